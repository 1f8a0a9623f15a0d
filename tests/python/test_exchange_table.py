"""Sources that are read by the exchange table of their type (DLPack 1.3), as torch's tensors, and
rows of other tensors: the short ways of an append. On a GPU or the simulated driver."""

import gc
import sys
import threading
import time
import types
import weakref

import numpy as np
import pytest

import pyvmm
from cuda_helper import DLPACK_TYPE, DeviceArray, Gate, TableArray
from dlpack_struct import Tabled
from model import pattern, same
from support import calls, calls_since, run_python, to_numpy


def rows(n, seed=0):
    return pattern((n, 4), "float32", seed)


@pytest.fixture
def tensor(cuda):
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=cuda) as t:
        yield t


@pytest.fixture
def current_stream(monkeypatch):
    return lambda stream: monkeypatch.setattr(Tabled, "current_stream", int(stream))


def test_rows_are_appended_whatever_their_strides(tensor, arrays):
    every = arrays(DeviceArray, rows(12, 1))
    tensor.append(arrays(TableArray, rows(5)))
    tensor.append(arrays(TableArray, rows(0)))
    tensor.append(Tabled(every.pointer, (4, 4), (48, 4), "float32", (DLPACK_TYPE, 0)))
    assert same(to_numpy(tensor), np.concatenate([rows(5), rows(12, 1)[::3]]))


def test_the_copy_runs_where_the_table_says_that_work_does(tensor, streams, arrays, current_stream):
    x, late = arrays(TableArray, rows(5)), arrays(DeviceArray, rows(5, 1))
    current_stream(streams[0])
    tensor.append(x)
    before = calls(tensor)
    with Gate(streams[0]) as gate:
        x.copy_from(late, streams[0])
        tensor.append(x)
        assert calls_since(before, tensor) == {"launch": 1}
        gate.open()
        assert same(to_numpy(tensor), np.concatenate([rows(5), rows(5, 1)]))


def test_on_a_named_stream_it_waits_for_the_producer(tensor, streams, arrays, current_stream):
    x, late = arrays(TableArray, rows(5)), arrays(DeviceArray, rows(5, 1))
    current_stream(streams[0])
    tensor.map(5)
    with Gate(streams[0]) as gate:
        x.copy_from(late, streams[0])
        tensor.append(x, stream=int(streams[1]))
        assert not streams[1].is_done()
        gate.open()
        assert same(to_numpy(tensor), rows(5, 1))


def test_host_memory_is_read_before_append_returns(tensor):
    x = rows(5).copy()
    tensor.append(Tabled(x.ctypes.data, x.shape, x.strides, x.dtype))
    x[...] = 0
    assert same(to_numpy(tensor), rows(5))


class Learning(TableArray):
    """Has what makes a type torch's, by a property."""

    requires_grad = True
    negated = False

    def is_neg(self):
        return self.negated


class Stopped(TableArray):
    """Has what makes a type Paddle's."""

    stop_gradient = False


def test_gradients_would_be_lost(tensor, arrays):
    for kind, is_fine in ((Learning, {"requires_grad": False}), (Stopped, {"stop_gradient": True})):
        x = arrays(kind, rows(5))
        with pytest.raises(BufferError, match="requires gradients"):
            tensor.append(x)
        assert tensor.length == 0
        vars(x).update(is_fine)
        tensor.append(x)
        assert same(to_numpy(tensor), rows(5))
        tensor.truncate(0)


def test_a_flag_of_another_type_is_refused(tensor, arrays):
    """Its function would take the object for one of its own."""

    class Odd(TableArray):
        requires_grad = types.FunctionType.__code__  # a function's, by C

        def is_neg(self):
            return False

    with pytest.raises(TypeError, match="descriptor"):
        tensor.append(arrays(Odd, rows(5)))


def test_what_is_negated_only_when_it_is_read_is_refused(tensor, arrays):
    x = arrays(Learning, rows(5))
    x.requires_grad, x.negated = False, True
    with pytest.raises(BufferError, match="resolve_neg"):
        tensor.append(x)
    assert tensor.length == 0


