from typing import final

from pyvmm._concat import Framework

@final
class Reservation: ...

@final
class NumPy(Framework): ...

NUMPY: NumPy
