"""Write the coverage of libvmm into docs/RELIABILITY.md; `make coverage` calls this.

    coverage_report.py COVERAGE.JSON

The file is gcovr's. The section gets a row for each file, then every line that is left out by
a GCOVR_EXCL marker, with the reason that stands behind the marker ("GCOVR_EXCL_LINE: reason"),
and every line that no test reaches, with the reason behind its own marker ("unreached:
reason"), which goes on for the lines that follow it and to the end of its statement.
"""

import json
import re
import sys
from pathlib import Path

from reliability import PAGE, ROOT, replace_section

MARKER = re.compile(r"GCOVR_EXCL_(LINE|BR_LINE|START|BR_START)\b:?\s*(.*?)\s*(?:\*/|$)")

UNREACHED = re.compile(r"/\* unreached: (.*?)\s*\*/")


class File:
    """Counts as gcovr has them: what is excluded counts nowhere."""

    def __init__(self, record):
        self.path = record["file"]
        lines = [line for line in record["lines"] if not line.get("gcovr/excluded")]
        branches = [
            (line["line_number"], branch["count"] > 0)
            for line in lines
            for branch in line["branches"]
            if not branch.get("gcovr/excluded")
        ]
        self.n_lines = len({line["line_number"] for line in lines})
        self.missed_lines = sorted(
            {line["line_number"] for line in lines}
            - {line["line_number"] for line in lines if line["count"]}
        )
        self.n_branches = len(branches)
        self.n_missed_branches = sum(not taken for _, taken in branches)
        self.source = (ROOT / self.path).read_text().splitlines()


def percent(missed, total):
    return f"{100 * (total - missed) / total:.1f} %" if total else "–"


def row(name, n_lines, missed_lines, n_branches, missed_branches):
    return (
        f"| {name} | {n_lines} | {percent(missed_lines, n_lines)} "
        f"| {n_branches} | {percent(missed_branches, n_branches)} |"
    )


def code(text):
    """Source text for a cell of a table."""
    return "`" + text.strip().replace("|", "\\|") + "`"


def files_table(files):
    yield "| file | lines | reached | branches | taken |"
    yield "|---|---:|---:|---:|---:|"
    counts = [(f.n_lines, len(f.missed_lines), f.n_branches, f.n_missed_branches) for f in files]
    for file, of_file in zip(files, counts, strict=True):
        yield row(f"`{file.path}`", *of_file)
    yield row("all", *(sum(column) for column in zip(*counts, strict=True)))


def left_out(files):
    """(place, text, reason) of each marker; the text is the code that it stands behind."""
    for file in files:
        for number, line in enumerate(file.source, 1):
            found = MARKER.search(line)
            if not found:
                continue
            if not found[2]:
                sys.exit(f"{file.path}:{number}: a GCOVR_EXCL marker without a reason")
            what = "branches of " if found[1].startswith("BR") else ""
            text = line[: found.start()].rsplit("/*", 1)[0].strip()
            yield f"{file.path}:{number}", what + code(text or file.source[number]), found[2]


def goes_on(file, number):
    """Whether a line belongs to what stands before it: a run of missed lines, a statement."""
    before = file.source[number - 2].rstrip()
    return number - 1 in file.missed_lines or before.endswith((",", '"', "("))


def why_unreached(file, number):
    for line in file.source[number - 1], file.source[number - 2]:  # where there is room for it
        found = UNREACHED.search(line)
        if found:
            return found[1]
    if goes_on(file, number):
        return why_unreached(file, number - 1)
    sys.exit(f"{file.path}:{number}: no test reaches it, and no marker says why")


def section(files):
    yield from files_table(files)
    excluded = list(left_out(files))
    if excluded:
        yield ""
        yield "Left out:"
        yield ""
        yield "| place | code | reason |"
        yield "|---|---|---|"
        for place, text, reason in excluded:
            yield f"| `{place}` | {text} | {reason} |"
    missed = [(file, number) for file in files for number in file.missed_lines]
    if missed:
        yield ""
        yield "Lines that no test in C reaches:"
        yield ""
        yield "| place | code | reason |"
        yield "|---|---|---|"
        for file, number in missed:
            text, reason = file.source[number - 1], why_unreached(file, number)
            yield f"| `{file.path}:{number}` | {code(UNREACHED.sub('', text))} | {reason} |"


def main():
    report = json.loads(Path(sys.argv[1]).read_text())
    files = sorted((File(record) for record in report["files"]), key=lambda file: file.path)
    PAGE.write_text(replace_section(PAGE.read_text(), "coverage", "\n".join(section(files))))
    print(f"{PAGE.relative_to(ROOT)}: the section on coverage has been written")


if __name__ == "__main__":
    main()
