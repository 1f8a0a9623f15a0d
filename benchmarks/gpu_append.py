"""What appending costs on a GPU, against torch.cat; needs torch with CUDA.

    python benchmarks/gpu_append.py --out FOLDER [--device cuda:0] [--length 4096]

K and V of one layer, bfloat16, batch 8, 32 heads of 128:

    device time   per append of K and V (one launch) in a captured graph of 1 000, against
                  torch.cat of both in a captured graph, layouts seq and lane; also for batch 32,
                  8 heads, 65536 tokens, and of K alone with rows of 2, 16 and 64 KiB
    attention     one decode step (SDPA, flash) over the cache, against the same over
                  torch.empty memory with the same strides
    host time     of append, append_many and grow from Python, of copying a row into a slice of
                  a preallocated tensor, and of torch.cat, each against bare launches by C in the
                  same process
    driver calls  and slack by block size, and what an append costs that needs a block

Every result is checked: the rows against what was appended, attention against attention.
Writes gpu_append-MACHINE.json, in the form that compare.py reads, and a Markdown table.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import Bench, bare_launches, slug
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend

import pyvmm

BATCH, HEADS, DIM = 8, 32, 128
DTYPE = torch.bfloat16
NODES = 1000  # appends in a graph
CAT_NODES = 50
REPLAYS = 30


class Run:
    """The device, its stream, and the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        torch.cuda.set_device(self.device)
        self.stream = torch.cuda.Stream(self.device)
        self.length: int = options.length
        self.bench = Bench(
            "gpu_append",
            "other cards, several GPUs, a whole model; attention in captured graphs only",
            device=options.device,
            out=options.out,
        )
        self.facts: dict[str, Any] = {}
        self.failures: list[str] = []

    def check(self, what: str, right: bool) -> None:
        if not right:
            self.failures.append(what)
            print(f"WRONG: {what}")

    def row(self, batch: int = BATCH, heads: int = HEADS) -> torch.Tensor:
        row = torch.randn(batch, 1, heads, DIM, device=self.device, dtype=DTYPE)
        torch.cuda.synchronize(self.device)
        return row

    def close(self, *tensors: pyvmm.VTensor) -> None:
        """A graph that appends to a tensor pins it, until the driver has given the graph up."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        for t in tensors:
            for _ in range(100):
                try:
                    t.close()
                except BufferError:
                    time.sleep(0.02)
                else:
                    break
            else:
                print(f"still pinned: {t!r}")
        pyvmm.default_pool(str(self.device)).trim(wait=True)
        torch.cuda.empty_cache()

    def empty(
        self, layout: str, capacity: int, batch: int = BATCH, heads: int = HEADS, **arguments: Any
    ) -> pyvmm.VTensor:
        return pyvmm.empty(
            (batch, 0, heads, DIM),
            "bfloat16",
            axis=1,
            capacity=capacity,
            device=str(self.device),
            layout=layout,
            **arguments,
        )

    def filled(
        self, layout: str, length: int, capacity: int, batch: int = BATCH, heads: int = HEADS
    ) -> pyvmm.VTensor:
        """A tensor of `length` random rows, all of its capacity mapped."""
        t = self.empty(layout, capacity, batch, heads)
        t.map(capacity)
        for begin in range(0, length, 1024):
            n = min(1024, length - begin)
            with torch.cuda.stream(self.stream):
                x = torch.randn(batch, n, heads, DIM, device=self.device, dtype=DTYPE)
                t.append(x, stream=self.stream)
        torch.cuda.synchronize(self.device)
        return t

    def capture(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with (
            pyvmm.default_pool(str(self.device)).capturing(),
            torch.cuda.graph(graph, stream=self.stream),
        ):
            work()
        return graph

    def replay_ns(
        self,
        graphs: list[torch.cuda.CUDAGraph],
        nodes: int,
        replays: int = REPLAYS,
        after: Callable[[], object] = lambda: None,
    ) -> list[list[float]]:
        """Device nanoseconds per node of each graph, replayed in turns."""
        samples: list[list[float]] = [[] for _ in graphs]
        with torch.cuda.stream(self.stream):
            for round in range(-3, replays):
                for graph, times in zip(graphs, samples, strict=True):
                    begin = torch.cuda.Event(enable_timing=True)
                    end = torch.cuda.Event(enable_timing=True)
                    begin.record(self.stream)
                    graph.replay()
                    end.record(self.stream)
                    end.synchronize()
                    after()
                    if round >= 0:
                        times.append(begin.elapsed_time(end) * 1e6 / nodes)
        return samples


def cat_time(run: Run, id: str, batch: int, heads: int, length: int, nodes: int) -> None:
    new_k, new_v = (run.row(batch, heads) for _ in "kv")
    keys = torch.randn((batch, length, heads, DIM), device=run.device, dtype=DTYPE)
    values = torch.randn_like(keys)

    def cat() -> None:
        for _ in range(nodes):
            torch.cat((keys, new_k), dim=1)
            torch.cat((values, new_v), dim=1)

    torch.cuda.synchronize(run.device)
    [samples] = run.replay_ns([run.capture(cat)], nodes, REPLAYS if nodes == CAT_NODES else 10)
    run.bench.report(id, samples)


def append_time(
    run: Run,
    id: str,
    tensors: list[pyvmm.VTensor],
    rows: list[torch.Tensor],
    length: int,
    baseline: str = "",
) -> None:
    """Device time of a captured append to all of `tensors`; the rows are looked at, too. A captured
    append goes where the tensor's cursor stands, and the host follows after each replay."""
    follows = hasattr(tensors[0], "advance")
    for t in tensors:
        t.truncate(length)
        if follows:
            t.cursor  # noqa: B018 (made here, not in the capture)

    def launches() -> int:
        return sum(t.stats()["driver_calls"]["launch"] for t in tensors)

    def append() -> None:
        for _ in range(NODES):
            pyvmm.append_many(tensors, rows, stream=run.stream)

    def follow() -> None:
        for t in tensors if follows else []:
            t.advance(NODES)
            t.truncate(length)

    before = launches()
    graph = run.capture(append)
    # What a cursor takes to be made comes on top of the launches of the appends.
    run.check(f"{id}: one launch for each append", 0 <= launches() - before - NODES <= 8)
    [samples] = run.replay_ns([graph], NODES, after=follow)
    row_bytes = sum(t.nbytes for t in rows)
    run.bench.report(id, samples, baseline, row_bytes=row_bytes, nodes=NODES)
    with torch.cuda.stream(run.stream):
        if follows:
            graph.replay()
            for t in tensors:
                t.advance(NODES)
        for t, row in zip(tensors, rows, strict=True):
            appended = torch.from_dlpack(t)[:, length:]
            run.check(f"{id}: {NODES} rows", appended.shape[1] == NODES)
            run.check(f"{id}: what they hold", bool((appended == row).all()))
    torch.cuda.synchronize(run.device)
    del graph


