/* Opening and closing devices: names, counting, one that is not there; the driver library
 * missing; and the host under a resource limit, which is an error and never a signal. */
#include "check.h"

#include <sys/resource.h>

static int without_driver(void) {
    vmm_device *device = NULL;

    setenv("VMM_CUDA_LIBRARY", "/nowhere/libcuda.so.1", 1);
    for (int i = 0; i < 2; i++) { /* the second time, too */
        CHECK_STATUS(vmm_device_open("cuda:0", &device), VMM_ERR_NO_DRIVER);
        CHECK(!device);
        CHECK(strstr(vmm_last_error()->message, "/nowhere/libcuda.so.1"));
        CHECK(strstr(vmm_last_error()->message, "device='host' works"));
    }
    CHECK_OK(vmm_device_open("host", &device));
    vmm_device_close(device);
    return 0;
}

/* A library, but not a CUDA driver. */
static int with_another_library(void) {
    vmm_device *device = NULL;

    setenv("VMM_CUDA_LIBRARY", "libm.so.6", 1);
    CHECK_STATUS(vmm_device_open("cuda:0", &device), VMM_ERR_NO_DRIVER);
    CHECK(!device && vmm_last_error()->message[0]);
    return 0;
}

static int under_address_limit(void) {
    struct rlimit limit = {2 * GIB, 2 * GIB};
    const int64_t shape[] = {0, 1024};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 16 * MIB};
    vmm_device_info info;
    vmm_device *device;
    vmm_pool *pool;
    vmm_tensor *tensor;

    if (!has_memory_limits())
        return 0;
    CHECK_OK(vmm_device_open("host", &device));
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
    CHECK_OK(vmm_device_query(device, &info));
    CHECK(info.reservable_bytes <= 2 * GIB);
    CHECK_OK(vmm_pool_create(device, 0, 0, &pool));
    vmm_status status = vmm_reserve(pool, &spec, &tensor); /* 16 GiB */
    CHECK(status == VMM_ERR_OUT_OF_MEMORY || status == VMM_ERR_DRIVER);
    CHECK(vmm_last_error()->driver_code != 0);
    CHECK(strstr(vmm_last_error()->message, "smaller capacity"));
    spec.capacity = 64 * KIB;
    CHECK_OK(vmm_reserve(pool, &spec, &tensor));
    CHECK_OK(vmm_grow(tensor, 1000, NULL));
    CHECK_OK(vmm_close(tensor));
    CHECK_OK(vmm_pool_close(pool));
    vmm_device_close(device);
    return 0;
}

static void test_names(void) {
    static const char *const wrong[] = {
        "",      "Host",    "hos",     "host:0", "host ",  "cuda:",   "cuda:-1", "cuda:x",
        "cuda0", "cuda:1x", "cuda :0", "gpu",    "CUDA:0", "cuda:+1", "cuda: 1", "cuda:00000",
        "hip:",  "hip0",    "hip:-1",  "hip:0 ", "HIP",    "hi",      "hip:1x",  "hip:00000"};
    vmm_device *device = NULL;
    char long_name[4000];

    for (size_t i = 0; i < LENGTH_OF(wrong); i++)
        CHECK_STATUS(vmm_device_open(wrong[i], &device), VMM_ERR_INVALID);
    memset(long_name, 'x', sizeof long_name - 1);
    long_name[sizeof long_name - 1] = '\0';
    CHECK_STATUS(vmm_device_open(long_name, &device), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_device_open(NULL, &device), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_device_open("host", NULL), VMM_ERR_INVALID);
    CHECK(!device);
}

