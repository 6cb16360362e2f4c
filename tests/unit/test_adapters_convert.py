"""`convert` and `re-block`: what PEFT computes with the result, the fits' optimality, reports, refusals, nothing left half done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from zoo import RECIPES, Recipe

from sgl_bdlora.adapters import AdapterError, dense_form, read_adapter
from sgl_bdlora.adapters.__main__ import main
from sgl_bdlora.adapters.convert import re_block, to_block_diagonal, to_dense
from sgl_bdlora.adapters.hosts import ROW_PARALLEL, leaf_of

FAMILY = "llama"
TOLERANCE = 1e-5
PROMPT = [(7 * i) % 509 + 3 for i in range(40)]
BLOCK_DIAGONAL = [name for name, recipe in RECIPES.items() if recipe.nblocks]
PLAIN = [name for name, recipe in RECIPES.items() if not recipe.nblocks]
WITH_EMBEDDING = ("plain-vocabulary", "plain-embedding")
CONVERTIBLE = [name for name in PLAIN if name not in (*WITH_EMBEDDING, "plain-head")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Everything is tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def source(zoo):
    return lambda recipe: zoo.adapter(FAMILY, recipe)


def same_logits(zoo, one: Path, other: Path) -> None:
    """Transformers + PEFT answer alike with both adapters, and not as the base model does."""
    oracle = zoo.oracle(FAMILY)
    a, b, base = (oracle.score(PROMPT, folder).all for folder in (one, other, None))
    assert (a - b).abs().max() < TOLERANCE
    assert (a - base).abs().max() > 0.1


def update(module) -> torch.Tensor:
    a, b = dense_form(module)
    return module.scale * (b.double() @ a.double())


def blocks_of(path: str, matrix: torch.Tensor, blocks: int):
    """Row blocks of a column-parallel layer's update, column blocks of a row-parallel one's."""
    return matrix.chunk(blocks, dim=1 if leaf_of(path) in ROW_PARALLEL else 0)


def optimum(block: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(block, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def assert_optimal(before: Path, after: Path, nblocks: int, report) -> None:
    """Block by block torch's truncated SVD, scale included, and the report's numbers are those of the matrices."""
    old, new = read_adapter(before).modules, read_adapter(after).modules
    assert old.keys() == new.keys() == {m.path for m in report.modules}
    for m in report.modules:
        if m.how == "carried":
            continue
        was, now = update(old[m.path]), update(new[m.path])
        assert new[m.path].rank == m.rank
        pairs = zip(blocks_of(m.path, was, nblocks), blocks_of(m.path, now, nblocks), strict=True)
        best = [(optimum(x, m.rank // nblocks), y) for x, y in pairs]
        for x, y in best:
            assert (x - y).norm() < 1e-4 * was.norm()
        assert m.relative_error == pytest.approx(((was - now).norm() / was.norm()).item(), abs=1e-6)
        kept = sum(x.square().sum() for x, _ in best) / was.square().sum()
        assert m.energy_kept == pytest.approx(kept.item(), abs=1e-6)


@pytest.mark.parametrize("recipe", BLOCK_DIAGONAL)
def test_block_diagonal_to_dense_is_exact(zoo, source, tmp_path, recipe):
    done = to_dense(source(recipe), tmp_path / "dense")
    same_logits(zoo, source(recipe), tmp_path / "dense")
    adapter = read_adapter(tmp_path / "dense")
    assert (adapter.kind, adapter.config.use_bdlora, done.exact) == ("plain", None, True)
    for path, module in read_adapter(source(recipe)).modules.items():
        mine = adapter.modules[path]
        assert (mine.rank, mine.scale) == (module.rank, module.scale)
        assert all(map(torch.equal, dense_form(mine), dense_form(module)))


@pytest.mark.parametrize(("recipe", "nblocks"), [*((recipe, 4) for recipe in CONVERTIBLE), ("plain-patterns", 8)])
def test_every_block_with_the_whole_rank_is_exact(zoo, source, tmp_path, recipe, nblocks):
    done = to_block_diagonal(source(recipe), tmp_path / "bd", nblocks, nblocks * RECIPES[recipe].rank)
    same_logits(zoo, source(recipe), tmp_path / "bd")
    adapter = read_adapter(tmp_path / "bd")
    assert (adapter.kind, adapter.nblocks) == ("block-diagonal", nblocks)
    assert done.exact
    assert done.relative_error == 0
    for path, module in read_adapter(source(recipe)).modules.items():
        assert adapter.modules[path].rank == nblocks * module.rank
        # Copies, not products: equal to the last bit.
        a, b = dense_form(module)
        mine = adapter.modules[path]
        if path.endswith(ROW_PARALLEL):
            assert torch.equal(torch.cat(mine.a.tensor.read().chunk(nblocks), dim=1), a)
        else:
            assert torch.equal(mine.b.tensor.read(), b)


@pytest.mark.parametrize(("nblocks", "rank"), [(2, 8), (4, 4), (8, 16), (1, 1)])
@pytest.mark.parametrize("recipe", ["plain-r16-mlp", "plain-r32", "plain-patterns"])
def test_fits_are_the_optimum(source, tmp_path, recipe, nblocks, rank):
    report = to_block_diagonal(source(recipe), tmp_path / "bd", nblocks, rank)
    assert_optimal(source(recipe), tmp_path / "bd", nblocks, report)
    assert report.exact == (rank >= nblocks * RECIPES[recipe].rank)


def test_the_fitted_adapter_is_what_peft_computes(zoo, source, tmp_path):
    """A fit's own dense form gives the same logits: PEFT packs and sides the blocks as we do."""
    to_block_diagonal(source("plain-patterns"), tmp_path / "bd", 4, 8)
    to_dense(tmp_path / "bd", tmp_path / "dense")
    same_logits(zoo, tmp_path / "bd", tmp_path / "dense")


