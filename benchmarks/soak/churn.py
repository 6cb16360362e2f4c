"""The operator of a soak: loads, renames, swaps and unloads adapters, and does what has to be refused."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from harness import Ask

from .clients import TIMEOUT_S, Refused, Tally, send
from .names import Names
from .references import References, difference

MOST_GUESTS = 4
PAUSE_S = (0.1, 0.9)


class Operator(threading.Thread):
    """Does one thing after another until `end` is set.

    folders: directories of all good adapters. spoiled: bad directory -> a word that its refusal has to contain.
    """

    def __init__(
        self,
        url: str,
        names: Names,
        references: References,
        tally: Tally,
        end: threading.Event,
        seed: str,
        folders: list[Path],
        spoiled: dict[Path, str],
    ):
        super().__init__(daemon=True)
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S)
        self._names, self._references, self._tally, self._end = names, references, tally, end
        self._folders, self._spoiled = folders, spoiled
        self._rng = random.Random(seed)
        self._guests: list[str] = []
        self._number = 0

    def run(self) -> None:
        actions = {
            self._new_guest: 3,
            self._other_files_same_name: 3,
            self._ask_for_an_unloaded_one: 1,
            self._load_a_bad_one: 2,
            self._load_a_taken_name: 1,
            self._ask_for_an_unknown_one: 1,
        }
        while not self._end.wait(self._rng.uniform(*PAUSE_S)):
            action = self._rng.choices(list(actions), list(actions.values()))[0]
            try:
                action()
            except Exception as error:
                self._tally.fail(f"operator: {action.__name__}: {error!r}")

    # What has to work

    def _new_guest(self) -> None:
        """Files that are served already, under a name that never was."""
        self._number += 1
        name, folder = f"guest-{self._number}", self._rng.choice(self._folders)
        self._load(name, folder)
        self._guests.append(name)
        self._names.open(name, folder, rank=self._rng.randrange(8))
        if len(self._guests) > MOST_GUESTS:
            leaving = self._guests.pop(0)
            self._names.close(leaving, forget=True)
            self._unload(leaving)

    def _other_files_same_name(self) -> None:
        """A stale answer, from old weights or from the prefix cache of the old ones, would differ from the new reference."""
        name, _ = self._rng.choice(sorted(self._names.folders().items()))
        self._names.close(name)
        self._unload(name)
        folder = self._rng.choice(self._folders)
        self._load(name, folder)
        self._names.open(name, folder)
        self._tally.add("swaps")

    def _ask_for_an_unloaded_one(self) -> None:
        """SGLang reads an adapter that it once knew again; several requests at the same time have to be served too."""
        name, folder = self._rng.choice(sorted(self._names.folders().items()))
        self._names.close(name)
        self._unload(name)
        ask = self._rng.choice(self._references.asks)
        asks = [Ask(ask.prompt, name, folder, ask.new_tokens, prompt_logprobs=False)] * 3
        with ThreadPoolExecutor(len(asks)) as pool:
            answers = [pool.submit(send, self._http, "whole", [ask]) for ask in asks]
        for answer in answers:
            wrong = answer.exception() or difference(self._references.of(folder, ask), answer.result()[0])
            if wrong:
                self._tally.fail(f"one of 3 requests at once for the unloaded adapter {name}: {wrong}")
        self._names.open(name, folder)
        self._tally.add("read_again")

    # What has to be refused

    def _load_a_bad_one(self) -> None:
        folder, word = self._rng.choice(list(self._spoiled.items()))
        self._refused(folder.name, folder, word)

    def _load_a_taken_name(self) -> None:
        name = self._rng.choice(sorted(self._names.folders()))
        self._refused(name, self._rng.choice(self._folders), name)

    def _ask_for_an_unknown_one(self) -> None:
        ask = self._references.asks[0]
        try:
            send(self._http, "whole", [Ask(ask.prompt, "never-loaded", None, 4)])
        except Refused as refusal:
            if "400 " in str(refusal) and "never-loaded" in str(refusal):
                self._tally.add("refused_as_expected")
                return
            raise
        raise AssertionError("a request for an adapter that was never loaded was answered")

    def _refused(self, name: str, folder: Path, word: str) -> None:
        response = self._post("load", name, folder)
        message = response.json().get("error_message", "")
        if response.status_code == 400 and all(part in message for part in (name, word, "Fix: ")):
            self._tally.add("refused_as_expected")
        else:
            raise AssertionError(f"loading {folder} as {name} got {response.status_code} {response.text}")

    # Requests to the server

    def close_all(self) -> None:
        """Unload everything."""
        for name in self._names.folders():
            self._names.close(name)
            self._unload(name)
        self._http.close()

    def _load(self, name: str, folder: Path) -> None:
        self._succeed(self._post("load", name, folder), f"loading {folder} as {name}")
        self._tally.add("loaded")

    def _unload(self, name: str) -> None:
        """Unload a closed name while requests for it may be running. A request that arrives just behind makes SGLang read the adapter
        again, so when the last one is answered, look."""
        self._succeed(self._post("unload", name), f"unloading {name}")
        if not self._names.wait_until_idle(name, 2 * TIMEOUT_S):
            raise AssertionError(f"requests for {name} have not ended")
        if name in {adapter["name"] for adapter in self._http.get("/bdlora/info").json()["adapters"]}:
            self._succeed(self._post("unload", name), f"unloading {name} once more")
            self._tally.add("unloaded_twice")
        self._tally.add("unloaded")

    def _post(self, verb: str, name: str, folder: Path | None = None) -> httpx.Response:
        body = {"lora_name": name} if folder is None else {"lora_name": name, "lora_path": str(folder)}
        return self._http.post(f"/{verb}_lora_adapter", json=body)

    def _succeed(self, response: httpx.Response, what: str) -> None:
        if response.status_code != 200 or not response.json()["success"]:
            raise AssertionError(f"{what} got {response.status_code} {response.text}")
