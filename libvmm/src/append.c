/* append.c - copying rows in: check everything, then map, then copy, then count. */
#include <stdlib.h>
#include <string.h>

#include "copy.h"
#include "cursor.h"
#include "error.h"
#include "process.h"
#include "tensor.h"

static const char *const operation = "append";

/* ---- checks --------------------------------------------------------------------------- */

static vmm_status check_memory(const vmm_tensor *tensor, const vmm_array *source) {
    const vmm_device *device = tensor->pool->device;
    if (source->memory == VMM_MEMORY_HOST)
        return VMM_OK;
    if (source->memory != VMM_MEMORY_DEVICE)
        return vmm_fail(VMM_ERR_INVALID, operation, "unknown kind of memory %d",
                        (int)source->memory);
    if (!device->ops->is_async)
        return vmm_fail(VMM_ERR_INVALID, operation,
                        "the source is on GPU %d and the tensor on %s: copy it there first",
                        source->device_index, device->name);
    if (source->device_index != device->index)
        return vmm_fail(VMM_ERR_INVALID, operation,
                        "the source is on GPU %d and the tensor on %s: copy it there first",
                        source->device_index, device->name);
    return VMM_OK;
}

/* An append goes lane by lane where lanes are named or differ in length, else all at once. */
static bool by_lane(const vmm_tensor *tensor, const lane_list *list) {
    return list || tensor->is_ragged;
}

size_t append_rows(const vmm_tensor *tensor, const vmm_array *source) {
    return (size_t)source->shape[tensor->spec.axis];
}

/* The length that the tensor needs; 0 where nothing is appended. */
static size_t rows_needed(const vmm_tensor *tensor, const vmm_array *source,
                          const lane_list *list) {
    size_t n_rows = append_rows(tensor, source), needed = 0;
    if (!by_lane(tensor, list))
        return n_rows ? tensor->length + n_rows : 0;
    for (size_t i = 0, n = list ? list->n : tensor->n_lengths; i < n; i++) {
        size_t count = lane_count(list, i, n_rows);
        size_t end = lanes_length(tensor, lane_at(list, i)) + count;
        needed = count && end > needed ? end : needed;
    }
    return needed;
}

static vmm_status check_lanes(const vmm_tensor *tensor, const vmm_array *source,
                              const lane_list *list) {
    size_t n_rows = append_rows(tensor, source);
    for (size_t i = 0, n = list ? list->n : tensor->n_lengths; i < n; i++) {
        size_t count = lane_count(list, i, n_rows), lane = lane_at(list, i);
        if (count > n_rows)
            return vmm_fail(VMM_ERR_INVALID, operation,
                            "%zu rows are to go to lane %zu, but the source has %zu", count, lane,
                            n_rows);
        if (count > tensor->spec.capacity - lanes_length(tensor, lane))
            return vmm_fail(VMM_ERR_CAPACITY, operation,
                            "%zu more row(s) after %zu in lane %zu exceed the capacity of %zu: "
                            "reserve a larger one (address space costs no memory)",
                            count, lanes_length(tensor, lane), lane, tensor->spec.capacity);
    }
    return VMM_OK;
}

