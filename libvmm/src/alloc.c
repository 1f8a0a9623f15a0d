/* alloc.c - memory of a pool for the allocators of others: one range of one lane, mapped
 * whole, known by its address. */
#include <search.h>

#include "error.h"
#include "process.h"
#include "range.h"

static const char *const operation = "pool_alloc";

static int by_base(const void *a, const void *b) {
    uintptr_t x = ((const range *)a)->base, y = ((const range *)b)->base;
    return (x > y) - (x < y);
}

/* The library's allocator, whose nodes hold ranges: NULL when the host has no memory left. */
static bool remember(range *range) {
    vmm_pool *pool = range->pool;
    pthread_mutex_lock(&pool->lock);
    bool done = tsearch(range, &pool->allocations, by_base) != NULL;
    pthread_mutex_unlock(&pool->lock);
    return done;
}

vmm_status vmm_pool_alloc(vmm_pool *pool, size_t bytes, vmm_stream stream, void **out) {
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, operation, "out is NULL");
    *out = NULL;
    vmm_status status = pool_check(pool, operation);
    if (status)
        return status;
    if (bytes == 0)
        return vmm_fail(VMM_ERR_INVALID, operation, "an allocation of 0 bytes");
    size_t block_bytes = pool->block_bytes, unit = pool->device->granularity_bytes;
    if (block_bytes == VMM_BLOCK_AUTO) {
        if (bytes > PTRDIFF_MAX - unit)
            return vmm_fail(VMM_ERR_OVERFLOW, operation, "%zu bytes do not fit the address space",
                            bytes);
        /* It does not grow, so one block does. */
        block_bytes = (bytes + unit - 1) / unit * unit;
    }
    range *range;
    if (!stream)
        stream = VMM_STREAM_LEGACY;
    status = range_create(pool, 1, bytes, block_bytes, NULL, stream, &range);
    if (status)
        return status;
    /* Out-of-memory callbacks have no part in it: whoever asks for memory here holds locks of its
     * own that they might want. */
    range_change change;
    status = range_map(&change, range, bytes, false, NULL, stream);
    if (!status)
        range_commit(&change);
    if (!status && !remember(range))
        status = vmm_fail(VMM_ERR_OUT_OF_MEMORY, operation, "no host memory left");
    if (status) {
        range_retire(range);
        return status;
    }
    *out = (void *)range->base;
    return VMM_OK;
}

vmm_status vmm_pool_free(vmm_pool *pool, void *pointer) {
    if (!pointer || (pool && pool->process != vmm_process))
        return VMM_OK;
    vmm_status status = pool_check(pool, "pool_free");
    if (status)
        return status;
    range key = {.base = (uintptr_t)pointer}, *range = NULL;
    pthread_mutex_lock(&pool->lock);
    struct range **node = tfind(&key, &pool->allocations, by_base);
    if (node) {
        range = *node;
        tdelete(range, &pool->allocations, by_base);
    }
    pthread_mutex_unlock(&pool->lock);
    if (!range)
        return vmm_fail(VMM_ERR_INVALID, "pool_free",
                        "%p is no allocation of this pool, or has been freed", pointer);
    range_retire(range);
    return VMM_OK;
}
