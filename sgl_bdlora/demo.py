"""`python -m sgl_bdlora.demo`: a real server, a real model, eight adapters, one mixed batch.

Starts `sgl_bdlora.launch_server` on 127.0.0.1 with the demo model (SmolLM2-135M-Instruct) and the adapters of
examples/adapters, sends one batch in which the base model, block-diagonal and plain adapters run together, prints what each
answered and how fast, opens the page of app/ beside it, and stays up until Ctrl-C.

Plain adapters are served in S-LoRA's sharding, so that the page can compare it with the block-diagonal one in one engine.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sgl_bdlora.adapters import Adapter, read_adapter
from sgl_bdlora.demo_model import DemoModelError, ensure_demo_model
from sgl_bdlora.server_process import ServerProcess, StartFailed, end_group
from sgl_bdlora.sharding import HostLayer, HostSlice, Span, layout_for

ADAPTERS = Path(__file__).resolve().parent.parent / "examples" / "adapters"
# The demo model has 9 query and 3 kv heads: tensor parallelism 1 or 3. The adapters have 3 blocks.
TP = 3
START_LIMIT_S = 600
MAX_NEW_TOKENS = 48
# The demo model answers it alike in float32 and bfloat16, whatever the processor's rounding.
BASE_PROMPT = "What is the capital of France?"

console = Console()


@dataclass(frozen=True)
class Request:
    """One request of the mixed batch. adapter: None for the base model."""

    adapter: Adapter | None
    prompt: str


@dataclass(frozen=True)
class Answer:
    """text, seconds to the first token, and output tokens a second after it (None for a single token)."""

    text: str
    ttft_s: float
    tokens_per_s: float | None


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    # Also when it is told to end, or was started in the background, where a shell has Ctrl-C ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return run(args)
    except (DemoModelError, DemoError, StartFailed) as problem:
        # A log has brackets of its own.
        console.print(str(problem), style="bold red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why and what to do."""


def run(args: argparse.Namespace) -> int:
    check_machine([args.port] if args.once else [args.port, args.app_port])
    adapters = load_adapters(args.adapters)
    model = args.model or ensure_demo_model()
    tp = args.tp or default_tp()
    log = Path(args.log).resolve()
    console.print(f"Starting the server: {model.name}, tensor parallelism {tp}, {len(adapters)} adapters (log: {log})")
    server, page = make_server(model, tp, adapters, args.port, log), None
    server.start()
    try:
        wait_until_ready(server)
        requests = [Request(None, BASE_PROMPT)]
        requests += [Request(adapter, prompt) for adapter, prompt in adapters.values()]
        console.print(f"Sending one mixed batch of {len(requests)} requests ...")
        answers = asyncio.run(send_batch(args.port, requests))
        console.print(results_table(requests, answers, tp))
        if args.once:
            return 0
        # Not through the console, which would break the command into lines.
        print(how_to_call(args.port, requests[1]), flush=True)
        page = start_page(args.port, args.app_port)
        while server.ended() is None:
            if page is not None and page.poll() is not None:
                console.print(f"The page ended (exit code {page.returncode}); the server stays up.")
                page = None
            time.sleep(0.5)
        raise DemoError(
            f"The server ended by itself (exit code {server.ended()}). The end of its log:\n{server.tail()}"
        )
    except KeyboardInterrupt:
        console.print("Stopping.")
        return 0
    finally:
        if page is not None:
            end_group(page)
        server.stop()


def check_machine(ports: list[int]) -> None:
    """Refuse early, with the way out, what would fail late."""
    for port, variable in zip(ports, ("PORT", "APP_PORT"), strict=False):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise DemoError(
                    f"Port {port} is in use. Choose another one: make demo {variable}={port + 1}"
                ) from error
    cores = len(os.sched_getaffinity(0))
    if cores < 2 and not _gpus():
        raise DemoError(f"The demo needs 2 CPU cores or a GPU; this process may use {cores} core.")


def load_adapters(directory: Path) -> dict[str, tuple[Adapter, str]]:
    """name -> (adapter, sample prompt), as examples/adapters/index.json lists them."""
    index = directory / "index.json"
    if not index.is_file():
        raise DemoError(f"{index} is missing. Run from a full checkout, or name a folder of adapters with --adapters.")
    entries = json.loads(index.read_text())
    return {e["name"]: (read_adapter(directory / e["name"], e["name"]), e["sample_prompt"]) for e in entries}


def default_tp() -> int:
    gpus = _gpus()
    return TP if gpus == 0 or gpus >= TP else 1


def make_server(model: Path, tp: int, adapters: dict, port: int, log: Path) -> ServerProcess:
    command = [sys.executable, "-m", "sgl_bdlora.launch_server", "--model-path", str(model), "--tp", str(tp)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "smollm2"]
    command += [
        "--max-loras-per-batch",
        str(len(adapters) + 1),
        "--max-total-tokens",
        "16384",
        "--lora-pool-gb",
        "0.25",
    ]
    if not _gpus():
        # On CPUs without bfloat16 units float32 decodes about a fifth faster.
        command += ["--dtype", "float32"]
    command += ["--lora-sharding", "s-lora"]
    command += ["--lora-paths", *(f"{name}={adapter.source}" for name, (adapter, _) in adapters.items())]
    return ServerProcess(command, {}, f"http://127.0.0.1:{port}", log, START_LIMIT_S)


