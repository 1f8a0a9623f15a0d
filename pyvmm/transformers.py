"""A key/value cache for transformers whose full-attention layers grow in place.

    cache = VMMCache(model.config)
    model.generate(**inputs, past_key_values=cache)

transformers' DynamicCache concatenates: every step copies every key and value that the
cache holds. Here each full-attention layer owns two growable tensors of shape
(batch, heads, tokens, dim); a step copies the new tokens into them, K and V in one call,
and hands the model views of what is there. The values are the same, bit for bit.

Sliding-window, linear and other layers of a model are bounded by themselves and keep
transformers' own classes.

As with any view, keys and values that a layer gave out show the memory of the cache:
tokens removed by `crop` or `reset`, and all tokens after `reorder_cache`, read
differently once new ones have taken their place. Copying, pickling and `torch.save` of
such a view take its whole storage, which is the address space of the full capacity and
mostly not backed by memory: `clone()` it first.
"""

# transformers' classes have no types where it is not installed, and some where it is.
# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

from typing import Any, Literal, NoReturn

import torch
from torch.utils.dlpack import from_dlpack
from transformers.cache_utils import DynamicCache, DynamicLayer

import pyvmm

__all__ = ["VMMCache", "VMMLayer"]

Layout = Literal["seq", "lane", "c"]


