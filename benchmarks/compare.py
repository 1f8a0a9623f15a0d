"""Compare two runs: python benchmarks/compare.py A B

A and B are results (JSON files) or folders of them; of folders, results of the same benchmark and
language are compared, or, where a folder has one language alone, those of the same benchmark. For
every id that both have: B / A (below 1: B is faster), the medians of A and of B, and B / A of the
99th percentiles. Medians within 10 % of one another are marked as equal, since host times vary by
more from run to run. Exits with 1 if no id is common.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench import format_ns

from pyvmm._measure import Result, load

EQUAL = 0.10


def pairs(a: Path, b: Path) -> list[tuple[Result, Result]]:
    """Results that are of the same thing."""
    first, second = ([result for _, result in load([path])] for path in (a, b))
    if not a.is_dir() and not b.is_dir():
        return [(first[0], second[0])]

    def others(one: Result) -> list[Result]:
        same = [other for other in second if other["benchmark"] == one["benchmark"]]
        return [other for other in same if other["language"] == one["language"]] or same

    return [(one, other) for one in first for other in others(one)]


def ratio(a: float, b: float) -> float:
    return b / a if a else float("inf")


def compare(a: Result, b: Result) -> int:
    """Print one table; how many ids are common."""
    print(f"\n{a['benchmark']}")
    for label, result in (("A", a), ("B", b)):
        print(
            f"{label}: {result['benchmark']}, {result['language']}, version {result['version']}, "
            f"{result['machine']}"
        )
    rows_a, rows_b = ({row["id"]: row for row in result["rows"]} for result in (a, b))
    common = [id for id in rows_a if id in rows_b]
    if common:
        print(f"{'B / A':>8} {'':<7} {'':<40} {'A':>12} {'B':>12} {'p99 B / A':>10}")
    for id in common:
        row_a, row_b = rows_a[id], rows_b[id]
        of_medians = ratio(row_a["p50_ns"], row_b["p50_ns"])
        of_tails = ratio(row_a["p99_ns"], row_b["p99_ns"])
        mark = "" if abs(of_medians - 1) > EQUAL else "equal"
        print(
            f"{of_medians:>8.3g} {mark:<7} {id:<40} {format_ns(row_a['p50_ns']):>12} "
            f"{format_ns(row_b['p50_ns']):>12} {of_tails:>10.3g}"
        )
    for label, mine, other in (("A", rows_a, rows_b), ("B", rows_b, rows_a)):
        only = [id for id in mine if id not in other]
        if only:
            print(f"only in {label}: {', '.join(only)}")
    return len(common)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        common = sum(compare(a, b) for a, b in pairs(*map(Path, arguments)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not common:
        print("no id is in both", file=sys.stderr)
    return 0 if common else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