static vmm_status check_source(const vmm_tensor *tensor, const vmm_array *source,
                               const lane_list *list) {
    const vmm_spec *spec = &tensor->spec;
    if (source->dtype.code != spec->dtype.code || source->dtype.bits != spec->dtype.bits ||
        source->dtype.lanes != spec->dtype.lanes)
        return vmm_fail(VMM_ERR_DTYPE, operation,
                        "elements of DLPack type (code %u, %u bits) do not go into a tensor of "
                        "(code %u, %u bits): convert them first",
                        source->dtype.code, source->dtype.bits, spec->dtype.code, spec->dtype.bits);
    if (source->ndim != spec->ndim)
        return vmm_fail(VMM_ERR_SHAPE, operation, "the source has %d dimensions, the tensor %d",
                        source->ndim, spec->ndim);
    if (!source->shape)
        return vmm_fail(VMM_ERR_INVALID, operation, "the source's shape is NULL");
    for (int d = 0; d < spec->ndim; d++) {
        if (source->shape[d] < 0)
            return vmm_fail(VMM_ERR_SHAPE, operation, "the source's dimension %d is negative", d);
        if (d == 0 && list && tensor->n_lengths > 1) {
            if ((size_t)source->shape[0] != list->n)
                return vmm_fail(VMM_ERR_SHAPE, operation,
                                "the source's dimension 0 has size %lld, but rows are to go to %zu "
                                "lane(s): one index for each",
                                (long long)source->shape[0], list->n);
        } else if (d != spec->axis && source->shape[d] != tensor->row_shape[d])
            return vmm_fail(VMM_ERR_SHAPE, operation,
                            "the source's dimension %d has size %lld, the tensor's %lld: only "
                            "dimension %d, the axis, may differ",
                            d, (long long)source->shape[d], (long long)tensor->row_shape[d],
                            spec->axis);
    }
    int last = spec->ndim - 1;
    if (source->strides && source->shape[last] > 1 && source->shape[spec->axis] > 0 &&
        source->strides[last] != (int64_t)tensor->itemsize)
        return vmm_fail(VMM_ERR_INVALID, operation,
                        "the source's last dimension is not dense (stride %lld bytes, elements "
                        "of %zu): make it contiguous first",
                        (long long)source->strides[last], tensor->itemsize);
    if (source->shape[spec->axis] > 0 && !source->data)
        return vmm_fail(VMM_ERR_INVALID, operation, "the source's data is NULL");
    if (by_lane(tensor, list)) {
        vmm_status status = check_lanes(tensor, source, list);
        if (status)
            return status;
    } else if (append_rows(tensor, source) > spec->capacity - tensor->length)
        return tensor_fail_capacity(tensor, operation, append_rows(tensor, source));
    return check_memory(tensor, source);
}

/* ---- copying ---------------------------------------------------------------------------- */

static void plan_append(copy_plan *plan, const vmm_tensor *tensor, const vmm_array *source) {
    const vmm_spec *spec = &tensor->spec;
    copy_plan_make(plan, tensor->range->base + tensor->length * tensor->lane_row_bytes,
                   tensor->strides, tensor->order, (uintptr_t)source->data, source->strides,
                   source->shape, spec->ndim, tensor->itemsize);
}

/* Index i of the source's dimension 0 goes to one lane; where no lanes are made for dimension
 * 0, the whole source does. */
static void plan_lane(copy_plan *plan, const vmm_tensor *tensor, const vmm_array *source,
                      size_t lane, size_t i, size_t n_rows) {
    const vmm_spec *spec = &tensor->spec;
    uintptr_t dst = tensor->range->base + lanes_length(tensor, lane) * tensor->lane_row_bytes;
    uintptr_t src = (uintptr_t)source->data;
    int64_t shape[VMM_MAX_NDIM];
    memcpy(shape, source->shape, (size_t)spec->ndim * sizeof *shape);
    shape[spec->axis] = (int64_t)n_rows;
    if (tensor->n_lengths > 1) {
        dst += lane * (uintptr_t)tensor->strides[0];
        src += i * (uintptr_t)source->strides[0];
        shape[0] = 1;
    }
    copy_plan_make(plan, dst, tensor->strides, tensor->order, src, source->strides, shape,
                   spec->ndim, tensor->itemsize);
}

/* `source` with strides: `strides` is room for them. */
vmm_array append_with_strides(const vmm_tensor *tensor, const vmm_array *source, int64_t *strides) {
    vmm_array array = *source;
    if (array.strides)
        return array;
    int64_t stride = (int64_t)tensor->itemsize;
    for (int d = source->ndim - 1; d >= 0; d--) {
        strides[d] = stride;
        stride *= source->shape[d];
    }
    array.strides = strides;
    return array;
}

