# cython: language_level=3, embedsignature=True
"""DLPack capsules: made for our rows, and read from others.

An export owns a pin and copies of shape and strides, and no Python object: the tensor may
grow on, be closed or collected, and the consumer may call the deleter on any thread,
without the GIL and after the interpreter has gone.
"""

from cpython.pycapsule cimport (
    PyCapsule_GetName,
    PyCapsule_GetPointer,
    PyCapsule_IsValid,
    PyCapsule_New,
)
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc

from pyvmm._libvmm cimport VMM_MAX_NDIM, vmm_pin, vmm_unpin

cdef const char *LEGACY = "dltensor"
cdef const char *VERSIONED = "dltensor_versioned"


cdef struct Export:
    DLManagedTensor legacy
    DLManagedTensorVersioned versioned
    vmm_pin *pin
    int64_t shape[VMM_MAX_NDIM]
    int64_t strides[VMM_MAX_NDIM]


cdef void _drop(Export *export) noexcept nogil:
    vmm_unpin(export.pin)
    free(export)


cdef void _delete_legacy(DLManagedTensor *managed) noexcept nogil:
    _drop(<Export *>managed.manager_ctx)


cdef void _delete_versioned(DLManagedTensorVersioned *managed) noexcept nogil:
    _drop(<Export *>managed.manager_ctx)


cdef void _destroy_capsule(object capsule) noexcept:
    # A consumer renames the capsule that it takes: then the export is the consumer's.
    cdef void *context
    if PyCapsule_IsValid(capsule, VERSIONED):
        context = (<DLManagedTensorVersioned *>
                   PyCapsule_GetPointer(capsule, VERSIONED)).manager_ctx
    elif PyCapsule_IsValid(capsule, LEGACY):
        context = (<DLManagedTensor *>PyCapsule_GetPointer(capsule, LEGACY)).manager_ctx
    else:
        return
    with nogil:
        _drop(<Export *>context)


# DLManagedTensorVersioned.flags
cdef uint64_t READ_ONLY = 1


cdef object make_capsule(const Region *region, vmm_pin *pin, bint versioned, bint read_only=False):
    """A capsule over the region. Takes the pin over, also when it fails. A legacy capsule cannot
    say that it is read only."""
    cdef Export *export = <Export *>malloc(sizeof(Export))
    if export == NULL:
        vmm_unpin(pin)
        raise MemoryError
    export.pin = pin

    cdef DLTensor *tensor = &export.legacy.dl_tensor
    if versioned:
        tensor = &export.versioned.dl_tensor
        export.versioned.version = DLPackVersion(1, 0)
        export.versioned.manager_ctx = export
        export.versioned.deleter = _delete_versioned
        export.versioned.flags = READ_ONLY if read_only else 0
    else:
        export.legacy.manager_ctx = export
        export.legacy.deleter = _delete_legacy
    tensor.device = region.device
    tensor.ndim = region.ndim
    tensor.dtype = region.dtype
    tensor.shape = export.shape
    tensor.strides = export.strides
    tensor.byte_offset = 0

    # Dimensions of size 1 have the stride that a dense array would have (Paddle compares
    # strictly), and an array of no elements has no address (as the standard says).
    cdef int64_t n_elements = 1, dense = 1
    cdef int i
    for i in range(region.ndim - 1, -1, -1):
        n_elements *= region.shape[i]
        export.shape[i] = region.shape[i]
        export.strides[i] = dense if region.shape[i] == 1 else region.strides[i] // region.itemsize
        dense = export.strides[i] * region.shape[i]
    tensor.data = region.data if n_elements else NULL

    try:
        if versioned:
            return PyCapsule_New(&export.versioned, VERSIONED, _destroy_capsule)
        return PyCapsule_New(&export.legacy, LEGACY, _destroy_capsule)
    except BaseException:
        _drop(export)
        raise


cdef DLTensor *read_capsule(object capsule) except NULL:
    """What another library's capsule describes, for as long as the capsule lives.

    The capsule is not renamed: its own destructor tells the producer that we are done."""
    cdef DLManagedTensorVersioned *versioned
    if PyCapsule_IsValid(capsule, VERSIONED):
        versioned = <DLManagedTensorVersioned *>PyCapsule_GetPointer(capsule, VERSIONED)
        if versioned.version.major != 1:
            raise BufferError(
                f"x exports DLPack {versioned.version.major}.{versioned.version.minor}: "
                "version 1 is understood, and capsules from before it"
            )
        return &versioned.dl_tensor
    if PyCapsule_IsValid(capsule, LEGACY):
        return &(<DLManagedTensor *>PyCapsule_GetPointer(capsule, LEGACY)).dl_tensor
    if PyCapsule_IsValid(capsule, PyCapsule_GetName(capsule)):
        raise BufferError("x.__dlpack__() gave a capsule that has been consumed already")
    raise TypeError(f"x.__dlpack__() gave {type(capsule).__name__}, and no capsule")
