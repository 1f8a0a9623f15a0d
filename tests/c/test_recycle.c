/* A closed tensor's range stays mapped, and the next tensor of the same geometry takes it over
 * behind one fence; it is unmapped only where memory is short or trim asks (invariants 3, 6, 8).
 * On a GPU; the host returns memory at close. */
#include "blocks.h"

#include <semaphore.h>

#include "../sim/vmm_sim.h"

#define UNKNOWN 999

/* A tensor that has used `n_blocks` and is closed; the device is done with it. */
static void *close_used(const fixture *f, const vmm_spec *spec, size_t n_blocks) {
    model m = model_open(f, spec);
    void *base = m.base;

    model_append(&m, VMM_UINT8, n_blocks * rows, VMM_MEMORY_HOST, NULL);
    model_close(&m);
    synchronize(f);
    return base;
}

/* A fence that waits for the device is not taken at open: it is provided here. */
static void provide_fence(const fixture *f) {
    vmm_spec other = make_spec(3);

    if (!is_hip)
        return;
    /* A growth beyond the budget waits; what it needed is there afterwards. */
    model m = model_open(f, &other);
    CHECK_STATUS(vmm_grow(m.tensor, 3 * rows, NULL), VMM_OK);
    model_close(&m);
}

static bool same_but(const vmm_pool_stats *a, const vmm_pool_stats *b, vmm_call x, vmm_call y) {
    for (int i = 0; i < VMM_CALL_COUNT; i++)
        if (i != (int)x && i != (int)y && a->driver_calls[i] != b->driver_calls[i])
            return false;
    return true;
}

