/* pool.c - physical blocks: create, recycle, release, the budget. */
#include "pool.h"

#include <stdio.h>
#include <stdlib.h>

#include "control.h"
#include "device.h"
#include "error.h"
#include "lookahead.h"
#include "process.h"
#include "queue.h"

/* ---- the books -------------------------------------------------------------- */

static size_t held_bytes(const vmm_pool *pool) {
    size_t sum = 0;
    for (int state = 0; state < POOL_STATES; state++)
        sum += pool->bytes[state];
    return sum;
}

void pool_move_bytes_locked(vmm_pool *pool, pool_entry *entry, pool_state from, pool_state to,
                            size_t bytes) {
    pool->bytes[from] -= bytes;
    pool->bytes[to] += bytes;
    if (entry) {
        entry->bytes[from] -= bytes;
        entry->bytes[to] += bytes;
    }
    if (from == POOL_NOWHERE && held_bytes(pool) > pool->peak_bytes)
        pool->peak_bytes = held_bytes(pool);
    if (pool->bytes[POOL_IN_USE] > pool->peak_in_use_bytes)
        pool->peak_in_use_bytes = pool->bytes[POOL_IN_USE];
}

void pool_move_bytes(vmm_pool *pool, pool_entry *entry, pool_state from, pool_state to,
                     size_t bytes) {
    pthread_mutex_lock(&pool->lock);
    pool_move_bytes_locked(pool, entry, from, to, bytes);
    pthread_mutex_unlock(&pool->lock);
}

/* The budget has no room for a block of `bytes`. */
static vmm_status fail_over_budget(vmm_pool *pool, size_t bytes) {
    vmm_size_text need, limit, in_use, spare, queued;
    pthread_mutex_lock(&pool->lock);
    vmm_format_bytes(pool->bytes[POOL_IN_USE], &in_use);
    vmm_format_bytes(pool->bytes[POOL_FREE], &spare);
    vmm_format_bytes(pool->bytes[POOL_QUEUED], &queued);
    pthread_mutex_unlock(&pool->lock);
    return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "create",
                    "the pool's budget of %s on %s has no room for a block of %s (%s in use, %s "
                    "free, %s queued): close tensors, trim, or raise max_bytes",
                    vmm_format_bytes(pool->max_bytes, &limit), pool->device->name,
                    vmm_format_bytes(bytes, &need), in_use.text, spare.text, queued.text);
}

/* ---- events ------------------------------------------------------------------- */

vmm_status pool_get_event(vmm_pool *pool, pool_event **out) {
    pthread_mutex_lock(&pool->lock);
    pool_event *event = pool->spare_events;
    if (event)
        pool->spare_events = event->next;
    pthread_mutex_unlock(&pool->lock);
    if (!event) {
        event = malloc(sizeof *event);
        if (!event)
            return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "event", "no host memory left");
        vmm_status status = pool->device->ops->event_create(pool->device->state, &event->event);
        if (status) {
            free(event);
            return status;
        }
    }
    *out = event;
    return VMM_OK;
}

void pool_put_event(vmm_pool *pool, pool_event *event) {
    if (!event)
        return;
    pthread_mutex_lock(&pool->lock);
    event->next = pool->spare_events;
    pool->spare_events = event;
    pthread_mutex_unlock(&pool->lock);
}

/* ---- blocks ------------------------------------------------------------------- */

vmm_status pool_release_block(pool_work *work, pool_block *block) {
    vmm_pool *pool = work->pool;
    vmm_status status = DRIVER(pool, work->tensor_calls, release, block->handle, block->bytes);
    if (status) {
        block->next = pool->parked_blocks;
        pool->parked_blocks = block;
        pool_move_bytes(pool, NULL, POOL_NOWHERE, POOL_PARKED, block->bytes);
    } else {
        free(block);
    }
    return status;
}

static pool_block **size_class(vmm_pool *pool, size_t bytes) {
    return &pool->free_blocks[63 - __builtin_clzll(bytes)];
}

vmm_status pool_release_free(pool_work *work, size_t enough) {
    vmm_pool *pool = work->pool;
    vmm_status first = VMM_OK;
    size_t released = 0;
    for (int i = POOL_SIZE_CLASSES - 1; i >= 0; i--) {
        while (pool->free_blocks[i] && released < enough) {
            pool_block *block = pool->free_blocks[i];
            size_t bytes = block->bytes;
            pool->free_blocks[i] = block->next;
            pool_move_bytes(pool, NULL, POOL_FREE, POOL_NOWHERE, bytes);
            vmm_status status = pool_release_block(work, block);
            if (status && !first)
                first = status;
            if (!status)
                released += bytes;
        }
    }
    return first;
}

