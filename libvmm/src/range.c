/* range.c - mapping by watermark, in changes that can be undone. */
#include "range.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "lookahead.h"

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

/* The same, but no more than `bytes` need in smallest blocks. Smaller than what the place allows is
 * always right: the bound on slack holds. */
static size_t fitting_size(const range *range, size_t offset, size_t bytes) {
    size_t size = block_size_at(range, offset), smallest = smallest_block(range);
    while (size > smallest && size > bytes && size - bytes >= smallest)
        size /= 2;
    return size;
}

static uintptr_t lane_base(const range *range, size_t lane) {
    return range->base + lane * range->lane_bytes;
}

/* ---- spare blocks --------------------------------------------------------------- */

/* Where the bytes of a spare block are counted. Under lock. */
static pool_state spare_state(const range *range, const pool_block *block) {
    switch (block->past) {
    case BLOCK_UNTOUCHED: return POOL_AHEAD;
    case BLOCK_PARKED: return POOL_PARKED;
    default: return pool_used_state(range->pool, &range->entry);
    }
}

static void move_bytes(range *range, pool_state from, pool_state to, size_t bytes) {
    pool_move_bytes_locked(range->pool, &range->entry, from, to, bytes);
}

/* Change what has become of a spare block. Under lock. */
static void set_past(range *range, pool_block *block, block_past past) {
    pool_state before = spare_state(range, block);
    block->past = past;
    move_bytes(range, before, spare_state(range, block), block->bytes);
}

/* Take the lane's first spare block into use. Under lock. */
static void revive(range *range, range_lane *lane) {
    pool_block *block = lane->blocks[lane->n_live++];
    move_bytes(range, spare_state(range, block), POOL_IN_USE, block->bytes);
    lane->live_bytes += block->bytes;
    range->n_live_blocks++;
    if (!range->entry.bytes[POOL_QUEUED] && !range->entry.bytes[POOL_RECYCLED])
        range->entry.trimmed = false;
}

/* Take live blocks of a lane out of use, down to the first `n_live`; their pasts tell what they
 * become. Under lock. */
static void make_spare(range *range, range_lane *lane, size_t n_live) {
    while (lane->n_live > n_live) {
        pool_block *block = lane->blocks[--lane->n_live];
        move_bytes(range, POOL_IN_USE, spare_state(range, block), block->bytes);
        lane->live_bytes -= block->bytes;
        range->n_live_blocks--;
    }
}

/* What was mapped ahead of growth counts as used from now on: the tensor has no more use for it,
 * and another may. Under lock. */
static void give_ahead(range *range) {
    for (size_t i = 0; i < range->n_lanes && range->entry.bytes[POOL_AHEAD]; i++) {
        range_lane *lane = &range->lanes[i];
        for (size_t k = lane->n_live; k < lane->n_blocks; k++)
            if (lane->blocks[k]->past == BLOCK_UNTOUCHED)
                set_past(range, lane->blocks[k], BLOCK_USED);
    }
}

/* ---- giving back ------------------------------------------------------------- */

/* The lane's last block, taken off so that growth cannot take it into use, if it may go. Its
 * bytes stay counted where they are. Under lock. */
static pool_block *claim_last(range *range, range_lane *lane, int may_go) {
    size_t keep = range->entry.retired ? 0 : lane->n_live;
    if (lane->n_blocks <= keep)
        return NULL;
    pool_block *block = lane->blocks[lane->n_blocks - 1];
    bool may = block->past == BLOCK_PARKED ? true
               : block->past == BLOCK_UNTOUCHED
                   ? may_go & RECLAIM_AHEAD
                   : may_go & RECLAIM_USED && pool_is_covered(range->pool, &range->entry);
    if (!may)
        return NULL;
    lane->n_blocks--;
    lane->total_bytes -= block->bytes;
    if (lane->open_bytes > lane->total_bytes)
        lane->open_bytes = lane->total_bytes;
    return block;
}

/* Unmap a lane's last block, if it may go, and give it to the pool. A block that the driver
 * refuses to unmap is parked where it is. `done`: there was one, and it has gone. */
