/* cursor_job.h - appending at a row that the device keeps: the ABI of the kernels in cursor.cuh.
 *
 * A tensor that graphs append to has a control block in device memory. For n entries, one for
 * each index of dimension 0 that grows on its own, else one in all:
 *   int32_t cursor[n]      the lengths, as attention kernels read them; written by us only
 *   (8-byte aligned)
 *   uint32_t mapped        rows that are mapped; written by the host at any time
 *   uint32_t unused
 *   {uint32_t length, ticket} state[n]
 *                          the lengths again, and how many blocks of a running append have read
 *                          theirs: one word of 64 bits, so that reading it and saying so are one
 *                          access
 *   uint32_t behind[n]     how much shorter the entry is than the longest
 * A small one lies within 128 bytes. `behind` is constant while a graph runs, since all entries
 * advance by the same; so each entry finds by itself whether the longest still fits, and all
 * find the same.
 */
#ifndef VMM_CURSOR_JOB_H
#define VMM_CURSOR_JOB_H

#include "append.h"

/* The names in the kernel image. The first takes a vmm_cursor_args by value: blockIdx.z is the
 * job's index, blockIdx.y the entry's. The second takes a vmm_cursor_set_args; one block. */
#define VMM_APPEND_KERNEL_CURSOR "vmm_append_kernel_cursor"
#define VMM_CURSOR_KERNEL "vmm_cursor_kernel"
#define VMM_CURSOR_BLOCK_THREADS 256

#define VMM_CURSOR_WORDS(n) (((uint64_t)(n) * 4 + 7) & ~(uint64_t)7)
#define VMM_CURSOR_STATE(n) (VMM_CURSOR_WORDS(n) + 8)
#define VMM_CURSOR_BEHIND(n) (VMM_CURSOR_STATE(n) + (uint64_t)(n) * 8)
#define VMM_CURSOR_BYTES(n) (VMM_CURSOR_BEHIND(n) + (uint64_t)(n) * 4)

#define VMM_CURSOR_JOBS 14 /* what 4 KiB of parameters hold */
#define VMM_CURSOR_MAX_ENTRIES 65535

/* Append `n_rows` to every entry. `copy` is that of entry 0 at row 0; entry e goes to
 * e * dst_entry_stride + length * row_bytes behind it. Past what is mapped nothing is written,
 * and the word at `flag`, in host memory, becomes 1. Everything is a multiple of unit_bytes. */
typedef struct vmm_cursor_job {
    vmm_append_job_wide copy;
    uint64_t control;
    uint64_t flag;
    uint64_t row_bytes;
    int64_t dst_entry_stride;
    int64_t src_entry_stride;
    uint32_t n_entries;
    uint32_t n_rows;
    uint32_t n_blocks; /* for each entry, within gridDim.x; the driver's choice */
    uint32_t unused;
} vmm_cursor_job;

typedef struct vmm_cursor_args {
    vmm_cursor_job job[VMM_CURSOR_JOBS];
} vmm_cursor_args;

/* Entries [first, first + count) of a control block become what is said here. */
typedef struct vmm_cursor_set {
    uint64_t control;
    uint32_t n_entries; /* of the control block */
    uint32_t first, count;
    uint32_t length, behind;
    uint32_t unused;
} vmm_cursor_set;

#define VMM_CURSOR_SETS 127

typedef struct vmm_cursor_set_args {
    uint64_t n_sets;
    vmm_cursor_set set[VMM_CURSOR_SETS];
} vmm_cursor_set_args;

#endif /* VMM_CURSOR_JOB_H */
