/* append.cu - the append kernel: up to 32 copy jobs (append.h), or 160 pieces, in one launch.
 *
 * An append is a few KiB to a few MiB, so what counts is how soon the first byte leaves:
 * blockIdx.y picks the job, one thread moves one unit while the device has threads for
 * that, and nothing is shared or waited for. Where a thread has more to do, its loads are
 * in flight together before the first store. No cache hints: what is appended is read next.
 *
 * The job is read where it lies, in the constant bank of the parameters. Everything of a
 * job is the same for all threads of a block, so no branch on it diverges.
 */
#include "append.h"
#include "cursor_job.h"
#ifdef __HIP__
#include "append_hip.h"
#endif

namespace {

/* Load all units before storing any; only the first n of N are there. The others are set
 * all the same: undefined, they would hold registers from one round of a loop to the next.
 * Offsets, and bases read from the parameters, let the compiler see global memory. */
template <typename Unit, int N, typename Job>
__device__ __forceinline__ void move_as(const Job &job, const int64_t *dst_offset,
                                        const int64_t *src_offset, int n) {
    Unit unit[N];
#pragma unroll
    for (int i = 0; i < N; i++)
        unit[i] = i < n ? *(const Unit *)((const char *)job.src + src_offset[i]) : Unit();
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < n)
            *(Unit *)((char *)job.dst + dst_offset[i]) = unit[i];
}

/* Compared by order, since equality would become a jump table: one more read from memory
 * before the first load. */
template <int N, typename Job>
__device__ __forceinline__ void move(const Job &job, const int64_t *dst_offset,
                                     const int64_t *src_offset, int n) {
    if (__builtin_expect(job.unit_bytes >= 16, 1))
        move_as<uint4, N>(job, dst_offset, src_offset, n);
    else if (job.unit_bytes >= 8)
        move_as<uint2, N>(job, dst_offset, src_offset, n);
    else if (job.unit_bytes >= 4)
        move_as<uint32_t, N>(job, dst_offset, src_offset, n);
    else if (job.unit_bytes >= 2)
        move_as<uint16_t, N>(job, dst_offset, src_offset, n);
    else
        move_as<uint8_t, N>(job, dst_offset, src_offset, n);
}

/* Where a unit of a job lies: in which run, in row-major order, and where in it. Dividing
 * 64 bits costs several times what 32 do, hence Index. */
template <typename Index, int DIMS, typename Job>
__device__ __forceinline__ void place(const Job &job, Index unit, int64_t &dst_offset,
                                      int64_t &src_offset) {
    Index run = unit / (Index)job.run_units;
    dst_offset = src_offset = (int64_t)(unit - run * (Index)job.run_units) * job.unit_bytes;
#pragma unroll
    for (int d = DIMS - 1; d > 0; d--) {
        if (d < (int)job.n_outer) {
            Index outer = run / (Index)job.count[d], i = run - outer * (Index)job.count[d];
            dst_offset += (int64_t)i * job.dst_stride[d];
            src_offset += (int64_t)i * job.src_stride[d];
            run = outer;
        }
    }
    dst_offset += (int64_t)run * job.dst_stride[0];
    src_offset += (int64_t)run * job.src_stride[0];
}

__device__ __forceinline__ uint32_t thread_count() {
    return gridDim.x * VMM_APPEND_BLOCK_THREADS;
}

__device__ __forceinline__ uint32_t thread_index() {
    return blockIdx.x * VMM_APPEND_BLOCK_THREADS + threadIdx.x;
}

/* There is a thread for each unit: the small append, by the shortest way to the load. */
template <int DIMS, typename Job> __device__ __forceinline__ void copy_one(const Job &job) {
    const uint32_t unit = thread_index();
    int64_t dst_offset, src_offset;
    if (unit >= (uint32_t)job.n_units)
        return;
    if (__builtin_expect(job.n_outer == 0, 1))
        dst_offset = src_offset = (int64_t)unit * job.unit_bytes;
    else
        place<uint32_t, DIMS>(job, unit, dst_offset, src_offset);
    move<1>(job, &dst_offset, &src_offset, 1);
}

