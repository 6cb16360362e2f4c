"""`python -m sgl_bdlora.cluster.serving.child ARGUMENTS`: a replica's server, sgl_bdlora.launch_server.

It ends when its standard input does, and so with the process that started it, however that one ends. The directory that FOLDER_ENV
names, where that process puts adapters from peers, goes with it.
"""

import os
import shutil
import signal
import sys
import threading
import time

FOLDER_ENV = "BDLORA_REPLICA_ADAPTERS"


def main(argv: list[str]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from sgl_bdlora import launch_server

    launch_server.main(argv)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(os.environ[FOLDER_ENV], ignore_errors=True)
    # The starter made this process the leader of a group, in which its own children are too.
    os.killpg(0, signal.SIGTERM)
    time.sleep(5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
