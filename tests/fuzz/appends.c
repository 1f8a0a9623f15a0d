/* appends.c - appending, from sources that are right and wrong. */
#include "fuzz.h"

/* Of `n` rows at most; with `n_indices` in dimension 0, if that is not 0. */
static void make_source_of(source *src, const shadow *s, size_t n, size_t n_indices,
                           bool on_device) {
    stride_kind kinds[VMM_MAX_NDIM];
    int64_t shape[VMM_MAX_NDIM];
    uint8_t bits = next();

    while (n && n * s->row_bytes > LOOK_BYTES)
        n /= 2;
    rows_shape(s->tensor, n, shape);
    if (n_indices)
        shape[0] = (int64_t)n_indices;
    for (int d = 0; d < s->spec.ndim; d++)
        kinds[d] = (stride_kind)(bits & 0x80 ? next() % 4 : DENSE);
    source_make(src, s, &w.f, shape, kinds, bits & 3, next(),
                w.f.is_gpu && (on_device || bits & 0x40));
    if (!(bits & 0x80) && bits & 0x20)
        src->array.strides = NULL;
}

void make_source(source *src, const shadow *s, bool on_device) {
    size_t left = s->spec.capacity - s->length, n = 1 + next() % 32;
    make_source_of(src, s, n < left ? n : left, 0, on_device);
}

static void appended(const source *src, shadow *s) {
    source_append(src, s);
    cursor_is_current(s);
}

/* Make one thing about a source wrong. Returns the status it must get, VMM_OK if this one
 * cannot be made wrong in that way. */
static vmm_status spoil(source *src, const shadow *s) {
    int last = s->spec.ndim - 1, other = s->spec.axis ? 0 : last;
    int64_t *rows = &src->shape[s->spec.axis];
    bool any = *rows > 0;

    switch (next() % 12) {
    case 0: src->array.dtype.code ^= 1; return VMM_ERR_DTYPE;
    case 1: src->array.dtype.bits ^= 24; return VMM_ERR_DTYPE;
    case 2: src->array.dtype.lanes = 4; return VMM_ERR_DTYPE;
    case 3: src->array.ndim += next() & 1 ? 1 : -1; return VMM_ERR_SHAPE;
    case 4: src->array.shape = NULL; return VMM_ERR_INVALID;
    case 5:
        if (other == s->spec.axis)
            return VMM_OK;
        src->shape[other]++;
        return VMM_ERR_SHAPE;
    case 6: *rows = -1; return VMM_ERR_SHAPE;
    case 7:
        if (s->spec.capacity - s->length >= INT64_MAX)
            return VMM_OK;
        *rows = (int64_t)(s->spec.capacity - s->length) + 1;
        return VMM_ERR_CAPACITY;
    case 8:
        if (src->shape[last] < 2 || !any || !src->array.strides)
            return VMM_OK;
        src->strides[last] += 1;
        return VMM_ERR_INVALID;
    case 9: src->array.data = NULL; return any ? VMM_ERR_INVALID : VMM_OK;
    case 10: src->array.memory = (vmm_memory)7; return VMM_ERR_INVALID;
    default:
        src->array.memory = VMM_MEMORY_DEVICE;
        src->array.device_index = 63;
        return VMM_ERR_INVALID;
    }
}

void do_append(void) {
    shadow *s = any_tensor();
    vmm_stream stream = any_stream();
    source src;

    if (!s)
        return;
    make_source(&src, s, false);
    size_t n = source_rows(&src, s);
    vmm_status wrong = next() % 4 ? VMM_OK : spoil(&src, s);
    if (!wrong && w.f.is_gpu && stream == VMM_STREAM_NONE && n)
        wrong = VMM_ERR_INVALID;
    unsigned expected = OK_OR_NO_MEMORY;
    if (wrong)
        expected = BIT(wrong);
    else if (n)
        expected = expected_with_graphs(s, expected);
    begin(s);
    vmm_status status = TRY(expected, vmm_append(s->tensor, &src.array, stream));
    end(status);
    if (!status && n)
        appended(&src, s);
    source_free(&src, &w.f);
    check_tensor(s);
}

/* Of all that are in the call: the first that refuses does. */
static unsigned expected_of_all(unsigned expected) {
    unsigned refused = 0, all = expected;
    for (size_t i = 0; i < w.n_busy; i++) {
        unsigned of = expected_with_graphs(w.busy[i], expected);
        all |= of;
        refused |= of & expected ? 0 : of;
    }
    return refused ? refused | (all & ~expected) : all;
}

