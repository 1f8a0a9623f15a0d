"""Lanes of different lengths: append and truncate with lanes=, and what all else makes of them."""

import gc

import numpy as np
import pytest

import pyvmm
from cuda_helper import InterfaceArray
from lanes_model import Lanes
from model import LAYOUTS, pattern, same
from support import to_numpy

LANED = ("lane", "c")


@pytest.fixture(params=LANED)
def ragged(empty, request):
    """Four lanes of 3, 0, 5 and 2 rows, and what they hold."""
    lanes = Lanes((4, 0, 6), "float32", 1, 40)
    x = pattern((4, 5, 6), "float32")
    with empty(shape=(4, 0, 6), axis=1, capacity=40, layout=request.param) as t:
        t.append(x, counts=(3, 0, 5, 2))
        lanes.append(x, range(4), (3, 0, 5, 2))
        yield t, lanes


# ---- appending and truncating ---------------------------------------------------------


def test_each_lane_grows_at_its_own_length(ragged):
    tensor, lanes = ragged
    lanes.check(tensor)
    x = pattern((2, 3, 6), "float32", 1)
    tensor.append(x, lanes=[3, 1])
    lanes.append(x, [3, 1], (3, 3))
    lanes.check(tensor)
    x = pattern((4, 2, 6), "float32", 2)
    tensor.append(x)  # without lanes: to all of them
    lanes.append(x, range(4), (2, 2, 2, 2))
    lanes.check(tensor)
    tensor.truncate(3, lanes=(0, 2))
    tensor.truncate(np.array([1, 0]), lanes=np.array([3, 1]))
    lanes.truncate((0, 2, 3, 1), (3, 3, 1, 0))
    lanes.check(tensor)
    tensor.truncate(2)  # what is longer
    lanes.truncate((0, 2), (2, 2))
    lanes.check(tensor)


@pytest.mark.parametrize(
    "numbers",
    [list, tuple, np.array, lambda n: np.array(n, np.int32), lambda n: np.array(n, np.uint8)],
)
def test_any_sequence_of_integers(ragged, numbers):
    tensor, lanes = ragged
    x = pattern((2, 3, 6), "float32", 1)
    tensor.append(x, lanes=numbers([2, 0]), counts=numbers([1, 3]))
    lanes.append(x, (2, 0), (1, 3))
    tensor.truncate(numbers([5, 0]), lanes=numbers([2, 3]))
    lanes.truncate((2, 3), (5, 0))
    lanes.check(tensor)


def test_a_tensor_with_one_length_has_lane_0(empty):
    with empty(shape=(3, 0, 4), axis=1, layout="seq") as t:
        x = pattern((3, 5, 4), "float32")
        t.append(x, lanes=[0], counts=[2])
        assert t.lengths == (2,)
        assert not t.ragged
        assert same(to_numpy(t), np.ascontiguousarray(x[:, :2]))
        t.truncate(1, lanes=[0])
        assert t.lengths == (1,)
        with pytest.raises(ValueError, match="lane 1 is out of range: the tensor has 1"):
            t.append(x, lanes=[1])


def test_lengths_of_every_layout(empty):
    for layout, shape, axis, expected in [
        ("seq", (3, 2, 0), 2, 1),
        ("lane", (3, 2, 0), 2, 3),
        ("c", (3, 2, 0), 2, 3),  # two lanes for each, which grow together
        ("lane", (0, 2), 0, 1),
        ("c", (0, 2), 0, 1),
    ]:
        with empty(shape=shape, axis=axis, layout=layout) as t:
            t.append(pattern((*shape[:axis], 4, *shape[axis + 1 :]), "float32"))
            assert t.lengths == (4,) * expected


def test_append_many_to_lanes_is_all_or_none(empty, device):
    with (
        empty(shape=(4, 0, 8), axis=1, layout="lane", capacity=50) as k,
        empty(shape=(4, 0, 8), axis=1, layout="lane", capacity=4) as v,
    ):
        x = pattern((2, 3, 8), "float32")
        models = [Lanes((4, 0, 8), "float32", 1, capacity) for capacity in (50, 4)]
        pyvmm.append_many([k, v], [x, x], lanes=[1, 3], counts=[3, 2])
        for model in models:
            model.append(x, (1, 3), (3, 2))
        with pytest.raises(pyvmm.CapacityError, match="in lane 1 exceed the capacity of 4"):
            pyvmm.append_many([k, v], [x, x], lanes=[3, 1], counts=[2, 2])
        for tensor, model in zip((k, v), models, strict=True):
            model.check(tensor)