/* Blocks of sizes that nobody asks for go, rather than that the pool keeps more than it ever
 * needed. */
static void release_excess(pool_work *work) {
    vmm_pool *pool = work->pool;
    pthread_mutex_lock(&pool->lock);
    size_t idle = pool->bytes[POOL_FREE] + pool->bytes[POOL_RECYCLED];
    size_t most = pool->peak_in_use_bytes;
    pthread_mutex_unlock(&pool->lock);
    if (idle <= most)
        return;
    vmm_undo_begin();
    pool_release_free(work, idle - most);
    vmm_undo_end();
}

void pool_give_block(pool_work *work, pool_block *block, bool release) {
    vmm_pool *pool = work->pool;
    /* The host's blocks are nothing once unmapped. */
    if (release || !pool->device->ops->is_async) {
        pool_release_block(work, block);
        return;
    }
    pool_block **list = size_class(pool, block->bytes);
    block->next = *list;
    *list = block;
    pool_move_bytes(pool, NULL, POOL_NOWHERE, POOL_FREE, block->bytes);
}

static pool_block *take_free(vmm_pool *pool, size_t bytes, pool_state as) {
    for (pool_block **link = size_class(pool, bytes); *link; link = &(*link)->next) {
        pool_block *block = *link;
        if (block->bytes == bytes) {
            *link = block->next;
            block->fresh = false;
            pool_move_bytes(pool, NULL, POOL_FREE, as, bytes);
            return block;
        }
    }
    return NULL;
}

/* How far a block of `bytes` would exceed the budget. */
static size_t over_budget(vmm_pool *pool, size_t bytes) {
    pthread_mutex_lock(&pool->lock);
    size_t held = held_bytes(pool);
    pthread_mutex_unlock(&pool->lock);
    if (bytes > pool->max_bytes)
        return SIZE_MAX;
    return held > pool->max_bytes - bytes ? held - (pool->max_bytes - bytes) : 0;
}

static vmm_status new_block(pool_work *work, size_t bytes, pool_state as, pool_block **out) {
    vmm_pool *pool = work->pool;
    pool_block *block = calloc(1, sizeof *block);
    if (!block)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "create", "no host memory left");
    block->bytes = bytes;
    block->fresh = true;
    vmm_status status = DRIVER(pool, work->tensor_calls, create, bytes, &block->handle);
    if (status) {
        free(block);
        return status;
    }
    pool_move_bytes(pool, NULL, POOL_NOWHERE, as, bytes);
    *out = block;
    return VMM_OK;
}

/* A new block, at the cost of free ones of other sizes where the budget or the device is
 * full. */
static vmm_status create_block(pool_work *work, size_t bytes, pool_block **out) {
    vmm_pool *pool = work->pool;
    size_t over = over_budget(pool, bytes);
    if (over) {
        vmm_status status = over == SIZE_MAX ? VMM_OK : pool_release_free(work, over);
        if (over_budget(pool, bytes)) /* for a driver that would not take blocks back? */
            return status ? status : fail_over_budget(pool, bytes);
    }
    vmm_status status = new_block(work, bytes, POOL_IN_USE, out);
    if (status == VMM_ERR_OUT_OF_MEMORY && pool->bytes[POOL_FREE]) {
        pool_release_free(work, SIZE_MAX);
        status = new_block(work, bytes, POOL_IN_USE, out);
    }
    return status;
}

vmm_status pool_take_block_ahead(pool_work *work, size_t bytes, pool_block **out) {
    *out = take_free(work->pool, bytes, POOL_AHEAD);
    if (*out)
        return VMM_OK;
    if (over_budget(work->pool, bytes))
        return VMM_ERR_OUT_OF_MEMORY;
    return new_block(work, bytes, POOL_AHEAD, out);
}

static vmm_status take_or_create(pool_work *work, size_t bytes, pool_block **out) {
    *out = take_free(work->pool, bytes, POOL_IN_USE);
    return *out ? VMM_OK : create_block(work, bytes, out);
}

void pool_work_begin(pool_work *work, vmm_pool *pool, uint64_t *tensor_calls, vmm_stream stream) {
    *work = (pool_work){.pool = pool, .tensor_calls = tensor_calls, .stream = stream};
    __atomic_fetch_add(&pool->work_waiters, 1, __ATOMIC_RELAXED);
    pthread_mutex_lock(&pool->work);
    __atomic_fetch_sub(&pool->work_waiters, 1, __ATOMIC_RELAXED);
    queue_retry_parked(work);
}

