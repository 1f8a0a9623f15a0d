/* vmm_append_many(), vmm_map_many(): several tensors at once, all or none; appended to in one launch. */
#include "check.h"

#define N_TENSORS 40 /* more than one launch holds */

static const int64_t shape[] = {2, 0, 4, 8};
static const int64_t wide_shape[] = {1, 2, 0, 1, 3, 1, 2, 2};

static vmm_spec make_spec(vmm_layout layout, size_t capacity) {
    return (vmm_spec){.ndim = 4,
                      .shape = shape,
                      .axis = 1,
                      .dtype = VMM_FLOAT16,
                      .capacity = capacity,
                      .layout = layout};
}

/* Append `n_rows[i]` rows to each of `n` models; what is expected is the caller's to say. */
static void append_many(const fixture *f, model *models, size_t n, const size_t *n_rows,
                        vmm_memory memory, vmm_status expected) {
    vmm_tensor *tensors[N_TENSORS];
    vmm_array sources[N_TENSORS];
    int64_t shapes[N_TENSORS][VMM_MAX_NDIM];
    uint8_t *rows[N_TENSORS];
    uint32_t first[N_TENSORS];

    for (size_t i = 0; i < n; i++) {
        size_t bytes = n_rows[i] * vmm_row_bytes(models[i].tensor);
        first[i] = last_number + 1;
        last_number += (uint32_t)n_rows[i];
        tensors[i] = models[i].tensor;
        rows[i] = make_rows(tensors[i], first[i], n_rows[i]);
        rows_shape(tensors[i], n_rows[i], shapes[i]);
        sources[i] = (vmm_array){.data = rows[i],
                                 .memory = memory,
                                 .dtype = VMM_FLOAT16,
                                 .ndim = vmm_ndim(tensors[i]),
                                 .shape = shapes[i]};
        if (memory == VMM_MEMORY_DEVICE) {
            sources[i].data = device_alloc(f, bytes);
            write_device(f, (void *)(uintptr_t)sources[i].data, rows[i], bytes);
        }
    }
    CHECK_STATUS(vmm_append_many(n, tensors, sources, NULL), expected);
    synchronize(f);
    for (size_t i = 0; i < n; i++) {
        if (memory == VMM_MEMORY_DEVICE)
            device_free(f, (void *)(uintptr_t)sources[i].data);
        free(rows[i]);
        if (expected == VMM_OK)
            model_extend(&models[i], first[i], n_rows[i]);
    }
}

