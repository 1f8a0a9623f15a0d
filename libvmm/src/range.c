/* range.c - mapping by watermark, in changes that can be undone. */
#include "range.h"

#include <stdlib.h>

#include "error.h"

static size_t smallest_block(const range *range) {
    return range->block_bytes == VMM_BLOCK_AUTO ? range->pool->device->granularity_bytes
                                                : range->block_bytes;
}

/* The size of the block that begins `offset` bytes into a lane.
 *
 * Under "auto" the largest power-of-two multiple of the granularity g that is at most
 * offset / 8 + g, divides the offset, and fits the lane. The size depends on the place only,
 * so wherever a lane is cut, by growth or by truncation and trim, its last block exceeds
 * the cut by at most an eighth of what lies before it plus g: the bound on slack holds
 * without looking ahead, with about eight blocks for each doubling. Dividing the offset
 * keeps large blocks aligned to their size, which large pages like. */
static size_t block_size_at(const range *range, size_t offset) {
    if (range->block_bytes != VMM_BLOCK_AUTO)
        return range->block_bytes;
    size_t granularity = range->pool->device->granularity_bytes;
    size_t size = granularity;
    while (size * 2 <= offset / 8 + granularity && offset % (size * 2) == 0 &&
           size * 2 <= range->lane_bytes - offset)
        size *= 2;
    return size;
}

static uintptr_t lane_base(const range *range, size_t lane) {
    return range->base + lane * range->lane_bytes;
}

/* ---- giving back ------------------------------------------------------------- */

/* Unmap the lane's last block and give it to the pool. A block that the driver refuses to
 * unmap is parked where it is. */
static vmm_status unmap_last(range *range, size_t lane_index, pool_work *work, bool release) {
    vmm_pool *pool = range->pool;
    range_lane *lane = &range->lanes[lane_index];
    pool_block *block = lane->blocks[lane->n_blocks - 1];
    uintptr_t address = lane_base(range, lane_index) + lane->total_bytes - block->bytes;
    vmm_status status = DRIVER(pool, work->tensor_calls, unmap, address, block->bytes);
    pthread_mutex_lock(&pool->lock);
    size_t *counter = block->parked ? &pool->parked_bytes : &pool->queued_bytes;
    size_t *share = block->parked ? &range->entry.parked_bytes : &range->entry.queued_bytes;
    *counter -= block->bytes;
    *share -= block->bytes;
    if (status) {
        block->parked = true;
        pool->parked_bytes += block->bytes;
        range->entry.parked_bytes += block->bytes;
    }
    pthread_mutex_unlock(&pool->lock);
    if (status)
        return status;
    block->parked = false;
    lane->total_bytes -= block->bytes;
    lane->n_blocks--;
    pool_give_block(work, block, release);
    return VMM_OK;
}

static vmm_status reclaim_range(pool_entry *entry, pool_work *work, bool fenced, bool retired,
                                bool *gone) {
    range *range = (struct range *)entry;
    vmm_pool *pool = range->pool;
    vmm_status first = VMM_OK;
    for (size_t i = 0; i < range->n_lanes; i++) {
        range_lane *lane = &range->lanes[i];
        size_t keep = retired ? 0 : lane->n_live;
        vmm_status status = VMM_OK;
        while (!status && lane->n_blocks > keep &&
               (fenced || lane->blocks[lane->n_blocks - 1]->parked))
            status = unmap_last(range, i, work, false);
        if (status && !first)
            first = status;
    }
    if (!fenced || !retired || first)
        return first;
    first = DRIVER(pool, work->tensor_calls, free, range->base, range->bytes);
    if (first)
        return first; /* stays queued, and is tried again */
    for (size_t i = 0; i < range->n_lanes; i++)
        free(range->lanes[i].blocks);
    free(range);
    *gone = true;
    return VMM_OK;
}

/* Count live blocks of a lane as stale, down to the first `n_live`. */
static void make_stale(range *range, range_lane *lane, size_t n_live) {
    vmm_pool *pool = range->pool;
    size_t bytes = 0, n_blocks = lane->n_live - n_live;
    while (lane->n_live > n_live)
        bytes += lane->blocks[--lane->n_live]->bytes;
    if (bytes == 0)
        return;
    lane->live_bytes -= bytes;
    pthread_mutex_lock(&pool->lock);
    range->in_use_bytes -= bytes;
    range->n_live_blocks -= n_blocks;
    pool->in_use_bytes -= bytes;
    pool->queued_bytes += bytes;
    range->entry.queued_bytes += bytes;
    pool_enqueue_locked(pool, &range->entry);
    pthread_mutex_unlock(&pool->lock);
}

/* ---- creating and retiring ---------------------------------------------------- */