void pool_work_end(pool_work *work) {
    vmm_pool *pool = work->pool;
    vmm_device *device = pool->device;
    pthread_mutex_unlock(&pool->work);
    pool_drain(pool);
    if (vmm_device_has_abandoned(device))
        queue_sweep_abandoned(device, work->stream, work->waited);
}

/* Memory is short: make some of what is idle free. What the driver has refused meanwhile is of
 * interest only where it is the last way out (`reclaimed`, `refusal`). */
static bool give_up_idle(pool_work *work, size_t bytes, vmm_status *reclaimed, vmm_error *refusal) {
    size_t before = work->unmapped_bytes;
    vmm_error shortage = *vmm_last_error();
    if (!reclaimed)
        vmm_undo_begin();
    vmm_status status = queue_give_up(work, bytes);
    if (!reclaimed)
        vmm_undo_end();
    else if (status && !*reclaimed) {
        *reclaimed = status;
        *refusal = *vmm_last_error();
    }
    vmm_fail_again(&shortage);
    return work->unmapped_bytes > before;
}

static size_t in_use_bytes(vmm_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    size_t bytes = pool->bytes[POOL_IN_USE];
    pthread_mutex_unlock(&pool->lock);
    return bytes;
}

/* Is about as much in use as when a block was refused that could have been smaller? */
static bool is_scarce(vmm_pool *pool) {
    size_t then = pool->scarce_bytes, now = then ? in_use_bytes(pool) : 0;
    if ((now > then ? now - then : then - now) > then / 8)
        pool->scarce_bytes = 0;
    return pool->scarce_bytes != 0;
}

vmm_status pool_take_block(pool_work *work, size_t bytes, size_t fitting_bytes,
                           size_t smallest_bytes, pool_block **out) {
    vmm_pool *pool = work->pool;
    vmm_status reclaimed = VMM_OK, status;
    vmm_error refusal;
    if (is_scarce(pool))
        bytes = fitting_bytes;
    *out = take_free(pool, bytes, POOL_IN_USE);
    if (!*out && pool_has_queue(pool)) {
        queue_tidy(work);
        *out = take_free(pool, bytes, POOL_IN_USE);
    }
    if (*out)
        return VMM_OK;
    release_excess(work);
    for (bool waited = false;; waited = true) {
        status = waited ? VMM_ERR_OUT_OF_MEMORY : create_block(work, bytes, out);
        while (status == VMM_ERR_OUT_OF_MEMORY &&
               give_up_idle(work, bytes, waited ? &reclaimed : NULL, &refusal))
            status = take_or_create(work, bytes, out);
        for (size_t size = fitting_bytes < bytes ? fitting_bytes : bytes / 2;
             status == VMM_ERR_OUT_OF_MEMORY && size >= smallest_bytes; size /= 2)
            status = take_or_create(work, size, out);
        if (status != VMM_ERR_OUT_OF_MEMORY || waited || !pool_has_queue(pool))
            break;
        vmm_error shortage = *vmm_last_error();
        reclaimed = queue_fence(work, true);
        refusal = *vmm_last_error();
        vmm_fail_again(&shortage);
    }
    bool less = status == VMM_ERR_OUT_OF_MEMORY || (!status && (*out)->bytes < bytes);
    if (less && bytes > smallest_bytes)
        pool->scarce_bytes = in_use_bytes(pool);
    if (status == VMM_ERR_OUT_OF_MEMORY && reclaimed && reclaimed != VMM_ERR_CAPTURING) {
        vmm_fail_again(&refusal); /* the cause: there was memory, and the driver kept it */
        status = reclaimed;
    }
    return status;
}

/* Address space of closed tensors that never mapped anything is not asked for by any
 * growth: from so many on, look whether it can be returned. */
#define QUEUE_HIGH_WATER 64

vmm_status pool_reserve(vmm_pool *pool, uint64_t *tensor_calls, size_t bytes, vmm_stream stream,
                        uintptr_t *out) {
    pool_work work;
    pthread_mutex_lock(&pool->lock);
    bool many = pool->n_bare >= QUEUE_HIGH_WATER, parked = pool->bytes[POOL_PARKED] > 0;
    pthread_mutex_unlock(&pool->lock);
    if (many || parked) {
        pool_work_begin(&work, pool, tensor_calls, stream);
        if (many)
            queue_return_addresses(&work);
        pool_work_end(&work);
    }
    vmm_status status = DRIVER(pool, tensor_calls, reserve, bytes, 0, out);
    if (status && pool_has_queue(pool)) {
        pool_empty_queue(pool, tensor_calls, stream);
        status = DRIVER(pool, tensor_calls, reserve, bytes, 0, out);
    }
    return status;
}

