/* Lanes of different lengths: vmm_append_lanes(), vmm_truncate_lanes() and what every other
 * call makes of a tensor whose lanes differ, against a shadow of each lane. */
#include "check.h"

#define MAX_LANES 64
#define MAX_ROWS 400 /* of a capacity */

/* Each lane's rows by their numbers (check.h); a lane is an index of dimension 0, or all. */
typedef struct shadow {
    const fixture *fixture;
    vmm_tensor *tensor;
    vmm_dtype dtype;
    size_t n_lanes;
    size_t length[MAX_LANES];
    uint32_t numbers[MAX_LANES][MAX_ROWS];
} shadow;

static shadow shadow_open(const fixture *f, const vmm_spec *spec) {
    shadow s = {.fixture = f, .dtype = spec->dtype};
    CHECK(spec->capacity <= MAX_ROWS);
    CHECK_OK(vmm_reserve(f->pool, spec, &s.tensor));
    s.n_lanes = vmm_length_count(s.tensor);
    CHECK(s.n_lanes <= MAX_LANES);
    return s;
}

static size_t longest(const shadow *s) {
    size_t most = 0;
    for (size_t lane = 0; lane < s->n_lanes; lane++)
        most = s->length[lane] > most ? s->length[lane] : most;
    return most;
}

static bool is_ragged(const shadow *s) {
    for (size_t lane = 1; lane < s->n_lanes; lane++)
        if (s->length[lane] != s->length[0])
            return true;
    return false;
}

static void shadow_check_books(const shadow *s) {
    vmm_tensor_stats stats;
    size_t n_rows = 0;
    const size_t *lengths = vmm_lengths(s->tensor);
    CHECK_SIZE(vmm_length(s->tensor), longest(s));
    CHECK(!vmm_is_ragged(s->tensor) == !is_ragged(s));
    for (size_t lane = 0; lane < s->n_lanes; lane++) {
        CHECK_SIZE(lengths[lane], s->length[lane]);
        n_rows += s->length[lane];
    }
    CHECK(longest(s) <= vmm_mapped(s->tensor));
    CHECK_OK(vmm_stats(s->tensor, &stats));
    CHECK_SIZE(stats.used_bytes, n_rows * (vmm_row_bytes(s->tensor) / s->n_lanes));
    CHECK_SIZE(stats.slack_bytes, stats.mapped_bytes - stats.used_bytes);
}

/* The bytes of row `number` of one lane begin at byte lane * (row's bytes of a lane) of it. */
static void shadow_check(const shadow *s) {
    size_t pre, post, length = longest(s);
    shadow_check_books(s);
    uint8_t *rows = read_rows(s->fixture, s->tensor, 0, length); /* all of it can be read */
    row_pieces(s->tensor, &pre, &post);
    for (size_t p = 0; p < pre; p++) {
        size_t lane = p / (pre / s->n_lanes);
        for (size_t r = 0; r < s->length[lane]; r++)
            for (size_t i = 0; i < post && s->numbers[lane][r]; i++)
                if (rows[(p * length + r) * post + i] !=
                    row_byte(s->numbers[lane][r], p * post + i))
                    FAIL("lane %zu, row %zu of %zu, byte %zu is another", lane, r, s->length[lane],
                         p * post + i);
    }
    free(rows);
}

static void shadow_close(shadow *s) {
    shadow_check(s);
    CHECK_OK(vmm_close(s->tensor));
    CHECK_OK(vmm_pool_trim(s->fixture->pool, 1)); /* sources are allocated beside the pool */
}

/* One of its own, which is large. */
static shadow *shadow_new(const fixture *f, const vmm_spec *spec) {
    shadow *s = malloc(sizeof *s);
    CHECK(s);
    *s = shadow_open(f, spec);
    return s;
}

static void shadow_free(shadow *s) {
    shadow_close(s);
    free(s);
}