vmm_status range_create(vmm_pool *pool, size_t n_lanes, size_t lane_bytes, size_t block_bytes,
                        uint64_t *tensor_calls, range **out) {
    size_t unit = block_bytes == VMM_BLOCK_AUTO ? pool->device->granularity_bytes : block_bytes;
    size_t rounded, bytes, header;
    if (__builtin_add_overflow(lane_bytes, unit - 1, &rounded) ||
        __builtin_mul_overflow(rounded / unit * unit, n_lanes, &bytes) || bytes > PTRDIFF_MAX ||
        __builtin_mul_overflow(n_lanes, sizeof(range_lane), &header) ||
        header > PTRDIFF_MAX - sizeof(range))
        return vmm_fail(VMM_ERR_OVERFLOW, "reserve",
                        "%zu lane(s) of %zu bytes do not fit the address space", n_lanes,
                        lane_bytes);
    range *range = calloc(1, sizeof *range + header);
    if (!range)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "reserve", "no host memory left");
    range->entry.reclaim = reclaim_range;
    range->pool = pool;
    range->n_lanes = n_lanes;
    range->lane_bytes = rounded / unit * unit;
    range->block_bytes = block_bytes;
    range->bytes = bytes;
    vmm_status status = pool_reserve(pool, tensor_calls, bytes, &range->base);
    if (status) {
        free(range);
        return status;
    }
    pool_range_added(pool);
    *out = range;
    return VMM_OK;
}

void range_retire(range *range) {
    vmm_pool *pool = range->pool;
    pthread_mutex_lock(&pool->lock);
    size_t bytes = range->in_use_bytes;
    range->in_use_bytes = 0;
    pool->in_use_bytes -= bytes;
    pool->queued_bytes += bytes;
    range->entry.queued_bytes += bytes;
    range->entry.retired = true;
    pool_enqueue_locked(pool, &range->entry);
    pthread_mutex_unlock(&pool->lock);
    /* From here on another thread may free the range; the pool stays until it is told. */
    pool_drain(pool);
    pool_range_gone(pool);
}

/* ---- changes -------------------------------------------------------------------- */

static vmm_status make_room(range_lane *lane) {
    if (lane->n_blocks < lane->room)
        return VMM_OK;
    size_t room = lane->room ? lane->room * 2 : 4;
    pool_block **blocks = realloc(lane->blocks, room * sizeof *blocks);
    if (!blocks)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "map", "no host memory left");
    lane->blocks = blocks;
    lane->room = room;
    return VMM_OK;
}

/* Take the lane's first stale block back into use. */
static void revive(range *range, range_lane *lane) {
    vmm_pool *pool = range->pool;
    pool_block *block = lane->blocks[lane->n_live];
    pthread_mutex_lock(&pool->lock);
    *(block->parked ? &pool->parked_bytes : &pool->queued_bytes) -= block->bytes;
    *(block->parked ? &range->entry.parked_bytes : &range->entry.queued_bytes) -= block->bytes;
    pool->in_use_bytes += block->bytes;
    range->in_use_bytes += block->bytes;
    range->n_live_blocks++;
    pthread_mutex_unlock(&pool->lock);
    block->parked = false;
    lane->n_live++;
    lane->live_bytes += block->bytes;
}

/* Map one more block at the lane's end. It has no access yet. */
static vmm_status map_next(range_change *change, range *range, size_t lane_index, bool wait) {
    vmm_pool *pool = range->pool;
    range_lane *lane = &range->lanes[lane_index];
    pool_block *block;
    vmm_status status = make_room(lane);
    if (status)
        return status;
    status = pool_take_block(change->work, block_size_at(range, lane->total_bytes),
                             smallest_block(range), wait, &block);
    if (status)
        return status;
    uintptr_t address = lane_base(range, lane_index) + lane->total_bytes;
    status = DRIVER(pool, change->work->tensor_calls, map, address, block->bytes, block->handle);
    if (status) {
        vmm_undo_begin();
        pool_move_bytes(pool, &pool->in_use_bytes, NULL, block->bytes);
        pool_give_block(change->work, block, block->fresh);
        vmm_undo_end();
        return status;
    }
    lane->blocks[lane->n_blocks++] = block;
    lane->n_live++;
    lane->live_bytes += block->bytes;
    lane->total_bytes += block->bytes;
    pthread_mutex_lock(&pool->lock);
    range->in_use_bytes += block->bytes;
    range->n_live_blocks++;
    pthread_mutex_unlock(&pool->lock);
    return VMM_OK;
}

