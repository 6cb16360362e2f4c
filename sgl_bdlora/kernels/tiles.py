"""Tile sizes of the linear kernel (fused.py), for a layer's shape and a number of rows.

Swept on one H200 (benchmarks/kernels/tune.py): the four layers of Llama-3.1-8B at TP 2 with 1 to 128 rows, few rank rows and many, and
those of 8B and 70B at TP 4 and 8 with 8 and 32 rows and few rank rows. What held for all of them: the launch should be one
wave, or at 8 rows (chosen up to 16) a nearly full wave of two tiles to a multiprocessor. A tile takes most of a multiprocessor's shared
memory, because the weights' stream needs that much in flight, and the programs that compute h run on multiprocessors that have no tile. A
launch of a few blocks more than there are multiprocessors costs up to twice the time. So tiles are as narrow as leaves room for those
programs. The narrowest are not worth their bytes of x: then tiles are wider and programs share their K, which costs 1 to 2 us and pays
where K is long. What is chosen for other layers and sizes follows from that and was not swept.

Many rank rows are bound by how many bytes of A and B are in flight on a multiprocessor, which gets some 36 GB/s and waits 2 us for each
load while all of them read: so h is computed for more of them at a time, and a tile reads many at once or asks for few of them further
ahead, as far as registers and shared memory go.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

# Blocks that compute h: at least, where the tiles leave so many places, and at most.
FEWEST, MOST = 12, 36
# Rank rows up to which a batch has few: that four blocks compute in one round, two parts of K, 64 rows each.
FEW_ROWS = 128
# And in a batch of up to 16 rows, whose tiles take so many at a time.
FEWER_ROWS = 64
# Shared memory that the product of one block may use, bytes, and where a tile's K is shared or the launch is more than one wave.
SHARED, _SHARED_TWO = 147_000, 98_304
# Of a block's shared memory, what its loops leave to the rest.
_REST = 16_000
# Pipeline stages of the loads for h. There are as many buffers where rows are 64 and more, and one fewer else.
SHRINK_STAGES = 4
WIDTHS = (16, 32, 64, 128)
SHRINK_ROWS = 16
# Parts of K that h is computed in, powers of two: usually, and at most.
SPLITS, MAX_SPLITS = 2, 4
# Inputs before the end of the product at which a tile asks for h and B.
EARLY = 512
# Pipeline stages of the rank rows behind a tile's first, where it takes many at a time and where few.
LATE_STAGES = (3, 6)
# Numbers in the sums of tiles whose K is in parts, at most: parts x rows x outputs. And of one tile, at least.
SUMS = 2**21
SMALLEST_SUM = 2 * 16 * 16
# Rows of a batch up to which the product is bound by its weights' bytes, and one tile holds all of them.
FUSED_TOKENS = 128
# Rows of the batch (a power of two) and whether it may have more than `few_rows` rank rows: what there are tiles for. At 128 rows the
# separate kernels are the faster ones from some 200 rank rows on.
KINDS = ((16, False), (16, True), (32, False), (32, True), (64, False), (64, True), (FUSED_TOKENS, False))
# Where there are many rank rows: rank rows of h at a time by rows of the batch.
_SHRINK_MANY = {16: 32, 32: 64, 64: 32}
# There, three slices of h beside 64 rows of x, which are as many bytes as a tile's W by then: half the tiles, and blocks that compute h.
_BUSY_FEWEST, _BUSY_MOST, _BUSY_ROWS = 60, 72, 64
# There, numbers of x up to which h is computed in one part: half as much of h to read for every tile, and it is done in time.
_ONE_PART = 2**17
# In batches of up to 16 rows: shared memory of the product's block where two should come to a multiprocessor, and the part of those places
# that tiles must fill. Also with many rank rows in layers of several slices.
_SHARED_PAIR, _PAIRS = 80_000, 0.8
# Inputs from which it pays to share a tile's K between programs, and how many at most.
_LONG, _MOST_PARTS = 4096, 4


@dataclass(frozen=True)
class Device:
    """What tile sizes and launches depend on.

    shared: bytes of shared memory that one block may have. dependent: whether a kernel may be launched so that it begins before the one
    ahead of it has ended (compute capability 9.0 and above).
    """

    multiprocessors: int
    shared: int
    dependent: bool = False

    @property
    def loops(self) -> int:
        """Bytes of it that one loop's buffers may fill."""
        return self.shared - _REST


