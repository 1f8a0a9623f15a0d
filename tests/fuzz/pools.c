/* pools.c - pools, look-ahead, out-of-memory callbacks, allocations of fixed size. */
#include "fuzz.h"

/* ---- pools -------------------------------------------------------------------------------- */

void do_pool_create(void) {
    size_t granularity = w.f.granularity_bytes;
    const size_t blocks[] = {0, VMM_BLOCK_AUTO, granularity, 3 * granularity, granularity + 1, 1};
    size_t block = PICK(blocks), max = (1 + (size_t)next()) * 2 * granularity;
    int i = w.pools[0].pool ? 1 : 0;
    vmm_pool *pool;

    if (w.pools[i].pool)
        return;
    size_t smallest = block == 0 || block == VMM_BLOCK_AUTO ? granularity : block;
    bool is_valid = smallest % granularity == 0 && smallest <= max;
    vmm_status status = TRY(is_valid ? BIT(VMM_OK) : BIT(VMM_ERR_INVALID),
                            vmm_pool_create(w.f.device, block, max, &pool));
    CHECK(!status == (pool != NULL));
    if (!status)
        w.pools[i] = (pool_slot){
            .pool = pool, .block_bytes = block ? block : VMM_BLOCK_AUTO, .max_bytes = max};
}

bool is_capturing(void) {
    return w.f.is_gpu && (w.pools[0].n_captures || w.pools[1].n_captures);
}

void do_pool_trim(void) {
    int i = any_pool();
    unsigned expected = BIT(VMM_OK) | (is_capturing() ? BIT(VMM_ERR_CAPTURING) : 0);

    if (i < 0)
        TRY(BIT(VMM_ERR_INVALID), vmm_pool_trim(NULL, 0));
    else
        TRY(expected, vmm_pool_trim(w.pools[i].pool, next() & 1));
}

static bool has_allocations(int pool) {
    for (size_t i = 0; i < w.n_allocations; i++)
        if (w.allocations[i].pool == pool)
            return true;
    return false;
}

static bool has_tensors(int pool) {
    for (size_t i = 0; i < w.n_tensors; i++)
        if (w.tensors[i]->pool == pool)
            return true;
    for (size_t i = 0; i < w.n_pins; i++)
        if (w.pins[i].of->pool == pool)
            return true;
    for (size_t g = 0; g < w.n_graphs; g++)
        for (size_t i = 0; i < w.graphs[g].n; i++)
            if (w.graphs[g].jobs[i].of->pool == pool)
                return true;
    return false;
}

void do_pool_close(void) {
    int i = any_pool();

    if (i < 0)
        return;
    unsigned expected = BIT(VMM_OK) | (is_capturing() ? BIT(VMM_ERR_CAPTURING) : 0);
    vmm_status status = TRY(has_tensors(i) || has_allocations(i) ? BIT(VMM_ERR_BUSY) : expected,
                            vmm_pool_close(w.pools[i].pool));
    if (!status)
        w.pools[i] = (pool_slot){0};
    else /* it was stopped, and may not have been to be had again */
        w.pools[i].lookahead_bytes = vmm_pool_lookahead(w.pools[i].pool);
}

/* Its tensors go on, but we lose sight of the pool: only where it has none but those that
 * pins keep. */
void do_pool_release(void) {
    int i = any_pool();

    if (i < 0 || has_allocations(i))
        return;
    for (size_t t = 0; t < w.n_tensors; t++)
        if (w.tensors[t]->pool == i)
            return;
    for (size_t p = 0; p < w.n_pins; p++)
        if (w.pins[p].of->pool == i)
            w.pins[p].of->pool = -1;
    for (size_t g = 0; g < w.n_graphs; g++)
        for (size_t j = 0; j < w.graphs[g].n; j++)
            if (w.graphs[g].jobs[j].of->pool == i)
                w.graphs[g].jobs[j].of->pool = -1;
    arm();
    vmm_pool_release(w.pools[i].pool);
    settle(VMM_OK, BIT(VMM_OK), "vmm_pool_release");
    w.pools[i] = (pool_slot){0};
}

void do_bracket(void) {
    int i = any_pool();

    if (i < 0)
        return;
    if (next() & 1) {
        TRY(BIT(VMM_OK), vmm_pool_capture_begin(w.pools[i].pool));
        w.pools[i].n_captures++;
    } else if (w.pools[i].n_captures) {
        TRY(BIT(VMM_OK), vmm_pool_capture_end(w.pools[i].pool));
        w.pools[i].n_captures--;
    } else {
        TRY(BIT(VMM_ERR_INVALID), vmm_pool_capture_end(w.pools[i].pool));
    }
}

