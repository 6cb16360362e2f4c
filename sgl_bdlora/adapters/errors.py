"""The one exception that adapters are refused with."""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 8


class AdapterError(ValueError):
    """An adapter that cannot be served exactly as it was trained.

    adapter: the name the adapter is loaded under.
    problem: the file, field or tensor at fault with its value.
    fix: what the user can do about it, in the imperative.
    """

    def __init__(self, adapter: str, problem: str, fix: str) -> None:
        # All three go to args, so that the error survives pickling between SGLang's processes.
        super().__init__(adapter, problem, fix)
        self.adapter = adapter
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"LoRA adapter {self.adapter!r}: {self.problem}. Fix: {self.fix}."


def show(value: object) -> str:
    """A one-line form of a value from an untrusted file, bounded in length."""
    try:
        return _SHORT.repr(value)
    except Exception:
        # An int of thousands of digits has no decimal repr (sys.set_int_max_str_digits).
        return f"<{type(value).__name__}>"
