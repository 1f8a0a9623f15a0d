/* bench_driver: what the driver's part costs, by block size.
 *
 *   block/open/S                mapping one block of S, new from the driver
 *   block/reopen/S              mapping one that the pool has: on a GPU one that was trimmed
 *   block/trim/S                trimming it: on a GPU it is queued, on the host unmapped
 *   block/return/S              vmm_pool_trim() of it, waiting for the device
 *   base/cuMem.../S             on an NVIDIA GPU: the driver's calls alone, and cuMemAlloc with its
 *                               cuMemFree
 *   base/touch/S                on the host: first touch of fresh memory with huge pages
 */
#include "cuda.h"

#include <sys/mman.h>

static void touch(bench *b, size_t block_bytes, int times) {
    for (int i = -1; i < times; i++) {
        char *memory = mmap(NULL, block_bytes + 2 * MIB, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED)
            abort();
        char *at = (char *)(((uintptr_t)memory + 2 * MIB - 1) & ~(2 * MIB - 1));
        madvise(at, block_bytes, MADV_HUGEPAGE);
        bench_start(b);
        for (size_t offset = 0; offset < block_bytes; offset += 4096)
            *(volatile char *)(at + offset) = 1;
        if (i >= 0)
            bench_stop(b, 1);
        munmap(memory, block_bytes + 2 * MIB);
    }
}

/* One block made, mapped, opened, unmapped, released; what NVIDIA's manual asks for and no more. */
static void bare_calls(bench *b, bench_cuda *cuda, size_t block_bytes, const char *size,
                       int times) {
    static const char *const names[] = {"cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap",
                                        "cuMemRelease"};
    CUmemAllocationProp properties = {
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = cuda->index}};
    CUmemAccessDesc access = {properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    double (*took)[5] = malloc(sizeof *took * (size_t)times);
    CUmemGenericAllocationHandle handle;
    CUdeviceptr base;

    if (!took)
        abort();
    CUDA_OK(cuda->cuMemAddressReserve(&base, block_bytes, 0, 0, 0));
    for (int i = -2; i < times; i++) {
        double t[6];
        t[0] = bench_now();
        CUDA_OK(cuda->cuMemCreate(&handle, block_bytes, &properties, 0));
        t[1] = bench_now();
        CUDA_OK(cuda->cuMemMap(base, block_bytes, 0, handle, 0));
        t[2] = bench_now();
        CUDA_OK(cuda->cuMemSetAccess(base, block_bytes, &access, 1));
        t[3] = bench_now();
        CUDA_OK(cuda->cuMemUnmap(base, block_bytes));
        t[4] = bench_now();
        CUDA_OK(cuda->cuMemRelease(handle));
        t[5] = bench_now();
        for (int call = 0; call < 5 && i >= 0; call++)
            took[i][call] = t[call + 1] - t[call];
    }
    CUDA_OK(cuda->cuMemAddressFree(base, block_bytes));
    for (int call = 0; call < 5; call++) {
        for (int i = 0; i < times; i++)
            bench_sample(b, took[i][call]);
        bench_report(b, "", "base/%s/%s", names[call], size);
        bench_extra(b, "block_bytes", (double)block_bytes);
    }
    free(took);
    for (int i = -1; i < times; i++) {
        bench_start(b);
        CUDA_OK(cuda->cuMemFree(cuda_alloc(cuda, block_bytes)));
        if (i >= 0)
            bench_stop(b, 1);
    }
    bench_report(b, "", "base/cuMemAlloc/%s", size);
    bench_extra(b, "block_bytes", (double)block_bytes);
}

static void blocks(bench *b, bench_cuda *cuda, size_t block_bytes, const char *size) {
    const int64_t shape[] = {0, (int64_t)block_bytes}; /* uint8: a row is a block */
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 4};
    int times = bench_times(b, block_bytes > 32 * MIB ? 20 : 100);
    double (*took)[4] = malloc(sizeof *took * (size_t)times);
    char baseline[64] = "";
    vmm_pool *pool;
    vmm_tensor *tensor;

    if (!took)
        abort();
    if (cuda) {
        bare_calls(b, cuda, block_bytes, size, times);
        snprintf(baseline, sizeof baseline, "base/cuMemAlloc/%s", size);
    } else if (!b->is_gpu) {
        touch(b, block_bytes, times);
        snprintf(baseline, sizeof baseline, "base/touch/%s", size);
        bench_report(b, "", "%s", baseline);
        bench_extra(b, "block_bytes", (double)block_bytes);
    }
    BENCH_OK(vmm_pool_create(b->device, block_bytes, 0, &pool));
    BENCH_OK(vmm_reserve(pool, &spec, &tensor));
    for (int i = -2; i < times; i++) {
        double t[6];
        t[0] = bench_now();
        BENCH_OK(vmm_map(tensor, 1));
        t[1] = bench_now();
        BENCH_OK(vmm_trim(tensor));
        t[2] = bench_now();
        BENCH_OK(vmm_map(tensor, 1));
        t[3] = bench_now();
        BENCH_OK(vmm_trim(tensor));
        t[4] = bench_now();
        BENCH_OK(vmm_pool_trim(pool, 1));
        t[5] = bench_now();
        if (i < 0)
            continue;
        for (int step = 0; step < 3; step++)
            took[i][step] = t[step + 1] - t[step];
        took[i][3] = t[5] - t[4];
    }
    static const char *const ids[] = {"block/open", "block/trim", "block/reopen", "block/return"};
    for (int id = 0; id < 4; id++) {
        for (int i = 0; i < times; i++)
            bench_sample(b, took[i][id]);
        bench_report(b, baseline, "%s/%s", ids[id], size);
        bench_extra(b, "block_bytes", (double)block_bytes);
    }
    BENCH_OK(vmm_close(tensor));
    BENCH_OK(vmm_pool_close(pool));
    free(took);
}

int main(int argc, char **argv) {
    static bench b;
    bench_cuda cuda;

    bench_open(&b, "bench_driver", argc, argv);
    b.not_measured = "use of the memory; several threads at once; the device at work meanwhile";
    bench_cuda *driver = cuda_open(&b, &cuda) ? &cuda : NULL;
    if (!b.is_gpu)
        blocks(&b, driver, 64 * KIB, "64KiB");
    blocks(&b, driver, 2 * MIB, "2MiB");
    blocks(&b, driver, 16 * MIB, "16MiB");
    blocks(&b, driver, 32 * MIB, "32MiB");
    blocks(&b, driver, 128 * MIB, "128MiB");
    bench_close(&b);
    return 0;
}