def device_time(run: Run) -> None:
    """(a): the cost of a node."""
    cat_time(run, "device/cat-k-and-v", BATCH, HEADS, run.length, CAT_NODES)
    torch.cuda.empty_cache()
    for layout in ("seq", "lane"):
        k, v = (run.filled(layout, run.length, run.length + NODES + 16) for _ in "kv")
        rows = [run.row(), run.row()]
        cat = "device/cat-k-and-v"
        append_time(run, f"device/append-k-and-v/{layout}", [k, v], rows, run.length, cat)
        run.close(k, v)
        for heads in (1, 8, 32):
            k = run.filled(layout, 64, 64 + NODES + 16, heads=heads)
            size = f"{BATCH * heads * DIM * 2 // 1024}KiB"
            row = run.row(heads=heads)
            append_time(run, f"device/append-k/{layout}/{size}", [k], [row], 64)
            run.close(k)


def device_time_long(run: Run) -> None:
    """(a), where a concatenate copies 8 GiB."""
    batch, heads, length = 32, 8, 65536
    cat = "device/cat-k-and-v/long"
    cat_time(run, cat, batch, heads, length, 5)
    torch.cuda.empty_cache()
    k, v = (run.filled("seq", length, length + NODES + 16, batch, heads) for _ in "kv")
    rows = [run.row(batch, heads) for _ in "kv"]
    append_time(run, "device/append-k-and-v/long", [k, v], rows, length, cat)
    run.close(k, v)


def attention_over(run: Run, layout: str, tensors: list[pyvmm.VTensor]) -> None:
    with torch.cuda.stream(run.stream):
        query = torch.randn(BATCH, HEADS, 1, DIM, device=run.device, dtype=DTYPE)
        ours = [torch.from_dlpack(t) for t in tensors]
        plain = [
            torch.empty_strided(c.shape, c.stride(), dtype=DTYPE, device=run.device).copy_(c)
            for c in ours
        ]

    def attend_to(caches: list[torch.Tensor], times: int) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            for _ in range(times):
                output = attend(query, *(cache.transpose(1, 2) for cache in caches))
        return output

    with torch.cuda.stream(run.stream):
        equal = bool(torch.equal(attend_to(plain, 3), attend_to(ours, 3)))
    run.check(f"attention, layout {layout}", equal)
    torch.cuda.synchronize(run.device)
    graphs = [
        run.capture(lambda: attend_to(plain, CAT_NODES)),
        run.capture(lambda: attend_to(ours, CAT_NODES)),
    ]
    plain_ns, ours_ns = run.replay_ns(graphs, CAT_NODES)
    baseline = f"attention/torch.empty/{layout}"
    reference = run.bench.report(baseline, plain_ns)
    measured = run.bench.report(f"attention/vtensor/{layout}", ours_ns, baseline)
    run.facts[f"attention ratio, {layout}"] = measured / reference


