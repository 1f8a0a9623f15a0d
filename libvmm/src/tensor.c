/* tensor.c - what a tensor is: its geometry, its length, mapping, growing and giving up. */
#include "tensor.h"

#include <stdlib.h>
#include <string.h>

#include "cursor.h"
#include "error.h"
#include "process.h"

/* ---- geometry ------------------------------------------------------------------- */

static vmm_status check_spec(const vmm_spec *spec, const vmm_pool *pool) {
    static const char *const operation = "reserve";
    size_t granularity = pool->device->granularity_bytes;
    if (spec->ndim < 1 || spec->ndim > VMM_MAX_NDIM)
        return vmm_fail(VMM_ERR_INVALID, operation, "%d dimensions: 1 to %d are possible",
                        spec->ndim, VMM_MAX_NDIM);
    if (!spec->shape)
        return vmm_fail(VMM_ERR_INVALID, operation, "shape is NULL");
    if (spec->axis < 0 || spec->axis >= spec->ndim)
        return vmm_fail(VMM_ERR_INVALID, operation, "axis %d is out of range for %d dimensions",
                        spec->axis, spec->ndim);
    for (int i = 0; i < spec->ndim; i++)
        if (i != spec->axis && spec->shape[i] < 1)
            return vmm_fail(VMM_ERR_INVALID, operation,
                            "dimension %d has size %lld: every dimension but the axis must be "
                            "at least 1",
                            i, (long long)spec->shape[i]);
    unsigned bits = spec->dtype.bits;
    if (bits < 8 || bits > 128 || bits & (bits - 1) || spec->dtype.lanes != 1)
        return vmm_fail(VMM_ERR_INVALID, operation,
                        "elements of %u bits and %u lanes: 8, 16, 32, 64 or 128 bits and 1 "
                        "lane are possible",
                        bits, spec->dtype.lanes);
    if (spec->capacity < 1)
        return vmm_fail(VMM_ERR_INVALID, operation, "the capacity must be at least 1 row");
    if ((unsigned)spec->layout > VMM_LAYOUT_C)
        return vmm_fail(VMM_ERR_INVALID, operation, "unknown layout %d", (int)spec->layout);
    if (spec->block_bytes != VMM_BLOCK_AUTO && spec->block_bytes % granularity)
        return vmm_fail(VMM_ERR_INVALID, operation,
                        "a block size of %zu bytes is not a multiple of the granularity of %s, "
                        "%zu bytes",
                        spec->block_bytes, pool->device->name, granularity);
    return VMM_OK;
}

static bool times(size_t *value, int64_t factor) {
    return !__builtin_mul_overflow(*value, (size_t)factor, value);
}

/* Is a lane made for each index of dimension `d`? */
static bool is_lane_dimension(const vmm_spec *spec, int d) {
    switch (spec->layout) {
    case VMM_LAYOUT_LANE: return d == 0 && spec->axis != 0;
    case VMM_LAYOUT_C: return d < spec->axis;
    default: return false;
    }
}

/* Rows and lanes in bytes, or false when they do not fit a size_t. */
static bool measure(vmm_tensor *tensor) {
    const vmm_spec *spec = &tensor->spec;
    tensor->n_lanes = 1;
    tensor->lane_row_bytes = tensor->itemsize;
    for (int d = 0; d < spec->ndim; d++) {
        if (d == spec->axis)
            continue;
        bool fits = is_lane_dimension(spec, d) ? times(&tensor->n_lanes, spec->shape[d])
                                               : times(&tensor->lane_row_bytes, spec->shape[d]);
        if (!fits)
            return false;
    }
    tensor->row_bytes = tensor->lane_row_bytes;
    return times(&tensor->row_bytes, (int64_t)tensor->n_lanes);
}