/* A source for the lanes of a list: index i of dimension 0 holds what lane lanes[i] is to
 * get, `n_rows` rows numbered from *first on; in memory that is given back by source_close(). */
typedef struct source {
    const fixture *fixture;
    vmm_array array;
    int64_t shape[VMM_MAX_NDIM], strides[VMM_MAX_NDIM];
    uint8_t *host;
    uint32_t first;
} source;

static void source_open(source *out, const shadow *s, size_t n_lanes, const size_t *lanes,
                        size_t n_rows, vmm_memory memory, bool is_strided) {
    size_t pre, post, row_bytes = vmm_row_bytes(s->tensor);
    size_t own_rows = is_strided ? n_rows + 1 : n_rows; /* one of each lane is left out */
    row_pieces(s->tensor, &pre, &post);
    bool is_sliced = s->n_lanes > 1;
    size_t pre_lane = pre / s->n_lanes, n_pre = is_sliced ? n_lanes * pre_lane : pre;
    size_t bytes = n_pre * own_rows * post;
    *out = (source){.fixture = s->fixture, .host = malloc(bytes + 1), .first = last_number + 1};
    CHECK(out->host);
    memset(out->host, 0xcd, bytes + 1);
    last_number += (uint32_t)n_rows;
    for (size_t p = 0; p < n_pre; p++) {
        size_t i = p / pre_lane, lane = is_sliced && lanes ? lanes[i] : i;
        size_t to = is_sliced ? lane * pre_lane + p % pre_lane : p;
        for (size_t r = 0; r < n_rows; r++)
            for (size_t b = 0; b < post; b++)
                out->host[(p * own_rows + r) * post + b] =
                    row_byte(out->first + (uint32_t)r, to * post + b);
    }
    out->array = (vmm_array){.data = out->host,
                             .memory = memory,
                             .dtype = s->dtype,
                             .ndim = vmm_ndim(s->tensor),
                             .shape = out->shape};
    rows_shape(s->tensor, own_rows, out->shape);
    if (is_sliced)
        out->shape[0] = (int64_t)n_lanes;
    if (is_strided) {
        int64_t stride = (int64_t)(row_bytes / pre / post * s->dtype.bits / 8);
        for (int d = out->array.ndim - 1; d >= 0; d--) {
            out->strides[d] = stride;
            stride *= out->shape[d];
        }
        out->array.strides = out->strides;
        out->shape[vmm_axis(s->tensor)] = (int64_t)n_rows;
    }
    if (memory == VMM_MEMORY_DEVICE) {
        out->array.data = device_alloc(s->fixture, bytes + 1);
        write_device(s->fixture, (void *)(uintptr_t)out->array.data, out->host, bytes);
    }
}

static void source_close(source *x) {
    if (x->array.memory == VMM_MEMORY_DEVICE) {
        synchronize(x->fixture);
        device_free(x->fixture, (void *)(uintptr_t)x->array.data);
    }
    free(x->host);
}

static void shadow_extend(shadow *s, const source *x, size_t n_lanes, const size_t *lanes,
                          const size_t *counts, size_t n_rows) {
    for (size_t i = 0; i < n_lanes; i++) {
        size_t lane = lanes ? lanes[i] : i, count = counts ? counts[i] : n_rows;
        for (size_t r = 0; r < count; r++)
            s->numbers[lane][s->length[lane]++] = x->first + (uint32_t)r;
    }
}

