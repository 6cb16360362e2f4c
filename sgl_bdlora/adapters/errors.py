"""The exceptions that adapters and models are refused with."""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 8

_LONGEST = 2000


class _Refusal(ValueError):
    """A message of three parts: who is at fault, what is wrong, what to do about it."""

    subject: str

    def __init__(self, name: str, problem: str, fix: str) -> None:
        # All three go to args, so that the error survives pickling between SGLang's processes.
        super().__init__(name, problem, fix)
        self.name = name
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return one_line(f"{self.subject} {self.name!r}: {self.problem}. Fix: {self.fix}.")


class AdapterError(_Refusal):
    """An adapter that cannot be served or converted exactly as it was trained.

    adapter: the name the adapter is loaded under.
    problem: the file, field or tensor at fault with its value.
    fix: what the user can do about it, in the imperative.
    """

    subject = "LoRA adapter"

    @property
    def adapter(self) -> str:
        return self.name


class ModelError(_Refusal):
    """A model's configuration that cannot be understood, or that does not fit the tensor-parallel size asked for."""

    subject = "model"


def one_line(text: str) -> str:
    """`text` as it may stand in a log or an answer: names out of a file in it can neither break the line nor make it endless."""
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(value: object) -> str:
    """A one-line form of a value from an untrusted file, bounded in length."""
    try:
        return _SHORT.repr(value)
    except Exception:
        # An int of thousands of digits has no decimal repr (sys.set_int_max_str_digits).
        return f"<{type(value).__name__}>"
