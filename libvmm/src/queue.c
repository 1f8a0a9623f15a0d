/* queue.c - what is given up and still mapped: it waits for a fence, then for someone to want
 * it. The tensor it was trimmed off, a new tensor of the same geometry, a growth that finds no
 * free block: in this order, and last the driver. */
#include "queue.h"

#include "device.h"
#include "error.h"
#include "lookahead.h"

/* ---- entries -------------------------------------------------------------------- */

bool pool_has_queue(vmm_pool *pool) {
    return __atomic_load_n(&pool->newest, __ATOMIC_RELAXED) != NULL;
}

bool pool_is_covered(const vmm_pool *pool, const pool_entry *entry) {
    return !pool->device->ops->is_async || pool->fences_passed > entry->epoch;
}

pool_state pool_used_state(const vmm_pool *pool, const pool_entry *entry) {
    return pool->fences_passed > entry->epoch ? POOL_RECYCLED : POOL_QUEUED;
}

static size_t spare_bytes(const pool_entry *entry) {
    return entry->bytes[POOL_QUEUED] + entry->bytes[POOL_RECYCLED] + entry->bytes[POOL_AHEAD] +
           entry->bytes[POOL_PARKED];
}

static void link_entry(vmm_pool *pool, pool_entry *entry) {
    entry->linked = true;
    entry->newer = NULL;
    entry->older = pool->newest;
    *(pool->newest ? &pool->newest->newer : &pool->oldest) = entry;
    __atomic_store_n(&pool->newest, entry, __ATOMIC_RELAXED);
}

static void unlink_entry(vmm_pool *pool, pool_entry *entry) {
    entry->linked = false;
    *(entry->older ? &entry->older->newer : &pool->oldest) = entry->newer;
    if (entry->newer)
        entry->newer->older = entry->older;
    else
        __atomic_store_n(&pool->newest, entry->older, __ATOMIC_RELAXED);
}

void pool_note_locked(vmm_pool *pool, pool_entry *entry) {
    bool keep = entry->retired || spare_bytes(entry);
    bool bare = entry->retired && !spare_bytes(entry);
    pool->n_bare += bare;
    pool->n_bare -= entry->bare;
    entry->bare = bare;
    if (keep && !entry->linked)
        link_entry(pool, entry);
    else if (!keep && entry->linked && !entry->claimed)
        unlink_entry(pool, entry);
}

void pool_enqueue_locked(vmm_pool *pool, pool_entry *entry) {
    pool_move_bytes_locked(pool, entry, POOL_RECYCLED, POOL_QUEUED, entry->bytes[POOL_RECYCLED]);
    entry->epoch = pool->fences_recorded;
    __atomic_store_n(&pool->has_news, true, __ATOMIC_RELEASE);
    if (entry->linked && !entry->claimed)
        unlink_entry(pool, entry); /* it goes to the front */
    pool_note_locked(pool, entry);
}

static vmm_status finish(pool_entry *entry, pool_work *work, int may_go, bool *gone) {
    (void)entry, (void)work;
    *gone = may_go & RECLAIM_USED;
    return VMM_OK;
}

void pool_discard_later(vmm_pool *pool, pool_entry *entry, void (*discard)(pool_entry *entry)) {
    *entry = (pool_entry){.retired = true, .trimmed = true, .reclaim = finish, .discard = discard};
    pthread_mutex_lock(&pool->lock);
    pool_enqueue_locked(pool, entry);
    pthread_mutex_unlock(&pool->lock);
}

/* ---- reclaiming ------------------------------------------------------------------- */

typedef enum queue_pick {
    PICK_PARKED,    /* what the driver has refused before */
    PICK_GIVEN_UP,  /* what is of use to nobody where it is */
    PICK_ADDRESSES, /* retired, without memory */
    PICK_AHEAD,     /* what was mapped ahead */
    PICK_RETIRED,   /* kept for the next tensor */
    PICK_ALL,
} queue_pick;