def wait_until_ready(server: ServerProcess) -> None:
    begin = time.monotonic()
    with console.status("Server starting ...") as status:
        server.wait(lambda seconds, line: status.update(f"Server starting, {seconds:.0f} s: {escape(line[:100])}"))
    console.print(f"Server ready after {time.monotonic() - begin:.0f} s.")


async def send_batch(port: int, requests: list[Request]) -> list[Answer]:
    """All requests at once, streamed, so that the server runs them as one batch."""
    # Without trust_env a proxy of the environment cannot come between.
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client:
        return await asyncio.gather(*(send(client, request) for request in requests))


async def send(client: httpx.AsyncClient, request: Request) -> Answer:
    model = f"smollm2:{request.adapter.name}" if request.adapter else "smollm2"
    body = {
        "model": model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin, first, last, text, tokens = time.perf_counter(), None, None, "", 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise DemoError(f"{model}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            delta = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
            if delta:
                last = time.perf_counter()
                first = first or last
                text += delta
    if first is None:
        return Answer("(empty)", time.perf_counter() - begin, None)
    rate = (tokens - 1) / (last - first) if tokens > 1 and last > first else None
    return Answer(text.strip(), first - begin, rate)


def results_table(requests: list[Request], answers: list[Answer], tp: int) -> Table:
    table = Table(title=f"One mixed batch, tensor parallelism {tp}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("adapter", no_wrap=True)
    table.add_column("rank", justify="right")
    table.add_column("local", justify="right")
    table.add_column("prompt and answer", overflow="fold", ratio=1)
    table.add_column("first\ntoken", justify="right", no_wrap=True)
    table.add_column("tokens\n/ s", justify="right", no_wrap=True)
    for request, answer in zip(requests, answers, strict=True):
        adapter = request.adapter
        name, kind = (adapter.name, adapter.kind) if adapter else ("(none)", "base model")
        ranks = (str(adapter.rank), str(local_rank(adapter, tp))) if adapter else ("-", "-")
        rate = f"{answer.tokens_per_s:.1f}" if answer.tokens_per_s else "-"
        words = Text.assemble((request.prompt, "dim"), "\n", answer.text, "\n")
        table.add_row(Text.assemble(name, "\n", (kind, "dim")), *ranks, words, f"{answer.ttft_s:.2f} s", rate)
    table.caption = "rank: as trained; local: what one rank of the server holds and computes"
    return table


def local_rank(adapter: Adapter, tp: int) -> int:
    """The rank that one of `tp` ranks keeps of the adapter's widest query projection."""
    module = next(m for path, m in adapter.modules.items() if path.endswith("q_proj"))
    outputs = Span.shard(module.out_features // tp, 0, module.out_features)
    host = HostSlice("q_proj", Span.whole(module.in_features), outputs, 0)
    layer = HostLayer(module.path, "column", (host,), 0, tp)
    return layout_for(adapter.name, module, layer, host, "replicated").local_rank


def how_to_call(port: int, example: Request) -> str:
    body = {
        "model": f"smollm2:{example.adapter.name}",
        "messages": [{"role": "user", "content": example.prompt}],
        "max_tokens": 48,
    }
    return (
        f"The server is up at http://127.0.0.1:{port} (Ctrl-C stops it). Call it from another terminal:\n\n"
        f"  curl -s http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d '{json.dumps(body)}'\n"
    )


def start_page(port: int, app_port: int) -> subprocess.Popen | None:
    """Start the page for the server, which prints its address when it is up; None where it is not installed."""
    if importlib.util.find_spec("gradio") is None or importlib.util.find_spec("app") is None:
        print("For the page that compares the shardings live, run from a checkout with: pip install -e '.[app]'")
        return None
    command = [sys.executable, "-m", "app", "--server", f"http://127.0.0.1:{port}", "--port", str(app_port)]
    # Of its own session, so that Ctrl-C reaches it through us only.
    return subprocess.Popen(command, start_new_session=True)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sgl_bdlora.demo", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--port", type=int, default=30000, help="port on 127.0.0.1 (default: 30000)")
    parser.add_argument(
        "--tp", type=int, choices=(1, 3), help="tensor-parallel size; default 3, or 1 with one or two GPUs"
    )
    parser.add_argument("--model", type=Path, help="model folder instead of the demo model")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder with index.json and adapters")
    parser.add_argument("--log", default="demo-server.log", help="file for the server's log")
    parser.add_argument("--app-port", type=int, default=7860, help="port of the page on 127.0.0.1 (default: 7860)")
    parser.add_argument("--once", action="store_true", help="stop after the batch: no page, nothing stays up")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
