"""Appends captured once and replayed while the tensor grows; t.cursor and t.advance()."""

import copy
import ctypes
import gc
import os

import numpy as np
import pytest

import cuda_helper
import dlpack_struct
import pyvmm
from conftest import SIMULATED
from cuda_helper import Capture, InterfaceArray
from model import pattern, same
from support import close_after_graphs, run_python, to_numpy

N_REPLAYS = 300 if SIMULATED else 10_000


def rows(n, width, seed=0):
    return pattern((n, width), "float32", seed)


def cursor_of(t):
    c = t.cursor
    return cuda_helper.read(c.ptr, c.shape, c.strides, c.dtype).tolist()


# ---- the cursor, everywhere ---------------------------------------------------------


def test_cursor_follows_every_change(device):
    with pyvmm.empty((2, 0, 4), "float32", axis=1, capacity=100, device=device, layout="lane") as t:
        c = t.cursor
        assert (c.shape, c.strides, c.dtype, c.ndim, c.nbytes) == ((2,), (4,), np.int32, 1, 8)
        assert c.device == t.device and c.base is t and "int32" in repr(c)
        read = (lambda: np.asarray(c).tolist()) if device == "host" else (lambda: cursor_of(t))
        assert read() == [0, 0]
        address = c.ptr
        t.append(np.ones((2, 3, 4), "float32"))
        assert read() == [3, 3]
        t.grow(4)
        assert read() == [7, 7]
        t.truncate(5)
        assert read() == [5, 5]
        t.append(np.ones((1, 2, 4), "float32"), lanes=[1])
        assert read() == [5, 7]
        t.truncate([4], lanes=[0])
        assert read() == [4, 7] == list(t.lengths)
        t.truncate(3)
        assert read() == [3, 3]
        assert t.cursor.ptr == address


def test_cursor_on_the_host_is_shared_and_read_only(host):
    t = pyvmm.empty((0, 4), "float32", axis=0, capacity=10)
    seen = np.asarray(t.cursor)
    assert np.from_dlpack(t.cursor).tolist() == [0]
    t.append(rows(3, 4))
    assert seen.tolist() == [3] and not seen.flags.writeable
    assert not np.from_dlpack(t.cursor).flags.writeable
    assert np.asarray(t.cursor, "int64").dtype == np.int64
    with pytest.raises((BufferError, TypeError), match="not writable|read only"):
        ctypes.c_char.from_buffer(t.cursor)
    with pytest.raises(BufferError):
        t.close()
    with pytest.raises(ValueError, match="captured"):
        t.advance(1)
    with pytest.raises(TypeError):
        pyvmm.Cursor()
    del seen
    gc.collect()
    c = t.cursor
    t.close()
    with pytest.raises(pyvmm.VMMError):
        _ = c.shape
    assert "closed" in repr(c)


def test_a_cursor_is_exported_read_only(device):
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=device) as t:
        versioned = dlpack_struct.look(t.cursor.__dlpack__(max_version=(1, 0)))
        assert versioned.flags == dlpack_struct.READ_ONLY
        assert versioned.tensor.data == t.cursor.ptr
        legacy = dlpack_struct.look(t.cursor.__dlpack__())
        assert isinstance(legacy, dlpack_struct.Legacy)
        del versioned, legacy


def test_a_cursor_pins_no_rows(host):
    """Not those either that a concat's arrays have shown, once these are gone."""
    t = pyvmm.empty((0, 4), "float32", axis=0, capacity=100)
    t.append(rows(3, 4))
    seen = np.asarray(t.cursor)
    out = pyvmm.concat(np.asarray(t), rows(2, 4, 1), axis=0)
    assert t.length == 5
    with pytest.raises(BufferError):
        t.truncate(1)
    del out
    gc.collect()
    t.truncate(1)
    assert seen.tolist() == [1]
    with pytest.raises(BufferError):
        t.close()
    del seen
    gc.collect()
    t.close()


