"""LoRA adds no collective: counted at run time, in every forward pass, below every Python wrapper."""

from servers import LLAMA, QWEN3, S_LORA, SLOW_S_LORA, on

LAYERS = 2


@on(LLAMA, QWEN3)
def test_adapters_add_no_collective(live):
    batches = {
        "base": [None] * 4,
        "block-diagonal": ["bd4-r16"] * 4,
        "plain": ["plain-r32"] * 4,
        "mixed": [None, "bd2-r8", "plain-r8-attention", "bd8-r32"],
        "embedding and lm_head": ["plain-vocabulary", "plain-head", "plain-embedding", None],
    }
    counted = count(live, batches)
    assert set(counted) == {"EXTEND", "DECODE"}
    for mode, by_kind in counted.items():
        assert len(by_kind["base"]) == 1, f"{mode}: the base model's own count varies: {by_kind['base']}"
        (base,) = by_kind["base"]
        # Two a decoder layer, one for the embedding, one for the logits.
        assert sum(count for _, count in base) == 2 * LAYERS + 2, f"{mode}: {base}"
        for kind, counts in by_kind.items():
            assert counts == by_kind["base"], f"{mode}, {kind}: {counts}, the base model {by_kind['base']}"


@on(S_LORA, SLOW_S_LORA[0], SLOW_S_LORA[2])
def test_s_lora_adds_four_a_layer_and_only_where_it_is_used(live):
    """Per decoder layer: base 2; every batch with an S-LoRA adapter 6 (attention only: 4); all-local batches 2.

    The embedding and lm_head are local under both shardings.
    """
    batches = {
        "base": [None] * 4,
        "local": ["bd4-r16", None, "bd8-r32", "bd2-r8"],
        "s-lora": ["plain-r32"] * 4,
        "s-lora and local": ["plain-r32", "bd4-r16", None, "plain-r2"],
        "attention only": ["plain-r8-attention", None, "bd4-r16", "bd4-r16"],
        "embedding and lm_head": ["plain-head", "plain-embedding", None, "bd4-head"],
    }
    a_layer = {
        "base": 2,
        "local": 2,
        "s-lora": 6,
        "s-lora and local": 6,
        "attention only": 4,
        "embedding and lm_head": 2,
    }
    # The logits' and the embedding's own; SGLang holds Gemma 3's embedding whole on every rank.
    outside = 1 if live.served.family == "gemma3" else 2
    for mode, by_kind in count(live, batches).items():
        for kind, counts in by_kind.items():
            totals = {sum(number for _, number in counted) for counted in counts}
            assert totals == {a_layer[kind] * LAYERS + outside}, f"{mode}, {kind}: {counts}"


def count(live, batches: dict[str, list]) -> dict[str, dict[str, set]]:
    """Forward mode -> batch -> the different collective counts of its forward passes."""
    counted: dict[str, dict[str, set]] = {}
    for kind, recipes in batches.items():
        # Prompt log-probabilities may be computed in parts, each with a gather of its own.
        asks = [live.ask(recipe, 20, new_tokens=6, prompt_logprobs=False) for recipe in recipes]
        with live.counting_collectives() as records:
            live.server.generate(asks)
        assert any(record["with_adapter"] for record in records) == any(recipes)
        for record in records:
            counts = tuple(sorted(record["collectives"].items()))
            counted.setdefault(record["mode"], {}).setdefault(kind, set()).add(counts)
    return counted