void pool_range_added_locked(vmm_pool *pool, pool_entry *entry) {
    pool->live_ranges++;
    entry->previous_live = NULL;
    entry->next_live = pool->live;
    if (pool->live)
        pool->live->previous_live = entry;
    pool->live = entry;
}

void pool_range_added(vmm_pool *pool, pool_entry *entry) {
    pthread_mutex_lock(&pool->lock);
    pool_range_added_locked(pool, entry);
    pthread_mutex_unlock(&pool->lock);
}

void pool_range_retired_locked(vmm_pool *pool, pool_entry *entry) {
    lookahead_forget_locked(pool, entry);
    *(entry->previous_live ? &entry->previous_live->next_live : &pool->live) = entry->next_live;
    if (entry->next_live)
        entry->next_live->previous_live = entry->previous_live;
}

void pool_range_gone(vmm_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->live_ranges--;
    pthread_mutex_unlock(&pool->lock);
}

/* ---- public --------------------------------------------------------------------- */

vmm_status pool_check(const vmm_pool *pool, const char *operation) {
    if (!pool)
        return vmm_fail(VMM_ERR_INVALID, operation, "pool is NULL");
    if (pool->process != vmm_process)
        return vmm_fail(VMM_ERR_FORKED, operation,
                        "the pool belongs to the parent process: create one in this process");
    return VMM_OK;
}

vmm_status vmm_pool_create(vmm_device *device, size_t block_bytes, size_t max_bytes,
                           vmm_pool **out) {
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, "pool_create", "out is NULL");
    *out = NULL;
    if (!device)
        return vmm_fail(VMM_ERR_INVALID, "pool_create", "device is NULL");
    if (device->process != vmm_process)
        return vmm_fail(VMM_ERR_FORKED, "pool_create",
                        "%s was opened by the parent process: open it anew", device->name);
    if (block_bytes == 0)
        block_bytes = VMM_BLOCK_AUTO;
    if (block_bytes != VMM_BLOCK_AUTO && block_bytes % device->granularity_bytes)
        return vmm_fail(VMM_ERR_INVALID, "pool_create",
                        "a block size of %zu bytes is not a multiple of the granularity of %s, "
                        "%zu bytes",
                        block_bytes, device->name, device->granularity_bytes);
    size_t smallest = block_bytes == VMM_BLOCK_AUTO ? device->granularity_bytes : block_bytes;
    if (max_bytes && max_bytes < smallest)
        return vmm_fail(VMM_ERR_INVALID, "pool_create",
                        "a budget of %zu bytes is less than one block of %zu bytes", max_bytes,
                        smallest);
    vmm_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "pool_create", "no host memory left");
    pool->device = vmm_device_retain(device);
    pool->process = vmm_process;
    pool->block_bytes = block_bytes;
    pool->max_bytes = max_bytes ? max_bytes : SIZE_MAX;
    pthread_mutex_init(&pool->work, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    *out = pool;
    return VMM_OK;
}

size_t vmm_pool_block_bytes(const vmm_pool *pool) {
    return pool->block_bytes;
}

vmm_status vmm_pool_trim(vmm_pool *pool, int wait) {
    vmm_status status = pool_check(pool, "pool_trim");
    if (status)
        return status;
    pool_work work;
    pool_work_begin(&work, pool, NULL, VMM_STREAM_NONE);
    status = queue_reclaim(&work, wait != 0);
    if (status)
        vmm_undo_begin(); /* the first failure is the one that is told */
    vmm_status released = pool_release_free(&work, SIZE_MAX);
    if (status)
        vmm_undo_end();
    pool_work_end(&work);
    return status ? status : released;
}

vmm_status vmm_pool_capture_begin(vmm_pool *pool) {
    vmm_status status = pool_check(pool, "pool_capture_begin");
    if (status)
        return status;
    /* A fence that is being taken, on any pool of the device, is done before the capture begins. */
    pthread_mutex_lock(&pool->device->fence_lock);
    pool->device->captures++;
    pool->captures++;
    pthread_mutex_unlock(&pool->device->fence_lock);
    return VMM_OK;
}

