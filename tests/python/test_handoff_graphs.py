"""Graphs of torch over tensors that grow: capture() of any loop, and what records and replays.

On the CPU a graph is replaced by one that runs the recorded function again (EagerGraph). Captured
steps of transformers are in test_handoff_captured.py."""

import threading

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import pyvmm  # noqa: E402
import pyvmm.torch  # noqa: E402
from pyvmm import _attention, _graphs  # noqa: E402
from torch_places import graphs_of, skip_place  # noqa: E402


@pytest.fixture(params=["cpu", "cuda"])
def place(request):
    skip_place(request.param)
    return request.param


@pytest.fixture
def cuda():
    skip_place("cuda")
    return torch.device("cuda:0")


# ---- capture() --------------------------------------------------------------------


class Loop:
    """One layer of attention, by hand."""

    def __init__(self, place, layout):
        torch.manual_seed(0)
        device = "host" if place == "cpu" else "cuda:0"
        self.k, self.v = (
            pyvmm.empty((2, 2, 0, 8), axis=2, capacity=4096, device=device, layout=layout)
            for _ in range(2)
        )
        self.weights = [torch.randn(16, 16, device=place) / 4 for _ in range(3)]
        self.lengths = torch.from_dlpack(self.k.cursor)
        self.whole = [torch.from_dlpack(t.reserved()) for t in (self.k, self.v)]

    def decode(self, x):  # (2, 16) to (2, 16)
        q, k, v = (torch.tanh(x @ w).view(2, 2, 1, 8) for w in self.weights)
        first = torch.zeros_like(self.lengths)
        plan = _attention.plan(self.lengths, first, None, 2)
        pyvmm.append_many([self.k, self.v], [k, v])
        reads = _attention.Reads(*plan, 1024, self.whole[0], self.k.layout)
        prepared = _attention.Plain.prepare(reads)
        parts, lse = _attention.Plain.attend(q, *self.whole, reads, prepared, 0.3)
        return _attention.merge(parts, lse).reshape(2, 16)


@pytest.mark.parametrize("layout", ["seq", "lane"])
def test_a_loop_of_ones_own(place, layout):
    eager, ours = Loop(place, layout), Loop(place, layout)
    step = pyvmm.torch._capture(ours.decode, [ours.k, ours.v], graphs_of(place))
    x = y = torch.randn(2, 16, device=place)
    for _ in range(300):
        x, y = eager.decode(x), step(y).clone()
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert step.n_captures == 1
    assert ours.k.length == ours.v.length == 300
    eager.k.truncate(100), eager.v.truncate(100)
    ours.k.truncate(100), ours.v.truncate(100)
    for _ in range(30):
        x, y = eager.decode(x), step(y).clone()
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert ours.k.length == 130


