"""Growing concatenations inside any model, turned into appends: what the frameworks share.

A model that keeps a cache concatenates it with what is new at every step. That is known by
what happens and not by names: the first operand of a concatenate is what an earlier one
returned, along the same axis. The first time this is so, the operand is taken in; from then
on it is a concat's own result, and found by its address.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, SupportsIndex

from pyvmm._concat import Framework, fall_back, is_result_at, join
from pyvmm._error import VMMError
from pyvmm._pool import Pool


class Turned:
    """What one `with` block has done so far.

    turned:   concatenations that became appends, or copies that later ones append to
    left:     those left to the framework, by reason; "not growing" is any other use
    reshaped: calls of view() on results that reshape() answered
    """

    turned: int
    left: dict[str, int]
    reshaped: int

    def __init__(
        self, capacity: SupportsIndex | None, layout: str | None, pool: Pool | None
    ) -> None:
        self.turned = self.reshaped = 0
        self.left = {}
        self._parameters = capacity, layout, pool

    def __repr__(self) -> str:
        return f"<turned {self.turned}, left {self.left}, reshaped {self.reshaped}>"


class _Thread(threading.local):
    """The blocks that a thread is in, the innermost last; and results of the framework's own
    concatenate in them that still live: by id, which and along what axis."""

    def __init__(self) -> None:
        self.blocks: list[Turned] = []
        self.results: dict[int, tuple[weakref.ref[Any], int]] = {}


class Switch:
    """A framework's functions, replaced while any thread is in a block and doing what they
    always did in every other thread.

    replacements: for each function its owner, its name, and what makes its replacement of it
    """

    def __init__(
        self,
        framework: Framework,
        replacements: list[tuple[Any, str, Callable[[Any], Any]]],
    ) -> None:
        self._framework = framework
        self._replacements = replacements
        self._put_there: list[tuple[Any, str, Any, Any]] = []  # owner, name, before, now
        self._lock = threading.Lock()
        # Weak, and not counted: what an interrupt kept from being ended goes by itself.
        self._open: weakref.WeakSet[Turned] = weakref.WeakSet()
        self._thread = _Thread()

    @contextlib.contextmanager
    def block(
        self, capacity: SupportsIndex | None, layout: str | None, pool: Pool | None
    ) -> Iterator[Turned]:
        turned = Turned(capacity, layout, pool)
        # This thread's: a generator may be ended by another.
        blocks, results = self._thread.blocks, self._thread.results
        try:
            with self._lock:
                if not self._open:
                    self._put_back()  # what an interrupt left
                    self._replace()
                self._open.add(turned)
            blocks.append(turned)
            yield turned
        finally:
            if turned in blocks:
                blocks.remove(turned)
            if not blocks:
                results.clear()
            with self._lock:
                self._open.discard(turned)
                if not self._open:
                    self._put_back()

    def stay(self, capacity: SupportsIndex | None, layout: str | None, pool: Pool | None) -> None:
        """Open a block that this thread never leaves. Nothing is replaced for it."""
        self._thread.blocks.append(Turned(capacity, layout, pool))

    def active(self) -> Turned | None:
        """The innermost block that this thread is in."""
        blocks = self._thread.blocks
        return blocks[-1] if blocks else None

    def leave(self, reason: str) -> None:
        """Count a concatenate that the framework is to do."""
        fall_back(reason, self._thread.blocks[-1].left)

    def concatenate(self, cache: Any, new: Any, axis: int) -> Any:
        """Of two operands, inside a block. None where the framework is to do it, counted; its
        result then goes to remember()."""
        thread = self._thread
        known = thread.results.get(id(cache))
        is_last_result = (
            known is not None and known[0]() is cache and known[1] == _dimension(cache, axis)
        )
        if not is_last_result and not is_result_at(self._framework.address(cache)):
            self.leave("not growing")
            return None
        turned = thread.blocks[-1]
        try:
            result = join(
                self._framework, cache, new, axis, *turned._parameters, is_last_result, turned.left
            )
        except VMMError as error:
            self.leave(error.status)
            return None
        if result is not None:
            turned.turned += 1
        return result

    def remember(self, result: Any, axis: int) -> None:
        """Of the framework's own concatenate: the next one may begin with it."""
        results, key = self._thread.results, id(result)
        try:
            known = weakref.ref(result, lambda _: results.pop(key, None))
        except TypeError:
            return  # of a type without weak references
        results[key] = known, _dimension(result, axis)

    def _replace(self) -> None:
        self._put_there = [
            (owner, name, vars(owner).get(name), make(getattr(owner, name)))
            for owner, name, make in self._replacements
        ]
        for owner, name, _, replacement in self._put_there:
            setattr(owner, name, replacement)

    def _put_back(self) -> None:
        for owner, name, before, replacement in self._put_there:
            if vars(owner).get(name) is not replacement:
                continue  # another has put its own there since, which may call ours
            if before is None:
                delattr(owner, name)  # a class had it from its base
            else:
                setattr(owner, name, before)
        self._put_there = []


def _dimension(array: Any, axis: Any) -> Any:
    """The axis counted from the first, if it is one."""
    return axis + array.ndim if isinstance(axis, int) and axis < 0 else axis
