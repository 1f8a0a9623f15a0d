/* Look-ahead: a thread of the pool maps behind the live blocks of tensors that grow, within its
 * bytes and the pool's budget, and gives all of it up where memory is short (invariants 2, 8, 9,
 * 12). What a test waits for has a deadline, far off: none asserts a time. */
#include "blocks.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "../sim/vmm_sim.h"

#define UNKNOWN 999
#define AHEAD_BLOCKS 16

static fixture with_lookahead(const fixture *f, size_t max_bytes, size_t ahead_bytes) {
    fixture own = with_pool(f, max_bytes);

    CHECK_SIZE(vmm_pool_lookahead(own.pool), 0);
    CHECK_OK(vmm_pool_set_lookahead(own.pool, ahead_bytes));
    CHECK_SIZE(vmm_pool_lookahead(own.pool), ahead_bytes);
    return own;
}

/* Until look-ahead holds between `least` and `most` bytes. */
static void await_ahead(const fixture *f, size_t least, size_t most) {
    for (int i = 0; i < 20000; i++) {
        size_t bytes = pool_stats(f->pool).lookahead_bytes;
        if (bytes >= least && bytes <= most)
            return;
        usleep(500);
    }
    FAIL("%zu bytes ahead, not %zu to %zu", pool_stats(f->pool).lookahead_bytes, least, most);
}

