"""What a concat that appends costs its caller, against the frameworks' own concatenate.

`concat/F/N` grows a key/value cache of framework F by one token, from N tokens on, with memory
mapped ahead; `base/F/N` is F's own concatenate at N tokens. Shape (1, N, 8, 64), float32: 2 KiB
a token. NumPy's part is pyvmm/_bench.py's. For torch also what the two ways to reach every call
inside a model cost: `torch/block/...` pyvmm.torch.inplace_cat(), `torch/mode/...` a
TorchFunctionMode that does nothing, both against `torch/bare/...`.
"""

from __future__ import annotations

from bench import Bench, keep_large_blocks, timed

from pyvmm import _bench

TIMES = 50


def growing(bench, id, concat, cache, new, baseline=""):
    """The call alone, on mapped rows."""
    box = [cache]

    def step():
        box[0] = concat(box[0], new)

    bench.report(id, [timed(step, TIMES) for _ in range(bench.times(60) + 5)][5:], baseline)


def of_torch(bench):
    import torch
    from torch.overrides import TorchFunctionMode

    import pyvmm.torch

    class Nothing(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    torch.set_num_threads(1)
    row = torch.ones((1, 1, 8, 64))
    for n_rows in (1, 64, 1024, 8192):
        plain = torch.ones((1, n_rows, 8, 64))
        times = TIMES if n_rows < 1000 else 2
        samples = [
            timed(lambda: torch.cat((plain, row), 1), times)  # noqa: B023 (called at once)
            for _ in range(bench.times(60) + 5)
        ]
        bench.report(f"base/torch/{n_rows}", samples[5:])
        t = pyvmm.empty((1, 0, 8, 64), "float32", axis=1, capacity=20000, device="host")
        t.map(20000)
        t.grow(n_rows)
        cache = torch.from_dlpack(t)
        growing(
            bench,
            f"concat/torch/{n_rows}",
            lambda c, n: pyvmm.torch.cat((c, n), 1),
            cache,
            row,
            f"base/torch/{n_rows}",
        )
    with pyvmm.torch.inplace_cat():
        cache = torch.cat((torch.cat((row, row), 1), row), 1)
        growing(bench, "torch/block/growing", lambda c, n: torch.cat((c, n), 1), cache, row)
    # What a model that grows nothing pays.
    x = torch.ones((1, 1, 8, 64))
    calls = {"cat": lambda: torch.cat((x, row), -1), "add": lambda: torch.add(x, x)}
    calls["view"] = lambda: x.view(-1)
    n = bench.times(60)
    for name, call in calls.items():
        bare = f"torch/bare/{name}"
        bench.report(bare, [timed(call, TIMES) for _ in range(n + 5)][5:])
        with pyvmm.torch.inplace_cat():
            samples = [timed(call, TIMES) for _ in range(n + 5)]
        bench.report(f"torch/block/{name}", samples[5:], bare)
        with Nothing():
            samples = [timed(call, TIMES) for _ in range(n + 5)]
        bench.report(f"torch/mode/{name}", samples[5:], bare)


def main():
    keep_large_blocks()
    bench = Bench("bench_concat", _bench.MEASUREMENTS["concat"].not_measured)
    if bench.is_gpu:
        raise SystemExit("bench_concat measures on the host")
    _bench.concat(bench)
    try:
        of_torch(bench)
    except ImportError:
        print("torch is not installed")
    bench.close()


if __name__ == "__main__":
    main()
