"""Appends in captured streams. On a GPU or the simulated driver."""

import gc
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import cuda_helper
import pyvmm
from cuda_helper import Capture, InterfaceArray
from model import pattern, same
from support import close_after_graphs, to_numpy


def rows(n, seed=0):
    return pattern((n, 4), "float32", seed)


@pytest.fixture
def tensor(cuda):
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=cuda) as t:
        t.map(1000)
        yield t
        cuda_helper.synchronize()


def test_captured_append_runs_with_the_graph(tensor, streams, arrays):
    a = streams[0]
    x = arrays(InterfaceArray, rows(5), a)
    tensor.append(arrays(InterfaceArray, rows(5, 7)), stream=int(a))
    with Capture(a) as graph:
        for _ in range(3):
            tensor.append(x)
    assert tensor.length == 5
    expected = [rows(5, 7)]
    for seed in (1, 2):
        x.set(rows(5, seed))
        graph.launch(a)
        tensor.advance(15)
        expected += [rows(5, seed)] * 3
        assert same(to_numpy(tensor), np.concatenate(expected))
    graph.close()


def test_growth_during_a_capture(cuda, streams, arrays):
    """Mapping is no part of the graph; it is allowed, also in the strictest mode."""
    a = streams[0]
    x = arrays(InterfaceArray, rows(1000), a)
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=300_000, device=cuda) as t:
        with Capture(a) as graph:
            for _ in range(300):
                t.append(x)
            t.map(300_000)
        graph.launch(a)
        t.advance(300_000)
        assert same(to_numpy(t), np.concatenate([rows(1000)] * 300))
        graph.close()


def test_host_source_during_a_capture_is_refused(tensor, streams, arrays):
    a = streams[0]
    x = arrays(InterfaceArray, rows(5), a)
    with Capture(a) as graph:
        with pytest.raises(pyvmm.VMMError) as error:
            tensor.append(rows(5), stream=int(a))
        assert error.value.status == "VMM_ERR_CAPTURING"
        tensor.append(x)
    graph.launch(a)  # so the capture has survived
    tensor.advance(5)
    assert same(to_numpy(tensor), rows(5))
    graph.close()


def test_captured_append_goes_to_no_stream_outside(tensor, streams, arrays):
    a, b, _ = streams
    x = arrays(InterfaceArray, rows(5), a)
    with Capture(a) as graph:
        tensor.append(x)
        for use in (
            lambda: tensor.__dlpack__(stream=int(b)),
            lambda: tensor.append(x, stream=int(b)),
        ):
            with pytest.raises((pyvmm.VMMError, BufferError)):
                use()
        tensor.__dlpack__(stream=int(a))
    graph.launch(a)
    tensor.advance(5)
    assert same(to_numpy(tensor), rows(5))
    graph.close()


def test_tensors_dropped_during_a_capture(cuda, streams, arrays):
    """Closing, collecting and growing anew while a stream captures leave the capture whole."""
    a = streams[0]
    x = arrays(InterfaceArray, rows(5), a)
    pool = pyvmm.Pool(cuda)

    def make():
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=cuda, pool=pool)
        t.grow(500)
        return t

    t, others = make(), [make() for _ in range(4)]
    t.truncate(0)
    with Capture(a) as graph:
        pool.capture_begin()
        others.pop().close()
        others.pop()
        capsule = others[0].__dlpack__(stream=-1)
        others.clear()
        del capsule
        gc.collect()
        t.append(x)
        late = make()
        pool.capture_end()
    graph.launch(a)
    t.advance(5)
    assert same(to_numpy(t), rows(5))
    graph.close()
    late.close()
    close_after_graphs(t)
    pool.close()


# ---- fences that fail, or must not be taken ------------------------------------------


def block_of(cuda, pool, n_blocks=1):
    n_bytes = n_blocks * pyvmm.device_info(cuda)["granularity_bytes"]
    t = pyvmm.empty((0, n_bytes // n_blocks), "uint8", axis=0, capacity=64, pool=pool)
    t.map(n_blocks)
    return t


def test_failed_fence_is_tried_again(cuda, simulator):
    pool = pyvmm.Pool(cuda)
    block_of(cuda, pool).close()
    fence = b"hipDeviceSynchronize" if cuda_helper.IS_HIP else b"cuCtxRecordEvent"
    simulator.vmm_sim_fail(fence, 1, 900, 1)
    with pytest.raises(pyvmm.VMMError):
        pool.trim(wait=True)
    assert pool.stats()["queued_bytes"] > 0
    pool.trim(wait=True)
    assert pool.stats()["queued_bytes"] == 0
    pool.close()


def test_abandoned_pool_takes_no_fence_in_a_capture(cuda, streams, arrays):
    """What a pool left behind is taken back by others, but not while one is capturing."""
    a = streams[0]
    left = pyvmm.Pool(cuda)
    block_of(cuda, left).close()
    del left
    gc.collect()
    with pyvmm.Pool(cuda) as pool:
        x = arrays(InterfaceArray, rows(5), a)
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=100, pool=pool)
        with pool.capturing(), Capture(a) as graph:
            t.append(x)  # maps, and so looks for what was left behind
        graph.launch(a)
        t.advance(5)
        assert same(to_numpy(t), rows(5))
        graph.close()
        close_after_graphs(t)


def test_tensor_opened_in_a_capture_of_torch(cuda, streams, monkeypatch):
    """Nobody brackets it, and one of its geometry could be taken over behind a fence."""
    says = SimpleNamespace(is_initialized=lambda: True, is_current_stream_capturing=lambda: True)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=says))
    with pyvmm.Pool(cuda) as pool:
        old = block_of(cuda, pool)
        width = old.shape[1]
        old.close()
        with Capture(streams[0]) as graph:
            t = pyvmm.empty((2, width), "uint8", axis=0, capacity=64, pool=pool)
            assert t.length == 2 and pool.stats()["driver_calls"]["fence"] == 0
        graph.close()
        says.is_current_stream_capturing = lambda: False
        t.close()
        pool.trim(wait=True)


def test_torch_without_cuda_is_not_asked_for_captures(cuda, monkeypatch):
    def refuse():
        raise RuntimeError("Tried to instantiate dummy base class")

    says = SimpleNamespace(is_initialized=lambda: False, is_current_stream_capturing=refuse)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=says))
    pyvmm.empty((0, 4), axis=0, capacity=10, device=cuda).close()


def test_callback_that_closes_tensors_in_a_capture(cuda, streams, arrays):
    """What it frees can only be had behind a fence: there is no memory, and the capture
    goes on."""
    a = streams[0]
    granularity = pyvmm.device_info(cuda)["granularity_bytes"]
    with pyvmm.Pool(cuda, max_bytes=2 * granularity) as pool:
        victim = block_of(cuda, pool, 2)
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=100, pool=pool)
        x = arrays(InterfaceArray, rows(5), a)
        pool.on_oom(lambda n_bytes: victim.close() or True)
        with Capture(a) as graph:
            with pytest.raises(pyvmm.OutOfMemoryError):
                t.append(x)
        graph.close()
        t.append(x)
        assert same(to_numpy(t), rows(5))
        t.close()


def test_fork_of_grown_rows_is_read_before_they_are_overwritten(cuda, streams, arrays):
    x = arrays(InterfaceArray, rows(50, 1))
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device=cuda) as t:
        t.grow(50)  # never appended to: the copy runs on the legacy stream
        before = to_numpy(t).copy()
        u = t.fork()
        t.truncate(0)
        t.append(x, stream=int(streams[0]))
        assert same(to_numpy(u), before)
        assert same(to_numpy(t), rows(50, 1))
        u.close()
