# cython: language_level=3, embedsignature=True
"""Exports of rows [start, stop) of a tensor, with a pin on its first `n_pinned` rows."""

import numpy

cimport cython

from pyvmm._buffer cimport fill_buffer, release_buffer
from pyvmm._core cimport TensorCore
from pyvmm._dlpack cimport DL_ROCM, Region, make_capsule
from pyvmm._libvmm cimport (
    VMM_STREAM_LEGACY,
    VMM_STREAM_NONE,
    vmm_last_stream,
    vmm_pin,
    vmm_stream,
    vmm_unpin,
)
from pyvmm._stream cimport number_of, stream_of

cdef str _DLPACK_ADVICE = "import it by DLPack, as torch.from_dlpack() or cupy.from_dlpack() do"


cdef vmm_stream consumer_of(TensorCore tensor, object stream, object dl_device,
                            object copy) except? NULL:
    """The stream that a consumer of DLPack names, for the arguments that it gave."""
    cdef vmm_stream consumer = VMM_STREAM_NONE
    if dl_device is not None and tuple(dl_device) != dlpack_device(tensor):
        raise BufferError(f"this memory is on {tensor.pool_.device_name} and is exported there "
                          "only: import it, then copy it to the other device")
    if copy:
        raise BufferError("an export shares memory: copy what was made from it instead")
    if tensor.on_host:
        if stream is not None and stream != -1:
            raise ValueError(f"stream must be None for memory on the host, not {stream!r}")
    elif stream is None:
        consumer = VMM_STREAM_LEGACY
    elif tensor.target.device.device_type == DL_ROCM and (stream == 1 or stream == 2):
        raise ValueError(f"stream {stream} means nothing on ROCm: 0 is the default stream, -1 asks "
                         "for no synchronization")
    elif stream == 0 and tensor.target.device.device_type != DL_ROCM:
        raise ValueError("stream 0 is ambiguous: 1 is the legacy default stream, 2 the "
                         "per-thread one, -1 asks for no synchronization")
    elif stream != -1:
        stream_of(stream, &consumer)
    return consumer


cdef object to_dlpack(TensorCore tensor, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t n_pinned,
                      object stream, object max_version, object dl_device, object copy):
    cdef vmm_stream consumer = consumer_of(tensor, stream, dl_device, copy)
    cdef Region region
    cdef vmm_pin *pin
    versioned = max_version is not None and max_version[0] >= 1

    tensor.region_of(start, stop, &region)
    pin = tensor.pin(n_pinned)
    try:
        tensor.handoff(consumer)
    except BaseException:
        vmm_unpin(pin)
        raise
    return make_capsule(&region, pin, versioned)


cdef tuple dlpack_device(TensorCore tensor):
    return (tensor.target.device.device_type, tensor.target.device.device_id)


cdef int to_buffer(TensorCore tensor, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t n_pinned,
                   Py_buffer *buffer, int flags, bytes format) except -1:
    cdef Region region
    if not tensor.on_host:
        raise BufferError(f"this memory is on {tensor.pool_.device_name}, out of the buffer "
                          f"protocol's reach: {_DLPACK_ADVICE}")
    if format is None:
        raise BufferError(f"the buffer protocol has no {tensor.dtype_}: use numpy.asarray(), "
                          f"__array__() or {_DLPACK_ADVICE}")
    tensor.region_of(start, stop, &region)
    return fill_buffer(buffer, flags, &region, tensor.pin(n_pinned), format)


@cython.final
cdef class _Bits:
    """The buffer of elements that have no format, as unsigned integers."""
    cdef TensorCore tensor
    cdef Py_ssize_t start
    cdef Py_ssize_t stop
    cdef vmm_pin *pin  # until it is collected: its rows may be asked for again

    def __dealloc__(self):
        with nogil:
            vmm_unpin(self.pin)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        cdef Region region
        self.tensor.region_of(self.start, self.stop, &region)
        fill_buffer(buffer, flags, &region, NULL, b"B" if self.tensor.itemsize == 1 else b"H")
        buffer.obj = self

    def __releasebuffer__(self, Py_buffer *buffer):
        release_buffer(buffer)


cdef object to_numpy(TensorCore tensor, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t n_pinned,
                     object exporter, object dtype, object copy):
    """What __array__(dtype, copy) of `exporter` returns."""
    cdef _Bits bits
    if not tensor.on_host:
        raise TypeError(f"this memory is on {tensor.pool_.device_name}, out of NumPy's reach: "
                        f"{_DLPACK_ADVICE}, and copy that to the host")
    if tensor.format is None:
        bits = _Bits.__new__(_Bits)
        bits.tensor, bits.start, bits.stop = tensor, start, stop
        bits.pin = tensor.pin(n_pinned)
        array = numpy.asarray(bits).view(tensor.dtype_)
    else:
        array = numpy.asarray(memoryview(exporter))
    if dtype is None or numpy.dtype(dtype) == tensor.dtype_:
        return array.copy() if copy else array
    if copy is not None and not copy:
        raise ValueError(f"{tensor.dtype_} cannot be seen as {numpy.dtype(dtype)} without a copy")
    return array.astype(dtype)


cdef dict interface_of(TensorCore tensor, Py_ssize_t start, Py_ssize_t stop):
    """What __cuda_array_interface__ returns."""
    cdef Region region
    cdef vmm_stream stream = vmm_last_stream(tensor.handle)
    if stream == NULL:
        stream = VMM_STREAM_LEGACY
    tensor.region_of(start, stop, &region)
    shape = tuple([region.shape[i] for i in range(region.ndim)])
    return {
        "shape": shape,
        "typestr": tensor.dtype_.str,
        "data": (0 if 0 in shape else <size_t>region.data, False),
        # CuPy takes strides over no elements for memory that it then asks the driver about.
        "strides": None if 0 in shape else tensor.strides_,
        "version": 3,
        # The reader makes its own stream wait for this one.
        "stream": number_of(stream, tensor.target.device),
    }
