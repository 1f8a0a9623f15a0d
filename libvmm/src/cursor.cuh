/* cursor.cuh - appending at a row that the device keeps (cursor_job.h); a part of append.cu,
 * which includes it.
 *
 * A node of a graph takes about as long as its longest chain of memory accesses. So what is to
 * be appended is read at once, and stored when the row is known: one access to the control
 * block, on the way at the same time. With one block for an entry all threads read it, and
 * meet before the first of them writes it. With several, a block's read is at the same time
 * its ticket; whoever draws the last one knows that all have read, and advances the entry.
 * No access after that one is waited for, and no fence is needed: the next kernel comes behind
 * the end of this one.
 */
namespace {

/* The row of an entry that the append goes to; false if it is past what is mapped. Called once
 * by all threads of each of the entry's blocks; `shared` is a word of their block. */
__device__ __forceinline__ bool take_row(const vmm_cursor_job &job, uint32_t entry,
                                         unsigned long long *shared, uint32_t &row) {
    char *const control = (char *)job.control;
    const uint32_t n = job.n_entries;
    unsigned long long *const state = (unsigned long long *)(control + VMM_CURSOR_STATE(n)) + entry;
    const uint32_t mapped = *(const volatile uint32_t *)(control + VMM_CURSOR_WORDS(n));
    const uint32_t behind = ((const uint32_t *)(control + VMM_CURSOR_BEHIND(n)))[entry];
    unsigned long long before;
    if (job.n_blocks == 1) {
        before = *(const volatile unsigned long long *)state;
        __syncthreads();
    } else {
        if (threadIdx.x == 0)
            *shared = atomicAdd(state, 1ull << 32);
        __syncthreads();
        before = *shared;
    }
    row = (uint32_t)before;
    const bool is_last = (uint32_t)(before >> 32) == job.n_blocks - 1;
    const bool fits = (uint64_t)row + behind + job.n_rows <= mapped;
    if (threadIdx.x == 0 && is_last) {
        const uint32_t length = fits ? row + job.n_rows : row;
        *(volatile unsigned long long *)state = length;
        if (fits)
            ((int32_t *)control)[entry] = (int32_t)length;
        else
            *(volatile uint32_t *)job.flag = 1;
    }
    return fits;
}

/* The units of a thread: N at a time, the first ones loaded before the row is known. */
template <typename Unit, int N>
__device__ __forceinline__ void append_entry(const vmm_cursor_job &job, uint32_t entry,
                                             unsigned long long *shared) {
    const vmm_append_job_wide &copy = job.copy;
    const uint32_t n_units = (uint32_t)copy.n_units;
    const uint32_t step = job.n_blocks * VMM_CURSOR_BLOCK_THREADS;
    const char *const src = (const char *)copy.src + entry * job.src_entry_stride;
    char *dst = (char *)copy.dst + entry * job.dst_entry_stride;
    uint32_t unit = blockIdx.x * VMM_CURSOR_BLOCK_THREADS + threadIdx.x;
    bool is_first = true;
    do {
        Unit value[N];
        int64_t dst_offset[N];
        int n = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            int64_t src_offset = dst_offset[i] = (int64_t)unit * sizeof(Unit);
            if (unit < n_units) {
                if (copy.n_outer)
                    place<uint32_t, VMM_APPEND_DIMS_WIDE>(copy, unit, dst_offset[i], src_offset);
                n = i + 1;
            }
            value[i] = unit < n_units ? *(const Unit *)(src + src_offset) : Unit();
            unit += step;
        }
        if (is_first) {
            uint32_t row;
            if (!take_row(job, entry, shared, row))
                return;
            dst += row * job.row_bytes;
            is_first = false;
        }
#pragma unroll
        for (int i = 0; i < N; i++)
            if (i < n)
                *(Unit *)(dst + dst_offset[i]) = value[i];
    } while (unit < n_units);
}

template <int N>
__device__ __forceinline__ void append_entry_as(const vmm_cursor_job &job, uint32_t entry,
                                                unsigned long long *shared) {
    if (__builtin_expect(job.copy.unit_bytes >= 16, 1))
        append_entry<uint4, N>(job, entry, shared);
    else if (job.copy.unit_bytes >= 8)
        append_entry<uint2, N>(job, entry, shared);
    else if (job.copy.unit_bytes >= 4)
        append_entry<uint32_t, N>(job, entry, shared);
    else if (job.copy.unit_bytes >= 2)
        append_entry<uint16_t, N>(job, entry, shared);
    else
        append_entry<uint8_t, N>(job, entry, shared);
}

} // namespace

extern "C" __global__ void __launch_bounds__(VMM_CURSOR_BLOCK_THREADS)
    vmm_append_kernel_cursor(const vmm_cursor_args args) {
    __shared__ unsigned long long shared;
    const vmm_cursor_job &job = args.job[blockIdx.z];
    if (blockIdx.x >= job.n_blocks || blockIdx.y >= job.n_entries)
        return;
    if (__builtin_expect(job.copy.n_units <= job.n_blocks * VMM_CURSOR_BLOCK_THREADS, 1))
        append_entry_as<1>(job, blockIdx.y, &shared);
    else
        append_entry_as<4>(job, blockIdx.y, &shared);
}

extern "C" __global__ void __launch_bounds__(VMM_CURSOR_BLOCK_THREADS)
    vmm_cursor_kernel(const vmm_cursor_set_args args) {
    if (threadIdx.x >= args.n_sets)
        return;
    const vmm_cursor_set &set = args.set[threadIdx.x];
    char *const control = (char *)set.control;
    const uint32_t n = set.n_entries;
    for (uint32_t i = set.first; i < set.first + set.count; i++) {
        ((int32_t *)control)[i] = (int32_t)set.length;
        ((unsigned long long *)(control + VMM_CURSOR_STATE(n)))[i] = set.length;
        ((uint32_t *)(control + VMM_CURSOR_BEHIND(n)))[i] = set.behind;
    }
}
