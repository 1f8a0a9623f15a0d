"""Attention of one new token per sequence over a cache that grows, up to lengths on the device.

What is read of the cache is data and not shape, so that a step can be captured once: each
sequence's keys are cut into chunks, a row to begin at and a number of rows for each, made anew
by every step from the cache's own cursor. The chunks of a sequence are attended to apart and
merged by their logsumexp; there is one where the kernel cuts the keys by itself.

A package's kernel is used once it has attended to a little data of the same case and come to what
plain torch does: packages change, and a model that reads its cache wrongly says nothing.

A backend prepares what all layers of a step share, once, and gives for each layer `parts`,
(batch, chunks, heads, dim), and `lse`, (batch, heads, chunks) in float32. Another backend is a
class more here, named in `_BACKENDS` in the order of preference.
"""

# torch has no types where it is not installed.
# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any, NamedTuple

import torch

_VARLEN = torch.ops.aten._flash_attention_forward.default
_ROWS_IN_PAGE = 64
_ROWS_TRIED = 256
_ROUNDING = 0.03  # of float16 and bfloat16, over the largest result


class Case(NamedTuple):
    """What a backend is chosen by. `is_cut`: keys do not all begin at row 0 (padding, window)."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    dim: int
    layout: str
    is_cut: bool
    # Rows from one lane to the next; 0 where that is no whole number.
    lane_rows: int


class Reads(NamedTuple):
    """What one step reads: int32 on the device, (sequences, chunks); (1, chunks) where all
    sequences read the same. `most_rows` is the host's bound of a chunk's rows, `keys` the whole
    reservation of any of the layers."""

    starts: torch.Tensor
    lengths: torch.Tensor
    most_rows: int
    keys: torch.Tensor
    layout: str


def plan(cursor: torch.Tensor, first: torch.Tensor, window: int | None, n_chunks: int) -> Any:
    """(starts, lengths) for a token that is appended at `cursor`, int32 (sequences,), and reads
    from row `first`, int32 (sequences,), on, the last `window` rows at most."""
    end = cursor + 1
    first = first if window is None else torch.maximum(first, end - window)
    n_rows = end - first
    if n_chunks == 1:
        return first[:, None], n_rows[:, None]
    size = ((n_rows + (n_chunks - 1)) // n_chunks)[:, None]
    begin = size * torch.arange(n_chunks, device=cursor.device, dtype=torch.int32)
    lengths = torch.minimum((n_rows[:, None] - begin).clamp_(min=0), size)
    # An empty chunk begins where there is memory.
    return first[:, None] + begin * (lengths > 0), lengths


def merge(parts: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """(batch, heads, dim) from the chunks. Kernels of flash attention say +inf for an empty one,
    where the sum of no exponentials is -inf."""
    if parts.shape[1] == 1:
        return parts[:, 0]
    weights = torch.softmax(lse.masked_fill(lse == torch.inf, -torch.inf), dim=-1)
    return (weights.transpose(1, 2)[..., None] * parts.float()).sum(1).to(parts.dtype)


# ---- backends ---------------------------------------------------------------------


class Backend:
    """`name` is what messages call it. `is_tried`: it is first looked at what it does, see above.
    `cuts_keys`: it spreads the keys of a sequence over the GPU by itself."""

    name = ""
    is_tried = False

    @staticmethod
    def fits(case: Case) -> bool:
        raise NotImplementedError

    @staticmethod
    def cuts_keys(case: Case) -> bool:
        return True

    @staticmethod
    def prepare(reads: Reads) -> Any:
        """What `attend` takes of a step, the same for every layer."""
        raise NotImplementedError

    @staticmethod
    def attend(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        reads: Reads,
        prepared: Any,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query: (batch, heads, 1, dim). keys, values: (batch, kv_heads, capacity, dim), whole
        reservations, of which the rows that are read have memory. `parts` and `lse`; no `lse`
        where there is one chunk."""
        raise NotImplementedError


def _is_half_on_gpu(case: Case) -> bool:
    return (
        case.device.type == "cuda"
        and case.dtype in (torch.float16, torch.bfloat16)
        and case.dim % 8 == 0
        and case.dim <= 256
    )


