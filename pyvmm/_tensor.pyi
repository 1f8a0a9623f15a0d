from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Literal, SupportsIndex, TypedDict, final, overload

from typing_extensions import Self

from pyvmm._core import TensorCore
from pyvmm._cursor import Cursor
from pyvmm._export import _Rows
from pyvmm._pool import Pool
from pyvmm._source import _Array
from pyvmm._stream import _Stream
from pyvmm._view import View

class _TensorStats(TypedDict):
    reserved_bytes: int
    mapped_bytes: int
    used_bytes: int
    slack_bytes: int
    block_count: int
    driver_calls: dict[str, int]

def empty(
    shape: SupportsIndex | Iterable[SupportsIndex],
    dtype: object = "float32",  # in any framework's own form
    *,
    axis: SupportsIndex | None = None,
    capacity: SupportsIndex,
    device: str | None = None,
    layout: str | None = None,  # "seq", "lane", "c"
    block_size: int | str | None = None,
    pool: Pool | None = None,
    zero: bool = False,
) -> VTensor: ...
def map_many(tensors: Sequence[VTensor], n: SupportsIndex | Sequence[SupportsIndex]) -> None: ...

@final
class VTensor(TensorCore, _Rows):
    @property
    def layout(self) -> Literal["seq", "lane", "c"]: ...
    @property
    def length(self) -> int: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def ragged(self) -> bool: ...
    @property
    def capacity(self) -> int: ...
    @property
    def mapped(self) -> int: ...
    @property
    def pool(self) -> Pool: ...
    @property
    def block_size(self) -> int | Literal["auto"]: ...
    @property
    def closed(self) -> bool: ...
    def stats(self) -> _TensorStats: ...
    def append(
        self,
        x: _Array,
        stream: _Stream | None = None,
        *,
        lanes: Iterable[SupportsIndex] | None = None,
        counts: Iterable[SupportsIndex] | None = None,
    ) -> None: ...
    def grow(self, n: SupportsIndex) -> View: ...
    @property
    def _given_up(self) -> int: ...
    def advance(self, n: SupportsIndex = 1) -> None: ...
    @property
    def cursor(self) -> Cursor: ...
    def map(self, n: SupportsIndex) -> None: ...
    @overload
    def truncate(
        self, n: SupportsIndex, stream: _Stream | None = None, *, lanes: None = None
    ) -> None: ...
    @overload
    def truncate(
        self,
        n: SupportsIndex | Sequence[SupportsIndex],
        stream: _Stream | None = None,
        *,
        lanes: Iterable[SupportsIndex],
    ) -> None: ...
    def trim(self) -> None: ...
    def fork(self, n: SupportsIndex | None = None) -> VTensor: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    def __getitem__(self, key: slice, /) -> View: ...
    def view(self, start: SupportsIndex | None = 0, stop: SupportsIndex | None = None) -> View: ...
    def reserved(self) -> View: ...
    # No __len__ and no __iter__: at run time they raise a TypeError that says what to do.
    def __bool__(self) -> Literal[True]: ...
