/* On a GPU, memory that is given back is queued: no driver call, until a fence is taken for
 * all of it when it is needed. On the host it goes back at once (invariants 6 and 9). */
#include "check.h"

#include <semaphore.h>

static const int64_t shape[] = {0, 64 * 1024}; /* uint8 */

static vmm_spec make_spec(const fixture *f) {
    size_t granule = f->granularity_bytes;

    return (vmm_spec){.ndim = 2,
                      .shape = shape,
                      .dtype = VMM_UINT8,
                      .capacity = 64 * (granule > 64 * KIB ? granule / (64 * KIB) : 1),
                      .block_bytes = granule};
}

static void test_host(const fixture *f) {
    vmm_spec spec = make_spec(f);
    model m = model_open(f, &spec);
    vmm_pool_stats stats;

    model_append(&m, VMM_UINT8, 60, VMM_MEMORY_HOST, NULL);
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    CHECK(stats.in_use_bytes >= 60 * 64 * KIB);
    CHECK_OK(vmm_truncate(m.tensor, 10, VMM_STREAM_NONE));
    m.length = 10;
    CHECK_OK(vmm_trim(m.tensor));
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    CHECK(stats.in_use_bytes < 12 * 64 * KIB);
    CHECK_SIZE(held_bytes(f->pool), stats.in_use_bytes);
    model_check(&m);
    model_close(&m);
    CHECK_SIZE(held_bytes(f->pool), 0);
}

static void test_close_queues(const fixture *f) {
    vmm_spec spec = make_spec(f);
    size_t granule = f->granularity_bytes, rows = granule / (64 * KIB);
    vmm_pool_stats stats;
    model models[8];

    for (int i = 0; i < 8; i++) {
        models[i] = model_open(f, &spec);
        model_append(&models[i], VMM_UINT8, 4 * rows, VMM_MEMORY_HOST, NULL);
    }
    uint64_t calls = pool_calls(f->pool);
    long seen = simulated_calls(f);
    for (int i = 0; i < 8; i++)
        model_close(&models[i]);
    CHECK(pool_calls(f->pool) == calls && simulated_calls(f) == seen);
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    CHECK_SIZE(stats.in_use_bytes, 0);
    CHECK_SIZE(stats.queued_bytes, 32 * granule);

    /* One fence for all that is queued. */
    uint64_t fences = stats.driver_calls[VMM_CALL_fence];
    CHECK_OK(vmm_pool_trim(f->pool, 1));
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    CHECK(stats.driver_calls[VMM_CALL_fence] - fences == 1);
    CHECK_SIZE(held_bytes(f->pool), 0);
    CHECK_SIZE(stats.driver_calls[VMM_CALL_create], stats.driver_calls[VMM_CALL_release]);
}

