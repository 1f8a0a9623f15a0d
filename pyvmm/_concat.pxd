from pyvmm._view cimport View


cdef class Framework:
    cdef public bint counts_elements
    cdef public object default_layout

    cpdef object unfit(self, object cache, object new)
    cpdef object concatenate(self, object cache, object new, object axis)
    cpdef object anchor(self, object cache)
    cpdef object wrap(self, View reserved)
    cpdef object cut(self, object array, tuple shape, tuple strides)
    cpdef object dense(self, object array)
