"""`python -m sgl_bdlora.launch_server`: SGLang's server with block-diagonal LoRA.

Takes every argument of `python -m sglang.launch_server` and ours. Unless told otherwise it enables LoRA with our back end, and on
a machine without a GPU adds the arguments that SGLang needs there.
"""

import os
import sys

from sgl_bdlora import cpu, defaults


def main(argv: list[str]) -> None:
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
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main(sys.argv[1:])
