/* append.c - copying rows in: check everything, then map, then copy, then count. */
#include <stdlib.h>

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

static vmm_status check_source(const vmm_tensor *tensor, const vmm_array *source) {
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
        if (d != spec->axis && source->shape[d] != tensor->row_shape[d])
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
    size_t n_rows = (size_t)source->shape[spec->axis];
    if (n_rows > spec->capacity - tensor->length)
        return tensor_fail_capacity(tensor, operation, n_rows);
    return check_memory(tensor, source);
}

static vmm_status check_tensors(size_t n_tensors, vmm_tensor *const *tensors) {
    for (size_t i = 0; i < n_tensors; i++) {
        vmm_status status = tensor_check(tensors[i], operation);
        if (status)
            return status;
        if (tensors[i]->pool->device != tensors[0]->pool->device)
            return vmm_fail(VMM_ERR_INVALID, operation,
                            "tensors of different devices (%s and %s) in one append",
                            tensors[0]->pool->device->name, tensors[i]->pool->device->name);
        for (size_t j = 0; j < i; j++)
            if (tensors[j] == tensors[i])
                return vmm_fail(VMM_ERR_INVALID, operation,
                                "the same tensor stands twice in one append");
    }
    return VMM_OK;
}

/* ---- copying ---------------------------------------------------------------------------- */

size_t append_rows(const vmm_tensor *tensor, const vmm_array *source) {
    return (size_t)source->shape[tensor->spec.axis];
}

const int64_t *append_strides(const vmm_tensor *tensor, const vmm_array *source, int64_t *dense) {
    if (source->strides)
        return source->strides;
    int64_t stride = (int64_t)tensor->itemsize;
    for (int d = tensor->spec.ndim - 1; d >= 0; d--) {
        dense[d] = stride;
        stride *= source->shape[d];
    }
    return dense;
}

static void plan_append(copy_plan *plan, const vmm_tensor *tensor, const vmm_array *source) {
    const vmm_spec *spec = &tensor->spec;
    int64_t dense[VMM_MAX_NDIM];
    const int64_t *strides = append_strides(tensor, source, dense);
    copy_plan_make(plan, tensor->range->base + tensor->length * tensor->lane_row_bytes,
                   tensor->strides, tensor->order, (uintptr_t)source->data, strides, source->shape,
                   spec->ndim, tensor->itemsize);
}

/* Jobs gathered for one launch. */
typedef struct batch {
    vmm_pool *pool;
    uint64_t *tensor_calls; /* of the first tensor: a launch is counted once */
    vmm_stream stream;
    bool submitted; /* a launch or a copy, whatever came after it */
    bool captured;  /* the stream is: nothing has been launched, and nothing will be */
    size_t n_jobs, n_jobs_wide;
    vmm_append_args args;
    vmm_append_args_wide args_wide;
} batch;

static vmm_status launched(batch *batch, vmm_status status) {
    if (batch->captured)
        return status;
    pool_count(batch->pool, batch->tensor_calls, VMM_CALL_launch);
    batch->submitted |= !status;
    return status;
}

static vmm_status launch_narrow(batch *batch) {
    size_t n_jobs = batch->n_jobs;
    batch->n_jobs = 0;
    if (n_jobs == 0 || batch->captured)
        return VMM_OK;
    vmm_device *device = batch->pool->device;
    return launched(batch, device->ops->launch(device->state, &batch->args, n_jobs, batch->stream,
                                               &batch->captured));
}

static vmm_status launch_wide(batch *batch) {
    size_t n_jobs = batch->n_jobs_wide;
    batch->n_jobs_wide = 0;
    if (n_jobs == 0 || batch->captured)
        return VMM_OK;
    vmm_device *device = batch->pool->device;
    return launched(batch, device->ops->launch_wide(device->state, &batch->args_wide, n_jobs,
                                                    batch->stream, &batch->captured));
}

