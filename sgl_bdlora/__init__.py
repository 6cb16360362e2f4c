"""Block-diagonal LoRA serving for SGLang (BD-LoRA, arXiv 2510.23346).

Importing this package imports neither torch nor sglang; `Engine` is resolved on first use.
"""

__version__ = "0.1.0"

__all__ = ["Engine", "__version__"]


def __getattr__(name: str):
    if name == "Engine":
        from sgl_bdlora.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