/* Append to lanes of `n` shadows of one device; what is expected is the caller's to say. */
static void append_lanes(shadow *shadows, size_t n, size_t n_lanes, const size_t *lanes,
                         const size_t *counts, size_t n_rows, vmm_memory memory, bool is_strided,
                         vmm_status expected) {
    source sources[160];
    vmm_array arrays[160];
    vmm_tensor *tensors[160];
    CHECK(n <= LENGTH_OF(sources));
    for (size_t k = 0; k < n; k++) {
        source_open(&sources[k], &shadows[k], n_lanes, lanes, n_rows, memory, is_strided);
        arrays[k] = sources[k].array;
        tensors[k] = shadows[k].tensor;
    }
    CHECK_STATUS(vmm_append_lanes(n, tensors, arrays, n_lanes, lanes, counts, NULL), expected);
    for (size_t k = 0; k < n; k++) {
        source_close(&sources[k]);
        if (expected == VMM_OK)
            shadow_extend(&shadows[k], &sources[k], n_lanes, lanes, counts, n_rows);
        shadow_check_books(&shadows[k]);
    }
}

static vmm_memory device_memory(const fixture *f) {
    return f->is_gpu ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST;
}

/* ---- random calls against the shadow ----------------------------------------------------------- */

typedef struct arrangement {
    int ndim;
    int64_t shape[VMM_MAX_NDIM];
    int axis;
    vmm_layout layout;
    vmm_dtype dtype;
    size_t n_lengths;
} arrangement;

static const arrangement arrangements[] = {
    {2, {5, 0}, 1, VMM_LAYOUT_LANE, {2, 64, 1}, 5},
    {4, {6, 0, 2, 8}, 1, VMM_LAYOUT_LANE, {2, 16, 1}, 6},
    {4, {4, 2, 0, 8}, 2, VMM_LAYOUT_LANE, {4, 16, 1}, 4},
    {4, {3, 2, 0, 8}, 2, VMM_LAYOUT_C, {2, 32, 1}, 3}, /* two lanes for each length */
    {3, {4, 0, 3}, 1, VMM_LAYOUT_C, {1, 8, 1}, 4},     /* nothing is aligned */
    {3, {4, 0, 6}, 1, VMM_LAYOUT_SEQ, {2, 16, 1}, 1},  /* one length */
    {2, {0, 7}, 0, VMM_LAYOUT_LANE, {0, 8, 1}, 1},
    {3, {1, 0, 4}, 1, VMM_LAYOUT_LANE, {2, 32, 1}, 1},
    {3, {40, 0, 8}, 1, VMM_LAYOUT_LANE, {2, 32, 1}, 40}, /* more jobs than fit a narrow launch */
};

/* Some lanes in some order, or all; returns how many. */
static size_t choose_lanes(const shadow *s, uint64_t *seed, size_t *lanes, bool *all) {
    size_t n = s->n_lanes;
    for (size_t i = 0; i < n; i++)
        lanes[i] = i;
    *all = random_below(seed, 3) == 0;
    if (*all)
        return n;
    for (size_t i = n - 1; i > 0; i--) {
        size_t j = random_below(seed, (uint32_t)i + 1), swap = lanes[i];
        lanes[i] = lanes[j];
        lanes[j] = swap;
    }
    return random_below(seed, (uint32_t)n + 1);
}

static void truncate_all(shadow *s, size_t n_rows) {
    CHECK_OK(vmm_truncate(s->tensor, n_rows, VMM_STREAM_NONE));
    for (size_t lane = 0; lane < s->n_lanes; lane++)
        s->length[lane] = s->length[lane] < n_rows ? s->length[lane] : n_rows;
}

