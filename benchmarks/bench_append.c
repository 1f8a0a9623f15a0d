/* bench_append: appending one row to a tensor of N rows, against moving it.
 *
 *   append/S             vmm_append() of one row of S bytes, within mapped rows
 *   append/S/growing     the same from a fresh tensor on, blocks included
 *   base/memcpy/S        the row's copy alone
 *   base/concatenate/S   a new buffer of N + 1 rows, both copied in, the old one freed. On the host
 *                        glibc is told to keep large blocks, else page faults take most of it. On
 *                        an NVIDIA GPU by cuMemAlloc, and waited for, since freeing waits
 *   base/concatenate-async/S  the same by cuMemAllocAsync, not waited for
 *   base/realloc/S       realloc() by one row, and its copy: for buffers of this size glibc moves
 *                        pages, not bytes, and the address changes
 *   base/cuLaunchKernel  a bare launch with the append kernel's signature
 *   base/cuMemcpyDtoDAsync/S  the row's copy by the driver
 *
 * N is 8192, and less where that would be more than 128 MiB. Host time of the calling thread: on a
 * GPU the source is in device memory, and device time is gpu_append.py's.
 */
#include "cuda.h"

#include <limits.h>
#include <malloc.h>

static int rows_of(size_t row_bytes) {
    return 8192 * row_bytes <= 128 * MIB ? 8192 : (int)(128 * MIB / row_bytes);
}

static void host_baselines(bench *b, size_t row_bytes, const char *size, const char *row) {
    size_t n_rows = (size_t)rows_of(row_bytes), ahead = n_rows / 4;
    char *target = bench_buffer(ahead * row_bytes);

    for (int round = -1; round < bench_times(b, 4); round++)
        for (size_t i = 0; i < ahead; i++) {
            bench_start(b);
            memcpy(target + i * row_bytes, row, row_bytes);
            if (round >= 0)
                bench_stop(b, 1);
        }
    free(target);
    bench_report(b, "", "base/memcpy/%s", size);

    mallopt(M_MMAP_THRESHOLD, INT_MAX);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    char *cache = bench_buffer(n_rows * row_bytes);
    for (int round = -2; round < bench_times(b, 30); round++) {
        bench_start(b);
        char *moved = malloc((n_rows + 1) * row_bytes);
        if (!moved)
            abort();
        memcpy(moved, cache, n_rows * row_bytes);
        memcpy(moved + n_rows * row_bytes, row, row_bytes);
        free(cache);
        if (round >= 0)
            bench_stop(b, 1);
        cache = moved;
    }
    free(cache);
    mallopt(M_MMAP_THRESHOLD, 128 * 1024);
    mallopt(M_TRIM_THRESHOLD, 128 * 1024);
    bench_report(b, "", "base/concatenate/%s", size);

    cache = bench_buffer(n_rows * row_bytes);
    for (int i = 0; i < bench_times(b, 1000); i++) {
        size_t at = (n_rows + (size_t)i) * row_bytes;
        bench_start(b);
        char *moved = realloc(cache, at + row_bytes);
        if (!moved)
            abort();
        memcpy(moved + at, row, row_bytes);
        bench_stop(b, 1);
        cache = moved;
    }
    free(cache);
    char baseline[64];
    snprintf(baseline, sizeof baseline, "base/concatenate/%s", size);
    bench_report(b, baseline, "base/realloc/%s", size);
}

/* A concatenate with memory by cuMemAlloc, or by cuMemAllocAsync. */
static void concatenate(bench *b, bench_cuda *cuda, size_t row_bytes, CUdeviceptr row, bool async) {
    size_t bytes = (size_t)rows_of(row_bytes) * row_bytes;
    CUdeviceptr cache = cuda_alloc(cuda, bytes), moved;

    for (int i = -2; i < bench_times(b, 50); i++) {
        bench_start(b);
        if (async)
            CUDA_OK(cuda->cuMemAllocAsync(&moved, bytes + row_bytes, NULL));
        else
            moved = cuda_alloc(cuda, bytes + row_bytes);
        CUDA_OK(cuda->cuMemcpyDtoDAsync(moved, cache, bytes, NULL));
        CUDA_OK(cuda->cuMemcpyDtoDAsync(moved + bytes, row, row_bytes, NULL));
        if (async)
            CUDA_OK(cuda->cuMemFreeAsync(moved, NULL));
        else {
            CUDA_OK(cuda->cuStreamSynchronize(NULL));
            CUDA_OK(cuda->cuMemFree(moved));
        }
        if (i >= 0)
            bench_stop(b, 1);
        CUDA_OK(cuda->cuStreamSynchronize(NULL));
    }
    CUDA_OK(cuda->cuMemFree(cache));
}

