"""Run every test that this machine can run; `make test` calls this.

C tests are programs, build/tests/c/test_*, each in a process of its own: exit status 0 is
a pass, 77 a skip (the last line printed says why), anything else a failure. One that takes
arguments (its main has argc) runs once for each device and gets the device's name; the
others run once. Devices: host; cuda:0 and hip:0 by the simulated driver; cuda:0 by the real
one.

Python tests run by pytest, on the host and the real GPU, then against the simulated
driver under CUDA's names and under HIP's; skips are told in a line for each reason. The
hand-off to each framework has a process of its own, since frameworks do not always bear one
another; they run where memory is what it says, so not on the simulator.

The checks of tests/checks.mk run the C tests alone, built elsewhere: see --help.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path

import reliability

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600
# Nothing in these depends on a device.
DEVICELESS = (
    "test_conformance.py",
    "test_hip.py",
    "test_packaging.py",
    "test_ptx.py",
    "test_typing.py",
)
OURS = ("VMM_CUDA_LIBRARY", "VMM_HIP_LIBRARY", "VMM_HIP_KERNELS", "PYVMM_TEST_DEVICE")

GPU_PROBE = """
import ctypes, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    sys.exit("libcuda.so.1 not found")
count = ctypes.c_int()
code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
sys.exit(f"the CUDA driver answers {code}" if code else 0 if count.value else "no CUDA device")
"""


class Totals:
    def __init__(self):
        self.passed = self.failed = self.skipped = 0

    def add(self, other):
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped

    def __str__(self):
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def environment(**extra):
    """Ours, with no driver but the one that is asked for."""
    clean = {k: v for k, v in os.environ.items() if k not in OURS}
    return {**clean, **extra}


def simulated(build, device, **extra):
    driver = reliability.simulated_driver(build, device)
    if "VMM_HIP_KERNELS" in driver:
        print("no HIP compiler: on hip:0, simulated, a text stands for the append kernel")
    return environment(**driver, **extra)


def find_devices(build, without_gpu=False):
    """(label, argument, environment) for each way to run a test that takes a device."""
    devices = [("host", "host", environment())]
    # A C test closes all that it opened: what the driver still holds at exit is a leak.
    strict = {"VMM_SIM_CHECK_EXIT": "1"}
    devices.append(("cuda:0, simulated", "cuda:0", simulated(build, "cuda:0", **strict)))
    devices.append(("hip:0, simulated", "hip:0", simulated(build, "hip:0", **strict)))
    if without_gpu:
        return devices
    probe = subprocess.run([sys.executable, "-c", GPU_PROBE], capture_output=True, text=True)
    if probe.returncode == 0:
        devices.append(("cuda:0", "cuda:0", environment()))
    else:
        print(f"skipped: tests on a real GPU: {probe.stderr.strip()}")
    return devices


def run_c_test(program, label, arguments, env, totals, under=()):
    name = f"{program.name} ({label})" if label else program.name
    if not program.exists():
        totals.failed += 1
        print(f"FAIL  {name}: was not built")
        return ""
    try:
        result = subprocess.run(
            [*under, program, *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
        )
        status, output = result.returncode, result.stdout.decode(errors="replace").strip()
    except subprocess.TimeoutExpired as error:
        status = f"still running after {TIMEOUT_S} s"
        output = (error.stdout or b"").decode(errors="replace").strip()
    if status == 0:
        totals.passed += 1
        print(f"pass  {name}")
    elif status == 77:
        totals.skipped += 1
        print(f"skip  {name}: {output.splitlines()[-1] if output else 'no reason given'}")
    else:
        totals.failed += 1
        print(f"FAIL  {name}: exit status {status}\n{output}")
    return output


def run_sweeps(build, under, totals):
    """tests/sweep: every call that can fail does, on the host and on simulated drivers."""
    sweeps = []
    for label, device, extra in reliability.SWEEPS:
        program, arguments = build / "tests/sweep", [device, "--json"]
        env = simulated(build, device, **extra)
        output = run_c_test(program, label, arguments, env, totals, under)
        sweeps += reliability.parse(label, output)
    return sweeps


def check_page(sweeps, totals):
    """docs/RELIABILITY.md says what was swept."""
    if reliability.sweeps_table(sweeps) == reliability.section("sweeps"):
        totals.passed += 1
        print("pass  docs/RELIABILITY.md")
    else:
        totals.failed += 1
        print("FAIL  docs/RELIABILITY.md: not what was swept: make reliability, and commit it")


def run_c_tests(build, devices, only="", under=()):
    totals = Totals()
    for source in sorted((ROOT / "tests/c").glob("test_*.c")):
        if not re.search(only, source.stem):
            continue
        program = build / "tests/c" / source.stem
        if re.search(r"\bmain\(int argc", source.read_text()):
            for label, argument, env in devices:
                run_c_test(program, label, [argument], env, totals, under)
        else:
            run_c_test(program, "", [], environment(), totals, under)
    return totals


def skip_reason(skipped):
    """Why a test was skipped; of a module that skips itself, the report tells it in the text."""
    of_module = re.search(r"Skipped: (.*)['\"]\)", skipped.text or "")
    return of_module[1] if of_module else skipped.get("message")


def run_pytest(label, arguments, env):
    print(f"\n== pytest, {label}", flush=True)
    report = ROOT / "build/pytest.xml"
    report.unlink(missing_ok=True)
    chosen = ["-q", "-rfE", "-m", "not frameworks", f"--junit-xml={report}"]
    command = [sys.executable, "-m", "pytest", *chosen, *arguments]
    status = subprocess.call(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL)
    totals = Totals()
    reasons = Counter()
    if report.exists():
        for suite in xml.parse(report).iter("testsuite"):
            totals.skipped += int(suite.get("skipped"))
            totals.failed += int(suite.get("failures")) + int(suite.get("errors"))
            totals.passed += int(suite.get("tests"))
            reasons.update(skip_reason(skip) for skip in suite.iter("skipped"))
        totals.passed -= totals.skipped + totals.failed
    for reason, count in reasons.most_common():
        print(f"skip  {count} test{'s' * (count > 1)}: {reason}")
    # 5: nothing was collected, as when a module skips itself. Any other status but 0 is a
    # failure even where the report counts none: a crash leaves no report.
    if status not in (0, 5) and not totals.failed:
        print(f"FAIL  pytest, {label}: exit status {status}")
        totals.failed += 1
    return totals


def run_python_tests(build, devices):
    tests = ROOT / "tests/python"
    handoffs = sorted(tests.glob("test_handoff_*.py"))
    real = "host and cuda:0" if devices[-1][0] == "cuda:0" else "host"
    totals = run_pytest(real, [tests, "--ignore-glob=*/test_handoff_*"], environment())
    for path in handoffs:
        totals.add(run_pytest(path.stem, [path], environment()))
    ignored = [f"--ignore={tests / name}" for name in DEVICELESS]
    arguments = [tests, "--ignore-glob=*/test_handoff_*", *ignored]
    env = simulated(build, "cuda:0", PYVMM_TEST_DEVICE="sim")
    totals.add(run_pytest("simulated cuda:0", arguments, env))
    env = simulated(build, "hip:0", PYVMM_TEST_DEVICE="sim-hip")
    totals.add(run_pytest("simulated hip:0", arguments, env))
    return totals


def parse_arguments():
    parser = argparse.ArgumentParser(description="Run the tests.")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where they were built")
    parser.add_argument("--c-only", action="store_true", help="C tests, no real GPU, no Python")
    parser.add_argument("--only", default="", help="C tests whose names match this expression")
    parser.add_argument("--under", type=shlex.split, default=[], help="command that runs each")
    return parser.parse_args()


def main():
    sys.stdout.reconfigure(line_buffering=True)
    arguments = parse_arguments()
    build = arguments.build.resolve()
    if not all((build / "sim" / name).exists() for name in ("libcuda.so.1", "libamdhip64.so")):
        sys.exit("the simulated driver was not built: run the tests by make")
    devices = find_devices(build, without_gpu=arguments.c_only)
    totals = run_c_tests(build, devices, arguments.only, arguments.under)
    if re.search(arguments.only, "sweep"):
        failed = totals.failed
        sweeps = run_sweeps(build, arguments.under, totals)
        if totals.failed == failed and not arguments.c_only:
            check_page(sweeps, totals)
    if not arguments.c_only:
        python_totals = run_python_tests(build, devices)
        print(f"\nC tests: {totals}\nPython tests: {python_totals}")
        totals.add(python_totals)
    print(totals)
    return 1 if totals.failed or not totals.passed else 0


if __name__ == "__main__":
    sys.exit(main())
