/* control.c - slabs of device memory and of host memory that the device can write, and what is
 * taken of them. */
#include "control.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

#define CELL_BYTES 256 /* what frameworks align arrays to */
#define SLAB_CELLS 256

/* Its lists are under the pool's lock. */
struct control_slab {
    struct control_slab *next;
    uintptr_t address;
    char *mirror;    /* in host memory: the cells once more, behind them */
    uint32_t *flags; /* one for each cell; that of its first is a block's */
    size_t n_cells;
    bool is_taken[];
};

static void free_slab(vmm_pool *pool, struct control_slab *slab) {
    const driver_ops *ops = pool->device->ops;
    if (slab->address)
        ops->deallocate(pool->device->state, slab->address);
    if (slab->mirror)
        ops->deallocate_host(pool->device->state, slab->mirror);
    free(slab);
}

static vmm_status make_slab(vmm_pool *pool, uint64_t *tensor_calls, size_t n_cells,
                            struct control_slab **out) {
    struct control_slab *slab = calloc(1, sizeof *slab + n_cells * sizeof slab->is_taken[0]);
    size_t cell_bytes = n_cells * CELL_BYTES;
    void *mirror = NULL;
    if (!slab)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "cursor", "no host memory left");
    slab->n_cells = n_cells;
    vmm_status status = DRIVER(pool, tensor_calls, allocate_host,
                               cell_bytes + n_cells * sizeof *slab->flags, &mirror);
    slab->mirror = mirror;
    if (!status) {
        slab->flags = (uint32_t *)(slab->mirror + cell_bytes);
        status = DRIVER(pool, tensor_calls, allocate, cell_bytes, &slab->address);
    }
    if (status) {
        free_slab(pool, slab);
        return status;
    }
    *out = slab;
    return VMM_OK;
}

/* The first of `n_cells` free ones in a row, or SIZE_MAX. */
static size_t find_cells(const struct control_slab *slab, size_t n_cells) {
    size_t n_free = 0;
    for (size_t i = 0; i < slab->n_cells; i++) {
        n_free = slab->is_taken[i] ? 0 : n_free + 1;
        if (n_free == n_cells)
            return i + 1 - n_cells;
    }
    return SIZE_MAX;
}

static bool take_cells_locked(vmm_pool *pool, control_block *control) {
    struct control_slab *slab = pool->control_slabs;
    size_t first = SIZE_MAX;
    for (; slab; slab = slab->next)
        if ((first = find_cells(slab, control->n_cells)) != SIZE_MAX)
            break;
    if (!slab)
        return false;
    memset(&slab->is_taken[first], true, control->n_cells);
    control->slab = slab;
    control->first = first;
    control->address = slab->address + first * CELL_BYTES;
    control->mirror = slab->mirror + first * CELL_BYTES;
    control->flag = &slab->flags[first];
    *control->flag = 0;
    return true;
}

static bool take_cells(vmm_pool *pool, control_block *control, struct control_slab *added) {
    pthread_mutex_lock(&pool->lock);
    if (added) {
        added->next = pool->control_slabs;
        pool->control_slabs = added;
    }
    bool done = take_cells_locked(pool, control);
    pthread_mutex_unlock(&pool->lock);
    return done;
}

vmm_status control_take(vmm_pool *pool, uint64_t *tensor_calls, size_t bytes, control_block **out) {
    control_block *control = calloc(1, sizeof *control);
    if (!control)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "cursor", "no host memory left");
    control->pool = pool;
    control->n_cells = (bytes + CELL_BYTES - 1) / CELL_BYTES;
    struct control_slab *slab = NULL;
    vmm_status status = VMM_OK;
    while (!status && !take_cells(pool, control, slab))
        status = make_slab(pool, tensor_calls,
                           control->n_cells > SLAB_CELLS ? control->n_cells : SLAB_CELLS, &slab);
    if (status) {
        free(control);
        return status;
    }
    *out = control;
    return VMM_OK;
}

/* Under the pool's lock. */
static void discard_control(pool_entry *entry) {
    control_block *control = (control_block *)entry;
    memset(&control->slab->is_taken[control->first], false, control->n_cells);
    free(control);
}

void control_put(control_block *control) {
    pool_discard_later(control->pool, &control->entry, discard_control);
}

void control_destroy(vmm_pool *pool) {
    while (pool->control_slabs) {
        struct control_slab *slab = pool->control_slabs;
        pool->control_slabs = slab->next;
        free_slab(pool, slab);
    }
}
