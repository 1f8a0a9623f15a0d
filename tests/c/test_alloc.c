/* Allocations of a fixed size: whole, counted in the pool, given back by address
 * (invariants 3, 6 and 8). */
#include <pthread.h>

#include "check.h"

static int called;

static int count_call(void *user, size_t needed_bytes) {
    (void)user, (void)needed_bytes;
    called++;
    return 1;
}

static vmm_pool_stats stats_of(vmm_pool *pool) {
    vmm_pool_stats stats;
    CHECK_OK(vmm_pool_statistics(pool, &stats));
    return stats;
}

/* Every byte is there, the addresses differ, and one block serves one allocation. */
static void test_contents(const fixture *f) {
    const size_t sizes[] = {1, f->granularity_bytes, 5 * f->granularity_bytes + 1};
    void *pointers[LENGTH_OF(sizes)];
    size_t in_use = 0;

    for (size_t i = 0; i < LENGTH_OF(sizes); i++) {
        uint8_t *data = malloc(sizes[i]);
        CHECK(data);
        memset(data, (int)i + 1, sizes[i]);
        CHECK_OK(vmm_pool_alloc(f->pool, sizes[i], NULL, &pointers[i]));
        write_device(f, pointers[i], data, sizes[i]);
        in_use += (sizes[i] + f->granularity_bytes - 1) / f->granularity_bytes;
        free(data);
    }
    CHECK_SIZE(stats_of(f->pool).in_use_bytes, in_use * f->granularity_bytes);
    CHECK_SIZE(stats_of(f->pool).driver_calls[VMM_CALL_map], LENGTH_OF(sizes));
    for (size_t i = 0; i < LENGTH_OF(sizes); i++) {
        uint8_t *data = malloc(sizes[i]);
        CHECK(data);
        read_device(f, data, (uintptr_t)pointers[i], sizes[i]);
        for (size_t at = 0; at < sizes[i]; at++)
            CHECK(data[at] == i + 1);
        free(data);
    }
    uint64_t before = pool_calls(f->pool);
    for (size_t i = 0; i < LENGTH_OF(sizes); i++)
        CHECK_OK(vmm_pool_free(f->pool, pointers[i]));
    if (f->is_gpu) {
        CHECK_SIZE(pool_calls(f->pool), before); /* queued */
        CHECK_SIZE(stats_of(f->pool).queued_bytes, in_use * f->granularity_bytes);
    }
    CHECK_SIZE(stats_of(f->pool).in_use_bytes, 0);
}

static void test_arguments(const fixture *f) {
    void *pointer = &pointer;

    CHECK_STATUS(vmm_pool_alloc(f->pool, 0, NULL, &pointer), VMM_ERR_INVALID);
    CHECK(!pointer);
    CHECK_STATUS(vmm_pool_alloc(f->pool, SIZE_MAX, NULL, &pointer), VMM_ERR_OVERFLOW);
    CHECK_STATUS(vmm_pool_alloc(f->pool, PTRDIFF_MAX, NULL, &pointer), VMM_ERR_OVERFLOW);
    CHECK_STATUS(vmm_pool_alloc(NULL, 1, NULL, &pointer), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pool_alloc(f->pool, 1, NULL, NULL), VMM_ERR_INVALID);
    CHECK_OK(vmm_pool_free(f->pool, NULL));
    CHECK_STATUS(vmm_pool_free(NULL, &pointer), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pool_free(f->pool, &pointer), VMM_ERR_INVALID);
    CHECK_OK(vmm_pool_alloc(f->pool, 1, NULL, &pointer));
    CHECK_STATUS(vmm_pool_free(f->pool, (char *)pointer + 1), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pool_close(f->pool), VMM_ERR_BUSY);
    CHECK_OK(vmm_pool_free(f->pool, pointer));
    CHECK_STATUS(vmm_pool_free(f->pool, pointer), VMM_ERR_INVALID);
}

/* Within the budget, without a callback, and what was freed serves the next. */
static void test_budget(const fixture *f) {
    size_t granule = f->granularity_bytes;
    vmm_pool *pool;
    void *first, *second;

    CHECK_OK(vmm_pool_create(f->device, VMM_BLOCK_AUTO, 4 * granule, &pool));
    CHECK_OK(vmm_pool_on_oom(pool, count_call, NULL));
    CHECK_OK(vmm_pool_alloc(pool, 3 * granule, NULL, &first));
    CHECK_STATUS(vmm_pool_alloc(pool, 2 * granule, NULL, &second), VMM_ERR_OUT_OF_MEMORY);
    CHECK(!second);
    CHECK_SIZE(called, 0);
    CHECK_SIZE(held_bytes(pool), 3 * granule);
    CHECK_OK(vmm_pool_free(pool, first));
    CHECK_OK(vmm_pool_alloc(pool, 4 * granule, NULL, &second));
    CHECK_SIZE(held_bytes(pool), 4 * granule);
    CHECK_OK(vmm_pool_free(pool, second));
    CHECK_OK(vmm_pool_close(pool));
}

/* Freeing goes on after the pool has been given up, as at exit. */
static void test_after_release(const fixture *f) {
    vmm_pool *pool;
    void *pointer;

    CHECK_OK(vmm_pool_create(f->device, VMM_BLOCK_AUTO, 0, &pool));
    CHECK_OK(vmm_pool_alloc(pool, 100, NULL, &pointer));
    vmm_pool_release(pool);
    CHECK_OK(vmm_pool_free(pool, pointer));
}

static void *allocate_and_free(void *argument) {
    const fixture *f = argument;
    void *pointers[16];

    for (int round = 0; round < 20; round++) {
        for (size_t i = 0; i < LENGTH_OF(pointers); i++)
            CHECK_OK(vmm_pool_alloc(f->pool, (i + 1) * 1000, NULL, &pointers[i]));
        for (size_t i = LENGTH_OF(pointers); i-- > 0;)
            CHECK_OK(vmm_pool_free(f->pool, pointers[i]));
    }
    return NULL;
}

static void test_threads(fixture *f) {
    pthread_t threads[4];

    for (size_t i = 0; i < LENGTH_OF(threads); i++)
        CHECK(pthread_create(&threads[i], NULL, allocate_and_free, f) == 0);
    for (size_t i = 0; i < LENGTH_OF(threads); i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, VMM_BLOCK_AUTO, 0);

    test_contents(&f);
    test_arguments(&f);
    test_budget(&f);
    test_after_release(&f);
    test_threads(&f);
    fixture_close(&f);
    return 0;
}
