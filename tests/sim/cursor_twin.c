/* cursor_twin.c - the kernels that append at a row which the device keeps, and that set it, once
 * more in C. Written from cursor_job.h, and from nothing else of libvmm.
 *
 * Where such an append goes is known when it runs. When it is submitted, all that may be its
 * place counts as used; when it runs, the place must be mapped.
 */
#define _GNU_SOURCE
#include <string.h>

#include "append_twin.h"

static uint64_t *state_of(uint64_t control, uint32_t n, uint32_t entry) {
    return (uint64_t *)(uintptr_t)(control + VMM_CURSOR_STATE(n)) + entry;
}

static uint32_t *behind_of(uint64_t control, uint32_t n, uint32_t entry) {
    return (uint32_t *)(uintptr_t)(control + VMM_CURSOR_BEHIND(n)) + entry;
}

static uint32_t mapped_of(uint64_t control, uint32_t n) {
    return __atomic_load_n((uint32_t *)(uintptr_t)(control + VMM_CURSOR_WORDS(n)),
                           __ATOMIC_RELAXED);
}

/* All of a control block but the word that the host writes at any time. */
static CUresult touch_control(uint64_t control, uint32_t n, const sim_visit *visit) {
    CUresult status = sim_touch(visit, control, (uint64_t)n * 4, true);
    return status ? status
                  : sim_touch(visit, control + VMM_CURSOR_STATE(n),
                              VMM_CURSOR_BYTES(n) - VMM_CURSOR_STATE(n), true);
}

/* ---- appending --------------------------------------------------------------------------------- */
static const vmm_cursor_job *job_at(const sim_op *op, unsigned i) {
    return &((const vmm_cursor_args *)op->u.launch.params)->job[i];
}

/* The copy of an entry, at row 0. */
static job entry_copy(const vmm_cursor_job *j, uint32_t entry) {
    job copy = j->copy;
    copy.dst += (uint64_t)(j->dst_entry_stride * entry);
    copy.src += (uint64_t)(j->src_entry_stride * entry);
    return copy;
}

static CUresult check_job(const vmm_cursor_job *j, unsigned i, const unsigned *grid,
                          const sim_visit *visit) {
    uint64_t unit = j->copy.unit_bytes;
    CUresult status = sim_check_shape(&j->copy, i, VMM_APPEND_DIMS_WIDE);
    if (status)
        return status;
    if (j->n_entries == 0 || j->n_entries > grid[1] || j->n_blocks == 0 || j->n_blocks > grid[0] ||
        j->n_rows == 0)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "job %u: %u entries, %u blocks, %u rows", i,
                          j->n_entries, j->n_blocks, j->n_rows);
    if (j->row_bytes % unit || (uint64_t)j->dst_entry_stride % unit ||
        (uint64_t)j->src_entry_stride % unit)
        return sim_refuse(CUDA_ERROR_MISALIGNED_ADDRESS, "job %u: a step is no multiple of %u", i,
                          j->copy.unit_bytes);
    const sim_space *flag = sim_space_find(j->flag);
    if (!flag || flag->kind != SIM_SPACE_HOST || j->flag % 4 || j->control % 8)
        return sim_refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "job %u: no flag, or no control block", i);
    status = touch_control(j->control, j->n_entries, visit);
    for (uint32_t entry = 0; entry < j->n_entries && status == CUDA_SUCCESS; entry++) {
        job copy = entry_copy(j, entry);
        run r;
        status = sim_touch_side(&copy, visit, false);
        uint64_t bytes = mapped_of(j->control, j->n_entries) * j->row_bytes;
        for (bool more = sim_first_run(&copy, &r); more && visit->note;
             more = sim_next_run(&copy, &r))
            sim_note(visit, r.dst, bytes);
    }
    return status;
}

static CUresult check(const sim_op *op, const sim_visit *visit) {
    const unsigned *grid = op->u.launch.grid, *block = op->u.launch.block;
    CUresult status = CUDA_SUCCESS;
    if (block[0] != VMM_CURSOR_BLOCK_THREADS || block[1] != 1 || block[2] != 1 ||
        grid[2] > VMM_CURSOR_JOBS || grid[1] > VMM_CURSOR_MAX_ENTRIES)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "%s: grid (%u, %u, %u) of blocks (%u, %u, %u)",
                          op->name, grid[0], grid[1], grid[2], block[0], block[1], block[2]);
    for (unsigned i = 0; i < grid[2] && status == CUDA_SUCCESS; i++)
        status = check_job(job_at(op, i), i, grid, visit);
    return status;
}

