/* Errors say what was wrong: names and texts of every status, the thread's last error, and
 * a device that is not there. */
#include "check.h"

#include <pthread.h>

static const int64_t shape[] = {0, 4};

static void check_message(const char *part) {
    if (!strstr(vmm_last_error()->message, part))
        FAIL("'%s' is not in '%s'", part, vmm_last_error()->message);
}

static void test_texts(void) {
    for (int i = 0; i <= VMM_ERR_DRIVER; i++) {
        CHECK(strncmp(vmm_status_name((vmm_status)i), "VMM_", 4) == 0);
        CHECK(strlen(vmm_status_text((vmm_status)i)) > 5);
        for (int j = 0; j < i; j++)
            CHECK(strcmp(vmm_status_name((vmm_status)i), vmm_status_name((vmm_status)j)) != 0);
    }
    CHECK(strcmp(vmm_status_name(VMM_OK), "VMM_OK") == 0);
    CHECK(strcmp(vmm_status_name(VMM_ERR_CAPACITY), "VMM_ERR_CAPACITY") == 0);
    CHECK(vmm_status_name((vmm_status)1000) && vmm_status_text((vmm_status)-1));
    for (int i = 0; i < VMM_CALL_COUNT; i++)
        CHECK(vmm_call_name((vmm_call)i)[0]);
    CHECK(strcmp(vmm_call_name(VMM_CALL_map), "map") == 0);
    CHECK(!vmm_call_name(VMM_CALL_COUNT) && !vmm_call_name((vmm_call)-1));
    CHECK(vmm_version() == VMM_VERSION_MAJOR * 10000 + VMM_VERSION_MINOR * 100 + VMM_VERSION_PATCH);
}

static void *fail_elsewhere(void *user) {
    vmm_device *device;

    (void)user;
    CHECK(vmm_last_error()->status == VMM_OK); /* this thread has not failed yet */
    CHECK_STATUS(vmm_device_open("another", &device), VMM_ERR_INVALID);
    check_message("another");
    return NULL;
}

static void test_per_thread(const fixture *f) {
    pthread_t thread;
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_INT8, .capacity = 10};
    vmm_tensor *tensor;

    CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
    CHECK_STATUS(vmm_grow(tensor, 11, NULL), VMM_ERR_CAPACITY);
    CHECK(pthread_create(&thread, NULL, fail_elsewhere, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_OK(vmm_grow(tensor, 10, NULL));
    CHECK(vmm_last_error()->status == VMM_ERR_CAPACITY); /* a success leaves it */
    check_message("capacity of 10");
    CHECK(strcmp(vmm_last_error()->operation, "grow") == 0);
    CHECK(vmm_last_error()->driver_code == 0);
    CHECK_OK(vmm_close(tensor));
}

/* Messages name the offending value. */
static void test_messages(const fixture *f) {
    int64_t rows[] = {1, 5}, good[] = {1, 4}, strides[] = {8, 2};
    int8_t data[16] = {0};
    vmm_array source = {.data = data, .dtype = VMM_INT8, .ndim = 2, .shape = rows};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_INT8, .capacity = 10};
    vmm_tensor *tensor;
    vmm_device *device;
    vmm_pool *pool;

    CHECK_STATUS(vmm_device_open("gpu7", &device), VMM_ERR_INVALID);
    check_message("gpu7");
    check_message("cuda:N");
    CHECK_STATUS(vmm_pool_create(f->device, 12345, 0, &pool), VMM_ERR_INVALID);
    check_message("12345");
    check_message("granularity");
    spec.axis = 5;
    CHECK_STATUS(vmm_reserve(f->pool, &spec, &tensor), VMM_ERR_INVALID);
    check_message("axis 5");
    spec.axis = 0;
    CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
    CHECK_STATUS(vmm_append(tensor, &source, NULL), VMM_ERR_SHAPE);
    check_message("5");
    check_message("4");
    source.shape = good;
    source.strides = strides;
    CHECK_STATUS(vmm_append(tensor, &source, NULL), VMM_ERR_INVALID);
    check_message("dense");
    source.dtype = VMM_FLOAT16;
    CHECK_STATUS(vmm_append(tensor, &source, NULL), VMM_ERR_DTYPE);
    check_message("16 bits");
    source.dtype = VMM_INT8, source.strides = NULL;
    source.memory = VMM_MEMORY_DEVICE, source.device_index = 9;
    CHECK_STATUS(vmm_append(tensor, &source, NULL), VMM_ERR_INVALID);
    check_message(f->name);
    CHECK_OK(vmm_close(tensor));
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    test_texts();
    test_per_thread(&f);
    test_messages(&f);
    fixture_close(&f);
    return 0;
}