/* From the innermost outwards: what is within a row, the axis, the lanes. */
static void lay_out(vmm_tensor *tensor) {
    const vmm_spec *spec = &tensor->spec;
    int64_t stride = (int64_t)tensor->itemsize;
    int place = spec->ndim;
    for (int d = spec->ndim - 1; d >= 0; d--) {
        if (d == spec->axis || is_lane_dimension(spec, d))
            continue;
        tensor->strides[d] = stride;
        stride *= spec->shape[d];
        tensor->order[--place] = d;
    }
    tensor->strides[spec->axis] = stride;
    tensor->order[--place] = spec->axis;
    stride = (int64_t)tensor->range->lane_bytes;
    for (int d = spec->ndim - 1; d >= 0; d--) {
        if (d == spec->axis || !is_lane_dimension(spec, d))
            continue;
        tensor->strides[d] = stride;
        stride *= spec->shape[d];
        tensor->order[--place] = d;
    }
}

/* `stream` takes part, VMM_STREAM_NONE for none. */
static vmm_status reserve(vmm_pool *pool, const vmm_spec *spec, vmm_stream stream,
                          vmm_tensor **out) {
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, "reserve", "out is NULL");
    *out = NULL;
    if (!pool || !spec)
        return vmm_fail(VMM_ERR_INVALID, "reserve", "pool or spec is NULL");
    if (pool->process != vmm_process)
        return vmm_fail(VMM_ERR_FORKED, "reserve", "the pool belongs to the parent process");
    vmm_status status = check_spec(spec, pool);
    if (status)
        return status;
    vmm_tensor *tensor = calloc(1, sizeof *tensor);
    if (!tensor)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "reserve", "no host memory left");
    tensor->pool = pool;
    tensor->process = vmm_process;
    tensor->references = 1;
    tensor->spec = *spec;
    tensor->spec.shape = tensor->row_shape;
    if (spec->block_bytes == 0)
        tensor->spec.block_bytes = pool->block_bytes;
    memcpy(tensor->row_shape, spec->shape, (size_t)spec->ndim * sizeof *spec->shape);
    tensor->row_shape[spec->axis] = 1;
    tensor->itemsize = spec->dtype.bits / 8;
    size_t lane_bytes;
    if (!measure(tensor) ||
        __builtin_mul_overflow(tensor->lane_row_bytes, spec->capacity, &lane_bytes)) {
        status = vmm_fail(VMM_ERR_OVERFLOW, "reserve",
                          "%zu rows of this shape do not fit the address space", spec->capacity);
        goto free_tensor;
    }
    tensor->n_lengths = is_lane_dimension(spec, 0) ? (size_t)spec->shape[0] : 1;
    tensor->lengths = calloc(tensor->n_lengths, 2 * sizeof *tensor->lengths);
    if (!tensor->lengths) {
        status = vmm_fail(VMM_ERR_OUT_OF_MEMORY, "reserve", "no host memory left");
        goto free_tensor;
    }
    status = range_create(pool, tensor->n_lanes, lane_bytes, tensor->spec.block_bytes,
                          tensor->driver_calls, stream, &tensor->range);
    if (status)
        goto free_tensor;
    lay_out(tensor);
    pthread_mutex_init(&tensor->pin_lock, NULL);
    find_add(tensor);
    *out = tensor;
    return VMM_OK;

free_tensor:
    free(tensor->lengths);
    free(tensor);
    return status;
}

vmm_status vmm_reserve(vmm_pool *pool, const vmm_spec *spec, vmm_tensor **out) {
    return reserve(pool, spec, VMM_STREAM_NONE, out);
}

void tensor_destroy(vmm_tensor *tensor) {
    find_remove(tensor); /* before its addresses can be another's */
    cursor_free(tensor); /* before the pool can be closed */
    pool_put_event(tensor->pool, tensor->event);
    range_retire(tensor->range);
    pthread_mutex_destroy(&tensor->pin_lock);
    free(tensor->waits);
    free(tensor->lengths);
    free(tensor);
}

