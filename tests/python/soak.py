"""The state machine of machine.py for as long as one likes; `make soak` calls this.

PYVMM_SOAK_STEPS   how many steps in all, half of them on the host, half on the simulated
                   driver (100 000)
PYVMM_SOAK_SEED    where to begin; without it, anywhere. A failure says the seed to begin
                   with for the same sequence
PYVMM_SOAK_SHRINK  1: make a sequence that fails short, which takes minutes
PYVMM_SOAK_DEVICE  "host" or "sim", for one of the two alone
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIMULATOR = ROOT / "build/sim/libcuda.so.1"
STEPS_AT_ONCE = 2000  # of one seed


def take_steps(name, n_steps, first_seed):
    """In this process, until it has taken that many steps."""
    import gc

    import hypothesis
    from hypothesis.stateful import run_state_machine_as_test

    from machine import Machine, done, failed

    gc.freeze()  # collecting what is there for good takes longer than the steps
    steps_each = 100
    phases = [hypothesis.Phase.generate]
    if os.environ.get("PYVMM_SOAK_SHRINK"):
        phases.append(hypothesis.Phase.shrink)
    settings = hypothesis.settings(
        max_examples=STEPS_AT_ONCE // steps_each,
        phases=phases,
        stateful_step_count=steps_each,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    began, seed = time.monotonic(), first_seed
    while done.total() < n_steps:
        machine = type("Machine", (Machine,), {"device": "host" if name == "host" else "cuda:0"})
        try:
            run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=settings)
        except BaseException:
            print(
                f"{name}: FAILED. The same again: make soak PYVMM_SOAK_DEVICE={name} "
                f"PYVMM_SOAK_SEED={seed} PYVMM_SOAK_STEPS=1",
                flush=True,
            )
            raise
        seed += 1
        print(
            f"{name}: {done.total()} steps, {failed.total()} driver calls made to fail, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    print(f"{name}: seeds {first_seed} to {seed - 1}")
    for title, counts in ("steps", done), ("driver calls made to fail", failed):
        if counts.total():
            print(
                f"{name}: {counts.total()} {title}: "
                + ", ".join(f"{key} {n}" for key, n in counts.most_common())
            )


def main():
    n_steps = int(os.environ.get("PYVMM_SOAK_STEPS") or 100_000)
    seed = int(os.environ.get("PYVMM_SOAK_SEED") or random.randrange(1_000_000))
    chosen = os.environ.get("PYVMM_SOAK_DEVICE")
    names = [chosen] if chosen else ["host", "sim"]
    # The machine asks the tests' own modules which device this is. Small blocks are quicker.
    simulated = {
        "VMM_CUDA_LIBRARY": str(SIMULATOR),
        "PYVMM_TEST_DEVICE": "sim",
        "VMM_SIM_GRANULARITY": "65536",
    }
    extra = {"host": {"PYVMM_TEST_DEVICE": "host"}, "sim": simulated}
    for name in names:
        arguments = [name, str(-(-n_steps // len(names))), str(seed)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **extra[name]}
        if subprocess.call([sys.executable, __file__, *arguments], env=environment):
            return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take_steps(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main())
