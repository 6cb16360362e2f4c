"""`python -m sgl_bdlora.launch_server`: SGLang's server with block-diagonal LoRA.

Takes every argument of `python -m sglang.launch_server` and ours. Unless told otherwise it enables LoRA with our back end, and on
a machine without a GPU adds the arguments that SGLang needs there.
"""

import os
import socket
import sys

from sgl_bdlora import cpu, defaults


def check_port(host: str, port: int) -> None:
    """End the process now when the address is taken: SGLang finds out only after it has loaded the model, and then hangs."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SystemExit(
                f"sgl-bdlora: cannot listen on {host}:{port} ({error.strerror}); choose another --port"
            ) from error


def main(argv: list[str]) -> None:
    """argv: the command line's words."""
    cpu.prepare_environment()
    cpu.start_fork_server()
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    from sgl_bdlora import plugin

    load_plugins()
    plugin.verify_hooks()
    server_args = prepare_server_args(argv + defaults.arguments(argv))
    check_port(server_args.host, server_args.port)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main(sys.argv[1:])