/* ---- mapping and growing ---------------------------------------------------------- */

vmm_status tensor_check(const vmm_tensor *tensor, const char *operation) {
    if (!tensor)
        return vmm_fail(VMM_ERR_INVALID, operation, "tensor is NULL");
    if (tensor->process != vmm_process)
        return vmm_fail(VMM_ERR_FORKED, operation,
                        "the tensor belongs to the parent process: its memory is not here");
    if (tensor->busy)
        return vmm_fail(VMM_ERR_BUSY, operation,
                        "the tensor is growing: an out-of-memory callback must leave it alone");
    return VMM_OK;
}

vmm_status tensor_check_many(size_t n_tensors, vmm_tensor *const *tensors, const char *operation) {
    for (size_t i = 0; i < n_tensors; i++) {
        vmm_status status = tensor_check(tensors[i], operation);
        if (status)
            return status;
        if (tensors[i]->pool->device != tensors[0]->pool->device)
            return vmm_fail(
                VMM_ERR_INVALID, operation, "tensors of different devices (%s and %s) in one %s",
                tensors[0]->pool->device->name, tensors[i]->pool->device->name, operation);
        for (size_t j = 0; j < i; j++)
            if (tensors[j] == tensors[i])
                return vmm_fail(VMM_ERR_INVALID, operation,
                                "the same tensor stands twice in one %s", operation);
    }
    return VMM_OK;
}

vmm_status tensor_fail_capacity(const vmm_tensor *tensor, const char *operation, size_t n_rows) {
    return vmm_fail(VMM_ERR_CAPACITY, operation,
                    "%zu more row(s) after %zu exceed the capacity of %zu: reserve a larger "
                    "one (address space costs no memory)",
                    n_rows, tensor->length, tensor->spec.capacity);
}

static void set_mapped(vmm_tensor *tensor) {
    size_t rows = range_live_bytes(tensor->range) / tensor->lane_row_bytes;
    if (rows > tensor->spec.capacity)
        rows = tensor->spec.capacity;
    __atomic_store_n(&tensor->mapped, rows, __ATOMIC_RELAXED);
}

void tensor_set_length(vmm_tensor *tensor, size_t n_rows) {
    __atomic_store_n(&tensor->length, n_rows, __ATOMIC_RELEASE);
}

void tensor_keep(size_t n, tensor_growth *growths) {
    while (n-- > 0)
        range_commit(&growths[n].change);
}

void tensor_unmap(size_t n, tensor_growth *growths, bool touched) {
    while (n-- > 0) {
        if (growths[n].change.n_marks == 0)
            continue;
        range_undo(&growths[n].change, touched);
        set_mapped(growths[n].tensor);
    }
}

static size_t lane_bytes_of(const tensor_growth *growth) {
    return growth->n_rows * growth->tensor->lane_row_bytes;
}

/* Once; `reached` is the first for which it failed, `beyond` as in range_change of any. */
static vmm_status try_map(size_t n, tensor_growth *growths, bool fit, vmm_stream stream,
                          size_t *reached, bool *beyond) {
    vmm_status status = VMM_OK;
    *reached = 0;
    *beyond = false;
    for (size_t i = 0; i < n && !status; i++) {
        tensor_growth *growth = &growths[i];
        vmm_tensor *tensor = growth->tensor;
        growth->change = (range_change){0};
        *reached = i;
        growth->n_rows_before = tensor->mapped;
        if (growth->n_rows <= tensor->mapped)
            continue;
        status = range_map(&growth->change, tensor->range, lane_bytes_of(growth), fit,
                           tensor->driver_calls, stream);
        *beyond |= growth->change.beyond;
        if (!status)
            set_mapped(tensor);
    }
    if (status)
        tensor_unmap(*reached, growths, false);
    return status;
}