/* Open after close: one record, one query, and growth over all that was mapped makes none. */
static void test_open_after_close(const fixture *f) {
    fixture own = with_pool(f, 0);
    vmm_spec spec = make_spec(16);
    void *base = close_used(&own, &spec, 16);
    vmm_pool_stats before = pool_stats(own.pool);

    CHECK_SIZE(before.queued_bytes, 16 * granule);
    model m = model_open(&own, &spec);
    vmm_pool_stats opened = pool_stats(own.pool);
    CHECK(m.base == base);
    CHECK(same_but(&before, &opened, VMM_CALL_fence, VMM_CALL_event_query));
    CHECK(opened.driver_calls[VMM_CALL_fence] == before.driver_calls[VMM_CALL_fence] + 1);
    CHECK(opened.driver_calls[VMM_CALL_event_query] ==
          before.driver_calls[VMM_CALL_event_query] + 1);
    CHECK_SIZE(opened.recycled_bytes, 16 * granule);
    CHECK_SIZE(opened.in_use_bytes, 0);
    CHECK_SIZE(vmm_length(m.tensor), 0);
    CHECK_SIZE(vmm_mapped(m.tensor), 0);

    long seen = simulated_calls(f);
    uint64_t calls = pool_calls(own.pool);
    for (size_t k = 1; k <= 16; k++) {
        model_grow(&m, rows, false);
        CHECK_SIZE(vmm_mapped(m.tensor), k * rows);
        CHECK_SIZE(pool_stats(own.pool).recycled_bytes, (16 - k) * granule);
        CHECK_SIZE(held_bytes(own.pool), 16 * granule);
    }
    CHECK(pool_calls(own.pool) == calls && simulated_calls(f) == seen);
    CHECK_OK(vmm_truncate(m.tensor, 0, VMM_STREAM_NONE));
    m.length = 0;
    model_append(&m, VMM_UINT8, 16 * rows, VMM_MEMORY_HOST, NULL); /* all of it is there */
    model_check(&m);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* A range that a fence has released already costs no call at all; the newest comes first. */
static void test_second_open_costs_nothing(const fixture *f) {
    fixture own = with_pool(f, 0);
    vmm_spec spec = make_spec(4);
    model a = model_open(&own, &spec), b = model_open(&own, &spec);
    void *a_base = a.base, *b_base = b.base;

    model_grow(&a, 4 * rows, false);
    model_grow(&b, 2 * rows, false);
    model_close(&a);
    model_close(&b);
    a = model_open(&own, &spec);
    CHECK(a.base == b_base);
    uint64_t calls = pool_calls(own.pool);
    b = model_open(&own, &spec);
    CHECK(b.base == a_base && pool_calls(own.pool) == calls);
    model_grow(&b, 4 * rows, false);
    model_grow(&a, 2 * rows, false);
    CHECK(pool_calls(own.pool) == calls);
    model_close(&a);
    model_close(&b);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* Address space alone is used again, too, and needs no fence. */
static void test_reservation_is_reused(const fixture *f) {
    fixture own = with_pool(f, 0);
    vmm_spec spec = make_spec(4);
    model m = model_open(&own, &spec);
    void *base = m.base;

    model_close(&m);
    uint64_t calls = pool_calls(own.pool);
    m = model_open(&own, &spec);
    CHECK(m.base == base && pool_calls(own.pool) == calls);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

static void test_other_geometry(const fixture *f) {
    static const int64_t lanes_shape[] = {2, 0, 64 * 1024};
    fixture own = with_pool(f, 0);
    vmm_spec spec = make_spec(4), longer = make_spec(5), blocks = make_spec(4);
    vmm_spec lanes = {.ndim = 3,
                      .shape = lanes_shape,
                      .axis = 1,
                      .dtype = VMM_UINT8,
                      .layout = VMM_LAYOUT_LANE,
                      .capacity = 2 * rows,
                      .block_bytes = granule};
    vmm_spec *others[] = {&longer, &blocks, &lanes};
    void *base = close_used(&own, &spec, 4);

    blocks.block_bytes = 2 * granule;
    for (size_t i = 0; i < LENGTH_OF(others); i++) {
        vmm_pool_stats before = pool_stats(own.pool), after;
        model m = model_open(&own, others[i]);
        after = pool_stats(own.pool);
        CHECK(m.base != base);
        CHECK(same_but(&before, &after, VMM_CALL_reserve, VMM_CALL_reserve));
        model_close(&m);
    }
    model m = model_open(&own, &spec);
    CHECK(m.base == base);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

static void wait_for(void *semaphore) {
    sem_wait(semaphore);
}

/* While a kernel is in flight the range is nobody's: each open asks once and gets a fresh one; a
 * fence that is pending and does not cover it is not asked. */
static void test_in_flight(const fixture *f) {
    fixture own = with_pool(f, 0);
    vmm_spec spec = make_spec(4);
    model m = model_open(&own, &spec);
    void *base = m.base, *stream, *memory;
    uint32_t number;
    sem_t gate;

    sem_init(&gate, 0, 0);
    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    CHECK_CUDA(cuda()->host_alloc(&memory, 64 * KIB, 0));
    model_append(&m, VMM_UINT8, 4 * rows, VMM_MEMORY_HOST, NULL);
    number = m.numbers[rows];
    CHECK_CUDA(cuda()->host_function(stream, wait_for, &gate));
    CHECK_CUDA(cuda()->to_host_async(memory, (uintptr_t)base + granule, 64 * KIB, stream));
    model_close(&m);

    model fresh = model_open(&own, &spec), more;
    vmm_pool_stats stats = pool_stats(own.pool);
    CHECK(fresh.base != base && stats.queued_bytes == 4 * granule && stats.recycled_bytes == 0);
    CHECK(stats.driver_calls[VMM_CALL_fence] == 1 && stats.driver_calls[VMM_CALL_event_query] == 1);
    more = model_open(&own, &spec); /* the fence is pending: one query */
    stats = pool_stats(own.pool);
    CHECK(more.base != base);
    CHECK(stats.driver_calls[VMM_CALL_fence] == 1 && stats.driver_calls[VMM_CALL_event_query] == 2);
    model_append(&fresh, VMM_UINT8, 4 * rows, VMM_MEMORY_HOST, NULL); /* its own blocks */
    sem_post(&gate);
    CHECK_CUDA(cuda()->stream_synchronize(stream));
    for (size_t i = 0; i < 64 * KIB; i += 4096)
        CHECK(((uint8_t *)memory)[i] == row_byte(number, i));
    model again = model_open(&own, &spec);
    CHECK(again.base == base);
    model_append(&again, VMM_UINT8, 4 * rows, VMM_MEMORY_HOST, NULL);
    model_check(&again);
    model_check(&fresh);
    model_close(&again);
    model_close(&fresh);
    model_close(&more);
    CHECK_OK(vmm_pool_close(own.pool));
    CHECK_CUDA(cuda()->host_free(memory));
    CHECK_CUDA(cuda()->stream_destroy(stream));
}

/* No fence is recorded in a capture that is known of. */
static void test_capture(const fixture *f) {
    fixture own = with_pool(f, 0);
    vmm_spec spec = make_spec(4);
    void *base = close_used(&own, &spec, 4);

    CHECK_OK(vmm_pool_capture_begin(own.pool));
    model m = model_open(&own, &spec);
    CHECK(m.base != base && pool_stats(own.pool).driver_calls[VMM_CALL_fence] == 0);
    CHECK_OK(vmm_pool_capture_end(own.pool));
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* The budget counts what is recycled, and gets it back before anything is refused; so does trim. */
static void test_pressure(const fixture *f) {
    fixture own = with_pool(f, 8 * granule);
    vmm_spec spec = make_spec(8), other = make_spec(9);

    close_used(&own, &spec, 5);
    provide_fence(&own);
    model m = model_open(&own, &spec); /* covers it */
    model_close(&m);
    model big = model_open(&own, &other);
    for (size_t k = 1; k <= 8; k++) {
        model_append(&big, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
        CHECK(held_bytes(own.pool) <= 8 * granule);
    }
    CHECK_STATUS(vmm_grow(big.tensor, rows, NULL), VMM_ERR_OUT_OF_MEMORY);
    CHECK_SIZE(pool_stats(own.pool).in_use_bytes, 8 * granule);
    model_check(&big);
    model_close(&big);
    CHECK_OK(vmm_pool_trim(own.pool, 1));
    CHECK_SIZE(held_bytes(own.pool), 0);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* Nothing is unmapped because another tensor grows, until more lies idle than was ever in use:
 * then the oldest goes. */
static void test_high_water(const fixture *f) {
    fixture own = with_pool(f, 0);
    vmm_spec specs[] = {make_spec(4), make_spec(5), make_spec(6)};

    close_used(&own, &specs[0], 4);
    CHECK_SIZE(pool_stats(own.pool).driver_calls[VMM_CALL_create], 4);
    close_used(&own, &specs[1], 4); /* 4 in use at most, 4 recycled: no more than was needed */
    CHECK_SIZE(pool_stats(own.pool).driver_calls[VMM_CALL_unmap], 0);
    CHECK_SIZE(held_bytes(own.pool), 8 * granule);
    for (int i = 0; i < 6; i++) {
        close_used(&own, &specs[(i + 2) % 3], 4);
        vmm_pool_stats stats = pool_stats(own.pool);
        CHECK(held_bytes(own.pool) <= 3 * 4 * granule);
        CHECK(stats.driver_calls[VMM_CALL_create] <= 12);
    }
    CHECK_OK(vmm_pool_trim(own.pool, 1));
    CHECK_SIZE(held_bytes(own.pool), 0);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* Blocks that no one has asked for since are old data: zero=True does not show them. */
static void test_zero(const fixture *f) {
    fixture own = with_pool(f, 0);
    vmm_spec spec = make_spec(4);
    void *base = close_used(&own, &spec, 4);

    spec.zero = 1;
    model m = model_open(&own, &spec);
    CHECK(m.base == base);
    model_grow(&m, 4 * rows, false);
    uint8_t *data = read_rows(f, m.tensor, 0, 4 * rows);
    for (size_t i = 0; i < 4 * granule; i += 512)
        CHECK(data[i] == 0);
    free(data);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* A growth that only took spare blocks, and whose launch fails, leaves them spare: at once when
 * nothing was submitted. */
static void test_undo(const fixture *f) {
    __typeof__(vmm_sim_fail) *fail;
    fixture own = with_pool(f, 0);
    vmm_spec spec = make_spec(4);
    void *memory = device_alloc(f, granule);
    int64_t n_rows[] = {(int64_t)rows, 64 * 1024};
    vmm_array source = {.data = memory,
                        .memory = VMM_MEMORY_DEVICE,
                        .dtype = VMM_UINT8,
                        .ndim = 2,
                        .shape = n_rows};

    *(void **)&fail = dlsym(cuda_library(), "vmm_sim_fail");
    close_used(&own, &spec, 4);
    model m = model_open(&own, &spec);
    model_append(&m, VMM_UINT8, rows, VMM_MEMORY_DEVICE, NULL);
    vmm_pool_stats before = pool_stats(own.pool), after;
    CHECK(fail("cuLaunchKernel", 1, UNKNOWN, 1) == 0);
    CHECK_STATUS(vmm_append(m.tensor, &source, NULL), VMM_ERR_DRIVER);
    after = pool_stats(own.pool);
    CHECK(before.recycled_bytes == 3 * granule && after.recycled_bytes == 3 * granule);
    CHECK(after.queued_bytes == 0 && after.in_use_bytes == granule);
    CHECK(same_but(&before, &after, VMM_CALL_launch, VMM_CALL_launch));
    CHECK_SIZE(vmm_mapped(m.tensor), rows);
    model_append(&m, VMM_UINT8, 3 * rows, VMM_MEMORY_DEVICE, NULL);
    model_check(&m);

    /* The fence fails at open, and then the query: a fresh reservation, and nothing is lost. */
    static const char *const calls[] = {"cuCtxRecordEvent", "cuEventQuery"};
    for (size_t i = 0; i < LENGTH_OF(calls); i++) {
        void *base = m.base;
        model_close(&m);
        CHECK(fail(calls[i], 1, UNKNOWN, 1) == 0);
        m = model_open(&own, &spec);
        CHECK(m.base != base);
        model_append(&m, VMM_UINT8, 4 * rows, VMM_MEMORY_HOST, NULL);
        model_check(&m);
    }
    model_close(&m);
    device_free(f, memory);
    CHECK_OK(vmm_pool_trim(own.pool, 1));
    CHECK_SIZE(held_bytes(own.pool), 0);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* An allocation of the same size is a range like any other. */
static void test_alloc(const fixture *f) {
    fixture own = with_pool(f, 0);
    void *first, *second;

    CHECK_OK(vmm_pool_alloc(own.pool, 3 * granule, NULL, &first));
    CHECK_OK(vmm_pool_free(own.pool, first));
    synchronize(f);
    vmm_pool_stats before = pool_stats(own.pool), after;
    CHECK_OK(vmm_pool_alloc(own.pool, 3 * granule, NULL, &second));
    after = pool_stats(own.pool);
    CHECK(second == first);
    CHECK(after.driver_calls[VMM_CALL_map] == before.driver_calls[VMM_CALL_map]);
    CHECK(after.driver_calls[VMM_CALL_set_access] == before.driver_calls[VMM_CALL_set_access]);
    CHECK_OK(vmm_pool_free(own.pool, second));
    CHECK_OK(vmm_pool_close(own.pool));
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    if (!f.is_gpu)
        SKIP("the host returns memory at close");
    cuda();
    blocks_are(f.granularity_bytes, 64 * KIB);
    test_reservation_is_reused(&f);
    test_pressure(&f);
    test_capture(&f);
    if (!is_hip) { /* whose fence waits, and is not taken at open */
        test_open_after_close(&f);
        test_second_open_costs_nothing(&f);
        test_other_geometry(&f);
        test_in_flight(&f);
        test_high_water(&f);
        test_zero(&f);
        test_alloc(&f);
        if (dlsym(cuda_library(), "vmm_sim_fail"))
            test_undo(&f);
    }
    fixture_close(&f);
    return 0;
}