static vmm_status unmap_last(range *range, size_t lane_index, pool_work *work, int may_go,
                             bool release, bool *done) {
    vmm_pool *pool = range->pool;
    range_lane *lane = &range->lanes[lane_index];
    *done = false;
    pthread_mutex_lock(&pool->lock);
    pool_block *block = claim_last(range, lane, may_go);
    pthread_mutex_unlock(&pool->lock);
    if (!block)
        return VMM_OK;
    uintptr_t address = lane_base(range, lane_index) + lane->total_bytes;
    vmm_status status = DRIVER(pool, work->tensor_calls, unmap, address, block->bytes);
    pthread_mutex_lock(&pool->lock);
    if (status) {
        set_past(range, block, BLOCK_PARKED);
        lane->n_blocks++;
        lane->total_bytes += block->bytes;
    } else {
        move_bytes(range, spare_state(range, block), POOL_NOWHERE, block->bytes);
    }
    pthread_mutex_unlock(&pool->lock);
    if (status)
        return status;
    work->unmapped_bytes += block->bytes;
    *done = true;
    pool_give_block(work, block, release && block->fresh);
    return VMM_OK;
}

/* The pool lets go of a range: no block is left, and nobody can take it over any more. */
static bool is_finished(range *range, int may_go) {
    bool finished = range->entry.retired && may_go & RECLAIM_USED;
    pthread_mutex_lock(&range->pool->lock);
    finished = finished && pool_is_covered(range->pool, &range->entry);
    for (size_t i = 0; i < range->n_lanes && finished; i++)
        finished = range->lanes[i].n_blocks == 0;
    pthread_mutex_unlock(&range->pool->lock);
    return finished;
}

static vmm_status reclaim_range(pool_entry *entry, pool_work *work, int may_go, bool *gone) {
    range *range = (struct range *)entry;
    vmm_status first = VMM_OK;
    for (size_t i = 0; i < range->n_lanes; i++) {
        bool more = true;
        while (more) {
            vmm_status status = unmap_last(range, i, work, may_go, false, &more);
            if (status && !first)
                first = status;
        }
    }
    if (first || !is_finished(range, may_go))
        return first;
    first = DRIVER(range->pool, work->tensor_calls, free, range->base, range->bytes);
    *gone = !first; /* else it stays queued, and is tried again */
    return first;
}

static void discard_range(pool_entry *entry) {
    range *range = (struct range *)entry;
    for (size_t i = 0; i < range->n_lanes; i++)
        free(range->lanes[i].blocks);
    free(range);
}

/* ---- creating and retiring ---------------------------------------------------- */

/* Would the one do where the other, which is not reserved yet, is asked for? */
static bool has_geometry(const pool_entry *entry, const void *key) {
    const range *a = (const range *)entry, *b = key;
    return entry->reclaim == reclaim_range && a->n_lanes == b->n_lanes &&
           a->lane_bytes == b->lane_bytes && a->block_bytes == b->block_bytes;
}

/* All blocks of a range that has been taken over are spare. */
static void begin_anew(range *range) {
    pthread_mutex_lock(&range->pool->lock);
    range->n_live_blocks = 0;
    range->growth = (range_growth){0};
    for (size_t i = 0; i < range->n_lanes; i++)
        range->lanes[i].n_live = range->lanes[i].live_bytes = 0;
    pthread_mutex_unlock(&range->pool->lock);
}

vmm_status range_create(vmm_pool *pool, size_t n_lanes, size_t lane_bytes, size_t block_bytes,
                        uint64_t *tensor_calls, vmm_stream stream, range **out) {
    size_t unit = block_bytes == VMM_BLOCK_AUTO ? pool->device->granularity_bytes : block_bytes;
    size_t rounded, bytes, header;
    if (__builtin_add_overflow(lane_bytes, unit - 1, &rounded) ||
        __builtin_mul_overflow(rounded / unit * unit, n_lanes, &bytes) || bytes > PTRDIFF_MAX ||
        __builtin_mul_overflow(n_lanes, sizeof(range_lane), &header) ||
        header > PTRDIFF_MAX - sizeof(range))
        return vmm_fail(VMM_ERR_OVERFLOW, "reserve",
                        "%zu lane(s) of %zu bytes do not fit the address space", n_lanes,
                        lane_bytes);
    const range wanted = {
        .n_lanes = n_lanes, .lane_bytes = rounded / unit * unit, .block_bytes = block_bytes};
    range *range =
        (struct range *)pool_take_over(pool, tensor_calls, stream, has_geometry, &wanted);
    if (range) {
        begin_anew(range);
        *out = range;
        return VMM_OK;
    }
    range = calloc(1, sizeof *range + header);
    if (!range)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "reserve", "no host memory left");
    range->entry.reclaim = reclaim_range;
    range->entry.discard = discard_range;
    range->pool = pool;
    range->n_lanes = n_lanes;
    range->lane_bytes = wanted.lane_bytes;
    range->block_bytes = block_bytes;
    range->bytes = bytes;
    vmm_status status = pool_reserve(pool, tensor_calls, bytes, stream, &range->base);
    if (status) {
        free(range);
        return status;
    }
    pool_range_added(pool, &range->entry);
    *out = range;
    return VMM_OK;
}

