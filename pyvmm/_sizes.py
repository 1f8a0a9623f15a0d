"""Sizes and counts that users give: "32MiB", 4096, 7 rows."""

from __future__ import annotations

import operator
import re
import sys
from fractions import Fraction

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*", re.ASCII)


def count(value: object, name: str, least: int = 0) -> int:
    """An integer of at least `least` that fits a signed 64-bit size.

    Raises TypeError (no integer, or a bool), ValueError (too small), OverflowError.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not bool")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    if number > sys.maxsize:
        raise OverflowError(f"{name} {number} does not fit 64 bits")
    return number


def byte_count(value: object, name: str, least: int = 1) -> int:
    """Bytes, at least `least`, from an integer or a string: "4096", "32MiB", "1.5 GiB", "2 MB".

    KiB, MiB, GiB, TiB count by 1024 and kB, MB, GB, TB by 1000; case does not matter.
    Raises TypeError, ValueError (does not parse, no whole bytes, too few), OverflowError.
    """
    if not isinstance(value, str):
        try:
            return count(value, name, least)
        except TypeError:
            kind = type(value).__name__
            raise TypeError(
                f"{name} must be an integer or a string such as '32MiB', not {kind}"
            ) from None
    match = _SIZE.fullmatch(value)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(
            f"{name} '{value}' is no size: a number of bytes, or one with KiB, MiB, GiB, TiB, "
            "kB, MB, GB or TB"
        )
    n_bytes = Fraction(match[1]) * unit
    if n_bytes.denominator != 1:
        raise ValueError(f"{name} '{value}' is no whole number of bytes")
    if n_bytes > sys.maxsize:
        raise OverflowError(f"{name} '{value}' does not fit 64 bits")
    return count(int(n_bytes), name, least)


def size_text(n_bytes: int) -> str:
    """ "12.5 MiB", "96 bytes" """
    value, unit = float(n_bytes), 0
    while value >= 1024 and unit < 4:
        value /= 1024
        unit += 1
    return f"{value:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
