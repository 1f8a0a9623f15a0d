/* tensors.c - tensors come, grow, shrink and go; pins. */
#include "fuzz.h"

/* ---- tensors -------------------------------------------------------------------------------- */

static const vmm_dtype dtypes[] = {{0, 8, 1}, {2, 16, 1}, {2, 32, 1}, {0, 64, 1}, {5, 128, 1}};

static bool is_valid_spec(const vmm_spec *spec) {
    if (spec->ndim < 1 || spec->ndim > VMM_MAX_NDIM || !spec->shape || spec->axis < 0 ||
        spec->axis >= spec->ndim || spec->capacity < 1 || (unsigned)spec->layout > VMM_LAYOUT_C)
        return false;
    for (int d = 0; d < spec->ndim; d++)
        if (d != spec->axis && spec->shape[d] < 1)
            return false;
    int bits = spec->dtype.bits;
    return (bits == 8 || bits == 16 || bits == 32 || bits == 64 || bits == 128) &&
           spec->dtype.lanes == 1 &&
           (spec->block_bytes == VMM_BLOCK_AUTO || spec->block_bytes % w.f.granularity_bytes == 0);
}

void do_reserve(void) {
    static const int64_t sizes[] = {1,       2,         3,         0,         -1,        100,
                                    1 << 20, INT64_MAX, INT64_MIN, 1ll << 31, 1ll << 40, 7};
    static const size_t capacities[] = {
        1, 0, 255, SIZE_MAX, SIZE_MAX / 2, (size_t)1 << 40, (size_t)1 << 62, 65537};
    size_t granularity = w.f.granularity_bytes;
    const size_t blocks[] = {0,
                             VMM_BLOCK_AUTO,
                             granularity,
                             2 * granularity,
                             5 * granularity,
                             granularity / 2,
                             granularity + 1};
    const size_t odd_blocks[] = {SIZE_MAX - 1, (size_t)1 << 62, (size_t)1 << 40, 3};
    int64_t shape[VMM_MAX_NDIM + 1] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
    int i = any_pool();
    bool is_wild = next() % 4 == 0;
    vmm_tensor *tensor;

    if (i < 0 || w.n_tensors == MAX_TENSORS)
        return;
    vmm_spec spec = {.shape = shape, .zero = next() & 1};
    spec.block_bytes = PICK(blocks);
    if (is_wild) {
        spec.ndim = next() % 16 - 3;
        spec.axis = next() % 12 - 2;
        for (int d = 0; d < spec.ndim && d <= VMM_MAX_NDIM; d++)
            shape[d] = PICK(sizes);
        spec.capacity = PICK(capacities);
        spec.layout = (vmm_layout)(next() % 5);
        spec.dtype = (vmm_dtype){next(), next(), next() % 3};
        if (next() % 4 == 0)
            spec.shape = NULL;
        if (next() % 4 == 0)
            spec.block_bytes = PICK(odd_blocks);
    } else {
        spec.ndim = 1 + next() % VMM_MAX_NDIM;
        spec.axis = next() % spec.ndim;
        for (int d = 0; d < spec.ndim; d++)
            shape[d] = 1 + next() % (spec.ndim > 4 ? 2 : 5);
        spec.capacity = 1 + next() * 8u;
        spec.layout = (vmm_layout)(next() % 3);
        spec.dtype = PICK(dtypes);
    }
    unsigned expected = BIT(VMM_OK);
    if (!is_valid_spec(&spec))
        expected = BIT(VMM_ERR_INVALID);
    else if (is_wild)
        expected |= BIT(VMM_ERR_OVERFLOW) | BIT(VMM_ERR_OUT_OF_MEMORY) | BIT(VMM_ERR_DRIVER);
    vmm_status status = TRY(expected, vmm_reserve(w.pools[i].pool, &spec, &tensor));
    CHECK(!status == (tensor != NULL));
    if (status)
        return;
    CHECK_SIZE(vmm_capacity(tensor), spec.capacity);
    CHECK(vmm_ndim(tensor) == spec.ndim && vmm_axis(tensor) == spec.axis);
    CHECK(vmm_length(tensor) == 0 && vmm_mapped(tensor) == 0);
    add_tensor(tensor, &spec, i);
}

/* Any number of rows: a few, all that are left, too many. */
static size_t any_rows(const shadow *s) {
    size_t left = s->spec.capacity - s->length;
    const size_t rows[] = {0, 1, 2, 3, next(), 16 * (size_t)next(), left, left + 1, SIZE_MAX};
    return PICK(rows);
}

void do_map(void) {
    shadow *s = any_tensor();

    if (!s)
        return;
    size_t n = any_rows(s), before = s->mapped;
    begin(s);
    vmm_status status =
        TRY(n > s->spec.capacity ? BIT(VMM_ERR_CAPACITY) : OK_OR_NO_MEMORY, vmm_map(s->tensor, n));
    end(status);
    if (!status)
        CHECK(s->mapped >= n && s->mapped >= before);
}

