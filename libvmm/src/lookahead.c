/* lookahead.c - one thread for each pool that has look-ahead on: it maps and opens blocks behind
 * the live ones of ranges that grow, so that growth finds them there.
 *
 * It polls while something grows: a growth that had to wake it would pay for that. It takes the
 * work lock for one block at a time, only when it is free and nobody waits for it. It has no
 * errors to tell: where the driver refuses it waits a while.
 */
#define _GNU_SOURCE
#include "lookahead.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "device.h"
#include "error.h"
#include "process.h"
#include "queue.h"
#include "range.h"

#define NS_PER_MS 1000000ull
#define LOOK_NS 100000ull           /* between two looks while something grows */
#define HORIZON_NS (20 * NS_PER_MS) /* of growth that is mapped ahead at the rate observed */
#define AVERAGE_NS (50.0 * NS_PER_MS)
#define GROWING_NS (100 * NS_PER_MS) /* so long after a growth it is looked for the next */
#define IDLE_NS (1000 * NS_PER_MS)   /* then what was mapped ahead goes */
#define REFUSED_NS (100 * NS_PER_MS) /* before a driver that has refused is asked again */

typedef struct lookahead {
    vmm_pool *pool;
    pthread_t thread;
    pthread_cond_t wake; /* with the pool's lock, which guards these: */
    size_t max_bytes;
    bool sleeps; /* until it is woken */
    bool stop;
    bool ended;             /* the thread touches nothing any more */
    uint64_t not_before_ns; /* the thread's own */
    struct lookahead *next; /* in the list of those that run */
} lookahead;

/* Starting, stopping, and the list. Held while a thread is waited for, which takes none of it. */
static pthread_mutex_t control = PTHREAD_MUTEX_INITIALIZER;
static lookahead *running;
static bool stops_at_exit; /* the handler is registered */
static bool at_exit;       /* it has run */

