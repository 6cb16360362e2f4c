"""Adapters in programs of SGLang's frontend language (sgl.function, sgl.gen, sgl.select, fork, run_batch).

    @sgl.function
    def ask(s, question):
        s += sgl.user(question)
        for branch in fork(s, ["json", "pirate"]):                  # branches that run as one batch on the server
            branch += sgl.assistant(sgl.gen("answer"))
        s += sgl.assistant(on("sql", sgl.gen("query")))             # one call
        s += use("sentiment")                                       # from here on

    ask.run("How many customers live in Oslo?", backend=Endpoint("http://127.0.0.1:30000", adapter="sql"))

None stands for the base model everywhere. Only a client of the server's HTTP routes: nothing here runs in the server.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sglang.lang.interpreter import ProgramState, ProgramStateGroup, StreamExecutor
from sglang.lang.ir import SglConstantText, SglExpr, SglExprList, SglSamplingParams, SglSelect
from sglang.utils import http_request

from sgl_bdlora.adapters.errors import AdapterError


class Endpoint(RuntimeEndpoint):
    """A running server as the backend of programs, bound to one of its adapters.

    adapter: what a program starts with. Other arguments are RuntimeEndpoint's. Raises AdapterError, which names the loaded
    adapters, when the server does not have this one.
    """

    adapter: str | None = None

    def __init__(self, base_url: str, adapter: str | None = None, **arguments):
        super().__init__(base_url, **arguments)
        self._outer = self
        if adapter is not None:
            self.require([adapter])
            self.adapter = adapter

    def bind(self, adapter: str | None) -> Endpoint:
        """The same server, bound to another adapter. Raises AdapterError."""
        self.require([adapter])
        return self._bound(adapter)

    def adapters(self) -> list[str]:
        """The names of the adapters that are loaded now."""
        response = http_request(self.base_url + "/v1/models", api_key=self.api_key, verify=self.verify)
        super()._assert_success(response)
        return sorted(model["id"] for model in response.json()["data"] if model.get("parent"))

    def require(self, adapters: Sequence[str | None]) -> None:
        """Raise AdapterError unless all of these are loaded."""
        wanted = [adapter for adapter in adapters if adapter is not None]
        loaded = self.adapters() if wanted else []
        for adapter in wanted:
            # One that --max-loaded-loras has put out is not listed, and comes back when it is asked for.
            if adapter not in loaded and self._compute(" ", adapter).status_code != 200:
                raise AdapterError(
                    adapter,
                    f"it is not loaded on {self.base_url}, which has {', '.join(map(repr, loaded)) or 'no adapters'}",
                    "use one of these, or load it with --lora-paths or POST /load_lora_adapter",
                )

    def _bound(self, adapter: str | None) -> Endpoint:
        bound = copy.copy(self)
        bound.adapter = adapter
        return bound

    def _entered(self, adapter: str | None) -> Endpoint:
        bound = self._bound(adapter)
        bound._outer = self
        return bound

    def _add_images(self, s: StreamExecutor, data: dict) -> None:
        """Every request that RuntimeEndpoint sends for a program passes here, but for cache_prefix's."""
        super()._add_images(s, data)
        data["lora_path"] = self.adapter

    def cache_prefix(self, prefix_str: str) -> None:
        self._assert_success(self._compute(prefix_str, self.adapter))

    def _compute(self, text: str, adapter: str | None):
        data = {"text": text, "sampling_params": {"max_new_tokens": 0}, "lora_path": adapter}
        return http_request(self.base_url + "/generate", json=data, api_key=self.api_key, verify=self.verify)

    def generate_stream(self, s: StreamExecutor, sampling_params: SglSamplingParams) -> Iterator[tuple[str, dict]]:
        try:
            yield from super().generate_stream(s, sampling_params)
        except Exception as error:
            s.error_ = self._stream_error(error)  # for `result`: here the variable is there, with less text or none
            raise s.error_ from error

    def _stream_error(self, error: Exception) -> Exception:
        # A refusal comes with status 200, as an event without text (http_server.py:generate_request).
        if not isinstance(error, KeyError):
            return error
        try:
            self.require([self.adapter])
        except AdapterError as unknown:
            return unknown
        return RuntimeError(f"{self.base_url} ended the stream with an error; its log says which")

    def select(
        self, s: StreamExecutor, choices: list[str], temperature: float, choices_method: ChoicesSamplingMethod
    ) -> ChoicesDecision:
        if isinstance(choices_method, _Switch):
            s.backend = choices_method.next(self)
            return ChoicesDecision("")
        return super().select(s, choices, temperature, choices_method)

    def _generate_http_request(self, s: StreamExecutor, data: dict):
        """select's requests. RuntimeEndpoint.select expects scores where the server has None, and all of them where it sends none.

        The server answers logprob_start_len = i with None for token i, as nothing before it was looked at; select takes the first
        entry for the token before the choice. It asks for the unconditional scores without saying where they begin.
        """
        start = data.get("logprob_start_len")
        if data.get("return_logprob") and start is None:
            data["logprob_start_len"] = 0
        answers = super()._generate_http_request(s, data)
        if start is not None:
            for answer in answers:
                scores = answer["meta_info"]["input_token_logprobs"]
                answer["meta_info"]["input_token_logprobs"] = scores[scores[0][0] is None :]
        return answers

    def _assert_success(self, res) -> None:
        if res.status_code != 200:
            self.require([self.adapter])
        super()._assert_success(res)


