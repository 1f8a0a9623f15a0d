"""Keys and values of one attention layer in torch, in two tensors that grow in place."""

# torch has no types where it is not installed.
# mypy: disable-error-code="misc"

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.utils.dlpack import from_dlpack

import pyvmm
from pyvmm._frameworks import gpu_name

Layout = Literal["seq", "lane", "c"]

# Above this, a lane for each (sequence, head) is too many on the host: a lane is two of the
# process's mappings, of which Linux allows 65530, and a model has two tensors a layer.
MOST_HOST_LANES = 128

# Where its type has DLPack's exchange table, a torch tensor names its own stream.
_NAMES_STREAM = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def default_layout(states: torch.Tensor) -> Layout:
    """The layout that is fastest for states (..., tokens, dim) on their device: head-major on
    the host, where attention reads it faster, as far as the lanes go; on a GPU, where
    attention does not care, the one that appends fastest and needs the fewest blocks."""
    if states.device.type != "cpu":
        return "seq"
    if math.prod(states.shape[:-2]) <= MOST_HOST_LANES:
        return "c"
    return "lane" if states.shape[0] <= MOST_HOST_LANES else "seq"


class KVPair:
    """Keys and values of shape (..., tokens, dim), each in a VTensor that grows by tokens.

    `keys` and `values` are views of the tokens in use. They are cut from one torch tensor
    over the whole reservation, made once: that is much cheaper than a hand-off, and the
    tensors' memory lives as long as the last view.
    """

    __slots__ = (
        "key_tensor",
        "value_tensor",
        "keys",
        "values",
        "length",
        "_all_keys",
        "_all_values",
        "_leading",
        "_key_dim",
        "_value_dim",
        "_key_strides",
        "_value_strides",
        "_device",
    )

    def __init__(self, key_tensor: pyvmm.VTensor, value_tensor: pyvmm.VTensor) -> None:
        # Normal tensors also when the caller is in inference mode.
        with torch.inference_mode(False):
            self._all_keys = from_dlpack(key_tensor.reserved())
            self._all_values = from_dlpack(value_tensor.reserved())
        self.key_tensor, self.value_tensor = key_tensor, value_tensor
        *self._leading, _, self._key_dim = self._all_keys.shape
        self._value_dim = self._all_values.shape[-1]
        self._key_strides = self._all_keys.stride()
        self._value_strides = self._all_values.stride()
        self._device = self._all_keys.device
        self._publish(key_tensor.length)

    @classmethod
    def reserve(
        cls,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        capacity: int,
        layout: Layout | None,
        pool: pyvmm.Pool | None,
    ) -> KVPair:
        """A pair without tokens, after the shape (..., any, dim), dtype and device of these."""

        def empty(states: torch.Tensor) -> pyvmm.VTensor:
            on_host = states.device.type == "cpu"
            return pyvmm.empty(
                (*states.shape[:-2], 0, states.shape[-1]),
                states.dtype,
                axis=-2,
                capacity=capacity,
                device="host" if on_host else gpu_name(torch, states.device.index),
                layout=layout or default_layout(states),
                pool=pool,
            )

        return cls(empty(key_states), empty(value_states))

    @property
    def capacity(self) -> int:
        return self.key_tensor.capacity

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Copy new tokens in, on torch's current stream; one launch for both.

        Raises what pyvmm.append_many() does, and ValueError for as many keys as values are
        not; then nothing has changed. RuntimeError where the tensors were changed by others.
        """
        key_tensor, value_tensor = self.key_tensor, self.value_tensor
        self._check()
        stream = None if _NAMES_STREAM else self._stream()
        pyvmm.append_many((key_tensor, value_tensor), (key_states, value_states), stream)
        length = key_tensor.length
        if value_tensor.length != length:
            key_tensor.truncate(self.length)
            value_tensor.truncate(self.length)
            raise ValueError(
                f"keys of {key_states.shape[-2]} tokens and values of {value_states.shape[-2]}"
            )
        self._publish(length)

    def truncate(self, length: int) -> None:
        """Drop the tokens from `length` on; the memory stays. Raises BufferError while an
        export of one of the two tensors pins them: then that one is as before."""
        self._check()
        stream = self._stream()
        self.key_tensor.truncate(length, stream=stream)
        self.value_tensor.truncate(length, stream=stream)
        self._publish(length)

    def fork(self, length: int | None = None) -> KVPair:
        """A copy of the first `length` tokens, by default all, that grows on its own."""
        if length is None:
            self._check()
            length = self.length
        return KVPair(self.key_tensor.fork(length), self.value_tensor.fork(length))

    def select(self, indices: torch.Tensor) -> None:
        """Sequence i becomes what sequence indices[i] was, in place."""
        for states in (self.keys, self.values):
            states.copy_(states.index_select(0, indices.to(states.device)))

    def _publish(self, length: int) -> None:
        # as_strided() takes half the time of narrow().
        self.length = length
        self.keys = self._all_keys.as_strided(
            (*self._leading, length, self._key_dim), self._key_strides
        )
        self.values = self._all_values.as_strided(
            (*self._leading, length, self._value_dim), self._value_strides
        )

    def _stream(self) -> int | None:
        # Where torch wrote the states and will read the views.
        if self._device.type == "cpu":
            return None
        stream: int = torch.cuda.current_stream(self._device).cuda_stream
        return stream

    def _check(self) -> None:
        key_tensor, value_tensor = self.key_tensor, self.value_tensor
        if (
            key_tensor.length != self.length
            or value_tensor.length != self.length
            or key_tensor.ragged
            or value_tensor.ragged
        ):
            self._refuse_changed()

    def _refuse_changed(self) -> None:
        raise RuntimeError(
            f"the cache gave out {self.length} tokens, but its tensors hold "
            f"{_lengths_of(self.key_tensor)} keys and {_lengths_of(self.value_tensor)} values: "
            "they were changed from outside"
        )


def _lengths_of(tensor: pyvmm.VTensor) -> int | tuple[int, ...]:
    return tensor.lengths if tensor.ragged else tensor.length
