"""CuPy and pyvmm share device memory, both ways and through growth.

Two ways lead from a tensor to an array: DLPack (cupy.from_dlpack) and
__cuda_array_interface__ (cupy.asarray).
"""

import gc
import os
import threading

import ml_dtypes
import numpy as np
import pytest

from model import pattern, same

if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
    pytest.skip(
        "the simulated driver's memory is not a GPU's: CuPy cannot use it", allow_module_level=True
    )
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
try:
    cupy.cuda.runtime.getDeviceCount()
except cupy.cuda.runtime.CUDARuntimeError as error:
    pytest.skip(f"CuPy has no CUDA device: {error}", allow_module_level=True)

import pyvmm  # noqa: E402

DTYPES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
]
CUDA = "cuda:0"


@pytest.fixture(params=["seq", "lane", "c"])
def layout(request):
    return request.param


@pytest.fixture(params=[cupy.from_dlpack, cupy.asarray], ids=["dlpack", "interface"])
def way(request):
    return request.param


def make(layout="seq", shape=(2, 0, 3, 4), axis=1, dtype="float32", capacity=8192):
    return pyvmm.empty(shape, dtype, axis=axis, capacity=capacity, device=CUDA, layout=layout)


def rows(*shape, dtype="float32", seed=0):
    return cupy.asarray(pattern(shape, dtype, seed))


def equal(a, b):
    return same(cupy.asnumpy(a), cupy.asnumpy(b))


def delay():
    """Work of some 30 ms on the current stream."""
    _spin((1,), (1,), (np.int64(50_000_000),))


_spin = cupy.RawKernel(
    'extern "C" __global__ void spin(long long n) { long long t = clock64();'
    " while (clock64() - t < n) {} }",
    "spin",
)


# ---- CuPy reads ---------------------------------------------------------------------------


