from typing import Literal, TypedDict

class _DeviceInfo(TypedDict):
    kind: Literal["host", "cuda"]
    index: int
    name: str
    description: str
    granularity_bytes: int
    recommended_bytes: int
    reservable_bytes: int
    free_bytes: int
    total_bytes: int
    driver_version: int
    exportable_handles: bool
    kernel: str

def library_version() -> str: ...
def devices() -> list[str]: ...
def device_info(device: str) -> _DeviceInfo: ...
