"""The Python surface: names, attributes, slicing, context managers, reprs, refusals."""

import copy
import inspect
import operator
import pickle

import numpy as np
import pytest

import pyvmm
from model import LAYOUTS, pattern, same
from support import to_numpy

# Pinned by docs/DESIGN.md.
NAMES = [
    "empty",
    "Pool",
    "default_pool",
    "append_many",
    "VMMError",
    "OutOfMemoryError",
    "CapacityError",
    "VTensor",
    "__version__",
]
TENSOR_ATTRIBUTES = [
    "shape", "strides", "dtype", "ndim", "axis", "layout", "length", "capacity", "mapped",
    "device", "ptr", "nbytes",
]  # fmt: skip
TENSOR_METHODS = [
    "append", "grow", "map", "truncate", "trim", "fork", "close", "stats", "view", "reserved",
]  # fmt: skip
POOL_METHODS = ["trim", "stats", "on_oom", "capture_begin", "capture_end", "close"]


@pytest.fixture
def tensor(empty):
    with empty(shape=(2, 0, 3), axis=1) as t:
        t.append(pattern((2, 10, 3), "float32"))
        yield t


# ---- names --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_public_names(name):
    assert hasattr(pyvmm, name)
    assert name in pyvmm.__all__ or name == "__version__"


def test_star_import_is_what_all_says():
    for name in pyvmm.__all__:
        assert getattr(pyvmm, name) is not None


def test_docstrings(tensor):
    documented = [pyvmm, pyvmm.VTensor, pyvmm.Pool, pyvmm.VMMError, type(tensor[:1])]
    documented += [getattr(pyvmm, name) for name in pyvmm.__all__ if name != "__version__"]
    documented += [getattr(pyvmm.VTensor, name) for name in TENSOR_METHODS + TENSOR_ATTRIBUTES]
    documented += [getattr(pyvmm.Pool, name) for name in POOL_METHODS]
    for thing in documented:
        text = inspect.getdoc(thing)
        assert text and len(text.split()) >= 3, thing
    for name in ("append", "grow", "map", "truncate", "fork", "close"):
        assert "Raises" in inspect.getdoc(getattr(pyvmm.VTensor, name)), name
    assert "Raises" in inspect.getdoc(pyvmm.empty)


def test_no_way_around_empty():
    with pytest.raises(TypeError):
        pyvmm.VTensor()
    with pytest.raises(TypeError):
        type("Mine", (pyvmm.VTensor,), {})
    with pytest.raises(TypeError):
        type("Mine", (pyvmm.Pool,), {})


# ---- attributes ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attributes(device, layout):
    shape = (8, 0, 32, 16)
    with pyvmm.empty(shape, "float16", axis=1, capacity=4097, device=device, layout=layout) as t:
        assert isinstance(t, pyvmm.VTensor)
        assert t.shape == shape
        assert t.dtype == np.dtype("float16")
        assert t.ndim == 4
        assert t.axis == 1
        assert t.layout == layout
        assert t.length == 0
        assert t.capacity == 4097  # exactly what was asked for
        assert t.mapped == 0
        assert t.device == device
        assert t.nbytes == 0
        t.grow(3)
        assert (t.shape, t.length, t.nbytes) == ((8, 3, 32, 16), 3, 3 * 8 * 32 * 16 * 2)
        for name in TENSOR_ATTRIBUTES:
            kinds = {"shape": tuple, "strides": tuple, "layout": str, "device": str}
            kind = kinds.get(name, np.dtype if name == "dtype" else int)
            assert isinstance(getattr(t, name), kind), name
        assert t.ptr % np.dtype("float16").itemsize == 0


@pytest.mark.parametrize("name", TENSOR_ATTRIBUTES)
def test_attributes_are_read_only(tensor, name):
    with pytest.raises(AttributeError):
        setattr(tensor, name, getattr(tensor, name))
    with pytest.raises(AttributeError):
        delattr(tensor, name)


