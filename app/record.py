"""A finished run as JSON, which can be opened again, and as CSV, for spreadsheets."""

import csv
import io
import json
from dataclasses import asdict, dataclass

from app.measure import Answer, Batch

FORMAT = "sgl-bdlora comparison"
VERSION = 1
COLUMNS = (
    "repeat", "arm", "request", "adapter", "prompt", "tokens", "prompt_tokens", "cached_tokens", "first_token_ms",
    "per_token_ms", "end_to_end_ms", "text",
)  # fmt: skip


class NotARecord(ValueError):
    """The file is no saved comparison; the message says why."""


@dataclass(frozen=True)
class Arm:
    """What one arm ran with. parameters and bytes_per_rank: sums over its adapters; collectives: added to each step."""

    key: str
    title: str
    server: str
    adapters: tuple[str, ...]
    ranks: tuple[int, ...]
    parameters: int
    bytes_per_rank: int
    collectives: int


@dataclass(frozen=True)
class Record:
    """A run: arms, batches, and the note of what was compared as (what, value) lines. on_cpu: times only show the idea."""

    made: str
    arms: tuple[Arm, ...]
    batches: tuple[Batch, ...]
    note: tuple[tuple[str, str], ...]
    on_cpu: bool
    error: str | None = None


def to_json(record: Record) -> str:
    return json.dumps({"format": FORMAT, "version": VERSION, **asdict(record)}, indent=1, ensure_ascii=False)


def from_json(text: str | bytes) -> Record:
    """Raises NotARecord."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise NotARecord(f"This file is not JSON: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise NotARecord("This file is JSON, but not a comparison that this page saved.")
    if body.get("version") != VERSION:
        raise NotARecord(f"This comparison has version {body.get('version')}; this page reads version {VERSION}.")
    try:
        return Record(
            made=str(body["made"]),
            arms=tuple(
                Arm(**{**arm, "adapters": tuple(arm["adapters"]), "ranks": tuple(arm["ranks"])}) for arm in body["arms"]
            ),
            batches=tuple(
                Batch(**{**batch, "answers": tuple(Answer(**answer) for answer in batch["answers"])})
                for batch in body["batches"]
            ),
            note=tuple((str(what), str(value)) for what, value in body["note"]),
            on_cpu=bool(body["on_cpu"]),
            error=body["error"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise NotARecord(f"This comparison is damaged: {error!r}") from error


def to_csv(record: Record) -> str:
    """One line for each request of each batch; times in milliseconds from sending the batch, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for batch in record.batches:
        for number, answer in enumerate(batch.answers):
            times = (_ms(answer.first_s), _ms(answer.per_token_s), _ms(answer.last_s))
            counts = (answer.tokens, answer.prompt_tokens, answer.cached_tokens)
            row = (
                batch.repeat + 1,
                batch.arm,
                number,
                answer.adapter or "",
                answer.prompt,
                *counts,
                *times,
                answer.text,
            )
            writer.writerow([_safe(cell) for cell in row])
    return out.getvalue()


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def _safe(cell: object) -> object:
    """Spreadsheets run a text that begins like a formula; a leading apostrophe stops that."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