void range_retire(range *range) {
    vmm_pool *pool = range->pool;
    pthread_mutex_lock(&pool->lock);
    pool_range_retired_locked(pool, &range->entry);
    give_ahead(range);
    range->entry.retired = true;
    pool_enqueue_locked(pool, &range->entry);
    move_bytes(range, POOL_IN_USE, POOL_QUEUED, range->entry.bytes[POOL_IN_USE]);
    pool_note_locked(pool, &range->entry);
    pthread_mutex_unlock(&pool->lock);
    /* From here on another thread may free the range; the pool stays until it is told. */
    pool_drain(pool);
    pool_range_gone(pool);
}

/* ---- changes -------------------------------------------------------------------- */

static vmm_status add_mark(range_change *change, range_mark mark) {
    if (change->n_marks == change->room) {
        size_t room = change->room ? change->room * 2 : 16;
        range_mark *marks = realloc(change->marks, room * sizeof *marks);
        if (!marks)
            return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "map", "no host memory left");
        change->marks = marks;
        change->room = room;
    }
    change->marks[change->n_marks++] = mark;
    return VMM_OK;
}

/* Take the lane's first spare block into use, of the `bytes` that it shall have. Under lock. */
static void revive_for(range_change *change, range_lane *lane, size_t bytes) {
    range *range = change->range;
    revive(range, lane);
    change->beyond |= lane->live_bytes > bytes && lane->live_bytes - bytes >= smallest_block(range);
}

/* Take spare blocks that have access into use, as far as they go; `done`: every lane has what it
 * needs. Without work. */
static vmm_status revive_open(range_change *change, size_t lane_bytes, bool *done) {
    range *range = change->range;
    for (size_t i = 0; i < range->n_lanes; i++) {
        vmm_status status = add_mark(change, (range_mark){i, range->lanes[i].n_live, SIZE_MAX});
        if (status)
            return status;
    }
    *done = true;
    pthread_mutex_lock(&range->pool->lock);
    for (size_t i = 0; i < range->n_lanes; i++) {
        range_lane *lane = &range->lanes[i];
        while (lane->live_bytes < lane_bytes && lane->n_live < lane->n_blocks &&
               lane->live_bytes < lane->open_bytes)
            revive_for(change, lane, lane_bytes);
        *done &= lane->live_bytes >= lane_bytes;
    }
    pool_note_locked(range->pool, &range->entry);
    pthread_mutex_unlock(&range->pool->lock);
    return VMM_OK;
}

static vmm_status make_room(range *range, range_lane *lane) {
    if (lane->n_blocks < lane->room)
        return VMM_OK;
    size_t room = lane->room ? lane->room * 2 : 4;
    pool_block **blocks = malloc(room * sizeof *blocks), **old = lane->blocks;
    if (!blocks)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "map", "no host memory left");
    if (old)
        memcpy(blocks, old, lane->n_blocks * sizeof *blocks);
    pthread_mutex_lock(&range->pool->lock);
    lane->blocks = blocks;
    lane->room = room;
    pthread_mutex_unlock(&range->pool->lock);
    free(old);
    return VMM_OK;
}

/* Map a block at the lane's end, behind all others, where it is counted as in use (and is live) or
 * as ahead. It has no access yet. When it cannot be, the pool has it back. Under work. */
static vmm_status map_block(range *range, size_t lane_index, pool_block *block, pool_state as,
                            pool_work *work) {
    vmm_pool *pool = range->pool;
    range_lane *lane = &range->lanes[lane_index];
    uintptr_t address = lane_base(range, lane_index) + lane->total_bytes;
    vmm_status status = DRIVER(pool, work->tensor_calls, map, address, block->bytes, block->handle);
    if (status) {
        vmm_undo_begin();
        pool_move_bytes(pool, NULL, as, POOL_NOWHERE, block->bytes);
        pool_give_block(work, block, block->fresh);
        vmm_undo_end();
        return status;
    }
    pthread_mutex_lock(&pool->lock);
    block->past = BLOCK_UNTOUCHED;
    lane->blocks[lane->n_blocks++] = block;
    lane->total_bytes += block->bytes;
    range->entry.bytes[as] += block->bytes;
    if (as == POOL_IN_USE) {
        lane->n_live++;
        lane->live_bytes += block->bytes;
        range->n_live_blocks++;
    } else if (range->entry.retired) {
        set_past(range, block, BLOCK_USED); /* meanwhile; then it is like the others */
    }
    pool_note_locked(pool, &range->entry);
    pthread_mutex_unlock(&pool->lock);
    return VMM_OK;
}

