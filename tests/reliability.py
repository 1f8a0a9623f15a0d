"""Write what docs/RELIABILITY.md shows of the sweeps; `make reliability` calls this.

The sweep program (tests/sweep) prints a line of JSON for each operation, kind of tensor and
kind of fault. Here they become the table between the page's markers. `make test` sweeps anyway,
and compares the table with what it has found, so the page cannot go stale.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/RELIABILITY.md"
BUILD = ROOT / "build"
# Label, device, environment. Drivers before 12.5 have no event for a whole context.
SWEEPS = (
    ("host", "host", {}),
    ("CUDA 13.0", "cuda:0", {}),
    ("CUDA 12.4", "cuda:0", {"VMM_SIM_DRIVER_VERSION": "12040"}),
    ("CUDA 11.3", "cuda:0", {"VMM_SIM_DRIVER_VERSION": "11030"}),
    ("HIP", "hip:0", {}),
)
# How often these call the driver depends on the machine: on how much it can reserve, on what
# the kernels were compiled with. They are swept, and not counted.
UNCOUNTED = ("device_open", "device_query")
FAULTS = {
    "driver": "driver call",
    "system": "system call",
    "allocation": "allocation",
}


def replace_section(text, name, body):
    """`text` with `body` between the markers of the section `name`."""
    begin, end = f"<!-- {name}: generated -->\n", f"<!-- {name}: end -->"
    head, found, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{PAGE.name} has no section {name}")
    return head + begin + "\n" + body.strip() + "\n\n" + end + tail


def section(name):
    """What stands between the page's markers of the section `name`."""
    rest = PAGE.read_text().partition(f"<!-- {name}: generated -->\n")[2]
    return rest.partition(f"<!-- {name}: end -->")[0].strip()


def spread(numbers):
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"


def sweeps_table(sweeps):
    """Markdown of (label, parsed line) pairs, in the order of the sweep program."""
    rows = {}
    for label, line in sweeps:
        rows.setdefault((line["operation"], label, line["fault"]), []).append(line)
    rows = {key: lines for key, lines in rows.items() if any(x["points"] for x in lines)}
    columns = ("points", "refused", "parked", "absorbed")
    table = [
        "| operation | on | what fails | kinds | calls | points | refused | parked | absorbed |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    totals = dict.fromkeys(columns, 0)
    n_sweeps = 0
    for (operation, label, fault), lines in rows.items():
        cells = [operation, label, FAULTS[fault], str(len(lines))]
        if operation in UNCOUNTED:
            cells += ["varies"] * 5
        else:
            sums = {name: sum(line[name] for line in lines) for name in columns}
            totals = {name: totals[name] + sums[name] for name in columns}
            n_sweeps += len(lines)
            cells += [spread([line["calls"] for line in lines])]
            cells += [f"{sums[name]:,}" for name in columns]
        table.append("| " + " | ".join(cells) + " |")
    total = (
        f"{totals['points']:,} failure points in {n_sweeps:,} sweeps: {totals['refused']:,} times "
        f"the call was refused and all was as before ({totals['parked']:,} times with memory "
        f"parked, since undoing failed, too), {totals['absorbed']:,} times it succeeded all the "
        "same. None lost or leaked anything; in each case the call succeeded when made again."
    )
    return total + "\n\n" + "\n".join(table)


def simulated_driver(build, device):
    """The environment in which libvmm finds the simulated driver for a device."""
    if not device.startswith("hip"):
        return {"VMM_CUDA_LIBRARY": str(build / "sim/libcuda.so.1")}
    drivers = {"VMM_HIP_LIBRARY": str(build / "sim/libamdhip64.so")}
    # Where no compiler has made kernels for AMD GPUs, a text stands for them, which the simulator
    # knows: it runs C functions either way.
    if not (build / "append.hipfb").stat().st_size:
        drivers["VMM_HIP_KERNELS"] = str(ROOT / "tests/sim/append.simcode")
    return drivers


def parse(label, output):
    return [(label, json.loads(line)) for line in output.splitlines() if line.startswith("{")]


def main():
    sweeps = []
    for label, device, extra in SWEEPS:
        print(f"sweeping {label}", flush=True)
        env = {**os.environ, **simulated_driver(BUILD, device), **extra}
        program = BUILD / "tests/sweep"
        result = subprocess.run([program, device, "--json"], env=env, stdout=subprocess.PIPE)
        if result.returncode:
            sys.exit(result.stdout.decode()[-2000:])
        sweeps += parse(label, result.stdout.decode())
    text = PAGE.read_text()
    PAGE.write_text(replace_section(text, "sweeps", sweeps_table(sweeps)))


if __name__ == "__main__":
    main()
