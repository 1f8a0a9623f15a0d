/* Two devices, each with what is its own: tensors, streams and pools of one are refused by the
 * other, and closing one leaves the other open. On one GPU beside the host, and on two. */
#include "check.h"

static const int64_t shape[] = {0, 256}; /* uint8 */

static model open_tensor(const fixture *f) {
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 1000};
    return model_open(f, &spec);
}

/* In one append all tensors are of one device. */
static void test_append_many(const fixture *a, const fixture *b) {
    uint8_t data[256] = {0};
    int64_t rows[] = {1, 256};
    vmm_array source = {.data = data, .dtype = VMM_UINT8, .ndim = 2, .shape = rows};
    vmm_array sources[] = {source, source};
    model of_a = open_tensor(a), of_b = open_tensor(b);
    vmm_tensor *tensors[] = {of_a.tensor, of_b.tensor};

    CHECK_STATUS(vmm_append_many(2, tensors, sources, NULL), VMM_ERR_INVALID);
    CHECK(strstr(vmm_last_error()->message, a->name) && strstr(vmm_last_error()->message, b->name));
    CHECK(vmm_length(of_a.tensor) == 0 && vmm_length(of_b.tensor) == 0);
    model_close(&of_a);
    model_close(&of_b);
}

/* A stream of the second GPU is none of the first's. */
static void test_streams(const fixture *f) {
    model m = open_tensor(f);
    void *context, *first, *stream;
    vmm_event *event;

    CHECK_CUDA(cuda()->get_current(&first));
    CHECK_CUDA(cuda()->retain(&context, 1));
    CHECK_CUDA(cuda()->set_current(context));
    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    CHECK_CUDA(cuda()->set_current(first));

    model_append(&m, VMM_UINT8, 3, VMM_MEMORY_HOST, NULL);
    CHECK_STATUS(vmm_handoff(m.tensor, stream), VMM_ERR_INVALID);
    CHECK(strstr(vmm_last_error()->message, "'cuda:1', not to 'cuda:0'"));
    CHECK_STATUS(vmm_truncate(m.tensor, 1, stream), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_stream_wait(f->device, NULL, stream), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_stream_wait(f->device, stream, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_event_record(f->device, stream, &event), VMM_ERR_INVALID);
    CHECK(!event);
    model_check(&m);
    model_close(&m);

    CHECK_CUDA(cuda()->set_current(context));
    CHECK_CUDA(cuda()->stream_destroy(stream));
    CHECK_CUDA(cuda()->set_current(first));
}

int main(int argc, char **argv) {
    char *host[] = {"", "host"}, *second[] = {"", "cuda:1"};

    setenv("VMM_SIM_DEVICES", "2", 0); /* before the driver is loaded */
    fixture f = fixture_open(argc, argv, 0, 0);
    if (!f.is_cuda)
        SKIP("the host is one device");
    cuda();
    fixture other = fixture_open(2, host, 0, 0);
    test_append_many(&f, &other);
    fixture_close(&other);

    vmm_device *device;
    if (vmm_device_open("cuda:1", &device))
        SKIP("there is one GPU only: %s", vmm_last_error()->message);
    vmm_device_close(device);
    other = fixture_open(2, second, 0, 0);
    test_append_many(&f, &other);
    test_streams(&f);
    /* The one that was opened first is closed first, with the other still open. */
    fixture_close(&f);
    model m = open_tensor(&other);
    CHECK_OK(vmm_grow(m.tensor, 10, NULL));
    CHECK_OK(vmm_close(m.tensor));
    free(m.numbers);
    fixture_close(&other);
    return 0;
}