void do_map_many(void) {
    vmm_tensor *tensors[MAX_TENSORS + 1];
    size_t n_rows[MAX_TENSORS + 1], before[MAX_TENSORS];
    unsigned expected = OK_OR_NO_MEMORY;
    size_t n = next() % (MAX_TENSORS + 1), first = next();
    shadow *of[MAX_TENSORS];

    if (n > w.n_tensors)
        n = w.n_tensors;
    for (size_t i = 0; i < n; i++) {
        of[i] = w.tensors[(first + i) % w.n_tensors];
        begin(of[i]);
        tensors[i] = of[i]->tensor;
        before[i] = of[i]->mapped;
        n_rows[i] = any_rows(of[i]);
        if (n_rows[i] > of[i]->spec.capacity)
            expected = BIT(VMM_ERR_CAPACITY);
    }
    size_t n_given = n;
    if (n && next() % 8 == 0) { /* twice */
        tensors[n] = tensors[0], n_rows[n] = 0, n_given++;
        expected = BIT(VMM_ERR_INVALID);
    }
    vmm_status status = TRY(n ? expected : BIT(VMM_OK), vmm_map_many(n_given, tensors, n_rows));
    end(status);
    for (size_t i = 0; i < n; i++)
        CHECK(status ? of[i]->mapped == before[i]
                     : of[i]->mapped >= n_rows[i] && of[i]->mapped >= before[i]);
}

void do_grow(void) {
    shadow *s = any_tensor();
    void *out = NULL;

    if (!s)
        return;
    size_t n = any_rows(s), begins = s->length;
    unsigned expected = OK_OR_NO_MEMORY;
    if (shadow_is_ragged(s))
        expected = BIT(VMM_ERR_INVALID);
    else if (n > s->spec.capacity - s->length)
        expected = BIT(VMM_ERR_CAPACITY);
    else if (n)
        expected = expected_with_graphs(s, expected);
    begin(s);
    vmm_status status = TRY(expected, vmm_grow(s->tensor, n, next() & 1 ? &out : NULL));
    end(status);
    if (status)
        return;
    if (out)
        CHECK((uint8_t *)out ==
              (uint8_t *)s->base + begins * (s->row_bytes / vmm_lane_count(s->tensor)));
    shadow_grow(s, n);
    if (n)
        cursor_is_current(s);
    if (s->spec.zero || s->cursor)
        check_tensor(s);
    if (n && n * s->row_bytes <= LOOK_BYTES && next() & 1)
        shadow_fill(s, &w.f, begins, next());
}

void do_truncate(void) {
    shadow *s = any_tensor();
    vmm_stream stream = any_stream();

    if (!s)
        return;
    const size_t rows[] = {0, s->length / 2, s->length, s->length + 1, next(), SIZE_MAX};
    size_t n = PICK(rows);
    unsigned expected = expected_of_truncation(s, BIT(VMM_OK));
    if (n > s->length)
        expected = BIT(VMM_ERR_INVALID);
    else if (n < s->length && pinned_rows(s) > n)
        expected = BIT(VMM_ERR_PINNED);
    if (!TRY(expected, vmm_truncate(s->tensor, n, stream))) {
        for (size_t lane = 0; lane < s->n_lanes; lane++)
            s->lengths[lane] = s->lengths[lane] < n ? s->lengths[lane] : n;
        s->length = n;
        cursor_is_current(s);
        s->has_overflowed = false;
    }
    check_tensor(s);
}

/* One lane, or the first few, or all by no name. */
void do_truncate_lanes(void) {
    size_t lanes[4], rows[4], n;
    shadow *s = any_tensor();
    vmm_stream stream = any_stream();

    if (!s)
        return;
    bool all = next() & 1 && s->n_lanes <= LENGTH_OF(lanes);
    n = all ? s->n_lanes : next() % (LENGTH_OF(lanes) + 1);
    unsigned expected = expected_of_truncation(s, BIT(VMM_OK));
    bool is_pinned = false, is_wrong = false;
    for (size_t i = 0; i < n; i++) {
        lanes[i] = all ? i : next() % (s->n_lanes + (next() % 8 == 0));
        for (size_t k = 0; k < i; k++)
            is_wrong |= lanes[k] == lanes[i];
        size_t length = lanes[i] < s->n_lanes ? s->lengths[lanes[i]] : 0;
        const size_t some[] = {length, length - (length > 0), length / 2, 0, length + 1};
        rows[i] = PICK(some);
        is_wrong |= lanes[i] >= s->n_lanes || rows[i] > length;
        is_pinned |= rows[i] < length && rows[i] < pinned_rows(s);
    }
    if (is_wrong)
        expected = BIT(VMM_ERR_INVALID);
    else if (is_pinned)
        expected = BIT(VMM_ERR_PINNED);
    if (!TRY(expected, vmm_truncate_lanes(s->tensor, n, all ? NULL : lanes, rows, stream))) {
        for (size_t i = 0; i < n; i++)
            shadow_set_length(s, lanes[i], rows[i]);
        cursor_is_current(s);
        s->has_overflowed = false;
    }
    check_tensor(s);
}

