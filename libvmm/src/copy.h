/* copy.h - from "these rows to that place" to the fewest, longest runs of bytes.
 *
 * A plan is the strided copy of an append with its dimensions sorted by where they lie in
 * the destination and merged where both sides allow it. It can be run by the CPU, sent
 * from host memory by the driver's copies, or handed to the append kernel as a job.
 */
#ifndef VMM_COPY_H
#define VMM_COPY_H

#include "pool.h"

typedef struct copy_plan {
    uintptr_t dst;
    uintptr_t src;
    size_t run_bytes;
    int n_outer;
    size_t count[VMM_MAX_NDIM];
    int64_t dst_stride[VMM_MAX_NDIM];
    int64_t src_stride[VMM_MAX_NDIM];
} copy_plan;

/* Strides in bytes; `order` lists the dimensions from the outermost in the destination.
 * No size is 0. */
void copy_plan_make(copy_plan *plan, uintptr_t dst, const int64_t *dst_strides, const int *order,
                    uintptr_t src, const int64_t *src_strides, const int64_t *shape, int ndim,
                    size_t itemsize);

void copy_plan_run(const copy_plan *plan);

/* Copy from host memory by the driver: one copy for each piece that is dense on both sides, or,
 * where these are many and small, gathered first. Sets, also when it fails, `submitted` once the
 * device has been given any of it, and `unread` where the copies go on reading the caller's
 * memory: then copy_wait_read() comes behind it. */
vmm_status copy_plan_send(const copy_plan *plan, vmm_pool *pool, uint64_t *tensor_calls,
                          vmm_stream stream, bool *submitted, bool *unread);
/* Wait until what was sent has been read. `status`: of the sending, which is what counts. */
vmm_status copy_wait_read(vmm_pool *pool, uint64_t *tensor_calls, vmm_stream stream,
                          vmm_status status);

bool copy_plan_is_wide(const copy_plan *plan);
void copy_plan_to_job(const copy_plan *plan, vmm_append_job *out);
void copy_plan_to_job_wide(const copy_plan *plan, vmm_append_job_wide *out);
/* The job's copy; what else it has is filled in already. */
void copy_plan_to_cursor_job(const copy_plan *plan, vmm_cursor_job *out);
/* Make it piece n of `args`, after the first of runs like the first's: false where it is of
 * another form. */
bool copy_plan_to_piece(const copy_plan *plan, vmm_append_args_pieces *args, size_t n);

#endif /* VMM_COPY_H */
