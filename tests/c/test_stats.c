/* vmm_stats() on one thread while another changes the tensor: every figure is one that was right
 * a moment ago, and none is less than nothing. */
#include "check.h"

#include <pthread.h>

#define N_ROUNDS 3000
#define N_LANES 3
#define ROW 512 /* of a lane */
#define CAPACITY 64

static fixture f;
static vmm_tensor *tensor;
static bool stop;

static void *ask(void *user) {
    vmm_tensor_stats stats;

    (void)user;
    while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
        CHECK_OK(vmm_stats(tensor, &stats));
        if (stats.slack_bytes > stats.mapped_bytes || stats.mapped_bytes > stats.reserved_bytes ||
            stats.used_bytes > N_LANES * ROW * CAPACITY)
            FAIL("%zu bytes mapped, %zu used, %zu slack", stats.mapped_bytes, stats.used_bytes,
                 stats.slack_bytes);
    }
    return NULL;
}

/* Full, and empty again; in between one lane at a time, or all at once. */
static void change(void) {
    static const int64_t shape[] = {1, CAPACITY / 2, ROW};
    static uint8_t rows[CAPACITY / 2 * ROW];
    const vmm_array source = {.data = rows, .dtype = VMM_UINT8, .ndim = 3, .shape = shape};

    for (int round = 0; round < N_ROUNDS; round++) {
        if (round % 2) {
            CHECK_OK(vmm_grow(tensor, CAPACITY, NULL));
        } else {
            for (size_t lane = 0; lane < N_LANES; lane++)
                CHECK_OK(vmm_append_lanes(1, &tensor, &source, 1, &lane, NULL, NULL));
        }
        CHECK_OK(vmm_truncate(tensor, round % 3, VMM_STREAM_NONE));
        CHECK_OK(vmm_trim(tensor));
        CHECK_OK(vmm_truncate(tensor, 0, VMM_STREAM_NONE));
    }
}

int main(int argc, char **argv) {
    static const int64_t shape[] = {N_LANES, 0, ROW};
    vmm_spec spec = {.ndim = 3,
                     .shape = shape,
                     .axis = 1,
                     .dtype = VMM_UINT8,
                     .capacity = CAPACITY,
                     .layout = VMM_LAYOUT_LANE};
    vmm_tensor_stats stats;
    pthread_t asking;

    f = fixture_open(argc, argv, 0, 0);
    CHECK_OK(vmm_reserve(f.pool, &spec, &tensor));
    CHECK(pthread_create(&asking, NULL, ask, NULL) == 0);
    change();
    __atomic_store_n(&stop, true, __ATOMIC_RELEASE);
    CHECK(pthread_join(asking, NULL) == 0);
    CHECK_OK(vmm_trim(tensor));
    CHECK_OK(vmm_stats(tensor, &stats));
    CHECK(stats.used_bytes == 0 && stats.mapped_bytes == 0 && stats.slack_bytes == 0);
    CHECK_OK(vmm_close(tensor));
    fixture_close(&f);
    return 0;
}