/* What of the entry may go, as a set of RECLAIM_*; 0: it is not picked. */
static int picked(const vmm_pool *pool, const pool_entry *entry, queue_pick pick) {
    bool covered = pool_is_covered(pool, entry);
    int may_go = entry->bytes[POOL_PARKED] ? RECLAIM_PARKED : 0;
    switch (pick) {
    case PICK_PARKED: break;
    case PICK_GIVEN_UP:
        if (covered && (entry->trimmed || (entry->retired && !pool->device->ops->is_async)))
            may_go |= RECLAIM_USED;
        break;
    case PICK_ADDRESSES:
        if (covered && entry->bare)
            may_go |= RECLAIM_USED;
        break;
    case PICK_AHEAD:
        if (entry->bytes[POOL_AHEAD])
            may_go |= RECLAIM_AHEAD;
        break;
    case PICK_RETIRED:
        if (entry->retired && entry->bytes[POOL_RECYCLED])
            may_go |= RECLAIM_USED;
        break;
    case PICK_ALL:
        if (entry->bytes[POOL_AHEAD])
            may_go |= RECLAIM_AHEAD;
        if (covered)
            may_go |= RECLAIM_USED;
        break;
    }
    return may_go;
}

/* Reclaim from the entries that are picked, oldest first, until `enough` bytes are unmapped.
 * Other threads may queue meanwhile, and take over what is not claimed. */
static vmm_status reclaim_picked(pool_work *work, queue_pick pick, size_t enough) {
    vmm_pool *pool = work->pool;
    vmm_status first = VMM_OK;
    size_t before = work->unmapped_bytes;
    pthread_mutex_lock(&pool->lock);
    for (pool_entry *entry = pool->oldest, *next; entry; entry = next) {
        if (work->unmapped_bytes - before >= enough)
            break;
        int may_go = picked(pool, entry, pick);
        if (!may_go) {
            next = entry->newer;
            continue;
        }
        bool gone = false;
        entry->claimed = true;
        pthread_mutex_unlock(&pool->lock);
        vmm_status status = entry->reclaim(entry, work, may_go, &gone);
        if (status && !first)
            first = status;
        pthread_mutex_lock(&pool->lock);
        next = entry->newer;
        entry->claimed = false;
        if (gone)
            entry->retired = false;
        pool_note_locked(pool, entry);
        if (gone)
            entry->discard(entry);
    }
    pthread_mutex_unlock(&pool->lock);
    return first;
}

/* ---- fences ------------------------------------------------------------------------ */

