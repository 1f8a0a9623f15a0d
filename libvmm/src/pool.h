/* pool.h - physical blocks of one device: create, recycle, release, within a budget.
 *
 * pool.c    blocks, the budget, the pool itself
 * queue.c   what waits for a fence, and how it comes back
 * oom.c     whom the pool asks before it gives up
 * lookahead.c, above ranges: the thread that maps ahead of growth
 *
 * Two locks, always taken in this order:
 *   work   serialises driver work (the driver does so anyway) and is held across driver
 *          calls. Between pool_work_begin() and pool_work_end().
 *   lock   guards the books and the queue, and is never held across a driver call, so
 *          that a deleter may take it on any thread.
 */
#ifndef VMM_POOL_H
#define VMM_POOL_H

#include <pthread.h>

#include "driver.h"

struct pool_work;

/* What a pool's bytes are, each in one place. */
typedef enum pool_state {
    POOL_IN_USE,   /* back rows */
    POOL_FREE,     /* are mapped nowhere */
    POOL_QUEUED,   /* given up and still mapped; device work may touch them */
    POOL_RECYCLED, /* the same, and a fence has passed */
    POOL_AHEAD,    /* mapped, and never used yet */
    POOL_PARKED,   /* the driver would not take them back */
    POOL_STATES,
    POOL_NOWHERE = POOL_STATES /* not the pool's, before and after */
} pool_state;

/* What has become of a block since it was mapped, for when it backs no rows. */
typedef enum block_past {
    BLOCK_USED, /* work on it may have been submitted */
    BLOCK_UNTOUCHED,
    BLOCK_PARKED, /* the driver would not unmap it; perhaps it has lost its access */
} block_past;

/* One physical block. Allocated with its memory, so that keeping one never allocates. */
typedef struct pool_block {
    driver_handle handle;
    size_t bytes;
    struct pool_block *next; /* in a free or parked list */
    bool fresh;              /* created, not recycled, in the change that is under way */
    block_past past;         /* of a mapped block; under lock */
} pool_block;

/* Free blocks are kept by the power of two of their size. */
#define POOL_SIZE_CLASSES 64

/* What may be unmapped. */
enum {
    RECLAIM_PARKED = 1,
    RECLAIM_AHEAD = 2, /* what is untouched */
    RECLAIM_USED = 4,  /* if it is covered; and addresses, when all is gone */
};

/* Something that holds memory it does not use, in the pool's queue: until a fence has passed, and
 * then until someone wants it. Ranges embed one. Guarded by the pool's lock. */
typedef struct pool_entry {
    struct pool_entry *newer, *older;
    bool linked;
    bool retired; /* the owner is gone: the next of its kind takes it over, or reclaim ends it */
    bool trimmed; /* the owner has given memory up, for others to grow with */
    bool claimed; /* being reclaimed: nobody takes it over */
    bool bare;    /* counted in the pool's n_bare */
    struct pool_entry *next_live, *previous_live; /* while it has an owner */
    uint64_t epoch; /* the number of the last fence that does not cover it */
    size_t bytes[POOL_STATES + 1];
    /* Give back from the end what may go, a set of RECLAIM_*. Under work. `gone`: the owner was,
     * and nothing is left. */
    vmm_status (*reclaim)(struct pool_entry *entry, struct pool_work *work, int may_go, bool *gone);
    void (*discard)(struct pool_entry *entry); /* free it, when it is gone */
} pool_entry;

typedef struct pool_event {
    driver_event event;
    struct pool_event *next;
} pool_event;

typedef struct pool_callback {
    vmm_oom_callback function;
    void *user;
    uint64_t number; /* ascending, in the order of registration */
} pool_callback;

struct vmm_pool {
    vmm_device *device;
    uint64_t process;
    size_t block_bytes; /* VMM_BLOCK_AUTO or bytes */
    size_t max_bytes;   /* SIZE_MAX for no budget */

