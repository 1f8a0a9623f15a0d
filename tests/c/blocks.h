/* blocks.h - tensors that are measured in blocks of the device's smallest size, in a pool of that
 * block size: for the tests that count blocks. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "check.h"

static size_t granule, rows; /* of a block */
static int64_t block_shape[2];

/* Blocks of `block_bytes`, rows of `row_bytes`. */
static inline void blocks_are(size_t block_bytes, size_t row_bytes) {
    granule = block_bytes;
    rows = block_bytes / row_bytes;
    block_shape[1] = (int64_t)row_bytes; /* uint8 */
}

static inline vmm_spec make_spec(size_t n_blocks) {
    return (vmm_spec){.ndim = 2,
                      .shape = block_shape,
                      .dtype = VMM_UINT8,
                      .capacity = n_blocks * rows,
                      .block_bytes = granule};
}

static inline fixture with_pool(const fixture *f, size_t max_bytes) {
    fixture own = *f;

    CHECK_OK(vmm_pool_create(f->device, granule, max_bytes, &own.pool));
    return own;
}

#endif /* BLOCKS_H */
