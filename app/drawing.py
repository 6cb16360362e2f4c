"""The sharding as drawings, from the shapes of the running model. Pure functions from numbers to inline SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from app.served import Layer

WIDTH = 380
MARGIN = 10
MAX_LANES = 3
W_BOX = 20

# What the layers of a decoder are called in words; others keep their own name.
WORDS = {
    "qkv_proj": "q, k, v: what to attend to",
    "o_proj": "o: attention's output",
    "gate_up_proj": "gate, up: into the MLP",
    "down_proj": "down: out of the MLP",
}


@dataclass(frozen=True)
class Stage:
    """One layer's LoRA on one rank under one sharding.

    a, b: shapes (rows, columns) of the local factors, several slices stacked. collective: "all-gather", "all-reduce" or None;
    numbers: how many it puts together for each token.
    """

    layer: Layer
    a: tuple[int, int]
    b: tuple[int, int]
    collective: str | None
    numbers: int = 0

    @property
    def row(self) -> bool:
        return self.layer.parallelism == "row"


def decoder_layers(layers: Sequence[Layer]) -> list[Layer]:
    """The layers that are split over the ranks and repeat through the decoder, in the order of the model."""
    return [layer for layer in layers if layer.parallelism in ("column", "row")]


def s_lora_stage(layer: Layer, rank: int, tp: int) -> Stage:
    """A plain adapter of this rank, cut everywhere: column layers gather the shrink, row layers add it up."""
    slices = layer.slices
    if tp == 1:
        return Stage(layer, _stack_a(layer, rank), _stack_b(layer, rank), None)
    if layer.parallelism == "row":
        return Stage(layer, (rank, slices[0].local_inputs), (-(-slices[0].outputs // tp), rank), "all-reduce", rank)
    share = -(-rank // tp)
    return Stage(layer, _stack_a(layer, share), _stack_b(layer, share * tp), "all-gather", share * tp * len(slices))


def block_stage(layer: Layer, rank: int, nblocks: int, tp: int) -> Stage:
    """A block-diagonal adapter: this rank's blocks, whole, and nothing of the others."""
    local = rank // nblocks * -(-nblocks // tp)
    return Stage(layer, _stack_a(layer, local), _stack_b(layer, local), None)


def _stack_a(layer: Layer, rank: int) -> tuple[int, int]:
    return rank * len(layer.slices), layer.slices[0].local_inputs


def _stack_b(layer: Layer, rank: int) -> tuple[int, int]:
    return sum(s.local_outputs for s in layer.slices), rank


def decoder(stages: Sequence[Stage], tp: int, style: str) -> str:
    """One decoder layer, top to bottom, a lane for each rank. style: "block" or "plain"."""
    lanes = min(tp, MAX_LANES)
    parts, y = [], 30
    for lane in range(lanes):
        x, width = _lane(lane, lanes)
        parts.append(_text(x + width / 2, 16, f"rank {lane}", "strong"))
    for stage in stages:
        drawn, y = _stage(stage, y, lanes, style)
        parts += drawn
    for lane in range(lanes):
        x, width = _lane(lane, lanes)
        parts.insert(0, f"<rect class='lane' x='{x:.1f}' y='22' width='{width:.1f}' height='{y - 26}' rx='8'/>")
    shown = f" (ranks 0 to {lanes - 1} of {tp})" if tp > lanes else ""
    title = f"{'Block-diagonal' if style == 'block' else 'S-LoRA'} sharding{shown}. " + " ".join(map(_sentence, stages))
    return _svg(title, y, parts)


def _sentence(stage: Stage) -> str:
    between = (
        f"an {stage.collective} of {stage.numbers} numbers a token between" if stage.collective else "nothing between"
    )
    return f"{stage.layer.name}: A {_shape(stage.a)}, {between}, B {_shape(stage.b)}."


