/* bench_read: reading memory that was mapped block by block, against memory allocated at once.
 *
 *   read/S          all rows of a tensor with blocks of S: on the host summed, 8 bytes at a time; on
 *                   an NVIDIA GPU copied by cuMemcpyDtoDAsync, which reads and writes
 *   base/malloc     the same over malloc()'s memory, with huge pages asked for
 *   base/cuMemAlloc the same over cuMemAlloc()'s
 *
 * 1 GiB on a GPU, 256 MiB on the host. Samples of the tensor and of the baseline are taken in turns.
 */
#include "cuda.h"

#include <sys/mman.h>

static volatile uint64_t sink;

static void sum(const void *memory, size_t bytes) {
    const uint64_t *words = memory;
    uint64_t total[4] = {0};

    for (size_t i = 0; i < bytes / sizeof *words; i += 4)
        for (size_t j = 0; j < 4; j++)
            total[j] += words[i + j];
    sink = total[0] + total[1] + total[2] + total[3];
}

static double read_once(bench_cuda *cuda, const void *host, CUdeviceptr from, CUdeviceptr to,
                        size_t bytes) {
    double begin = bench_now();

    if (cuda) {
        CUDA_OK(cuda->cuMemcpyDtoDAsync(to, from, bytes, NULL));
        CUDA_OK(cuda->cuStreamSynchronize(NULL));
    } else
        sum(host, bytes);
    return bench_now() - begin;
}

static void read_blocks(bench *b, bench_cuda *cuda, const char *base, size_t bytes,
                        size_t block_bytes, const char *size) {
    const int64_t shape[] = {0, 64 * KIB};
    int times = bench_times(b, cuda ? 100 : 20);
    double *theirs = malloc(sizeof *theirs * (size_t)times);
    CUdeviceptr plain = 0, target = 0;
    char *host = NULL;
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = bytes / (64 * KIB)};
    vmm_pool *pool;
    vmm_tensor *tensor;

    if (!theirs)
        abort();
    BENCH_OK(vmm_pool_create(b->device, block_bytes, 0, &pool));
    BENCH_OK(vmm_reserve(pool, &spec, &tensor));
    while (vmm_length(tensor) < spec.capacity) /* block after block */
        BENCH_OK(vmm_grow(tensor, 1, NULL));
    if (cuda) {
        plain = cuda_alloc(cuda, bytes);
        target = cuda_alloc(cuda, bytes);
        CUDA_OK(cuda->cuMemsetD8Async(plain, 1, bytes, NULL));
        CUDA_OK(cuda->cuMemsetD8Async((CUdeviceptr)vmm_base(tensor), 1, bytes, NULL));
        CUDA_OK(cuda->cuStreamSynchronize(NULL));
    } else {
        if (posix_memalign((void **)&host, 2 * MIB, bytes))
            abort();
        madvise(host, bytes, MADV_HUGEPAGE);
        memset(host, 1, bytes);
        memset(vmm_base(tensor), 1, bytes);
    }
    for (int i = -2; i < times; i++) {
        double other = read_once(cuda, host, plain, target, bytes);
        double ours =
            read_once(cuda, vmm_base(tensor), (CUdeviceptr)vmm_base(tensor), target, bytes);
        if (i < 0)
            continue;
        theirs[i] = other;
        bench_sample(b, ours);
    }
    char id[64];
    double *ours = malloc(sizeof *ours * (size_t)times);
    if (!ours)
        abort();
    memcpy(ours, b->samples, sizeof *ours * (size_t)times);
    b->n_samples = 0;
    snprintf(id, sizeof id, "%s/%s", base, size);
    for (int i = 0; i < times; i++)
        bench_sample(b, theirs[i]);
    bench_report(b, "", "%s", id);
    bench_extra_rate(b, bytes);
    for (int i = 0; i < times; i++)
        bench_sample(b, ours[i]);
    bench_report(b, id, "read/%s", size);
    bench_extra_rate(b, bytes);
    bench_extra(b, "block_bytes", (double)block_bytes);
    free(ours);
    free(theirs);
    free(host);
    if (cuda) {
        CUDA_OK(cuda->cuMemFree(plain));
        CUDA_OK(cuda->cuMemFree(target));
    }
    BENCH_OK(vmm_close(tensor));
    BENCH_OK(vmm_pool_close(pool));
}

int main(int argc, char **argv) {
    static bench b;
    bench_cuda cuda;

    bench_open(&b, "bench_read", argc, argv);
    bench_cuda *driver = cuda_open(&b, &cuda) ? &cuda : NULL;
    if (b.is_gpu && !driver)
        BENCH_SKIP("bench_read needs a way to read: the host, or an NVIDIA GPU");
    b.not_measured = "attention: the Python twin has it where torch is installed";
    size_t bytes = b.quick ? 64 * MIB : b.is_gpu ? GIB : 256 * MIB;
    const char *base = driver ? "base/cuMemAlloc" : "base/malloc";
    read_blocks(&b, driver, base, bytes, 2 * MIB, "2MiB");
    read_blocks(&b, driver, base, bytes, 32 * MIB, "32MiB");
    bench_close(&b);
    return 0;
}
