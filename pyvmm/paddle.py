"""Paddle: a concat that appends, on Paddle's own tensors.

    keys = pyvmm.paddle.concat([keys, new], axis=1)      # in place of paddle.concat

`concat` is pyvmm.concat() in Paddle's form: equal to paddle.concat in value, always.
`vtensor_reserve_one_token` is the same in the form of PaddleNLP's operator,
`inplace_concat()` does it to the concatenations inside a model that is left as it is, and
`pyvmm.paddle_op` to static programs.

print(), numpy(), save() and pickling read the storage behind a Paddle tensor whole, and what
lies behind the last row may not be backed by memory. So each result here has a storage of its
own that ends where its rows do, over the same memory. That takes layout "seq", which is the
default; in the others there are gaps between lanes, and what goes through these calls must
be clone()d first. `paddle.from_dlpack(t.reserved())` must always.
"""

# mypy: disable-error-code="no-untyped-call, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, SupportsIndex

import numpy
import paddle
from paddle.base import core
from paddle.jit.marker import unified

import pyvmm
from pyvmm import paddle_op
from pyvmm._concat import Framework, fall_back, is_tensor_at, register
from pyvmm._inplace import Switch, Turned
from pyvmm._rows import Rows
from pyvmm._view import View

__all__ = ["as_tensor", "concat", "inplace_concat", "vtensor_reserve_one_token"]

_Tensor = paddle.Tensor
_as_strided = paddle._C_ops.as_strided
_concat = paddle.concat  # Paddle's own, whatever inplace_concat() puts there
_CPU = core.CPUPlace()
# What NumPy has no name for goes through a type of the same size.
_BY_VIEW = {paddle.float8_e4m3fn: "uint8", paddle.float8_e5m2: "uint8"}
_NUMPY = {
    getattr(paddle, name): name
    for name in (
        "bool int8 int16 int32 int64 uint8 float16 float32 float64 complex64 complex128"
    ).split()
} | {paddle.bfloat16: "uint16"}  # which Paddle reads as bfloat16


# ---- sharing memory ------------------------------------------------------------------------


def _share(address: int, shape: Sequence[int], strides: Sequence[int], like: Any) -> Any:
    """The first rows of the tensor that begins at `address`, of the dtype and on the place of
    `like`. Strides count elements."""
    if 0 in shape:
        return paddle.empty(shape, like.dtype, device=like.place)
    shape, strides = list(shape), _dense_strides(shape, strides)
    extension = paddle_op.loaded()
    if extension is None and like.place.is_gpu_place():
        extension = paddle_op.load()  # Paddle has no other way to a storage over GPU memory
    if extension is not None:
        return extension.show(address, shape, strides, like)
    dtype = like.dtype
    storage = Rows(address, shape)
    flat = numpy.frombuffer(memoryview(storage), _NUMPY.get(dtype) or _BY_VIEW[dtype])
    # Without a copy: the storage keeps the array, and with it the rows.
    whole = _Tensor(flat, _CPU, False, True, None, True)
    if dtype in _BY_VIEW:
        whole = whole.view(dtype)
    return _as_strided(whole, shape, strides, 0)


@functools.cache
def _empty_like(dtype: str, device: str) -> Any:
    """An empty tensor of that dtype (NumPy's name of it) on that device (pyvmm's name)."""
    kind, _, number = device.partition(":")
    if kind == "host":
        return paddle.empty([0], dtype, device="cpu")
    # A CUDA object given to the CPU wheel ends the process.
    if not paddle.is_compiled_with_cuda():
        raise RuntimeError(f"this Paddle has no CUDA: it cannot show memory on {device}")
    return paddle.empty([0], dtype, device=f"gpu:{number}")


