"""Decode steps of transformers' models, captured once and replayed over a cache that grows.

`captured()` replaces a model's forward. A step of one token over a cache that it knows goes to
a graph: ids and positions are copied into static buffers, the graph appends the new keys and
values where the tensors' cursors stand and attends to what is there. Everything else goes to
the model as it is, over the same cache. Nothing has to be undone in between.
"""

# transformers' classes have no types where it is not installed, and some where it is.
# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator"

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules import module as torch_modules
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from pyvmm._captured_layers import CapturedLayer, CapturedSliding
from pyvmm._captured_step import Steps
from pyvmm._captured_twin import twin_of
from pyvmm._graphs import CAPTURE, CannotCapture, CudaGraph, Graph
from pyvmm._pool import Pool
from pyvmm.transformers import _DEFAULT_CAPACITY, VMMCache, VMMLayer, _InstalledLayer

# The models whose step can be recorded, by the class that generates: what makes one fit, and
# how to add it, is in docs/captured.md.
MODELS = frozenset(
    {
        "Gemma3ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
)

# Caches that have gone, whose memory and graphs wait for the next of their batch size.
_MOST_KEPT = 4
_KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels",
    "use_cache", "logits_to_keep", "return_dict", "output_attentions", "output_hidden_states",
}  # fmt: skip


class _Unfit(Exception):
    """Why a call runs eagerly; said once."""


# ---- the cache --------------------------------------------------------------------


class _Run:
    """One cache under capture: its layers, and the steps over them."""

    def __init__(self, layers: list[Any], steps: Steps | None, is_plain: bool) -> None:
        self.layers = layers
        self.steps = steps
        # Made by generate(), say: another like it can take over the memory.
        self.is_plain = is_plain
        # Of the last captured step: the tokens after it, and whether a mask was given.
        self.known: tuple[int, bool] = (-1, False)


def _is_adoptable(layer: Any) -> bool:
    return type(layer) in (DynamicLayer, VMMLayer, _InstalledLayer, DynamicSlidingWindowLayer)


# ---- the model --------------------------------------------------------------------


