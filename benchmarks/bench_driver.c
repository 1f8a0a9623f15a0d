/* bench_driver: what the driver's part costs, by block size.
 *
 *   tensor/open, tensor/close   reserving address space for 1 GiB, and giving it up
 *   block/open/S                mapping one block of S, new from the driver
 *   block/reopen/S              mapping one that the pool has: on a GPU one that was trimmed
 *   block/trim/S                trimming it: on a GPU it is queued, on the host unmapped
 *   block/return/S              vmm_pool_trim() of it, waiting for the device
 */
#include "bench.h"

static void blocks(bench *b, size_t block_bytes, const char *size) {
    const int64_t shape[] = {0, (int64_t)block_bytes}; /* uint8: a row is a block */
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 4};
    int rounds = block_bytes > 32 * MIB ? 20 : 100;
    double *opened = malloc(sizeof *opened * (size_t)rounds * 4), *at = opened;
    vmm_pool *pool;
    vmm_tensor *tensor;

    if (!opened)
        abort();
    BENCH_OK(vmm_pool_create(b->device, block_bytes, 0, &pool));
    BENCH_OK(vmm_reserve(pool, &spec, &tensor));
    for (int round = -2; round < rounds; round++) {
        double t[5];
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
        double end = bench_now();
        if (round < 0)
            continue;
        *at++ = t[1] - t[0];
        *at++ = t[2] - t[1];
        *at++ = t[3] - t[2];
        *at++ = end - t[4];
    }
    static const char *const ids[] = {"block/open", "block/trim", "block/reopen", "block/return"};
    char baseline[64];
    snprintf(baseline, sizeof baseline, "block/open/%s", size);
    for (int id = 0; id < 4; id++) {
        for (int round = 0; round < rounds; round++)
            bench_sample(b, opened[round * 4 + id]);
        bench_report(b, id == 2 ? baseline : "", "%s/%s", ids[id], size);
    }
    BENCH_OK(vmm_close(tensor));
    BENCH_OK(vmm_pool_close(pool));
    free(opened);
}

static void tensors(bench *b) {
    const int64_t shape[] = {0, 1024};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = MIB};
    double closed[500];
    vmm_pool *pool;
    vmm_tensor *tensor;

    BENCH_OK(vmm_pool_create(b->device, 0, 0, &pool));
    for (int i = 0; i < 500; i++) {
        bench_start(b);
        BENCH_OK(vmm_reserve(pool, &spec, &tensor));
        bench_stop(b, 1);
        double start = bench_now();
        BENCH_OK(vmm_close(tensor));
        closed[i] = bench_now() - start;
    }
    bench_report(b, "", "tensor/open");
    for (int i = 0; i < 500; i++)
        bench_sample(b, closed[i]);
    bench_report(b, "", "tensor/close");
    BENCH_OK(vmm_pool_close(pool));
}

int main(int argc, char **argv) {
    static bench b;

    bench_open(&b, "bench_driver", argc, argv);
    b.not_measured = "use of the memory; several threads at once; the device at work meanwhile";
    tensors(&b);
    if (!b.is_cuda)
        blocks(&b, 64 * KIB, "64KiB");
    blocks(&b, 2 * MIB, "2MiB");
    blocks(&b, 32 * MIB, "32MiB");
    blocks(&b, 128 * MIB, "128MiB");
    bench_close(&b);
    return 0;
}
