"""Layers of a cache whose tokens a captured step appends, while the host looks elsewhere.

Between such steps they are what they derive from: everything that transformers and users do
with a VMMLayer, or with a sliding layer of transformers', works on them. `keys` and `values`
catch up with the steps when they are looked at.
"""

# transformers' classes have no types where it is not installed, and some where it is.
# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import pyvmm
from pyvmm._torch_kv import KVPair, Layout
from pyvmm.transformers import VMMLayer


def _apart(method: Callable[..., Any]) -> Callable[..., Any]:
    """Of what changes the tensors outside of graphs: while no other thread captures."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.apart:
            return method(self, *args, **kwargs)

    return run


class _Followed:
    """`keys` and `values` that are read from the pair where it has grown since. `apart`: what
    is entered by work that no other thread may capture beside."""

    apart: Any = contextlib.nullcontext()
    _pair: KVPair | None = None
    _keys: torch.Tensor | None = None
    _values: torch.Tensor | None = None

    @property
    def keys(self) -> Any:
        self._follow()
        return self._keys

    @keys.setter
    def keys(self, states: Any) -> None:
        self._keys = states

    @property
    def values(self) -> Any:
        self._follow()
        return self._values

    @values.setter
    def values(self, states: Any) -> None:
        self._values = states

    def _follow(self) -> None:
        raise NotImplementedError


class CapturedLayer(_Followed, VMMLayer):
    """A VMMLayer, all tokens of it. `kept`: a pair of an earlier cache, for the first update."""

    window = None

    def __init__(
        self,
        capacity: int | None = None,
        *,
        layout: Layout | None = None,
        pool: pyvmm.Pool | None = None,
    ) -> None:
        super().__init__(capacity, layout=layout, pool=pool)
        self.kept: KVPair | None = None

    update = _apart(VMMLayer.update)
    crop = _apart(VMMLayer.crop)
    reset = _apart(VMMLayer.reset)
    reorder_cache = _apart(VMMLayer.reorder_cache)
    batch_repeat_interleave = _apart(VMMLayer.batch_repeat_interleave)
    batch_select_indices = _apart(VMMLayer.batch_select_indices)
    prefetch = _apart(VMMLayer.prefetch)

    @classmethod
    def after(cls, layer: DynamicLayer, capacity: int, layout: Layout | None) -> CapturedLayer:
        """In the place of a layer of transformers' or of pyvmm's, with its tokens."""
        if not isinstance(layer, VMMLayer):
            new = cls(capacity, layout=layout)
            new._may_reserve_less = True
            if layer.get_seq_length() > 0:
                new.update(layer.keys, layer.values)
            return new
        new = cls(layer.capacity, layout=layer._layout or layout, pool=layer._pool)
        new._may_reserve_less = layer._may_reserve_less
        for name in ("moves", "intakes", "concatenations"):
            setattr(new, name, getattr(layer, name))
        pair = layer._settle()
        if pair is not None:
            new._publish(pair)
        elif layer.get_seq_length() > 0:
            new.update(layer.keys, layer.values)
        return new

    def pair_of_step(self) -> KVPair | None:
        """The pair that holds the tokens; None where they cannot be stored in place."""
        pair = self._pair
        if pair is not None and self._keys is pair.keys and self._values is pair.values:
            return pair
        with self.apart:
            return self._settle()

    @_apart
    def relayout(self, layout: Layout) -> KVPair | None:
        """The tokens, copied into new memory of that layout."""
        pair = self._settle()
        if pair is None or pair.key_tensor.layout == layout:
            return pair
        keys, values = pair.keys, pair.values
        self._layout = layout
        moved = self._reserve(keys, values, pair.length)
        moved.append(keys, values)
        self.moves += 1
        self._publish(moved)
        return moved

    def n_tokens(self) -> int:
        """get_seq_length(), without a look at the views."""
        pair = self._pair
        if pair is None or self._keys is not pair.keys:
            return self.get_seq_length()
        return pair.key_tensor.length

    def step_done(self) -> None:
        """Nothing: the length is the tensors'."""

    def _follow(self) -> None:
        pair = self._pair
        if (
            pair is not None
            and self._keys is pair.keys
            and self._values is pair.values
            and pair.key_tensor.length != pair.length
        ):
            pair.follow()
            self._keys, self._values = pair.keys, pair.values

    def _reserve(
        self, key_states: torch.Tensor, value_states: torch.Tensor, n_tokens: int
    ) -> KVPair:
        kept, self.kept = self.kept, None
        if kept is not None and kept.capacity >= n_tokens and kept.is_for(key_states, value_states):
            return kept
        return super()._reserve(key_states, value_states, n_tokens)

    @_apart
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = super().__deepcopy__(memo)
        new.kept = None
        return new


