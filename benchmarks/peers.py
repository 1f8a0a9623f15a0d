"""Mapping throughput of this library and of others that map GPU memory, on one card in one run.

    python benchmarks/peers.py [DEVICE] [--out FOLDER] [--kvcached FOLDER] [--bytes 2GiB] [--quick]

Each maps the same bytes, in pieces of 2 MiB and of 32 MiB, new from the driver, from one thread
with the device idle, several times over; between the rounds all of it is given back to the driver.
pyvmm and kvcached take turns, for the host's times change within a run.
Timed are these calls and no others; every one creates memory, maps it and opens access to it:

    pyvmm/S         t.map(n), for each piece one call; t's pool has blocks of S
    pyvmm/S/once    t.map(n) once, for all pieces
    pyvmm-auto/once t.map(n) once, block size "auto", the default
    bare/S          cuMemCreate, cuMemMap and cuMemSetAccess by ctypes, for each piece: what any
                    library must do at the least, and Python's cost of three calls
    kvcached/S      kvcached.vmm_ops.map_to_kv_tensors([offset]) for each piece. One layer, one
                    buffer, contiguous layout, page_size S: so a piece is a page. It unmaps its
                    zero page first: that is its path
    kvcached/S/once map_to_kv_tensors(all offsets), once
    cuda.core/S     VirtualMemoryResource.allocate(S) for each piece: a reservation, too
    cuda.core/S/grow  modify_allocation(buffer, size + S) for each piece of one buffer: it grows
    torch/S         torch.empty(S) for each piece, kept, expandable_segments:True, in a process of
                    its own. torch maps in pieces of its own (2 MiB, or 20 MiB for large
                    allocations); bytes are what torch.cuda.memory_reserved() says it mapped

`extra.bytes_per_second` is bytes over the median of the rounds. What cannot be installed or run is
in the result under "attempts", with its error. kvcached is imported from the environment, or built
in the folder that --kvcached names (its unpacked sdist) by `setup.py build_ext --inplace`, which
needs torch >= 2.10 with CUDA, nvcc and g++; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import RESULTS, Bench

import pyvmm
from pyvmm._sizes import byte_count

MIB = 2**20
PIECES = {"2MiB": 2 * MIB, "32MiB": 32 * MIB}

Samples = list[float]


class Peers:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device: str = options.device
        self.index = int(self.device.partition(":")[2] or 0)
        self.n_bytes: int = options.bytes
        self.bench = Bench(
            "peers",
            "several threads; unmapping; the device at work meanwhile",
            options.device,
            options.out,
        )
        self.attempts: dict[str, dict[str, Any]] = {}

    def rounds(self, piece: int) -> int:
        """Of pieces that large: more where a round is short."""
        return 2 if self.options.quick else 7 if piece < 32 * MIB else 40

    def report(self, id: str, samples: Samples, n_bytes: int, piece: int, base: str = "") -> None:
        rate = n_bytes * 1e9 / sorted(samples)[len(samples) // 2]
        self.bench.report(
            id, samples, base, bytes=n_bytes, piece_bytes=piece, bytes_per_second=rate
        )

    def attempt(self, name: str, measure: Callable[[], dict[str, Any] | None]) -> None:
        """Measure one of them; its failure is a result, too."""
        try:
            self.attempts[name] = {"ran": True, **(measure() or {})}
        except BaseException as error:  # SystemExit of a build script as well
            if isinstance(error, KeyboardInterrupt):
                raise
            self.attempts[name] = {
                "ran": False,
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc()[-4000:],
            }
            print(f"{name}: could not be measured: {self.attempts[name]['error']}"[:2000])


# ---- this library -------------------------------------------------------------------------------


def map_all(run: Peers, block: int | str, step: int) -> Samples:
    samples = []
    with pyvmm.Pool(run.device, block_size=block) as pool:
        for i in range(-1, run.rounds(block if isinstance(block, int) else 0)):
            t = pyvmm.empty(
                (0, MIB),
                "uint8",
                axis=0,
                capacity=run.n_bytes // MIB,
                device=run.device,
                pool=pool,
            )
            begin = time.perf_counter_ns()
            for n_rows in range(step // MIB, run.n_bytes // MIB + 1, step // MIB):
                t.map(n_rows)
            taken = time.perf_counter_ns() - begin
            if t.mapped != t.capacity:
                raise RuntimeError(f"{t.mapped} of {t.capacity} rows are mapped")
            t.close()
            pool.trim(wait=True)
            if i >= 0:
                samples.append(taken)
    return samples


def ours_and_kvcached(run: Peers) -> None:
    path: list[str] = []
    run.attempt("kvcached", lambda: find_kvcached(run, path))
    for size, piece in PIECES.items():
        for once in (False, True):
            ours: Samples = []
            theirs: Samples = []

            part = ["kvcached", str(piece), str(int(once))]
            for _ in range(1 if run.options.quick else 2):
                ours += map_all(run, piece, run.n_bytes if once else piece)
                if run.attempts["kvcached"]["ran"]:
                    run.attempt(
                        "kvcached", functools.partial(measure_kvcached, run, part, path, theirs)
                    )
            end = f"{size}{'/once' if once else ''}"
            run.report(f"pyvmm/{end}", ours, run.n_bytes, piece, f"bare/{size}")
            if theirs:
                run.report(f"kvcached/{end}", theirs, run.n_bytes, piece, f"bare/{size}")
    run.report("pyvmm-auto/once", map_all(run, "auto", run.n_bytes), run.n_bytes, 0, "bare/2MiB")


# ---- the driver's calls alone -------------------------------------------------------------------


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


def bare(run: Peers) -> None:
    cuda = ctypes.CDLL(os.environ.get("VMM_CUDA_LIBRARY") or "libcuda.so.1")
    pinned, on_device, read_write = 1, 1, 3

    def check(code: int) -> None:
        if code:
            raise RuntimeError(f"the CUDA driver answers {code}")

    context = ctypes.c_void_p()
    check(cuda.cuInit(0))
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), run.index))
    check(cuda.cuCtxPushCurrent_v2(context))
    where = _Location(on_device, run.index)
    properties = _Properties(type=pinned, location=where)
    access = _Access(where, read_write)
    for name in ("cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemAddressFree"):
        getattr(cuda, name).argtypes = None
    for size, piece in PIECES.items():
        n = run.n_bytes // piece
        base = ctypes.c_uint64()
        c_piece, zero = ctypes.c_size_t(piece), ctypes.c_uint64(0)
        check(
            cuda.cuMemAddressReserve(
                ctypes.byref(base), ctypes.c_size_t(n * piece), ctypes.c_size_t(0), zero, zero
            )
        )
        samples = []
        for i in range(-1, run.rounds(piece)):
            handles = []
            begin = time.perf_counter_ns()
            for j in range(n):
                handle, at = ctypes.c_uint64(), ctypes.c_uint64(base.value + j * piece)
                check(
                    cuda.cuMemCreate(ctypes.byref(handle), c_piece, ctypes.byref(properties), zero)
                )
                check(cuda.cuMemMap(at, c_piece, ctypes.c_size_t(0), handle, zero))
                check(cuda.cuMemSetAccess(at, c_piece, ctypes.byref(access), ctypes.c_size_t(1)))
                handles.append(handle)
            taken = time.perf_counter_ns() - begin
            for j, handle in enumerate(handles):
                check(cuda.cuMemUnmap(ctypes.c_uint64(base.value + j * piece), c_piece))
                check(cuda.cuMemRelease(handle))
            if i >= 0:
                samples.append(taken)
        check(cuda.cuMemAddressFree(base, ctypes.c_size_t(n * piece)))
        run.report(f"bare/{size}", samples, run.n_bytes, piece)
    check(cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))


# ---- kvcached -----------------------------------------------------------------------------------

BUILD_S = 240


def build_kvcached(folder: Path) -> None:
    """In place; the error is the compiler's last words."""
    if list((folder / "kvcached").glob("_C*.so")):
        return
    from torch.utils.cpp_extension import CUDA_HOME

    # Where there is no libcuda.so to link with, CUDA has one for that.
    stubs = os.pathsep.join(
        str(path) for path in Path(CUDA_HOME or "/usr/local/cuda").glob("**/stubs")
    )
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env={
            **os.environ,
            "MAX_JOBS": str(os.cpu_count() or 1),
            "LIBRARY_PATH": os.pathsep.join(filter(None, (os.environ.get("LIBRARY_PATH"), stubs))),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_S,
    )
    if done.returncode:
        raise RuntimeError(f"kvcached does not build here:\n{done.stdout[-3000:]}")


