from typing import final

from pyvmm._export import _Rows
from pyvmm._tensor import VTensor

@final
class View(_Rows):
    @property
    def base(self) -> VTensor: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
