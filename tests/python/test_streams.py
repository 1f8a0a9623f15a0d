"""Streams: whose work waits for whose. On a GPU or the simulated driver.

A gate is work on a stream that is not done until the test opens it: what is seen while it
is shut has not waited, and what is right after it opens has. One gate at a time: a GPU's
driver runs the host functions of all streams on one thread.
"""

import gc
import threading
import weakref

import numpy as np
import pytest

import conftest
import cuda_helper
import pyvmm
from cuda_helper import CapsuleArray, DeviceArray, Gate, InterfaceArray, Stream
from model import LAYOUTS, pattern, same
from support import calls, calls_since, run_python, to_numpy

DEFAULT, PER_THREAD = cuda_helper.DEFAULT_STREAM, 2


def rows(n, seed=0):
    return pattern((n, 4), "float32", seed)


@pytest.fixture
def tensor(cuda):
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=cuda) as t:
        t.map(1000)
        yield t
        cuda_helper.synchronize()


# ---- producers ----------------------------------------------------------------------


def test_append_runs_on_the_stream_that_the_source_names(tensor, streams, arrays):
    """So it comes after what writes the source, without an event."""
    stream = streams[0]
    x = arrays(InterfaceArray, rows(5), stream)
    late = arrays(DeviceArray, rows(5, 1))
    tensor.append(x)
    before = calls(tensor)
    with Gate(stream) as gate:
        x.copy_from(late, stream)
        tensor.append(x)
        assert calls_since(before, tensor) == {"launch": 1}
        gate.open()
        assert same(to_numpy(tensor), np.concatenate([rows(5), rows(5, 1)]))


def test_append_on_another_stream_waits_for_the_producer(tensor, streams, arrays):
    producer, stream = streams[:2]
    x = arrays(InterfaceArray, rows(5), producer)
    late = arrays(DeviceArray, rows(5, 1))
    with Gate(producer) as gate:
        x.copy_from(late, producer)
        tensor.append(x, stream=int(stream))
        assert not stream.is_done()
        gate.open()
        assert same(to_numpy(tensor), rows(5, 1))


def test_source_without_a_stream_is_read_on_the_legacy_stream(tensor, streams, arrays):
    """An interface that names no stream promises that its data is ready."""
    x = arrays(InterfaceArray, rows(5))
    with Gate(streams[0]):
        tensor.append(x)
        tensor.append(x)
    assert same(to_numpy(tensor), np.concatenate([rows(5)] * 2))


def test_dlpack_source_is_asked_for_the_stream_of_the_copy(tensor, streams, arrays):
    x = arrays(CapsuleArray, rows(5))
    tensor.append(x)
    tensor.append(x, stream=int(streams[0]))
    tensor.append(x, stream=PER_THREAD)
    assert x.producer.asked_streams == [DEFAULT, int(streams[0]), PER_THREAD]
    assert same(to_numpy(tensor), np.concatenate([rows(5)] * 3))


class UnorderedArray(CapsuleArray):
    """Has an interface of version 2, which names no stream, beside DLPack: as JAX's arrays."""

    def __init__(self, array):
        super().__init__(array)
        interface = cuda_helper.Interface(self.pointer, self.shape, self.strides, self.dtype)
        self.__cuda_array_interface__ = {**interface.__cuda_array_interface__, "version": 2}
        del self.__cuda_array_interface__["stream"]


def test_interface_that_orders_nothing_is_left_for_dlpack(tensor, arrays):
    x = arrays(UnorderedArray, rows(5))
    tensor.append(x)
    assert x.producer.asked_streams == [DEFAULT]
    assert same(to_numpy(tensor), rows(5))


def test_what_was_read_is_let_go_when_the_pool_is_asked(cuda, arrays, streams):
    """The last source of all is not kept until someone happens to append again."""
    with pyvmm.Pool(cuda) as pool:
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device=cuda, pool=pool)
        u = pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device=cuda)
        t.append(rows(5))
        u.append(t[0:5], stream=int(streams[0]))
        cuda_helper.synchronize()
        assert same(to_numpy(u), rows(5))
        del t
        assert pool.stats()["in_use_bytes"] == 0
        u.close()