static void run(const fixture *f, const arrangement *a, int n_steps, uint64_t seed) {
    vmm_spec spec = {.ndim = a->ndim,
                     .shape = a->shape,
                     .axis = a->axis,
                     .dtype = a->dtype,
                     .capacity = 200,
                     .layout = a->layout};
    shadow *s = shadow_new(f, &spec), *fork = malloc(sizeof *fork);
    size_t lanes[MAX_LANES], counts[MAX_LANES];
    bool all;
    CHECK(fork);
    CHECK_SIZE(s->n_lanes, a->n_lengths);
    for (int step = 0; step < n_steps; step++) {
        size_t n, n_rows = random_below(&seed, 6), most = longest(s);
        vmm_memory memory = random_below(&seed, 3) ? device_memory(f) : VMM_MEMORY_HOST;
        switch (random_below(&seed, 9)) {
        case 0:
        case 1:
        case 2:
        case 3: {
            bool counted = random_below(&seed, 4) != 0, is_full = false, strided;
            n = choose_lanes(s, &seed, lanes, &all);
            for (size_t i = 0; i < n; i++) {
                counts[i] = counted ? random_below(&seed, (uint32_t)n_rows + 1) : n_rows;
                is_full |= s->length[lanes[i]] + counts[i] > spec.capacity;
            }
            strided = random_below(&seed, 4) == 0;
            append_lanes(s, 1, n, all ? NULL : lanes, counted ? counts : NULL, n_rows, memory,
                         strided, is_full ? VMM_ERR_CAPACITY : VMM_OK);
            break;
        }
        case 4: { /* to all, each behind its own */
            source x;
            vmm_status expected = most + n_rows > spec.capacity ? VMM_ERR_CAPACITY : VMM_OK;
            source_open(&x, s, s->n_lanes, NULL, n_rows, memory, random_below(&seed, 3) == 0);
            CHECK_STATUS(vmm_append(s->tensor, &x.array, NULL), expected);
            source_close(&x);
            if (!expected)
                shadow_extend(s, &x, s->n_lanes, NULL, NULL, n_rows);
            break;
        }
        case 5: /* a few rows, or all of a lane */
            n = choose_lanes(s, &seed, lanes, &all);
            for (size_t i = 0; i < n; i++) {
                size_t length = s->length[lanes[i]], less = random_below(&seed, 5);
                counts[i] = less == 4 ? 0 : length - (less < length ? less : length);
            }
            CHECK_OK(vmm_truncate_lanes(s->tensor, n, all ? NULL : lanes, counts,
                                        random_below(&seed, 2) ? NULL : VMM_STREAM_NONE));
            for (size_t i = 0; i < n; i++)
                s->length[lanes[i]] = counts[i];
            break;
        case 6:
            truncate_all(s, most - random_below(&seed, (uint32_t)(most < 9 ? most : 9) + 1));
            break;
        case 7: {
            void *out;
            n = most + n_rows > spec.capacity ? 0 : n_rows;
            CHECK_STATUS(vmm_grow(s->tensor, n, &out), is_ragged(s) ? VMM_ERR_INVALID : VMM_OK);
            for (size_t lane = 0; lane < s->n_lanes && !is_ragged(s); lane++)
                memset(&s->numbers[lane][most], 0, n * sizeof(uint32_t));
            for (size_t lane = 0, ragged = is_ragged(s); lane < s->n_lanes && !ragged; lane++)
                s->length[lane] += n;
            break;
        }
        default:
            CHECK_OK(vmm_trim(s->tensor));
            CHECK_OK(vmm_map(s->tensor, random_below(&seed, 30)));
            n = random_below(&seed, (uint32_t)most + 1);
            *fork = *s;
            CHECK_OK(vmm_fork(s->tensor, n, &fork->tensor));
            for (size_t lane = 0; lane < s->n_lanes; lane++)
                fork->length[lane] = s->length[lane] < n ? s->length[lane] : n;
            if (random_below(&seed, 2)) { /* go on with the fork */
                shadow swap = *s;
                *s = *fork;
                *fork = swap;
            }
            shadow_close(fork);
        }
        if (random_below(&seed, 6) == 0)
            shadow_check(s);
        else
            shadow_check_books(s);
    }
    shadow_free(s);
    free(fork);
}

/* ---- one launch --------------------------------------------------------------------------------- */

static uint64_t launches(const fixture *f) {
    vmm_pool_stats stats;
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    return stats.driver_calls[VMM_CALL_launch];
}