/* A single run: no divisions. */
template <int N, typename Job> __device__ __forceinline__ void copy_dense(const Job &job) {
    const int64_t n_bytes = (int64_t)(job.n_units * job.unit_bytes);
    const int64_t step = (int64_t)thread_count() * job.unit_bytes;
    int64_t offset = (int64_t)thread_index() * job.unit_bytes;
#pragma unroll 1
    while (offset < n_bytes) {
        int64_t offsets[N];
        int n = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            offsets[i] = offset;
            if (offset < n_bytes)
                n = i + 1;
            offset += step;
        }
        move<N>(job, offsets, offsets, n);
    }
}

/* Runs anywhere. */
template <typename Index, int DIMS, int N, typename Job>
__device__ __forceinline__ void copy_runs(const Job &job) {
    const Index n_units = (Index)job.n_units;
    Index unit = thread_index();
#pragma unroll 1
    while (unit < n_units) {
        int64_t dst_offset[N], src_offset[N];
        int n = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (unit < n_units) {
                place<Index, DIMS>(job, unit, dst_offset[i], src_offset[i]);
                n = i + 1;
            }
            unit += thread_count();
        }
        move<N>(job, dst_offset, src_offset, n);
    }
}

/* A thread that has several units moves 4 at a time, or N where finding their places takes
 * registers. 32-bit indices leave room for the last step beyond the end. */
template <int DIMS, int N, typename Job> __device__ __forceinline__ void copy(const Job &job) {
    if (__builtin_expect(job.n_units <= thread_count(), 1))
        copy_one<DIMS>(job);
    else if (job.n_outer == 0)
        copy_dense<4>(job);
    else if (job.n_units <= (uint64_t)1 << 31)
        copy_runs<uint32_t, DIMS, N>(job);
    else
        copy_runs<uint64_t, DIMS, 1>(job);
}

/* One run of a piece. Its offset is added to that within the run, so that the bases stay
 * parameters. */
template <int N>
__device__ __forceinline__ void copy_piece(const vmm_append_args_pieces &args,
                                           const vmm_append_piece &piece) {
    const int64_t dst_run = (int64_t)blockIdx.z * args.dst_stride;
    const int64_t src_run = (int64_t)blockIdx.z * args.src_stride;
    const int64_t n_bytes = (int64_t)piece.n_units * piece.unit_bytes;
    const int64_t step = (int64_t)thread_count() * piece.unit_bytes;
    int64_t offset = (int64_t)thread_index() * piece.unit_bytes;
#pragma unroll 1
    while (offset < n_bytes) {
        int64_t dst_offset[N], src_offset[N];
        int n = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            dst_offset[i] = dst_run + offset;
            src_offset[i] = src_run + offset;
            if (offset < n_bytes)
                n = i + 1;
            offset += step;
        }
        move<N>(piece, dst_offset, src_offset, n);
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(VMM_APPEND_BLOCK_THREADS)
    vmm_append_kernel(const vmm_append_args args) {
    copy<VMM_APPEND_DIMS, 2>(args.job[blockIdx.y]);
}

extern "C" __global__ void __launch_bounds__(VMM_APPEND_BLOCK_THREADS)
    vmm_append_kernel_wide(const vmm_append_args_wide args) {
    copy<VMM_APPEND_DIMS_WIDE, 1>(args.job[blockIdx.y]);
}

extern "C" __global__ void __launch_bounds__(VMM_APPEND_BLOCK_THREADS)
    vmm_append_kernel_pieces(const vmm_append_args_pieces args) {
    const vmm_append_piece &piece = args.piece[blockIdx.y];
    if (__builtin_expect(piece.n_units <= thread_count(), 1))
        copy_piece<1>(args, piece);
    else
        copy_piece<2>(args, piece);
}

#include "cursor.cuh"
