/* One pool under eight threads, each with tensors of its own; another that only trims and
 * asks; and an out-of-memory callback that runs on whichever thread needs it. */
#include "check.h"

#include <pthread.h>

#define N_THREADS 8
#define N_ROUNDS 60

static const int64_t shape[] = {2, 0, 1000}; /* float32: a row of 8000 bytes */

typedef struct worker {
    const fixture *f;
    uint64_t seed;
    size_t refused;
} worker;

static bool stop;

/* As model_append(), but a refusal for want of memory is an answer. */
static bool try_append(model *m, uint32_t first, size_t n_rows, uint8_t *device_rows) {
    int64_t rows[VMM_MAX_NDIM];
    uint8_t *host = make_rows(m->tensor, first, n_rows);
    vmm_array source = {.data = host, .dtype = VMM_FLOAT32, .ndim = 3, .shape = rows};
    vmm_status status;

    rows_shape(m->tensor, n_rows, rows);
    if (device_rows) {
        write_device(m->fixture, device_rows, host, n_rows * vmm_row_bytes(m->tensor));
        source.data = device_rows;
        source.memory = VMM_MEMORY_DEVICE;
    }
    status = vmm_append(m->tensor, &source, VMM_STREAM_PER_THREAD);
    if (status != VMM_OK && status != VMM_ERR_OUT_OF_MEMORY)
        FAIL("%s: %s", vmm_status_name(status), vmm_last_error()->message);
    if (status == VMM_OK)
        model_extend(m, first, n_rows);
    synchronize(m->fixture);
    free(host);
    return status == VMM_OK;
}

static void *work(void *user) {
    worker *w = user;
    uint8_t *device_rows = w->f->is_cuda ? device_alloc(w->f, 16 * 8000) : NULL;

    for (int round = 0; round < N_ROUNDS; round++) {
        vmm_spec spec = {.ndim = 3,
                         .shape = shape,
                         .axis = 1,
                         .dtype = VMM_FLOAT32,
                         .capacity = 2000,
                         .layout = (vmm_layout)(round % 3),
                         .block_bytes = round % 2 ? VMM_BLOCK_AUTO : w->f->granularity_bytes};
        model m = model_open(w->f, &spec);
        uint32_t first = (uint32_t)w->seed * 1000003u + (uint32_t)round * 1009u + 1;
        vmm_tensor *fork;

        for (int i = 0; i < 12; i++) {
            size_t n = 1 + random_below(&w->seed, 15);
            bool from_device = device_rows && random_below(&w->seed, 2);
            w->refused += !try_append(&m, first, n, from_device ? device_rows : NULL);
            first += (uint32_t)n;
            if (random_below(&w->seed, 4) == 0) {
                size_t keep = m.length - random_below(&w->seed, (uint32_t)m.length / 2 + 1);
                CHECK_OK(vmm_truncate(m.tensor, keep, VMM_STREAM_NONE));
                m.length = keep;
                CHECK_OK(vmm_trim(m.tensor));
            }
        }
        model_check(&m);
        vmm_status status = vmm_fork(m.tensor, m.length / 2, &fork);
        CHECK(status == VMM_OK || status == VMM_ERR_OUT_OF_MEMORY);
        if (status == VMM_OK)
            CHECK_OK(vmm_close(fork));
        model_close(&m);
    }
    if (device_rows)
        device_free(w->f, device_rows);
    return NULL;
}

static void *disturb(void *user) {
    const fixture *f = user;
    vmm_pool_stats stats;
    vmm_pool *pool;

    while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
        CHECK_OK(vmm_pool_statistics(f->pool, &stats));
        CHECK(!stats.max_bytes || held_bytes(f->pool) <= stats.max_bytes);
        CHECK_OK(vmm_pool_trim(f->pool, 0));
        CHECK_OK(vmm_pool_create(f->device, 0, 0, &pool));
        vmm_pool_release(pool);
    }
    return NULL;
}

static int on_oom(void *user, size_t needed_bytes) {
    (void)needed_bytes;
    __atomic_fetch_add((int *)user, 1, __ATOMIC_RELAXED);
    return 0;
}

static size_t run(const fixture *f) {
    pthread_t threads[N_THREADS], disturber;
    worker workers[N_THREADS];
    size_t refused = 0;

    stop = false;
    for (int t = 0; t < N_THREADS; t++) {
        workers[t] = (worker){.f = f, .seed = (uint64_t)t + 1};
        CHECK(pthread_create(&threads[t], NULL, work, &workers[t]) == 0);
    }
    CHECK(pthread_create(&disturber, NULL, disturb, (void *)(uintptr_t)f) == 0);
    for (int t = 0; t < N_THREADS; t++) {
        CHECK(pthread_join(threads[t], NULL) == 0);
        refused += workers[t].refused;
    }
    __atomic_store_n(&stop, true, __ATOMIC_RELEASE);
    CHECK(pthread_join(disturber, NULL) == 0);
    return refused;
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);
    fixture tight = f;
    int callbacks = 0;

    if (f.is_cuda)
        cuda();
    CHECK_SIZE(run(&f), 0);

    /* With a budget that is too small for all of them at once. */
    CHECK_OK(
        vmm_pool_create(f.device, 0, f.is_cuda ? 10 * f.granularity_bytes : 2 * MIB, &tight.pool));
    CHECK_OK(vmm_pool_on_oom(tight.pool, on_oom, &callbacks));
    size_t refused = run(&tight);
    CHECK(!refused || callbacks);
    CHECK_OK(vmm_pool_close(tight.pool));
    fixture_close(&f);
    return 0;
}