@dataclass(frozen=True)
class _Switch(ChoicesSamplingMethod):
    """Which endpoint an executor talks to next.

    An executor knows a closed set of expressions (StreamExecutor._execute). The one that hands an object of ours to the backend,
    in turn and together with the executor, is a select: between one empty choice, which adds nothing to the text.
    """

    next: Callable[[Endpoint], Endpoint]

    def __call__(self, **_) -> ChoicesDecision:
        raise TypeError("a program that chooses adapters needs an sgl_bdlora.frontend.Endpoint as its backend")

    def expression(self) -> SglExpr:
        return SglSelect(None, [""], 0.0, self)


def use(adapter: str | None) -> SglExpr:
    """`s += use("sql")`: everything after it in this state, and in states forked from it, is for this adapter."""
    return _Switch(lambda endpoint: endpoint._bound(adapter)).expression()


def on(adapter: str | None, expression: SglExpr | str) -> SglExpr:
    """`s += on("sql", sgl.gen("query"))`: only this expression is for this adapter.

    expression: anything that a state takes, such as gen, select, a role with them inside, or a sum.
    """
    if isinstance(expression, str):
        expression = SglConstantText(expression)
    enter = _Switch(lambda endpoint: endpoint._entered(adapter)).expression()
    leave = _Switch(lambda endpoint: endpoint._outer).expression()
    return SglExprList([enter, expression, leave])


def fork(s: ProgramState, adapters: Sequence[str | None]) -> ProgramStateGroup:
    """Like `s.fork(len(adapters))`, with branch i for adapters[i]; the branches' requests run as one batch on the server.

    Cached prefixes belong to an adapter, so the text so far is computed once for each; for an adapter that is named several times
    before its branches start. Raises AdapterError.
    """
    executor = getattr(s, "stream_executor", None)  # a program that is only traced has none
    if executor is not None:
        executor.sync()
        _prepare(executor, adapters)
    group = ProgramStateGroup([s.fork(1)[0] for _ in adapters], s)
    for state, adapter in zip(group.states, adapters, strict=True):
        state += use(adapter)
    return group


def _prepare(executor: StreamExecutor, adapters: Sequence[str | None]) -> None:
    endpoint = executor.backend
    if not isinstance(endpoint, Endpoint):
        raise TypeError(f"fork over adapters needs an sgl_bdlora.frontend.Endpoint as backend, not {endpoint!r}")
    endpoint.require(adapters)
    for adapter, branches in Counter(adapters).items():
        if branches > 1 and executor.text_:
            endpoint._bound(adapter).commit_lazy_operations(executor)


def result(s: ProgramState, name: str) -> str | list[str]:
    """`s[name]`, but raises what went wrong in this state: SGLang warns of it, and has no such variable or an empty one."""
    executor = s.stream_executor
    try:
        value = s[name]
    except KeyError:
        # The thread is ending; it notes the error after it has released those that wait for variables.
        executor.worker.join()
        if executor.error_ is None:
            raise
    if executor.error_ is not None:
        raise executor.error_
    return value
