/* queue.h - what pool.c needs of the queue; what ranges need of it is in pool.h. All under work,
 * where nothing else is said. */
#ifndef VMM_QUEUE_H
#define VMM_QUEUE_H

#include "pool.h"

/* Look whether the pending fence has passed, or wait for it. */
vmm_status queue_settle(pool_work *work, bool wait);

/* Take back all that can be: without `wait` what a fence has released by now, recording one if
 * none is pending and that does not wait either; with it everything that was queued on entry. */
vmm_status queue_reclaim(pool_work *work, bool wait);
/* The fence of the above alone: nothing is unmapped. */
vmm_status queue_fence(pool_work *work, bool wait);

/* Before a growth makes a new block: take back what tensors have trimmed off, and what is more
 * than the pool ever needed. */
void queue_tidy(pool_work *work);
/* Memory is short. Give up what was mapped ahead and what is kept for recycling, oldest first,
 * until `enough` bytes are unmapped. */
vmm_status queue_give_up(pool_work *work, size_t enough);
/* Look-ahead is turned off: what it has mapped goes. */
void queue_give_ahead(pool_work *work);
/* Return address space of closed tensors that holds no memory, as far as fences allow. */
void queue_return_addresses(pool_work *work);

/* Try again what the driver would not take back. */
void queue_retry_parked(pool_work *work);

/* Return what abandoned pools hold, without `wait` as far as it can be had so; destroy those
 * that are empty, put the others back. No lock held. */
void queue_sweep_abandoned(vmm_device *device, vmm_stream stream, bool wait);

#endif /* VMM_QUEUE_H */