static shadow *open_many(const fixture *f, size_t n, const vmm_spec *spec) {
    shadow *shadows = malloc(n * sizeof *shadows);
    CHECK(shadows);
    for (size_t k = 0; k < n; k++) {
        shadows[k] = shadow_open(f, spec);
        CHECK_OK(vmm_map(shadows[k].tensor, 40));
    }
    return shadows;
}

static void close_many(shadow *shadows, size_t n) {
    for (size_t k = 0; k < n; k++)
        shadow_close(&shadows[k]);
    free(shadows);
}

/* A whole batch, keys and values, each sequence at its own length. */
static void test_batch(const fixture *f) {
    static const int64_t shape[] = {64, 0, 2, 4};
    vmm_spec spec = {.ndim = 4,
                     .shape = shape,
                     .axis = 1,
                     .dtype = VMM_FLOAT16,
                     .capacity = 300,
                     .layout = VMM_LAYOUT_LANE};
    shadow *kv = open_many(f, 2, &spec);
    size_t counts[64];
    for (int round = 0; round < 4; round++) {
        for (size_t i = 0; i < 64; i++)
            counts[i] = round ? 1 : 1 + i % 7;
        counts[63] = round ? 1 : 30; /* one is much longer */
        uint64_t before = launches(f);
        append_lanes(kv, 2, 64, NULL, round == 2 ? NULL : counts, round ? 1 : 30, device_memory(f),
                     false, VMM_OK);
        if (f->is_gpu)
            CHECK(launches(f) - before == 1);
    }
    close_many(kv, 2);
}

/* One piece is so much larger than the others that it takes their share of the device. */
static void test_uneven(const fixture *f) {
    static const int64_t shape[] = {64, 0, 512};
    vmm_spec spec = {.ndim = 3,
                     .shape = shape,
                     .axis = 1,
                     .dtype = VMM_UINT8,
                     .capacity = 100,
                     .layout = VMM_LAYOUT_LANE};
    shadow *kv = open_many(f, 2, &spec);
    size_t counts[64];
    for (size_t i = 0; i < 64; i++)
        counts[i] = 1 + i % 3;
    counts[20] = 100;
    append_lanes(kv, 2, 64, NULL, counts, 100, device_memory(f), false, VMM_OK);
    close_many(kv, 2);
}

/* Keys and values of many layers. `is_mixed`: not all of one geometry. */
static void test_layers(const fixture *f, vmm_layout layout, size_t n, bool is_mixed,
                        uint64_t expected) {
    static const int64_t shape[] = {3, 2, 0, 8};
    vmm_spec spec = {.ndim = 4,
                     .shape = shape,
                     .axis = 2,
                     .dtype = VMM_FLOAT16,
                     .capacity = 100,
                     .layout = layout};
    shadow *layers = open_many(f, n, &spec);
    if (is_mixed) {
        spec.capacity = MAX_ROWS; /* lanes lie further apart, where blocks are small */
        spec.dtype = VMM_UINT8;
        for (size_t k = 0; k < n; k += 3) {
            CHECK_OK(vmm_close(layers[k].tensor));
            layers[k] = shadow_open(f, &spec);
            CHECK_OK(vmm_map(layers[k].tensor, 40));
        }
    }
    for (int step = 0; step < 3; step++) {
        vmm_array arrays[200];
        vmm_tensor *tensors[200];
        source sources[200];
        size_t n_rows = step == 1 ? 5 : 1;
        CHECK(n <= LENGTH_OF(arrays));
        for (size_t k = 0; k < n; k++) {
            source_open(&sources[k], &layers[k], 3, NULL, n_rows, device_memory(f), false);
            arrays[k] = sources[k].array;
            tensors[k] = layers[k].tensor;
        }
        uint64_t before = launches(f);
        CHECK_OK(vmm_append_many(n, tensors, arrays, NULL));
        if (f->is_gpu && n_rows == 1)
            CHECK_SIZE(launches(f) - before, expected);
        for (size_t k = 0; k < n; k++) {
            source_close(&sources[k]);
            shadow_extend(&layers[k], &sources[k], layers[k].n_lanes, NULL, NULL, n_rows);
        }
    }
    close_many(layers, n);
}

