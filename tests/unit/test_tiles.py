"""Tile sizes for layers and devices that were never swept: what the kernels take for granted holds for all of them."""

import itertools

import pytest

from sgl_bdlora.kernels.rows import TOGETHER, padded
from sgl_bdlora.kernels.tiles import FEW_ROWS, FEWER_ROWS, H200, KINDS, SMALLEST_SUM, SUMS, Device, few_rows, tiles_for

L40S = Device(142, 101_376)
# (hidden, q, k and v, inner): Llama-3.1 8B and 70B, Qwen2.5 7B and 0.5B, the demo's.
MODELS = [
    (4096, 4096, 1024, 14336),
    (8192, 8192, 1024, 28672),
    (3584, 3584, 512, 18944),
    (896, 896, 128, 4864),
    (576, 576, 192, 1536),
]


def layers_of(hidden, q, kv, inner, tp):
    """(inputs, ends) of the four products on a rank."""
    q, kv, inner = q // tp, kv // tp, inner // tp
    yield hidden, [q, q + kv, q + 2 * kv]
    yield q, [hidden]
    yield hidden, [inner, 2 * inner]
    yield inner, [hidden]


@pytest.mark.parametrize("device", [H200, L40S, Device(84, 101_376), Device(170, 232_448)], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_pieces_divide_and_fit(model, device):
    found = 0
    for tp, (block_t, many) in itertools.product((1, 2, 3, 4, 8), KINDS):
        if any(size % (8 * tp) for size in model[1:]):
            continue
        for inputs, ends in layers_of(*model, tp):
            tiles = tiles_for(ends, inputs, block_t, many, device)
            if tiles is None:
                continue
            found += 1
            assert inputs % tiles.block_k == 0
            assert inputs % (tiles.splits * tiles.shrink_k) == 0
            assert tiles.splits in (1, 2, 4)
            assert min(tiles.block_k, tiles.shrink_k) >= 16
            assert 0 < tiles.early <= inputs // tiles.block_k // tiles.parts * tiles.block_k
            if tiles.parts > 1:
                assert tiles.parts * block_t * tiles.block_n >= SMALLEST_SUM
                assert tiles.parts * block_t * ends[-1] <= SUMS
                assert ends[-1] // tiles.block_n * tiles.parts + tiles.programs <= device.multiprocessors
            assert tiles.early % tiles.block_k == 0
            assert all(end % tiles.block_n == 0 for end in ends)
            blocks = ends[-1] // tiles.block_n * tiles.parts
            if block_t > 16 and not many and blocks + 4 <= device.multiprocessors:
                assert blocks + tiles.programs <= device.multiprocessors
            assert max(tiles.buffers(block_t)) <= device.loops, tiles
    assert found > 20


def test_a_device_with_little_shared_memory_takes_fewer_rank_rows_at_a_time():
    large, small = (tiles_for([4096], 2048, 64, True, device) for device in (H200, L40S))
    assert (large.rows, large.late_stages) == (32, 6)
    assert small.rows == 16


@pytest.mark.parametrize(
    ("ends", "inputs", "kind", "wanted"),
    [
        # q/k/v and gate/up of 8B at TP 2, and gate/up at TP 1: two blocks on a multiprocessor. TP 4's two buffers leave no room.
        ([2048, 2560, 3072], 4096, (16, True), {"stages": 4, "splits": 2, "rows": 128}),
        ([7168, 14336], 4096, (16, True), {"block_n": 64, "stages": 4, "splits": 1, "parts": 1, "programs": 36}),
        ([14336, 28672], 4096, (16, True), {"stages": 3}),
        ([3584, 7168], 4096, (16, True), {"block_n": 64, "stages": 4}),
        # Two narrow tiles on a multiprocessor where they nearly fill all places (many rank rows: none of 32), one wave else.
        ([7168, 14336], 4096, (16, False), {"block_n": 64, "block_k": 128, "stages": 4, "programs": 36}),
        ([8192], 3584, (16, False), {"block_n": 32, "block_k": 256, "stages": 4}),
        ([8192], 3584, (16, True), {"block_n": 128}),
        ([6144], 3584, (16, False), {"block_n": 64}),
        ([9216], 3584, (16, False), {"block_n": 128}),
        ([8192, 16384], 3072, (16, False), {"block_n": 128}),
        ([2048, 2560, 3072], 4096, (16, False), {"block_n": 32, "block_k": 128}),
        ([4096], 7168, (16, False), {"block_n": 64, "block_k": 256, "parts": 1}),
        ([14336, 28672], 4096, (32, False), {"block_n": 128, "stages": 3}),
        ([7168, 14336], 4096, (32, False), {"block_n": 128, "parts": 1}),
        # A tile's K is shared: q/k/v at TP 8, 4 and, of 70B, 8; 128 rows; many rank rows of one slice. Not where K is short.
        ([512, 640, 768], 4096, (16, False), {"block_n": 32, "parts": 4, "programs": 36, "early": 512}),
        ([512, 640, 768], 4096, (64, True), {"block_n": 32, "parts": 3, "programs": 60}),
        ([512], 4096, (16, False), {"block_n": 32, "parts": 4}),
        ([1024, 1280, 1536], 4096, (32, False), {"block_n": 32, "parts": 2, "programs": 36, "splits": 4}),
        ([1024, 1152, 1280], 8192, (16, True), {"block_n": 32, "block_k": 128, "parts": 2}),
        ([1024, 1152, 1280], 3584, (16, True), {"block_n": 16, "block_k": 256, "parts": 1}),
        ([2048, 2560, 3072], 4096, (128, False), {"block_n": 64, "parts": 2, "stages": 3}),
        ([4096], 7168, (128, False), {"block_n": 64, "parts": 2, "programs": 4, "rows": 32}),
        ([4096], 7168, (32, True), {"block_n": 128, "parts": 3, "stages": 3, "programs": 36}),
        ([4096], 2048, (32, True), {"block_n": 64, "parts": 1}),
        # Nor for one slice with few rank rows or 16 rows, for few rank rows at 64 rows, or where slices do not divide into wider tiles.
        ([4096], 7168, (32, False), {"block_n": 32, "parts": 1}),
        ([4096], 7168, (16, True), {"block_n": 64, "parts": 1}),
        ([2048, 2560, 3072], 4096, (64, False), {"block_n": 32, "parts": 1}),
        ([512, 656, 800], 4096, (16, False), {"block_n": 16, "parts": 1}),
        # One part of K for h where x is short.
        ([4096], 7168, (16, True), {"splits": 1}),
        ([4096], 7168, (32, True), {"splits": 2}),
        ([4096], 2048, (64, True), {"splits": 1}),
        ([4096], 2048, (16, False), {"splits": 2}),
        # Four for few of q/k/v; at 64 rows where its tiles are shared too.
        ([2048, 2560, 3072], 4096, (16, False), {"splits": 4, "shrink_k": 256}),
        ([2048, 2560, 3072], 4096, (32, False), {"splits": 4, "shrink_k": 128, "shrink_rows": 16, "programs": 36}),
        ([2048, 2560, 3072], 4096, (64, False), {"splits": 2}),
        ([512, 640, 768], 4096, (64, False), {"splits": 4, "parts": 4}),
        ([512, 640, 768], 4096, (128, False), {"splits": 2}),
        ([512, 640, 768], 4096, (32, True), {"splits": 2}),
        # For few rank rows at 32 rows h of gate/up in one round, or in long pieces where its tiles are narrow.
        ([7168, 14336], 4096, (32, False), {"programs": 8, "shrink_rows": 64, "shrink_k": 256, "halves": False}),
        ([3584, 7168], 4096, (32, False), {"block_n": 64, "programs": 8, "shrink_rows": 64, "shrink_k": 256}),
        # Fewer where they have no more places beside the tiles (1B); as many where there is a second wave anyway.
        ([8192, 16384], 2048, (32, False), {"block_n": 128, "programs": 4, "shrink_rows": 64, "halves": False}),
        ([14336, 28672], 4096, (32, False), {"block_n": 128, "programs": 8}),
        ([1792, 3584], 4096, (32, False), {"block_n": 32, "programs": 20, "shrink_rows": 16, "shrink_k": 512}),
        ([1792, 3584], 4096, (64, False), {"programs": 20, "shrink_rows": 16, "shrink_k": 128}),
        # Four programs for h of one slice compute half as many rank rows at a time where there are few.
        ([4096], 512, (32, False), {"programs": 4, "shrink_rows": 64, "shrink_k": 128, "halves": True}),
        ([4096], 7168, (64, False), {"programs": 4, "shrink_rows": 64, "halves": True}),
        ([4096], 7168, (128, False), {"programs": 4, "halves": True}),
        ([14336, 28672], 4096, (64, False), {"programs": 4, "shrink_rows": 64, "halves": False}),
        ([4096], 7168, (16, False), {"halves": False}),
        ([4096], 7168, (64, True), {"halves": False}),
        # Half the tiles for q/k/v at 64 rows, if one wave is left.
        ([2048, 2560, 3072], 4096, (64, True), {"block_n": 64, "programs": 72, "shrink_rows": 64}),
        ([8192, 9216, 10240], 8192, (64, True), {"block_n": 128, "programs": 36, "shrink_rows": 32}),
        # Of two parts one would be too narrow.
        ([4096], 304, (16, True), {"splits": 1, "shrink_k": 16}),
    ],
)
def test_tiles_that_were_swept_or_follow(ends, inputs, kind, wanted):
    tiles = tiles_for(ends, inputs, *kind, H200)
    assert {name: getattr(tiles, name) for name in wanted} == wanted


def test_sums_have_room_on_a_device_of_any_size():
    """With so many multiprocessors K would be in four parts."""
    tiles = tiles_for([16384], 8192, 64, True, Device(1000, 232_448))
    assert tiles.parts == SUMS // (64 * 16384) == 2


def test_few_rank_rows():
    assert [few_rows(tokens) for tokens in (1, 16, 17, 128)] == [FEWER_ROWS] * 2 + [FEW_ROWS] * 2
    assert [padded(rank, TOGETHER) for rank in (1, 4, 10, 12)] == [4, 4, 12, 12]