def test_without_a_rank_it_has_about_as_many_parameters(source, tmp_path):
    report = to_block_diagonal(source("plain-r32"), tmp_path / "bd", 4).as_json()
    assert report["parameters"] == pytest.approx(report["parameters_before"], rel=0.03)


@pytest.mark.parametrize(
    ("recipe", "nblocks", "rank"),
    [("bd8-r32", 4, 32), ("bd8-r32", 1, 32), ("bd4-patterns", 2, 8), ("bd2-r8", 8, 32), ("bd4-patterns", 8, 16),
     ("bd8-r8-rslora", 2, 8), ("bd4-mixed", 2, 16), ("bd2-mixed-by-layer", 4, 16), ("bd4-head", 8, 16)],
)  # fmt: skip
def test_nested_blocks_are_exact(zoo, source, tmp_path, recipe, nblocks, rank):
    """Merged blocks keep the rank; split ones need it as many times as there are more blocks."""
    done = re_block(source(recipe), tmp_path / "new", nblocks)
    same_logits(zoo, source(recipe), tmp_path / "new")
    adapter = read_adapter(tmp_path / "new")
    assert (adapter.nblocks, adapter.config.r, done.exact) == (nblocks, rank, True)
    before = read_adapter(source(recipe)).modules
    carried = {m.path for m in done.modules if m.how == "carried"}
    assert carried == {path for path, module in before.items() if not module.block_diagonal}
    for path in carried:
        assert adapter.modules[path].rank == before[path].rank


@pytest.mark.parametrize("rank", [8, 16])
def test_splitting_with_a_smaller_rank_is_the_optimum(source, tmp_path, rank):
    report = re_block(source("bd4-r16"), tmp_path / "new", 8, rank)
    assert_optimal(source("bd4-r16"), tmp_path / "new", 8, report)
    assert not report.exact


def test_blocks_that_do_not_nest(tmp_path):
    report = re_block(by_hand(tmp_path / "two", 8, nblocks=2), tmp_path / "three", 3)
    assert report.rank == 9
    assert_optimal(tmp_path / "two", tmp_path / "three", 3, report)
    assert 0 < report.relative_error < 1


