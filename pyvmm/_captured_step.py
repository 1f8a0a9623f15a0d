"""Captured decode steps over one cache: their graphs, one for each bucket of its length."""

# transformers' classes have no types where it is not installed, and some where it is.
# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator"

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from pyvmm import _attention
from pyvmm._captured_twin import CacheOfStep, current
from pyvmm._graphs import Recorded, Turns
from pyvmm._torch_kv import KVPair

# Graphs are recorded for lengths up to a bound, since kernels spread over the GPU what may be
# there to read: this, then multiples of the step, then eighths between two powers of two.
_LEAST_BUCKET = 512
_LEAST_STEP = 1024
# Each holds memory of its own. Lengths grow, so the first recorded is the first to go.
_MOST_GRAPHS = 8


def bucket_for(length: int) -> int:
    """The length that a graph for `length` tokens is recorded for."""
    if length <= _LEAST_BUCKET:
        return _LEAST_BUCKET
    power = 1 << (length - 1).bit_length()  # it, or the next
    step = max(_LEAST_STEP, power // 16)
    return -(-length // step) * step


class _Group:
    """Layers that read the same rows: those of all tokens, or of one window."""

    def __init__(self, window: int | None, pair: KVPair, uniform: bool) -> None:
        self.window = window
        self.cursor = from_dlpack(pair.key_tensor.cursor)
        keys = pair.reserved[0]
        # Where sequences begin, in rows of the pair.
        n = 1 if uniform else keys.shape[0]
        self.first = torch.zeros(n, dtype=torch.int32, device=keys.device)
        self.reads: Any = None
        self.prepared: Any = None


class Steps:
    """The graphs over the pairs of one cache, one for each bucket of its length, and their
    static buffers. Pairs that were replaced need other steps.

    captured: gives `step`, what is recorded, and `graphs`, `n_heads`; counts `n_captures`."""

    def __init__(self, captured: Any, pairs: list[KVPair], windows: list[int | None]) -> None:
        self._captured: Any = weakref.proxy(captured)
        self.pairs = pairs
        self.windows = windows
        keys = pairs[0].reserved[0]
        self.device = keys.device
        self.batch = keys.shape[0]
        self.layout = pairs[0].key_tensor.layout
        self.capacity = min(
            (p.capacity for p, w in zip(pairs, windows, strict=True) if w is None),
            default=1 << 62,
        )
        self.graphs: dict[int, Recorded] = {}
        self.tensors = [t for pair in pairs for t in (pair.key_tensor, pair.value_tensor)]
        self.pads: tuple[int, ...] = ()
        self.dropped: tuple[int, ...] = ()
        self.bucket = 0
        self.logits: Any = None
        with torch.inference_mode(False):
            self.ids = torch.zeros((self.batch, 1), dtype=torch.long, device=self.device)
            self.positions = torch.zeros_like(self.ids)
            self.groups = {
                window: _Group(window, pairs[windows.index(window)], self.layout == "seq")
                for window in dict.fromkeys(windows)
            }
        first = [group.first for group in self.groups.values()]
        self._turns = Turns(self.device)
        self._turns.add(self.ids, self.positions, *first)
        self._backend: dict[bool, tuple[type[_attention.Backend], int]] = {}

    def is_over(self, pairs: list[KVPair]) -> bool:
        return self.pairs == pairs

    def n_chunks(self, layer: int) -> int:
        return self._chosen(self.windows[layer])[1]

    def set_first(self, pads: tuple[int, ...], dropped: dict[int | None, int]) -> None:
        """Where each sequence begins, and how many tokens are gone from before the pairs."""
        now = tuple(dropped.get(window, 0) for window in self.groups)
        if pads == self.pads and now == self.dropped:
            return
        self._turns.begin()
        for group, gone in zip(self.groups.values(), now, strict=True):
            first = [max(n - gone, 0) for n in pads[: len(group.first)]]
            group.first.copy_(torch.tensor(first, dtype=torch.int32))
        if any(self.pads) != any(pads):
            self.graphs.clear()  # another backend may be the first that fits
            self._backend.clear()
        self.pads, self.dropped = pads, now

    def append_and_attend(
        self,
        query: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pair, group = self.pairs[layer], self.groups[self.windows[layer]]
        pair.append_recorded(key_states, value_states)
        backend, _ = self._chosen(group.window)
        keys, values = pair.reserved
        parts, lse = backend.attend(query, keys, values, group.reads, group.prepared, scale)
        if lse is None:
            lse = query.new_empty((*query.shape[:2], 0), dtype=torch.float32)
        return parts.contiguous(), lse.contiguous()

    def graph_for(self, length: int) -> Recorded:
        """The graph for a cache that has so many tokens after the step."""
        bucket = bucket_for(length)
        if bucket not in self.graphs:
            self.graphs[bucket] = self._record(bucket)
            # What they ran is over: the capture has waited for it.
            while len(self.graphs) > _MOST_GRAPHS:
                del self.graphs[next(iter(self.graphs))]
        return self.graphs[bucket]

    def replay(self, length: int, ids: torch.Tensor, positions: torch.Tensor | None) -> int:
        """One token more; `length` are there. Returns how often the tensors grew for it;
        `logits` are the next step's to write over."""
        self._turns.begin()
        graph = self.graph_for(length + 1)
        self.ids.copy_(ids)
        if positions is None:
            self.positions.fill_(length)
        else:
            self.positions.copy_(positions)
        n_growths = graph.n_growths
        graph.replay()
        return graph.n_growths - n_growths

    def hand_over(self) -> bool:
        """Can another cache have these pairs, that is, does nobody see what was in them? They
        are empty then, and this thread's stream is after the last replay."""
        try:
            for pair in self.pairs:
                pair.follow()
                if pair.is_shared():
                    return False
            self._turns.begin()
            for pair in self.pairs:
                pair.truncate(0)
        except BufferError:
            return False
        return True

    def _record(self, bucket: int) -> Recorded:
        self.bucket = bucket
        recorded = Recorded(self._run, self.tensors, self.device, self._captured.graphs)
        self._captured.n_captures += 1
        return recorded

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self) -> None:
        current.steps = self
        try:
            for group in self.groups.values():
                self._plan(group)
            logits = self._captured.step(
                input_ids=self.ids,
                position_ids=self.positions,
                past_key_values=CacheOfStep(),
                use_cache=True,
                return_dict=True,
            ).logits
            if self.logits is None:
                self.logits = torch.empty_like(logits)
                self._turns.add(self.logits)
            self.logits.copy_(logits)
        finally:
            current.steps = None

    def _plan(self, group: _Group) -> None:
        backend, n_chunks = self._chosen(group.window)
        longest = self.bucket if group.window is None else min(self.bucket, group.window)
        cursor = group.cursor[: len(group.first)]
        starts, lengths = _attention.plan(cursor, group.first, group.window, n_chunks)
        keys = self.pairs[self.windows.index(group.window)].reserved[0]
        group.reads = _attention.Reads(starts, lengths, -(-longest // n_chunks), keys, self.layout)
        group.prepared = backend.prepare(group.reads)

    def _chosen(self, window: int | None) -> tuple[type[_attention.Backend], int]:
        is_cut = window is not None or any(self.pads)
        if is_cut not in self._backend:
            keys = self.pairs[self.windows.index(window)].reserved[0]
            _, kv_heads, _, dim = keys.shape
            case = _attention.Case(
                device=self.device,
                dtype=keys.dtype,
                batch=self.batch,
                heads=self._captured.n_heads,
                kv_heads=kv_heads,
                dim=dim,
                layout=self.layout,
                is_cut=is_cut,
                lane_rows=_attention.lane_rows(keys),
            )
            backend = _attention.choose(case)
            n_processors = 1
            if self.device.type == "cuda":
                properties = torch.cuda.get_device_properties(self.device)
                n_processors = properties.multi_processor_count
            n_chunks = _attention.chunks_for(backend, case, n_processors)
            self._backend[is_cut] = backend, n_chunks
        return self._backend[is_cut]
