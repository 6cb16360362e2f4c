"""Adapters of the input embedding and lm_head: pieces of every rank put together, rows of lm_head, copies of the base weight."""

import pytest
import torch

from sgl_bdlora.adapters import Adapter, AdapterError, adapter_from_tensors, dense_form
from sgl_bdlora.kernels.batch import make_batch
from sgl_bdlora.kernels.torch_ops import add_embedding_lora, add_lora
from sgl_bdlora.memory_pool import MemoryPool
from sgl_bdlora.sharding import AdapterShard, HostLayer, HostModel, HostSlice, Span, shard_adapter
from sgl_bdlora.sharding.shard import ALIGNMENT

WIDTH, VOCABULARY, PADDING = 24, 500, 64
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
CPU = torch.device("cpu")
TP = (1, 2, 4)


def adapter(seed: int, rank: int, base: torch.Tensor | None = None, prefix: str = "") -> Adapter:
    """Plain LoRA on both layers; base: the (vocabulary, width) weight to save beside their factors."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    stem = f"base_model.model.{prefix}"
    tensors = {
        f"{stem}{EMBEDDING}.lora_embedding_A": random(rank, VOCABULARY),
        f"{stem}{EMBEDDING}.lora_embedding_B": random(WIDTH, rank),
        f"{stem}{HEAD}.lora_A.weight": random(rank, WIDTH),
        f"{stem}{HEAD}.lora_B.weight": random(VOCABULARY, rank),
    }
    if base is not None:
        tensors |= {f"{stem}{EMBEDDING}.base_layer.weight": base, f"{stem}{HEAD}.base_layer.weight": base}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": ["embed_tokens", "lm_head"]}
    return adapter_from_tensors(f"sample{seed}", tensors, config)


def part(tp: int, rank: int) -> Span:
    """Token ids of a rank, as SGLang splits a padded vocabulary."""
    share = -(-VOCABULARY // PADDING) * PADDING // tp
    return Span(share * rank, min(share * (rank + 1), VOCABULARY), VOCABULARY)


def host(tp: int, rank: int, weight: torch.Tensor | None = None) -> HostModel:
    rows, width = part(tp, rank), Span.whole(WIDTH)
    held = None if weight is None else weight[rows.start : rows.stop]
    embedding = HostLayer(EMBEDDING, "embedding", (HostSlice("embed_tokens", rows, width, 0),), weight=held)
    head = HostLayer(HEAD, "head", (HostSlice("lm_head", width, rows, 0),), weight=held)
    return HostModel([embedding, head])


def batch_of(shards: list[AdapterShard | None], lengths: list[int]):
    pool = MemoryPool(1 << 22, torch.float64, CPU, 8)
    pool.ensure({s.name: s for s in shards if s is not None})
    return make_batch([s and pool.get(s.name) for s in shards], lengths, CPU)


NAMES, LENGTHS = ("a", None, "b", "a"), [3, 2, 4, 1]


@pytest.mark.parametrize("sharding", ["replicated", "s-lora"])
@pytest.mark.parametrize("tp", TP)
def test_ranks_together_are_the_dense_update(tp, sharding):
    """The padded columns of the last rank's logits stay as they are, and no collective is run."""
    samples = {"a": adapter(1, 5), "b": adapter(2, 3)}
    owners = [name for name, length in zip(NAMES, LENGTHS, strict=True) for _ in range(length)]
    # The first and last ids of the ranks' parts, and some between.
    ids = torch.tensor([0, 499, 128, 127, 255, 256, 383, 384, 77, 300])
    x = torch.randn(len(owners), WIDTH, dtype=torch.float64)
    embedded = torch.zeros(len(owners), WIDTH, dtype=torch.float64)
    logits = []
    for rank in range(tp):
        shards = {n: shard_adapter(s, host(tp, rank), torch.float64, sharding) for n, s in samples.items()}
        assert all(shard.collectives == 0 for shard in shards.values())
        batch = batch_of([n and shards[n] for n in NAMES], LENGTHS)
        add_embedding_lora(embedded, ids, batch, EMBEDDING, part(tp, rank).start, gain=1.5)
        y = torch.full((len(owners), 512 // tp), 0.25, dtype=torch.float64)
        add_lora(y, x, batch, HEAD, collectives=None)
        logits.append(y - 0.25)
    logits = torch.cat(logits, dim=1)
    assert not logits[:, VOCABULARY:].any()
    for t, owner in enumerate(owners):
        wanted_embedding, wanted_logits = torch.zeros(WIDTH), torch.zeros(VOCABULARY)
        if owner is not None:
            a, b = (f.double() for f in dense_form(samples[owner].modules[EMBEDDING]))
            scale = samples[owner].modules[EMBEDDING].scale
            wanted_embedding = 1.5 * scale * b @ a[:, ids[t]]
            a, b = (f.double() for f in dense_form(samples[owner].modules[HEAD]))
            wanted_logits = scale * b @ (a @ x[t])
        assert torch.allclose(embedded[t], wanted_embedding.double(), atol=1e-9)
        assert torch.allclose(logits[t, :VOCABULARY], wanted_logits.double(), atol=1e-9)


@pytest.mark.parametrize("sharding", ["replicated", "s-lora"])
@pytest.mark.parametrize("tp", TP)
def test_each_rank_holds_its_part_of_the_vocabulary(tp, sharding):
    for rank in range(tp):
        shard = shard_adapter(adapter(1, 5), host(tp, rank), torch.bfloat16, sharding)
        elements = 5 * (len(part(tp, rank)) + WIDTH)
        assert shard.nbytes == 2 * 2 * -(-elements // ALIGNMENT) * ALIGNMENT
        assert shard.local_ranks == {"embed_tokens": 5, "lm_head": 5}


def test_a_wrapper_may_name_them_otherwise():
    """A multimodal model has them under language_model in Transformers."""
    shard = shard_adapter(adapter(1, 2, prefix="model.language_model."), host(2, 1), torch.float32)
    assert set(shard.layers) == {EMBEDDING, HEAD}


def test_another_vocabulary_is_refused():
    resized = HostSlice("lm_head", Span.whole(WIDTH), Span.whole(VOCABULARY + 4), 0)
    only_head = HostModel([HostLayer(HEAD, "head", (resized,)), host(1, 0).layers[EMBEDDING]])
    with pytest.raises(AdapterError, match=r"sample1.*lm_head.*500.*504"):
        shard_adapter(adapter(1, 2), only_head, torch.float32)


WEIGHT = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tp", TP)
def test_the_same_base_weight_is_accepted(tp):
    for rank in range(tp):
        shard_adapter(adapter(1, 2, WEIGHT), host(tp, rank, WEIGHT), torch.float32)
        shard_adapter(adapter(1, 2, WEIGHT), host(tp, rank, WEIGHT.bfloat16()), torch.bfloat16)


@pytest.mark.parametrize("row", [0, 260, 499])
def test_another_base_weight_is_refused_by_the_rank_that_holds_the_row(row):
    other = WEIGHT.clone()
    other[row, 7] *= 1 + 2**-20
    for rank in range(4):
        if part(4, rank).start <= row < part(4, rank).stop:
            with pytest.raises(AdapterError, match=r"sample1.*lm_head\.base_layer\.weight.*differs"):
                shard_adapter(adapter(1, 2, other), host(4, rank, WEIGHT), torch.float32)
        else:
            shard_adapter(adapter(1, 2, other), host(4, rank, WEIGHT), torch.float32)
    # bfloat16 cannot hold the difference, so the served function is the same.
    shard_adapter(adapter(1, 2, other), host(1, 0, WEIGHT.bfloat16()), torch.bfloat16)


def test_a_base_weight_that_cannot_be_compared_is_refused():
    with pytest.raises(AdapterError, match=r"sample1.*base_layer\.weight.*save_embedding_layers=False"):
        shard_adapter(adapter(1, 2, WEIGHT), host(1, 0), torch.float32)


@pytest.fixture
def backend(monkeypatch):
    from sgl_bdlora import cpu, plugin

    cpu.prepare_environment()
    from sgl_bdlora.kernels.backend import BDLoRABackend

    monkeypatch.setattr(plugin, "verify_hooks", lambda: None)
    return BDLoRABackend(8, CPU, None)


def residents(*names: str | None) -> list:
    pool = MemoryPool(1 << 22, torch.float32, CPU, 8)
    shards = {
        n: shard_adapter(adapter(i, 4), host(1, 0), torch.float32) for i, n in enumerate(sorted({*names} - {None}))
    }
    pool.ensure(shards)
    return [n and pool.get(n) for n in names]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_rows_of_lm_head_may_come_in_parts(backend, chunk):
    """5, 1 and 3 rows prefill, of which 2, 1 and 3 reach lm_head: as if those alone were the batch."""
    adapters, head_lengths = residents("a", None, "b"), [2, 1, 3]
    x, wanted = torch.randn(6, WIDTH), torch.zeros(6, VOCABULARY)
    add_lora(wanted, x, make_batch(adapters, head_lengths, CPU), HEAD, collectives=None)
    backend.set_batch(adapters, [5, 1, 3], head_lengths)
    for _ in range(2):
        y = torch.zeros(6, VOCABULARY)
        for start in range(0, 6, chunk):
            backend.add_head_lora(y[start : start + chunk], x[start : start + chunk], HEAD)
        assert torch.allclose(y, wanted, atol=1e-4)


def test_more_rows_than_the_batch_has_for_lm_head_are_an_error(backend):
    backend.set_batch(residents("a", None), [5, 1], [1, 1])
    with pytest.raises(RuntimeError, match="lm_head was given 6 rows of a batch that has 2"):
        backend.add_head_lora(torch.zeros(6, VOCABULARY), torch.randn(6, WIDTH), HEAD)


def test_decode_rows_are_the_batch_itself(backend):
    backend.set_batch(residents("a", None), [1, 1], [1, 1])
    assert backend._head is backend._batch
    assert backend._head.rows(0, 2) is backend._batch


def test_one_module_may_be_both(backend):
    """Tied: a lookup gets the embedding's update times the module's scale, logits get lm_head's, in float32 if they are."""
    from sgl_bdlora.layers import embedding

    module = torch.nn.Embedding(VOCABULARY, WIDTH)
    module.weight.data.zero_()
    module.embed_scale = 3.0
    layers = host(1, 0).layers
    for layer in (layers[EMBEDDING], layers[HEAD]):
        embedding.wrap(module, layer, backend)
    backend.set_batch(residents("a", None), [2, 1], [2, 1])
    ids, x = torch.tensor([7, 499, 7]), torch.randn(3, WIDTH)
    sample = adapter(0, 4)
    a, b = dense_form(sample.modules[EMBEDDING])
    wanted = 3 * sample.modules[EMBEDDING].scale * a[:, ids].T @ b.T
    wanted[2] = 0
    assert torch.allclose(module(ids), wanted, atol=1e-4)
    a, b = dense_form(sample.modules[HEAD])
    wanted = sample.modules[HEAD].scale * x @ a.T @ b.T
    wanted[2] = 0
    for dtype in (torch.float32, torch.float64):
        logits = torch.ones(3, VOCABULARY, dtype=dtype)
        embedding.add_to_logits(module, logits, x)
        assert torch.allclose(logits - 1, wanted.to(dtype), atol=1e-4)


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_peft_adapts_one_of_two_tied_layers_alone(zoo, layer):
    """What the server has to do on tied models: the other layer keeps the base model's weight."""
    from transformers import AutoModelForCausalLM
    from zoo import Recipe

    folder = zoo.adapter("qwen2", Recipe(f"tied-{layer}", 4, targets=(layer,), seed=9))
    model = AutoModelForCausalLM.from_pretrained(zoo.model("qwen2"), dtype=torch.float32, attn_implementation="eager")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    from sgl_bdlora.adapters import read_adapter

    (module,) = read_adapter(folder).modules.values()
    a, b = dense_form(module)
    ids = list(range(3, 30))
    weight = model.lm_head.weight.data
    changed = weight + module.scale * ((b @ a).T if layer == "embed_tokens" else b @ a)
    inputs, outputs = (changed, weight) if layer == "embed_tokens" else (weight, changed)
    with torch.inference_mode():
        hidden = model.model(inputs_embeds=inputs[ids].unsqueeze(0), use_cache=False).last_hidden_state
        wanted = (hidden[0, :-1] @ outputs.T).log_softmax(-1)
    assert torch.allclose(zoo.oracle("qwen2").score(ids, folder).all, wanted, atol=1e-5)
