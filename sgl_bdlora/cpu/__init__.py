"""What SGLang's own engine needs to run on a machine without a GPU.

SGLang runs on CPUs with its CPU kernels (a separate build of `sgl_kernel`, not on the package index). Where neither a
GPU nor that build exists, this package makes the ordinary wheels start and serve with PyTorch's operators, for
development, tests and the demo. Everywhere else every function here does nothing.

Importing this package imports neither torch nor sglang.
"""

from sgl_bdlora.cpu.arguments import default_fields
from sgl_bdlora.cpu.detect import applies
from sgl_bdlora.cpu.environment import prepare_environment
from sgl_bdlora.cpu.hooks import register_hooks
from sgl_bdlora.cpu.processes import start_fork_server

__all__ = [
    "applies",
    "default_fields",
    "prepare_environment",
    "register_hooks",
    "start_fork_server",
]
