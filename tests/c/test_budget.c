/* A pool never holds more than its budget, and asks its callbacks before it reports out of
 * memory (invariants 3 and 8). */
#include "check.h"

static const int64_t shape[] = {0, 1024}; /* uint8: four rows to a page */

static vmm_spec make_spec(size_t block_bytes, size_t capacity_bytes) {
    return (vmm_spec){.ndim = 2,
                      .shape = shape,
                      .dtype = VMM_UINT8,
                      .capacity = capacity_bytes / 1024,
                      .block_bytes = block_bytes};
}

static void test_exhausted(const fixture *f, size_t block_bytes) {
    size_t granule = f->granularity_bytes, max_bytes = 16 * granule;
    fixture tight = *f;
    vmm_spec spec = make_spec(block_bytes, 64 * granule);
    vmm_pool_stats stats;

    CHECK_OK(vmm_pool_create(f->device, block_bytes, max_bytes, &tight.pool));
    model a = model_open(&tight, &spec), b = model_open(&tight, &spec);
    for (int round = 0; round < 3; round++) {
        size_t step = granule / 1024 / 2; /* half a granule */
        while (vmm_map(a.tensor, a.length + step) == VMM_OK) {
            model_append(&a, VMM_UINT8, step, VMM_MEMORY_HOST, NULL);
            CHECK(held_bytes(tight.pool) <= max_bytes);
        }
        CHECK(vmm_last_error()->status == VMM_ERR_OUT_OF_MEMORY);
        CHECK(strstr(vmm_last_error()->message, "budget"));
        /* Under auto the last blocks are small ones, so the budget is used to the end. */
        CHECK(a.length * 1024 >
              max_bytes - (block_bytes == VMM_BLOCK_AUTO ? granule : block_bytes));
        model_check(&a);
        size_t mapped = vmm_mapped(a.tensor);
        CHECK_STATUS(vmm_grow(b.tensor, 1, NULL), VMM_ERR_OUT_OF_MEMORY);
        CHECK_STATUS(vmm_grow(a.tensor, 8 * granule / 1024, NULL), VMM_ERR_OUT_OF_MEMORY);
        CHECK_SIZE(vmm_length(a.tensor), a.length);
        CHECK_SIZE(vmm_mapped(a.tensor), mapped);
        CHECK_SIZE(vmm_mapped(b.tensor), 0);
        model_check(&a);

        /* What one gives back serves the other: on a GPU it is queued and taken back. */
        CHECK_OK(vmm_truncate(a.tensor, a.length / 4, NULL));
        a.length /= 4;
        CHECK_OK(vmm_trim(a.tensor));
        model_append(&b, VMM_UINT8, 8 * granule / 1024, VMM_MEMORY_HOST, NULL);
        CHECK(held_bytes(tight.pool) <= max_bytes);
        model_check(&a);
        model_check(&b);
        CHECK_OK(vmm_truncate(b.tensor, 0, NULL));
        b.length = 0;
        CHECK_OK(vmm_trim(b.tensor));
    }
    CHECK_OK(vmm_pool_statistics(tight.pool, &stats));
    CHECK_SIZE(stats.max_bytes, max_bytes);
    CHECK(stats.peak_bytes <= max_bytes && stats.peak_bytes > max_bytes / 2);
    model_close(&a);
    model_close(&b);
    CHECK_OK(vmm_pool_close(tight.pool));
}

typedef struct oom {
    vmm_pool *pool;
    vmm_tensor *growing; /* whose calls must be refused meanwhile */
    vmm_tensor **victim; /* to be closed, or NULL */
    int calls;
    int *order, rank;
    size_t needed_bytes;
} oom;

static int on_oom(void *user, size_t needed_bytes) {
    oom *state = user;
    vmm_pool_stats stats;

    state->calls++;
    state->needed_bytes = needed_bytes;
    if (state->order)
        *state->order = *state->order * 10 + state->rank;
    if (state->growing) {
        CHECK_STATUS(vmm_grow(state->growing, 1, NULL), VMM_ERR_BUSY);
        CHECK_STATUS(vmm_map(state->growing, 1), VMM_ERR_BUSY);
        CHECK_STATUS(vmm_truncate(state->growing, 0, VMM_STREAM_NONE), VMM_ERR_BUSY);
        CHECK_STATUS(vmm_trim(state->growing), VMM_ERR_BUSY);
        CHECK_STATUS(vmm_close(state->growing), VMM_ERR_BUSY);
    }
    CHECK_OK(vmm_pool_statistics(state->pool, &stats)); /* no lock is held */
    CHECK_OK(vmm_pool_trim(state->pool, 0));
    if (!state->victim || !*state->victim)
        return 0;
    CHECK_OK(vmm_close(*state->victim));
    *state->victim = NULL;
    return 1;
}