/* Jobs gathered for one launch. */
typedef struct batch {
    vmm_pool *pool;
    uint64_t *tensor_calls; /* of the first tensor: a launch is counted once */
    vmm_stream stream;
    bool submitted;     /* a launch or a copy, whatever came after it */
    bool captured;      /* the stream is: nothing has been launched, and nothing will be */
    vmm_tensor *unread; /* to which host memory is being copied: it may still be read */
    bool is_large;      /* more jobs than fit one launch of the narrow kernel */
    size_t n_jobs, n_jobs_wide, n_pieces;
    vmm_append_args args;
    vmm_append_args_wide args_wide;
    vmm_append_args_pieces args_pieces;
} batch;

static vmm_status launched(batch *batch, vmm_status status) {
    if (batch->captured)
        return status;
    pool_count(batch->pool, batch->tensor_calls, VMM_CALL_launch);
    batch->submitted |= !status;
    return status;
}

#define LAUNCH(batch, verb, args, n)                                                               \
    launched((batch), (batch)->pool->device->ops->verb((batch)->pool->device->state, (args), (n),  \
                                                       (batch)->stream, &(batch)->captured))

static vmm_status launch_narrow(batch *batch) {
    size_t n_jobs = batch->n_jobs;
    batch->n_jobs = 0;
    return n_jobs && !batch->captured ? LAUNCH(batch, launch, &batch->args, n_jobs) : VMM_OK;
}

static vmm_status launch_wide(batch *batch) {
    size_t n_jobs = batch->n_jobs_wide;
    batch->n_jobs_wide = 0;
    return n_jobs && !batch->captured ? LAUNCH(batch, launch_wide, &batch->args_wide, n_jobs)
                                      : VMM_OK;
}

static vmm_status launch_pieces(batch *batch) {
    size_t n_pieces = batch->n_pieces;
    batch->n_pieces = 0;
    return n_pieces && !batch->captured
               ? LAUNCH(batch, launch_pieces, &batch->args_pieces, n_pieces)
               : VMM_OK;
}

static vmm_status add_job(batch *batch, const copy_plan *plan) {
    vmm_status status = VMM_OK;
    if (batch->is_large && batch->n_pieces == VMM_APPEND_PIECES)
        status = launch_pieces(batch);
    if (status)
        return status;
    if (batch->is_large && copy_plan_to_piece(plan, &batch->args_pieces, batch->n_pieces)) {
        batch->n_pieces++;
    } else if (copy_plan_is_wide(plan)) {
        if (batch->n_jobs_wide == VMM_APPEND_JOBS_WIDE)
            status = launch_wide(batch);
        if (!status)
            copy_plan_to_job_wide(plan, &batch->args_wide.job[batch->n_jobs_wide++]);
    } else {
        if (batch->n_jobs == VMM_APPEND_JOBS)
            status = launch_narrow(batch);
        if (!status)
            copy_plan_to_job(plan, &batch->args.job[batch->n_jobs++]);
    }
    return status;
}

static vmm_status copy_one(batch *batch, vmm_tensor *tensor, const copy_plan *plan,
                           vmm_memory memory) {
    if (!tensor->pool->device->ops->is_async) {
        pool_count(tensor->pool, tensor->driver_calls, VMM_CALL_copy);
        copy_plan_run(plan);
        return VMM_OK;
    }
    if (memory == VMM_MEMORY_HOST) {
        bool unread = false;
        vmm_status status = copy_plan_send(plan, tensor->pool, tensor->driver_calls, batch->stream,
                                           &batch->submitted, &unread);
        if (unread && !batch->unread)
            batch->unread = tensor;
        return status;
    }
    if (batch->n_jobs + batch->n_jobs_wide + batch->n_pieces == 0) {
        batch->pool = tensor->pool;
        batch->tensor_calls = tensor->driver_calls;
    }
    return add_job(batch, plan);
}

