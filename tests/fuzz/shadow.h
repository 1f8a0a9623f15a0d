/* shadow.h - what a tensor of the fuzzer must hold, and sources of any strides for it.
 *
 * Unlike the model of check.h it keeps the bytes themselves: sources overlap themselves and
 * repeat, so their rows have no numbers. Each lane, an index of dimension 0 that has a length of
 * its own, has its part of every row.
 */
#ifndef SHADOW_H
#define SHADOW_H

#include "check.h"

/* Rows whose contents are looked at, and rows of one source, stay below this. */
#define LOOK_BYTES (16 * KIB)

typedef struct shadow {
    vmm_tensor *tensor;
    vmm_spec spec; /* its shape points to `shape` */
    int64_t shape[VMM_MAX_NDIM];
    size_t row_bytes;
    void *base;
    int pool;
    size_t mapped, length; /* of the longest lane */
    size_t n_lanes, lane_bytes, *lengths;
    size_t n_kept;  /* rows there is room for in these two: */
    uint8_t *rows;  /* row after row, each in C order */
    uint8_t *known; /* for each lane of each row: 0 if its bytes are undefined */
    size_t n_pins;  /* and graphs that append */

    /* See graphs.c. */
    int32_t *cursor;      /* NULL until it is known */
    long long ahead;      /* rows that the device counts and the host does not */
    bool has_overflowed;  /* the device has said so, and nobody has asked */
    size_t n_graphs;      /* that append to it */
    bool is_captured;     /* a graph has been captured that appends, */
    bool may_be_captured; /* or has been given up, perhaps before it came to that */
    bool unsure;          /* a failure may have left its mark */
} shadow;

static inline void shadow_init(shadow *s, vmm_tensor *tensor, const vmm_spec *spec, int pool) {
    *s = (shadow){.tensor = tensor, .spec = *spec, .base = vmm_base(tensor), .pool = pool};
    memcpy(s->shape, spec->shape, (size_t)spec->ndim * sizeof *spec->shape);
    s->spec.shape = s->shape;
    s->row_bytes = vmm_row_bytes(tensor);
    s->n_lanes = vmm_length_count(tensor);
    s->lane_bytes = s->row_bytes / s->n_lanes;
    CHECK(s->lengths = calloc(s->n_lanes, sizeof *s->lengths));
}

static inline void shadow_free(shadow *s) {
    free(s->lengths);
    free(s->rows);
    free(s->known);
    free(s);
}

static inline bool shadow_is_ragged(const shadow *s) {
    for (size_t lane = 1; lane < s->n_lanes; lane++)
        if (s->lengths[lane] != s->lengths[0])
            return true;
    return false;
}

/* ---- rows come and go ------------------------------------------------------------------- */

static inline void shadow_keep(shadow *s, size_t n_rows) {
    if (n_rows <= s->n_kept)
        return;
    CHECK(s->rows = realloc(s->rows, n_rows * s->row_bytes));
    CHECK(s->known = realloc(s->known, n_rows * s->n_lanes));
    memset(s->rows + s->n_kept * s->row_bytes, 0, (n_rows - s->n_kept) * s->row_bytes);
    memset(s->known + s->n_kept * s->n_lanes, 0, (n_rows - s->n_kept) * s->n_lanes);
    s->n_kept = n_rows;
}

/* Row `at` of a lane has been written, in device memory: with `bytes`, NULL for zero. */
static inline void shadow_write(shadow *s, size_t lane, size_t at, const uint8_t *bytes,
                                bool known) {
    shadow_keep(s, at + 1);
    uint8_t *row = s->rows + at * s->row_bytes + lane * s->lane_bytes;
    if (bytes)
        memcpy(row, bytes, s->lane_bytes);
    else
        memset(row, 0, s->lane_bytes);
    s->known[at * s->n_lanes + lane] = known;
}

static inline void shadow_set_length(shadow *s, size_t lane, size_t n_rows) {
    s->lengths[lane] = n_rows;
    s->length = 0;
    for (size_t i = 0; i < s->n_lanes; i++)
        s->length = s->lengths[i] > s->length ? s->lengths[i] : s->length;
}

static inline void shadow_add_to_all(shadow *s, size_t n_rows) {
    shadow_keep(s, s->length + n_rows);
    for (size_t lane = 0; lane < s->n_lanes; lane++)
        s->lengths[lane] += n_rows;
    s->length += n_rows;
}

/* What lies behind the rows in use is no one's. */
static inline void shadow_forget(shadow *s) {
    for (size_t lane = 0; lane < s->n_lanes; lane++)
        for (size_t row = s->lengths[lane]; row < s->n_kept; row++)
            s->known[row * s->n_lanes + lane] = 0;
}

