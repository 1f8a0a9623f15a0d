/* The device itself has no more memory: an error, nothing changed, no signal; and the next
 * call can succeed (invariants 3 and 11). On the host a resource limit plays the part; on a
 * GPU, where it would take everyone's memory, only the simulated driver does. */
#include "check.h"

#include <sys/resource.h>

static const int64_t shape[] = {0, 64 * 1024}; /* uint8 */

static void limit_host_memory(size_t bytes) {
    struct rlimit limit;
    size_t now = 0;
    char line[256];
    FILE *file = fopen("/proc/self/status", "r");

    CHECK(file);
    while (fgets(line, sizeof line, file))
        if (strncmp(line, "VmData:", 7) == 0)
            now = strtoull(line + 7, NULL, 10) * KIB;
    fclose(file);
    CHECK(getrlimit(RLIMIT_DATA, &limit) == 0);
    limit.rlim_cur = now + bytes;
    CHECK(setrlimit(RLIMIT_DATA, &limit) == 0);
}

static void run(const fixture *f, size_t block_bytes) {
    vmm_spec spec = {.ndim = 2,
                     .shape = shape,
                     .dtype = VMM_UINT8,
                     .capacity = 32 * KIB, /* 2 GiB */
                     .block_bytes = block_bytes};
    model a = model_open(f, &spec), b = model_open(f, &spec);
    vmm_status status = VMM_OK;

    while (a.length < 32 * KIB - 100) {
        status = vmm_grow(a.tensor, 17, NULL);
        if (status)
            break;
        memset(a.numbers + a.length, 0, 17 * sizeof *a.numbers);
        a.length += 17;
    }
    CHECK_STATUS(status, VMM_ERR_OUT_OF_MEMORY);
    CHECK(vmm_last_error()->driver_code != 0 && vmm_last_error()->message[0]);
    CHECK(vmm_last_error()->operation[0]);
    size_t mapped = vmm_mapped(a.tensor), held = held_bytes(f->pool);
    CHECK(mapped >= 16); /* it did get some */
    CHECK_STATUS(vmm_grow(b.tensor, 16 * KIB, NULL), VMM_ERR_OUT_OF_MEMORY);
    model_check_books(&a);
    CHECK_SIZE(vmm_mapped(a.tensor), mapped);
    CHECK_SIZE(vmm_length(b.tensor), 0);
    CHECK_SIZE(vmm_mapped(b.tensor), 0);
    CHECK(held_bytes(f->pool) <= held + 64 * f->granularity_bytes);

    CHECK_OK(vmm_truncate(a.tensor, a.length / 2, NULL));
    a.length /= 2;
    CHECK_OK(vmm_trim(a.tensor));
    model_append(&b, VMM_UINT8, 20, VMM_MEMORY_HOST, NULL);
    model_check(&b);
    model_close(&a);
    model_close(&b);
}

int main(int argc, char **argv) {
    setenv("VMM_SIM_MEMORY", "134217728", 1); /* before the driver is loaded */
    fixture f = fixture_open(argc, argv, 0, 0);
    if (f.is_gpu && !dlsym(cuda_library(), "vmm_sim_version"))
        SKIP("a GPU's memory is not ours to exhaust: the simulated driver's is");
    if (!f.is_gpu && !has_memory_limits())
        SKIP("no limit of memory is in force under a sanitizer or valgrind");
    if (!f.is_gpu)
        limit_host_memory(128 * MIB);
    run(&f, VMM_BLOCK_AUTO);
    run(&f, 2 * MIB);
    fixture_close(&f);
    return 0;
}
