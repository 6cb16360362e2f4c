"""`python -m app --server URL [--compare-server URL]`: the page, on 127.0.0.1 unless told otherwise."""

import argparse
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

# Read by Gradio and its hub client when they are imported: nothing may leave this machine.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    check_address(args.host, args.port)
    from app.client import Server
    from app.context import Context
    from app.page import build
    from app.theme import CSS, theme

    keys = os.environ.get("BDLORA_API_KEY"), os.environ.get("BDLORA_ADMIN_KEY")
    with tempfile.TemporaryDirectory(prefix="sgl-bdlora-app-") as folder:
        compare = Server(args.compare_server, *keys) if args.compare_server else None
        context = Context(Server(args.server, *keys), compare, Path(folder), args.cluster)
        demo = build(context)
        _, address, _ = demo.launch(
            server_name=args.host,
            server_port=args.port,
            auth=args.auth,
            theme=theme(),
            css=CSS,
            footer_links=["settings"],
            allowed_paths=[folder],
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"The page is up at {address} (Ctrl-C stops it)", flush=True)
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
        print("Stopping.", flush=True)
        demo.close(verbose=False)
    return 0


def check_address(host: str, port: int) -> None:
    """End the process with a clear message when the address is taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SystemExit(
                f"app: cannot listen on {host}:{port} ({error.strerror}); choose another --port"
            ) from error


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__.partition(": ")[2].strip())
    parser.add_argument(
        "--server", default="http://127.0.0.1:30000", metavar="URL", help="server to show (default: %(default)s)"
    )
    parser.add_argument(
        "--compare-server",
        metavar="URL",
        help="second server for the plain adapters, started with --lora-sharding s-lora; without it --server runs both sides",
    )
    parser.add_argument(
        "--cluster", metavar="URL", help="cluster to draw on a page of its own (python -m sgl_bdlora.cluster serve)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port (default: %(default)s)")
    parser.add_argument(
        "--auth",
        type=credentials,
        action="append",
        metavar="USER:PASSWORD",
        help="ask for a name and a password (may be repeated); also read from BDLORA_APP_AUTH, separated by commas",
    )
    args = parser.parse_args(argv)
    if not args.auth and os.environ.get("BDLORA_APP_AUTH"):
        args.auth = [credentials(word) for word in os.environ["BDLORA_APP_AUTH"].split(",")]
    return args


def credentials(word: str) -> tuple[str, str]:
    user, colon, password = word.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError("has to be USER:PASSWORD")
    return user, password


if __name__ == "__main__":
    sys.exit(main())
