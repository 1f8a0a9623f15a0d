/* range.h - one reservation and the blocks mapped into it, lane by lane, by watermark.
 *
 * A lane's blocks lie one after the other from its beginning. The first `n_live` back rows; the
 * rest are spare: given up by a trim, an undo or the tensor that had the range before, or mapped
 * ahead. They stay mapped until the pool takes them back, and growth takes them into use first.
 */
#ifndef VMM_RANGE_H
#define VMM_RANGE_H

#include "pool.h"

/* What lies beyond n_live changes under the pool's work lock, for the driver is called between,
 * and under its other lock: either is enough to read it. So growth can take spare blocks into use
 * while another thread is inside the driver. What is live is the one writer's, who changes it
 * under the lock. */
typedef struct range_lane {
    pool_block **blocks;
    size_t n_live;
    size_t n_blocks;
    size_t room;        /* entries allocated in `blocks` */
    size_t live_bytes;  /* in the first n_live blocks */
    size_t total_bytes; /* in all of them */
    size_t open_bytes;  /* that have access, from the beginning: an undo may leave some without */
} range_lane;

/* What look-ahead has seen of a range's growth; its thread's, under the pool's lock. */
typedef struct range_growth {
    size_t seen_bytes; /* in use, at the last look */
    double bytes_per_ns;
    uint64_t grew_ns;    /* when it last did */
    size_t wanted_bytes; /* behind the live blocks of each lane */
} range_growth;

typedef struct range {
    pool_entry entry; /* first: the pool hands it back to us. Its bytes are of the blocks' */
    vmm_pool *pool;
    uintptr_t base;
    size_t bytes;
    size_t lane_bytes;  /* a multiple of every block size */
    size_t block_bytes; /* VMM_BLOCK_AUTO or bytes */
    size_t n_lanes;
    size_t n_live_blocks; /* in all lanes; under the pool's lock */
    range_growth growth;
    range_lane lanes[];
} range;

/* A range of `n_lanes` lanes for `lane_bytes` each, rounded up to whole blocks: one that was
 * retired, with the blocks it still has, where a fence has passed since (see pool_take_over(),
 * also for `stream`), else a reservation. */
vmm_status range_create(vmm_pool *pool, size_t n_lanes, size_t lane_bytes, size_t block_bytes,
                        uint64_t *tensor_calls, vmm_stream stream, range **out);

/* Give the range up: no driver call, from any thread. Its memory is queued in the pool, for the
 * next range of the same geometry; when the memory goes, the range is freed. */
void range_retire(range *range);

/* A change that takes blocks into use, and can be taken back as a whole. */
typedef struct range_mark {
    size_t lane;
    size_t n_live; /* before the change */
    size_t n_blocks;
} range_mark;

typedef struct range_change {
    range *range;
    uint64_t *tensor_calls;
    range_mark *marks;
    size_t n_marks, room;
    bool fit;    /* no block is larger than what is needed */
    bool mapped; /* not only spare blocks were taken */
    bool beyond; /* a lane got more than it needs: with smaller blocks others could have it */
} range_change;

/* Back the first `lane_bytes` bytes of every lane, as far as they are not. Spare blocks are taken
 * without a driver call and without waiting for one; only what is then missing is mapped, at
 * the cost of waiting for pending fences before giving up. Under "auto" with `fit` no more than is
 * needed. `stream` takes part, VMM_STREAM_NONE for none. On failure everything is as before, but
 * `beyond` is said. Out-of-memory callbacks are not run. No lock held. */
vmm_status range_map(range_change *change, range *range, size_t lane_bytes, bool fit,
                     uint64_t *tensor_calls, vmm_stream stream);

/* End a change: keep it, or put everything back as it was. No lock held. `touched`: work on the
 * new blocks may have been submitted, so they wait for a fence like any others. */
void range_commit(range_change *change);
void range_undo(range_change *change, bool touched);

/* For look-ahead, under work. One more block behind a lane's, with access, not in use; and the
 * last such block given back. VMM_ERR_OUT_OF_MEMORY where memory is short for it. */
size_t range_next_block_bytes(const range *range, size_t lane); /* 0: the lane is full */
vmm_status range_map_ahead(range *range, size_t lane, pool_work *work);
bool range_release_ahead(range *range, pool_work *work);

/* Make spare what lies beyond the blocks that hold the first `lane_bytes` bytes of each lane.
 * Under work. */
void range_trim(range *range, size_t lane_bytes);

/* The bytes that every lane has behind it. By the one writer. */
size_t range_live_bytes(const range *range);

/* What must still be mapped, in whole blocks, before every lane has `lane_bytes`; and what the
 * first row takes. */
size_t range_missing_bytes(const range *range, size_t lane_bytes);
size_t range_least_bytes(const range *range);

/* Live blocks and their bytes, from any thread. */
void range_count(range *range, size_t *bytes, size_t *blocks);

#endif /* VMM_RANGE_H */
