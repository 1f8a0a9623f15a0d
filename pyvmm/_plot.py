"""Pictures: the demo's, and `python -m pyvmm plot` of what benchmarks measured. matplotlib is
imported here and nowhere else.

What a row of a result can be drawn as lies in its "extra": `length` with its time, `length` with
`mapped_bytes`, `block_bytes` with its time; and of any row with a 99.9th percentile, its tail.
Of a result with "steps", a model's steps by cache (benchmarks/captured_decode.py), bars.
A curve is the rows whose ids differ in their last part alone: append/1024, append/2048.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pyvmm._measure import Result, load, slug
from pyvmm._sizes import size_text

Curve = tuple[str, Sequence[float], Sequence[float]]  # label, x, y
MISSING = "matplotlib is not installed: pip install 'pyvmm[plot]'"


def check(path: Path) -> str:
    """Why `path` cannot be drawn, or nothing: asked before the work, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "--plot needs matplotlib: pip install 'pyvmm[plot]'"
    if not path.resolve().parent.is_dir():
        return f"--plot: there is no folder {path.resolve().parent}"
    return ""


def time_per_token(
    path: Path, title: str, curves: Sequence[tuple[str, Sequence[int], Sequence[float]]]
) -> None:
    """Write a PNG of µs per token against length, one curve for each (label, x, y)."""
    picture = _Picture(title, "length of the cache, tokens", "time per token, µs (logarithmic)")
    picture.axes.set_yscale("log")
    for label, lengths, times in curves:
        picture.axes.plot(lengths, times, label=label, linewidth=1.8)
    picture.save(path)


class _Picture:
    def __init__(self, title: str, x: str, y: str) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(self.figure)
        self.axes: Any = self.figure.add_subplot()
        self.axes.set_title(title, fontsize="medium")
        self.axes.set_xlabel(x)
        self.axes.set_ylabel(y)
        self.axes.grid(True, which="both", alpha=0.25)

    def save(self, path: Path) -> None:
        if len(self.axes.get_lines()) > 8:
            self.axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
        else:
            self.axes.legend(fontsize="small")
        import matplotlib

        # Without the date and random ids, so that the same result makes the same file.
        with matplotlib.rc_context({"svg.hashsalt": "pyvmm"}):
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            self.figure.savefig(path, dpi=120, metadata=metadata)


# ---- python -m pyvmm plot -----------------------------------------------------------------------


def run(results: list[Path], out: Path, form: str) -> int:
    """Draw what can be drawn of each result. Returns 1 where that is nothing, 2 without
    matplotlib. Raises ValueError for a file that holds no result."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        import sys

        print(f"pyvmm plot: {MISSING}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for _, result in load(results):
        name = f"{result['benchmark']}-{result['language']}-{slug(result['machine'])}"
        for what, draw in DRAWINGS.items():
            path = out / f"{name}-{what}.{form}"
            if draw(result, path):
                print(f"written: {path}")
                drawn += 1
    if not drawn:
        print(
            "nothing to draw: no row has a length, a block size or a 99.9th percentile, and there "
            "are no steps"
        )
    return 0 if drawn else 1


def title(result: Result, what: str) -> str:
    where = f"{result['benchmark']} ({result['language']}), {result['machine']}"
    return f"{what}\n{where}, pyvmm {result['version']}"


def curves(rows: Iterable[Result], x: str, y: Callable[[Result], float | None]) -> list[Curve]:
    """By id without its last part; ordered by x. Single points are no curve."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        at, value = row.get("extra", {}).get(x), y(row)
        if at is not None and value is not None:
            found.setdefault(row["id"].rpartition("/")[0], []).append((at, value))
    made: list[Curve] = []
    for label, points in found.items():
        if len(points) > 1:
            points.sort()
            made.append((label, [at for at, _ in points], [value for _, value in points]))
    return made


def draw_curves(
    path: Path, heading: str, x: str, y: str, lines: list[Curve], log_x: bool = True
) -> bool:
    if not lines:
        return False
    picture = _Picture(heading, x, y)
    if log_x:
        picture.axes.set_xscale("log", base=2)
    picture.axes.set_yscale("log")
    for label, xs, ys in lines:
        style = ":" if label.endswith(": used") else "--" if label.startswith("base/") else "-"
        picture.axes.plot(xs, ys, style, marker="o", markersize=3, label=label)
    picture.save(path)
    return True


