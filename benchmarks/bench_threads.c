/* bench_threads: one pool under 1 to 16 threads.
 *
 *   cycle/T    T threads, each with tensors of its own: reserve, grow over 4 blocks, close
 *   append/T   T threads, each appending 4 KiB rows to a tensor of its own, within mapped rows, on
 *              the thread's default stream
 *   base/mmap-cycle/T    T threads: as much from the kernel by mmap(), first touch, munmap()
 *   base/memcpy/T        T threads: the copies alone
 *
 * A sample is one operation of one thread. extra.operations_per_second counts all threads.
 */
#include "bench.h"

#include <pthread.h>
#include <sys/mman.h>

#define MOST 16
#define BLOCKS 4
#define ROW_BYTES (4 * KIB)

typedef enum kind { CYCLE, APPEND, MMAP, MEMCPY } kind;

typedef struct worker {
    bench *b;
    vmm_pool *pool;
    const vmm_array *source;
    pthread_barrier_t *gate;
    kind kind;
    int times;
    double *ns, began, ended;
} worker;

static void cycle(vmm_pool *pool, size_t block_bytes) {
    const int64_t shape[] = {0, ROW_BYTES};
    size_t n_rows = BLOCKS * block_bytes / ROW_BYTES;
    vmm_spec spec = {.ndim = 2,
                     .shape = shape,
                     .dtype = VMM_UINT8,
                     .capacity = n_rows,
                     .block_bytes = block_bytes};
    vmm_tensor *tensor;

    BENCH_OK(vmm_reserve(pool, &spec, &tensor));
    for (size_t i = 0; i < BLOCKS; i++)
        BENCH_OK(vmm_grow(tensor, n_rows / BLOCKS, NULL));
    BENCH_OK(vmm_close(tensor));
}

static void map_and_touch(size_t bytes) {
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED)
        abort();
    for (size_t offset = 0; offset < bytes; offset += 4096)
        *(volatile char *)(memory + offset) = 1;
    munmap(memory, bytes);
}

static void *work(void *argument) {
    worker *w = argument;
    size_t block_bytes = w->b->is_gpu ? 2 * MIB : 256 * KIB;
    size_t bytes = BLOCKS * block_bytes, n_rows = 1024;
    const int64_t shape[] = {0, ROW_BYTES};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = n_rows};
    char *row = bench_buffer(ROW_BYTES), *target = NULL;
    vmm_tensor *tensor = NULL;

    if (w->kind == APPEND) {
        BENCH_OK(vmm_reserve(w->pool, &spec, &tensor));
        BENCH_OK(vmm_map(tensor, n_rows));
    } else if (w->kind == MEMCPY)
        target = bench_buffer(n_rows * ROW_BYTES);
    pthread_barrier_wait(w->gate);
    w->began = bench_now();
    for (int i = 0; i < w->times; i++) {
        if (tensor && vmm_length(tensor) == n_rows)
            BENCH_OK(vmm_truncate(tensor, 0, VMM_STREAM_NONE));
        double begin = bench_now();
        switch (w->kind) {
        case CYCLE: cycle(w->pool, block_bytes); break;
        case APPEND: BENCH_OK(vmm_append(tensor, w->source, VMM_STREAM_PER_THREAD)); break;
        case MMAP: map_and_touch(bytes); break;
        case MEMCPY: memcpy(target + (size_t)i % n_rows * ROW_BYTES, row, ROW_BYTES); break;
        }
        w->ns[i] = bench_now() - begin;
        if (tensor && i % 64 == 63)
            bench_wait(w->b, VMM_STREAM_PER_THREAD);
    }
    w->ended = bench_now();
    if (tensor) {
        bench_wait(w->b, VMM_STREAM_PER_THREAD);
        BENCH_OK(vmm_close(tensor));
    }
    free(row);
    free(target);
    return NULL;
}

static void threads(bench *b, kind kind, int n, const char *baseline, const char *id) {
    int times = bench_times(b, kind == CYCLE || kind == MMAP ? 1600 / n : 64000 / n);
    pthread_barrier_t gate;
    pthread_t thread[MOST];
    worker workers[MOST];
    bench_source source;
    vmm_pool *pool;
    double began = INFINITY, ended = 0;

    BENCH_OK(vmm_pool_create(b->device, 0, 0, &pool));
    bench_source_open(b, pool, ROW_BYTES, &source);
    bench_wait(b, NULL);
    pthread_barrier_init(&gate, NULL, (unsigned)n);
    for (int i = 0; i < n; i++) {
        workers[i] = (worker){.b = b,
                              .pool = pool,
                              .source = &source.array,
                              .gate = &gate,
                              .kind = kind,
                              .times = times,
                              .ns = malloc(sizeof(double) * (size_t)times)};
        if (!workers[i].ns || pthread_create(&thread[i], NULL, work, &workers[i]))
            abort();
    }
    for (int i = 0; i < n; i++)
        pthread_join(thread[i], NULL);
    for (int i = 0; i < n; i++) {
        began = fmin(began, workers[i].began);
        ended = fmax(ended, workers[i].ended);
        for (int j = times / 10; j < times; j++) /* the first tenth is warm-up */
            bench_sample(b, workers[i].ns[j]);
        free(workers[i].ns);
    }
    pthread_barrier_destroy(&gate);
    bench_report(b, baseline, "%s/%d", id, n);
    bench_extra(b, "threads", n);
    bench_extra(b, "operations_per_second", n * (double)times * 1e9 / (ended - began));
    bench_source_close(&source);
    BENCH_OK(vmm_pool_close(pool));
}

int main(int argc, char **argv) {
    static bench b;

    bench_open(&b, "bench_threads", argc, argv);
    b.not_measured = "work between the calls; threads that share a tensor, which they may not";
    for (int n = 1; n <= MOST; n *= 2) {
        char cycles[64] = "", copies[64] = "";
        if (!b.is_gpu) {
            snprintf(cycles, sizeof cycles, "base/mmap-cycle/%d", n);
            threads(&b, MMAP, n, "", "base/mmap-cycle");
            snprintf(copies, sizeof copies, "base/memcpy/%d", n);
            threads(&b, MEMCPY, n, "", "base/memcpy");
        }
        threads(&b, CYCLE, n, cycles, "cycle");
        threads(&b, APPEND, n, copies, "append");
    }
    bench_close(&b);
    return 0;
}