/* ---- what is refused ---------------------------------------------------------------------------- */

static const int64_t four_lanes[] = {4, 0, 8};

static vmm_spec four_spec(void) {
    return (vmm_spec){.ndim = 3,
                      .shape = four_lanes,
                      .axis = 1,
                      .dtype = VMM_FLOAT32,
                      .capacity = 50,
                      .layout = VMM_LAYOUT_LANE};
}

static void refuse(shadow *s, size_t n_lanes, const size_t *lanes, const size_t *counts,
                   size_t n_rows, vmm_status expected) {
    long calls = simulated_calls(s->fixture);
    source x;
    source_open(&x, s, n_lanes, NULL, n_rows, VMM_MEMORY_HOST, false);
    CHECK_STATUS(vmm_append_lanes(1, &s->tensor, &x.array, n_lanes, lanes, counts, NULL), expected);
    CHECK(simulated_calls(s->fixture) == calls); /* before any call of the driver */
    source_close(&x);
    shadow_check_books(s);
}

static void test_arguments(const fixture *f) {
    vmm_spec spec = four_spec();
    shadow *s = shadow_new(f, &spec);
    const size_t counts[] = {3, 0, 2, 3}, twice[] = {1, 2, 1}, outside[] = {0, 4}, two[] = {2, 0};
    const size_t many[] = {4, 1}, last[] = {3}, uneven[] = {3, 1, 2, 3}, too_long[] = {3, 1};

    append_lanes(s, 1, 4, NULL, counts, 3, VMM_MEMORY_HOST, false, VMM_OK);
    refuse(s, 3, twice, NULL, 1, VMM_ERR_INVALID);
    refuse(s, 2, outside, NULL, 1, VMM_ERR_INVALID);
    refuse(s, 3, NULL, NULL, 1, VMM_ERR_INVALID); /* NULL stands for all four */
    refuse(s, 2, two, many, 3, VMM_ERR_INVALID);  /* four rows of three */
    refuse(s, 2, two, NULL, 49, VMM_ERR_CAPACITY);
    CHECK(strstr(vmm_last_error()->message, "lane 2"));
    refuse(s, 4, NULL, NULL, 48, VMM_ERR_CAPACITY); /* two lanes have 3 */
    append_lanes(s, 1, 1, last, NULL, 47, VMM_MEMORY_HOST, false, VMM_OK);

    source x;
    source_open(&x, s, 2, NULL, 1, VMM_MEMORY_HOST, false);
    CHECK_STATUS(vmm_append_lanes(1, &s->tensor, &x.array, 3, uneven + 1, NULL, NULL),
                 VMM_ERR_SHAPE); /* two indices for three lanes */
    CHECK_STATUS(vmm_append(s->tensor, &x.array, NULL), VMM_ERR_SHAPE);
    CHECK_STATUS(vmm_append_lanes(1, &s->tensor, NULL, 2, two, NULL, NULL), VMM_ERR_INVALID);
    CHECK_OK(vmm_append_lanes(0, NULL, NULL, 2, two, NULL, NULL));
    source_close(&x);
    source_open(&x, s, 4, NULL, 1, VMM_MEMORY_HOST, false);
    CHECK_STATUS(vmm_append(s->tensor, &x.array, NULL), VMM_ERR_CAPACITY); /* one is full */
    source_close(&x);

    CHECK_STATUS(vmm_grow(s->tensor, 1, NULL), VMM_ERR_INVALID);
    CHECK(strstr(vmm_last_error()->message, "0 to 50"));
    CHECK_STATUS(vmm_truncate(s->tensor, 51, VMM_STREAM_NONE), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_truncate_lanes(s->tensor, 2, two, too_long, VMM_STREAM_NONE), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_truncate_lanes(s->tensor, 3, twice, counts, VMM_STREAM_NONE), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_truncate_lanes(s->tensor, 2, outside, counts, VMM_STREAM_NONE),
                 VMM_ERR_INVALID);
    CHECK_STATUS(vmm_truncate_lanes(s->tensor, 3, NULL, counts, VMM_STREAM_NONE), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_truncate_lanes(s->tensor, 1, last, NULL, VMM_STREAM_NONE), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_truncate_lanes(NULL, 1, last, counts, VMM_STREAM_NONE), VMM_ERR_INVALID);
    shadow_check(s);

    /* Evened, it grows again. */
    truncate_all(s, 0);
    CHECK_OK(vmm_grow(s->tensor, 2, NULL));
    for (size_t lane = 0; lane < 4; lane++) {
        s->numbers[lane][0] = s->numbers[lane][1] = 0;
        s->length[lane] = 2;
    }
    shadow_free(s);
}