/* Is something queued that no fence has released? Asked when none is pending. */
static bool needs_fence(vmm_pool *pool) {
    bool needed = false;
    pthread_mutex_lock(&pool->lock);
    for (pool_entry *entry = pool->newest; entry && !needed; entry = entry->older)
        needed =
            entry->epoch >= pool->fences_passed && (entry->bytes[POOL_QUEUED] || entry->retired);
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
    pthread_mutex_lock(&pool->lock);
    pool->fences_passed = pool->fences_recorded;
    for (pool_entry *entry = pool->newest; entry; entry = entry->older)
        if (entry->epoch < pool->fences_passed)
            pool_move_bytes_locked(pool, entry, POOL_QUEUED, POOL_RECYCLED,
                                   entry->bytes[POOL_QUEUED]);
    pthread_mutex_unlock(&pool->lock);
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
 * that gives no answer to that has failed: that, and no capture, is what went wrong. The default
 * stream is asked by the fence itself. */
static vmm_status check_captures(pool_work *work) {
    vmm_pool *pool = work->pool;
    uint64_t capture = pool->device->captures;
    vmm_status status = VMM_OK;
    if (!capture && work->stream != VMM_STREAM_NONE && work->stream != VMM_STREAM_LEGACY)
        status = DRIVER(pool, work->tensor_calls, stream_capture, work->stream, &capture);
    if (!status && capture)
        status = vmm_fail(VMM_ERR_CAPTURING, "fence",
                          "this takes a fence over the device, which is not possible while a "
                          "stream is being captured");
    return status;
}

/* Record a fence, if that may be, and look at it. */
static vmm_status take_fence(pool_work *work, bool wait) {
    vmm_pool *pool = work->pool;
    bool may_wait = wait || !pool->device->ops->fence_waits(pool->device->state);
    pthread_mutex_lock(&pool->device->fence_lock);
    vmm_status status = check_captures(work);
    if (!status && may_wait)
        status = record_fence(work);
    pthread_mutex_unlock(&pool->device->fence_lock);
    return !status && pool->fence ? queue_settle(work, wait) : status;
}

vmm_status queue_fence(pool_work *work, bool wait) {
    vmm_pool *pool = work->pool;
    vmm_status status = VMM_OK;
    if (!pool->device->ops->is_async)
        return VMM_OK;
    work->waited |= wait;
    if (pool->fence)
        status = queue_settle(work, wait);
    if (!status && !pool->fence && needs_fence(pool))
        status = take_fence(work, wait);
    return status;
}

vmm_status pool_wait(vmm_pool *pool, uint64_t *tensor_calls, vmm_stream stream) {
    pool_work work = {.pool = pool, .tensor_calls = tensor_calls, .stream = stream};
    pool_event *event;
    vmm_status status = pool_get_event(pool, &event);
    if (status)
        return status;
    pthread_mutex_lock(&pool->device->fence_lock);
    status = check_captures(&work);
    if (!status)
        status = DRIVER(pool, tensor_calls, fence, event->event);
    pthread_mutex_unlock(&pool->device->fence_lock);
    if (!status)
        status = DRIVER(pool, tensor_calls, event_synchronize, event->event);
    pool_put_event(pool, event);
    return status;
}

/* ---- what comes back, and when ------------------------------------------------------ */

vmm_status queue_reclaim(pool_work *work, bool wait) {
    vmm_status first = queue_fence(work, wait);
    vmm_status status = reclaim_picked(work, PICK_ALL, SIZE_MAX);
    return first ? first : status;
}

void pool_empty_queue(vmm_pool *pool, uint64_t *tensor_calls, vmm_stream stream) {
    pool_work work;
    pool_work_begin(&work, pool, tensor_calls, stream);
    vmm_undo_begin(); /* what is missing is told by whoever asked for it */
    queue_reclaim(&work, true);
    vmm_undo_end();
    pool_work_end(&work);
}

/* What the pool has mapped, or keeps, beyond the most that was ever in use. */
static size_t excess_bytes(const vmm_pool *pool, bool covered_only) {
    size_t idle = pool->bytes[POOL_FREE] + pool->bytes[POOL_RECYCLED] +
                  (covered_only ? 0 : pool->bytes[POOL_QUEUED]);
    return idle > pool->peak_in_use_bytes ? idle - pool->peak_in_use_bytes : 0;
}

void queue_tidy(pool_work *work) {
    vmm_pool *pool = work->pool;
    pthread_mutex_lock(&pool->lock);
    bool ask = excess_bytes(pool, false) > 0;
    for (pool_entry *entry = pool->newest; entry && !ask; entry = entry->older)
        ask = entry->trimmed && !entry->retired && entry->bytes[POOL_QUEUED];
    pthread_mutex_unlock(&pool->lock);
    vmm_undo_begin(); /* nothing to be had is no failure: a new block may do */
    if (ask)
        queue_fence(work, false);
    reclaim_picked(work, PICK_GIVEN_UP, SIZE_MAX);
    pthread_mutex_lock(&pool->lock);
    size_t excess = pool->device->ops->is_async ? excess_bytes(pool, true) : 0;
    size_t recycled = pool->bytes[POOL_RECYCLED];
    pthread_mutex_unlock(&pool->lock);
    if (excess && recycled)
        reclaim_picked(work, PICK_RETIRED, excess);
    vmm_undo_end();
}

void queue_give_ahead(pool_work *work) {
    vmm_undo_begin();
    reclaim_picked(work, PICK_AHEAD, SIZE_MAX);
    vmm_undo_end();
}

vmm_status queue_give_up(pool_work *work, size_t enough) {
    static const queue_pick picks[] = {PICK_AHEAD, PICK_RETIRED, PICK_ALL};
    vmm_status first = VMM_OK;
    size_t before = work->unmapped_bytes, done = 0;
    for (size_t i = 0; i < sizeof picks / sizeof picks[0] && done < enough; i++) {
        vmm_status status = reclaim_picked(work, picks[i], enough - done);
        if (status && !first)
            first = status;
        done = work->unmapped_bytes - before;
    }
    return first;
}

void queue_return_addresses(pool_work *work) {
    vmm_undo_begin();
    queue_fence(work, false);
    reclaim_picked(work, PICK_ADDRESSES, SIZE_MAX);
    vmm_undo_end();
}

void queue_retry_parked(pool_work *work) {
    vmm_pool *pool = work->pool;
    pthread_mutex_lock(&pool->lock);
    bool retry = pool->bytes[POOL_PARKED] > 0;
    pthread_mutex_unlock(&pool->lock);
    if (!retry)
        return;
    vmm_undo_begin(); /* a retry that fails is no failure of the call that tried */
    pool_block *block = pool->parked_blocks;
    pool->parked_blocks = NULL;
    while (block) {
        pool_block *next = block->next;
        pool_move_bytes(pool, NULL, POOL_PARKED, POOL_NOWHERE, block->bytes);
        pool_release_block(work, block);
        block = next;
    }
    reclaim_picked(work, PICK_PARKED, SIZE_MAX);
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
        pool_work work = {.pool = pool, .stream = VMM_STREAM_NONE};
        __atomic_store_n(&pool->has_news, false, __ATOMIC_RELEASE);
        vmm_undo_begin();
        reclaim_picked(&work, PICK_GIVEN_UP, SIZE_MAX);
        vmm_undo_end();
        pthread_mutex_unlock(&pool->work);
    }
}