def test_what_does_not_fit_is_refused_and_changes_nothing(tensor, arrays):
    tensor.append(arrays(TableArray, rows(5)))
    wrong_shape = arrays(TableArray, pattern((5, 3), "float32"))
    wrong_dtype = arrays(TableArray, pattern((5, 4), "int32"))
    elsewhere = arrays(TableArray, rows(5))
    elsewhere.exported.device_id = 1
    too_many = arrays(TableArray, rows(996))
    for x, error in (
        (wrong_shape, ValueError),
        (wrong_dtype, TypeError),
        (elsewhere, ValueError),
        (too_many, pyvmm.CapacityError),
    ):
        with pytest.raises(error):
            tensor.append(x)
        assert same(to_numpy(tensor), rows(5))
    tensor.close()
    with pytest.raises(pyvmm.VMMError, match="closed"):
        tensor.append(too_many)


# ---- rows of another tensor ---------------------------------------------------------


@pytest.fixture
def source(cuda, arrays):
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=cuda) as t:
        t.append(arrays(TableArray, rows(5)))
        yield t


def test_rows_of_a_tensor_within_mapped_rows_and_beyond(tensor, source):
    with pytest.raises(pyvmm.CapacityError):
        tensor.map(1001)
    tensor.append(source)
    tensor.map(1000)
    tensor.append(source)
    source.truncate(0)
    tensor.append(source)
    assert same(to_numpy(tensor), np.concatenate([rows(5)] * 2))


def test_rows_of_a_tensor_come_after_what_wrote_them(tensor, source, streams, arrays):
    tensor.map(1000)
    late = arrays(TableArray, rows(5, 1))
    with Gate(streams[0]) as gate:
        source.append(late, stream=int(streams[0]))
        tensor.append(source)
        assert calls(tensor)["launch"] == 1 and "event_wait" not in calls(tensor)
        gate.open()
        assert same(to_numpy(tensor), np.concatenate([rows(5), rows(5, 1)]))


def test_a_tensor_is_appended_to_itself(tensor, source):
    source.append(source)
    assert same(to_numpy(source), np.concatenate([rows(5)] * 2))


def test_a_source_is_free_again_when_it_does_not_fit(tensor, source, cuda):
    tensor.map(1000)
    tensor.grow(1000)
    with pytest.raises(pyvmm.CapacityError):
        tensor.append(source)
    tensor.truncate(0)
    with pyvmm.empty((0, 4), "int32", axis=0, capacity=9, device=cuda) as other:
        other.grow(2)
        with pytest.raises(TypeError):
            tensor.append(other)
        other.append(other)
        assert other.length == 4
    with pytest.raises(pyvmm.VMMError, match="closed"):
        tensor.append(other)
    source.append(source)
    tensor.append(source)
    assert same(to_numpy(tensor), np.concatenate([rows(5)] * 2))


