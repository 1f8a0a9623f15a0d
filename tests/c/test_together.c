/* Everything at once, on one pool: tensors of the same few geometries that grow, are cut, trimmed,
 * closed and opened again over each other's memory, lanes that go their own way, graphs that
 * append, the look-ahead thread, trims, pools that are given up; and driver calls that fail. Every
 * row is right to the end, and at the end nothing is left.
 *
 * VMM_TEST_ROUNDS in the environment: how often each thread does its part, 12 if not set. */
#include "check.h"

#include <pthread.h>
#include <time.h>

#include "../sim/vmm_sim.h"

#define UNKNOWN 999 /* what the driver returns where it is made to fail */
#define N_LANES 2
#define CAPACITY 40
#define N_STEPS 30
#define EDGE 64 /* of a row is looked at on both sides */

static fixture f;
static size_t granule, row_bytes; /* of one lane; four to a block */
static int n_rounds;
static bool stop, failing;
static long n_failed;
/* Held to write while a stream is captured, which no fence may meet. */
static pthread_rwlock_t captures = PTHREAD_RWLOCK_INITIALIZER;

static __typeof__(vmm_sim_fail) *sim_fail;
static __typeof__(vmm_sim_fail_none) *sim_fail_none;
static __typeof__(vmm_sim_failed) *sim_failed;

/* ---- a tensor, and the number that each of its rows is filled with ------------------------- */

typedef struct subject {
    uint64_t seed;
    void *stream;
    uint8_t *rows, *device_rows; /* sources */
    vmm_tensor *tensor;
    size_t n_lanes;
    size_t length[N_LANES];
    uint8_t number[N_LANES][CAPACITY];
    int64_t shape[3];
} subject;

static bool may_fail(vmm_status status) {
    if (status && status != VMM_ERR_OUT_OF_MEMORY && !(failing && status == VMM_ERR_DRIVER))
        FAIL("%s: %s", vmm_status_name(status), vmm_last_error()->message);
    return !status;
}

static bool open_subject(subject *s, size_t n_lanes) {
    int64_t shape[] = {(int64_t)n_lanes, 0, (int64_t)row_bytes};
    vmm_spec spec = {.ndim = 3,
                     .shape = shape,
                     .axis = 1,
                     .dtype = VMM_UINT8,
                     .capacity = CAPACITY,
                     .layout = VMM_LAYOUT_LANE,
                     .block_bytes = granule};

    s->n_lanes = n_lanes;
    memset(s->length, 0, sizeof s->length);
    return may_fail(vmm_reserve(f.pool, &spec, &s->tensor));
}

static size_t longest(const subject *s) {
    return s->length[0] > s->length[s->n_lanes - 1] ? s->length[0] : s->length[s->n_lanes - 1];
}

/* A source of `n_rows` rows for `n_lanes` lanes, each filled with a number by chance. */
static vmm_array make_source(subject *s, size_t n_lanes, size_t n_rows) {
    size_t bytes = n_lanes * n_rows * row_bytes;

    if (f.is_gpu)
        CHECK_CUDA(cuda()->stream_synchronize(s->stream)); /* the last one has been read */
    for (size_t i = 0; i < n_lanes * n_rows; i++)
        memset(s->rows + i * row_bytes, (int)random_below(&s->seed, 256), row_bytes);
    s->shape[0] = (int64_t)n_lanes;
    s->shape[1] = (int64_t)n_rows;
    s->shape[2] = (int64_t)row_bytes;
    vmm_array source = {.data = s->rows, .dtype = VMM_UINT8, .ndim = 3, .shape = s->shape};
    if (f.is_gpu) {
        CHECK_CUDA(cuda()->to_device_async((uintptr_t)s->device_rows, s->rows, bytes, s->stream));
        CHECK_CUDA(cuda()->stream_synchronize(s->stream));
        source.data = s->device_rows;
        source.memory = VMM_MEMORY_DEVICE;
    }
    return source;
}

static void note(subject *s, size_t lane, size_t i, size_t n_rows) {
    for (size_t r = 0; r < n_rows; r++)
        s->number[lane][s->length[lane]++] = s->rows[(i * n_rows + r) * row_bytes];
}

