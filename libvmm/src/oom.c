/* oom.c - the callbacks that a pool asks before it reports out of memory. */
#include <stdlib.h>

#include "error.h"
#include "pool.h"

/* The callback that was registered next after number `*last`, of those up to `end`. */
static bool next_callback(vmm_pool *pool, uint64_t *last, uint64_t end, pool_callback *out) {
    bool found = false;
    pthread_mutex_lock(&pool->lock);
    for (size_t i = 0; i < pool->n_callbacks && !found; i++) {
        *out = pool->callbacks[i];
        found = out->number > *last && out->number <= end;
    }
    pthread_mutex_unlock(&pool->lock);
    if (found)
        *last = out->number;
    return found;
}

bool pool_run_callbacks(vmm_pool *pool, size_t needed_bytes) {
    /* One by one, for they may register and remove; no copy, for there may be no memory. */
    bool freed = false;
    pool_callback callback;
    uint64_t last = 0;
    pthread_mutex_lock(&pool->lock);
    uint64_t end = pool->callbacks_registered;
    pthread_mutex_unlock(&pool->lock);
    while (next_callback(pool, &last, end, &callback))
        freed |= callback.function(callback.user, needed_bytes) != 0;
    return freed;
}

vmm_status vmm_pool_on_oom(vmm_pool *pool, vmm_oom_callback callback, void *user) {
    vmm_status status = pool_check(pool, "pool_on_oom");
    if (status)
        return status;
    pthread_mutex_lock(&pool->lock);
    if (callback) {
        pool_callback *grown =
            realloc(pool->callbacks, (pool->n_callbacks + 1) * sizeof *pool->callbacks);
        if (grown) {
            pool->callbacks = grown;
            grown[pool->n_callbacks++] =
                (pool_callback){callback, user, ++pool->callbacks_registered};
        } else {
            status = vmm_fail(VMM_ERR_OUT_OF_MEMORY, "pool_on_oom", "no host memory left");
        }
    } else {
        size_t kept = 0;
        for (size_t i = 0; i < pool->n_callbacks; i++)
            if (pool->callbacks[i].user != user)
                pool->callbacks[kept++] = pool->callbacks[i];
        if (kept == pool->n_callbacks)
            status = vmm_fail(VMM_ERR_INVALID, "pool_on_oom", "no such callback is registered");
        pool->n_callbacks = kept;
    }
    pthread_mutex_unlock(&pool->lock);
    return status;
}
