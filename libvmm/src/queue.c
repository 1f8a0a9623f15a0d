/* queue.c - what waits for a fence, and how it comes back. */
#include "queue.h"

#include "device.h"
#include "error.h"

bool pool_has_queue(vmm_pool *pool) {
    return __atomic_load_n(&pool->queue, __ATOMIC_RELAXED) != NULL;
}

static void link_entry(vmm_pool *pool, pool_entry *entry) {
    entry->next = pool->queue;
    entry->linked = true;
    pool->n_queued++;
    __atomic_store_n(&pool->queue, entry, __ATOMIC_RELAXED);
}

void pool_enqueue_locked(vmm_pool *pool, pool_entry *entry) {
    entry->epoch = pool->fences_recorded;
    __atomic_store_n(&pool->has_news, true, __ATOMIC_RELEASE);
    if (!entry->linked)
        link_entry(pool, entry);
}

/* Reclaim from every entry what the fences passed so far allow, or, with `parked_only`,
 * what was refused before. Other threads may queue meanwhile: the list is taken off whole,
 * and its entries stay marked as linked until it is known what is left of them. */
static vmm_status reclaim_covered(pool_work *work, bool parked_only) {
    vmm_pool *pool = work->pool;
    vmm_status first = VMM_OK;
    pthread_mutex_lock(&pool->lock);
    pool_entry *list = pool->queue;
    pool->n_queued = 0;
    __atomic_store_n(&pool->queue, NULL, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&pool->lock);
    while (list) {
        pool_entry *entry = list;
        list = entry->next;
        bool gone = false;
        pthread_mutex_lock(&pool->lock);
        bool fenced =
            !parked_only && (!pool->device->ops->is_async || pool->fences_passed > entry->epoch);
        bool useful = fenced || entry->parked_bytes > 0, retired = entry->retired;
        pthread_mutex_unlock(&pool->lock);
        if (useful) {
            vmm_status status = entry->reclaim(entry, work, fenced, retired, &gone);
            if (status && !first)
                first = status;
        }
        if (gone)
            continue;
        pthread_mutex_lock(&pool->lock);
        entry->linked = false;
        if (entry->retired || entry->queued_bytes || entry->parked_bytes)
            link_entry(pool, entry);
        pthread_mutex_unlock(&pool->lock);
    }
    return first;
}

/* Is something queued that no fence has released? Asked when none is pending. */
static bool needs_fence(vmm_pool *pool) {
    bool needed = false;
    pthread_mutex_lock(&pool->lock);
    for (pool_entry *entry = pool->queue; entry && !needed; entry = entry->next)
        needed = entry->epoch >= pool->fences_passed && (entry->queued_bytes || entry->retired);
    pthread_mutex_unlock(&pool->lock);
    return needed;
}

vmm_status queue_settle(pool_work *work, bool wait) {
    vmm_pool *pool = work->pool;
    bool done = true;
    vmm_status status =
        wait ? DRIVER(pool, work->tensor_calls, event_synchronize, pool->fence->event)
             : DRIVER(pool, work->tensor_calls, event_query, pool->fence->event, &done);
    if (status || !done)
        return status;
    pool_put_event(pool, pool->fence);
    pool->fence = NULL;
    pool->fences_passed = pool->fences_recorded;
    return VMM_OK;
}

static vmm_status record_fence(pool_work *work) {
    vmm_pool *pool = work->pool;
    pool_event *event;
    vmm_status status = pool_get_event(pool, &event);
    if (status)
        return status;
    /* Counted before it is recorded: what is queued meanwhile belongs to the next one. */
    pthread_mutex_lock(&pool->lock);
    pool->fences_recorded++;
    pthread_mutex_unlock(&pool->lock);
    status = DRIVER(pool, work->tensor_calls, fence, event->event);
    if (status) {
        pool_put_event(pool, event);
        return status;
    }
    pool->fence = event;
    return VMM_OK;
}

/* Would a fence now meet a capture that is known of? Under the device's fence lock. A driver
 * that gives no answer to that has failed: that, and no capture, is what went wrong. */
static vmm_status check_captures(pool_work *work) {
    vmm_pool *pool = work->pool;
    uint64_t capture = pool->device->captures;
    vmm_status status = VMM_OK;
    if (!capture && work->stream != VMM_STREAM_NONE)
        status = DRIVER(pool, work->tensor_calls, stream_capture, work->stream, &capture);
    if (!status && capture)
        status = vmm_fail(VMM_ERR_CAPTURING, "fence",
                          "queued memory can only be had behind a fence, and a stream is being "
                          "captured");
    return status;
}

vmm_status queue_reclaim(pool_work *work, bool wait) {
    vmm_pool *pool = work->pool;
    vmm_status first = VMM_OK, status;
    if (!pool->device->ops->is_async)
        return reclaim_covered(work, false);
    work->waited |= wait;
    if (pool->fence) {
        first = queue_settle(work, wait);
    }
    if (!first && !pool->fence && needs_fence(pool)) {
        bool may_wait = wait || !pool->device->ops->fence_waits(pool->device->state);
        pthread_mutex_lock(&pool->device->fence_lock);
        first = check_captures(work);
        if (!first && may_wait)
            first = record_fence(work);
        pthread_mutex_unlock(&pool->device->fence_lock);
        if (!first && pool->fence)
            first = queue_settle(work, wait);
    }
    status = reclaim_covered(work, false);
    return first ? first : status;
}

void queue_retry_parked(pool_work *work) {
    vmm_pool *pool = work->pool;
    pthread_mutex_lock(&pool->lock);
    bool retry = pool->parked_bytes > 0;
    pthread_mutex_unlock(&pool->lock);
    if (!retry)
        return;
    vmm_undo_begin(); /* a retry that fails is no failure of the call that tried */
    pool_block *block = pool->parked_blocks;
    pool->parked_blocks = NULL;
    while (block) {
        pool_block *next = block->next;
        pool_move_bytes(pool, &pool->parked_bytes, NULL, block->bytes);
        pool_release_block(work, block);
        block = next;
    }
    reclaim_covered(work, true);
    vmm_undo_end();
}

void pool_drain(vmm_pool *pool) {
    if (pool->device->ops->is_async)
        return;
    /* Again, if another thread queued something after the list was taken and before the lock
     * was free for it. What the driver refuses is parked and no news. Either we see its news
     * here, having let go of the lock, or it finds the lock free: never neither. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    while (__atomic_load_n(&pool->has_news, __ATOMIC_ACQUIRE) &&
           pthread_mutex_trylock(&pool->work) == 0) {
        pool_work work = {pool, NULL, VMM_STREAM_NONE, false};
        __atomic_store_n(&pool->has_news, false, __ATOMIC_RELEASE);
        vmm_undo_begin();
        reclaim_covered(&work, false);
        vmm_undo_end();
        pthread_mutex_unlock(&pool->work);
    }
}

void queue_sweep_abandoned(vmm_device *device, vmm_stream stream, bool wait) {
    vmm_pool *pool = vmm_device_take_abandoned(device);
    vmm_undo_begin();
    while (pool) {
        vmm_pool *next = pool->next_abandoned;
        pool_work work;
        pool_work_begin(&work, pool, NULL, stream); /* what was parked is tried again, too */
        queue_reclaim(&work, wait);
        pool_release_free(&work, SIZE_MAX);
        pthread_mutex_unlock(&pool->work);
        if (pool_is_empty(pool))
            pool_destroy(pool);
        else
            vmm_device_abandon(device, pool);
        pool = next;
    }
    vmm_undo_end();
}
