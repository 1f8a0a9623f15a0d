"""Declarations of vmm.h, nothing else. The header is the manual."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t


cdef extern from "vmm.h" nogil:
    const int VMM_VERSION_MAJOR
    const int VMM_VERSION_MINOR
    int vmm_version()

    # ---- errors
    ctypedef enum vmm_status:
        VMM_OK
        VMM_ERR_INVALID
        VMM_ERR_OVERFLOW
        VMM_ERR_DTYPE
        VMM_ERR_SHAPE
        VMM_ERR_CAPACITY
        VMM_ERR_OUT_OF_MEMORY
        VMM_ERR_PINNED
        VMM_ERR_BUSY
        VMM_ERR_CLOSED
        VMM_ERR_FORKED
        VMM_ERR_NO_DRIVER
        VMM_ERR_NO_DEVICE
        VMM_ERR_UNSUPPORTED
        VMM_ERR_CAPTURING
        VMM_ERR_DRIVER

    ctypedef struct vmm_error:
        vmm_status status
        int driver_code
        const char *operation
        char *message

    const vmm_error *vmm_last_error()
    const char *vmm_status_name(vmm_status status)

    # ---- devices
    ctypedef struct vmm_device:
        pass

    ctypedef enum vmm_device_kind:
        VMM_DEVICE_HOST
        VMM_DEVICE_CUDA
        VMM_DEVICE_HIP

    ctypedef struct vmm_device_info:
        vmm_device_kind kind
        int index
        char *name
        char *description
        size_t granularity_bytes
        size_t recommended_bytes
        size_t reservable_bytes
        size_t free_bytes
        size_t total_bytes
        int driver_version
        int exportable_handles
        char *kernel

    vmm_status vmm_device_open(const char *name, vmm_device **out)
    void vmm_device_close(vmm_device *device)
    vmm_status vmm_device_query(vmm_device *device, vmm_device_info *out)

    # ---- pools
    ctypedef struct vmm_pool:
        pass

    const size_t VMM_BLOCK_AUTO
    ctypedef int (*vmm_oom_callback)(void *user, size_t needed_bytes) noexcept

    vmm_status vmm_pool_create(vmm_device *device, size_t block_bytes, size_t max_bytes,
                               vmm_pool **out)
    vmm_status vmm_pool_trim(vmm_pool *pool, int wait)
    vmm_status vmm_pool_set_lookahead(vmm_pool *pool, size_t max_bytes)
    size_t vmm_pool_lookahead(const vmm_pool *pool)
    vmm_status vmm_pool_on_oom(vmm_pool *pool, vmm_oom_callback callback, void *user)
    vmm_status vmm_pool_capture_begin(vmm_pool *pool)
    vmm_status vmm_pool_capture_end(vmm_pool *pool)
    vmm_status vmm_pool_close(vmm_pool *pool)
    void vmm_pool_release(vmm_pool *pool)
    size_t vmm_pool_block_bytes(const vmm_pool *pool)

    ctypedef void *vmm_stream
    const vmm_stream VMM_STREAM_LEGACY
    const vmm_stream VMM_STREAM_PER_THREAD
    const vmm_stream VMM_STREAM_NONE

    vmm_status vmm_pool_alloc(vmm_pool *pool, size_t bytes, vmm_stream stream, void **out)
    vmm_status vmm_pool_free(vmm_pool *pool, void *pointer)

    # ---- tensors
    ctypedef struct vmm_dtype:
        uint8_t code
        uint8_t bits
        uint16_t lanes

    ctypedef enum vmm_layout:
        VMM_LAYOUT_SEQ
        VMM_LAYOUT_LANE
        VMM_LAYOUT_C

    enum:
        VMM_MAX_NDIM

    ctypedef struct vmm_spec:
        int ndim
        const int64_t *shape
        int axis
        vmm_dtype dtype
        size_t capacity
        vmm_layout layout
        size_t block_bytes
        int zero

    ctypedef struct vmm_tensor:
        pass

    vmm_status vmm_reserve(vmm_pool *pool, const vmm_spec *spec, vmm_tensor **out)
    vmm_status vmm_close(vmm_tensor *tensor)
    void vmm_release(vmm_tensor *tensor)
    vmm_status vmm_find(const void *base, vmm_tensor **out)
    void *vmm_base(const vmm_tensor *tensor)
    size_t vmm_capacity(const vmm_tensor *tensor)
    int vmm_ndim(const vmm_tensor *tensor)
    int vmm_axis(const vmm_tensor *tensor)
    const int64_t *vmm_strides(const vmm_tensor *tensor)
    const int64_t *vmm_row_shape(const vmm_tensor *tensor)
    size_t vmm_row_bytes(const vmm_tensor *tensor)
    size_t vmm_lane_count(const vmm_tensor *tensor)
    size_t vmm_lane_bytes(const vmm_tensor *tensor)
    size_t vmm_length(const vmm_tensor *tensor)
    size_t vmm_mapped(const vmm_tensor *tensor)
    size_t vmm_length_count(const vmm_tensor *tensor)
    const size_t *vmm_lengths(vmm_tensor *tensor)
    int vmm_is_ragged(const vmm_tensor *tensor)
    vmm_device *vmm_device_of(const vmm_tensor *tensor)
    vmm_pool *vmm_pool_of(const vmm_tensor *tensor)
    const vmm_spec *vmm_spec_of(const vmm_tensor *tensor)
    void **vmm_user(vmm_tensor *tensor)

    # ---- growing, appending, shrinking
    size_t vmm_length_count(const vmm_tensor *tensor)
    vmm_status vmm_map(vmm_tensor *tensor, size_t n_rows)
    vmm_status vmm_map_many(size_t n_tensors, vmm_tensor **tensors, const size_t *n_rows)
    vmm_status vmm_grow(vmm_tensor *tensor, size_t n_rows, void **out)

    ctypedef enum vmm_memory:
        VMM_MEMORY_HOST
        VMM_MEMORY_DEVICE

    ctypedef struct vmm_array:
        const void *data
        vmm_memory memory
        int device_index
        vmm_dtype dtype
        int ndim
        const int64_t *shape
        const int64_t *strides

    vmm_status vmm_append(vmm_tensor *tensor, const vmm_array *source, vmm_stream stream)
    vmm_status vmm_append_many(size_t n_tensors, vmm_tensor **tensors, const vmm_array *sources,
                               vmm_stream stream)
    vmm_status vmm_append_lanes(size_t n_tensors, vmm_tensor **tensors, const vmm_array *sources,
                                size_t n_lanes, const size_t *lanes, const size_t *counts,
                                vmm_stream stream)
    vmm_status vmm_truncate(vmm_tensor *tensor, size_t n_rows, vmm_stream stream)
    vmm_status vmm_truncate_lanes(vmm_tensor *tensor, size_t n_lanes, const size_t *lanes,
                                  const size_t *n_rows, vmm_stream stream)
    vmm_status vmm_trim(vmm_tensor *tensor)
    vmm_status vmm_fork(vmm_tensor *tensor, size_t n_rows, vmm_tensor **out)

    # ---- streams, hand-off
    vmm_status vmm_handoff(vmm_tensor *tensor, vmm_stream stream)
    vmm_status vmm_add_reader(vmm_tensor *tensor, vmm_stream stream)
    vmm_stream vmm_last_stream(const vmm_tensor *tensor)
    vmm_status vmm_stream_wait(vmm_device *device, vmm_stream waiter, vmm_stream producer)

    ctypedef struct vmm_event:
        pass

    vmm_status vmm_event_record(vmm_device *device, vmm_stream stream, vmm_event **out)
    vmm_status vmm_event_query(vmm_event *event, int *done)
    void vmm_event_close(vmm_event *event)

    # ---- graphs
    vmm_status vmm_cursor(vmm_tensor *tensor, vmm_stream stream, int32_t **out)
    vmm_status vmm_advance(vmm_tensor *tensor, size_t n_rows)
    int vmm_advance_waits(const vmm_tensor *tensor)
    int vmm_has_cursor(const vmm_tensor *tensor)
    vmm_status vmm_stream_is_capturing(vmm_device *device, vmm_stream stream, int *out)

    ctypedef struct vmm_graph_pins:
        pass

    vmm_status vmm_graph_pins_open(vmm_device *device, vmm_stream stream, vmm_graph_pins **out)
    void vmm_graph_pins_close(vmm_graph_pins *pins)

    # ---- pins
    ctypedef struct vmm_pin:
        pass

    vmm_status vmm_pin_rows(vmm_tensor *tensor, size_t n_rows, vmm_pin **out)
    vmm_status vmm_pin_cursor(vmm_tensor *tensor, vmm_pin **out)
    void vmm_unpin(vmm_pin *pin)
    void vmm_pin_shown(vmm_tensor *tensor)

    # ---- statistics
    ctypedef enum vmm_call:
        VMM_CALL_COUNT

    const char *vmm_call_name(vmm_call call)

    ctypedef struct vmm_tensor_stats:
        size_t reserved_bytes
        size_t mapped_bytes
        size_t used_bytes
        size_t slack_bytes
        size_t block_count
        uint64_t *driver_calls

    ctypedef struct vmm_pool_stats:
        size_t in_use_bytes
        size_t free_bytes
        size_t queued_bytes
        size_t lookahead_bytes
        size_t recycled_bytes
        size_t parked_bytes
        size_t peak_bytes
        size_t max_bytes
        uint64_t *driver_calls

    vmm_status vmm_stats(const vmm_tensor *tensor, vmm_tensor_stats *out)
    vmm_status vmm_pool_statistics(vmm_pool *pool, vmm_pool_stats *out)