def test_wrongly_sided_modules_are_put_right(zoo, tmp_path):
    """PEFT's help swaps the two lists, so such adapters exist; no server takes them."""
    recipe = Recipe("wrong-sided-r4", 4, 2, bd_a=RECIPES["bd2-r8"].bd_b, bd_b=RECIPES["bd2-r8"].bd_a, seed=20)
    folder = zoo.adapter(FAMILY, recipe)
    report = re_block(folder, tmp_path / "right", 2, 8)
    assert report.exact
    assert "14 modules were block-diagonal on the wrong side" in report.notes[0]
    same_logits(zoo, folder, tmp_path / "right")
    report = re_block(folder, tmp_path / "fitted", 2)
    assert_optimal(folder, tmp_path / "fitted", 2, report)


def test_lm_head_and_kept_modules_are_carried_over(zoo, source, tmp_path):
    recipe = Recipe(
        "with-head", 6, targets=("q_proj", "k_proj", "o_proj", "lm_head"), more={"use_rslora": True}, seed=31
    )
    done = to_block_diagonal(source(recipe), tmp_path / "bd", 4, 24, keep=("k_proj",))
    assert {leaf_of(path) for path in done.as_json()["carried"]} == {"lm_head", "k_proj"}
    adapter = read_adapter(tmp_path / "bd")
    assert adapter.kind == "mixed"
    assert adapter.config.use_bdlora.match_strict is False
    assert {leaf_of(p) for p, m in adapter.modules.items() if not m.block_diagonal} == {"lm_head", "k_proj"}
    assert adapter.modules["lm_head"].base_weight is not None
    same_logits(zoo, source(recipe), tmp_path / "bd")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_types_stay(tmp_path, dtype):
    folder = by_hand(tmp_path / "plain", 4, dtype=dtype)
    report = to_block_diagonal(folder, tmp_path / "bd", 2, 4)
    tensors = load_file(tmp_path / "bd" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    # The report's error includes the rounding to the stored type.
    assert all(m.relative_error**2 > 1 - m.energy_kept for m in report.modules)
    for m in report.modules:
        was, now = (update(read_adapter(f).modules[m.path]) for f in (folder, tmp_path / "bd"))
        assert m.relative_error == pytest.approx(((was - now).norm() / was.norm()).item(), abs=1e-6)
    whole = to_block_diagonal(folder, tmp_path / "exact", 2, 10)
    assert whole.exact
    assert "above nblocks x r = 8" in whole.notes[0]
    report = re_block(tmp_path / "exact", tmp_path / "back", 1)
    assert report.exact
    for path, module in read_adapter(folder).modules.items():
        assert torch.equal(update(read_adapter(tmp_path / "back").modules[path]), update(module))


def test_an_untrained_adapter(tmp_path):
    folder = by_hand(tmp_path / "plain", 4, gain=0.0)
    report = to_block_diagonal(folder, tmp_path / "bd", 2, 4)
    assert (report.relative_error, report.energy_kept) == (0, 1)
    assert all(not update(m).any() for m in read_adapter(tmp_path / "bd").modules.values())


def test_what_is_written(capsys, source, tmp_path):
    """PEFT's two files and the report, readable by whoever may read here; the same numbers as JSON and as a table."""
    command = ["convert", str(source("plain-r32")), str(tmp_path / "bd"), "--nblocks", "4", "--rank", "16"]
    assert main([*command, "--json"]) == 0
    said = capsys.readouterr()
    assert "Converting" in said.err
    names = {"adapter_config.json", "adapter_model.safetensors", "conversion.json"}
    assert {p.name for p in (tmp_path / "bd").iterdir()} == names
    assert sorted(os.listdir(tmp_path)) == ["bd"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "bd").stat().st_mode & 0o777 == 0o777 & ~mask
    report = json.loads(said.out)
    assert report == json.loads((tmp_path / "bd" / "conversion.json").read_text())
    assert (report["nblocks"], report["rank"], report["exact"], len(report["modules"])) == (4, 16, False, 14)
    assert report["not_copied"] == ["README.md"]
    with safe_open(tmp_path / "bd" / "adapter_model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert main([*command, "--overwrite"]) == 0
    out = capsys.readouterr().out
    assert f"relative error {report['relative_error']:.4f}" in out
    assert "32 -> 16" in out
    assert "Not copied: README.md" in out
    assert main(["re-block", str(tmp_path / "bd"), str(tmp_path / "two"), "--nblocks", "2"]) == 0
    assert "exact" in capsys.readouterr().out


def test_overwrite_replaces_an_adapter_whole(source, tmp_path):
    target = tmp_path / "bd"
    to_block_diagonal(source("plain-r32"), target, 2)
    (target / "old").touch()
    to_block_diagonal(source("plain-r2"), target, 4, 4, overwrite=True)
    assert not (target / "old").exists()
    assert read_adapter(target).nblocks == 4
    assert os.listdir(tmp_path) == ["bd"]
    # Onto itself: the source stays readable until the result is whole.
    to_dense(target, target, overwrite=True)
    assert read_adapter(target).kind == "plain"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_left_of_a_conversion_that_stops(source, tmp_path, there, error):
    target = tmp_path / "bd"
    if there:
        to_block_diagonal(source("plain-r32"), target, 2)
    before = snapshot(tmp_path)

    def stop(targets):
        yield from targets[:5]
        assert any(name.startswith(".bd.") for name in os.listdir(tmp_path))
        raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else AdapterError):
        to_block_diagonal(source("plain-r32"), target, 4, overwrite=there, track=stop)
    assert snapshot(tmp_path) == before


def test_a_process_that_is_stopped_leaves_nothing(tmp_path):
    """By Ctrl-C and by what a CI system sends."""
    by_hand(tmp_path / "plain", 64, layers=60, size=768)
    command = [sys.executable, "-m", "sgl_bdlora.adapters", "convert", "plain", "--nblocks", "8"]
    stopped = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        stopped[number] = subprocess.Popen(
            [*command, number.name], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
    waiting, deadline = set(stopped), time.monotonic() + 60
    while waiting and time.monotonic() < deadline:
        for number in list(waiting):
            if list(tmp_path.glob(f".{number.name}.*")):
                stopped[number].send_signal(number)
                waiting.remove(number)
        time.sleep(0.005)
    for process in stopped.values():
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "nothing was written" in err
        assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["plain"]


def by_hand(
    folder: Path, r: int, nblocks: int = 1, layers: int = 1, size: int = 48, gain: float = 1.0, dtype=torch.float32
):
    """q_proj and o_proj of `layers` layers with `size` inputs and 2 * `size` outputs, without PEFT."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}
    if nblocks > 1:
        config["use_bdlora"] = {
            "nblocks": nblocks,
            "target_modules_bd_a": ["o_proj"],
            "target_modules_bd_b": ["q_proj"],
        }
    random = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(layers):
        for leaf in ("q_proj", "o_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{leaf}"
            a, b = (1, nblocks) if leaf == "q_proj" else (nblocks, 1)
            shapes = {"A": (r, size // a), "B": (2 * size, r // b)}
            for name, shape in shapes.items():
                values = torch.randn(shape, generator=random) * (gain if name == "B" else 1.0)
                tensors[f"{prefix}.lora_{name}.weight"] = values.to(dtype)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def spoil(folder: Path, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def poke(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")


CONVERT, DENSE, RE_BLOCK = ("convert", "--nblocks", "4"), ("convert", "--dense"), ("re-block", "--nblocks", "4")
# Command, blocks of a rank-8 source, what spoils it, words of the message.
MALFORMED = {
    "missing": (CONVERT, 1, lambda f: (f / "adapter_config.json").unlink(), ("adapter_config.json",)),
    "not JSON": (DENSE, 2, lambda f: (f / "adapter_config.json").write_text("{"), ("not valid JSON",)),
    "field": (RE_BLOCK, 2, lambda f: spoil(f, r="8"), ("r = '8'",)),
    "DoRA": (CONVERT, 1, lambda f: spoil(f, use_dora=True), ("use_dora = True",)),
    "bias": (CONVERT, 1, lambda f: spoil(f, bias="all"), ("bias = 'all'",)),
    "modules_to_save": (DENSE, 2, lambda f: spoil(f, modules_to_save=["lm_head"]), ("modules_to_save",)),
    "truncated": (
        CONVERT, 1, lambda f: os.truncate(f / "adapter_model.safetensors", 900), ("adapter_model.safetensors",),
    ),
    "NaN, fitted": (CONVERT, 1, poke, ("lora_A.weight", "NaN")),
    "NaN, dense": (DENSE, 2, poke, ("lora_A.weight", "NaN")),
    "rank and blocks": ((*CONVERT, "--rank", "10"), 1, None, ("--rank 10", "--nblocks 4", "choose 8 or 12")),
    "rank below blocks": ((*RE_BLOCK, "--rank", "3"), 2, None, ("--rank 3", "choose 4")),
    "size and blocks": (("convert", "--nblocks", "5"), 1, None, ("48 inputs", "--nblocks 5", "--keep o_proj")),
    "re-block size": (("re-block", "--nblocks", "32"), 2, None, ("48 inputs", "--nblocks 32")),
    "already block-diagonal": (CONVERT, 2, None, ("nblocks = 2", "re-block")),
    "already plain": (DENSE, 1, None, ("use_bdlora = None",)),
    "re-block of plain": (RE_BLOCK, 1, None, ("use_bdlora", "convert --nblocks")),
    "kept module": ((*CONVERT, "--keep", "v_proj"), 1, None, ("--keep v_proj", "o_proj, q_proj")),
    "nothing left": ((*CONVERT, "--keep", "q_proj", "o_proj"), 1, None, ("none would become",)),
    "rank of dense": ((*DENSE, "--rank", "4"), 2, None, ("--rank",)),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(capsys, tmp_path, case):
    (command, *options), nblocks, edit, words = MALFORMED[case]
    folder = by_hand(tmp_path / "odd", 8, nblocks)
    if edit:
        edit(folder)
    before = snapshot(tmp_path)
    assert main([command, str(folder), str(tmp_path / "new"), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    for word in ("LoRA adapter 'odd': ", "Fix: ", *words):
        assert word in said.err, said.err
    assert "Traceback" not in said.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("recipe", [*WITH_EMBEDDING, "plain-head"])
def test_embeddings_are_refused(capsys, source, tmp_path, recipe):
    assert main(["convert", str(source(recipe)), str(tmp_path / "new"), "--nblocks", "2"]) == 2
    err = capsys.readouterr().err
    assert ("embed_tokens" if recipe != "plain-head" else "lm_head") in err
    assert recipe in err
    assert not os.listdir(tmp_path)


TARGETS = {
    "exists": (lambda t: by_hand(t, 4), (), "exists"),
    "file": (lambda t: t.write_text("x"), ("--overwrite",), "no adapter directory"),
    "not an adapter": (lambda t: t.mkdir(), ("--overwrite",), "no adapter directory"),
    "link": (lambda t: t.symlink_to("odd"), ("--overwrite",), "no adapter directory"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_are_refused(capsys, tmp_path, case):
    make, options, words = TARGETS[case]
    folder = by_hand(tmp_path / "odd", 4)
    make(tmp_path / "new")
    before = snapshot(tmp_path)
    assert main(["convert", str(folder), str(tmp_path / "new"), "--nblocks", "2", *options]) == 2
    assert words in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_targets_around_the_source(capsys, tmp_path):
    by_hand(tmp_path / "outer", 4)
    folder = by_hand(tmp_path / "outer" / "inner", 4)
    before = snapshot(tmp_path)
    assert main(["convert", str(folder), str(tmp_path / "outer"), "--nblocks", "2", "--overwrite"]) == 2
    assert "contains the adapter itself" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "no" / "where"), "--nblocks", "2"]) == 2
    assert "create it first" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [["--nblocks", "0"], ["--nblocks", "two"], [], ["--dense", "--nblocks", "2"], ["--nblocks", "2", "--rank", "-4"]],
)
def test_malformed_options(capsys, tmp_path, words):
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(by_hand(tmp_path / "a", 4)), str(tmp_path / "b"), *words])
    assert caught.value.code == 2
    assert "--" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a"]
