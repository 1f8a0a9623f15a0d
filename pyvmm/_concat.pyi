from typing import Any, SupportsIndex, TypedDict, TypeVar

from typing_extensions import disjoint_base

from pyvmm._pool import Pool
from pyvmm._view import View

_Array = TypeVar("_Array")

class _ConcatStats(TypedDict):
    appended: int
    forked: int
    moved: int
    taken_in: int
    fell_back: int
    reasons: dict[str, int]
    copied_bytes: int

@disjoint_base
class Framework:
    counts_elements: bool
    default_layout: str | None
    def unfit(self, cache: Any, new: Any) -> str | None: ...
    def concatenate(self, cache: Any, new: Any, axis: Any) -> Any: ...
    def anchor(self, cache: Any) -> int: ...
    def wrap(self, reserved: View) -> Any: ...
    def cut(self, array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any: ...
    def dense(self, array: Any) -> Any: ...
    def address(self, array: Any) -> int: ...

def register(kind: type, framework: Framework) -> None: ...
def concat_stats(*, reset: bool = False) -> _ConcatStats: ...
def fall_back(reason: str, counts: dict[str, int] | None = None) -> None: ...
def is_tensor_at(address: int) -> bool: ...
def is_result_at(address: int) -> bool: ...
def concat(
    cache: _Array,
    new: Any,  # of the same framework
    axis: SupportsIndex | None = 0,
    *,
    capacity: SupportsIndex | None = None,
    layout: str | None = None,  # "seq", "lane", "c"
    pool: Pool | None = None,
) -> _Array: ...
def join(
    framework: Framework,
    cache: _Array,
    new: Any,
    axis: Any,
    capacity: SupportsIndex | None,
    layout: str | None,
    pool: Pool | None,
    take_in: bool,
    counts: dict[str, int] | None = None,
) -> _Array | None: ...