# ---- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lanes": [0, 4]}, ValueError, "lane 4 is out of range: the tensor has 4"),
        ({"lanes": [2, 2]}, ValueError, "lane 2 is named twice"),
        ({"lanes": [0, 1, 2]}, ValueError, r"dimension 0 has size 2, but .* 3 lane"),
        ({"lanes": [0, 1], "counts": [1]}, ValueError, "counts has 1 entries for 2 lanes"),
        ({"lanes": [0, 1], "counts": [1, 4]}, ValueError, "4 rows are to go to lane 1, but .* 3"),
        ({"counts": [1, 1]}, ValueError, "stands for all 4"),
        ({"lanes": [0, -1]}, ValueError, r"lanes\[1\] must be at least 0"),
        ({"lanes": 1}, TypeError, "lanes must be a sequence of integers, not int"),
        ({"lanes": "01"}, TypeError, "lanes must be a sequence of integers, not str"),
        ({"lanes": {0, 1}}, TypeError, "not set"),
        ({"lanes": [0.0, 1.0]}, TypeError, r"lanes\[0\] must be an integer, not float"),
        ({"lanes": [False, True]}, TypeError, "not bool"),
        ({"lanes": [0, 1], "counts": 3}, TypeError, "counts must be a sequence"),
        ({"lanes": [0, 2**64]}, OverflowError, "does not fit 64 bits"),
    ],
)
def test_bad_lanes(ragged, arguments, error, message):
    tensor, lanes = ragged
    x = pattern((2, 3, 6), "float32", 1)
    with pytest.raises(error, match=message):
        tensor.append(x, **arguments)
    with pytest.raises(error, match=message):
        pyvmm.append_many([tensor], [x], **arguments)
    lanes.check(tensor)


@pytest.mark.parametrize(
    ("n", "lanes", "error", "message"),
    [
        (4, [0], ValueError, "4 rows are more than the length of lane 0, 3"),
        ([1, 6], [0, 2], ValueError, "6 rows are more than the length of lane 2, 5"),
        (0, [1, 4], ValueError, "lane 4 is out of range"),
        (0, [1, 1], ValueError, "named twice"),
        ([0], [0, 2], ValueError, "n has 1 entries for 2 lanes"),
        (-1, [0], ValueError, "at least 0"),
        (1.5, [0], TypeError, "n must be an integer"),
        (0, 2, TypeError, "lanes must be a sequence"),
        ([1, 1], None, TypeError, "n must be an integer"),
    ],
)
def test_bad_truncation(ragged, n, lanes, error, message):
    tensor, model = ragged
    with pytest.raises(error, match=message):
        tensor.truncate(n, lanes=lanes)
    model.check(tensor)


def test_grow_refuses_a_ragged_tensor(ragged):
    tensor, lanes = ragged
    for n in (0, 1, 30, 1000):
        with pytest.raises(ValueError, match="different lengths, 0 to 5: append"):
            tensor.grow(n)
    tensor.map(30)
    lanes.check(tensor)
    tensor.truncate(0)
    assert tensor.grow(2).shape == (4, 2, 6)


# ---- exports --------------------------------------------------------------------------


def test_pins_and_views(empty, device):
    with empty(shape=(3, 0, 4), axis=1, layout="lane") as t:
        t.append(pattern((3, 6, 4), "float32"), counts=[6, 2, 4])
        shown, later = t[:4], t[:6]
        holder = t[:4].__dlpack__()
        # Rows that a pin covers and that a short lane does not have yet may be written.
        x = pattern((1, 2, 4), "float32", 1)
        t.append(x, lanes=[1])
        assert same(to_numpy(t)[1:2, 2:4], x)
        gc.collect()
        with pytest.raises(BufferError, match="covers rows up to 4"):
            t.truncate(3, lanes=[1])
        t.truncate(4, lanes=[0])
        assert same(to_numpy(shown)[1:2, 2:4], x)
        with pytest.raises(BufferError, match="truncated away"):
            later.__dlpack__()  # rows of lane 0 are gone
        del holder
        t.truncate(3, lanes=[1])
        with pytest.raises(BufferError, match="truncated away"):
            shown.__dlpack__()
        assert t.lengths == (4, 3, 4)