def attention(run: Run) -> None:
    """(b): reading the cache, against ordinary memory with the same strides."""
    for layout in ("seq", "lane"):
        k, v = (run.filled(layout, run.length, run.length) for _ in "kv")
        attention_over(run, layout, [k, v])
        run.close(k, v)


def host_time(run: Run) -> None:
    """(c): what the calling thread pays, in batches that fit the launch queue."""
    batch, rounds, length = 400, 20, run.length
    capacity = length + batch + 16
    k, v = (run.filled("seq", length, capacity) for _ in "kv")
    new_k, new_v = run.row(), run.row()
    buffer = torch.empty(BATCH, capacity, HEADS, DIM, device=run.device, dtype=DTYPE)
    cache = buffer[:, :length].contiguous()
    torch.cuda.synchronize(run.device)

    index = int(run.device.index or 0)

    def measure(id: str, calls: Callable[[int], object], n: int = batch) -> None:
        """`calls(n)` makes n of them: a sample is the mean of these, for a look at the clock takes
        a twentieth of a launch. As many bare launches before each, for the host's times change
        within a run: base/ID."""
        samples: list[float] = []
        bare: list[float] = []
        for round in range(rounds + 1):
            torch.cuda.synchronize(run.device)
            launches = bare_launches(index, run.stream.cuda_stream, batch)
            begin = time.perf_counter_ns()
            calls(n)
            taken = (time.perf_counter_ns() - begin) / n
            torch.cuda.synchronize(run.device)
            k.truncate(length)
            v.truncate(length)
            if round > 0:  # the first warms up
                bare.append(launches)
                samples.append(taken)
        run.bench.report(f"base/{id}", bare)
        run.bench.report(id, samples, f"base/{id}")

    def cats(n: int) -> None:
        for _ in range(n):
            torch.cat((cache, new_k), dim=1)

    def copies_into_slices(n: int) -> None:
        for i in range(n):
            buffer[:, length + i : length + i + 1].copy_(new_k)

    def appends(n: int) -> None:
        for _ in range(n):
            k.append(new_k)

    def appends_of_a_vtensor(n: int) -> None:
        for _ in range(n):
            k.append(row)

    def appends_on_a_stream(n: int) -> None:
        for _ in range(n):
            k.append(new_k, stream)

    def appends_of_k_and_v(n: int) -> None:
        for _ in range(n):
            pyvmm.append_many(pair, rows)

    def grows(n: int) -> None:
        for _ in range(n):
            k.grow(1)

    pair, rows, stream = [k, v], [new_k, new_v], run.stream
    with torch.cuda.stream(stream):
        row = run.filled("seq", 1, 1)
        measure("host/cat-k", cats, 20)
        measure("host/copy-into-slice", copies_into_slices)
        measure("host/append", appends)
        measure("host/append/vtensor", appends_of_a_vtensor)
        measure("host/append/stream-named", appends_on_a_stream)
        measure("host/append-many/k-and-v", appends_of_k_and_v)
        measure("host/grow", grows)
    run.close(k, v, row)


def driver_calls(run: Run) -> None:
    """(d): what growth costs by block size."""
    tokens = 8192
    new = run.row()
    table = []
    for block in ("auto", "2MiB", "16MiB", "32MiB", "128MiB"):
        with pyvmm.Pool(str(run.device), block_size=block) as pool:
            t = run.empty("seq", tokens, pool=pool)
            within, beyond = [], []
            most_slack = 0
            with torch.cuda.stream(run.stream):
                for i in range(tokens):
                    needs_block = t.mapped == t.length
                    begin = time.perf_counter_ns()
                    t.append(new)
                    (beyond if needs_block else within).append(time.perf_counter_ns() - begin)
                    if needs_block:
                        most_slack = max(most_slack, t.stats()["slack_bytes"])
                    if i % 256 == 255:
                        torch.cuda.synchronize(run.device)
                right = bool((torch.from_dlpack(t) == new).all())
            run.check(f"blocks of {block}: the rows", right)
            stats = t.stats()
            run.bench.report(f"growing/within/{block}", within)
            run.bench.report(f"growing/needs-block/{block}", beyond)
            calls = {name: n for name, n in stats["driver_calls"].items() if n}
            launches = calls.pop("launch", 0)
            table.append(
                {
                    "block_size": block,
                    "blocks": stats["block_count"],
                    "mapped_bytes": stats["mapped_bytes"],
                    "most_slack_bytes": most_slack,
                    "launches": launches,
                    "other_driver_calls": calls,
                }
            )
            t.close()
            pool.trim(wait=True)
    run.facts["driver calls by block size"] = table
    run.facts["tokens of that"] = tokens


