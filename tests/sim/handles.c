/* handles.c - which pointers were ever given out as handles of a kind.
 *
 * The structures behind them are never freed, only marked dead, so that a handle that is used
 * after its end is known for what it is, and no new one gets its value.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "sim.h"

static int by_address(const void *a, const void *b) {
    uintptr_t x = (uintptr_t)*(void *const *)a, y = (uintptr_t)*(void *const *)b;
    return (x > y) - (x < y);
}

void sim_handles_add(sim_handles *handles, void *handle) {
    if (handles->n == handles->capacity) {
        handles->capacity = handles->capacity ? 2 * handles->capacity : 64;
        handles->item = sim_grow(handles->item, handles->capacity * sizeof(void *));
    }
    handles->item[handles->n++] = handle;
}

/* Those added since the last sort stand unsorted at the end. */
bool sim_handles_has(sim_handles *handles, const void *handle) {
    if (handles->n - handles->n_sorted > 64) {
        qsort(handles->item, handles->n, sizeof(void *), by_address);
        handles->n_sorted = handles->n;
    }
    for (size_t i = handles->n; i-- > handles->n_sorted;)
        if (handles->item[i] == handle)
            return true;
    return handles->n_sorted &&
           bsearch(&handle, handles->item, handles->n_sorted, sizeof(void *), by_address);
}
