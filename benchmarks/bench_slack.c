/* bench_slack: what a decode step of 32 layers costs in memory and driver calls, by block size.
 *
 *   separate/S   64 tensors, K and V of each layer, appended to at once
 *   together/S   one tensor whose row holds all of them: shape (tokens, 32, 2, heads, dim)
 *   base/static  the copies into buffers of the final size, which are committed from the start
 *
 * A sample is a token's append, in time of the calling thread. extra has the slack (memory mapped
 * and not used: at the end, the mean and the most over the run) and per token the driver calls that
 * have to do with memory and the launches or copies. 8 heads of 128 in 16 bits: 2 KiB for each
 * tensor and sequence; 8 sequences and 4096 tokens on a GPU (4 GiB), 1 and 2048 on the host.
 */
#include "cuda.h"

#define TENSORS 64

typedef struct step {
    size_t n_tensors, row_bytes, tokens;
} step;

static void decode(bench *b, const step *step, size_t block_bytes, const char *base,
                   const char *id) {
    const int64_t shape[] = {0, (int64_t)step->row_bytes};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = step->tokens};
    vmm_tensor *tensors[TENSORS];
    vmm_array sources[TENSORS];
    vmm_pool *pool, *others;
    bench_source source;
    vmm_pool_stats stats;
    double mean = 0, most = 0, slack = 0, in_use = 0;
    size_t n_looked = 0;

    BENCH_OK(vmm_pool_create(b->device, block_bytes, 0, &pool));
    BENCH_OK(vmm_pool_create(b->device, 0, 0, &others));
    bench_source_open(b, others, step->row_bytes, &source);
    for (size_t i = 0; i < step->n_tensors; i++) {
        BENCH_OK(vmm_reserve(pool, &spec, &tensors[i]));
        sources[i] = source.array;
    }
    vmm_pool_stats before;
    BENCH_OK(vmm_pool_statistics(pool, &before));
    for (size_t token = 0; token < step->tokens; token++) {
        bench_start(b);
        vmm_status status = vmm_append_many(step->n_tensors, tensors, sources, NULL);
        bench_stop(b, 1);
        if (status == VMM_ERR_OUT_OF_MEMORY) {
            printf("%-36s does not fit: %s\n", id, vmm_last_error()->message);
            break;
        }
        BENCH_OK(status);
        if (token % 64 == 63)
            bench_wait(b, NULL);
        if (token % 16 == 15 || token + 1 == step->tokens) {
            BENCH_OK(vmm_pool_statistics(pool, &stats));
            double used = (double)((token + 1) * step->n_tensors * step->row_bytes);
            in_use = (double)stats.in_use_bytes;
            slack = in_use - used;
            mean += slack;
            most = slack > most ? slack : most;
            n_looked++;
        }
    }
    bench_wait(b, NULL);
    bool fits = vmm_length(tensors[0]) == step->tokens;
    uint64_t launches = stats.driver_calls[VMM_CALL_launch] + stats.driver_calls[VMM_CALL_copy] -
                        before.driver_calls[VMM_CALL_launch] - before.driver_calls[VMM_CALL_copy];
    double calls = (double)(bench_mapping_calls(stats.driver_calls) -
                            bench_mapping_calls(before.driver_calls));
    size_t n_blocks = 0;
    for (size_t i = 0; i < step->n_tensors; i++) {
        vmm_tensor_stats of;
        BENCH_OK(vmm_stats(tensors[i], &of));
        n_blocks += of.block_count;
    }
    if (fits) {
        bench_report(b, base, "%s", id);
        if (block_bytes != VMM_BLOCK_AUTO)
            bench_extra(b, "block_bytes", (double)block_bytes);
        bench_extra(b, "tokens", (double)step->tokens);
        bench_extra(b, "mapped_bytes", in_use);
        bench_extra(b, "slack_bytes", slack);
        bench_extra(b, "slack_bytes_mean", mean / (double)n_looked);
        bench_extra(b, "slack_bytes_most", most);
        bench_extra(b, "blocks", (double)n_blocks);
        bench_extra(b, "driver_calls_per_token", calls / (double)step->tokens);
        bench_extra(b, "launches_per_token", (double)launches / (double)step->tokens);
    } else
        b->n_samples = 0;
    for (size_t i = 0; i < step->n_tensors; i++)
        BENCH_OK(vmm_close(tensors[i]));
    bench_source_close(&source);
    BENCH_OK(vmm_pool_close(others));
    BENCH_OK(vmm_pool_close(pool));
}