void do_append_many(void) {
    vmm_tensor *tensors[MAX_TENSORS + 1];
    vmm_array arrays[MAX_TENSORS + 1];
    source sources[MAX_TENSORS];
    vmm_stream stream = any_stream();
    unsigned expected = OK_OR_NO_MEMORY;
    bool any = false;
    size_t n = next() % (MAX_TENSORS + 1), first = next();

    if (n > w.n_tensors)
        n = w.n_tensors;
    for (size_t i = 0; i < n; i++) {
        shadow *s = w.tensors[(first + i) % w.n_tensors];
        begin(s);
        make_source(&sources[i], s, false);
        tensors[i] = s->tensor;
        arrays[i] = sources[i].array;
        any |= source_rows(&sources[i], s) > 0;
    }
    if (any)
        expected = expected_of_all(expected);
    if (any && w.f.is_gpu && stream == VMM_STREAM_NONE)
        expected = BIT(VMM_ERR_INVALID);
    size_t n_given = n;
    switch (n ? next() % 8 : 7) {
    case 0: /* twice */
        tensors[n] = tensors[0], arrays[n] = arrays[0], n_given++;
        expected = BIT(VMM_ERR_INVALID);
        break;
    case 1: tensors[n - 1] = NULL, expected = BIT(VMM_ERR_INVALID); break;
    default: break;
    }
    shadow *of[MAX_TENSORS]; /* end() forgets them */
    memcpy(of, w.busy, n * sizeof *of);
    vmm_status status = TRY(expected, vmm_append_many(n_given, tensors, arrays, stream));
    end(status);
    for (size_t i = 0; i < n; i++) {
        if (!status && source_rows(&sources[i], of[i]))
            appended(&sources[i], of[i]);
        source_free(&sources[i], &w.f);
        check_tensor(of[i]);
    }
}

/* To a few lanes by name, each behind its own length; or to all. */
void do_append_lanes(void) {
    size_t lanes[4], counts[4], ends = 0;
    shadow *s = any_tensor();
    vmm_stream stream = any_stream();
    source src;

    if (!s)
        return;
    bool all = next() & 1 && s->n_lanes <= LENGTH_OF(lanes), counted = next() & 1;
    size_t n = all ? s->n_lanes : 1 + next() % LENGTH_OF(lanes), n_rows = next() % 16;
    make_source_of(&src, s, n_rows, s->n_lanes > 1 ? n : 0, false);
    n_rows = source_rows(&src, s);
    unsigned expected = OK_OR_NO_MEMORY;
    bool is_wrong = false, is_full = false, any = false;
    for (size_t i = 0; i < n; i++) {
        lanes[i] = all ? i : next() % (s->n_lanes + (next() % 16 == 0));
        counts[i] = counted ? next() % (n_rows + 1) + (next() % 16 == 0) : n_rows;
        is_wrong |= lanes[i] >= s->n_lanes || counts[i] > n_rows;
        for (size_t k = 0; k < i; k++)
            is_wrong |= lanes[k] == lanes[i];
        size_t length = lanes[i] < s->n_lanes ? s->lengths[lanes[i]] : 0;
        is_full |= counts[i] > s->spec.capacity - length;
        any |= counts[i] > 0;
        ends = counts[i] && length + counts[i] > ends ? length + counts[i] : ends;
    }
    if (is_wrong)
        expected = BIT(VMM_ERR_INVALID) | (is_full ? BIT(VMM_ERR_CAPACITY) : 0);
    else if (is_full)
        expected = BIT(VMM_ERR_CAPACITY);
    else if (any && w.f.is_gpu && stream == VMM_STREAM_NONE)
        expected = BIT(VMM_ERR_INVALID);
    else if (any)
        expected = expected_with_graphs(s, expected);
    begin(s);
    vmm_status status =
        TRY(expected, vmm_append_lanes(1, &s->tensor, &src.array, n, all ? NULL : lanes,
                                       counted ? counts : NULL, stream));
    end(status);
    if (!status && any) {
        CHECK(ends <= s->mapped);
        for (size_t i = 0; i < n; i++) {
            source_copy(&src, s, i, lanes[i], s->lengths[lanes[i]], counts[i]);
            shadow_set_length(s, lanes[i], s->lengths[lanes[i]] + counts[i]);
        }
        cursor_is_current(s);
    }
    source_free(&src, &w.f);
    check_tensor(s);
}