def test_source_is_kept_until_it_has_been_read(tensor, streams):
    producer, stream = streams[:2]

    class Freed(InterfaceArray):
        pass

    x = Freed(rows(5), producer)
    memory, gone = x._memory, weakref.ref(x)
    with Gate(stream) as gate:
        tensor.append(x, stream=int(stream))
        del x
        gc.collect()
        assert gone() is not None
        gate.open()
        cuda_helper.synchronize()
        for _ in range(3):
            tensor.append(rows(1), stream=int(stream))
        gc.collect()
        assert gone() is None
    with cuda_helper.context():
        cuda_helper.call("cuMemFree_v2", memory)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_many_waits_for_every_producer(cuda, streams, arrays, layout, late):
    *producers, stream = streams
    values = [pattern((2, 5, 4), "float32", seed) for seed in range(2)]
    sources = [arrays(InterfaceArray, values[0], producer) for producer in producers]
    update = arrays(DeviceArray, values[1])
    tensors = [
        pyvmm.empty((2, 0, 4), "float32", axis=1, capacity=99, device=cuda, layout=layout)
        for _ in sources
    ]
    with Gate(producers[late]) as gate:
        sources[late].copy_from(update, producers[late])
        pyvmm.append_many(tensors, sources, stream=int(stream))
        assert not stream.is_done()
        gate.open()
        for i, t in enumerate(tensors):
            assert same(to_numpy(t), values[i == late])
    for t in tensors:
        t.close()