static vmm_status copy_lanes(batch *batch, vmm_tensor *tensor, const vmm_array *source,
                             const lane_list *list) {
    vmm_status status = VMM_OK;
    size_t n_rows = append_rows(tensor, source);
    for (size_t i = 0, n = list ? list->n : tensor->n_lengths; i < n && !status; i++) {
        size_t count = lane_count(list, i, n_rows);
        copy_plan plan;
        if (count == 0)
            continue;
        plan_lane(&plan, tensor, source, lane_at(list, i), i, count);
        status = copy_one(batch, tensor, &plan, source->memory);
    }
    return status;
}

static size_t count_jobs(size_t n_tensors, vmm_tensor *const *tensors, const lane_list *list) {
    size_t n = list ? n_tensors * list->n : 0;
    for (size_t i = 0; i < n_tensors && !list; i++)
        n += tensors[i]->is_ragged ? tensors[i]->n_lengths : 1;
    return n;
}

/* Behind a copy: the cursors of the tensors that have one move on. */
static vmm_status move_cursors(size_t n_tensors, vmm_tensor *const *tensors,
                               const vmm_array *sources, const lane_list *list, vmm_stream stream) {
    for (size_t i = 0; i < n_tensors; i++)
        if (tensors[i]->cursor && rows_needed(tensors[i], &sources[i], list) > 0)
            cursor_extend_next(tensors[i], list, append_rows(tensors[i], &sources[i]));
    return cursor_set(n_tensors, tensors, stream, operation);
}

/* What becomes of an append: the device has been given some of it, whatever is returned; it
 * may become part of a graph, has become one, which alone will append. */
typedef struct outcome {
    bool submitted, capturable, captured;
} outcome;

/* Copy every source's rows behind its tensor's length, or have a graph do it. */
static vmm_status copy_rows(size_t n_tensors, vmm_tensor *const *tensors, const vmm_array *sources,
                            const lane_list *list, vmm_stream stream, outcome *outcome) {
    vmm_status status = VMM_OK;
    bool has_cursor = false;
    batch batch;
    batch.stream = stream;
    batch.submitted = batch.captured = false;
    batch.unread = NULL;
    batch.n_jobs = batch.n_jobs_wide = batch.n_pieces = 0;
    batch.is_large = count_jobs(n_tensors, tensors, list) > VMM_APPEND_JOBS;
    for (size_t i = 0; i < n_tensors && !status; i++) {
        vmm_tensor *tensor = tensors[i];
        if (append_rows(tensor, &sources[i]) == 0)
            continue;
        has_cursor |= tensor->cursor != NULL;
        int64_t strides[VMM_MAX_NDIM];
        vmm_array source = append_with_strides(tensor, &sources[i], strides);
        if (by_lane(tensor, list)) {
            status = copy_lanes(&batch, tensor, &source, list);
        } else {
            copy_plan plan;
            plan_append(&plan, tensor, &source);
            status = copy_one(&batch, tensor, &plan, source.memory);
        }
    }
    if (!status)
        status = launch_narrow(&batch);
    if (!status)
        status = launch_wide(&batch);
    if (!status)
        status = launch_pieces(&batch);
    if (batch.unread)
        status = copy_wait_read(batch.unread->pool, batch.unread->driver_calls, stream, status);
    if (!status && batch.captured)
        status = outcome->capturable && !list
                     ? append_captured(n_tensors, tensors, sources, stream, &batch.submitted)
                     : vmm_fail(VMM_ERR_CAPTURING, operation,
                                "%s: a graph would do the same again at each replay",
                                list ? "rows cannot go to named lanes while the stream is being "
                                       "captured"
                                     : "not while the stream is being captured");
    else if (!status && has_cursor)
        status = move_cursors(n_tensors, tensors, sources, list, stream);
    outcome->submitted = batch.submitted;
    outcome->captured = batch.captured;
    return status;
}