/* Do the callbacks of a pool free something? The error stays the one that there is. */
static bool ask_callbacks(vmm_pool *pool, size_t n, const tensor_growth *growths) {
    vmm_error shortage = *vmm_last_error();
    size_t missing = 0;
    for (size_t i = 0; i < n; i++)
        if (growths[i].tensor->pool == pool)
            missing += range_missing_bytes(growths[i].tensor->range, lane_bytes_of(&growths[i]));
    bool freed = pool_run_callbacks(pool, missing);
    vmm_fail_again(&shortage);
    return freed;
}

/* Once more, with blocks no larger than what each lane needs. What lanes have had mapped already
 * goes first, for that would be taken into use as it is. The error stays the one that there is. */
static vmm_status try_fitting(size_t n, tensor_growth *growths, vmm_stream stream, size_t *reached,
                              bool *beyond) {
    vmm_error shortage = *vmm_last_error();
    for (size_t i = 0; i < n; i++) {
        vmm_tensor *tensor = growths[i].tensor;
        if (pool_has_queue(tensor->pool) && (i == 0 || tensor->pool != growths[i - 1].tensor->pool))
            pool_empty_queue(tensor->pool, tensor->driver_calls, stream);
    }
    vmm_status status = try_map(n, growths, true, stream, reached, beyond);
    if (status == VMM_ERR_OUT_OF_MEMORY)
        vmm_fail_again(&shortage); /* the cause */
    return status;
}

vmm_status tensor_map(size_t n, tensor_growth *growths, vmm_stream stream) {
    size_t reached, asked = 0; /* callbacks once for each that could not grow */
    bool beyond;
    const vmm_tensor *tensor; /* of which the error is */
    vmm_status status = try_map(n, growths, false, stream, &reached, &beyond);
    for (;;) {
        tensor = growths[reached].tensor;
        if (status == VMM_ERR_OUT_OF_MEMORY && beyond)
            status = try_fitting(n, growths, stream, &reached, &beyond);
        if (status != VMM_ERR_OUT_OF_MEMORY || reached < asked ||
            !ask_callbacks(growths[reached].tensor->pool, n, growths))
            break;
        asked = reached + 1;
        status = try_map(n, growths, false, stream, &reached, &beyond);
    }
    if (status == VMM_ERR_OUT_OF_MEMORY && tensor->n_lanes > 1 && tensor->length == 0) {
        vmm_size_text least;
        vmm_fail_note("; with %zu lanes of at least one block each this tensor needs %s for its "
                      "first row: layout 'seq' has one lane",
                      tensor->n_lanes, vmm_format_bytes(range_least_bytes(tensor->range), &least));
    }
    return status;
}

/* Tell the device of what is mapped now; where that fails, of what was before. */
static vmm_status show_mapped(size_t n, const tensor_growth *growths) {
    vmm_status status = VMM_OK;
    size_t i;
    for (i = 0; i < n && !status; i++)
        status = cursor_show_mapped(growths[i].tensor, growths[i].tensor->mapped);
    if (!status)
        return VMM_OK;
    /* It may have arrived all the same. If the driver does not take this, either, no replay is
     * right any more. */
    vmm_undo_begin();
    while (i-- > 0)
        cursor_show_mapped(growths[i].tensor, growths[i].n_rows_before);
    vmm_undo_end();
    return status;
}

/* The stream of the last writes that a fence must not meet: one that is captured, if any is. */
static vmm_stream stream_of_writes(size_t n_tensors, vmm_tensor *const *tensors) {
    vmm_stream stream = order_write_stream(tensors[0]);
    uint64_t capture;
    vmm_undo_begin(); /* what does not answer is asked again before a fence */
    for (size_t i = 1; i < n_tensors; i++) {
        vmm_stream other = order_write_stream(tensors[i]);
        if (other != stream && (order_capture_of(tensors[i], other, &capture) || capture))
            stream = other;
    }
    vmm_undo_end();
    return stream;
}

