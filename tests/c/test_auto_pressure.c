/* Blocks of "auto" where memory is short: as small as growth needs, so that tensors that grow side
 * by side fill a budget, or the device, to the last granule (invariants 3 and 8). */
#include "check.h"

#define ROW_BYTES 1024
#define MOST 8 /* tensors */

static int64_t shape[] = {1, 0, ROW_BYTES}; /* uint8 */
static size_t granule, rows;                /* of a granule */

static vmm_spec make_spec(size_t n_lanes, size_t block_bytes) {
    shape[0] = (int64_t)n_lanes;
    return (vmm_spec){.ndim = 3,
                      .shape = shape,
                      .axis = 1,
                      .dtype = VMM_UINT8,
                      .capacity = 1024 * rows,
                      .layout = VMM_LAYOUT_LANE,
                      .block_bytes = block_bytes};
}

static fixture with_budget(const fixture *f, size_t n_granules) {
    fixture own = *f;
    CHECK_OK(vmm_pool_create(f->device, 0, n_granules * granule, &own.pool));
    return own;
}

static void open_models(const fixture *f, size_t n, size_t n_lanes, model *out) {
    vmm_spec spec = make_spec(n_lanes, VMM_BLOCK_AUTO);
    for (size_t i = 0; i < n; i++)
        out[i] = model_open(f, &spec);
}

static void close_models(size_t n, model *models) {
    for (size_t i = 0; i < n; i++)
        model_close(&models[i]);
}

static vmm_tensor_stats stats_of(const model *m) {
    vmm_tensor_stats stats;
    CHECK_OK(vmm_stats(m->tensor, &stats));
    return stats;
}

/* Append rows from the host to all at once, which grow by `n` rows or not at all. */
static vmm_status append_to_all(size_t n_tensors, model *models, size_t n) {
    int64_t source_shape[] = {shape[0], (int64_t)n, ROW_BYTES};
    vmm_tensor *tensors[MOST];
    vmm_array sources[MOST];
    uint8_t *bytes = make_rows(models[0].tensor, last_number + 1, n);
    for (size_t i = 0; i < n_tensors; i++) {
        tensors[i] = models[i].tensor;
        sources[i] =
            (vmm_array){.data = bytes, .dtype = VMM_UINT8, .ndim = 3, .shape = source_shape};
    }
    vmm_status status = vmm_append_many(n_tensors, tensors, sources, NULL);
    for (size_t i = 0; i < n_tensors && !status; i++)
        model_extend(&models[i], last_number + 1, n);
    last_number += (uint32_t)n;
    free(bytes);
    return status;
}

/* Nothing of what is there has changed, nor of the books. */
static void check_refused(const fixture *f, size_t n_tensors, model *models, size_t n_rows) {
    vmm_tensor_stats before[MOST];
    size_t in_use = pool_stats(f->pool).in_use_bytes;
    for (size_t i = 0; i < n_tensors; i++)
        before[i] = stats_of(&models[i]);
    CHECK_STATUS(append_to_all(n_tensors, models, n_rows), VMM_ERR_OUT_OF_MEMORY);
    CHECK_SIZE(pool_stats(f->pool).in_use_bytes, in_use);
    for (size_t i = 0; i < n_tensors; i++) {
        vmm_tensor_stats now = stats_of(&models[i]);
        CHECK_SIZE(now.mapped_bytes, before[i].mapped_bytes);
        CHECK_SIZE(now.block_count, before[i].block_count);
        CHECK_SIZE(vmm_length(models[i].tensor), models[i].length);
        model_check(&models[i]);
    }
}

/* Lanes and tensors that grow together end with the same, and nothing is left over. In a second
 * round what the first had is the pool's. */
