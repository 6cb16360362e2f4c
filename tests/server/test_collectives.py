"""LoRA adds no collective: counted at run time, in every forward pass, below every Python wrapper."""

from servers import LLAMA, QWEN3, on


@on(LLAMA, QWEN3)
def test_adapters_add_no_collective(live):
    batches = {
        "base": [None] * 4,
        "block-diagonal": ["bd4-r16"] * 4,
        "plain": ["plain-r32"] * 4,
        "mixed": [None, "bd2-r8", "plain-r8-attention", "bd8-r32"],
    }
    counted: dict[str, dict[str, set]] = {}
    for kind, recipes in batches.items():
        asks = [live.ask(recipe, 20, new_tokens=6) for recipe in recipes]
        with live.counting_collectives() as records:
            live.server.generate(asks)
        assert any(record["with_adapter"] for record in records) == any(recipes)
        for record in records:
            counts = tuple(sorted(record["collectives"].items()))
            counted.setdefault(record["mode"], {}).setdefault(kind, set()).add(counts)

    assert set(counted) == {"EXTEND", "DECODE"}
    layers = 2
    for mode, by_kind in counted.items():
        assert len(by_kind["base"]) == 1, f"{mode}: the base model's own count varies: {by_kind['base']}"
        (base,) = by_kind["base"]
        # Two a decoder layer, one for the embedding, one for the logits.
        assert sum(count for _, count in base) == 2 * layers + 2, f"{mode}: {base}"
        for kind, counts in by_kind.items():
            assert counts == by_kind["base"], f"{mode}, {kind}: {counts}, the base model {by_kind['base']}"
