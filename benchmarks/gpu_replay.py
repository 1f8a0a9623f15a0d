"""One captured append, replayed while the tensor grows; needs torch with CUDA and pyvmm's cursor.

    python benchmarks/gpu_replay.py --out FOLDER [--device cuda:0] [--replays 10000]

A graph appends one row of K and V that another kernel of the graph makes (the step's number), and
is replayed 10 000 times through growth; the host maps ahead of a replay and follows with advance().
In the end every byte is compared. Then a replay past what is mapped: advance() must raise, and no
byte may have changed.

    replay/ours    host time of t.map(), replay() and advance_many() for a step; the graph's tensors
                   are kept by a pyvmm.GraphPins
    replay/ours/kept-by-graph  the same where the graph keeps them by a user object of CUDA's
    replay/bare    of replay() alone, of the same graph with a copy into one place for the append
    device/ours, device/bare   device time a replay, by events around 100 of them
    overflow       host time of a replay past the end with the refusal (one sample)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, Bench

import pyvmm

SHAPE = (8, 1, 8, 128)  # 16 KiB in bfloat16


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        torch.cuda.set_device(self.device)
        self.stream = torch.cuda.Stream(self.device)
        self.replays: int = options.replays
        self.failures: list[str] = []
        self.bench = Bench(
            "gpu_replay", "a model's step: benchmarks of issue 6", str(self.device), options.out
        )

    def check(self, what: str, right: bool) -> None:
        if not right:
            self.failures.append(what)
            print(f"WRONG: {what}")


def new_rows(run: Run) -> tuple[torch.Tensor, list[torch.Tensor]]:
    step = torch.zeros(1, dtype=torch.int32, device=run.device)
    return step, [torch.empty(SHAPE, dtype=torch.int32, device=run.device) for _ in "kv"]


def make_rows(step: torch.Tensor, rows: list[torch.Tensor]) -> None:
    for row in rows:
        row.copy_(step.expand(SHAPE))
    step.add_(1)


def capture(
    run: Run, pool: pyvmm.Pool, work: Callable[[], object], is_kept: bool = False
) -> torch.cuda.CUDAGraph:
    """`is_kept`: pins in Python keep the tensors, and not the graph."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(run.device)
    with pool.capturing(), torch.cuda.graph(graph, stream=run.stream):
        if is_kept:
            pyvmm.GraphPins(run.stream, owner=graph, device=str(run.device))
        work()
    return graph


class Growing:
    """K and V that a graph appends the number of its replay to."""

    def __init__(self, run: Run, pool: pyvmm.Pool, n: int, is_kept: bool) -> None:
        step, rows = new_rows(run)
        self.tensors = [
            pyvmm.empty(
                (SHAPE[0], 0, *SHAPE[2:]),
                "int32",
                axis=1,
                capacity=2 * n + 1024,
                device=str(run.device),
                pool=pool,
            )
            for _ in "kv"
        ]
        self.k, self.v = self.tensors
        with torch.cuda.stream(run.stream):
            pyvmm.append_many(self.tensors, rows, stream=run.stream)  # so that all is loaded
            for t in self.tensors:
                t.truncate(0)
            step.zero_()

        def append() -> None:
            make_rows(step, rows)
            pyvmm.append_many(self.tensors, rows, stream=run.stream)

        self.read = step, rows  # by the graph, which does not keep them
        self.graph = capture(run, pool, append, is_kept)
        self._blocks = self._block_count()
        self.replay = self._replay()

    def _replay(self) -> Callable[[], None]:
        """As a loop has it that looks names up once."""
        tensors, room = tuple(self.tensors), 0
        replay, advance_many = self.graph.replay, pyvmm.advance_many

        def replay_and_follow() -> None:
            nonlocal room
            if room < 1:
                pyvmm.map_many(tensors, tensors[0].length + 1)
            replay()
            room = advance_many(tensors)

        return replay_and_follow

    def _block_count(self) -> int:
        return sum(t.stats()["block_count"] for t in self.tensors)

    def blocks_mapped(self) -> int:
        return self._block_count() - self._blocks

    def check(self, run: Run, n: int) -> None:
        run.check(f"{n} rows in use", all(t.length == n for t in self.tensors))
        wanted = torch.arange(n, dtype=torch.int32, device=run.device).view(1, n, 1, 1)
        with torch.cuda.stream(run.stream):
            for t in self.tensors:
                run.check("every row", bool((torch.from_dlpack(t) == wanted).all()))