static void test_together(const fixture *f, size_t n_tensors, size_t n_lanes, size_t step) {
    size_t each = 45; /* granules: no sum of "auto"'s blocks from the beginning of a lane */
    fixture tight = with_budget(f, each * n_tensors * n_lanes);
    for (int round = 0; round < 2; round++) {
        model models[MOST];
        open_models(&tight, n_tensors, n_lanes, models);
        while (models[0].length + step <= each * rows)
            CHECK_OK(append_to_all(n_tensors, models, step));
        if (models[0].length < each * rows)
            CHECK_OK(append_to_all(n_tensors, models, each * rows - models[0].length));
        CHECK_SIZE(pool_stats(tight.pool).in_use_bytes, each * n_tensors * n_lanes * granule);
        check_refused(&tight, n_tensors, models, 1);
        close_models(n_tensors, models);
    }
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* One call that needs all there is, from nothing: the first lanes must leave the last its part. */
static void test_at_once(const fixture *f, size_t n_tensors, size_t n_lanes) {
    size_t each = 45;
    fixture tight = with_budget(f, each * n_tensors * n_lanes);
    model models[MOST];
    open_models(&tight, n_tensors, n_lanes, models);
    check_refused(&tight, n_tensors, models, each * rows + 1);
    CHECK_OK(append_to_all(n_tensors, models, each * rows));
    check_refused(&tight, n_tensors, models, 1);
    close_models(n_tensors, models);
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* Tensors that are mapped one after the other and then written, as the layers of a model are: what
 * the first have taken and the last need, trimming gives back, and then it goes round. */
static void test_in_turn(const fixture *f) {
    size_t each = 45;
    fixture tight = with_budget(f, each * MOST);
    model models[MOST];
    int shortages = 0;
    open_models(&tight, MOST, 1, models);
    for (size_t n = 1; n <= each; n++) {
        for (size_t i = 0; i < MOST; i++) {
            vmm_status status = vmm_map(models[i].tensor, n * rows);
            if (!status)
                continue;
            CHECK_STATUS(status, VMM_ERR_OUT_OF_MEMORY);
            CHECK(++shortages == 1);
            for (size_t k = 0; k < MOST; k++)
                CHECK_OK(vmm_trim(models[k].tensor));
            CHECK_OK(vmm_pool_trim(tight.pool, 1)); /* or growth takes its own back as it is */
            i = SIZE_MAX;                           /* from the first on */
        }
        CHECK_OK(append_to_all(MOST, models, rows));
    }
    CHECK(shortages == 1);
    CHECK_SIZE(pool_stats(tight.pool).in_use_bytes, each * MOST * granule);
    check_refused(&tight, MOST, models, 1);
    close_models(MOST, models);
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* A block that a tensor has given up is no more of its own than it needs: another one that grows in
 * the same call has the rest, before it and behind it. */
static void test_own_spare(const fixture *f, size_t first) {
    fixture tight = with_budget(f, 28);
    vmm_spec spec = make_spec(1, VMM_BLOCK_AUTO);
    model m = model_open(&tight, &spec);
    vmm_tensor *other;
    CHECK_OK(append_to_all(1, &m, 24 * rows));
    CHECK_OK(vmm_map(m.tensor, 25 * rows)); /* a block of four */
    CHECK_SIZE(vmm_mapped(m.tensor), 28 * rows);
    CHECK_OK(vmm_trim(m.tensor));
    CHECK_OK(vmm_reserve(tight.pool, &spec, &other));
    int64_t shapes[2][3] = {{1, 1, ROW_BYTES}, {1, (int64_t)(3 * rows), ROW_BYTES}};
    uint8_t *bytes = make_rows(m.tensor, last_number + 1, 3 * rows);
    vmm_tensor *tensors[2];
    vmm_array sources[2];
    for (size_t i = 0; i < 2; i++) {
        size_t place = (first + i) % 2;
        tensors[place] = i ? other : m.tensor;
        sources[place] =
            (vmm_array){.data = bytes, .dtype = VMM_UINT8, .ndim = 3, .shape = shapes[i]};
    }
    CHECK_OK(vmm_append_many(2, tensors, sources, NULL));
    model_extend(&m, last_number + 1, 1);
    last_number += (uint32_t)(3 * rows);
    CHECK_SIZE(vmm_mapped(m.tensor), 25 * rows);
    CHECK_SIZE(vmm_mapped(other), 3 * rows);
    model_check(&m);
    free(bytes);
    CHECK_OK(vmm_close(other));
    model_close(&m);
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* The note on lanes is of the tensor that the error is of: the first that could not grow, though
 * with smaller blocks another one is. */
static void test_note(const fixture *f) {
    static const size_t n_lanes[] = {1, 2, 4};
    fixture tight = with_budget(f, 29);
    int64_t shapes[3][3];
    uint8_t *bytes = calloc(4, ROW_BYTES);
    vmm_tensor *tensors[3];
    vmm_array sources[3];
    for (size_t i = 0; i < 3; i++) {
        vmm_spec spec = make_spec(n_lanes[i], VMM_BLOCK_AUTO);
        CHECK_OK(vmm_reserve(tight.pool, &spec, &tensors[i]));
        memcpy(shapes[i], shape, sizeof shape);
        shapes[i][1] = 1;
        sources[i] = (vmm_array){.data = bytes, .dtype = VMM_UINT8, .ndim = 3, .shape = shapes[i]};
    }
    CHECK_OK(vmm_grow(tensors[0], 24 * rows, NULL)); /* the next block is one of four */
    CHECK_STATUS(vmm_append_many(3, tensors, sources, NULL), VMM_ERR_OUT_OF_MEMORY);
    if (!strstr(vmm_last_error()->message, "with 2 lanes"))
        FAIL("%s", vmm_last_error()->message);
    for (size_t i = 0; i < 3; i++)
        CHECK_OK(vmm_close(tensors[i]));
    free(bytes);
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* What one call has, calls one after the other do not: the first takes larger blocks than it needs
 * while there is memory, and trimming gives these back to be taken again. */
static void test_map_many(const fixture *f, size_t n_tensors, size_t n_lanes) {
    size_t each = 45, n_rows[MOST];
    fixture tight = with_budget(f, each * n_tensors * n_lanes);
    vmm_tensor *tensors[MOST];
    model models[MOST];
    vmm_status status;
    open_models(&tight, n_tensors, n_lanes, models);
    for (size_t i = 0; i < n_tensors; i++) {
        tensors[i] = models[i].tensor;
        n_rows[i] = each * rows;
    }
    for (int round = 0; round < 2; round++) {
        status = VMM_OK;
        for (size_t i = 0; i < n_tensors && !status; i++)
            status = vmm_map(tensors[i], n_rows[i]);
        CHECK_STATUS(status, VMM_ERR_OUT_OF_MEMORY);
        for (size_t i = 0; i < n_tensors; i++)
            CHECK_OK(vmm_trim(tensors[i]));
        CHECK_OK(vmm_pool_trim(tight.pool, 1));
    }
    CHECK_OK(vmm_map_many(n_tensors, tensors, n_rows));
    CHECK_SIZE(pool_stats(tight.pool).in_use_bytes, each * n_tensors * n_lanes * granule);
    n_rows[0]++;
    CHECK_STATUS(vmm_map_many(n_tensors, tensors, n_rows), VMM_ERR_OUT_OF_MEMORY);
    for (size_t i = 0; i < n_tensors; i++)
        CHECK_SIZE(vmm_mapped(tensors[i]), each * rows);
    CHECK_OK(append_to_all(n_tensors, models, each * rows));
    check_refused(&tight, n_tensors, models, 1);
    close_models(n_tensors, models);
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* When memory is there again, blocks are as large as before. */
static void test_large_again(const fixture *f) {
    size_t n_blocks[2];
    fixture tight = with_budget(f, 93);
    for (int round = 0; round < 2; round++) {
        model m;
        open_models(&tight, 1, 1, &m);
        CHECK_OK(append_to_all(1, &m, 64 * rows));
        n_blocks[round] = stats_of(&m).block_count;
        for (size_t length = 64; length < 93; length++)
            CHECK_OK(append_to_all(1, &m, rows));
        check_refused(&tight, 1, &m, 1);
        CHECK(stats_of(&m).block_count <= n_blocks[round] + 29);
        close_models(1, &m);
        CHECK_OK(vmm_pool_trim(tight.pool, 1));
    }
    CHECK_SIZE(n_blocks[1], n_blocks[0]);
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* A block size that was asked for is what every block has. */
static void test_fixed(const fixture *f) {
    fixture tight = with_budget(f, 10);
    vmm_spec spec = make_spec(2, 4 * granule);
    model m = model_open(&tight, &spec);
    CHECK_OK(append_to_all(1, &m, 4 * rows));
    check_refused(&tight, 1, &m, 1);
    CHECK_SIZE(stats_of(&m).block_count, 2);
    model_close(&m);
    CHECK_OK(vmm_pool_close(tight.pool));
}

typedef struct victims {
    vmm_tensor *tensors[2];
    size_t n, calls, needed_bytes;
} victims;

static int close_one(void *user, size_t needed_bytes) {
    victims *victims = user;
    victims->calls++;
    victims->needed_bytes = needed_bytes;
    if (victims->n == 0)
        return 0;
    CHECK_OK(vmm_close(victims->tensors[--victims->n]));
    return 1;
}

/* Callbacks come after smaller blocks, are told what all tensors lack, and are asked as long as
 * each time more of the tensors can have what they need. */
static void test_callbacks(const fixture *f) {
    fixture tight = with_budget(f, 28);
    victims victims = {.n = 2};
    vmm_spec spec = make_spec(1, VMM_BLOCK_AUTO);
    for (int i = 0; i < 2; i++) {
        CHECK_OK(vmm_reserve(tight.pool, &spec, &victims.tensors[i]));
        CHECK_OK(vmm_grow(victims.tensors[i], 4 * rows, NULL));
    }
    CHECK_OK(vmm_pool_on_oom(tight.pool, close_one, &victims));
    model models[2];
    open_models(&tight, 2, 1, models);
    for (int i = 0; i < 10; i++) /* to the 28th granule */
        CHECK_OK(append_to_all(2, models, rows));
    CHECK_SIZE(victims.calls, 0);
    CHECK_OK(append_to_all(2, models, 4 * rows));
    CHECK_SIZE(victims.calls, 2);
    CHECK_SIZE(victims.needed_bytes, 8 * granule);
    check_refused(&tight, 2, models, 1);
    CHECK_SIZE(victims.calls, 3);
    close_models(2, models);
    CHECK_OK(vmm_pool_close(tight.pool));
}

/* The same where the device has no more: without a budget, and with few calls that are refused. */
static void test_device(const fixture *f) {
    model models[MOST];
    vmm_status status = VMM_OK;
    fixture own = with_budget(f, 0);
    open_models(&own, MOST, 1, models);
    while (!status)
        status = append_to_all(MOST, models, rows / 2);
    CHECK_STATUS(status, VMM_ERR_OUT_OF_MEMORY);
    CHECK(vmm_last_error()->driver_code != 0);
    vmm_device_info info;
    size_t n_blocks = 0;
    CHECK_OK(vmm_device_query(f->device, &info));
    for (size_t i = 0; i < MOST; i++) {
        CHECK_SIZE(vmm_mapped(models[i].tensor), models[0].length);
        n_blocks += stats_of(&models[i]).block_count;
        model_check(&models[i]);
    }
    if (f->is_gpu)
        CHECK(info.free_bytes < MOST * granule);
    uint64_t created = pool_stats(own.pool).driver_calls[VMM_CALL_create];
    if (created > n_blocks + 4 * MOST)
        FAIL("%zu blocks were asked for, for %zu that there are", (size_t)created, n_blocks);
    close_models(MOST, models);
    CHECK_OK(vmm_pool_close(own.pool));
}

int main(int argc, char **argv) {
    setenv("VMM_SIM_GRANULARITY", "65536", 1); /* before the driver is loaded */
    setenv("VMM_SIM_MEMORY", "33554432", 1);
    fixture f = fixture_open(argc, argv, 0, 0);

    granule = f.granularity_bytes;
    rows = granule / ROW_BYTES;
    /* A GPU's own granules are large and slow to fill: once through will do. */
    size_t most = granule > (1 << 20) ? 1 : 3;
    for (size_t n_tensors = 1; n_tensors <= most; n_tensors++)
        for (size_t n_lanes = 1; n_lanes <= 3; n_lanes += 2) {
            test_together(&f, n_tensors, n_lanes, rows / 2);
            test_together(&f, n_tensors, n_lanes, 5 * rows + 1);
            test_at_once(&f, n_tensors, n_lanes);
        }
    test_in_turn(&f);
    test_own_spare(&f, 0);
    test_own_spare(&f, 1);
    test_note(&f);
    test_map_many(&f, 2, 1);
    test_map_many(&f, 3, 2);
    test_large_again(&f);
    test_fixed(&f);
    test_callbacks(&f);
    if (f.is_gpu && dlsym(cuda_library(), "vmm_sim_version"))
        test_device(&f);
    fixture_close(&f);
    return 0;
}