void do_trim(void) {
    shadow *s = any_tensor();

    if (!s)
        return;
    size_t before = s->mapped;
    vmm_status status = TRY(expected_with_graphs(s, BIT(VMM_OK)), vmm_trim(s->tensor));
    s->mapped = vmm_mapped(s->tensor);
    CHECK(status ? s->mapped == before : s->mapped <= before);
    check_tensor(s);
}

void do_fork(void) {
    shadow *s = any_tensor();
    vmm_tensor *tensor;

    if (!s || w.n_tensors == MAX_TENSORS)
        return;
    const size_t rows[] = {s->length, s->length / 2, 0, s->length + 1};
    size_t n = PICK(rows);
    begin(s);
    vmm_status status = TRY(n > s->length ? BIT(VMM_ERR_INVALID) : OK_OR_NO_MEMORY,
                            vmm_fork(s->tensor, n, &tensor));
    end(status);
    CHECK(!status == (tensor != NULL));
    if (status)
        return;
    shadow *fork = add_tensor(tensor, &s->spec, s->pool);
    CHECK(fork->base != s->base);
    fork->mapped = vmm_mapped(tensor);
    for (size_t lane = 0; lane < s->n_lanes; lane++) {
        size_t length = s->lengths[lane] < n ? s->lengths[lane] : n;
        for (size_t r = 0; r < length; r++)
            shadow_write(fork, lane, r, s->rows + r * s->row_bytes + lane * s->lane_bytes,
                         s->known[r * s->n_lanes + lane]);
        fork->lengths[lane] = length;
    }
    fork->length = n;
    check_tensor(fork);
}

void close_tensor(shadow *s) {
    check_tensor(s);
    if (!TRY(s->n_pins ? BIT(VMM_ERR_PINNED) : BIT(VMM_OK), vmm_close(s->tensor)))
        remove_tensor(s);
}

void do_close(void) {
    shadow *s = any_tensor();
    if (s)
        close_tensor(s);
}

void do_release(void) {
    shadow *s = any_tensor();

    if (!s)
        return;
    w.pools[s->pool].has_hidden |= s->n_pins > 0;
    arm();
    vmm_release(s->tensor);
    settle(VMM_OK, BIT(VMM_OK), "vmm_release");
    remove_tensor(s);
}

/* What lives is found, and for as long is not closed: also what only its pins keep. */
void do_find(void) {
    shadow *s = next() & 1 && w.n_pins ? w.pins[next() % w.n_pins].of : any_tensor();
    vmm_tensor *found;

    if (!s)
        return;
    TRY(BIT(VMM_OK), vmm_find((char *)s->base + 1, &found));
    CHECK(!found);
    TRY(BIT(VMM_OK), vmm_find(s->base, &found));
    CHECK(found && (!s->tensor || found == s->tensor));
    CHECK_SIZE(vmm_spec_of(found)->capacity, s->spec.capacity);
    CHECK(!s->tensor || vmm_pool_of(found) == w.pools[s->pool].pool);
    CHECK_STATUS(vmm_close(found), VMM_ERR_PINNED);
    vmm_release(found);
}

/* ---- pins ---------------------------------------------------------------------------------------- */

void do_pin(void) {
    shadow *s = any_tensor();
    vmm_pin *pin;

    if (!s || w.n_pins == MAX_PINS)
        return;
    const size_t rows[] = {0, s->length / 2, s->length, s->length + 1, SIZE_MAX};
    size_t n = PICK(rows);
    vmm_status status =
        TRY(n > s->length ? BIT(VMM_ERR_INVALID) : BIT(VMM_OK), vmm_pin_rows(s->tensor, n, &pin));
    CHECK(!status == (pin != NULL));
    if (status)
        return;
    w.pins[w.n_pins].pin = pin;
    w.pins[w.n_pins].of = s;
    w.pins[w.n_pins++].n_rows = n;
    s->n_pins++;
    CHECK_SIZE(vmm_pinned_rows(s->tensor), pinned_rows(s));
}

void do_unpin(void) {
    if (w.n_pins == 0)
        return;
    size_t i = next() % w.n_pins;
    arm();
    vmm_unpin(w.pins[i].pin);
    settle(VMM_OK, BIT(VMM_OK), "vmm_unpin");
    shadow *of = w.pins[i].of;
    w.pins[i] = w.pins[--w.n_pins];
    drop_keeper(of);
}
