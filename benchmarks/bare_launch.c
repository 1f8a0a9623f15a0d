/* bare_launch.c - bare kernel launches timed inside another process, for the Python benchmarks.
 *
 * A launch costs what its process has made of the driver: contexts, streams, libraries that are
 * loaded. So what a framework's process pays for an append is compared with bare launches in that
 * process and not in one of C. Built as build/benchmarks/libbare_launch.so; bench.py loads it.
 */
#include "cuda.h"

/* Nanoseconds of each of `times` launches on `stream` of CUDA device `index`, in `samples`. The
 * stream is waited for before the first, and after the last. Ends the process where CUDA fails; pyvmm or a framework has
 * initialised it. */
__attribute__((visibility("default"))) void bare_launches(int index, CUstream stream, int times,
                                                          double *samples) {
    static bench_cuda cuda;
    static bool opened;
    static bench b = {.is_cuda = true}; /* too large for a stack */

    if (!opened || cuda.index != index) {
        b.info.index = index;
        opened = cuda_open(&b, &cuda);
    }
    cuda_bare_launch(&cuda, stream);
    CUDA_OK(cuda.cuStreamSynchronize(stream));
    for (int i = 0; i < times; i++) {
        double begin = bench_now();
        cuda_bare_launch(&cuda, stream);
        samples[i] = bench_now() - begin;
    }
    CUDA_OK(cuda.cuStreamSynchronize(stream));
}
