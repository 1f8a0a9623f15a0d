"""The benchmarks run, on the host and on the simulated driver, and what reads results does, too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
PROGRAMS = ROOT / "build/benchmarks"
TWINS = sorted(
    path.stem for path in BENCHMARKS.glob("bench_*.c") if path.with_suffix(".py").exists()
)
# What one language alone has: see benchmarks/bench.py.
APART = ("base/", "torch/", "concat/torch/")


@pytest.fixture(scope="module")
def target():
    """Where benchmarks run here, and what they need for that."""
    kind = os.environ.get("PYVMM_TEST_DEVICE", "")
    device = {"sim": "cuda:0", "sim-hip": "hip:0", "": "host"}.get(kind, kind)
    # Blocks that are not junk cost no time: these fill gigabytes. Torch would find the simulator.
    simulated = {"VMM_SIM_JUNK": "0", "VMM_SIM_DELAY_US": "0", "VMM_SIM_MEMORY": str(8 << 30)}
    return device, simulated if kind.startswith("sim") else {}


def run(*command, status=0, **environment):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


def result_in(folder, name, language):
    [path] = folder.glob(f"{name}-{language}-*.json")
    result = json.loads(path.read_text())
    assert result["benchmark"] == name and result["language"] == language
    assert result["not_measured"] and result["machine"] and result["version"]
    ids = [row["id"] for row in result["rows"]]
    assert ids and len(set(ids)) == len(ids)
    for row in result["rows"]:
        assert 0 < row["p50_ns"] <= row["p99_ns"] and row["n"] > 0, row
        assert ("max_ns" in row) == ("p999_ns" in row) == (row["n"] >= 1000), row
        if "max_ns" in row:
            assert row["p99_ns"] <= row["p999_ns"] <= row["max_ns"], row
        assert row["baseline"] in ("", *ids), row
    return result


def ours(result):
    return {row["id"] for row in result["rows"] if not row["id"].startswith(APART)}


@pytest.fixture(scope="module")
def results(target, tmp_path_factory):
    """The folder that quick runs of the named benchmarks have written into."""
    folder = tmp_path_factory.mktemp("results")
    device, environment = target
    done = {}

    def of(name, language):
        if (name, language) not in done:
            command = [PROGRAMS / name]
            if language == "python":
                command = [sys.executable, BENCHMARKS / f"{name}.py"]
            output = run(*command, device, "--quick", "--out", folder, **environment)
            if not list(folder.glob(f"{name}-{language}-*.json")):
                done[name, language] = output.strip().splitlines()[-1]  # why not
            else:
                done[name, language] = result_in(folder, name, language)
        if isinstance(done[name, language], str):
            pytest.skip(done[name, language])
        return done[name, language]

    of.folder = folder
    return of


def test_every_program_has_a_twin():
    assert TWINS == sorted(path.stem for path in BENCHMARKS.glob("bench_*.c"))


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_same_ids(name, results):
    if not (PROGRAMS / name).exists():
        pytest.skip("benchmarks are not built: make bench-programs")
    assert ours(results(name, "c")) == ours(results(name, "python"))


def test_no_append_through_boundaries_is_left_out(results, target):
    """Every append is within mapped rows or at a boundary, and boundaries are where blocks end."""
    rows = {row["id"]: row for row in results("bench_boundaries", "python")["rows"]}
    for name in ("off", "on", "paced"):
        counts = {part: rows[f"{name}/{part}"]["n"] for part in ("all", "within", "boundary")}
        assert counts["all"] == counts["within"] + counts["boundary"]
        extra = rows[f"{name}/boundary"]["extra"]
        assert extra["boundaries"] == counts["boundary"]
        blocks = counts["all"] * extra["row_bytes"] / extra["block_bytes"]
        assert abs(counts["boundary"] - blocks) <= 2 or extra["boundaries_mapped_by_caller"] == 0


def test_slack_is_what_is_mapped_and_not_used(results):
    rows = [row for row in results("bench_slack", "python")["rows"] if "blocks" in row["extra"]]
    for row in rows:
        extra = row["extra"]
        row_bytes = {"host": 2048}.get(results("bench_slack", "python")["device"], 16384)
        used = extra["tokens"] * 64 * row_bytes
        assert extra["mapped_bytes"] == used + extra["slack_bytes"]
        if "block_bytes" in extra:
            assert extra["mapped_bytes"] == extra["blocks"] * extra["block_bytes"]


def test_compare(results, tmp_path, host):
    results("bench_grow", "python")
    out = run(sys.executable, BENCHMARKS / "compare.py", results.folder, results.folder)
    assert "grow/within/2KiB" in out and "equal" in out
    [path] = results.folder.glob("bench_grow-python-*.json")
    twice = json.loads(path.read_text())
    for row in twice["rows"]:
        row["p50_ns"] *= 2
    other = tmp_path / "twice.json"
    other.write_text(json.dumps(twice))
    out = run(sys.executable, BENCHMARKS / "compare.py", path, other)
    lines = [line.split() for line in out.splitlines() if " base/call " in line]
    assert [line[0] for line in lines] == ["2"]
    other.write_text("{}")
    out = run(sys.executable, BENCHMARKS / "compare.py", path, other, status=2)
    assert "twice.json holds no result of a benchmark" in out
    twice["rows"] = [{**twice["rows"][0], "id": "another"}]
    other.write_text(json.dumps(twice))
    out = run(sys.executable, BENCHMARKS / "compare.py", path, other, status=1)
    assert "no id is in both" in out


def test_make_bench(tmp_path, host):
    command = [sys.executable, BENCHMARKS / "run.py", "host", "--quick", "--out", tmp_path]
    out = run(*command, "--only", "grow")
    result = result_in(tmp_path, "bench_grow", "python")
    [summary] = tmp_path.glob("bench-*.md")
    assert f"written: {summary}" in out
    text = summary.read_text()
    for row in result["rows"]:
        assert f"| `{row['id']}` |" in text
    assert "`base/call`" in text and result["not_measured"] in text


def test_bench_command(tmp_path, target):
    device, environment = target
    command = [sys.executable, "-m", "pyvmm", "bench", device, "--quick", "--out", tmp_path]
    out = run(*command, "--only", "grow", "length", **environment)
    for name in ("bench_grow", "bench_length"):
        result_in(tmp_path, name, "python")
    assert f"python -m pyvmm plot {tmp_path}" in out
    out = run(*command, "--only", "nothing", status=1, **environment)
    assert "no measurement 'nothing'" in out and "append_many" in out


def test_plot_command(results, tmp_path, host):
    pytest.importorskip("matplotlib")
    for name in ("bench_grow", "bench_length", "bench_boundaries"):
        results(name, "python")
    plot = [sys.executable, "-m", "pyvmm", "plot"]
    run(*plot, results.folder, "--out", tmp_path, "--format", "svg")
    drawn = {path.stem.rpartition("-")[2] for path in tmp_path.glob("*.svg")}
    assert drawn == {"time", "memory", "blocks", "percentiles"}
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    run(*plot, results.folder, "--out", tmp_path, "--format", "svg")
    assert first == {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    out = run(*plot, tmp_path / "nothing.json", "--out", tmp_path, status=1)
    assert "there is no such file" in out
    (tmp_path / "empty").mkdir()
    assert "nothing to draw" in run(*plot, tmp_path / "empty", "--out", tmp_path, status=1)


def test_plot_without_matplotlib(tmp_path, host):
    program = (
        "import runpy, sys; sys.modules['matplotlib'] = None; "
        f"sys.argv = ['pyvmm', 'plot', {str(tmp_path)!r}]; "
        "runpy.run_module('pyvmm', run_name='__main__')"
    )
    out = run(sys.executable, "-c", program, status=2)
    assert "matplotlib is not installed" in out and "pip install 'pyvmm[plot]'" in out


def test_must_show_judges_by_the_figures(tmp_path, host):
    def write(grow_ns):
        result = {
            "benchmark": "bench_grow",
            "language": "c",
            "machine": "a machine",
            "device": "cuda:0",
            "version": "0",
            "not_measured": "",
            "rows": [{"id": "grow/within/16KiB", "p50_ns": grow_ns, "p99_ns": grow_ns}],
        }
        (tmp_path / "grow.json").write_text(json.dumps(result))

    command = [sys.executable, BENCHMARKS / "must_show.py", tmp_path, "--points", "1"]
    write(14.0)
    out = run(*command)
    assert "| 1 | grow(1) in C | ≤ 15.0 ns | 14.0 ns | yes |" in out
    assert "not measured: no result of gpu_append (python)" in out
    write(16.0)
    assert "| 1 | grow(1) in C | ≤ 15.0 ns | 16.0 ns | NO |" in run(*command, status=1)
