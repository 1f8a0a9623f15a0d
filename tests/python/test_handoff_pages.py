"""The examples of the pages about frameworks run, each in a process of its own."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

import pyvmm
from support import run_python

if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
    pytest.skip("the simulated driver's memory is not a GPU's", allow_module_level=True)

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def examples():
    """(page, heading, framework, code) of every example; the framework is what it imports."""
    for page in ("captured.md", "frameworks.md", "paddle.md"):
        sections = re.split(r"^## (.*)\n", (DOCS / page).read_text(), flags=re.M)
        for heading, text in zip(sections[1::2], sections[2::2], strict=True):
            for code in BLOCK.findall(text):
                yield page, heading, code


EXAMPLES = list(examples())


def imported(code):
    """The libraries that an example imports, without our own and Python's."""
    lines = re.findall(r"^(?:from|import) ([\w., ]+)", code, re.M)
    names = {name.split()[0].split(".")[0] for line in lines for name in line.split(",")}
    return names - {"pyvmm"}


@pytest.mark.parametrize(
    ("page", "heading", "code"),
    EXAMPLES,
    ids=[f"{page}-{heading}" for page, heading, _ in EXAMPLES],
)
def test_example(page, heading, code, device, tmp_path):
    """On every device there is, by the device's name only."""
    for name in sorted(imported(code)):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if "cupy" in imported(code) and device == "host":
        pytest.skip("CuPy has no arrays on the host")
    on_host_only = "numpy" in imported(code) or "paddle" in imported(code) or "device=" not in code
    if on_host_only and device != "host" and "cupy" not in imported(code):
        pytest.skip("this example is the host's")
    code = re.sub(r'"(?:host|cuda:0)"', repr(device), code)
    # From a file: to_static reads the source.
    (tmp_path / "example.py").write_text(code)
    said = run_python(
        f"""
        import sys, warnings
        warnings.simplefilter("ignore")
        sys.path.insert(0, {str(tmp_path)!r})
        import example
        """,
        check=False,
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
        JAX_PLATFORMS="cpu" if device == "host" else "",
    )
    assert said.returncode == 0, said.stderr
    assert page == "paddle.md" or said.stdout.strip()


def test_every_framework_has_its_example():
    """A module of pyvmm that is named after a framework is on a page."""
    package = Path(pyvmm.__file__).parent
    shown = "".join(code for _, _, code in EXAMPLES) + (DOCS / "paddle.md").read_text()
    for path in package.glob("[a-z]*.py"):
        assert f"pyvmm.{path.stem}" in shown, path.name