def test_cursor_on_a_gpu_speaks_the_protocols(cuda):
    with pyvmm.empty((0, 4), "float32", axis=0, capacity=10, device=cuda) as t:
        c = t.cursor
        interface = c.__cuda_array_interface__
        assert interface["shape"] == (1,) and interface["typestr"] == "<i4"
        assert interface["data"] == (c.ptr, True)
        assert c.__dlpack_device__() == t.__dlpack_device__()
        capsule = c.__dlpack__(stream=cuda_helper.DEFAULT_STREAM, max_version=(1, 0))
        with pytest.raises(BufferError, match="DLPack"):
            memoryview(c)
        with pytest.raises(TypeError, match="lengths"):
            np.asarray(c)
        del capsule, c, interface


# ---- graphs ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["seq", "lane"])
def test_replays_through_growth(cuda, streams, arrays, layout):
    """Right to the last byte, of K and V together, whatever was grown between the replays."""
    a = streams[0]
    width = pyvmm.device_info(cuda)["granularity_bytes"] // 16 if SIMULATED else 2048
    block = None if SIMULATED else "2MiB"
    shape = (2, 0, width)
    pair = [
        pyvmm.empty(
            shape, "uint8", axis=1, capacity=N_REPLAYS + 10, device=cuda, layout=layout,
            block_size=block,
        )
        for _ in range(2)
    ]  # fmt: skip
    news = [arrays(InterfaceArray, np.zeros((2, 1, width), "uint8"), a) for _ in range(2)]
    expected = [np.zeros((2, N_REPLAYS, width), "uint8") for _ in range(2)]
    random = np.random.default_rng(5)
    with Capture(a) as graph:
        pyvmm.append_many(pair, news)
    for step in range(N_REPLAYS):
        for new, want in zip(news, expected, strict=True):
            value = random.integers(0, 256, (2, 1, width), "uint8")
            new.set(value)
            want[:, step] = value[:, 0]
        for t in pair:
            t.map(step + 1)
        graph.launch(a)
        for t in pair:
            t.advance()
    a.synchronize()
    for t, want in zip(pair, expected, strict=True):
        assert t.length == N_REPLAYS
        assert same(to_numpy(t), want)
        assert cursor_of(t) == [N_REPLAYS] * t.cursor.shape[0]
        assert t.stats()["block_count"] > 5
    graph.close()
    for t in pair:
        close_after_graphs(t)


def test_overflow_and_a_forgotten_advance(cuda, streams, arrays):
    a = streams[0]
    t = pyvmm.empty((0, 4), "float32", axis=0, capacity=1_000_000, device=cuda)
    x = arrays(InterfaceArray, rows(5, 4), a)
    t.append(x)
    with Capture(a) as graph:
        t.append(x)
    graph.launch(a)
    with pytest.raises(pyvmm.VMMError, match=r"advance\(5\)") as error:
        t.append(x)
    assert error.value.status == "VMM_ERR_BUSY"
    with pytest.raises(pyvmm.VMMError, match=r"advance\(5\)"):
        t.grow(1)
    t.advance(5)
    t.grow(t.mapped - t.length)
    before = to_numpy(t)
    graph.launch(a)
    a.synchronize()
    with pytest.raises(pyvmm.CapacityError, match="overflow"):
        t.advance(5)
    assert same(to_numpy(t), before)
    with pytest.raises(BufferError, match="graph"):
        t.close()
    graph.close()
    close_after_graphs(t)


