"""make bench: every benchmark that has a C program or is a twin of one, and bench_length and
bench_concat, one after another, with a summary of what they wrote.

    python benchmarks/run.py [DEVICE] [--out FOLDER] [--only NAME ...] [--language c|python]
                             [--quick] [--limit SECONDS] [--summary]

A benchmark that fails, or takes longer than the limit, does not keep the next from running. The
summary is FOLDER/bench-MACHINE.md, ratios first, of all results of that machine in FOLDER.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from bench import RESULTS, format_ns, slug

from pyvmm._measure import Result, load
from pyvmm._report import progress

ROOT = Path(__file__).resolve().parent.parent
# In the order of what one wants to know first.
NAMES = (
    "append",
    "grow",
    "boundaries",
    "open",
    "append_many",
    "driver",
    "slack",
    "length",
    "read",
    "threads",
    "concat",
)


def commands(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    found = []
    for name in options.only or NAMES:
        program = ROOT / "build/benchmarks" / f"bench_{name}"
        script = ROOT / "benchmarks" / f"bench_{name}.py"
        if options.language != "python" and program.exists():
            found.append((f"{name}, C", [str(program)]))
        if options.language != "c" and script.exists():
            if name != "concat" or options.device == "host":
                found.append((f"{name}, Python", [sys.executable, str(script)]))
    return found


def cells(row: Result, p50: dict[str, float]) -> list[str]:
    base = p50.get(row["baseline"], 0)
    times_less = (
        f"{base / row['p50_ns']:.4g} × `{row['baseline']}`" if base and row["p50_ns"] else ""
    )
    tail = [format_ns(row[key]) if key in row else "" for key in ("p999_ns", "max_ns")]
    extra = ", ".join(f"{name} {value:.6g}" for name, value in row.get("extra", {}).items())
    medians = [format_ns(row["p50_ns"]), format_ns(row["p99_ns"])]
    return [f"`{row['id']}`", times_less, *medians, *tail, str(row["n"]), extra]


def summary(machine: str, results: list[Result]) -> str:
    lines = [
        f"# Benchmarks on {machine}",
        "",
        "One run each, by `make bench`; `benchmarks/bench_*.c` and `.py` say what is measured.",
    ]
    for result in results:
        lines += [
            "",
            f"## {result['benchmark']}, {result['language']}, on {result['device']}, version "
            f"{result['version']}",
            "",
            "| | times less than its baseline | p50 | p99 | p99.9 | max | samples | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        p50 = {row["id"]: row["p50_ns"] for row in result["rows"]}
        lines += [f"| {' | '.join(cells(row, p50))} |" for row in result["rows"]]
        lines += ["", f"Not measured: {result['not_measured']}."]
    return "\n".join(lines) + "\n"


def write_summaries(out: Path) -> list[Path]:
    """One for each machine that has results of `make bench` in the folder."""
    machines: dict[str, list[Result]] = {}
    for path, result in load([out]):
        if path.name.startswith(tuple(f"bench_{name}-" for name in NAMES)):
            machines.setdefault(result["machine"], []).append(result)
    paths = []
    for machine, results in machines.items():
        path = out / f"bench-{slug(machine)}.md"
        path.write_text(summary(machine, results))
        paths.append(path)
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("device", nargs="?", default="host")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=[], metavar="NAME")
    parser.add_argument("--language", choices=("c", "python"))
    parser.add_argument("--quick", action="store_true", help="few samples, for the tests")
    parser.add_argument("--summary", action="store_true", help="of what is in the folder, no more")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one benchmark")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    to_run = [] if options.summary else commands(options)
    outputs, failed = [], []
    with progress("benchmarks", len(to_run) or 1) as advance:
        for name, command in to_run:
            command += [options.device, "--out", str(options.out), *["--quick"] * options.quick]
            begin = time.perf_counter()
            try:
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=options.limit,
                )
                output, status = done.stdout, f"exit status {done.returncode}"
                if done.returncode:
                    failed.append(name)
            except subprocess.TimeoutExpired as error:
                output = (error.stdout or b"").decode(errors="replace")
                status = f"stopped after {options.limit:.0f} s"
                failed.append(name)
            seconds = time.perf_counter() - begin
            outputs.append(f"== {name}: {status}, {seconds:.0f} s\n{output}")
            advance(1)
    print("\n".join(outputs))
    for path in write_summaries(options.out):
        print(f"written: {path}")
    if failed:
        print(f"failed: {'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
