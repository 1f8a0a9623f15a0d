"""What several test modules use: contents and driver calls of any device, new processes."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

import cuda_helper
import pyvmm

# The tests' own modules, and the pyvmm that is tested.
_MODULES = f"{Path(__file__).parent}{os.pathsep}{Path(pyvmm.__file__).parents[1]}"


def to_numpy(array):
    """A copy of what a tensor or a view holds, wherever it lies; nothing stays exported."""
    if array.device == "host":
        return np.array(array)
    return cuda_helper.read(array.ptr, array.shape, array.strides, array.dtype)


def fill(array, values):
    """Write into a tensor or a view in place, wherever it lies."""
    values = np.broadcast_to(values, array.shape).astype(array.dtype)
    if array.device == "host":
        np.asarray(array)[...] = values
    else:
        cuda_helper.write(array.ptr, array.strides, values)


def calls(owner):
    """The driver calls of a tensor or a pool so far, those that were made at all."""
    return {name: n for name, n in owner.stats()["driver_calls"].items() if n}


def calls_since(before, owner):
    """What calls(owner) has gained since it was `before`."""
    now = calls(owner)
    return {name: n - before.get(name, 0) for name, n in now.items() if n != before.get(name, 0)}


def smallest_block(device):
    """Bytes of the smallest block, measured: what the first row of a tensor takes."""
    with pyvmm.empty((0, 1), "uint8", axis=0, capacity=1, device=device, block_size="auto") as t:
        t.map(1)
        return t.stats()["mapped_bytes"]


def run_python(code, *, check=True, **environment):
    """Run a program, which calls the GPU "cuda:0" whosever it is, in a new interpreter; with
    `check` it must succeed and say nothing on
    stderr. Its stdout is the result."""
    program = textwrap.dedent(code)
    if cuda_helper.IS_HIP:
        program = program.replace("cuda:", "hip:")
    result = subprocess.run(
        # Python warns of any fork while a thread runs, and the CUDA driver has some.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        env={**os.environ, "PYTHONPATH": _MODULES, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if not check:
        return result
    if result.returncode or result.stderr:
        said = f"{result.stdout}\n{result.stderr}"
        raise AssertionError(f"the program ended with status {result.returncode}\n{said}")
    return result.stdout


def state(tensor):
    """All of a tensor that a failed call must leave as it was."""
    stats = tensor.stats()
    del stats["driver_calls"]
    contents = to_numpy(tensor).tobytes()
    return tensor.ptr, tensor.shape, tensor.length, tensor.mapped, stats, contents


def held(pool):
    """The bytes of a pool by what they are in; those that count against the budget."""
    stats = pool.stats()
    names = "in_use", "free", "queued", "lookahead", "recycled", "parked"
    return {name: stats[f"{name}_bytes"] for name in names if stats[f"{name}_bytes"]}


def close_after_graphs(t):
    """Close a tensor whose graphs are destroyed: a driver may take its time to let go of what
    they kept."""
    for _ in range(1000):
        try:
            return t.close()
        except BufferError:
            time.sleep(0.005)
    return t.close()
