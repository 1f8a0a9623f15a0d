"""What the Python benchmarks share: where pyvmm is, arguments, its measuring (pyvmm/_measure.py).

A benchmark is a script: bench_x.py [DEVICE] [--out FOLDER] [--quick]. Where bench_x.c is its twin,
ids are the same but for baselines, which begin with "base/", and what one language alone has,
which begins with a framework's name.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path

try:
    import pyvmm  # noqa: F401
except ModuleNotFoundError:  # built in place and not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyvmm import _bench, _measure
from pyvmm._measure import cpu_name, format_ns, keep_large_blocks, slug, timed

__all__ = [
    "Bench",
    "bare_launches",
    "cpu_name",
    "format_ns",
    "keep_large_blocks",
    "slug",
    "timed",
    "twin",
]

RESULTS = Path(__file__).resolve().parent / "results"


def arguments(name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("device", nargs="?", default="host")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--quick", action="store_true", help="few samples, for the tests")
    return parser.parse_args()


class Bench(_measure.Bench):
    """Takes device and folder from the command line where they are not given."""

    def __init__(
        self, name: str, not_measured: str, device: str | None = None, out: Path | None = None
    ) -> None:
        quick = False
        if device is None or out is None:
            options = arguments(name)
            device, out, quick = options.device, options.out, options.quick
        super().__init__(name, not_measured, device, out, quick)


def bare_launches(index: int, stream: int, times: int) -> float:
    """Nanoseconds of a bare launch with the append kernel's signature, from C, in this process, the
    mean of `times`: bare_launch.c. Not more than a GPU's queue takes, or they wait for it.

    Raises OSError where `make bench-programs` has not been run."""
    library = ctypes.CDLL(str(RESULTS.parent.parent / "build/benchmarks/libbare_launch.so"))
    library.bare_launches.restype = ctypes.c_double
    return float(library.bare_launches(index, ctypes.c_void_p(stream), times))


def twin(name: str) -> None:
    """Run one of those that pyvmm has itself."""
    options = arguments(f"bench_{name}")
    _bench.measure(name, options.device, options.out, options.quick)
