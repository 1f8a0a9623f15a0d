# cython: language_level=3, embedsignature=True
"""Pools as the allocators of frameworks.

The C entries need neither Python nor the GIL: a framework calls them with locks of its own
held, on any thread, during captures, and at exit when there is no interpreter any more. So
they run no out-of-memory callback, and a pool that is bound to them is kept for the life of
the process.
"""

import threading

cimport cython
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uintptr_t

from pyvmm._error cimport check
from pyvmm._libvmm cimport (
    vmm_pool,
    vmm_pool_alloc,
    vmm_pool_free,
    vmm_status,
    vmm_stream,
)
from pyvmm._pool cimport Pool

cdef extern from *:
    """
    /* Found by their names, in a module that is compiled with hidden visibility. */
    __attribute__((visibility("default")))
    void *pyvmm_torch_alloc(Py_ssize_t n_bytes, int device, void *stream);
    __attribute__((visibility("default")))
    void pyvmm_torch_free(void *pointer, Py_ssize_t n_bytes, int device, void *stream);
    """

cdef enum:
    MAX_DEVICES = 64

# By index of the device, which is all that torch's entries are told.
cdef vmm_pool *_bound[MAX_DEVICES]
cdef dict _owners = {}
cdef object _lock = threading.Lock()


cdef public void *pyvmm_torch_alloc(Py_ssize_t n_bytes, int device, void *stream) noexcept nogil:
    """As torch's CUDAPluggableAllocator calls it. NULL is out of memory, which torch answers by
    emptying its cache and asking again."""
    cdef void *pointer = NULL
    if 0 <= device < MAX_DEVICES and _bound[device] != NULL:
        vmm_pool_alloc(_bound[device], <size_t>n_bytes, <vmm_stream>stream, &pointer)
    return pointer


cdef public void pyvmm_torch_free(void *pointer, Py_ssize_t n_bytes, int device,
                                  void *stream) noexcept nogil:
    if 0 <= device < MAX_DEVICES and _bound[device] != NULL:
        vmm_pool_free(_bound[device], pointer)


def bind(Pool pool not None):
    """Let the C entries take the memory of the pool's device from this pool, for the life of
    the process: from then on it cannot be closed. Binding the same pool again is fine.

    Returns the file and the names of the two functions in it. Raises ValueError for a pool
    that is not of a GPU, or when another one is bound to the device; VMMError when closed."""
    kind, _, index = pool.device_name.partition(":")
    if kind == "host":
        raise ValueError("torch's pluggable allocator is for GPUs, and this pool is of the host")
    cdef int device = int(index)
    if device >= MAX_DEVICES:
        raise ValueError(f"{pool.device_name} is beyond the {MAX_DEVICES} that can be bound")
    cdef vmm_pool *handle = pool.enter("bind")
    with _lock:
        owner = _owners.setdefault(device, pool)
        if _bound[device] == NULL:
            # Neither close() nor the end of the interpreter may take it away: this use of it is
            # never left, and this reference never dropped.
            Py_INCREF(pool)
            _bound[device] = handle
        else:
            pool.leave()
        if owner is not pool:
            raise ValueError(f"another pool is bound to {pool.device_name} already, and stays so: "
                             "take that one")
    return __file__, "pyvmm_torch_alloc", "pyvmm_torch_free"


@cython.final
cdef class Allocator:
    """Memory of a pool by address, for allocators that call Python."""
    cdef Pool pool
    cdef vmm_pool *handle  # there as long as an allocation is, whatever becomes of the Pool

    def __cinit__(self, Pool pool not None):
        self.pool = pool
        self.handle = pool.enter("alloc")
        pool.leave()

    def alloc(self, Py_ssize_t n_bytes):
        """The address of `n_bytes` bytes, at least 1. Runs no out-of-memory callback.

        Raises OutOfMemoryError, ValueError, VMMError."""
        cdef void *pointer = NULL
        cdef vmm_status status
        cdef vmm_pool *handle = self.pool.enter("alloc")
        with nogil:
            status = vmm_pool_alloc(handle, <size_t>n_bytes, NULL, &pointer)
        self.pool.leave()
        check(status)
        return <uintptr_t>pointer

    def free(self, uintptr_t pointer):
        """Give back what alloc() returned, and nothing else."""
        cdef vmm_status status
        with nogil:
            status = vmm_pool_free(self.handle, <void *>pointer)
        check(status)