static void test_all_or_none(const fixture *f, vmm_layout layout) {
    vmm_memory memory = f->is_gpu ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST;
    vmm_spec spec = make_spec(layout, 500), small = make_spec(layout, 20);
    model models[3] = {model_open(f, &spec), model_open(f, &small), model_open(f, &spec)};
    const size_t fits[] = {7, 15, 0}, too_many[] = {3, 6, 2}, none[] = {0, 0, 0};
    size_t mapped[3];
    vmm_tensor_stats before, after;
    vmm_pool_stats pool_before, pool_after;

    append_many(f, models, 3, fits, memory, VMM_OK);
    for (int i = 0; i < 3; i++) {
        model_check(&models[i]);
        mapped[i] = vmm_mapped(models[i].tensor);
    }
    append_many(f, models, 3, too_many, memory, VMM_ERR_CAPACITY); /* 15 + 6 > 20 */
    for (int i = 0; i < 3; i++) {
        model_check(&models[i]);
        CHECK_SIZE(vmm_mapped(models[i].tensor), mapped[i]);
    }
    append_many(f, models, 3, none, memory, VMM_OK);
    CHECK_OK(vmm_append_many(0, NULL, NULL, NULL));

    /* Within mapped rows: one launch for all of them. */
    CHECK_OK(vmm_map(models[2].tensor, 10));
    const size_t one[] = {1, 1, 1};
    CHECK_OK(vmm_pool_statistics(f->pool, &pool_before));
    append_many(f, models, 3, one, memory, VMM_OK);
    CHECK_OK(vmm_pool_statistics(f->pool, &pool_after));
    if (f->is_gpu) {
        CHECK(pool_after.driver_calls[VMM_CALL_launch] -
                  pool_before.driver_calls[VMM_CALL_launch] ==
              1);
        for (int call = 0; call < VMM_CALL_COUNT; call++)
            CHECK(call == VMM_CALL_launch ||
                  pool_after.driver_calls[call] == pool_before.driver_calls[call]);
    }

    /* A bad source among good ones, and a tensor named twice. */
    for (int bad = 0; bad < 3; bad++) {
        vmm_tensor *tensors[3];
        vmm_array sources[3];
        int64_t shapes[3][VMM_MAX_NDIM];
        uint8_t *rows = make_rows(models[0].tensor, 1, 1);
        for (int i = 0; i < 3; i++) {
            tensors[i] = models[i].tensor;
            rows_shape(tensors[i], 1, shapes[i]);
            sources[i] =
                (vmm_array){.data = rows, .dtype = VMM_FLOAT16, .ndim = 4, .shape = shapes[i]};
        }
        CHECK_OK(vmm_stats(models[0].tensor, &before));
        sources[bad].dtype = VMM_BFLOAT16;
        CHECK_STATUS(vmm_append_many(3, tensors, sources, NULL), VMM_ERR_DTYPE);
        sources[bad].dtype = VMM_FLOAT16;
        shapes[bad][3]++;
        CHECK_STATUS(vmm_append_many(3, tensors, sources, NULL), VMM_ERR_SHAPE);
        shapes[bad][3]--;
        tensors[bad] = tensors[(bad + 1) % 3];
        CHECK_STATUS(vmm_append_many(3, tensors, sources, NULL), VMM_ERR_INVALID);
        tensors[bad] = NULL;
        CHECK_STATUS(vmm_append_many(3, tensors, sources, NULL), VMM_ERR_INVALID);
        CHECK_OK(vmm_stats(models[0].tensor, &after));
        CHECK(memcmp(&before, &after, sizeof before) == 0);
        free(rows);
    }
    for (int i = 0; i < 3; i++) {
        model_check(&models[i]);
        model_close(&models[i]);
    }
}

