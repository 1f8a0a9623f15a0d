/* An executable graph that is updated from another one keeps that one's tensors, and its own no
 * longer. On a CUDA driver that is not the simulated one: it is the driver that does it. */
#include "check.h"

typedef struct update_result { /* CUgraphExecUpdateResultInfo */
    int result;
    void *error_node, *error_from_node;
} update_result;

static fixture f;
static void *stream;

static void *capture(vmm_tensor *tensor, const vmm_array *row) {
    void *graph;

    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_append(tensor, row, stream));
    CHECK_CUDA(cuda()->end_capture(stream, &graph));
    return graph;
}

int main(int argc, char **argv) {
    int (*update)(void *, void *, update_result *) = NULL;
    const int64_t shape[] = {0, 64}, row_shape[] = {1, 64};
    vmm_spec spec = {
        .ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 1000, .layout = VMM_LAYOUT_SEQ};
    model old, new;
    void *graph, *exec;

    f = fixture_open(argc, argv, 0, 0);
    if (!f.is_gpu || is_hip)
        SKIP("graphs are updated so by CUDA");
    cuda();
    *(void **)&update = dlsym(cuda_library(), "cuGraphExecUpdate_v2");
    if (!update)
        SKIP("this driver has no cuGraphExecUpdate");
    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    old = model_open(&f, &spec);
    new = model_open(&f, &spec);
    uint8_t *bytes = make_rows(new.tensor, ++last_number, 1);
    vmm_array row = {.data = device_alloc(&f, 64),
                     .memory = VMM_MEMORY_DEVICE,
                     .dtype = VMM_UINT8,
                     .ndim = 2,
                     .shape = row_shape};
    write_device(&f, (void *)(uintptr_t)row.data, bytes, 64);
    synchronize(&f);

    graph = capture(old.tensor, &row);
    CHECK_CUDA(cuda()->instantiate(&exec, graph, 0));
    CHECK_CUDA(cuda()->graph_destroy(graph));
    graph = capture(new.tensor, &row);
    update_result said = {0};
    CHECK_CUDA(update(exec, graph, &said));
    CHECK_CUDA(cuda()->graph_destroy(graph));
    wait_for_unpinned(old.tensor);
    CHECK_SIZE(vmm_pin_count(new.tensor), 1);
    CHECK_STATUS(vmm_close(new.tensor), VMM_ERR_PINNED);
    CHECK_OK(vmm_map(new.tensor, 1));
    CHECK_CUDA(cuda()->graph_launch(exec, stream));
    CHECK_CUDA(cuda()->stream_synchronize(stream));
    CHECK_OK(vmm_advance(new.tensor, 1));
    model_extend(&new, last_number, 1);
    CHECK_CUDA(cuda()->graph_exec_destroy(exec));
    wait_for_unpinned(new.tensor);
    model_check(&new);
    model_check(&old);
    model_close(&new);
    model_close(&old);
    free(bytes);
    device_free(&f, (void *)(uintptr_t)row.data);
    CHECK_CUDA(cuda()->stream_destroy(stream));
    fixture_close(&f);
    return 0;
}
