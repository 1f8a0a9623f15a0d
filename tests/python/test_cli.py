"""python -m pyvmm: info and demo, with and without rich and matplotlib."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import pyvmm

ROOT = Path(__file__).resolve().parents[2]

# Run the command as if these packages were not installed.
WITHOUT = """
import runpy, sys
for name in {missing!r}:
    sys.modules[name] = None
sys.argv = ["pyvmm", *{arguments!r}]
runpy.run_module("pyvmm", run_name="__main__")
"""


def cli(*arguments, missing=(), status=0, **environment):
    if os.environ.get("PYVMM_TEST_DEVICE") in ("sim", "sim-hip"):
        missing = (*missing, "torch", "cupy")  # their CUDA would find the simulated driver
    arguments = [str(argument) for argument in arguments]
    command = [sys.executable, "-m", "pyvmm", *arguments]
    if missing:
        command = [sys.executable, "-c", WITHOUT.format(missing=missing, arguments=arguments)]
    result = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result


@pytest.fixture(params=["rich", "plain"])
def missing(request):
    """What is missing: nothing, or rich."""
    if request.param == "plain":
        return ("rich",)
    pytest.importorskip("rich")
    return ()


def test_info(missing, device):
    out = cli("info", missing=missing).stdout
    info = pyvmm.device_info(device)
    assert f"pyvmm {pyvmm.__version__}" in out
    assert re.search(rf"\b{device}\b", out)
    assert info["description"].split()[0] in out
    for word in ("granularity", "largest reservation", "exportable handles", "free memory"):
        assert word in out
    granularity = info["granularity_bytes"]
    unit, name = (2**20, "MiB") if granularity >= 2**20 else (2**10, "KiB")
    assert f"{granularity // unit} {name}" in out


def test_info_says_why_there_is_no_gpu(missing, host):
    result = cli("info", missing=missing, VMM_CUDA_LIBRARY="/nowhere/libcuda.so.1")
    assert "no CUDA driver" in result.stdout
    assert "/nowhere/libcuda.so.1" in result.stdout.replace("\n", "").replace(" ", "")
    assert result.stderr == ""


def rows_of(out):
    """The lines of the demo's table, as numbers; "-" where nothing was compared."""
    lines = [line.replace(",", "").split() for line in out.splitlines()]
    return [line for line in lines if len(line) == 7 and line[0].isdigit()]


def test_demo(missing, device):
    out = cli("demo", "--device", device, "--tokens", 200, missing=missing).stdout
    rows = rows_of(out)
    assert len(rows) >= 4
    assert int(rows[-1][0]) == 200
    batch = 1 if device == "host" else 8
    for tokens, append, _, _, mapped, used, calls in rows:
        assert float(append) > 0
        expected = int(tokens) * 2 * batch * 32 * 128 * 2 / 2**20
        assert float(used) == pytest.approx(expected, abs=0.06)
        assert float(mapped) >= float(used) - 0.06
        assert int(calls) > 0
    if "nothing to compare with" in out:
        assert device != "host"
        return
    assert "both caches hold the same 200 tokens" in out
    assert "as at the beginning" in out
    for _, append, concat, ratio, *_ in rows:
        assert float(ratio) == pytest.approx(float(concat) / float(append), rel=0.5, abs=0.2)


@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_demo_of_few_tokens(host, tokens):
    out = cli("demo", "--device", "host", "--tokens", tokens).stdout
    assert f"both caches hold the same {tokens} tokens" in out
    assert int(rows_of(out)[-1][0]) == tokens


def test_demo_takes_a_gpu_where_there_is_one(device):
    out = cli("demo", "--tokens", 3).stdout
    best = "cuda:0" if "cuda:0" in pyvmm.devices() else "host"
    assert f"on {best} (" in out


def test_plot(tmp_path, host):
    pytest.importorskip("matplotlib")
    path = tmp_path / "time.png"
    out = cli("demo", "--device", "host", "--tokens", 130, "--plot", path).stdout
    assert f"written: {path}" in out.replace("\n", "")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 400 and height > 300


def test_plot_that_cannot_be_drawn_is_refused_at_once(tmp_path, host):
    path = tmp_path / "time.png"
    arguments = ("demo", "--device", "host", "--plot")
    result = cli(*arguments, path, missing=("matplotlib",), status=2)
    assert "pip install 'pyvmm[plot]'" in result.stderr
    pytest.importorskip("matplotlib")
    result = cli(*arguments, tmp_path / "none" / "time.png", status=2)
    assert "there is no folder" in result.stderr
    assert "append in place" not in result.stdout


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ((), 2, "usage"),
        (("nonsense",), 2, "invalid choice"),
        (("demo", "--tokens", "0"), 2, "at least 1"),
        (("demo", "--tokens", "many"), 2, "many"),
        (("demo", "--device", "gpu"), 1, "unknown device 'gpu'"),
        (("demo", "--device", "cuda:63"), 1, "cuda"),
    ],
)
def test_mistakes(arguments, status, message):
    result = cli(*arguments, status=status)
    assert message in result.stderr.lower()
    assert "Traceback" not in result.stderr


def test_version():
    assert cli("--version").stdout == f"pyvmm {pyvmm.__version__}\n"
