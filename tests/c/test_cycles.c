/* 10 000 tensors opened, grown and closed: the device's memory and the process's are back
 * where they were, and nothing is left in the pool. */
#include "check.h"

#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
/* What has been freed is resident as long as ASan keeps it back, and by default that is long. */
const char *__asan_default_options(void) {
    return "quarantine_size_mb=1";
}
#endif

/* The simulated driver keeps a word for every handle that there was; TSan remembers, too. */
#ifdef __SANITIZE_THREAD__
#define SPARE_BYTES (16 * MIB)
#else
#define SPARE_BYTES (2 * MIB)
#endif

#define N_CYCLES 10000
#define N_WARM_UP 500

static const int64_t shape[] = {0, 64 * 1024}; /* uint8 */

static size_t resident_bytes(void) {
    size_t pages = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");

    CHECK(file && fscanf(file, "%zu %zu", &pages, &resident) == 2);
    fclose(file);
    return resident * (size_t)sysconf(_SC_PAGESIZE);
}

static size_t device_free_bytes(const fixture *f) {
    size_t free_bytes = 0, total;

    if (f->is_gpu)
        CHECK_CUDA(cuda()->memory_info(&free_bytes, &total));
    return free_bytes;
}

/* Of blocks as they come, one or two at a time, with and without a return to the driver. */
static void cycle(const fixture *f, const vmm_array *source, size_t i) {
    vmm_spec spec = {.ndim = 2,
                     .shape = shape,
                     .dtype = VMM_UINT8,
                     .capacity = 1 << 20,
                     .layout = VMM_LAYOUT_SEQ,
                     .block_bytes = i % 2 ? f->granularity_bytes : VMM_BLOCK_AUTO};
    vmm_tensor *tensor;
    vmm_pin *pin;

    CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
    CHECK_OK(vmm_append(tensor, source, NULL));
    CHECK_OK(vmm_grow(tensor, 1 + i % (f->granularity_bytes / (32 * KIB) + 1), NULL));
    if (i % 3 == 0) {
        CHECK_OK(vmm_pin_rows(tensor, 1, &pin));
        vmm_release(tensor); /* lives on by the pin */
        vmm_unpin(pin);
    } else {
        CHECK_OK(vmm_truncate(tensor, 1, NULL));
        CHECK_OK(vmm_trim(tensor));
        CHECK_OK(vmm_close(tensor));
    }
    if (i % 100 == 99)
        CHECK_OK(vmm_pool_trim(f->pool, i % 200 == 199));
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);
    int64_t one_row[] = {1, 64 * 1024};
    vmm_array source = {.data = device_alloc(&f, 64 * KIB),
                        .memory = f.is_gpu ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST,
                        .dtype = VMM_UINT8,
                        .ndim = 2,
                        .shape = one_row};
    size_t resident = 0, available = 0;

    for (size_t i = 0; i < N_CYCLES; i++) {
        if (i == N_WARM_UP) {
            CHECK_OK(vmm_pool_trim(f.pool, 1));
            available = device_free_bytes(&f);
            resident = resident_bytes();
        }
        cycle(&f, &source, i);
    }
    CHECK_OK(vmm_pool_trim(f.pool, 1));
    CHECK_SIZE(held_bytes(f.pool), 0);
    /* Others may use the GPU, too; one block lost in each cycle would be 19 GiB. */
    CHECK(device_free_bytes(&f) + 64 * MIB > available);
    size_t now = resident_bytes();
    if (now > resident + SPARE_BYTES)
        FAIL("%zu bytes resident after %d cycles, %zu after %d", now, N_CYCLES, resident,
             N_WARM_UP);
    device_free(&f, (void *)(uintptr_t)source.data);
    fixture_close(&f);
    return 0;
}
