"""A key/value cache for transformers whose full-attention layers grow in place.

    cache = VMMCache(model.config)
    model.generate(**inputs, past_key_values=cache)

or, for every cache that generate() and the models make by themselves:

    pyvmm.transformers.install()

transformers' DynamicCache concatenates: every step copies every key and value that the
cache holds. Here each full-attention layer owns two growable tensors of shape
(batch, heads, tokens, dim); a step copies the new tokens into them, K and V in one call,
and hands the model views of what is there. The values are the same, bit for bit.

Sliding-window, linear and other layers of a model are bounded by themselves and keep
transformers' own classes. An encoder-decoder model takes
EncoderDecoderCache(VMMCache(config), VMMCache(config)).

As with any view, keys and values that a layer gave out show the memory of the cache:
tokens removed by `crop` or `reset`, and all tokens after `reorder_cache`, read
differently once new ones have taken their place. Caches and layers are copied, pickled and
saved by their tokens alone; but copying, pickling and `torch.save` of one such view by
itself take its whole storage, which is the address space of the full capacity and mostly
not backed by memory: `clone()` it first.
"""

# transformers' classes have no types where it is not installed, and some where it is.
# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicCache, DynamicLayer

import pyvmm
from pyvmm._torch_kv import KVPair, Layout

__all__ = ["VMMCache", "VMMLayer", "captured", "install", "stats", "uninstall"]

# Tokens of address space where neither the caller nor the model's config says how many.
_DEFAULT_CAPACITY = 131_072
# A capacity that nobody asked for takes no more addresses than this for one tensor, so that
# all layers of a large model fit in what a process or a GPU has.
_MOST_DEFAULT_BYTES = 128 << 30