static void test_counting(const fixture *f) {
    vmm_device *again, *third;
    vmm_device_info info;
    vmm_pool *pool;

    CHECK_OK(vmm_device_open(f->name, &again));
    CHECK(again == f->device);
    CHECK_OK(vmm_device_open(is_hip ? "hip" : f->is_gpu ? "cuda" : "cpu", &third));
    CHECK(third == f->device);
    CHECK_OK(vmm_pool_create(again, 0, 0, &pool)); /* a pool keeps its device for itself */
    vmm_device_close(again);
    vmm_device_close(third);
    CHECK_OK(vmm_device_query(f->device, &info));
    CHECK(strcmp(info.name, f->name) == 0);
    CHECK_OK(vmm_pool_close(pool));
    CHECK(info.kind == (is_hip ? VMM_DEVICE_HIP : f->is_gpu ? VMM_DEVICE_CUDA : VMM_DEVICE_HOST));
    CHECK(info.index == 0);
    CHECK(info.granularity_bytes >= 4096 && info.recommended_bytes >= info.granularity_bytes);
    CHECK(info.granularity_bytes % 4096 == 0 && info.reservable_bytes >= GIB);
    CHECK(info.free_bytes <= info.total_bytes && info.total_bytes > 0);
    CHECK(info.description[0] && info.kernel[0]);
    CHECK(f->is_gpu == (info.driver_version > 0));
}

static void test_not_there(const fixture *f) {
    vmm_device *device = NULL;

    if (!f->is_gpu)
        return;
    CHECK_STATUS(vmm_device_open(is_hip ? "hip:63" : "cuda:63", &device), VMM_ERR_NO_DEVICE);
    CHECK(!device && strstr(vmm_last_error()->message, "63"));
    CHECK_STATUS(vmm_device_open(is_hip ? "hip:9999" : "cuda:9999", &device), VMM_ERR_NO_DEVICE);
}

/* The caller's current context is left as it was found. Of HIP's, test_hip.c. */
static void test_context(const fixture *f) {
    void *before, *after;
    vmm_device *device;
    vmm_device_info info;

    if (!f->is_gpu || is_hip)
        return;
    for (int with_context = 0; with_context < 2; with_context++) {
        if (!with_context)
            CHECK_CUDA(cuda()->set_current(NULL));
        CHECK_CUDA(cuda()->get_current(&before));
        CHECK_OK(vmm_device_open("cuda:0", &device));
        CHECK_OK(vmm_device_query(device, &info));
        vmm_device_close(device);
        CHECK_CUDA(cuda()->get_current(&after));
        CHECK(before == after);
    }
}

/* So is the thread's capture mode, which calls change for themselves: by success and failure. */
static void test_capture_mode(const fixture *f) {
    static const int64_t shape[] = {0, 4};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_INT8, .capacity = 1000};
    vmm_tensor *tensor;
    vmm_device *device;

    if (!f->is_gpu)
        return;
    for (int mode = 0; mode < 3; mode++) {
        int before = mode, after;
        CHECK_CUDA(cuda()->exchange_capture_mode(&before));
        CHECK_OK(vmm_device_open(f->name, &device));
        CHECK_STATUS(vmm_device_open(is_hip ? "hip:63" : "cuda:63", &device), VMM_ERR_NO_DEVICE);
        CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
        CHECK_OK(vmm_grow(tensor, 1, NULL));
        CHECK_OK(vmm_close(tensor));
        CHECK_OK(vmm_pool_trim(f->pool, 1));
        spec.capacity = SIZE_MAX / 64;
        CHECK_STATUS(vmm_reserve(f->pool, &spec, &tensor), VMM_ERR_DRIVER);
        spec.capacity = 1000;
        vmm_device_close(f->device);
        after = before;
        CHECK_CUDA(cuda()->exchange_capture_mode(&after));
        CHECK(after == mode);
    }
}

int main(int argc, char **argv) {
    CHECK(in_child(without_driver) == 0);
    CHECK(in_child(with_another_library) == 0);
    CHECK(in_child(under_address_limit) == 0);

    fixture f = fixture_open(argc, argv, 0, 0);
    test_names();
    test_counting(&f);
    test_not_there(&f);
    test_context(&f);
    test_capture_mode(&f);
    fixture_close(&f);
    return 0;
}
