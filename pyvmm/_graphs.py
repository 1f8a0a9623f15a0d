"""A function of torch that appends to growing tensors, captured once and replayed."""

# torch has no types where it is not installed.
# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.dlpack import from_dlpack

from pyvmm._error import CapacityError, OutOfMemoryError
from pyvmm._tensor import VTensor

# Kernels may read whole tiles past the length: what they find there is mapped, and finite.
TILE = 256

# Two captures at once would each see the other's work.
_CAPTURE = threading.Lock()


class CannotCapture(RuntimeError):
    """What torch said while a step was captured. Nothing has changed by it."""


class Graph(Protocol):
    """What records a step and runs it again."""

    def __init__(self, device: torch.device) -> None: ...
    def record(self, run: Callable[[], None], warm_up: Callable[[], None]) -> None: ...
    def replay(self) -> None: ...
    def follow(self, tensors: Iterable[VTensor], n_rows: Iterable[int]) -> None: ...


class CudaGraph:
    """One torch.cuda.CUDAGraph, with memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def record(self, run: Callable[[], None], warm_up: Callable[[], None]) -> None:
        """`warm_up` runs first, on the stream of the capture: libraries initialise themselves,
        and compilers compile, where the graph must not see it."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            warm_up()
        stream.synchronize()
        with (
            _CAPTURE,
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
        ):
            run()

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()

    def follow(self, tensors: Iterable[VTensor], n_rows: Iterable[int]) -> None:
        """The host's lengths, after a replay that appended so many rows to each."""
        for tensor, n in zip(tensors, n_rows, strict=True):
            tensor.advance(n)


class EagerGraph:
    """Runs the function again instead: what the code around graphs is tested with where there
    is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self._run: Callable[[], None] | None = None

    def record(self, run: Callable[[], None], warm_up: Callable[[], None]) -> None:
        warm_up()
        self._run = run

    def replay(self) -> None:
        assert self._run is not None
        self._run()

    def follow(self, tensors: Iterable[VTensor], n_rows: Iterable[int]) -> None:
        """Nothing: the appends were not captured, and the lengths have followed."""


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
        self._lengths = [-1] * len(self.tensors)
        # Rows from which on nothing is known to be finite, for each tensor.
        self._clean = [0] * len(self.tensors)
        self.n_rows = [1] * len(self.tensors)
        # Replays before which at least one tensor was given memory.
        self.n_growths = 0
        self._device = device
        self._graph = make_graph(device)
        self._record(run)

    def _record(self, run: Callable[[], None]) -> None:
        for tensor in self.tensors:
            tensor.cursor  # noqa: B018  made here: a capture allocates nothing
        self._map_ahead()

        def warm_up() -> None:
            lengths = [tensor.lengths for tensor in self.tensors]
            try:
                run()
                self.n_rows = [
                    tensor.length - max(before)
                    for tensor, before in zip(self.tensors, lengths, strict=True)
                ]
            finally:
                for tensor, before in zip(self.tensors, lengths, strict=True):
                    _truncate(tensor, before, self._stream())

        handled = sys.exc_info()[1]  # the caller may be about to mend something else
        try:
            self._graph.record(run, warm_up)
        except (torch.OutOfMemoryError, MemoryError, CapacityError):
            raise
        except Exception as error:
            # Of any kind: compilers have their own, and the code that is recorded its.
            raise CannotCapture(_cause(error, handled)) from error
        self._lengths = [tensor.length for tensor in self.tensors]

    def replay(self) -> None:
        """Once more: memory ahead where there is none yet, the graph, the host's lengths.

        Raises pyvmm.CapacityError and pyvmm.OutOfMemoryError before anything has happened."""
        self._map_ahead()
        self._graph.replay()
        self._graph.follow(self.tensors, self.n_rows)
        self._lengths = [tensor.length for tensor in self.tensors]
        # For the next one, while the device is at this one. What fails is said when it is due.
        with contextlib.suppress(CapacityError, OutOfMemoryError):
            self._map_ahead()

    def _map_ahead(self) -> None:
        has_grown = False
        for i, tensor in enumerate(self.tensors):
            length, mapped = tensor.length, tensor.mapped
            if length != self._lengths[i] or mapped < self._clean[i]:
                self._clean[i] = length
            n_rows = length + self.n_rows[i]
            if n_rows > tensor.capacity:
                tensor.map(n_rows)  # raises CapacityError
            n_rows = min((n_rows + TILE - 1) // TILE * TILE + TILE, tensor.capacity)
            if self._clean[i] < n_rows:
                tensor.map(n_rows)
                has_grown |= tensor.mapped > mapped
                mapped = tensor.mapped
                fresh = mapped - self._clean[i]
                self._whole[i].narrow(tensor.axis, self._clean[i], fresh).zero_()
                self._clean[i] = mapped
        self.n_growths += has_grown

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

    @property
    def n_captures(self) -> int:
        return len(self._recorded)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self._make_graph is None:
            return self._fn(*inputs)
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

            return Recorded(run, self._tensors, self._device, self._make_graph), held, outputs


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
