/* clock.c - order between pieces of device work, and what the host knows of it. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "sim.h"

typedef struct slot {
    uint64_t submitted, completed;
    bool taken;
} slot;

static slot *slots;
static size_t n_slots;

static sim_clock *resized(sim_clock *clock, size_t n) {
    size_t old = clock ? clock->n : 0;
    clock = sim_grow(clock, sizeof *clock + n * sizeof clock->seq[0]);
    memset(clock->seq + old, 0, (n - old) * sizeof clock->seq[0]);
    clock->n = n;
    return clock;
}

uint64_t sim_clock_at(const sim_clock *clock, size_t index) {
    return clock && index < clock->n ? clock->seq[index] : 0;
}

void sim_clock_set(sim_clock **clock, size_t index, uint64_t seq) {
    if (!*clock || index >= (*clock)->n)
        *clock = resized(*clock, index + 1);
    (*clock)->seq[index] = seq;
}

void sim_clock_merge(sim_clock **into, const sim_clock *from) {
    if (!from)
        return;
    if (!*into || (*into)->n < from->n)
        *into = resized(*into, from->n);
    for (size_t i = 0; i < from->n; i++)
        if (from->seq[i] > (*into)->seq[i])
            (*into)->seq[i] = from->seq[i];
}

sim_clock *sim_clock_copy(const sim_clock *from) {
    sim_clock *clock = NULL;
    sim_clock_merge(&clock, from);
    return clock;
}

bool sim_clock_passed(const sim_clock *clock) {
    for (size_t i = 0; clock && i < clock->n; i++)
        if (clock->seq[i] > slots[i].completed)
            return false;
    return true;
}

void sim_clock_wait(const sim_clock *clock) {
    sim_clock *until = sim_clock_copy(clock);
    sim.n_waiting++;
    while (!sim_clock_passed(until))
        pthread_cond_wait(&sim.changed, &sim.lock);
    sim.n_waiting--;
    free(until);
}

void sim_observe(const sim_clock *clock) {
    sim_clock_merge(&sim.host, clock);
}

bool sim_observed(size_t index, uint64_t seq) {
    return seq <= (sim.observe ? sim_clock_at(sim.host, index) : slots[index].completed);
}

/* A slot is used again only when nothing of its last stream can be in doubt any more:
 * otherwise the new stream would seem to come after the old one. */
size_t sim_slot_take(void) {
    for (size_t i = 0; i < n_slots; i++)
        if (!slots[i].taken && slots[i].submitted <= sim_clock_at(sim.host, i)) {
            slots[i].taken = true;
            return i;
        }
    slots = sim_grow(slots, (n_slots + 1) * sizeof *slots);
    slots[n_slots] = (slot){.taken = true};
    return n_slots++;
}

void sim_slot_give(size_t index) {
    slots[index].taken = false;
}

uint64_t sim_slot_next(size_t index) {
    return slots[index].submitted + 1;
}

void sim_slot_submitted(size_t index) {
    slots[index].submitted++;
}

void sim_slot_completed(size_t index) {
    slots[index].completed++;
}

uint64_t sim_slots_pending(void) {
    uint64_t n = 0;
    for (size_t i = 0; i < n_slots; i++)
        n += slots[i].submitted - slots[i].completed;
    return n;
}
