"""Paddle and pyvmm share memory, both ways and through growth.

Paddle keeps one deleter for each address: of two wraps that live at once, dropping either
runs the later one's and the other's never runs. So a growing tensor is wrapped once, its
whole reservation, and each step's view is cut from that with paddle.as_strided.

Writing goes through the cut view, too: x[:, :n] = y on a strided reservation copies all of it,
mapped or not, and ends the process.
"""

import gc
import os
import threading
import warnings

import numpy as np
import pytest

from model import pattern

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "No ccache found"
    paddle = pytest.importorskip("paddle", reason="paddle is not installed")

import pyvmm  # noqa: E402

DTYPES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "complex64",
    "complex128",
]


@pytest.fixture(params=["host", "cuda:0"])
def device(request):
    if request.param == "host":
        return request.param
    if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
        pytest.skip("the simulated driver's memory is not a GPU's: Paddle cannot use it")
    # A CUDA object given to the CPU wheel would crash the process.
    if not paddle.is_compiled_with_cuda() or not paddle.device.cuda.device_count():
        pytest.skip("this Paddle has no CUDA device")
    return request.param


@pytest.fixture(params=["seq", "lane", "c"])
def layout(request):
    return request.param


def make(device, layout="seq", shape=(2, 0, 3, 4), axis=1, dtype="float32", capacity=8192):
    return pyvmm.empty(shape, dtype, axis=axis, capacity=capacity, device=device, layout=layout)


def rows(device, *shape, dtype="float32", seed=0):
    """Random bytes as a Paddle tensor of that shape and dtype."""
    place = paddle.CPUPlace() if device == "host" else paddle.CUDAPlace(0)
    if dtype in ("float8_e4m3fn", "float8_e5m2"):
        return paddle.to_tensor(pattern(shape, "uint8", seed), place=place).view(dtype)
    # Paddle reads NumPy's uint16 as bfloat16.
    numpy_dtype = "uint16" if dtype == "bfloat16" else dtype
    return paddle.to_tensor(pattern(shape, numpy_dtype, seed), place=place)


def raw(x):
    """The bytes of a Paddle tensor. Works on a copy: contiguous() would rewrite `x`."""
    own = paddle.empty_like(x).copy_(x, True) if x.dtype != paddle.bool else x.clone()
    if x.dtype in (paddle.float8_e4m3fn, paddle.float8_e5m2):
        own = own.view("uint8")
    return own.numpy().tobytes()


def same(a, b):
    return list(a.shape) == list(b.shape) and a.dtype == b.dtype and raw(a) == raw(b)


def joined(parts):
    return paddle.concat(parts, axis=1)


# ---- Paddle reads -------------------------------------------------------------------------


def test_shares_memory_shape_and_strides(device, layout):
    t = make(device, layout)
    x = rows(device, 2, 5, 3, 4)
    t.append(x)
    w = paddle.from_dlpack(t)
    assert w.data_ptr() == t.ptr
    assert tuple(w.shape) == (2, 5, 3, 4)
    assert tuple(4 * s for s in w.strides) == tuple(t.strides)
    assert same(w, x)


