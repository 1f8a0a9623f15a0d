/* Bad arguments: each gets its status, before any driver call, and changes nothing. */
#include "check.h"

static const int64_t shape[] = {2, 0, 3, 8}; /* float32: a row of 192 bytes */

static vmm_spec good_spec(void) {
    return (vmm_spec){.ndim = 4, .shape = shape, .axis = 1, .dtype = VMM_FLOAT32, .capacity = 1000};
}

static void test_reserve(const fixture *f) {
    const int64_t zero[] = {2, 0, 0, 8}, negative[] = {-2, 0, 3, 8}, lone[] = {0};
    const int64_t huge[] = {INT64_MAX, 0, 3, 8}, product[] = {1 << 30, 0, 1 << 30, 1 << 30};
    const int64_t nine[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
    uint64_t calls = pool_calls(f->pool);
    long seen = simulated_calls(f);
    vmm_tensor *tensor = (vmm_tensor *)&calls;
    vmm_spec spec = good_spec();

#define REFUSED(field, value, expected)                                                            \
    do {                                                                                           \
        vmm_spec bad = good_spec();                                                                \
        bad.field = (value);                                                                       \
        tensor = (vmm_tensor *)&calls;                                                             \
        CHECK_STATUS(vmm_reserve(f->pool, &bad, &tensor), expected);                               \
        CHECK(!tensor || tensor == (vmm_tensor *)&calls);                                          \
    } while (0)

    CHECK_STATUS(vmm_reserve(NULL, &spec, &tensor), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_reserve(f->pool, NULL, &tensor), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_reserve(f->pool, &spec, NULL), VMM_ERR_INVALID);
    REFUSED(ndim, 0, VMM_ERR_INVALID);
    REFUSED(ndim, -1, VMM_ERR_INVALID);
    REFUSED(ndim, VMM_MAX_NDIM + 1, VMM_ERR_INVALID);
    REFUSED(shape, NULL, VMM_ERR_INVALID);
    REFUSED(shape, zero, VMM_ERR_INVALID);
    REFUSED(shape, negative, VMM_ERR_INVALID);
    REFUSED(shape, huge, VMM_ERR_OVERFLOW);
    REFUSED(shape, product, VMM_ERR_OVERFLOW);
    REFUSED(axis, -1, VMM_ERR_INVALID);
    REFUSED(axis, 4, VMM_ERR_INVALID);
    REFUSED(capacity, 0, VMM_ERR_INVALID);
    REFUSED(capacity, SIZE_MAX, VMM_ERR_OVERFLOW);
    REFUSED(capacity, SIZE_MAX / 192, VMM_ERR_OVERFLOW);
    REFUSED(layout, (vmm_layout)3, VMM_ERR_INVALID);
    REFUSED(layout, (vmm_layout)-1, VMM_ERR_INVALID);
    REFUSED(block_bytes, f->granularity_bytes - 1, VMM_ERR_INVALID);
    REFUSED(block_bytes, f->granularity_bytes + 1, VMM_ERR_INVALID);
    REFUSED(block_bytes, f->granularity_bytes / 2, VMM_ERR_INVALID);
    REFUSED(block_bytes, SIZE_MAX - 1, VMM_ERR_INVALID);
    REFUSED(dtype, ((vmm_dtype){2, 0, 1}), VMM_ERR_INVALID);
    REFUSED(dtype, ((vmm_dtype){2, 12, 1}), VMM_ERR_INVALID);
    REFUSED(dtype, ((vmm_dtype){2, 32, 0}), VMM_ERR_INVALID);
    REFUSED(dtype, ((vmm_dtype){2, 32, 2}), VMM_ERR_INVALID);
#undef REFUSED
    {
        vmm_spec bad = {.ndim = 9, .shape = nine, .dtype = VMM_INT8, .capacity = 1};
        CHECK_STATUS(vmm_reserve(f->pool, &bad, &tensor), VMM_ERR_INVALID);
    }
    CHECK(pool_calls(f->pool) == calls && simulated_calls(f) == seen);

    /* A range that the driver refuses: the address space has 2^47 bytes or so. */
    {
        vmm_spec large = {
            .ndim = 1, .shape = lone, .dtype = VMM_UINT8, .capacity = (size_t)1 << 62};
        vmm_status status = vmm_reserve(f->pool, &large, &tensor);
        CHECK(status == VMM_ERR_DRIVER || status == VMM_ERR_OUT_OF_MEMORY ||
              status == VMM_ERR_OVERFLOW);
        CHECK(vmm_last_error()->message[0]);
    }
    CHECK_SIZE(held_bytes(f->pool), 0);
}

static void test_pool(const fixture *f) {
    vmm_pool *pool = NULL;

    CHECK_STATUS(vmm_pool_create(NULL, 0, 0, &pool), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pool_create(f->device, 0, 0, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pool_create(f->device, f->granularity_bytes + 1, 0, &pool), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pool_create(f->device, 4 * f->granularity_bytes, f->granularity_bytes, &pool),
                 VMM_ERR_INVALID);
    CHECK(!pool);
    CHECK_STATUS(vmm_pool_trim(NULL, 0), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pool_close(NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pool_capture_begin(NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pool_capture_end(f->pool), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pool_on_oom(f->pool, NULL, &pool), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pool_statistics(f->pool, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_device_query(NULL, NULL), VMM_ERR_INVALID);
    vmm_pool_release(NULL);
    vmm_release(NULL);
    vmm_unpin(NULL);
    vmm_event_close(NULL);
    vmm_device_close(NULL);
}

static void test_tensor(const fixture *f) {
    vmm_spec spec = good_spec();
    model m = model_open(f, &spec);
    uint8_t data[2 * 3 * 8 * 4 * 4 + 64] = {0};
    int64_t four[] = {2, 4, 3, 8}, other[] = {2, 4, 3, 9}, fewer[] = {2, 4, 3};
    int64_t negative[] = {2, -1, 3, 8}, too_many[] = {2, 1001, 3, 8};
    int64_t overflow[] = {2, INT64_MAX, 3, 8};
    int64_t strided[] = {384, 96, 32, 8}, zero_last[] = {384, 96, 32, 0};
    vmm_array good = {.data = data, .dtype = VMM_FLOAT32, .ndim = 4, .shape = four};
    vmm_tensor *fork = NULL;
    vmm_pin *pin = NULL;
    vmm_event *event = NULL;

    model_append(&m, VMM_FLOAT32, 5, VMM_MEMORY_HOST, NULL);
    synchronize(f);
    uint64_t calls = pool_calls(f->pool);
    long seen = simulated_calls(f);
    size_t mapped = vmm_mapped(m.tensor);

#define REFUSED(field, value, expected)                                                            \
    do {                                                                                           \
        vmm_array bad = good;                                                                      \
        bad.field = (value);                                                                       \
        CHECK_STATUS(vmm_append(m.tensor, &bad, NULL), expected);                                  \
        CHECK_SIZE(vmm_length(m.tensor), 5);                                                       \
    } while (0)

    CHECK_STATUS(vmm_append(NULL, &good, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_append(m.tensor, NULL, NULL), VMM_ERR_INVALID);
    REFUSED(data, NULL, VMM_ERR_INVALID);
    REFUSED(shape, NULL, VMM_ERR_INVALID);
    REFUSED(ndim, 3, VMM_ERR_SHAPE);
    REFUSED(ndim, 0, VMM_ERR_SHAPE);
    REFUSED(ndim, 9, VMM_ERR_SHAPE);
    REFUSED(dtype, VMM_INT32, VMM_ERR_DTYPE);
    REFUSED(dtype, VMM_FLOAT64, VMM_ERR_DTYPE);
    REFUSED(dtype, ((vmm_dtype){2, 32, 4}), VMM_ERR_DTYPE);
    REFUSED(shape, other, VMM_ERR_SHAPE);
    REFUSED(shape, negative, VMM_ERR_SHAPE);
    REFUSED(shape, too_many, VMM_ERR_CAPACITY);
    REFUSED(shape, overflow, VMM_ERR_CAPACITY);
    REFUSED(strides, strided, VMM_ERR_INVALID);
    REFUSED(strides, zero_last, VMM_ERR_INVALID);
    REFUSED(memory, (vmm_memory)7, VMM_ERR_INVALID);
    {
        vmm_array bad = good;
        bad.ndim = 3, bad.shape = fewer;
        CHECK_STATUS(vmm_append(m.tensor, &bad, NULL), VMM_ERR_SHAPE);
        bad = good;
        bad.memory = VMM_MEMORY_DEVICE, bad.device_index = f->is_gpu ? 63 : 0;
        CHECK_STATUS(vmm_append(m.tensor, &bad, NULL), VMM_ERR_INVALID);
    }
#undef REFUSED

    CHECK_STATUS(vmm_map(NULL, 1), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_map(m.tensor, 1001), VMM_ERR_CAPACITY);
    CHECK_STATUS(vmm_map(m.tensor, SIZE_MAX), VMM_ERR_CAPACITY);
    CHECK_STATUS(vmm_grow(NULL, 1, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_grow(m.tensor, 996, NULL), VMM_ERR_CAPACITY);
    CHECK_STATUS(vmm_grow(m.tensor, SIZE_MAX, NULL), VMM_ERR_CAPACITY);
    CHECK_STATUS(vmm_grow(m.tensor, SIZE_MAX - 4, NULL), VMM_ERR_CAPACITY);
    CHECK_STATUS(vmm_truncate(NULL, 0, VMM_STREAM_NONE), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_truncate(m.tensor, 6, VMM_STREAM_NONE), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_truncate(m.tensor, SIZE_MAX, VMM_STREAM_NONE), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_trim(NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_fork(NULL, 0, &fork), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_fork(m.tensor, 6, &fork), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_fork(m.tensor, 1, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pin_rows(NULL, 0, &pin), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pin_rows(m.tensor, 6, &pin), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_pin_rows(m.tensor, 1, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_handoff(NULL, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_stream_wait(NULL, NULL, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_event_record(NULL, NULL, &event), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_event_record(f->device, NULL, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_stats(NULL, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_stats(m.tensor, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_close(NULL), VMM_ERR_INVALID);
    CHECK(!fork && !pin && !event);
    CHECK_SIZE(vmm_pin_count(m.tensor), 0);
    CHECK_SIZE(vmm_mapped(m.tensor), mapped);
    CHECK(pool_calls(f->pool) == calls && simulated_calls(f) == seen);
    model_check(&m);

    /* An append of no rows needs no data; nor does a grow of none change anything. */
    {
        int64_t none[] = {2, 0, 3, 8};
        vmm_array empty = {.dtype = VMM_FLOAT32, .ndim = 4, .shape = none};
        CHECK_OK(vmm_append(m.tensor, &empty, NULL));
        CHECK_OK(vmm_grow(m.tensor, 0, NULL));
        CHECK_OK(vmm_map(m.tensor, 0));
        CHECK(pool_calls(f->pool) == calls);
    }
    model_append(&m, VMM_FLOAT32, 995, VMM_MEMORY_HOST, NULL); /* to the last row */
    CHECK_STATUS(vmm_grow(m.tensor, 1, NULL), VMM_ERR_CAPACITY);
    model_check(&m);
    CHECK_STATUS(vmm_pool_close(f->pool), VMM_ERR_BUSY);
    model_close(&m);
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    if (f.is_gpu)
        cuda(); /* loading it makes calls of its own */
    test_pool(&f);
    test_reserve(&f);
    test_tensor(&f);
    fixture_close(&f);
    return 0;
}
