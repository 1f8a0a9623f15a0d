"""CuPy: a concatenate that appends.

    cache = pyvmm.cupy.concatenate((cache, new), axis=1)

Equal in value to cupy.concatenate; see pyvmm.concat(). Appends run on CuPy's current stream.
"""

# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import cupy

from pyvmm._concat import Framework, fall_back, join, register
from pyvmm._pool import Pool

__all__ = ["concatenate"]


class _CuPy(Framework):
    def unfit(self, cache: Any, new: Any) -> str | None:
        return None if type(cache) is type(new) is cupy.ndarray else "types"

    def concatenate(self, cache: Any, new: Any, axis: Any) -> Any:
        return cupy.concatenate((cache, new), axis)

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def anchor(self, cache: Any) -> int:
        # Of the memory that a slice is cut from: behind its end another's may begin.
        return int(cache.data.mem.ptr)

    def wrap(self, reserved: Any) -> Any:
        return cupy.from_dlpack(reserved)

    def cut(self, array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        # Whatever rows the array was made over, its memory keeps all of the tensor's.
        return cupy.ndarray(shape, array.dtype, array.data, strides)

    def dense(self, array: Any) -> Any:
        return cupy.ascontiguousarray(array)


_CUPY = _CuPy()
register(cupy.ndarray, _CUPY)


def concatenate(
    tup: Sequence[Any],
    axis: SupportsIndex | None = 0,
    out: Any = None,
    *,
    dtype: Any = None,
    casting: str = "same_kind",
    capacity: SupportsIndex | None = None,
    layout: str | None = None,
    pool: Pool | None = None,
) -> Any:
    """cupy.concatenate, and an append where `tup` are two arrays and the first is what the
    last one returned, or the whole of a VTensor; see pyvmm.concat(), also for the parameters.

    With out=, dtype=, another number of arrays, and whatever else cannot grow in place it is
    cupy.concatenate, counted in pyvmm.concat_stats()."""
    if out is not None or dtype is not None:
        fall_back("out= or dtype=")
    elif not isinstance(tup, (tuple, list)) or len(tup) != 2:
        fall_back("number of operands")
    else:
        result = join(_CUPY, tup[0], tup[1], axis, capacity, layout, pool, True)
        if result is not None:
            return result
    return cupy.concatenate(tup, axis, out, dtype=dtype, casting=casting)
