"""The device runs out of memory for real: a pool without a budget grows until nothing is left.
An error, everything as before, and all of it usable again once something is given back."""

import gc

import pytest

import cuda_helper
import pyvmm
from model import pattern, same
from support import held, state, to_numpy

ROW = 1 << 16  # bytes
CAPACITY = 1 << 24  # rows: 1 TiB, more than there is
NOISE = 256 << 20  # what the driver may keep for itself


def make(pool, **arguments):
    spec = {"axis": 0, "capacity": CAPACITY, "device": pool.device, "pool": pool, **arguments}
    return pyvmm.empty((0, ROW), "uint8", **spec)


def fill(tensor):
    """Grow until not one row more can be had; the tensor's state is checked at each failure."""
    step, failures = 1 << 18, 0
    while step:
        before = tensor.ptr, tensor.length, tensor.mapped, tensor.stats()["mapped_bytes"]
        try:
            tensor.map(tensor.mapped + step)
        except pyvmm.OutOfMemoryError as error:
            # Page tables take memory, too.
            calls = map(cuda_helper.driver_name, ("cuMemCreate", "cuMemMap", "cuMemSetAccess"))
            assert error.operation in calls
            assert error.driver_code == 2
            after = tensor.ptr, tensor.length, tensor.mapped, tensor.stats()["mapped_bytes"]
            assert after == before
            step //= 2
            failures += 1
    return failures


@pytest.fixture
def pools(full_device):
    made = [pyvmm.Pool(full_device) for _ in range(2)]
    yield made
    gc.collect()
    for pool in made:
        pool.close()


@pytest.mark.parametrize("block_size", ["auto", "32MiB"])
def test_recovery(full_device, pools, block_size):
    pool = pools[0]
    before = cuda_helper.free_bytes()
    x = pattern((3, ROW), "uint8")
    small, large = make(pool), make(pool, block_size=block_size)
    small.append(x)
    assert fill(large) >= 18
    assert cuda_helper.free_bytes() < 2 * NOISE
    large.grow(1)
    kept = state(small)
    for grow in (lambda: large.map(large.mapped + 1), lambda: small.map(large.mapped)):
        for _ in range(3):
            with pytest.raises(pyvmm.OutOfMemoryError, match=cuda_helper.OUT_OF_MEMORY):
                grow()
    assert state(small) == kept
    assert same(to_numpy(small), x)

    # What the large one gives back serves the small one: queued, no call to the driver needed.
    large.close()
    small.append(pattern((300, ROW), "uint8", 1))
    assert same(to_numpy(small[3:]), pattern((300, ROW), "uint8", 1))
    assert same(to_numpy(small[:3]), x)
    small.close()
    pool.trim(wait=True)
    assert held(pool) == {}
    assert abs(cuda_helper.free_bytes() - before) < NOISE
    with make(pool) as again:
        again.append(x)
        assert same(to_numpy(again), x)


def test_truncating_and_trimming_is_enough(full_device, pools):
    with make(pools[0]) as large, make(pools[0]) as other:
        large.append(pattern((2, ROW), "uint8"))
        fill(large)
        with pytest.raises(pyvmm.OutOfMemoryError):
            other.map(10_000)
        large.trim()
        other.append(pattern((200, ROW), "uint8", 1))
        assert same(to_numpy(other), pattern((200, ROW), "uint8", 1))
        assert same(to_numpy(large), pattern((2, ROW), "uint8"))


def test_second_pool(full_device, pools):
    """What one pool has in use the other cannot have. Once it is given back it can, at once; and
    a callback can give it back."""
    rich, poor = pools
    x = pattern((50, ROW), "uint8")
    large, t = make(rich), make(poor)
    fill(large)
    with pytest.raises(pyvmm.OutOfMemoryError):
        t.append(x)
    assert t.length == t.mapped == 0
    large.close()
    t.append(x)
    assert same(to_numpy(t), x)
    t.close()
    poor.trim(wait=True)

    large, t = make(rich), make(poor)
    fill(large)
    asked = []

    def give_up(n_bytes):
        asked.append(n_bytes)
        if not large.closed:
            large.close()
        rich.trim(wait=True)
        return True

    poor.on_oom(give_up)
    t.append(x)
    assert len(asked) == 1 and asked[0] >= x.nbytes
    assert same(to_numpy(t), x)
    t.close()


def test_append_many_takes_all_or_nothing(full_device, pools):
    pool = pools[0]
    large, pair = make(pool), [make(pool), make(pool)]
    x = [pattern((4, ROW), "uint8", seed) for seed in range(2)]
    pyvmm.append_many(pair, x)
    kept = [state(t) for t in pair]
    fill(large)
    many = pattern((64, ROW), "uint8", 2)
    with pytest.raises(pyvmm.OutOfMemoryError):
        pyvmm.append_many(pair, [many, many])
    assert [state(t) for t in pair] == kept
    large.close()
    pyvmm.append_many(pair, [many, many])
    for t, first in zip(pair, x, strict=True):
        assert same(to_numpy(t[:4]), first) and same(to_numpy(t[4:]), many)
        t.close()