def _stage(stage: Stage, y: int, lanes: int, style: str) -> tuple[list[str], int]:
    name = WORDS.get(stage.layer.name, stage.layer.name)
    kind = "split on inputs" if stage.row else "split on outputs"
    parts = [
        f"<rect class='title-back' x='{MARGIN}' y='{y}' width='{WIDTH - 2 * MARGIN}' height='22' fill='var(--card)'/>",
        f"<text x='{WIDTH / 2}' y='{y + 15}' text-anchor='middle'><tspan class='strong'>{escape(name)}</tspan>"
        f"<tspan class='soft'> · {kind}</tspan></text>",
    ]
    top = y + 26
    for lane in range(lanes):
        x, width = _lane(lane, lanes)
        inner, left = width - W_BOX - 16, x + W_BOX + 10
        middle = left + inner / 2
        parts += [
            f"<rect class='host' x='{x + 5:.1f}' y='{top}' width='{W_BOX}' height='88' rx='3'/>",
            _text(x + 5 + W_BOX / 2, top + 18, "W", "soft"),
            f"<rect class='factor-{style}' x='{left:.1f}' y='{top}' width='{inner:.1f}' height='26' rx='4'/>",
            _text(middle, top + 17, f"A {_shape(stage.a)}"),
            f"<path class='wire' d='M{middle:.1f} {top + 26}V{top + 62}'/>",
            f"<rect class='factor-{style}' x='{left:.1f}' y='{top + 62}' width='{inner:.1f}' height='26' rx='4'/>",
            _text(middle, top + 79, f"B {_shape(stage.b)}"),
        ]
        if not stage.collective:
            parts.append(f"<rect class='gone' x='{left:.1f}' y='{top + 33}' width='{inner:.1f}' height='22' rx='11'/>")
            parts.append(f"<rect x='{middle - 24:.1f}' y='{top + 36}' width='48' height='16' fill='var(--card)'/>")
            parts.append(_text(middle, top + 48, "no wait", "soft"))
    if stage.collective:
        parts.append(
            f"<rect class='collective' x='{MARGIN}' y='{top + 31}' width='{WIDTH - 2 * MARGIN}' height='26' rx='6'/>"
        )
        label = f"{stage.collective} · {stage.numbers} numbers a token"
        width = 7.6 * len(label) + 14
        parts.append(
            f"<rect class='collective-label' x='{(WIDTH - width) / 2:.1f}' y='{top + 34.5}' width='{width:.1f}' height='19' rx='5'/>"
        )
        parts.append(_text(WIDTH / 2, top + 48, label, "strong"))
    bottom = top + 88
    if stage.row:
        parts.append(
            f"<rect class='base' x='{MARGIN}' y='{bottom + 8}' width='{WIDTH - 2 * MARGIN}' height='22' rx='6'/>"
        )
        parts.append(_text(WIDTH / 2, bottom + 23, "the base model's own all-reduce", "soft"))
        bottom += 30
    return parts, bottom + 14


def matrices(outputs: int, inputs: int, rank: int, nblocks: int, tp: int) -> str:
    """A column layer's B and A as matrices, coloured by who holds them. nblocks: 1 for a plain adapter.

    A plain factor is cut into one part a rank; a block-diagonal one too, or into its blocks where ranks hold parts of blocks.
    """
    plain = nblocks == 1
    whole = tp if plain or (nblocks % tp == 0 and tp > 1) else nblocks
    holder = "rank" if whole == tp else "block"
    ranks = max(2, min(whole, MAX_LANES))
    bx, by, bw, bh = 44, 34, 84, 132
    ax, ay, aw, ah = 178, 58, 186, 84
    parts = [
        _text(bx + bw / 2, 20, f"B · {outputs} × {rank}", "strong"),
        _text(ax + aw / 2, 20, f"A · {rank} × {inputs}", "strong"),
        _text(153, 105, "×", "strong"),
    ]
    for t in range(ranks):
        y, h = by + bh * t / ranks, bh / ranks
        parts.append(_text(22, y + h / 2 + 4, f"y{'₀₁₂'[t]}", "soft"))
        for column in range(ranks):
            x, w = bx + bw * column / ranks, bw / ranks
            filled = plain or column == t
            style = f"r{t}" if filled else "zero"
            parts.append(
                f"<rect class='{style}' x='{x + 1:.1f}' y='{y + 1:.1f}' width='{w - 2:.1f}' height='{h - 2:.1f}'/>"
            )
            if not filled:
                parts.append(_text(x + w / 2, y + h / 2 + 4, "0", "soft"))
        y, h = ay + ah * t / ranks, ah / ranks
        parts.append(f"<rect class='r{t}' x='{ax}' y='{y + 1:.1f}' width='{aw}' height='{h - 2:.1f}'/>")
        parts.append(_text(ax + aw / 2, y + h / 2 + 4, f"{holder} {t}", "r0-text" if t == 0 else "on-rank"))
    words = (
        "Each rank's rows of B touch every row of A: the ranks have to put A's results together first."
        if plain
        else "Each rank's block of B touches only its own rows of A: it needs nothing from the others."
    )
    return _svg(words, 178, parts)


def _lane(lane: int, lanes: int) -> tuple[float, float]:
    width = (WIDTH - 2 * MARGIN - 8 * (lanes - 1)) / lanes
    return MARGIN + lane * (width + 8), width


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"


def _text(x: float, y: float, words: str, style: str = "") -> str:
    chosen = f" class='{style}'" if style else ""
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='middle'{chosen}>{escape(words)}</text>"


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return f"<svg role='img' aria-label='{escape(title, quote=True)}' viewBox='0 0 {WIDTH} {height:.0f}'>{''.join(parts)}</svg>"
