/* race.c - accesses of several streams to the same bytes that nothing orders.
 *
 * Every physical block remembers, for each stream slot, the accesses that the host has not
 * seen finished, as ranges within the block, so that aliases are seen through. The lists are
 * bounded: past the bound the oldest access is forgotten, and a race with it is missed, never
 * invented.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "sim.h"

#define MAX_ACCESSES 1024 /* of one slot */

typedef struct access {
    size_t begin, end;
    uint64_t seq;
    const char *name;
    bool write;
} access;

typedef struct lane {
    size_t slot;
    access *ring;
    size_t n, newest, capacity; /* the last n up to `newest` */
} lane;

typedef struct sim_accesses {
    size_t n_lanes;
    lane *lanes;
} sim_accesses;

static const access *nth_newest(const lane *l, size_t i) {
    return &l->ring[(l->newest + l->capacity - i) % l->capacity];
}

static lane *lane_of(sim_block *block, size_t slot) {
    sim_accesses *all = block->accesses;
    if (!all)
        all = block->accesses = sim_alloc(sizeof *all);
    for (size_t i = 0; i < all->n_lanes; i++)
        if (all->lanes[i].slot == slot)
            return &all->lanes[i];
    all->lanes = sim_grow(all->lanes, (all->n_lanes + 1) * sizeof(lane));
    all->lanes[all->n_lanes] = (lane){.slot = slot};
    return &all->lanes[all->n_lanes++];
}

static void remember(sim_block *block, size_t slot, access item) {
    lane *l = lane_of(block, slot);
    if (l->n && nth_newest(l, 0)->seq <= sim_clock_at(sim.host, slot))
        l->n = 0;
    if (l->n == l->capacity && l->capacity < MAX_ACCESSES) {
        size_t capacity = l->capacity ? 4 * l->capacity : 16;
        access *ring = sim_alloc(capacity * sizeof *ring);
        for (size_t i = 0; i < l->n; i++)
            ring[l->n - 1 - i] = *nth_newest(l, i);
        free(l->ring);
        *l = (lane){slot, ring, l->n, l->n ? l->n - 1 : 0, capacity};
    }
    l->newest = (l->newest + 1) % l->capacity;
    l->ring[l->newest] = item;
    l->n += l->n < l->capacity;
}

CUresult sim_race_check(const sim_visit *visit, sim_block *block, uintptr_t offset, size_t bytes,
                        bool write) {
    size_t end = offset + bytes;
    for (size_t k = 0; block->accesses && k < block->accesses->n_lanes; k++) {
        const lane *l = &block->accesses->lanes[k];
        if (l->slot == visit->slot)
            continue;
        uint64_t before = sim_clock_at(visit->clock, l->slot),
                 seen = sim_clock_at(sim.host, l->slot);
        for (size_t i = 0; i < l->n; i++) {
            const access *a = nth_newest(l, i);
            if (a->seq <= before || a->seq <= seen)
                break;
            if (a->begin < end && offset < a->end && (a->write || write))
                return sim_late("%s %s bytes %zu to %zu of a physical block that %s number %llu of "
                                "stream slot %zu %s: nothing orders the two streams",
                                visit->name, write ? "writes" : "reads", (size_t)offset, end,
                                a->name, (unsigned long long)a->seq, l->slot,
                                a->write ? "writes" : "reads");
        }
    }
    remember(block, visit->slot, (access){offset, end, visit->seq, visit->name, write});
    return CUDA_SUCCESS;
}

void sim_race_forget(sim_block *block) {
    for (size_t k = 0; block->accesses && k < block->accesses->n_lanes; k++)
        free(block->accesses->lanes[k].ring);
    if (block->accesses)
        free(block->accesses->lanes);
    free(block->accesses);
    block->accesses = NULL;
}
