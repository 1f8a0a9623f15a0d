"""What the documents show runs: the ctypes program, the C program, the README's Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs/examples"


def run(command, folder, **environment):
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The library, the header and the pkg-config file, as `make install` puts them."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    if not (ROOT / "build/libvmm.so").exists():
        pytest.skip("build/libvmm.so has not been built in this tree")
    prefix = tmp_path_factory.mktemp("prefix")
    # What has been built is installed, by whichever compiler: nothing is built anew.
    compiler = (ROOT / "build/nvcc").read_text().strip()
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    result = subprocess.run(
        ["make", "-C", ROOT, "install", f"PREFIX={prefix}", f"NVCC={compiler}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return prefix


def test_installed_files(installed):
    for name in ("include/vmm.h", "lib/libvmm.so", "lib/libvmm.so.0", "lib/pkgconfig/vmm.pc"):
        assert (installed / name).exists(), name


def test_ctypes_program(installed, tmp_path):
    """The library without Cython, and without pyvmm."""
    program = EXAMPLES / "first_ctypes.py"
    lines = [line for line in program.read_text().splitlines() if line.strip()]
    assert len(lines) <= 40
    assert "pyvmm" not in program.read_text().replace("pyvmm/", "")
    shutil.copy(program, tmp_path)
    library = str(installed / "lib")
    result = run([sys.executable, "first_ctypes.py"], tmp_path, LD_LIBRARY_PATH=library)
    assert result.stdout.strip()
    assert result.stderr == ""


def c_program(installed, tmp_path, compiler, source):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    if not shutil.which("pkg-config"):
        pytest.skip("pkg-config is not installed")
    (tmp_path / source.name).write_text(source.read_text())
    where = str(installed / "lib/pkgconfig")
    flags = run(["pkg-config", "--cflags", "--libs", "vmm"], tmp_path, PKG_CONFIG_PATH=where)
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-o", "first", source.name]
    run([*command, *flags.stdout.split()], tmp_path)
    return run(["./first"], tmp_path, LD_LIBRARY_PATH=str(installed / "lib"))


def test_c_program(installed, tmp_path):
    result = c_program(installed, tmp_path, "cc", EXAMPLES / "first.c")
    assert result.stdout.strip()
    assert result.stderr == ""


def test_program_in_the_header(installed, tmp_path):
    """The manual's first program, cut out of its comment."""
    header = (ROOT / "libvmm/include/vmm.h").read_text()
    program = header[header.index("#include <stdio.h>") : header.index("Build it with")]
    lines = [re.sub(r"^ \*( {4})?", "", line) for line in program.splitlines()]
    source = tmp_path / "source" / "manual.c"
    source.parent.mkdir()
    source.write_text("\n".join(lines) + "\n")
    result = c_program(installed, tmp_path, "cc", source)
    assert result.stdout == "1 row(s), the first begins with 1\n"


def test_version_of_the_pkg_config_file(installed):
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f"Version: {version}" in (installed / "lib/pkgconfig/vmm.pc").read_text()


def python_block(document):
    text = (ROOT / document).read_text()
    block = re.search(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert block, f"{document} has no block of Python"
    return block[1]


def test_readme_example(tmp_path, device):
    """On a machine without a GPU the example runs on the host, by its device's name only."""
    code = python_block("README.md")
    code = re.sub(r"""(["'])(?:cuda:0|cuda|host)\1""", repr(device), code)
    (tmp_path / "readme.py").write_text(code)
    result = run([sys.executable, "readme.py"], tmp_path, PYTHONPATH=str(ROOT))
    assert result.stderr == ""
