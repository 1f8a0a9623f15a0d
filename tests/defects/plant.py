"""Plant defects in a copy of the library, one at a time: a test must notice each.

    python tests/defects/plant.py [NAME ...]     all of them, or those named
    python tests/defects/plant.py --write        and the table into docs/RELIABILITY.md

`make planted-defects` builds what this needs and runs it. The copy is build/defects, where
only what a defect changes is compiled again. Every named test first has to pass without one.
The exit status is 1 if a defect goes unnoticed, or no longer fits the source.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from defects import DEFECTS

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build/defects"
COPIED = ("Makefile", "pyproject.toml", "setup.py", "_build_backend.py", "libvmm", "pyvmm", "tests")
PAGE = ROOT / "docs/RELIABILITY.md"
BEGIN, END = "<!-- defects: generated -->", "<!-- defects: end -->"
TIMEOUT_S = 180
SKIPPED = 77


def copy_sources():
    """Bring the copy up to date; what is the same keeps its time, so that make leaves it."""
    for name in COPIED:
        source = ROOT / name
        files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
        for path in files:
            if "__pycache__" in path.parts:
                continue
            copy = TREE / path.relative_to(ROOT)
            if not copy.exists() or copy.read_bytes() != path.read_bytes():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                shutil.copymode(path, copy)


def environment(**extra):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    simulator = str(TREE / "build/sim/libcuda.so.1")
    return {
        **clean,
        "PYTHONPATH": str(TREE),
        "VMM_CUDA_LIBRARY": simulator,
        "PYVMM_TEST_DEVICE": "sim",
        **extra,
    }


def run(command, environ=None, **arguments):
    return subprocess.run(
        command,
        cwd=TREE,
        env=environ or environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **arguments,
    )


def make(*targets):
    """Without nvcc: the checked-in PTX is what the simulated driver needs."""
    command = ["make", "--no-print-directory", "-s", "NVCC=", "WERROR=", "CFLAGS=-O1 -g", *targets]
    result = run(command)
    if result.returncode:
        sys.exit(f"the copy cannot be built:\n{result.stdout.decode(errors='replace')}")


def is_c(test):
    return test.endswith(".c")


def program_of(test):
    return f"build/tests/c/{Path(test).stem}"


def build(test, *, extensions=False):
    if extensions:
        result = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"])
        if result.returncode:
            sys.exit(f"the extensions cannot be built:\n{result.stdout.decode(errors='replace')}")
    make("build/libvmm.so", "build/sim/libcuda.so.1", *([program_of(test)] if is_c(test) else []))
    if not is_c(test):
        shutil.copyfile(TREE / "build/libvmm.so", TREE / "pyvmm/libvmm.so.0")


def verdict(test, on):
    """(whether the test fails, what it said last)"""
    environ = environment()
    if is_c(test):
        command = [f"./{program_of(test)}", on]
        environ = environment(VMM_SIM_CHECK_EXIT="1")  # as run_tests.py does
    else:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    try:
        result = run(command, environ, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return True, f"still running after {TIMEOUT_S} s"
    lines = result.stdout.decode(errors="replace").strip().splitlines()
    if result.returncode == SKIPPED and is_c(test):
        sys.exit(f"{test} skips itself: {lines[-1] if lines else ''}")
    return result.returncode != 0, what_it_said(lines)


def what_it_said(lines):
    """The line that tells why; what is left at exit is the end of any test that fails."""
    for sign in (r"tests/c/\w+\.c:\d+: ", r"vmm-sim: (?!exit)", r"E  ", r"vmm-sim: "):
        for line in lines:
            if re.match(sign, line):
                return line.removeprefix("E").strip()
    return lines[-1] if lines else ""


class Planted:
    """The defect is in the copy within the block."""

    def __init__(self, defect):
        self.path = TREE / defect.file
        self.replacements = defect.replacements
        self.original = self.path.read_bytes()

    def __enter__(self):
        text = self.original.decode()
        for old, new in self.replacements:
            if text.count(old) != 1:
                raise LookupError(f"fits {text.count(old)} times, not once:\n{old}")
            text = text.replace(old, new)
        self.path.write_text(text)
        return self

    def __exit__(self, *exception):
        self.path.write_bytes(self.original)


def plant(defect):
    """(result for the table, what the test said)"""
    in_extension = defect.file.startswith("pyvmm/")
    try:
        with Planted(defect):
            build(defect.test, extensions=in_extension)
            failed, said = verdict(defect.test, defect.on)
    except LookupError as error:
        return "does not fit the source", str(error)
    if in_extension:
        build(defect.test, extensions=True)  # make mends the library by itself, not these
    return "noticed" if failed else "NOT NOTICED", said


def check_without_defects(defects):
    """What the tests say of the library as it is: all must pass, or failing proves nothing."""
    for test, on in sorted({(defect.test, defect.on) for defect in defects}):
        build(test)
        failed, said = verdict(test, on)
        if failed:
            sys.exit(f"{test} fails without a defect: {said}")


def table(rows):
    lines = ["| defect | planted in | the test that notices | result |", "|---|---|---|---|"]
    for defect, result in rows:
        lines.append(f"| {defect.says} | `{defect.file}` | `{defect.test}` | {result} |")
    return "\n".join(lines)


def write_page(rows):
    text = PAGE.read_text()
    head, found, rest = text.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        sys.exit(f"{PAGE} has no lines {BEGIN} and {END} to write between")
    PAGE.write_text(f"{head}{BEGIN}\n\n{table(rows)}\n\n{END}{tail}")
    print(f"written: {PAGE.relative_to(ROOT)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these defects")
    parser.add_argument("--write", action="store_true", help="the table into docs/RELIABILITY.md")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    unknown = set(arguments.names) - {defect.name for defect in DEFECTS}
    if unknown:
        parser.error(f"no such defect: {', '.join(sorted(unknown))}")
    chosen = [d for d in DEFECTS if not arguments.names or d.name in arguments.names]
    copy_sources()
    needs_extensions = any(not is_c(d.test) for d in chosen)
    build(chosen[0].test, extensions=needs_extensions)
    check_without_defects(chosen)
    rows = []
    for defect in chosen:
        begun = time.monotonic()
        result, said = plant(defect)
        rows.append((defect, result))
        print(
            f"{result:12} {defect.name:14} {Path(defect.test).name}"
            f" ({time.monotonic() - begun:.1f} s): {said}"
        )
    missed = [defect.name for defect, result in rows if result != "noticed"]
    print(f"{len(rows) - len(missed)} of {len(rows)} planted defects are noticed by their tests")
    if missed:
        sys.exit(f"not noticed, or not planted: {', '.join(missed)}")
    if arguments.write:
        write_page(rows)


if __name__ == "__main__":
    main()
