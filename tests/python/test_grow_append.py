"""Growing, appending, shrinking: lengths, contents, what sources are taken."""

import array
import ctypes

import numpy as np
import pytest

import cuda_helper
import dlpack_struct
import pyvmm
from model import LAYOUTS, Model, pattern, same
from support import calls, calls_since, fill, smallest_block, to_numpy


def rows(n, seed=0):
    return pattern((n, 4), "float32", seed)


@pytest.fixture
def tensor(empty):
    with empty() as t:
        yield t


# ---- append -------------------------------------------------------------------------


def test_append_of_any_number_of_rows(tensor):
    model = Model((0, 4), "float32", 0, 1000)
    for seed, n in enumerate([1, 0, 2, 100, 0, 1, 300, 596]):
        x = rows(n, seed)
        assert tensor.append(x) is None
        model.append(x)
        assert tensor.length == model.length
        assert tensor.shape == (model.length, 4)
        assert tensor.nbytes == model.length * 16
    assert tensor.length == tensor.capacity
    assert same(to_numpy(tensor), model.array)
    tensor.append(rows(0))
    with pytest.raises(pyvmm.CapacityError):
        tensor.append(rows(1))


STRIDED_SOURCES = {
    "dense": lambda a: a,
    "every second row": lambda a: a[::2],
    "rows backwards": lambda a: a[::-1],
    "part of each row": lambda a: np.concatenate([a, a, a], axis=3)[..., 5:10],
    "the middle dimensions swapped": lambda a: np.ascontiguousarray(
        a.transpose(0, 2, 1, 3)
    ).transpose(0, 2, 1, 3),
    "the growth axis outermost": lambda a: np.ascontiguousarray(a.transpose(1, 0, 2, 3)).transpose(
        1, 0, 2, 3
    ),
    "a dimension repeated": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "one row": lambda a: a[:, 3:4],
    "lanes backwards": lambda a: a[::-1, :, ::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", STRIDED_SOURCES)
def test_source_of_any_strides(empty, device, how, layout):
    x = STRIDED_SOURCES[how](pattern((6, 7, 3, 5), "float32"))
    shape = (x.shape[0], 0, 3, 5)
    with empty(shape=shape, axis=1, layout=layout) as t:
        first = pattern((x.shape[0], 2, 3, 5), "float32", seed=1)
        t.append(first)
        t.append(x)
        assert same(to_numpy(t), np.concatenate([first, x], axis=1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["dense", "the growth axis outermost", "part of each row"])
def test_device_source_of_any_strides(cuda, how, layout):
    whole = pattern((6, 7, 3, 5), "float32")
    x = STRIDED_SOURCES[how](whole)
    # Memory as the base has it; the interface tells the strides.
    base = x if x.base is None else x.base
    memory = cuda_helper.DeviceArray(np.ascontiguousarray(base).ravel())
    source = cuda_helper.Interface(
        memory.pointer + x.ctypes.data - base.ctypes.data, x.shape, x.strides, x.dtype
    )
    with pyvmm.empty((6, 0, 3, 5), "float32", axis=1, capacity=50, device=cuda, layout=layout) as t:
        t.append(source)
        t.append(source)
        assert same(to_numpy(t), np.concatenate([x, x], axis=1))
    memory.free()


def test_sources_of_every_kind(tensor):
    x = rows(2)
    sources = [
        x,
        memoryview(x),
        dlpack_struct.Producer(x.ctypes.data, x.shape, x.strides, x.dtype),
        np.ma.masked_array(x).data,
        x.view(type("Subclass", (np.ndarray,), {})),
        (ctypes.c_float * 4 * 2).from_buffer_copy(x),
    ]
    for source in sources:
        tensor.append(source)
    assert same(to_numpy(tensor), np.concatenate([x] * len(sources)))


def test_read_only_sources(tensor):
    x = rows(2)
    x.flags.writeable = False
    tensor.append(x)
    tensor.append(np.frombuffer(x.tobytes(), "float32").reshape(2, 4))
    tensor.append(memoryview(x))
    assert same(to_numpy(tensor), np.concatenate([x] * 3))


def test_source_in_one_dimension(empty):
    with empty(shape=(0,), dtype="int32") as t:
        t.append(array.array("i", [1, 2, 3]))
        t.append(np.arange(4, 9, dtype="int32"))
        assert to_numpy(t).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_sources_on_the_device(cuda, tensor):
    by_interface = cuda_helper.InterfaceArray(rows(3))
    by_capsule = cuda_helper.CapsuleArray(rows(2, 1))
    for x in (by_interface, by_capsule, rows(1, 2), by_interface):
        tensor.append(x)
    expected = [rows(3), rows(2, 1), rows(1, 2), rows(3)]
    assert same(to_numpy(tensor), np.concatenate(expected))
    assert by_capsule.producer.alive == 0  # what it exported has been given back
    by_interface.free()
    by_capsule.free()


def test_a_tensor_and_its_view_are_sources(empty, tensor):
    tensor.append(rows(5))
    with empty() as other:
        other.append(tensor)
        other.append(tensor[1:3])
        assert same(to_numpy(other), np.concatenate([rows(5), rows(5)[1:3]]))
        other.truncate(0)  # nothing of it is still exported
    tensor.append(tensor[0:2])  # its own rows, read before the new ones are in use
    tensor.truncate(0)


def test_dlpack_source_is_given_back(tensor):
    x = rows(3)
    producer = dlpack_struct.Producer(x.ctypes.data, x.shape, x.strides, x.dtype)
    tensor.append(producer)
    assert producer.alive == 0
    wrong = dlpack_struct.Producer(x.ctypes.data, (3, 2), x.strides, x.dtype)
    with pytest.raises(ValueError):
        tensor.append(wrong)
    assert wrong.alive == 0
    assert same(to_numpy(tensor), x)


def test_source_that_raises(tensor):
    class Broken:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **arguments):
            raise RuntimeError("the producer's own trouble")

    with pytest.raises(RuntimeError, match="the producer's own trouble"):
        tensor.append(Broken())
    assert tensor.length == 0
    tensor.append(rows(1))


def test_host_source_has_been_read_when_append_returns(tensor):
    x = rows(100).copy()
    tensor.append(x)
    x[...] = 0
    assert same(to_numpy(tensor), rows(100))


def test_row_of_many_blocks(empty, device):
    block = smallest_block(device)
    n_elements = 3 * block // 2
    with empty(shape=(0, n_elements), dtype="uint8", capacity=5) as t:
        x = pattern((4, n_elements), "uint8")
        for i in range(4):
            t.append(x[i : i + 1])
        assert same(to_numpy(t), x)


# ---- append_many --------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_many(empty, layout):
    k = empty(shape=(2, 0, 3, 8), dtype="float16", axis=1, layout=layout)
    v = empty(shape=(0, 5), dtype="int32", axis=0, layout=layout)
    models = Model((2, 0, 3, 8), "float16", 1, 1000), Model((0, 5), "int32", 0, 1000)
    for step, (n, m) in enumerate([(1, 1), (3, 0), (0, 4), (17, 17)]):
        new_k, new_v = pattern((2, n, 3, 8), "float16", step), pattern((m, 5), "int32", step)
        pyvmm.append_many([k, v], (new_k, new_v))
        models[0].append(new_k)
        models[1].append(new_v)
    for t, model in zip((k, v), models, strict=True):
        assert same(to_numpy(t), model.array)
        t.close()


def test_append_many_is_one_launch(cuda):
    """160 tensors in one launch, 161 in two."""
    x = cuda_helper.InterfaceArray(rows(2))
    pool = pyvmm.Pool(cuda)
    tensors = [
        pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device=cuda, pool=pool)
        for _ in range(161)
    ]
    for t in tensors:
        t.map(100)
    for n, launches in ((1, 1), (2, 1), (32, 1), (33, 1), (160, 1), (161, 2)):
        before = calls(pool)
        pyvmm.append_many(tensors[:n], [x] * n)
        assert calls_since(before, pool) == {"launch": launches}
    for i, t in enumerate(tensors):
        times = sum(i < n for n in (1, 2, 32, 33, 160, 161))
        assert same(to_numpy(t), np.concatenate([rows(2)] * times))
        t.close()
    pool.close()
    x.free()


def test_append_many_of_host_and_device_sources(cuda, empty):
    x = cuda_helper.InterfaceArray(rows(2))
    with empty() as t, empty() as u:
        pyvmm.append_many([t, u], [x, rows(3, 1)])
        assert same(to_numpy(t), rows(2))
        assert same(to_numpy(u), rows(3, 1))
    x.free()


def test_append_many_all_or_none(make_pool, empty, device):
    block = smallest_block(device)
    pool = make_pool(block_size=block, max_bytes=3 * block)
    with empty(pool=pool) as t, empty(pool=pool, capacity=3 * block // 16) as u:
        with pytest.raises(pyvmm.OutOfMemoryError):
            pyvmm.append_many([t, u], [rows(1), rows(3 * block // 16)])
        assert t.length == u.length == t.mapped == u.mapped == 0
        pyvmm.append_many([t, u], [rows(1), rows(2 * block // 16)])
        assert same(to_numpy(t), rows(1))


# ---- map_many -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_map_many(empty, layout):
    with empty(shape=(2, 0, 3), axis=1, layout=layout) as t, empty(layout=layout) as u:
        t.append(pattern((2, 2, 3), "float32"))
        assert pyvmm.map_many([t, u], 10) is None
        assert (t.length, u.length) == (2, 0)
        assert t.mapped >= 10
        assert u.mapped >= 10
        pyvmm.map_many((t, u), np.array([900, 1000]))
        assert t.mapped >= 900
        assert u.mapped == 1000
        before = calls(t), calls(u)
        pyvmm.map_many([t, u], [900, np.int64(1000)])
        assert (calls(t), calls(u)) == before


def test_map_many_all_or_none(make_pool, empty, device):
    block = smallest_block(device)
    pool = make_pool(block_size=block, max_bytes=3 * block)
    with empty(pool=pool) as t, empty(pool=pool, capacity=3 * block // 16) as u:
        with pytest.raises(pyvmm.OutOfMemoryError):
            pyvmm.map_many([t, u], [1, 3 * block // 16])
        assert t.mapped == u.mapped == 0
        pyvmm.map_many([t, u], [1, 2 * block // 16])
        assert u.mapped == 2 * block // 16


def test_map_many_has_what_one_by_one_has_not(make_pool, empty, device):
    """Of blocks of "auto" the first takes larger ones than it needs."""
    block = smallest_block(device)
    n_rows, n = 45 * block // 64, 3
    pool = make_pool(max_bytes=n * 45 * block)
    tensors = [empty(shape=(0, 16), capacity=100 * block // 64, pool=pool) for _ in range(n)]
    with pytest.raises(pyvmm.OutOfMemoryError):
        for t in tensors:
            t.map(n_rows)
    for t in tensors:
        t.trim()
    pool.trim(wait=True)
    pyvmm.map_many(tensors, n_rows)
    assert [t.mapped for t in tensors] == [n_rows] * n
    assert pool.stats()["in_use_bytes"] == n * 45 * block
    for t in tensors:
        t.close()


# ---- grow ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grow_returns_the_new_rows(empty, layout):
    with empty(shape=(3, 0, 2), axis=1, layout=layout) as t:
        t.append(pattern((3, 4, 2), "float32"))
        view = t.grow(5)
        assert t.length == 9
        assert view.shape == (3, 5, 2)
        assert view.strides == t.strides
        assert view.ptr == t.ptr + 4 * t.strides[1]
        x = pattern((3, 5, 2), "float32", 1)
        fill(view, x)
        assert same(to_numpy(t), np.concatenate([pattern((3, 4, 2), "float32"), x], axis=1))


def test_grow_nothing(tensor):
    tensor.grow(3)
    view = tensor.grow(0)
    assert view.shape == (0, 4)
    assert tensor.length == 3


def test_map_leaves_the_length(tensor):
    tensor.map(0)
    tensor.map(500)
    assert tensor.length == 0
    assert 500 <= tensor.mapped <= 1000
    mapped = tensor.mapped
    tensor.map(10)  # never less
    assert tensor.mapped == mapped
    tensor.trim()
    assert tensor.mapped == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero(empty, device, make_pool, layout):
    """Rows taken by grow read zero, also after truncation and in recycled blocks."""
    block = smallest_block(device)
    n_rows = block // 16
    pool = make_pool(block_size=block, max_bytes=8 * block)
    with empty(shape=(2, 0, 2), axis=1, layout=layout, capacity=4 * n_rows, pool=pool) as t:
        t.grow(n_rows)
        fill(t, 7)
    arguments = {"shape": (2, 0, 2), "axis": 1, "layout": layout, "capacity": 4 * n_rows}
    with empty(**arguments, pool=pool, zero=True) as t:
        t.grow(3)
        assert not to_numpy(t).any()
        fill(t, 7)
        t.truncate(1)
        t.grow(n_rows)
        contents = to_numpy(t)
        assert (contents[:, :1] == 7).all() and not contents[:, 1:].any()
        t.truncate(0)
        t.append(pattern((2, 5, 2), "float32"))
        t.grow(2)
        assert same(to_numpy(t)[:, :5], pattern((2, 5, 2), "float32"))
        assert not to_numpy(t)[:, 5:].any()


# ---- truncate, trim, fork, close ----------------------------------------------------


def test_truncate_and_append_again(tensor):
    model = Model((0, 4), "float32", 0, 1000)
    for seed, keep in enumerate([10, 3, 3, 0, 5]):
        x = rows(12, seed)
        tensor.append(x)
        model.append(x)
        tensor.truncate(keep)
        model.truncate(keep)
        assert tensor.length == keep
        assert same(to_numpy(tensor), model.array)
    tensor.truncate(5)  # to the length: allowed, and nothing


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trim_gives_back_blocks_without_rows(empty, device, make_pool, layout):
    block = smallest_block(device)
    n_rows = block // 16
    pool = make_pool(block_size=block)
    with empty(capacity=10 * n_rows, layout=layout, pool=pool) as t:
        x = pattern((7 * n_rows, 4), "float32")
        t.append(x)
        t.truncate(2 * n_rows + 1)
        assert t.stats()["mapped_bytes"] == 7 * block
        t.trim()
        assert t.stats()["mapped_bytes"] == 3 * block
        assert t.stats()["block_count"] == 3
        assert t.mapped == 3 * n_rows
        assert same(to_numpy(t), x[: 2 * n_rows + 1])
        t.append(x[2 * n_rows + 1 :])
        assert same(to_numpy(t), x)
        t.truncate(0)
        t.trim()
        assert (t.mapped, t.stats()["mapped_bytes"]) == (0, 0)


def test_fork_of_a_part(tensor):
    tensor.append(rows(10))
    for n in (None, 0, 1, 10):
        with tensor.fork() if n is None else tensor.fork(n) as fork:
            assert fork.length == (10 if n is None else n)
            assert same(to_numpy(fork), rows(10)[: fork.length])
            assert (fork.capacity, fork.dtype, fork.device) == (1000, tensor.dtype, tensor.device)
    with tensor.fork(n=4) as fork:
        tensor.close()
        assert same(to_numpy(fork), rows(10)[:4])


def test_stats_of_a_tensor(empty, device, pool):
    block = smallest_block(device)
    with empty(shape=(2, 0, 2), axis=1, layout="lane", block_size=block, pool=pool) as t:
        names = {"reserved_bytes", "mapped_bytes", "used_bytes", "slack_bytes", "block_count"}
        assert t.stats().keys() == names | {"driver_calls"}
        stats = t.stats()
        assert stats["reserved_bytes"] == 2 * -(-1000 * 8 // block) * block
        assert stats["mapped_bytes"] == stats["used_bytes"] == stats["block_count"] == 0
        t.append(pattern((2, 3, 2), "float32"))
        stats = t.stats()
        assert stats["mapped_bytes"] == 2 * block
        assert stats["used_bytes"] == t.nbytes == 3 * 16
        assert stats["slack_bytes"] == 2 * block - 48
        assert stats["block_count"] == 2
        assert stats["driver_calls"]["create"] == 2
        assert all(type(n) is int for n in stats["driver_calls"].values())


@pytest.mark.parametrize("block_size", ["8MiB", 8 << 20])
def test_block_size_of_the_tensor_and_of_the_pool(empty, make_pool, block_size):
    pool = make_pool(block_size="4MiB")
    with empty(pool=pool) as t, empty(pool=pool, block_size=block_size) as u:
        t.grow(1)
        u.grow(1)
        assert t.stats()["mapped_bytes"] == 4 << 20
        assert u.stats()["mapped_bytes"] == 8 << 20