class VMMLayer(DynamicLayer):
    """One layer's keys and values in two growable tensors.

    capacity: tokens of address space; memory is taken as tokens arrive.
    layout:   pyvmm's "seq", "lane" or "c"; None is "c" on the host, where head-major
              attention is faster, and "seq" on a GPU, where each lane costs a block.
    pool:     where memory comes from; None is the default pool of the model's device.

    The tensors exist from the first update on, as `key_tensor` and `value_tensor`, and
    take batch, heads, dim, dtype and device from it. `keys` and `values` are views of
    the tokens in use, to be read and not replaced.
    """

    key_tensor: pyvmm.VTensor
    value_tensor: pyvmm.VTensor

    def __init__(
        self, capacity: int, *, layout: Layout | None = None, pool: pyvmm.Pool | None = None
    ) -> None:
        super().__init__()
        self.capacity = capacity
        self._layout = layout
        self._pool = pool

    def __repr__(self) -> str:
        return f"VMMLayer(length={self.get_seq_length()}, capacity={self.capacity})"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve both tensors after the shape (batch, heads, any, dim), dtype and device
        of these states. On failure the layer is as before."""
        key_tensor, value_tensor = self._reserve(key_states), self._reserve(value_states)
        # One tensor over the whole capacity: cutting a step's view from it is much cheaper
        # than a hand-off. A normal tensor also when the caller is in inference mode.
        with torch.inference_mode(False):
            self._all_keys = from_dlpack(key_tensor.reserved())
            self._all_values = from_dlpack(value_tensor.reserved())
        self.key_tensor, self.value_tensor = key_tensor, value_tensor
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self._publish(0)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of shape (batch, heads, tokens, dim) and return views of all.

        Raises ValueError (another shape, K and V of different lengths), TypeError
        (another dtype or device), pyvmm.CapacityError, pyvmm.OutOfMemoryError, and
        RuntimeError where gradients are wanted, which in-place storage cannot give. On
        failure the layer holds what it held before.
        """
        if key_states.requires_grad or value_states.requires_grad:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "VMMLayer stores values in place and cannot carry gradients: call the "
                    "model under torch.no_grad(), or train with DynamicCache"
                )
            key_states, value_states = key_states.detach(), value_states.detach()
        if key_states.shape[-2] != value_states.shape[-2]:
            raise ValueError(
                f"keys of {key_states.shape[-2]} tokens and values of {value_states.shape[-2]}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_consistent()
        pyvmm.append_many(
            [self.key_tensor, self.value_tensor], [key_states, value_states], stream=self._stream()
        )
        return self._publish(self.key_tensor.length)

    def get_max_length(self) -> int:
        """The capacity, in tokens."""
        return self.capacity

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens, or all if there are fewer. A positive
        number is transformers' older form: the length to keep at most. The memory stays
        with the layer. Raises BufferError while an export of `key_tensor` or
        `value_tensor` pins these tokens."""
        length = self.get_seq_length()
        tokens_to_remove = int(tokens_to_remove)  # assisted generation passes a tensor
        if tokens_to_remove > 0:
            self._truncate(min(tokens_to_remove, length))
        else:
            self._truncate(max(length + tokens_to_remove, 0))

    def reset(self) -> None:
        """Drop all tokens and keep the memory: the next update begins a new sequence of
        the same batch. Raises as `crop` does."""
        self._truncate(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was, in place; beam_idx has shape
        (batch,). Costs one copy of the layer, as it does in DynamicLayer."""
        if self.get_seq_length() == 0:
            return
        self._check_consistent()
        if beam_idx.shape != (self.batch_size,):
            raise ValueError(f"beam_idx of shape {tuple(beam_idx.shape)}, batch {self.batch_size}")
        for states in self._published:
            states.copy_(states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported yet: raises NotImplementedError."""
        self._refuse("change its batch size")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Not supported yet: raises NotImplementedError."""
        self._refuse("change its batch size")

    def offload(self) -> None:
        """Not supported yet: raises NotImplementedError."""
        self._refuse("be offloaded")

    def prefetch(self) -> None:
        """Not supported yet: raises NotImplementedError."""
        self._refuse("be offloaded")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # Also what copy.deepcopy() and torch.save() call. Either would read the storage
        # of the views, most of which is not backed by memory.
        raise TypeError(
            "a VMMLayer cannot be copied or pickled: keep [layer.keys.clone(), "
            "layer.values.clone()], and update() a new layer with them"
        )

    def _reserve(self, states: torch.Tensor) -> pyvmm.VTensor:
        device = states.device
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"VMMLayer works on cpu and cuda devices, not on {device}")
        on_host = device.type == "cpu"
        batch, heads, _, dim = states.shape
        return pyvmm.empty(
            (batch, heads, 0, dim),
            states.dtype,
            axis=2,
            capacity=self.capacity,
            device="host" if on_host else f"cuda:{device.index}",
            layout=self._layout or ("c" if on_host else "seq"),
            pool=self._pool,
        )

    def _stream(self) -> int | None:
        # The stream on which torch wrote the states, and will read the views.
        if self.device.type == "cpu":
            return None
        stream: int = torch.cuda.current_stream(self.device).cuda_stream
        return stream

    def _publish(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self._all_keys.narrow(2, 0, length)
        values = self._all_values.narrow(2, 0, length)
        self.keys, self.values = self._published = keys, values
        return keys, values

    def _truncate(self, length: int) -> None:
        if not self.is_initialized or length == self.get_seq_length():
            return
        self._check_consistent()
        self.key_tensor.truncate(length, stream=self._stream())
        self.value_tensor.truncate(length, stream=self._stream())
        self._publish(length)

    def _check_consistent(self) -> None:
        keys, values = self._published
        if self.keys is not keys or self.values is not values:
            raise RuntimeError(
                "VMMLayer.keys or .values was replaced from outside, which would not reach "
                "the cache: use update, crop, reset and reorder_cache"
            )
        if not self.key_tensor.length == self.value_tensor.length == keys.shape[2]:
            raise RuntimeError(
                f"VMMLayer gave out {keys.shape[2]} tokens, but its tensors hold "
                f"{self.key_tensor.length} keys and {self.value_tensor.length} values: "
                "they were changed from outside, or pinned while tokens were dropped"
            )

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(f"a VMMLayer cannot {what} yet: use DynamicCache for this")


class VMMCache(DynamicCache):
    """transformers' DynamicCache with a VMMLayer for each full-attention layer.

    config:   the model's; says which layers attend to all tokens.
    capacity: tokens of address space for each such layer; None is the config's
              max_position_embeddings. Generating past it raises pyvmm.CapacityError.
    layout, pool: as for VMMLayer.

    Use one cache for one batch of sequences; `reset()` readies it for the next of the
    same batch size. Gradients, deepcopy, pickling, offloading and changes of the batch
    size are not supported and raise.
    """

    def __init__(
        self,
        config: Any,
        *,
        capacity: int | None = None,
        layout: Layout | None = None,
        pool: pyvmm.Pool | None = None,
    ) -> None:
        super().__init__(config=config)
        self._config = config
        if capacity is None:
            decoder = config.get_text_config(decoder=True)
            capacity = getattr(decoder, "max_position_embeddings", None)
            if capacity is None:
                raise ValueError("the config has no max_position_embeddings: give a capacity")
        for index, layer in enumerate(self.layers):
            # Exactly this class: classes derived from it store more than keys and values.
            if type(layer) is DynamicLayer:
                self.layers[index] = VMMLayer(capacity, layout=layout, pool=pool)

    def reset(self) -> None:
        """Drop all tokens; the memory of the VMMLayers is kept for the next sequence."""
        # transformers' own reset of a sliding layer zeroes its tokens and keeps them.
        fresh = DynamicCache(config=self._config).layers
        for index, layer in enumerate(self.layers):
            if isinstance(layer, VMMLayer):
                layer.reset()
            else:
                self.layers[index] = fresh[index]