/* Open the live blocks of a lane from `open_from` on, a block's begin. */
static vmm_status set_access(range *range, size_t lane_index, size_t open_from, pool_work *work) {
    const range_lane *lane = &range->lanes[lane_index];
    uintptr_t base = lane_base(range, lane_index);
    if (!range->pool->device->ops->access_by_block)
        return DRIVER(range->pool, work->tensor_calls, set_access, base + open_from,
                      lane->live_bytes - open_from);
    vmm_status status = VMM_OK;
    size_t end = lane->live_bytes;
    for (size_t i = lane->n_live; i-- > 0 && end > open_from && !status;) {
        end -= lane->blocks[i]->bytes;
        status =
            DRIVER(range->pool, work->tensor_calls, set_access, base + end, lane->blocks[i]->bytes);
    }
    return status;
}

static vmm_status extend_lane(range_change *change, range *range, size_t lane_index, size_t bytes,
                              bool wait) {
    range_lane *lane = &range->lanes[lane_index];
    size_t open_from = lane->live_bytes;
    if (change->n_marks == change->room) {
        size_t room = change->room ? change->room * 2 : 16;
        range_mark *marks = realloc(change->marks, room * sizeof *marks);
        if (!marks)
            return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "map", "no host memory left");
        change->marks = marks;
        change->room = room;
    }
    change->marks[change->n_marks++] =
        (range_mark){range, lane_index, lane->n_live, lane->n_blocks};
    while (lane->live_bytes < bytes) {
        vmm_status status = VMM_OK;
        if (lane->n_live < lane->n_blocks)
            revive(range, lane);
        else
            status = map_next(change, range, lane_index, wait);
        if (status)
            return status;
    }
    /* Revived blocks may be the remains of an undo, which have none. */
    return set_access(range, lane_index, open_from, change->work);
}

vmm_status range_extend(range_change *change, range *range, size_t lane_bytes, bool wait) {
    for (size_t i = 0; i < range->n_lanes; i++) {
        if (range->lanes[i].live_bytes >= lane_bytes)
            continue; /* unreached: lanes that differ, by blocks of halved sizes */
        vmm_status status = extend_lane(change, range, i, lane_bytes, wait);
        if (status)
            return status;
    }
    return VMM_OK;
}

void range_commit(range_change *change) {
    free(change->marks);
    change->marks = NULL;
    change->n_marks = change->room = 0;
}

void range_undo(range_change *change, bool touched) {
    vmm_undo_begin();
    while (change->n_marks > 0) {
        range_mark *mark = &change->marks[--change->n_marks];
        range *range = mark->range;
        range_lane *lane = &range->lanes[mark->lane];
        make_stale(range, lane, mark->n_live);
        if (touched)
            continue;
        /* No work of the device has seen what this change mapped, so no fence is needed. A
         * block that cannot be unmapped keeps those before it mapped, too: all are parked. */
        vmm_status status = VMM_OK;
        while (!status && lane->n_blocks > mark->n_blocks)
            status = unmap_last(range, mark->lane, change->work,
                                lane->blocks[lane->n_blocks - 1]->fresh);
        for (size_t i = mark->n_blocks; i < lane->n_blocks; i++) {
            pool_block *block = lane->blocks[i];
            if (block->parked)
                continue;
            block->parked = true;
            pool_move_bytes(range->pool, &range->pool->queued_bytes, &range->pool->parked_bytes,
                            block->bytes);
            pool_move_bytes(range->pool, &range->entry.queued_bytes, &range->entry.parked_bytes,
                            block->bytes);
        }
    }
    vmm_undo_end();
    range_commit(change);
}

void range_trim(range *range, size_t lane_bytes) {
    for (size_t i = 0; i < range->n_lanes; i++) {
        range_lane *lane = &range->lanes[i];
        size_t n_live = lane->n_live, kept = lane->live_bytes;
        while (n_live > 0 && kept - lane->blocks[n_live - 1]->bytes >= lane_bytes)
            kept -= lane->blocks[--n_live]->bytes;
        make_stale(range, lane, n_live);
    }
}

size_t range_live_bytes(const range *range) {
    size_t least = SIZE_MAX;
    for (size_t i = 0; i < range->n_lanes; i++)
        if (range->lanes[i].live_bytes < least)
            least = range->lanes[i].live_bytes;
    return least;
}

size_t range_least_bytes(const range *range) {
    return smallest_block(range) * range->n_lanes;
}

size_t range_missing_bytes(const range *range, size_t lane_bytes) {
    size_t unit = smallest_block(range), missing = 0;
    for (size_t i = 0; i < range->n_lanes; i++)
        if (range->lanes[i].live_bytes < lane_bytes)
            missing += (lane_bytes - range->lanes[i].live_bytes + unit - 1) / unit * unit;
    return missing;
}

void range_count(range *range, size_t *bytes, size_t *blocks) {
    pthread_mutex_lock(&range->pool->lock);
    *bytes = range->in_use_bytes;
    *blocks = range->n_live_blocks;
    pthread_mutex_unlock(&range->pool->lock);
}
