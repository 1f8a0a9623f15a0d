"""PaddleNLP's models, unchanged, with caches that grow in place.

    pyvmm.paddlenlp.install()
    model.generate(input_ids, attention_mask=attention_mask, ...)
    pyvmm.paddlenlp.uninstall()

PaddleNLP's attention layers keep keys and values as (batch, tokens, heads, dim), some as
(batch, heads, tokens, dim), and concatenate at every step. `install()` gives each of its
modules of models a `paddle` of its own whose concat appends where `pyvmm.paddle` would
inside inplace_concat(): to what an earlier concat along the same axis returned. Everything
else, and everyone else's paddle.concat, stays as it is. pyvmm.concat_stats() counts.

In to_static and static programs, `sample_d2s` among them, a concat of two tensors of four
dimensions along axis 1 becomes `pyvmm.paddle_op`'s operator if `install(static=True)` was
called: it appends for a batch of one and is Paddle's concat for a larger one, whose cache in
this order of dimensions cannot be handed to a static program without a copy.

Made for PaddleNLP 3.0.0b4.
"""

# mypy: disable-error-code="untyped-decorator, attr-defined"

from __future__ import annotations

import importlib
import sys
import threading
import types
from typing import Any, SupportsIndex

import paddle
from paddle.jit.marker import unified

import pyvmm
from pyvmm import paddle_op
from pyvmm._inplace import Switch
from pyvmm.paddle import PADDLE, appending

__all__ = ["install", "uninstall"]

_concat = paddle.concat  # Paddle's own
_lock = threading.Lock()


class _Paddle(types.ModuleType):
    """The module `paddle`, with a concat of its own."""

    def __init__(
        self,
        static: bool,
        capacity: SupportsIndex | None,
        layout: str | None,
        pool: pyvmm.Pool | None,
    ) -> None:
        super().__init__("paddle", paddle.__doc__)
        self._static = static
        self._parameters = capacity, layout, pool
        self._switch = Switch(PADDLE, [])
        self._appending = appending(self._switch, _concat)

    def __getattr__(self, name: str) -> Any:
        return getattr(paddle, name)

    @unified
    def concat(self, x: Any, axis: Any = 0, name: str | None = None) -> Any:
        if paddle.in_dynamic_mode():
            if self._switch.active() is None:
                self._switch.stay(*self._parameters)
            return self._appending(x, axis, name)
        if self._static and _is_of_cache(x, axis):
            capacity = self._parameters[0]
            return paddle_op.concat(
                *x, axis, capacity=paddle_op.CAPACITY if capacity is None else capacity
            )
        return _concat(x, axis, name)


def _is_of_cache(x: Any, axis: Any) -> bool:
    """Whether variables of a program are a cache and what is new, as far as can be seen."""
    if not isinstance(x, (list, tuple)) or len(x) != 2 or axis != 1:
        return False
    cache, new = x
    return len(cache.shape) == len(new.shape) == 4 and cache.dtype == new.dtype


def install(
    *,
    static: bool = False,
    capacity: SupportsIndex | None = None,
    layout: str | None = None,
    pool: pyvmm.Pool | None = None,
) -> None:
    """Let the models of PaddleNLP that are imported by now append to their caches, in every
    thread. Again: for models imported since, and with these parameters from now on.

    static: in to_static and static programs, too, by an operator that is compiled now
    capacity, layout, pool: as for pyvmm.paddle.concat

    Raises ImportError without PaddleNLP, RuntimeError where the operator cannot be built."""
    transformers = importlib.import_module("paddlenlp.transformers")
    if static:
        paddle_op.load()
    replacement = _Paddle(static, capacity, layout, pool)
    with _lock:
        for module in _models(transformers.__name__):
            module.paddle = replacement


def uninstall() -> None:
    """Give the models Paddle's own concat back. Caches that have grown in place stay right."""
    with _lock:
        for module in _models("paddlenlp.transformers"):
            if isinstance(module.paddle, _Paddle):
                module.paddle = paddle


def _models(package: str) -> list[types.ModuleType]:
    """Its modules of models that have `paddle` by that name."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(package + ".")
        and name.rpartition(".")[2].startswith("modeling")
        and (
            getattr(module, "paddle", None) is paddle
            or isinstance(getattr(module, "paddle", None), _Paddle)
        )
    ]