/* Some of it is missing. */
static vmm_status map_missing(size_t n_tensors, vmm_tensor *const *tensors, const size_t *n_rows) {
    tensor_growth one, *growths = &one;
    if (n_tensors > 1) {
        growths = malloc(n_tensors * sizeof *growths);
        if (!growths)
            return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "map", "no host memory left");
    }
    for (size_t i = 0; i < n_tensors; i++) {
        growths[i] = (tensor_growth){.tensor = tensors[i], .n_rows = n_rows[i]};
        tensors[i]->busy = true;
    }
    /* It may be called while appends are captured, which a fence must not meet. */
    vmm_status status = tensor_map(n_tensors, growths, stream_of_writes(n_tensors, tensors));
    if (!status) {
        status = show_mapped(n_tensors, growths);
        if (!status)
            tensor_keep(n_tensors, growths);
        else /* replays may have seen it, so the memory waits for a fence */
            tensor_unmap(n_tensors, growths, true);
    }
    for (size_t i = 0; i < n_tensors; i++)
        tensors[i]->busy = false;
    if (growths != &one)
        free(growths);
    return status;
}

vmm_status vmm_map_many(size_t n_tensors, vmm_tensor *const *tensors, const size_t *n_rows) {
    if (n_tensors == 0)
        return VMM_OK;
    if (!tensors || !n_rows)
        return vmm_fail(VMM_ERR_INVALID, "map", "tensors or n_rows is NULL");
    vmm_status status = tensor_check_many(n_tensors, tensors, "map");
    bool missing = false;
    for (size_t i = 0; i < n_tensors && !status; i++) {
        size_t capacity = tensors[i]->spec.capacity;
        missing |= n_rows[i] > tensors[i]->mapped;
        if (n_rows[i] > capacity)
            status = vmm_fail(VMM_ERR_CAPACITY, "map",
                              "%zu rows exceed the capacity of %zu: reserve a "
                              "larger one (address space costs no memory)",
                              n_rows[i], capacity);
    }
    if (!status && missing)
        return map_missing(n_tensors, tensors, n_rows);
    for (size_t i = 0; i < n_tensors && !status; i++)
        status = cursor_show_mapped(tensors[i], tensors[i]->mapped);
    return status;
}

vmm_status vmm_map(vmm_tensor *tensor, size_t n_rows) {
    return vmm_map_many(1, &tensor, &n_rows);
}

/* Zero the rows behind the length. `submitted`: something has been, whatever is returned. */
static vmm_status fill_zero(vmm_tensor *tensor, size_t n_rows, bool *submitted) {
    vmm_stream stream = order_write_stream(tensor);
    vmm_status status = order_before_write(tensor, stream);
    uintptr_t first = tensor->range->base + tensor->length * tensor->lane_row_bytes;
    for (size_t lane = 0; lane < tensor->n_lanes && !status; lane++) {
        status = DRIVER(tensor->pool, tensor->driver_calls, fill,
                        first + lane * tensor->range->lane_bytes, n_rows * tensor->lane_row_bytes,
                        stream);
        *submitted |= !status;
    }
    if (*submitted)
        order_after_write(tensor, stream);
    return status;
}

/* What grow does when it cannot just count: refuse, map, zero, tell the device. */
static vmm_status grow_slowly(vmm_tensor *tensor, size_t n_rows) {
    if (tensor->is_ragged) /* no view could show the rows that are new, and no others */
        return vmm_fail(VMM_ERR_INVALID, "grow",
                        "the lanes have different lengths, %zu to %zu: append() to them, each at "
                        "its own, or truncate() until all are the same",
                        lanes_least(tensor), tensor->length);
    tensor_growth growth = {.tensor = tensor, .n_rows = tensor->length + n_rows};
    vmm_stream stream = order_write_stream(tensor);
    bool submitted = false;
    vmm_status status = tensor->cursor ? order_before_write(tensor, stream) : VMM_OK;
    if (!status)
        status = cursor_check(1, &tensor, stream, "grow");
    tensor->busy = true;
    if (!status)
        status = tensor_map(1, &growth, stream);
    if (!status && tensor->spec.zero)
        status = fill_zero(tensor, n_rows, &submitted);
    if (!status)
        status = cursor_grow(tensor, n_rows, stream);
    if (!status)
        tensor_keep(1, &growth);
    else
        tensor_unmap(1, &growth, submitted);
    tensor->busy = false;
    cursor_show_growth(tensor);
    return status;
}