def test_advance_many_follows_all_that_can(cuda, streams, arrays):
    a = streams[0]
    width = pyvmm.device_info(cuda)["granularity_bytes"] // 4
    ts = [
        pyvmm.empty((0, width), "uint8", axis=0, capacity=40, device=cuda, block_size=4 * width)
        for _ in range(3)
    ]
    new = [arrays(InterfaceArray, np.full((1, width), i, "uint8"), a) for i in range(3)]
    with Capture(a) as graph:
        pyvmm.append_many(ts, new)
    for t in ts:
        t.map(4)
    graph.launch(a)
    assert pyvmm.advance_many(ts) == min(t.mapped for t in ts) - 1
    for t in ts:
        t.map(t.mapped - t.length + 4)
    graph.launch(a)
    graph.launch(a)
    assert pyvmm.advance_many(tuple(ts), np.int64(2)) == min(t.mapped for t in ts) - 3

    ts[1].trim()
    for _ in range(ts[1].mapped - 3):
        graph.launch(a)
        pyvmm.advance_many(ts)
    length = ts[1].length
    assert length == ts[1].mapped
    for t in (ts[0], ts[2]):
        t.map(length + 1)
    graph.launch(a)
    a.synchronize()
    with pytest.raises(pyvmm.CapacityError, match="overflow"):
        pyvmm.advance_many(ts)
    assert [t.length for t in ts] == [length + 1, length, length + 1]
    # 0 asks for it, and follows nothing.
    graph.launch(a)
    a.synchronize()
    with pytest.raises(pyvmm.CapacityError, match="overflow"):
        pyvmm.advance_many(ts, 0)
    assert pyvmm.advance_many(ts, 0) == 0
    assert [t.length for t in ts] == [length + 1, length, length + 1]
    for i, t in enumerate(ts):
        assert same(to_numpy(t), np.full((t.length, width), i, "uint8"))
    assert pyvmm.advance_many([]) == 0
    with pytest.raises(ValueError):
        pyvmm.advance_many(ts, -1)
    lengths = [t.length for t in ts]
    with pytest.raises(TypeError, match="VTensors"):
        pyvmm.advance_many([ts[0], 3])
    assert [t.length for t in ts] == lengths
    with pytest.raises(TypeError, match="list"):
        pyvmm.advance_many(ts[0])
    graph.close()
    for t in ts:
        close_after_graphs(t)


def test_advance_that_waits_lets_other_threads_run(simulator):
    """Setting the cursor has failed, so advance looks where it is: behind work that another thread
    lets go on, once the driver has been called for that."""
    run_python("""
        import signal, threading, time
        import numpy as np
        import pyvmm
        import cuda_helper
        from cuda_helper import Capture, InterfaceArray, Stream
        signal.alarm(30)
        sim, stream = cuda_helper.load(), Stream()
        t = pyvmm.empty((0, 4), "float32", axis=0, capacity=100, device="cuda:0")
        x = InterfaceArray(np.ones((1, 4), "float32"), stream)

        def let_go(calls, done):
            while sim.vmm_sim_calls(b"*") == calls:
                time.sleep(0.001)
            done.append(True)  # before advance can return
            sim.vmm_sim_go()

        for advance in (t.advance, lambda n: pyvmm.advance_many([t], n)):
            with Capture(stream) as graph:
                t.append(x)
            t.map(10)
            sim.vmm_sim_fail(b"cuLaunchKernel", 2, 719, 1)
            try:
                t.append(x)
            except pyvmm.VMMError as error:
                assert error.operation == cuda_helper.driver_name("cuLaunchKernel")
            else:
                raise SystemExit("no error")
            sim.vmm_sim_hold()
            graph.launch(stream)
            done, length = [], t.length
            thread = threading.Thread(target=let_go, args=(sim.vmm_sim_calls(b"*"), done))
            thread.start()
            advance(1)
            assert done == [True] and t.length == length + 1
            thread.join()
            graph.close()
    """)


class Owner:
    """Something that weak references can refer to, as frameworks' graphs are."""


