"""The quality benchmark: its adapters are PEFT's, one pass for many equals one after another, its figures are what they say."""

import dataclasses
import json
import math
import random
import statistics
from copy import deepcopy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality import data, learn, models, tasks, weights
from benchmarks.quality.__main__ import main
from benchmarks.quality.arms import Arm, arms_of
from benchmarks.quality.bank import Bank
from benchmarks.quality.report import Results, tables
from benchmarks.quality.run import QUICK, Quality
from benchmarks.quality.save import save
from benchmarks.quality.stats import bits, interval, over_rows
from benchmarks.record import RESULTS, read_rows
from sgl_bdlora.adapters import read_adapter
from sgl_bdlora.adapters.__main__ import main as adapters_command
from sgl_bdlora.adapters.dense import dense_form
from sgl_bdlora.adapters.model import read_model

ARMS = [Arm(1, 4, 1.0, 1.0), Arm(2, 8, 1.0, 1.0), Arm(2, 4, 0.87, 0.87), Arm(4, 8, 1.0, 1.0)]
WORDS = ["fox", "dog", "quick", "lazy", "price", "name", "capital", "France", "score", "rank"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small only wait for each other's threads
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(zoo):
    return zoo.model("llama")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def layers(folder):
    return read_model(folder).linear_layers()


@pytest.fixture(scope="module")
def parts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    texts = [(" ".join(rng.choices(WORDS, k=rng.randint(3, 9))), i % 2) for i in range(60)]
    # Bytes are the tiny tokenizer's whole vocabulary of classes: two single, different tokens.
    return {
        name: _encode(tokenizer, rows)
        for name, rows in {"train": texts[:40], "validation": texts[40:48], "test": texts[48:]}.items()
    }


def _encode(tokenizer, rows):
    class Bytes:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text, **options):
            made = tokenizer(text, **options)
            made["input_ids"] = made["input_ids"][-1:] if text in (" no", " yes") else made["input_ids"]
            return made

    return data.encode(Bytes(), rows, " ?", ("no", "yes"), 12)


def filled(model, layers, arms=ARMS, seed=0):
    """A bank whose B is not zero."""
    bank, noise = Bank(model, layers, arms, seed), torch.Generator().manual_seed(seed)
    for i in range(len(bank.arms)):
        bank.put(i, {p: (a, 0.05 * torch.randn(b.shape, generator=noise)) for p, (a, b) in bank.get(i).items()})
    return bank


def losses_of(model, bank, rows, teacher=None):
    return learn.loss(model, learn.hidden_states(model, bank, rows), rows, teacher)[0]


def gradients_of(bank, model, layers):
    """A bank whose adapters are the other's gradients."""
    other = Bank(model, layers, bank.arms)
    other._weights.copy_(bank._gradient)
    return other


def test_answers_and_gradients_are_pefts(model, layers, parts, folder, tmp_path, monkeypatch):
    """Of different ranks in one pass, and chunk by chunk through the head."""
    monkeypatch.setitem(learn.LOGITS, "cpu", 4 * 7 * model.config.vocab_size)
    bank, rows = filled(model, layers), parts["test"].take(torch.arange(3))
    hidden = learn.hidden_states(model, bank, rows)
    ours = model.lm_head(hidden)
    hidden.backward(learn.loss(model, hidden, rows)[1])
    gradients = gradients_of(bank, model, layers)
    plain = model(input_ids=rows.ids).logits
    masks = [mask[:, :-1] for mask in rows.counted()]
    for i, arm in enumerate(bank.arms):
        save(bank, i, tmp_path / str(i))
        assert adapters_command(["validate", str(tmp_path / str(i)), "--model", str(folder), "--tp", "2"]) == 0
        peft = PeftModel.from_pretrained(deepcopy(model), str(tmp_path / str(i)), is_trainable=True)
        theirs = peft(input_ids=rows.ids).logits
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=2e-5)
        assert (theirs - plain).abs().max() > 0.05, arm
        says = theirs[:, :-1].log_softmax(-1).gather(2, rows.ids[:, 1:, None])[..., 0]
        (-sum(says[mask].mean() for mask in masks)).backward()
        for path, (a, b) in gradients.get(i).items():
            module = peft.base_model.model.get_submodule(path)
            torch.testing.assert_close(a, module.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(b, module.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6)
            assert b.abs().max() > 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_fused_norms_change_rounding_alone(model, parts, dtype, bound):
    ids, before = parts["test"].ids, deepcopy(model).to(dtype)
    after = weights.fuse_norms(deepcopy(before))
    ours, theirs = (m(input_ids=ids).logits.float() for m in (after, before))
    assert "forward" in vars(after.model.norm)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * float(theirs.abs().max()))