/* Within the budget, the next tensor gets the queued blocks. */
static void test_reuse(const fixture *f) {
    size_t granule = f->granularity_bytes, rows = granule / (64 * KIB);
    fixture tight = *f;
    vmm_spec spec = make_spec(f);
    vmm_pool_stats stats;

    CHECK_OK(vmm_pool_create(f->device, granule, 8 * granule, &tight.pool));
    for (int round = 0; round < 5; round++) {
        model m = model_open(&tight, &spec);
        model_append(&m, VMM_UINT8, 8 * rows, VMM_MEMORY_HOST, NULL);
        model_check(&m);
        model_close(&m);
        CHECK(held_bytes(tight.pool) <= 8 * granule);
    }
    CHECK_OK(vmm_pool_statistics(tight.pool, &stats));
    CHECK(stats.driver_calls[VMM_CALL_create] <= 16);
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* Trimmed blocks are taken back by the tensor that trimmed them. */
static void test_trim_and_regrow(const fixture *f) {
    size_t granule = f->granularity_bytes, rows = granule / (64 * KIB);
    vmm_spec spec = make_spec(f);
    model m = model_open(f, &spec);
    vmm_pool_stats stats;

    model_append(&m, VMM_UINT8, 8 * rows, VMM_MEMORY_HOST, NULL);
    uint64_t calls = pool_calls(f->pool);
    CHECK_OK(vmm_truncate(m.tensor, rows, VMM_STREAM_NONE));
    m.length = rows;
    CHECK_OK(vmm_trim(m.tensor));
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    CHECK_SIZE(stats.in_use_bytes, granule);
    CHECK_SIZE(stats.queued_bytes, 7 * granule);
    CHECK_SIZE(vmm_mapped(m.tensor), rows);
    CHECK(pool_calls(f->pool) == calls);
    uint64_t maps = stats.driver_calls[VMM_CALL_map], creates = stats.driver_calls[VMM_CALL_create];
    CHECK_OK(vmm_map(m.tensor, 8 * rows));
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    CHECK_SIZE(stats.queued_bytes, 0);
    CHECK_SIZE(stats.driver_calls[VMM_CALL_map], maps);
    CHECK_SIZE(stats.driver_calls[VMM_CALL_create], creates);
    model_append(&m, VMM_UINT8, 8 * rows, VMM_MEMORY_HOST, NULL);
    model_check(&m);
    model_close(&m);
    CHECK_OK(vmm_pool_trim(f->pool, 1));
}

static void wait_for(void *semaphore) {
    sem_wait(semaphore);
}

/* A fence says nothing of what is queued after it was recorded, by the same tensor either. */
static void test_fence_covers_what_was_before(const fixture *f) {
    size_t granule = f->granularity_bytes, rows = granule / (64 * KIB);
    vmm_spec spec = make_spec(f);
    model m = model_open(f, &spec), other = model_open(f, &spec);
    vmm_pool_stats stats;
    sem_t first, second;
    void *stream, *memory;

    sem_init(&first, 0, 0);
    sem_init(&second, 0, 0);
    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    CHECK_CUDA(cuda()->host_alloc(&memory, 64 * KIB, 0));
    model_append(&m, VMM_UINT8, 4 * rows, VMM_MEMORY_HOST, NULL);
    CHECK_CUDA(cuda()->host_function(stream, wait_for, &first));
    CHECK_OK(vmm_truncate(m.tensor, 2 * rows, VMM_STREAM_NONE));
    CHECK_OK(vmm_trim(m.tensor));
    model_grow(&other, rows, false);
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    uint64_t fences = stats.driver_calls[VMM_CALL_fence];
    CHECK_SIZE(stats.queued_bytes, 2 * granule);

    sem_post(&first);
    CHECK_CUDA(cuda()->stream_synchronize(stream));
    CHECK_CUDA(cuda()->host_function(stream, wait_for, &second));
    CHECK_CUDA(cuda()->to_host_async(memory, (uintptr_t)m.base + granule, 64 * KIB, stream));
    CHECK_OK(vmm_truncate(m.tensor, rows, VMM_STREAM_NONE));
    m.length = rows;
    CHECK_OK(vmm_trim(m.tensor));
    model_grow(&other, rows, false);
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    CHECK_SIZE(stats.queued_bytes, 3 * granule);
    /* HIP's would wait for the device, so none is taken where waiting is not allowed. */
    CHECK(stats.driver_calls[VMM_CALL_fence] == fences + (is_hip ? 0 : 1));

    sem_post(&second);
    CHECK_CUDA(cuda()->stream_synchronize(stream));
    for (size_t i = 0; i < 64 * KIB; i += 4096)
        CHECK(((uint8_t *)memory)[i] == row_byte(m.numbers[rows], i));
    model_check(&m);
    model_close(&m);
    model_close(&other);
    CHECK_OK(vmm_pool_trim(f->pool, 1));
    CHECK_CUDA(cuda()->host_free(memory));
    CHECK_CUDA(cuda()->stream_destroy(stream));
}

/* Between capture_begin and capture_end no fence is taken. */
static void test_capture(const fixture *f) {
    size_t granule = f->granularity_bytes, rows = granule / (64 * KIB);
    fixture tight = *f;
    vmm_spec spec = make_spec(f);
    vmm_pool_stats stats;

    CHECK_OK(vmm_pool_create(f->device, granule, 8 * granule, &tight.pool));
    model m = model_open(&tight, &spec);
    model_append(&m, VMM_UINT8, 8 * rows, VMM_MEMORY_HOST, NULL);
    CHECK_OK(vmm_pool_capture_begin(tight.pool));
    CHECK_OK(vmm_pool_capture_begin(tight.pool));
    model_close(&m);
    CHECK_STATUS(vmm_pool_trim(tight.pool, 0), VMM_ERR_CAPTURING);
    CHECK_OK(vmm_pool_capture_end(tight.pool));
    m = model_open(&tight, &spec);
    CHECK_STATUS(vmm_grow(m.tensor, rows, NULL), VMM_ERR_OUT_OF_MEMORY);
    CHECK_OK(vmm_pool_statistics(tight.pool, &stats));
    CHECK(stats.driver_calls[VMM_CALL_fence] == 0 && stats.queued_bytes == 8 * granule);
    CHECK_OK(vmm_pool_capture_end(tight.pool));
    CHECK_STATUS(vmm_pool_capture_end(tight.pool), VMM_ERR_INVALID);
    model_append(&m, VMM_UINT8, 8 * rows, VMM_MEMORY_HOST, NULL);
    model_check(&m);
    model_close(&m);
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* A pool that is given up, before or after its tensors, leaves nothing behind. */
static void test_release(const fixture *f) {
    vmm_spec spec = make_spec(f);
    vmm_pool *pool;
    vmm_tensor *tensor, *other;

    CHECK_OK(vmm_pool_create(f->device, 0, 0, &pool));
    CHECK_OK(vmm_reserve(pool, &spec, &tensor));
    CHECK_OK(vmm_grow(tensor, 20, NULL));
    vmm_pool_release(pool);
    CHECK_OK(vmm_grow(tensor, 20, NULL)); /* tensors go on */
    vmm_release(tensor);
    CHECK_OK(vmm_reserve(f->pool, &spec, &other)); /* a call that looks after what was left */
    CHECK_OK(vmm_grow(other, 1, NULL));
    CHECK_OK(vmm_close(other));
}

/* Nor does it leave a bracket open that no one could end. */
static void test_release_in_bracket(const fixture *f) {
    vmm_spec spec = make_spec(f);
    vmm_pool *pool;
    vmm_tensor *tensor, *other;

    CHECK_OK(vmm_reserve(f->pool, &spec, &other));
    CHECK_OK(vmm_grow(other, 20, NULL));
    CHECK_OK(vmm_pool_create(f->device, 0, 0, &pool));
    CHECK_OK(vmm_reserve(pool, &spec, &tensor));
    CHECK_OK(vmm_grow(tensor, 20, NULL));
    CHECK_OK(vmm_pool_capture_begin(pool));
    CHECK_OK(vmm_close(other));
    CHECK_OK(vmm_close(tensor));
    if (f->is_gpu)
        CHECK_STATUS(vmm_pool_trim(f->pool, 1), VMM_ERR_CAPTURING);
    vmm_pool_release(pool);
    CHECK_OK(vmm_pool_trim(f->pool, 1));
    CHECK_SIZE(held_bytes(f->pool), 0);
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    test_release(&f);
    test_release_in_bracket(&f);
    if (f.is_gpu) {
        cuda();
        CHECK_OK(vmm_pool_trim(f.pool, 1));
        test_close_queues(&f);
        test_reuse(&f);
        test_trim_and_regrow(&f);
        test_fence_covers_what_was_before(&f);
        test_capture(&f);
    } else {
        test_host(&f);
    }
    fixture_close(&f);
    return 0;
}
