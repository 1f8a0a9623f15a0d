"""What a concat that appends costs its caller, against the frameworks' own concatenate.

`concat/F/N` grows a key/value cache of framework F by one token, from N tokens on, with memory
mapped ahead; `own/F/N` is F's own concatenate at N tokens. Shape (1, N, 8, 64), float32: 2 KiB
a token. For torch also what the two ways to reach every call inside a model cost:
`block/...` pyvmm.torch.inplace_cat(), `mode/...` a TorchFunctionMode that does nothing.
"""

import numpy as np
from bench import Bench, keep_large_blocks, timed

import pyvmm

LENGTHS = (1, 64, 1024, 8192)
TIMES = 50


def growing(bench, id, concat, cache, new, baseline=""):
    """The call alone, on mapped rows."""
    box = [cache]

    def step():
        box[0] = concat(box[0], new)

    bench.report(id, [timed(step, TIMES) for _ in range(60)][10:], baseline)


def tensor_of(n_rows):
    """Rows in use, and mapped ahead."""
    t = pyvmm.empty((1, 0, 8, 64), "float32", axis=1, capacity=20000, device="host")
    t.map(20000)
    t.grow(n_rows)
    return t


def own(bench, id, concatenate, n_rows):
    times = TIMES if n_rows < 1000 else 2
    bench.report(id, [timed(concatenate, times) for _ in range(60)][10:])


def of_numpy(bench):
    row = np.ones((1, 1, 8, 64), "float32")
    for n_rows in LENGTHS:
        plain = np.ones((1, n_rows, 8, 64), "float32")
        own(bench, f"own/numpy/{n_rows}", lambda: np.concatenate((plain, row), 1), n_rows)  # noqa: B023
        cache = np.asarray(tensor_of(n_rows))
        growing(
            bench,
            f"concat/numpy/{n_rows}",
            lambda c, n: pyvmm.concat(c, n, 1),
            cache,
            row,
            f"own/numpy/{n_rows}",
        )


def of_torch(bench):
    import torch
    from torch.overrides import TorchFunctionMode

    import pyvmm.torch

    class Nothing(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    torch.set_num_threads(1)
    row = torch.ones((1, 1, 8, 64))
    for n_rows in LENGTHS:
        plain = torch.ones((1, n_rows, 8, 64))
        own(bench, f"own/torch/{n_rows}", lambda: torch.cat((plain, row), 1), n_rows)  # noqa: B023
        cache = torch.from_dlpack(tensor_of(n_rows))
        growing(
            bench,
            f"concat/torch/{n_rows}",
            lambda c, n: pyvmm.torch.cat((c, n), 1),
            cache,
            row,
            f"own/torch/{n_rows}",
        )
    with pyvmm.torch.inplace_cat():
        cache = torch.cat((torch.cat((row, row), 1), row), 1)
        growing(bench, "block/growing", lambda c, n: torch.cat((c, n), 1), cache, row)
    # What a model that grows nothing pays.
    x = torch.ones((1, 1, 8, 64))
    calls = {"cat": lambda: torch.cat((x, row), -1), "add": lambda: torch.add(x, x)}
    calls["view"] = lambda: x.view(-1)
    for name, call in calls.items():
        bench.report(f"torch/{name}", [timed(call, TIMES) for _ in range(60)][10:])
        with pyvmm.torch.inplace_cat():
            bench.report(f"block/{name}", [timed(call, TIMES) for _ in range(60)][10:])
        with Nothing():
            bench.report(f"mode/{name}", [timed(call, TIMES) for _ in range(60)][10:])


def main():
    keep_large_blocks()
    bench = Bench("bench_concat", "a GPU's time; memory that is mapped on the way")
    if bench.is_cuda:
        raise SystemExit("bench_concat measures on the host")
    of_numpy(bench)
    try:
        of_torch(bench)
    except ImportError:
        print("torch is not installed")
    bench.close()


if __name__ == "__main__":
    main()
