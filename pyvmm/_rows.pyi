from collections.abc import Sequence
from typing import final

from typing_extensions import disjoint_base

@final
@disjoint_base
class Rows:
    def __init__(self, address: int, shape: Sequence[int]) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...
