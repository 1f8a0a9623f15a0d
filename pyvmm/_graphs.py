"""A function of torch that appends to growing tensors, captured once and replayed."""

# torch has no types where it is not installed.
# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.dlpack import from_dlpack

from pyvmm._cursor import advance_many
from pyvmm._error import CapacityError, OutOfMemoryError, VMMError
from pyvmm._graph_pins import GraphPins
from pyvmm._pool import Pool
from pyvmm._tensor import VTensor, map_many

# Kernels may read whole tiles past the length: what they find there is mapped, and finite. This
# bounds their keys.
TILE = 256


def _tile_of(tensor: VTensor) -> int:
    """The tile over a tensor of shape (batch, n, heads, dim): flash attention's split kernels take
    fewer keys the larger the dimension is."""
    if tensor.ndim != 4:
        return TILE
    dim = tensor.shape[-1]
    return TILE if dim <= 64 else 128 if dim <= 128 else 64


# Held by a capture, and by work of captured steps that is none and no replay either: an append
# to a tensor that a living graph appends to waits for the whole device, and while any stream of
# it is captured that fails and ends the capture, whatever the thread. A replay does without.
CAPTURE = threading.RLock()
# A child has none of the threads that may have held it; others have taken it from here.
os.register_at_fork(after_in_child=CAPTURE._at_fork_reinit)  # type: ignore[attr-defined]

# What could not be captured: torch's allocators may look at it still.
_abandoned: list[Any] = []


class CannotCapture(RuntimeError):
    """What torch said while a step was captured. Nothing has changed by it."""


class Graph(Protocol):
    """What records a step and runs it again."""

    def __init__(self, device: torch.device) -> None: ...
    def record(
        self, run: Callable[[], None], warm_up: Callable[[], None], pools: Iterable[Pool]
    ) -> None: ...
    def check(self, tensors: Iterable[VTensor], n_rows: Iterable[int]) -> None: ...
    def replay(self) -> None: ...
    def follow(self, tensors: Iterable[VTensor], n_rows: Iterable[int]) -> None: ...


class CudaGraph:
    """One torch.cuda.CUDAGraph, with memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._name = f"{'hip' if torch.version.hip else 'cuda'}:{self._index}"  # as pyvmm says it
        self._graph = torch.cuda.CUDAGraph()
        # A graph that kept its tensors by itself would be dearer to launch.
        self._pins: GraphPins | None = None

    def record(
        self, run: Callable[[], None], warm_up: Callable[[], None], pools: Iterable[Pool]
    ) -> None:
        """`warm_up` runs first, on the stream of the capture: libraries initialise themselves,
        and compilers compile, where the graph must not see it. `pools` take no fence meanwhile.
        """
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            warm_up()
        stream.synchronize()
        memory = torch.cuda.graph_pool_handle()
        with contextlib.ExitStack() as stack:
            for pool in pools:
                stack.enter_context(pool.capturing())
            # torch.cuda.graph() does not go back to it where the end of the capture fails.
            stack.enter_context(torch.cuda.stream(torch.cuda.current_stream(self._device)))
            try:
                # Of what other threads do, only that counts which no mode allows.
                with torch.cuda.graph(
                    self._graph, pool=memory, stream=stream, capture_error_mode="thread_local"
                ):
                    self._pins = GraphPins(stream, owner=self._graph, device=self._name)
                    run()
            except BaseException:
                self._abandon(memory)
                raise

    def _abandon(self, memory: Any) -> None:
        """Undo what torch has begun: where the end of a capture fails, its generator and its
        allocator go on as in one, and the allocator asks this graph whose memory to use."""
        _abandoned.append(self._graph)
        if self._pins is not None:
            self._pins.close()
        self._graph.reset()
        # Refused where the capture has ended well, or has not begun.
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self._index, memory)
            torch._C._cuda_releasePool(self._index, memory)

    def check(self, tensors: Iterable[VTensor], n_rows: Iterable[int]) -> None:
        """Raises CapacityError where a replay has overflowed since the last look, of this graph or
        of another that appends to one of these."""
        advance_many([t for t, n in zip(tensors, n_rows, strict=True) if n], 0)

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()

    def follow(self, tensors: Iterable[VTensor], n_rows: Iterable[int]) -> None:
        """The host's lengths, after a replay that appended so many rows to each."""
        counts, refused = tuple(n_rows), None
        for n in sorted(set(counts) - {0}):
            try:
                advance_many([t for t, m in zip(tensors, counts, strict=True) if m == n], n)
            except CapacityError as error:
                refused = error
        if refused is not None:
            raise refused


