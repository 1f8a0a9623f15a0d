"""What the Python benchmarks share; bench.h in Python. Results have the same form and ids."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

try:
    import pyvmm
except ModuleNotFoundError:  # built in place and not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import pyvmm

RESULTS = Path(__file__).resolve().parent / "results"


def keep_large_blocks() -> None:
    """Tell glibc to keep what is freed: else every concatenation faults its pages in anew,
    which would flatter what grows in place."""
    mallopt = ctypes.CDLL(None).mallopt
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


class Bench:
    """Rows of one benchmark, printed as they come and written as JSON by `close`."""

    def __init__(
        self, name: str, not_measured: str, device: str | None = None, out: Path | None = None
    ) -> None:
        if device is None or out is None:
            parser = argparse.ArgumentParser(prog=name)
            parser.add_argument("device", nargs="?", default="host")
            parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
            options = parser.parse_args()
            device, out = options.device, options.out
        self.name, self.not_measured, self.out = name, not_measured, Path(out)
        self.device = str(device)
        info = pyvmm.device_info(self.device)
        self.is_cuda = self.device.startswith("cuda")
        self.machine = f"{info['description']}, {cpu_name()}" if self.is_cuda else cpu_name()
        self.rows: list[dict[str, object]] = []
        self._p50: dict[str, float] = {}
        print(f"{name}, pyvmm {pyvmm.__version__} on {self.device}: {self.machine}")
        print(f"{'':<36} {'p50':>12} {'p99':>12} {'samples':>9}  times less than")

    def report(self, id: str, samples_ns: Iterable[float], baseline: str = "") -> float:
        ordered = sorted(samples_ns)
        p50 = ordered[len(ordered) // 2]
        p99 = ordered[(len(ordered) * 99 - 1) // 100]
        self._p50[id] = p50
        self.rows.append(
            {"id": id, "baseline": baseline, "p50_ns": p50, "p99_ns": p99, "n": len(ordered)}
        )
        line = f"{id:<36} {format_ns(p50):>12} {format_ns(p99):>12} {len(ordered):>9}"
        if baseline in self._p50:
            line += f"  {self._p50[baseline] / p50:.4g} x {baseline}"
        print(line, flush=True)
        return p50

    def close(self, **more: object) -> None:
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


def timed(call: Callable[[], object], times: int = 1) -> float:
    """Nanoseconds for one call, the mean of `times`."""
    begin = time.perf_counter_ns()
    for _ in range(times):
        call()
    return (time.perf_counter_ns() - begin) / times