def markdown(run: Run) -> str:
    p50 = {str(row["id"]): float(str(row["p50_ns"])) for row in run.bench.rows}

    def us(id: str) -> str:
        return f"{p50[id] / 1e3:.2f}"

    lines = [
        f"# gpu_append on {run.bench.machine}",
        "",
        f"pyvmm {pyvmm.__version__}, torch {torch.__version__}, "
        f"kernel {pyvmm.device_info(str(run.device))['kernel']}. K and V, bfloat16, batch "
        f"{BATCH}, {HEADS} heads of {DIM}, at {run.length} tokens. Medians.",
        "",
        "## Device time, per node of a captured graph",
        "",
        "| | torch.cat is so many times slower | µs |",
        "|---|---|---|",
        f"| torch.cat of K and V | | {us('device/cat-k-and-v')} |",
    ]
    for layout in ("seq", "lane"):
        id = f"device/append-k-and-v/{layout}"
        ratio = p50["device/cat-k-and-v"] / p50[id]
        lines.append(f"| append of K and V in place, layout {layout} | {ratio:.0f} | {us(id)} |")
    if "device/append-k-and-v/long" in p50:
        cat, id = "device/cat-k-and-v/long", "device/append-k-and-v/long"
        lines.append(f"| torch.cat, batch 32, 8 heads, 65536 tokens | | {us(cat)} |")
        lines.append(f"| append in place, the same | {p50[cat] / p50[id]:.0f} | {us(id)} |")
    lines += [
        f"| append of K in place, {id.removeprefix('device/append-k/')} a row | | {us(id)} |"
        for id in p50
        if id.startswith("device/append-k/")
    ]
    lines += ["", "## Attention over the cache", "", "| | ratio | µs |", "|---|---|---|"]
    for layout in ("seq", "lane"):
        lines.append(
            f"| layout {layout}, against torch.empty with the same strides | "
            f"{run.facts[f'attention ratio, {layout}']:.3f} | {us(f'attention/vtensor/{layout}')} |"
        )
    lines += [
        "",
        "## Host time from Python, a call in a loop",
        "",
        "| | µs | bare launches from C between them, µs |",
        "|---|---|---|",
    ]
    lines += [
        f"| {id[5:]} | {us(id)} | {us(f'base/{id}')} |" for id in p50 if id.startswith("host/")
    ]
    tokens = run.facts["tokens of that"]
    lines += [
        "",
        f"## Growth by block size, {tokens} appends of one token",
        "",
        "| block size | blocks | driver calls besides launches | most slack, MiB | "
        "append that needs a block, µs p50 |",
        "|---|---|---|---|---|",
    ]
    for entry in run.facts["driver calls by block size"]:
        block = entry["block_size"]
        lines.append(
            f"| {block} | {entry['blocks']} | {sum(entry['other_driver_calls'].values())} | "
            f"{entry['most_slack_bytes'] / 2**20:.1f} | {us(f'growing/needs-block/{block}')} |"
        )
    lines += ["", f"Not measured: {run.bench.not_measured}.", ""]
    if run.failures:
        lines += ["WRONG RESULTS:", "", *(f"- {what}" for what in run.failures), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--length", type=int, default=4096, help="tokens in the cache")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_append needs torch with CUDA and a GPU", file=sys.stderr)
        return 77
    run = Run(options)
    for part in (device_time, attention, host_time, driver_calls, device_time_long):
        try:
            part(run)
        except (torch.cuda.OutOfMemoryError, pyvmm.VMMError) as error:
            run.failures.append(f"{part.__name__}: {error}")
            print(f"{part.__name__}: {error}")
    run.bench.close(facts=run.facts, failures=run.failures, torch=torch.__version__)
    text = markdown(run)
    path = options.out / f"gpu_append-{slug(run.bench.machine)}.md"
    path.write_text(text)
    print(f"written: {path}\n\n{text}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
