"""The structs of DLPack 1.3 (dlpack.h), and capsules made and read."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from pyvmm._libvmm cimport VMM_MAX_NDIM, vmm_dtype, vmm_pin


cdef enum:
    DL_CPU = 1
    DL_CUDA = 2
    DL_CUDA_HOST = 3
    DL_ROCM = 10
    DL_ROCM_HOST = 11
    DL_CUDA_MANAGED = 13


ctypedef struct DLPackVersion:
    uint32_t major
    uint32_t minor


ctypedef struct DLDevice:
    int32_t device_type
    int32_t device_id


ctypedef struct DLTensor:
    void *data
    DLDevice device
    int32_t ndim
    vmm_dtype dtype  # vmm.h's element types are DLDataType
    int64_t *shape
    int64_t *strides  # in elements
    uint64_t byte_offset


cdef struct DLManagedTensor:
    DLTensor dl_tensor
    void *manager_ctx
    void (*deleter)(DLManagedTensor *) noexcept nogil


cdef struct DLManagedTensorVersioned:
    DLPackVersion version
    void *manager_ctx
    void (*deleter)(DLManagedTensorVersioned *) noexcept nogil
    uint64_t flags
    DLTensor dl_tensor


cdef struct DLPackExchangeAPIHeader:
    DLPackVersion version
    DLPackExchangeAPIHeader *prev_api


ctypedef struct DLPackExchangeAPI:
    DLPackExchangeAPIHeader header
    void *managed_tensor_allocator
    void *managed_tensor_from_py_object_no_sync
    void *managed_tensor_to_py_object_no_sync
    int (*dltensor_from_py_object_no_sync)(void *py_object, DLTensor *out) except -1
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out) except -1


# Rows of a tensor, as an export describes them.
ctypedef struct Region:
    void *data
    DLDevice device
    vmm_dtype dtype
    int itemsize
    int ndim
    int64_t shape[VMM_MAX_NDIM]
    int64_t strides[VMM_MAX_NDIM]  # in bytes


cdef inline bint is_on_gpu(DLDevice device) noexcept:
    return (device.device_type == DL_CUDA or device.device_type == DL_ROCM
            or device.device_type == DL_CUDA_MANAGED)


cdef inline bint is_same_device(DLDevice a, DLDevice b) noexcept:
    return a.device_type == b.device_type and a.device_id == b.device_id


cdef object make_capsule(const Region *region, vmm_pin *pin, bint versioned, bint read_only=*)
cdef DLTensor *read_capsule(object capsule) except NULL