def find_kvcached(run: Peers, path: list[str]) -> dict[str, Any]:
    """Its version; `path` is where it was built, where that was asked for."""
    version = "0.1.6"
    if run.options.kvcached:
        folder = run.options.kvcached.resolve()
        build_kvcached(folder)
        path.append(str(folder))
        information = (folder / "PKG-INFO").read_text()
        version = information.partition("\nVersion: ")[2].partition("\n")[0]
    return {"version": version}


def measure_kvcached(
    run: Peers, part: list[str], path: list[str], samples: Samples
) -> dict[str, Any]:
    samples += in_process(run, part, path=path)["samples"]
    return run.attempts["kvcached"]  # its version


def kvcached(run: Peers, piece: int, once: bool) -> None:
    """In a process of its own, for its page size is the process's: prints the samples as JSON."""
    from kvcached import vmm_ops  # type: ignore[import-not-found]

    offsets = list(range(0, run.n_bytes, piece))
    vmm_ops.init_kvcached(run.device, piece, True)
    vmm_ops.create_kv_tensors(run.n_bytes, 2, run.device, 1, 1)
    samples = []
    for i in range(-1, run.rounds(piece)):
        begin = time.perf_counter_ns()
        if once:
            mapped = vmm_ops.map_to_kv_tensors(offsets)
        else:
            mapped = all(vmm_ops.map_to_kv_tensors([offset]) for offset in offsets)
        taken = time.perf_counter_ns() - begin
        if not mapped or not vmm_ops.unmap_from_kv_tensors(offsets):
            raise RuntimeError("map_to_kv_tensors or unmap_from_kv_tensors returned false")
        if i >= 0:
            samples.append(taken)
    vmm_ops.shutdown_kvcached()
    print(json.dumps({"samples": samples, "bytes": run.n_bytes}))


