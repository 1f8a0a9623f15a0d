# cython: language_level=3, embedsignature=True
"""Lanes of different lengths: what callers say of them, truncation, the lengths."""

from cpython.mem cimport PyMem_Free, PyMem_Malloc

from pyvmm._core cimport TensorCore
from pyvmm._error cimport check
from pyvmm._libvmm cimport (
    VMM_OK,
    VMM_STREAM_NONE,
    vmm_length,
    vmm_length_count,
    vmm_lengths,
    vmm_status,
    vmm_stream,
    vmm_tensor,
    vmm_truncate_lanes,
)
from pyvmm._stream cimport stream_of

from pyvmm._sizes import count


cdef int read_lanes(object lanes, object counts, Lanes *out) except -1:
    out.lanes = out.counts = NULL
    try:
        if lanes is not None:
            out.n = _read(lanes, "lanes", &out.lanes)
        if counts is not None:
            _read_counts(counts, "counts", lanes is None, out)
    except BaseException:
        close_lanes(out)
        raise
    return 0


cdef int _read_truncation(object lanes, object n, Lanes *out) except -1:
    """`n` is one number for all lanes, or one for each."""
    cdef size_t n_rows, i
    out.lanes = out.counts = NULL
    try:
        out.n = _read(lanes, "lanes", &out.lanes)
        if hasattr(n, "__len__"):
            _read_counts(n, "n", False, out)
        else:
            n_rows = count(n, "n")
            out.counts = _room(out.n)
            for i in range(out.n):
                out.counts[i] = n_rows
    except BaseException:
        close_lanes(out)
        raise
    return 0


cdef int _read_counts(object counts, str name, bint alone, Lanes *out) except -1:
    cdef size_t n = _read(counts, name, &out.counts)
    if not alone and n != out.n:
        raise ValueError(f"{name} has {n} entries for {out.n} lanes: one for each is needed")
    out.n = n
    return 0


cdef size_t _read(object values, str name, size_t **out) except? 0:
    """A new array of these numbers. Returns how many there are."""
    cdef size_t i
    try:
        if isinstance(values, (str, bytes, dict, set, frozenset)):
            raise TypeError
        numbers = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of integers, not {type(values).__name__}"
                        ) from None
    out[0] = _room(len(numbers))
    for i in range(<size_t>len(numbers)):
        out[0][i] = count(numbers[i], f"{name}[{i}]")
    return len(numbers)


cdef size_t *_room(size_t n) except NULL:
    """For n numbers, and never nothing: NULL would mean all lanes."""
    cdef size_t *room = <size_t *>PyMem_Malloc((n + 1) * sizeof(size_t))
    if room == NULL:
        raise MemoryError
    return room


cdef void close_lanes(Lanes *lanes) noexcept:
    PyMem_Free(lanes.lanes)
    PyMem_Free(lanes.counts)
    lanes.lanes = lanes.counts = NULL


cdef int truncate_lanes(TensorCore tensor, object n, object stream, object lanes) except -1:
    """VTensor.truncate(lanes=)."""
    cdef Lanes named
    cdef vmm_stream reader = VMM_STREAM_NONE
    cdef vmm_status status
    cdef vmm_tensor *handle
    cdef Py_ssize_t kept
    if stream is not None:
        stream_of(stream, &reader)
    _read_truncation(lanes, n, &named)
    try:
        handle = tensor.enter("truncate")
        kept = _kept(handle, &named)
        with nogil:
            status = vmm_truncate_lanes(handle, named.n, named.lanes, named.counts, reader)
        if status == VMM_OK:
            tensor.mark_stale(kept)
        tensor.leave()
        check(status)
    finally:
        close_lanes(&named)
    return 0


cdef Py_ssize_t _kept(vmm_tensor *handle, const Lanes *lanes) noexcept:
    """The rows of which no lane loses any by this truncation."""
    cdef const size_t *lengths = vmm_lengths(handle)
    cdef size_t kept = vmm_length(handle), i
    for i in range(lanes.n):
        if (
            lanes.lanes[i] < vmm_length_count(handle)
            and lanes.counts[i] < min(kept, lengths[lanes.lanes[i]])
        ):
            kept = lanes.counts[i]
    return kept


cdef tuple lengths_of(TensorCore tensor):
    cdef const size_t *lengths
    cdef size_t i
    tensor.wait_for_others("lengths")
    lengths = vmm_lengths(tensor.handle)
    return tuple([lengths[i] for i in range(vmm_length_count(tensor.handle))])