def test_no_new_attributes(tensor):
    with pytest.raises(AttributeError):
        tensor.lenght = 3


def test_attributes_of_a_view(tensor):
    view = tensor[2:7]
    assert view.shape == (2, 5, 3)
    assert view.strides == tensor.strides
    assert (view.dtype, view.ndim, view.device) == (tensor.dtype, 3, tensor.device)
    assert view.ptr == tensor.ptr + 2 * tensor.strides[1]
    assert view.nbytes == 5 * 6 * 4


def test_cpu_is_the_host(host):
    with pyvmm.empty((0,), "uint8", axis=0, capacity=1, device="cpu") as t:
        assert t.device == "host"


def test_shape_in_any_integers(host):
    shape = [np.int64(2), 0, np.uint8(3)]
    with pyvmm.empty(shape, "uint8", axis=np.int32(1), capacity=np.int64(5), device=host) as t:
        assert t.shape == (2, 0, 3)
        t.grow(np.int16(2))
        t.truncate(np.uint64(1))
        t.map(np.int8(3))
        assert t.length == 1
        assert all(type(n) is int for n in t.shape)


def test_capacity_is_needed(host):
    with pytest.raises(TypeError, match="capacity"):
        pyvmm.empty((0, 4), "float32", axis=0, device=host)


def test_shape_may_begin_with_rows(device):
    with pyvmm.empty((2, 5, 3), "int32", axis=1, capacity=9, device=device, zero=True) as t:
        assert (t.length, t.shape) == (5, (2, 5, 3))
        assert not to_numpy(t).any()


def test_axis_is_the_one_of_size_zero(host):
    with pyvmm.empty((2, 0, 3), "int32", capacity=9, device=host) as t:
        assert t.axis == 1
    for shape in ((2, 3), (0, 0)):
        with pytest.raises(ValueError, match="axis"):
            pyvmm.empty(shape, "int32", capacity=9, device=host)


# ---- slicing ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slice_",
    [
        slice(None),
        slice(3, None),
        slice(None, 4),
        slice(2, 7),
        slice(-3, None),
        slice(None, -2),
        slice(-5, -1),
        slice(7, 3),
        slice(5, 5),
        slice(0, 1000),
        slice(20, 30),
        slice(-1000, 2),
        slice(2, 7, 1),
        slice(np.int64(2), np.int32(7)),
    ],
    ids=str,
)
def test_slices_are_those_of_numpy(tensor, slice_):
    expected = pattern((2, 10, 3), "float32")[:, slice_]
    assert same(to_numpy(tensor[slice_]), expected)


def test_view_method(tensor):
    assert same(to_numpy(tensor.view(2, 7)), pattern((2, 10, 3), "float32")[:, 2:7])
    assert tensor.view(2, 7).ptr == tensor[2:7].ptr


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (0, TypeError),
        (-1, TypeError),
        ((slice(None), 0), TypeError),
        ((slice(None), slice(None)), TypeError),
        (..., TypeError),
        (None, TypeError),
        ([0, 1], TypeError),
        (np.array([0, 1]), TypeError),
        ("a", TypeError),
        (slice(0, 4, 2), ValueError),
        (slice(4, 0, -1), ValueError),
        (slice(0, 4, 0), ValueError),
        (slice("a", None), TypeError),
        (slice(0.0, 2.0), TypeError),
    ],
    ids=str,
)
def test_other_indices_are_refused(tensor, index, error):
    with pytest.raises(error):
        tensor[index]


def test_nothing_is_assigned_by_index(tensor):
    with pytest.raises(TypeError):
        tensor[0:2] = 0
    with pytest.raises(TypeError):
        del tensor[0:2]


def test_no_len_and_no_iteration(tensor):
    for owner in (tensor, tensor[:3], tensor.reserved()):
        with pytest.raises(TypeError):
            len(owner)
        with pytest.raises(TypeError):
            iter(owner)
        with pytest.raises(TypeError):
            list(owner)
        with pytest.raises(TypeError):
            3.0 in owner  # noqa: B015
        assert operator.truth(owner)


