"""Element types: what each framework calls them, and their codes in DLPack."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy


class Element(NamedTuple):
    """An element type: its code and bits in DLPack, and its numpy.dtype."""

    code: int
    bits: int
    dtype: numpy.dtype[Any]


def _native(code: int, bits: int, name: str) -> Element:
    return Element(code, bits, numpy.dtype(name))


ELEMENTS = {
    "bool": _native(6, 8, "bool"),
    "int8": _native(0, 8, "int8"),
    "int16": _native(0, 16, "int16"),
    "int32": _native(0, 32, "int32"),
    "int64": _native(0, 64, "int64"),
    "uint8": _native(1, 8, "uint8"),
    "uint16": _native(1, 16, "uint16"),
    "uint32": _native(1, 32, "uint32"),
    "uint64": _native(1, 64, "uint64"),
    "float16": _native(2, 16, "float16"),
    "float32": _native(2, 32, "float32"),
    "float64": _native(2, 64, "float64"),
    "bfloat16": Element(4, 16, numpy.dtype(ml_dtypes.bfloat16)),
    "float8_e4m3fn": Element(10, 8, numpy.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": Element(12, 8, numpy.dtype(ml_dtypes.float8_e5m2)),
    "complex64": _native(5, 64, "complex64"),
    "complex128": _native(5, 128, "complex128"),
}
_BY_DTYPE = {element.dtype: element for element in ELEMENTS.values()}
_BY_CODE = {(element.code, element.bits): name for name, element in ELEMENTS.items()}
# What DLPack calls kinds, for messages, and the kinds that NumPy has by itself.
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_NATIVE = {0, 1, 2, 5, 6}


def element_of(dtype: object) -> Element:
    """The element type that `dtype` means, in any framework's own form.

    A name ("bfloat16"), a numpy.dtype or scalar type, ml_dtypes', torch's, jax's, paddle's.
    Raises TypeError, with the names that are known, for anything else.
    """
    if dtype is None:
        raise _unknown(dtype)
    if isinstance(dtype, str):
        name = dtype
    elif type(dtype).__module__.partition(".")[0] in ("torch", "paddle"):
        name = str(dtype)
    else:
        name = ""
    known = ELEMENTS.get(name.rpartition(".")[2])  # "torch.float16" too
    if known is not None:
        return known
    try:
        found = numpy.dtype(dtype)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise _unknown(dtype) from None
    known = _BY_DTYPE.get(found)
    if known is None or not found.isnative:
        raise _unknown(dtype)
    return known


def name_of(code: int, bits: int, lanes: int = 1) -> str:
    """What to call an element type of DLPack in a message."""
    name = _BY_CODE.get((code, bits)) or f"{_KINDS.get(code, f'type {code} of ')}{bits}"
    return name if lanes == 1 else f"{name}x{lanes}"


def format_of(element: Element) -> str | None:
    """The format of an element in a buffer, None where the buffer protocol has none."""
    if element.code not in _NATIVE:
        return None
    return numpy.empty(0, element.dtype).data.format


def _unknown(dtype: object) -> TypeError:
    shown = f"'{dtype}'" if isinstance(dtype, str) else repr(dtype)
    if isinstance(dtype, numpy.dtype) and not dtype.isnative:
        return TypeError(f"dtype {shown} is not in this machine's byte order ({sys.byteorder})")
    return TypeError(f"unknown dtype {shown}: known are {', '.join(ELEMENTS)}")