def test_two_tensors_are_appended_to_each_other_by_two_threads(tensor, source):
    """Neither thread waits for what the other holds."""
    tensor.map(1000)
    source.map(1000)
    errors = []

    def work(target, other):
        try:
            for _ in range(60):
                target.append(other)
                while target.length > 3:
                    try:
                        target.truncate(3)
                    except BufferError:  # the other thread is reading the rows
                        time.sleep(1e-4)
        except BaseException as error:
            errors.append(error)

    tensor.append(source)
    threads = [
        threading.Thread(target=work, args=pair) for pair in ((tensor, source), (source, tensor))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert same(to_numpy(tensor)[:3], rows(5)[:3]) and same(to_numpy(source)[:3], rows(5)[:3])


@pytest.mark.parametrize("is_mapped", [True, False])
@pytest.mark.parametrize("reader", ["own", "other"])
def test_rows_are_not_written_over_before_they_have_been_read(
    tensor, source, streams, arrays, is_mapped, reader
):
    """Whatever is known of the source's last write: its next one comes after the reading."""
    one, two = arrays(TableArray, rows(5, 1)), arrays(TableArray, rows(5, 2))
    late = arrays(DeviceArray, rows(5, 3))
    if is_mapped:
        tensor.map(1000)
    source.truncate(0)
    with Gate(streams[0]) as gate:
        one.copy_from(late, streams[0])
        source.append(one, stream=int(streams[0]))
        source.__dlpack__(stream=int(streams[1]))  # an event stands behind the write
        if reader == "own":
            tensor.append(source)
        else:
            tensor.append(source, stream=int(streams[2]))
        source.truncate(0)
        source.append(two, stream=int(streams[1]))
        gate.open()
        assert same(to_numpy(tensor), rows(5, 3)) and same(to_numpy(source), rows(5, 2))


def test_a_source_is_open_to_other_threads_while_the_device_is_waited_for(simulator):
    """Where a graph appends to the target, append looks how far it has gone: behind work that here
    another thread lets go on, which uses the source."""
    run_python("""
        import signal, threading, time
        import numpy as np
        import pyvmm
        import cuda_helper
        from cuda_helper import Capture, InterfaceArray, Stream
        signal.alarm(30)
        sim, stream, other = cuda_helper.load(), Stream(), Stream()
        t, source = (
            pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device="cuda:0") for _ in "ab"
        )
        x = InterfaceArray(np.ones((1, 4), "float32"), stream)
        source.append(x)
        with Capture(stream) as graph:
            t.append(x)
        t.map(10)
        graph.launch(stream)
        t.advance(1)
        sim.vmm_sim_hold()

        def let_go(calls):
            while sim.vmm_sim_calls(b"*") == calls:
                time.sleep(0.001)
            source.__dlpack__(stream=int(other))
            sim.vmm_sim_go()

        thread = threading.Thread(target=let_go, args=(sim.vmm_sim_calls(b"*"),))
        thread.start()
        t.append(source)
        thread.join()
        assert t.length == 2
        graph.close()
    """)


# ---- callbacks ----------------------------------------------------------------------


@pytest.fixture
def short_pool(make_pool):
    """A pool of which a tensor, `hog`, has all: another one grows once that has been closed."""
    pool = make_pool(max_bytes="4MiB")
    hog = pyvmm.empty(
        (0, 2**20), "uint8", axis=0, capacity=4, device=pool.device, pool=pool, block_size="2MiB"
    )
    hog.map(4)
    yield pool, hog
    hog.close()


WAYS = {
    "append": lambda t, x, source: t.append(x),
    "append_many": lambda t, x, source: pyvmm.append_many([t], [x]),
    "rows": lambda t, x, source: t.append(source),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_callback_gives_the_tensor_up(
    cuda, short_pool, source, streams, arrays, way, monkeypatch
):
    monkeypatch.setitem(sys.modules, "cupy", cupy_of(int(streams[0])))
    monkeypatch.setattr(Tabled, "current_stream", int(streams[0]))
    pool, hog = short_pool
    x = arrays(TableArray, rows(5))
    source.truncate(0)
    source.append(x)
    t = pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=cuda, pool=pool)

    def give_up(n_bytes):
        t.__exit__(None, None, None)
        hog.close()
        return True

    pool.on_oom(give_up)
    WAYS[way](t, x, source)
    assert t.closed


def cupy_of(stream):
    """As much of CuPy as is asked for its current stream."""

    class CurrentStream:
        ptr = stream

    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(get_current_stream=CurrentStream)
    return cupy


@pytest.mark.parametrize("way", WAYS)
def test_the_stream_is_kept_where_a_callback_was_interrupted(
    cuda, short_pool, source, streams, arrays, way, monkeypatch
):
    """The rows have been appended all the same, on a stream that the next write waits for."""
    cupy = cupy_of(int(streams[0]))
    current = [cupy.cuda.get_current_stream()]
    is_alive = weakref.ref(current[0])
    cupy.cuda.get_current_stream = lambda: current[0]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(Tabled, "current_stream", int(streams[0]))
    pool, hog = short_pool
    x = arrays(TableArray, rows(5))
    source.truncate(0)
    source.append(x, stream=int(streams[0]))  # whose own is not kept
    t = pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=cuda, pool=pool)

    def interrupted(n_bytes):
        hog.close()
        raise KeyboardInterrupt

    pool.on_oom(interrupted)
    pool.on_oom(lambda n_bytes: True)
    with pytest.raises(KeyboardInterrupt):
        WAYS[way](t, x, source)
    current.clear()
    gc.collect()
    assert t.length == 5 and is_alive() is not None
    t.close()
