from pyvmm._dlpack cimport DLDevice
from pyvmm._libvmm cimport vmm_stream, vmm_tensor
from pyvmm._pool cimport Pool


cdef int stream_of(object stream, vmm_stream *out) except -1
cdef object number_of(vmm_stream stream, DLDevice device)
cdef int keep_last_stream(vmm_tensor *handle, vmm_stream stream) except -1
cdef int keep_until_read(Pool pool, vmm_stream stream, object owner) except -1
cdef int drop_what_was_read() except -1
