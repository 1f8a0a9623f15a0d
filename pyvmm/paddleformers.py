"""A key/value cache layer for PaddleFormers that grows in place.

    from paddleformers.transformers.cache_utils import Cache

    cache = Cache(layer_class_to_replicate=pyvmm.paddleformers.VMMLayer)
    model.generate(**inputs, past_key_values=cache)

PaddleFormers' DynamicLayer concatenates: every step copies every key and value that the layer
holds. A VMMLayer is a DynamicLayer whose concatenations are pyvmm.paddle.concat, so a step
copies the new tokens alone. The values are the same, bit for bit.

Everything else is as in DynamicLayer, with ordinary tensors: what `crop` leaves is a shorter
view, and the first update after it copies that once; what `reorder_cache` and the batch_
methods make is copied by these and taken in at the next update; gradients make an update
fall back to paddle.concat.
"""

# PaddleFormers' classes have no types where it is not installed, and some where it is.
# mypy: disable-error-code="misc, no-untyped-call, has-type"

from __future__ import annotations

import functools
from typing import Any, SupportsIndex

from paddleformers.transformers.cache_utils import Cache, DynamicLayer

import pyvmm
from pyvmm.paddle import concat

__all__ = ["VMMLayer", "cache"]


class VMMLayer(DynamicLayer):
    """A DynamicLayer whose keys and values, of shape (batch, heads, tokens, dim), grow in place.

    capacity: tokens of address space; memory is taken as tokens arrive, and past it the cache
              moves to twice as many. None: 65536, or four times the first tokens
    layout:   "seq", "lane" or "c", as in pyvmm.empty(); "seq" unless another is named
    pool:     where memory comes from; None is the default pool of the model's device
    """

    def __init__(
        self,
        capacity: SupportsIndex | None = None,
        *,
        layout: str | None = None,
        pool: pyvmm.Pool | None = None,
    ) -> None:
        super().__init__()
        self._concat = functools.partial(
            concat, axis=-2, capacity=capacity, layout=layout, pool=pool
        )

    def update(
        self, key_states: Any, value_states: Any, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Any, Any]:
        """Append states of shape (batch, heads, tokens, dim) and return all of them. What was
        returned before stays as it is. On failure the layer holds what it held before."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = self._concat([self.keys, key_states])
        values = self._concat([self.values, value_states])
        self.keys, self.values = keys, values
        return keys, values


def cache(
    *,
    capacity: SupportsIndex | None = None,
    layout: str | None = None,
    pool: pyvmm.Pool | None = None,
) -> Any:
    """A PaddleFormers Cache of VMMLayers with these parameters, to be given to `generate` as
    past_key_values."""
    layer = functools.partial(VMMLayer, capacity, layout=layout, pool=pool)
    return Cache(layer_class_to_replicate=layer)