class CapturedSliding(_Followed, DynamicSlidingWindowLayer):
    """transformers' layer of the last `sliding_window` tokens, which moves them into a pair of
    twice as many rows when a captured step needs them at a fixed address. Where the rows are
    used up, the last ones move to the front: once in a window's length of steps."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.kept: KVPair | None = None
        self._pool: pyvmm.Pool | None = None
        # Tokens that came before row 0 of the pair.
        self.dropped = 0
        # Are the tokens in the pair, and `_keys` a view of them?
        self._is_paired = False

    @classmethod
    def after(
        cls, layer: DynamicSlidingWindowLayer, pool: pyvmm.Pool | None = None
    ) -> CapturedSliding:
        new = cls(layer.sliding_window)
        new._pool = pool
        new.record_past = layer.record_past
        if layer.is_initialized:
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
            new.cumulative_length = layer.cumulative_length
        return new

    @property
    def window(self) -> int:
        size: int = self.sliding_window
        return size

    def pair_of_step(self, layout: Layout | None = None) -> KVPair | None:
        """The pair with the window's tokens and room for one more; None where the past is
        being recorded."""
        if self.record_past:
            return None
        pair = self._pair
        if pair is not None and self._is_paired:
            if pair.key_tensor.length < pair.capacity:
                return pair
            self._follow()
        with self.apart:
            return self._into_pair(layout)

    def _into_pair(self, layout: Layout | None) -> KVPair:
        pair = self._pair
        keys, values = self._keys, self._values
        assert keys is not None and values is not None
        if pair is not None and pair.is_for(keys, values):
            if self._is_paired or pair.is_shared():
                keys, values = keys.clone(), values.clone()
            pair.truncate(0)
        else:
            pair = self.kept
            if pair is None or not pair.is_for(keys, values):
                pair = KVPair.reserve(keys, values, 2 * self.window, layout, self._pool)
            self.kept = None
        pair.append(_dense(keys), _dense(values))
        self._pair = pair
        self._keys, self._values = pair.keys, pair.values
        self._is_paired = True
        self.dropped = self.cumulative_length - pair.length
        return pair

    def relayout(self, layout: Layout) -> KVPair | None:
        if self._pair is not None and self._pair.key_tensor.layout != layout:
            keys, values = self.keys, self.values
            self.keys, self.values = keys, values
            self._pair = self.kept = None
        return self.pair_of_step(layout)

    def n_tokens(self) -> int:
        n: int = self.cumulative_length
        return n

    def step_done(self) -> None:
        self.cumulative_length += 1

    @property
    def keys(self) -> Any:
        self._follow()
        return self._keys

    @keys.setter
    def keys(self, states: Any) -> None:
        self._keys, self._is_paired = states, False

    def _follow(self) -> None:
        pair = self._pair
        if pair is not None and self._is_paired and pair.key_tensor.length != pair.length:
            pair.follow()
            self._keys = pair.keys[:, :, -self.sliding_window + 1 :]
            self._values = pair.values[:, :, -self.sliding_window + 1 :]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = type(self)(self.sliding_window)
        new._pool, new.apart = self._pool, self.apart
        memo[id(self)] = new
        self._copy_into(new)
        return new

    def __copy__(self) -> Any:
        return self.__deepcopy__({})

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved and read back it is transformers' own."""
        plain = DynamicSlidingWindowLayer(self.sliding_window)
        self._copy_into(plain)
        return _restored_sliding, (self.sliding_window, plain.__dict__)

    def _copy_into(self, layer: DynamicSlidingWindowLayer) -> None:
        layer.record_past = self.record_past
        layer.cumulative_length = self.cumulative_length
        if self.is_initialized:
            layer.lazy_initialization(self._keys, self._values)
            layer.keys, layer.values = self.keys.clone(), self.values.clone()


def _restored_sliding(sliding_window: int, state: dict[str, Any]) -> DynamicSlidingWindowLayer:
    layer = DynamicSlidingWindowLayer(sliding_window)
    layer.__dict__.update(state)
    return layer


def _dense(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()