static void note_all(subject *s, size_t n_rows) {
    for (size_t lane = 0; lane < s->n_lanes; lane++)
        note(s, lane, lane, n_rows);
}

static void check_subject(subject *s) {
    uint8_t edges[2 * EDGE];

    CHECK_SIZE(vmm_length(s->tensor), longest(s));
    CHECK(vmm_mapped(s->tensor) >= longest(s));
    if (f.is_gpu)
        CHECK_CUDA(cuda()->stream_synchronize(s->stream));
    for (size_t lane = 0; lane < s->n_lanes; lane++) {
        CHECK_SIZE(vmm_lengths(s->tensor)[lane], s->length[lane]);
        for (size_t r = 0; r < s->length[lane]; r++) {
            uintptr_t row =
                (uintptr_t)vmm_base(s->tensor) + lane * vmm_lane_bytes(s->tensor) + r * row_bytes;
            read_device(&f, edges, row, EDGE);
            read_device(&f, edges + EDGE, row + row_bytes - EDGE, EDGE);
            for (size_t i = 0; i < sizeof edges; i++)
                if (edges[i] != s->number[lane][r])
                    FAIL("row %zu of lane %zu holds %d, not %d", r, lane, edges[i],
                         s->number[lane][r]);
        }
    }
}

/* ---- what a writer does ---------------------------------------------------------------------- */

static void append(subject *s) {
    size_t n_rows = 1 + random_below(&s->seed, 3);
    size_t lane = random_below(&s->seed, (uint32_t)s->n_lanes);
    bool named = s->n_lanes > 1 && random_below(&s->seed, 3) == 0;
    vmm_status status;

    if (longest(s) + n_rows > CAPACITY)
        return;
    vmm_array source = make_source(s, named ? 1 : s->n_lanes, n_rows);
    if (named)
        status = vmm_append_lanes(1, &s->tensor, &source, 1, &lane, NULL, s->stream);
    else
        status = vmm_append(s->tensor, &source, s->stream);
    if (may_fail(status) && named)
        note(s, lane, 0, n_rows);
    else if (!status)
        note_all(s, n_rows);
}

static void cut(subject *s) {
    size_t n_rows = random_below(&s->seed, (uint32_t)longest(s) + 1);

    if (!may_fail(vmm_truncate(s->tensor, n_rows, s->stream)))
        return;
    for (size_t lane = 0; lane < s->n_lanes; lane++)
        s->length[lane] = s->length[lane] < n_rows ? s->length[lane] : n_rows;
}

static void write_some(subject *s) {
    switch (random_below(&s->seed, 12)) {
    case 0: cut(s); break;
    case 1: may_fail(vmm_trim(s->tensor)); break;
    case 2: may_fail(vmm_map(s->tensor, random_below(&s->seed, CAPACITY))); break;
    case 3: check_subject(s); break;
    default: append(s);
    }
}

static void begin(subject *s, uint64_t seed) {
    size_t bytes = N_LANES * 4 * row_bytes;

    *s = (subject){.seed = seed, .rows = malloc(bytes)};
    CHECK(s->rows);
    if (f.is_gpu) {
        CHECK_CUDA(cuda()->stream_create(&s->stream, CUDA_STREAM_NON_BLOCKING));
        s->device_rows = device_alloc(&f, bytes);
    }
}

static void end(subject *s) {
    if (f.is_gpu) {
        device_free(&f, s->device_rows);
        CHECK_CUDA(cuda()->stream_destroy(s->stream));
    }
    free(s->rows);
}

static void *write_rows(void *argument) {
    subject s;

    begin(&s, (uint64_t)(uintptr_t)argument);
    for (int round = 0; round < n_rounds; round++) {
        pthread_rwlock_rdlock(&captures);
        bool opened = open_subject(&s, 1 + random_below(&s.seed, N_LANES));
        pthread_rwlock_unlock(&captures);
        for (int i = 0; i < N_STEPS && opened; i++) {
            pthread_rwlock_rdlock(&captures);
            write_some(&s);
            pthread_rwlock_unlock(&captures);
        }
        pthread_rwlock_rdlock(&captures);
        if (opened) {
            check_subject(&s);
            append(&s); /* still under way when the tensor is closed */
            CHECK_OK(vmm_close(s.tensor));
        }
        pthread_rwlock_unlock(&captures);
    }
    end(&s);
    return NULL;
}