def _dense_strides(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The same strides, but those of dimensions of size 1, which mean nothing, such that
    Paddle takes what is contiguous for contiguous."""
    dense, found = 1, list(strides)
    for d in range(len(found) - 1, -1, -1):
        if shape[d] == 1:
            found[d] = dense
        else:
            dense = found[d] * shape[d]
    return found


class _Paddle(Framework):
    """See pyvmm.concat()."""

    def __init__(self) -> None:
        self.counts_elements = True
        self.default_layout = "seq"

    def unfit(self, cache: Any, new: Any) -> str | None:
        if type(cache) is not _Tensor or type(new) is not _Tensor:
            return "types"
        if not (cache.stop_gradient and new.stop_gradient) and paddle.is_grad_enabled():
            return "gradients"
        if not (cache.is_dense() and new.is_dense()):
            return "types"
        return None

    def concatenate(self, cache: Any, new: Any, axis: Any) -> Any:
        return _concat([cache, new], axis)

    def address(self, array: Any) -> int:
        if type(array) is not _Tensor or not array.is_dense():
            return 0
        address: int = array.data_ptr()
        return address

    def anchor(self, cache: Any) -> int:
        return self.address(cache)

    def wrap(self, reserved: View) -> Any:
        # What cut() takes as well: a storage over all of it is what must not be.
        return reserved

    def cut(self, array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        if isinstance(array, View):
            return _share(array.ptr, shape, strides, _empty_like(array.dtype.name, array.device))
        return _share(array.data_ptr(), shape, strides, array)

    def dense(self, array: Any) -> Any:
        return array.clone()


PADDLE = _Paddle()
register(_Tensor, PADDLE)


def as_tensor(rows: pyvmm.VTensor | View) -> paddle.Tensor:
    """A Paddle tensor of the rows of a tensor, or of a view that begins at row 0: it shares
    their memory, pins them as an export does, and has a storage that ends where they do.

    Two tensors made by `paddle.from_dlpack(t)` must not live at once, since Paddle then calls
    the wrong deleter or none; these may. Raises ValueError for a view of other rows."""
    if isinstance(rows, View):
        if rows.start != 0:
            raise ValueError("rows from the first on are wanted: slice what as_tensor() returns")
    itemsize = rows.dtype.itemsize
    like = _empty_like(rows.dtype.name, rows.device)
    return _share(rows.ptr, rows.shape, [stride // itemsize for stride in rows.strides], like)


# ---- concat ---------------------------------------------------------------------------------


@unified  # to_static calls it and does not translate it
def concat(
    x: Sequence[Any],
    axis: Any = 0,
    name: str | None = None,
    *,
    capacity: int | None = None,
    layout: str | None = None,
    pool: pyvmm.Pool | None = None,
) -> Any:
    """paddle.concat(x, axis) in value, and an append to the first of `x` where that can be.

    x:        tensors of one dtype; the first is the cache, the others are appended to it in
              turn, any number of rows each
    axis:     along which they are joined
    capacity, layout, pool: as in pyvmm.concat(), for a cache that is taken in; the layout is
              "seq" unless another is named

    Eagerly it is pyvmm.concat(). In a static program and in to_static it is
    pyvmm.paddle_op.concat() where the axis is the outermost in memory, and else Paddle's own,
    counted by pyvmm.concat_stats() as "static program"."""
    if not isinstance(x, (list, tuple)) or len(x) < 2:
        return _concat(x, axis, name)
    if not paddle.in_dynamic_mode():
        return _static_concat(x, axis, name, capacity)
    return functools.reduce(
        lambda cache, new: pyvmm.concat(
            cache, new, axis, capacity=capacity, layout=layout, pool=pool
        ),
        x,
    )


def _static_concat(x: Sequence[Any], axis: Any, name: str | None, capacity: int | None) -> Any:
    shapes = [list(variable.shape) for variable in x]
    fits = (
        isinstance(axis, int)
        and -len(shapes[0]) <= axis < len(shapes[0])
        and all(size == 1 for size in shapes[0][: axis % len(shapes[0])])
        and all(len(shape) == len(shapes[0]) for shape in shapes)
        and all(variable.dtype == x[0].dtype for variable in x)
        and all(variable.stop_gradient for variable in x)
    )
    if not fits:
        fall_back("static program")
        return _concat(x, axis, name)
    rows = paddle_op.CAPACITY if capacity is None else capacity
    return functools.reduce(lambda cache, new: paddle_op.concat(cache, new, axis, capacity=rows), x)


@unified
def vtensor_reserve_one_token(
    key_cache: Any, key_states: Any, transposed_input: bool = False
) -> Any:
    """The cache with the new tokens behind it, as PaddleNLP's operator of this name returns it.

    key_cache:  (batch, tokens, heads, dim); (tokens, batch, heads, dim), the order in memory,
                if `transposed_input`. Any tensor at first, then what this returned
    key_states: (batch, new tokens, heads, dim)

    Returns (batch, tokens + new tokens, heads, dim), in the memory of `key_cache` if that was
    returned here; the first call reserves it. Unlike the operator it takes any number of
    tokens, of any size, on the CPU too, and older results stay right.

    In a static program this shape is not contiguous for a batch above 1, and kernels there
    read no strides: the result is transposed, which copies it. Programs keep the cache as
    (tokens, batch, heads, dim) and call pyvmm.paddle_op.concat."""
    for name, tensor in ("key_cache", key_cache), ("key_states", key_states):
        if len(tensor.shape) != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not 4 dimensions")
    if not transposed_input:
        return concat([key_cache, key_states], 1)
    swap = [1, 0, 2, 3]
    if paddle.in_dynamic_mode():
        return concat([paddle.transpose(key_cache, swap), key_states], 1)
    return paddle.transpose(concat([key_cache, paddle.transpose(key_states, swap)], 0), swap)


# ---- inside any model -----------------------------------------------------------------------


def inplace_concat(
    *,
    capacity: SupportsIndex | None = None,
    layout: str | None = None,
    pool: pyvmm.Pool | None = None,
) -> AbstractContextManager[Turned]:
    """Turn growing concatenations of this thread into appends while the block lasts.

        with pyvmm.paddle.inplace_concat() as turned:
            model.generate(**inputs)
        print(turned)

    A paddle.concat (or cat) of two tensors whose first is what an earlier one returned, along
    the same axis, appends; see `concat` for the parameters and pyvmm.concat() for what is left
    to Paddle. `turned.turned` counts them, `turned.left` the others by reason. Results are
    equal in value and, for more than one sequence, not contiguous: reshape() copies where it
    must, as it does for any such tensor, and view(), which would raise, is answered by
    reshape (`turned.reshaped`).

    Not supported: writing in place into a result that a later one continues, and functions
    imported before (`from paddle import concat`), which stay Paddle's own. In static programs
    and to_static it is Paddle's own: see pyvmm.paddle_op.

    Blocks nest, the parameters of the innermost count, other threads are not affected, and
    after the last block Paddle is as it was."""
    return _SWITCH.block(capacity, layout, pool)


def appending(switch: Switch, original: Callable[..., Any]) -> Callable[..., Any]:
    """Paddle's concat, which inside a block of the switch appends where that can be."""

    @unified
    @functools.wraps(original)
    def concat(*args: Any, **kwargs: Any) -> Any:
        turned = switch.active() if paddle.in_dynamic_mode() else None
        if turned is None:
            return original(*args, **kwargs)
        operands, axis, unfit = _operands(*args, **kwargs)
        if unfit:
            switch.leave(unfit)
            return original(*args, **kwargs)
        result = switch.concatenate(operands[0], operands[1], axis)
        if result is None:
            result = original(operands, axis)
            switch.remember(result, axis)
        return result

    return concat


def _operands(
    x: Any = None,
    axis: Any = 0,
    name: Any = None,
    *,
    tensors: Any = None,
    dim: Any = None,
    out: Any = None,
    **others: Any,
) -> tuple[Any, Any, str | None]:
    """What is to be concatenated, along what, and why only Paddle can judge that, or None."""
    x = tensors if x is None else x
    unfit = None
    if out is not None:
        unfit = "out="
    elif not isinstance(x, (list, tuple)) or len(x) != 2 or others:
        unfit = "number of operands"
    return x, axis if dim is None else dim, unfit


def _viewing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def view(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except ValueError:
            turned = _SWITCH.active()
            if turned is None or not is_tensor_at(PADDLE.address(self)):
                raise
            result = self.reshape(*args, **kwargs)
            turned.reshaped += 1
            return result

    return view


def _appending(original: Callable[..., Any]) -> Callable[..., Any]:
    return appending(_SWITCH, original)


_SWITCH = Switch(
    PADDLE,
    [
        (paddle, "concat", _appending),
        (paddle, "cat", _appending),
        (paddle.tensor, "concat", _appending),
        (_Tensor, "view", _viewing),
    ],
)
