"""What is mapped before it is asked for: ranges of closed tensors, and a thread's look-ahead."""

import time

import numpy as np
import pytest

import cuda_helper
import pyvmm
from model import pattern
from support import calls, calls_since, held, smallest_block, to_numpy

MIB = 1 << 20


@pytest.fixture
def block(device):
    return smallest_block(device)


@pytest.fixture
def tensor(empty, block):
    """tensor(pool, n): n blocks in use of 100; a row is 16 bytes."""

    def make(pool, n=0, **arguments):
        t = empty(capacity=100 * block // 16, block_size=block, pool=pool, **arguments)
        t.grow(n * block // 16)
        return t

    return make


def wait_until(condition):
    """Look-ahead works on its own time; a deadline far off, and no more said of time."""
    for _ in range(20000):
        if condition():
            return
        time.sleep(0.0005)
    raise AssertionError("it never came to that")


# ---- recycling ----------------------------------------------------------------------


def test_invariant_06_open_after_close_maps_nothing(cuda, pool, tensor, block):
    tensor(pool, 8).close()
    cuda_helper.synchronize()
    if cuda.startswith("hip"):
        pytest.skip("HIP's fence waits for the device, so none is taken at open")
    before = calls(pool)
    t = tensor(pool)
    assert calls_since(before, pool) == {"fence": 1, "event_query": 1}
    assert held(pool) == {"recycled": 8 * block}
    t.grow(8 * block // 16)
    assert calls_since(before, pool) == {"fence": 1, "event_query": 1}
    assert held(pool) == {"in_use": 8 * block}
    assert not any(t.stats()["driver_calls"][name] for name in ("create", "map", "set_access"))
    t.close()


def test_invariant_06_nothing_in_flight_is_recycled(cuda, pool, tensor, block):
    stream = cuda_helper.Stream()
    with cuda_helper.Gate(stream) as gate:
        t = tensor(pool, 2)
        ptr = t.ptr
        t.close()
        u = tensor(pool)
        assert u.ptr != ptr and "recycled" not in held(pool)
        gate.open()
    stream.close()
    u.close()


def test_invariant_08_recycled_memory_is_no_reason_to_run_out(
    cuda, make_pool, tensor, empty, block
):
    pool = make_pool(max_bytes=4 * block)
    tensor(pool, 4).close()
    cuda_helper.synchronize()
    t = empty(capacity=50 * block // 16, block_size=block, pool=pool)
    t.grow(4 * block // 16)
    assert held(pool) == {"in_use": 4 * block}
    t.close()


def test_zero_over_recycled_blocks(pool, empty):
    for _ in range(3):
        t = empty(capacity=1000, pool=pool, zero=True)
        t.grow(500)
        assert not to_numpy(t).any()
        t.truncate(0)
        t.append(pattern((500, *t.shape[1:]), t.dtype))
        t.close()


# ---- look-ahead ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "n_bytes"),
    [
        (None, 0),
        (False, 0),
        (0, 0),
        (np.int64(0), 0),
        ("0", 0),
        ("0 MiB", 0),
        (True, 256 * MIB),
        (4 * MIB, 4 * MIB),
        ("8MiB", 8 * MIB),
        (np.int64(MIB), MIB),
    ],
)
def test_lookahead_takes(given, n_bytes, device):
    with pyvmm.Pool(device, lookahead=given) as pool:
        assert pool.lookahead == n_bytes
    with pyvmm.Pool(device) as pool:
        assert pool.lookahead == 0
        pool.lookahead = given
        assert pool.lookahead == n_bytes
        pool.lookahead = None
        assert pool.lookahead == 0
    assert pool.lookahead == 0


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("lots", ValueError),
        (-1, ValueError),
        (1.5, TypeError),
        (1 << 64, OverflowError),
        ([], TypeError),
    ],
)
def test_lookahead_refuses(given, error, device):
    with pytest.raises(error):
        pyvmm.Pool(device, lookahead=given)
    with pyvmm.Pool(device, lookahead="1MiB") as pool:
        with pytest.raises(error):
            pool.lookahead = given
        assert pool.lookahead == MIB


def test_lookahead_of_a_closed_pool(device):
    pool = pyvmm.Pool(device, lookahead=True)
    pool.close()
    with pytest.raises(pyvmm.VMMError) as error:
        pool.lookahead = True
    assert error.value.status == "VMM_ERR_CLOSED"


def test_growth_finds_what_was_mapped_ahead(pool, tensor, block):
    pool.lookahead = 8 * block
    t = tensor(pool, 1)
    for k in range(2, 12):
        wait_until(lambda: held(pool).get("lookahead", 0) >= block)
        before = t.stats()["driver_calls"]
        t.map(k * block // 16)
        assert t.stats()["driver_calls"] == before
        assert held(pool)["in_use"] == k * block
    pool.lookahead = 0
    assert "lookahead" not in held(pool)
    t.close()


def test_invariant_08_lookahead_stays_within_the_budget(make_pool, tensor, block):
    pool = make_pool(max_bytes=6 * block)
    pool.lookahead = 100 * block
    t, u = tensor(pool, 1), tensor(pool, 1)
    wait_until(lambda: held(pool).get("lookahead", 0) >= block)
    for _ in range(4):
        u.grow(block // 16)
        assert sum(held(pool).values()) <= 6 * block
    with pytest.raises(pyvmm.OutOfMemoryError):
        t.grow(block // 16)
    assert pool.stats()["peak_bytes"] <= 6 * block
    t.close()
    u.close()


def test_trim_and_close_with_lookahead(pool, tensor, block):
    pool.lookahead = 8 * block
    t = tensor(pool, 2)
    t.close()
    pool.trim(wait=True)
    assert held(pool) == {}
    assert pool.lookahead == 8 * block