def timed_replays(
    run: Run, n: int, *steps: Callable[[], object]
) -> list[tuple[list[float], list[float]]]:
    """Host time of each call, and device time of a hundred of them, of each step; a hundred of one
    after a hundred of the other, for the host's times change within a run."""
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in steps]
    with torch.cuda.stream(run.stream):
        for _ in range(0, n, 100):
            for step, (host, device) in zip(steps, times, strict=True):
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record(run.stream)
                for _ in range(100):
                    at = time.perf_counter_ns()
                    step()
                    host.append(time.perf_counter_ns() - at)
                last.record(run.stream)
                last.synchronize()
                device.append(first.elapsed_time(last) * 1e6 / 100)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_replay.py")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--replays", type=int, default=10_000)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_replay needs torch with CUDA and a GPU", file=sys.stderr)
        return 77
    run = Run(options)
    pool = pyvmm.Pool(str(run.device), block_size="2MiB")
    n = run.replays

    # The baseline: the same graph with a copy where ours appends.
    bare_step, bare_rows = new_rows(run)
    places = [torch.empty_like(row) for row in bare_rows]

    def bare() -> None:
        make_rows(bare_step, bare_rows)
        for place, row in zip(places, bare_rows, strict=True):
            place.copy_(row)

    with torch.cuda.stream(run.stream):
        bare()
    bare_graph = capture(run, pool, bare)

    kept, own = Growing(run, pool, n, True), Growing(run, pool, n, False)
    timed_replays(run, 500, bare_graph.replay)
    times = timed_replays(run, n, kept.replay, bare_graph.replay, own.replay)
    for (host, device), name, growing in zip(
        times, ("ours", "bare", "ours/kept-by-graph"), (kept, None, own), strict=True
    ):
        if growing is None:
            run.bench.report(f"replay/{name}", host)
            run.bench.report(f"device/{name}", device)
            continue
        blocks = growing.blocks_mapped()
        run.bench.report(f"replay/{name}", host, "replay/bare", blocks_mapped=blocks)
        run.bench.report(f"device/{name}", device, "device/bare")
        growing.check(run, n)
    overflow(run, kept.graph, kept.tensors)
    facts: dict[str, Any] = {"replays": n, "failures": run.failures, "torch": torch.__version__}
    run.bench.close(**facts)
    return 1 if run.failures else 0


def overflow(run: Run, graph: torch.cuda.CUDAGraph, tensors: list[pyvmm.VTensor]) -> None:
    """Replay until what is mapped is used up, and once more."""
    k, v = tensors
    with torch.cuda.stream(run.stream):
        while k.length < k.mapped and v.length < v.mapped:
            graph.replay()
            k.advance(1)
            v.advance(1)
        torch.cuda.synchronize(run.device)
        before = [torch.from_dlpack(t).clone() for t in tensors]
        begin = time.perf_counter_ns()
        graph.replay()
        torch.cuda.synchronize(run.device)
        refused = []
        for t in tensors:
            if t.length < t.mapped:
                continue
            try:
                t.advance(1)
                refused.append(False)
            except (pyvmm.VMMError, ValueError) as error:
                print(f"advance() past what is mapped: {type(error).__name__}: {error}")
                refused.append(True)
        run.bench.report("overflow", [time.perf_counter_ns() - begin])
        run.check("advance() raises past what is mapped", bool(refused) and all(refused))
        for t, old in zip(tensors, before, strict=True):
            now = torch.from_dlpack(t)
            same = now.shape == old.shape and bool((now == old).all())
            run.check("nothing was written", same)


if __name__ == "__main__":
    sys.exit(main())
