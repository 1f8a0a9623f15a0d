"""torch: a cat that appends, by hand or inside any model.

    cache = pyvmm.torch.cat((cache, new), dim=1)     # as torch.cat, an append where it can be

    with pyvmm.torch.inplace_cat():                  # every growing torch.cat in here
        model.generate(**inputs)

    step = pyvmm.torch.capture(decode, [k, v])       # a CUDA graph over a cache that grows
    logits = step(token)

    memory = torch.cuda.MemPool(pyvmm.torch.allocator(pool).allocator())
    with torch.cuda.use_mem_pool(memory):            # torch's own tensors, within pool's budget
        weights = torch.empty(...)

Results are torch tensors, equal in value to torch.cat's and strided: where they are not
contiguous, `.view` of them may fail where `.reshape` does not. A result shares memory with the
one before it, so writing into one in place is seen through the other.

The storage of a result is the address space of its whole capacity, most of it without memory.
Copying by copy.deepcopy, pickle and torch.save, which would read all of it, is taught to
copy the elements alone; what passes a storage to another process (torch.multiprocessing,
share_memory_) is not: clone() the result first.
"""

# torch has no types where it is not installed, and some where it is.
# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, SupportsIndex

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.dlpack import from_dlpack

from pyvmm._allocator import bind
from pyvmm._concat import Framework, fall_back, is_tensor_at, join, register
from pyvmm._frameworks import gpu_name
from pyvmm._graphs import CapturedStep, CudaGraph, Graph, tensors_of
from pyvmm._inplace import Switch, Turned
from pyvmm._pool import Pool, default_pool

__all__ = ["allocator", "capture", "cat", "inplace_cat"]

_Tensor = torch.Tensor
_cat = torch.cat
_n_dispatch_modes = torch._C._len_torch_dispatch_stack
_n_function_modes = torch._C._len_torch_function_stack
# Constant under torch.compile, which then sees torch.cat and nothing of this.
_is_compiling = torch.compiler.is_dynamo_compiling
_is_tracing = torch._C._is_tracing