class EagerGraph:
    """Runs the function again instead: what the code around graphs is tested with where there
    is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self._run: Callable[[], None] | None = None

    def record(
        self, run: Callable[[], None], warm_up: Callable[[], None], pools: Iterable[Pool]
    ) -> None:
        warm_up()
        self._run = run

    def check(self, tensors: Iterable[VTensor], n_rows: Iterable[int]) -> None:
        """Nothing: what does not fit is refused."""

    def replay(self) -> None:
        assert self._run is not None
        self._run()

    def follow(self, tensors: Iterable[VTensor], n_rows: Iterable[int]) -> None:
        """Nothing: the appends were not captured, and the lengths have followed."""


class Turns:
    """For graphs that share buffers: each replay after the one before, whatever their streams.

    A graph belongs to no stream, and uses the same memory at each replay. torch's allocator
    knows a block by the stream that it was allocated on, and gives it to others of that stream
    as soon as it is freed: so it is told of each stream that replays use it on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._last: Any = None

    def add(self, *buffers: torch.Tensor) -> None:
        self._buffers += buffers
        for buffer in buffers if self._last is not None else ():
            buffer.record_stream(self._last)

    def begin(self) -> None:
        """What follows on the current stream may write to the buffers, and replay."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if stream == self._last:
            return
        if self._last is not None:
            stream.wait_stream(self._last)
        for buffer in self._buffers:
            buffer.record_stream(stream)
        self._last = stream


class Recorded:
    """`run`, which appends to `tensors` where their cursors stand, recorded; replay() as often
    as wanted. Between replays the tensors may grow and be truncated by others."""

    def __init__(
        self,
        run: Callable[[], None],
        tensors: Iterable[VTensor],
        device: torch.device,
        make_graph: type[Graph] = CudaGraph,
    ) -> None:
        """Raises CannotCapture, and what growing and `run` raise; the tensors are then as
        before."""
        self.tensors = tuple(tensors)
        # Whole reservations, to clear rows that no append has written.
        with torch.inference_mode(False):
            self._whole = [from_dlpack(tensor.reserved()) for tensor in self.tensors]
        # For each tensor, the row up to which all is finite that lies behind a lane's length, as
        # long as nothing has been given up since.
        self._clean = [0] * len(self.tensors)
        self._given_up = [-1] * len(self.tensors)
        self._tiles = [_tile_of(tensor) for tensor in self.tensors]
        # Lengths at which no more is asked for than a replay needs: memory was short.
        self._short = range(0)
        self.n_rows = [1] * len(self.tensors)
        # Replays before which at least one tensor was given memory.
        self.n_growths = 0
        self._device = device
        with CAPTURE:
            self._graph = self._record(run, make_graph)

    def _record(self, run: Callable[[], None], make_graph: type[Graph]) -> Graph:
        for tensor in self.tensors:
            tensor.cursor  # noqa: B018  made here: a capture allocates nothing
        self._map_ahead()

        lengths = [tensor.lengths for tensor in self.tensors]
        is_warm = False

        def warm_up() -> None:
            nonlocal is_warm
            try:
                run()
                self.n_rows = [
                    tensor.length - max(before)
                    for tensor, before in zip(self.tensors, lengths, strict=True)
                ]
            finally:
                go_back()
            is_warm = True

        def go_back() -> None:
            for tensor, before in zip(self.tensors, lengths, strict=True):
                if tensor.lengths != before:
                    _truncate(tensor, before, self._stream())

        handled = sys.exc_info()[1]  # the caller may be about to mend something else
        unique = {id(tensor.pool): tensor.pool for tensor in self.tensors}
        pools = [pool for pool in unique.values() if not pool.closed]
        for is_last in (False, True):
            is_warm = False
            graph = make_graph(self._device)
            try:
                graph.record(run, warm_up, pools)
                break
            except (torch.OutOfMemoryError, MemoryError, CapacityError):
                go_back()
                raise
            except Exception as error:
                # Of any kind: compilers have their own, and the code that is recorded its.
                go_back()
                # Another thread may have ended the capture by what it did; so once more.
                if is_last or not is_warm:
                    raise CannotCapture(_cause(error, handled)) from error
        return graph

    def replay(self) -> None:
        """Once more: memory ahead where there is none yet, the graph, the host's lengths.

        Raises pyvmm.CapacityError and pyvmm.OutOfMemoryError before anything has run. But where
        this replay itself has overflowed, since another thread has trimmed a tensor meanwhile or
        replays that nobody follows have used up its rows, CapacityError comes when that is seen:
        after it, or before the next one. Then truncate the tensors to the rows that are right."""
        self._map_ahead()
        self._graph.check(self.tensors, self.n_rows)
        self._graph.replay()
        self._graph.follow(self.tensors, self.n_rows)
        # For the next one, while the device is at this one. What fails is said when it is due.
        with contextlib.suppress(CapacityError, OutOfMemoryError):
            self._map_ahead()

    def _map_ahead(self) -> None:
        """The rows that the next replay may touch, and a tile more where there is memory for it."""
        for tensor, n_rows in zip(self.tensors, self.n_rows, strict=True):
            if tensor.length + n_rows > tensor.capacity:
                tensor.map(tensor.length + n_rows)  # raises CapacityError
        longest = max((tensor.length for tensor in self.tensors), default=0)
        if longest not in self._short:
            try:
                # Wherever in a tile the rows end: block by block, and not the blocks of a whole
                # tile at once.
                self._map_clean([2 * tile for tile in self._tiles])
                return
            except OutOfMemoryError:
                # Each try may ask callbacks, which empty caches: not at each step.
                self._short = range(longest, longest + min(self._tiles))
        # A tile begins where a sequence or a chunk of it does, so it may end anywhere.
        least = [tile - 1 for tile in self._tiles]
        try:
            self._map_clean(least)
        except OutOfMemoryError:
            self._give_back()
            self._map_clean(least)

    def _map_clean(self, n_ahead: list[int]) -> None:
        """So many rows more than those of a replay, mapped and finite."""
        due = {}
        for i, tensor in enumerate(self.tensors):
            if self._given_up[i] != tensor._given_up:
                self._clean[i], self._given_up[i] = 0, tensor._given_up
            n_rows = min(tensor.length + self.n_rows[i] + n_ahead[i], tensor.capacity)
            if self._clean[i] < n_rows:
                due[i] = n_rows
        if not due:
            return
        mapped = {i: self.tensors[i].mapped for i in due}
        with CAPTURE:  # new memory may have to be waited for
            map_many([self.tensors[i] for i in due], list(due.values()))
        self.n_growths += any(self.tensors[i].mapped > n for i, n in mapped.items())
        for i in due:
            self._clear(i)

    def _clear(self, i: int) -> None:
        """What has been mapped of a tensor and is not known to be finite, behind its lengths."""
        tensor, whole = self.tensors[i], self._whole[i]
        starts = [max(length, self._clean[i]) for length in tensor.lengths]
        lanes = [whole] if len(set(starts)) == 1 else whole.split(1)
        for lane, start in zip(lanes, starts, strict=False):
            lane.narrow(tensor.axis, start, tensor.mapped - start).zero_()
        self._clean[i] = tensor.mapped

    def _give_back(self) -> None:
        """What some tensors have mapped ahead, others may need now."""
        pools = {id(tensor.pool): tensor.pool for tensor in self.tensors}
        # Elsewhere a capture may forbid it; then what is missing is said by whoever lacks it.
        with CAPTURE, contextlib.suppress(VMMError):
            for tensor in self.tensors:
                tensor.trim()
            for pool in pools.values():
                pool.trim(wait=True)  # a tensor's own next growth would take it as it is

    def _stream(self) -> int | None:
        if self._device.type == "cpu":
            return None
        stream: int = torch.cuda.current_stream(self._device).cuda_stream
        return stream


def _cause(error: BaseException, handled: BaseException | None) -> str:
    """What went wrong first, and where: the end of a capture that has failed fails in turn.
    `handled` had gone wrong before."""
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    where = traceback.extract_tb(error.__traceback__)
    text = (str(error) or type(error).__name__).splitlines()[0]
    return f"{text} ({Path(where[-1].filename).name}:{where[-1].lineno})" if where else text


def _truncate(tensor: VTensor, lengths: tuple[int, ...], stream: int | None) -> None:
    if len(set(lengths)) == 1:
        tensor.truncate(lengths[0], stream=stream)
        return
    for lane, length in enumerate(lengths):
        tensor.truncate(length, lanes=[lane], stream=stream)


# ---- for any loop -----------------------------------------------------------------


class CapturedStep:
    """What pyvmm.torch.capture() returns. `n_captures` counts the graphs: one for each set of
    input shapes and dtypes."""

    def __init__(
        self,
        fn: Callable[..., Any],
        tensors: tuple[VTensor, ...],
        device: torch.device,
        make_graph: type[Graph] | None,
    ) -> None:
        """Without `make_graph`, fn is called as it is."""
        self._fn = fn
        self._tensors = tensors
        self._device = device
        self._make_graph = make_graph
        self._recorded: dict[Any, tuple[Recorded, tuple[torch.Tensor, ...], list[Any]]] = {}
        self._turns = Turns(device)

    @property
    def n_captures(self) -> int:
        return len(self._recorded)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self._make_graph is None:
            return self._fn(*inputs)
        self._turns.begin()
        key = tuple((x.shape, x.dtype, x.device) for x in inputs)
        if key not in self._recorded:
            self._recorded[key] = self._record(inputs)
        recorded, held, outputs = self._recorded[key]
        for static, given in zip(held, inputs, strict=True):
            static.copy_(given)
        recorded.replay()
        return outputs[0]

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        assert self._make_graph is not None
        outputs: list[Any] = [None]
        with torch.inference_mode(False), torch.no_grad():
            held = tuple(x.detach().clone() for x in inputs)

            def run() -> None:
                outputs[0] = self._fn(*held)

            recorded = Recorded(run, self._tensors, self._device, self._make_graph)
            self._turns.add(*(x for x in held if x.is_cuda))
            return recorded, held, outputs


def tensors_of(cache: Any) -> Iterator[VTensor]:
    """The VTensors of a cache: one itself, anything that iterates over caches, an object with
    `key_tensor` and `value_tensor`, or with `layers` of these."""
    if isinstance(cache, VTensor):
        yield cache
    elif hasattr(cache, "key_tensor"):
        yield cache.key_tensor
        yield cache.value_tensor
    elif hasattr(cache, "layers"):
        for layer in cache.layers:
            yield from tensors_of(layer)
    elif isinstance(cache, Iterable):
        for part in cache:
            yield from tensors_of(part)
    else:
        raise TypeError(
            f"{type(cache).__name__} lists no VTensors: pass a list of them, or an object with "
            "key_tensor and value_tensor, or with layers of these"
        )
