"""Exports: what they show, what they pin, and when the pins go."""

import gc
import threading

import numpy as np
import pytest

import cuda_helper
import dlpack_struct
import pyvmm
from dlpack_struct import Consumer, Legacy, Versioned, look
from model import LAYOUTS, pattern, same
from support import fill, state, to_numpy

SHAPE = (2, 0, 3, 4)


def rows(n, seed=0):
    return pattern((2, n, 3, 4), "float32", seed)


@pytest.fixture(params=LAYOUTS)
def tensor(request, empty):
    with empty(shape=SHAPE, axis=1, layout=request.param) as t:
        t.append(rows(10))
        yield t


@pytest.fixture
def on_host(host):
    with pyvmm.empty(SHAPE, "float32", axis=1, capacity=1000, device=host, layout="lane") as t:
        t.append(rows(10))
        yield t


def check_pins(t, n_rows):
    """Rows [0, n_rows) cannot be truncated away; the tensor can grow and trim."""
    with pytest.raises(BufferError):
        t.truncate(n_rows - 1)
    with pytest.raises(BufferError):
        t.close()
    t.append(rows(3, seed=9))
    t.trim()
    t.truncate(n_rows)


# ---- DLPack: the struct -------------------------------------------------------------


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 3), (2, 0)])
def test_capsule_is_of_the_version_that_is_asked_for(tensor, version):
    managed = look(tensor.__dlpack__(max_version=version))
    if version and version >= (1, 0):
        assert isinstance(managed, Versioned)
        assert managed.major == 1
        assert managed.flags == 0
    else:
        assert isinstance(managed, Legacy)
    assert managed.manager_ctx
    device = (dlpack_struct.CPU, 0) if tensor.device == "host" else (cuda_helper.DLPACK_TYPE, 0)
    assert tensor.__dlpack_device__() == device
    dl = managed.tensor
    assert (dl.device_type, dl.device_id) == device
    assert (dl.code, dl.bits, dl.lanes) == (2, 32, 1)
    assert dl.byte_offset == 0
    assert dl.data == tensor.ptr
    assert dl.ndim == 4
    assert tuple(dl.shape[:4]) == tensor.shape
    assert tuple(n * 4 for n in dl.strides[:4]) == tensor.strides


def test_data_is_the_first_element_of_a_view(tensor):
    view = tensor[3:7]
    dl = look(view.__dlpack__()).tensor
    assert dl.data == view.ptr == tensor.ptr + 3 * tensor.strides[1]
    assert dl.byte_offset == 0
    assert tuple(dl.shape[:4]) == (2, 4, 3, 4)


def test_struct_stays_as_it_was_exported(tensor):
    capsule = tensor.__dlpack__()
    tensor.append(rows(5))
    assert tuple(look(capsule).tensor.shape[:4]) == (2, 10, 3, 4)


def test_empty_export(empty):
    with empty(shape=SHAPE, axis=1) as t:
        dl = look(t.__dlpack__()).tensor
        assert tuple(dl.shape[:4]) == (2, 0, 3, 4)
        assert dl.strides


