"""What is installed: the library's exports and needs, `make install`, the sdist, the wheel."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build/libvmm.so"
HEADER = (ROOT / "libvmm/include/vmm.h").read_text()


def clean_environment(**extra):
    """Without what a make above us, or the tests' settings, say to the commands below."""
    ours = ("MAKEFLAGS", "PYTHONPATH", "VMM_CUDA_LIBRARY", "LD_LIBRARY_PATH")
    return {**{k: v for k, v in os.environ.items() if k not in ours}, **extra}


def output(*command, **kwargs):
    __tracebackhide__ = True
    kwargs.setdefault("env", clean_environment())
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )
    if done.returncode:
        pytest.fail(f"{command}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def needs(tool):
    return pytest.mark.skipif(not shutil.which(tool), reason=f"no {tool}")


@needs("nm")
def test_exports_are_what_the_header_declares():
    declared = set(re.findall(r"^VMM_API [^;(]*?\b(vmm_\w+)\(", HEADER, re.M))
    symbols = output("nm", "-D", "--defined-only", LIBRARY).splitlines()
    exported = {line.split()[-1].split("@")[0] for line in symbols} - {"LIBVMM_0"}
    assert exported == declared


@needs("readelf")
def test_library_needs_libc_alone():
    dynamic = output("readelf", "-d", LIBRARY)
    needed = re.findall(r"NEEDED.*\[([^.\]]+)", dynamic)
    # libdl and libpthread are glibc's own, folded into libc since 2.34.
    assert set(needed) <= {"libc", "libdl", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert "Library soname: [libvmm.so.0]" in dynamic


def test_versions_agree():
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    parts = [re.search(rf"VERSION_{p} (\d+)", HEADER)[1] for p in ("MAJOR", "MINOR", "PATCH")]
    assert ".".join(parts) == project
    assert f"## {project}" in (ROOT / "CHANGELOG.md").read_text()
    import pyvmm

    assert pyvmm.__version__ == project


@needs("pkg-config")
@needs("cc")
def test_install_and_the_program_of_the_header(tmp_path):
    """The first program of vmm.h, taken from its comment, built as the comment says."""
    make = ["make", "-s", "install", f"PREFIX={tmp_path}/usr"]
    output(*make, cwd=ROOT, env=build_environment())
    program = re.search(r"^ \*     #include <stdio\.h>.*?^ \*     \}\n", HEADER, re.M | re.S)[0]
    source = tmp_path / "first.c"
    source.write_text(re.sub(r"^ \*", "", program, flags=re.M))
    env = clean_environment(
        PKG_CONFIG_PATH=f"{tmp_path}/usr/lib/pkgconfig", LD_LIBRARY_PATH=f"{tmp_path}/usr/lib"
    )
    flags = output("pkg-config", "--cflags", "--libs", "vmm", env=env).split()
    output("cc", "-Wall", "-Werror", "-o", tmp_path / "first", source, *flags, env=env)
    assert "1 row(s), the first begins with 1" in output(tmp_path / "first", env=env)


def test_destdir_stays_out_of_the_pkg_config_file(tmp_path):
    make = ["make", "-s", "install", "PREFIX=/opt/vmm", f"DESTDIR={tmp_path}"]
    output(*make, cwd=ROOT, env=build_environment())
    text = (tmp_path / "opt/vmm/lib/pkgconfig/vmm.pc").read_text()
    assert "prefix=/opt/vmm\n" in text and str(tmp_path) not in text
    assert (tmp_path / "opt/vmm/lib/libvmm.so").exists()


def build_environment(**extra):
    """The nvcc that this interpreter finds, so that make below does not build anew."""
    from _build_backend import find_nvcc

    return clean_environment(NVCC=find_nvcc() or "", **extra)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from the sdist in an empty folder, offline, with what is installed."""
    pytest.importorskip("setuptools", "77", reason="building a wheel needs setuptools 77")
    folder = tmp_path_factory.mktemp("dist")
    call_backend(f"build_sdist({str(folder)!r})", ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    (tree,) = (path for path in folder.glob("pyvmm-*") if path.is_dir())
    call_backend(f"build_wheel({str(folder)!r})", tree)
    (path,) = folder.glob("*.whl")
    return path


def call_backend(call, tree):
    """What pip does, without an environment of its own."""
    code = f"import sys; sys.path.insert(0, '.'); import _build_backend as b; b.{call}"
    output(sys.executable, "-c", code, cwd=tree, env=build_environment())


def test_wheel_holds_the_library_and_the_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"pyvmm/__init__.py", "pyvmm/libvmm.so.0", "pyvmm/py.typed"} <= names
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for path in (ROOT / "pyvmm").glob("_*.pyx"):
        assert f"pyvmm/{path.stem}{suffix}" in names
        assert f"pyvmm/{path.stem}.pyi" in names
    # What is compiled where it is used: Paddle's operator, and what it includes.
    assert {"pyvmm/paddle_op/concat.cc", "pyvmm/include/vmm.h"} <= names
    assert not any(name.endswith((".pyx", ".c", ".h")) for name in names - {"pyvmm/include/vmm.h"})


def test_wheel_works_where_there_is_no_compiler(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import numpy, pyvmm; t = pyvmm.empty((0, 4), 'float32', axis=0, capacity=10, "
        "device='host'); t.append(numpy.ones((2, 4), 'float32')); "
        "print(pyvmm.__file__, numpy.asarray(t).sum(), pyvmm.get_include())"
    )
    env = clean_environment(PYTHONPATH=str(tmp_path / "site"), PATH="")
    printed = output(sys.executable, "-c", code, cwd=tmp_path, env=env)
    package = tmp_path / "site/pyvmm"
    assert printed.split() == [str(package / "__init__.py"), "8.0", str(package / "include")]


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_get_a_clear_error(platform):
    code = f"import sys; sys.platform = {platform!r}; exec(open('setup.py').read())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert f"Linux only; this is {platform}" in done.stderr
    assert "Traceback" not in done.stderr


@needs("make")
def test_a_missing_prerequisite_is_named():
    """A machine without a compiler is told what to install."""
    done = subprocess.run(
        ["make", "CC=no-such-compiler", "check-cc"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "missing: the C compiler no-such-compiler" in done.stderr
    assert "apt install python3-venv python3-dev gcc g++ make" in done.stderr