def microseconds(row: Result) -> float:
    return float(row["p50_ns"]) / 1e3


def draw_length(result: Result, path: Path) -> bool:
    lines = curves(result["rows"], "length", microseconds)
    heading = title(result, "Time per token against length, medians")
    return draw_curves(path, heading, "rows in use", "µs a row (logarithmic)", lines)


def draw_memory(result: Result, path: Path) -> bool:
    lines: list[Curve] = []
    for key, label in (
        ("mapped_bytes", "{}: committed"),
        ("used_bytes", "{}: used"),
        ("static_bytes", "base/a buffer of the last length"),
    ):

        def mebibytes(row: Result, key: str = key) -> float | None:
            n_bytes = row.get("extra", {}).get(key)
            return None if n_bytes is None else n_bytes / 2**20

        for id, xs, ys in curves(result["rows"], "length", mebibytes):
            lines.append((label.format(id), xs, ys))
    heading = title(result, "Memory against length")
    return draw_curves(path, heading, "rows in use", "MiB (logarithmic)", lines)


def draw_blocks(result: Result, path: Path) -> bool:
    def by_kind(row: Result) -> Result:
        return {**row, "extra": {"block": row.get("extra", {}).get("block_bytes")}}

    lines = curves(map(by_kind, result["rows"]), "block", microseconds)
    lines = [line for line in lines if len(set(line[1])) > 1]
    if not lines:
        return False
    picture = _Picture(
        title(result, "Cost against block size, medians"), "block size", "µs (logarithmic)"
    )
    picture.axes.set_xscale("log", base=2)
    picture.axes.set_yscale("log")
    for label, xs, ys in lines:
        style = "--" if label.startswith("base/") else "-"
        picture.axes.plot(xs, ys, style, marker="o", markersize=3, label=label)
    sizes = sorted({x for _, xs, _ in lines for x in xs})
    picture.axes.set_xticks(sizes, [size_text(int(size)) for size in sizes])
    picture.axes.minorticks_off()
    picture.save(path)
    return True


def draw_tail(result: Result, path: Path) -> bool:
    rows = [row for row in result["rows"] if "p999_ns" in row]
    if len(rows) < 2:
        return False
    picture = _Picture(title(result, "Latency percentiles"), "", "µs (logarithmic)")
    keys = ("p50_ns", "p99_ns", "p999_ns", "max_ns")
    picture.axes.set_yscale("log")
    picture.axes.set_xticks(range(len(keys)), ["p50", "p99", "p99.9", "max"])
    for row in rows:
        style = "--" if row["id"].startswith("base/") else "-"
        picture.axes.plot(
            range(len(keys)), [row[key] / 1e3 for key in keys], style, marker="o", label=row["id"]
        )
    picture.save(path)
    return True


def draw_steps(result: Result, path: Path) -> bool:
    """A group of bars for each model, batch and context, a bar for each cache."""
    steps = [row for row in result.get("steps", ()) if any(k.startswith("wall/") for k in row)]
    if not steps:
        return False
    kinds = [k[5:] for k in dict.fromkeys(k for row in steps for k in row) if k.startswith("wall/")]
    picture = _Picture(title(result, "A decode step, medians"), "ms, wall clock", "")
    picture.figure.set_size_inches(8, 1.5 + 0.16 * len(steps) * (len(kinds) + 1))
    picture.axes.title.set_fontsize("small")  # beside long names
    axes, width = picture.axes, 1 / (len(kinds) + 1)
    for i, kind in enumerate(kinds):
        bars = [
            (n, row[f"wall/{kind}"] / 1e6) for n, row in enumerate(steps) if f"wall/{kind}" in row
        ]
        places = [n + i * width for n, _ in bars]
        drawn = axes.barh(places, [ms for _, ms in bars], width, label=kind)
        axes.bar_label(drawn, fmt="%.3g", fontsize="xx-small", padding=2)
    names = [f"{row['model']}, {row['batch']}, {row['context']}" for row in steps]
    axes.set_yticks([n + (len(kinds) - 1) * width / 2 for n in range(len(steps))], names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    picture.save(path)
    return True


DRAWINGS: dict[str, Callable[[Result, Path], bool]] = {
    "time": draw_length,
    "memory": draw_memory,
    "blocks": draw_blocks,
    "percentiles": draw_tail,
    "steps": draw_steps,
}