class _Torch(Framework):
    def __init__(self) -> None:
        self.counts_elements = True

    def unfit(self, cache: torch.Tensor, new: torch.Tensor) -> str | None:
        if type(cache) is not _Tensor or type(new) is not _Tensor:
            return "types"
        if cache.requires_grad or new.requires_grad:
            return "gradients"
        if _n_dispatch_modes() or _is_tracing() or forward_ad._current_level >= 0:
            return "a mode of torch"
        if _n_function_modes() and not all(
            type(mode) is DeviceContext for mode in _get_current_function_mode_stack()
        ):
            return "a mode of torch"
        # Sparse and quantised tensors, and those of a functorch transform, have no memory to
        # look at. These have, and other elements than lie there:
        if cache.is_neg() or new.is_neg() or cache.is_conj() or new.is_conj():
            return "conjugated or negated"
        return None

    def concatenate(self, cache: torch.Tensor, new: torch.Tensor, axis: Any) -> torch.Tensor:
        return _cat((cache, new), axis)

    def address(self, array: Any) -> int:
        if type(array) is not _Tensor:
            return 0
        try:
            address: int = array.data_ptr()
        except RuntimeError:
            return 0  # it has no storage
        return address

    def anchor(self, cache: torch.Tensor) -> int:
        address: int = cache.untyped_storage().data_ptr()
        return address

    def wrap(self, reserved: Any) -> torch.Tensor:
        _copy_elements_alone()
        # A normal tensor also when the caller is in inference mode.
        with torch.inference_mode(False):
            return from_dlpack(reserved)

    def cut(
        self, array: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> torch.Tensor | None:
        try:
            return array.as_strided(shape, strides, 0)
        except RuntimeError:
            return None  # a storage over fewer rows

    def dense(self, array: torch.Tensor) -> torch.Tensor:
        return array.contiguous()


_TORCH = _Torch()
register(_Tensor, _TORCH)


def cat(
    tensors: Sequence[torch.Tensor],
    dim: int = 0,
    *,
    out: torch.Tensor | None = None,
    capacity: SupportsIndex | None = None,
    layout: str | None = None,
    pool: Pool | None = None,
) -> torch.Tensor:
    """torch.cat, and an append where `tensors` are two and the first is what the last cat
    returned, or the whole of a VTensor; see pyvmm.concat(), also for the parameters.

    With out=, another number of tensors, and whatever else cannot grow in place it is
    torch.cat, counted in pyvmm.concat_stats()."""
    if not _is_compiling():
        if out is not None:
            fall_back("out=")
        elif not isinstance(tensors, (tuple, list)) or len(tensors) != 2:
            fall_back("number of operands")
        else:
            cache, new = tensors
            result = join(_TORCH, cache, new, dim, capacity, layout, pool, True)
            if result is not None:
                return result
    return _cat(tensors, dim) if out is None else _cat(tensors, dim, out=out)


# ---- inside any model -------------------------------------------------------------


def inplace_cat(
    *,
    capacity: SupportsIndex | None = None,
    layout: str | None = None,
    pool: Pool | None = None,
) -> AbstractContextManager[Turned]:
    """Turn growing concatenations of this thread into appends while the block lasts.

        with pyvmm.torch.inplace_cat() as turned:
            model.generate(**inputs)
        print(turned)

    A torch.cat (concat, concatenate) of two tensors whose first is what an earlier one
    returned, along the same dimension, appends; see pyvmm.concat() for the parameters and for
    what is left to torch. `turned.turned` counts them, `turned.left` the others by reason.
    Results are equal in value and not contiguous: `.view` on them is answered by reshape,
    a copy, where it must (`turned.reshaped`).

    Not supported: writing in place into a result that a later one continues, and functions
    imported before (`from torch import cat`), which stay torch's own. Under torch.compile,
    in a dispatch mode or a functorch transform, and with gradients, it is torch.cat;
    torch.jit.script does not know the replaced functions, so script before.

    Blocks nest, the parameters of the innermost count, other threads are not affected, and
    after the last block torch is as it was."""
    return _SWITCH.block(capacity, layout, pool)


def _appending(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cat(*args: Any, **kwargs: Any) -> Any:
        if _is_compiling() or _SWITCH.active() is None:
            return original(*args, **kwargs)
        tensors, dim = _operands(*args, **kwargs)
        if tensors is None:
            return original(*args, **kwargs)
        result = _SWITCH.concatenate(tensors[0], tensors[1], dim)
        if result is None:
            result = original(tensors, dim)
            _SWITCH.remember(result, dim)
        return result

    return cat


def _operands(
    tensors: Any = None, dim: Any = None, *, axis: Any = 0, out: Any = None, **others: Any
) -> tuple[Any, Any]:
    """What is to be concatenated, None for what only torch can judge."""
    if out is not None:
        _SWITCH.leave("out=")
    elif not isinstance(tensors, (tuple, list)) or len(tensors) != 2 or others:
        _SWITCH.leave("number of operands")
    else:
        return tensors, axis if dim is None else dim
    return None, None


def _viewing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def view(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except RuntimeError:
            turned = None if _is_compiling() else _SWITCH.active()
            if turned is None or not _is_ours(self):
                raise
            result = self.reshape(*args, *kwargs.values())  # size=, or one dtype=
            turned.reshaped += 1
            return result

    return view


_SWITCH = Switch(
    _TORCH,
    [
        (torch, "cat", _appending),
        (torch, "concat", _appending),
        (torch, "concatenate", _appending),
        (_Tensor, "view", _viewing),
    ],
)


# ---- graphs -----------------------------------------------------------------------


def capture(fn: Callable[..., Any], cache: Any) -> CapturedStep:
    """A decode step that is captured once in a CUDA graph and replayed while the cache grows.

        lengths = torch.from_dlpack(k.cursor)            # int32, on the device

        def decode(token):                               # a tensor in, tensors out
            q, new_k, new_v = project(token)
            pyvmm.append_many([k, v], [new_k, new_v])
            return attend(q, torch.from_dlpack(k.reserved()), ..., lengths)

        step = pyvmm.torch.capture(decode, [k, v])
        for _ in range(n):
            token = step(token).argmax(-1)

    fn:    takes tensors and appends to the cache's tensors, as many rows at every call; whatever
           else it takes of the cache must be data on the device: `reserved()` for the rows and
           `cursor` for the lengths, taken before and outside of it.
    cache: a VTensor, a list of them, or an object that lists them: a VMMCache after its first
           update, one of its layers.

    The step takes what fn takes. Its first call, and the first with tensors of another shape or
    dtype, runs fn twice, the second time under capture; what the first appended is dropped, so
    fn must not count its calls. Each call copies the inputs to the graph's own, backs the rows
    of the step and those to the end of the tile that follows with zeroed memory, behind each lane
    of a ragged tensor, replays, and advances the tensors' lengths. What it returns is the graph's
    own memory: the next call writes over it.

    Without a GPU fn is called as it is, which is said once as a RuntimeWarning. The step raises
    pyvmm.CapacityError and pyvmm.OutOfMemoryError before it runs, with the cache as it was, and
    RuntimeError for a function that cannot be captured. Where it has overflowed itself, since
    another thread has trimmed a tensor meanwhile or replays that nobody follows have used up its
    rows, CapacityError comes after it: truncate the tensors to the rows that are right.
    Raises TypeError, ValueError for a `cache` without tensors or of several devices."""
    return _capture(fn, cache, None)


def _capture(fn: Callable[..., Any], cache: Any, make_graph: type[Graph] | None) -> CapturedStep:
    tensors = tuple(dict.fromkeys(tensors_of(cache)))
    if not tensors:
        raise ValueError("the cache lists no VTensors: make them, or fill it, first")
    names = {tensor.device for tensor in tensors}
    if len(names) > 1:
        raise ValueError(f"the cache lies on several devices: {', '.join(sorted(names))}")
    with torch.inference_mode(False):
        device = from_dlpack(tensors[0].reserved()).device
    if device.type == "cpu" and make_graph is None:
        warnings.warn(
            "pyvmm.torch.capture: the function is called as it is, because graphs exist on CUDA "
            "devices, and the cache is on the host",
            RuntimeWarning,
            stacklevel=3,
        )
        return CapturedStep(fn, tensors, device, None)
    return CapturedStep(fn, tensors, device, make_graph or CudaGraph)


# ---- memory -----------------------------------------------------------------------

_FIRST_GPU = gpu_name(torch, 0)


def allocator(pool: Pool | str = _FIRST_GPU) -> torch.cuda.memory.CUDAPluggableAllocator:
    """torch's pluggable allocator over a pool, or over the default pool of a device.

        memory = torch.cuda.MemPool(pyvmm.torch.allocator(pool).allocator())
        with torch.cuda.use_mem_pool(memory):
            ...

    What torch allocates in the block counts against the pool's budget, beside the tensors that
    grow. torch caches on top of it: its cache goes back by torch.cuda.empty_cache(), or with
    the MemPool. Where the budget is exhausted, torch empties its cache, asks again and raises
    torch.cuda.OutOfMemoryError; out-of-memory callbacks of the pool are not run, since torch
    holds its lock.

    The pool is bound to its device for the life of the process, one for each device, and cannot
    be closed any more. Within
    torch.cuda.memory.change_current_allocator() it works too, but torch does not check there
    whether there was memory.

    Raises ValueError for a pool of the host, or when another one is bound to the device."""
    if isinstance(pool, str):
        pool = default_pool(pool)
    return torch.cuda.memory.CUDAPluggableAllocator(*bind(pool))


# ---- copies -----------------------------------------------------------------------


def _is_ours(array: torch.Tensor) -> bool:
    try:
        return is_tensor_at(array.untyped_storage().data_ptr())
    except RuntimeError:
        return False  # it has no storage


def _compact(array: torch.Tensor) -> torch.Tensor:
    """A copy with a storage of its own, a leaf that requires gradients where `array` does."""
    return array.detach().clone().requires_grad_(array.requires_grad)


@functools.cache
def _copy_elements_alone() -> None:
    """Teach deepcopy and pickle that of our tensors the elements are to be copied and not
    the storage, which has no memory for most of its addresses. Others stay as they were."""
    deepcopy, reduce_ex = _Tensor.__deepcopy__, _Tensor.__reduce_ex__

    @functools.wraps(deepcopy)
    def __deepcopy__(self: torch.Tensor, memo: dict[int, Any]) -> Any:
        if type(self) is not _Tensor or not self.is_leaf or not _is_ours(self):
            return deepcopy(self, memo)
        if id(self) not in memo:
            memo[id(self)] = compact = _compact(self)
            compact.grad = copy.deepcopy(self.grad, memo)
            compact.__dict__ = copy.deepcopy(self.__dict__, memo)
        return memo[id(self)]

    @functools.wraps(reduce_ex)
    def __reduce_ex__(self: torch.Tensor, protocol: Any) -> Any:
        if type(self) is _Tensor and _is_ours(self):
            attributes, self = self.__dict__, _compact(self)
            self.__dict__ = attributes
        return reduce_ex(self, protocol)

    _Tensor.__deepcopy__ = __deepcopy__
    _Tensor.__reduce_ex__ = __reduce_ex__
