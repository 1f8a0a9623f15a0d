from collections.abc import Sequence
from typing import SupportsIndex, final

from pyvmm._export import _Shared
from pyvmm._tensor import VTensor

@final
class Cursor(_Shared):
    @property
    def base(self) -> VTensor: ...

def advance_many(tensors: Sequence[VTensor], n: SupportsIndex = 1) -> int: ...
