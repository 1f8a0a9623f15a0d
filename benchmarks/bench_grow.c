/* bench_grow: taking rows into use, within mapped rows and past them.
 *
 *   grow/within         vmm_grow() of one row that is mapped; no driver call
 *   grow/within/2-lanes the same for two lanes: it costs the same
 *   grow/new-block/S    vmm_grow() of one row that needs a block of S, new from the driver
 *   touch/S             the baseline on the host: first touch of S bytes of huge pages
 */
#include "bench.h"

#include <sys/mman.h>

#define ROW_BYTES (16 * KIB)
#define CALLS 100000

static const int64_t shape[] = {0, ROW_BYTES}; /* uint8 */

static void grow_within(bench *b, vmm_pool *pool, const vmm_spec *spec, const char *id) {
    vmm_tensor *tensor;

    BENCH_OK(vmm_reserve(pool, spec, &tensor));
    BENCH_OK(vmm_map(tensor, CALLS));
    for (int round = -3; round < 201; round++) {
        bench_start(b);
        for (int i = 0; i < CALLS; i++)
            vmm_grow(tensor, 1, NULL);
        if (round >= 0)
            bench_stop(b, CALLS);
        if (vmm_length(tensor) != CALLS)
            abort();
        BENCH_OK(vmm_truncate(tensor, 0, VMM_STREAM_NONE));
    }
    bench_report(b, "", "%s", id);
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

static void new_blocks(bench *b, size_t block_bytes, const char *size) {
    size_t n_blocks = 512 * MIB / block_bytes;
    vmm_spec spec = {.ndim = 2,
                     .shape = shape,
                     .dtype = VMM_UINT8,
                     .capacity = n_blocks * block_bytes / ROW_BYTES,
                     .block_bytes = block_bytes};
    char baseline[64] = "";
    vmm_pool *pool;
    vmm_tensor *tensor;

    if (!b->is_cuda) {
        snprintf(baseline, sizeof baseline, "touch/%s", size);
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
    BENCH_OK(vmm_close(tensor));
    BENCH_OK(vmm_pool_close(pool));
}

int main(int argc, char **argv) {
    static bench b;
    const int64_t small[] = {0, 16}, lanes[] = {2, 0, 16};
    vmm_spec one = {.ndim = 2, .shape = small, .dtype = VMM_UINT8, .capacity = CALLS};
    vmm_spec two = {.ndim = 3,
                    .shape = lanes,
                    .axis = 1,
                    .dtype = VMM_UINT8,
                    .capacity = CALLS,
                    .layout = VMM_LAYOUT_LANE};
    vmm_pool *pool;

    bench_open(&b, "bench_grow", argc, argv);
    b.not_measured = "writing the rows; look-ahead, which this version does not have";
    BENCH_OK(vmm_pool_create(b.device, 0, 0, &pool));
    grow_within(&b, pool, &one, "grow/within");
    grow_within(&b, pool, &two, "grow/within/2-lanes");
    BENCH_OK(vmm_pool_close(pool));
    new_blocks(&b, 2 * MIB, "2MiB");
    new_blocks(&b, 32 * MIB, "32MiB");
    bench_close(&b);
    return 0;
}