def test_rows_past_the_length_are_finite(place):
    loop = Loop(place, "seq")
    loop.k.append(torch.full((2, 2, 1000, 8), torch.nan, device=place))
    loop.k.truncate(0)
    loop.k.trim()
    step = pyvmm.torch._capture(loop.decode, [loop.k, loop.v], graphs_of(place))
    for i in range(260):
        step(torch.randn(2, 16, device=place))
        for whole in loop.whole:
            assert torch.isfinite(whole[:, :, : (i + 256) // 256 * 256 + 256]).all()


def lanes_of(place, n_lanes=3, capacity=4096, dim=8):
    device = "host" if place == "cpu" else "cuda:0"
    t = pyvmm.empty((n_lanes, 0, dim), axis=1, capacity=capacity, device=device, layout="lane")
    return t, torch.from_dlpack(t.reserved())


def assert_finite_behind(t, n_ahead=_graphs.TILE):
    whole = torch.from_dlpack(t.reserved())
    for lane, length in enumerate(t.lengths):
        assert torch.isfinite(whole[lane, length : length + n_ahead]).all(), (lane, length)


def test_rows_behind_shorter_lanes_are_finite(place):
    """Of a batch of sequences of different lengths, each has a tile behind it that can be read."""
    t, whole = lanes_of(place)
    t.map(4096)
    whole.fill_(torch.nan)  # what recycled memory may hold
    x = torch.ones(3, 300, 8, device=place)
    t.append(x, counts=[300, 0, 17])
    step = pyvmm.torch._capture(lambda x: t.append(x) or x, t, graphs_of(place))
    new = torch.full((3, 1, 8), 2.0, device=place)
    for _ in range(3):
        step(new)
        assert_finite_behind(t)
    assert t.lengths == (303, 3, 20)
    # Rows of the others' are left, and those that were theirs are not read as they were.
    t.truncate(100, lanes=[0])
    t.append(x.fill_(torch.nan), counts=[0, 100, 290])
    t.truncate([3, 20], lanes=[1, 2])
    for _ in range(300):
        step(new)
        assert_finite_behind(t)
    assert t.lengths == (400, 303, 320)
    for lane, n_first in enumerate((100, 0, 17)):
        assert (whole[lane, :n_first] == 1).all()
        length = t.lengths[lane]
        assert (whole[lane, length - 300 : length] == 2).all()


def test_rows_that_another_appended_to_a_longer_lane_are_cleared_in_the_others(place):
    t, whole = lanes_of(place, n_lanes=2, dim=1024)  # so large that a block holds few
    step = pyvmm.torch._capture(lambda x: t.append(x) or x, t, graphs_of(place))
    new = torch.ones(2, 1, 1024, device=place)
    step(new)
    before = t.mapped
    assert before < 1500
    t.append(torch.ones(2, 1500, 1024, device=place), counts=[1500, 0])
    whole[1, before : t.mapped] = torch.nan  # what new memory may hold
    whole[0, 1501 : t.mapped] = torch.nan
    for _ in range(before):
        step(new)
        assert_finite_behind(t)


def test_rows_that_were_appended_and_taken_back_are_cleared(place):
    """Also where the length is what it was."""
    t, whole = lanes_of(place)
    step = pyvmm.torch._capture(lambda x: t.append(x) or x, t, graphs_of(place))
    new = torch.ones(3, 1, 8, device=place)
    step(new)
    t.append(torch.full((3, 50, 8), torch.nan, device=place))
    t.truncate(1)
    step(new)
    assert t.length == 2
    assert_finite_behind(t)


def test_a_tensor_that_is_listed_twice(place):
    """Each replay is counted once."""
    t, whole = lanes_of(place)
    step = pyvmm.torch._capture(lambda x: t.append(x) or x, [t, [t]], graphs_of(place))
    for _ in range(3):
        step(torch.ones(3, 1, 8, device=place))
    assert t.length == 3
    assert (whole[:, :3] == 1).all()


def test_capacity_ends_a_loop_and_loses_nothing(place):
    device = "host" if place == "cpu" else "cuda:0"
    t = pyvmm.empty((0, 4), capacity=5, device=device)
    step = pyvmm.torch._capture(lambda x: t.append(x) or x + 1, t, graphs_of(place))
    x = torch.zeros(1, 4, device=place)
    for _ in range(5):
        x = step(x).clone()
    with pytest.raises(pyvmm.CapacityError):
        step(x)
    rows = torch.from_dlpack(t).cpu()
    assert torch.equal(rows[:, 0], torch.arange(5.0))
    assert t.length == 5


def test_other_shapes_are_captured_anew(place):
    device = "host" if place == "cpu" else "cuda:0"
    t = pyvmm.empty((0, 4), capacity=1000, device=device)
    step = pyvmm.torch._capture(lambda x: t.append(x) or x.sum(), t, graphs_of(place))
    for n in (1, 3, 1, 3):
        total = step(torch.ones(n, 4, device=place))
        assert total.item() == 4 * n
    assert t.length == 8
    assert step.n_captures == 2


def test_what_capture_refuses():
    with pytest.raises(TypeError, match="lists no VTensors"):
        pyvmm.torch.capture(lambda: None, 3)
    with pytest.raises(ValueError, match="lists no VTensors"):
        pyvmm.torch.capture(lambda: None, [])


def test_capture_on_the_cpu_calls_the_function():
    t = pyvmm.empty((0, 4), capacity=10, device="host")
    with pytest.warns(RuntimeWarning, match="host"):
        step = pyvmm.torch.capture(t.append, t)
    step(torch.ones(2, 4))
    assert t.length == 2


# ---- captures that fail -----------------------------------------------------------


def broken(place, n_times):
    class Broken(graphs_of(place)):
        n = 0

        def record(self, run, warm_up, pools):
            def fail():
                run()
                type(self).n += 1
                if self.n <= n_times:
                    raise RuntimeError("previous error during capture")

            super().record(fail, warm_up, pools)
            if place == "cpu":
                fail()

    return Broken


@pytest.mark.parametrize("n_times", [1, 2])
def test_a_capture_that_others_end_is_tried_once_more(place, n_times):
    device = "host" if place == "cpu" else "cuda:0"
    t = pyvmm.empty((0, 4), capacity=100, device=device)
    t.append(torch.zeros(3, 4, device=place))
    graph = broken(place, n_times)
    x = torch.ones(1, 4, device=place)
    stream = torch.cuda.current_stream() if place == "cuda" else None
    recorded = None
    if n_times == 1:
        recorded = _graphs.Recorded(lambda: t.append(x), [t], x.device, graph)
    else:
        with pytest.raises(_graphs.CannotCapture, match="previous error"):
            _graphs.Recorded(lambda: t.append(x), [t], x.device, graph)
    assert graph.n == 2
    if place == "cuda":
        assert torch.cuda.current_stream() == stream
        torch.randn(3, device=place)  # the generator is out of the capture, too
        t.truncate(3)
    else:
        assert t.length == (4 if n_times == 1 else 3)
        t.truncate(3)
    for _ in range(2 if recorded else 0):
        recorded.replay()
    assert torch.from_dlpack(t).sum().item() == (8 if recorded else 0)
    # Nobody is kept out any more.
    thread = threading.Thread(
        target=lambda: _graphs.CAPTURE.acquire() and _graphs.CAPTURE.release()
    )
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


# ---- memory ahead, where it is short ----------------------------------------------


@pytest.mark.parametrize(("dim", "tile"), [(64, 256), (128, 128), (256, 64)])
def test_tiles_by_head_dimension(dim, tile):
    t = pyvmm.empty((1, 0, 1, dim), axis=1, capacity=4096, device="host")
    assert _graphs._tile_of(t) == tile
    x = torch.ones(1, 1, 1, dim)
    _graphs.Recorded(lambda: t.append(x), [t], x.device, _graphs.EagerGraph)
    assert 2 * tile < t.mapped < 2 * tile + 256


def test_graph_is_followed_by_those_that_it_appends_to():
    """A tensor that was listed and is not appended to is left alone; all others follow, also
    behind one that cannot."""
    graph = object.__new__(_graphs.CudaGraph)
    ts = [pyvmm.empty((0, 4), axis=0, capacity=8) for _ in range(2)]
    graph.follow(ts, [0, 0])  # nothing was captured: advance(0) would say so
    with pytest.raises(ValueError, match="captured"):
        graph.follow(ts, [0, 1])
    graph.follow([], [])


def test_rows_that_came_back_from_trim_are_cleared_again():
    t = pyvmm.empty((0, 8), axis=0, capacity=100_000)
    x = torch.ones(1, 8)
    recorded = _graphs.Recorded(lambda: t.append(x), [t], torch.device("cpu"), _graphs.EagerGraph)
    for _ in range(5):
        recorded.replay()
    length = t.length
    t.truncate(0)
    t.trim()
    t.append(torch.ones(length, 8))
    t.map(recorded._clean[0])
    recorded._whole[0][length : t.mapped] = torch.nan  # what recycled memory may hold
    recorded.replay()
    assert t.length == length + 1
    assert torch.isfinite(recorded._whole[0][length : length + 1 + _graphs.TILE]).all()


@pytest.mark.parametrize("n_rows", [3, 45, 144])
@pytest.mark.parametrize("n_tensors", [2, 5])
def test_a_replay_has_what_fits_for_all_together(n_rows, n_tensors):
    """From a prompt that fills the budget but for the tile that a replay may read. Mapped one after
    the other, the first would take more than it needs."""
    tile, dim = 128, 128
    n_bytes = n_tensors * (n_rows + tile) * dim * 8 * 4
    with pyvmm.Pool("host", max_bytes=n_bytes) as pool:
        tensors = [
            pyvmm.empty((1, 0, 8, dim), axis=1, capacity=1 << 16, device="host", pool=pool)
            for _ in range(n_tensors)
        ]
        pyvmm.append_many(tensors, [torch.ones(1, n_rows, 8, dim)] * n_tensors)
        x = torch.ones(1, 1, 8, dim)
        found = set()

        def run():
            found.update((t.length, t.mapped) for t in tensors)
            for t in tensors:
                t.append(x)

        recorded = _graphs.Recorded(run, tensors, x.device, _graphs.EagerGraph)
        recorded.replay()
        assert found == {(n_rows, n_rows + tile)}
        with pytest.raises(pyvmm.OutOfMemoryError):
            recorded.replay()
        del recorded
        for t in tensors:
            assert torch.equal(torch.from_dlpack(t), x.expand(1, n_rows + 1, 8, dim))


def test_replays_to_the_end_of_a_budget():
    """Tensors that grow side by side fill it, though none can have a tile more at the end."""
    n_tensors, n_tiles = 4, 9
    tile, dim = 128, 128
    n_bytes = n_tensors * n_tiles * tile * dim * 8 * 4
    asked = []
    with pyvmm.Pool("host", max_bytes=n_bytes) as pool:
        pool.on_oom(asked.append)
        tensors = [
            pyvmm.empty((1, 0, 8, dim), axis=1, capacity=1 << 16, device="host", pool=pool)
            for _ in range(n_tensors)
        ]
        x = torch.ones(1, 1, 8, dim)

        def run():
            for t in tensors:
                t.append(x)

        recorded = _graphs.Recorded(run, tensors, x.device, _graphs.EagerGraph)
        n_steps = 0
        with pytest.raises(pyvmm.OutOfMemoryError):
            while True:
                recorded.replay()
                n_steps += 1
                end = n_steps + tile - 1
                for i, t in enumerate(tensors):
                    assert t.length == n_steps
                    assert t.mapped >= end
                    rest = recorded._whole[i][:, n_steps : recorded._clean[i]]
                    assert not rest.any()
        assert n_steps == n_tiles * tile - (tile - 1)
        assert pool.stats()["in_use_bytes"] == n_bytes
        assert len(asked) < 8
        for t in tensors:
            assert torch.equal(torch.from_dlpack(t), x.expand(1, n_steps, 8, dim))


# ---- replays that overflow --------------------------------------------------------


class Overflowing(_graphs.EagerGraph):
    """A replay before the next one has overflowed, where `is_over` says so."""

    is_over = False
    n_replays = 0

    def check(self, tensors, n_rows):
        if self.is_over:
            type(self).is_over = False
            raise pyvmm.CapacityError("overflow")

    def replay(self):
        type(self).n_replays += 1
        super().replay()


def test_an_overflow_of_before_is_said_before_anything_has_run():
    class Graph(Overflowing):
        pass

    t = pyvmm.empty((0, 8), axis=0, capacity=1000)
    x = torch.ones(1, 8)
    recorded = _graphs.Recorded(lambda: t.append(x), [t], torch.device("cpu"), Graph)
    recorded.replay()
    Graph.is_over = True
    with pytest.raises(pyvmm.CapacityError):
        recorded.replay()
    assert Graph.n_replays == t.length == 1
    recorded.replay()
    assert Graph.n_replays == t.length == 2


def test_an_overflow_of_another_graph(cuda):
    t, whole = lanes_of("cuda", n_lanes=1, capacity=1 << 20)
    new = torch.ones(1, 1, 8, device=cuda)
    step = pyvmm.torch.capture(lambda x: t.append(x) or x, t)
    step(new)
    other = _graphs.CudaGraph(cuda)
    other.record(lambda: t.append(new), lambda: None, [t.pool])
    t.grow(t.mapped - t.length)
    length = t.length
    other.replay()
    torch.cuda.synchronize()
    with pytest.raises(pyvmm.CapacityError, match="overflow"):
        step(2 * new)
    torch.cuda.synchronize()
    assert t.length == torch.from_dlpack(t.cursor).item() == length
    step(3 * new)
    assert t.length == torch.from_dlpack(t.cursor).item() == length + 1
    assert (whole[0, length] == 3).all()
