/* Pins: rows that others look at are neither truncated nor unmapped, and unpinning works on
 * any thread, after the owner is gone, and inside a host callback of a stream (invariant 5). */
#include "check.h"

#include <pthread.h>

static const int64_t shape[] = {2, 0, 16 * 1024}; /* uint8: a row of 32 KiB */

static vmm_spec make_spec(const fixture *f, vmm_layout layout) {
    return (vmm_spec){.ndim = 3,
                      .shape = shape,
                      .axis = 1,
                      .dtype = VMM_UINT8,
                      .capacity = f->is_gpu ? 1000 : 200,
                      .layout = layout};
}

static void test_pinned_rows(const fixture *f, vmm_layout layout) {
    vmm_spec spec = make_spec(f, layout);
    model m = model_open(f, &spec);
    vmm_pin *none, *some, *more;

    model_append(&m, VMM_UINT8, 50, VMM_MEMORY_HOST, NULL);
    uint64_t calls = pool_calls(f->pool);
    CHECK_OK(vmm_pin_rows(m.tensor, 30, &some));
    CHECK_OK(vmm_pin_rows(m.tensor, 40, &more));
    CHECK_SIZE(vmm_pin_count(m.tensor), 2);
    CHECK_SIZE(vmm_pinned_rows(m.tensor), 40);
    CHECK_STATUS(vmm_truncate(m.tensor, 39, VMM_STREAM_NONE), VMM_ERR_PINNED);
    CHECK_OK(vmm_truncate(m.tensor, 40, VMM_STREAM_NONE));
    m.length = 40;
    vmm_unpin(more);
    CHECK_SIZE(vmm_pinned_rows(m.tensor), 30);
    CHECK_STATUS(vmm_truncate(m.tensor, 29, VMM_STREAM_NONE), VMM_ERR_PINNED);
    CHECK_STATUS(vmm_truncate(m.tensor, 0, VMM_STREAM_NONE), VMM_ERR_PINNED);
    CHECK_SIZE(vmm_length(m.tensor), 40);
    CHECK(pool_calls(f->pool) == calls);

    /* Growing and trimming go on, and leave the pinned rows where they are. */
    CHECK_OK(vmm_trim(m.tensor));
    model_append(&m, VMM_UINT8, 60, VMM_MEMORY_HOST, NULL);
    CHECK_OK(vmm_trim(m.tensor));
    model_check(&m);
    CHECK_STATUS(vmm_close(m.tensor), VMM_ERR_PINNED);
    CHECK(strstr(vmm_last_error()->message, "1 export"));
    vmm_unpin(some);

    /* A pin on no row refuses close and nothing else. */
    CHECK_OK(vmm_pin_rows(m.tensor, 0, &none));
    CHECK_SIZE(vmm_pin_count(m.tensor), 1);
    CHECK_SIZE(vmm_pinned_rows(m.tensor), 0);
    CHECK_OK(vmm_truncate(m.tensor, 0, VMM_STREAM_NONE));
    m.length = 0;
    CHECK_STATUS(vmm_close(m.tensor), VMM_ERR_PINNED);
    vmm_unpin(none);
    CHECK_SIZE(vmm_pin_count(m.tensor), 0);
    model_close(&m);
}

