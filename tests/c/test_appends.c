/* 100 000 appends of one row and 1 000 of 1 to 300 rows, in every layout: the address stays,
 * the contents are right, the slack is within its bound, and within mapped rows there is no
 * driver call but the copy itself (invariants 1, 4 and 9). */
#include "check.h"

#define N_SINGLE 100000
#define N_MANY 1000

static const int64_t shape[] = {2, 0, 3, 4}; /* float16: a row of 48 bytes */
static const size_t row_bytes = 48;

static size_t slack_bound(const fixture *f, const vmm_tensor *t) {
    size_t used = vmm_length(t) * vmm_row_bytes(t) / vmm_lane_count(t);

    return (used / 8 + f->granularity_bytes) * vmm_lane_count(t);
}

/* What an append may cost in driver calls while its rows are mapped. */
static void check_cost(const vmm_tensor_stats *before, const vmm_tensor_stats *after,
                       vmm_memory memory, bool is_gpu) {
    uint64_t delta[VMM_CALL_COUNT], sum = 0;

    for (int i = 0; i < VMM_CALL_COUNT; i++) {
        delta[i] = after->driver_calls[i] - before->driver_calls[i];
        sum += delta[i];
    }
    if (!is_gpu) {
        CHECK(delta[VMM_CALL_launch] + delta[VMM_CALL_copy] == sum && sum <= 1);
    } else if (memory == VMM_MEMORY_DEVICE) {
        CHECK(delta[VMM_CALL_launch] == 1 && sum == 1);
    } else { /* the copy, the wait for it, and whether the stream is being captured */
        CHECK(delta[VMM_CALL_copy] == 1 && delta[VMM_CALL_stream_synchronize] == 1);
        CHECK(delta[VMM_CALL_stream_capture] == 1 && sum == 3);
    }
}

static void run(const fixture *f, vmm_layout layout, vmm_memory memory) {
    size_t capacity = N_SINGLE + N_MANY * 300;
    vmm_spec spec = {.ndim = 4,
                     .shape = shape,
                     .axis = 1,
                     .dtype = VMM_FLOAT16,
                     .capacity = capacity,
                     .layout = layout,
                     .block_bytes = VMM_BLOCK_AUTO};
    model m = model_open(f, &spec);
    uint64_t seed = 7;
    size_t n_within = 0, source_rows = 4096;
    int64_t source_shape[VMM_MAX_NDIM];
    uint8_t *rows = make_rows(m.tensor, 1, source_rows); /* pre-made: 1-row sources are dense */
    vmm_array source = {.memory = memory, .dtype = VMM_FLOAT16, .ndim = 4, .shape = source_shape};
    uint8_t *single = malloc(source_rows * row_bytes), *memory_at;

    CHECK(single);
    CHECK_SIZE(vmm_row_bytes(m.tensor), row_bytes);
    for (size_t r = 0; r < source_rows; r++) {
        uint8_t *row = make_rows(m.tensor, 1 + (uint32_t)r, 1);
        memcpy(single + r * row_bytes, row, row_bytes);
        free(row);
    }
    memory_at = single;
    if (memory == VMM_MEMORY_DEVICE) {
        memory_at = device_alloc(f, source_rows * row_bytes);
        write_device(f, memory_at, single, source_rows * row_bytes);
    }

    rows_shape(m.tensor, 1, source_shape);
    for (size_t i = 0; i < N_SINGLE; i++) {
        bool within = vmm_mapped(m.tensor) > m.length;
        vmm_tensor_stats before, after;

        CHECK_OK(vmm_stats(m.tensor, &before));
        source.data = memory_at + (i % source_rows) * row_bytes;
        CHECK_OK(vmm_append(m.tensor, &source, NULL));
        CHECK_OK(vmm_stats(m.tensor, &after));
        if (within)
            check_cost(&before, &after, memory, f->is_gpu);
        n_within += within;
        model_extend(&m, 1 + (uint32_t)(i % source_rows), 1);
        CHECK(vmm_base(m.tensor) == m.base && vmm_length(m.tensor) == m.length);
        CHECK(vmm_length(m.tensor) <= vmm_mapped(m.tensor));
        if (after.slack_bytes > slack_bound(f, m.tensor))
            FAIL("slack %zu after %zu rows, more than %zu", after.slack_bytes, m.length,
                 slack_bound(f, m.tensor));
    }
    CHECK(n_within > N_SINGLE / 2);
    synchronize(f);
    last_number = (uint32_t)source_rows;
    for (size_t i = 0; i < N_MANY; i++) {
        size_t n = 1 + random_below(&seed, 300);
        vmm_tensor_stats stats;

        model_append(&m, VMM_FLOAT16, n, memory, NULL);
        CHECK(vmm_base(m.tensor) == m.base && vmm_length(m.tensor) == m.length);
        CHECK_OK(vmm_stats(m.tensor, &stats));
        CHECK(stats.slack_bytes <= slack_bound(f, m.tensor));
    }
    model_check(&m);
    if (memory_at != single)
        device_free(f, memory_at);
    free(single);
    free(rows);
    model_close(&m);
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    for (int layout = VMM_LAYOUT_SEQ; layout <= VMM_LAYOUT_C; layout++)
        run(&f, (vmm_layout)layout, f.is_gpu ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST);
    if (f.is_gpu)
        run(&f, VMM_LAYOUT_SEQ, VMM_MEMORY_HOST);
    fixture_close(&f);
    return 0;
}
