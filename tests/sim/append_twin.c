/* append_twin.c - the append kernel once more, in C, with every precondition checked.
 *
 * Written from append.h's description of a job, and from nothing else of libvmm.
 */
#define _GNU_SOURCE
#include <string.h>

#include "append_twin.h"

static job widened(const vmm_append_job *in) {
    job out = {.dst = in->dst,
               .src = in->src,
               .n_units = in->n_units,
               .run_units = in->run_units,
               .unit_bytes = in->unit_bytes,
               .n_outer = in->n_outer};
    for (uint32_t d = 0; d < VMM_APPEND_DIMS; d++) {
        out.count[d] = in->count[d];
        out.dst_stride[d] = in->dst_stride[d];
        out.src_stride[d] = in->src_stride[d];
    }
    return out;
}

/* A piece is a job of one outer dimension, which the grid's third direction counts. */
static job of_piece(const vmm_append_args_pieces *args, unsigned i) {
    const vmm_append_piece *piece = &args->piece[i];
    return (job){.dst = piece->dst,
                 .src = piece->src,
                 .n_units = args->n_runs * piece->n_units,
                 .run_units = piece->n_units,
                 .unit_bytes = piece->unit_bytes,
                 .n_outer = 1,
                 .count = {args->n_runs},
                 .dst_stride = {args->dst_stride},
                 .src_stride = {args->src_stride}};
}

static bool is_wide(const sim_op *op) {
    return op->u.launch.kernel == &sim_append_kernel_wide;
}

static bool is_pieces(const sim_op *op) {
    return op->u.launch.kernel == &sim_append_kernel_pieces;
}

static job job_at(const sim_op *op, unsigned i) {
    if (is_pieces(op))
        return of_piece(op->u.launch.params, i);
    return is_wide(op) ? ((const vmm_append_args_wide *)op->u.launch.params)->job[i]
                       : widened(&((const vmm_append_args *)op->u.launch.params)->job[i]);
}

/* ---- runs ------------------------------------------------------------------------------------ */
bool sim_first_run(const job *j, run *r) {
    *r = (run){.dst = j->dst, .src = j->src};
    return j->n_units > 0;
}

bool sim_next_run(const job *j, run *r) {
    for (uint32_t d = j->n_outer; d-- > 0;) {
        r->dst += (uint64_t)j->dst_stride[d];
        r->src += (uint64_t)j->src_stride[d];
        if (++r->index[d] < j->count[d])
            return true;
        r->dst -= (uint64_t)j->dst_stride[d] * j->count[d];
        r->src -= (uint64_t)j->src_stride[d] * j->count[d];
        r->index[d] = 0;
    }
    return false;
}

/* ---- preconditions ------------------------------------------------------------------------------ */
CUresult sim_check_shape(const job *j, unsigned i, uint32_t dims) {
    uint32_t unit = j->unit_bytes;
    if (unit != 1 && unit != 2 && unit != 4 && unit != 8 && unit != 16)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "job %u: units of %u bytes", i, unit);
    if (j->n_outer > dims)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "job %u: %u outer dimensions", i, j->n_outer);
    uint64_t n_units = j->run_units;
    for (uint32_t d = 0; d < j->n_outer; d++)
        n_units *= j->count[d];
    if (n_units != j->n_units)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE,
                          "job %u: %llu units, but counts and run make %llu", i,
                          (unsigned long long)j->n_units, (unsigned long long)n_units);
    uint64_t misaligned = j->dst % unit | j->src % unit;
    for (uint32_t d = 0; d < j->n_outer; d++)
        if (j->count[d] > 1)
            misaligned |= (uint64_t)j->dst_stride[d] % unit | (uint64_t)j->src_stride[d] % unit;
    if (misaligned)
        return sim_refuse(CUDA_ERROR_MISALIGNED_ADDRESS,
                          "job %u: dst 0x%llx, src 0x%llx or a stride is no multiple of %u", i,
                          (unsigned long long)j->dst, (unsigned long long)j->src, unit);
    return CUDA_SUCCESS;
}

/* Visit the runs of one side, neighbours as one. */
CUresult sim_touch_side(const job *j, const sim_visit *visit, bool write) {
    run r;
    uint64_t bytes = j->run_units * j->unit_bytes, begin = 0, end = 0;
    CUresult status = CUDA_SUCCESS;
    for (bool more = sim_first_run(j, &r); more && status == CUDA_SUCCESS;
         more = sim_next_run(j, &r)) {
        uint64_t at = write ? r.dst : r.src;
        if (at != end || begin == end) {
            status = sim_touch(visit, begin, end - begin, write);
            begin = at;
        }
        end = at + bytes;
    }
    return status ? status : sim_touch(visit, begin, end - begin, write);
}

static CUresult check(const sim_op *op, const sim_visit *visit) {
    const unsigned *grid = op->u.launch.grid, *block = op->u.launch.block;
    unsigned jobs = is_pieces(op) ? VMM_APPEND_PIECES
                    : is_wide(op) ? VMM_APPEND_JOBS_WIDE
                                  : VMM_APPEND_JOBS;
    uint64_t runs =
        is_pieces(op) ? ((const vmm_append_args_pieces *)op->u.launch.params)->n_runs : 1;
    uint32_t dims = is_wide(op) ? VMM_APPEND_DIMS_WIDE : VMM_APPEND_DIMS;
    if (block[0] != VMM_APPEND_BLOCK_THREADS || block[1] != 1 || block[2] != 1 || grid[2] != runs ||
        grid[1] > jobs || grid[0] > (1u << 30) / VMM_APPEND_BLOCK_THREADS)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE,
                          "%s: grid (%u, %u, %u) of blocks (%u, %u, %u), made for blocks of %d and "
                          "at most %u jobs in %llu runs",
                          op->name, grid[0], grid[1], grid[2], block[0], block[1], block[2],
                          VMM_APPEND_BLOCK_THREADS, jobs, (unsigned long long)runs);
    for (unsigned i = 0; i < grid[1]; i++) {
        job j = job_at(op, i);
        CUresult status = sim_check_shape(&j, i, dims);
        if (status == CUDA_SUCCESS)
            status = sim_touch_side(&j, visit, false);
        if (status == CUDA_SUCCESS)
            status = sim_touch_side(&j, visit, true);
        if (status)
            return status;
    }
    return CUDA_SUCCESS;
}

/* ---- the copy ---------------------------------------------------------------------------------- */
static void run_jobs(const sim_op *op) {
    /* Jobs run side by side on a device: take them backwards, so that no one relies on order. */
    for (unsigned i = op->u.launch.grid[1]; i-- > 0;) {
        job j = job_at(op, i);
        run r;
        for (bool more = sim_first_run(&j, &r); more; more = sim_next_run(&j, &r))
            memmove((void *)(uintptr_t)r.dst, (const void *)(uintptr_t)r.src,
                    j.run_units * j.unit_bytes);
    }
}

const sim_kernel sim_append_kernel = {VMM_APPEND_KERNEL, sizeof(vmm_append_args), check, run_jobs};
const sim_kernel sim_append_kernel_wide = {VMM_APPEND_KERNEL_WIDE, sizeof(vmm_append_args_wide),
                                           check, run_jobs};
const sim_kernel sim_append_kernel_pieces = {VMM_APPEND_KERNEL_PIECES,
                                             sizeof(vmm_append_args_pieces), check, run_jobs};