class FlashAttn(Backend):
    """flash_attn_with_kvcache of the package flash-attn."""

    name = "flash-attn"
    is_tried = True

    @staticmethod
    def fits(case: Case) -> bool:
        return (
            _is_half_on_gpu(case) and _function("flash_attn", "flash_attn_with_kvcache") is not None
        )

    @staticmethod
    def prepare(reads: Reads) -> Any:
        batch = reads.keys.shape[0]
        starts = reads.starts[:, 0].expand(batch).contiguous()
        return starts, (starts + reads.lengths[:, 0]).contiguous()

    @staticmethod
    def attend(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        reads: Reads,
        prepared: Any,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        starts, ends = prepared
        out = _function("flash_attn", "flash_attn_with_kvcache")(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            cache_seqlens=ends,
            cache_leftpad=starts,
            softmax_scale=scale,
        )
        return out, None


class FlashInfer(Backend):
    """trtllm_batch_decode_with_kv_cache of the package flashinfer-python, over the lanes as
    pages that lie in a row."""

    name = "FlashInfer"
    is_tried = True

    @staticmethod
    def fits(case: Case) -> bool:
        return (
            _is_half_on_gpu(case)
            and not case.is_cut
            and (case.layout == "lane" or case.batch == 1)
            and (case.batch == 1 or (case.lane_rows > 0 and case.lane_rows % _ROWS_IN_PAGE == 0))
            and _function("flashinfer.decode", "trtllm_batch_decode_with_kv_cache") is not None
        )

    @staticmethod
    def prepare(reads: Reads) -> Any:
        keys, batch = reads.keys, reads.keys.shape[0]
        n_pages = -(-reads.most_rows // _ROWS_IN_PAGE)
        lane_pages = lane_rows(keys) // _ROWS_IN_PAGE if batch > 1 else 0
        page = torch.arange(n_pages, device=keys.device, dtype=torch.int32)
        lane = torch.arange(batch, device=keys.device, dtype=torch.int32)
        lengths = reads.lengths[:, 0].expand(batch).contiguous()
        return page + lane[:, None] * lane_pages, lengths, _workspace(keys.device)

    @staticmethod
    def attend(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        reads: Reads,
        prepared: Any,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        kv_heads, dim = keys.shape[1], keys.shape[3]
        tables, lengths, workspace = prepared
        pages = tuple(
            rows[: rows.shape[0] // _ROWS_IN_PAGE * _ROWS_IN_PAGE].view(
                -1, _ROWS_IN_PAGE, kv_heads, dim
            )
            for rows in (_rows(keys, "lane"), _rows(values, "lane"))
        )
        out = _function("flashinfer.decode", "trtllm_batch_decode_with_kv_cache")(
            query[:, :, 0],
            pages,
            workspace,
            tables,
            lengths,
            reads.most_rows,
            bmm1_scale=scale,
            kv_layout="NHD",
        )
        return out[:, None], None


class Varlen(Backend):
    """torch's own flash attention in its form for sequences of different lengths. In layout
    "seq" the batch is presented as more heads, in layout "lane" as sequences of one array.

    It cuts the keys by itself only where query heads outnumber key heads."""

    name = "torch's varlen flash attention"

    @staticmethod
    def fits(case: Case) -> bool:
        return (
            _is_half_on_gpu(case)
            and any(argument.name == "seqused_k" for argument in _VARLEN._schema.arguments)
            and case.layout in ("seq", "lane")
            and (case.layout == "seq" or case.batch == 1 or case.lane_rows > 0)
            and torch.cuda.get_device_capability(case.device) >= (8, 0)
        )

    @staticmethod
    def cuts_keys(case: Case) -> bool:
        return case.heads > case.kv_heads

    @staticmethod
    def prepare(reads: Reads) -> Any:
        keys, starts, lengths = reads.keys, reads.starts, reads.lengths
        batch = keys.shape[0]
        if reads.layout != "seq" and batch > 1:
            lanes = torch.arange(batch, device=keys.device, dtype=torch.int32) * lane_rows(keys)
            starts = starts + lanes[:, None]
            lengths = lengths.expand(batch, -1)
        n = lengths.numel()
        queries = torch.arange(n + 1, device=keys.device, dtype=torch.int32)
        # One more than there are sequences, and never read: lengths are given.
        starts = torch.nn.functional.pad(starts.reshape(n), (0, 1))
        return queries, starts, lengths.reshape(n)

    @staticmethod
    def attend(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        reads: Reads,
        prepared: Any,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, heads, _, dim = query.shape
        n_chunks = reads.lengths.shape[1]
        if reads.layout == "seq":
            queries = query.reshape(1, batch * heads, dim).expand(n_chunks, -1, -1)
        else:
            queries = query.reshape(batch, 1, heads, dim).expand(-1, n_chunks, -1, -1)
        out, lse, *_ = _VARLEN(
            queries.reshape(-1, queries.shape[-2], dim),
            _rows(keys, reads.layout),
            _rows(values, reads.layout),
            *prepared[:2],
            1,
            reads.most_rows,
            0.0,
            False,
            False,
            scale=scale,
            seqused_k=prepared[2],
        )
        if reads.layout == "seq":
            parts = out.view(n_chunks, batch, heads, dim).transpose(0, 1)
        else:
            parts = out.view(batch, n_chunks, heads, dim)
        if n_chunks == 1:
            return parts, None
        if lse.dim() == 3:  # (sequences, heads, 1) until torch 2.6, then (heads, sequences)
            lse = lse[:, :, 0].transpose(0, 1)
        if reads.layout == "seq":
            return parts, lse.reshape(batch, heads, n_chunks)
        return parts, lse.reshape(heads, batch, n_chunks).transpose(0, 1)


class Plain(Backend):
    """The same in plain torch, for every device, dtype and layout: what the others are compared
    with, and what float32 takes. It copies what it reads."""

    name = "plain torch"

    @staticmethod
    def fits(case: Case) -> bool:
        return True

    @staticmethod
    def prepare(reads: Reads) -> Any:
        batch = reads.keys.shape[0]
        row = torch.arange(reads.most_rows, device=reads.keys.device, dtype=torch.int32)
        is_read = (row < reads.lengths[..., None]).expand(batch, -1, -1)
        rows = torch.where(is_read, reads.starts[..., None] + row, reads.starts[..., None])
        return rows.reshape(batch, -1), is_read

    @staticmethod
    def attend(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        reads: Reads,
        prepared: Any,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, heads, _, dim = query.shape
        kv_heads, n_chunks = keys.shape[1], reads.lengths.shape[1]
        rows, is_read = prepared
        sequence = torch.arange(batch, device=keys.device)[:, None]

        exact = torch.promote_types(query.dtype, torch.float32)

        def read(states: torch.Tensor) -> torch.Tensor:
            taken = states[sequence, :, rows].to(exact)  # (batch, rows, kv_heads, dim)
            return taken.view(batch, n_chunks, reads.most_rows, kv_heads, 1, -1)

        queries = query.to(exact).reshape(batch, 1, 1, kv_heads, heads // kv_heads, dim)
        scores = (queries * read(keys)).sum(-1) * scale
        scores = scores.masked_fill(~is_read[..., None, None], -torch.inf)
        lse = torch.logsumexp(scores, dim=2)
        # Of an empty chunk all weights are zero.
        weights = torch.exp(scores - lse.clamp(min=torch.finfo(exact).min)[:, :, None])
        parts = (weights[..., None] * read(values)).sum(2).to(query.dtype)
        lse = lse.float().reshape(batch, n_chunks, heads).transpose(1, 2)
        return parts.reshape(batch, n_chunks, heads, -1), lse


_BACKENDS: tuple[type[Backend], ...] = (FlashAttn, FlashInfer, Varlen, Plain)


def choose(case: Case) -> type[Backend]:
    """The first backend that is installed and fits, and is right where it is tried. Not to be
    called while a stream is captured."""
    like = _like(case)
    is_right: Any = _is_right  # mypy takes a class for no key of a cache
    return next(b for b in _BACKENDS if b.fits(case) and (not b.is_tried or is_right(b, like)))


def _like(case: Case) -> Case:
    """What stands for a case when a backend is tried: two sequences are as good as many."""
    batch = min(case.batch, 2)
    return case._replace(batch=batch, lane_rows=_ROWS_TRIED if case.lane_rows else 0)


@functools.cache
def _is_right(backend: type[Backend], case: Case) -> bool:
    """Does the backend do what Plain does? Says so once where it does not."""
    try:
        with torch.inference_mode():
            apart = _try(backend, case)
    except Exception as error:
        fault = f"fails with {type(error).__name__}: {error}"
    else:
        if apart <= _ROUNDING:
            return True
        fault = f"is {apart:.2g} of its largest result apart from attention in plain torch"
    warnings.warn(
        f"pyvmm: {backend.name} is installed and {fault}. Captured steps use another kernel; the "
        "package's version may not fit torch's or this GPU",
        stacklevel=2,
    )
    return False


def _try(backend: type[Backend], case: Case) -> float:
    """How far the backend is from Plain, of the largest result, over random data."""
    source = torch.Generator(case.device).manual_seed(0)  # the program's own stays as it is

    def random(*shape: int) -> torch.Tensor:
        states = torch.randn(shape, generator=source, device=case.device, dtype=torch.float32)
        return states.to(case.dtype)

    shape = case.batch, case.kv_heads, _ROWS_TRIED, case.dim
    batch, kv_heads, n_rows, dim = range(4)
    order = {
        "seq": (n_rows, batch, kv_heads, dim),
        "lane": (batch, n_rows, kv_heads, dim),
        "c": (batch, kv_heads, n_rows, dim),
    }[case.layout]
    back = [order.index(d) for d in range(4)]
    keys, values = (random(*(shape[d] for d in order)).permute(back) for _ in "kv")
    query = random(case.batch, case.heads, 1, case.dim)
    cursor = torch.tensor([_ROWS_TRIED - 56, 76][: case.batch], device=case.device).int()
    first = torch.tensor([7, 0][: case.batch], device=case.device).int() * case.is_cut
    starts, lengths = plan(cursor, first, None, 1)
    reads = Reads(starts, lengths, _ROWS_TRIED, keys, case.layout)
    scale = case.dim**-0.5
    theirs, right = (
        merge(*kind.attend(query, keys, values, reads, kind.prepare(reads), scale)).float()
        for kind in (backend, Plain)
    )
    if theirs.shape != right.shape:
        raise ValueError(f"a result of shape {tuple(theirs.shape)} and not {tuple(right.shape)}")
    apart = ((theirs - right).abs().max() / right.abs().max()).item()
    return apart if apart == apart else float("inf")  # NaN


def chunks_for(backend: type[Backend], case: Case, n_processors: int) -> int:
    """How many chunks fill the GPU, a power of two: three blocks for two multiprocessors."""
    if backend.cuts_keys(case):
        return 1
    n_chunks = 1
    while n_chunks < 32 and 2 * case.batch * case.heads * n_chunks < 3 * n_processors:
        n_chunks *= 2
    return n_chunks


def lane_rows(keys: torch.Tensor) -> int:
    """Of a whole reservation (batch, kv_heads, capacity, dim) in layout "lane"."""
    lane, row = keys.stride(0), keys.stride(2)
    return 0 if lane % row else lane // row


def _rows(states: torch.Tensor, layout: str) -> torch.Tensor:
    """The reservation as (rows, heads, dim): the batch among the heads, or lane after lane."""
    batch, heads, capacity, dim = states.shape
    row = states.stride(2)
    if layout == "seq":
        return states.as_strided((capacity, batch * heads, dim), (row, dim, 1))
    n_rows = capacity + (batch - 1) * lane_rows(states) if batch > 1 else capacity
    return states.as_strided((n_rows, heads, dim), (row, states.stride(1), 1))


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    """FlashInfer's, zero before its first use; made by a step before it is captured."""
    return torch.zeros(128 << 20, dtype=torch.uint8, device=device)


@functools.cache
def _function(module: str, name: str) -> Any:
    """None where the package is not installed, does not load, or has no such function."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError):
        return None