/* Out of memory: do what a callback may, and try what it must not. */
static int on_oom(void *user, size_t needed_bytes) {
    pool_slot *slot = user;
    shadow *s = any_tensor();
    void *out;

    CHECK(needed_bytes > 0);
    switch (next() % 6) {
    case 0: return 0;
    case 1: vmm_pool_trim(slot->pool, next() & 1); return 1;
    case 2:
        if (!s || is_busy(s) || s->n_pins)
            return 0;
        CHECK_OK(vmm_close(s->tensor));
        remove_tensor(s);
        return 1;
    case 3:
        if (!s || is_busy(s))
            return 0;
        if (vmm_trim(s->tensor)) {
            CHECK(s->cursor); /* a graph has appended, or the device cannot be asked or told */
            s->unsure = true;
        }
        s->mapped = vmm_mapped(s->tensor);
        return 1;
    case 4:
        if (w.n_busy) {
            CHECK_STATUS(vmm_grow(w.busy[0]->tensor, 1, &out), VMM_ERR_BUSY);
            CHECK_STATUS(vmm_trim(w.busy[0]->tensor), VMM_ERR_BUSY);
            if (!w.busy[0]->n_pins)
                CHECK_STATUS(vmm_close(w.busy[0]->tensor), VMM_ERR_BUSY);
        }
        return 0;
    default: return 1; /* not true */
    }
}

void do_hook(void) {
    int i = any_pool();

    if (i < 0)
        return;
    if (next() & 1) {
        bool any = w.pools[i].n_hooks > 0;
        TRY(any ? BIT(VMM_OK) : BIT(VMM_ERR_INVALID),
            vmm_pool_on_oom(w.pools[i].pool, NULL, &w.pools[i]));
        w.pools[i].n_hooks = 0;
    } else if (w.pools[i].n_hooks < 3) {
        TRY(BIT(VMM_OK), vmm_pool_on_oom(w.pools[i].pool, on_oom, &w.pools[i]));
        w.pools[i].n_hooks++;
    }
}

/* Its thread's calls come at any time: also one that was made to fail may be its. */
void do_lookahead(void) {
    const size_t bytes[] = {0, 1, w.f.granularity_bytes, 16 * w.f.granularity_bytes, SIZE_MAX};
    size_t max = PICK(bytes);
    int i = any_pool();

    if (i < 0) {
        TRY(BIT(VMM_ERR_INVALID), vmm_pool_set_lookahead(NULL, max));
        return;
    }
    if (!TRY(OK_OR_NO_MEMORY, vmm_pool_set_lookahead(w.pools[i].pool, max)))
        w.pools[i].lookahead_bytes = max;
}

/* ---- allocations ------------------------------------------------------------------------------ */

void free_allocation(size_t i) {
    uint8_t *pointer = w.allocations[i].pointer, contents = w.allocations[i].contents;
    size_t bytes = w.allocations[i].bytes;
    vmm_pool *pool = w.pools[w.allocations[i].pool].pool;
    uint8_t *seen = malloc(bytes);

    CHECK(seen);
    read_device(&w.f, seen, (uintptr_t)pointer, bytes);
    for (size_t at = 0; at < bytes; at++)
        CHECK(seen[at] == contents);
    free(seen);
    TRY(BIT(VMM_OK), vmm_pool_free(pool, pointer));
    TRY(BIT(VMM_ERR_INVALID), vmm_pool_free(pool, pointer));
    w.allocations[i] = w.allocations[--w.n_allocations];
}

void do_alloc(void) {
    size_t granularity = w.f.granularity_bytes;
    const size_t sizes[] = {0, 1, granularity, 2 * granularity + 1, 40 * granularity, SIZE_MAX};
    size_t bytes = PICK(sizes);
    vmm_stream stream = any_stream();
    int i = any_pool();
    void *pointer;

    if (i < 0 || w.n_allocations == MAX_ALLOCATIONS)
        return;
    unsigned expected = bytes == 0          ? BIT(VMM_ERR_INVALID)
                        : bytes == SIZE_MAX ? BIT(VMM_ERR_OVERFLOW)
                                            : OK_OR_NO_MEMORY;
    vmm_status status = TRY(expected, vmm_pool_alloc(w.pools[i].pool, bytes, stream, &pointer));
    CHECK(!status == (pointer != NULL));
    if (status)
        return;
    size_t block = w.pools[i].block_bytes == VMM_BLOCK_AUTO ? granularity : w.pools[i].block_bytes;
    uint8_t contents = next(), *data = malloc(bytes);
    CHECK(data);
    memset(data, contents, bytes);
    write_device(&w.f, pointer, data, bytes);
    free(data);
    w.allocations[w.n_allocations].pointer = pointer;
    w.allocations[w.n_allocations].bytes = bytes;
    w.allocations[w.n_allocations].mapped_bytes = (bytes + block - 1) / block * block;
    w.allocations[w.n_allocations].contents = contents;
    w.allocations[w.n_allocations++].pool = i;
}

void do_free(void) {
    if (w.n_allocations)
        free_allocation(next() % w.n_allocations);
}