/* The child has no such threads, and the lock may be held by one that it does not have. */
static void after_fork_in_child(void) {
    running = NULL;
    pthread_mutex_init(&control, NULL);
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- looking ------------------------------------------------------------------------ */

static size_t spare_in_lane(const range_lane *lane) {
    return lane->total_bytes - lane->live_bytes;
}

/* How much of each lane should be mapped ahead, by how fast the range has grown. Under lock. */
static void look_at(range *range, uint64_t now, uint64_t passed_ns) {
    range_growth *growth = &range->growth;
    size_t in_use = range->entry.bytes[POOL_IN_USE];
    size_t grown = in_use > growth->seen_bytes ? in_use - growth->seen_bytes : 0;
    growth->seen_bytes = in_use;
    if (grown)
        growth->grew_ns = now;
    growth->bytes_per_ns += ((double)grown - (double)passed_ns * growth->bytes_per_ns) /
                            (AVERAGE_NS + (double)passed_ns);
    growth->wanted_bytes = 0;
    if (growth->grew_ns && now - growth->grew_ns < IDLE_NS)
        growth->wanted_bytes =
            1 + (size_t)(growth->bytes_per_ns * (double)HORIZON_NS / (double)range->n_lanes);
}

typedef enum activity { ASLEEP, WAITING, GROWING } activity;

/* Look at every range. Under lock. */
static activity look(vmm_pool *pool, uint64_t now, uint64_t passed_ns) {
    activity most = ASLEEP;
    for (pool_entry *entry = pool->live; entry; entry = entry->next_live) {
        range *range = (struct range *)entry;
        look_at(range, now, passed_ns);
        if (range->growth.grew_ns && now - range->growth.grew_ns < GROWING_NS)
            most = GROWING;
        else if ((range->growth.wanted_bytes || entry->bytes[POOL_AHEAD]) && most == ASLEEP)
            most = WAITING;
    }
    return most;
}

/* The range and lane that come next: with the least behind them of those that want more. What
 * does not fit what look-ahead may hold waits. Under lock. */
static range *pick_growing(lookahead *it, size_t *lane) {
    size_t room = it->max_bytes - it->pool->bytes[POOL_AHEAD], least = SIZE_MAX;
    range *picked = NULL;
    if (it->pool->bytes[POOL_AHEAD] >= it->max_bytes)
        return NULL;
    for (pool_entry *entry = it->pool->live; entry; entry = entry->next_live) {
        range *range = (struct range *)entry;
        for (size_t i = 0; i < range->n_lanes && range->growth.wanted_bytes; i++) {
            size_t spare = spare_in_lane(&range->lanes[i]);
            size_t bytes = range_next_block_bytes(range, i);
            if (spare < range->growth.wanted_bytes && spare < least && bytes && bytes <= room) {
                least = spare;
                picked = range;
                *lane = i;
            }
        }
    }
    return picked;
}

/* A range that has more than it wants: it does not grow any more, or look-ahead may hold less
 * than before. Under lock. */
static range *pick_idle(lookahead *it) {
    bool over = it->pool->bytes[POOL_AHEAD] > it->max_bytes;
    for (pool_entry *entry = it->pool->live; entry; entry = entry->next_live)
        if (entry->bytes[POOL_AHEAD] && (over || !((range *)entry)->growth.wanted_bytes))
            return (range *)entry;
    return NULL;
}

/* ---- mapping ------------------------------------------------------------------------ */

/* Map or release one block, with the work lock held: nothing that is picked goes meanwhile.
 * Returns whether there was something to do, and it was done. */
static bool do_one(lookahead *it, pool_work *work, uint64_t now) {
    vmm_pool *pool = it->pool;
    size_t lane = 0;
    pthread_mutex_lock(&pool->lock);
    range *idle = it->stop ? NULL : pick_idle(it);
    range *growing = it->stop || idle || now < it->not_before_ns ? NULL : pick_growing(it, &lane);
    pthread_mutex_unlock(&pool->lock);
    if (idle)
        return range_release_ahead(idle, work);
    if (!growing)
        return false;
    if (range_map_ahead(growing, lane, work) == VMM_OK)
        return true;
    it->not_before_ns = now + REFUSED_NS;
    return false;
}

/* As long as there is something to do and nobody else wants the lock. */
static void map_ahead(lookahead *it, uint64_t now) {
    vmm_pool *pool = it->pool;
    bool more = true;
    while (more && __atomic_load_n(&pool->work_waiters, __ATOMIC_RELAXED) == 0 &&
           pthread_mutex_trylock(&pool->work) == 0) {
        pool_work work = {.pool = pool, .stream = VMM_STREAM_NONE};
        more = do_one(it, &work, now);
        pthread_mutex_unlock(&pool->work);
        pool_drain(pool); /* what others left to whoever had the lock */
    }
}

/* Under lock. */
static void rest(lookahead *it, activity activity) {
    vmm_pool *pool = it->pool;
    if (it->stop)
        return;
    if (activity == ASLEEP) {
        it->sleeps = true;
        while (it->sleeps && !it->stop)
            pthread_cond_wait(&it->wake, &pool->lock);
        it->sleeps = false;
        return;
    }
    uint64_t until = now_ns() + (activity == GROWING ? LOOK_NS : GROWING_NS);
    struct timespec at = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    it->sleeps = activity == WAITING; /* a growth need not wait for the end of that */
    pthread_cond_timedwait(&it->wake, &pool->lock, &at);
    it->sleeps = false;
}

static void *run(void *argument) {
    lookahead *it = argument;
    vmm_pool *pool = it->pool;
    uint64_t last = now_ns();
    vmm_undo_begin(); /* nobody asks for this thread's errors */
    pthread_mutex_lock(&pool->lock);
    while (!it->stop) {
        uint64_t now = now_ns();
        activity activity = look(pool, now, now - last);
        last = now;
        if (activity != ASLEEP) {
            pthread_mutex_unlock(&pool->lock);
            map_ahead(it, now);
            pthread_mutex_lock(&pool->lock);
        }
        rest(it, activity);
    }
    it->ended = true;
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

void lookahead_wake_locked(vmm_pool *pool) {
    lookahead *it = pool->lookahead;
    if (it && it->sleeps) {
        it->sleeps = false;
        pthread_cond_signal(&it->wake);
    }
}

/* ---- starting and stopping ------------------------------------------------------------ */

/* Wait for a thread that has been told to stop, and forget it. Under control. */
static void join(lookahead *it) {
    vmm_pool *pool = it->pool;
    lookahead **link = &running;
    pthread_join(it->thread, NULL);
    while (*link != it)
        link = &(*link)->next;
    *link = it->next;
    pthread_mutex_lock(&pool->lock);
    pool->lookahead = NULL;
    pthread_mutex_unlock(&pool->lock);
    pthread_cond_destroy(&it->wake);
    free(it);
}

static void tell_to_stop(lookahead *it) {
    pthread_mutex_lock(&it->pool->lock);
    it->stop = true;
    pthread_cond_signal(&it->wake);
    pthread_mutex_unlock(&it->pool->lock);
}

/* Before the driver is torn down, which was loaded before this was registered. */
static void stop_all(void) {
    pthread_mutex_lock(&control);
    at_exit = true;
    while (running) {
        tell_to_stop(running);
        join(running);
    }
    pthread_mutex_unlock(&control);
}

static bool start_thread(lookahead *it) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's own threads */
    int error = pthread_create(&it->thread, NULL, run, it);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error)
        pthread_setname_np(it->thread, "vmm-lookahead");
    return !error;
}

