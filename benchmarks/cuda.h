/* cuda.h - the CUDA driver without the library, for the baselines of the C benchmarks.
 *
 * The driver is loaded as libvmm loads it, so it may be the simulator of the tests. Calls that a
 * driver lacks are NULL. Nothing here is there on the host or on an AMD GPU: cuda_open() is false.
 */
#ifndef BENCH_CUDA_H
#define BENCH_CUDA_H

#include "bench.h"

#include <dlfcn.h>

#include "append.h"
#include "cuda_abi.h"

/* X(name, the name in the library, parameters): what is needed beyond cuda_abi.h, and some of it. */
#define BENCH_CUDA_CALLS(X)                                                                        \
    X(cuDeviceGet, cuDeviceGet, (CUdevice * device, int index))                                    \
    X(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))  \
    X(cuCtxPushCurrent, cuCtxPushCurrent_v2, (CUcontext context))                                  \
    X(cuCtxSynchronize, cuCtxSynchronize, (void))                                                  \
    X(cuMemAlloc, cuMemAlloc_v2, (CUdeviceptr * pointer, size_t bytes))                            \
    X(cuMemFree, cuMemFree_v2, (CUdeviceptr pointer))                                              \
    X(cuMemAllocAsync, cuMemAllocAsync, (CUdeviceptr * pointer, size_t bytes, CUstream stream))    \
    X(cuMemFreeAsync, cuMemFreeAsync, (CUdeviceptr pointer, CUstream stream))                      \
    X(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2,                                                     \
      (CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream))                           \
    X(cuMemsetD8Async, cuMemsetD8Async,                                                            \
      (CUdeviceptr dst, unsigned char value, size_t bytes, CUstream stream))                       \
    X(cuMemAddressReserve, cuMemAddressReserve,                                                    \
      (CUdeviceptr * base, size_t bytes, size_t alignment, CUdeviceptr wanted,                     \
       unsigned long long flags))                                                                  \
    X(cuMemAddressFree, cuMemAddressFree, (CUdeviceptr base, size_t bytes))                        \
    X(cuMemCreate, cuMemCreate,                                                                    \
      (CUmemGenericAllocationHandle * handle, size_t bytes, const CUmemAllocationProp *properties, \
       unsigned long long flags))                                                                  \
    X(cuMemRelease, cuMemRelease, (CUmemGenericAllocationHandle handle))                           \
    X(cuMemMap, cuMemMap,                                                                          \
      (CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,      \
       unsigned long long flags))                                                                  \
    X(cuMemUnmap, cuMemUnmap, (CUdeviceptr address, size_t bytes))                                 \
    X(cuMemSetAccess, cuMemSetAccess,                                                              \
      (CUdeviceptr address, size_t bytes, const CUmemAccessDesc *access, size_t count))            \
    X(cuModuleLoadData, cuModuleLoadData, (CUmodule * module, const void *image))                  \
    X(cuModuleGetFunction, cuModuleGetFunction,                                                    \
      (CUfunction * function, CUmodule module, const char *name))                                  \
    X(cuLaunchKernel, cuLaunchKernel,                                                              \
      (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,   \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream,                 \
       void **parameters, void **extra))                                                           \
    X(cuStreamSynchronize, cuStreamSynchronize, (CUstream stream))

typedef struct bench_cuda {
#define BENCH_CUDA_FIELD(name, symbol, parameters) CUresult(*name) parameters;
    BENCH_CUDA_CALLS(BENCH_CUDA_FIELD)
#undef BENCH_CUDA_FIELD
    CUfunction append; /* the library's kernel, loaded from the checked-in PTX */
    int index;
} bench_cuda;

#define CUDA_OK(call)                                                                              \
    do {                                                                                           \
        CUresult code_ = (call);                                                                   \
        if (code_) {                                                                               \
            fprintf(stderr, "%s:%d: %s: CUDA error %d\n", __FILE__, __LINE__, #call, code_);       \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

extern const char bench_ptx[];
__asm__(".pushsection .rodata\n"
        "bench_ptx:\n"
        ".incbin \"libvmm/src/append.ptx\"\n"
        ".byte 0\n"
        ".popsection\n");

/* Load the driver and make the device's context current. False where the device is no CUDA's. */
static inline bool cuda_open(const bench *b, bench_cuda *cuda) {
    if (!b->is_cuda)
        return false;
    const char *path = getenv("VMM_CUDA_LIBRARY");
    void *library = dlopen(path && *path ? path : "libcuda.so.1", RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
#define BENCH_CUDA_LOAD(name, symbol, parameters) *(void **)&cuda->name = dlsym(library, #symbol);
    BENCH_CUDA_CALLS(BENCH_CUDA_LOAD)
#undef BENCH_CUDA_LOAD
    CUdevice device;
    CUcontext context;
    CUmodule module;
    cuda->index = b->info.index;
    CUDA_OK(cuda->cuDeviceGet(&device, b->info.index));
    CUDA_OK(cuda->cuDevicePrimaryCtxRetain(&context, device));
    CUDA_OK(cuda->cuCtxPushCurrent(context));
    CUDA_OK(cuda->cuModuleLoadData(&module, bench_ptx));
    CUDA_OK(cuda->cuModuleGetFunction(&cuda->append, module, VMM_APPEND_KERNEL));
    return true;
}

/* A launch of the append kernel with the library's own parameters, and nothing for it to copy: what
 * any launch of that signature costs its caller. */
static inline void cuda_bare_launch(bench_cuda *cuda, CUstream stream) {
    static vmm_append_args nothing = {.job = {{.unit_bytes = 16}}};
    void *parameters[] = {&nothing};

    CUDA_OK(cuda->cuLaunchKernel(cuda->append, 1, 1, 1, VMM_APPEND_BLOCK_THREADS, 1, 1, 0, stream,
                                 parameters, NULL));
}

/* So many of them, each a sample. */
static inline void cuda_time_bare_launches(bench *b, bench_cuda *cuda, int times) {
    for (int i = -BENCH_IN_FLIGHT; i < times; i++) {
        bench_start(b);
        cuda_bare_launch(cuda, NULL);
        if (i >= 0)
            bench_stop(b, 1);
        if (i % BENCH_IN_FLIGHT == 0)
            CUDA_OK(cuda->cuStreamSynchronize(NULL));
    }
    CUDA_OK(cuda->cuStreamSynchronize(NULL));
}

static inline CUdeviceptr cuda_alloc(bench_cuda *cuda, size_t bytes) {
    CUdeviceptr pointer;

    CUDA_OK(cuda->cuMemAlloc(&pointer, bytes));
    return pointer;
}

#endif /* BENCH_CUDA_H */
