"""The invariants of docs/DESIGN.md, each tested at least here and named by its number.

Not here, since what they are about does not exist yet: invariant 10 (concat), blocks that
forks share in 7, look-ahead and recycled ranges in 8.
"""

import os
import threading

import numpy as np
import pytest

import cuda_helper
import pyvmm
from model import LAYOUTS, Model, lane_count, pattern, same
from support import calls, calls_since, fill, held, run_python, smallest_block, state, to_numpy

LAUNCH_FAILED = 719  # CUDA_ERROR_LAUNCH_FAILED
SHAPE = (2, 0, 3, 4)  # grows along axis 1; two lanes under "lane" and "c"


@pytest.fixture(params=LAYOUTS)
def tensor(request, empty):
    with empty(shape=SHAPE, axis=1, capacity=5000, layout=request.param) as t:
        yield t


def rows(n, seed=0):
    return pattern((2, n, 3, 4), "float32", seed)


def check_backed(t):
    """Rows [0, mapped) can be written and read, in every lane."""
    whole = t.reserved()
    if t.device == "host":
        backed = np.asarray(whole)[:, : t.mapped]
        backed[:, t.length :] = 7
        assert (backed[:, t.length :] == 7).all()
        return
    n_spare = t.mapped - t.length
    values = np.full((2, n_spare, 3, 4), 7, "float32")
    address = t.ptr + t.length * t.strides[1]
    cuda_helper.write(address, t.strides, values)
    assert same(cuda_helper.read(address, values.shape, t.strides, "float32"), values)


def test_invariant_01_base_address_never_changes(tensor):
    address = tensor.ptr
    for change in (
        lambda: tensor.append(rows(3)),
        lambda: tensor.map(4000),
        lambda: tensor.append(rows(4500)),
        lambda: tensor.truncate(10),
        lambda: tensor.trim(),
        lambda: tensor.grow(4990),
        lambda: tensor.truncate(0),
        lambda: tensor.trim(),
        lambda: tensor.append(rows(1)),
    ):
        change()
        assert tensor.ptr == tensor.reserved().ptr == address
        if tensor.device == "host":
            assert np.asarray(tensor).ctypes.data == address or tensor.length == 0


def test_invariant_02_length_within_mapped_within_capacity(tensor):
    def check(length):
        assert tensor.length == length <= tensor.mapped <= tensor.capacity == 5000
        check_backed(tensor)

    check(0)
    tensor.append(rows(7))
    check(7)
    tensor.map(1234)
    assert tensor.mapped >= 1234
    check(7)
    tensor.grow(1300)
    check(1307)
    tensor.truncate(100)
    check(100)
    tensor.trim()
    check(100)
    tensor.grow(4900)
    assert tensor.mapped == 5000  # blocks may hold more; that is never reported
    check(5000)
    assert tensor.reserved().shape == (2, 5000, 3, 4)


def test_invariant_03_failed_call_changes_nothing(tensor):
    tensor.append(rows(20))
    view = tensor[:20]
    other = tensor.fork()
    before = state(tensor)
    failures = {
        "append past the capacity": (pyvmm.CapacityError, lambda: tensor.append(rows(4981))),
        "grow past the capacity": (pyvmm.CapacityError, lambda: tensor.grow(4981)),
        "map past the capacity": (pyvmm.CapacityError, lambda: tensor.map(5001)),
        "another dtype": (TypeError, lambda: tensor.append(rows(1).astype("float64"))),
        "another shape": (ValueError, lambda: tensor.append(rows(1)[:, :, :, :3].copy())),
        "truncate upwards": (ValueError, lambda: tensor.truncate(21)),
        "the second of many": (
            ValueError,
            lambda: pyvmm.append_many([tensor, other], [rows(1), rows(1)[:1]]),
        ),
    }
    for what, (error, fail) in failures.items():
        with pytest.raises(error):
            fail()
        assert state(tensor) == before, what
        assert other.length == 20
    other.close()
    tensor.append(rows(1, seed=1))
    assert same(to_numpy(tensor), np.concatenate([rows(20), rows(1, seed=1)], axis=1))
    assert view.shape == (2, 20, 3, 4)


@pytest.mark.parametrize("layout", ["lane", "c"])
def test_invariant_03_growth_that_fails_half_way_is_undone(layout, device, make_pool, empty):
    block = smallest_block(device)
    per_lane = block // 48  # rows in a block, and a bit is left over
    # Room for the first lane's third block, and not for the second's.
    pool = make_pool(block_size=block, max_bytes=5 * block)
    with empty(shape=SHAPE, axis=1, capacity=10 * per_lane, layout=layout, pool=pool) as t:
        t.append(rows(2 * per_lane))
        before, pool_before = state(t), held(pool)
        for _ in range(3):
            with pytest.raises(pyvmm.OutOfMemoryError):
                t.append(rows(per_lane))
            assert state(t) == before
            assert held(pool) == pool_before == {"in_use": 4 * block}
        t.truncate(0)
        t.append(rows(2 * per_lane, seed=1))
        assert same(to_numpy(t), rows(2 * per_lane, seed=1))