/* Map one more block, in use, of the `bytes` that the lane still needs. Under work. */
static vmm_status map_next(range_change *change, size_t lane_index, size_t bytes, pool_work *work) {
    pool_block *block;
    range *range = change->range;
    range_lane *lane = &range->lanes[lane_index];
    size_t fitting = fitting_size(range, lane->total_bytes, bytes);
    size_t size = change->fit ? fitting : block_size_at(range, lane->total_bytes);
    vmm_status status = make_room(range, lane);
    if (!status)
        status = pool_take_block(work, size, fitting, smallest_block(range), &block);
    if (status)
        return status;
    change->beyond |= block->bytes > fitting;
    return map_block(range, lane_index, block, POOL_IN_USE, work);
}

/* Open a lane's blocks as far as `end`, the end of one. Under work. */
static vmm_status set_access(range *range, size_t lane_index, size_t end, pool_work *work) {
    vmm_pool *pool = range->pool;
    range_lane *lane = &range->lanes[lane_index];
    uintptr_t base = lane_base(range, lane_index);
    vmm_status status = VMM_OK;
    size_t open = lane->open_bytes;
    if (open >= end)
        return VMM_OK;
    if (!pool->device->ops->access_by_block) {
        status = DRIVER(pool, work->tensor_calls, set_access, base + open, end - open);
    } else {
        size_t place = lane->total_bytes;
        for (size_t i = lane->n_blocks; i-- > 0 && place > open && !status;) {
            place -= lane->blocks[i]->bytes;
            if (place < end)
                status = DRIVER(pool, work->tensor_calls, set_access, base + place,
                                lane->blocks[i]->bytes);
        }
    }
    if (status)
        return status;
    pthread_mutex_lock(&pool->lock);
    lane->open_bytes = end;
    pthread_mutex_unlock(&pool->lock);
    return VMM_OK;
}

/* Under work. */
static vmm_status extend_lane(range_change *change, size_t lane_index, size_t bytes,
                              pool_work *work) {
    range *range = change->range;
    vmm_pool *pool = range->pool;
    range_lane *lane = &range->lanes[lane_index];
    vmm_status status = add_mark(change, (range_mark){lane_index, lane->n_live, lane->n_blocks});
    pthread_mutex_lock(&pool->lock);
    while (!status && lane->live_bytes < bytes && lane->n_live < lane->n_blocks)
        revive_for(change, lane, bytes);
    pthread_mutex_unlock(&pool->lock);
    while (!status && lane->live_bytes < bytes)
        status = map_next(change, lane_index, bytes - lane->live_bytes, work);
    return status ? status : set_access(range, lane_index, lane->live_bytes, work);
}

size_t range_next_block_bytes(const range *range, size_t lane) {
    size_t total = range->lanes[lane].total_bytes;
    return total < range->lane_bytes ? block_size_at(range, total) : 0;
}

vmm_status range_map_ahead(range *range, size_t lane_index, pool_work *work) {
    pool_block *block;
    range_lane *lane = &range->lanes[lane_index];
    vmm_status status = make_room(range, lane);
    if (!status)
        status = pool_take_block_ahead(work, block_size_at(range, lane->total_bytes), &block);
    if (!status)
        status = map_block(range, lane_index, block, POOL_AHEAD, work);
    if (status)
        return status;
    status = set_access(range, lane_index, lane->total_bytes, work);
    if (status) {
        bool done;
        unmap_last(range, lane_index, work, RECLAIM_AHEAD, true, &done);
    }
    return status;
}

bool range_release_ahead(range *range, pool_work *work) {
    bool done = false;
    for (size_t i = 0; i < range->n_lanes && !done; i++)
        unmap_last(range, i, work, RECLAIM_AHEAD, false, &done);
    pthread_mutex_lock(&range->pool->lock);
    pool_note_locked(range->pool, &range->entry);
    pthread_mutex_unlock(&range->pool->lock);
    return done;
}

static void end_change(range_change *change) {
    free(change->marks);
    change->marks = NULL;
    change->n_marks = change->room = 0;
}

void range_commit(range_change *change) {
    if (change->n_marks == 0)
        return;
    range *range = change->range;
    pthread_mutex_lock(&range->pool->lock);
    for (size_t k = 0; k < change->n_marks; k++) {
        const range_lane *lane = &range->lanes[change->marks[k].lane];
        for (size_t i = change->marks[k].n_live; i < lane->n_live; i++)
            lane->blocks[i]->past = BLOCK_USED;
    }
    lookahead_wake_locked(range->pool);
    pthread_mutex_unlock(&range->pool->lock);
    end_change(change);
}

