/* append_hip.h - what append.cu uses of CUDA C, for a HIP compiler that is given neither AMD's
 * headers nor its device library: clang alone then builds the kernels, and they are the same
 * whichever ROCm is installed.
 */
#ifndef VMM_APPEND_HIP_H
#define VMM_APPEND_HIP_H

#include <stdint.h>

#include "append.h"

#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ __attribute__((shared))
#define __launch_bounds__(threads) __attribute__((amdgpu_flat_work_group_size(threads, threads)))

typedef uint32_t uint2 __attribute__((ext_vector_type(2)));
typedef uint32_t uint4 __attribute__((ext_vector_type(4)));

struct vmm_block_index {
    __device__ static uint32_t get_x() {
        return __builtin_amdgcn_workgroup_id_x();
    }
    __device__ static uint32_t get_y() {
        return __builtin_amdgcn_workgroup_id_y();
    }
    __device__ static uint32_t get_z() {
        return __builtin_amdgcn_workgroup_id_z();
    }
    __declspec(property(get = get_x)) uint32_t x;
    __declspec(property(get = get_y)) uint32_t y;
    __declspec(property(get = get_z)) uint32_t z;
};
struct vmm_thread_index {
    __device__ static uint32_t get_x() {
        return __builtin_amdgcn_workitem_id_x();
    }
    __declspec(property(get = get_x)) uint32_t x;
};
struct vmm_grid_size {
    __device__ static uint32_t get_x() {
        return __builtin_amdgcn_grid_size_x() / VMM_APPEND_BLOCK_THREADS;
    }
    __declspec(property(get = get_x)) uint32_t x;
};
static const __device__ vmm_block_index blockIdx;
static const __device__ vmm_thread_index threadIdx;
static const __device__ vmm_grid_size gridDim;

/* All threads of a block meet, and see what the others wrote before. */
static __device__ inline void __syncthreads() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

static __device__ inline unsigned long long atomicAdd(unsigned long long *at,
                                                      unsigned long long n) {
    return __hip_atomic_fetch_add(at, n, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

#endif /* VMM_APPEND_HIP_H */
