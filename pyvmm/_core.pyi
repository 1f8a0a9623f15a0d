from typing_extensions import disjoint_base

# What a VTensor is made of. Nothing of it is called from Python.
@disjoint_base
class TensorCore: ...
