/* bench_grow: taking rows into use, within mapped rows and past them.
 *
 *   grow/within/S           vmm_grow() of one row of S bytes that is mapped; no driver call
 *   grow/within/2KiB/2-lanes  the same for two lanes
 *   grow/new-block/S        vmm_grow() of one row that needs a block of S, new from the driver
 *   base/call               an empty function
 *   base/touch/S            on the host: first touch of S bytes of huge pages
 *   base/cuMemAlloc/S       on an NVIDIA GPU: S bytes from the driver, which do not grow anything
 */
#include "cuda.h"

#include <sys/mman.h>

#define ROW_BYTES (16 * KIB)

__attribute__((noinline)) static vmm_status empty(vmm_tensor *tensor, size_t n_rows, void **out) {
    __asm__ volatile("" : : "r"(tensor), "r"(n_rows), "r"(out) : "memory");
    return VMM_OK;
}

static void grow_within(bench *b, vmm_pool *pool, size_t row_bytes, size_t n_lanes,
                        const char *id) {
    const int64_t shape[] = {(int64_t)n_lanes, 0, (int64_t)row_bytes};
    int calls = (int)(256 * MIB / row_bytes) < 100000 ? (int)(256 * MIB / row_bytes) : 100000;
    vmm_spec spec = {.ndim = 3,
                     .shape = shape,
                     .axis = 1,
                     .dtype = VMM_UINT8,
                     .capacity = (size_t)calls,
                     .layout = VMM_LAYOUT_LANE};
    vmm_tensor *tensor;

    BENCH_OK(vmm_reserve(pool, &spec, &tensor));
    BENCH_OK(vmm_map(tensor, (size_t)calls));
    for (int round = -3; round < bench_times(b, 201); round++) {
        bench_start(b);
        for (int i = 0; i < calls; i++)
            vmm_grow(tensor, 1, NULL);
        if (round >= 0)
            bench_stop(b, (size_t)calls);
        if (vmm_length(tensor) != (size_t)calls)
            abort();
        BENCH_OK(vmm_truncate(tensor, 0, VMM_STREAM_NONE));
    }
    bench_report(b, "base/call", "%s", id);
    bench_extra(b, "row_bytes", (double)row_bytes);
    BENCH_OK(vmm_close(tensor));
}

/* First touch of `n_blocks` pieces of fresh memory, what mapping on the host must do, too. */
static void touch(bench *b, size_t block_bytes, size_t n_blocks, bool timed) {
    size_t bytes = n_blocks * block_bytes;
    char *memory = mmap(NULL, bytes + 2 * MIB, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *at = (char *)(((uintptr_t)memory + 2 * MIB - 1) & ~(2 * MIB - 1));

    if (memory == MAP_FAILED)
        abort();
    madvise(at, bytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < n_blocks; i++, at += block_bytes) {
        bench_start(b);
        for (size_t offset = 0; offset < block_bytes; offset += 4096)
            *(volatile char *)(at + offset) = 1;
        if (timed)
            bench_stop(b, 1);
    }
    munmap(memory, bytes + 2 * MIB);
}

static void alloc(bench *b, bench_cuda *cuda, size_t block_bytes, size_t n_blocks) {
    CUdeviceptr *blocks = malloc(n_blocks * sizeof *blocks);

    if (!blocks)
        abort();
    for (size_t i = 0; i < n_blocks; i++) {
        bench_start(b);
        blocks[i] = cuda_alloc(cuda, block_bytes);
        bench_stop(b, 1);
    }
    for (size_t i = 0; i < n_blocks; i++)
        CUDA_OK(cuda->cuMemFree(blocks[i]));
    free(blocks);
}

static void new_blocks(bench *b, bench_cuda *cuda, size_t block_bytes, const char *size) {
    const int64_t shape[] = {0, ROW_BYTES};
    size_t n_blocks = (b->quick ? 256 : 512) * MIB / block_bytes;
    vmm_spec spec = {.ndim = 2,
                     .shape = shape,
                     .dtype = VMM_UINT8,
                     .capacity = n_blocks * block_bytes / ROW_BYTES,
                     .block_bytes = block_bytes};
    char baseline[64] = "";
    vmm_pool *pool;
    vmm_tensor *tensor;

    if (cuda) {
        snprintf(baseline, sizeof baseline, "base/cuMemAlloc/%s", size);
        alloc(b, cuda, block_bytes, n_blocks);
        bench_report(b, "", "%s", baseline);
    } else if (!b->is_gpu) {
        snprintf(baseline, sizeof baseline, "base/touch/%s", size);
        touch(b, block_bytes, n_blocks, false);
        touch(b, block_bytes, n_blocks, true);
        bench_report(b, "", "%s", baseline);
    }
    BENCH_OK(vmm_pool_create(b->device, block_bytes, 0, &pool));
    BENCH_OK(vmm_reserve(pool, &spec, &tensor));
    for (size_t i = 0; i < n_blocks; i++) {
        bench_start(b);
        BENCH_OK(vmm_grow(tensor, 1, NULL));
        bench_stop(b, 1);
        BENCH_OK(vmm_grow(tensor, block_bytes / ROW_BYTES - 1, NULL));
    }
    bench_report(b, baseline, "grow/new-block/%s", size);
    bench_extra(b, "block_bytes", (double)block_bytes);
    BENCH_OK(vmm_close(tensor));
    BENCH_OK(vmm_pool_close(pool));
}

int main(int argc, char **argv) {
    static bench b;
    bench_cuda cuda;
    vmm_pool *pool;

    bench_open(&b, "bench_grow", argc, argv);
    b.not_measured = "writing the rows; look-ahead: bench_boundaries has it";
    bench_cuda *driver = cuda_open(&b, &cuda) ? &cuda : NULL;
    for (int round = -3; round < bench_times(&b, 201); round++) {
        bench_start(&b);
        for (int i = 0; i < 100000; i++)
            empty(NULL, 1, NULL);
        if (round >= 0)
            bench_stop(&b, 100000);
    }
    bench_report(&b, "", "base/call");
    BENCH_OK(vmm_pool_create(b.device, 0, 0, &pool));
    grow_within(&b, pool, 2 * KIB, 1, "grow/within/2KiB");
    grow_within(&b, pool, 16 * KIB, 1, "grow/within/16KiB");
    grow_within(&b, pool, 128 * KIB, 1, "grow/within/128KiB");
    grow_within(&b, pool, MIB, 1, "grow/within/1MiB");
    grow_within(&b, pool, 2 * KIB, 2, "grow/within/2KiB/2-lanes");
    BENCH_OK(vmm_pool_close(pool));
    new_blocks(&b, driver, 2 * MIB, "2MiB");
    new_blocks(&b, driver, 16 * MIB, "16MiB");
    new_blocks(&b, driver, 32 * MIB, "32MiB");
    new_blocks(&b, driver, 128 * MIB, "128MiB");
    bench_close(&b);
    return 0;
}
