"""The tiles that the separate kernels take: every row with an adapter in exactly one, of its own adapter."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sgl_bdlora.kernels.separate import most_tiles, order_of, tiles_of

OWNERS = st.lists(st.integers(-1, 6), max_size=70)


@given(owners=OWNERS, rows=st.sampled_from([1, 4, 16]), behind=st.integers(0, 9))
def test_every_row_is_in_one_tile_of_its_adapter(owners, rows, behind):
    owners = np.array(owners, dtype=np.int32)
    order, tiles = order_of(owners, len(owners) + behind), tiles_of(owners, rows)
    assert sorted(order) == list(range(len(owners) + behind))
    place = 0
    for adapter, first, count in tiles:
        assert first == place
        assert 0 < count <= rows
        assert np.all(owners[order[first : first + count]] == adapter)
        place += count
    # What is left is the base model's, and then nobody's.
    assert np.all(owners[order[place : len(owners)]] == -1)
    assert list(order[len(owners) :]) == list(range(len(owners), len(order)))
    assert len(tiles) <= most_tiles(len(owners), 7, rows)


def test_rows_of_an_adapter_keep_their_order():
    owners = np.array([2, -1, 0, 2, 0, -1, 2], dtype=np.int32)
    assert list(order_of(owners, 7)) == [2, 4, 0, 3, 6, 1, 5]
    assert tiles_of(owners, 2).tolist() == [[0, 0, 2], [2, 2, 2], [2, 4, 1]]
