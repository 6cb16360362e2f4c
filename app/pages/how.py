"""How it works: one drawn page of the sharding, from the running model's shapes."""

from html import escape

import gradio as gr

from app import drawing, text
from app.compare import BLOCK
from app.context import Context, look_or_none, pairs
from app.pairs import Pair
from app.served import Layer, Served


def build(context: Context, timer: gr.Timer, demo: gr.Blocks) -> None:
    seen = gr.State("")
    page = gr.HTML("<p>Waiting for the server, whose shapes are drawn here.</p>", elem_id="how")

    def show(seen: str):
        served, found = look_or_none(context.arms[BLOCK]), pairs(context)
        key = repr((served.layers, served.tp, [p.label for p in found])) if served else seen
        if key == seen:
            return gr.skip(), gr.skip()
        return key, render(served, found[0] if found else None)

    for event in (demo.load, timer.tick):
        event(show, seen, [seen, page], show_progress="hidden", api_visibility="private", concurrency_limit=None)


def render(served: Served, pair: Pair | None) -> str:
    """The page. Without a pair of adapters it is drawn for a plain rank 16 and a block-diagonal rank of twice that."""
    tp, layers = served.tp, drawing.decoder_layers(served.layers)
    plain_rank = pair.plain.rank if pair else 16
    block_rank, nblocks = (pair.block.rank, pair.block.nblocks) if pair else (2 * tp * -(-16 // tp), max(tp, 2))
    plain = [drawing.s_lora_stage(layer, plain_rank, tp) for layer in layers]
    block = [drawing.block_stage(layer, block_rank, nblocks, tp) for layer in layers]
    count = max((layer.count for layer in layers), default=0)
    collectives = sum(stage.layer.count for stage in plain if stage.collective)
    first = next((layer for layer in layers if layer.parallelism == "column"), None)
    names = (
        f"{pair.plain.name} (rank {plain_rank}) and {pair.block.name} (rank {block_rank})"
        if pair
        else f"ranks {plain_rank} and {block_rank}"
    )
    return "".join(
        (
            "<div class='story'><h2>One model, several ranks</h2>",
            f"<p>{escape(served.model)} runs on <b>{tp} rank{'' if tp == 1 else 's'}</b>. Each holds a part of every weight matrix W. ",
            "A LoRA adapter adds a small correction to each W: first A shrinks the input to a few numbers, then B expands them again. ",
            "The question is what happens between A and B.</p></div>",
            _matrices(first, plain_rank, block_rank, nblocks, tp) if first else "",
            f"<div class='story'><h2>One decoder layer of {escape(served.model)}, {count} of which run for every token</h2>",
            f"<p>Drawn with the shapes of {escape(names)} as each rank holds them. The hatched bars are where all ranks stop and ",
            "wait for each other.</p></div>",
            "<div class='drawings'>",
            _figure("S-LoRA sharding", f"{collectives} extra collectives a step", drawing.decoder(plain, tp, "plain")),
            _figure("Block-diagonal", "0 extra collectives a step", drawing.decoder(block, tp, "block")),
            "</div>",
            _legend(),
            _costs(served, pair) if pair else "",
        )
    )


def _matrices(layer: Layer, plain_rank: int, block_rank: int, nblocks: int, tp: int) -> str:
    first = layer.slices[0]
    return (
        f"<div class='story'><h2>The whole trick: most of B is zero</h2><p>{escape(first.name)}, {first.inputs} inputs and {first.outputs} "
        "outputs. Colours say which rank holds what; the thin sides are drawn wider than they are.</p></div><div class='drawings'>"
        + _figure(
            "Plain",
            "every rank's outputs need all of A's results",
            drawing.matrices(first.outputs, first.inputs, plain_rank, 1, tp),
        )
        + _figure(
            "Block-diagonal",
            "each rank's outputs need only its own",
            drawing.matrices(first.outputs, first.inputs, block_rank, nblocks, tp),
        )
        + "</div><div class='story'><p>In layers that are split on inputs (o, down) it is A that is block-diagonal, and what the ranks "
        "add up at the end they add up anyway, for the base model.</p></div>"
    )


def _figure(title: str, note: str, svg: str) -> str:
    return (
        f"<figure class='drawing'><figcaption>{escape(title)} <span>· {escape(note)}</span></figcaption>{svg}</figure>"
    )


def _legend() -> str:
    return (
        "<p class='legend'><span>W: the base model's weights</span><span>A, B: the adapter's, rows×columns on one rank</span>"
        "<span>hatched bar: a collective, which every rank waits for</span><span>grey bar: one that the base model runs anyway</span></p>"
    )


def _costs(served: Served, pair: Pair) -> str:
    rows = []
    for title, adapter, per_rank, collectives in (
        ("block-diagonal", pair.block, max(pair.block.bytes_per_rank), 0),
        ("plain, S-LoRA", pair.plain, max(pair.plain.plain_bytes["s-lora"]), _s_lora_collectives(served)),
        ("plain, replicated", pair.plain, max(pair.plain.plain_bytes["replicated"]), 0),
    ):
        rows.append(
            [
                title,
                adapter.name,
                str(adapter.rank),
                text.count(adapter.parameters),
                text.size(per_rank),
                str(collectives),
            ]
        )
    head = ["sharding", "adapter", "rank", "parameters", "bytes a rank", "collectives a step"]
    return (
        "<div class='story'><h2>What each sharding costs here</h2><p>Replicated sharding needs no collective either, but every rank "
        "then holds, reads and multiplies parts of the adapter whole.</p></div>"
        + text.table(head, rows, f"{served.model}, {served.where}, {served.dtype}")
    )


def _s_lora_collectives(served: Served) -> int:
    return sum(layer.count for layer in drawing.decoder_layers(served.layers)) if served.tp > 1 else 0