    pthread_mutex_t work;
    int work_waiters; /* growths that want it, before which look-ahead stands back. Atomic */
    pool_block *free_blocks[POOL_SIZE_CLASSES]; /* under work: unmapped, last given back first */
    pool_block *parked_blocks; /* under work: unmapped, but the driver would not release them */
    size_t scarce_bytes; /* under work: were in use when one of "auto"'s blocks was refused; or 0 */
    pool_event *fence;   /* under work: the pending fence, NULL if none */

    pthread_mutex_t lock;
    pool_entry *newest, *oldest; /* entries with something that is not in use */
    size_t n_bare;               /* of them: retired, address space and no memory */
    bool has_news;               /* something was queued since the last look; host pools. Atomic */
    size_t bytes[POOL_STATES + 1];
    size_t peak_bytes;        /* held in all */
    size_t peak_in_use_bytes; /* so much may be kept that is not in use */
    uint64_t fences_passed;   /* written under work, too */
    uint64_t fences_recorded;
    size_t live_ranges;
    pool_entry *live;            /* the ranges themselves */
    struct lookahead *lookahead; /* NULL: off. See lookahead.c */
    void *allocations;           /* ranges by their address, see alloc.c */
    int captures;                /* under the device's fence lock */
    pool_event *spare_events;
    pool_callback *callbacks;
    size_t n_callbacks;
    uint64_t callbacks_registered;
    struct vmm_pool *next_abandoned;
    struct control_slab *control_slabs; /* control.c */

    uint64_t driver_calls[VMM_CALL_COUNT]; /* atomic */
};

/* A stretch of driver work on a pool, on behalf of a tensor (whose calls are counted) or
 * of nobody. */
typedef struct pool_work {
    vmm_pool *pool;
    uint64_t *tensor_calls;
    vmm_stream stream;     /* takes part, and may be captured: then no fence. VMM_STREAM_NONE */
    bool waited;           /* for the device, which the caller has allowed */
    size_t unmapped_bytes; /* so far */
} pool_work;

static inline void pool_count(vmm_pool *pool, uint64_t *tensor_calls, vmm_call call) {
    __atomic_fetch_add(&pool->driver_calls[call], 1, __ATOMIC_RELAXED);
    if (tensor_calls)
        __atomic_fetch_add(&tensor_calls[call], 1, __ATOMIC_RELAXED);
}

