/* The driver fails in the middle of a growth, and again while that is undone: the tensor is as
 * it was, what could not be undone is parked and comes back (invariants 3 and 6). Chosen
 * failures; tests of every call's are elsewhere. On the simulated driver only. */
#include "check.h"

#include "../sim/vmm_sim.h"

#define NOT_READY 600
#define LAUNCH_FAILED 719
#define UNKNOWN 999

static const int64_t shape[] = {0, 64 * 1024}; /* uint8 */

static struct {
    __typeof__(vmm_sim_fail) *fail;
    __typeof__(vmm_sim_fail_none) *fail_none;
    __typeof__(vmm_sim_failed) *failed;
    __typeof__(vmm_sim_hold) *hold;
    __typeof__(vmm_sim_go) *go;
} sim;

static void load_simulator(void) {
    *(void **)&sim.fail = dlsym(cuda_library(), "vmm_sim_fail");
    *(void **)&sim.fail_none = dlsym(cuda_library(), "vmm_sim_fail_none");
    *(void **)&sim.failed = dlsym(cuda_library(), "vmm_sim_failed");
    *(void **)&sim.hold = dlsym(cuda_library(), "vmm_sim_hold");
    *(void **)&sim.go = dlsym(cuda_library(), "vmm_sim_go");
    if (!sim.fail)
        SKIP("the driver is not the simulated one");
}

static void let_fail(const char *call, int code, int times) {
    CHECK(sim.fail(call, 1, code, times) == 0);
}

/* Blocks of one granule, `rows` to a block. */
static model open_model(const fixture *f, size_t *rows) {
    vmm_spec spec = {.ndim = 2,
                     .shape = shape,
                     .dtype = VMM_UINT8,
                     .capacity = 16 * f->granularity_bytes / (64 * KIB),
                     .block_bytes = f->granularity_bytes};

    *rows = f->granularity_bytes / (64 * KIB);
    return model_open(f, &spec);
}

static size_t parked_bytes(const fixture *f) {
    vmm_pool_stats stats;

    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    return stats.parked_bytes;
}

/* Access fails, and so do both attempts to unmap: the blocks are taken back into use where
 * they are, and must be given the access that they never got. */
static void test_revived_without_access(const fixture *f) {
    size_t rows;
    model m = open_model(f, &rows);

    model_append(&m, VMM_UINT8, rows, VMM_MEMORY_DEVICE, NULL);
    let_fail("cuMemSetAccess", UNKNOWN, 1);
    let_fail("cuMemUnmap", UNKNOWN, 2);
    CHECK_STATUS(vmm_grow(m.tensor, 2 * rows, NULL), VMM_ERR_DRIVER);
    CHECK(strcmp(vmm_last_error()->operation, is_hip ? "hipMemSetAccess" : "cuMemSetAccess") == 0);
    model_check(&m);
    CHECK_SIZE(vmm_mapped(m.tensor), rows);
    CHECK_SIZE(parked_bytes(f), 2 * f->granularity_bytes);
    model_append(&m, VMM_UINT8, 2 * rows, VMM_MEMORY_DEVICE, NULL);
    CHECK(sim.failed() == 3);
    CHECK_SIZE(parked_bytes(f), 0);
    model_check(&m);
    model_close(&m);
}

/* Parked while mapped, and parked unmapped: the pool's next call tries again. */
static void test_parked_is_retried(const fixture *f) {
    static const char *const calls[] = {"cuMemUnmap", "cuMemRelease"};
    size_t rows;

    for (size_t i = 0; i < LENGTH_OF(calls); i++) {
        model m = open_model(f, &rows), other = open_model(f, &rows);
        CHECK_OK(vmm_pool_trim(f->pool, 1));
        let_fail("cuMemSetAccess", UNKNOWN, 1);
        let_fail(calls[i], UNKNOWN, 1);
        CHECK_STATUS(vmm_grow(m.tensor, rows, NULL), VMM_ERR_DRIVER);
        CHECK_SIZE(parked_bytes(f), f->granularity_bytes);
        model_append(&other, VMM_UINT8, 1, VMM_MEMORY_HOST, NULL);
        CHECK_SIZE(parked_bytes(f), 0);
        CHECK_SIZE(held_bytes(f->pool), f->granularity_bytes);
        model_close(&m);
        model_close(&other);
    }
}

