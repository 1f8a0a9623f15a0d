"""What appends in CUDA graphs cost; needs torch with CUDA.

    python benchmarks/gpu_graph.py --out FOLDER [--device cuda:0]

    device time   of a node that appends at the cursor, in a captured graph of 1 000: a row of 2,
                  8, 16, 32 and 64 KiB, of one tensor and of K and V in one launch, layouts seq
                  and lane (8 lanes), against one copy_ into a fixed place of a tensor (what a
                  node costs that knows its row beforehand) and against torch.cat at 1 024 rows
    host time     of a replay of such a graph with map() and advance(), against the replay alone

Each graph's rows are compared to the last byte. Writes gpu_graph-python-MACHINE.json and prints
the ratios.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import RESULTS, Bench

import pyvmm

LANES = 8
NODES = 1000
CAT_NODES = 50
CAT_ROWS = 1024
REPLAYS = 30
STEPS = 2000


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        torch.cuda.set_device(self.device)
        self.stream = torch.cuda.Stream(self.device)
        self.bench = Bench(
            "gpu_graph", "other cards; the work of a model", options.device, options.out
        )
        self.failures: list[str] = []

    def check(self, what: str, right: bool) -> None:
        if not right:
            self.failures.append(what)
            print(f"WRONG: {what}")

    def capture(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph, stream=self.stream):
            work()
        return graph

    def device_ns(
        self, graph: torch.cuda.CUDAGraph, nodes: int, before: Callable[[], object] = lambda: None
    ) -> list[float]:
        samples = []
        with torch.cuda.stream(self.stream):
            for _ in range(REPLAYS + 3):
                before()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record(self.stream)
                graph.replay()
                end.record(self.stream)
                end.synchronize()
                samples.append(begin.elapsed_time(end) * 1e6 / nodes)
        return samples[3:]

    def tensor(self, layout: str, row_bytes: int, capacity: int) -> pyvmm.VTensor:
        return pyvmm.empty(
            (LANES, 0, row_bytes // LANES),
            "uint8",
            axis=1,
            capacity=capacity,
            device=str(self.device),
            layout=layout,
        )

    def row(self, row_bytes: int) -> torch.Tensor:
        return torch.randint(
            256, (LANES, 1, row_bytes // LANES), dtype=torch.uint8, device=self.device
        )

    def close(self, *tensors: pyvmm.VTensor) -> None:
        gc.collect()
        for t in tensors:
            for _ in range(1000):  # the driver lets go of a graph's tensors a moment later
                try:
                    t.close()
                    break
                except BufferError:
                    time.sleep(0.005)
        pyvmm.default_pool(str(self.device)).trim(wait=True)


def node_time(run: Run, layout: str, row_bytes: int, n_tensors: int) -> None:
    kib = row_bytes // 1024
    pair = "k-and-v" if n_tensors == 2 else "k"
    tensors = [run.tensor(layout, row_bytes, NODES + 8) for _ in range(n_tensors)]
    rows = [run.row(row_bytes) for _ in tensors]
    for t in tensors:
        t.map(NODES)

    def append() -> None:
        for _ in range(NODES):
            pyvmm.append_many(tensors, rows, stream=run.stream)

    def rewind() -> None:
        for t in tensors:
            t.truncate(0, stream=run.stream)

    graph = run.capture(append)
    samples = run.device_ns(graph, NODES, rewind)
    torch.cuda.synchronize(run.device)
    for t, row in zip(tensors, rows, strict=True):
        t.advance(NODES)
        appended = torch.from_dlpack(t)
        run.check(f"{layout} {kib} KiB {pair}", bool((appended == row).all()))
        run.check(f"{layout} {kib} KiB {pair}: cursor", bool(
            (torch.from_dlpack(t.cursor) == NODES).all()))  # fmt: skip
        del appended
    run.bench.report(
        f"device/append-{pair}/{layout}/{kib}KiB", samples, f"device/copy-{pair}/{layout}/{kib}KiB"
    )
    del graph
    run.close(*tensors)


def copy_time(run: Run, layout: str, row_bytes: int, n_tensors: int) -> None:
    """The same bytes to places known beforehand: a node for each tensor."""
    pair = "k-and-v" if n_tensors == 2 else "k"
    tensors = [run.tensor(layout, row_bytes, 8) for _ in range(n_tensors)]
    for t in tensors:
        t.grow(8)
    places = [torch.from_dlpack(t)[:, 3:4] for t in tensors]
    rows = [run.row(row_bytes) for _ in tensors]

    def copy() -> None:
        for _ in range(NODES):
            for place, row in zip(places, rows, strict=True):
                place.copy_(row)

    graph = run.capture(copy)
    run.bench.report(
        f"device/copy-{pair}/{layout}/{row_bytes // 1024}KiB", run.device_ns(graph, NODES)
    )
    places.clear()
    del graph
    run.close(*tensors)


def cat_time(run: Run, row_bytes: int) -> None:
    kib = row_bytes // 1024
    old = [
        torch.zeros(LANES, CAT_ROWS, row_bytes // LANES, dtype=torch.uint8, device=run.device)
        for _ in range(2)
    ]
    new = [run.row(row_bytes) for _ in old]

    def cat() -> None:
        for _ in range(CAT_NODES):
            for a, b in zip(old, new, strict=True):
                torch.cat((a, b), dim=1)

    graph = run.capture(cat)
    run.bench.report(f"device/cat-k-and-v/{kib}KiB", run.device_ns(graph, CAT_NODES))


def host_time(run: Run) -> None:
    """The calling thread, per step of a graph with 32 layers of K and V."""
    tensors = [run.tensor("seq", 2048, STEPS + 8) for _ in range(64)]
    rows = [run.row(2048) for _ in tensors]

    def step() -> None:
        for i in range(0, 64, 2):
            pyvmm.append_many(tensors[i : i + 2], rows[i : i + 2], stream=run.stream)

    def samples_of(work: Callable[[int], object]) -> list[float]:
        samples = []
        for i in range(STEPS):
            begin = time.perf_counter_ns()
            work(i)
            samples.append(float(time.perf_counter_ns() - begin))
            if i % 16 == 15:
                torch.cuda.synchronize(run.device)
        return samples

    graphs = [run.capture(step)]
    for t in tensors:
        t.map(STEPS)

    def bare(i: int) -> None:
        graphs[0].replay()

    def followed(i: int) -> None:
        for t in tensors:
            t.map(i + 1)
        graphs[0].replay()
        for t in tensors:
            t.advance()

    def one(i: int) -> None:
        tensors[0].map(i + 1)
        tensors[0].advance()

    with torch.cuda.stream(run.stream):
        run.bench.report("host/replay", samples_of(bare))
        torch.cuda.synchronize(run.device)
        for t in tensors:
            t.truncate(0, stream=run.stream)
        run.bench.report("host/replay-map-advance, 64 tensors", samples_of(followed), "host/replay")
        torch.cuda.synchronize(run.device)
        for t, row in zip(tensors, rows, strict=True):
            run.check("host: rows", bool((torch.from_dlpack(t) == row).all()))
        tensors[0].truncate(0, stream=run.stream)
        begin = time.perf_counter_ns()
        for i in range(STEPS):
            one(i)
        run.bench.report("host/map-advance, 1 tensor", [(time.perf_counter_ns() - begin) / STEPS])
    graphs.clear()
    run.close(*tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--device", default="cuda:0")
    run = Run(parser.parse_args())
    for layout in ("seq", "lane"):
        for kib in (2, 8, 16, 32, 64):
            for n_tensors in (1, 2):
                copy_time(run, layout, kib * 1024, n_tensors)
                node_time(run, layout, kib * 1024, n_tensors)
    for kib in (2, 16, 64):
        cat_time(run, kib * 1024)
    host_time(run)
    run.bench.close()
    if run.failures:
        sys.exit(f"{len(run.failures)} results are wrong: {run.failures}")


if __name__ == "__main__":
    main()
