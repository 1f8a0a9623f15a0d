/* bare_launch.c - bare kernel launches timed inside another process, for the Python benchmarks.
 *
 * A launch costs what its process has made of the driver: contexts, streams, libraries that are
 * loaded. So what a framework's process pays for an append is compared with bare launches in that
 * process and not in one of C. Built as build/benchmarks/libbare_launch.so; bench.py loads it.
 */
#include "cuda.h"

/* Nanoseconds of a launch on `stream` of CUDA device `index`, the mean of `times`. The stream is
 * waited for before the first, and after the last. Ends the process where CUDA fails; pyvmm or a
 * framework has initialised it. */
__attribute__((visibility("default"))) double bare_launches(int index, CUstream stream, int times) {
    static bench_cuda cuda;
    static bool opened;
    static bench b = {.is_cuda = true}; /* too large for a stack */

    if (!opened || cuda.index != index) {
        b.info.index = index;
        opened = cuda_open(&b, &cuda);
    }
    cuda_bare_launch(&cuda, stream);
    CUDA_OK(cuda.cuStreamSynchronize(stream));
    double begin = bench_now();
    for (int i = 0; i < times; i++)
        cuda_bare_launch(&cuda, stream);
    double taken = bench_now() - begin;
    CUDA_OK(cuda.cuStreamSynchronize(stream));
    return taken / times;
}
