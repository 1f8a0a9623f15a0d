"""Tables and progress bars on the terminal: by rich where it is installed, else plain."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Table:
    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    caption: str = ""
    align: str = ""  # "l" or "r" for each column; right where nothing is said


def show(table: Table) -> None:
    align = table.align or "r" * len(table.columns)
    try:
        import rich.box
        import rich.console
        import rich.table
    except ImportError:
        print("\n" + "\n".join(plain_lines(table)))
        return
    made = rich.table.Table(
        title=table.title,
        caption=table.caption or None,
        box=rich.box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        padding=(0, 1),
        show_edge=False,
        pad_edge=False,
    )
    for column, side in zip(table.columns, align, strict=True):
        made.add_column(column, justify="left" if side == "l" else "right", overflow="fold")
    for row in table.rows:
        made.add_row(*row)
    console = rich.console.Console(markup=False, highlight=False)
    console.print()
    console.print(made)


def plain_lines(table: Table) -> list[str]:
    """The table as text, a line each, without colours."""
    align = table.align or "r" * len(table.columns)
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    text = [table.title]
    for line in lines:
        cells = [
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(line, widths, align, strict=True)
        ]
        text.append("  ".join(cells).rstrip())
    if table.caption:
        text.append(table.caption)
    return text


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` steps, advanced by what is yielded. Nothing where output is no terminal
    and rich is missing, but the label and that it is done."""
    try:
        import rich.console
        import rich.progress
    except ImportError:
        with _plain_progress(label, total) as advance:
            yield advance
        return
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        console=rich.console.Console(),
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def _plain_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    live = sys.stdout.isatty()
    done = shown = 0

    def advance(steps: int) -> None:
        nonlocal done, shown
        done += steps
        tenths = done * 10 // total
        if live and tenths > shown:
            shown = tenths
            print(f"\r{label} {tenths * 10:3} %", end="", flush=True)

    yield advance
    print(f"\r{label}: done" if live else f"{label}: done", flush=True)
