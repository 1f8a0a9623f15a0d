"""What measurements share: clocks, percentiles, a table as they come, and results as JSON.

A result is a file: what was measured, where, and rows. A row has an id, the median and the 99th
percentile of its samples, from 1000 samples on also the 99.9th and the maximum, the id of the row
it is to be compared with, and under "extra" counts and sizes, their units in their names. Rows
whose ids begin with "base/" are those baselines. The C benchmarks write the same: bench.h.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pyvmm

MANY = 1000  # samples from which p99.9 and the maximum say something
IN_FLIGHT = 256  # launches that fit a GPU's queue without the caller waiting for room

Result = dict[str, Any]


def keep_large_blocks() -> None:
    """Tell glibc to keep what is freed: else every concatenate on the host faults its pages in
    anew, and the comparison would flatter what grows in place."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**31 - 1)


def cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return f"{found[1] if found else 'CPU'}, {os.cpu_count()} cores"


def slug(machine: str) -> str:
    return re.sub("[^a-z0-9]+", "-", machine.split(",")[0].lower()).strip("-")


def format_ns(ns: float) -> str:
    for unit, size in (("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.2f} {unit}"
    return f"{ns:.1f} ns"


def timed(call: Callable[[], object], times: int = 1) -> float:
    """Nanoseconds for one call, the mean of `times`."""
    begin = time.perf_counter_ns()
    for _ in itertools.repeat(None, times):
        call()
    return (time.perf_counter_ns() - begin) / times


class Bench:
    """Rows of one benchmark, printed as they come and written as JSON by `close`.

    `quick`: few samples of everything, for the tests; the figures mean nothing.
    """

    def __init__(
        self, name: str, not_measured: str, device: str, out: Path, quick: bool = False
    ) -> None:
        info = pyvmm.device_info(device)
        self.name, self.not_measured, self.out, self.quick = name, not_measured, Path(out), quick
        self.device: str = info["name"]
        self.is_gpu = info["kind"] != "host"
        self.is_cuda = info["kind"] == "cuda"
        self.machine = f"{info['description']}, {cpu_name()}" if self.is_gpu else cpu_name()
        self.rows: list[Result] = []
        self._p50: dict[str, float] = {}
        self._to_wait: pyvmm.VTensor | None = None
        print(f"{name}, pyvmm {pyvmm.__version__} on {self.device}: {self.machine}")
        print(f"{'':<36} {'p50':>10} {'p99':>10} {'samples':>8}  times less than")

    def times(self, n: int) -> int:
        """`n`, or a few of them where only the way through counts."""
        return n if not self.quick else n // 50 if n > 100 else min(n, 2)

    def report(
        self, id: str, samples_ns: Iterable[float], baseline: str = "", **extra: float
    ) -> float:
        ordered = sorted(samples_ns)
        n = len(ordered)
        p50, p99 = ordered[n // 2], ordered[(n * 99 - 1) // 100]
        row: Result = {"id": id, "baseline": baseline, "p50_ns": p50, "p99_ns": p99}
        if n >= MANY:
            row |= {"p999_ns": ordered[(n * 999 - 1) // 1000], "max_ns": ordered[-1]}
        row["n"] = n
        if extra:
            row["extra"] = extra
        self._p50[id] = p50
        self.rows.append(row)
        line = f"{id:<36} {format_ns(p50):>10} {format_ns(p99):>10} {n:>8}"
        if baseline in self._p50:
            line += f"  {self._p50[baseline] / p50:.4g} x {baseline}"
        print(line, flush=True)
        return p50

    def wait(self, stream: int | None = None) -> None:
        """Until what was submitted to the stream is done. Needs no framework: appending from host
        memory returns when it has been read."""
        if not self.is_gpu:
            return
        if self._to_wait is None:
            self._to_wait = pyvmm.empty((0, 1), "uint8", axis=0, capacity=1, device=self.device)
        self._to_wait.append(np.ones((1, 1), np.uint8), stream=stream)
        self._to_wait.truncate(0)

    def source(self, shape: Sequence[int], dtype: str = "uint8") -> Any:
        """An array of that shape, one row along dimension 0, where the device reads it best."""
        array = np.ones(shape, dtype)
        if not self.is_gpu:
            return array
        t = pyvmm.empty((0, *shape[1:]), dtype, axis=0, capacity=1, device=self.device)
        t.append(array)
        return t

    def close(self, **more: object) -> Path:
        if self._to_wait is not None:
            self._to_wait.close()
        print(f"not measured: {self.not_measured}")
        result = {
            "benchmark": self.name,
            "language": "python",
            "machine": self.machine,
            "device": self.device,
            "version": pyvmm.__version__,
            "not_measured": self.not_measured,
            "rows": self.rows,
            **more,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.name}-python-{slug(self.machine)}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {path}")
        return path


def load(paths: Iterable[Path]) -> Iterator[tuple[Path, Result]]:
    """The results in these files, and in the JSON files of these folders.

    Raises ValueError for a file that is named and holds none.
    """
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        for file in files:
            try:
                result = json.loads(file.read_text())
                rows = result["rows"]
                well_formed = all("id" in row and "p50_ns" in row for row in rows)
            except FileNotFoundError:
                raise ValueError(f"{file}: there is no such file") from None
            except (OSError, ValueError, KeyError, TypeError):
                well_formed = False
            if well_formed:
                yield file, result
            elif not path.is_dir():
                raise ValueError(f"{file} holds no result of a benchmark")
