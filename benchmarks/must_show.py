"""What the library promises of its speed, from the results of one run: target, figure, met or not.

    python benchmarks/must_show.py FOLDER [--out FILE.md]

FOLDER holds what benchmarks/gpu.sh wrote (points 1 to 7, on one NVIDIA H100) or what `make bench`
and bench_transformers.py wrote on a host (point 8). What a result is missing for says so. Exits
with 1 if a figure misses its target, 0 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench import format_ns

from pyvmm._measure import Result, load


class Missing(Exception):
    """A figure that this run does not have."""


@dataclass
class Row:
    point: str
    what: str
    target: str
    figure: str
    met: bool | None  # None: nothing to compare


@dataclass
class Run:
    results: dict[tuple[str, str], Result] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def row(self, benchmark: str, language: str, id: str) -> Result:
        result = self.results.get((benchmark, language))
        if result is None:
            raise Missing(f"no result of {benchmark} ({language})")
        for row in result["rows"]:
            if row["id"] == id:
                found: Result = row
                return found
        raise Missing(f"{benchmark} ({language}) has no row {id}")

    def p50(self, benchmark: str, language: str, id: str) -> float:
        return float(self.row(benchmark, language, id)["p50_ns"])

    def extra(self, benchmark: str, language: str, id: str, name: str) -> float:
        try:
            return float(self.row(benchmark, language, id)["extra"][name])
        except KeyError:
            raise Missing(f"{benchmark} ({language}), {id}: no {name}") from None

    def show(
        self, point: str, what: str, target: str, measure: Callable[[], tuple[str, bool | None]]
    ) -> None:
        try:
            figure, met = measure()
        except Missing as missing:
            figure, met = f"not measured: {missing}", None
        self.rows.append(Row(point, what, target, figure, met))


def at_most(run: Run, point: str, what: str, ns: Callable[[], float], most: float) -> None:
    def measure() -> tuple[str, bool]:
        value = ns()
        return format_ns(value), value <= most

    run.show(point, what, f"≤ {format_ns(most)}", measure)


def times_less(
    run: Run,
    point: str,
    what: str,
    base: Callable[[], float],
    ours: Callable[[], float],
    least: float,
) -> None:
    def measure() -> tuple[str, bool]:
        a, b = base(), ours()
        return f"{a / b:.4g} ({format_ns(b)} against {format_ns(a)})", a / b >= least

    run.show(point, what, f"≥ {least:g} times less", measure)


def point_1(run: Run) -> None:
    c, python = "c", "python"
    at_most(run, "1", "grow(1) in C", lambda: run.p50("bench_grow", c, "grow/within/16KiB"), 15)
    at_most(
        run,
        "1",
        "grow(1) in Python",
        lambda: run.p50("bench_grow", python, "grow/within/16KiB"),
        150,
    )

    for id, what in (("host/append", "a torch row"), ("host/append/vtensor", "a VTensor's row")):

        def host(id: str = id) -> tuple[str, bool]:
            bare, ours = (run.p50("gpu_append", python, row) for row in (f"base/{id}", id))
            return f"{format_ns(ours)}, bare {format_ns(bare)}", ours <= bare + 800

        run.show(
            "1",
            f"append of {what} from Python, host time",
            "≤ a bare launch of the same process + 800 ns",
            host,
        )
    for layout, most in (("seq", 2200), ("lane", 2800)):
        for size in ("2KiB", "16KiB", "64KiB"):
            id = f"device/append-k/{layout}/{size}"
            at_most(
                run,
                "1",
                f"device time a node, layout {layout}, {size}",
                lambda id=id: run.p50("gpu_append", python, id),  # type: ignore[misc]
                most,
            )

    def launches() -> tuple[str, bool]:
        n = run.extra("bench_append_many", c, "append-many/2x16KiB", "launches_per_call")
        return f"{n:g}", n <= 1

    run.show("1", "launches for K and V together", "1", launches)


def point_2(run: Run) -> None:
    def p50(id: str) -> Callable[[], float]:
        return lambda: run.p50("gpu_append", "python", id)

    times_less(
        run,
        "2",
        "append of K and V against torch.cat, (8, 32, 4096), device time",
        p50("device/cat-k-and-v"),
        p50("device/append-k-and-v/seq"),
        150,
    )
    times_less(
        run,
        "2",
        "the same at (32, 8, 65536)",
        p50("device/cat-k-and-v/long"),
        p50("device/append-k-and-v/long"),
        2500,
    )


def point_3(run: Run) -> None:
    benchmark = "bench_boundaries"
    for name, base in (("on", "base/cuLaunchKernel"), ("paced", "base/cuLaunchKernel/paced")):
        for key, percentile in (("p99_ns", "p99"), ("p999_ns", "p99.9")):

            def tail(name: str = name, base: str = base, key: str = key) -> tuple[str, bool]:
                ours, bare = run.row(benchmark, "c", f"{name}/all"), run.row(benchmark, "c", base)
                if key not in ours or key not in bare:
                    raise Missing("too few samples")
                ratio = ours[key] / bare[key]
                text = f"{ratio:.3g} ({format_ns(ours[key])}, bare {format_ns(bare[key])})"
                return text, ratio <= 1.5

            what = f"{percentile} of appends, look-ahead on, C"
            if name == "paced":
                what += ", 10 us of work between appends"
            run.show("3", what, "≤ 1.5 of as many bare launches", tail)

    def largest() -> tuple[str, None]:
        rows = [run.row(benchmark, "c", id) for id in ("on/all", "off/all", "base/cuLaunchKernel")]
        return " / ".join(format_ns(row["max_ns"]) for row in rows if "max_ns" in row), None

    run.show("3", "max: look-ahead on / off / bare launches", "beside it", largest)

    def boundaries() -> tuple[str, bool]:
        on = run.row(benchmark, "c", "on/boundary")
        off = run.row(benchmark, "c", "off/boundary")
        n = on["extra"]["boundaries"]
        text = f"{n:g}; p50, p99: {format_ns(on['p50_ns'])}, {format_ns(on['p99_ns'])}; off: "
        return f"{text}{format_ns(off['p50_ns'])}, {format_ns(off['p99_ns'])}", n >= 5000

    run.show("3", "boundary appends, look-ahead on", "≥ 5000", boundaries)
    for language in ("c", "python"):

        def calls(language: str = language) -> tuple[str, bool]:
            n, appends, paced = (
                run.extra(benchmark, language, f"{name}/boundary", key)
                for name, key in (
                    ("on", "mapping_calls_by_caller"),
                    ("on", "boundaries_mapped_by_caller"),
                    ("paced", "mapping_calls_by_caller"),
                )
            )
            text = f"{n:g}, in {appends:g} appends"
            return f"{text}; with 10 us between appends {paced:g}", n == 0

        run.show("3", f"create, map, access on the calling thread, {language}", "none", calls)


def point_4(run: Run) -> None:
    names = ("create", "map", "set_access", "unmap")
    for language in ("c", "python"):

        def calls(language: str = language) -> tuple[str, bool]:
            counts = {
                name: run.extra("bench_open", language, "open/again", f"calls_{name}")
                + run.extra("bench_open", language, "map/again", f"calls_{name}")
                for name in (*names, "event_record", "fence", "event_query")
            }
            text = ", ".join(f"{name} {count:g}" for name, count in counts.items() if count)
            records = counts["event_record"] + counts["fence"]
            free = not any(counts[name] for name in names)
            return text or "none", free and records <= 1 and counts["event_query"] <= 1

        run.show(
            "4",
            f"driver calls of open and map after close, 1 GiB, {language}",
            "no create, map, access, unmap; ≤ 1 record, ≤ 1 query",
            calls,
        )
    at_most(
        run, "4", "open after close, C", lambda: run.p50("bench_open", "c", "open/again"), 10_000
    )
    at_most(
        run,
        "4",
        "open after close, Python",
        lambda: run.p50("bench_open", "python", "open/again"),
        10_000,
    )


def point_5(run: Run) -> None:
    for arrangement in ("separate", "together"):
        for size in ("auto", "2MiB", "16MiB", "32MiB", "128MiB"):

            def slack(id: str = f"{arrangement}/{size}") -> tuple[str, None]:
                row = run.row("bench_slack", "c", id)
                extra = row["extra"]
                return (
                    f"{extra['slack_bytes_mean'] / 2**20:.1f} MiB mean, "
                    f"{extra['slack_bytes_most'] / 2**20:.1f} most; "
                    f"{extra['driver_calls_per_token']:.3g} calls a token, "
                    f"{extra['launches_per_token']:g} launches; {format_ns(row['p50_ns'])} a token"
                ), None

            run.show("5", f"32 layers, {arrangement}, blocks {size}", "the figures", slack)


def point_6(run: Run) -> None:
    def rate(id: str) -> float:
        return run.extra("peers", "python", id, "bytes_per_second") / 2**30

    peers = [
        f"{name}/{size}{how}"
        for name, hows in (
            ("kvcached", ("", "/once")),
            ("cuda.core", ("", "/grow")),
            ("torch", ("",)),
        )
        for size in ("2MiB", "32MiB")
        for how in hows
    ]
    for peer in peers:
        size = peer.split("/")[1]
        ours = f"pyvmm/{size}{'/once' if peer.endswith('/once') else ''}"

        compared = not peer.startswith("torch")

        def throughput(
            peer: str = peer, ours: str = ours, compared: bool = compared
        ) -> tuple[str, bool | None]:
            try:
                theirs = rate(peer)
            except Missing:
                attempts = run.results.get(("peers", "python"), {}).get("attempts", {})
                of_peer = attempts.get(peer.split("/")[0], {})
                error = of_peer.get("error") or (
                    of_peer.get("modify_allocation") if peer.endswith("/grow") else None
                )
                if error:
                    return f"could not run: {error.splitlines()[0][:150]}", None
                raise
            mine = rate(ours)
            text = f"{mine / theirs:.3g} ({mine:.1f} against {theirs:.1f} GiB/s)"
            return text, mine >= theirs if compared else None

        target = "≥ 1" if compared else "beside it"
        run.show("6", f"mapping throughput, {ours} over {peer}", target, throughput)


def point_7(run: Run) -> None:
    result = run.results.get(("gpu_replay", "python"))

    def right() -> tuple[str, bool]:
        if result is None:
            raise Missing("no result of gpu_replay")
        failures = result["failures"]
        growths = run.extra("gpu_replay", "python", "replay/ours", "blocks_mapped")
        text = f"{result['replays']} replays, {growths:g} blocks mapped"
        return "; ".join([text, *failures]), not failures and result["replays"] >= 10_000

    run.show(
        "7", "captured append through growth; overflow", "10 000, right to the last byte", right
    )

    for name, what in (("ours", "GraphPins"), ("ours/kept-by-graph", "the graph itself")):

        def host(name: str = name) -> tuple[str, bool | None]:
            ours, bare = (run.p50("gpu_replay", "python", f"replay/{x}") for x in (name, "bare"))
            text = f"{ours / bare:.3f} ({format_ns(ours)}, bare {format_ns(bare)})"
            return text, ours <= 1.1 * bare if name == "ours" else None

        run.show(
            "7",
            f"host time a replay, with map() and advance(); tensors kept by {what}",
            "≤ 1.1 of the graph alone" if name == "ours" else "beside it",
            host,
        )


def point_8(run: Run) -> None:
    for length in (1024, 8192, 32768):
        for library in ("numpy.concatenate", "torch.cat"):

            def ratio(library: str = library, length: int = length) -> tuple[str, None]:
                base = run.p50("bench_length", "python", f"base/{library}/{length}")
                ours = run.p50("bench_length", "python", f"append/{length}")
                return (
                    f"{base / ours:.4g} times ({format_ns(ours)} against {format_ns(base)})",
                    None,
                )

            run.show("8", f"append of 16 KiB at {length} rows against {library}", "ratios", ratio)
    for context in (8192, 32768):

        def step(context: int = context) -> tuple[str, bool]:
            ours = run.p50("bench_transformers", "python", f"step/{context}/VMMCache")
            bound = run.p50("bench_transformers", "python", f"step/{context}/bound")
            ratio = ours / bound
            return f"{ratio:.3f} ({format_ns(ours)}, bound {format_ns(bound)})", ratio <= 1.05

        run.show("8", f"decode step at {context}, VMMCache / preallocated", "≤ 1.05", step)


POINTS = {
    "1": point_1,
    "2": point_2,
    "3": point_3,
    "4": point_4,
    "5": point_5,
    "6": point_6,
    "7": point_7,
    "8": point_8,
}


def table(run: Run) -> str:
    devices = sorted({str(result["device"]) for result in run.results.values()})
    machines = sorted({str(result["machine"]) for result in run.results.values()})
    lines = [
        f"# What was to be shown, on {', '.join(devices)}: {'; '.join(machines)}",
        "",
        "| | what | target | measured | met |",
        "|---|---|---|---|---|",
    ]
    words = {True: "yes", False: "NO", None: ""}
    for row in run.rows:
        cells = (row.point, row.what, row.target, row.figure, words[row.met])
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    n = {met: sum(row.met is met for row in run.rows) for met in (True, False, None)}
    lines += ["", f"{n[True]} met, {n[False]} not met, {n[None]} without a target or not measured."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="must_show.py")
    parser.add_argument("results", nargs="+", type=Path, help="JSON files, or folders of them")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    parser.add_argument("--device", help="results of this device alone: cuda:0")
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    options = parser.parse_args()
    run = Run()
    try:
        for _, result in load(options.results):
            if options.device in (None, result["device"]):
                run.results[result["benchmark"], result["language"]] = result
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for point in options.points:
        POINTS[point](run)
    text = table(run)
    print(text, end="")
    if options.out:
        options.out.write_text(text)
    return 1 if any(row.met is False for row in run.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