static inline void shadow_grow(shadow *s, size_t n_rows) {
    for (size_t lane = 0; lane < s->n_lanes; lane++)
        for (size_t r = 0; r < n_rows; r++)
            shadow_write(s, lane, s->length + r, NULL, s->spec.zero);
    shadow_add_to_all(s, n_rows);
}

/* The caller's kernel writes the rows from `begin` on; all lanes are of one length. */
static inline void shadow_fill(shadow *s, const fixture *f, size_t begin, uint8_t seed) {
    size_t pre, post, n_rows = s->length - begin;
    uint8_t *dense = malloc(n_rows * s->row_bytes + 1);

    CHECK(dense);
    row_pieces(s->tensor, &pre, &post);
    for (size_t r = 0; r < n_rows; r++)
        for (size_t i = 0; i < s->row_bytes; i++) {
            uint8_t byte = row_byte(seed + (uint32_t)(begin + r), i);
            s->rows[(begin + r) * s->row_bytes + i] = byte;
            dense[(i / post * n_rows + r) * post + i % post] = byte;
        }
    memset(s->known + begin * s->n_lanes, 1, n_rows * s->n_lanes);
    copy_rows(f, s->tensor, begin, s->length, dense, true);
    free(dense);
}

/* ---- checks -------------------------------------------------------------------------------- */

static inline void shadow_check_rows(const shadow *s, const fixture *f) {
    size_t pre, post, bytes = s->length * s->row_bytes;

    if (bytes == 0 || bytes > LOOK_BYTES)
        return;
    uint8_t *dense = read_rows(f, s->tensor, 0, s->length);
    row_pieces(s->tensor, &pre, &post);
    for (size_t r = 0; r < s->length; r++)
        for (size_t i = 0; i < s->row_bytes; i++) {
            size_t lane = i / s->lane_bytes;
            uint8_t actual = dense[(i / post * s->length + r) * post + i % post];
            bool in_use = r < s->lengths[lane] && s->known[r * s->n_lanes + lane];
            if (in_use && actual != s->rows[r * s->row_bytes + i])
                FAIL("row %zu of %zu, byte %zu, in lane %zu: %d, not %d", r, s->lengths[lane], i,
                     lane, actual, s->rows[r * s->row_bytes + i]);
        }
    free(dense);
}

static inline void shadow_check_lengths(const shadow *s) {
    const size_t *lengths = vmm_lengths(s->tensor);
    CHECK_SIZE(vmm_length(s->tensor), s->length);
    CHECK_SIZE(vmm_length_count(s->tensor), s->n_lanes);
    CHECK(!vmm_is_ragged(s->tensor) == !shadow_is_ragged(s));
    for (size_t lane = 0; lane < s->n_lanes; lane++)
        CHECK_SIZE(lengths[lane], s->lengths[lane]);
}

static inline void shadow_check_books(const shadow *s) {
    const vmm_tensor *t = s->tensor;
    vmm_tensor_stats stats;
    size_t n_rows = 0;

    CHECK(vmm_base(t) == s->base);
    shadow_check_lengths(s);
    CHECK_SIZE(vmm_mapped(t), s->mapped);
    CHECK(s->length <= s->mapped && s->mapped <= s->spec.capacity);
    for (size_t lane = 0; lane < s->n_lanes; lane++)
        n_rows += s->lengths[lane];
    CHECK_OK(vmm_stats(t, &stats));
    CHECK_SIZE(stats.used_bytes, n_rows * s->lane_bytes);
    CHECK_SIZE(stats.slack_bytes, stats.mapped_bytes - stats.used_bytes);
    CHECK(stats.mapped_bytes >= s->mapped * s->row_bytes);
    CHECK(!stats.mapped_bytes == !stats.block_count);
    CHECK_SIZE(stats.reserved_bytes, vmm_lane_count(t) * vmm_lane_bytes(t));
    CHECK(stats.mapped_bytes <= stats.reserved_bytes);
    CHECK_SIZE(vmm_pin_count(t), s->n_pins);
    CHECK(!vmm_has_cursor(t) == !s->cursor);
}

/* ---- sources --------------------------------------------------------------------------- */

typedef struct source {
    vmm_array array;
    int64_t shape[VMM_MAX_NDIM], strides[VMM_MAX_NDIM];
    size_t bytes, first; /* of the memory behind it, and where in it the first element is */
    uint8_t *host;       /* exactly `bytes`, so that reading beyond is seen */
    void *device;        /* a copy of it; NULL for a source in host memory */
} source;