# ---- cuda.core ----------------------------------------------------------------------------------


def of_cuda_core(run: Peers) -> dict[str, Any]:
    import cuda.core as core  # type: ignore[import-not-found]

    if not hasattr(core, "VirtualMemoryResource"):
        import cuda.core.experimental as core  # type: ignore[import-not-found,no-redef]
    device = core.Device(run.index)
    device.set_current()
    stream = device.create_stream()
    options = core.VirtualMemoryResourceOptions(handle_type=None)
    try:
        resource = core.VirtualMemoryResource(device, options)
        resource.allocate(2 * MIB, stream=stream).close(stream)
    except Exception:  # versions that refuse handles of no kind
        resource = core.VirtualMemoryResource(device)
    for size, piece in PIECES.items():
        n = run.n_bytes // piece
        samples: Samples = []
        for i in range(-1, run.rounds(piece)):
            begin = time.perf_counter_ns()
            buffers = [resource.allocate(piece, stream=stream) for _ in range(n)]
            taken = time.perf_counter_ns() - begin
            for buffer in buffers:
                buffer.close(stream)
            if i >= 0:
                samples.append(taken)
        run.report(f"cuda.core/{size}", samples, run.n_bytes, piece, f"bare/{size}")
    facts: dict[str, Any] = {"version": importlib.metadata.version("cuda-core")}
    try:
        for size, piece in PIECES.items():
            n = min(run.n_bytes // piece, 64)  # growth may remap all that is there
            samples = []
            moved = 0
            for _ in range(run.rounds(piece)):
                buffer = resource.allocate(piece, stream=stream)
                first = int(buffer.handle)
                begin = time.perf_counter_ns()
                for j in range(2, n + 1):
                    buffer = resource.modify_allocation(buffer, j * piece)
                samples.append(time.perf_counter_ns() - begin)
                moved += int(buffer.handle) != first
                buffer.close(stream)
            id = f"cuda.core/{size}/grow"
            run.report(id, samples, (n - 1) * piece, piece, f"bare/{size}")
            facts[f"address moved, {size}"] = f"in {moved} of {run.rounds}"
    except Exception as error:
        facts["modify_allocation"] = f"{type(error).__name__}: {error}"
        print(f"cuda.core, modify_allocation: {error}"[:500])
    return facts


# ---- torch --------------------------------------------------------------------------------------


def torch_segments(run: Peers, piece: int) -> None:
    """In a process of its own, since the allocator is set up once: prints the samples as JSON."""
    import torch

    torch.cuda.init()
    n = run.n_bytes // piece
    samples, reserved = [], []
    for i in range(-1, run.rounds(piece)):
        before = torch.cuda.memory_reserved()
        begin = time.perf_counter_ns()
        kept = [torch.empty(piece, dtype=torch.uint8, device=run.device) for _ in range(n)]
        taken = time.perf_counter_ns() - begin
        mapped = torch.cuda.memory_reserved() - before
        del kept
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if i >= 0:
            samples.append(taken)
            reserved.append(mapped)
    print(json.dumps({"samples": samples, "bytes": sorted(reserved)[len(reserved) // 2]}))


def of_torch(run: Peers) -> dict[str, Any]:
    import torch

    settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for size, piece in PIECES.items():
        got = in_process(run, ["torch", str(piece)], **settings)
        run.report(f"torch/{size}", got["samples"], got["bytes"], piece, f"bare/{size}")
    return {"version": torch.__version__}


# ---- the program --------------------------------------------------------------------------------


def in_process(
    run: Peers, part: list[str], path: list[str] | None = None, **environment: str
) -> dict[str, Any]:
    """This script once more, for one part; what it printed last, as JSON."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [*(path or []), root, os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, __file__, run.device, "--bytes", str(run.n_bytes)]
    command += ["--quick"] * run.options.quick + ["--part", *part]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


class Part(Peers):
    """What a part in a process of its own needs of a run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, self.n_bytes = options, options.device, options.bytes


def main() -> int:
    parser = argparse.ArgumentParser(prog="peers.py")
    parser.add_argument("device", nargs="?", default="cuda:0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--kvcached", type=Path, help="unpacked sdist of kvcached, to build there")
    parser.add_argument("--bytes", type=lambda text: byte_count(text, "--bytes"), default="2GiB")
    parser.add_argument("--quick", action="store_true", help="few rounds, for the tests")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, *rest = options.part
        if name == "torch":
            torch_segments(Part(options), int(rest[0]))
        else:
            kvcached(Part(options), int(rest[0]), bool(int(rest[1])))
        return 0
    try:
        pyvmm.device_info(options.device)
    except pyvmm.VMMError as error:
        print(f"peers.py needs an NVIDIA GPU: {error}")
        return 77
    run = Peers(options)
    bare(run)
    ours_and_kvcached(run)
    # cuda.core last: versions of it keep one reference of each block for ever.
    measures = {"torch": of_torch, "cuda.core": of_cuda_core}
    for name, measure in measures.items():
        run.attempt(name, lambda measure=measure: measure(run))
    run.bench.close(attempts=run.attempts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