/* May the work write there, now? Reports it if not: on a device, a fault. */
static bool is_writable(const sim_op *op, uint64_t control, uint64_t address, uint64_t bytes) {
    pthread_mutex_lock(&sim.lock);
    const sim_space *space = sim_space_find(control);
    sim_visit visit = {.name = op->name, .device = space->map[0]->block->device};
    CUresult status = sim_touch(&visit, address, bytes, true);
    if (status)
        sim.poison = status;
    pthread_mutex_unlock(&sim.lock);
    return status == CUDA_SUCCESS;
}

static void run_entry(const sim_op *op, const vmm_cursor_job *j, uint32_t entry) {
    uint64_t *state = state_of(j->control, j->n_entries, entry), row = *state;
    uint32_t behind = *behind_of(j->control, j->n_entries, entry);
    if (row + behind + j->n_rows > mapped_of(j->control, j->n_entries)) {
        __atomic_store_n((uint32_t *)(uintptr_t)j->flag, 1, __ATOMIC_RELEASE);
        return;
    }
    job copy = entry_copy(j, entry);
    uint64_t bytes = copy.run_units * copy.unit_bytes;
    run r;
    copy.dst += row * j->row_bytes;
    for (bool more = sim_first_run(&copy, &r); more; more = sim_next_run(&copy, &r)) {
        if (!is_writable(op, j->control, r.dst, bytes))
            return;
        memmove((void *)(uintptr_t)r.dst, (const void *)(uintptr_t)r.src, bytes);
    }
    *state = row + j->n_rows;
    ((int32_t *)(uintptr_t)j->control)[entry] = (int32_t)(row + j->n_rows);
}

static void run_jobs(const sim_op *op) {
    for (unsigned i = op->u.launch.grid[2]; i-- > 0;)
        for (uint32_t entry = 0; entry < job_at(op, i)->n_entries; entry++)
            run_entry(op, job_at(op, i), entry);
}

const sim_kernel sim_append_kernel_cursor = {VMM_APPEND_KERNEL_CURSOR, sizeof(vmm_cursor_args),
                                             check, run_jobs};

/* ---- setting ------------------------------------------------------------------------------------ */
static const vmm_cursor_set_args *sets_of(const sim_op *op) {
    return op->u.launch.params;
}

static CUresult check_sets(const sim_op *op, const sim_visit *visit) {
    const unsigned *grid = op->u.launch.grid, *block = op->u.launch.block;
    const vmm_cursor_set_args *args = sets_of(op);
    CUresult status = CUDA_SUCCESS;
    if (grid[0] != 1 || grid[1] != 1 || grid[2] != 1 || block[0] != VMM_CURSOR_BLOCK_THREADS ||
        args->n_sets == 0 || args->n_sets > VMM_CURSOR_SETS)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "%s: %llu sets in %u blocks of %u", op->name,
                          (unsigned long long)args->n_sets, grid[0], block[0]);
    for (uint64_t i = 0; i < args->n_sets && status == CUDA_SUCCESS; i++) {
        const vmm_cursor_set *set = &args->set[i];
        if (set->count == 0 || set->first + set->count > set->n_entries)
            return sim_refuse(CUDA_ERROR_INVALID_VALUE, "%s: entries %u to %u of %u", op->name,
                              set->first, set->first + set->count, set->n_entries);
        status = touch_control(set->control, set->n_entries, visit);
    }
    return status;
}

static void run_sets(const sim_op *op) {
    const vmm_cursor_set_args *args = sets_of(op);
    for (uint64_t i = 0; i < args->n_sets; i++) {
        const vmm_cursor_set *set = &args->set[i];
        for (uint32_t entry = set->first; entry < set->first + set->count; entry++) {
            *state_of(set->control, set->n_entries, entry) = set->length;
            *behind_of(set->control, set->n_entries, entry) = set->behind;
            ((int32_t *)(uintptr_t)set->control)[entry] = (int32_t)set->length;
        }
    }
}

const sim_kernel sim_cursor_kernel = {VMM_CURSOR_KERNEL, sizeof(vmm_cursor_set_args), check_sets,
                                      run_sets};