typedef enum stride_kind { DENSE, PADDED, NEGATIVE, REPEATED } stride_kind;

/* A source that has been copied has its array elsewhere. */
static inline const vmm_array *source_array(source *src) {
    src->array.shape = src->array.shape ? src->shape : NULL;
    src->array.strides = src->array.strides ? src->strides : NULL;
    return &src->array;
}

static inline void source_write(source *src, const fixture *f, uint8_t seed) {
    for (size_t i = 0; i < src->bytes; i++)
        src->host[i] = row_byte(seed, i);
    if (src->device && src->bytes)
        write_device(f, src->device, src->host, src->bytes);
}

/* `kinds` has the kind of each dimension's stride; the last is dense always. The memory
 * begins `misalignment` bytes behind an aligned address. `shape` is the source's. */
static inline void source_make(source *src, const shadow *s, const fixture *f, const int64_t *shape,
                               const stride_kind *kinds, size_t misalignment, uint8_t seed,
                               bool on_device) {
    int64_t item = s->spec.dtype.bits / 8, stride = item, low = 0, high = item;
    int ndim = s->spec.ndim;
    bool any = true;

    memset(src, 0, sizeof *src);
    memcpy(src->shape, shape, (size_t)ndim * sizeof *shape);
    for (int d = 0; d < ndim; d++)
        any &= src->shape[d] > 0;
    for (int d = ndim - 1; d >= 0; d--) {
        stride_kind kind = d == ndim - 1 ? DENSE : kinds[d];
        int64_t reach = any ? (src->shape[d] - 1) * stride : 0;
        src->strides[d] = kind == REPEATED ? 0 : kind == NEGATIVE ? -stride : stride;
        low -= kind == NEGATIVE ? reach : 0;
        high += kind == DENSE || kind == PADDED ? reach : 0;
        if (kind != REPEATED)
            stride = stride * (any ? src->shape[d] : 1) + (kind == PADDED ? 3 * item : 0);
    }
    src->bytes = (any ? (size_t)(high - low) : 0) + misalignment;
    src->first = (size_t)-low + misalignment;
    CHECK(src->host = malloc(src->bytes ? src->bytes : 1));
    if (on_device)
        src->device = device_alloc(f, src->bytes);
    source_write(src, f, seed);
    src->array = (vmm_array){.data = (uint8_t *)(on_device ? src->device : src->host) + src->first,
                             .memory = on_device ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST,
                             .dtype = s->spec.dtype,
                             .ndim = ndim,
                             .shape = src->shape,
                             .strides = src->strides};
}

static inline size_t source_rows(const source *src, const shadow *s) {
    return (size_t)src->shape[s->spec.axis];
}

/* Row `row` of index `index` of dimension 0, where the tensor has lanes, else of all, as the
 * shadow keeps it. */
static inline void source_gather(const source *src, const shadow *s, size_t index, size_t row,
                                 uint8_t *bytes) {
    size_t item = s->spec.dtype.bits / 8;
    for (size_t i = 0; i < s->lane_bytes / item; i++) {
        int64_t at = (int64_t)src->first + (int64_t)row * src->strides[s->spec.axis];
        size_t rest = i;
        for (int d = s->spec.ndim - 1; d >= (s->n_lanes > 1 ? 1 : 0); d--) {
            if (d == s->spec.axis)
                continue;
            at += (int64_t)(rest % (size_t)src->shape[d]) * src->strides[d];
            rest /= (size_t)src->shape[d];
        }
        if (s->n_lanes > 1)
            at += (int64_t)index * src->strides[0];
        memcpy(bytes + i * item, src->host + at, item);
    }
}

/* The first `n_rows` rows of one index are written behind the first `at` rows of a lane. */
static inline void source_copy(const source *src, shadow *s, size_t index, size_t lane, size_t at,
                               size_t n_rows) {
    uint8_t *bytes = malloc(s->lane_bytes);
    CHECK(bytes);
    for (size_t r = 0; r < n_rows; r++) {
        source_gather(src, s, index, r, bytes);
        shadow_write(s, lane, at + r, bytes, true);
    }
    free(bytes);
}

/* All of it has been appended, to every lane. */
static inline void source_append(const source *src, shadow *s) {
    size_t n_rows = source_rows(src, s);
    for (size_t lane = 0; lane < s->n_lanes; lane++)
        source_copy(src, s, lane, lane, s->lengths[lane], n_rows);
    shadow_add_to_all(s, n_rows);
}

/* Once the device has read it. */
static inline void source_free(source *src, const fixture *f) {
    synchronize(f);
    if (src->device)
        device_free(f, src->device);
    free(src->host);
}

#endif /* SHADOW_H */