/* Put back what a mark tells. Under lock. */
static void put_back(range *range, const range_mark *mark, bool touched) {
    range_lane *lane = &range->lanes[mark->lane];
    if (touched && lane->n_live > mark->n_live) {
        for (size_t i = mark->n_live; i < lane->n_live; i++)
            lane->blocks[i]->past = BLOCK_USED;
        pool_enqueue_locked(range->pool, &range->entry);
        range->entry.trimmed = true;
    }
    make_spare(range, lane, mark->n_live);
    pool_note_locked(range->pool, &range->entry);
}

/* No work of the device has seen what a change has mapped, so no fence is needed. A block that
 * cannot be unmapped keeps those before it mapped, too: all are parked. Under work. */
static void unmap_new(range *range, const range_mark *mark, pool_work *work) {
    range_lane *lane = &range->lanes[mark->lane];
    bool more = true;
    while (more && lane->n_blocks > mark->n_blocks)
        unmap_last(range, mark->lane, work, RECLAIM_AHEAD, true, &more);
    pthread_mutex_lock(&range->pool->lock);
    for (size_t i = mark->n_blocks; i < lane->n_blocks; i++)
        set_past(range, lane->blocks[i], BLOCK_PARKED);
    pool_note_locked(range->pool, &range->entry);
    pthread_mutex_unlock(&range->pool->lock);
}

/* `work` NULL where the change has mapped nothing. */
static void undo(range_change *change, bool touched, pool_work *work) {
    vmm_undo_begin();
    while (change->n_marks > 0) {
        const range_mark *mark = &change->marks[--change->n_marks];
        pthread_mutex_lock(&change->range->pool->lock);
        put_back(change->range, mark, touched);
        pthread_mutex_unlock(&change->range->pool->lock);
        if (!touched && work)
            unmap_new(change->range, mark, work);
    }
    vmm_undo_end();
    end_change(change);
}

void range_undo(range_change *change, bool touched) {
    pool_work work;
    if (change->n_marks == 0)
        return;
    if (!change->mapped) {
        undo(change, touched, NULL);
        return;
    }
    vmm_undo_begin();
    pool_work_begin(&work, change->range->pool, change->tensor_calls, VMM_STREAM_NONE);
    undo(change, touched, &work);
    pool_work_end(&work);
    vmm_undo_end();
}

vmm_status range_map(range_change *change, range *range, size_t lane_bytes, bool fit,
                     uint64_t *tensor_calls, vmm_stream stream) {
    bool done = false;
    *change = (range_change){.range = range, .fit = fit, .tensor_calls = tensor_calls};
    vmm_status status = revive_open(change, lane_bytes, &done);
    if (done)
        return VMM_OK;
    if (status) {
        undo(change, false, NULL);
        return status;
    }
    pool_work work;
    pool_work_begin(&work, range->pool, tensor_calls, stream);
    change->mapped = true;
    for (size_t i = 0; i < range->n_lanes && !status; i++)
        if (range->lanes[i].live_bytes < lane_bytes)
            status = extend_lane(change, i, lane_bytes, &work);
    if (status)
        undo(change, false, &work);
    pool_work_end(&work);
    return status;
}

void range_trim(range *range, size_t lane_bytes) {
    pthread_mutex_lock(&range->pool->lock);
    bool any = range->entry.bytes[POOL_AHEAD] > 0;
    if (any)
        pool_enqueue_locked(range->pool, &range->entry);
    for (size_t i = 0; i < range->n_lanes; i++) {
        range_lane *lane = &range->lanes[i];
        size_t n_live = lane->n_live, kept = lane->live_bytes;
        while (n_live > 0 && kept - lane->blocks[n_live - 1]->bytes >= lane_bytes)
            kept -= lane->blocks[--n_live]->bytes;
        if (n_live == lane->n_live)
            continue;
        if (!any)
            pool_enqueue_locked(range->pool, &range->entry);
        any = true;
        make_spare(range, lane, n_live);
    }
    give_ahead(range);
    if (range->entry.bytes[POOL_QUEUED] || range->entry.bytes[POOL_RECYCLED])
        range->entry.trimmed = true;
    pool_note_locked(range->pool, &range->entry);
    pthread_mutex_unlock(&range->pool->lock);
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
    *bytes = range->entry.bytes[POOL_IN_USE];
    *blocks = range->n_live_blocks;
    pthread_mutex_unlock(&range->pool->lock);
}
