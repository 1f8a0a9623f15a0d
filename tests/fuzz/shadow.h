/* shadow.h - what a tensor of the fuzzer must hold, and sources of any strides for it.
 *
 * Unlike the model of check.h it keeps the bytes themselves: sources overlap themselves and
 * repeat, so their rows have no numbers.
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
    size_t length, mapped;
    uint8_t *rows;  /* length * row_bytes: row after row, each in C order */
    uint8_t *known; /* for each row: 0 if its bytes are undefined */
    size_t n_pins;
} shadow;

/* Take `n_rows` more rows into use, with bytes to be filled in by the caller; NULL for no rows
 * and for rows without bytes that are known. */
static inline uint8_t *shadow_extend(shadow *s, size_t n_rows, bool known) {
    size_t length = s->length + n_rows;

    if (n_rows == 0)
        return NULL;
    CHECK(s->rows = realloc(s->rows, length * s->row_bytes));
    CHECK(s->known = realloc(s->known, length));
    memset(s->known + s->length, known, n_rows);
    uint8_t *rows = s->rows + s->length * s->row_bytes;
    memset(rows, 0, n_rows * s->row_bytes);
    s->length = length;
    return rows;
}

/* The caller's kernel writes the rows from `begin` on. */
static inline void shadow_write(shadow *s, const fixture *f, size_t begin, uint8_t seed) {
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
    memset(s->known + begin, 1, n_rows);
    copy_rows(f, s->tensor, begin, s->length, dense, true);
    free(dense);
}

static inline void shadow_check_rows(const shadow *s, const fixture *f) {
    size_t pre, post, bytes = s->length * s->row_bytes;

    if (bytes == 0 || bytes > LOOK_BYTES)
        return;
    uint8_t *dense = read_rows(f, s->tensor, 0, s->length);
    row_pieces(s->tensor, &pre, &post);
    for (size_t r = 0; r < s->length; r++)
        for (size_t i = 0; i < s->row_bytes && s->known[r]; i++) {
            uint8_t actual = dense[(i / post * s->length + r) * post + i % post];
            if (actual != s->rows[r * s->row_bytes + i])
                FAIL("row %zu of %zu, byte %zu: %d, not %d", r, s->length, i, actual,
                     s->rows[r * s->row_bytes + i]);
        }
    free(dense);
}

static inline void shadow_check_books(const shadow *s) {
    const vmm_tensor *t = s->tensor;
    vmm_tensor_stats stats;

    CHECK(vmm_base(t) == s->base);
    CHECK_SIZE(vmm_length(t), s->length);
    CHECK_SIZE(vmm_mapped(t), s->mapped);
    CHECK(s->length <= s->mapped && s->mapped <= s->spec.capacity);
    CHECK_OK(vmm_stats(t, &stats));
    CHECK_SIZE(stats.used_bytes, s->length * s->row_bytes);
    CHECK_SIZE(stats.slack_bytes, stats.mapped_bytes - stats.used_bytes);
    CHECK(stats.mapped_bytes >= s->mapped * s->row_bytes);
    CHECK(!stats.mapped_bytes == !stats.block_count);
    CHECK_SIZE(stats.reserved_bytes, vmm_lane_count(t) * vmm_lane_bytes(t));
    CHECK(stats.mapped_bytes <= stats.reserved_bytes);
    CHECK_SIZE(vmm_pin_count(t), s->n_pins);
}

static inline void shadow_free(shadow *s) {
    free(s->rows);
    free(s->known);
    free(s);
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

/* `kinds` has the kind of each dimension's stride; the last is dense always. The memory
 * begins `misalignment` bytes behind an aligned address. */
static inline void source_make(source *src, const shadow *s, const fixture *f, size_t n_rows,
                               const stride_kind *kinds, size_t misalignment, uint8_t seed,
                               bool on_device) {
    int64_t item = s->spec.dtype.bits / 8, stride = item, low = 0, high = item;
    int ndim = s->spec.ndim;
    bool any = n_rows > 0;

    memset(src, 0, sizeof *src);
    rows_shape(s->tensor, n_rows, src->shape);
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
    for (size_t i = 0; i < src->bytes; i++)
        src->host[i] = row_byte(seed, i);
    if (on_device) {
        src->device = device_alloc(f, src->bytes);
        if (src->bytes)
            write_device(f, src->device, src->host, src->bytes);
    }
    src->array = (vmm_array){.data = (uint8_t *)(on_device ? src->device : src->host) + src->first,
                             .memory = on_device ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST,
                             .dtype = s->spec.dtype,
                             .ndim = ndim,
                             .shape = src->shape,
                             .strides = src->strides};
}

/* The appended rows, as the shadow keeps them. */
static inline void source_gather(const source *src, const shadow *s, uint8_t *rows) {
    size_t item = s->spec.dtype.bits / 8, n_rows = (size_t)src->shape[s->spec.axis];

    for (size_t r = 0; r < n_rows; r++)
        for (size_t i = 0; i < s->row_bytes / item; i++) {
            int64_t at = (int64_t)src->first + (int64_t)r * src->strides[s->spec.axis];
            size_t rest = i;
            for (int d = s->spec.ndim - 1; d >= 0; d--) {
                if (d == s->spec.axis)
                    continue;
                at += (int64_t)(rest % (size_t)src->shape[d]) * src->strides[d];
                rest /= (size_t)src->shape[d];
            }
            memcpy(rows + r * s->row_bytes + i * item, src->host + at, item);
        }
}

/* Once the device has read it. */
static inline void source_free(source *src, const fixture *f) {
    synchronize(f);
    if (src->device)
        device_free(f, src->device);
    free(src->host);
}

#endif /* SHADOW_H */