/* ---- appending ------------------------------------------------------------------------ */

/* Map what is missing, then copy; on failure unmap it again. */
static vmm_status map_and_copy(size_t n_tensors, vmm_tensor *const *tensors,
                               const vmm_array *sources, const lane_list *list, vmm_stream stream,
                               outcome *outcome) {
    tensor_growth one, *growths = &one;
    if (n_tensors > 1) {
        growths = malloc(n_tensors * sizeof *growths);
        if (!growths)
            return vmm_fail(VMM_ERR_OUT_OF_MEMORY, operation, "no host memory left");
    }
    for (size_t i = 0; i < n_tensors; i++) {
        size_t needed = rows_needed(tensors[i], &sources[i], list);
        growths[i] = (tensor_growth){.tensor = tensors[i], .n_rows = needed};
        tensors[i]->busy = true;
    }
    vmm_status status = tensor_map(n_tensors, growths, stream);
    if (!status) {
        status = copy_rows(n_tensors, tensors, sources, list, stream, outcome);
        if (!status)
            tensor_keep(n_tensors, growths);
        else
            tensor_unmap(n_tensors, growths, outcome->submitted);
    }
    for (size_t i = 0; i < n_tensors; i++)
        tensors[i]->busy = false;
    if (growths != &one)
        free(growths);
    return status;
}

/* Rows that a graph has appended, and the host does not count, would be written over. Inside a
 * capture nothing is: what is appended there comes behind them. */
static vmm_status check_graphs(size_t n_tensors, vmm_tensor *const *tensors, vmm_stream stream) {
    uint64_t capture = 0;
    vmm_status status = order_capture_of(tensors[0], stream, &capture);
    return status || capture ? status : cursor_check(n_tensors, tensors, stream, operation);
}

vmm_status append_checked(size_t n_tensors, vmm_tensor *const *tensors, const vmm_array *sources,
                          const lane_list *list, vmm_stream stream, bool capturable) {
    bool mapping = false, may_differ = false;
    vmm_status status = VMM_OK;
    for (size_t i = 0; i < n_tensors && !status; i++) {
        vmm_tensor *tensor = tensors[i];
        status = order_before_write(tensor, stream);
        may_differ |= tensor->cursor && tensor->cursor->may_differ;
        mapping |= rows_needed(tensor, &sources[i], list) > tensor->mapped;
    }
    if (!status && may_differ)
        status = check_graphs(n_tensors, tensors, stream);
    if (status)
        return status;
    outcome outcome = {.capturable = capturable};
    status =
        (mapping ? map_and_copy : copy_rows)(n_tensors, tensors, sources, list, stream, &outcome);
    for (size_t i = 0; i < n_tensors; i++) {
        size_t needed = rows_needed(tensors[i], &sources[i], list);
        if (needed == 0)
            continue;
        if (outcome.submitted)
            order_after_write(tensors[i], stream);
        if (status)
            continue;
        if (outcome.captured)
            ; /* the graph counts */
        else if (by_lane(tensors[i], list))
            lanes_extend(tensors[i], list, append_rows(tensors[i], &sources[i]));
        else
            tensor_set_length(tensors[i], needed);
        if (tensors[i]->cursor)
            cursor_show_growth(tensors[i]);
    }
    return status;
}