vmm_status vmm_pool_capture_end(vmm_pool *pool) {
    vmm_status status = pool_check(pool, "pool_capture_end");
    if (status)
        return status;
    pthread_mutex_lock(&pool->device->fence_lock);
    if (pool->captures == 0) {
        status = vmm_fail(VMM_ERR_INVALID, "pool_capture_end", "no capture has begun");
    } else {
        pool->captures--;
        pool->device->captures--;
    }
    pthread_mutex_unlock(&pool->device->fence_lock);
    return status;
}

vmm_status vmm_pool_statistics(vmm_pool *pool, vmm_pool_stats *out) {
    vmm_status status = pool_check(pool, "pool_statistics");
    if (status)
        return status;
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, "pool_statistics", "out is NULL");
    pthread_mutex_lock(&pool->lock);
    *out = (vmm_pool_stats){
        .in_use_bytes = pool->bytes[POOL_IN_USE],
        .free_bytes = pool->bytes[POOL_FREE],
        .queued_bytes = pool->bytes[POOL_QUEUED],
        .lookahead_bytes = pool->bytes[POOL_AHEAD],
        .recycled_bytes = pool->bytes[POOL_RECYCLED],
        .parked_bytes = pool->bytes[POOL_PARKED],
        .peak_bytes = pool->peak_bytes,
        .max_bytes = pool->max_bytes == SIZE_MAX ? 0 : pool->max_bytes,
    };
    pthread_mutex_unlock(&pool->lock);
    for (int call = 0; call < VMM_CALL_COUNT; call++)
        out->driver_calls[call] = __atomic_load_n(&pool->driver_calls[call], __ATOMIC_RELAXED);
    return VMM_OK;
}

/* No one can end the brackets of a pool that is given up. Without any there is nothing to wait
 * for: a destructor may be here, and the lock may be held across a fence. */
static void end_captures(vmm_pool *pool) {
    if (!pool->captures)
        return;
    pthread_mutex_lock(&pool->device->fence_lock);
    pool->device->captures -= pool->captures;
    pool->captures = 0;
    pthread_mutex_unlock(&pool->device->fence_lock);
}

void pool_destroy(vmm_pool *pool) {
    const driver_ops *ops = pool->device->ops;
    while (pool->spare_events) {
        pool_event *event = pool->spare_events;
        pool->spare_events = event->next;
        ops->event_destroy(pool->device->state, event->event);
        free(event);
    }
    vmm_device *device = pool->device;
    control_destroy(pool);
    end_captures(pool);
    pthread_mutex_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool->callbacks);
    free(pool);
    vmm_device_close(device);
}

bool pool_is_empty(vmm_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    bool empty =
        pool->live_ranges == 0 && !pool->lookahead && !pool->newest && held_bytes(pool) == 0;
    pthread_mutex_unlock(&pool->lock);
    return empty && !pool->fence;
}

vmm_status vmm_pool_close(vmm_pool *pool) {
    if (pool && pool->process != vmm_process)
        return VMM_OK;
    vmm_status status = pool_check(pool, "pool_close");
    if (status)
        return status;
    pthread_mutex_lock(&pool->lock);
    size_t live = pool->live_ranges;
    pthread_mutex_unlock(&pool->lock);
    if (live) {
        pool_work work; /* what was parked is tried again */
        pool_work_begin(&work, pool, NULL, VMM_STREAM_NONE);
        pool_work_end(&work);
        return vmm_fail(VMM_ERR_BUSY, "pool_close",
                        "%zu tensor(s) or allocation(s) of this pool on %s still live: close "
                        "them and drop what was exported first",
                        live, pool->device->name);
    }
    size_t ahead_bytes = lookahead_stop(pool);
    pool_work work;
    pool_work_begin(&work, pool, NULL, VMM_STREAM_NONE);
    status = queue_reclaim(&work, true);
    if (!status && pool->fence)
        status = queue_settle(&work, true); /* unreached: reclaim has settled it */
    if (!status)
        status = pool_release_free(&work, SIZE_MAX);
    pthread_mutex_unlock(&pool->work);
    if (!status && !pool_is_empty(pool)) /* unreached: who keeps memory has failed before */
        status = vmm_fail(VMM_ERR_DRIVER, "pool_close",
                          "the driver would not take all memory back: try again");
    if (!status)
        pool_destroy(pool);
    else if (ahead_bytes)
        lookahead_again(pool, ahead_bytes);
    return status;
}

void vmm_pool_release(vmm_pool *pool) {
    if (!pool || pool->process != vmm_process)
        return;
    end_captures(pool);
    lookahead_dismiss(pool);
    if (pool_is_empty(pool) && !pool->spare_events && !pool->control_slabs)
        pool_destroy(pool);
    else
        vmm_device_abandon(pool->device, pool);
}
