/* A capture that no pool was told of survives what would take a fence, as far as the library can
 * know of it: the captured stream is the tensor's, or a blocking one. On GPUs. */
#include "blocks.h"

static fixture f;
static void close_used(const vmm_spec *spec) {
    model m = model_open(&f, spec);

    model_append(&m, VMM_UINT8, 2 * rows, VMM_MEMORY_HOST, NULL);
    model_close(&m);
}

static void *begin(unsigned flags) {
    void *stream;

    CHECK_CUDA(cuda()->stream_create(&stream, flags));
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    return stream;
}

static uint64_t fences(void) {
    return pool_stats(f.pool).driver_calls[VMM_CALL_fence];
}

/* The default stream cannot answer while a blocking stream is captured: nobody's fence is taken. */
static void test_blocking_stream(void) {
    vmm_spec spec = make_spec(4);
    void *stream;

    close_used(&spec);
    CHECK(pool_stats(f.pool).queued_bytes > 0);
    stream = begin(0);
    model m = model_open(&f, &spec); /* does without what is queued */
    CHECK_STATUS(vmm_pool_trim(f.pool, 1), VMM_ERR_CAPTURING);
    CHECK(pool_stats(f.pool).queued_bytes > 0);
    drop_capture(stream);
    CHECK_OK(vmm_pool_trim(f.pool, 1));
    CHECK_SIZE(held_bytes(f.pool), 0);
    model_append(&m, VMM_UINT8, 2 * rows, VMM_MEMORY_HOST, NULL);
    model_check(&m);
    model_close(&m);
    CHECK_CUDA(cuda()->stream_destroy(stream));
}

/* What growth would ask a fence for is left where it is, while the tensor's stream is captured. */
static void test_stream_of_the_tensor(void) {
    vmm_spec spec = make_spec(8), other = make_spec(9);
    model trimmed = model_open(&f, &other), m = model_open(&f, &spec);
    vmm_tensor *fork;
    void *stream, *out;

    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    model_append(&m, VMM_UINT8, 1, VMM_MEMORY_HOST, stream);
    model_grow(&trimmed, 4 * rows, false);
    CHECK_OK(vmm_truncate(trimmed.tensor, trimmed.length = 0, VMM_STREAM_NONE));
    CHECK_OK(vmm_trim(trimmed.tensor));
    size_t queued = pool_stats(f.pool).queued_bytes;
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_map(m.tensor, 2 * rows));
    CHECK_OK(vmm_grow(m.tensor, 3 * rows, &out));
    CHECK_SIZE(pool_stats(f.pool).queued_bytes, queued);
    drop_capture(stream);
    CHECK_OK(vmm_truncate(m.tensor, 1, VMM_STREAM_NONE));

    close_used(&spec); /* which a fork would take over */
    uint64_t before = fences();
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_STATUS(vmm_fork(m.tensor, 1, &fork), VMM_ERR_CAPTURING);
    drop_capture(stream);
    CHECK(fences() == before);
    model_check(&m);
    model_close(&m);
    model_close(&trimmed);
    CHECK_CUDA(cuda()->stream_destroy(stream));
}

/* Nor while the stream of another tensor of the same call is: the first of them, or the last. */
static void test_stream_of_one_of_many(void) {
    vmm_spec spec = make_spec(8), other = make_spec(9);
    void *streams[2];

    for (int i = 0; i < 2; i++)
        CHECK_CUDA(cuda()->stream_create(&streams[i], CUDA_STREAM_NON_BLOCKING));
    for (int captured = 0; captured < 2; captured++) {
        model trimmed = model_open(&f, &other);
        model m[2] = {model_open(&f, &spec), model_open(&f, &spec)};
        vmm_tensor *tensors[] = {m[0].tensor, m[1].tensor};
        const size_t n_rows[] = {2 * rows, 2 * rows};
        for (int i = 0; i < 2; i++)
            model_append(&m[i], VMM_UINT8, 1, VMM_MEMORY_HOST, streams[i]);
        model_grow(&trimmed, 4 * rows, false);
        CHECK_OK(vmm_truncate(trimmed.tensor, trimmed.length = 0, VMM_STREAM_NONE));
        CHECK_OK(vmm_trim(trimmed.tensor));
        size_t queued = pool_stats(f.pool).queued_bytes;
        uint64_t before = fences();
        CHECK_CUDA(cuda()->begin_capture(streams[captured], CUDA_CAPTURE_GLOBAL));
        CHECK_OK(vmm_map_many(2, tensors, n_rows));
        CHECK_SIZE(pool_stats(f.pool).queued_bytes, queued);
        CHECK(fences() == before);
        drop_capture(streams[captured]);
        for (int i = 0; i < 2; i++) {
            CHECK_SIZE(vmm_mapped(m[i].tensor), 2 * rows);
            model_check(&m[i]);
            model_close(&m[i]);
        }
        model_close(&trimmed);
        CHECK_OK(vmm_pool_trim(f.pool, 1));
    }
    for (int i = 0; i < 2; i++)
        CHECK_CUDA(cuda()->stream_destroy(streams[i]));
}

int main(int argc, char **argv) {
    f = fixture_open(argc, argv, 0, 0);
    if (!f.is_gpu)
        SKIP("the host takes no fences");
    cuda();
    blocks_are(f.granularity_bytes, 64 * KIB);
    test_blocking_stream();
    test_stream_of_the_tensor();
    test_stream_of_one_of_many();
    fixture_close(&f);
    return 0;
}