# Each fails once during one append that has to map; "after" is how many succeed before it.
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_invariant_03_refused_driver_call_is_undone(simulator, empty, make_pool, call, after):
    pool = make_pool()
    with empty(shape=SHAPE, axis=1, capacity=200_000, layout="lane", pool=pool) as t:
        t.append(rows(10))
        before, pool_before = state(t), held(pool)
        call = cuda_helper.driver_name(call)
        simulator.vmm_sim_fail(call.encode(), after + 1, LAUNCH_FAILED, 1)
        with pytest.raises(pyvmm.VMMError, match=call) as error:
            t.append(rows(100_000))
        assert error.value.operation == call
        assert error.value.driver_code == LAUNCH_FAILED
        assert error.value.status == "VMM_ERR_DRIVER"
        assert state(t) == before
        assert held(pool) == pool_before
        t.append(rows(100_000, seed=1))
        assert same(to_numpy(t), np.concatenate([rows(10), rows(100_000, seed=1)], axis=1))


def test_invariant_03_refused_copy_is_undone(simulator, empty):
    source = cuda_helper.InterfaceArray(rows(5, seed=2))
    with empty(shape=SHAPE, axis=1) as t:
        t.append(rows(10))
        before = state(t)
        for call, x in (("cuLaunchKernel", source), ("cuMemcpy", rows(5))):
            call = cuda_helper.driver_name(call)
            names = [name for name in _call_names(simulator) if name.startswith(call)]
            for name in names:
                simulator.vmm_sim_fail(name.encode(), 1, LAUNCH_FAILED, 1)
            with pytest.raises(pyvmm.VMMError, match=call):
                t.append(x)
            simulator.vmm_sim_fail_none()
            assert state(t) == before
        t.append(source)
        assert same(to_numpy(t), np.concatenate([rows(10), rows(5, seed=2)], axis=1))
    source.free()


def _call_names(simulator):
    simulator.vmm_sim_call_name.restype = cuda_helper.ctypes.c_char_p
    index = 0
    while name := simulator.vmm_sim_call_name(cuda_helper.ctypes.c_size_t(index)):
        yield name.decode()
        index += 1


def test_invariant_03_block_that_cannot_be_unmapped_is_parked(simulator, empty, make_pool):
    pool = make_pool()
    with empty(shape=SHAPE, axis=1, layout="lane", pool=pool) as t:
        t.append(rows(1))
        t.truncate(0)
        t.trim()
        pool.trim(wait=True)
        simulator.vmm_sim_fail(b"cuMemSetAccess", 1, LAUNCH_FAILED, 1)
        simulator.vmm_sim_fail(b"cuMemUnmap", 1, LAUNCH_FAILED, 1)
        with pytest.raises(pyvmm.VMMError, match="MemSetAccess"):
            t.append(rows(1))
        assert t.length == 0
        assert pool.stats()["parked_bytes"] > 0
        t.append(rows(3))  # retries what is parked
        assert pool.stats()["parked_bytes"] == 0
        assert same(to_numpy(t), rows(3))


def test_invariant_04_appended_rows_neither_move_nor_change(tensor):
    model = Model(SHAPE, "float32", 1, 5000)
    views = []
    for step in range(40):
        x = rows(step * 5 % 53, seed=step)
        tensor.append(x)
        model.append(x)
        n = model.length
        views.append((tensor[:n], n))
    tensor.map(5000)
    for view, n in views:
        assert view.ptr == tensor.ptr
        assert same(to_numpy(view), model.rows(0, n))


def test_invariant_05_export_pins_the_rows_it_covers(tensor):
    tensor.append(rows(30))
    part = tensor[5:20]
    tensor.truncate(10)  # a view that is not exported pins nothing
    with pytest.raises(BufferError, match="20"):
        part.__dlpack__()
    tensor.append(rows(20, seed=1))
    capsule = tensor[5:20].__dlpack__()
    for allowed in (
        lambda: tensor.append(rows(3, seed=2)),
        lambda: tensor.map(2000),
        lambda: tensor.trim(),
        lambda: tensor.truncate(20),
    ):
        allowed()
    before = state(tensor)
    with pytest.raises(BufferError):
        tensor.truncate(19)
    with pytest.raises(BufferError):
        tensor.close()
    assert state(tensor) == before
    del capsule
    tensor.truncate(19)
    whole = tensor.reserved().__dlpack__()
    tensor.truncate(0)
    with pytest.raises(BufferError):
        tensor.close()
    del whole
    tensor.close()


