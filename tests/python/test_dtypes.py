"""Every dtype: what it is called, how it is exported, and that its bits arrive."""

import ml_dtypes
import numpy as np
import pytest

import pyvmm
from dlpack_struct import look
from model import pattern, same
from support import to_numpy

# name: DLPack's code and bits
DTYPES = {
    "bool": (6, 8),
    "int8": (0, 8),
    "int16": (0, 16),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "uint16": (1, 16),
    "uint32": (1, 32),
    "uint64": (1, 64),
    "float16": (2, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "bfloat16": (4, 16),
    "float8_e4m3fn": (10, 8),
    "float8_e5m2": (12, 8),
    "complex64": (5, 64),
    "complex128": (5, 128),
}
EXTENDED = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]
NATIVE = [name for name in DTYPES if name not in EXTENDED]


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name)) if name in EXTENDED else np.dtype(name)


def make(name, device, **arguments):
    spec = {"axis": 1, "capacity": 100, "device": device, "layout": "lane", **arguments}
    return pyvmm.empty((2, 0, 3), name, **spec)


@pytest.mark.parametrize("name", DTYPES)
def test_bits_arrive(name, device):
    x = pattern((2, 20, 3), numpy_dtype(name))
    with make(name, device) as t:
        assert t.dtype == numpy_dtype(name)
        assert type(t.dtype) is type(np.dtype(t.dtype))
        assert isinstance(t.dtype, np.dtype)
        assert t.strides[2] == t.dtype.itemsize
        t.append(x[:, :1])
        t.append(x[:, 1:])
        assert t.nbytes == x.nbytes
        assert same(to_numpy(t), x)


@pytest.mark.parametrize("name", DTYPES)
def test_code_in_dlpack(name, device):
    with make(name, device) as t:
        t.grow(2)
        dl = look(t.__dlpack__()).tensor
        assert (dl.code, dl.bits, dl.lanes) == (*DTYPES[name], 1)


@pytest.mark.parametrize("name", DTYPES)
def test_forms_of_a_dtype(name, host):
    forms = [name, numpy_dtype(name), numpy_dtype(name).type]
    for form in forms:
        with make(form, host) as t:
            assert t.dtype == numpy_dtype(name)


@pytest.mark.parametrize(
    ("form", "name"),
    [(float, "float64"), (int, "int64"), (bool, "bool"), (complex, "complex128"),
     ("<f4", "float32"), ("f2", "float16"), ("?", "bool"),
     (np.float32, "float32"), (np.dtype("=i2"), "int16")],
    ids=str,
)  # fmt: skip
def test_numpys_own_forms(form, name, host):
    with make(form, host) as t:
        assert t.dtype == np.dtype(name)


@pytest.mark.parametrize("name", NATIVE)
def test_numpy_shares_native_dtypes(name, host):
    x = pattern((2, 4, 3), name)
    with make(name, host) as t:
        t.append(x)
        for share in (np.asarray, np.from_dlpack, memoryview):
            shared = np.asarray(share(t))
            assert shared.dtype == t.dtype
            assert shared.ctypes.data == t.ptr
            assert same(np.array(shared), x)
            del shared


@pytest.mark.parametrize("name", NATIVE)
def test_memoryview_has_numpys_format(name, host):
    with make(name, host) as t:
        t.grow(1)
        with memoryview(t) as view:
            assert view.format == memoryview(np.empty(1, name)).format
            assert view.itemsize == t.dtype.itemsize


@pytest.mark.parametrize("name", EXTENDED)
def test_extended_dtypes_have_no_buffer_but_an_array(name, host):
    """The buffer protocol has no format for them; __array__ gives a view without a copy."""
    x = pattern((2, 4, 3), numpy_dtype(name))
    with make(name, host) as t:
        t.append(x)
        for owner in (t, t[1:3]):
            with pytest.raises(BufferError, match=name):
                memoryview(owner)
        shared = np.asarray(t)
        assert shared.dtype == numpy_dtype(name)
        assert shared.ctypes.data == t.ptr
        assert same(np.array(shared), x)
        shared[0, 0, 0] = 1.5
        assert to_numpy(t)[0, 0, 0] == 1.5
        part = np.asarray(t[1:3])
        assert part.ctypes.data == t.ptr + t.strides[1]
        with pytest.raises(BufferError):
            t.truncate(3)
        del shared, part
        t.truncate(0)


@pytest.mark.parametrize("name", EXTENDED)
def test_extended_dtypes_from_each_other(name, device):
    """Sources: ml_dtypes' arrays, and another tensor of ours."""
    x = pattern((2, 4, 3), numpy_dtype(name))
    with make(name, device) as t, make(name, device) as u:
        t.append(x)
        u.append(t)
        u.append(t[1:2])
        assert same(to_numpy(u), np.concatenate([x, x[:, 1:2]], axis=1))


@pytest.mark.parametrize("name", EXTENDED)
def test_extended_dtypes_have_no_cuda_array_interface(name, cuda):
    with make(name, cuda) as t:
        t.grow(1)
        assert not hasattr(t, "__cuda_array_interface__")
        assert not hasattr(t[:1], "__cuda_array_interface__")


@pytest.mark.parametrize("name", NATIVE)
def test_cuda_array_interface_typestr(name, cuda):
    with make(name, cuda) as t:
        t.grow(1)
        assert t[:1].__cuda_array_interface__["typestr"] == np.dtype(name).str


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_are_never_converted(name, device):
    with make(name, device) as t:
        t.append(pattern((2, 1, 3), numpy_dtype(name)))
        for other in DTYPES:
            if other == name:
                continue
            with pytest.raises(TypeError, match=name):
                t.append(pattern((2, 1, 3), numpy_dtype(other)))
        assert t.length == 1


def test_every_size_of_element_and_run(device):
    """The copy moves 1 to 16 bytes at a time; odd runs and odd beginnings are whole, too."""
    for width in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63):
        with pyvmm.empty((2, 0, width), "uint8", axis=1, capacity=60, device=device) as t:
            x = pattern((2, 60, width), "uint8", seed=width)
            start = 0
            for n in (1, 2, 3, 5, 8, 13, 28):
                t.append(x[:, start : start + n])
                start += n
            assert same(to_numpy(t), x)
