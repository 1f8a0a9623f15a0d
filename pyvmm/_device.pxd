from pyvmm._libvmm cimport vmm_device


cdef str canonical_name(object device)
cdef vmm_device *open_device(str name) except NULL