def test_graph_pins_keep_the_tensors(cuda, streams, arrays):
    """In the graph's place: until the owner has gone, or until they are closed."""
    a = streams[0]
    t = pyvmm.empty((0, 64), "uint8", axis=0, capacity=100, device=cuda)
    new = arrays(InterfaceArray, np.ones((1, 64), "uint8"), a)
    owner = Owner()
    with Capture(a) as graph:
        pins = pyvmm.GraphPins(int(a), owner=owner, device=cuda)
        t.append(new)
    assert t.stats()["driver_calls"]["retain"] == 0
    del pins
    gc.collect()
    for step in range(5):
        t.map(step + 1)
        graph.launch(a)
        t.advance()
    with pytest.raises(BufferError, match="graph"):
        t.close()
    graph.close()
    with pytest.raises(BufferError, match="graph"):
        t.close()
    del owner
    gc.collect()
    assert to_numpy(t).tolist() == [[1] * 64] * 5
    t.close()

    t = pyvmm.empty((0, 64), "uint8", axis=0, capacity=100, device=cuda)
    with Capture(a) as graph:
        pins = pyvmm.GraphPins(int(a), device=cuda)
        t.append(new)
    graph.close()
    with pytest.raises(BufferError, match="graph"):
        t.close()
    pins.close()
    pins.close()
    t.close()


def test_graph_pins_say_what_is_wrong(cuda, streams):
    a = streams[0]
    with pytest.raises(ValueError, match="captured"):
        pyvmm.GraphPins(int(a), device=cuda)
    with pytest.raises(ValueError, match="captured"):
        pyvmm.GraphPins(0, device="host")
    with pytest.raises(TypeError, match="weak"):
        pyvmm.GraphPins(int(a), owner=3, device=cuda)
    with pytest.raises(TypeError, match="stream"):
        pyvmm.GraphPins(None, device=cuda)
    with Capture(a) as graph:
        pins = pyvmm.GraphPins(int(a), device=cuda)
        with pytest.raises(TypeError, match="another"):
            pins.__init__(int(a), device=cuda)
        with pytest.raises(TypeError, match="copied"):
            copy.copy(pins)
        pins.close()
        with pytest.raises(TypeError, match="another"):
            pins.__init__(int(a), device=cuda)
    graph.close()


def test_concat_in_a_capture_is_the_frameworks_own(cuda, streams, arrays):
    """What it returns must be right at once, not when the graph is replayed."""
    torch = pytest.importorskip("torch")
    if SIMULATED:
        pytest.skip("torch does not run on the simulated driver")
    import pyvmm.torch

    cache = torch.zeros(1, 4, 8, device=cuda)
    new = torch.ones(1, 1, 8, device=cuda)
    cache = pyvmm.torch.cat((cache, new), dim=1)
    pyvmm.concat_stats(reset=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = pyvmm.torch.cat((cache, new), dim=1)
    new.fill_(3)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert out.shape == (1, 6, 8) and torch.equal(out[:, 5:], new)
    assert pyvmm.concat_stats()["appended"] == 0
    del graph


def test_torch_captures_and_reads_the_cursor(cuda):
    torch = pytest.importorskip("torch")
    if SIMULATED:
        pytest.skip("torch does not run on the simulated driver")
    n = 2_000 if os.environ.get("PYVMM_TEST_SHORT") else 10_000
    t = pyvmm.empty((2, 0, 4, 64), "float16", axis=1, capacity=n, device=cuda, layout="lane")
    source = torch.zeros(2, 1, 4, 64, dtype=torch.float16, device=cuda)
    step = torch.zeros((), dtype=torch.float16, device=cuda)
    lengths = torch.from_dlpack(t.cursor)
    seen = torch.zeros(2, dtype=torch.int32, device=cuda)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.add_(1).remainder_(1000)
        source.copy_(step)
        t.append(source)
        seen.copy_(lengths)
    for i in range(n):
        t.map(i + 1)
        graph.replay()
        t.advance()
    torch.cuda.synchronize()
    expected = (torch.arange(1, n + 1, device=cuda) % 1000).to(torch.float16)
    out = torch.from_dlpack(t)
    assert torch.equal(out, expected.view(1, n, 1, 1).expand(2, n, 4, 64))
    assert seen.tolist() == [n, n] == lengths.tolist()
    del out, lengths, graph
    gc.collect()
    close_after_graphs(t)
