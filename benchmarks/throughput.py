"""Decode throughput of a running server: one streamed request for each name given, all at once, several times.

    python benchmarks/throughput.py --url http://127.0.0.1:30000 --tokens 48 base base json-bd sql-lora

`base` is a request without an adapter. Prints tokens a second over all requests and the slowest time to the first token.
"""

import argparse
import asyncio
import time

import httpx

PROMPT = "Tell me a long story about a dog and a cat."


async def one(client: httpx.AsyncClient, name: str, tokens: int) -> float:
    """Seconds to the first token."""
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = {"text": PROMPT, "sampling_params": sampling, "stream": True}
    if name != "base":
        body["lora_path"] = name
    begin, first = time.perf_counter(), None
    async with client.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and first is None:
                first = time.perf_counter() - begin
    return first


async def main(args: argparse.Namespace) -> None:
    async with httpx.AsyncClient(base_url=args.url, timeout=600) as client:
        for _ in range(args.repeats):
            begin = time.perf_counter()
            firsts = await asyncio.gather(*(one(client, name, args.tokens) for name in args.names))
            rate = len(args.names) * args.tokens / (time.perf_counter() - begin)
            print(
                f"{len(args.names)} requests of {args.tokens}: {rate:.1f} tokens/s, first token within {max(firsts):.2f} s"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="adapter of each request; base for none")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--tokens", type=int, default=48, help="output tokens of each request (default: 48)")
    parser.add_argument("--repeats", type=int, default=3)
    asyncio.run(main(parser.parse_args()))
