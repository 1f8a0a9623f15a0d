/* bench_open: opening and closing a tensor of 1 GiB (64 MiB on the host).
 *
 *   open/new, map/new       vmm_reserve(), and vmm_map() of all of it, where the pool has nothing
 *   close/new               vmm_close() of that
 *   open/again, map/again, close/again  the same after the close of one of the same geometry,
 *                           with the device idle: recycled where the pool recycles
 *   open/busy               vmm_reserve() directly behind the close of one with work under way
 *   base/cuMemAlloc         on an NVIDIA GPU: as much by cuMemAlloc and cuMemFree
 *   base/malloc             on the host: as much by malloc(), touched and freed
 *
 * extra.calls_NAME are the pool's driver calls in the timed call, the most of all samples.
 */
#include "cuda.h"

#define ROW_BYTES (64 * KIB)

static const vmm_call counted[] = {
    VMM_CALL_reserve, VMM_CALL_create, VMM_CALL_map,          VMM_CALL_set_access,  VMM_CALL_unmap,
    VMM_CALL_release, VMM_CALL_free,   VMM_CALL_event_record, VMM_CALL_event_query, VMM_CALL_fence};
static const char *const names[] = {
    "calls_reserve", "calls_create", "calls_map",          "calls_set_access",  "calls_unmap",
    "calls_release", "calls_free",   "calls_event_record", "calls_event_query", "calls_fence"};
#define N_COUNTED (sizeof counted / sizeof *counted)

enum { OPEN, MAP, CLOSE, N_STEPS };

typedef struct timing {
    double ns[N_STEPS][200];
    uint64_t most[N_STEPS][N_COUNTED];
    int n;
} timing;

/* Call `step` and keep its time and its driver calls as sample `i`; a negative one is warm-up. */
#define TIME(timing_, step, i, call)                                                               \
    do {                                                                                           \
        vmm_pool_stats before_, after_;                                                            \
        BENCH_OK(vmm_pool_statistics(pool, &before_));                                             \
        double begin_ = bench_now();                                                               \
        BENCH_OK(call);                                                                            \
        double taken_ = bench_now() - begin_;                                                      \
        BENCH_OK(vmm_pool_statistics(pool, &after_));                                              \
        if ((i) >= 0)                                                                              \
            keep(timing_, step, i, taken_, &before_, &after_);                                     \
    } while (0)

static void keep(timing *timing, int step, int i, double ns, const vmm_pool_stats *before,
                 const vmm_pool_stats *after) {
    timing->ns[step][i] = ns;
    timing->n = i + 1;
    for (size_t c = 0; c < N_COUNTED; c++) {
        uint64_t calls = after->driver_calls[counted[c]] - before->driver_calls[counted[c]];
        if (calls > timing->most[step][c])
            timing->most[step][c] = calls;
    }
}

static void report(bench *b, const timing *timing, int step, const char *baseline, const char *id,
                   size_t bytes) {
    for (int i = 0; i < timing->n; i++)
        bench_sample(b, timing->ns[step][i]);
    bench_report(b, baseline, "%s", id);
    bench_extra(b, "bytes", (double)bytes);
    for (size_t c = 0; c < N_COUNTED; c++)
        bench_extra(b, names[c], (double)timing->most[step][c]);
}

int main(int argc, char **argv) {
    static timing fresh, again, busy;
    static bench b;
    bench_cuda cuda;
    bench_source source;
    vmm_pool *pool, *sources;
    vmm_tensor *tensor;

    bench_open(&b, "bench_open", argc, argv);
    b.not_measured = "first touch of device memory; other geometries of tensor in the same pool";
    bench_cuda *driver = cuda_open(&b, &cuda) ? &cuda : NULL;
    const size_t bytes = b.is_gpu ? GIB : 64 * MIB;
    const int64_t shape[] = {0, ROW_BYTES};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = bytes / ROW_BYTES};
    int times = bench_times(&b, b.is_gpu ? 30 : 20), many = bench_times(&b, 100);
    const char *base = driver ? "base/cuMemAlloc" : b.is_gpu ? "" : "base/malloc";

    for (int i = -2; i < times && (driver || !b.is_gpu); i++) {
        bench_start(&b);
        if (driver)
            CUDA_OK(cuda.cuMemFree(cuda_alloc(driver, bytes)));
        else
            free(bench_buffer(bytes));
        if (i >= 0)
            bench_stop(&b, 1);
    }
    if (*base)
        bench_report(&b, "", "%s", base);

    BENCH_OK(vmm_pool_create(b.device, 0, 0, &pool));
    BENCH_OK(vmm_pool_create(b.device, 0, 0, &sources));
    bench_source_open(&b, sources, ROW_BYTES, &source);
    for (int i = -2; i < times; i++) {
        BENCH_OK(vmm_pool_trim(pool, 1));
        TIME(&fresh, OPEN, i, vmm_reserve(pool, &spec, &tensor));
        TIME(&fresh, MAP, i, vmm_map(tensor, spec.capacity));
        TIME(&fresh, CLOSE, i, vmm_close(tensor));
    }
    for (int i = -2; i < many; i++) {
        TIME(&again, OPEN, i, vmm_reserve(pool, &spec, &tensor));
        TIME(&again, MAP, i, vmm_map(tensor, spec.capacity));
        TIME(&again, CLOSE, i, vmm_close(tensor));
    }
    for (int i = -2; i < many; i++) {
        TIME(&busy, OPEN, i, vmm_reserve(pool, &spec, &tensor));
        BENCH_OK(vmm_append(tensor, &source.array, NULL));
        BENCH_OK(vmm_close(tensor));
    }
    bench_wait(&b, NULL);
    report(&b, &fresh, OPEN, base, "open/new", bytes);
    report(&b, &fresh, MAP, base, "map/new", bytes);
    report(&b, &fresh, CLOSE, base, "close/new", bytes);
    report(&b, &again, OPEN, base, "open/again", bytes);
    report(&b, &again, MAP, base, "map/again", bytes);
    report(&b, &again, CLOSE, base, "close/again", bytes);
    report(&b, &busy, OPEN, base, "open/busy", bytes);
    bench_source_close(&source);
    BENCH_OK(vmm_pool_close(sources));
    BENCH_OK(vmm_pool_close(pool));
    bench_close(&b);
    return 0;
}
