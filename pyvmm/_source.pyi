from typing import Any, Protocol, TypeAlias

from typing_extensions import Buffer

# Nothing here is seen from Python but the type of what append() reads.
class _DLPackExporter(Protocol):
    def __dlpack__(self) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...

class _CudaArray(Protocol):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

_Array: TypeAlias = _DLPackExporter | _CudaArray | Buffer