static vmm_status add_job(batch *batch, const copy_plan *plan) {
    vmm_status status = VMM_OK;
    if (copy_plan_is_wide(plan)) {
        if (batch->n_jobs_wide == VMM_APPEND_JOBS_WIDE)
            status = launch_wide(batch); /* unreached: takes 17 wide jobs */
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

/* What has become of an append: the device has been given some of it, whatever is returned; it
 * has become part of a graph, which alone will append. */
typedef struct outcome {
    bool submitted, captured;
} outcome;

/* Copy every source's rows behind its tensor's length, and move the cursors of those that have
 * one; or have a graph do it. */
static vmm_status copy_rows(size_t n_tensors, vmm_tensor *const *tensors, const vmm_array *sources,
                            vmm_stream stream, bool capturable, outcome *outcome) {
    vmm_status status = VMM_OK;
    bool has_cursor = false;
    batch batch;
    batch.stream = stream;
    batch.submitted = batch.captured = false;
    batch.n_jobs = batch.n_jobs_wide = 0;
    for (size_t i = 0; i < n_tensors && !status; i++) {
        vmm_tensor *tensor = tensors[i];
        copy_plan plan;
        if (append_rows(tensor, &sources[i]) == 0)
            continue;
        has_cursor |= tensor->cursor != NULL;
        plan_append(&plan, tensor, &sources[i]);
        if (!tensor->pool->device->ops->is_async) {
            pool_count(tensor->pool, tensor->driver_calls, VMM_CALL_copy);
            copy_plan_run(&plan);
        } else if (sources[i].memory == VMM_MEMORY_HOST) {
            status =
                copy_plan_send(&plan, tensor->pool, tensor->driver_calls, stream, &batch.submitted);
        } else {
            if (batch.n_jobs + batch.n_jobs_wide == 0) {
                batch.pool = tensor->pool;
                batch.tensor_calls = tensor->driver_calls;
            }
            status = add_job(&batch, &plan);
        }
    }
    if (!status)
        status = launch_narrow(&batch);
    if (!status)
        status = launch_wide(&batch);
    if (!status && batch.captured)
        status = capturable ? append_captured(n_tensors, tensors, sources, stream, &batch.submitted)
                            : vmm_fail(VMM_ERR_CAPTURING, operation,
                                       "not while the stream is being captured: a graph would "
                                       "append again at each replay");
    else if (!status && has_cursor)
        status = cursor_set(n_tensors, tensors, sources, 0, stream, operation);
    outcome->submitted = batch.submitted;
    outcome->captured = batch.captured;
    return status;
}

/* ---- appending ------------------------------------------------------------------------ */

/* Map what is missing, then copy; on failure unmap it again. */
static vmm_status map_and_copy(size_t n_tensors, vmm_tensor *const *tensors,
                               const vmm_array *sources, vmm_stream stream, bool capturable,
                               outcome *outcome) {
    range_change one, *changes = &one;
    if (n_tensors > 1) {
        changes = malloc(n_tensors * sizeof *changes);
        if (!changes)
            return vmm_fail(VMM_ERR_OUT_OF_MEMORY, operation, "no host memory left");
    }
    vmm_status status = VMM_OK;
    size_t n_mapped = 0;
    for (size_t i = 0; i < n_tensors; i++)
        tensors[i]->busy = true;
    for (; n_mapped < n_tensors && !status; n_mapped++) {
        vmm_tensor *tensor = tensors[n_mapped];
        size_t needed = tensor->length + append_rows(tensor, &sources[n_mapped]);
        changes[n_mapped] = (range_change){0};
        if (needed > tensor->mapped)
            status = tensor_map(tensor, needed, stream, &changes[n_mapped]);
    }
    if (status)
        n_mapped--; /* tensor_map() has undone its own */
    else
        status = copy_rows(n_tensors, tensors, sources, stream, capturable, outcome);
    while (n_mapped-- > 0) {
        if (!status)
            range_commit(&changes[n_mapped]);
        else
            tensor_unmap(tensors[n_mapped], &changes[n_mapped], outcome->submitted);
    }
    for (size_t i = 0; i < n_tensors; i++)
        tensors[i]->busy = false;
    if (changes != &one)
        free(changes);
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
                          vmm_stream stream, bool capturable) {
    bool mapping = false, may_differ = false;
    vmm_status status = VMM_OK;
    for (size_t i = 0; i < n_tensors && !status; i++) {
        vmm_tensor *tensor = tensors[i];
        status = order_before_write(tensor, stream);
        may_differ |= tensor->cursor && tensor->cursor->may_differ;
        mapping |= append_rows(tensor, &sources[i]) > tensor->mapped - tensor->length;
    }
    if (!status && may_differ)
        status = check_graphs(n_tensors, tensors, stream);
    if (status)
        return status;
    outcome outcome = {0};
    status = (mapping ? map_and_copy : copy_rows)(n_tensors, tensors, sources, stream, capturable,
                                                  &outcome);
    for (size_t i = 0; i < n_tensors; i++) {
        size_t n_rows = append_rows(tensors[i], &sources[i]);
        if (n_rows == 0)
            continue;
        if (outcome.submitted)
            order_after_write(tensors[i], stream);
        if (!status && !outcome.captured)
            tensor_set_length(tensors[i], tensors[i]->length + n_rows);
        if (!status && tensors[i]->cursor)
            cursor_show_growth(tensors[i]);
    }
    return status;
}

vmm_status vmm_append_many(size_t n_tensors, vmm_tensor *const *tensors, const vmm_array *sources,
                           vmm_stream stream) {
    if (n_tensors == 0)
        return VMM_OK;
    if (!tensors || !sources)
        return vmm_fail(VMM_ERR_INVALID, operation, "tensors or sources is NULL");
    vmm_status status = check_tensors(n_tensors, tensors);
    if (status)
        return status;
    bool from_host = false, any = false;
    for (size_t i = 0; i < n_tensors; i++) {
        status = check_source(tensors[i], &sources[i]);
        if (status)
            return status;
        size_t n_rows = append_rows(tensors[i], &sources[i]);
        any |= n_rows > 0;
        from_host |= n_rows > 0 && sources[i].memory == VMM_MEMORY_HOST;
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
    return append_checked(n_tensors, tensors, sources, stream, true);
}

vmm_status vmm_append(vmm_tensor *tensor, const vmm_array *source, vmm_stream stream) {
    if (!source)
        return vmm_fail(VMM_ERR_INVALID, operation, "source is NULL");
    return vmm_append_many(1, &tensor, source, stream);
}
