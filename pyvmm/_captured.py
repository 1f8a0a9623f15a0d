"""Decode steps of transformers' models, captured once and replayed over a cache that grows.

`captured()` replaces a model's forward. A step of one token over a cache that it knows goes to
a graph: ids and positions are copied into static buffers, the graph appends the new keys and
values where the tensors' cursors stand and attends to what is there. Everything else goes to
the model as it is, over the same cache. Nothing has to be undone in between.

What the graph records is a twin of the model: the same modules and weights with a config of
its own, whose attention is ours, so that other threads may run the model itself meanwhile.
"""

# transformers' classes have no types where it is not installed, and some where it is.
# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules import module as torch_modules
from torch.utils.dlpack import from_dlpack
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import AttentionInterface

from pyvmm import _attention
from pyvmm._captured_layers import CapturedLayer, CapturedSliding
from pyvmm._graphs import CannotCapture, CudaGraph, Graph, Recorded
from pyvmm._pool import Pool
from pyvmm._torch_kv import KVPair
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

# The name that the twin's config has for its attention. transformers makes no mask for a name
# of which it knows no kind of mask.
_ATTENTION = "pyvmm_captured"
# Graphs are recorded for lengths up to a power of two, from this on.
_LEAST_BUCKET = 512
# Caches that have gone, whose memory and graphs wait for the next of their batch size.
_MOST_KEPT = 4
_KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels",
    "use_cache", "logits_to_keep", "return_dict", "output_attentions", "output_hidden_states",
}  # fmt: skip


class _Unfit(Exception):
    """Why a call runs eagerly; said once."""


# ---- what is recorded -------------------------------------------------------------


class _Current(threading.local):
    """The steps that this thread records; what the operator below appends to."""

    steps: _Steps | None = None


_current = _Current()


@torch.library.custom_op("pyvmm::append_and_attend", mutates_args=())
def _append_and_attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    # That the cache changes is nobody's business but the next layer's, which depends on the
    # result. Were the reservations arguments, a compiler might copy them.
    assert _current.steps is not None
    return _current.steps.append_and_attend(query, keys, values, layer, scale)