/* Who reads the cursor keeps the tensor, and no row: not those either that others were shown. */
static void test_cursor_pins(const fixture *f) {
    vmm_spec spec = make_spec(f, VMM_LAYOUT_SEQ);
    model m = model_open(f, &spec);
    vmm_pin *cursor, *rows, *more;

    model_append(&m, VMM_UINT8, 10, VMM_MEMORY_HOST, NULL);
    CHECK_STATUS(vmm_pin_cursor(m.tensor, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pin_cursor(NULL, &cursor), VMM_ERR_INVALID);
    CHECK_OK(vmm_pin_cursor(m.tensor, &cursor));
    CHECK_OK(vmm_pin_rows(m.tensor, 0, &rows));
    CHECK_OK(vmm_pin_rows(m.tensor, 0, &more));
    CHECK_SIZE(vmm_pin_count(m.tensor), 3);
    vmm_pin_shown(m.tensor);
    vmm_unpin(more);
    CHECK_SIZE(vmm_pinned_rows(m.tensor), 10);
    vmm_unpin(rows);
    CHECK_SIZE(vmm_pinned_rows(m.tensor), 0);
    CHECK_OK(vmm_truncate(m.tensor, 3, VMM_STREAM_NONE));
    m.length = 3;
    CHECK_OK(vmm_pin_rows(m.tensor, 0, &rows)); /* that has not been shown anything */
    CHECK_SIZE(vmm_pinned_rows(m.tensor), 0);
    vmm_unpin(rows);
    CHECK_STATUS(vmm_close(m.tensor), VMM_ERR_PINNED);
    vmm_unpin(cursor);
    model_check(&m);
    model_close(&m);
}

typedef struct unpinner {
    vmm_pin *pin;
    bool done;
} unpinner;

static void *unpin_thread(void *user) {
    unpinner *u = user;

    vmm_unpin(u->pin);
    __atomic_store_n(&u->done, true, __ATOMIC_RELEASE);
    return NULL;
}

static void unpin_callback(void *user) {
    unpin_thread(user);
}

/* After vmm_release() the memory lives as long as the last pin. */
static void test_outlives_owner(const fixture *f) {
    vmm_spec spec = make_spec(f, VMM_LAYOUT_SEQ);
    model m = model_open(f, &spec);
    unpinner first = {0}, last = {0};
    size_t bytes = 20 * vmm_row_bytes(m.tensor);
    uint8_t *expected, *actual = malloc(bytes);
    pthread_t thread;
    vmm_pool_stats stats;

    CHECK(actual);
    model_append(&m, VMM_UINT8, 20, VMM_MEMORY_HOST, NULL);
    synchronize(f);
    expected = malloc(bytes);
    CHECK(expected);
    read_device(f, expected, (uintptr_t)m.base, bytes);
    CHECK_OK(vmm_pin_rows(m.tensor, 20, &first.pin));
    CHECK_OK(vmm_pin_rows(m.tensor, 5, &last.pin));
    vmm_release(m.tensor);
    CHECK_STATUS(vmm_pool_close(f->pool), VMM_ERR_BUSY);
    CHECK(pthread_create(&thread, NULL, unpin_thread, &first) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    read_device(f, actual, (uintptr_t)m.base, bytes);
    CHECK(memcmp(actual, expected, bytes) == 0);
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    CHECK(stats.in_use_bytes >= bytes);

    uint64_t calls = pool_calls(f->pool);
    if (f->is_gpu) {
        void *stream;
        CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
        CHECK_CUDA(cuda()->host_function(stream, unpin_callback, &last));
        CHECK_CUDA(cuda()->stream_synchronize(stream));
        CHECK_CUDA(cuda()->stream_destroy(stream));
        CHECK(__atomic_load_n(&last.done, __ATOMIC_ACQUIRE));
        CHECK(pool_calls(f->pool) == calls); /* it has queued, and called nothing */
    } else {
        unpin_callback(&last);
    }
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    CHECK_SIZE(stats.in_use_bytes, 0);
    CHECK_OK(vmm_pool_trim(f->pool, 1));
    CHECK_SIZE(held_bytes(f->pool), 0);
    free(expected);
    free(actual);
    free(m.numbers);
}

/* Many threads drop pins while the owner appends. */
#define N_THREADS 6
#define N_PINS 200

static void *unpin_many(void *user) {
    vmm_pin **pins = user;

    for (int i = 0; i < N_PINS; i++)
        vmm_unpin(pins[i]);
    return NULL;
}

static void test_threads(const fixture *f) {
    vmm_spec spec = make_spec(f, VMM_LAYOUT_LANE);
    model m = model_open(f, &spec);
    static vmm_pin *pins[N_THREADS][N_PINS];
    pthread_t threads[N_THREADS];

    model_append(&m, VMM_UINT8, 10, VMM_MEMORY_HOST, NULL);
    for (int t = 0; t < N_THREADS; t++)
        for (int i = 0; i < N_PINS; i++)
            CHECK_OK(vmm_pin_rows(m.tensor, (size_t)(i % 11), &pins[t][i]));
    CHECK_SIZE(vmm_pin_count(m.tensor), N_THREADS * N_PINS);
    for (int t = 0; t < N_THREADS; t++)
        CHECK(pthread_create(&threads[t], NULL, unpin_many, pins[t]) == 0);
    for (int i = 0; i < 50; i++)
        model_append(&m, VMM_UINT8, 2, VMM_MEMORY_HOST, NULL);
    for (int t = 0; t < N_THREADS; t++)
        CHECK(pthread_join(threads[t], NULL) == 0);
    CHECK_SIZE(vmm_pin_count(m.tensor), 0);
    CHECK_SIZE(vmm_pinned_rows(m.tensor), 0);
    model_check(&m);
    model_close(&m);
}

/* Owner and last pin gone at the same moment: the memory goes exactly once. */
static void test_release_race(const fixture *f) {
    for (int i = 0; i < 100; i++) {
        vmm_spec spec = make_spec(f, VMM_LAYOUT_SEQ);
        vmm_tensor *tensor;
        unpinner u = {0};
        pthread_t thread;

        CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
        CHECK_OK(vmm_grow(tensor, 1, NULL));
        CHECK_OK(vmm_pin_rows(tensor, 1, &u.pin));
        CHECK(pthread_create(&thread, NULL, unpin_thread, &u) == 0);
        vmm_release(tensor);
        CHECK(pthread_join(thread, NULL) == 0);
    }
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    if (f.is_gpu)
        cuda();
    for (int layout = VMM_LAYOUT_SEQ; layout <= VMM_LAYOUT_C; layout++)
        test_pinned_rows(&f, (vmm_layout)layout);
    test_cursor_pins(&f);
    test_outlives_owner(&f);
    test_threads(&f);
    test_release_race(&f);
    fixture_close(&f);
    return 0;
}
