/* captured.c - appends on a stream that is being captured: kernels that append at the cursor
 * become part of the graph, which pins the tensor. */
#include "copy.h"
#include "cursor.h"
#include "error.h"
#include "graph_pins.h"

static const char *const operation = "append";

/* ---- the graph's pin ------------------------------------------------------------------- */

/* Once for each graph. */
static vmm_status pin_graph(vmm_tensor *tensor, vmm_stream stream, uint64_t capture) {
    tensor_cursor *cursor = tensor->cursor;
    if (cursor->last_capture == capture)
        return VMM_OK;
    vmm_status status = graph_pins_add(tensor, stream, capture);
    if (status)
        return status;
    cursor->last_capture = capture;
    cursor->is_captured = cursor->may_differ = true;
    return VMM_OK;
}

/* ---- the jobs ---------------------------------------------------------------------------- */

/* The copy of one entry, as if the tensor were empty. */
static vmm_status make_job(vmm_tensor *tensor, const vmm_array *source, vmm_cursor_job *out) {
    const tensor_cursor *cursor = tensor->cursor;
    int64_t dense[VMM_MAX_NDIM], shape[VMM_MAX_NDIM];
    const int64_t *strides = append_with_strides(tensor, source, dense).strides;
    for (int d = 0; d < tensor->spec.ndim; d++)
        shape[d] = source->shape[d];
    *out = (vmm_cursor_job){
        .control = cursor->control->address,
        .flag = (uintptr_t)cursor->control->flag,
        .row_bytes = tensor->lane_row_bytes,
        .n_entries = (uint32_t)cursor->n_entries,
        .n_rows = (uint32_t)append_rows(tensor, source),
    };
    if (cursor->n_entries > 1) {
        shape[0] = 1;
        out->dst_entry_stride = tensor->strides[0];
        out->src_entry_stride = strides[0];
    }
    copy_plan plan;
    copy_plan_make(&plan, tensor->range->base, tensor->strides, tensor->order,
                   (uintptr_t)source->data, strides, shape, tensor->spec.ndim, tensor->itemsize);
    copy_plan_to_cursor_job(&plan, out);
    if (out->copy.n_units > INT32_MAX) /* unreached: takes 2 GiB at least */
        return vmm_fail(VMM_ERR_UNSUPPORTED, operation,
                        "an append of %llu pieces cannot be captured: append fewer rows at a time",
                        (unsigned long long)out->copy.n_units);
    return VMM_OK;
}

static vmm_status launch(vmm_tensor *tensor, vmm_cursor_args *args, size_t n_jobs,
                         vmm_stream stream, bool *submitted) {
    const vmm_device *device = tensor->pool->device;
    pool_count(tensor->pool, tensor->driver_calls, VMM_CALL_launch);
    vmm_status status = device->ops->launch_cursor(device->state, args, n_jobs, stream);
    *submitted |= !status;
    return status;
}

vmm_status append_captured(size_t n_tensors, vmm_tensor *const *tensors, const vmm_array *sources,
                           vmm_stream stream, bool *submitted) {
    uint64_t capture;
    vmm_cursor_args args;
    size_t n_jobs = 0;
    vmm_status status = order_capture_of(tensors[0], stream, &capture);
    for (size_t i = 0; i < n_tensors && !status; i++) {
        if (append_rows(tensors[i], &sources[i]) == 0)
            continue;
        status = cursor_make(tensors[i]);
        if (!status && tensors[i]->cursor->stale)
            status = vmm_fail(VMM_ERR_BUSY, operation,
                              "setting the cursor has failed, and a capture cannot set it anew: "
                              "append() or truncate(%zu) before it",
                              tensors[i]->length);
    }
    for (size_t i = 0; i < n_tensors && !status; i++)
        if (append_rows(tensors[i], &sources[i]) > 0)
            status = pin_graph(tensors[i], stream, capture);
    for (size_t i = 0; i < n_tensors && !status; i++) {
        if (append_rows(tensors[i], &sources[i]) == 0)
            continue;
        if (n_jobs == VMM_CURSOR_JOBS) {
            status = launch(tensors[0], &args, n_jobs, stream, submitted);
            n_jobs = 0;
        }
        if (!status)
            status = make_job(tensors[i], &sources[i], &args.job[n_jobs++]);
    }
    return status ? status : launch(tensors[0], &args, n_jobs, stream, submitted);
}