class VMMLayer(DynamicLayer):
    """One layer's keys and values in two growable tensors.

    capacity: tokens of address space; memory is taken as tokens arrive. None is 131072, or
              fewer where one tensor would take more than 128 GiB of addresses. A layer that
              outgrows it moves to twice the capacity, which copies it once.
    layout:   pyvmm's "seq", "lane" or "c"; None is the fastest of the device: "c" on the
              host (with more than 128 pairs of sequence and head "lane", with more than 128
              sequences "seq"), "seq" on a GPU.
    pool:     where memory comes from; None is the default pool of the model's device.

    The tensors exist from the first update on, as `key_tensor` and `value_tensor`, and take
    batch, heads, dim, dtype and device from it. `keys` and `values` are views of the tokens
    in use. Code that puts other tensors in their place is obeyed: at the next call the layer
    takes these in.

    Counted: `moves` to a larger reservation or away from a pinned one, `intakes` of tensors
    that came from outside, `concatenations` where storage in place was not possible: where
    gradients are wanted, for tensors of a subclass, and for sizes of 0.
    """

    keys: Any
    values: Any

    def __init__(
        self,
        capacity: int | None = None,
        *,
        layout: Layout | None = None,
        pool: pyvmm.Pool | None = None,
    ) -> None:
        super().__init__()
        self.capacity = _DEFAULT_CAPACITY if capacity is None else capacity
        self.moves = self.intakes = self.concatenations = 0
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self._may_reserve_less = capacity is None
        self._layout = layout
        self._pool = pool
        # None as long as there is nothing, and where keys and values lie outside.
        self._pair: KVPair | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(length={self.get_seq_length()}, capacity={self.capacity}, "
            f"moves={self.moves})"
        )

    @property
    def key_tensor(self) -> pyvmm.VTensor:
        """The keys; an AttributeError before the first update."""
        return self._stored().key_tensor

    @property
    def value_tensor(self) -> pyvmm.VTensor:
        """The values; an AttributeError before the first update."""
        return self._stored().value_tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve both tensors after the shape (batch, heads, any, dim), dtype and device
        of these states. Raises ValueError for a device that is neither the host nor CUDA; on
        failure the layer is as before."""
        self._publish(self._reserve(key_states, value_states, 0))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of shape (batch, heads, tokens, dim) and return views of all.

        Raises ValueError (another shape or device, K and V of different lengths), TypeError
        (another dtype), pyvmm.OutOfMemoryError. On failure the layer holds what it held
        before. Where gradients are wanted, which in-place storage cannot give, it
        concatenates as DynamicLayer does.
        """
        pair = self._pair
        if pair is None or self.keys is not pair.keys or self.values is not pair.values:
            pair = self._prepare(key_states, value_states)
        try:
            if pair is None:
                return self._concatenate(key_states, value_states)
            pair.append(key_states, value_states)
        except (BufferError, TypeError, ValueError) as error:  # CapacityError is a ValueError
            is_full = isinstance(error, pyvmm.CapacityError)
            updated = self._update_otherwise(key_states, value_states, is_full)
            if updated is None:
                raise
            return updated
        self.keys, self.values = keys, values = pair.keys, pair.values
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens in use."""
        length: int = 0 if self.keys is None else self.keys.shape[-2]
        return length

    def get_max_length(self) -> int:
        """-1, transformers' word for no maximum: the capacity is no limit, see `capacity`."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens, or all if there are fewer. A positive
        number is transformers' older form: the length to keep at most. The memory stays
        with the layer, unless an export of `key_tensor` or `value_tensor` pins these tokens:
        then the others are copied into new memory."""
        length = self.get_seq_length()
        tokens_to_remove = int(tokens_to_remove)  # assisted generation passes a tensor
        if tokens_to_remove > 0:
            self._truncate(min(tokens_to_remove, length))
        else:
            self._truncate(max(length + tokens_to_remove, 0))

    def reset(self) -> None:
        """Drop all tokens and keep the memory for the next sequences; of another batch size,
        they take new memory."""
        self._truncate(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was, in place; beam_idx has shape
        (batch,). Costs one copy of the layer, as it does in DynamicLayer."""
        if self.get_seq_length() == 0:
            return
        pair = None if self._is_offloaded() else self._settle()
        if pair is not None and beam_idx.shape == self.keys.shape[:1]:
            pair.select(beam_idx)
        else:
            super().reorder_cache(beam_idx)
            self._take_in()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times: batch becomes batch x repeats."""
        super().batch_repeat_interleave(repeats)
        self._take_in()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences of these indices, or of the true ones of a boolean mask."""
        super().batch_select_indices(indices)
        self._take_in()

    def offload(self) -> None:
        """Move the tokens to host memory and give the memory on the GPU back, once the views
        that are out have gone. On the host, nothing."""
        super().offload()
        if self._pair is not None and self.keys is not self._pair.keys:
            self._pair = None

    def prefetch(self) -> None:
        """Move offloaded tokens back to the GPU, on the current stream."""
        if self._is_offloaded():
            self._settle()

    def __deepcopy__(self, memo: dict[int, Any]) -> VMMLayer:
        """A layer with a copy of the tokens in memory of its own, from the same pool."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        pair = None if self._is_offloaded() else self._settle()
        new.__dict__.update(self.__dict__)
        if pair is not None:
            new._publish(pair.fork())
        elif self.is_initialized:
            new.keys, new.values = self.keys.clone(), self.values.clone()
        return new

    def __copy__(self) -> VMMLayer:
        # Two layers over the same tensors would write over each other's tokens.
        return self.__deepcopy__({})

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """What pickle and torch.save() take: the tokens, compact. Read back, the layer takes
        its memory from the default pool of the device that they are read to."""
        states = (self.keys.clone(), self.values.clone()) if self.is_initialized else None
        return _restored, (self.capacity, self._may_reserve_less, self._layout, states)

    # -- where the tokens lie

    def _stored(self) -> KVPair:
        pair = self._settle()
        if pair is None:
            raise AttributeError("the layer has no tensors: nothing is stored in place yet")
        return pair

    def _publish(self, pair: KVPair) -> None:
        self._pair = pair
        self.keys, self.values = pair.keys, pair.values
        self.dtype, self.device = pair.keys.dtype, pair.keys.device
        self.batch_size = pair.keys.shape[0]
        self.capacity = pair.capacity
        self.is_initialized = True

    def _reserve(
        self, key_states: torch.Tensor, value_states: torch.Tensor, n_tokens: int
    ) -> KVPair:
        """A pair without tokens that has room for that many."""
        for states in (key_states, value_states):
            if states.device.type not in ("cpu", "cuda"):
                raise ValueError(
                    f"VMMLayer works on cpu and cuda devices, not on {states.device}: use "
                    "DynamicCache there (and uninstall(), if this was installed)"
                )
        capacity = self.capacity
        if self._may_reserve_less:
            token_bytes = max(
                math.prod(states.shape[:-2]) * states.shape[-1] * states.element_size()
                for states in (key_states, value_states)
            )
            capacity = min(capacity, max(_MOST_DEFAULT_BYTES // token_bytes, 1))
        while capacity < n_tokens:
            capacity *= 2
        return KVPair.reserve(key_states, value_states, capacity, self._layout, self._pool)

    def _prepare(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KVPair | None:
        """The pair that these states are to be appended to; None if they cannot be."""
        if not (_is_storable(key_states) and _is_storable(value_states)):
            return None
        if self.is_initialized:
            return self._settle()
        self.lazy_initialization(key_states, value_states)
        return self._pair

    def _settle(self) -> KVPair | None:
        """The pair that holds `keys` and `values`, after taking them in if they came from
        outside; None if there is nothing yet or they cannot be stored in place."""
        pair, keys, values = self._pair, self.keys, self.values
        if keys is None or (pair is not None and keys is pair.keys and values is pair.values):
            return pair
        if not (_is_storable(keys) and _is_storable(values)):
            self._pair = None
            self.batch_size = keys.shape[0]
            return None
        if self._is_offloaded():
            keys, values = (states.to(self.device, non_blocking=True) for states in (keys, values))
        else:
            self.intakes += 1
        taken = self._reserve(keys, values, keys.shape[-2])
        taken.append(_dense(keys), _dense(values))
        self._publish(taken)
        return taken

    def _take_in(self) -> None:
        """After a method of DynamicLayer's has put new tensors in the place of the old."""
        if not self._is_offloaded():
            n_intakes = self.intakes
            self._settle()
            self.intakes = n_intakes

    def _is_offloaded(self) -> bool:
        return self.is_initialized and self.keys.device != self.device

    def _update_otherwise(
        self, key_states: torch.Tensor, value_states: torch.Tensor, is_full: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What could not be appended as it is; None if there is no other way."""
        pair = self._pair
        if pair is None:
            return None
        if not (_is_storable(key_states) and _is_storable(value_states)):
            return self._concatenate(key_states, value_states)
        dense = _dense(key_states), _dense(value_states)
        if pair.length == 0 and not pair.is_for(key_states, value_states):
            # Nothing is lost: other sequences begin, say of another batch size.
            fresh = self._reserve(key_states, value_states, key_states.shape[-2])
            fresh.append(*dense)
            self._publish(fresh)
            return self.keys, self.values
        if is_full:
            moved = self._reserve(pair.keys, pair.values, pair.length + key_states.shape[-2])
            moved.append(pair.keys, pair.values)
            moved.append(*dense)
            self.moves += 1
            self._publish(moved)
            return self.keys, self.values
        if dense[0] is key_states and dense[1] is value_states:
            return None
        return self.update(*dense)

    def _concatenate(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What DynamicLayer does; the next update that can takes the result in."""
        keys, values = key_states, value_states
        if self.get_seq_length() > 0:
            keys = torch.cat([self.keys, key_states], dim=-2)
            values = torch.cat([self.values, value_states], dim=-2)
        self._pair = None
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.batch_size = keys.shape[0]
        self.is_initialized = True
        self.concatenations += 1
        return keys, values

    def _truncate(self, length: int) -> None:
        if length == self.get_seq_length():
            return
        pair = None if self._is_offloaded() else self._settle()
        if pair is None:
            self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]
            return
        try:
            pair.truncate(length)
        except BufferError:  # pinned by an export, which keeps the old memory alive
            pair = pair.fork(length)
            self.moves += 1
        self._publish(pair)


