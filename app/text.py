"""Words and numbers for readers, and the end of an answer."""

import re
from html import escape

# End marks of common chat formats, as they appear when special tokens are shown.
_END = re.compile(r"<\|[a-z_]*(?:end|eot|eos)[a-z_]*\|>|</s>|<eos>|<end_of_turn>|<｜end▁of▁sentence｜>")


def until_end(text: str) -> tuple[str, bool]:
    """An answer up to its first end mark, and whether there was one."""
    found = _END.search(text)
    return (text[: found.start()], True) if found else (text, False)


def seconds(value: float | None) -> str:
    """ "1.23 s", "45.6 ms"; "–" for None."""
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value < 0.9995 else "1.00 s"


def count(value: float) -> str:
    """A whole number with thousands apart: 1 234 567 (narrow no-break spaces)."""
    return f"{value:,.0f}".replace(",", "\u202f")


def size(value: float) -> str:
    """Bytes in KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1024
    return f"{value:.3g} GiB"


def table(head: list[str], rows: list[list[str]], caption: str) -> str:
    """An HTML table of escaped cells; the first cell of a row is its heading."""
    body = "".join(
        f"<tr><th scope='row'>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    heads = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in head)
    title = escape(caption, quote=True)
    return (
        f"<p class='aside'>{title}</p><div class='scroll' tabindex='0'><table aria-label='{title}'>"
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def message(kind: str, words: str) -> str:
    """A framed message. kind: "bad", "good" or "note"; each has its sign, so that colour is not all that tells."""
    sign = {"bad": "✕", "good": "✓", "note": "i"}[kind]
    role = "alert" if kind == "bad" else "status"
    return f"<div class='message {kind}' role='{role}'><span class='sign' aria-hidden='true'>{sign}</span><p>{escape(words)}</p></div>"