static vmm_status append(size_t n_tensors, vmm_tensor *const *tensors, const vmm_array *sources,
                         const lane_list *list, vmm_stream stream) {
    if (n_tensors == 0)
        return VMM_OK;
    if (!tensors || !sources)
        return vmm_fail(VMM_ERR_INVALID, operation, "tensors or sources is NULL");
    vmm_status status = tensor_check_many(n_tensors, tensors, operation);
    if (status)
        return status;
    bool from_host = false, any = false;
    for (size_t i = 0; i < n_tensors; i++) {
        if (list)
            status = lanes_check(tensors[i], list, operation);
        if (!status)
            status = check_source(tensors[i], &sources[i], list);
        if (status)
            return status;
        bool some = rows_needed(tensors[i], &sources[i], list) > 0;
        any |= some;
        from_host |= some && sources[i].memory == VMM_MEMORY_HOST;
    }
    if (!any)
        return VMM_OK;
    for (size_t i = 0; i < n_tensors; i++) {
        status = order_check_stream(tensors[i], &stream, operation);
        if (status)
            return status;
    }
    uint64_t capture = 0;
    if (from_host) /* its copy ends with a wait, which a capture cannot have */
        status = order_capture_of(tensors[0], stream, &capture);
    if (status)
        return status;
    if (capture)
        return vmm_fail(VMM_ERR_CAPTURING, operation,
                        "host memory cannot be appended while the stream is being captured: "
                        "copy it to the device before");
    return append_checked(n_tensors, tensors, sources, list, stream, true);
}

/* ---- one tensor, as at each step --------------------------------------------------------- */

/* May a launch be all? Then rows come from the device's memory to the end of all lanes, behind the
 * last write on its own stream, and no cursor moves with them. */
static bool is_one_launch(const vmm_tensor *tensor, const vmm_array *source, vmm_stream stream) {
    return tensor && source->memory == VMM_MEMORY_DEVICE && tensor->written &&
           tensor->last_stream == stream && tensor->n_waits == 0 && !tensor->is_ragged &&
           !tensor->cursor;
}

/* What append() does for many, in half the instructions: they are a tenth of what an append costs
 * its caller. False where more is needed after all; then nothing has been done. */
static bool append_by_one_launch(vmm_tensor *tensor, const vmm_array *source, vmm_stream stream,
                                 vmm_status *status) {
    vmm_device *device = tensor->pool->device;
    int64_t strides[VMM_MAX_NDIM];
    vmm_append_args args;
    copy_plan plan;
    bool captured = false;
    *status = tensor_check(tensor, operation);
    if (!*status)
        *status = check_source(tensor, source, NULL);
    if (*status)
        return true;
    size_t n_rows = append_rows(tensor, source);
    if (n_rows == 0)
        return true;
    if (n_rows > tensor->mapped - tensor->length)
        return false;
    vmm_array array = append_with_strides(tensor, source, strides);
    plan_append(&plan, tensor, &array);
    if (copy_plan_is_wide(&plan))
        return false;
    copy_plan_to_job(&plan, &args.job[0]);
    *status = device->ops->launch(device->state, &args, 1, stream, &captured);
    if (captured)
        return false;
    pool_count(tensor->pool, tensor->driver_calls, VMM_CALL_launch);
    if (!*status) {
        order_after_write(tensor, stream);
        tensor_set_length(tensor, tensor->length + n_rows);
    }
    return true;
}

vmm_status vmm_append_many(size_t n_tensors, vmm_tensor *const *tensors, const vmm_array *sources,
                           vmm_stream stream) {
    return append(n_tensors, tensors, sources, NULL, stream);
}

vmm_status vmm_append(vmm_tensor *tensor, const vmm_array *source, vmm_stream stream) {
    if (!source)
        return vmm_fail(VMM_ERR_INVALID, operation, "source is NULL");
    vmm_status status;
    if (!stream)
        stream = VMM_STREAM_LEGACY;
    if (is_one_launch(tensor, source, stream) &&
        append_by_one_launch(tensor, source, stream, &status))
        return status;
    return append(1, &tensor, source, NULL, stream);
}

vmm_status vmm_append_lanes(size_t n_tensors, vmm_tensor *const *tensors, const vmm_array *sources,
                            size_t n_lanes, const size_t *lanes, const size_t *counts,
                            vmm_stream stream) {
    const lane_list list = {n_lanes, lanes, counts};
    return append(n_tensors, tensors, sources, &list, stream);
}