static void test_callbacks(const fixture *f) {
    size_t granule = f->granularity_bytes, rows = granule / 1024;
    fixture tight = *f;
    vmm_spec spec = make_spec(granule, 64 * granule);
    vmm_tensor *victim;
    int order = 0;

    CHECK_OK(vmm_pool_create(f->device, granule, 8 * granule, &tight.pool));
    CHECK_OK(vmm_reserve(tight.pool, &spec, &victim));
    CHECK_OK(vmm_grow(victim, 4 * rows, NULL));
    model m = model_open(&tight, &spec);
    model_append(&m, VMM_UINT8, 4 * rows, VMM_MEMORY_HOST, NULL);

    oom idle = {.pool = tight.pool, .growing = m.tensor, .order = &order, .rank = 1};
    oom closing = {.pool = tight.pool, .victim = &victim, .order = &order, .rank = 2};
    CHECK_OK(vmm_pool_on_oom(tight.pool, on_oom, &idle));
    CHECK_STATUS(vmm_grow(m.tensor, 1, NULL), VMM_ERR_OUT_OF_MEMORY);
    CHECK(idle.calls == 1 && idle.needed_bytes >= granule);
    model_check(&m);

    CHECK_OK(vmm_pool_on_oom(tight.pool, on_oom, &closing));
    order = 0;
    model_append(&m, VMM_UINT8, 3 * rows, VMM_MEMORY_HOST, NULL);
    CHECK(!victim && closing.calls == 1 && order == 12);
    CHECK(held_bytes(tight.pool) <= 8 * granule);
    model_check(&m);
    CHECK_STATUS(vmm_grow(m.tensor, 2 * rows, NULL), VMM_ERR_OUT_OF_MEMORY);
    model_check(&m);

    CHECK_OK(vmm_pool_on_oom(tight.pool, NULL, &idle));
    CHECK_STATUS(vmm_pool_on_oom(tight.pool, NULL, &idle), VMM_ERR_INVALID);
    int calls = idle.calls;
    CHECK_STATUS(vmm_grow(m.tensor, 2 * rows, NULL), VMM_ERR_OUT_OF_MEMORY);
    CHECK(idle.calls == calls);
    model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL); /* the last that fits */
    model_check(&m);
    model_close(&m);
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* Blocks of one size, free in the pool, do not stand in the way of another size. */
static void test_free_blocks_make_room(const fixture *f) {
    size_t granule = f->granularity_bytes;
    fixture tight = *f;
    vmm_spec small = make_spec(granule, 64 * granule), large = make_spec(4 * granule, 64 * granule);

    CHECK_OK(vmm_pool_create(f->device, 0, 8 * granule, &tight.pool));
    model a = model_open(&tight, &small);
    model_append(&a, VMM_UINT8, 8 * granule / 1024, VMM_MEMORY_HOST, NULL);
    model_close(&a);
    model b = model_open(&tight, &large);
    model_append(&b, VMM_UINT8, 8 * granule / 1024, VMM_MEMORY_HOST, NULL);
    CHECK(held_bytes(tight.pool) <= 8 * granule);
    model_check(&b);
    model_close(&b);
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* A tensor's own blocks are larger than the pool's budget: nothing is given up for one. */
static void test_block_beyond_the_budget(const fixture *f) {
    size_t granule = f->granularity_bytes;
    fixture tight = *f;
    vmm_spec small = make_spec(granule, 4 * granule), large = make_spec(4 * granule, 8 * granule);

    CHECK_OK(vmm_pool_create(f->device, granule, 2 * granule, &tight.pool));
    model a = model_open(&tight, &small), b = model_open(&tight, &large);
    model_append(&a, VMM_UINT8, 1, VMM_MEMORY_HOST, NULL);
    size_t held = held_bytes(tight.pool);
    CHECK_STATUS(vmm_grow(b.tensor, 1, NULL), VMM_ERR_OUT_OF_MEMORY);
    CHECK(strstr(vmm_last_error()->message, "budget"));
    CHECK_SIZE(held_bytes(tight.pool), held);
    model_check(&a);
    model_close(&a);
    model_close(&b);
    CHECK_OK(vmm_pool_close(tight.pool));
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    test_exhausted(&f, f.granularity_bytes);
    test_exhausted(&f, 2 * f.granularity_bytes);
    test_exhausted(&f, VMM_BLOCK_AUTO);
    test_callbacks(&f);
    test_block_beyond_the_budget(&f);
    test_free_blocks_make_room(&f);
    fixture_close(&f);
    return 0;
}
