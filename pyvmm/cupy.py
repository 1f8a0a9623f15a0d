"""CuPy: a concatenate that appends, and an allocator over a pool.

    cache = pyvmm.cupy.concatenate((cache, new), axis=1)

    cupy.cuda.set_allocator(pyvmm.cupy.allocator(pool))     # CuPy's own arrays, within its budget

Results are equal in value to cupy.concatenate's; see pyvmm.concat(). Appends run on CuPy's
current stream.
"""

# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import cupy

from pyvmm._allocator import Allocator
from pyvmm._concat import Framework, fall_back, join, register
from pyvmm._error import OutOfMemoryError
from pyvmm._frameworks import gpu_name
from pyvmm._pool import Pool, default_pool

__all__ = ["allocator", "concatenate"]


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


# ---- memory -----------------------------------------------------------------------

_FIRST_GPU = gpu_name(cupy, 0)


# cudaErrorMemoryAllocation, and hipErrorOutOfMemory.
_ERROR_MEMORY_ALLOCATION = 2


def allocator(pool: Pool | str = _FIRST_GPU) -> Any:
    """What cupy.cuda.set_allocator() and using_allocator() take, over a pool or over the
    default pool of a device: CuPy's memory pool with ours beneath it.

    What CuPy allocates counts against the pool's budget, beside the tensors that grow. Where
    it is exhausted, CuPy gives its unused blocks back, asks again and raises
    cupy.cuda.memory.OutOfMemoryError; out-of-memory callbacks of the pool are not run.

    The arrays may outlive the pool. Raises ValueError for a pool of the host; allocating on
    another device than the pool's is a ValueError, too."""
    if isinstance(pool, str):
        pool = default_pool(pool)
    if pool.device == "host":
        raise ValueError("CuPy's arrays are on a GPU, and this pool is of the host")
    name = pool.device
    own_index = int(name.rpartition(":")[2])
    memory = Allocator(pool)

    def alloc(n_bytes: int, index: int) -> int:
        if index != own_index:
            raise ValueError(f"the allocator is of a pool of {name}, and the device is {index}")
        if n_bytes == 0:
            return 0
        try:
            return memory.alloc(n_bytes)
        except OutOfMemoryError:
            # What CuPy's pool answers by giving back what it keeps.
            raise cupy.cuda.runtime.CUDARuntimeError(_ERROR_MEMORY_ALLOCATION) from None

    def free(pointer: int, index: int) -> None:
        if pointer:
            memory.free(pointer)

    function_allocator = cupy.cuda.PythonFunctionAllocator(alloc, free)
    return cupy.cuda.MemoryPool(function_allocator.malloc).malloc