class Captured:
    """What captured() turns on: the model's forward while at least one block is open."""

    def __init__(
        self, model: Any, compile: bool = False, graphs: type[Graph] | None = None
    ) -> None:
        self.model = model
        self.compile = compile
        # Counted: steps replayed, graphs recorded, steps before which the tensors grew.
        self.n_replays = self.n_captures = self.n_growths = 0
        self.reasons: set[str] = set()
        self._lock = threading.Lock()
        self._runs: weakref.WeakKeyDictionary[Any, _Run] = weakref.WeakKeyDictionary()
        # Steps whose cache has gone. Filled by finalizers, on any thread.
        self._kept: deque[Steps] = deque(maxlen=_MOST_KEPT)
        _all.add(self)
        self._impossible: str | None = None
        self.graphs: type[Graph] = CudaGraph if graphs is None else graphs
        # What is no replay keeps out of other threads' captures, where there are any.
        has_graphs = graphs is not None or model.device.type == "cuda"
        self._apart: Any = CAPTURE if has_graphs else contextlib.nullcontext()
        if graphs is None and model.device.type != "cuda":
            self._impossible = f"graphs exist on CUDA devices, and the model is on {model.device}"
        elif type(model).__name__ not in MODELS:
            self._impossible = f"{type(model).__name__} is not among the models of docs/captured.md"
        elif any(hasattr(module, "_hf_hook") for module in model.modules()):
            self._impossible = "the model is spread or offloaded by hooks of accelerate"
        elif getattr(model.config, "use_bidirectional_attention", False):
            self._impossible = "the model attends in both directions"
        text = model.config.get_text_config(decoder=True)
        self.n_heads: int = getattr(text, "num_attention_heads", 0)
        self._capacity = getattr(text, "max_position_embeddings", None) or _DEFAULT_CAPACITY
        self._eager = model.forward
        self._names = list(inspect.signature(model.forward).parameters)
        self._hooks: list[Any] = []
        self._step: Callable[..., Any] | None = None
        self._compiles = compile

    # -- in and out

    def install(self) -> None:
        self._eager = self.model.forward

        @functools.wraps(self._eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        self._hooks = [
            hooks
            for module in self.model.modules()
            if module is not self.model  # those run around forward, and so around a replay
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._hooks += [
            torch_modules._global_forward_hooks,
            torch_modules._global_forward_pre_hooks,
        ]
        self._had_forward = "forward" in self.model.__dict__
        self.model.forward = forward

    def uninstall(self) -> None:
        if self._had_forward:
            self.model.forward = self._eager
        else:
            del self.model.forward
        self.give_up()
        for run in list(self._runs.values()):
            run.steps = None
        self._step = None

    def give_up(self) -> int:
        """Let go of what waits for the next cache; how many sets of tensors that was."""
        n_kept = 0
        with contextlib.suppress(IndexError):
            while True:
                self._kept.popleft().graphs.clear()
                n_kept += 1
        return n_kept

    @property
    def step(self) -> Callable[..., Any]:
        """The twin's forward. Hooks of the model run around a replay."""
        if self._step is None:
            self._step = twin_of(self.model, self._compiles).forward
        return self._step

    # -- a call of forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(self._names, args, strict=False))
        if kwargs.get("past_key_values") is None:
            self._give_cache(kwargs)
        try:
            run = self._run_of(kwargs)
            return self._replay(run, kwargs)
        except _Unfit as reason:
            if str(reason):
                self._say(str(reason))
        with self._apart:
            return self._eager(**kwargs)

    def _say(self, reason: str, how: str = "run eagerly") -> None:
        with self._lock:
            is_new = reason not in self.reasons
            self.reasons.add(reason)
        if is_new:
            warnings.warn(
                f"pyvmm.transformers.captured: steps {how}, because {reason}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _give_cache(self, kwargs: dict[str, Any]) -> None:
        use_cache = kwargs.get("use_cache")
        if use_cache or (use_cache is None and getattr(self.model.config, "use_cache", False)):
            config = self.model.config.get_text_config(decoder=True)
            if not self.model.config.is_encoder_decoder:
                kwargs["past_key_values"] = DynamicCache(config=config)

    def _run_of(self, kwargs: dict[str, Any]) -> _Run:
        cache = kwargs.get("past_key_values")
        if cache is None:
            raise _Unfit
        run = self._runs.get(cache)
        if run is None or run.layers is not cache.layers:
            run = self._adopt(cache, kwargs)
        return run

    def _adopt(self, cache: Any, kwargs: dict[str, Any]) -> _Run:
        """Put layers that can be captured in the place of the cache's own."""
        if type(cache) not in (DynamicCache, VMMCache) or cache.offloading:
            raise _Unfit(f"{type(cache).__name__} is no DynamicCache or VMMCache, or offloads")
        if not cache.layers:
            raise _Unfit  # they come with the first update
        with self._apart, self._lock:
            if not all(
                _is_adoptable(layer) or isinstance(layer, (CapturedLayer, CapturedSliding))
                for layer in cache.layers
            ):
                raise _Unfit("the cache has layers of other kinds than full and sliding attention")
            layout, kept = self._kept_for(cache, kwargs)
            pool = next((x._pool for x in cache.layers if isinstance(x, VMMLayer)), None)
            for index, layer in enumerate(cache.layers):
                if not _is_adoptable(layer):
                    continue
                if isinstance(layer, DynamicSlidingWindowLayer):
                    new: Any = CapturedSliding.after(layer, pool)
                else:
                    new = CapturedLayer.after(layer, self._capacity, layout)
                new.apart = self._apart
                if kept is not None:
                    new.kept = kept.pairs[index]
                cache.layers[index] = new
            run = self._runs[cache] = _Run(cache.layers, kept, type(cache) is DynamicCache)
        weakref.finalize(cache, self._give_back, weakref.ref(self), run)
        return run

    @staticmethod
    def _give_back(captured: weakref.ref[Captured], run: _Run) -> None:
        """Of a cache that has gone. Also by the garbage collector, so no more than this."""
        self = captured()
        if self is not None and run.is_plain and run.steps is not None:
            self._kept.append(run.steps)

    def _kept_for(self, cache: Any, kwargs: dict[str, Any]) -> tuple[Any, Steps | None]:
        """The layout for a cache, and, if it is empty, the steps of one that has gone."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None or self._impossible is not None:
            return None, None
        layout = None
        if ids.device.type == "cuda" and isinstance(mask, torch.Tensor) and mask.dim() == 2:
            # Sequences that begin at different rows are lanes of their own.
            layout = "lane" if bool((mask[:, 0] == 0).any()) and len(mask) > 1 else None
        is_new = type(cache) is DynamicCache and not any(x.is_initialized for x in cache.layers)
        for steps in list(self._kept) if is_new else ():
            if steps.batch != len(ids) or len(steps.pairs) != len(cache.layers):
                continue
            if ids.device.type == "cuda" and steps.layout != (layout or "seq"):
                continue
            with contextlib.suppress(ValueError):
                self._kept.remove(steps)
            if steps.hand_over():
                return layout, steps
        return layout, None

    # -- a captured step

    def _replay(self, run: _Run, kwargs: dict[str, Any]) -> Any:
        ids = kwargs.get("input_ids")
        if ids is None or ids.dim() != 2 or ids.shape[1] != 1:
            raise _Unfit
        length = run.layers[0].n_tokens()
        if length == 0:
            raise _Unfit
        if self._impossible is not None:
            raise _Unfit(self._impossible)
        self._check(kwargs)
        mask = kwargs.get("attention_mask")
        steps = self._steps_of(run, ids.shape[0], mask, length)
        if length == steps.capacity:
            raise _Unfit  # the next update moves the layers to twice as much
        try:
            self.n_growths += self._replay_steps(steps, length, ids, kwargs.get("position_ids"))
        except CannotCapture as error:
            self._impossible = f"the step cannot be captured: {error}"
            raise _Unfit(self._impossible) from error
        for layer in run.layers:
            layer.step_done()
        run.known = length + 1, mask is not None
        self.n_replays += 1
        return CausalLMOutputWithPast(
            logits=steps.logits.clone(), past_key_values=kwargs["past_key_values"]
        )

    def _replay_steps(self, steps: Steps, *given: Any) -> int:
        """steps.replay(), with torch.compile or, where that fails, without."""
        try:
            return steps.replay(*given)
        except CannotCapture as error:
            if not self._do_without_compiler(error):
                raise
        return steps.replay(*given)

    def _do_without_compiler(self, error: CannotCapture) -> bool:
        """Was it torch.compile that failed? From now on the steps are captured as they are."""
        if not self.compile:
            return False
        from torch._dynamo.exc import TorchDynamoException  # an import of seconds

        if not isinstance(error.__cause__, TorchDynamoException):
            return False
        with CAPTURE:
            if self._compiles:
                self._compiles, self._step = False, None
        self._say(f"torch.compile failed: {error}", "are captured uncompiled")
        return True

    def _check(self, kwargs: dict[str, Any]) -> None:
        """Raise _Unfit for what a graph cannot give."""
        for name, value in kwargs.items():
            if name not in _KNOWN and value is not None:
                raise _Unfit(f"the step was given {name}")
        for name in ("labels", "inputs_embeds"):
            if kwargs.get(name) is not None:
                raise _Unfit(f"the step was given {name}")
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name) or (
                kwargs.get(name) is None and getattr(self.model.config, name, False)
            ):
                raise _Unfit(f"{name} was asked for")
        if kwargs.get("return_dict") is False:
            raise _Unfit("return_dict=False was asked for")
        if kwargs.get("use_cache") is False:
            raise _Unfit("use_cache=False was asked for")
        if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            raise _Unfit("logits_to_keep is a tensor")
        if any(self._hooks) and any(
            not _is_transformers_own(hook) for hooks in self._hooks for hook in hooks.values()
        ):
            raise _Unfit("modules of the model have forward hooks")
        if self.model.training:
            raise _Unfit("the model is in training mode")
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise _Unfit("gradients are enabled: use torch.no_grad() or torch.inference_mode()")
        if torch.is_autocast_enabled(self.model.device.type):
            raise _Unfit("autocast is enabled")

    def _steps_of(self, run: _Run, batch: int, mask: Any, length: int) -> Steps:
        is_known = run.known == (length, mask is not None)
        steps = run.steps
        if is_known and steps is not None:
            pads = steps.pads
        else:
            with self._apart:
                pads = _pads(mask, length + 1, batch)
        pairs = [layer.pair_of_step() for layer in run.layers]
        if None in pairs:
            raise _Unfit("the cache cannot be stored in place, or records its past")
        if pairs[0].key_tensor.layout == "seq" and len(set(pads)) > 1:
            pairs = [layer.relayout("lane") for layer in run.layers]
        if steps is None or not steps.is_over(pairs):
            with self._apart:
                steps = run.steps = Steps(self, pairs, [layer.window for layer in run.layers])
            _give_up_when_short(pairs[0].key_tensor.pool)
        if steps.batch != batch:
            raise _Unfit("the cache has another batch size than the step")
        dropped = {x.window: x.dropped for x in run.layers if x.window is not None}
        steps.set_first(pads, dropped)
        return steps


def _pads(mask: Any, length: int, batch: int) -> tuple[int, ...]:
    """How many tokens each sequence is padded with on the left; a synchronisation."""
    if mask is None:
        return (0,) * batch
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape != (batch, length):
        raise _Unfit("the mask is not one number for each token")
    is_token = mask != 0
    pads = length - is_token.sum(1)
    expected = torch.arange(length, device=mask.device) >= pads[:, None]
    *found, is_left = torch.cat([pads, (is_token == expected).all().long()[None]]).tolist()
    if not is_left:
        raise _Unfit("the mask leaves out more than padding on the left")
    return tuple(found)


def _is_transformers_own(hook: Any) -> bool:
    """Hooks that it leaves on modules once outputs were asked for; idle otherwise."""
    module: str = getattr(hook, "__module__", "")
    return module == "transformers.utils.output_capturing"


# ---- memory -----------------------------------------------------------------------

_all: weakref.WeakSet[Captured] = weakref.WeakSet()
_asked: weakref.WeakSet[Pool] = weakref.WeakSet()


def _give_up_when_short(pool: Pool) -> None:
    """Before this pool runs out, let go of what waits for the next cache."""
    if pool not in _asked:
        _asked.add(pool)
        pool.on_oom(_give_up)


def _give_up(needed_bytes: int) -> bool:
    n_kept = 0
    for captured in list(_all):
        n_kept += captured.give_up()
    return n_kept > 0


# ---- blocks -----------------------------------------------------------------------

_open: dict[int, tuple[Captured, int]] = {}
_open_lock = threading.Lock()


def _after_fork_in_child() -> None:
    # Threads that may hold the locks are not here, and the parent's memory is of no use.
    global _open_lock
    _open_lock = threading.Lock()
    for captured in list(_all):
        captured._lock = threading.Lock()
        captured._kept.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


@contextlib.contextmanager
def block(model: Any, compile: bool, graphs: type[Graph] | None = None) -> Iterator[Captured]:
    """Blocks over one model may nest, and lie on several threads: they share what is captured."""
    with _open_lock:
        captured, n_open = _open.get(id(model), (None, 0))
        if captured is None:
            captured = Captured(model, compile, graphs)
            captured.install()
        elif captured.compile != compile:
            raise ValueError(
                f"the model is captured already with compile={captured.compile}: use the same"
            )
        _open[id(model)] = captured, n_open + 1
    try:
        yield captured
    finally:
        with _open_lock:
            captured, n_open = _open.pop(id(model))
            if n_open > 1:
                _open[id(model)] = captured, n_open - 1
            else:
                captured.uninstall()