/* ---- graphs ------------------------------------------------------------------------------------ */

static void *capture(subject *s) {
    pthread_rwlock_wrlock(&captures);
    sim_fail_none();
    vmm_array source = make_source(s, s->n_lanes, 1);
    CHECK_CUDA(cuda()->begin_capture(s->stream, CUDA_CAPTURE_THREAD_LOCAL));
    CHECK_OK(vmm_append(s->tensor, &source, s->stream));
    void *exec = end_capture(s->stream);
    pthread_rwlock_unlock(&captures);
    return exec;
}

static void step(subject *s, void *exec) {
    size_t length = longest(s);

    if (length == CAPACITY || !may_fail(vmm_map(s->tensor, length + 1)))
        return;
    make_source(s, s->n_lanes, 1);
    CHECK_CUDA(cuda()->graph_launch(exec, s->stream));
    CHECK_OK(vmm_advance(s->tensor, 1));
    note_all(s, 1);
}

static void replay_graphs(subject *s) {
    pthread_rwlock_rdlock(&captures);
    bool opened = open_subject(s, 1 + random_below(&s->seed, N_LANES));
    for (int i = 0; i < 5 && opened; i++)
        append(s);
    pthread_rwlock_unlock(&captures);
    if (!opened)
        return;
    /* The capture maps a row, for which there may be no memory. */
    pthread_rwlock_rdlock(&captures);
    if (longest(s) == CAPACITY || !may_fail(vmm_map(s->tensor, longest(s) + 1))) {
        CHECK_OK(vmm_close(s->tensor));
        pthread_rwlock_unlock(&captures);
        return;
    }
    pthread_rwlock_unlock(&captures);
    void *exec = capture(s);
    for (int i = 0; i < N_STEPS; i++) {
        pthread_rwlock_rdlock(&captures);
        if (random_below(&s->seed, 2))
            step(s, exec);
        else
            write_some(s);
        pthread_rwlock_unlock(&captures);
    }
    pthread_rwlock_rdlock(&captures);
    check_subject(s);
    if (random_below(&s->seed, 2)) {
        vmm_release(s->tensor); /* the graph has the last of it, and goes on */
        CHECK_CUDA(cuda()->graph_launch(exec, s->stream));
        CHECK_CUDA(cuda()->graph_exec_destroy(exec));
    } else {
        CHECK_CUDA(cuda()->graph_exec_destroy(exec));
        CHECK_CUDA(cuda()->stream_synchronize(s->stream));
        wait_for_unpinned(s->tensor);
        CHECK_OK(vmm_close(s->tensor));
    }
    CHECK_CUDA(cuda()->stream_synchronize(s->stream));
    pthread_rwlock_unlock(&captures);
}

static void *run_graphs(void *argument) {
    subject s;

    begin(&s, (uint64_t)(uintptr_t)argument);
    for (int round = 0; round < n_rounds; round++)
        replay_graphs(&s);
    end(&s);
    return NULL;
}

/* ---- what disturbs them ------------------------------------------------------------------------ */

/* One of the calls that make, map and give back memory, or start work, fails soon. */
static void fail_one(uint64_t *seed) {
    static const char *const calls[] = {
        "cuMemCreate",         "cuMemMap",         "cuMemSetAccess", "cuMemUnmap", "cuMemRelease",
        "cuMemAddressReserve", "cuMemAddressFree", "cuLaunchKernel",
    };

    sim_fail_none();
    CHECK(sim_fail(calls[random_below(seed, LENGTH_OF(calls))], 1 + random_below(seed, 4), UNKNOWN,
                   1) == 0);
}

static void give_up_a_pool(uint64_t *seed) {
    int64_t shape[] = {0, (int64_t)row_bytes};
    vmm_spec spec = {
        .ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 8, .block_bytes = granule};
    vmm_pool *pool;
    vmm_tensor *tensor;

    CHECK_OK(vmm_pool_create(f.device, granule, 0, &pool));
    may_fail(vmm_pool_set_lookahead(pool, 4 * granule));
    if (may_fail(vmm_reserve(pool, &spec, &tensor))) {
        may_fail(vmm_grow(tensor, 4, NULL));
        if (random_below(seed, 2)) {
            vmm_pool_release(pool);
            pool = NULL;
        }
        CHECK_OK(vmm_close(tensor));
    }
    vmm_pool_release(pool);
}

