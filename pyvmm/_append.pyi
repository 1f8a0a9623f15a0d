from collections.abc import Sequence

from pyvmm._source import _Array
from pyvmm._stream import _Stream
from pyvmm._tensor import VTensor

def append_many(
    tensors: Sequence[VTensor], sources: Sequence[_Array], stream: _Stream | None = None
) -> None: ...
