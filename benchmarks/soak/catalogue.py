"""The adapters of a soak: a mix of structures and ranks, spoiled ones, and a pool that holds only some of them."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from zoo import Recipe, write_adapter
from zoo.adapters import ALL, ATTENTION, MLP

from sgl_bdlora.adapters import read_adapter
from sgl_bdlora.adapters.inspect import report

WEIGHTS = "adapter_model.safetensors"
_STRUCTURES = (2, None, 4, 2, 4)  # nblocks; None is a plain adapter
_RANKS = (8, 16, 4, 32, 8, 12, 24)
_TARGETS = (ALL, ALL, ATTENTION, ALL, MLP, ALL)


def recipes(count: int) -> list[Recipe]:
    """`count` different adapters. The cycles' lengths share no factor, so that ranks, structures and targets mix."""
    return [
        Recipe(
            f"a{i:02d}",
            rank=_RANKS[i % len(_RANKS)],
            nblocks=_STRUCTURES[i % len(_STRUCTURES)],
            targets=_TARGETS[i % len(_TARGETS)],
            seed=500 + i,
        )
        for i in range(count)
    ]


def write_adapters(model: Path, root: Path, count: int) -> list[Path]:
    return [write_adapter(model, recipe, root / recipe.name) for recipe in recipes(count)]


def pool_bytes(folders: list[Path], tp: int, sharding: str, oversubscribed: float) -> int:
    """Bytes per rank, in float32, of a pool that all adapters together would fill `oversubscribed` times."""
    return math.ceil(sum(_rank_bytes(folder, tp, sharding) for folder in folders) / oversubscribed)


def _rank_bytes(folder: Path, tp: int, sharding: str) -> int:
    adapter = read_adapter(folder, folder.name)
    split = sharding == "s-lora" and adapter.kind == "plain"
    return 4 * report(adapter, tp).per_rank["dense, s-lora" if split else "as served"]


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _poison(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    weights[min(weights)][-1, -1] = math.nan
    save_file(weights, folder / WEIGHTS)


def _move_layer(folder: Path) -> None:
    """Move a layer to where the model has none."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    save_file({name.replace("layers.1.", "layers.9."): w for name, w in weights.items()}, folder / WEIGHTS)


def _make_dora(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))


# How an adapter can be bad -> (what to do to a good one, a word that the refusal has to say).
SPOILS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, WEIGHTS),
    "not-finite": (_poison, "NaN"),
    "of-another-model": (_move_layer, "layers.9"),
    "dora": (_make_dora, "use_dora"),
    "without-weights": (lambda folder: (folder / WEIGHTS).unlink(), "safetensors"),
}


def write_spoiled(good: Path, root: Path) -> dict[Path, str]:
    """Bad copies of an adapter -> the word that the server's refusal has to contain."""
    spoiled = {}
    for kind, (spoil, word) in SPOILS.items():
        folder = root / f"bad-{kind}"
        shutil.copytree(good, folder)
        spoil(folder)
        spoiled[folder] = word
    return spoiled