/* Nothing was submitted: the length and the mapping are as before. */
static void test_launch_fails(const fixture *f) {
    size_t rows;
    model m = open_model(f, &rows);
    uint8_t *memory = device_alloc(f, 3 * rows * 64 * KIB);
    int64_t n_rows[] = {(int64_t)(2 * rows), 64 * 1024};
    vmm_array source = {.data = memory,
                        .memory = VMM_MEMORY_DEVICE,
                        .dtype = VMM_UINT8,
                        .ndim = 2,
                        .shape = n_rows};

    model_append(&m, VMM_UINT8, rows / 2, VMM_MEMORY_DEVICE, NULL);
    for (int mapped = 0; mapped < 2; mapped++) {
        if (mapped)
            CHECK_OK(vmm_map(m.tensor, 4 * rows));
        size_t before = vmm_mapped(m.tensor);
        let_fail("cuLaunchKernel", LAUNCH_FAILED, 1);
        CHECK_STATUS(vmm_append(m.tensor, &source, NULL), VMM_ERR_DRIVER);
        CHECK_SIZE(vmm_mapped(m.tensor), before);
        model_check(&m);
    }
    model_append(&m, VMM_UINT8, 2 * rows, VMM_MEMORY_DEVICE, NULL);
    model_check(&m);
    device_free(f, memory);
    model_close(&m);
}

/* The second launch fails while the first one writes to what was mapped for it: no unmap. */
static void test_second_launch_fails(const fixture *f) {
    enum { N = VMM_APPEND_MAX_FUSED + 8 };
    model models[N];
    vmm_tensor *tensors[N];
    vmm_array sources[N];
    size_t rows;
    int64_t one_row[] = {1, 64 * 1024};
    void *memory = device_alloc(f, 64 * KIB);

    for (int i = 0; i < N; i++) {
        models[i] = open_model(f, &rows);
        tensors[i] = models[i].tensor;
        sources[i] = (vmm_array){.data = memory,
                                 .memory = VMM_MEMORY_DEVICE,
                                 .dtype = VMM_UINT8,
                                 .ndim = 2,
                                 .shape = one_row};
    }
    synchronize(f);
    sim.hold();
    CHECK(sim.fail("cuLaunchKernel", 2, LAUNCH_FAILED, 1) == 0);
    CHECK_STATUS(vmm_append_many(N, tensors, sources, NULL), VMM_ERR_DRIVER);
    for (int i = 0; i < N; i++) {
        model_check_books(&models[i]);
        CHECK_SIZE(vmm_mapped(tensors[i]), 0);
    }
    sim.go();
    CHECK_OK(vmm_append_many(N, tensors, sources, NULL));
    synchronize(f);
    for (int i = 0; i < N; i++) {
        CHECK_SIZE(vmm_length(tensors[i]), 1);
        model_close(&models[i]);
    }
    device_free(f, memory);
}

/* Access that is not ready for a while, as under WSL2, is asked for again. */
static void test_not_ready(const fixture *f) {
    size_t rows;
    synchronize(f);
    CHECK_OK(vmm_pool_trim(f->pool, 1)); /* a range that is taken over has access already */
    model m = open_model(f, &rows);

    let_fail("cuMemSetAccess", NOT_READY, 3);
    model_append(&m, VMM_UINT8, rows, VMM_MEMORY_HOST, NULL);
    model_check(&m);
    let_fail("cuMemSetAccess", NOT_READY, -1);
    CHECK_STATUS(vmm_grow(m.tensor, 1, NULL), VMM_ERR_DRIVER);
    CHECK(vmm_last_error()->driver_code == NOT_READY);
    sim.fail_none();
    model_check(&m);
    model_close(&m);
}

/* Where two things fail, the first is returned, and is what the last error says. */
static void test_first_failure_is_told(const fixture *f) {
    size_t rows;
    model m = open_model(f, &rows), closed = open_model(f, &rows);

    model_grow(&closed, 4 * rows, false);
    model_close(&closed);
    synchronize(f);
    model_grow(&m, rows, false); /* takes back four blocks, and leaves three free */
    CHECK_OK(vmm_map(m.tensor, 2 * rows));
    CHECK_OK(vmm_trim(m.tensor));
    CHECK_OK(vmm_pool_capture_begin(f->pool));
    let_fail("cuMemRelease", UNKNOWN, -1);
    CHECK_STATUS(vmm_pool_trim(f->pool, 1), VMM_ERR_CAPTURING);
    CHECK(sim.failed() > 0);
    CHECK_STATUS(vmm_last_error()->status, VMM_ERR_CAPTURING);
    sim.fail_none();
    CHECK_OK(vmm_pool_capture_end(f->pool));
    CHECK_OK(vmm_pool_trim(f->pool, 1));
    CHECK_SIZE(parked_bytes(f), 0);
    model_close(&m);
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    if (!f.is_gpu)
        SKIP("the host has no simulated driver");
    load_simulator();
    test_revived_without_access(&f);
    test_parked_is_retried(&f);
    test_launch_fails(&f);
    test_second_launch_fails(&f);
    test_not_ready(&f);
    test_first_failure_is_told(&f);
    fixture_close(&f);
    return 0;
}
