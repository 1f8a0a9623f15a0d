"""The demo's picture. matplotlib is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, lengths, times in curves:
        axes.plot(lengths, times, label=label, linewidth=1.8)
    axes.set_yscale("log")
    axes.set_xlabel("length of the cache, tokens")
    axes.set_ylabel("time per token, µs (logarithmic)")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