/* Call the driver, counted: DRIVER(pool, tensor_calls, map, address, bytes, handle). */
#define DRIVER(pool, tensor_calls, verb, ...)                                                      \
    (pool_count((pool), (tensor_calls), VMM_CALL_##verb),                                          \
     (pool)->device->ops->verb((pool)->device->state, __VA_ARGS__))

/* What was parked is retried at the beginning; what may be returned at once (host) is at
 * the end. */
void pool_work_begin(pool_work *work, vmm_pool *pool, uint64_t *tensor_calls, vmm_stream stream);
void pool_work_end(pool_work *work);

/* May this call use the pool: it exists, here. */
vmm_status pool_check(const vmm_pool *pool, const char *operation);

/* Take a block of `bytes` for mapping, counted as in use. When there is none: what tensors have
 * trimmed off and fences have released; a new one, for which what was mapped ahead and what is
 * kept for recycling are given up; one of `fitting_bytes`, which is all that the caller lacks, and
 * smaller ones down to `smallest_bytes`, by halves; the first again when pending fences have been
 * waited for. VMM_ERR_OUT_OF_MEMORY after all that.
 *
 * Where "auto" has been refused a block, what is left may be little for all who grow: none gets
 * more than the fitting size, until an eighth of what was in use then has been given up, or an
 * eighth more could be had. Under work. */
vmm_status pool_take_block(pool_work *work, size_t bytes, size_t fitting_bytes,
                           size_t smallest_bytes, pool_block **out);

/* A block for look-ahead, counted as ahead: one that is free, or a new one if there is room for
 * it. Nothing is given up for it. Under work. */
vmm_status pool_take_block_ahead(pool_work *work, size_t bytes, pool_block **out);

/* Reserve address space; what closed tensors still hold of it is taken back where it is
 * needed, or where much has gathered. `stream` as in pool_work. No lock held. */
vmm_status pool_reserve(vmm_pool *pool, uint64_t *tensor_calls, size_t bytes, vmm_stream stream,
                        uintptr_t *out);

/* Give back a block that is not mapped (any more); the caller has moved its bytes out of
 * whatever it was counted under to none. To the free list, or to the driver where keeping
 * it has no use or `release` asks. Under work. */
void pool_give_block(pool_work *work, pool_block *block, bool release);

/* Return a block to the driver; one that it refuses is parked. Its bytes are counted nowhere on
 * entry. Under work. */
vmm_status pool_release_block(pool_work *work, pool_block *block);
/* Release free blocks, large ones first, until `enough` bytes have gone back. Under work. */
vmm_status pool_release_free(pool_work *work, size_t enough);

/* The pool holds nothing, and nothing of it is in use; free it then. */
bool pool_is_empty(vmm_pool *pool);
void pool_destroy(vmm_pool *pool);

/* The books; `entry` is whose bytes they are, NULL for nobody's. */
void pool_move_bytes(vmm_pool *pool, pool_entry *entry, pool_state from, pool_state to,
                     size_t bytes);
void pool_move_bytes_locked(vmm_pool *pool, pool_entry *entry, pool_state from, pool_state to,
                            size_t bytes);

/* Under lock: work on what the entry has given up may be under way, so it waits for the next
 * fence, all of it. */
void pool_enqueue_locked(vmm_pool *pool, pool_entry *entry);
/* Queue an entry that holds nothing of the pool's and is of use to nobody: `discard` frees it, under
 * lock, behind the next fence. No driver call, from any thread, no lock held. */
void pool_discard_later(vmm_pool *pool, pool_entry *entry, void (*discard)(pool_entry *entry));
/* Under lock: see to it that the pool knows of the entry, as its bytes have changed. */
void pool_note_locked(vmm_pool *pool, pool_entry *entry);

/* Under lock: a fence has passed since the entry was last queued; and what of the entry that has
 * been used and given up counts as. */
bool pool_is_covered(const vmm_pool *pool, const pool_entry *entry);
pool_state pool_used_state(const vmm_pool *pool, const pool_entry *entry);

/* A retired entry that `fits` the key and may be used at once: its owner from now on is the
 * caller, who has no lock. At most one fence is recorded and one query made; NULL if that does
 * not do. `stream` as in pool_work. */
pool_entry *pool_take_over(vmm_pool *pool, uint64_t *tensor_calls, vmm_stream stream,
                           bool (*fits)(const pool_entry *entry, const void *key), const void *key);

/* On a host pool take back what is queued, now, unless another thread is at work on the
 * pool: that one does it when it ends. No lock held. */
void pool_drain(vmm_pool *pool);

bool pool_has_queue(vmm_pool *pool);
/* Unmap all that is queued, recycled or ahead, as far as the driver and captures let it: waits for
 * a fence. `stream` as in pool_work. No lock held. */
void pool_empty_queue(vmm_pool *pool, uint64_t *tensor_calls, vmm_stream stream);

/* Wait for everything that the device has been given. `stream` takes part: while it, or any that
 * a bracket knows of, is captured, VMM_ERR_CAPTURING. No lock held. */
vmm_status pool_wait(vmm_pool *pool, uint64_t *tensor_calls, vmm_stream stream);

/* Run the out-of-memory callbacks, without locks. True if one freed something. */
bool pool_run_callbacks(vmm_pool *pool, size_t needed_bytes);

/* A range has an owner from now on; its owner has gone (under lock); and nothing of the owner's
 * call is left in the pool. */
void pool_range_added(vmm_pool *pool, pool_entry *entry);
void pool_range_added_locked(vmm_pool *pool, pool_entry *entry);
void pool_range_retired_locked(vmm_pool *pool, pool_entry *entry);
void pool_range_gone(vmm_pool *pool);

/* Events, recycled: putting one back makes no driver call. */
vmm_status pool_get_event(vmm_pool *pool, pool_event **out);
void pool_put_event(vmm_pool *pool, pool_event *event);

#endif /* VMM_POOL_H */
