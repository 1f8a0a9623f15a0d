from collections.abc import Sequence

from pyvmm._memory import Holder

class VMMError(Exception):
    status: str
    driver_code: int
    operation: str
    def __init__(
        self,
        message: str = "",
        status: str = "VMM_ERR_DRIVER",
        driver_code: int = 0,
        operation: str = "",
    ) -> None: ...

class OutOfMemoryError(VMMError, MemoryError):
    holders: Sequence[Holder]

class CapacityError(VMMError, ValueError): ...