/* ---- taking over ---------------------------------------------------------------------- */

/* How far back a new tensor looks for one that it can take over. */
#define TAKE_OVER_DEPTH 256

/* The newest that fits, with memory that the first `fences` fences cover; without memory
 * (`bare`) none is needed. Under lock. */
static pool_entry *find_retired(const vmm_pool *pool,
                                bool (*fits)(const pool_entry *, const void *), const void *key,
                                uint64_t fences, bool bare) {
    int depth = TAKE_OVER_DEPTH;
    for (pool_entry *entry = pool->newest; entry && depth-- > 0; entry = entry->older)
        if (entry->retired && !entry->claimed && entry->bare == bare &&
            (bare || entry->epoch < fences) && fits(entry, key))
            return entry;
    return NULL;
}

/* Under lock. */
static pool_entry *take_over(vmm_pool *pool, pool_entry *entry) {
    entry->retired = entry->trimmed = false;
    pool_note_locked(pool, entry);
    pool_range_added_locked(pool, entry);
    return entry;
}

/* One fence or one look at a pending one, if that can make something of the kind usable. */
static void look_for_fence(pool_work *work, bool (*fits)(const pool_entry *, const void *),
                           const void *key) {
    vmm_pool *pool = work->pool;
    vmm_undo_begin(); /* there is fresh address space */
    if (pool->fence) {
        pthread_mutex_lock(&pool->lock);
        bool useful = find_retired(pool, fits, key, pool->fences_recorded, false);
        pthread_mutex_unlock(&pool->lock);
        if (useful)
            queue_settle(work, false);
    } else {
        take_fence(work, false);
    }
    vmm_undo_end();
}

pool_entry *pool_take_over(vmm_pool *pool, uint64_t *tensor_calls, vmm_stream stream,
                           bool (*fits)(const pool_entry *, const void *), const void *key) {
    if (!pool->device->ops->is_async || !pool_has_queue(pool))
        return NULL;
    pthread_mutex_lock(&pool->lock);
    pool_entry *entry = find_retired(pool, fits, key, pool->fences_passed, false);
    if (!entry && find_retired(pool, fits, key, UINT64_MAX, false)) {
        pthread_mutex_unlock(&pool->lock);
        pool_work work;
        pool_work_begin(&work, pool, tensor_calls, stream);
        look_for_fence(&work, fits, key);
        pool_work_end(&work);
        pthread_mutex_lock(&pool->lock);
        entry = find_retired(pool, fits, key, pool->fences_passed, false);
    }
    if (!entry)
        entry = find_retired(pool, fits, key, 0, true);
    if (entry)
        take_over(pool, entry);
    pthread_mutex_unlock(&pool->lock);
    return entry;
}

/* ---- abandoned pools -------------------------------------------------------------------- */

void queue_sweep_abandoned(vmm_device *device, vmm_stream stream, bool wait) {
    vmm_pool *pool = vmm_device_take_abandoned(device);
    vmm_undo_begin();
    while (pool) {
        vmm_pool *next = pool->next_abandoned;
        lookahead_reap(pool);
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