vmm_status vmm_grow(vmm_tensor *tensor, size_t n_rows, void **out) {
    vmm_status status = tensor_check(tensor, "grow");
    if (status)
        return status;
    size_t length = tensor->length;
    if (n_rows > tensor->spec.capacity - length && !tensor->is_ragged)
        return tensor_fail_capacity(tensor, "grow", n_rows);
    if (n_rows > tensor->mapped - length || tensor->is_ragged ||
        ((tensor->spec.zero || tensor->cursor) && n_rows)) {
        status = grow_slowly(tensor, n_rows);
        if (status)
            return status;
    }
    if (out)
        *out = (void *)(tensor->range->base + length * tensor->lane_row_bytes);
    tensor_set_length(tensor, length + n_rows);
    return VMM_OK;
}

vmm_status vmm_truncate(vmm_tensor *tensor, size_t n_rows, vmm_stream stream) {
    vmm_status status = tensor_check(tensor, "truncate");
    if (status)
        return status;
    if (n_rows > tensor->length)
        return vmm_fail(VMM_ERR_INVALID, "truncate",
                        "%zu rows are more than the length, %zu: grow() adds rows", n_rows,
                        tensor->length);
    size_t pinned = n_rows < tensor->length ? vmm_pinned_rows(tensor) : 0;
    if (pinned <= n_rows && stream != VMM_STREAM_NONE) {
        status = order_check_stream(tensor, &stream, "truncate");
        if (!status)
            status = order_add_wait(tensor, stream);
        if (status)
            return status;
    }
    if (pinned <= n_rows)
        status = cursor_before_truncate(tensor, &stream);
    if (status)
        return status;
    if (!pin_truncate(tensor, n_rows, &pinned))
        return vmm_fail(VMM_ERR_PINNED, "truncate",
                        "an export covers rows up to %zu: drop it before truncating to %zu", pinned,
                        n_rows);
    return cursor_truncate(tensor, stream);
}

vmm_status vmm_trim(vmm_tensor *tensor) {
    vmm_status status = tensor_check(tensor, "trim");
    if (!status) /* a row that a graph has appended and the host does not count would be lost */
        status = cursor_check(1, &tensor, order_write_stream(tensor), "trim");
    if (!status) /* first, so that no replay from here on writes what is given up */
        status = cursor_show_mapped(tensor, tensor->length);
    if (status)
        return status;
    pool_work work;
    pool_work_begin(&work, tensor->pool, tensor->driver_calls, VMM_STREAM_NONE);
    range_trim(tensor->range, tensor->length * tensor->lane_row_bytes);
    set_mapped(tensor);
    pool_work_end(&work);
    cursor_show_growth(tensor);
    return VMM_OK;
}

