"""Uploaded adapters: a zip, or the files of a folder, unpacked where a server on this machine can read them."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NEEDED = (CONFIG, WEIGHTS)
LIMIT_BYTES = 8 * 2**30
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class BadUpload(ValueError):
    """What was uploaded is no adapter; the message says why."""


def check_name(name: str) -> str:
    """Raises BadUpload for a name that makes no folder."""
    name = name.strip()
    if not _NAME.fullmatch(name):
        raise BadUpload("Give the adapter a name of letters, digits, dots, dashes and underscores (at most 64).")
    return name


def unpack(files: Sequence[str | Path], folder: Path) -> Path:
    """Put the adapter's two files into `folder`. files: one zip, or the files of an adapter's folder.

    Nothing else is unpacked, so no member's path can lead out of `folder`. Raises BadUpload.
    """
    paths = [Path(file) for file in files]
    folder.mkdir(parents=True, exist_ok=True)
    if len(paths) == 1 and paths[0].suffix.lower() == ".zip":
        _unzip(paths[0], folder)
    else:
        _copy(paths, folder)
    return folder


def _copy(paths: Sequence[Path], folder: Path) -> None:
    by_name = {path.name: path for path in paths}
    _complain(set(by_name))
    for name in NEEDED:
        (folder / name).write_bytes(by_name[name].read_bytes())


def _unzip(path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {}
            for member in archive.infolist():
                name = PurePosixPath(member.filename).name
                if name in NEEDED and not member.is_dir():
                    if name in members:
                        raise BadUpload(f"The zip holds {name} more than once; put one adapter into it.")
                    members[name] = member
            _complain(set(members))
            if sum(member.file_size for member in members.values()) > LIMIT_BYTES:
                raise BadUpload(f"The adapter is larger than {LIMIT_BYTES // 2**30} GiB.")
            for name, member in members.items():
                with archive.open(member) as source, (folder / name).open("wb") as target:
                    while block := source.read(2**20):
                        target.write(block)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise BadUpload(f"The zip cannot be read: {error}") from error


def _complain(found: set[str]) -> None:
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise BadUpload(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: PEFT's save_pretrained writes both."
        )
