/* bench_boundaries: 100 000 appends through more than 5 000 block boundaries, with look-ahead off
 * and on.
 *
 *   off/all, on/all             every append
 *   off/within, on/within       those that stay within mapped rows
 *   off/boundary, on/boundary   those whose first row lies behind what is mapped
 *   paced/...                   look-ahead on, and 10 us of other work before each append
 *   base/cuLaunchKernel         on an NVIDIA GPU: as many bare launches with the same signature
 *   base/memcpy                 on the host: as many copies, into memory touched before
 *   base/.../paced              the same with 10 us of other work before each
 *
 * extra.boundaries counts them, extra.boundaries_mapped_by_caller those of them in which the
 * calling thread created, mapped or opened a block, and extra.mapping_calls_by_caller its calls:
 * with look-ahead on and warm both are to be 0. Off and on, appends follow one another without a
 * pause, which no decoding does: where a block is filled in less time than it takes to map one,
 * look-ahead cannot keep up. Rows of 104 KiB in blocks of 2 MiB on a GPU, of 3328 bytes in 64 KiB on the host:
 * a boundary at every 19.7th.
 */
#include "cuda.h"

#define APPENDS 100000
#define PAUSE_NS 10e3

static double samples[APPENDS];
static bool at_boundary[APPENDS];

static uint64_t mapping_calls(const vmm_tensor *tensor) {
    vmm_tensor_stats stats;

    BENCH_OK(vmm_stats(tensor, &stats));
    return stats.driver_calls[VMM_CALL_create] + stats.driver_calls[VMM_CALL_map] +
           stats.driver_calls[VMM_CALL_set_access];
}

/* Other work of this thread. */
static void work(double ns) {
    double end = bench_now() + ns;

    while (ns > 0 && bench_now() < end)
        ;
}

static void baseline(bench *b, bench_cuda *cuda, size_t row_bytes, int n, double pause_ns,
                     const char *id) {
    char *row = bench_buffer(row_bytes),
         *target = cuda ? NULL : bench_buffer((size_t)n * row_bytes);

    for (int i = cuda ? -BENCH_IN_FLIGHT : 0; i < n; i++) {
        work(pause_ns);
        bench_start(b);
        if (cuda)
            cuda_bare_launch(cuda, NULL);
        else
            memcpy(target + (size_t)i * row_bytes, row, row_bytes);
        if (i >= 0)
            bench_stop(b, 1);
        if (i % BENCH_IN_FLIGHT == 0)
            bench_wait(b, NULL);
    }
    bench_wait(b, NULL);
    free(row);
    free(target);
    bench_report(b, "", "%s", id);
}

static void appends(bench *b, size_t row_bytes, size_t block_bytes, int n, const char *name,
                    size_t lookahead_bytes, double pause_ns, const char *base) {
    const int64_t shape[] = {0, (int64_t)row_bytes};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8};
    static const char *const parts[] = {"all", "within", "boundary"};
    uint64_t n_boundaries = 0, mapped_by_caller = 0;
    int n_warm = n / 20; /* at the pace of other work: look-ahead learns how fast they come */
    bench_source source;
    vmm_pool *pool;
    vmm_tensor *tensor;

    spec.capacity = (size_t)(n + n_warm);
    BENCH_OK(vmm_pool_create(b->device, block_bytes, 0, &pool));
    BENCH_OK(vmm_pool_set_lookahead(pool, lookahead_bytes));
    bench_source_open(b, pool, row_bytes, &source);
    BENCH_OK(vmm_reserve(pool, &spec, &tensor));
    for (int i = 0; i < n_warm; i++) {
        work(PAUSE_NS);
        BENCH_OK(vmm_append(tensor, &source.array, NULL));
        if (i % BENCH_IN_FLIGHT == 0)
            bench_wait(b, NULL);
    }
    bench_wait(b, NULL);
    const uint64_t calls_before = mapping_calls(tensor);
    uint64_t calls = calls_before;
    for (int i = 0; i < n; i++) {
        at_boundary[i] = vmm_mapped(tensor) == vmm_length(tensor);
        work(pause_ns);
        double begin = bench_now();
        BENCH_OK(vmm_append(tensor, &source.array, NULL));
        samples[i] = bench_now() - begin;
        if (at_boundary[i]) {
            uint64_t now = mapping_calls(tensor);
            n_boundaries++;
            mapped_by_caller += now != calls;
            calls = now;
        }
        if (i % BENCH_IN_FLIGHT == 0)
            bench_wait(b, NULL);
    }
    bench_wait(b, NULL);
    for (int part = 0; part < 3; part++) {
        for (int i = 0; i < n; i++)
            if (part == 0 || at_boundary[i] == (part == 2))
                bench_sample(b, samples[i]);
        bench_report(b, base, "%s/%s", name, parts[part]);
        bench_extra(b, "boundaries", (double)n_boundaries);
        bench_extra(b, "boundaries_mapped_by_caller", (double)mapped_by_caller);
        bench_extra(b, "mapping_calls_by_caller", (double)(calls - calls_before));
        bench_extra(b, "block_bytes", (double)block_bytes);
        bench_extra(b, "row_bytes", (double)row_bytes);
    }
    BENCH_OK(vmm_close(tensor));
    bench_source_close(&source);
    BENCH_OK(vmm_pool_close(pool));
}

int main(int argc, char **argv) {
    static bench b;
    bench_cuda cuda;

    bench_open(&b, "bench_boundaries", argc, argv);
    b.not_measured =
        "decoding between the appends: milliseconds, in which look-ahead has more time";
    bench_cuda *driver = cuda_open(&b, &cuda) ? &cuda : NULL;
    size_t row_bytes = b.is_gpu ? 104 * KIB : 3328, block_bytes = b.is_gpu ? 2 * MIB : 64 * KIB;
    int n = bench_times(&b, APPENDS);
    const char *base = driver ? "base/cuLaunchKernel" : b.is_gpu ? "" : "base/memcpy";
    char paced[64] = "";

    if (*base) {
        snprintf(paced, sizeof paced, "%s/paced", base);
        baseline(&b, driver, row_bytes, n, 0, base);
        baseline(&b, driver, row_bytes, n, PAUSE_NS, paced);
    }
    appends(&b, row_bytes, block_bytes, n, "off", 0, 0, base);
    appends(&b, row_bytes, block_bytes, n, "on", 256 * MIB, 0, base);
    appends(&b, row_bytes, block_bytes, n, "paced", 256 * MIB, PAUSE_NS, paced);
    bench_close(&b);
    return 0;
}