def test_shares_memory_shape_and_strides(way, layout):
    t = make(layout)
    x = rows(2, 5, 3, 4)
    t.append(x)
    a = way(t)
    assert a.data.ptr == t.ptr
    assert a.shape == (2, 5, 3, 4)
    assert a.strides == tuple(t.strides)
    assert equal(a, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(way, dtype):
    t = make(dtype=dtype)
    x = rows(2, 5, 3, 4, dtype=dtype)
    t.append(x)
    a = way(t)
    assert a.dtype == np.dtype(dtype)
    assert equal(a, x)


def test_bfloat16_through_dlpack():
    t = make(dtype="bfloat16")
    x = pattern((2, 5, 3, 4), ml_dtypes.bfloat16)
    t.append(x)
    try:
        a = cupy.from_dlpack(t)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        gc.collect()
        t.close()  # the refused capsule pins nothing
        pytest.skip(f"this CuPy does not take bfloat16: {error}")
    assert a.data.ptr == t.ptr
    assert same(cupy.asnumpy(a.view("uint16")), x.view("uint16"))
    t.append(a.copy())
    assert same(cupy.asnumpy(cupy.from_dlpack(t)[:, 5:].view("uint16")), x.view("uint16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_no_interface_for_dtypes_it_cannot_name(dtype):
    t = make(dtype=dtype)
    assert not hasattr(t, "__cuda_array_interface__")
    t.close()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_a_refused_capsule_pins_nothing(dtype):
    t = make(dtype=dtype)
    t.append(pattern((2, 5, 3, 4), getattr(ml_dtypes, dtype)))
    try:
        a = cupy.from_dlpack(t)
    except (BufferError, RuntimeError, TypeError, ValueError):
        pass
    else:
        del a
    gc.collect()
    t.close()


@pytest.mark.parametrize("shape, axis", [((0,), 0), ((1, 0, 1, 8), 1), ((1, 1, 0, 1), 2)])
def test_small_shapes(way, layout, shape, axis):
    t = make(layout, shape=shape, axis=axis)
    x = rows(*(6 if i == axis else n for i, n in enumerate(shape)))
    t.append(x)
    assert equal(way(t), x)
    assert equal(way(t[2:3]), x.take(cupy.arange(2, 3), axis))


def test_length_zero(way, layout):
    t = make(layout)
    assert way(t).shape == (2, 0, 3, 4)
    t.append(rows(2, 0, 3, 4))
    assert t.length == 0


def test_slices(way, layout):
    t = make(layout)
    x = rows(2, 9, 3, 4)
    t.append(x)
    for view in (t[2:5], t.view(2, 5), t[-7:-4]):
        assert equal(way(view), x[:, 2:5])


# ---- growth, writes -----------------------------------------------------------------------


def test_earlier_array_stays_right_through_growth(way, layout):
    t = make(layout, capacity=100_000)
    x = rows(2, 3, 3, 4)
    t.append(x)
    address = t.ptr
    first = way(t)
    parts = [x]
    for i, n in enumerate([1, 300, 0, 17, 4096, 20_000]):
        parts.append(rows(2, n, 3, 4, seed=i + 1))
        t.append(parts[-1])
    assert t.ptr == address == first.data.ptr
    assert equal(first, x)
    assert equal(way(t), cupy.concatenate(parts, axis=1))


def test_writes_into_a_grown_view(way, layout):
    t = make(layout)
    t.append(rows(2, 2, 3, 4))
    x = rows(2, 5, 3, 4, seed=1)
    way(t.grow(5))[...] = x
    assert equal(way(t)[:, 2:], x)


def test_writes_through_the_reservation(way, layout):
    t = make(layout)
    # cupy.asarray asks the driver on which GPU an address is: something must be mapped there.
    t.grow(1)
    everything = way(t.reserved())
    assert everything.shape == (2, t.capacity, 3, 4)
    t.grow(299)
    x = rows(2, 300, 3, 4)
    everything[:, :300] = x
    assert equal(way(t), x)


# ---- life -------------------------------------------------------------------------------


def test_a_live_array_refuses_close_and_truncate():
    t = make()
    x = rows(2, 5, 3, 4)
    t.append(x)
    a = cupy.from_dlpack(t)
    for refused in (t.close, lambda: t.truncate(4)):
        with pytest.raises(BufferError):
            refused()
    t.append(x)
    t.trim()
    t.truncate(5)
    assert equal(a, x)
    del a
    t.truncate(1)
    t.close()


def test_interface_read_on_a_tensor_pins_for_its_life():
    t = make()
    t.append(rows(2, 5, 3, 4))
    cupy.asarray(t)
    t.append(rows(2, 5, 3, 4))
    with pytest.raises(BufferError):
        t.truncate(4)
    t.truncate(5)
    with pytest.raises(BufferError):
        t.close()


def test_interface_read_on_a_view_pins_until_it_is_collected():
    t = make()
    t.append(rows(2, 5, 3, 4))
    view = t[0:5]
    a = cupy.asarray(view)
    with pytest.raises(BufferError):
        t.truncate(4)
    del a, view
    gc.collect()
    t.truncate(0)
    t.close()


def test_memory_lives_as_long_as_the_array():
    pool = pyvmm.Pool(CUDA)
    t = pyvmm.empty((0, 1024), "float32", capacity=100_000, device=CUDA, pool=pool)
    x = rows(2000, 1024)
    t.append(x)
    a = cupy.from_dlpack(t)
    del t
    gc.collect()
    assert pool.stats()["in_use_bytes"] > 0
    assert equal(a, x)
    del a
    gc.collect()
    assert pool.stats()["in_use_bytes"] == 0
    pool.trim(wait=True)
    assert pool.stats()["queued_bytes"] == 0
    pool.close()


def test_last_reference_dropped_on_another_thread():
    t = make()
    t.append(rows(2, 5, 3, 4))
    held = [cupy.from_dlpack(t)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    t.close()


# ---- CuPy arrays appended -------------------------------------------------------------------


def sources():
    return {
        "contiguous": rows(2, 5, 3, 4),
        "transposed": rows(2, 3, 5, 4).transpose(0, 2, 1, 3),
        "sliced": rows(4, 9, 3, 4)[::2, 2:7],
        "last dimension sliced": rows(2, 5, 3, 9)[..., 2:6],
        "reversed": rows(2, 5, 3, 4)[::-1, ::-1],
        "broadcast": cupy.broadcast_to(rows(1, 5, 1, 4), (2, 5, 3, 4)),
        "one row": rows(2, 1, 3, 4),
        "no rows": rows(2, 0, 3, 4),
        "many rows": rows(2, 3000, 3, 4),
    }


@pytest.mark.parametrize(
    "name",
    [
        "contiguous",
        "transposed",
        "sliced",
        "last dimension sliced",
        "reversed",
        "broadcast",
        "one row",
        "no rows",
        "many rows",
    ],
)
def test_append(layout, name):
    x = sources()[name]
    t = make(layout)
    t.append(rows(2, 2, 3, 4, seed=9))
    t.append(x)
    t.append(x)
    assert equal(cupy.from_dlpack(t)[:, 2:], cupy.concatenate([x, x], axis=1))


def test_append_many():
    k, v = make(), make(shape=(2, 0, 3, 8))
    new_k, new_v = rows(2, 5, 3, 4), rows(2, 5, 3, 8)
    pyvmm.append_many([k, v], [new_k, new_v])
    assert equal(cupy.from_dlpack(k), new_k)
    assert equal(cupy.from_dlpack(v), new_v)


def bad_sources():
    x = rows(2, 5, 3, 4)
    return {
        "dtype": (TypeError, x.astype("float64")),
        "int32 for float32": (TypeError, x.view("int32")),
        "rank": (ValueError, x[0]),
        "row shape": (ValueError, rows(2, 5, 4, 4)),
        "last dimension strided": (ValueError, rows(2, 5, 3, 8)[..., ::2]),
        "too many rows": (pyvmm.CapacityError, rows(2, 9000, 3, 4)),
    }


@pytest.mark.parametrize(
    "name",
    ["dtype", "int32 for float32", "rank", "row shape", "last dimension strided", "too many rows"],
)
def test_refused_append_changes_nothing(name):
    error, x = bad_sources()[name]
    t, other = make(), make()
    good = rows(2, 5, 3, 4)
    t.append(good)
    with pytest.raises(error) as caught:
        t.append(x)
    assert str(caught.value)
    with pytest.raises(error):
        pyvmm.append_many([other, t], [good, x])
    assert (t.length, other.length) == (5, 0)
    assert equal(cupy.from_dlpack(t), good)


def test_device_array_for_a_host_tensor():
    t = pyvmm.empty((2, 0, 3, 4), "float32", axis=1, capacity=64, device="host")
    with pytest.raises((BufferError, TypeError, ValueError)):
        t.append(rows(2, 5, 3, 4))
    assert t.length == 0


# ---- streams ----------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [cupy.from_dlpack, cupy.asarray], ids=["dlpack", "interface"])
def test_append_on_the_producers_stream(reader):
    t = make()
    x = cupy.zeros((2, 5, 3, 4), "float32")
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        delay()
        x.fill(7)
        t.append(x)
        total = reader(t).sum()
        assert float(total) == 7 * 120


@pytest.mark.parametrize("form", ["handle", "object"])
def test_append_on_a_given_stream_waits_for_the_producer(form):
    t = make()
    x = cupy.zeros((2, 5, 3, 4), "float32")
    producer, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    cupy.cuda.Device().synchronize()
    with producer:
        delay()
        x.fill(7)
        t.append(x, stream=other.ptr if form == "handle" else other)
        del x
        cupy.zeros((2, 5, 3, 4), "float32")  # takes x's memory if nobody kept it
    with other:
        assert float(cupy.from_dlpack(t).sum()) == 7 * 120


def test_handoff_to_another_stream(way):
    t = make()
    producer, consumer = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with producer:
        delay()
        t.append(cupy.full((2, 5, 3, 4), 3, "float32"))
    with consumer:
        assert float(way(t).sum()) == 3 * 120