/* Under control. */
static vmm_status start(vmm_pool *pool, size_t max_bytes) {
    static const char *const operation = "pool_set_lookahead";
    lookahead *it = calloc(1, sizeof *it);
    if (!it)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, operation, "no host memory left");
    if (!stops_at_exit && atexit(stop_all) == 0)
        stops_at_exit = true;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&it->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    it->pool = pool;
    it->max_bytes = max_bytes;
    /* What is there already does not count as growth. */
    pthread_mutex_lock(&pool->lock);
    for (pool_entry *entry = pool->live; entry; entry = entry->next_live)
        ((range *)entry)->growth = (range_growth){.seen_bytes = entry->bytes[POOL_IN_USE]};
    pthread_mutex_unlock(&pool->lock);
    if (!stops_at_exit || at_exit || !start_thread(it)) {
        pthread_cond_destroy(&it->wake);
        free(it);
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, operation,
                        "the system has no thread for look-ahead: it stays off");
    }
    it->next = running;
    running = it;
    pthread_mutex_lock(&pool->lock);
    pool->lookahead = it;
    pthread_mutex_unlock(&pool->lock);
    return VMM_OK;
}

size_t lookahead_stop(vmm_pool *pool) {
    size_t max_bytes = 0;
    pthread_mutex_lock(&control);
    if (pool->lookahead) {
        max_bytes = pool->lookahead->max_bytes;
        tell_to_stop(pool->lookahead);
        join(pool->lookahead);
    }
    pthread_mutex_unlock(&control);
    return max_bytes;
}

void lookahead_again(vmm_pool *pool, size_t max_bytes) {
    vmm_undo_begin();
    pthread_mutex_lock(&control);
    start(pool, max_bytes);
    pthread_mutex_unlock(&control);
    vmm_undo_end();
}

void lookahead_dismiss(vmm_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    if (pool->lookahead) {
        pool->lookahead->stop = true;
        pthread_cond_signal(&pool->lookahead->wake);
    }
    pthread_mutex_unlock(&pool->lock);
}

void lookahead_reap(vmm_pool *pool) {
    pthread_mutex_lock(&control);
    pthread_mutex_lock(&pool->lock);
    lookahead *it = pool->lookahead && pool->lookahead->ended ? pool->lookahead : NULL;
    pthread_mutex_unlock(&pool->lock);
    if (it)
        join(it); /* it only has to return */
    pthread_mutex_unlock(&control);
}

/* ---- public --------------------------------------------------------------------------- */

vmm_status vmm_pool_set_lookahead(vmm_pool *pool, size_t max_bytes) {
    vmm_status status = pool_check(pool, "pool_set_lookahead");
    if (status)
        return status;
    if (max_bytes == 0) {
        lookahead_stop(pool);
        pool_work work;
        pool_work_begin(&work, pool, NULL, VMM_STREAM_NONE);
        queue_give_ahead(&work);
        pool_work_end(&work);
        return VMM_OK;
    }
    pthread_mutex_lock(&control);
    pthread_mutex_lock(&pool->lock);
    bool runs = pool->lookahead;
    if (runs) {
        pool->lookahead->max_bytes = max_bytes;
        lookahead_wake_locked(pool);
    }
    pthread_mutex_unlock(&pool->lock);
    if (!runs)
        status = start(pool, max_bytes);
    pthread_mutex_unlock(&control);
    return status;
}

size_t vmm_pool_lookahead(const vmm_pool *pool) {
    if (!pool || pool->process != vmm_process)
        return 0;
    pthread_mutex_t *lock = (pthread_mutex_t *)&pool->lock;
    pthread_mutex_lock(lock);
    size_t max_bytes = pool->lookahead ? pool->lookahead->max_bytes : 0;
    pthread_mutex_unlock(lock);
    return max_bytes;
}
