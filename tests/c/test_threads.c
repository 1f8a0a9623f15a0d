/* Two pools under eight threads, each with several tensors of its own in both; tensors and pins
 * end on other threads than they began; another thread only trims and asks; and an
 * out-of-memory callback runs on whichever thread needs it. */
#include "check.h"

#include <pthread.h>

#define N_THREADS 8
#define N_ROUNDS 20
#define N_STEPS 36
#define N_TENSORS 3

static const int64_t shape[] = {2, 0, 1000}; /* float32: a row of 8000 bytes */

/* The pools are those of two fixtures. */
typedef struct worker {
    const fixture *f;
    uint64_t seed;
    size_t refused;
    uint32_t first; /* number of the next row */
    uint8_t *device_rows;
} worker;

static bool stop;

/* ---- what one thread leaves to another ---------------------------------------------- */

typedef struct mailbox {
    pthread_mutex_t lock;
    void *items[64];
    size_t n;
} mailbox;

static mailbox pins = {.lock = PTHREAD_MUTEX_INITIALIZER};
static mailbox tensors = {.lock = PTHREAD_MUTEX_INITIALIZER};

static bool leave(mailbox *box, void *item) {
    pthread_mutex_lock(&box->lock);
    bool fits = box->n < LENGTH_OF(box->items);
    if (fits)
        box->items[box->n++] = item;
    pthread_mutex_unlock(&box->lock);
    return fits;
}

static void *take(mailbox *box) {
    pthread_mutex_lock(&box->lock);
    void *item = box->n ? box->items[--box->n] : NULL;
    pthread_mutex_unlock(&box->lock);
    return item;
}

/* ---- work -------------------------------------------------------------------------- */

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

static vmm_spec make_spec(const worker *w, uint32_t kind) {
    return (vmm_spec){.ndim = 3,
                      .shape = shape,
                      .axis = 1,
                      .dtype = VMM_FLOAT32,
                      .capacity = 2000,
                      .layout = (vmm_layout)(kind % 3),
                      .block_bytes = kind / 3 % 2 ? VMM_BLOCK_AUTO : w->f->granularity_bytes};
}

static void append(worker *w, model *m) {
    size_t n = 1 + random_below(&w->seed, 15);
    bool from_device = w->device_rows && random_below(&w->seed, 2);

    w->refused += !try_append(m, w->first, n, from_device ? w->device_rows : NULL);
    w->first += (uint32_t)n;
}

static void shorten(worker *w, model *m) {
    size_t keep = m->length - random_below(&w->seed, (uint32_t)m->length / 2 + 1);
    vmm_status status = vmm_truncate(m->tensor, keep, VMM_STREAM_NONE);

    CHECK(status == VMM_OK || status == VMM_ERR_PINNED);
    if (status == VMM_OK)
        m->length = keep;
    CHECK_OK(vmm_trim(m->tensor));
}

static void pin(worker *w, model *m) {
    vmm_pin *pin;

    CHECK_OK(vmm_pin_rows(m->tensor, random_below(&w->seed, (uint32_t)m->length + 1), &pin));
    if (!leave(&pins, pin))
        vmm_unpin(pin);
}

/* A tensor ends here, on another thread, or with its last pin wherever that is. */
static void give_up(worker *w, model *m) {
    model_check(m);
    if (random_below(&w->seed, 2) || !leave(&tensors, m->tensor))
        vmm_release(m->tensor);
    free(m->numbers);
}

static void fork_and_close(model *m) {
    vmm_tensor *fork;
    vmm_status status = vmm_fork(m->tensor, m->length / 2, &fork);

    CHECK(status == VMM_OK || status == VMM_ERR_OUT_OF_MEMORY);
    if (status == VMM_OK)
        CHECK_OK(vmm_close(fork));
}

static void *work(void *user) {
    worker *w = user;

    w->device_rows = w->f->is_gpu ? device_alloc(w->f, 16 * 8000) : NULL;
    w->first = (uint32_t)w->seed * 1000003u + 1;
    for (int round = 0; round < N_ROUNDS; round++) {
        model models[N_TENSORS];
        for (uint32_t t = 0; t < N_TENSORS; t++) {
            vmm_spec spec = make_spec(w, (uint32_t)round + t);
            models[t] = model_open(&w->f[t % 2], &spec);
        }
        for (int step = 0; step < N_STEPS; step++) {
            model *m = &models[random_below(&w->seed, N_TENSORS)];
            switch (random_below(&w->seed, 10)) {
            case 0: shorten(w, m); break;
            case 1: pin(w, m); break;
            case 2: vmm_unpin(take(&pins)); break;
            case 3: vmm_release(take(&tensors)); break;
            case 4: fork_and_close(m); break;
            default: append(w, m);
            }
        }
        for (int t = 0; t < N_TENSORS; t++)
            give_up(w, &models[t]);
    }
    if (w->device_rows)
        device_free(w->f, w->device_rows);
    return NULL;
}

static void *disturb(void *user) {
    const fixture *f = user;
    vmm_pool_stats stats;
    vmm_pool *pool;

    while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
        for (int i = 0; i < 2; i++) {
            CHECK_OK(vmm_pool_statistics(f[i].pool, &stats));
            CHECK(!stats.max_bytes || held_bytes(f[i].pool) <= stats.max_bytes);
            CHECK_OK(vmm_pool_trim(f[i].pool, 0));
        }
        vmm_unpin(take(&pins));
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

/* `f`: two fixtures. Returns how many appends were refused for want of memory. */
static size_t run(const fixture *f) {
    pthread_t threads[N_THREADS], disturber;
    worker workers[N_THREADS];
    vmm_pin *pin;
    vmm_tensor *tensor;
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
    while ((tensor = take(&tensors)))
        vmm_release(tensor);
    while ((pin = take(&pins)))
        vmm_unpin(pin);
    return refused;
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);
    fixture roomy[] = {f, f}, tight[] = {f, f};
    int callbacks = 0;

    if (f.is_gpu)
        cuda();
    CHECK_OK(vmm_pool_create(f.device, f.granularity_bytes, 0, &roomy[1].pool));
    CHECK_SIZE(run(roomy), 0);

    /* With budgets that are too small for all of them at once. */
    size_t budget = f.is_gpu ? 10 * f.granularity_bytes : 2 * MIB;
    for (int i = 0; i < 2; i++) {
        CHECK_OK(vmm_pool_create(f.device, 0, budget, &tight[i].pool));
        CHECK_OK(vmm_pool_on_oom(tight[i].pool, on_oom, &callbacks));
    }
    size_t refused = run(tight);
    CHECK(!refused || callbacks);
    CHECK_OK(vmm_pool_close(tight[0].pool));
    CHECK_OK(vmm_pool_close(tight[1].pool));
    CHECK_OK(vmm_pool_close(roomy[1].pool));
    fixture_close(&f);
    return 0;
}
