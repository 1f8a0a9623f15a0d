"""pyvmm.cupy.concatenate: CuPy's own values always, appends where it can be."""

import functools
import os

import numpy as np
import pytest

if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
    pytest.skip(
        "the simulated driver's memory is not a GPU's: CuPy cannot use it", allow_module_level=True
    )
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
try:
    cupy.cuda.runtime.getDeviceCount()
except cupy.cuda.runtime.CUDARuntimeError as error:
    pytest.skip(f"CuPy has no CUDA device: {error}", allow_module_level=True)
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import concat_programs  # noqa: E402
import pyvmm  # noqa: E402
import pyvmm.cupy  # noqa: E402
from concat_arrays import Uncollected, counted, in_use  # noqa: E402


@pytest.fixture(autouse=True)
def stats():
    pyvmm.concat_stats(reset=True)
    return counted


def same(result, expected):
    assert type(result) is cupy.ndarray and result.dtype == expected.dtype
    assert result.shape == expected.shape and bool((result == expected).all())


@pytest.mark.parametrize("layout", ["seq", "lane", "c"])
@pytest.mark.parametrize("axis", [0, 1, -2])
def test_a_growing_cache(stats, axis, layout):
    shape = [2, 3, 2, 4]
    cache = expected = cupy.random.rand(*shape, dtype="float32")
    kept = []
    for n_rows in (1, 3, 0, 1):
        shape[axis] = n_rows
        new = cupy.random.rand(*shape, dtype="float32")
        cache = pyvmm.cupy.concatenate((cache, new), axis, layout=layout)
        expected = cupy.concatenate((expected, new), axis)
        kept.append((cache, expected))
    for result, was in kept:
        same(result, was)
    assert stats() == {"taken_in": 1, "appended": 3}


@pytest.mark.parametrize("take", [cupy.from_dlpack, cupy.asarray])
def test_the_rows_of_a_tensor(stats, take):
    t = pyvmm.empty((2, 0, 4), axis=1, capacity=50, device="cuda:0")
    new = cupy.random.rand(2, 3, 4, dtype="float32")
    t.append(new)
    cache = pyvmm.cupy.concatenate([take(t), new], axis=1)
    same(cache, cupy.concatenate([new, new], axis=1))
    same(pyvmm.cupy.concatenate((cache[:, :2], new), 1), cupy.concatenate((new[:, :2], new), 1))
    assert stats() == {"appended": 1, "forked": 1}
    assert t.length == 6 and cache.data.ptr == t.ptr


def test_on_streams(stats):
    cache = expected = cupy.random.rand(8, 1000, dtype="float32")
    for _ in range(6):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            stream.wait_event(cupy.cuda.Stream.null.record())
            new = cupy.random.rand(8, 3000, dtype="float32")
            cache = pyvmm.cupy.concatenate((cache, new), 1)
            expected = cupy.concatenate((expected, new), 1)
            same(cache, expected)
            stream.synchronize()
    assert stats() == {"taken_in": 1, "appended": 5}


def test_left_to_cupy(stats):
    a = cupy.ones((2, 3), "float32")
    same(pyvmm.cupy.concatenate((a, a, a)), cupy.concatenate((a, a, a)))
    same(pyvmm.cupy.concatenate((a, a), dtype="float64"), cupy.ones((4, 3)))
    same(pyvmm.cupy.concatenate((a, a.astype("float64"))), cupy.ones((4, 3)))
    same(pyvmm.cupy.concatenate((a, a), None), cupy.ones(12, "float32"))
    out = cupy.empty((4, 3), "float32")
    assert pyvmm.cupy.concatenate((a, a), 0, out) is out
    with pytest.raises(ValueError):
        pyvmm.cupy.concatenate((a, a[:, :2]))
    assert stats() == {"fell_back": 6}


def test_dropping_every_result_drops_the_memory():
    before = in_use("cuda:0")
    with Uncollected():
        start = cupy.ones((2, 3, 4), "float32")
        caches = [start] * 4
        for _ in range(4):
            caches = [pyvmm.cupy.concatenate((cache, cache), 1) for cache in caches]
        kept = caches[0][:, 1:]
        assert in_use("cuda:0") > before
        del caches
        assert in_use("cuda:0") > before
        del kept
        assert in_use("cuda:0") == before


@settings(deadline=None, max_examples=50)
@given(program=concat_programs.PROGRAMS, capacity=st.sampled_from([1, 7, None]))
def test_invariant_10_of_any_program(program, capacity):
    concat_programs.run(
        program,
        functools.partial(pyvmm.concat, capacity=capacity),
        make=cupy.asarray,
        clone=cupy.copy,
        value=lambda x: np.asarray(x.get()),
    )
