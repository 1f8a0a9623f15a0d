/* Look-ahead over more lanes and ranges than it looks at in one go: none is left out, and those
 * that go meanwhile do no harm. On the host, whose blocks are small. */
#include "check.h"

#include <pthread.h>

#define N_TENSORS 12
#define N_LANES 64
#define N_ROUNDS 40
#define N_CYCLES 60

static size_t granule, rows; /* of a block */
static vmm_pool *pool;

static vmm_tensor *open_one(size_t n_lanes) {
    const int64_t shape[] = {(int64_t)n_lanes, 0, 1024};
    vmm_tensor *tensor;
    vmm_spec spec = {.ndim = 3,
                     .shape = shape,
                     .axis = 1,
                     .dtype = VMM_UINT8,
                     .layout = VMM_LAYOUT_LANE,
                     .capacity = (N_ROUNDS + 1) * 2 * rows,
                     .block_bytes = granule};

    CHECK_OK(vmm_reserve(pool, &spec, &tensor));
    return tensor;
}

/* A block more of each lane, and the calls that it took. */
static uint64_t grow_all(vmm_tensor **tensors) {
    uint64_t before = 0, after = 0;

    for (size_t i = 0; i < N_TENSORS; i++)
        before += total_calls(tensors[i]);
    for (size_t i = 0; i < N_TENSORS; i++)
        CHECK_OK(vmm_grow(tensors[i], rows, NULL));
    for (size_t i = 0; i < N_TENSORS; i++)
        after += total_calls(tensors[i]);
    return after - before;
}

static bool all_ahead(void) {
    struct timespec pause = {0, 1000000};

    for (int i = 0; i < 400; i++) {
        if (pool_stats(pool).lookahead_bytes == N_TENSORS * N_LANES * granule)
            return true;
        nanosleep(&pause, NULL);
    }
    return false;
}

/* With one block for each lane and no more, every lane gets one. A slow machine gets more rounds:
 * what does not grow for a while is given up. */
static void test_every_lane(void) {
    vmm_tensor *tensors[N_TENSORS];
    bool found = false;

    CHECK_OK(vmm_pool_set_lookahead(pool, N_TENSORS * N_LANES * granule));
    for (size_t i = 0; i < N_TENSORS; i++)
        tensors[i] = open_one(N_LANES);
    for (int i = 0; i < N_ROUNDS && !found; i++) {
        grow_all(tensors);
        found = all_ahead() && grow_all(tensors) == 0;
    }
    CHECK(found);
    for (size_t i = 0; i < N_TENSORS; i++)
        CHECK_OK(vmm_close(tensors[i]));
    CHECK_OK(vmm_pool_set_lookahead(pool, 0)); /* which may be returning what was closed */
    CHECK_SIZE(held_bytes(pool), 0);
}

static void *open_and_close(void *argument) {
    (void)argument;
    for (int i = 0; i < N_CYCLES; i++) {
        vmm_tensor *first = open_one(N_LANES), *second = open_one(N_LANES);
        CHECK_OK(vmm_grow(first, rows, NULL));
        CHECK_OK(vmm_grow(second, 2 * rows, NULL));
        CHECK_OK(vmm_close(first));
        CHECK_OK(vmm_grow(second, rows, NULL));
        CHECK_OK(vmm_close(second));
    }
    return NULL;
}

static void test_ranges_go(void) {
    pthread_t threads[3];
    vmm_tensor *stays[N_TENSORS];

    CHECK_OK(vmm_pool_set_lookahead(pool, 2 * N_TENSORS * N_LANES * granule));
    for (size_t i = 0; i < N_TENSORS; i++)
        stays[i] = open_one(N_LANES);
    for (size_t i = 0; i < LENGTH_OF(threads); i++)
        CHECK(pthread_create(&threads[i], NULL, open_and_close, NULL) == 0);
    for (int i = 0; i < N_ROUNDS / 2; i++)
        grow_all(stays);
    for (size_t i = 0; i < LENGTH_OF(threads); i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    for (size_t i = 0; i < N_TENSORS; i++)
        CHECK_OK(vmm_close(stays[i]));
    CHECK_OK(vmm_pool_set_lookahead(pool, 0));
    CHECK_SIZE(held_bytes(pool), 0);
}

/* A tensor that takes the thread several goes to look at is closed when the thread is within it,
 * most of these times: it goes on with what is left. */
static void test_range_goes_halfway(void) {
    vmm_tensor *stays = open_one(1);
    struct timespec pause = {0, 2000000};

    CHECK_OK(vmm_pool_set_lookahead(pool, granule));
    for (int i = 0; i < 8; i++) {
        vmm_tensor *goes = open_one(64 * N_LANES);
        CHECK_OK(vmm_grow(goes, rows, NULL));
        nanosleep(&pause, NULL);
        CHECK_OK(vmm_close(goes));
        CHECK_OK(vmm_grow(stays, 1, NULL));
    }
    CHECK_OK(vmm_close(stays));
    CHECK_OK(vmm_pool_set_lookahead(pool, 0));
    CHECK_SIZE(held_bytes(pool), 0);
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    if (f.is_gpu)
        SKIP("so many blocks of a GPU are too much memory");
    pool = f.pool;
    granule = f.granularity_bytes;
    rows = granule / 1024;
    test_every_lane();
    test_ranges_go();
    test_range_goes_halfway();
    fixture_close(&f);
    return 0;
}