def test_fork_keeps_the_lengths(ragged):
    tensor, lanes = ragged
    with tensor.fork() as fork:
        lanes.check(fork)
        x = pattern((1, 7, 6), "float32", 3)
        fork.append(x, lanes=[1])
    with tensor.fork(2) as fork:
        assert fork.lengths == (2, 0, 2, 2)
        assert same(to_numpy(fork)[2], np.ascontiguousarray(to_numpy(tensor)[2][:2]))
    lanes.check(tensor)


def test_repr(ragged, empty):
    tensor, _ = ragged
    assert "lengths 3, 0, 5, 2, mapped" in repr(tensor)
    tensor.truncate(0)
    assert "length 0, mapped" in repr(tensor)
    with empty(shape=(9, 0, 2), axis=1, layout="lane") as t:
        t.append(pattern((1, 3, 2), "float32"), lanes=[4])
        assert "lengths 0 to 3 in 9 lanes" in repr(t)


def test_concat_equals_concatenate_of_what_is_shown(host):
    tensor = pyvmm.empty((3, 0, 4), "float32", axis=1, capacity=50, layout="lane")
    tensor.append(pattern((3, 6, 4), "float32"), counts=[6, 2, 4])
    cache = np.from_dlpack(tensor)
    new = pattern((3, 1, 4), "float32", 1)
    before, expected = cache.copy(), np.concatenate([cache, new], axis=1)
    result = pyvmm.concat(cache, new, axis=1)
    assert same(result, expected)
    assert same(cache, before)
    assert tensor.lengths == (6, 2, 4)
    # The result is even: it goes on in place.
    again = pyvmm.concat(result, new, axis=1)
    assert same(again, np.concatenate([expected, new], axis=1))
    assert again.ctypes.data == result.ctypes.data
    # And so does the tensor's own array once its lanes are even.
    del cache, result, again
    tensor.truncate(2)
    cache = np.from_dlpack(tensor)
    result = pyvmm.concat(cache, new, axis=1)
    assert result.ctypes.data == tensor.ptr
    assert tensor.lengths == (3, 3, 3)
    del cache, result
    tensor.close()


# ---- launches -------------------------------------------------------------------------


def launches(tensor):
    return tensor.pool.stats()["driver_calls"].get("launch", 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_and_values_of_32_layers_are_one_launch(cuda, layout):
    shape = (2, 3, 0, 8)
    tensors = [
        pyvmm.empty(shape, "float16", axis=2, capacity=64, device=cuda, layout=layout)
        for _ in range(64)
    ]
    sources = [pattern((2, 3, 1, 8), "float16", seed) for seed in range(64)]
    given = [InterfaceArray(x) for x in sources]
    for t in tensors:
        t.map(4)
    for _ in range(3):
        before = launches(tensors[0])
        pyvmm.append_many(tensors, given)
        assert launches(tensors[0]) - before == 1
    for t, x, array in zip(tensors, sources, given, strict=True):
        assert same(to_numpy(t), np.concatenate([x] * 3, axis=2))
        t.close()
        array.free()


def test_a_ragged_batch_of_64_keys_and_values_is_one_launch(cuda):
    pair = [
        pyvmm.empty((64, 0, 2, 8), "float16", axis=1, capacity=64, device=cuda, layout="lane")
        for _ in range(2)
    ]
    models = [Lanes((64, 0, 2, 8), "float16", 1, 64) for _ in pair]
    for t in pair:
        t.map(40)
    for seed, counts in enumerate([[1 + i % 9 for i in range(64)], [1] * 64]):
        x = [pattern((64, 9, 2, 8), "float16", 2 * seed + i) for i in range(2)]
        before = launches(pair[0])
        given = [InterfaceArray(each) for each in x]
        pyvmm.append_many(pair, given, counts=counts)
        assert launches(pair[0]) - before == 1
        for each in given:
            each.free()
        for model, each in zip(models, x, strict=True):
            model.append(each, range(64), counts)
    for t, model in zip(pair, models, strict=True):
        model.check(t)
        t.close()
