"""python -m pyvmm info | demo | bench | plot"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyvmm
from pyvmm import _bench
from pyvmm._report import Table, show
from pyvmm._sizes import size_text

FRAMEWORKS = ("numpy", "torch", "cupy-cuda12x", "cupy-cuda13x", "jax", "paddlepaddle")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        return status
    except (ValueError, pyvmm.VMMError) as error:
        print(f"pyvmm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as behind `| head`; what is left to write goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m pyvmm", description="Tensors that grow in place: what runs here, and how."
    )
    top.add_argument("--version", action="version", version=f"pyvmm {pyvmm.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = commands.add_parser("info", help="version, drivers found and why not, devices")
    about.set_defaults(run=info)
    demo = commands.add_parser(
        "demo", help="a decode loop that grows its cache in place, against concatenate"
    )
    demo.add_argument("--device", help="host, cuda:N or hip:N; by default a GPU where there is one")
    demo.add_argument("--tokens", type=positive, metavar="N", help="tokens to decode")
    demo.add_argument(
        "--plot", type=Path, metavar="FILE", help="write time per token against length as a PNG"
    )
    demo.set_defaults(run=run_demo)
    bench = commands.add_parser(
        "bench", help="what growing, appending and opening cost on a device, against doing without"
    )
    bench.add_argument(
        "device", nargs="?", help="host, cuda:N or hip:N; by default a GPU where there is one"
    )
    bench.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="folder of the results (this one)"
    )
    bench.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(_bench.MEASUREMENTS)}"
    )
    bench.add_argument("--quick", action="store_true", help="few samples, to see that it runs")
    bench.set_defaults(run=run_bench)
    plot = commands.add_parser("plot", help="draw what the benchmarks measured")
    plot.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT", help="JSON files, or folders of them"
    )
    plot.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="folder of the pictures (this one)"
    )
    plot.add_argument("--format", choices=("png", "svg"), default="png")
    plot.set_defaults(run=run_plot)
    return top


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def run_demo(options: argparse.Namespace) -> int:
    from pyvmm import _demo

    return _demo.run(options.device, options.tokens, options.plot)


def run_bench(options: argparse.Namespace) -> int:
    return _bench.run(options.device, options.out, options.only, options.quick)


def run_plot(options: argparse.Namespace) -> int:
    from pyvmm import _plot

    return _plot.run(options.results, options.out, options.format)


def info(options: argparse.Namespace) -> int:
    found: list[Mapping[str, Any]] = [pyvmm.device_info("host")]
    drivers: list[Sequence[str]] = [("host", "yes")]
    notes: list[str] = []
    for kind in ("cuda", "hip"):
        devices, missing = find_devices(kind)
        found += devices
        drivers.append((kind, "yes" if devices else f"no: {missing}"))
        if devices and missing:
            notes.append(missing)
    print(f"pyvmm {pyvmm.__version__}, Python {platform.python_version()}, {installed()}")
    show(
        Table(
            "drivers",
            ("driver", "found"),
            drivers,
            align="ll",
        )
    )
    for note in notes:
        print(note)
    fields = [
        ("description", [str(device["description"]) for device in found]),
        ("granularity", [size_text(device["granularity_bytes"]) for device in found]),
        ("recommended", [size_text(device["recommended_bytes"]) for device in found]),
        ("largest reservation", [size_text(device["reservable_bytes"]) for device in found]),
        ("exportable handles", ["yes" if d["exportable_handles"] else "no" for d in found]),
        ("free memory", [size_text(device["free_bytes"]) for device in found]),
        ("total memory", [size_text(device["total_bytes"]) for device in found]),
        ("driver version", [driver_version(device) for device in found]),
        ("append kernel", [str(device["kernel"]) for device in found]),
    ]
    show(
        Table(
            "devices",
            ("", *(str(device["name"]) for device in found)),
            [(name, *values) for name, values in fields],
            align="l" * (1 + len(found)),
        )
    )
    return 0


def find_devices(kind: str) -> tuple[list[Mapping[str, Any]], str]:
    """What is known of each GPU of a kind, and why there is no (further) one."""
    found: list[Mapping[str, Any]] = []
    while True:
        try:
            found.append(pyvmm.device_info(f"{kind}:{len(found)}"))
        except pyvmm.VMMError as error:
            # Behind the last GPU there is none: that is no news.
            expected = error.status == "VMM_ERR_NO_DEVICE" and len(found) > 0
            return found, "" if expected else str(error)


def installed() -> str:
    """The frameworks that are installed, without importing them."""
    names = []
    for name in FRAMEWORKS:
        try:
            names.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return ", ".join(names)


def driver_version(device: Mapping[str, Any]) -> str:
    version: int = device["driver_version"]
    if device["kind"] == "hip":
        return f"HIP {version // 10_000_000}.{version // 100_000 % 100}"
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if version else "none"


if __name__ == "__main__":
    sys.exit(main())