static void cuda_baselines(bench *b, bench_cuda *cuda, size_t row_bytes, const char *size) {
    CUdeviceptr row = cuda_alloc(cuda, row_bytes), target = cuda_alloc(cuda, row_bytes);

    CUDA_OK(cuda->cuMemsetD8Async(row, 1, row_bytes, NULL));
    for (int i = -BENCH_IN_FLIGHT; i < bench_times(b, 4096); i++) {
        bench_start(b);
        CUDA_OK(cuda->cuMemcpyDtoDAsync(target, row, row_bytes, NULL));
        if (i >= 0)
            bench_stop(b, 1);
        if (i % BENCH_IN_FLIGHT == 0)
            CUDA_OK(cuda->cuStreamSynchronize(NULL));
    }
    CUDA_OK(cuda->cuStreamSynchronize(NULL));
    bench_report(b, "", "base/cuMemcpyDtoDAsync/%s", size);
    concatenate(b, cuda, row_bytes, row, false);
    bench_report(b, "", "base/concatenate/%s", size);
    if (cuda->cuMemAllocAsync && cuda->cuMemFreeAsync) {
        concatenate(b, cuda, row_bytes, row, true);
        bench_report(b, "", "base/concatenate-async/%s", size);
    }
    CUDA_OK(cuda->cuMemFree(row));
    CUDA_OK(cuda->cuMemFree(target));
}

static void appends(bench *b, bench_cuda *cuda, vmm_pool *pool, size_t row_bytes,
                    const char *size) {
    const int64_t shape[] = {0, (int64_t)row_bytes};
    size_t n_rows = (size_t)rows_of(row_bytes), ahead = n_rows / 4;
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = n_rows + ahead};
    bench_source source;
    char baseline[64] = "";
    vmm_tensor *tensor;

    bench_source_open(b, pool, row_bytes, &source);
    if (cuda)
        cuda_baselines(b, cuda, row_bytes, size);
    else if (!b->is_gpu)
        host_baselines(b, row_bytes, size, source.host);
    if (cuda || !b->is_gpu)
        snprintf(baseline, sizeof baseline, "base/concatenate/%s", size);

    BENCH_OK(vmm_reserve(pool, &spec, &tensor));
    BENCH_OK(vmm_map(tensor, n_rows + ahead));
    BENCH_OK(vmm_grow(tensor, n_rows, NULL));
    for (int round = -1; round < bench_times(b, 8192 / (int)ahead); round++) {
        for (size_t i = 0; i < ahead; i++) {
            bench_start(b);
            vmm_append(tensor, &source.array, NULL);
            if (round >= 0)
                bench_stop(b, 1);
            if (i % BENCH_IN_FLIGHT == 0)
                bench_wait(b, NULL);
        }
        if (vmm_length(tensor) != n_rows + ahead)
            abort();
        bench_wait(b, NULL);
        BENCH_OK(vmm_truncate(tensor, n_rows, VMM_STREAM_NONE));
    }
    bench_report(b, baseline, "append/%s", size);
    bench_extra(b, "row_bytes", (double)row_bytes);
    bench_extra(b, "n_rows", (double)n_rows);
    BENCH_OK(vmm_close(tensor));
    BENCH_OK(vmm_pool_trim(pool, 1));

    BENCH_OK(vmm_reserve(pool, &spec, &tensor));
    for (size_t i = 0; i < n_rows; i++) {
        bench_start(b);
        BENCH_OK(vmm_append(tensor, &source.array, NULL));
        bench_stop(b, 1);
        if (i % BENCH_IN_FLIGHT == 0)
            bench_wait(b, NULL);
    }
    bench_wait(b, NULL);
    bench_report(b, baseline, "append/%s/growing", size);
    bench_extra(b, "row_bytes", (double)row_bytes);
    BENCH_OK(vmm_close(tensor));
    bench_source_close(&source);
    BENCH_OK(vmm_pool_trim(pool, 1));
}

int main(int argc, char **argv) {
    static bench b;
    bench_cuda cuda;
    vmm_pool *pool;

    bench_open(&b, "bench_append", argc, argv);
    b.not_measured = b.is_gpu ? "device time: benchmarks/gpu_append.py has it"
                              : "reading the tensor back; allocators other than glibc's";
    bench_cuda *driver = cuda_open(&b, &cuda) ? &cuda : NULL;
    if (driver) {
        cuda_time_bare_launches(&b, driver, bench_times(&b, 8192));
        bench_report(&b, "", "base/cuLaunchKernel");
    }
    BENCH_OK(vmm_pool_create(b.device, 0, 0, &pool));
    appends(&b, driver, pool, 2 * KIB, "2KiB");
    appends(&b, driver, pool, 16 * KIB, "16KiB");
    appends(&b, driver, pool, 128 * KIB, "128KiB");
    appends(&b, driver, pool, MIB, "1MiB");
    BENCH_OK(vmm_pool_close(pool));
    bench_close(&b);
    return 0;
}
