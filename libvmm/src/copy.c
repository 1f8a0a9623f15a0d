/* copy.c - planning and running the copy of an append. */
#include "copy.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

void copy_plan_make(copy_plan *plan, uintptr_t dst, const int64_t *dst_strides, const int *order,
                    uintptr_t src, const int64_t *src_strides, const int64_t *shape, int ndim,
                    size_t itemsize) {
    int n = 0;
    plan->dst = dst;
    plan->src = src;
    for (int i = 0; i < ndim; i++) {
        int d = order[i];
        if (shape[d] == 1)
            continue;
        int64_t count = shape[d];
        /* One step of the dimension before equals all of this one, on both sides: merge. */
        if (n > 0 && plan->dst_stride[n - 1] == count * dst_strides[d] &&
            plan->src_stride[n - 1] == count * src_strides[d]) {
            n--;
            count *= (int64_t)plan->count[n];
        }
        plan->count[n] = (size_t)count;
        plan->dst_stride[n] = dst_strides[d];
        plan->src_stride[n] = src_strides[d];
        n++;
    }
    plan->run_bytes = itemsize;
    if (n > 0 && plan->dst_stride[n - 1] == (int64_t)itemsize &&
        plan->src_stride[n - 1] == (int64_t)itemsize)
        plan->run_bytes *= plan->count[--n];
    plan->n_outer = n;
}

/* Step through the first `n` outer dimensions. False when all have been visited. */
static bool next_run(const copy_plan *plan, int n, size_t *index, uintptr_t *dst, uintptr_t *src) {
    for (int i = n - 1; i >= 0; i--) {
        *dst += (uintptr_t)plan->dst_stride[i];
        *src += (uintptr_t)plan->src_stride[i];
        if (++index[i] < plan->count[i])
            return true;
        *dst -= (uintptr_t)plan->dst_stride[i] * plan->count[i];
        *src -= (uintptr_t)plan->src_stride[i] * plan->count[i];
        index[i] = 0;
    }
    return false;
}

void copy_plan_run(const copy_plan *plan) {
    size_t index[VMM_MAX_NDIM] = {0};
    uintptr_t dst = plan->dst, src = plan->src;
    do
        memcpy((void *)dst, (const void *)src, plan->run_bytes);
    while (next_run(plan, plan->n_outer, index, &dst, &src));
}

/* Merge, in the destination, the dimensions that are dense there whatever the source: what
 * is left are the pieces that one copy of dense data can fill. */
static copy_plan dense_in_destination(const copy_plan *plan) {
    copy_plan dense = *plan;
    while (dense.n_outer > 0 && dense.dst_stride[dense.n_outer - 1] == (int64_t)dense.run_bytes)
        dense.run_bytes *= dense.count[--dense.n_outer];
    return dense;
}

/* From this size on a piece is worth a copy of its own. */
#define WORTH_A_COPY ((size_t)64 << 10)

/* Host memory that a source is gathered in. Where the stream cannot be waited for, copies may
 * still read it: then it is queued in the pool and goes behind the next fence. */
typedef struct staging {
    pool_entry entry; /* first: the pool hands it back to us */
    char data[];
} staging;

static void discard_staging(pool_entry *entry) {
    free(entry);
}

/* Pinned memory is read after the call has returned. Also behind a failure, `status`: earlier
 * copies may still be reading; the failure that counts is then the first. */
static vmm_status wait_read(vmm_pool *pool, uint64_t *tensor_calls, vmm_stream stream,
                            vmm_status status) {
    if (status)
        vmm_undo_begin();
    vmm_status waited = DRIVER(pool, tensor_calls, stream_synchronize, stream);
    if (status)
        vmm_undo_end();
    return waited;
}