def test_equality_is_identity(tensor):
    assert tensor == tensor
    assert tensor[:3] != tensor[:3]
    assert len({tensor, tensor}) == 1


# ---- reprs --------------------------------------------------------------------------


def test_repr_of_a_tensor_tells_its_state(empty):
    t = empty(shape=(2, 0, 3), axis=1, layout="lane")
    t.grow(7)
    for part in ("7", "1000", "float32", "lane", t.device):
        assert part in repr(t), repr(t)
    capsule = t.__dlpack__()
    assert repr(t)
    del capsule
    t.close()
    assert "closed" in repr(t)


def test_repr_of_a_view(tensor):
    view = tensor[2:7]
    for part in ("2", "7", "float32"):
        assert part in repr(view), repr(view)
    tensor.truncate(3)
    assert "stale" in repr(view) or "truncated" in repr(view), repr(view)
    assert repr(tensor.reserved())


def test_repr_of_a_pool(device):
    pool = pyvmm.Pool(device, block_size="32MiB", max_bytes="64MiB")
    for part in (device, str(32 << 20), str(64 << 20)):
        assert part in repr(pool) or part in repr(pool).replace("MiB", ""), repr(pool)
    pool.close()
    assert "closed" in repr(pool)


# ---- copies and context managers ----------------------------------------------------


def test_copying_is_refused_with_the_way_to_do_it(tensor):
    pool = pyvmm.default_pool(tensor.device)
    for owner, way in ((tensor, "fork"), (tensor[:3], "numpy|copy|append"), (pool, "Pool")):
        for refuse in (
            copy.copy,
            copy.deepcopy,
            pickle.dumps,
            lambda o: pickle.dumps(o, protocol=2),
            lambda o: o.__reduce__(),
        ):
            with pytest.raises(TypeError, match=way):
                refuse(owner)


def test_with_block_closes(empty):
    with empty() as t:
        t.grow(3)
    with pytest.raises(pyvmm.VMMError, match="closed"):
        t.grow(1)
    with pytest.raises(pyvmm.VMMError, match="closed"):
        t.__enter__()
    t.__exit__(None, None, None)  # never raises


def test_with_block_lets_exceptions_through(empty):
    with pytest.raises(KeyError):
        with empty():
            raise KeyError


def test_closed_tensor_still_says_what_it_was(empty):
    t = empty(shape=(2, 0, 3), axis=1)
    t.grow(3)
    t.close()
    assert (t.dtype, t.ndim, t.axis, t.capacity) == (np.dtype("float32"), 3, 1, 1000)


def test_return_values(empty):
    x = pattern((1, 4), "float32")
    with empty() as t:
        assert t.append(x) is None
        assert t.map(10) is None
        assert t.truncate(0) is None
        assert t.trim() is None
        assert pyvmm.append_many([t], [x]) is None
        assert t.close() is None


def test_fork_takes_its_parents_pool_and_spec(empty, make_pool):
    pool = make_pool()
    with empty(pool=pool, zero=True) as t:
        t.append(pattern((3, 4), "float32"))
        with t.fork() as fork:
            before = pool.stats()["in_use_bytes"]
            fork.map(1000)
            assert pool.stats()["in_use_bytes"] > before or fork.mapped == 1000
            assert not to_numpy(fork.grow(5)).any()


def test_keyword_and_positional_arguments(host):
    with pyvmm.empty(
        (0, 4), "float32", axis=0, capacity=10, device=host, layout="seq", block_size=None,
        pool=None, zero=False,
    ) as t:  # fmt: skip
        t.append(pattern((2, 4), "float32"), stream=None)
        t.truncate(1, stream=None)
        with t.fork(n=1) as u:
            assert u.length == 1
        pyvmm.append_many([t], [pattern((2, 4), "float32")], stream=None)
        assert t.length == 3
    pool = pyvmm.Pool(host, block_size="auto", max_bytes=None)
    pool.trim(wait=False)
    pool.close()
