from collections.abc import Iterable, Sequence
from typing import SupportsIndex

from pyvmm._source import _Array
from pyvmm._stream import _Stream
from pyvmm._tensor import VTensor

def append_many(
    tensors: Sequence[VTensor],
    sources: Sequence[_Array],
    stream: _Stream | None = None,
    *,
    lanes: Iterable[SupportsIndex] | None = None,
    counts: Iterable[SupportsIndex] | None = None,
) -> None: ...