static void copies(bench *b, bench_cuda *cuda, const step *step) {
    size_t bytes = step->tokens * step->row_bytes;
    CUdeviceptr buffers[TENSORS], row = 0;
    char *on_host[TENSORS], *host_row = bench_buffer(step->row_bytes);

    if (cuda)
        row = cuda_alloc(cuda, step->row_bytes);
    for (size_t i = 0; i < step->n_tensors; i++)
        if (cuda)
            buffers[i] = cuda_alloc(cuda, bytes);
        else
            on_host[i] = bench_buffer(bytes);
    for (size_t token = 0; token < step->tokens; token++) {
        size_t at = token * step->row_bytes;
        bench_start(b);
        for (size_t i = 0; i < step->n_tensors; i++)
            if (cuda)
                CUDA_OK(cuda->cuMemcpyDtoDAsync(buffers[i] + at, row, step->row_bytes, NULL));
            else
                memcpy(on_host[i] + at, host_row, step->row_bytes);
        bench_stop(b, 1);
        if (cuda && token % 4 == 3)
            CUDA_OK(cuda->cuStreamSynchronize(NULL));
    }
    if (cuda) {
        CUDA_OK(cuda->cuStreamSynchronize(NULL));
        CUDA_OK(cuda->cuMemFree(row));
    }
    for (size_t i = 0; i < step->n_tensors; i++)
        if (cuda)
            CUDA_OK(cuda->cuMemFree(buffers[i]));
        else
            free(on_host[i]);
    free(host_row);
    bench_report(b, "", "base/static");
    bench_extra(b, "tokens", (double)step->tokens);
    bench_extra(b, "mapped_bytes", (double)(step->n_tensors * bytes));
    bench_extra(b, "slack_bytes_mean", (double)(step->n_tensors * bytes) / 2);
}

int main(int argc, char **argv) {
    static const struct {
        size_t bytes;
        const char *text;
    } sizes[] = {{VMM_BLOCK_AUTO, "auto"},
                 {2 * MIB, "2MiB"},
                 {16 * MIB, "16MiB"},
                 {32 * MIB, "32MiB"},
                 {128 * MIB, "128MiB"}};
    static bench b;
    bench_cuda cuda;

    bench_open(&b, "bench_slack", argc, argv);
    b.not_measured = "attention over the rows: a cache with all layers in a row has strides";
    bench_cuda *driver = cuda_open(&b, &cuda) ? &cuda : NULL;
    size_t row_bytes = b.is_gpu ? 16 * KIB : 2 * KIB;
    size_t tokens = b.quick ? 64 : b.is_gpu ? 4096 : 2048;
    const step separate = {TENSORS, row_bytes, tokens};
    const step together = {1, TENSORS * row_bytes, tokens};
    const char *base = driver || !b.is_gpu ? "base/static" : "";

    if (*base)
        copies(&b, driver, &separate);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char id[64];
        /* On the host blocks are committed whole: not so many large ones. */
        if (b.is_gpu || sizes[i].bytes == VMM_BLOCK_AUTO || sizes[i].bytes <= 16 * MIB) {
            snprintf(id, sizeof id, "separate/%s", sizes[i].text);
            decode(&b, &separate, sizes[i].bytes, base, id);
        }
        snprintf(id, sizeof id, "together/%s", sizes[i].text);
        decode(&b, &together, sizes[i].bytes, base, id);
    }
    bench_close(&b);
    return 0;
}
