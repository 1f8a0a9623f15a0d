"""Compare two results of one benchmark: python benchmarks/compare.py A.json B.json

For every id that both have: the median of A, of B, and B / A (below 1: B is faster). Medians
within 10 % of one another are marked as equal, since host times vary by more from run to
run. Exits with 1 if no id is common.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

EQUAL = 0.10


def load(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    result = json.loads(Path(path).read_text())
    return result, {row["id"]: row for row in result["rows"]}


def format_ns(ns: float) -> str:
    for unit, size in (("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.2f} {unit}"
    return f"{ns:.1f} ns"


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    (a, rows_a), (b, rows_b) = load(arguments[0]), load(arguments[1])
    for label, result in (("A", a), ("B", b)):
        print(
            f"{label}: {result['benchmark']}, {result['language']}, version {result['version']}, "
            f"{result['machine']}"
        )
    common = [id for id in rows_a if id in rows_b]
    if not common:
        print("no id is in both", file=sys.stderr)
        return 1
    print(f"{'':<40} {'A':>12} {'B':>12} {'B / A':>8}")
    for id in common:
        p50_a, p50_b = rows_a[id]["p50_ns"], rows_b[id]["p50_ns"]
        ratio = p50_b / p50_a if p50_a else float("inf")
        mark = "" if abs(ratio - 1) > EQUAL else "  equal"
        print(f"{id:<40} {format_ns(p50_a):>12} {format_ns(p50_b):>12} {ratio:>8.3g}{mark}")
    for label, only in (
        ("A", [id for id in rows_a if id not in rows_b]),
        ("B", [id for id in rows_b if id not in rows_a]),
    ):
        if only:
            print(f"only in {label}: {', '.join(only)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