/* All or none, where the second of two tensors cannot. */
static void test_all_or_none(const fixture *f) {
    vmm_spec spec = four_spec(), small = spec, other = spec;
    static const int64_t two_lanes[] = {2, 0, 8};
    shadow *s = malloc(3 * sizeof *s);
    CHECK(s);
    small.capacity = 4;
    other.shape = two_lanes;
    s[0] = shadow_open(f, &spec);
    s[1] = shadow_open(f, &small);
    s[2] = shadow_open(f, &other);
    const size_t lanes[] = {3, 0}, counts[] = {3, 1};
    append_lanes(s, 2, 2, lanes, counts, 3, device_memory(f), false, VMM_OK);
    append_lanes(s, 2, 2, lanes, counts, 3, device_memory(f), false, VMM_ERR_CAPACITY);
    const size_t one_each[] = {1, 1};
    append_lanes(s, 3, 2, lanes, one_each, 1, device_memory(f), false, VMM_ERR_INVALID);
    for (int i = 0; i < 3; i++)
        shadow_close(&s[i]);
    free(s);
}

/* Past the budget: nothing has become mapped, and no length has changed. */
static void test_growth_fails(const fixture *f) {
    size_t block = f->granularity_bytes, lane_rows = block / 32;
    fixture tight = *f;
    CHECK_OK(vmm_pool_create(f->device, block, 8 * block, &tight.pool));
    vmm_spec spec = four_spec();
    spec.capacity = 4 * lane_rows;
    vmm_tensor *tensor;
    CHECK_OK(vmm_reserve(tight.pool, &spec, &tensor));
    int64_t shape[] = {1, (int64_t)(2 * lane_rows), 8};
    void *zeros = calloc(2 * lane_rows, 32);
    vmm_array array = {.data = zeros, .dtype = VMM_FLOAT32, .ndim = 3, .shape = shape};
    const size_t lane[] = {2};
    CHECK(zeros);
    CHECK_OK(vmm_append_lanes(1, &tensor, &array, 1, lane, NULL, NULL));
    CHECK_SIZE(vmm_mapped(tensor), 2 * lane_rows); /* in every lane */
    CHECK_STATUS(vmm_append_lanes(1, &tensor, &array, 1, lane, NULL, NULL), VMM_ERR_OUT_OF_MEMORY);
    CHECK_SIZE(vmm_mapped(tensor), 2 * lane_rows);
    CHECK_SIZE(vmm_length(tensor), 2 * lane_rows);
    CHECK_SIZE(vmm_lengths(tensor)[2], 2 * lane_rows);
    CHECK_SIZE(vmm_lengths(tensor)[1], 0);
    const size_t other[] = {1}; /* is mapped already */
    CHECK_OK(vmm_append_lanes(1, &tensor, &array, 1, other, NULL, NULL));
    CHECK_SIZE(vmm_lengths(tensor)[1], 2 * lane_rows);
    free(zeros);
    CHECK_OK(vmm_close(tensor));
    CHECK_OK(vmm_pool_close(tight.pool));
}

