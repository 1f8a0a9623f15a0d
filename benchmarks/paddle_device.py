"""Can Paddle's memory come from a pool? What its custom devices give, and what that costs.

Compiles paddle_device.cc, loads it as a plug-in, and measures operations on tensors of that
device against the same on `cpu`. docs/paddle.md says what follows from it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import Bench, keep_large_blocks, timed

import pyvmm

HERE = Path(__file__).resolve().parent
BUDGET = 256 << 20


def build(folder):
    import paddle

    library = Path(pyvmm.__file__).parent
    subprocess.run(
        ["g++", "-O2", "-shared", "-fPIC", "-std=c++17", "-w"]
        + [f"-I{paddle.sysconfig.get_include()}", f"-I{pyvmm.get_include()}"]
        + [str(HERE / "paddle_device.cc"), "-o", f"{folder}/libpaddle_device.so"]
        + [f"-L{library}", "-l:libvmm.so.0", f"-Wl,-rpath,{library}"],
        check=True,
    )


def measure():
    keep_large_blocks()
    import numpy
    import paddle

    results = Bench("paddle_device", "a GPU, where each fallback would copy to the host and back")
    x = numpy.random.default_rng(1).random((1024, 1024), "float32")
    operations = {
        "add": lambda x: x + x,
        "matmul": lambda x: paddle.matmul(x, x),
        "softmax": lambda x: paddle.nn.functional.softmax(x),
        "concat": lambda x: paddle.concat([x, x]),
    }
    for name, operation in operations.items():
        for device in ("vmm", "cpu"):
            paddle.set_device(device)
            tensor = paddle.to_tensor(x)
            times = [timed(lambda: operation(tensor)) for _ in range(30)][5:]  # noqa: B023
            results.report(f"{device}/{name}", times, f"vmm/{name}" if device == "cpu" else "")
    paddle.set_device("vmm")
    try:
        kept = [paddle.to_tensor(x) for _ in range(2 * BUDGET // x.nbytes)]
        print(f"no error past the budget: {len(kept)}")
    except Exception as error:
        said = str(error).strip().splitlines()[-1]
        print(f"past the budget of {BUDGET >> 20} MiB: {type(error).__name__}: {said}")
    results.close(paddle=paddle.__version__)


def main():
    if "CUSTOM_DEVICE_ROOT" in os.environ:
        return measure()
    with tempfile.TemporaryDirectory() as folder:
        build(folder)
        # Paddle looks for plug-ins once, when it is imported.
        environment = {
            **os.environ,
            "CUSTOM_DEVICE_ROOT": folder,
            "PADDLE_DEVICE_BUDGET": str(BUDGET),
        }
        return subprocess.call([sys.executable, __file__, *sys.argv[1:]], env=environment)


if __name__ == "__main__":
    sys.exit(main())
