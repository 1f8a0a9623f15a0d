"""What a token costs in Paddle: K and V of one layer appended against paddle.concat.

Cache (B, N, 8, 128); one sample is K and V of one new token. `own/...` is paddle.concat from N
tokens on; `concat/...` pyvmm.paddle.concat, with memory mapped as it grows; `op/...` the
custom operator, called eagerly on (N, B, 8, 128), and `show/...` pyvmm.paddle.concat once the
operator is loaded, whose extension then makes the results. bfloat16 has few kernels on the
CPU, but concat is one of them. `step-own/...` and `step-concat/...` are a token with the
attention over the cache, written as PaddleNLP's models do, in float32.
"""

import functools
import warnings

from bench import Bench, keep_large_blocks, timed

warnings.simplefilter("ignore")  # "No ccache found"

import paddle  # noqa: E402

import pyvmm.paddle as vmm_paddle  # noqa: E402
from pyvmm import paddle_op  # noqa: E402

CASES = [
    (dtype, batch, n_tokens)
    for dtype in ("float32", "bfloat16")
    for batch in (1, 4)
    for n_tokens in (1024, 4096, 16384)
]


def ones(dtype, shape):
    return paddle.ones(shape).astype(dtype)


def samples(step, caches, new):
    """Nanoseconds for one token, K and V, from the caches that are given on."""
    state = list(caches)

    def token():
        for i, rows in enumerate(new):
            state[i] = step(state[i], rows)

    return [timed(token, 5) for _ in range(50)][10:]


def measure(bench, name, concat, axis):
    for dtype, batch, n_tokens in CASES:
        shape = [batch, n_tokens, 8, 128] if axis == 1 else [n_tokens, batch, 8, 128]
        one = list(shape)
        one[axis] = 1
        case = f"{dtype}/{batch}/{n_tokens}"
        new = [ones(dtype, one) for _ in "kv"]
        # The first takes the caches in.
        caches = [concat(ones(dtype, shape), rows) for rows in new]
        bench.report(f"{name}/{case}", samples(concat, caches, new), f"own/{case}")


def own(bench):
    for dtype, batch, n_tokens in CASES:
        cache, new = ones(dtype, [batch, n_tokens, 8, 128]), ones(dtype, [batch, 1, 8, 128])
        concat = functools.partial(paddle.concat, [cache, new], 1)
        times = [2 * timed(concat) for _ in range(30)][5:]
        bench.report(f"own/{dtype}/{batch}/{n_tokens}", times)


def attention(q, keys, values):
    """As PaddleNLP's models: (batch, tokens, heads, dim) in, transposed here."""
    q, keys, values = (paddle.transpose(x, [0, 2, 1, 3]) for x in (q, keys, values))
    weights = paddle.nn.functional.softmax(paddle.matmul(q, keys, transpose_y=True) / 128**0.5)
    return paddle.matmul(weights, values)


def steps(bench):
    """The two in turn: what else the machine does then falls on both."""
    concats = {"step-own": paddle.concat, "step-concat": vmm_paddle.concat}
    for dtype, batch, n_tokens in CASES:
        if dtype != "float32":
            continue
        new = ones(dtype, [batch, 1, 8, 128])
        start = ones(dtype, [batch, n_tokens, 8, 128])
        states = {name: [concat([start, new], 1)] * 2 for name, concat in concats.items()}
        states["step-concat"][1] = vmm_paddle.concat([start, new], 1)

        def token(name):
            state, concat = states[name], concats[name]  # noqa: B023
            state[:] = [concat([cache, new], 1) for cache in state]  # noqa: B023
            attention(new, *state)  # noqa: B023

        times = {name: [] for name in concats}
        for _ in range(35):
            for name in concats:
                times[name].append(timed(functools.partial(token, name)))
        case = f"{batch}/{n_tokens}"
        bench.report(f"step-own/{case}", times["step-own"][5:])
        bench.report(f"step-concat/{case}", times["step-concat"][5:], f"step-own/{case}")


def main():
    bench = Bench("bench_paddle", "a GPU; the copy of a cache that is taken in")
    if bench.is_cuda:
        raise SystemExit("bench_paddle measures on the host")
    paddle.set_device("cpu")
    keep_large_blocks()
    own(bench)
    steps(bench)
    measure(bench, "concat", lambda cache, new: vmm_paddle.concat([cache, new], 1), 1)
    paddle_op.load()
    measure(bench, "op", lambda cache, new: paddle_op.concat(cache, new, 0), 0)
    measure(bench, "show", lambda cache, new: vmm_paddle.concat([cache, new], 1), 1)
    bench.close(paddle=paddle.__version__)


if __name__ == "__main__":
    main()