static void test_pins(const fixture *f) {
    vmm_spec spec = four_spec();
    shadow *s = shadow_new(f, &spec);
    const size_t counts[] = {6, 2, 6, 4}, lane1[] = {1}, lane0[] = {0}, four[] = {4}, three[] = {3};
    const size_t six[] = {6};
    vmm_pin *pin;
    append_lanes(s, 1, 4, NULL, counts, 6, VMM_MEMORY_HOST, false, VMM_OK);
    CHECK_OK(vmm_pin_rows(s->tensor, 4, &pin));
    /* A short lane gets rows that the pin covers: they were undefined. */
    append_lanes(s, 1, 1, lane1, NULL, 2, VMM_MEMORY_HOST, false, VMM_OK);
    CHECK_OK(vmm_truncate_lanes(s->tensor, 1, lane0, six, VMM_STREAM_NONE));
    CHECK_STATUS(vmm_truncate_lanes(s->tensor, 1, lane1, three, VMM_STREAM_NONE), VMM_ERR_PINNED);
    CHECK_STATUS(vmm_truncate_lanes(s->tensor, 1, lane0, three, NULL), VMM_ERR_PINNED);
    CHECK_STATUS(vmm_truncate(s->tensor, 3, VMM_STREAM_NONE), VMM_ERR_PINNED);
    shadow_check(s);
    CHECK_OK(vmm_truncate_lanes(s->tensor, 1, lane0, four, VMM_STREAM_NONE));
    s->length[0] = 4;
    truncate_all(s, 5);
    shadow_check(s);
    vmm_unpin(pin);
    CHECK_OK(vmm_truncate_lanes(s->tensor, 1, lane0, three, NULL));
    s->length[0] = 3;
    shadow_free(s);
}

/* What grow takes reads zero, whatever short lanes had there. */
static void test_zero(const fixture *f) {
    vmm_spec spec = four_spec();
    spec.zero = 1;
    shadow *s = shadow_new(f, &spec);
    const size_t counts[] = {6, 2, 6, 4}, even[] = {2, 2, 2, 2};
    append_lanes(s, 1, 4, NULL, counts, 6, VMM_MEMORY_HOST, false, VMM_OK);
    CHECK_OK(vmm_truncate_lanes(s->tensor, 4, NULL, even, VMM_STREAM_NONE));
    for (size_t lane = 0; lane < 4; lane++)
        s->length[lane] = 2;
    CHECK_OK(vmm_grow(s->tensor, 5, NULL));
    uint8_t *rows = read_rows(f, s->tensor, 2, 7);
    for (size_t i = 0; i < 5 * vmm_row_bytes(s->tensor); i++)
        CHECK(rows[i] == 0);
    free(rows);
    CHECK_OK(vmm_close(s->tensor));
    free(s);
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    for (size_t i = 0; i < LENGTH_OF(arrangements); i++)
        run(&f, &arrangements[i], arrangements[i].n_lengths > 8 ? 60 : 300, 1 + i);
    test_batch(&f);
    test_uneven(&f);
    test_layers(&f, VMM_LAYOUT_SEQ, 64, false, 1);
    test_layers(&f, VMM_LAYOUT_LANE, 64, false, 1);
    test_layers(&f, VMM_LAYOUT_SEQ, 170, false, 2);
    test_layers(&f, VMM_LAYOUT_SEQ, 64, true, 1);
    test_layers(&f, VMM_LAYOUT_LANE, 48, true, 2); /* 16 pieces, 32 jobs */
    test_arguments(&f);
    test_all_or_none(&f);
    test_growth_fails(&f);
    test_pins(&f);
    test_zero(&f);
    fixture_close(&f);
    return 0;
}