H200 = Device(132, 232_448, dependent=True)


@dataclass(frozen=True)
class Tiles:
    """block_n x block_k of W at a time in `stages` pipeline stages by `warps` warps; a tile's K is shared by `parts` blocks. early: inputs
    that are left of the first part when it asks for h and B, a multiple of block_k.

    rows: rank rows of h and B at a time; those behind the first are asked for (late_stages - 1) // 2 times ahead. programs: blocks that
    compute h, shrink_rows rank rows and shrink_k inputs at a time, K in `splits` parts, or two of four if all pieces are one round only
    then. halves: half as many rank rows at a time where there is a program for every piece then.
    """

    block_n: int
    block_k: int
    stages: int
    warps: int
    parts: int
    early: int
    rows: int
    late_stages: int
    programs: int
    splits: int
    shrink_rows: int
    shrink_k: int
    halves: bool = False

    def buffers(self, block_t: int) -> tuple[int, int, int]:
        """Bytes that its loops have in flight for 16-bit numbers: the product's, h's, and of the rank rows behind a tile's first."""
        product = (self.stages - 1) * 2 * (block_t + self.block_n) * self.block_k
        h = (SHRINK_STAGES - 1) * 2 * (block_t + self.shrink_rows) * self.shrink_k
        return product, h, (self.late_stages - 1) * self.rows * (2 * self.block_n + 8 * block_t)


@dataclass(frozen=True)
class _Case:
    """What tiles are chosen for: a layer, one of KINDS, and a device. widths: of tiles that the layer's slices divide into."""

    widths: list[int]
    slices: int
    outputs: int
    inputs: int
    block_t: int
    many: bool
    device: Device


