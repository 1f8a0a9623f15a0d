"""NumPy and pyvmm share memory, both ways and through growth.

Three ways lead from a tensor to an array: the buffer protocol (numpy.asarray, memoryview),
DLPack (numpy.from_dlpack), and __array__ for the dtypes that neither can name.
"""

import array
import copy
import gc
import os
import pickle
import threading

import ml_dtypes
import numpy as np
import pytest

import pyvmm
from model import pattern, same

NATIVE = [
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
EXTENDED = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.fixture
def cuda():
    """A real GPU's name, found without any framework."""
    if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
        pytest.skip("the simulated driver's memory is not a GPU's")
    try:
        pyvmm.Pool("cuda:0").close()
    except pyvmm.VMMError as error:
        pytest.skip(f"no CUDA device: {error}")
    return "cuda:0"


@pytest.fixture(params=["seq", "lane", "c"])
def layout(request):
    return request.param


@pytest.fixture(params=[np.asarray, np.from_dlpack], ids=["buffer", "dlpack"])
def way(request):
    return request.param


def make(layout="seq", shape=(2, 0, 3, 4), axis=1, dtype="float32", capacity=8192, device="host"):
    return pyvmm.empty(shape, dtype, axis=axis, capacity=capacity, device=device, layout=layout)


def address(a):
    return a.__array_interface__["data"][0]


# ---- NumPy reads ------------------------------------------------------------------------


def test_shares_memory_shape_and_strides(way, layout):
    t = make(layout)
    x = pattern((2, 5, 3, 4), "float32")
    t.append(x)
    a = way(t)
    assert type(a) is np.ndarray
    assert address(a) == t.ptr
    assert a.shape == t.shape == (2, 5, 3, 4)
    assert a.strides == tuple(t.strides)
    assert a.flags.writeable
    assert same(a, x)
    if layout == "seq":
        assert a.strides == (48, 96, 16, 4)
    else:
        assert a.strides[1:] == (48, 16, 4)


def test_head_major_cache(way, layout):
    t = make(layout, shape=(2, 3, 0, 8), axis=2)
    x = pattern((2, 3, 7, 8), "float32")
    t.append(x)
    assert same(way(t), x)


@pytest.mark.parametrize("dtype", NATIVE)
def test_every_dtype_numpy_has(way, dtype):
    t = make(dtype=dtype)
    x = pattern((2, 5, 3, 4), dtype)
    t.append(x)
    a = way(t)
    assert a.dtype == t.dtype == np.dtype(dtype)
    assert address(a) == t.ptr
    assert same(a, x)


@pytest.mark.parametrize("dtype", EXTENDED, ids=lambda dtype: dtype.__name__)
def test_dtypes_of_ml_dtypes_through_array(dtype):
    t = make(dtype=dtype)
    x = pattern((2, 5, 3, 4), dtype)
    t.append(x)
    a = np.asarray(t)
    assert a.dtype == t.dtype == np.dtype(dtype)
    assert address(a) == t.ptr
    assert same(a, x)
    with pytest.raises(BufferError):
        t.close()
    with pytest.raises(BufferError):
        memoryview(t)
    del a
    t.close()


def test_array_takes_dtype_and_copy():
    t = make(dtype=ml_dtypes.bfloat16)
    t.append(np.ones((2, 5, 3, 4), ml_dtypes.bfloat16))
    assert np.asarray(t, dtype="float32").dtype == np.float32
    own = np.array(t)
    assert address(own) != t.ptr
    t.close()
    assert (own == 1).all()


@pytest.mark.parametrize("shape, axis", [((0,), 0), ((1, 0, 1, 8), 1), ((1, 1, 0, 1), 2)])
def test_small_shapes(way, layout, shape, axis):
    t = make(layout, shape=shape, axis=axis)
    x = pattern(tuple(6 if i == axis else n for i, n in enumerate(shape)), "float32")
    t.append(x)
    assert same(way(t), x)
    assert same(way(t[2:3]), x.take(range(2, 3), axis))


def test_length_zero(way, layout):
    t = make(layout)
    assert way(t).shape == (2, 0, 3, 4)
    t.append(pattern((2, 0, 3, 4), "float32"))
    assert t.length == 0
    t.close()


def test_slices(way, layout):
    t = make(layout)
    x = pattern((2, 9, 3, 4), "float32")
    t.append(x)
    for view in (t[2:5], t.view(2, 5), t[-7:-4]):
        assert same(way(view), x[:, 2:5])
    assert way(t[4:4]).shape == (2, 0, 3, 4)


def test_numpy_functions_take_a_tensor():
    t = make(shape=(0, 3), axis=0)
    t.append(np.arange(6, dtype="float32").reshape(2, 3))
    assert np.concatenate([t, t]).tolist() == [[0, 1, 2], [3, 4, 5]] * 2
    assert float(np.sum(t)) == 15
    t.close()


# ---- buffers ------------------------------------------------------------------------------


def test_memoryview_covers_the_rows_of_its_creation():
    t = make(shape=(0, 3), axis=0)
    t.append(np.arange(6, dtype="float32").reshape(2, 3))
    view = memoryview(t)
    t.append(np.ones((5, 3), "float32"))
    assert (view.shape, view.strides, view.format, view.itemsize) == ((2, 3), (12, 4), "f", 4)
    assert not view.readonly
    assert view.nbytes == 24
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(BufferError):
        t.truncate(1)
    view[1, 2] = 50
    view.release()
    assert np.asarray(t)[1, 2] == 50
    t.close()


def test_dense_rows_are_bytes_without_a_copy():
    t = make(shape=(0, 3), axis=0, dtype="uint8")
    t.append(np.arange(6, dtype="uint8").reshape(2, 3))
    assert bytes(t) == bytes(range(6))
    assert memoryview(t).cast("B").tobytes() == bytes(range(6))
    flat = np.frombuffer(t, np.uint8)
    assert address(flat) == t.ptr
    del flat
    t.close()


def test_strided_memory_is_not_given_out_as_dense(layout):
    t = make(layout)
    x = pattern((2, 5, 3, 4), "float32")
    t.append(x)
    with pytest.raises((BufferError, ValueError)):  # asks for contiguity
        np.frombuffer(t, np.float32)
    assert memoryview(t).tobytes() == x.tobytes()
    t.close()


# ---- growth -----------------------------------------------------------------------------


def test_earlier_array_stays_right_through_growth(way, layout):
    t = make(layout, capacity=100_000)
    x = pattern((2, 3, 3, 4), "float32")
    t.append(x)
    base = t.ptr
    first = way(t)
    parts = [x]
    for i, n in enumerate([1, 300, 0, 17, 4096, 20_000]):
        parts.append(pattern((2, n, 3, 4), "float32", seed=i + 1))
        t.append(parts[-1])
    assert t.ptr == base == address(first)
    assert same(first, x)
    assert address(way(t)) == base
    assert same(way(t), np.concatenate(parts, axis=1))


# ---- NumPy writes -----------------------------------------------------------------------


def test_writes_into_a_grown_view(way, layout):
    t = make(layout)
    t.append(pattern((2, 2, 3, 4), "float32"))
    x = pattern((2, 5, 3, 4), "float32", seed=1)
    way(t.grow(5))[...] = x
    assert same(way(t)[:, 2:], x)


def test_out_argument(layout):
    t = make(layout)
    a, b = np.ones((2, 5, 3, 4), "float32"), np.full((2, 5, 3, 4), 2, "float32")
    np.add(a, b, out=np.asarray(t.grow(5)))
    assert (np.asarray(t) == 3).all()


def test_writes_through_the_reservation(way, layout):
    t = make(layout)
    everything = way(t.reserved())
    assert everything.shape == (2, t.capacity, 3, 4)
    t.grow(300)
    x = pattern((2, 300, 3, 4), "float32")
    everything[:, :300] = x
    assert same(way(t), x)


# ---- life -------------------------------------------------------------------------------


def test_a_live_array_refuses_close_and_truncate(way):
    t = make()
    x = pattern((2, 5, 3, 4), "float32")
    t.append(x)
    a = way(t)
    part = a[:, 1:2].T
    del a
    for refused in (t.close, lambda: t.truncate(4)):
        with pytest.raises(BufferError):
            refused()
    assert t.length == 5
    t.append(x)
    t.trim()
    t.truncate(5)
    assert same(part.T, x[:, 1:2])
    del part
    t.truncate(1)
    t.close()


def test_reservation_pins_closing_only(way):
    t = make()
    t.append(pattern((2, 5, 3, 4), "float32"))
    everything = way(t.reserved())
    t.truncate(1)
    with pytest.raises(BufferError):
        t.close()
    del everything
    t.close()


def test_view_of_truncated_rows_cannot_be_exported(way):
    t = make()
    t.append(pattern((2, 5, 3, 4), "float32"))
    view = t[2:5]
    t.truncate(3)
    with pytest.raises((BufferError, pyvmm.VMMError)):
        way(view)
    t.close()


def test_memory_lives_as_long_as_the_array(way):
    pool = pyvmm.Pool("host")
    t = pyvmm.empty((0, 1024), "float32", capacity=100_000, device="host", pool=pool)
    x = pattern((2000, 1024), "float32")
    t.append(x)
    a = way(t)
    del t
    gc.collect()
    assert pool.stats()["in_use_bytes"] > 0
    assert same(a, x)
    del a
    gc.collect()
    assert pool.stats()["in_use_bytes"] == 0
    pool.close()


def test_last_reference_dropped_on_another_thread(way):
    t = make()
    t.append(pattern((2, 5, 3, 4), "float32"))
    held = [way(t)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    t.close()


def test_closed_tensor_cannot_be_exported():
    t = make()
    t.close()
    for way in (np.from_dlpack, memoryview):
        with pytest.raises(pyvmm.VMMError):
            way(t)
    with pytest.raises(Exception):  # noqa: B017  (NumPy may wrap it, and must not return)
        np.asarray(t)


def test_copy_argument():
    t = make()
    x = pattern((2, 5, 3, 4), "float32")
    t.append(x)
    try:
        own = np.from_dlpack(t, copy=True)
    except BufferError as error:
        assert "copy" in str(error)
        t.close()
        return
    assert same(own, x)
    assert address(own) != t.ptr
    t.close()
    assert same(own, x)


def test_tensor_refuses_pickling_and_copying():
    t = make()
    for refused in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            refused(t)


# ---- arrays appended ------------------------------------------------------------------------


def sources():
    read_only = pattern((2, 5, 3, 4), "float32").copy()
    read_only.flags.writeable = False
    return {
        "contiguous": pattern((2, 5, 3, 4), "float32"),
        "transposed": pattern((2, 3, 5, 4), "float32").transpose(0, 2, 1, 3),
        "sliced": pattern((4, 9, 3, 4), "float32")[::2, 2:7],
        "last dimension sliced": pattern((2, 5, 3, 9), "float32")[..., 2:6],
        "reversed": pattern((2, 5, 3, 4), "float32")[::-1, ::-1],
        "broadcast": np.broadcast_to(pattern((1, 5, 1, 4), "float32"), (2, 5, 3, 4)),
        "read-only": read_only,
        "one row": pattern((2, 1, 3, 4), "float32"),
        "no rows": pattern((2, 0, 3, 4), "float32"),
        "many rows": pattern((2, 3000, 3, 4), "float32"),
        "unaligned": np.frombuffer(b"\0" + pattern((480,), "uint8").tobytes(), np.uint8)[1:]
        .view("float32")
        .reshape(2, 5, 3, 4),
    }


@pytest.mark.parametrize("name", list(sources()))
def test_append(layout, name):
    x = sources()[name]
    t = make(layout)
    t.append(pattern((2, 2, 3, 4), "float32", seed=9))
    t.append(x)
    t.append(x)
    assert same(np.asarray(t)[:, 2:], np.concatenate([x, x], axis=1))


@pytest.mark.parametrize("dtype", EXTENDED, ids=lambda dtype: dtype.__name__)
def test_append_of_dtypes_without_a_buffer(layout, dtype):
    t = make(layout, dtype=dtype)
    x = pattern((2, 3, 5, 4), dtype).transpose(0, 2, 1, 3)
    t.append(x)
    assert same(np.asarray(t), x)


def test_append_of_other_buffers():
    t = make(shape=(0,), axis=0, dtype="uint8")
    t.append(b"abc")
    t.append(bytearray(b"de"))
    t.append(memoryview(b"fgh")[1:])
    t.append(array.array("B", b"ij"))
    assert bytes(t) == b"abcdeghij"


def test_append_of_another_tensor_and_of_its_own_rows(layout):
    t, other = make(layout), make("c")
    x = pattern((2, 5, 3, 4), "float32")
    other.append(x)
    t.append(other)
    t.append(t[0:5])
    t.append(t)
    assert same(np.asarray(t), np.concatenate([x] * 4, axis=1))


def bad_sources():
    x = pattern((2, 5, 3, 4), "float32")
    return {
        "dtype": (TypeError, x.astype("float64")),
        "int32 for float32": (TypeError, x.view("int32")),
        "big-endian": (TypeError, x.astype(">f4")),
        "structured": (TypeError, x.view([("f", "<f4")])),
        "objects": (TypeError, x.astype(object)),
        "rank": (ValueError, x[0]),
        "row shape": (ValueError, pattern((2, 5, 4, 4), "float32")),
        "batch": (ValueError, pattern((3, 5, 3, 4), "float32")),
        "last dimension strided": (ValueError, pattern((2, 5, 3, 8), "float32")[..., ::2]),
        "Fortran order": (ValueError, np.asfortranarray(x)),
        "last dimension reversed": (ValueError, x[..., ::-1]),
        "list": (TypeError, x.tolist()),
        "number": (TypeError, 1.0),
        "None": (TypeError, None),
        "too many rows": (pyvmm.CapacityError, pattern((2, 9000, 3, 4), "float32")),
    }


@pytest.mark.parametrize("name", list(bad_sources()))
def test_refused_append_changes_nothing(layout, name):
    error, x = bad_sources()[name]
    t, other = make(layout), make(layout)
    good = pattern((2, 5, 3, 4), "float32")
    t.append(good)
    with pytest.raises(error) as caught:
        t.append(x)
    assert str(caught.value)
    with pytest.raises(error):
        pyvmm.append_many([other, t], [good, x])
    assert (t.length, other.length) == (5, 0)
    assert same(np.asarray(t), good)


# ---- device memory ------------------------------------------------------------------------


def test_device_memory_is_refused_and_names_the_way(cuda):
    t = make(device=cuda)
    t.append(pattern((2, 5, 3, 4), "float32"))
    with pytest.raises(BufferError, match="DLPack"):
        memoryview(t)
    with pytest.raises(TypeError, match="DLPack"):
        np.asarray(t)
    with pytest.raises((BufferError, TypeError, ValueError, RuntimeError)):
        np.from_dlpack(t)
    t.close()


@pytest.mark.parametrize("name", list(sources()))
def test_append_to_device_memory_has_read_the_source(cuda, layout, name):
    torch = pytest.importorskip("torch", reason="reading device memory back takes torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    x = sources()[name]
    expected = x.copy()
    t = make(layout, device=cuda)
    t.append(x)
    if x.flags.writeable:
        x[...] = 0
    assert same(torch.from_dlpack(t).cpu().numpy(), expected)
