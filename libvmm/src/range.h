/* range.h - one reservation and the blocks mapped into it, lane by lane, by watermark.
 *
 * A lane's blocks lie one after the other from its beginning. The first `n_live` back rows;
 * the rest are stale: given up by a trim or left by an undo, still mapped until the pool
 * reclaims them, and taken back into use when the lane grows first.
 */
#ifndef VMM_RANGE_H
#define VMM_RANGE_H

#include "pool.h"

typedef struct range_lane {
    pool_block **blocks;
    size_t n_live;
    size_t n_blocks;
    size_t room;        /* entries allocated in `blocks` */
    size_t live_bytes;  /* in the first n_live blocks */
    size_t total_bytes; /* in all of them */
} range_lane;

/* Lanes are guarded by the pool's work lock. */
typedef struct range {
    pool_entry entry; /* first: the pool hands it back to us */
    vmm_pool *pool;
    uintptr_t base;
    size_t bytes;
    size_t lane_bytes;  /* a multiple of every block size */
    size_t block_bytes; /* VMM_BLOCK_AUTO or bytes */
    size_t n_lanes;
    size_t in_use_bytes;  /* in live blocks; under the pool's lock */
    size_t n_live_blocks; /* in all lanes; under the pool's lock */
    range_lane lanes[];
} range;

/* Reserve `n_lanes` lanes for `lane_bytes` each, rounded up to whole blocks. */
vmm_status range_create(vmm_pool *pool, size_t n_lanes, size_t lane_bytes, size_t block_bytes,
                        uint64_t *tensor_calls, range **out);

/* Give the range up: no driver call, from any thread. Its memory is queued in the pool, and
 * with the last of it the range is freed. */
void range_retire(range *range);

/* A change that maps, over one range or several, and can be taken back as a whole. */
typedef struct range_mark {
    range *range;
    size_t lane;
    size_t n_live; /* before the change */
    size_t n_blocks;
} range_mark;

typedef struct range_change {
    pool_work *work;
    range_mark *marks;
    size_t n_marks, room;
} range_change;

/* Back the first `lane_bytes` bytes of every lane, as far as they are not. `wait`: wait for
 * pending fences before giving up. On failure the change holds what has been done so far:
 * undo it. Under work. */
vmm_status range_extend(range_change *change, range *range, size_t lane_bytes, bool wait);

/* End a change: keep it, or put everything back as it was. Under work. `touched`: work on
 * the new blocks may have been submitted, so they wait for a fence like any others. */
void range_commit(range_change *change);
void range_undo(range_change *change, bool touched);

/* Make stale what lies beyond the blocks that hold the first `lane_bytes` bytes of each
 * lane. Under work. */
void range_trim(range *range, size_t lane_bytes);

/* The bytes that every lane has behind it. Under work, or by the one writer. */
size_t range_live_bytes(const range *range);

/* What must still be mapped, in whole blocks, before every lane has `lane_bytes`; and what the
 * first row takes. */
size_t range_missing_bytes(const range *range, size_t lane_bytes);
size_t range_least_bytes(const range *range);

/* Live blocks and their bytes, from any thread. */
void range_count(range *range, size_t *bytes, size_t *blocks);

#endif /* VMM_RANGE_H */
