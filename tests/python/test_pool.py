"""Pools: the books, the budget, what is recycled and when it goes back, threads."""

import gc
import signal
import sys
import threading
import weakref

import numpy as np
import pytest

import cuda_helper
import pyvmm
from model import LAYOUTS, Model, pattern, same
from support import calls, calls_since, fill, held, smallest_block, to_numpy

KEYS = {
    "in_use_bytes",
    "free_bytes",
    "queued_bytes",
    "lookahead_bytes",
    "recycled_bytes",
    "parked_bytes",
    "peak_bytes",
    "max_bytes",
    "driver_calls",
}


@pytest.fixture
def block(device):
    """Of the smallest size; a row of the tensors of `empty` is 16 bytes."""
    return smallest_block(device)


@pytest.fixture
def blocks(empty, block):
    """blocks(n, pool=...): a tensor that has n blocks mapped and room for 100."""

    def make(n, **arguments):
        t = empty(capacity=100 * block // 16, block_size=block, **arguments)
        t.grow(n * block // 16)
        return t

    return make


# ---- the books ----------------------------------------------------------------------


def test_stats_keys(pool):
    stats = pool.stats()
    assert stats.keys() == KEYS
    assert all(type(stats[key]) is int for key in KEYS - {"driver_calls"})
    assert not any(stats["driver_calls"].values())
    assert held(pool) == {}


def test_books_of_mapping_and_giving_back(pool, blocks, block):
    t = blocks(3, pool=pool)
    assert held(pool) == {"in_use": 3 * block}
    u = blocks(2, pool=pool)
    assert held(pool) == {"in_use": 5 * block}
    assert pool.stats()["peak_bytes"] == 5 * block
    t.truncate(0)
    assert held(pool) == {"in_use": 5 * block}  # truncated rows stay mapped
    t.trim()
    gpu = t.device != "host"
    assert held(pool) == {"in_use": 2 * block} | ({"queued": 3 * block} if gpu else {})
    u.close()
    assert held(pool) == ({"queued": 5 * block} if gpu else {})
    pool.trim(wait=True)
    assert held(pool) == {}
    assert pool.stats()["peak_bytes"] == 5 * block
    t.close()


def test_calls_are_those_of_the_tensors(pool, empty):
    t, u = empty(pool=pool), empty(pool=pool)
    for _ in range(3):
        t.append(pattern((5, 4), "float32"))
    u.grow(1000)
    ours = calls(pool)
    for name, n in ours.items():
        assert n == calls(t).get(name, 0) + calls(u).get(name, 0), name
    t.close()
    u.close()


def test_trimmed_blocks_come_back_into_use(cuda, pool, blocks, block):
    """Growth after a trim takes what is still mapped there: nothing is created or mapped."""
    t = blocks(4, pool=pool)
    x = pattern((4 * block // 16, 4), "float32")
    t.truncate(0)
    t.trim()
    assert held(pool) == {"queued": 4 * block}
    before = calls(pool)
    t.append(x)
    made = calls_since(before, pool)
    assert "create" not in made and "map" not in made and "fence" not in made
    assert held(pool) == {"in_use": 4 * block}
    assert same(to_numpy(t), x)
    t.close()


def test_blocks_are_recycled_behind_one_fence(cuda, make_pool, blocks, block):
    pool = make_pool(max_bytes=4 * block)
    tensors = [blocks(1, pool=pool) for _ in range(4)]
    for t in tensors:
        fill(t, 1)
        t.close()
    assert held(pool) == {"queued": 4 * block}
    before = calls(pool)
    t = blocks(4, pool=pool)
    made = calls_since(before, pool)
    assert "create" not in made
    assert made["fence"] == 1
    assert held(pool) == {"in_use": 4 * block}
    fill(t, 2)
    assert (to_numpy(t) == 2).all()
    t.close()


def test_reclaimed_blocks_wait_in_the_free_list(cuda, make_pool, blocks, block):
    pool = make_pool(max_bytes=4 * block)
    trimmed = blocks(4, pool=pool)
    trimmed.truncate(0)
    trimmed.trim()
    t = blocks(1, pool=pool)
    assert held(pool) == {"in_use": block, "free": 3 * block}
    before = calls(pool)
    t.grow(3 * block // 16)
    made = calls_since(before, pool)
    assert "create" not in made and "fence" not in made
    t.close()
    trimmed.close()
    pool.trim(wait=True)
    assert held(pool) == {}


@pytest.mark.parametrize("rounds", [50])
def test_no_leak_over_many_cycles(pool, blocks, block, rounds):
    for _ in range(rounds):
        blocks(3, pool=pool).close()
    pool.trim(wait=True)
    assert held(pool) == {}
    made = calls(pool)
    assert made["create"] == made["release"]
    assert made["map"] == made["unmap"] <= 3 * rounds
    assert made["reserve"] == made["free"] <= rounds


def test_trim_without_wait_leaves_what_runs(cuda, pool, blocks, block):
    stream = cuda_helper.Stream()
    with cuda_helper.Gate(stream) as gate:
        blocks(2, pool=pool).close()
        pool.trim()
        assert held(pool) == {"queued": 2 * block}
        gate.open()
        pool.trim(wait=True)
        assert held(pool) == {}
    stream.close()


# ---- the budget ---------------------------------------------------------------------


def test_budget(make_pool, blocks, block):
    pool = make_pool(max_bytes=3 * block + 1)
    assert pool.stats()["max_bytes"] == 3 * block + 1
    t = blocks(2, pool=pool)
    with pytest.raises(pyvmm.OutOfMemoryError):
        t.grow(2 * block // 16)
    u = blocks(1, pool=pool)
    with pytest.raises(pyvmm.OutOfMemoryError):
        u.grow(1)
    t.close()
    u.grow(2 * block // 16)  # in what t gave back
    assert held(pool) == {"in_use": 3 * block}
    assert pool.stats()["peak_bytes"] <= 3 * block + 1
    u.close()


def test_no_budget(pool):
    assert pool.stats()["max_bytes"] == 0


def test_budgets_are_separate(make_pool, blocks, block):
    one, other = make_pool(max_bytes=block), make_pool(max_bytes=block)
    t, u = blocks(1, pool=one), blocks(1, pool=other)
    for tensor in (t, u):
        with pytest.raises(pyvmm.OutOfMemoryError):
            tensor.grow(block // 16)
        tensor.close()


def test_auto_takes_smaller_blocks_within_a_budget(make_pool, empty, block):
    """Under "auto" a shortage is answered with smaller blocks before it is an error."""
    pool = make_pool(max_bytes=40 * block)
    with empty(capacity=100 * block // 16, pool=pool, block_size="auto") as t:
        t.grow(40 * block // 16)
        assert held(pool) == {"in_use": 40 * block}
        with pytest.raises(pyvmm.OutOfMemoryError):
            t.grow(1)


# ---- out-of-memory callbacks --------------------------------------------------------


def test_callback_frees_and_growth_goes_on(make_pool, blocks, block):
    pool = make_pool(max_bytes=4 * block)
    spare, t = blocks(2, pool=pool), blocks(2, pool=pool)
    needed = []

    def give_up_spare(n_bytes):
        needed.append(n_bytes)
        spare.close()
        return True

    pool.on_oom(give_up_spare)
    x = pattern((2 * block // 16, 4), "float32")
    t.append(x)
    assert needed == [2 * block]
    assert same(to_numpy(t[2 * block // 16 :]), x)
    t.close()


def test_callbacks_run_in_order_until_one_frees(make_pool, blocks, block):
    pool = make_pool(max_bytes=block)
    t = blocks(1, pool=pool)
    ran = []
    pool.on_oom(lambda n_bytes: ran.append("first"))
    pool.on_oom(lambda n_bytes: ran.append("second"))
    with pytest.raises(pyvmm.OutOfMemoryError):
        t.grow(1)
    assert ran == ["first", "second"]
    assert t.length == block // 16
    t.close()


def test_callback_that_lies_is_asked_once(make_pool, blocks, block):
    """It says that it freed something and did not: one more try, then the error."""
    pool = make_pool(max_bytes=block)
    t = blocks(1, pool=pool)
    ran = []
    pool.on_oom(lambda n_bytes: ran.append(n_bytes) or True)
    with pytest.raises(pyvmm.OutOfMemoryError):
        t.grow(1)
    assert len(ran) == 1
    t.close()


def test_callback_must_leave_the_growing_tensor_alone(make_pool, blocks, block):
    pool = make_pool(max_bytes=2 * block)
    t = blocks(1, pool=pool)
    errors = []

    def meddle(n_bytes):
        for use in (
            lambda: t.grow(0),
            lambda: t.append(pattern((1, 4), "float32")),
            lambda: t.truncate(0),
            lambda: t.trim(),
            lambda: t.map(1),
            lambda: t.fork(),
            lambda: t.close(),
        ):
            try:
                use()
            except pyvmm.VMMError as error:
                errors.append(error.status)

    pool.on_oom(meddle)
    with pytest.raises(pyvmm.OutOfMemoryError):
        t.grow(2 * block // 16)
    assert errors == ["VMM_ERR_BUSY"] * 7
    t.grow(1)
    t.close()


def test_callback_that_raises(make_pool, blocks, block, monkeypatch):
    """There is nobody to raise to: it counts as no help, and the hook is told."""
    pool = make_pool(max_bytes=block)
    t = blocks(1, pool=pool)
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable))

    def broken(n_bytes):
        raise KeyError("the callback's own trouble")

    pool.on_oom(broken)
    with pytest.raises(pyvmm.OutOfMemoryError):
        t.grow(1)
    assert [unraisable.exc_type for unraisable in told] == [KeyError]
    told.clear()
    assert t.length == block // 16
    t.close()


@pytest.mark.parametrize("use", ["grow", "map", "map_many", "append", "append_many", "fork"])
@pytest.mark.parametrize("helps", [False, True])
def test_interrupt_in_a_callback_is_raised_once(make_pool, blocks, block, use, helps):
    """Ctrl-C while a callback runs: by the call that needs the memory, and no other."""
    pool = make_pool(max_bytes=2 * block)
    t, spare = blocks(1, pool=pool), blocks(1, pool=pool)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(n_bytes):
        if spare.closed:
            return False
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("was not interrupted")

    pool.on_oom(interrupted)
    if helps:  # so that the call succeeds, and is interrupted all the same
        pool.on_oom(lambda n_bytes: spare.close() or True)
    n, length = block // 16, t.length
    x = pattern((n, 4), "float32")
    uses = {
        "grow": lambda: t.grow(n),
        "map": lambda: t.map(length + n),
        "map_many": lambda: pyvmm.map_many([t], length + n),
        "append": lambda: t.append(x),
        "append_many": lambda: pyvmm.append_many([t], [x]),
        "fork": lambda: t.fork(),
    }
    try:
        with pytest.raises(KeyboardInterrupt):
            uses[use]()
        grown = n if helps and use in ("grow", "append", "append_many") else 0
        assert t.length == length + grown
        if grown and use != "grow":
            assert same(to_numpy(t[length:]), x)
        gc.collect()  # the fork that nobody has been given
        t.trim()
        spare.close()
        assert pool.stats()["in_use_bytes"] == t.stats()["mapped_bytes"]
        t.truncate(0)
        t.append(x)  # and no interrupt any more
        assert same(to_numpy(t), x)
    finally:
        signal.signal(signal.SIGINT, before)
        spare.close()
        t.close()


def test_exit_in_a_callback_is_raised(make_pool, blocks, block):
    pool = make_pool(max_bytes=block)
    t = blocks(1, pool=pool)
    pool.on_oom(lambda n_bytes: sys.exit(3))
    with pytest.raises(SystemExit):
        t.grow(1)
    t.close()


def test_pool_does_not_keep_itself_alive_by_its_callback(device):
    class Owner:
        def __init__(self):
            self.pool = pyvmm.Pool(device)
            self.pool.on_oom(self.free_something)

        def free_something(self, n_bytes):
            return False

    owner = Owner()
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_callback_is_a_callable(pool):
    with pytest.raises(TypeError, match="int"):
        pool.on_oom(3)


# ---- capture brackets ---------------------------------------------------------------


def test_no_fence_between_capture_begin_and_end(cuda, make_pool, blocks, block):
    pool = make_pool(max_bytes=2 * block)
    t = blocks(0, pool=pool)
    blocks(2, pool=pool).close()
    pool.capture_begin()
    pool.capture_begin()
    before = calls(pool)
    with pytest.raises(pyvmm.OutOfMemoryError):
        t.grow(1)
    pool.capture_end()
    with pytest.raises(pyvmm.OutOfMemoryError):
        t.grow(1)
    with pytest.raises(pyvmm.VMMError) as error:
        pool.trim(wait=True)
    assert error.value.status == "VMM_ERR_CAPTURING"
    assert "fence" not in calls_since(before, pool)
    assert held(pool) == {"queued": 2 * block}
    pool.capture_end()
    t.grow(2 * block // 16)
    assert calls_since(before, pool)["fence"] == 1
    t.close()


def test_growth_in_a_capture_takes_new_memory(cuda, pool, blocks, block):
    blocks(2, pool=pool).close()
    pool.capture_begin()
    t = blocks(1, pool=pool)
    assert held(pool) == {"in_use": block, "queued": 2 * block}
    pool.capture_end()
    t.close()


def test_capture_end_without_begin(pool):
    with pytest.raises(ValueError, match="capture"):
        pool.capture_end()
    pool.capture_begin()
    pool.capture_end()
    with pytest.raises(ValueError):
        pool.capture_end()


# ---- closing ------------------------------------------------------------------------


def test_close_refuses_while_tensors_live(pool, empty):
    t = empty(pool=pool)
    t.grow(5)
    with pytest.raises(pyvmm.VMMError, match="tensor") as error:
        pool.close()
    assert error.value.status == "VMM_ERR_BUSY"
    t.append(pattern((1, 4), "float32"))  # the pool goes on
    capsule = t.__dlpack__()
    with pytest.raises(BufferError):
        t.close()
    del t
    with pytest.raises(pyvmm.VMMError):
        pool.close()
    del capsule
    pool.close()


def test_with_block_does_not_refuse(device):
    with pyvmm.Pool(device) as pool:
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=device, pool=pool)
        t.grow(2)
    # The pool is closed to new uses; its tensors go on.
    t.append(pattern((1, 4), "float32"))
    assert t.length == 3
    with pytest.raises(pyvmm.VMMError):
        pool.trim()
    with pytest.raises(pyvmm.VMMError):
        pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=device, pool=pool)
    t.close()


def test_tensor_keeps_its_pool(device):
    pool = pyvmm.Pool(device)
    t = pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=device, pool=pool)
    del pool
    gc.collect()
    t.append(pattern((3, 4), "float32"))
    assert same(to_numpy(t), pattern((3, 4), "float32"))
    t.close()


def test_abandoned_pool_gives_its_memory_back(simulator, blocks, block):
    """A pool that is dropped returns what it holds, at the latest with other pools' work."""
    n_bytes = cuda_helper.ctypes.c_ulonglong

    def live():
        out = n_bytes()
        simulator.vmm_sim_live(None, None, None, cuda_helper.ctypes.byref(out))
        return out.value

    with pyvmm.Pool(cuda_helper.NAME) as other:
        other.trim(wait=True)
        before = live()
        pool = pyvmm.Pool(cuda_helper.NAME)
        blocks(5, pool=pool).close()
        del pool
        gc.collect()
        cuda_helper.synchronize()
        for _ in range(3):
            blocks(1, pool=other).close()
            other.trim(wait=True)
        assert live() == before


def test_abandoned_pool_returns_what_the_driver_refused(simulator, device, blocks, block):
    """A block that the driver would not take back when its pool was given up goes later."""

    def handles():
        out = cuda_helper.ctypes.c_long()
        simulator.vmm_sim_live(cuda_helper.ctypes.byref(out), None, None, None)
        return out.value

    with pyvmm.Pool(device) as other:
        other.trim(wait=True)
        before = handles()
        pool = pyvmm.Pool(device)
        blocks(1, pool=pool).close()
        simulator.vmm_sim_fail(b"cuMemRelease", 1, 999, -1)
        pool.__exit__(None, None, None)
        simulator.vmm_sim_fail_none()
        assert handles() == before + 1
        for _ in range(3):
            cuda_helper.synchronize()
            other.trim(wait=True)
        assert handles() == before


def test_default_pool(device):
    pool = pyvmm.default_pool(device)
    assert pool is pyvmm.default_pool(device)
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=device) as t:
        before = pool.stats()["in_use_bytes"]
        t.grow(1)
        assert pool.stats()["in_use_bytes"] > before


def test_default_pool_by_other_names(host, device):
    assert pyvmm.default_pool("cpu") is pyvmm.default_pool("host")
    if device != "host":
        assert pyvmm.default_pool("cuda") is pyvmm.default_pool("cuda:0")


def test_default_pool_of_nothing():
    with pytest.raises(ValueError, match="abacus"):
        pyvmm.default_pool("abacus")


# ---- threads ------------------------------------------------------------------------


def test_eight_threads_on_one_pool(make_pool, empty, block):
    """Each with tensors of its own, against one budget that all of them hit."""
    pool = make_pool(max_bytes=24 * block)
    failures, refusals = [], []

    def work(seed):
        random = np.random.default_rng(seed)
        try:
            for step in range(12):
                layout = LAYOUTS[step % 3]
                shape = (2, 0, 2)
                with empty(shape=shape, axis=1, layout=layout, capacity=block, pool=pool) as t:
                    model = Model(shape, "float32", 1, block)
                    for n in random.integers(1, block // 8, 4).tolist():
                        x = pattern((2, n, 2), "float32", seed * 1000 + step)
                        try:
                            t.append(x)
                            model.append(x)
                        except pyvmm.OutOfMemoryError:
                            refusals.append(seed)
                        assert t.length == model.length
                    assert same(to_numpy(t), model.array)
                    assert pool.stats()["peak_bytes"] <= 24 * block
                if step % 5 == 0:
                    pool.trim()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert pool.stats()["in_use_bytes"] == 0


@pytest.mark.parametrize("n_pools", [1, 2])
def test_two_threads_with_tensors_each(make_pool, empty, n_pools):
    """On one pool or one each; exports of one thread's tensor are dropped by the other."""
    pools = [make_pool() for _ in range(n_pools)]
    exports, failures = [[], []], []

    def work(me):
        try:
            model = Model((0, 4), "float32", 0, 100_000)
            with empty(capacity=100_000, pool=pools[me % n_pools]) as t:
                for step in range(150):
                    x = pattern((step * 7 % 300, 4), "float32", 1000 * me + step)
                    t.append(x)
                    model.append(x)
                    exports[1 - me].append(t[: t.length // 2].__dlpack__())
                    if exports[me]:
                        exports[me].pop()
                assert same(to_numpy(t), model.array)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    exports.clear()
    assert all(pool.stats()["in_use_bytes"] == 0 for pool in pools)


def test_threads_that_drop_exports(empty):
    """Exports are taken here and dropped on other threads while the tensor grows."""
    with empty(capacity=10_000) as t:
        t.append(pattern((100, 4), "float32"))
        exports = [t.__dlpack__() for _ in range(400)]

        def drop():
            while True:
                try:
                    exports.pop()
                except IndexError:
                    return

        threads = [threading.Thread(target=drop) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(90):
            t.append(pattern((100, 4), "float32"))
        for thread in threads:
            thread.join()
        t.truncate(0)  # nothing pins it any more