class Framework:
    """A stream object in each framework's form."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Protocol:
    def __init__(self, handle):
        self.handle = handle

    def __cuda_stream__(self):
        return 0, self.handle


def test_stream_objects(tensor, streams, arrays):
    x, handle = arrays(InterfaceArray, rows(1), streams[0]), int(streams[0])
    tensor.append(x)
    before = calls(tensor)
    for stream in (handle, Framework(cuda_stream=handle), Framework(ptr=handle), Protocol(handle)):
        tensor.append(x, stream=stream)
    assert calls_since(before, tensor) == {"launch": 4}  # all of them the same stream


# ---- one tensor, several streams ----------------------------------------------------


def test_append_on_another_stream_waits_for_the_last(tensor, streams, arrays):
    a, b, c = streams
    x = arrays(InterfaceArray, rows(5))
    with Gate(a) as gate:
        tensor.append(x, stream=int(a))
        before = calls(tensor)
        tensor.append(x, stream=int(b))
        made = calls_since(before, tensor)
        assert (made["event_record"], made["event_wait"], made["launch"]) == (1, 1, 1)
        tensor.append(x, stream=int(c))
        assert not b.is_done() and not c.is_done()
        gate.open()
        assert same(to_numpy(tensor), np.concatenate([rows(5)] * 3))


def test_overwritten_rows_are_written_in_order(tensor, streams, arrays):
    """Truncated and appended on another stream: the later rows stay."""
    a, b, _ = streams
    x, y = arrays(InterfaceArray, rows(50)), arrays(InterfaceArray, rows(50, 1))
    with Gate(a) as gate:
        tensor.append(x, stream=int(a))
        tensor.truncate(0)
        tensor.append(y, stream=int(b))
        gate.open()
        assert same(to_numpy(tensor), rows(50, 1))


def test_truncate_waits_for_the_readers_stream(tensor, streams, arrays):
    reader, writer, _ = streams
    x, y = arrays(InterfaceArray, rows(50)), arrays(InterfaceArray, rows(50, 1))
    out = arrays(DeviceArray, rows(50, 2))
    tensor.append(x, stream=int(writer))
    writer.synchronize()
    with Gate(reader) as gate:
        out.copy_from(tensor.ptr, reader)
        tensor.truncate(0, stream=int(reader))
        tensor.append(y, stream=int(writer))
        assert not writer.is_done()
        gate.open()
        assert same(to_numpy(tensor), rows(50, 1))
        assert same(out.get(), rows(50))


@pytest.mark.parametrize("late", [0, 1])
def test_truncate_waits_for_every_reader_named(tensor, streams, arrays, late):
    *readers, writer = streams
    x, y = arrays(InterfaceArray, rows(50)), arrays(InterfaceArray, rows(50, 1))
    outs = [arrays(DeviceArray, rows(40, 2)) for _ in readers]
    tensor.append(x, stream=int(writer))
    writer.synchronize()
    with Gate(readers[late]) as gate:
        for n_rows, reader, out in zip((40, 0), readers, outs, strict=True):
            out.copy_from(tensor.ptr, reader)
            tensor.truncate(n_rows, stream=int(reader))
        tensor.append(y, stream=int(writer))
        assert not writer.is_done()
        gate.open()
        assert same(to_numpy(tensor), rows(50, 1))
        for out in outs:
            assert same(out.get(), rows(50)[:40])


def test_fork_comes_after_the_last_append(tensor, streams, arrays):
    x, y = arrays(InterfaceArray, rows(50)), arrays(InterfaceArray, rows(50, 1))
    with Gate(streams[0]) as gate:
        tensor.append(x, stream=int(streams[0]))
        fork = tensor.fork()
        tensor.truncate(0)
        tensor.append(y, stream=int(streams[1]))
        gate.open()
        assert same(to_numpy(fork), rows(50))
        assert same(to_numpy(tensor), rows(50, 1))
    fork.close()


# ---- hand-off -----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["tensor", "view", "reserved"])
def test_consumers_stream_waits_for_the_last_append(tensor, streams, arrays, what):
    a, consumer, _ = streams
    x, out = arrays(InterfaceArray, rows(50)), arrays(DeviceArray, rows(50, 2))
    with Gate(a) as gate:
        tensor.append(x, stream=int(a))
        owner = {"tensor": tensor, "view": tensor[:50], "reserved": tensor.reserved()}[what]
        capsule = owner.__dlpack__(stream=int(consumer))
        out.copy_from(tensor.ptr, consumer)
        assert not consumer.is_done()
        gate.open()
        assert same(out.get(), rows(50))
    del capsule


def test_handoff_within_one_stream_costs_nothing(tensor, streams, arrays):
    a = streams[0]
    tensor.append(arrays(InterfaceArray, rows(50)), stream=int(a))
    before = calls(tensor)
    for _ in range(3):
        tensor.__dlpack__(stream=int(a))
    assert calls_since(before, tensor) == {}


def test_no_event_until_a_handoff(tensor, streams, arrays):
    a, b, _ = streams
    x = arrays(InterfaceArray, rows(5))
    for _ in range(10):
        tensor.append(x, stream=int(a))
    assert "event_record" not in calls(tensor)
    for _ in range(3):
        tensor.__dlpack__(stream=int(b))
    assert calls(tensor)["event_record"] == 1
    tensor.append(x, stream=int(a))
    tensor.__dlpack__(stream=int(b))
    assert calls(tensor)["event_record"] == 2


def test_stream_arguments_of_dlpack(tensor, streams, arrays):
    """CUDA: 1 legacy, 2 per thread, None legacy; 0 is ambiguous and refused. ROCm: 0 and None
    the default; 1 and 2 are refused. Both: -1 no order."""
    a = streams[0]
    x = arrays(InterfaceArray, rows(5))
    named = (DEFAULT,) if cuda_helper.IS_HIP else (DEFAULT, PER_THREAD)
    refused = (1, 2) if cuda_helper.IS_HIP else (0,)
    for stream, waits in ((None, 1), *((name, 1) for name in named), (int(a), 0), (-1, 0)):
        tensor.append(x, stream=int(a))
        before = calls(tensor)
        tensor.__dlpack__(stream=stream)
        assert calls_since(before, tensor).get("event_wait", 0) == waits, stream
    wrong = (*((stream, ValueError) for stream in refused), (-2, ValueError), ("1", TypeError))
    for stream, error in wrong:
        with pytest.raises((error, BufferError)):
            tensor.__dlpack__(stream=stream)
    tensor.truncate(0)  # nothing stayed exported


def test_interface_names_a_stream_that_is_in_order(tensor, streams, arrays):
    """Whoever waits for the stream that the interface names sees the rows."""
    a, consumer, _ = streams
    x, out = arrays(InterfaceArray, rows(50)), arrays(DeviceArray, rows(50, 2))
    view = None
    with Gate(a) as gate:
        tensor.append(x, stream=int(a))
        view = tensor[:50]
        named = view.__cuda_array_interface__.get("stream")
        assert named is None or named in (DEFAULT, PER_THREAD, int(a))
        gate.open()
        if named in (None, DEFAULT, PER_THREAD):
            out.copy_from(tensor.ptr, named or DEFAULT)
        else:
            out.copy_from(tensor.ptr, a)
        assert same(out.get(), rows(50))
    del view


def test_streams_of_their_own(cuda, streams, arrays):
    """Appends on two streams, each to its tensor, handed to a third."""
    a, b, consumer = streams
    x = arrays(InterfaceArray, rows(50))
    tensors = [pyvmm.empty((0, 4), "float32", axis=0, capacity=500, device=cuda) for _ in range(2)]
    outs = [arrays(DeviceArray, rows(500, 2)) for _ in range(2)]
    with Gate(a) as first:
        for _ in range(10):
            for t, stream in zip(tensors, (a, b), strict=True):
                t.append(x, stream=int(stream))
        capsules = [t.__dlpack__(stream=int(consumer)) for t in tensors]
        for t, out in zip(tensors, outs, strict=True):
            out.copy_from(t.ptr, consumer)
        b.synchronize()
        assert not consumer.is_done()
        first.open()
        for out in outs:
            assert same(out.get(), np.concatenate([rows(50)] * 10))
    del capsules
    for t in tensors:
        t.close()


def test_threads_with_streams_of_their_own(cuda):
    pool, failures = pyvmm.Pool(cuda), []

    def work(seed):
        try:
            stream = Stream()
            x = InterfaceArray(rows(30, seed), stream)
            for _ in range(5):
                t = pyvmm.empty((0, 4), "float32", axis=0, capacity=900, device=cuda, pool=pool)
                for _ in range(30):
                    t.append(x)
                assert same(to_numpy(t), np.concatenate([rows(30, seed)] * 30))
                t.close()
            x.free()
            stream.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    pool.close()


# ---- contexts and devices -----------------------------------------------------------


def test_current_context_is_left_as_it_was(tensor):
    found = []

    def work():
        found.append(cuda_helper.current_context())
        tensor.append(rows(3))
        tensor.trim()
        with tensor.fork() as fork:
            fork.grow(500)
        pyvmm.default_pool(tensor.device).trim(wait=True)
        found.append(cuda_helper.current_context())
        with cuda_helper.context():
            found.append(cuda_helper.current_context())
            tensor.append(rows(3))
            found.append(cuda_helper.current_context())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    # In HIP a device is always current, and at first the first one.
    assert found[:2] == ([0, 0] if cuda_helper.IS_HIP else [None, None])
    assert found[2] == found[3] is not None


@pytest.mark.skipif(cuda_helper.IS_HIP, reason="of HIP, tests/c/test_hip.c has two devices")
def test_stream_and_source_of_another_device(simulator):
    """Two devices, which the simulated driver has when it is asked for them."""
    run_python(
        """
        import ctypes, os
        import numpy as np
        import pyvmm
        cuda = ctypes.CDLL(os.environ["VMM_CUDA_LIBRARY"])
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device="cuda:1")
        u = pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device="cuda:0")
        context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert cuda.cuCtxPushCurrent_v2(context) == 0
        assert cuda.cuStreamCreate(ctypes.byref(stream), 1) == 0
        x = np.ones((2, 4), "float32")
        for use in (lambda: t.append(x, stream=stream.value),
                    lambda: t.truncate(0, stream=stream.value),
                    lambda: t.__dlpack__(stream=stream.value),
                    lambda: pyvmm.append_many([t, u], [x, x]),
                    lambda: t.append(u.grow(1))):
            try:
                use()
            except (ValueError, BufferError) as error:
                assert "cuda:1" in str(error) or "device" in str(error), error
            else:
                raise SystemExit("a stream of another device was taken")
        assert t.length == 0 and u.length == 1
        u.append(x, stream=stream.value)
        t.append(x)
        """,
        VMM_SIM_DEVICES="2",
    )


def test_stream_that_its_framework_destroys(cuda):
    """CuPy destroys a stream with the last object of it, and the driver would follow the handle
    when the next write, on another stream, waits for the one before."""
    if not conftest.SIMULATED:
        pytest.skip("on a GPU test_handoff_concat_cupy.py does this with CuPy itself")
    run_python(
        """
        import os, sys, types
        import numpy, cuda_helper, pyvmm
        DEVICE = os.environ["TEST_DEVICE"]

        class Stream(cuda_helper.Stream):
            made = 0
            def __init__(self):
                super().__init__()
                self.ptr = int(self)
                Stream.made += 1
                cupy.current = self
            def __del__(self):
                self.close()
                Stream.made -= 1

        cupy = types.ModuleType("cupy")
        cupy.cuda = types.SimpleNamespace(get_current_stream=lambda: cupy.current)
        sys.modules["cupy"] = cupy
        x = numpy.ones((3, 4), "float32")
        arrays = []
        with pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=DEVICE) as t:
            for step in range(5):
                stream = Stream()
                arrays.append(cuda_helper.InterfaceArray(x * step, stream))
                t.append(arrays[-1])
                del stream
                assert Stream.made <= 2  # the last one's, and the current one
            cuda_helper.synchronize()
            got = cuda_helper.read(t.ptr, t.shape, t.strides, t.dtype)
            assert (got == numpy.repeat(numpy.arange(5), 3)[:, None]).all()
        # The streams of tensors that are gone go, too.
        for _ in range(200):
            with pyvmm.empty((0, 4), "float32", axis=0, capacity=1000, device=DEVICE) as t:
                Stream()
                t.append(cuda_helper.InterfaceArray(x, cupy.current))
        assert Stream.made < 100, Stream.made
    """,
        TEST_DEVICE=cuda,
    )
