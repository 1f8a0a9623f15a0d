from pyvmm._core cimport TensorCore
from pyvmm._libvmm cimport vmm_stream


cdef object to_dlpack(TensorCore tensor, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t n_pinned,
                      object stream, object max_version, object dl_device, object copy)
cdef vmm_stream consumer_of(TensorCore tensor, object stream, object dl_device,
                            object copy) except? NULL
cdef tuple dlpack_device(TensorCore tensor)
cdef int to_buffer(TensorCore tensor, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t n_pinned,
                   Py_buffer *buffer, int flags, bytes format) except -1
cdef object to_numpy(TensorCore tensor, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t n_pinned,
                     object exporter, object dtype, object copy)
cdef dict interface_of(TensorCore tensor, Py_ssize_t start, Py_ssize_t stop)