static void *disturb(void *argument) {
    uint64_t seed = (uint64_t)(uintptr_t)argument;
    struct timespec pause = {0, 300000};

    while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
        pthread_rwlock_rdlock(&captures);
        if (failing)
            fail_one(&seed);
        switch (random_below(&seed, 6)) {
        case 0: may_fail(vmm_pool_trim(f.pool, (int)random_below(&seed, 2))); break;
        case 1: may_fail(vmm_pool_set_lookahead(f.pool, 0)); break;
        case 2: give_up_a_pool(&seed); break;
        default: may_fail(vmm_pool_set_lookahead(f.pool, random_below(&seed, 8) * granule));
        }
        vmm_pool_stats stats = pool_stats(f.pool);
        CHECK(!stats.max_bytes || held_bytes(f.pool) <= stats.max_bytes);
        pthread_rwlock_unlock(&captures);
        nanosleep(&pause, NULL);
    }
    return NULL;
}

/* ---- all of it --------------------------------------------------------------------------------- */

static void run(bool with_failures, size_t max_bytes) {
    fixture before = f;
    pthread_t threads[4], disturber;
    size_t n = 0;

    stop = false;
    failing = with_failures;
    CHECK_OK(vmm_pool_create(f.device, granule, max_bytes, &f.pool));
    CHECK_OK(vmm_pool_set_lookahead(f.pool, 4 * granule));
    for (uintptr_t seed = 1; seed <= 2; seed++)
        CHECK(pthread_create(&threads[n++], NULL, write_rows, (void *)seed) == 0);
    for (uintptr_t seed = 3; seed <= 4 && f.is_gpu; seed++)
        CHECK(pthread_create(&threads[n++], NULL, run_graphs, (void *)seed) == 0);
    CHECK(pthread_create(&disturber, NULL, disturb, (void *)(uintptr_t)5) == 0);
    while (n > 0)
        CHECK(pthread_join(threads[--n], NULL) == 0);
    __atomic_store_n(&stop, true, __ATOMIC_RELEASE);
    CHECK(pthread_join(disturber, NULL) == 0);
    if (f.is_gpu) {
        n_failed += sim_failed();
        sim_fail_none();
    }
    failing = false;
    synchronize(&f);
    vmm_status status = VMM_ERR_BUSY; /* the driver may keep a graph a moment longer */
    for (int i = 0; i < 5000 && status == VMM_ERR_BUSY; i++) {
        struct timespec pause = {0, 1000000};
        CHECK_SIZE(pool_stats(f.pool).in_use_bytes * (i == 4999), 0);
        status = vmm_pool_close(f.pool);
        nanosleep(&pause, NULL);
    }
    CHECK_OK(status);
    f = before;
}

int main(int argc, char **argv) {
    const char *rounds = getenv("VMM_TEST_ROUNDS");

    setenv("VMM_SIM_GRANULARITY", "65536", 0); /* blocks that are filled soon */
    f = fixture_open(argc, argv, 0, 0);
    granule = f.is_gpu ? f.granularity_bytes : 64 * KIB;
    row_bytes = granule / 4;
    n_rounds = rounds ? atoi(rounds) : 12;
    if (f.is_gpu) {
        cuda();
        *(void **)&sim_fail = dlsym(cuda_library(), "vmm_sim_fail");
        *(void **)&sim_fail_none = dlsym(cuda_library(), "vmm_sim_fail_none");
        *(void **)&sim_failed = dlsym(cuda_library(), "vmm_sim_failed");
        if (!sim_fail)
            SKIP("it has the driver fail, which the simulated one does");
    }
    run(false, 0);
    run(false, 48 * granule);
    if (f.is_gpu) {
        run(true, 0);
        run(true, 48 * granule);
        CHECK(n_failed > 0);
    }
    fixture_close(&f);
    return 0;
}