def test_starts_are_drawn_layer_by_layer_whatever_else_is_trained(model, layers):
    """In this order and width: a seed's rows of one unit are compared with those of another."""
    arms = [*ARMS, dataclasses.replace(ARMS[3], init="lora")]
    bank = Bank(model, layers, arms, seed=5)
    for i, arm in enumerate(arms):
        random = torch.Generator().manual_seed(5)
        for layer, (path, (a, b)) in zip(layers, bank.get(i).items(), strict=True):
            n = arm.nblocks if layer.parallelism == "row" else 1
            bound = math.sqrt((6 if n > 1 else 1) / (layer.inputs // n))
            bound = math.sqrt(1 / layer.inputs) if arm.init == "lora" else bound
            assert path == layer.path
            assert torch.equal(a, (torch.rand(arm.rank, layer.inputs // n, generator=random) * 2 - 1) * bound)
            assert torch.equal(b, torch.zeros(layer.outputs, arm.rank * n // arm.nblocks))
    before = bank.get(0)
    bank._weights.add_(1)
    bank.reset(5)
    assert torch.equal(bank._weights[~bank._mask], torch.zeros(int((~bank._mask).sum())))
    assert all(torch.equal(x, y) for path in before for x, y in zip(before[path], bank.get(0)[path], strict=True))


def test_put_and_get_are_inverse(model, layers):
    bank = filled(model, layers)
    before = bank.get(2)
    bank.put(2, before)
    for path, (a, b) in bank.get(2).items():
        assert torch.equal(a, before[path][0])
        assert torch.equal(b, before[path][1])
    bank._weights.zero_()
    assert all(a.any() and b.any() for a, b in before.values())  # no views


def test_one_pass_equals_one_after_another(model, layers, parts):
    rates = [1e-2, 3e-3, 1e-2, 2e-3]
    arms = [Arm(arm.nblocks, arm.rank, arm.goal, arm.ratio, lr) for arm, lr in zip(ARMS, rates, strict=True)]
    together = filled(model, layers, arms)
    alone = [Bank(model, layers, [arm]) for arm in together.arms]
    begun = [together.get(i) for i in range(4)]
    for bank, tensors in zip(alone, begun, strict=True):
        bank.put(0, tensors)
    for bank in (together, *alone):
        learn.train(model, bank, data.batches(parts["train"], 4, 4, seed=1), 4)
    for i, bank in enumerate(alone):
        for path, (a, b) in together.get(i).items():
            torch.testing.assert_close(a, bank.get(0)[path][0], rtol=0, atol=1e-5)
            torch.testing.assert_close(b, bank.get(0)[path][1], rtol=0, atol=1e-5)
        assert any(not torch.allclose(b, begun[i][path][1], atol=1e-3) for path, (_, b) in together.get(i).items())


def test_step_is_torch_adamw_with_clipping(model, layers):
    """On the entries that an adapter has; what else the gradient holds neither counts for its norm nor is learnt."""
    bank = filled(model, layers)
    copies = [
        [leaf.clone().requires_grad_() for pair in bank.get(i).values() for leaf in pair] for i in range(len(ARMS))
    ]
    optimizers = [
        torch.optim.AdamW(leaves, lr=arm.lr, weight_decay=0.0) for leaves, arm in zip(copies, ARMS, strict=True)
    ]
    noise = torch.Generator().manual_seed(3)
    for _ in range(3):
        bank._gradient.copy_(torch.randn(bank._gradient.shape, generator=noise))
        gradients = gradients_of(bank, model, layers)
        for i, (leaves, optimizer) in enumerate(zip(copies, optimizers, strict=True)):
            for leaf, gradient in zip(leaves, [g for pair in gradients.get(i).values() for g in pair], strict=True):
                leaf.grad = gradient
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            optimizer.step()
        bank.step()
    for i, leaves in enumerate(copies):
        for leaf, ours in zip(leaves, [f for pair in bank.get(i).values() for f in pair], strict=True):
            torch.testing.assert_close(ours, leaf, rtol=0, atol=1e-6)
    assert not bank._weights[~bank._mask].any()
    assert torch.equal(bank._copy, bank._weights)


def _naive(model, bank, rows, index):
    """Perplexity, accuracy and losses of one adapter, row by row and position by position."""
    text, label, hits = [], [], []
    for i in range(len(rows)):
        ids = rows.ids[i, : rows.length[i]]
        with torch.no_grad(), bank.on():
            logits = model(input_ids=ids.repeat(len(bank.arms), 1)).logits[index]
        says = logits.log_softmax(-1)
        text += [-says[t - 1, ids[t]].item() for t in range(1, int(rows.text[i]))]
        label.append(-says[-2, ids[-1]].item())
        hits.append(int(rows.classes[logits[-2, rows.classes].argmax()]) == int(ids[-1]))
    return text, label, hits


def test_scores_and_loss_equal_a_plain_loop(model, layers, parts):
    bank, rows = filled(model, layers), parts["test"]
    scores = learn.score(model, bank, rows, 4 * 5)
    losses = losses_of(model, bank, rows)
    for i, score in enumerate(scores):
        text, label, hits = _naive(model, bank, rows, i)
        assert score.perplexity == pytest.approx(math.exp(statistics.mean(text)), rel=1e-4)
        assert score.label_loss == pytest.approx(statistics.mean(label), rel=1e-4)
        assert score.correct == hits
        assert score.accuracy == sum(hits) / len(hits)
        assert losses[i].item() == pytest.approx(statistics.mean(text) + statistics.mean(label), rel=1e-4)
    assert len({tuple(score.correct) for score in scores}) > 1 or len({s.perplexity for s in scores}) == 4


def test_16_bit_model_trains_like_the_32_bit_one(model, layers, parts):
    """As on a GPU: products in bfloat16, adapter weights and optimiser in float32."""
    small, last = deepcopy(model).bfloat16(), []
    for base in (model, small):
        bank = filled(base, layers, [dataclasses.replace(arm, lr=5e-3) for arm in ARMS])
        assert bank._weights.dtype == torch.float32
        assert bank._copy.dtype == bank._gradient.dtype == base.dtype
        begun = losses_of(base, bank, parts["train"])
        learn.train(base, bank, data.batches(parts["train"], 10, 8, seed=1), 10)
        last.append(losses_of(base, bank, parts["train"]))
        assert (last[-1] < begun - 0.5).all()
    torch.testing.assert_close(last[1], last[0], rtol=0.05, atol=0)


def test_divergence_from_oneself_is_zero_and_healing_lowers_it(model, layers, parts):
    teacher = filled(model, layers, ARMS[:1])
    students = Bank(model, layers, [Arm(2, 4, 1.0, 1.0, 3e-3), Arm(2, 8, 1.0, 1.0, 3e-3)])
    for i, arm in enumerate(students.arms):
        fitted, error = learn.convert(students, teacher.get(0), 2, arm.rank)
        students.put(i, fitted)
        assert (error < 1e-6) == (arm.rank == 8)

    def distance(rows=parts["train"]):
        with torch.no_grad():
            target = learn.hidden_states(model, teacher, rows)
        return losses_of(model, students, rows, target)

    before = distance()
    assert before[1] < 1e-4 < before[0]  # rank nblocks x r is exact
    learn.train(model, students, data.batches(parts["train"], 40, 8, seed=1), 40, teacher)
    assert distance()[0] < 0.8 * before[0]


def test_conversion_equals_the_command(model, layers, tmp_path):
    teacher = filled(model, layers, ARMS[:1])
    save(teacher, 0, tmp_path / "lora")
    words = ["convert", str(tmp_path / "lora"), str(tmp_path / "bd"), "--nblocks", "4", "--rank", "4"]
    assert adapters_command(words) == 0
    fitted, error = learn.convert(teacher, teacher.get(0), 4, 4)
    bank = Bank(model, layers, [Arm(4, 4, 1.0, 1.0)])
    bank.put(0, fitted)
    save(bank, 0, tmp_path / "ours")
    command, ours = read_adapter(tmp_path / "bd"), read_adapter(tmp_path / "ours")
    for path, module in command.modules.items():
        (a, b), (c, d) = dense_form(module), dense_form(ours.modules[path])
        torch.testing.assert_close(module.scale * b @ a, ours.modules[path].scale * d @ c, rtol=0, atol=1e-5)
    report = json.loads((tmp_path / "bd" / "conversion.json").read_text())
    assert error == pytest.approx(report["relative_error"], abs=1e-4)


def test_arms_are_matched_and_skip_blocks_that_do_not_divide():
    layers = read_model_of_demo()
    arms = arms_of(layers, 30, (2, 4, 5, 8))
    assert [arm.nblocks for arm in arms] == [1, *[2] * 3, *[4] * 3, *[8] * 3]
    for arm in arms:
        assert arm.rank % arm.nblocks == 0
        assert arm.ratio == pytest.approx(arm.goal, rel=0.03)


def read_model_of_demo():
    from sgl_bdlora.adapters.model import BaseModel

    return BaseModel("SmolLM2", "llama", 576, 1536, 30, 9, 3, 64, 49152, True, None).linear_layers()


def test_no_text_is_in_two_parts(tmp_path):
    texts = [(f"A film about number {i % 700}, {'!' * (i % 3)}", i % 2) for i in range(2000)]
    task = tasks.Task("t", "?", ("no", "yes"), 8, 400, 100, 200, lambda folder: iter(texts))
    parts = tasks.split(task, tmp_path)
    assert {name: len(rows) for name, rows in parts.items()} == {"test": 200, "validation": 100, "train": 400}
    seen = [text.rstrip("! ") for rows in parts.values() for text, _ in rows]
    assert len(set(seen)) == len(seen) == 700
    assert tasks.split(task, tmp_path) == parts


def test_letter_keeps_subject_and_body_alone():
    raw = "From: a@b\nSubject: [ILUG] Hello\nX-Spam: yes\nContent-Type: text/html\n\n<p>Buy&nbsp;<b>now</b></p><style>x{}</style>"
    assert tasks.letter(raw) == "Hello Buy now"


def test_batches_follow_the_seed_and_use_every_row(parts):
    rows = parts["train"]
    first, again, other = ([b.ids.tolist() for b in data.batches(rows, 10, 8, seed)] for seed in (1, 1, 2))
    assert first == again != other
    seen = [
        tuple(row[: int(n)])
        for b in data.batches(rows, 5, 8, 1)
        for row, n in zip(b.ids.tolist(), b.length, strict=True)
    ]
    assert sorted(seen) == sorted(tuple(row[: int(n)]) for row, n in zip(rows.ids.tolist(), rows.length, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_travels_as_its_blocks(tmp_path, tied):
    """Of a Llama, whose q and k a GGUF file holds in another order. pack itself compares every weight that comes out again."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
    from safetensors.torch import save_file

    heads, kv_heads, width, kind = 4, 2, 32, GGMLQuantizationType.Q4_1
    config = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    random = np.random.default_rng(0)
    writer, whole = GGUFWriter(tmp_path / "model.gguf", "llama"), {"model.norm.weight": torch.ones(width)}
    sizes = {"blk.0.attn_q": width, "blk.0.attn_k": width // 2, "blk.0.ffn_up": 64, "token_embd": 16}
    names = {
        "blk.0.attn_q": "model.layers.0.self_attn.q_proj", "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
        "blk.0.ffn_up": "model.layers.0.mlp.up_proj", "token_embd": "model.embed_tokens", "output": "lm_head",
    }  # fmt: skip
    for name, rows in (sizes if tied else sizes | {"output": 16}).items():
        raw = quantize(random.normal(size=(rows, width)).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
        value = torch.from_numpy(dequantize(raw, kind))
        if count := {"blk.0.attn_q": heads, "blk.0.attn_k": kv_heads}.get(name):
            # Rows of a head: first halves and second halves of the rotary pairs, where the file has pair after pair.
            value = value.view(count, -1, 2, width).transpose(1, 2).reshape(rows, width)
        whole[f"{names[name]}.weight"] = value.clone()
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    half = len(whole) // 2  # a checkpoint in two files
    for number, part in enumerate((list(whole)[:half], list(whole)[half:])):
        save_file({name: whole[name] for name in part}, tmp_path / "model" / f"model-{number}.safetensors")
    weights.pack(tmp_path / "model", tmp_path / "packed", tmp_path / "model.gguf")
    kinds = json.loads((tmp_path / "packed" / "weights.json").read_text())["kinds"]
    assert {name for name, found in kinds.items() if found == "Q4_1"} == whole.keys() - {"model.norm.weight"}
    found = weights.unpack(tmp_path / "packed", torch.float32)
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_tokenizer_from_gguf_merges_by_score(tmp_path):
    from gguf import GGUFWriter

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *"▁abc", "ab", "bc", "abc", "▁abc"]
    scores = [-1000.0] * 5 + [-9.0, -10.0, -11.0, -12.0] + [-2.0, -1.0, -3.0, -4.0]
    writer = GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types([3, 3, 3, 3, 4] + [1] * 8)
    for name, number in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{name}_token_id")(number)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    tokenizer = models._tokenizer(tmp_path / "model.gguf")
    for text, expected in {
        " abc": ["▁abc"], "abcb": ["abc", "b"], "bcab\n": ["bc", "ab", "\n"], "ab c": ["ab", "▁", "c"],
    }.items():  # fmt: skip
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == expected
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.pad_token_id) == ("<bos>", 0)


def test_intervals():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert interval([2.0]).half is None
    assert not interval([-1.0, 1.0]).excludes_zero
    rows = [{"correct": f"{int('0110', 2):x}", "rows": 4}, {"correct": f"{int('0010', 2):x}", "rows": 4}]
    assert bits(rows[0]) == [0, 1, 1, 0]
    difference = over_rows(rows, rows[1:] * 2)
    assert difference.mean == pytest.approx(12.5)
    assert difference.half == pytest.approx(1.96 * 25 / 2)


def test_quick_run_resumes_and_reports(folder, parts, tmp_path, capsys):
    prepared = tmp_path / "tiny"
    data.save(prepared, "toy", parts)
    weights.pack(folder, prepared)
    (prepared / "prepared.json").write_text(json.dumps({"tasks": ["toy"]}))
    output = tmp_path / "rows.jsonl"
    words = ["run", "--data", str(prepared), "--output", str(output), "--quick", "--device", "cpu"]
    assert main([*words, "--only", "sweep/*", "base/*"]) == 0
    sweep = [row for row in read_rows(output) if row["kind"] == "sweep"]
    assert len(sweep) == 3 * len(QUICK.rates)
    assert main(words) == 2  # would write into rows that are there
    assert main([*words, "--resume"]) == 0
    rows = read_rows(output)
    assert main([*words, "--resume"]) == 0
    assert len(read_rows(output)) == len(rows)
    assert [row["unit"] for row in rows if row["kind"] == "done"] == [
        "sweep/toy", "base/toy", "heal/toy", "speed/toy", "main/toy/0", "start/toy/0", "main/toy/1", "start/toy/1",
    ]  # fmt: skip
    phases = {row["unit"]: row["phases"] for row in rows if row["kind"] == "done"}
    assert list(phases["main/toy/0"]) == ["build", "train", "score", "convert", "heal"]
    assert list(phases["base/toy"]) == ["score"]
    healed = {row["heal_lr"]: row for row in rows if row["kind"] == "heal" and row["variant"] == "healed"}
    assert set(healed) == set(QUICK.heal_rates)
    best_heal = min(healed.values(), key=lambda row: row["text_loss"] + row["label_loss"])["heal_lr"]
    assert {row["heal_lr"] for row in rows if row["kind"] == "result" and row["variant"] == "healed"} == {best_heal}
    for row in rows:
        assert row["kind"] != "done" or sum(row["phases"].values()) <= row["seconds"] + 0.05
    best = min((r for r in sweep if r["nblocks"] == 1), key=lambda row: row["text_loss"] + row["label_loss"])
    results = [row for row in rows if row["kind"] == "result" and row["seed"] == 0]
    assert {row["lr"] for row in results if row["arm"] == "lora"} == {best["lr"]}
    variants = [row["variant"] for row in results]
    assert {v: variants.count(v) for v in variants} == {"trained": 4, "converted": 2, "healed": 2, "small start": 3}
    capsys.readouterr()
    assert main(["report", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "| 2 blocks, healed |" in printed
    assert "| model | task | blocks | LoRA | not healed | 0.0001 | 0.0002 |" in printed
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert "Seeds: 2;" in tables(rows)
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- tables: begin -->\nold\n<!-- tables: end -->\n\nAfter.\n")
    assert main(["report", str(output), "--page", str(page)]) == 0
    assert (
        page.read_text() == f"Before.\n\n<!-- tables: begin -->\n\n{tables(rows)}\n\n<!-- tables: end -->\n\nAfter.\n"
    )
    page.write_text("no marker")
    assert main(["report", str(output), "--page", str(page)]) == 2


def test_a_unit_is_done_again_when_the_sweep_chooses_another_rate(folder, parts, tmp_path):
    data.save(tmp_path, "toy", parts)
    weights.pack(folder, tmp_path)
    (tmp_path / "prepared.json").write_text(json.dumps({"tasks": ["toy"]}))
    output, plan = tmp_path / "rows.jsonl", dataclasses.replace(QUICK, seeds=(0,))

    def run() -> list[str]:
        before = len(read_rows(output)) if output.exists() else 0
        Quality(tmp_path, output, plan, "cpu", resume=True).run(["sweep/*", "main/*", "start/*"])
        return [row["unit"] for row in read_rows(output)[before:] if row["kind"] == "done"]

    assert run() == ["sweep/toy", "main/toy/0", "start/toy/0"]
    assert run() == []
    rows = read_rows(output)
    best = next(row for row in rows if row["kind"] == "sweep" and row["arm"] == "lora") | {"lr": 1e-4, "text_loss": 0.0}
    output.write_text("".join(json.dumps(row) + "\n" for row in [*rows, best]))
    plan = dataclasses.replace(plan, rates=(*QUICK.rates, 1e-4))
    assert run() == ["sweep/toy", "main/toy/0"]
    swept = [(row["arm"], row["init"], row["lr"]) for row in read_rows(output) if row["kind"] == "sweep"]
    assert len(set(swept)) == len(swept) == 3 * len(plan.rates)
    results = Results(read_rows(output), tmp_path.name, "toy")
    assert results.rates().startswith("LoRA 0.0001; blocks ")


def test_the_pages_tables_are_those_of_the_rows():
    assert tables(read_rows(RESULTS / "quality.jsonl")) in (RESULTS.parents[1] / "docs" / "quality.md").read_text()


def test_summary_pairs_seeds_and_gives_each_task_a_line():
    rows = [
        _result("t", seed, *key) for seed in (0, 1) for key in [("lora", 1, "trained"), ("bd2-1.00x", 2, "trained")]
    ]
    rows += [_result("t", 0, "bd2-1.00x", 2, "converted") | {"relative_error": 0.25, "correct": "7", "accuracy": 0.75}]
    # Perplexity 7 against 6 and 8 against 7; converted 7 against 6, and one more of four texts right.
    assert "| t | 2 | 2 | +15.48 ± 15.13* | - | +16.67 | - | +0.00 ± 0.00 | - | +25.00 ± 49.00 | - | 0.250 |" in tables(
        rows
    )


def test_report_of_runs_split_over_devices(tmp_path, capsys):
    """Files that share rows; the plot's legend has kinds that only the second task has."""
    rows = [
        _result(task, seed, *key)
        for task, kinds in {"first": ["trained"], "second": ["trained", "healed"]}.items()
        for seed in (0, 1)
        for key in [("lora", 1, "trained"), *(("bd2-1.00x", 2, kind) for kind in kinds)]
    ]
    speed = {"kind": "speed", "model": "m", "task": "first", "gpu": "G", "adapters": 10, "batch": 16}
    rows.append(speed | {"together_s": 0.1, "one_after_another_s": 0.4, "speed_up": 4.0})
    for name, part in {"a": rows, "b": rows[4:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    words = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--plot", str(tmp_path / "plot.svg")]
    assert main(["report", *words]) == 0
    printed = capsys.readouterr().out
    assert printed.count("4.00x") == 1
    assert printed.count("Seeds: 2;") == 2
    assert "2 blocks, healed" in (tmp_path / "plot.svg").read_text()


def _result(task, seed, arm, nblocks, variant):
    return {
        "kind": "result", "model": "m", "task": task, "seed": seed, "arm": arm, "nblocks": nblocks, "variant": variant, "rank": 4,
        "goal": 1.0, "params_ratio": 1.0, "steps": 4, "batch": 2, "rows": 4, "perplexity": 5.0 + nblocks + seed,
        "accuracy": 0.5, "correct": "6", "heal_lr": 2e-4,
    }  # fmt: skip
