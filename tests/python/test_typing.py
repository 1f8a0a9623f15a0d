"""The stubs: what they promise a type checker, and that they are what the modules are."""

import os
import subprocess
import sys

import pytest

import pyvmm

pytest.importorskip("mypy", reason="mypy is not installed")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(pyvmm.__file__)))

# A line is right where it says nothing, and wrong in the way that its comment names.
SAMPLE = """
import array
from typing import assert_type

import numpy as np
import pyvmm

pool = pyvmm.Pool("host", block_size="2MiB", max_bytes=None)
pool.on_oom(lambda needed_bytes: needed_bytes > 0)
assert_type(pool.stats()["driver_calls"]["map"], int)
assert_type(pool.stats()["everything"], int)  # typeddict-item
pyvmm.Pool("host", block_size=2.5)  # arg-type
with pool.capturing():
    pool.trim(wait=True)

t = pyvmm.empty((8, 0, 4), "bfloat16", axis=1, capacity=100, pool=pool, zero=True)
pyvmm.empty((0, 4), np.float32, capacity=np.int64(100)).close()
pyvmm.empty((0, 4))  # call-arg
assert_type(t.shape, tuple[int, ...])
assert_type(t.layout == "seq", bool)
t.ptr = 3  # misc
t.append(np.zeros((8, 1, 4)), stream=1)
t.append(memoryview(b""))
t.append(array.array("f"))
t.append(t)
t.append([1.0, 2.0])  # arg-type
t.append(np.zeros((8, 1, 4)), stream="default")  # arg-type
assert_type(t.grow(1), pyvmm.View)
assert_type(t[1:2], pyvmm.View)
t[1]  # index
t[:, 1]  # index
len(t)  # arg-type
for row in t:  # attr-defined
    pass
assert_type(t.fork(), pyvmm.VTensor)
assert_type(t.view(0, 2).base.stats()["slack_bytes"], int)
np.asarray(t).sum()
memoryview(t).tolist()
np.from_dlpack(t).sum()
pyvmm.append_many([t, t.fork()], [np.zeros(1), t])
pyvmm.append_many(t, np.zeros(1))  # arg-type
pyvmm.map_many([t, t.fork()], [3, np.int64(4)])
pyvmm.map_many(t, 3)  # arg-type
pyvmm.concat(np.zeros(3), np.zeros(1), axis=0).sum()
pyvmm.concat(np.zeros(3), np.zeros(1), layout=3)  # arg-type
assert_type(pyvmm.concat_stats()["reasons"]["dtypes"], int)
with t as entered:
    assert_type(entered, pyvmm.VTensor)
try:
    t.close()
except pyvmm.OutOfMemoryError as error:
    assert_type(error.driver_code, int)
    assert_type(error.status, str)

class Stream:
    cuda_stream = 7

t.truncate(0, stream=Stream())
"""

# Where the stubs may differ from the modules.
ALLOWED = r"""
# What Cython puts into every module.
.*\.__(pyx_capi|test|reduce_cython|setstate_cython)__
# These only raise a TypeError that says what to do instead: a type checker says it earlier.
pyvmm\._tensor\.VTensor\.__(len|iter)__
pyvmm\.(_tensor\.VTensor|_view\.View)\.__init__
# Not seen from Python before 3.12.
pyvmm\.(_tensor\.VTensor|_view\.View|_numpy\.Reservation)\.__(release_)?buffer__
"""


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "MYPYPATH": ROOT, "PYTHONPATH": ROOT, "NO_COLOR": "1"},
        cwd=os.path.join(ROOT, "tests"),
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_what_a_type_checker_finds(tmp_path):
    sample = tmp_path / "sample.py"
    sample.write_text(SAMPLE)
    result = run(
        "mypy",
        "--strict",
        "--python-version=3.12",
        "--no-error-summary",
        "--hide-error-context",
        "--config-file=",
        f"--cache-dir={tmp_path / 'cache'}",
        str(sample),
    )
    found = {}
    for line in result.stdout.splitlines():
        location, _, text = line.partition(": error: ")
        if text:
            found.setdefault(int(location.rpartition(":")[2]), []).append(text)
    for number, line in enumerate(SAMPLE.splitlines(), 1):
        code, wrong = line.partition("  # ")[2], found.pop(number, [])
        if code:
            assert any(f"[{code}]" in text for text in wrong), (line, wrong)
        else:
            assert not wrong, (line, wrong)
    assert not found and not result.stderr


def test_stubs_are_what_the_modules_are(tmp_path):
    allowed = tmp_path / "allowed"
    allowed.write_text(ALLOWED)
    result = run(
        "mypy.stubtest",
        "pyvmm._append",
        "pyvmm._buffer",
        "pyvmm._concat",
        "pyvmm._core",
        "pyvmm._device",
        "pyvmm._dlpack",
        "pyvmm._error",
        "pyvmm._export",
        "pyvmm._numpy",
        "pyvmm._pool",
        "pyvmm._source",
        "pyvmm._stream",
        "pyvmm._tensor",
        "pyvmm._view",
        f"--allowlist={allowed}",
        "--ignore-unused-allowlist",
    )
    assert result.returncode == 0, result.stdout + result.stderr
