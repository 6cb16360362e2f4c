"""SGLang's own server on a machine without a GPU: the process environment of sgl_bdlora.cpu, and no plugin.

Only environment variables and arguments are taken from sgl_bdlora.cpu; SGLANG_PLUGINS matches no plugin, so that
neither its hooks nor ours are in any process. With a GPU this is `python -m sglang.launch_server`.
"""

import os
import runpy
import sys

from sgl_bdlora import cpu, defaults
from sgl_bdlora.cpu.environment import bind_threads

if __name__ == "__main__":
    os.environ["SGLANG_PLUGINS"] = "none"
    cpu.prepare_environment()
    if cpu.applies():
        bind_threads(int(sys.argv[sys.argv.index("--tp-size") + 1]))
    sys.argv += defaults.as_flags(cpu.default_fields(defaults.given_fields(sys.argv)))
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