def test_invariant_06_memory_that_the_device_may_touch_is_only_queued(cuda, make_pool, empty):
    pool, stream = make_pool(), cuda_helper.Stream()
    x = cuda_helper.InterfaceArray(pattern((50_000, 4), "float32"), stream)
    t = empty(pool=pool, capacity=50_000)
    t.map(50_000)
    n_bytes = pool.stats()["in_use_bytes"]
    with cuda_helper.Gate(stream) as gate:
        t.append(x)  # cannot begin before the gate opens
        before = calls(pool)
        t.close()
        assert calls(pool) == before
        assert held(pool) == {"queued": n_bytes}
        pool.trim()
        assert held(pool) == {"queued": n_bytes}
        other = empty(pool=pool)
        other.grow(1)
        in_use = other.stats()["mapped_bytes"]
        assert held(pool) == {"queued": n_bytes, "in_use": in_use}
        gate.open()
        pool.trim(wait=True)
        assert held(pool) == {"in_use": in_use}
    other.close()
    x.free()
    stream.close()


def test_invariant_06_undo_of_a_copy_that_began(simulator):
    """The second launch of an append_many() fails while the first one runs into memory that
    was mapped for it: that memory is not unmapped under the kernel."""
    run_python("""
        import ctypes, os
        import numpy as np
        import pyvmm
        import cuda_helper
        sim = cuda_helper.load()
        pool = pyvmm.Pool("cuda:0")
        tensors = [pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device="cuda:0", pool=pool)
                   for _ in range(170)]
        x = cuda_helper.InterfaceArray(np.ones((5, 4), "float32"))
        sim.vmm_sim_hold()
        sim.vmm_sim_fail(b"cuLaunchKernel", 2, 719, 1)
        try:
            pyvmm.append_many(tensors, [x] * 170)
        except pyvmm.VMMError as error:
            assert error.operation == cuda_helper.driver_name("cuLaunchKernel"), error.operation
        else:
            raise SystemExit("no error")
        assert sim.vmm_sim_pending() > 0
        assert all(t.length == t.mapped == 0 for t in tensors)
        sim.vmm_sim_go()
        pyvmm.append_many(tensors, [x] * 170)
        for t in tensors:
            assert (cuda_helper.read(t.ptr, t.shape, t.strides, t.dtype) == 1).all()
            t.close()
        pool.close()
        sim.vmm_sim_last_report.restype = ctypes.c_char_p
        assert sim.vmm_sim_reports() == 0, sim.vmm_sim_last_report()
    """)


def test_invariant_06_host_memory_goes_back_at_once(host):
    with pyvmm.Pool("host") as pool:
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=50_000, device="host", pool=pool)
        t.grow(50_000)
        t.close()
        assert held(pool) == {}


def test_invariant_07_a_fork_grows_on_its_own(tensor):
    tensor.append(rows(20))
    fork, part = tensor.fork(), tensor.fork(5)
    assert fork.ptr != tensor.ptr
    fill(tensor[0:1], 1)
    tensor.append(rows(2, seed=1))
    fork.append(rows(3, seed=2))
    part.truncate(3)
    part.append(rows(4, seed=3))
    assert same(to_numpy(tensor)[:, 1:], np.concatenate([rows(20)[:, 1:], rows(2, 1)], axis=1))
    assert same(to_numpy(fork), np.concatenate([rows(20), rows(3, 2)], axis=1))
    assert same(to_numpy(part), np.concatenate([rows(20)[:, :3], rows(4, 3)], axis=1))
    for copy in (fork, part):
        assert (copy.shape[2:], copy.axis, copy.layout) == ((3, 4), 1, tensor.layout)
        assert copy.capacity == tensor.capacity
        copy.close()


def test_invariant_08_a_pool_stays_within_its_budget(device, make_pool, empty):
    block = smallest_block(device)
    pool = make_pool(block_size=block, max_bytes=8 * block)
    n_rows = block // 16
    tensors, refused, random = [], 0, np.random.default_rng(0)
    for step in range(200):
        try:
            if step % 3 == 0 or not tensors:
                tensors.append(empty(capacity=20 * n_rows, pool=pool))
            tensors[random.integers(len(tensors))].grow(int(random.integers(3 * n_rows)))
        except pyvmm.OutOfMemoryError:
            refused += 1
            tensors.pop(random.integers(len(tensors))).close()
        assert sum(held(pool).values()) <= pool.stats()["max_bytes"] == 8 * block
        assert pool.stats()["peak_bytes"] <= 8 * block
    assert refused > 10
    assert sum(t.stats()["mapped_bytes"] for t in tensors) == pool.stats()["in_use_bytes"]
    for t in tensors:
        t.close()


