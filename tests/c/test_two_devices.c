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
    CHECK_STATUS(vmm_map_many(2, tensors, (size_t[]){1, 1}), VMM_ERR_INVALID);
    CHECK(strstr(vmm_last_error()->message, a->name) && strstr(vmm_last_error()->message, b->name));
    CHECK(vmm_length(of_a.tensor) == 0 && vmm_length(of_b.tensor) == 0);
    model_close(&of_a);
    model_close(&of_b);
}

/* Make a GPU current on this thread, by the context of CUDA's that stands for it. */
static void set_device(int index) {
    static void *contexts[2];

    if (is_hip) {
        CHECK_CUDA(cuda()->set_device(index));
        return;
    }
    if (!contexts[index])
        CHECK_CUDA(cuda()->retain(&contexts[index], index));
    CHECK_CUDA(cuda()->set_current(contexts[index]));
}

/* A stream of the second GPU is none of the first's. */
static void test_streams(const fixture *f, const fixture *other) {
    model m = open_tensor(f);
    char message[64];
    void *stream;
    vmm_event *event;

    set_device(1);
    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    set_device(0);

    model_append(&m, VMM_UINT8, 3, VMM_MEMORY_HOST, NULL);
    CHECK_STATUS(vmm_handoff(m.tensor, stream), VMM_ERR_INVALID);
    snprintf(message, sizeof message, "'%s', not to '%s'", other->name, f->name);
    CHECK(strstr(vmm_last_error()->message, message));
    CHECK_STATUS(vmm_truncate(m.tensor, 1, stream), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_stream_wait(f->device, NULL, stream), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_stream_wait(f->device, stream, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_event_record(f->device, stream, &event), VMM_ERR_INVALID);
    CHECK(!event);
    model_check(&m);
    model_close(&m);

    set_device(1);
    CHECK_CUDA(cuda()->stream_destroy(stream));
    set_device(0);
}

int main(int argc, char **argv) {
    char *host[] = {"", "host"}, *second[] = {"", NULL};

    setenv("VMM_SIM_DEVICES", "2", 0); /* before the driver is loaded */
    fixture f = fixture_open(argc, argv, 0, 0);
    if (!f.is_gpu)
        SKIP("the host is one device");
    cuda();
    fixture other = fixture_open(2, host, 0, 0);
    test_append_many(&f, &other);
    fixture_close(&other);

    vmm_device *device;
    second[1] = is_hip ? "hip:1" : "cuda:1";
    if (vmm_device_open(second[1], &device)) {
        fixture_close(&f);
        SKIP("there is one GPU only: %s", vmm_last_error()->message);
    }
    vmm_device_close(device);
    other = fixture_open(2, second, 0, 0);
    test_append_many(&f, &other);
    test_streams(&f, &other);
    /* The one that was opened first is closed first, with the other still open. */
    fixture_close(&f);
    model m = open_tensor(&other);
    CHECK_OK(vmm_grow(m.tensor, 10, NULL));
    CHECK_OK(vmm_close(m.tensor));
    free(m.numbers);
    fixture_close(&other);
    return 0;
}
