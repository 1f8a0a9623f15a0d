/* bench_append_many: one row to each of several tensors at once, by row size.
 *
 *   append-many/NxS             vmm_append_many() of N tensors with rows of S bytes, all mapped
 *   base/memcpy/NxS             on the host: the copies alone
 *   base/cuMemcpyDtoDAsync/NxS  on an NVIDIA GPU: N copies by the driver
 *   base/cuLaunchKernel         a bare launch with the append kernel's signature
 *
 * Host time of the calling thread; on a GPU the sources are in device memory.
 */
#include "cuda.h"

#define MOST 64

static void base(bench *b, bench_cuda *cuda, size_t n, size_t row_bytes, int times,
                 const char *id) {
    size_t n_rows = 16;
    char *row = bench_buffer(row_bytes), *host = NULL;
    CUdeviceptr source = 0, target = 0;

    if (cuda) {
        source = cuda_alloc(cuda, row_bytes);
        target = cuda_alloc(cuda, n * row_bytes);
        CUDA_OK(cuda->cuMemsetD8Async(source, 1, row_bytes, NULL));
    } else
        host = bench_buffer(n * n_rows * row_bytes);
    for (int i = -8; i < times; i++) {
        bench_start(b);
        for (size_t j = 0; j < n; j++)
            if (cuda)
                CUDA_OK(cuda->cuMemcpyDtoDAsync(target + j * row_bytes, source, row_bytes, NULL));
            else
                memcpy(host + (j * n_rows + (size_t)(i + 8) % n_rows) * row_bytes, row, row_bytes);
        if (i >= 0)
            bench_stop(b, 1);
        if (cuda && i % (BENCH_IN_FLIGHT / MOST) == 0)
            CUDA_OK(cuda->cuStreamSynchronize(NULL));
    }
    if (cuda) {
        CUDA_OK(cuda->cuStreamSynchronize(NULL));
        CUDA_OK(cuda->cuMemFree(source));
        CUDA_OK(cuda->cuMemFree(target));
    }
    free(row);
    free(host);
    bench_report(b, "", "%s", id);
}

static void appends(bench *b, bench_cuda *cuda, vmm_pool *pool, size_t n, size_t row_bytes,
                    const char *size) {
    const int64_t shape[] = {0, (int64_t)row_bytes};
    size_t n_rows = 256 * MIB / (n * row_bytes);
    char baseline[64] = "";
    vmm_tensor *tensors[MOST];
    vmm_array sources[MOST];
    vmm_tensor_stats before, after;
    bench_source source;

    n_rows = n_rows > 2048 ? 2048 : n_rows;
    int times = (int)(n_rows * n > 8192 ? n_rows : 8192 / n);
    times = bench_times(b, times * row_bytes * n > GIB ? (int)(GIB / (row_bytes * n)) : times);
    if (cuda || !b->is_gpu) {
        snprintf(baseline, sizeof baseline, "base/%s/%zux%s", cuda ? "cuMemcpyDtoDAsync" : "memcpy",
                 n, size);
        base(b, cuda, n, row_bytes, times, baseline);
    }
    bench_source_open(b, pool, row_bytes, &source);
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = n_rows};
    for (size_t i = 0; i < n; i++) {
        BENCH_OK(vmm_reserve(pool, &spec, &tensors[i]));
        BENCH_OK(vmm_map(tensors[i], n_rows));
        sources[i] = source.array;
    }
    BENCH_OK(vmm_stats(tensors[0], &before));
    for (int i = -8; i < times; i++) {
        if (vmm_length(tensors[0]) == n_rows) {
            bench_wait(b, NULL);
            for (size_t j = 0; j < n; j++)
                BENCH_OK(vmm_truncate(tensors[j], 0, VMM_STREAM_NONE));
        }
        bench_start(b);
        BENCH_OK(vmm_append_many(n, tensors, sources, NULL));
        if (i >= 0)
            bench_stop(b, 1);
        if (i % BENCH_IN_FLIGHT == 0)
            bench_wait(b, NULL);
    }
    bench_wait(b, NULL);
    BENCH_OK(vmm_stats(tensors[0], &after));
    uint64_t launches = 0;
    for (size_t i = 0; i < n; i++) {
        BENCH_OK(vmm_stats(tensors[i], &after));
        launches += after.driver_calls[VMM_CALL_launch];
    }
    bench_report(b, baseline, "append-many/%zux%s", n, size);
    bench_extra(b, "row_bytes", (double)row_bytes);
    bench_extra(b, "tensors", (double)n);
    bench_extra(b, "launches_per_call", (double)launches / (times + 8));
    for (size_t i = 0; i < n; i++)
        BENCH_OK(vmm_close(tensors[i]));
    bench_source_close(&source);
    BENCH_OK(vmm_pool_trim(pool, 1));
}

int main(int argc, char **argv) {
    static const struct {
        size_t bytes;
        const char *text;
    } sizes[] = {{2 * KIB, "2KiB"}, {16 * KIB, "16KiB"}, {128 * KIB, "128KiB"}, {MIB, "1MiB"}};
    static bench b;
    bench_cuda cuda;
    vmm_pool *pool;

    bench_open(&b, "bench_append_many", argc, argv);
    b.not_measured = b.is_gpu ? "device time: benchmarks/gpu_append.py has it"
                              : "tensors of different dtypes or layouts at once";
    bench_cuda *driver = cuda_open(&b, &cuda) ? &cuda : NULL;
    if (driver) {
        cuda_time_bare_launches(&b, driver, bench_times(&b, 8192));
        bench_report(&b, "", "base/cuLaunchKernel");
    }
    BENCH_OK(vmm_pool_create(b.device, 0, 0, &pool));
    for (size_t n = 1; n <= MOST; n = n == 1 ? 2 : n == 2 ? MOST : MOST + 1)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            appends(&b, driver, pool, n, sizes[i].bytes, sizes[i].text);
    BENCH_OK(vmm_pool_close(pool));
    bench_close(&b);
    return 0;
}
