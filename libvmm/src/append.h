/* append.h - one copy job, as the host prepares it and the append kernel reads it.
 *
 * This is the kernel's ABI: append.cu, the host's own copy and the simulated driver of
 * the tests all include it. Plain C, no padding that differs between compilers.
 *
 * A job copies `count[0] * ... * count[n_outer-1]` runs of `run_bytes` bytes each. Run
 * (i0, i1, ...) begins at dst + i0*dst_stride[0] + ..., and likewise for src. Dimension 0
 * is the outermost. With n_outer 0 there is one run of n_units. Everything of a job is a multiple of `unit_bytes` (1, 2, 4, 8 or 16),
 * the size of one access.
 */
#ifndef VMM_APPEND_H
#define VMM_APPEND_H

#include <stdint.h>

/* The names in the kernel image. Each takes one parameter by value: a vmm_append_args, a
 * vmm_append_args_wide or a vmm_append_args_pieces. gridDim.y is the number of jobs or pieces,
 * blockIdx.y the index of one; for pieces gridDim.z is the number of runs. */
#define VMM_APPEND_KERNEL "vmm_append_kernel"
#define VMM_APPEND_KERNEL_WIDE "vmm_append_kernel_wide"
#define VMM_APPEND_KERNEL_PIECES "vmm_append_kernel_pieces"
#define VMM_APPEND_BLOCK_THREADS 128

/* Three outer dimensions hold every layout of a 4-D cache, so many jobs fit into the 4 KiB
 * of kernel parameters; eight hold any tensor of VMM_MAX_NDIM dimensions. */
#define VMM_APPEND_DIMS 3
#define VMM_APPEND_DIMS_WIDE 8
#define VMM_APPEND_JOBS 32
#define VMM_APPEND_JOBS_WIDE 16

#define VMM_APPEND_JOB_FIELDS(dims)                                                                \
    uint64_t dst;                                                                                  \
    uint64_t src;                                                                                  \
    uint64_t n_units;   /* in the whole job: product of counts * run_units */                      \
    uint64_t run_units; /* run_bytes / unit_bytes */                                               \
    uint32_t unit_bytes;                                                                           \
    uint32_t n_outer;                                                                              \
    uint64_t count[dims];                                                                          \
    int64_t dst_stride[dims];                                                                      \
    int64_t src_stride[dims];

typedef struct vmm_append_job {
    VMM_APPEND_JOB_FIELDS(VMM_APPEND_DIMS)
} vmm_append_job;

typedef struct vmm_append_job_wide {
    VMM_APPEND_JOB_FIELDS(VMM_APPEND_DIMS_WIDE)
} vmm_append_job_wide;

typedef struct vmm_append_args {
    vmm_append_job job[VMM_APPEND_JOBS];
} vmm_append_args;

typedef struct vmm_append_args_wide {
    vmm_append_job_wide job[VMM_APPEND_JOBS_WIDE];
} vmm_append_args_wide;

/* Pieces are jobs of one form, so that many more fit: `n_runs` dense runs each, at the same
 * distances for all of them. Run r of a piece begins at dst + r*dst_stride and src +
 * r*src_stride, and is n_units * unit_bytes bytes long. Keys and values of 80 layers. */
#define VMM_APPEND_PIECES 160

typedef struct vmm_append_piece {
    uint64_t dst;
    uint64_t src;
    uint32_t n_units; /* of one run */
    uint32_t unit_bytes;
} vmm_append_piece;

typedef struct vmm_append_args_pieces {
    uint64_t n_runs;
    int64_t dst_stride;
    int64_t src_stride;
    vmm_append_piece piece[VMM_APPEND_PIECES];
} vmm_append_args_pieces;

#endif /* VMM_APPEND_H */
