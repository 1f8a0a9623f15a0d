"""One memory: who else holds a device's, and asking them to give back what they do not use.

Frameworks keep the memory that their tensors gave back in caches of their own, where the
driver cannot hand it out again. Before a pool of a GPU reports that it has run out, the caches
of the frameworks in this process are emptied and its other pools trimmed; if that does not
help, the error says who holds what.

Nothing is imported here: a framework that is not loaded holds nothing.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm._device import device_info
from pyvmm._error import VMMError
from pyvmm._frameworks import gpu_kind
from pyvmm._report import Table, plain_lines
from pyvmm._sizes import size_text

if TYPE_CHECKING:
    from pyvmm._pool import Pool


class Holder(NamedTuple):
    """What someone in this process holds of a device's memory, in bytes."""

    device: str
    name: str  # "pyvmm.Pool", "torch", "cupy", "paddle"
    in_use_bytes: int
    unused_bytes: int  # kept for the next tensor, or waiting for the device


class _Cache:
    """The caching allocator of one framework. `module` is the framework, loaded."""

    def __init__(self, module: Any, index: int):
        self.module = module
        self.index = index

    def bytes(self) -> tuple[int, int] | None:
        """In use, and kept; None where the framework does not use this device."""
        raise NotImplementedError

    def empty(self) -> None:
        raise NotImplementedError


class _Torch(_Cache):
    def bytes(self) -> tuple[int, int] | None:
        cuda = self.module.cuda
        if not cuda.is_initialized() or self.index >= cuda.device_count():
            return None
        in_use = cuda.memory_allocated(self.index)
        return in_use, cuda.memory_reserved(self.index) - in_use

    def empty(self) -> None:
        # Freeing is an error inside a capture.
        if not self.module.cuda.is_current_stream_capturing():
            with self.module.cuda.device(self.index):
                self.module.cuda.empty_cache()


class _CuPy(_Cache):
    def bytes(self) -> tuple[int, int] | None:
        # The pool answers for the current device, and asking for it creates no context.
        with self.module.cuda.Device(self.index):
            pool = self.module.get_default_memory_pool()
            return pool.used_bytes(), pool.free_bytes()

    def empty(self) -> None:
        with self.module.cuda.Device(self.index):
            self.module.get_default_memory_pool().free_all_blocks()


class _Paddle(_Cache):
    def bytes(self) -> tuple[int, int] | None:
        if not self.module.is_compiled_with_cuda():
            return None
        cuda = self.module.device.cuda
        if self.index >= cuda.device_count():
            return None
        in_use = cuda.memory_allocated(self.index)
        return in_use, cuda.memory_reserved(self.index) - in_use

    def empty(self) -> None:
        self.module.device.cuda.empty_cache()


_CACHES: dict[str, type[_Cache]] = {"torch": _Torch, "cupy": _CuPy, "paddle": _Paddle}

# By id. A WeakSet cannot be gone through while another thread makes a pool; the list of this
# one's references is made in one step.
_pools: weakref.WeakValueDictionary[int, Pool] = weakref.WeakValueDictionary()


def _caches(device: str) -> Iterator[tuple[str, _Cache, int, int]]:
    """Name, cache, bytes in use and bytes kept of each framework that uses the device."""
    own_kind, _, index = device.partition(":")
    for name, kind in _CACHES.items():
        module = sys.modules.get(name)
        if not isinstance(module, ModuleType):
            continue
        cache = kind(module, int(index))
        # A framework that fails, or is only half imported, must not hide the shortage.
        try:
            found = cache.bytes() if gpu_kind(module) == own_kind else None
        except Exception:
            continue
        if found is not None:
            yield name, cache, *found


def _bytes_of(pool: Pool) -> tuple[int, int]:
    """In use, and kept unused."""
    stats = pool.stats()
    unused = (
        stats["free_bytes"]
        + stats["queued_bytes"]
        + stats["lookahead_bytes"]
        + stats["recycled_bytes"]
        + stats["parked_bytes"]
    )
    return stats["in_use_bytes"], unused


def _open_pools() -> list[Pool]:
    pools = [reference() for reference in _pools.valuerefs()]
    return [pool for pool in pools if pool is not None and not pool.closed]


def _pools_of(device: str) -> list[Pool]:
    return [pool for pool in _open_pools() if pool.device == device]


def _over_budget(pool: Pool, needed_bytes: int) -> bool:
    if pool.max_bytes is None:
        return False
    return sum(_bytes_of(pool)) + needed_bytes > pool.max_bytes


def ask_others(pool: Pool, needed_bytes: int) -> bool:
    """Empty the caches of frameworks on the pool's device and trim its other pools; True if
    that freed anything. Where it is the pool's own budget that is exhausted, they would lose
    their memory for nothing, and are left alone."""
    if _over_budget(pool, needed_bytes):
        return False
    freed = False
    for _, cache, _, kept in _caches(pool.device):
        if kept == 0:
            continue
        try:
            cache.empty()
            left = cache.bytes()
        except Exception:
            continue
        freed |= left is not None and left[1] < kept
    for other in _pools_of(pool.device):
        if other is pool:
            continue
        try:
            _, before = _bytes_of(other)
            if before:
                other.trim(wait=True)  # as the pool has waited for its own
                freed |= _bytes_of(other)[1] < before
        except VMMError:
            continue  # closed meanwhile, or a capture is going on
    return freed


def join(pool: Pool) -> None:
    """Let a new pool take part: be listed, and on a GPU ask the others when it runs out."""
    _pools[id(pool)] = pool
    if pool.device == "host":
        return
    reference = weakref.ref(pool)

    def before_giving_up(needed_bytes: int) -> bool:
        pool = reference()
        return pool is not None and ask_others(pool, needed_bytes)

    pool.on_oom(before_giving_up)


def holders(device: str) -> list[Holder]:
    """Who holds memory of a device in this process: the pools of pyvmm, then frameworks."""
    found = []
    for pool in _pools_of(device):
        try:
            found.append(Holder(device, "pyvmm.Pool", *_bytes_of(pool)))
        except VMMError:
            continue  # closed meanwhile
    if device != "host":
        for name, _, in_use, kept in _caches(device):
            found.append(Holder(device, name, in_use, kept))
    return [holder for holder in found if holder.in_use_bytes or holder.unused_bytes]


def who_holds_what() -> tuple[list[Holder], str]:
    """The holders on every device that has a pool, and the same as a table for people."""
    everyone: list[Holder] = []
    texts = []
    for device in sorted({pool.device for pool in _open_pools()}):
        try:
            info = device_info(device)
        except VMMError:
            continue
        found = holders(device)
        everyone += found
        title = (
            f"{device}: {size_text(info['free_bytes'])} of {size_text(info['total_bytes'])} free"
        )
        table = Table(title, ["held by", "in use", "kept unused"], align="lrr")
        for holder in found:
            table.rows.append(
                [holder.name, size_text(holder.in_use_bytes), size_text(holder.unused_bytes)]
            )
        texts.append("\n".join(plain_lines(table)) if found else title)
    return everyone, "\n".join(texts)