def test_head_major_cache(device, layout):
    t = make(device, layout, shape=(2, 3, 0, 8), axis=2)
    x = rows(device, 2, 3, 7, 8)
    t.append(x)
    assert same(paddle.from_dlpack(t), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(device, dtype):
    t = make(device, dtype=dtype)
    x = rows(device, 2, 5, 3, 4, dtype=dtype)
    assert x.dtype == getattr(paddle, dtype)
    t.append(x)
    w = paddle.from_dlpack(t)
    assert w.dtype == x.dtype
    assert w.data_ptr() == t.ptr
    assert raw(w.flatten() if dtype.startswith("float8") else w) == raw(x)


@pytest.mark.parametrize("shape, axis", [((0,), 0), ((1, 0, 1, 8), 1), ((1, 1, 0, 1), 2)])
def test_small_shapes(device, layout, shape, axis):
    t = make(device, layout, shape=shape, axis=axis)
    x = rows(device, *(6 if i == axis else n for i, n in enumerate(shape)))
    t.append(x)
    w = paddle.from_dlpack(t)
    assert same(w, x)


def test_one_sequence_counts_as_dense(device):
    """Dimensions of size 1 have canonical strides: Paddle compares strictly, and copies
    what it takes for strided."""
    t = make(device, shape=(1, 0, 3, 4))
    t.append(rows(device, 1, 5, 3, 4))
    assert paddle.from_dlpack(t).is_contiguous()


def test_length_zero(device, layout):
    t = make(device, layout)
    w = paddle.from_dlpack(t)
    assert tuple(w.shape) == (2, 0, 3, 4)
    del w
    t.append(rows(device, 2, 0, 3, 4))
    assert t.length == 0
    t.close()


def test_slices(device, layout):
    t = make(device, layout)
    x = rows(device, 2, 9, 3, 4)
    t.append(x)
    assert same(paddle.from_dlpack(t[2:5]), x[:, 2:5])
    assert same(paddle.from_dlpack(t.view(-7, -4)), x[:, 2:5])


# ---- growth: one wrap of the reservation ----------------------------------------------------


def test_one_wrap_serves_every_length(device, layout):
    t = make(device, layout, capacity=100_000)
    everything = paddle.from_dlpack(t.reserved())  # nothing is backed yet, nothing is touched
    assert everything.data_ptr() == t.ptr
    strides = everything.strides
    assert tuple(everything.shape) == (2, 100_000, 3, 4)
    parts, views = [], []
    for i, n in enumerate([3, 1, 300, 17, 4096, 20_000]):
        parts.append(rows(device, 2, n, 3, 4, seed=i))
        t.append(parts[-1])
        views.append(paddle.as_strided(everything, [2, t.length, 3, 4], strides))
    assert {view.data_ptr() for view in views} == {t.ptr}
    assert same(views[0], parts[0])
    assert same(views[2], joined(parts[:3]))
    assert same(views[-1], joined(parts))


def test_earlier_tensor_stays_right_through_growth(device, layout):
    t = make(device, layout, capacity=100_000)
    x = rows(device, 2, 3, 3, 4)
    t.append(x)
    first = paddle.from_dlpack(t)
    t.append(rows(device, 2, 20_000, 3, 4, seed=1))
    assert first.data_ptr() == t.ptr
    assert same(first, x)


def test_last_view_of_the_wrap_is_what_holds(device):
    t = make(device)
    everything = paddle.from_dlpack(t.reserved())
    t.append(rows(device, 2, 5, 3, 4))
    views = [paddle.as_strided(everything, [2, n, 3, 4], everything.strides) for n in (2, 5)]
    del everything
    gc.collect()
    with pytest.raises(BufferError):
        t.close()
    t.truncate(1)  # the reservation pins no rows
    views.pop()
    with pytest.raises(BufferError):
        t.close()
    views.clear()
    gc.collect()
    t.close()


def test_wraps_one_after_the_other(device):
    """Of one address, but not alive at once: each deleter runs."""
    t = make(device)
    for n in range(1, 5):
        t.append(rows(device, 2, 1, 3, 4))
        w = paddle.from_dlpack(t)
        assert w.shape[1] == n
        del w
        gc.collect()
    t.truncate(0)
    t.close()


# ---- Paddle writes ------------------------------------------------------------------------


def test_writes_through_the_reservation(device, layout):
    t = make(device, layout)
    everything = paddle.from_dlpack(t.reserved())
    t.grow(300)
    x = rows(device, 2, 300, 3, 4)
    view = paddle.as_strided(everything, [2, 300, 3, 4], everything.strides)
    view[:, :100] = x[:, :100]
    everything[:, 100:300].copy_(x[:, 100:], True)
    assert view.data_ptr() == t.ptr
    assert same(view, x)
    del view, everything
    if device == "host":
        assert np.asarray(t).tobytes() == raw(x)


def test_writes_into_a_grown_view(device, layout):
    t = make(device, layout)
    t.append(rows(device, 2, 2, 3, 4))
    x = rows(device, 2, 5, 3, 4, seed=1)
    new = paddle.from_dlpack(t.grow(5))
    address = new.data_ptr()
    new[:] = x
    assert new.data_ptr() == address
    del new
    gc.collect()
    assert same(paddle.from_dlpack(t)[:, 2:], x)


# ---- life -------------------------------------------------------------------------------


def test_a_live_tensor_refuses_close_and_truncate(device):
    t = make(device)
    x = rows(device, 2, 5, 3, 4)
    t.append(x)
    w = paddle.from_dlpack(t)
    for refused in (t.close, lambda: t.truncate(4)):
        with pytest.raises(BufferError):
            refused()
    t.append(x)
    t.trim()
    t.truncate(5)
    assert same(w, x)
    del w
    gc.collect()
    t.truncate(1)
    t.close()


def test_memory_lives_as_long_as_the_paddle_tensor(device):
    pool = pyvmm.Pool(device)
    t = pyvmm.empty((0, 1024), "float32", capacity=100_000, device=device, pool=pool)
    x = rows(device, 2000, 1024)
    t.append(x)
    w = paddle.from_dlpack(t)
    part = w[5:7]
    del t, w
    gc.collect()
    assert pool.stats()["in_use_bytes"] > 0
    assert same(part, x[5:7])
    del part
    gc.collect()
    assert pool.stats()["in_use_bytes"] == 0
    pool.close()


def test_last_reference_dropped_on_another_thread(device):
    t = make(device)
    t.append(rows(device, 2, 5, 3, 4))
    held = [paddle.from_dlpack(t)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    gc.collect()
    t.close()


def test_closed_tensor_cannot_be_exported(device):
    t = make(device)
    t.close()
    with pytest.raises(pyvmm.VMMError):
        paddle.from_dlpack(t)


# ---- Paddle tensors appended ----------------------------------------------------------------


def sources(device):
    return {
        "contiguous": rows(device, 2, 5, 3, 4),
        "transposed": paddle.transpose(rows(device, 2, 3, 5, 4), [0, 2, 1, 3]),
        "sliced": rows(device, 4, 9, 3, 4)[::2, 2:7],
        "last dimension sliced": rows(device, 2, 5, 3, 9)[..., 2:6],
        "one row": rows(device, 2, 1, 3, 4),
        "no rows": rows(device, 2, 0, 3, 4),
        "many rows": rows(device, 2, 3000, 3, 4),
    }


@pytest.mark.parametrize("name", list(sources("host")))
def test_append(device, layout, name):
    x = sources(device)[name]
    t = make(device, layout)
    t.append(rows(device, 2, 2, 3, 4, seed=9))
    t.append(x)
    t.append(x)
    assert same(paddle.from_dlpack(t)[:, 2:], joined([x, x]))


def test_append_many(device):
    k, v = make(device), make(device, shape=(2, 0, 3, 8))
    new_k, new_v = rows(device, 2, 5, 3, 4), rows(device, 2, 5, 3, 8)
    pyvmm.append_many([k, v], [new_k, new_v])
    assert same(paddle.from_dlpack(k), new_k)
    assert same(paddle.from_dlpack(v), new_v)


def bad_sources(device):
    x = rows(device, 2, 5, 3, 4)
    wanted = rows(device, 2, 5, 3, 4)
    wanted.stop_gradient = False
    return {
        "dtype": (TypeError, x.astype("float64")),
        "int32 for float32": (TypeError, x.view("int32")),
        "rank": (ValueError, x[0]),
        "row shape": (ValueError, rows(device, 2, 5, 4, 4)),
        "last dimension strided": (ValueError, rows(device, 2, 5, 3, 8)[..., ::2]),
        "gradient": ((BufferError, RuntimeError, TypeError), wanted),
        "too many rows": (pyvmm.CapacityError, rows(device, 2, 9000, 3, 4)),
    }


@pytest.mark.parametrize("name", list(bad_sources("host")))
def test_refused_append_changes_nothing(device, name):
    error, x = bad_sources(device)[name]
    t, other = make(device), make(device)
    good = rows(device, 2, 5, 3, 4)
    t.append(good)
    with pytest.raises(error) as caught:
        t.append(x)
    assert str(caught.value)
    with pytest.raises(error):
        pyvmm.append_many([other, t], [good, x])
    assert (t.length, other.length) == (5, 0)
    assert same(paddle.from_dlpack(t), good)
