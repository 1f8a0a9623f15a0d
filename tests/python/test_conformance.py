"""The simulated driver answers as a real one does: the probes of tests/conformance, asked of
both. Where they differ the simulator is wrong.

A real driver's answers are kept in tests/conformance/<gpu>.txt, for machines without a GPU.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBES = ROOT / "build/tests/conformance/probes"
SIMULATOR = ROOT / "build/sim/libcuda.so.1"
TRANSCRIPTS = sorted((ROOT / "tests/conformance").glob("*.txt"))
NO_DRIVER = 77


def transcript(**environment):
    """What the driver named by VMM_CUDA_LIBRARY answers, None where there is none."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VMM_")}
    result = subprocess.run(
        [PROBES], env={**clean, **environment}, capture_output=True, text=True, timeout=300
    )
    if result.returncode == NO_DRIVER:
        return None
    assert result.returncode == 0, result.stderr
    return answers(result.stdout)


def answers(text):
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [line.split(": ", 1) for line in lines]
    table = {name: said.split(", ") for name, said in pairs}
    assert len(table) == len(lines), "two probes have one name"
    return table


def difference(real, simulated):
    """The answers that are not the same, a line each."""
    lines = []
    for name in [*real, *(name for name in simulated if name not in real)]:
        a, b = real.get(name, ["no such probe"]), simulated.get(name, ["no such probe"])
        if len(a) != len(b):
            lines.append(f"{name}:\n    real      {', '.join(a)}\n    simulated {', '.join(b)}")
            continue
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                before = f"after {a[i - 1]!r}, " if i else ""
                lines.append(f"{name}: {before}the real one says {x!r}, the simulated one {y!r}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def simulated():
    # What new memory holds is no answer, and writing it takes most of the time.
    return transcript(VMM_CUDA_LIBRARY=str(SIMULATOR), VMM_SIM_STRICT="return", VMM_SIM_JUNK="0")


def test_every_probe_is_answered_by_the_simulator(simulated):
    """No probe fails to prepare, or dies there."""
    assert len(simulated) > 150
    unanswered = ("not probed", "the process", "Segmentation", "Aborted")
    bad = {
        name: said
        for name, said in simulated.items()
        if any(answer.startswith(unanswered) for answer in said)
    }
    assert not bad


@pytest.mark.skipif(not TRANSCRIPTS, reason="no transcript of a real driver is committed yet")
@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_simulator_answers_as_the_driver_did(path, simulated):
    different = difference(answers(path.read_text()), simulated)
    assert not different, f"against {path.name}:\n{different}"


def test_simulator_answers_as_the_driver_here(simulated):
    real = transcript()
    if real is None:
        pytest.skip("no CUDA driver or GPU")
    different = difference(real, simulated)
    assert not different, f"against the driver of this machine:\n{different}"