@_append_and_attend.register_fake
def _(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    assert _current.steps is not None
    batch, heads, _, dim = query.shape
    n_chunks = _current.steps.n_chunks(layer)
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
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention layers call: (batch, heads, 1, dim) to (batch, 1, heads, dim)."""
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise RuntimeError(f"its attention has {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts, lse = torch.ops.pyvmm.append_and_attend(query, key, value, module.layer_idx, scale)
    return _attention.merge(parts, lse)[:, None], None


AttentionInterface.register(_ATTENTION, _attend)


class _CacheOfStep:
    """What the twin takes for a cache: keys and values pass, and are appended by attention."""

    is_compileable = True
    is_sliding = (False,)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


def _twin(model: torch.nn.Module) -> Any:
    """The same modules with the same parameters, and configs of their own."""
    twins: dict[int, Any] = {}
    configs: dict[int, Any] = {}

    def config_of_twin(config: Any) -> Any:
        if id(config) not in configs:
            configs[id(config)] = own = copy.copy(config)
            own._attn_implementation_internal = _ATTENTION
        return configs[id(config)]

    def twin(module: torch.nn.Module) -> Any:
        if id(module) not in twins:
            new = twins[id(module)] = type(module).__new__(type(module))
            new.__dict__.update(module.__dict__)
            new.__dict__.pop("forward", None)
            for name, value in module.__dict__.items():
                if isinstance(value, PreTrainedConfig):
                    new.__dict__[name] = config_of_twin(value)
            new.__dict__["_modules"] = {
                name: child if child is None else twin(child)
                for name, child in module._modules.items()
            }
        return twins[id(module)]

    return twin(model)


class _Group:
    """Layers that read the same rows: those of all tokens, or of one window."""

    def __init__(self, window: int | None, pair: KVPair, uniform: bool) -> None:
        self.window = window
        self.cursor = from_dlpack(pair.key_tensor.cursor)
        keys = pair.reserved[0]
        # Where sequences begin, in rows of the pair.
        n = 1 if uniform else keys.shape[0]
        self.first = torch.zeros(n, dtype=torch.int32, device=keys.device)
        self.reads: Any = None
        self.prepared: Any = None


class _Steps:
    """The graphs over the pairs of one cache, one for each bucket of its length, and their
    static buffers. Pairs that were replaced need other steps."""

    def __init__(self, captured: Captured, pairs: list[KVPair], windows: list[int | None]) -> None:
        self._captured = weakref.proxy(captured)
        self.pairs = pairs
        self.windows = windows
        keys = pairs[0].reserved[0]
        self.device = keys.device
        self.batch = keys.shape[0]
        self.layout = pairs[0].key_tensor.layout
        self.capacity = min(
            (p.capacity for p, w in zip(pairs, windows, strict=True) if w is None),
            default=1 << 62,
        )
        self.graphs: dict[int, Recorded] = {}
        self.tensors = [t for pair in pairs for t in (pair.key_tensor, pair.value_tensor)]
        self.pads: tuple[int, ...] = ()
        self.dropped: tuple[int, ...] = ()
        self.bucket = 0
        self.logits: Any = None
        with torch.inference_mode(False):
            self.ids = torch.zeros((self.batch, 1), dtype=torch.long, device=self.device)
            self.positions = torch.zeros_like(self.ids)
            self.groups = {
                window: _Group(window, pairs[windows.index(window)], self.layout == "seq")
                for window in dict.fromkeys(windows)
            }
        self._backend: dict[bool, tuple[type[_attention.Backend], int]] = {}
        _give_up_when_short(self.tensors[0].pool)

    def is_over(self, pairs: list[KVPair]) -> bool:
        return self.pairs == pairs

    def n_chunks(self, layer: int) -> int:
        return self._chosen(self.windows[layer])[1]

    def set_first(self, pads: tuple[int, ...], dropped: dict[int | None, int]) -> None:
        """Where each sequence begins, and how many tokens are gone from before the pairs."""
        state = (dropped.get(window, 0) for window in self.groups)
        now = tuple(state)
        if pads == self.pads and now == self.dropped:
            return
        for (window, group), gone in zip(self.groups.items(), now, strict=True):
            first = [max(n - gone, 0) for n in pads[: len(group.first)]]
            group.first.copy_(torch.tensor(first, dtype=torch.int32))
        if any(self.pads) != any(pads):
            self.graphs.clear()  # another backend may be the first that fits
            self._backend.clear()
        self.pads, self.dropped = pads, now

    def append_and_attend(
        self,
        query: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pair, group = self.pairs[layer], self.groups[self.windows[layer]]
        pair.append_recorded(key_states, value_states)
        backend, _ = self._chosen(group.window)
        keys, values = pair.reserved
        parts, lse = backend.attend(query, keys, values, group.reads, group.prepared, scale)
        if lse is None:
            lse = query.new_empty((*query.shape[:2], 0), dtype=torch.float32)
        return parts.contiguous(), lse.contiguous()

    def graph_for(self, length: int) -> Recorded:
        """The graph for a cache that has so many tokens after the step."""
        bucket = _LEAST_BUCKET
        while bucket < length:
            bucket *= 2
        if bucket not in self.graphs:
            self.graphs[bucket] = self._record(bucket)
        return self.graphs[bucket]

    def _record(self, bucket: int) -> Recorded:
        self.bucket = bucket
        with torch.inference_mode(False), torch.no_grad():
            recorded = Recorded(self._run, self.tensors, self.device, self._captured.graphs)
        self._captured.n_captures += 1
        return recorded

    def _run(self) -> None:
        _current.steps = self
        try:
            for group in self.groups.values():
                self._plan(group)
            logits = self._captured.step(
                input_ids=self.ids,
                position_ids=self.positions,
                past_key_values=_CacheOfStep(),
                use_cache=True,
                return_dict=True,
            ).logits
            if self.logits is None:
                self.logits = torch.empty_like(logits)
            self.logits.copy_(logits)
        finally:
            _current.steps = None

    def _plan(self, group: _Group) -> None:
        backend, n_chunks = self._chosen(group.window)
        longest = self.bucket if group.window is None else min(self.bucket, group.window)
        cursor = group.cursor[: len(group.first)]
        starts, lengths = _attention.plan(cursor, group.first, group.window, n_chunks)
        keys = self.pairs[self.windows.index(group.window)].reserved[0]
        group.reads = _attention.Reads(
            starts, lengths, -(-longest // n_chunks), keys, self.layout
        )
        group.prepared = backend.prepare(group.reads)

    def _chosen(self, window: int | None) -> tuple[type[_attention.Backend], int]:
        is_cut = window is not None or any(self.pads)
        if is_cut not in self._backend:
            keys = self.pairs[self.windows.index(window)].reserved[0]
            _, kv_heads, _, dim = keys.shape
            case = _attention.Case(
                device=self.device,
                dtype=keys.dtype,
                batch=self.batch,
                heads=self._captured.n_heads,
                kv_heads=kv_heads,
                dim=dim,
                layout=self.layout,
                is_cut=is_cut,
                lane_rows=_attention.lane_rows(keys),
            )
            backend = _attention.choose(case)
            n_processors = 1
            if self.device.type == "cuda":
                properties = torch.cuda.get_device_properties(self.device)
                n_processors = properties.multi_processor_count
            n_chunks = _attention.chunks_for(backend, case, n_processors)
            self._backend[is_cut] = backend, n_chunks
        return self._backend[is_cut]


# ---- the cache --------------------------------------------------------------------


class _Run:
    """One cache under capture: its layers, and the steps over them."""

    def __init__(self, layers: list[Any], steps: _Steps | None, is_plain: bool) -> None:
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
        self._kept: deque[_Steps] = deque(maxlen=_MOST_KEPT)
        _all.add(self)
        self._impossible: str | None = None
        self.graphs: type[Graph] = CudaGraph if graphs is None else graphs
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
        """The twin, compiled where that was asked for."""
        if self._step is None:
            self._step = _twin(self.model).forward  # hooks of the model run around a replay
            if self.compile:
                self._step = torch.compile(self._step, dynamic=False)
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
        return self._eager(**kwargs)

    def _say(self, reason: str) -> None:
        with self._lock:
            is_new = reason not in self.reasons
            self.reasons.add(reason)
        if is_new:
            warnings.warn(
                f"pyvmm.transformers.captured: steps run eagerly, because {reason}",
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
        with self._lock:
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
                if kept is not None:
                    new.kept = kept.pairs[index]
                cache.layers[index] = new
            run = self._runs[cache] = _Run(
                cache.layers, kept, type(cache) is DynamicCache
            )
        weakref.finalize(cache, self._give_back, weakref.ref(self), run)
        return run

    @staticmethod
    def _give_back(captured: weakref.ref[Captured], run: _Run) -> None:
        """Of a cache that has gone. Also by the garbage collector, so no more than this."""
        self = captured()
        if self is not None and run.is_plain and run.steps is not None:
            self._kept.append(run.steps)

    def _kept_for(self, cache: Any, kwargs: dict[str, Any]) -> tuple[Any, _Steps | None]:
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
            if self._emptied(steps):
                return layout, steps
        return layout, None

    @staticmethod
    def _emptied(steps: _Steps) -> bool:
        """Can another cache have these pairs: does nobody see what was in them?"""
        try:
            for pair in steps.pairs:
                pair.follow()
                if pair.is_shared():
                    return False
                pair.truncate(0)
        except BufferError:
            return False
        return True

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
            graph = steps.graph_for(length + 1)
        except CannotCapture as error:
            self._impossible = f"the step cannot be captured: {error}"
            raise _Unfit(self._impossible) from error
        steps.ids.copy_(ids)
        positions = kwargs.get("position_ids")
        if positions is None:
            steps.positions.fill_(length)
        else:
            steps.positions.copy_(positions)
        n_growths = graph.n_growths
        graph.replay()
        self.n_growths += graph.n_growths - n_growths
        for layer in run.layers:
            layer.step_done()
        run.known = length + 1, mask is not None
        self.n_replays += 1
        return CausalLMOutputWithPast(
            logits=steps.logits.clone(), past_key_values=kwargs["past_key_values"]
        )

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

    def _steps_of(self, run: _Run, batch: int, mask: Any, length: int) -> _Steps:
        is_known = run.known == (length, mask is not None)
        steps = run.steps
        if is_known and steps is not None:
            pads = steps.pads
        else:
            pads = _pads(mask, length + 1, batch)
        pairs = [layer.pair_of_step() for layer in run.layers]
        if None in pairs:
            raise _Unfit("the cache cannot be stored in place, or records its past")
        if pairs[0].key_tensor.layout == "seq" and len(set(pads)) > 1:
            pairs = [layer.relayout("lane") for layer in run.layers]
        if steps is None or not steps.is_over(pairs):
            steps = run.steps = _Steps(self, pairs, [layer.window for layer in run.layers])
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
