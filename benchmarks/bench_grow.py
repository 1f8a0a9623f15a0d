"""bench_grow.c's twin: taking rows into use from Python. Ids as there, and

call                an empty method call: the floor of any call from Python
"""

from bench import Bench, timed

import pyvmm

CALLS = 50_000
ROW = 16 * 1024


class Empty:
    def grow(self, n: int) -> None:
        pass


def within(bench: Bench, id: str, shape: tuple[int, ...], axis: int, layout: str) -> None:
    with pyvmm.empty(
        shape, "uint8", axis=axis, capacity=CALLS, device=bench.device, layout=layout
    ) as t:
        t.map(CALLS)
        samples = []
        for round in range(-2, 41):
            grow = t.grow
            ns = timed(lambda: grow(1), CALLS)  # noqa: B023 (called before grow changes)
            if round >= 0:
                samples.append(ns)
            t.truncate(0)
    bench.report(id, samples)


def new_blocks(bench: Bench, block: int, size: str) -> None:
    n = 512 * 2**20 // block
    rest = block // ROW - 1
    with pyvmm.empty(
        (0, ROW), "uint8", axis=0, capacity=n * (rest + 1), device=bench.device, block_size=block
    ) as t:
        if not bench.is_cuda:  # memory that the machine has handed out before
            t.map(t.capacity)
            t.trim()
        samples = []
        for _ in range(n):
            samples.append(timed(lambda: t.grow(1)))
            t.grow(rest)
    bench.report(f"grow/new-block/{size}", samples)


def main() -> None:
    bench = Bench("bench_grow", "writing the rows; look-ahead, which this version does not have")
    empty = Empty()
    bench.report("call", [timed(lambda: empty.grow(1), CALLS) for _ in range(41)])
    within(bench, "grow/within", (0, 16), 0, "seq")
    within(bench, "grow/within/2-lanes", (2, 0, 16), 1, "lane")
    new_blocks(bench, 2 * 2**20, "2MiB")
    new_blocks(bench, 32 * 2**20, "32MiB")
    bench.close()


if __name__ == "__main__":
    main()
