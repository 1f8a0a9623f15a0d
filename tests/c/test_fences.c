/* A fence that one pool is taking, and a capture that another is told of: the capture waits
 * (invariant 6). Drivers before 12.5 wait for the device meanwhile, so there is time to look. */
#include "check.h"

#include <pthread.h>
#include <unistd.h>

#include "vmm_sim.h"

static const int64_t shape[] = {0, 1024}; /* uint8 */

typedef struct simulator {
    long (*calls)(const char *);
    void (*hold)(void);
    void (*go)(void);
} simulator;

static void *trim(void *pool) {
    CHECK_OK(vmm_pool_trim(pool, 1)); /* may wait, which that fence does */
    return NULL;
}

static int begun;

static void *begin(void *pool) {
    CHECK_OK(vmm_pool_capture_begin(pool));
    __atomic_store_n(&begun, 1, __ATOMIC_RELEASE);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc > 1 && strncmp(argv[1], "cuda", 4) == 0)
        setenv("VMM_SIM_DRIVER_VERSION", "12040", 1); /* before the driver is loaded */
    fixture f = fixture_open(argc, argv, 0, 0);
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 4096};
    simulator sim;
    vmm_pool *other;
    vmm_tensor *tensor;
    pthread_t threads[2];
    uint8_t byte = 0;
    void *stream, *memory;

    if (!f.is_gpu)
        SKIP("the host takes no fences");
    *(void **)&sim.calls = dlsym(cuda_library(), "vmm_sim_calls");
    *(void **)&sim.hold = dlsym(cuda_library(), "vmm_sim_hold");
    *(void **)&sim.go = dlsym(cuda_library(), "vmm_sim_go");
    if (!sim.calls)
        SKIP("only the simulated driver's work can be held back");
    memory = device_alloc(&f, 1);
    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    CHECK_OK(vmm_pool_create(f.device, 0, 0, &other));
    CHECK_OK(vmm_reserve(f.pool, &spec, &tensor));
    CHECK_OK(vmm_grow(tensor, 10, NULL));
    CHECK_OK(vmm_close(tensor));

    sim.hold();
    CHECK_CUDA(cuda()->to_device_async((uintptr_t)memory, &byte, 1, stream));
    CHECK(pthread_create(&threads[0], NULL, trim, f.pool) == 0);
    while (sim.calls("cuCtxSynchronize") == 0)
        usleep(100);
    CHECK(pthread_create(&threads[1], NULL, begin, other) == 0);
    usleep(50 * 1000); /* as long as it might take, had it nothing to wait for */
    CHECK(!__atomic_load_n(&begun, __ATOMIC_ACQUIRE));
    sim.go();
    for (int i = 0; i < 2; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(begun);

    CHECK_STATUS(vmm_pool_capture_end(f.pool), VMM_ERR_INVALID);
    CHECK_OK(vmm_pool_capture_end(other));
    CHECK_CUDA(cuda()->stream_destroy(stream));
    device_free(&f, memory);
    CHECK_OK(vmm_pool_close(other));
    fixture_close(&f);
    return 0;
}