def test_invariant_09_calls_within_mapped_rows(tensor):
    tensor.map(5000)
    before = calls(tensor)
    tensor.grow(10)
    assert calls_since(before, tensor) == {}
    tensor.append(rows(0))
    assert calls_since(before, tensor) == {}
    tensor.append(rows(3))
    tensor.append(rows(2))
    if tensor.device == "host":
        assert calls_since(before, tensor) == {"copy": 2}
    else:  # host memory goes lane by lane, is waited for, and cannot be captured
        lanes = lane_count(SHAPE, 1, tensor.layout)
        waits = {"stream_synchronize": 2, "stream_capture": 2}
        assert calls_since(before, tensor) == {"copy": 2 * lanes, **waits}


def test_invariant_09_device_source_costs_one_launch_and_no_event(cuda, tensor):
    stream = cuda_helper.Stream()
    x = cuda_helper.InterfaceArray(rows(3), stream)
    tensor.map(5000)
    tensor.append(x)
    before = calls(tensor)
    for _ in range(5):
        tensor.append(x)
    assert calls_since(before, tensor) == {"launch": 5}
    assert same(to_numpy(tensor), np.concatenate([rows(3)] * 6, axis=1))
    x.free()
    stream.close()


def test_invariant_11_no_host_memory_is_an_error(host):
    """Memory that cannot be committed is refused when it is mapped, not by a signal when it
    is touched."""
    print(
        run_python("""
            import resource, numpy as np, pyvmm
            t = pyvmm.empty((0, 1 << 20), "uint8", axis=0, capacity=1 << 20, device="host")
            t.append(np.ones((3, 1 << 20), "uint8"))
            # Half a GiB more than the process has: with a GPU driver in it that is much.
            status = dict(line.split(":", 1) for line in open("/proc/self/status"))
            limit = (int(status["VmData"].split()[0]) << 10) + (512 << 20)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            resource.setrlimit(resource.RLIMIT_AS, (3 << 40, 3 << 40))
            for attempt in range(3):
                try:
                    t.grow(4096)
                except pyvmm.OutOfMemoryError as error:
                    assert isinstance(error, MemoryError) and isinstance(error, pyvmm.VMMError)
                    assert error.driver_code, repr(error)
                else:
                    raise SystemExit("4 GiB were mapped with room for 512 MiB")
                assert t.length == 3 and np.asarray(t).all()
            t.append(np.full((2, 1 << 20), 7, "uint8"))
            assert np.asarray(t)[3:].min() == 7
        """)
    )


def test_invariant_11_every_driver_failure_is_an_error(simulator, empty):
    """Whatever fails first, and with it all that follows: an error, and no harm after it."""
    x = cuda_helper.InterfaceArray(rows(3))
    for nth in range(1, 40):
        with empty(shape=SHAPE, axis=1, layout="lane", capacity=50_000) as t:
            t.append(x)
            simulator.vmm_sim_reset()
            simulator.vmm_sim_fail(b"*", nth, LAUNCH_FAILED, -1)
            try:
                t.append(x)
                t.append(rows(45_000))
                t.fork().close()
            except pyvmm.VMMError as error:
                assert error.operation.startswith(("cu", "hip")), repr(error)
                assert error.driver_code == LAUNCH_FAILED
            failed = simulator.vmm_sim_failed()
            simulator.vmm_sim_fail_none()
            n = t.length
            t.append(rows(2, seed=1))
            assert same(to_numpy(t)[:, n:], rows(2, seed=1))
        if not failed:
            break
    else:
        pytest.fail("the sweep did not reach the end of the operation")
    assert nth > 5
    x.free()


def test_invariant_12_threads_share_a_pool(pool, empty):
    failures = []

    def work(seed):
        try:
            for step in range(10):
                with empty(shape=SHAPE, axis=1, layout="c", pool=pool) as t:
                    model = Model(SHAPE, "float32", 1, 1000)
                    for n in (1, 200, 3):
                        x = rows(n, seed * 100 + step)
                        t.append(x)
                        model.append(x)
                    assert same(to_numpy(t), model.array)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert pool.stats()["in_use_bytes"] == 0


def test_invariant_12_interpreter_exit_is_silent(device):
    run_python(f"""
        import pyvmm
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device={device!r})
        view, capsule = t.grow(5), t.__dlpack__()
        pool = pyvmm.Pool({device!r})
        other = pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device={device!r}, pool=pool)
        other.grow(3)
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_invariant_12_forked_child_is_refused(device):
    out = run_python(f"""
        import os, pyvmm
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device={device!r})
        t.grow(5)
        child = os.fork()
        if child == 0:
            try:
                t.grow(1)
            except pyvmm.VMMError as error:
                print(error.status, flush=True)
            t.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        t.grow(1)
        print(t.length)
    """)
    assert out.split() == ["VMM_ERR_FORKED", "6"]