/* The budget ends in the middle: what the first tensors had mapped is given back. */
static void test_out_of_memory(const fixture *f) {
    size_t block = f->granularity_bytes;
    fixture tight = *f;
    model models[3];
    size_t n_rows[3];

    CHECK_OK(vmm_pool_create(f->device, block, 4 * block, &tight.pool));
    for (int i = 0; i < 3; i++) {
        vmm_spec spec = make_spec(VMM_LAYOUT_SEQ, 8 * block / 128);
        models[i] = model_open(&tight, &spec);
        CHECK_SIZE(vmm_row_bytes(models[i].tensor), 128);
        n_rows[i] = 2 * block / 128;
    }
    append_many(&tight, models, 3, n_rows, f->is_gpu ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST,
                VMM_ERR_OUT_OF_MEMORY);
    for (int i = 0; i < 3; i++) {
        model_check(&models[i]);
        CHECK_SIZE(vmm_mapped(models[i].tensor), 0);
    }
    append_many(&tight, models, 2, n_rows, f->is_gpu ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST, VMM_OK);
    for (int i = 0; i < 3; i++) {
        model_check(&models[i]);
        model_close(&models[i]);
    }
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* A callback that runs while the second grows may touch neither. */
static int try_all(void *user, size_t needed_bytes) {
    model *models = user;

    (void)needed_bytes;
    for (int i = 0; i < 2; i++) {
        CHECK_STATUS(vmm_trim(models[i].tensor), VMM_ERR_BUSY);
        CHECK_STATUS(vmm_truncate(models[i].tensor, 0, VMM_STREAM_NONE), VMM_ERR_BUSY);
        CHECK_STATUS(vmm_close(models[i].tensor), VMM_ERR_BUSY);
    }
    return 0;
}

static void test_callback_leaves_them_alone(const fixture *f) {
    size_t block = f->granularity_bytes;
    fixture tight = *f;
    vmm_spec spec = make_spec(VMM_LAYOUT_SEQ, 8 * block / 128);
    vmm_memory memory = f->is_gpu ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST;
    model models[2];
    size_t n_rows[2] = {2 * block / 128, 2 * block / 128}, few[2] = {1, 1};
    vmm_tensor *fork, *other;

    CHECK_OK(vmm_pool_create(f->device, block, 3 * block, &tight.pool));
    for (int i = 0; i < 2; i++)
        models[i] = model_open(&tight, &spec);
    CHECK_OK(vmm_pool_on_oom(tight.pool, try_all, models));
    append_many(&tight, models, 2, n_rows, memory, VMM_ERR_OUT_OF_MEMORY);
    append_many(&tight, models, 2, few, memory, VMM_OK);
    append_many(&tight, models, 2, n_rows, memory, VMM_ERR_OUT_OF_MEMORY);
    for (int i = 0; i < 2; i++) {
        model_check(&models[i]);
        CHECK_OK(vmm_trim(models[i].tensor)); /* busy no more */
    }
    CHECK_OK(vmm_pool_on_oom(tight.pool, NULL, models));

    /* Nor may one touch what is being forked. */
    model source[2] = {models[0], models[0]};
    CHECK_OK(vmm_fork(models[0].tensor, 1, &fork));
    CHECK_OK(vmm_pool_on_oom(tight.pool, try_all, source));
    CHECK_STATUS(vmm_fork(models[0].tensor, 1, &other), VMM_ERR_OUT_OF_MEMORY);
    CHECK(!other);
    CHECK_OK(vmm_close(fork));
    for (int i = 0; i < 2; i++) {
        model_check(&models[i]);
        model_close(&models[i]);
    }
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* More tensors than a launch holds, and one of the highest rank. */
static void test_long_list(const fixture *f, vmm_memory memory) {
    model models[N_TENSORS];
    size_t n_rows[N_TENSORS];
    vmm_spec wide = {.ndim = 8,
                     .shape = wide_shape,
                     .axis = 2,
                     .dtype = VMM_FLOAT16,
                     .capacity = 100,
                     .layout = VMM_LAYOUT_SEQ};

    for (size_t i = 0; i < N_TENSORS; i++) {
        vmm_spec spec = make_spec(i % 2 ? VMM_LAYOUT_LANE : VMM_LAYOUT_SEQ, 100);
        models[i] = model_open(f, i == 5 ? &wide : &spec);
        n_rows[i] = i % 4;
    }
    for (int round = 0; round < 3; round++)
        append_many(f, models, N_TENSORS, n_rows, memory, VMM_OK);
    for (size_t i = 0; i < N_TENSORS; i++) {
        model_check(&models[i]);
        model_close(&models[i]);
    }
}

static vmm_status map_many(const model *models, size_t n, const size_t *n_rows) {
    vmm_tensor *tensors[N_TENSORS];
    for (size_t i = 0; i < n; i++)
        tensors[i] = models[i].tensor;
    return vmm_map_many(n, tensors, n_rows);
}

static void check_mapped(const model *models, size_t n, const size_t *mapped) {
    for (size_t i = 0; i < n; i++)
        CHECK_SIZE(vmm_mapped(models[i].tensor), mapped[i]);
}

/* What is refused leaves all as they are. */
static void test_map(const fixture *f, vmm_layout layout) {
    vmm_spec spec = make_spec(layout, 500), small = make_spec(layout, 20);
    model models[3] = {model_open(f, &spec), model_open(f, &small), model_open(f, &spec)};
    vmm_tensor *tensors[4];
    size_t none[3] = {0}, mapped[3];
    uint64_t calls[VMM_CALL_COUNT];

    for (int i = 0; i < 3; i++)
        tensors[i] = models[i].tensor;
    CHECK_OK(vmm_map_many(0, NULL, NULL));
    CHECK_OK(map_many(models, 3, none));
    check_mapped(models, 3, none);
    CHECK_STATUS(map_many(models, 3, (size_t[]){1, 21, 1}), VMM_ERR_CAPACITY);
    CHECK_STATUS(vmm_map_many(3, NULL, none), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_map_many(3, tensors, NULL), VMM_ERR_INVALID);
    tensors[3] = tensors[1];
    CHECK_STATUS(vmm_map_many(4, tensors, (size_t[]){1, 1, 1, 1}), VMM_ERR_INVALID);
    CHECK(strstr(vmm_last_error()->message, "twice in one map"));
    tensors[3] = NULL;
    CHECK_STATUS(vmm_map_many(4, tensors, (size_t[]){1, 1, 1, 1}), VMM_ERR_INVALID);
    check_mapped(models, 3, none);

    CHECK_OK(map_many(models, 3, (size_t[]){500, 20, 0}));
    CHECK_SIZE(vmm_mapped(tensors[0]), 500);
    CHECK_SIZE(vmm_mapped(tensors[1]), 20);
    CHECK_SIZE(vmm_mapped(tensors[2]), 0);
    CHECK_OK(map_many(models, 3, (size_t[]){0, 0, 5}));
    for (int i = 0; i < 3; i++) {
        CHECK_SIZE(vmm_length(tensors[i]), 0);
        mapped[i] = vmm_mapped(tensors[i]);
        CHECK(mapped[i] >= (i == 2 ? 5 : 20));
    }
    /* Within what is mapped: no driver call, and the rows can be written. */
    memcpy(calls, pool_stats(f->pool).driver_calls, sizeof calls);
    CHECK_OK(map_many(models, 3, (size_t[]){500, 20, 5}));
    CHECK(memcmp(calls, pool_stats(f->pool).driver_calls, sizeof calls) == 0);
    append_many(f, models, 3, (size_t[]){9, 20, 5}, f->is_gpu ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST,
                VMM_OK);
    check_mapped(models, 3, mapped);
    for (int i = 0; i < 3; i++) {
        model_check(&models[i]);
        model_close(&models[i]);
    }
}

/* The budget ends in the middle: nothing is kept, and callbacks may touch none of them. */
static void test_map_out_of_memory(const fixture *f) {
    size_t block = f->granularity_bytes, n_rows = 2 * block / 128;
    fixture tight = *f;
    model models[3];

    CHECK_OK(vmm_pool_create(f->device, block, 5 * block, &tight.pool));
    for (int i = 0; i < 3; i++) {
        vmm_spec spec = make_spec(VMM_LAYOUT_SEQ, 8 * block / 128);
        models[i] = model_open(&tight, &spec);
    }
    CHECK_OK(vmm_map(models[0].tensor, 1));
    CHECK_OK(vmm_pool_on_oom(tight.pool, try_all, models));
    CHECK_STATUS(map_many(models, 3, (size_t[]){n_rows, n_rows, n_rows}), VMM_ERR_OUT_OF_MEMORY);
    check_mapped(models, 3, (size_t[]){n_rows / 2, 0, 0});
    CHECK_SIZE(pool_stats(tight.pool).in_use_bytes, block);
    CHECK_OK(map_many(models, 3, (size_t[]){n_rows, n_rows / 2, n_rows}));
    check_mapped(models, 3, (size_t[]){n_rows, n_rows / 2, n_rows});
    for (int i = 0; i < 3; i++) {
        CHECK_OK(vmm_trim(models[i].tensor)); /* busy no more */
        model_close(&models[i]);
    }
    CHECK_OK(vmm_pool_close(tight.pool));
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    for (int layout = VMM_LAYOUT_SEQ; layout <= VMM_LAYOUT_C; layout++)
        test_all_or_none(&f, (vmm_layout)layout);
    for (int layout = VMM_LAYOUT_SEQ; layout <= VMM_LAYOUT_C; layout++)
        test_map(&f, (vmm_layout)layout);
    test_map_out_of_memory(&f);
    test_out_of_memory(&f);
    test_callback_leaves_them_alone(&f);
    test_long_list(&f, VMM_MEMORY_HOST);
    if (f.is_gpu)
        test_long_list(&f, VMM_MEMORY_DEVICE);
    fixture_close(&f);
    return 0;
}
