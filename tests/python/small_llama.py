"""A small Llama-like model in Paddle: RMS norm, rotary embedding, grouped keys, a gated MLP. Its
caches are (tokens, batch, heads, dim), as a program must keep them to append in place."""

import paddle
from paddle import nn
from paddle.nn import functional as F

from pyvmm import paddle_op


class Layer(nn.Layer):
    def __init__(self, width, n_heads, n_kv_heads):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.dim = n_heads, n_kv_heads, width // n_heads
        self.q = nn.Linear(width, n_heads * self.dim, bias_attr=False)
        self.k = nn.Linear(width, n_kv_heads * self.dim, bias_attr=False)
        self.v = nn.Linear(width, n_kv_heads * self.dim, bias_attr=False)
        self.o = nn.Linear(n_heads * self.dim, width, bias_attr=False)
        self.gate = nn.Linear(width, 2 * width, bias_attr=False)
        self.up = nn.Linear(width, 2 * width, bias_attr=False)
        self.down = nn.Linear(2 * width, width, bias_attr=False)

    def project(self, x, first):
        """Queries (batch, n, heads, dim); keys and values (n, batch, heads, dim) of n new tokens,
        the first of which has position `first`."""
        h = norm(x)
        q = rotate(self.q(h).reshape([0, 0, self.n_heads, self.dim]), first)
        k = rotate(self.k(h).reshape([0, 0, self.n_kv_heads, self.dim]), first)
        v = self.v(h).reshape([0, 0, self.n_kv_heads, self.dim])
        return q, paddle.transpose(k, [1, 0, 2, 3]), paddle.transpose(v, [1, 0, 2, 3])

    def attend(self, x, q, keys, values, causal):
        q = paddle.transpose(q, [0, 2, 1, 3])
        repeats = self.n_heads // self.n_kv_heads
        keys = paddle.transpose(keys, [1, 2, 3, 0]).repeat_interleave(repeats, 1)
        values = paddle.transpose(values, [1, 2, 0, 3]).repeat_interleave(repeats, 1)
        scores = paddle.matmul(q, keys) / self.dim**0.5
        if causal:
            n = x.shape[1]
            scores = scores + paddle.triu(paddle.full([n, n], -1e9), 1)
        out = paddle.matmul(F.softmax(scores, -1), values)
        x = x + self.o(paddle.transpose(out, [0, 2, 1, 3]).flatten(2))
        h = norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def norm(x):
    return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def rotate(x, first):
    half = x.shape[-1] // 2
    positions = first.astype("float32") + paddle.arange(x.shape[1], dtype="float32")
    angles = paddle.outer(positions, 10000.0 ** (-paddle.arange(half, dtype="float32") / half))
    sin, cos = paddle.sin(angles).unsqueeze(1), paddle.cos(angles).unsqueeze(1)
    a, b = x[..., :half], x[..., half:]
    return paddle.concat([a * cos - b * sin, b * cos + a * sin], -1)


class SmallLlama(nn.Layer):
    vocabulary = 97
    n_layers = 2

    def __init__(self, width=64, n_heads=4, n_kv_heads=2):
        super().__init__()
        spread = nn.initializer.Normal(0.0, 1.0)
        self.embedding = nn.Embedding(self.vocabulary, width, weight_attr=spread)
        self.head = nn.Linear(width, self.vocabulary, weight_attr=spread, bias_attr=False)
        self.layers = nn.LayerList(
            [Layer(width, n_heads, n_kv_heads) for _ in range(self.n_layers)]
        )

    def step(self, ids, caches, first, concat):
        """The next token of each sequence, (batch, 1), and the caches with the new tokens; no
        caches at the first step."""
        x = self.embedding(ids)
        grown = []
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(x, first)
            if caches:
                k, v = concat([caches[2 * i], k], 0), concat([caches[2 * i + 1], v], 0)
            grown += [k, v]
            x = layer.attend(x, q, k, v, causal=not caches)
        return paddle.argmax(self.head(norm(x[:, -1:])), -1), grown

    def decode(self, ids, n_tokens, concat):
        """Greedily, (batch, n_tokens)."""
        first = paddle.zeros([1], "int64")
        token, caches = self.step(ids, [], first, concat)
        tokens = [token]
        for n in range(n_tokens - 1):
            position = paddle.full([1], ids.shape[1] + n, "int64")
            token, caches = self.step(token, caches, position, concat)
            tokens.append(token)
        return paddle.concat(tokens, 1)

    def decode_in_program(self, ids, n_tokens):
        """The same with a loop that a program can hold. The caches are returned as well: what a
        loop leaves and nothing uses, Paddle's executor keeps."""
        position = paddle.zeros([1], "int64")
        token, (k0, v0, k1, v1) = self.step(ids, [], position, None)
        position = paddle.full([1], ids.shape[1], "int64")
        last = position + n_tokens - 1
        tokens = token
        while position < last:
            token, (k0, v0, k1, v1) = self.step(token, [k0, v0, k1, v1], position, append)
            tokens = paddle.concat([tokens, token], 1)
            position = position + 1
        return tokens, k0, v0, k1, v1


def append(operands, axis):
    return paddle_op.concat(operands[0], operands[1], axis)
