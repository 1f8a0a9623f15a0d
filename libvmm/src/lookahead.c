/* lookahead.c - one thread for each pool that has look-ahead on: it maps and opens blocks behind
 * the live ones of ranges that grow, so that growth finds them there.
 *
 * It polls while something grows: a growth that had to wake it would pay for that. It walks over
 * all ranges and lanes, a few at a time, since growth wants the lock that this takes, and notes
 * those that are short of blocks most. For these it takes the work lock for one block at a time,
 * only when it is free and nobody waits for it. It has no errors to tell: where the driver refuses
 * it waits a while.
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

/* Lanes that are looked at before others may have the lock, a few microseconds; a range, which is
 * somewhere else in memory, counts as several. As long a pause lets them come before us. */
#define WALK_LANES 512
#define WALK_LANES_PER_RANGE 8
#define WALK_PAUSE_NS 20000
#define PICKS 256

/* Something to do, if it still is when its turn comes. */
typedef struct pick {
    range *range;
    size_t lane;  /* to map a block for; RELEASE: the range has more than it wants */
    size_t spare; /* the bytes that are mapped behind the lane already */
} pick;

#define RELEASE SIZE_MAX

typedef struct lookahead {
    vmm_pool *pool;
    pthread_t thread;
    pthread_cond_t wake; /* with the pool's lock, which guards these: */
    size_t max_bytes;
    bool sleeps; /* until it is woken */
    bool stop;
    bool ended;     /* the thread touches nothing any more */
    pool_entry *at; /* where the walk is, and in which lane; moves on if that goes */
    size_t lane;
    size_t n_picks; /* the most urgent first; those of a range that goes, go */
    pick picks[PICKS];
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

static activity activity_of(const range *range, uint64_t now) {
    if (range->growth.grew_ns && now - range->growth.grew_ns < GROWING_NS)
        return GROWING;
    return range->growth.wanted_bytes || range->entry.bytes[POOL_AHEAD] ? WAITING : ASLEEP;
}

/* Is there room for another block of the lane, and a wish? What does not fit what look-ahead may
 * hold waits. Under lock. */
static bool wants_block(const lookahead *it, const range *range, size_t lane) {
    size_t ahead = it->pool->bytes[POOL_AHEAD], bytes = range_next_block_bytes(range, lane);
    return spare_in_lane(&range->lanes[lane]) < range->growth.wanted_bytes && bytes &&
           ahead < it->max_bytes && bytes <= it->max_bytes - ahead;
}

/* Has it more than it wants: it does not grow any more, or look-ahead may hold less than before?
 * Under lock. */
static bool has_too_much(const lookahead *it, const range *range) {
    return range->entry.bytes[POOL_AHEAD] &&
           (it->pool->bytes[POOL_AHEAD] > it->max_bytes || !range->growth.wanted_bytes);
}

/* First what is to be released, then the lanes with the least behind them. Under lock. */
static void note(lookahead *it, range *range, size_t lane) {
    size_t spare = lane == RELEASE ? 0 : spare_in_lane(&range->lanes[lane]);
    size_t place = it->n_picks;
    while (place > 0 && (it->picks[place - 1].spare > spare ||
                         (lane == RELEASE && it->picks[place - 1].lane != RELEASE)))
        place--;
    if (place == PICKS)
        return;
    size_t n_kept = it->n_picks < PICKS ? it->n_picks : PICKS - 1;
    memmove(&it->picks[place + 1], &it->picks[place], (n_kept - place) * sizeof *it->picks);
    it->picks[place] = (pick){range, lane, spare};
    it->n_picks = n_kept + 1;
}

/* A pause for those who want the lock; without it whoever waits for the lock may find it taken
 * again. Under lock. */
static void let_others(lookahead *it) {
    struct timespec pause = {.tv_nsec = WALK_PAUSE_NS};
    pthread_mutex_unlock(&it->pool->lock);
    nanosleep(&pause, NULL);
    pthread_mutex_lock(&it->pool->lock);
}

/* Look at every range, and note what is to be done. Under lock, with pauses. */
static activity walk(lookahead *it, uint64_t now, uint64_t passed_ns) {
    activity most = ASLEEP;
    size_t left = WALK_LANES;
    it->n_picks = 0;
    it->lane = 0;
    for (it->at = it->pool->live; it->at && !it->stop;) {
        range *range = (struct range *)it->at;
        if (it->lane == 0) {
            look_at(range, now, passed_ns);
            activity activity = activity_of(range, now);
            most = activity > most ? activity : most;
            if (has_too_much(it, range))
                note(it, range, RELEASE);
            left -= left < WALK_LANES_PER_RANGE ? left : WALK_LANES_PER_RANGE;
        }
        size_t n_lanes = range->growth.wanted_bytes ? range->n_lanes : 0;
        for (; it->lane < n_lanes && left > 0; it->lane++, left--)
            if (wants_block(it, range, it->lane))
                note(it, range, it->lane);
        if (it->lane >= n_lanes) {
            it->at = it->at->next_live;
            it->lane = 0;
        }
        if (left == 0 && it->at) {
            let_others(it);
            left = WALK_LANES;
        }
    }
    it->at = NULL;
    return most;
}

void lookahead_forget_locked(vmm_pool *pool, const pool_entry *entry) {
    lookahead *it = pool->lookahead;
    if (!it)
        return;
    if (it->at == entry) {
        it->at = entry->next_live;
        it->lane = 0;
    }
    size_t n_kept = 0;
    for (size_t i = 0; i < it->n_picks; i++)
        if (&it->picks[i].range->entry != entry)
            it->picks[n_kept++] = it->picks[i];
    it->n_picks = n_kept;
}

/* ---- mapping ------------------------------------------------------------------------ */

/* The first of the picks that is still to be done. Under lock. */
static bool take_pick(lookahead *it, uint64_t now, pick *out) {
    size_t i = 0;
    bool found = false;
    for (; i < it->n_picks && !found && !it->stop; i++) {
        *out = it->picks[i];
        found = out->lane == RELEASE
                    ? has_too_much(it, out->range)
                    : now >= it->not_before_ns && wants_block(it, out->range, out->lane);
    }
    it->n_picks -= i;
    memmove(it->picks, &it->picks[i], it->n_picks * sizeof *it->picks);
    return found;
}

/* Map or release one block, with the work lock held: nothing that is picked goes meanwhile.
 * Returns whether there was something to do, and it was done. */
static bool do_one(lookahead *it, pool_work *work, uint64_t now) {
    vmm_pool *pool = it->pool;
    pick pick;
    pthread_mutex_lock(&pool->lock);
    bool found = take_pick(it, now, &pick);
    pthread_mutex_unlock(&pool->lock);
    if (!found)
        return false;
    if (pick.lane == RELEASE)
        return range_release_ahead(pick.range, work);
    if (range_map_ahead(pick.range, pick.lane, work) == VMM_OK)
        return true;
    it->not_before_ns = now + REFUSED_NS;
    return false;
}

/* As long as there is something to do and nobody else wants the lock. Returns whether all was
 * done, so that there may be more. */
static bool map_ahead(lookahead *it, uint64_t now) {
    vmm_pool *pool = it->pool;
    bool more = true, any = false;
    while (more && __atomic_load_n(&pool->work_waiters, __ATOMIC_RELAXED) == 0 &&
           pthread_mutex_trylock(&pool->work) == 0) {
        pool_work work = {.pool = pool, .stream = VMM_STREAM_NONE};
        more = do_one(it, &work, now);
        any |= more;
        pthread_mutex_unlock(&pool->work);
        pool_drain(pool); /* what others left to whoever had the lock */
    }
    return any && !more;
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
        activity activity = walk(it, now, now - last);
        bool again = false;
        last = now;
        if (it->n_picks) {
            pthread_mutex_unlock(&pool->lock);
            again = map_ahead(it, now);
            pthread_mutex_lock(&pool->lock);
        }
        if (!again)
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
    pool->lookahead = it; /* which is told of ranges that go from now on */
    pthread_mutex_unlock(&pool->lock);
    if (!stops_at_exit || at_exit || !start_thread(it)) {
        pthread_mutex_lock(&pool->lock);
        pool->lookahead = NULL;
        pthread_mutex_unlock(&pool->lock);
        pthread_cond_destroy(&it->wake);
        free(it);
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, operation,
                        "the system has no thread for look-ahead: it stays off");
    }
    it->next = running;
    running = it;
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