def tiles_for(ends: Sequence[int], inputs: int, block_t: int, many: bool, device: Device) -> Tiles | None:
    """For a layer of `inputs` whose slices' outputs end at `ends`, and one of KINDS; None if the shapes do not divide."""
    widths = [n for n in WIDTHS if all(end % n == 0 for end in ends)]
    if not widths:
        return None
    slices, outputs, multiprocessors = len(ends), ends[-1], device.multiprocessors
    case = _Case(widths, slices, outputs, inputs, block_t, many, device)
    # From 32 rows on x comes to as many bytes as W, so it pays to spread both over more blocks; few rank rows leave it to four.
    fewest, most, shrink_rows = 4 if block_t > 16 and not many else FEWEST, MOST, SHRINK_ROWS
    if many:
        shrink_rows = _SHRINK_MANY[block_t]
        if block_t == 64 and slices == 3 and outputs // widths[-1] + _BUSY_FEWEST <= multiprocessors:
            fewest, most, shrink_rows = _BUSY_FEWEST, _BUSY_MOST, _BUSY_ROWS
    block_n, parts, pairs = _grid(case, fewest)
    blocks = outputs // block_n * parts
    one_wave = blocks + fewest <= multiprocessors
    # As swept. One wave of tiles of 32 starts sooner with small pieces.
    deep = block_t == 16 and parts == 1 and block_n in ((16, 32) if pairs else (16, 32, 64) if many else (16, 64))
    block_k = divisor(256 if deep else 128, inputs)
    programs = most if pairs else min(most, max(fewest, multiprocessors - blocks))
    h = _h(case, block_n, parts, programs, shrink_rows, one_wave)
    if min(block_k, h["shrink_k"]) < 16:
        return None
    shared = min(SHARED, device.loops)
    if parts > 1 or not one_wave:
        shared = min(_SHARED_TWO, device.loops * 2 // 3)
    buffer = (block_t + block_n) * block_k * 2
    if pairs or (many and slices > 1 and block_t == 16 and 2 * buffer <= _SHARED_PAIR):
        shared = min(shared, _SHARED_PAIR, device.loops // 2)
    rows = _rows(block_t, block_n, many)
    tiles = Tiles(
        block_n,
        block_k,
        # One more than buffers.
        stages=max(2, min(6, shared // buffer + 1)),
        warps=warps_for(block_t, block_n),
        parts=parts,
        early=min(EARLY // block_k, inputs // block_k // parts) * block_k,
        rows=rows,
        late_stages=LATE_STAGES[many and rows <= 32],
        **h,
    )
    while tiles.rows > 16 and tiles.buffers(block_t)[2] > device.loops // (2 if pairs else 1):
        tiles = replace(tiles, rows=tiles.rows // 2)
    return tiles


def _h(case: _Case, block_n: int, parts: int, programs: int, shrink_rows: int, one_wave: bool) -> dict[str, int]:
    """The fields of Tiles that say how h is computed.

    programs: that have places beside tiles of block_n columns and `parts`. shrink_rows: rank rows at a time, where nothing speaks for
    others. one_wave: tiles and the fewest programs are one.
    """
    block_t, many = case.block_t, case.many
    most_splits, most_k, halves = SPLITS, 256 if block_t == 16 else 128, False
    if many:
        most_splits = 1 if case.slices < 3 and block_t * case.inputs <= _ONE_PART else SPLITS
    elif case.slices == 3 and (block_t <= 32 or (block_t == 64 and parts > 1)):
        # Where few outputs stand beside each other h takes as long as the tiles.
        most_splits = MAX_SPLITS
    elif case.slices == 2 and block_t == 32:
        if block_n <= 32:
            most_k = 512
        else:
            # As many as compute FEW_ROWS in one round, unless that would take a second wave.
            wanted = FEW_ROWS // 64 * SPLITS * case.slices
            programs = min(programs, wanted) if one_wave else wanted
            shrink_rows, most_k = 64, 256
    if programs < FEWEST:
        shrink_rows, halves = 64, case.slices == 1
    room = case.device.loops // (SHRINK_STAGES * 2 * (block_t + shrink_rows))
    splits, shrink_k = _shrink_parts(case.inputs, min(most_k, power_of_two(room)), most_splits)
    return dict(programs=programs, splits=splits, shrink_rows=shrink_rows, shrink_k=shrink_k, halves=halves)


def _grid(case: _Case, fewest: int) -> tuple[int, int, bool]:
    """Columns of a tile, parts of its K, and whether two tiles come to a multiprocessor. fewest: programs that compute h."""
    widths, outputs, block_t, many = case.widths, case.outputs, case.block_t, case.many
    multiprocessors = case.device.multiprocessors
    if block_t == 16:
        for n in widths:
            # Of tiles of 32 three have room.
            most = 2 * multiprocessors - (MOST if n > 32 else 0)
            if n >= (64 if many else 32) and _PAIRS * 2 * multiprocessors <= outputs // n <= most:
                return n, 1, True
    wave = next((n for n in widths if outputs // n + fewest <= multiprocessors), widths[-1])
    wide, beside = None, max(MOST, fewest)
    if wave == 16:
        wide = 32
    elif wave == 32 and block_t == FUSED_TOKENS:
        wide, beside = 64, fewest
    elif many and case.slices == 1 and block_t > 16:
        wide = 128
    if wide in widths and case.inputs >= _LONG:
        parts = min(_MOST_PARTS, (multiprocessors - beside) // (outputs // wide), SUMS // (block_t * outputs))
        if parts > 1:
            return wide, parts, False
    return wave, 1, False


def warps_for(block_t: int, block_n: int) -> int:
    """Of a program, for a tile of so many rows and columns."""
    return 8 if block_n >= 128 or block_t == 128 else 4


def few_rows(tokens: int) -> int:
    """Rank rows up to which a batch of so many rows has few."""
    return FEWER_ROWS if tokens <= KINDS[0][0] else FEW_ROWS


def _rows(block_t: int, block_n: int, many: bool) -> int:
    """As many as leave registers for h."""
    if block_t >= 64 or (many and block_t == 32):
        return 32
    return 128 if many and block_n < 128 else FEWER_ROWS


def _shrink_parts(inputs: int, most: int, most_parts: int) -> tuple[int, int]:
    """Parts of K for the shrink and the inputs that it reads at once, 16 if it can: fewest rounds of loads, then most parts."""
    blocks = {n: divisor(most, inputs // n) for n in (1, 2, 4) if n <= most_parts and inputs % n == 0}
    splits = min(blocks, key=lambda n: (blocks[n] < 16, inputs // n // blocks[n], -n))
    return splits, blocks[splits]


def power_of_two(most: int) -> int:
    """The largest that is not above `most`."""
    return 1 << most.bit_length() - 1


def divisor(block: int, *sizes: int) -> int:
    """The largest of block, block / 2, ... that divides all sizes."""
    while block > 1 and any(size % block for size in sizes):
        block //= 2
    return block
