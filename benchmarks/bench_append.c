/* bench_append: appending rows to a tensor of 8192 rows, against moving it.
 *
 *   append/S             vmm_append() of one row of S bytes at 8192 rows, within mapped rows
 *   append/S/growing     the same over 4096 appends to a fresh tensor, blocks included
 *   append-many/2xS      K and V at once
 *   memcpy/S             the row's copy alone
 *   concatenate/S        a new buffer of 8193 rows, both copied in, the old one freed; glibc
 *                        is told to keep large blocks, else page faults take most of it
 *   realloc/S            realloc() by one row, and its copy: for buffers of this size glibc
 *                        moves pages, not bytes, and the address changes
 *
 * On a GPU sources are in host memory (a bare C program has no other without CUDA's own
 * headers); benchmarks/gpu_append.py measures device sources.
 */
#include "bench.h"

#include <limits.h>
#include <malloc.h>

#define ROWS 8192
#define AHEAD 2048

static char *buffer_of(size_t bytes) {
    char *buffer = malloc(bytes);

    if (!buffer)
        abort();
    memset(buffer, 1, bytes);
    return buffer;
}

static void measure_memcpy(bench *b, const char *row, size_t row_bytes) {
    char *target = buffer_of(AHEAD * row_bytes);

    for (int round = -1; round < 4; round++)
        for (size_t i = 0; i < AHEAD; i++) {
            bench_start(b);
            memcpy(target + i * row_bytes, row, row_bytes);
            if (round >= 0)
                bench_stop(b, 1);
        }
    free(target);
}

static void measure_concatenate(bench *b, const char *row, size_t row_bytes) {
    mallopt(M_MMAP_THRESHOLD, INT_MAX);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    char *cache = buffer_of(ROWS * row_bytes);
    for (int round = -2; round < 30; round++) {
        bench_start(b);
        char *moved = malloc((ROWS + 1) * row_bytes);
        if (!moved)
            abort();
        memcpy(moved, cache, ROWS * row_bytes);
        memcpy(moved + ROWS * row_bytes, row, row_bytes);
        free(cache);
        if (round >= 0)
            bench_stop(b, 1);
        cache = moved;
    }
    free(cache);
    mallopt(M_MMAP_THRESHOLD, 128 * 1024);
    mallopt(M_TRIM_THRESHOLD, 128 * 1024);
}

static void measure_realloc(bench *b, const char *row, size_t row_bytes) {
    char *cache = buffer_of(ROWS * row_bytes);

    for (size_t i = 0; i < 1000; i++) {
        bench_start(b);
        char *moved = realloc(cache, (ROWS + i + 1) * row_bytes);
        if (!moved)
            abort();
        memcpy(moved + (ROWS + i) * row_bytes, row, row_bytes);
        bench_stop(b, 1);
        cache = moved;
    }
    free(cache);
}

static void append_rows(bench *b, vmm_pool *pool, size_t row_bytes, const char *size) {
    const int64_t shape[] = {0, (int64_t)row_bytes}, row_shape[] = {1, (int64_t)row_bytes};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = ROWS + AHEAD};
    char *row = buffer_of(row_bytes);
    vmm_array source = {.data = row, .dtype = VMM_UINT8, .ndim = 2, .shape = row_shape};
    vmm_array sources[2] = {source, source};
    char concatenate[64];
    vmm_tensor *tensors[2];
    int rounds = b->is_cuda ? 2 : 4;

    snprintf(concatenate, sizeof concatenate, "concatenate/%s", size);

    if (!b->is_cuda) {
        measure_memcpy(b, row, row_bytes);
        bench_report(b, "", "memcpy/%s", size);
        measure_concatenate(b, row, row_bytes);
        bench_report(b, "", "%s", concatenate);
        measure_realloc(b, row, row_bytes);
        bench_report(b, concatenate, "realloc/%s", size);
    }

    for (int i = 0; i < 2; i++) {
        BENCH_OK(vmm_reserve(pool, &spec, &tensors[i]));
        BENCH_OK(vmm_map(tensors[i], ROWS + AHEAD));
        BENCH_OK(vmm_grow(tensors[i], ROWS, NULL));
    }
    for (int round = -1; round < rounds; round++) {
        for (size_t i = 0; i < AHEAD; i++) {
            bench_start(b);
            vmm_append(tensors[0], &source, NULL);
            if (round >= 0)
                bench_stop(b, 1);
        }
        if (vmm_length(tensors[0]) != ROWS + AHEAD)
            abort();
        BENCH_OK(vmm_truncate(tensors[0], ROWS, VMM_STREAM_NONE));
    }
    bench_report(b, concatenate, "append/%s", size);
    for (int round = -1; round < rounds; round++) {
        for (size_t i = 0; i < AHEAD; i++) {
            bench_start(b);
            vmm_append_many(2, tensors, sources, NULL);
            if (round >= 0)
                bench_stop(b, 1);
        }
        for (int i = 0; i < 2; i++)
            BENCH_OK(vmm_truncate(tensors[i], ROWS, VMM_STREAM_NONE));
    }
    bench_report(b, concatenate, "append-many/2x%s", size);
    for (int i = 0; i < 2; i++)
        BENCH_OK(vmm_close(tensors[i]));

    BENCH_OK(vmm_reserve(pool, &spec, &tensors[0]));
    for (size_t i = 0; i < 4096; i++) {
        bench_start(b);
        BENCH_OK(vmm_append(tensors[0], &source, NULL));
        bench_stop(b, 1);
    }
    bench_report(b, concatenate, "append/%s/growing", size);
    BENCH_OK(vmm_close(tensors[0]));
    free(row);
}

int main(int argc, char **argv) {
    static bench b;
    vmm_pool *pool;

    bench_open(&b, "bench_append", argc, argv);
    b.not_measured = b.is_cuda ? "device sources: benchmarks/gpu_append.py has them"
                               : "reading the tensor back; allocators other than glibc's";
    BENCH_OK(vmm_pool_create(b.device, 0, 0, &pool));
    append_rows(&b, pool, 256, "256B");
    append_rows(&b, pool, 4 * KIB, "4KiB");
    append_rows(&b, pool, 16 * KIB, "16KiB");
    BENCH_OK(vmm_pool_close(pool));
    bench_close(&b);
    return 0;
}
