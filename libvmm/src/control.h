/* control.h - control blocks (cursor_job.h) of the tensors of a pool, each with as much host memory
 * that it is copied from and to, and the words in which the device says that an append went past
 * what is mapped.
 *
 * They are pieces of slabs, so that thousands of tensors do not cost an allocation each. A slab
 * is no part of the budget, and stays until the pool goes.
 */
#ifndef VMM_CONTROL_H
#define VMM_CONTROL_H

#include "pool.h"

struct control_slab;

typedef struct control_block {
    pool_entry entry; /* first: the pool hands it back to us */
    vmm_pool *pool;
    struct control_slab *slab;
    size_t first, n_cells; /* of the slab */
    uintptr_t address;
    char *mirror;            /* what is copied lies here, for a copy that fails may yet be made */
    volatile uint32_t *flag; /* in host memory; the device has it at the same address */
} control_block;

/* A control block of at least `bytes`; undefined, the flag 0. May be called in a capture. */
vmm_status control_take(vmm_pool *pool, uint64_t *tensor_calls, size_t bytes, control_block **out);

/* Give it back, behind the next fence: no driver call, from any thread. */
void control_put(control_block *control);

/* Free the slabs of a pool whose queue is empty. */
void control_destroy(vmm_pool *pool);

#endif /* VMM_CONTROL_H */