vmm_status copy_plan_send(const copy_plan *plan, vmm_pool *pool, uint64_t *tensor_calls,
                          vmm_stream stream, bool *submitted, bool *unread) {
    copy_plan pieces = *plan, gathered = dense_in_destination(plan);
    staging *staging = NULL;
    if (gathered.n_outer < plan->n_outer && plan->run_bytes < WORTH_A_COPY) {
        size_t bytes = plan->run_bytes, stride = gathered.run_bytes;
        copy_plan gather = *plan;
        for (int i = 0; i < plan->n_outer; i++)
            bytes *= plan->count[i];
        staging = malloc(sizeof *staging + bytes);
        if (!staging)
            return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "append",
                            "no host memory left to gather a strided source");
        /* The same pieces, one behind the other. */
        pieces = gathered;
        pieces.src = gather.dst = (uintptr_t)staging->data;
        for (int i = pieces.n_outer - 1; i >= 0; i--) {
            pieces.src_stride[i] = gather.dst_stride[i] = (int64_t)stride;
            stride *= pieces.count[i];
        }
        copy_plan_run(&gather);
    }
    size_t index[VMM_MAX_NDIM] = {0};
    uintptr_t dst = pieces.dst, src = pieces.src;
    vmm_status status;
    do {
        status = DRIVER(pool, tensor_calls, copy, dst, (const void *)src, pieces.run_bytes, stream);
        *submitted |= !status;
    } while (!status && next_run(&pieces, pieces.n_outer, index, &dst, &src));
    if (!staging) {
        *unread |= *submitted;
        return status;
    }
    vmm_status waited = wait_read(pool, tensor_calls, stream, status);
    if (!waited)
        free(staging);
    else
        pool_discard_later(pool, &staging->entry, discard_staging);
    return status ? status : waited;
}

vmm_status copy_wait_read(vmm_pool *pool, uint64_t *tensor_calls, vmm_stream stream,
                          vmm_status status) {
    vmm_status waited = wait_read(pool, tensor_calls, stream, status);
    return status ? status : waited;
}

bool copy_plan_is_wide(const copy_plan *plan) {
    return plan->n_outer > VMM_APPEND_DIMS;
}

/* The largest access that divides everything, and `also`. */
static uint32_t unit_bytes(const copy_plan *plan, uint64_t also) {
    uint64_t all = plan->dst | plan->src | plan->run_bytes | also | 16;
    for (int i = 0; i < plan->n_outer; i++)
        all |= (uint64_t)plan->dst_stride[i] | (uint64_t)plan->src_stride[i];
    return (uint32_t)(all & -all);
}

/* The two forms differ in the length of their arrays only. */
#define FILL_JOB(plan, job, also)                                                                  \
    do {                                                                                           \
        (job)->dst = (plan)->dst;                                                                  \
        (job)->src = (plan)->src;                                                                  \
        (job)->unit_bytes = unit_bytes(plan, also);                                                \
        (job)->run_units = (plan)->run_bytes / (job)->unit_bytes;                                  \
        (job)->n_units = (job)->run_units;                                                         \
        (job)->n_outer = (uint32_t)(plan)->n_outer;                                                \
        for (int i = 0; i < (plan)->n_outer; i++) {                                                \
            (job)->n_units *= (plan)->count[i];                                                    \
            (job)->count[i] = (plan)->count[i];                                                    \
            (job)->dst_stride[i] = (plan)->dst_stride[i];                                          \
            (job)->src_stride[i] = (plan)->src_stride[i];                                          \
        }                                                                                          \
    } while (0)

void copy_plan_to_job(const copy_plan *plan, vmm_append_job *out) {
    FILL_JOB(plan, out, 0);
}

void copy_plan_to_job_wide(const copy_plan *plan, vmm_append_job_wide *out) {
    FILL_JOB(plan, out, 0);
}

void copy_plan_to_cursor_job(const copy_plan *plan, vmm_cursor_job *out) {
    uint64_t steps =
        out->row_bytes | (uint64_t)out->dst_entry_stride | (uint64_t)out->src_entry_stride;
    FILL_JOB(plan, &out->copy, steps);
}

#define MAX_RUNS 65535 /* of a grid in its third direction */

bool copy_plan_to_piece(const copy_plan *plan, vmm_append_args_pieces *args, size_t n) {
    bool is_dense = plan->n_outer == 0;
    uint64_t n_runs = is_dense ? 1 : plan->count[0];
    int64_t dst_stride = is_dense ? 0 : plan->dst_stride[0];
    int64_t src_stride = is_dense ? 0 : plan->src_stride[0];
    uint32_t unit = unit_bytes(plan, 0);
    if (plan->n_outer > 1 || n_runs > MAX_RUNS || plan->run_bytes / unit > UINT32_MAX)
        return false;
    if (n == 0) {
        args->n_runs = n_runs;
        args->dst_stride = dst_stride;
        args->src_stride = src_stride;
    } else if (args->n_runs != n_runs || args->dst_stride != dst_stride ||
               args->src_stride != src_stride) {
        return false;
    }
    args->piece[n] = (vmm_append_piece){.dst = plan->dst,
                                        .src = plan->src,
                                        .n_units = (uint32_t)(plan->run_bytes / unit),
                                        .unit_bytes = unit};
    return true;
}
