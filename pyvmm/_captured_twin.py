"""What captured decode steps of transformers run: a twin of the model, whose attention is ours.

The twin has the modules and weights of the model and a config of its own, so that other threads
may run the model itself meanwhile. Its layers append to the cache of the step that runs, and
attend to it.
"""

# transformers' classes have no types where it is not installed, and some where it is.
# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator"

from __future__ import annotations

import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig
from transformers.modeling_utils import AttentionInterface

from pyvmm import _attention

# The name that the twin's config has for its attention. transformers makes no mask for a name
# of which it knows no kind of mask.
_ATTENTION = "pyvmm_captured"


class Step(Protocol):
    """What the twin asks of the steps that run it."""

    batch: int

    def n_chunks(self, layer: int) -> int: ...
    def append_and_attend(
        self,
        query: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class _Current(threading.local):
    """The steps that this thread runs; what the operator below appends to."""

    steps: Step | None = None


current = _Current()


# ---- attention --------------------------------------------------------------------


@torch.library.custom_op("pyvmm::append_and_attend", mutates_args=())
def _append_and_attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    n_chunks: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    # That the cache changes is nobody's business but the next layer's, which depends on the
    # result. Were the reservations arguments, a compiler might copy them.
    assert current.steps is not None
    return current.steps.append_and_attend(query, keys, values, int(layer), scale)


@_append_and_attend.register_fake
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    n_chunks: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, _, dim = query.shape
    parts = query.new_empty((batch, n_chunks, heads, values.shape[-1]))
    n_merged = n_chunks if n_chunks > 1 else 0
    return parts, query.new_empty((batch, heads, n_merged), dtype=torch.float32)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    layer: torch.Tensor,
    n_chunks: int,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention layers call; the result is (batch, 1, heads, dim). `layer`
    and `n_chunks` come from _forward_of_layer(), among the keywords that layers pass on."""
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise RuntimeError(f"its attention has {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts, lse = torch.ops.pyvmm.append_and_attend(query, key, value, layer, n_chunks, scale)
    return _attention.merge(parts, lse)[:, None], None


AttentionInterface.register(_ATTENTION, _attend)


class CacheOfStep:
    """What the twin takes for a cache: keys and values pass, and are appended by attention."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


# ---- the twin ---------------------------------------------------------------------


def twin_of(model: torch.nn.Module, compile: bool) -> Any:
    """The same modules with the same parameters, and configs of their own."""
    whole = _twin(model, {})
    decoder = whole.get_decoder()
    call = _Compiled() if compile else _forward
    for index, layer in enumerate(decoder.layers):
        layer.__dict__["forward"] = functools.partial(
            _forward_of_layer, call, weakref.ref(layer), torch.tensor(index, device="cpu")
        )
    if compile:
        for module in (decoder.rotary_emb, decoder.norm):
            module.__dict__["forward"] = functools.partial(_forward_of, call, weakref.ref(module))
    return whole


def _twin(of: Any, made: dict[int, Any]) -> Any:
    """Of a module or a config, once for each."""
    if id(of) in made:
        return made[id(of)]
    if isinstance(of, PreTrainedConfig):
        config = made[id(of)] = copy.copy(of)
        config._attn_implementation_internal = _ATTENTION
        return config
    kind: Any = type(of)
    module = made[id(of)] = kind.__new__(kind)
    module.__dict__.update(of.__dict__)
    # These call the model's own modules: what captured() and module.compile() set.
    for name in ("forward", "_compiled_call_impl"):
        module.__dict__.pop(name, None)
    for name, value in of.__dict__.items():
        if isinstance(value, PreTrainedConfig):
            module.__dict__[name] = _twin(value, made)
    module.__dict__["_modules"] = {
        name: child if child is None else _twin(child, made) for name, child in of._modules.items()
    }
    return module


# The forward of a twin's module has no more than a weak reference to it: weights are many
# gigabytes, and must not wait for the garbage collector.


def _forward_of(call: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    return call(module(), *args, **kwargs)


def _forward_of_layer(
    call: Callable[..., Any], layer: Any, index: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """One decoder layer. Which it is is data, so that all of a kind are the same to a compiler."""
    assert current.steps is not None
    n_chunks = current.steps.n_chunks(int(index))
    return call(layer(), *args, layer=index, n_chunks=n_chunks, **kwargs)


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


class _Compiled:
    """_forward(), compiled once for all modules of one class and one batch size: weights are
    arguments to torch.compile. What else differs (layers of a window, chunks) it finds out by
    itself, a few times.

    Each has code of its own. torch.compile keeps what it has compiled with the code, for all
    functions and models that share it, and after a few more (recompile_limit) runs it eagerly;
    or fails, with `fullgraph`, which also refuses to compile a part only."""

    def __init__(self) -> None:
        self._functions: dict[tuple[type, int], Callable[..., Any]] = {}

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        assert current.steps is not None
        kind, batch = type(module), current.steps.batch
        function = self._functions.get((kind, batch))
        if function is None:
            code = _forward.__code__.replace(co_name=f"{kind.__name__}_batch_{batch}")
            own = types.FunctionType(code, _forward.__globals__)
            function = torch.compile(own, dynamic=False, fullgraph=True)
            self._functions[kind, batch] = function
        return function(module, *args, **kwargs)