vmm_status vmm_fork(vmm_tensor *tensor, size_t n_rows, vmm_tensor **out) {
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, "fork", "out is NULL");
    *out = NULL;
    vmm_status status = tensor_check(tensor, "fork");
    if (status)
        return status;
    if (n_rows > tensor->length)
        return vmm_fail(VMM_ERR_INVALID, "fork", "%zu rows are more than the length, %zu", n_rows,
                        tensor->length);
    vmm_stream stream = order_write_stream(tensor);
    vmm_tensor *copy;
    status = reserve(tensor->pool, &tensor->spec, stream, &copy);
    if (status)
        return status;
    int64_t shape[VMM_MAX_NDIM];
    memcpy(shape, tensor->row_shape, sizeof shape);
    shape[tensor->spec.axis] = (int64_t)n_rows;
    vmm_array rows = {
        .data = (void *)tensor->range->base,
        .memory = tensor->pool->device->ops->is_async ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST,
        .device_index = tensor->pool->device->index,
        .dtype = tensor->spec.dtype,
        .ndim = tensor->spec.ndim,
        .shape = shape,
        .strides = tensor->strides,
    };
    vmm_tensor *const target[] = {copy};
    tensor->busy = true;
    /* The source's next write comes after this reading. Said first, since it can fail. */
    status = n_rows ? order_add_wait(tensor, stream) : VMM_OK;
    if (!status && n_rows)
        status = append_checked(1, target, &rows, NULL, stream, false);
    if (!status && tensor->is_ragged)
        lanes_copy(copy, tensor, n_rows);
    tensor->busy = false;
    if (status) {
        tensor_unreference(copy);
        return status;
    }
    *out = copy;
    return VMM_OK;
}

/* ---- what a tensor is ---------------------------------------------------------------- */

void *vmm_base(const vmm_tensor *tensor) {
    return (void *)tensor->range->base;
}

size_t vmm_capacity(const vmm_tensor *tensor) {
    return tensor->spec.capacity;
}

int vmm_ndim(const vmm_tensor *tensor) {
    return tensor->spec.ndim;
}

int vmm_axis(const vmm_tensor *tensor) {
    return tensor->spec.axis;
}

void **vmm_user(vmm_tensor *tensor) {
    return tensor->user;
}

vmm_pool *vmm_pool_of(const vmm_tensor *tensor) {
    return tensor->pool;
}

vmm_device *vmm_device_of(const vmm_tensor *tensor) {
    return tensor->pool->device;
}

const vmm_spec *vmm_spec_of(const vmm_tensor *tensor) {
    return &tensor->spec;
}

const int64_t *vmm_strides(const vmm_tensor *tensor) {
    return tensor->strides;
}

const int64_t *vmm_row_shape(const vmm_tensor *tensor) {
    return tensor->row_shape;
}

size_t vmm_row_bytes(const vmm_tensor *tensor) {
    return tensor->row_bytes;
}

size_t vmm_lane_count(const vmm_tensor *tensor) {
    return tensor->n_lanes;
}

size_t vmm_lane_bytes(const vmm_tensor *tensor) {
    return tensor->range->lane_bytes;
}

size_t vmm_length(const vmm_tensor *tensor) {
    return __atomic_load_n(&tensor->length, __ATOMIC_ACQUIRE);
}

size_t vmm_mapped(const vmm_tensor *tensor) {
    return __atomic_load_n(&tensor->mapped, __ATOMIC_RELAXED);
}

vmm_status vmm_stats(const vmm_tensor *tensor, vmm_tensor_stats *out) {
    if (!tensor || !out)
        return vmm_fail(VMM_ERR_INVALID, "stats", "tensor or out is NULL");
    if (tensor->process != vmm_process)
        return vmm_fail(VMM_ERR_FORKED, "stats", "the tensor belongs to the parent process");
    *out = (vmm_tensor_stats){.reserved_bytes = tensor->range->bytes};
    out->used_bytes = lanes_used_rows(tensor) * (tensor->row_bytes / tensor->n_lengths);
    range_count(tensor->range, &out->mapped_bytes, &out->block_count);
    /* In this order, so that rows which another thread adds meanwhile are not counted before their
     * memory; it may have cut and trimmed all the same. */
    if (out->mapped_bytes > out->used_bytes)
        out->slack_bytes = out->mapped_bytes - out->used_bytes;
    for (int call = 0; call < VMM_CALL_COUNT; call++)
        out->driver_calls[call] = __atomic_load_n(&tensor->driver_calls[call], __ATOMIC_RELAXED);
    return VMM_OK;
}
