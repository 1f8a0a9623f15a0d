"""python -m pyvmm demo: a decode loop that grows its cache in place, against concatenate.

Both loops get the same new rows of K and V for each token. One appends them to two VTensors,
the other makes new arrays by concatenate. Times are wall clock; on a GPU the device is
synchronised around each stretch of tokens, not around each token.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pyvmm
from pyvmm import _plot
from pyvmm._measure import keep_large_blocks
from pyvmm._report import Table, progress, show

HEADS, DIM = 32, 128
STRETCHES = 64  # as many points in the plot
VARIETY = 16  # different rows; token i gets row i modulo this

Shape = tuple[int, int, int, int]
Rows = tuple[Any, Any]  # of K and of V, for one token


@dataclass(frozen=True)
class Arrays:
    """What the loop needs of an array library on one device."""

    label: str
    on_device: Callable[[Any], Any]  # of a NumPy array
    concatenate: Callable[[Any, Any], Any]  # along the tokens' axis
    equal: Callable[[pyvmm.VTensor, Any], bool]
    synchronize: Callable[[], None]


def numpy_arrays() -> Arrays:
    return Arrays(
        "numpy.concatenate",
        lambda array: array,
        lambda cache, new: np.concatenate((cache, new), axis=1),
        lambda tensor, cache: bool(np.array_equal(np.asarray(tensor), cache)),
        lambda: None,
    )


def torch_arrays(device: str) -> Arrays:
    import torch

    torch.zeros(1, device=device)  # fails here where torch has no CUDA
    return Arrays(
        "torch.cat",
        lambda array: torch.from_numpy(array).to(device),
        lambda cache, new: torch.cat((cache, new), dim=1),
        lambda tensor, cache: bool(torch.equal(torch.from_dlpack(tensor), cache)),
        (lambda: None) if device == "cpu" else (lambda: torch.cuda.synchronize(device)),
    )


def cupy_arrays(device: str) -> Arrays:
    import cupy

    cupy.cuda.Device(int(device.partition(":")[2])).use()
    cupy.zeros(1)
    return Arrays(
        "cupy.concatenate",
        cupy.asarray,
        lambda cache, new: cupy.concatenate((cache, new), axis=1),
        lambda tensor, cache: bool(cupy.array_equal(cupy.from_dlpack(tensor), cache)),
        lambda: cupy.cuda.get_current_stream().synchronize(),
    )


def find_arrays(device: str) -> tuple[Arrays | None, str]:
    """The library to concatenate with, or why there is none."""
    if device == "host":
        return numpy_arrays(), ""
    reasons = []
    for name, make in (("torch", torch_arrays), ("cupy", cupy_arrays)):
        try:
            return make(device), ""
        except ImportError:
            reasons.append(f"{name} is not installed")
        except Exception as error:  # whatever a framework without a usable CUDA raises
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            reasons.append(f"{name} cannot use {device} ({reason})")
    return None, " and ".join(reasons)


def find_device() -> str:
    """A GPU where there is one."""
    try:
        pyvmm.device_info("cuda:0")
    except pyvmm.VMMError:
        return "host"
    return "cuda:0"


@dataclass
class Point:
    """One stretch of tokens: its end, what a token took, and the books of K and V."""

    length: int
    microseconds: float
    mapped_bytes: int = 0
    used_bytes: int = 0
    driver_calls: int = 0


def stretches(tokens: int) -> Iterator[range]:
    step = -(-tokens // STRETCHES)
    for begin in range(0, tokens, step):
        yield range(begin, min(begin + step, tokens))


def books(tensors: tuple[pyvmm.VTensor, ...]) -> tuple[int, int, int]:
    """Mapped and used bytes, and driver calls other than the copies themselves."""
    mapped = used = calls = 0
    for tensor in tensors:
        stats = tensor.stats()
        mapped += stats["mapped_bytes"]
        used += stats["used_bytes"]
        by_name = stats["driver_calls"]
        copies = ("copy", "launch", "stream_synchronize", "stream_capture")
        calls += sum(n for name, n in by_name.items() if name not in copies)
    return mapped, used, calls


def grow_in_place(
    tensors: tuple[pyvmm.VTensor, pyvmm.VTensor],
    rows: list[Rows],
    tokens: int,
    synchronize: Callable[[], None],
) -> list[Point]:
    points = []
    with progress("append in place", tokens) as advance:
        for stretch in stretches(tokens):
            synchronize()
            begin = time.perf_counter()
            for token in stretch:
                pyvmm.append_many(tensors, rows[token % VARIETY])
            synchronize()
            taken = time.perf_counter() - begin
            points.append(Point(stretch.stop, taken / len(stretch) * 1e6, *books(tensors)))
            advance(len(stretch))
    return points


def concatenate(arrays: Arrays, rows: list[Rows], tokens: int) -> tuple[list[Point], Rows]:
    points = []
    keys = values = None
    with progress(arrays.label, tokens) as advance:
        for stretch in stretches(tokens):
            arrays.synchronize()
            begin = time.perf_counter()
            for token in stretch:
                new_keys, new_values = rows[token % VARIETY]
                if token == 0:
                    keys, values = new_keys, new_values
                    continue
                keys = arrays.concatenate(keys, new_keys)
                values = arrays.concatenate(values, new_values)
            arrays.synchronize()
            taken = time.perf_counter() - begin
            points.append(Point(stretch.stop, taken / len(stretch) * 1e6))
            advance(len(stretch))
    return points, (keys, values)


def warm_up(
    arrays: Arrays | None, rows: list[Rows], shape: Shape, tokens: int, device: str
) -> None:
    """Once through everything that is slow the first time: memory that the machine has not
    handed out yet, kernels that are loaded at their first launch, allocators."""
    with (
        pyvmm.empty(shape, "float16", axis=1, capacity=tokens, device=device) as keys,
        pyvmm.empty(shape, "float16", axis=1, capacity=tokens, device=device) as values,
    ):
        for tensor in (keys, values):
            tensor.map(tokens)
        for new in rows[:tokens]:
            pyvmm.append_many((keys, values), new)
    if arrays:
        for new_keys, new_values in rows:
            arrays.concatenate(new_keys, new_values)
        arrays.synchronize()


def format_ratio(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:,.0f}"


def results(in_place: list[Point], moved: list[Point], label: str) -> Table:
    names = (
        "tokens",
        "µs in place",
        "µs concat",
        "ratio",
        "mapped MiB",
        "used MiB",
        "driver calls",
    )
    table = Table(
        "time per token by length of the cache",
        names,
        caption=f"µs for K and V of one token, means over {in_place[0].length} tokens; concat: "
        f"{label}; driver calls so far, the copies themselves not counted",
    )
    n = len(in_place)
    for i in sorted({max(n * k // 16 - 1, 0) for k in (1, 2, 4, 8, 12, 16)}):
        point = in_place[i]
        other = ratio = "-"
        if moved:
            other = f"{moved[i].microseconds:.1f}"
            ratio = format_ratio(moved[i].microseconds / point.microseconds)
        table.rows.append(
            (
                f"{point.length}",
                f"{point.microseconds:.1f}",
                other,
                ratio,
                f"{point.mapped_bytes / 2**20:.1f}",
                f"{point.used_bytes / 2**20:.1f}",
                f"{point.driver_calls}",
            )
        )
    return table


def run(device: str | None, tokens: int | None, plot: Path | None) -> int:
    reason = _plot.check(plot) if plot else ""
    if reason:
        print(f"pyvmm: {reason}", file=sys.stderr)
        return 2
    device = device or find_device()
    info = pyvmm.device_info(device)
    device = info["name"]
    is_host = device == "host"
    batch = 1 if is_host else 8
    tokens = tokens or (2048 if is_host else 4096)
    arrays, reason = find_arrays(device)
    if is_host:
        keep_large_blocks()

    shape = (batch, 1, HEADS, DIM)
    generator = np.random.default_rng(1)
    on_device = arrays.on_device if arrays else lambda array: array

    def new_row() -> Any:
        return on_device(generator.standard_normal(shape, np.float32).astype(np.float16))

    rows = [(new_row(), new_row()) for _ in range(VARIETY)]
    print(
        f"pyvmm {pyvmm.__version__} on {device} ({info['description']}): K and V of one layer, "
        f"float16, batch {batch}, {HEADS} heads of {DIM}, {tokens} tokens"
    )

    empty_shape = (batch, 0, HEADS, DIM)
    warm_up(arrays, rows, empty_shape, tokens, device)
    with (
        pyvmm.empty(empty_shape, "float16", axis=1, capacity=tokens, device=device) as keys,
        pyvmm.empty(empty_shape, "float16", axis=1, capacity=tokens, device=device) as values,
    ):
        addresses = keys.ptr, values.ptr
        in_place = grow_in_place(
            (keys, values), rows, tokens, arrays.synchronize if arrays else lambda: None
        )
        if arrays is None:
            print(f"nothing to compare with on {device}: {reason}")
            show(results(in_place, [], "none"))
            finish(plot, in_place, [], "", info["description"])
            return 0
        moved, caches = concatenate(arrays, rows, tokens)
        equal = all(
            arrays.equal(tensor, cache)
            for tensor, cache in zip((keys, values), caches, strict=True)
        )
        still = addresses == (keys.ptr, values.ptr)
    show(results(in_place, moved, arrays.label))
    print(f"both caches hold the same {tokens} tokens" if equal else "THE CACHES DIFFER")
    print(f"the address of K: {hex(addresses[0])}, {'as' if still else 'NOT as'} at the beginning")
    finish(plot, in_place, moved, arrays.label, info["description"])
    return 0 if equal and still else 1


def finish(
    plot: Path | None, in_place: list[Point], moved: list[Point], label: str, machine: str
) -> None:
    if not plot:
        return
    curves = [("append in place", in_place)] + ([(label, moved)] if moved else [])
    _plot.time_per_token(
        plot,
        f"K and V of one token, {machine}",
        [
            (name, [point.length for point in points], [point.microseconds for point in points])
            for name, points in curves
        ],
    )
    print(f"written: {plot}")
