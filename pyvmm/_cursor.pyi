from typing import final

from pyvmm._export import _Shared
from pyvmm._tensor import VTensor

@final
class Cursor(_Shared):
    @property
    def base(self) -> VTensor: ...