def _is_storable(states: torch.Tensor) -> bool:
    """Is there memory to copy from, and does nothing but its values matter?"""
    if type(states) is not torch.Tensor and type(states) is not torch.nn.Parameter:
        return False
    if states.requires_grad and torch.is_grad_enabled():
        return False
    return 0 not in states.shape[:-2] and states.shape[-1] != 0


def _dense(states: torch.Tensor) -> torch.Tensor:
    """States that can be appended: without gradients, the last dimension dense."""
    states = states.detach() if states.requires_grad else states
    return states if states.stride(-1) == 1 else states.contiguous()


def _restored(
    capacity: int,
    may_reserve_less: bool,
    layout: Layout | None,
    states: tuple[torch.Tensor, torch.Tensor] | None,
) -> VMMLayer:
    layer = VMMLayer(capacity, layout=layout)
    layer._may_reserve_less = may_reserve_less
    if states is not None:
        keys, values = states
        with torch.no_grad():
            layer.update(keys, values)
    return layer


class VMMCache(DynamicCache):
    """transformers' DynamicCache with a VMMLayer for each full-attention layer.

    config:   the model's; says which layers attend to all tokens.
    capacity: tokens of address space for each such layer; None is the config's
              max_position_embeddings, or 131072. It is not a limit: see VMMLayer.
    layout, pool: as for VMMLayer.
    offloading, offload_only_non_sliding: as for DynamicCache.

    `reset()` readies it for the next sequences. Copies (copy.deepcopy) take their memory from
    the same pool, caches read back by pickle or torch.load from the default one.
    """

    def __init__(
        self,
        config: Any,
        *,
        capacity: int | None = None,
        layout: Layout | None = None,
        pool: pyvmm.Pool | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        super().__init__(
            config=config,
            offloading=offloading,
            offload_only_non_sliding=offload_only_non_sliding,
        )
        self._config = config
        decoder = config.get_text_config(decoder=True)
        longest = getattr(decoder, "max_position_embeddings", None) or _DEFAULT_CAPACITY
        for index, layer in enumerate(self.layers):
            # Exactly these: classes derived from them store more than keys and values.
            if type(layer) is DynamicLayer or type(layer) is _InstalledLayer:
                self.layers[index] = vmm_layer = VMMLayer(capacity, layout=layout, pool=pool)
                if capacity is None:
                    vmm_layer.capacity = longest

    def reset(self) -> None:
        """Drop all tokens; the memory of the VMMLayers is kept for the next sequences."""
        # transformers' own reset of a sliding layer zeroes its tokens and keeps them.
        fresh = DynamicCache(config=self._config).layers
        for index, layer in enumerate(self.layers):
            if isinstance(layer, VMMLayer):
                layer.reset()
            else:
                self.layers[index] = fresh[index]

    def stats(self) -> dict[str, int]:
        """See pyvmm.transformers.stats()."""
        return stats(self)


def stats(cache: Any) -> dict[str, int]:
    """Sums over the VMMLayers of any of transformers' caches, those that install() brings in
    too: reserved_bytes, mapped_bytes, used_bytes and slack_bytes as in VTensor.stats(), and
    the layers' moves, intakes and concatenations."""
    parts = (
        getattr(cache, "self_attention_cache", cache),
        getattr(cache, "cross_attention_cache", None),
    )
    layers = [layer for part in parts if part is not None for layer in part.layers]
    total = dict.fromkeys(_BYTES + _COUNTS, 0)
    for layer in layers:
        if not isinstance(layer, VMMLayer):
            continue
        for name in _COUNTS:
            total[name] += getattr(layer, name)
        if layer._pair is not None:
            for tensor in (layer._pair.key_tensor, layer._pair.value_tensor):
                of_tensor: Any = tensor.stats()
                for name in _BYTES:
                    total[name] += of_tensor[name]
    return total


_BYTES = "reserved_bytes", "mapped_bytes", "used_bytes", "slack_bytes"
_COUNTS = "moves", "intakes", "concatenations"


# ---- in every cache -----------------------------------------------------------------------

_FULL = "full_attention"


class _InstalledLayer(VMMLayer):
    """What DynamicCache makes for each full-attention layer between install() and
    uninstall()."""

    options: dict[str, Any] = {}

    def __init__(self, **of_other_layers: Any) -> None:
        # transformers gives every layer of a model what any of them needs.
        super().__init__(**self.options)


_replaced: type | None = None


def install(
    *, capacity: int | None = None, layout: Layout | None = None, pool: pyvmm.Pool | None = None
) -> None:
    """Let every DynamicCache that is made from a config from now on, by generate(), by a model
    or by hand, hold its full-attention layers in VMMLayers with these parameters. Caches that
    exist, and layers of other kinds, are left as they are.

    Called again, it changes the parameters. It holds for the whole process: install before
    other threads make caches."""
    global _replaced
    _InstalledLayer.options = {"capacity": capacity, "layout": layout, "pool": pool}
    if DYNAMIC_LAYER_TYPE_MAPPING[_FULL] is not _InstalledLayer:
        _replaced = DYNAMIC_LAYER_TYPE_MAPPING[_FULL]
        DYNAMIC_LAYER_TYPE_MAPPING[_FULL] = _InstalledLayer


def uninstall() -> None:
    """Undo install(): DynamicCache makes again what it made before. Without it, nothing.

    Raises RuntimeError if another library has taken that place since."""
    global _replaced
    _InstalledLayer.options = {}
    if _replaced is None:
        return
    if DYNAMIC_LAYER_TYPE_MAPPING[_FULL] is not _InstalledLayer:
        raise RuntimeError(
            f"{DYNAMIC_LAYER_TYPE_MAPPING[_FULL].__name__} was registered for {_FULL!r} after "
            "install(): undo that first"
        )
    DYNAMIC_LAYER_TYPE_MAPPING[_FULL] = _replaced
    _replaced = None


# ---- captured steps -----------------------------------------------------------------------


def captured(model: Any, compile: bool = False) -> AbstractContextManager[Any]:
    """Capture the model's decode steps in CUDA graphs while the block lasts.

        with pyvmm.transformers.captured(model):
            out = model.generate(**inputs, max_new_tokens=1024)

    Steps of one token run without the host: recorded once for a batch size, and again after some
    thousand tokens each, then replayed over a cache that grows as ever. Prefill, and whatever a
    graph cannot give (see docs/captured.md), runs eagerly over the same cache, which is a VMMCache
    in all but name; that is said once, with the reason, as a RuntimeWarning.

    compile: let torch.compile fuse the layers before they are captured: one is compiled for all,
             before the first step of a batch size.

    Inside the block, forward takes DynamicCache and VMMCache and puts layers of its own in the
    place of theirs. Caches remain usable after it. The model's weights and modules must not be
    exchanged in the block. Blocks nest, and several threads may generate at once. The block's
    value counts: `n_captures`, `n_replays`, and has the `reasons` for eager steps.

    Raises ValueError if the model is captured already with another `compile`."""
    from pyvmm import _captured  # which takes its layers from here

    return _captured.block(model, compile)
