"""The three layouts: one shape, different strides."""

import numpy as np
import pytest

import pyvmm
from model import (
    LAYOUTS,
    Model,
    expected_strides,
    lane_count,
    lane_row_bytes,
    pattern,
    same,
)
from support import smallest_block, to_numpy

SHAPES = [
    # shape with 0 at the growth axis, axis
    ((0,), 0),
    ((0, 5), 0),
    ((3, 0), 1),
    ((2, 0, 3, 4), 1),
    ((2, 3, 0, 4), 2),
    ((2, 3, 4, 0), 3),
    ((0, 2, 3, 4), 0),
    ((1, 0, 3, 1), 1),
    ((1, 1, 0, 1), 2),
    ((2, 1, 2, 1, 2, 1, 0, 3), 6),
]


def grown(shape, axis, n):
    return shape[:axis] + (n,) + shape[axis + 1 :]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_strides_and_contents(empty, device, shape, axis, layout):
    with empty(shape=shape, axis=axis, capacity=77, layout=layout) as t:
        n_lanes = lane_count(shape, axis, layout)
        lane_bytes, remainder = divmod(t.stats()["reserved_bytes"], n_lanes)
        assert remainder == 0
        assert lane_bytes % smallest_block(device) == 0  # lanes begin on block boundaries
        assert lane_bytes >= 77 * lane_row_bytes(shape, "float32", axis, layout)
        assert t.strides == expected_strides(shape, "float32", axis, layout, lane_bytes)
        assert (t.shape, t.ndim, t.axis, t.layout) == (shape, len(shape), axis, layout)
        model = Model(shape, "float32", axis, 77)
        for seed, n in enumerate((1, 5, 0, 13, 58)):
            x = pattern(grown(shape, axis, n), "float32", seed)
            t.append(x)
            model.append(x)
            assert t.shape == model.array.shape
        assert t.length == 77
        assert same(to_numpy(t), model.array)
        assert same(to_numpy(t[5:20]), model.rows(5, 20))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_axis_counts_from_the_end(empty, layout):
    with empty(shape=(2, 0, 3), axis=-2, layout=layout) as t:
        assert t.axis == 1
        t.append(pattern((2, 4, 3), "float32"))
        assert same(to_numpy(t), pattern((2, 4, 3), "float32"))


def test_seq_is_one_dense_lane(empty):
    with empty(shape=(8, 0, 4, 16), axis=1, layout="seq") as t:
        assert t.strides == (4 * 16 * 4, 8 * 4 * 16 * 4, 16 * 4, 4)


def test_lane_begins_each_sequence_on_a_block(empty, device):
    block = 4 * smallest_block(device)
    with empty(shape=(8, 0, 4, 16), axis=1, layout="lane", block_size=block) as t:
        assert t.strides[1:] == (4 * 16 * 4, 16 * 4, 4)
        assert t.strides[0] % block == 0
        t.grow(1)
        assert t.stats()["block_count"] == 8
        assert t.stats()["mapped_bytes"] == 8 * block


def test_c_is_as_the_shape_says(empty):
    with empty(shape=(2, 3, 0, 4), axis=2, layout="c") as t:
        assert t.strides[2:] == (16, 4)
        assert t.strides[0] == 3 * t.strides[1]
        t.grow(1)
        assert t.stats()["block_count"] == 6


def test_default_layout(cuda):
    with pyvmm.empty((2, 0, 3), "float32", axis=1, capacity=10, device=cuda) as t:
        assert t.layout == "seq"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_of_any_size_that_the_granularity_divides(empty, device, layout):
    """Also one that is no power of two, and one above the whole capacity."""
    for n in (1, 3, 7):
        block = n * smallest_block(device)
        with empty(shape=(2, 0, 5), axis=1, layout=layout, block_size=block) as t:
            x = pattern((2, 1000, 5), "float32")
            t.append(x)
            lanes = lane_count((2, 0, 5), 1, layout)
            per_lane = -(-1000 * lane_row_bytes((2, 0, 5), "float32", 1, layout) // block)
            assert t.stats()["block_count"] == lanes * per_lane
            assert t.stats()["reserved_bytes"] == lanes * per_lane * block
            assert same(to_numpy(t), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_straddle_blocks(empty, device, layout):
    """Rows of a size that no block is a multiple of."""
    block = smallest_block(device)
    width = 1021
    capacity = 3 * block // width
    with empty(
        shape=(0, width), dtype="uint8", capacity=capacity, layout=layout, block_size=block
    ) as t:
        x = pattern((capacity, width), "uint8")
        for start in range(0, capacity, max(1, capacity // 7)):
            stop = min(capacity, start + max(1, capacity // 7))
            t.append(x[start:stop])
            assert t.stats()["block_count"] == -(-t.length * width // block)
        assert same(to_numpy(t), x)
        assert np.array_equal(to_numpy(t[capacity - 1 :]), x[-1:])
