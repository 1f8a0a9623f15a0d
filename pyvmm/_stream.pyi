from typing import Protocol, TypeAlias

class _CudaStream(Protocol):
    def __cuda_stream__(self) -> tuple[int, int]: ...

class _TorchStream(Protocol):
    @property
    def cuda_stream(self) -> int: ...

class _CuPyStream(Protocol):
    @property
    def ptr(self) -> int: ...

_Stream: TypeAlias = int | _CudaStream | _TorchStream | _CuPyStream

# Nothing here is meant to be called from Python.
def _let_go() -> None: ...
