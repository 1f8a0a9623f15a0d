/* lookahead.h - the thread of a pool that maps ahead of growth: what pool.c and range.c need of
 * it. */
#ifndef VMM_LOOKAHEAD_H
#define VMM_LOOKAHEAD_H

#include "pool.h"

/* Under the pool's lock: a range has taken blocks into use. Wakes the thread if it sleeps. */
void lookahead_wake_locked(vmm_pool *pool);
/* Under the pool's lock, while it is still among the live ones: a range has no owner any more. */
void lookahead_forget_locked(vmm_pool *pool, const pool_entry *entry);

/* End the thread and wait for its end; what it has mapped stays. Returns the bytes that it was
 * allowed, 0 where there was none. No lock held. */
size_t lookahead_stop(vmm_pool *pool);
/* Start it again, after a close that was refused; without a thread it stays off. */
void lookahead_again(vmm_pool *pool, size_t max_bytes);

/* From a destructor: tell the thread to end and do not wait; and, later, see whether it has. */
void lookahead_dismiss(vmm_pool *pool);
void lookahead_reap(vmm_pool *pool);

#endif /* VMM_LOOKAHEAD_H */