@pytest.mark.parametrize(
    ("shape", "axis", "n", "strides"),
    [
        ((1, 0, 3, 4), 1, 7, (84, 12, 4, 1)),
        ((2, 0, 1, 4), 1, 7, None),
        ((0, 1, 1), 0, 5, (1, 1, 1)),
        ((1, 0, 1), 1, 1, (1, 1, 1)),
        ((0, 3, 1), 0, 1, (3, 1, 1)),
        ((0,), 0, 1, (1,)),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dimensions_of_size_one_have_canonical_strides(empty, shape, axis, n, strides, layout):
    """As if the dimension were dense in what follows it: Paddle compares them."""
    with empty(shape=shape, axis=axis, layout=layout, capacity=100) as t:
        t.grow(n)
        consumer = Consumer(t.__dlpack__())
        found, sizes = consumer.strides, consumer.shape
        consumer.delete()
        if strides:
            assert found == strides
        for dim, size in enumerate(sizes):
            if size == 1:
                last = dim == len(sizes) - 1
                assert found[dim] == (1 if last else found[dim + 1] * sizes[dim + 1])
            else:
                assert found[dim] * 4 == t.strides[dim]


def test_arguments_that_cannot_be_met(tensor):
    for arguments in ({"dl_device": (2, 3)}, {"dl_device": (7, 0)}):
        with pytest.raises(BufferError):
            tensor.__dlpack__(**arguments)
    with pytest.raises(TypeError):
        tensor.__dlpack__(None)  # by keyword only
    tensor.truncate(0)  # nothing was left exported
    assert tensor.__dlpack__(dl_device=tensor.__dlpack_device__())
    assert tensor.__dlpack__(copy=False)


def test_copy_is_made_or_refused(on_host):
    try:
        copied = np.from_dlpack(on_host, copy=True)
    except BufferError:
        return
    assert same(np.array(copied), rows(10))
    fill(on_host, 0)
    assert same(np.array(copied), rows(10))
    on_host.truncate(0)  # a copy pins nothing


# ---- DLPack: pins -------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_consumed_capsule_pins_until_it_is_deleted(tensor, version):
    consumer = Consumer(tensor[2:8].__dlpack__(max_version=version))
    gc.collect()
    check_pins(tensor, 8)
    consumer.delete()
    tensor.truncate(0)


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_capsule_dropped_unconsumed_unpins(tensor, version):
    capsule = tensor.__dlpack__(max_version=version)
    check_pins(tensor, 10)
    del capsule
    tensor.truncate(0)


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_deleter_on_another_thread(tensor, version):
    """Without the GIL, and while this thread holds on to the tensor."""
    consumers = [Consumer(tensor.__dlpack__(max_version=version)) for _ in range(50)]
    threads = [threading.Thread(target=consumer.delete) for consumer in consumers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tensor.truncate(0)


def test_pin_is_the_longest_of_all(tensor):
    exports = [tensor[:n].__dlpack__() for n in (4, 9, 6)]
    check_pins(tensor, 9)
    del exports[1]
    check_pins(tensor, 6)
    exports.clear()
    tensor.truncate(0)


def test_exports_survive_the_tensor(device, empty):
    t = empty(shape=SHAPE, axis=1)
    t.append(rows(10))
    consumer = Consumer(t.__dlpack__())
    pointer, strides = t.ptr, t.strides
    del t
    gc.collect()
    if device == "host":
        memory = np.frombuffer((cuda_helper.ctypes.c_char * 24).from_address(pointer), "float32")
        assert memory[0] == rows(10).flat[0]
        del memory
    else:
        assert same(cuda_helper.read(pointer, (2, 10, 3, 4), strides, "float32"), rows(10))
    assert pyvmm.default_pool(device).stats()["in_use_bytes"] > 0
    consumer.delete()


def test_with_block_closes_later_under_exports(device, empty):
    with empty(shape=SHAPE, axis=1) as t:
        t.append(rows(10))
        capsule = t.__dlpack__()
        in_use = pyvmm.default_pool(device).stats()["in_use_bytes"]
    with pytest.raises(pyvmm.VMMError, match="closed"):
        t.grow(1)
    assert pyvmm.default_pool(device).stats()["in_use_bytes"] == in_use
    del capsule
    assert pyvmm.default_pool(device).stats()["in_use_bytes"] < in_use


def test_exception_in_a_with_block_is_the_users(empty):
    with pytest.raises(ZeroDivisionError):
        with empty(shape=SHAPE, axis=1) as t:
            t.append(rows(10))
            capsule = t.__dlpack__()
            raise ZeroDivisionError
    del capsule


# ---- views --------------------------------------------------------------------------


def test_view_pins_only_while_it_is_exported(tensor):
    view = tensor[:10]
    tensor.truncate(5)
    before = state(tensor)
    for export in (view.__dlpack__, lambda: np.from_dlpack(view)):
        with pytest.raises(BufferError, match="truncated"):
            export()
    assert state(tensor) == before
    assert tensor[:5].__dlpack__()


def test_view_of_rows_that_were_replaced_is_stale(tensor):
    """Truncated and grown again: these are other rows."""
    view = tensor[2:10]
    kept = tensor[0:4]
    tensor.truncate(5)
    tensor.append(rows(10, seed=1))
    with pytest.raises(BufferError, match="truncated"):
        view.__dlpack__()
    assert kept.__dlpack__()


def test_grown_view_goes_stale(tensor):
    view = tensor.grow(3)
    tensor.truncate(11)
    with pytest.raises(BufferError):
        view.__dlpack__()


def test_reserved_refuses_only_close(tensor):
    capsule = tensor.reserved().__dlpack__()
    assert tuple(look(capsule).tensor.shape[:4]) == (2, 1000, 3, 4)
    tensor.truncate(0)
    tensor.trim()
    tensor.append(rows(20))
    with pytest.raises(BufferError):
        tensor.close()
    del capsule


def test_view_keeps_the_tensor(empty):
    t = empty(shape=SHAPE, axis=1)
    t.append(rows(10))
    view = t[2:5]
    del t
    gc.collect()
    assert same(to_numpy(view), rows(10)[:, 2:5])


# ---- NumPy and the buffer protocol --------------------------------------------------


def test_numpy_shares_memory(on_host):
    for share in (np.asarray, np.from_dlpack, lambda t: np.asarray(memoryview(t))):
        a = share(on_host)
        assert same(np.array(a), to_numpy(on_host))
        assert a.ctypes.data == on_host.ptr
        a[0, 3] = 42
        assert (to_numpy(on_host)[0, 3] == 42).all()
        check_pins(on_host, 10)
        del a
    on_host.truncate(0)


def test_numpy_array_keeps_its_rows_while_the_tensor_grows(on_host):
    a = np.asarray(on_host)
    before = a.copy()
    on_host.append(rows(900))
    assert same(a, before)
    assert a.shape == (2, 10, 3, 4)


def test_numpy_from_dlpack_is_writable(on_host):
    assert np.from_dlpack(on_host).flags.writeable
    assert np.from_dlpack(on_host, device="cpu", copy=False).flags.writeable


def test_consumer_that_knows_legacy_capsules_only(on_host):
    class Old:
        def __dlpack_device__(self):
            return on_host.__dlpack_device__()

        def __dlpack__(self, stream=None, **arguments):
            return on_host.__dlpack__(stream=stream)

    a = np.from_dlpack(Old())
    assert a.ctypes.data == on_host.ptr
    assert same(np.array(a), rows(10))
    check_pins(on_host, 10)


def test_array_protocol_arguments(on_host):
    assert np.array(on_host, dtype="float64").dtype == np.float64
    assert np.asarray(on_host, dtype="float32").ctypes.data == on_host.ptr
    copied = np.array(on_host, copy=True)
    on_host.truncate(0)
    assert same(copied, rows(10))


def test_memoryview(on_host):
    view = memoryview(on_host)
    assert (view.shape, view.strides) == (on_host.shape, on_host.strides)
    assert (view.format, view.itemsize, view.readonly) == ("f", 4, False)
    assert view.tobytes() == rows(10).tobytes()
    on_host.append(rows(5))
    assert view.shape == (2, 10, 3, 4)  # of its creation
    part = view[1:]
    view.release()
    with pytest.raises(BufferError):
        on_host.truncate(9)
    part.release()
    on_host.truncate(0)


@pytest.fixture
def get_buffer():
    """PyObject_GetBuffer with flags of our choice; the buffer is released at once."""
    api = cuda_helper.ctypes.pythonapi
    c = cuda_helper.ctypes

    class Buffer(c.Structure):
        _fields_ = [
            ("buf", c.c_void_p),
            ("obj", c.c_void_p),
            ("len", c.c_ssize_t),
            ("itemsize", c.c_ssize_t),
            ("readonly", c.c_int),
            ("ndim", c.c_int),
            ("format", c.c_char_p),
            ("shape", c.POINTER(c.c_ssize_t)),
            ("strides", c.POINTER(c.c_ssize_t)),
            ("suboffsets", c.c_void_p),
            ("internal", c.c_void_p),
        ]

    def get(owner, flags):
        buffer = Buffer()
        status = api.PyObject_GetBuffer(c.py_object(owner), c.byref(buffer), c.c_int(flags))
        assert status == 0
        api.PyBuffer_Release(c.byref(buffer))
        return buffer

    return get


WRITABLE, FORMAT, ND, STRIDES = 0x1, 0x4, 0x8, 0x18
C_CONTIGUOUS, F_CONTIGUOUS, ANY_CONTIGUOUS = 0x38, 0x58, 0x98


def test_buffer_requests_of_strided_memory(on_host, get_buffer):
    for flags in (0, WRITABLE, ND, ND | FORMAT, C_CONTIGUOUS, F_CONTIGUOUS, ANY_CONTIGUOUS):
        with pytest.raises(BufferError):
            get_buffer(on_host, flags)
    for flags in (STRIDES, STRIDES | FORMAT, STRIDES | WRITABLE):
        buffer = get_buffer(on_host, flags)
        assert buffer.len == on_host.nbytes
        assert (buffer.itemsize, buffer.ndim, buffer.readonly) == (4, 4, 0)
        assert not buffer.suboffsets
    on_host.truncate(0)


def test_buffer_requests_of_dense_memory(host, get_buffer):
    with pyvmm.empty((0, 4), "int16", axis=0, capacity=10, device=host, layout="seq") as t:
        t.append(pattern((3, 4), "int16"))
        for flags in (0, WRITABLE, ND, FORMAT, STRIDES, C_CONTIGUOUS, ANY_CONTIGUOUS):
            buffer = get_buffer(t, flags)
            assert (buffer.buf, buffer.len) == (t.ptr, 24)
            assert bool(buffer.format) == bool(flags & FORMAT)
            assert bool(buffer.shape) == bool(flags & ND)
            assert bool(buffer.strides) == (flags & STRIDES == STRIDES)
        with pytest.raises(BufferError):
            get_buffer(t, F_CONTIGUOUS)
        assert bytes(t) == pattern((3, 4), "int16").tobytes()
        t.truncate(0)


def test_close_is_refused_under_a_buffer(on_host):
    with memoryview(on_host):
        with pytest.raises(BufferError, match="export"):
            on_host.close()
    on_host.close()


def test_buffer_of_a_view(on_host):
    view = memoryview(on_host[2:5])
    assert np.asarray(view).ctypes.data == on_host.ptr + 2 * on_host.strides[1]
    assert view.shape == (2, 3, 3, 4)
    check_pins(on_host, 5)
    view.release()


# ---- CUDA ---------------------------------------------------------------------------


def on_gpu(cuda):
    """No fixture, which would outlive its test: some of these keep their pins for life."""
    t = pyvmm.empty(SHAPE, "float32", axis=1, capacity=1000, device=cuda, layout="lane")
    t.append(rows(10))
    return t


def test_device_memory_names_dlpack_as_the_way(cuda):
    t = on_gpu(cuda)
    for owner in (t, t[:2], t.reserved()):
        with pytest.raises(BufferError, match="DLPack|dlpack"):
            memoryview(owner)
        with pytest.raises(TypeError, match="DLPack|dlpack"):
            np.asarray(owner)
        with pytest.raises(TypeError, match="DLPack|dlpack"):
            np.array(owner)
    t.truncate(0)


def test_cuda_array_interface(cuda):
    t = on_gpu(cuda)
    view = t[3:7]
    interface = view.__cuda_array_interface__
    assert interface["shape"] == (2, 4, 3, 4)
    assert interface["strides"] == t.strides
    assert interface["typestr"] == "<f4"
    assert interface["data"] == (view.ptr, False)
    assert interface["version"] == 3
    assert interface["stream"] == cuda_helper.DEFAULT_STREAM


def test_interface_of_the_tensor_pins_for_its_life(cuda):
    t = on_gpu(cuda)
    assert t.__cuda_array_interface__["shape"] == (2, 10, 3, 4)
    gc.collect()
    with pytest.raises(BufferError):
        t.truncate(9)
    t.append(rows(5))
    t.truncate(10)


def test_interface_of_a_view_pins_until_the_view_goes(cuda):
    t = on_gpu(cuda)
    view = t[:7]
    assert view.__cuda_array_interface__
    check_pins(t, 7)
    del view
    gc.collect()
    t.truncate(0)
    t.close()


def test_interface_of_stale_rows(cuda):
    t = on_gpu(cuda)
    view = t[:7]
    t.truncate(3)
    with pytest.raises(BufferError, match="truncated"):
        view.__cuda_array_interface__  # noqa: B018


def test_host_has_no_cuda_array_interface(on_host):
    assert not hasattr(on_host, "__cuda_array_interface__")
    assert not hasattr(on_host[:2], "__cuda_array_interface__")
