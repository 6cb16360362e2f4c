"""`make docs`: a page for every module of the package, from its docstrings, in build/api."""

import argparse
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import sgl_bdlora

# They are for processes of their own, and act when they are imported.
APART = ("sgl_bdlora.cpu.preload", "sgl_bdlora.cpu.stubs")


def specifications() -> list[str]:
    """What pdoc takes: all modules that can be imported here, then "!expression" of those that cannot, as it goes into packages by itself.

    Modules whose extra is not installed are named on stderr.
    """
    from sgl_bdlora import cpu

    cpu.prepare_environment()
    found, without = ["sgl_bdlora"], [f"!{re.escape(name)}" for name in APART]
    for module in pkgutil.walk_packages(sgl_bdlora.__path__, "sgl_bdlora.", onerror=lambda name: None):
        if module.name.startswith(APART) or module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as missing:
            print(f"left out: {module.name} ({missing})", file=sys.stderr)
            without.append(f"!{re.escape(module.name)}$")
            continue
        found.append(module.name)
    return found + without


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "build" / "api", metavar="DIR")
    target = parser.parse_args().output
    names = specifications()
    import pdoc

    pdoc.render.configure(docformat="markdown", show_source=True, footer_text=f"sgl-bdlora {sgl_bdlora.__version__}")
    pdoc.pdoc(*names, output_directory=target)
    print(target / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