/* Growth finds its blocks: no call is made for it, and what it takes is counted as in use. */
static void test_growth_finds_blocks(const fixture *f) {
    fixture own = with_lookahead(f, 0, AHEAD_BLOCKS * granule);
    vmm_spec spec = make_spec(64);
    model m = model_open(&own, &spec);

    model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
    for (size_t k = 2; k <= 32; k++) {
        await_ahead(&own, granule, AHEAD_BLOCKS * granule);
        uint64_t calls = total_calls(m.tensor);
        CHECK_OK(vmm_map(m.tensor, k * rows));
        CHECK(total_calls(m.tensor) == calls);
        CHECK_SIZE(vmm_mapped(m.tensor), k * rows);
        CHECK_SIZE(pool_stats(own.pool).in_use_bytes, k * granule);
        model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
    }
    model_check(&m);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* Off: the blocks go back, nothing is ahead; on again: at the next growth. */
static void test_off_and_on(const fixture *f) {
    fixture own = with_lookahead(f, 0, AHEAD_BLOCKS * granule);
    vmm_spec spec = make_spec(64);
    model m = model_open(&own, &spec);

    for (int i = 0; i < 3; i++) {
        model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
        await_ahead(&own, granule, AHEAD_BLOCKS * granule);
        CHECK_OK(vmm_pool_set_lookahead(own.pool, 0));
        CHECK_SIZE(vmm_pool_lookahead(own.pool), 0);
        CHECK_SIZE(pool_stats(own.pool).lookahead_bytes, 0);
        CHECK_OK(vmm_pool_set_lookahead(own.pool, 0)); /* it is off already */
        model_append(&m, VMM_UINT8, 1, VMM_MEMORY_HOST, NULL);
        CHECK_SIZE(pool_stats(own.pool).lookahead_bytes, 0);
        CHECK_OK(vmm_pool_set_lookahead(own.pool, AHEAD_BLOCKS * granule));
        CHECK_OK(vmm_pool_set_lookahead(own.pool, 2 * granule)); /* and changed */
        CHECK_SIZE(vmm_pool_lookahead(own.pool), 2 * granule);
    }
    model_check(&m);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* Trim takes what lies ahead of the tensor, too. */
static void test_trim(const fixture *f) {
    fixture own = with_lookahead(f, 0, AHEAD_BLOCKS * granule);
    vmm_spec spec = make_spec(64);
    model m = model_open(&own, &spec);

    model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
    await_ahead(&own, granule, AHEAD_BLOCKS * granule);
    CHECK_OK(vmm_trim(m.tensor));
    CHECK_SIZE(pool_stats(own.pool).in_use_bytes, granule);
    CHECK_OK(vmm_map(m.tensor, 4 * rows));
    model_check(&m);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

#ifdef __SANITIZE_THREAD__ /* which has a pthread_create() of its own */
static void test_no_thread(const fixture *f) {
    (void)f;
}
#else
static bool has_no_threads;

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                   void *argument) {
    static int (*next)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

    if (!next)
        *(void **)&next = dlsym(RTLD_NEXT, "pthread_create");
    return has_no_threads ? EAGAIN : next(thread, attributes, start, argument);
}

/* The system has no thread for it: that is said, and nothing has changed. */
static void test_no_thread(const fixture *f) {
    fixture own = with_lookahead(f, 0, 0);

    has_no_threads = true;
    CHECK_STATUS(vmm_pool_set_lookahead(own.pool, MIB), VMM_ERR_OUT_OF_MEMORY);
    has_no_threads = false;
    CHECK_SIZE(vmm_pool_lookahead(own.pool), 0);
    CHECK_OK(vmm_pool_set_lookahead(own.pool, MIB));
    CHECK_OK(vmm_pool_close(own.pool));
    CHECK_STATUS(vmm_pool_set_lookahead(NULL, MIB), VMM_ERR_INVALID);
    CHECK_SIZE(vmm_pool_lookahead(NULL), 0);
}
#endif

/* A tensor that does not grow any more gives back what lies ahead of it. */
static void test_idle(const fixture *f) {
    fixture own = with_lookahead(f, 0, AHEAD_BLOCKS * granule);
    vmm_spec spec = make_spec(64);
    model m = model_open(&own, &spec);

    model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
    await_ahead(&own, granule, AHEAD_BLOCKS * granule);
    await_ahead(&own, 0, 0);
    CHECK_SIZE(pool_stats(own.pool).in_use_bytes, granule);
    model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL); /* and is woken by the next */
    await_ahead(&own, granule, AHEAD_BLOCKS * granule);
    model_check(&m);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

static vmm_spec spec_of_lanes(const int64_t *lanes_shape) {
    return (vmm_spec){.ndim = 3,
                      .shape = lanes_shape,
                      .axis = 1,
                      .dtype = VMM_UINT8,
                      .layout = VMM_LAYOUT_LANE,
                      .capacity = 16 * rows,
                      .block_bytes = granule};
}

/* Every lane has its blocks, and none more than its share. */
static void test_lanes(const fixture *f) {
    static const int64_t lanes_shape[] = {4, 0, 1024};
    fixture own = with_lookahead(f, 0, 4 * granule);
    vmm_spec spec = spec_of_lanes(lanes_shape);
    model m = model_open(&own, &spec);

    model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
    await_ahead(&own, 4 * granule, 4 * granule);
    uint64_t calls = total_calls(m.tensor);
    CHECK_OK(vmm_map(m.tensor, 2 * rows));
    CHECK(total_calls(m.tensor) == calls);
    model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
    model_check(&m);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

static uint64_t map_calls(vmm_pool *pool) {
    return pool_stats(pool).driver_calls[VMM_CALL_map];
}

/* A tensor goes while the thread is busy with its lanes: no more is mapped for it than the block
 * that is under way. What then becomes ahead of another one, which grows without waiting for the
 * thread, comes behind all that it had noted before. */
static void test_closed_meanwhile(const fixture *f) {
    int64_t lanes_shape[] = {AHEAD_BLOCKS, 0, 1024};
    vmm_spec spec = spec_of_lanes(lanes_shape);

    for (int i = 0; i < 8; i++) {
        fixture own = with_lookahead(f, 0, 2 * AHEAD_BLOCKS * granule);
        vmm_tensor *goes, *stays;
        lanes_shape[0] = AHEAD_BLOCKS;
        CHECK_OK(vmm_reserve(own.pool, &spec, &goes));
        lanes_shape[0] = 2;
        CHECK_OK(vmm_reserve(own.pool, &spec, &stays));
        CHECK_OK(vmm_grow(stays, rows, NULL));
        await_ahead(&own, 2 * granule, 2 * granule);
        CHECK_OK(vmm_grow(goes, rows, NULL));
        await_ahead(&own, 3 * granule, 2 * AHEAD_BLOCKS * granule);
        CHECK_OK(vmm_close(goes));
        uint64_t before = map_calls(own.pool);
        CHECK_OK(vmm_grow(stays, rows, NULL));
        await_ahead(&own, 2 * granule, 2 * AHEAD_BLOCKS * granule);
        CHECK(map_calls(own.pool) - before < AHEAD_BLOCKS / 2);
        CHECK_OK(vmm_close(stays));
        CHECK_OK(vmm_pool_close(own.pool));
    }
}

/* Within the budget always, and given up before anything is refused; trim takes it, too. */
static void test_budget(const fixture *f) {
    fixture own = with_lookahead(f, 8 * granule, 64 * granule);
    vmm_spec spec = make_spec(64);
    model a = model_open(&own, &spec), b = model_open(&own, &spec);

    model_append(&a, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
    await_ahead(&own, granule, 8 * granule);
    for (size_t k = 1; k <= 7; k++) {
        model_append(&b, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
        CHECK(held_bytes(own.pool) <= 8 * granule);
    }
    CHECK_SIZE(pool_stats(own.pool).in_use_bytes, 8 * granule);
    CHECK_STATUS(vmm_grow(b.tensor, rows, NULL), VMM_ERR_OUT_OF_MEMORY);
    CHECK_SIZE(pool_stats(own.pool).lookahead_bytes, 0);
    CHECK(pool_stats(own.pool).peak_bytes <= 8 * granule);
    model_check(&a);
    model_check(&b);
    model_close(&b);
    model_close(&a);
    CHECK_OK(vmm_pool_trim(own.pool, 1));
    CHECK_SIZE(held_bytes(own.pool), 0);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* The driver refuses the thread's calls, each in turn: nothing is told, nothing is lost, and
 * growth goes on. */
static void test_refused(const fixture *f) {
    static const char *const calls[] = {"cuMemCreate", "cuMemMap", "cuMemSetAccess"};
    __typeof__(vmm_sim_fail) *fail;
    __typeof__(vmm_sim_fail_none) *fail_none;
    __typeof__(vmm_sim_failed) *failed;
    __typeof__(vmm_sim_reset) *reset;

    *(void **)&fail = dlsym(cuda_library(), "vmm_sim_fail");
    *(void **)&fail_none = dlsym(cuda_library(), "vmm_sim_fail_none");
    *(void **)&failed = dlsym(cuda_library(), "vmm_sim_failed");
    *(void **)&reset = dlsym(cuda_library(), "vmm_sim_reset");
    if (!fail)
        return;
    for (size_t i = 0; i < LENGTH_OF(calls); i++) {
        fixture own = with_lookahead(f, 0, AHEAD_BLOCKS * granule);
        vmm_spec spec = make_spec(64);
        model m = model_open(&own, &spec);

        reset();
        /* The growth makes the first of them. */
        CHECK(fail(calls[i], 2, UNKNOWN, 1) == 0);
        model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
        for (int k = 0; k < 20000 && failed() == 0; k++)
            usleep(500);
        CHECK(failed() == 1);
        fail_none();
        await_ahead(&own, granule, AHEAD_BLOCKS * granule); /* tried again */
        CHECK_SIZE(pool_stats(own.pool).parked_bytes, 0);
        model_append(&m, VMM_UINT8, 4 * rows, VMM_MEMORY_HOST, NULL);
        model_check(&m);
        model_close(&m);
        CHECK_OK(vmm_pool_close(own.pool));
    }
}

/* The driver does not take everything back at close: the pool is there, and look-ahead on. */
static void test_refused_close(const fixture *f) {
    __typeof__(vmm_sim_fail) *fail;
    fixture own = with_lookahead(f, 0, AHEAD_BLOCKS * granule);
    vmm_spec spec = make_spec(64);
    model m = model_open(&own, &spec);

    *(void **)&fail = dlsym(cuda_library(), "vmm_sim_fail");
    model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
    model_close(&m);
    if (fail) {
        CHECK(fail("cuMemUnmap", 1, UNKNOWN, 1) == 0);
        CHECK_STATUS(vmm_pool_close(own.pool), VMM_ERR_DRIVER);
        CHECK_SIZE(vmm_pool_lookahead(own.pool), AHEAD_BLOCKS * granule);
    }
    CHECK_OK(vmm_pool_close(own.pool));
}

/* A launch fails over blocks that were mapped ahead: they are ahead again. */
static void test_undo(const fixture *f) {
    __typeof__(vmm_sim_fail) *fail;
    fixture own = with_lookahead(f, 0, granule);
    vmm_spec spec = make_spec(64);
    model m = model_open(&own, &spec);
    void *memory = device_alloc(f, granule);
    int64_t n_rows[] = {(int64_t)rows, 1024};
    vmm_array source = {.data = memory,
                        .memory = VMM_MEMORY_DEVICE,
                        .dtype = VMM_UINT8,
                        .ndim = 2,
                        .shape = n_rows};

    *(void **)&fail = f->is_gpu ? dlsym(cuda_library(), "vmm_sim_fail") : NULL;
    if (fail) {
        model_append(&m, VMM_UINT8, rows, VMM_MEMORY_DEVICE, NULL);
        await_ahead(&own, granule, granule);
        CHECK(fail("cuLaunchKernel", 1, UNKNOWN, 1) == 0);
        CHECK_STATUS(vmm_append(m.tensor, &source, NULL), VMM_ERR_DRIVER);
        CHECK_SIZE(vmm_mapped(m.tensor), rows);
        CHECK_SIZE(pool_stats(own.pool).in_use_bytes, granule);
        CHECK_SIZE(pool_stats(own.pool).queued_bytes, 0);
        model_append(&m, VMM_UINT8, rows, VMM_MEMORY_DEVICE, NULL);
        model_check(&m);
    }
    device_free(f, memory);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* While a stream is captured in global mode: no call of the thread breaks it. */
static void test_capture(const fixture *f) {
    fixture own = with_lookahead(f, 0, AHEAD_BLOCKS * granule);
    vmm_spec spec = make_spec(64);
    model m = model_open(&own, &spec);
    void *stream;

    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_map(m.tensor, rows));
    await_ahead(&own, granule, AHEAD_BLOCKS * granule);
    drop_capture(stream);
    CHECK_CUDA(cuda()->stream_destroy(stream));
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* ---- threads ------------------------------------------------------------------------- */

typedef struct writer {
    const fixture *f;
    size_t n_blocks;
    uint32_t seed;
} writer;

/* A tensor of its own, through many boundaries, trimmed, closed and opened again; each row is its
 * number. */
static void *write_rows(void *argument) {
    writer *w = argument;
    vmm_spec spec = make_spec(w->n_blocks);
    uint8_t row[1024];
    int64_t row_shape[] = {1, 1024};
    vmm_array source = {
        .data = row, .memory = VMM_MEMORY_HOST, .dtype = VMM_UINT8, .ndim = 2, .shape = row_shape};

    for (int round = 0; round < 3; round++) {
        vmm_tensor *tensor;
        size_t step = rows / 2;
        CHECK_OK(vmm_reserve(w->f->pool, &spec, &tensor));
        for (size_t i = 0; i + step <= spec.capacity; i += step) {
            memset(row, (int)(uint8_t)(w->seed + i), sizeof row);
            CHECK_OK(vmm_append(tensor, &source, NULL));
            CHECK_OK(vmm_grow(tensor, step - 1, NULL));
            if (i == spec.capacity / 2) {
                CHECK_OK(vmm_truncate(tensor, i, VMM_STREAM_NONE));
                CHECK_OK(vmm_trim(tensor));
                CHECK_OK(vmm_append(tensor, &source, NULL));
                CHECK_OK(vmm_grow(tensor, step - 1, NULL));
            }
        }
        for (size_t i = 0; i + step <= spec.capacity; i += step) {
            read_device(w->f, row, (uintptr_t)vmm_base(tensor) + i * 1024, sizeof row);
            CHECK(row[0] == (uint8_t)(w->seed + i) && row[1023] == row[0]);
        }
        CHECK_OK(vmm_close(tensor));
    }
    return NULL;
}

static void test_threads(const fixture *f) {
    fixture own = with_lookahead(f, 0, AHEAD_BLOCKS * granule);
    writer writers[3];
    pthread_t threads[LENGTH_OF(writers)];

    for (size_t i = 0; i < LENGTH_OF(writers); i++) {
        writers[i] = (writer){&own, 100, (uint32_t)(i * 77)};
        CHECK(pthread_create(&threads[i], NULL, write_rows, &writers[i]) == 0);
    }
    for (int i = 0; i < 20; i++) {
        CHECK_OK(vmm_pool_set_lookahead(own.pool, i % 4 == 3 ? 0 : AHEAD_BLOCKS * granule));
        CHECK_OK(vmm_pool_trim(own.pool, 0));
        usleep(1000);
    }
    for (size_t i = 0; i < LENGTH_OF(writers); i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK_SIZE(pool_stats(own.pool).in_use_bytes, 0);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* A close that is refused leaves look-ahead on; one that is not ends it while it is at work. */
static void test_close(const fixture *f) {
    vmm_spec spec = make_spec(64);

    for (int i = 0; i < 20; i++) {
        fixture own = with_lookahead(f, 0, AHEAD_BLOCKS * granule);
        model m = model_open(&own, &spec);
        model_append(&m, VMM_UINT8, 4 * rows, VMM_MEMORY_HOST, NULL);
        CHECK_STATUS(vmm_pool_close(own.pool), VMM_ERR_BUSY);
        CHECK_SIZE(vmm_pool_lookahead(own.pool), AHEAD_BLOCKS * granule);
        model_close(&m);
        CHECK_OK(vmm_pool_close(own.pool));
    }
}

/* Given up while the thread is at work, before its tensor or after: nothing is left. */
static void test_release(const fixture *f) {
    vmm_spec spec = make_spec(64);

    for (int i = 0; i < 20; i++) {
        fixture own = with_lookahead(f, 0, AHEAD_BLOCKS * granule);
        vmm_tensor *tensor;
        CHECK_OK(vmm_reserve(own.pool, &spec, &tensor));
        CHECK_OK(vmm_grow(tensor, 4 * rows, NULL));
        if (i % 2)
            CHECK_OK(vmm_close(tensor));
        vmm_pool_release(own.pool);
        if (i % 2 == 0) {
            CHECK_OK(vmm_grow(tensor, 4 * rows, NULL));
            CHECK_OK(vmm_close(tensor));
        }
    }
    usleep(50 * 1000); /* for the threads to end: the next call joins them */
    for (int i = 0; i < 3; i++) {
        vmm_tensor *other;
        CHECK_OK(vmm_reserve(f->pool, &spec, &other));
        CHECK_OK(vmm_grow(other, 1, NULL));
        CHECK_OK(vmm_close(other));
        CHECK_OK(vmm_pool_trim(f->pool, 1));
    }
}

/* A child has no such thread, and waits for none. */
static void test_fork(const fixture *f) {
    fixture own = with_lookahead(f, 0, AHEAD_BLOCKS * granule);
    vmm_spec spec = make_spec(64);
    model m = model_open(&own, &spec);

    for (int i = 0; i < 10; i++) {
        int status;
        model_append(&m, VMM_UINT8, 2 * rows, VMM_MEMORY_HOST, NULL);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            alarm(20);
            vmm_status set = vmm_pool_set_lookahead(own.pool, granule);
            bool right = set == VMM_ERR_FORKED && vmm_pool_lookahead(own.pool) == 0 &&
                         vmm_pool_close(own.pool) == VMM_OK;
            vmm_pool_release(own.pool);
#ifdef __SANITIZE_THREAD__
            _exit(right ? 0 : 1); /* it knows no threads in such a child */
#endif
            if (!f->is_gpu && right) { /* it may have its own */
                vmm_device *device;
                vmm_pool *pool;
                right = !vmm_device_open("host", &device) &&
                        !vmm_pool_create(device, 0, 0, &pool) &&
                        !vmm_pool_set_lookahead(pool, MIB) && !vmm_pool_close(pool);
            }
            _exit(right ? 0 : 1);
        }
        CHECK(waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    model_check(&m);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
}

/* Exit while it is at work: with everything open, silently. Its own process opens what it uses. */
static const char *device_name;

static int exit_at_work(void) {
    vmm_spec spec = make_spec(64);
    vmm_device *device;
    vmm_pool *pool;
    vmm_tensor *tensor;

    alarm(20);
    unsetenv("VMM_SIM_CHECK_EXIT"); /* read already: nothing is closed, and that is said */
    CHECK_OK(vmm_device_open(device_name, &device));
    CHECK_OK(vmm_pool_create(device, granule, 0, &pool));
    CHECK_OK(vmm_pool_set_lookahead(pool, AHEAD_BLOCKS * granule));
    CHECK_OK(vmm_reserve(pool, &spec, &tensor));
    CHECK_OK(vmm_grow(tensor, 8 * rows, NULL));
    return 0;
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "host") == 0) {
        blocks_are(64 * KIB, 1024);
        device_name = "host";
        for (int i = 0; i < 10; i++)
            CHECK(in_child(exit_at_work) == 0);
    }
    fixture f = fixture_open(argc, argv, 0, 0);

    blocks_are(f.is_gpu ? f.granularity_bytes : 64 * KIB, 1024);
    if (f.is_gpu)
        cuda();
    test_growth_finds_blocks(&f);
    test_off_and_on(&f);
    test_trim(&f);
    test_no_thread(&f);
    test_lanes(&f);
    test_closed_meanwhile(&f);
    test_budget(&f);
    test_undo(&f);
    if (f.is_gpu) {
        test_refused(&f);
        test_refused_close(&f);
        test_capture(&f);
    }
    test_threads(&f);
    test_close(&f);
    test_release(&f);
    test_fork(&f);
    test_idle(&f);
    fixture_close(&f);
    return 0;
}
