"""The checked-in PTX of the append kernel is what nvcc makes of append.cu, and assembles."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from _build_backend import find_nvcc

ROOT = Path(__file__).resolve().parents[2]
PTX = ROOT / "libvmm/src/append.ptx"
PINNED = "V13.0.88"  # the nvcc that made the file; another may order registers differently

nvcc = find_nvcc()
needs_nvcc = pytest.mark.skipif(not nvcc, reason="no nvcc")


def test_declares_the_lowest_version_and_the_kernels():
    text = PTX.read_text()
    assert re.search(r"^\.version 6\.3$", text, re.M)
    assert re.search(r"^\.target sm_75$", text, re.M)
    names = re.findall(r'^#define VMM_\w*KERNEL\w* "(\w+)"', headers(), re.M)
    assert names and sorted(re.findall(r"\.visible \.entry (\w+)\(", text)) == sorted(names)


def headers():
    return "".join(
        (ROOT / "libvmm/src" / name).read_text() for name in ("append.h", "cursor_job.h")
    )


@needs_nvcc
def test_regenerating_gives_the_same():
    version = subprocess.check_output([nvcc, "--version"], text=True)
    if PINNED not in version:
        pytest.skip(f"nvcc is not {PINNED}")
    made = ROOT / "build/append.ptx"
    made.unlink(missing_ok=True)
    make = ["make", "-s", f"NVCC={nvcc}", "build/append.ptx"]
    subprocess.run(make, cwd=ROOT, check=True, env=without_make_flags())
    assert made.read_text() == PTX.read_text(), "append.cu has changed: run `make ptx`"


def without_make_flags():
    return {k: v for k, v in os.environ.items() if k != "MAKEFLAGS"}


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_assembles(arch, tmp_path):
    ptxas = shutil.which("ptxas", path=os.path.dirname(nvcc)) or shutil.which("ptxas")
    if not ptxas:
        pytest.skip("no ptxas beside nvcc or on PATH")
    image = tmp_path / "append.cubin"
    subprocess.run([ptxas, f"-arch={arch}", PTX, "-o", image], check=True)
    assert image.stat().st_size > 0
