/* fuzz_vmm.c - the bytes of an input become calls of vmm.h, with arguments that are right and
 * wrong, in any order, on the host and on the simulated CUDA driver, some of whose calls are
 * made to fail. After each call: the status is one that fits, a failure has changed nothing,
 * contents and books are those of the shadows, the pools stay within their budgets. At the
 * end nothing is alive.
 *
 * `make fuzz` links it to libFuzzer; tests/c/test_fuzz_corpus.c runs the corpus through it.
 */
#include "shadow.h"
#include "vmm_sim.h"

#define MAX_TENSORS 6
#define MAX_POOLS 2
#define MAX_PINS 8
#define MAX_EVENTS 4
#define MAX_ALLOCATIONS 4
#define BIT(status) (1u << (status))
/* What a call may return when a driver call was made to fail. */
#define INJECTED                                                                                   \
    (BIT(VMM_ERR_DRIVER) | BIT(VMM_ERR_OUT_OF_MEMORY) | BIT(VMM_ERR_CAPTURING) |                   \
     BIT(VMM_ERR_INVALID) | BIT(VMM_ERR_NO_DEVICE) | BIT(VMM_ERR_UNSUPPORTED))
#define OK_OR_NO_MEMORY (BIT(VMM_OK) | BIT(VMM_ERR_OUT_OF_MEMORY))

/* "host" or "cuda:0": every input on this device; NULL: the input says on which. */
static const char *fuzz_device;

typedef struct pool_slot {
    vmm_pool *pool;
    size_t block_bytes, max_bytes;
    size_t n_captures;
    size_t n_hooks;
    bool has_hidden; /* tensors of it were given up under pins: the books cannot be compared */
} pool_slot;

static struct {
    const uint8_t *data;
    size_t left;
    fixture f;
    pool_slot pools[MAX_POOLS];
    shadow *tensors[MAX_TENSORS];
    size_t n_tensors;
    shadow *busy[MAX_TENSORS]; /* in the call that is being made */
    size_t n_busy;
    struct {
        vmm_pin *pin;
        shadow *of;
        size_t n_rows;
    } pins[MAX_PINS];
    size_t n_pins;
    struct {
        uint8_t *pointer;
        size_t bytes, mapped_bytes;
        int pool;
        uint8_t contents;
    } allocations[MAX_ALLOCATIONS];
    size_t n_allocations;
    vmm_event *events[MAX_EVENTS];
    size_t n_events;
    struct {
        bool armed;
        uint8_t call, nth, code, times;
    } failure;
    long failed_before;
    bool any_failed;
    long events_before;
} w;

/* Made once: the simulator keeps what is left of a stream. */
static void *streams[2];

/* ---- the input ------------------------------------------------------------------------- */

static uint8_t next(void) {
    if (w.left == 0)
        return 0;
    w.left--;
    return *w.data++;
}

#define PICK(table) ((table)[next() % LENGTH_OF(table)])

/* ---- the simulator ----------------------------------------------------------------------- */

static struct {
    int (*fail)(const char *call, long nth, int code, int times);
    long (*failed)(void);
    void (*fail_none)(void);
    const char *(*call_name)(size_t i);
    void (*live)(long *, long *, long *, unsigned long long *);
    void (*live_objects)(long *, long *, long *, long *);
} sim; /* all NULL with a real driver */

static void find_simulator(void) {
    *(void **)&sim.fail = dlsym(cuda_library(), "vmm_sim_fail");
    *(void **)&sim.failed = dlsym(cuda_library(), "vmm_sim_failed");
    *(void **)&sim.fail_none = dlsym(cuda_library(), "vmm_sim_fail_none");
    *(void **)&sim.call_name = dlsym(cuda_library(), "vmm_sim_call_name");
    *(void **)&sim.live = dlsym(cuda_library(), "vmm_sim_live");
    *(void **)&sim.live_objects = dlsym(cuda_library(), "vmm_sim_live_objects");
}

/* The failure that was asked for meets the next call of libvmm, and none of ours. */
static void arm(void) {
    static const int codes[] = {2, 600, 1, 900, 999, 400, 4242};
    static const int times[] = {1, 2, 3, 12, -1};

    w.failed_before = 0;
    if (!w.f.is_gpu || !sim.fail)
        return;
    w.failed_before = sim.failed();
    if (!w.failure.armed)
        return;
    size_t n_calls = 0;
    while (sim.call_name(n_calls))
        n_calls++;
    size_t call = w.failure.call % (2 * n_calls); /* any call, half of the time */
    CHECK(sim.fail(call < n_calls ? sim.call_name(call) : "*", 1 + w.failure.nth % 24,
                   codes[w.failure.code % LENGTH_OF(codes)],
                   times[w.failure.times % LENGTH_OF(times)]) == 0);
    w.failure.armed = false;
}

static vmm_status settle(vmm_status status, unsigned expected, const char *call) {
    bool injected = false;

    if (w.f.is_gpu && sim.fail) {
        injected = sim.failed() > w.failed_before;
        sim.fail_none();
    }
    if (injected)
        expected |= INJECTED;
    w.any_failed |= injected;
    if (!(expected & BIT(status)))
        FAIL("%s\n  returned %s%s; the last error: %s", call, vmm_status_name(status),
             injected ? " (a driver call failed)" : "", vmm_last_error()->message);
    if (status)
        CHECK(vmm_last_error()->status == status && vmm_last_error()->message[0]);
    return status;
}

/* Make the call; end the program if what it returns is neither expected nor injected. */
#define TRY(expected, call) (arm(), settle((call), (expected), #call))

/* ---- what there is ------------------------------------------------------------------------ */

static shadow *any_tensor(void) {
    return w.n_tensors ? w.tensors[next() % w.n_tensors] : NULL;
}

static int any_pool(void) {
    int i = next() % MAX_POOLS;
    return w.pools[i].pool ? i : w.pools[!i].pool ? !i : -1;
}

static bool is_busy(const shadow *s) {
    for (size_t i = 0; i < w.n_busy; i++)
        if (w.busy[i] == s)
            return true;
    return false;
}

static vmm_stream any_stream(void) {
    vmm_stream all[] = {NULL,       VMM_STREAM_LEGACY, VMM_STREAM_PER_THREAD,
                        streams[0], streams[1],        VMM_STREAM_NONE};
    return PICK(all);
}

static size_t pinned_rows(const shadow *s) {
    size_t most = 0;
    for (size_t i = 0; i < w.n_pins; i++)
        if (w.pins[i].of == s && w.pins[i].n_rows > most)
            most = w.pins[i].n_rows;
    return most;
}

static void check_pool(const pool_slot *slot) {
    vmm_pool_stats stats;
    size_t in_use = 0;

    CHECK_OK(vmm_pool_statistics(slot->pool, &stats));
    CHECK_SIZE(stats.max_bytes, slot->max_bytes);
    CHECK_SIZE(vmm_pool_block_bytes(slot->pool), slot->block_bytes);
    CHECK(held_bytes(slot->pool) <= stats.peak_bytes && stats.peak_bytes <= stats.max_bytes);
    for (size_t i = 0; i < w.n_tensors; i++) {
        vmm_tensor_stats of;
        if (&w.pools[w.tensors[i]->pool] != slot)
            continue;
        CHECK_OK(vmm_stats(w.tensors[i]->tensor, &of));
        in_use += of.mapped_bytes;
    }
    for (size_t i = 0; i < w.n_allocations; i++)
        if (&w.pools[w.allocations[i].pool] == slot)
            in_use += w.allocations[i].mapped_bytes;
    if (!slot->has_hidden)
        CHECK_SIZE(stats.in_use_bytes, in_use);
    if (!w.f.is_gpu)
        CHECK(stats.queued_bytes == 0 && stats.free_bytes == 0 && stats.parked_bytes == 0);
}

static void check_everything(void) {
    for (size_t i = 0; i < w.n_tensors; i++)
        shadow_check_books(w.tensors[i]);
    for (int i = 0; i < MAX_POOLS; i++)
        if (w.pools[i].pool)
            check_pool(&w.pools[i]);
}

static void remove_tensor(shadow *s) {
    for (size_t i = 0; i < w.n_tensors; i++)
        if (w.tensors[i] == s)
            w.tensors[i] = w.tensors[--w.n_tensors];
    s->tensor = NULL;
    if (s->n_pins == 0)
        shadow_free(s);
}

static void remove_pin(size_t i) {
    shadow *of = w.pins[i].of;
    w.pins[i] = w.pins[--w.n_pins];
    if (--of->n_pins == 0 && !of->tensor)
        shadow_free(of);
}

static shadow *add_tensor(vmm_tensor *tensor, const vmm_spec *spec, int pool) {
    shadow *s = calloc(1, sizeof *s);

    CHECK(s);
    *s = (shadow){.tensor = tensor, .spec = *spec, .base = vmm_base(tensor), .pool = pool};
    memcpy(s->shape, spec->shape, (size_t)spec->ndim * sizeof *spec->shape);
    s->spec.shape = s->shape;
    s->row_bytes = vmm_row_bytes(tensor);
    w.tensors[w.n_tensors++] = s;
    return s;
}

/* ---- pools -------------------------------------------------------------------------------- */

static void do_pool_create(void) {
    size_t granularity = w.f.granularity_bytes;
    const size_t blocks[] = {0, VMM_BLOCK_AUTO, granularity, 3 * granularity, granularity + 1, 1};
    size_t block = PICK(blocks), max = (1 + (size_t)next()) * 2 * granularity;
    int i = w.pools[0].pool ? 1 : 0;
    vmm_pool *pool;

    if (w.pools[i].pool)
        return;
    size_t smallest = block == 0 || block == VMM_BLOCK_AUTO ? granularity : block;
    bool is_valid = smallest % granularity == 0 && smallest <= max;
    vmm_status status = TRY(is_valid ? BIT(VMM_OK) : BIT(VMM_ERR_INVALID),
                            vmm_pool_create(w.f.device, block, max, &pool));
    CHECK(!status == (pool != NULL));
    if (!status)
        w.pools[i] = (pool_slot){
            .pool = pool, .block_bytes = block ? block : VMM_BLOCK_AUTO, .max_bytes = max};
}

static bool is_capturing(void) {
    return w.f.is_gpu && (w.pools[0].n_captures || w.pools[1].n_captures);
}

static void do_pool_trim(void) {
    int i = any_pool();
    unsigned expected = BIT(VMM_OK) | (is_capturing() ? BIT(VMM_ERR_CAPTURING) : 0);

    if (i < 0)
        TRY(BIT(VMM_ERR_INVALID), vmm_pool_trim(NULL, 0));
    else
        TRY(expected, vmm_pool_trim(w.pools[i].pool, next() & 1));
}

static bool has_allocations(int pool) {
    for (size_t i = 0; i < w.n_allocations; i++)
        if (w.allocations[i].pool == pool)
            return true;
    return false;
}

static bool has_tensors(int pool) {
    for (size_t i = 0; i < w.n_tensors; i++)
        if (w.tensors[i]->pool == pool)
            return true;
    for (size_t i = 0; i < w.n_pins; i++)
        if (w.pins[i].of->pool == pool)
            return true;
    return false;
}

static void do_pool_close(void) {
    int i = any_pool();

    if (i < 0)
        return;
    unsigned expected = BIT(VMM_OK) | (is_capturing() ? BIT(VMM_ERR_CAPTURING) : 0);
    vmm_status status = TRY(has_tensors(i) || has_allocations(i) ? BIT(VMM_ERR_BUSY) : expected,
                            vmm_pool_close(w.pools[i].pool));
    if (!status)
        w.pools[i] = (pool_slot){0};
}

/* Its tensors go on, but we lose sight of the pool: only where it has none but those that
 * pins keep. */
static void do_pool_release(void) {
    int i = any_pool();

    if (i < 0 || has_allocations(i))
        return;
    for (size_t t = 0; t < w.n_tensors; t++)
        if (w.tensors[t]->pool == i)
            return;
    for (size_t p = 0; p < w.n_pins; p++)
        if (w.pins[p].of->pool == i)
            w.pins[p].of->pool = -1;
    arm();
    vmm_pool_release(w.pools[i].pool);
    settle(VMM_OK, BIT(VMM_OK), "vmm_pool_release");
    w.pools[i] = (pool_slot){0};
}

static void do_capture(void) {
    int i = any_pool();

    if (i < 0)
        return;
    if (next() & 1) {
        TRY(BIT(VMM_OK), vmm_pool_capture_begin(w.pools[i].pool));
        w.pools[i].n_captures++;
    } else if (w.pools[i].n_captures) {
        TRY(BIT(VMM_OK), vmm_pool_capture_end(w.pools[i].pool));
        w.pools[i].n_captures--;
    } else {
        TRY(BIT(VMM_ERR_INVALID), vmm_pool_capture_end(w.pools[i].pool));
    }
}

static void close_tensor(shadow *s);

/* Out of memory: do what a callback may, and try what it must not. */
static int on_oom(void *user, size_t needed_bytes) {
    pool_slot *slot = user;
    shadow *s = any_tensor();
    void *out;

    CHECK(needed_bytes > 0);
    switch (next() % 6) {
    case 0: return 0;
    case 1: vmm_pool_trim(slot->pool, next() & 1); return 1;
    case 2:
        if (!s || is_busy(s) || s->n_pins)
            return 0;
        CHECK_OK(vmm_close(s->tensor));
        remove_tensor(s);
        return 1;
    case 3:
        if (!s || is_busy(s))
            return 0;
        CHECK_OK(vmm_trim(s->tensor));
        s->mapped = vmm_mapped(s->tensor);
        return 1;
    case 4:
        if (w.n_busy) {
            CHECK_STATUS(vmm_grow(w.busy[0]->tensor, 1, &out), VMM_ERR_BUSY);
            CHECK_STATUS(vmm_trim(w.busy[0]->tensor), VMM_ERR_BUSY);
            if (!w.busy[0]->n_pins)
                CHECK_STATUS(vmm_close(w.busy[0]->tensor), VMM_ERR_BUSY);
        }
        return 0;
    default: return 1; /* not true */
    }
}

static void do_hook(void) {
    int i = any_pool();

    if (i < 0)
        return;
    if (next() & 1) {
        bool any = w.pools[i].n_hooks > 0;
        TRY(any ? BIT(VMM_OK) : BIT(VMM_ERR_INVALID),
            vmm_pool_on_oom(w.pools[i].pool, NULL, &w.pools[i]));
        w.pools[i].n_hooks = 0;
    } else if (w.pools[i].n_hooks < 3) {
        TRY(BIT(VMM_OK), vmm_pool_on_oom(w.pools[i].pool, on_oom, &w.pools[i]));
        w.pools[i].n_hooks++;
    }
}

/* ---- allocations ------------------------------------------------------------------------------ */

static void free_allocation(size_t i) {
    uint8_t *pointer = w.allocations[i].pointer, contents = w.allocations[i].contents;
    size_t bytes = w.allocations[i].bytes;
    vmm_pool *pool = w.pools[w.allocations[i].pool].pool;
    uint8_t *seen = malloc(bytes);

    CHECK(seen);
    read_device(&w.f, seen, (uintptr_t)pointer, bytes);
    for (size_t at = 0; at < bytes; at++)
        CHECK(seen[at] == contents);
    free(seen);
    TRY(BIT(VMM_OK), vmm_pool_free(pool, pointer));
    TRY(BIT(VMM_ERR_INVALID), vmm_pool_free(pool, pointer));
    w.allocations[i] = w.allocations[--w.n_allocations];
}

static void do_alloc(void) {
    size_t granularity = w.f.granularity_bytes;
    const size_t sizes[] = {0, 1, granularity, 2 * granularity + 1, 40 * granularity, SIZE_MAX};
    size_t bytes = PICK(sizes);
    vmm_stream stream = any_stream();
    int i = any_pool();
    void *pointer;

    if (i < 0 || w.n_allocations == MAX_ALLOCATIONS)
        return;
    unsigned expected = bytes == 0          ? BIT(VMM_ERR_INVALID)
                        : bytes == SIZE_MAX ? BIT(VMM_ERR_OVERFLOW)
                                            : OK_OR_NO_MEMORY;
    vmm_status status = TRY(expected, vmm_pool_alloc(w.pools[i].pool, bytes, stream, &pointer));
    CHECK(!status == (pointer != NULL));
    if (status)
        return;
    size_t block = w.pools[i].block_bytes == VMM_BLOCK_AUTO ? granularity : w.pools[i].block_bytes;
    uint8_t contents = next(), *data = malloc(bytes);
    CHECK(data);
    memset(data, contents, bytes);
    write_device(&w.f, pointer, data, bytes);
    free(data);
    w.allocations[w.n_allocations].pointer = pointer;
    w.allocations[w.n_allocations].bytes = bytes;
    w.allocations[w.n_allocations].mapped_bytes = (bytes + block - 1) / block * block;
    w.allocations[w.n_allocations].contents = contents;
    w.allocations[w.n_allocations++].pool = i;
}

static void do_free(void) {
    if (w.n_allocations)
        free_allocation(next() % w.n_allocations);
}

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

static void do_reserve(void) {
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

static void begin(shadow *s) {
    w.busy[w.n_busy++] = s;
}

/* The call is over: what is mapped is read anew after a success, and checked after a failure. */
static void end(vmm_status status) {
    for (size_t i = 0; i < w.n_busy; i++)
        if (!status)
            w.busy[i]->mapped = vmm_mapped(w.busy[i]->tensor);
    w.n_busy = 0;
}

/* Any number of rows: a few, all that are left, too many. */
static size_t any_rows(const shadow *s) {
    size_t left = s->spec.capacity - s->length;
    const size_t rows[] = {0, 1, 2, 3, next(), 16 * (size_t)next(), left, left + 1, SIZE_MAX};
    return PICK(rows);
}

static void do_map(void) {
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

static void do_grow(void) {
    shadow *s = any_tensor();
    void *out = NULL;

    if (!s)
        return;
    size_t n = any_rows(s), begins = s->length;
    bool is_valid = n <= s->spec.capacity - s->length;
    begin(s);
    vmm_status status = TRY(is_valid ? OK_OR_NO_MEMORY : BIT(VMM_ERR_CAPACITY),
                            vmm_grow(s->tensor, n, next() & 1 ? &out : NULL));
    end(status);
    if (status)
        return;
    if (out)
        CHECK((uint8_t *)out ==
              (uint8_t *)s->base + begins * (s->row_bytes / vmm_lane_count(s->tensor)));
    shadow_extend(s, n, s->spec.zero);
    if (s->spec.zero)
        shadow_check_rows(s, &w.f);
    if (n && n * s->row_bytes <= LOOK_BYTES && next() & 1)
        shadow_write(s, &w.f, begins, next());
}

/* A source for `s` of rows that fit. */
static void make_source(source *src, const shadow *s) {
    size_t left = s->spec.capacity - s->length, n = 1 + next() % 32;
    stride_kind kinds[VMM_MAX_NDIM];
    uint8_t bits = next();

    if (n > left)
        n = left;
    while (n && n * s->row_bytes > LOOK_BYTES)
        n /= 2;
    for (int d = 0; d < s->spec.ndim; d++)
        kinds[d] = (stride_kind)(bits & 0x80 ? next() % 4 : DENSE);
    source_make(src, s, &w.f, n, kinds, bits & 3, next(), w.f.is_gpu && bits & 0x40);
    if (!(bits & 0x80) && bits & 0x20)
        src->array.strides = NULL;
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

static void do_append(void) {
    shadow *s = any_tensor();
    vmm_stream stream = any_stream();
    source src;

    if (!s)
        return;
    make_source(&src, s);
    size_t n = (size_t)src.shape[s->spec.axis];
    vmm_status wrong = next() % 4 ? VMM_OK : spoil(&src, s);
    if (!wrong && w.f.is_gpu && stream == VMM_STREAM_NONE && n)
        wrong = VMM_ERR_INVALID;
    unsigned expected = wrong ? BIT(wrong) : OK_OR_NO_MEMORY;
    begin(s);
    vmm_status status = TRY(expected, vmm_append(s->tensor, &src.array, stream));
    end(status);
    if (!status && n)
        source_gather(&src, s, shadow_extend(s, n, true));
    source_free(&src, &w.f);
    shadow_check_rows(s, &w.f);
}

static void do_append_many(void) {
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
        make_source(&sources[i], s);
        tensors[i] = s->tensor;
        arrays[i] = sources[i].array;
        any |= sources[i].shape[s->spec.axis] > 0;
    }
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
        size_t n_rows = (size_t)sources[i].shape[of[i]->spec.axis];
        if (!status && n_rows)
            source_gather(&sources[i], of[i], shadow_extend(of[i], n_rows, true));
        source_free(&sources[i], &w.f);
        shadow_check_rows(of[i], &w.f);
    }
}

/* A lane gets rows and loses them again, so that what the shadow knows stays even. */
static void do_lane(void) {
    shadow *s = any_tensor();
    vmm_stream stream = any_stream();
    source src;

    if (!s)
        return;
    make_source(&src, s);
    size_t n_lanes = vmm_length_count(s->tensor), n_rows = (size_t)src.shape[s->spec.axis];
    const size_t lanes[] = {next() % n_lanes, n_lanes}, counts[] = {n_rows, n_rows / 2, n_rows + 1};
    size_t lane = PICK(lanes), count = PICK(counts), before = s->length;
    unsigned expected = OK_OR_NO_MEMORY;
    if (n_lanes > 1)
        src.shape[0] = 1;
    if (lane == n_lanes || count > n_rows || (count && w.f.is_gpu && stream == VMM_STREAM_NONE))
        expected = BIT(VMM_ERR_INVALID);
    begin(s);
    vmm_status status =
        TRY(expected, vmm_append_lanes(1, &s->tensor, &src.array, 1, &lane, &count, stream));
    end(status);
    source_free(&src, &w.f);
    const size_t *lengths = vmm_lengths(s->tensor);
    for (size_t i = 0; i < n_lanes; i++)
        CHECK_SIZE(lengths[i], before + (!status && i == lane ? count : 0));
    if (status)
        return;
    CHECK(vmm_is_ragged(s->tensor) == (count > 0 && n_lanes > 1));
    if (vmm_is_ragged(s->tensor))
        CHECK_STATUS(vmm_grow(s->tensor, 0, NULL), VMM_ERR_INVALID);
    CHECK_OK(vmm_truncate_lanes(s->tensor, 1, &lane, &before, VMM_STREAM_NONE));
    shadow_check_rows(s, &w.f);
}

static void do_truncate(void) {
    shadow *s = any_tensor();
    vmm_stream stream = any_stream();

    if (!s)
        return;
    const size_t rows[] = {0, s->length / 2, s->length, s->length + 1, next(), SIZE_MAX};
    size_t n = PICK(rows);
    unsigned expected = BIT(VMM_OK);
    if (n > s->length)
        expected = BIT(VMM_ERR_INVALID);
    else if (n < s->length && pinned_rows(s) > n)
        expected = BIT(VMM_ERR_PINNED);
    if (!TRY(expected, vmm_truncate(s->tensor, n, stream)))
        s->length = n;
    shadow_check_rows(s, &w.f);
}

static void do_trim(void) {
    shadow *s = any_tensor();

    if (!s)
        return;
    TRY(BIT(VMM_OK), vmm_trim(s->tensor));
    s->mapped = vmm_mapped(s->tensor);
    shadow_check_rows(s, &w.f);
}

static void do_fork(void) {
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
    if (n) {
        memcpy(shadow_extend(fork, n, true), s->rows, n * s->row_bytes);
        memcpy(fork->known, s->known, n);
    }
    shadow_check_rows(fork, &w.f);
}

static void close_tensor(shadow *s) {
    shadow_check_rows(s, &w.f);
    if (!TRY(s->n_pins ? BIT(VMM_ERR_PINNED) : BIT(VMM_OK), vmm_close(s->tensor)))
        remove_tensor(s);
}

static void do_close(void) {
    shadow *s = any_tensor();
    if (s)
        close_tensor(s);
}

static void do_release(void) {
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
static void do_find(void) {
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

/* ---- pins, streams, events -------------------------------------------------------------------- */

static void do_pin(void) {
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

static void do_unpin(void) {
    if (w.n_pins == 0)
        return;
    size_t i = next() % w.n_pins;
    arm();
    vmm_unpin(w.pins[i].pin);
    settle(VMM_OK, BIT(VMM_OK), "vmm_unpin");
    remove_pin(i);
}

static void do_handoff(void) {
    shadow *s = any_tensor();
    if (s)
        TRY(BIT(VMM_OK), vmm_handoff(s->tensor, any_stream()));
}

static void do_stream_wait(void) {
    vmm_stream waiter = any_stream(), producer = any_stream();
    if (waiter != VMM_STREAM_NONE && producer != VMM_STREAM_NONE)
        TRY(BIT(VMM_OK), vmm_stream_wait(w.f.device, waiter, producer));
}

static void do_event(void) {
    vmm_stream stream = any_stream();
    vmm_event *event;
    int done = -1;

    if (next() & 1 && w.n_events < MAX_EVENTS && stream != VMM_STREAM_NONE) {
        vmm_status status = TRY(BIT(VMM_OK), vmm_event_record(w.f.device, stream, &event));
        CHECK(!status == (event != NULL));
        if (!status)
            w.events[w.n_events++] = event;
    } else if (w.n_events) {
        size_t i = next() % w.n_events;
        vmm_status status = TRY(BIT(VMM_OK), vmm_event_query(w.events[i], &done));
        CHECK(status ? done == -1 : done == 0 || done == 1);
        if (next() & 1) {
            vmm_event_close(w.events[i]);
            w.events[i] = w.events[--w.n_events];
        }
    }
}

/* ---- devices, nothing at all --------------------------------------------------------------- */

static void do_device(void) {
    char name[8] = "cuda:0";
    vmm_device *device;
    vmm_device_info info;

    /* Without a failure: addresses that the driver will not take back are lost. */
    CHECK_OK(vmm_device_query(w.f.device, &info));
    for (size_t i = 0; i < sizeof name - 1; i++) {
        uint8_t byte = next();
        if (byte)
            name[i] = (char)byte;
    }
    vmm_status status = vmm_device_open(next() & 1 ? name : w.f.name, &device);
    CHECK(!status == (device != NULL));
    vmm_device_close(device);
}

static void do_nothing(void) {
    vmm_pin *pin;
    vmm_event *event;
    vmm_tensor *tensor;
    vmm_pool *pool;
    int done;
    shadow *s = any_tensor();
    vmm_tensor *t = s ? s->tensor : NULL;
    vmm_pool *p = w.pools[0].pool;
    vmm_status status = VMM_ERR_INVALID;

    switch (next() % 16) {
    case 0: status = vmm_map(NULL, 1); break;
    case 1: status = vmm_grow(NULL, 1, NULL); break;
    case 2: status = vmm_append(t, NULL, NULL); break;
    case 3: status = vmm_append_many(1, NULL, NULL, NULL); break;
    case 4: status = vmm_truncate(NULL, 0, NULL); break;
    case 5: status = vmm_trim(NULL); break;
    case 6: status = vmm_fork(t, 0, NULL); break;
    case 7: status = vmm_fork(NULL, 0, &tensor); break;
    case 8: status = vmm_pin_rows(NULL, 0, &pin); break;
    case 9: status = vmm_handoff(NULL, NULL); break;
    case 10: status = vmm_event_record(NULL, NULL, &event); break;
    case 11: status = vmm_event_query(NULL, &done); break;
    case 12: status = vmm_pool_create(NULL, 0, 0, &pool); break;
    case 13: status = vmm_reserve(p, NULL, &tensor); break;
    case 14: status = vmm_stats(t, NULL); break;
    default:
        vmm_release(NULL);
        vmm_unpin(NULL);
        vmm_event_close(NULL);
        vmm_pool_release(NULL);
        vmm_device_close(NULL);
        return;
    }
    CHECK(status == VMM_ERR_INVALID && vmm_last_error()->status == VMM_ERR_INVALID);
}

static void do_failure(void) {
    w.failure.armed = true;
    w.failure.call = next(), w.failure.nth = next();
    w.failure.code = next(), w.failure.times = next();
}

/* ---- an input --------------------------------------------------------------------------------- */

static void (*const operations[])(void) = {
    do_reserve, do_append,  do_grow,      do_append,      do_failure,    do_truncate,
    do_trim,    do_map,     do_fork,      do_append_many, do_pin,        do_unpin,
    do_close,   do_release, do_pool_trim, do_pool_create, do_pool_close, do_pool_release,
    do_capture, do_hook,    do_handoff,   do_stream_wait, do_event,      do_device,
    do_nothing, do_alloc,   do_lane,      do_failure,     do_free,       do_find,
};

static void open_world(const char *device) {
    static size_t granularity_bytes[2];
    vmm_device_info info;
    vmm_pool *pool;

    w.f = (fixture){.name = device, .is_gpu = strcmp(device, "host") != 0};
    CHECK_OK(vmm_device_open(device, &w.f.device));
    if (!granularity_bytes[w.f.is_gpu]) {
        CHECK_OK(vmm_device_query(w.f.device, &info));
        granularity_bytes[w.f.is_gpu] = info.granularity_bytes;
        is_hip = info.kind == VMM_DEVICE_HIP;
        if (w.f.is_gpu) {
            cuda();
            find_simulator();
            for (size_t i = 0; i < LENGTH_OF(streams); i++)
                CHECK_CUDA(cuda()->stream_create(&streams[i], CUDA_STREAM_NON_BLOCKING));
        }
    }
    w.f.granularity_bytes = granularity_bytes[w.f.is_gpu];
    if (w.f.is_gpu && sim.live_objects)
        sim.live_objects(NULL, &w.events_before, NULL, NULL);
    CHECK_OK(vmm_pool_create(w.f.device, 0, 64 * w.f.granularity_bytes, &pool));
    w.pools[0] = (pool_slot){
        .pool = pool, .block_bytes = VMM_BLOCK_AUTO, .max_bytes = 64 * w.f.granularity_bytes};
}

/* Pools that were given up are swept by the calls of another. */
static void sweep_given_up(void) {
    long handles = 0, mappings = 0, reservations = 0, events = 0;
    vmm_pool *pool;

    CHECK_OK(vmm_pool_create(w.f.device, 0, 0, &pool));
    for (int i = 0; i < 3; i++) {
        synchronize(&w.f);
        CHECK_OK(vmm_pool_trim(pool, 1));
    }
    CHECK_OK(vmm_pool_close(pool));
    if (!w.f.is_gpu || !sim.live)
        return;
    sim.live(&handles, &mappings, &reservations, NULL);
    sim.live_objects(NULL, &events, NULL, NULL);
    events -= w.events_before;
    if (w.any_failed) /* an event that the driver would not destroy is lost */
        events = 0;
    if (handles || mappings || reservations || events)
        FAIL("%ld handles, %ld mappings, %ld reservations, %ld events are left", handles, mappings,
             reservations, events);
}

static void close_world(void) {
    w.failure.armed = false;
    while (w.n_pins)
        do_unpin();
    while (w.n_tensors)
        close_tensor(w.tensors[0]);
    while (w.n_allocations)
        free_allocation(0);
    while (w.n_events)
        vmm_event_close(w.events[--w.n_events]);
    for (int i = 0; i < MAX_POOLS; i++)
        while (w.pools[i].n_captures) {
            CHECK_OK(vmm_pool_capture_end(w.pools[i].pool));
            w.pools[i].n_captures--;
        }
    for (int i = 0; i < MAX_POOLS; i++)
        if (w.pools[i].pool) {
            w.f.pool = w.pools[i].pool;
            vmm_pool_stats stats;
            CHECK_OK(vmm_pool_trim(w.f.pool, 1));
            CHECK_OK(vmm_pool_statistics(w.f.pool, &stats));
            CHECK_SIZE(held_bytes(w.f.pool), 0);
            CHECK_OK(vmm_pool_close(w.f.pool));
        }
    sweep_given_up();
    vmm_device_close(w.f.device);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    /* Small pages, so that small inputs map many; read when the simulator is loaded. */
    setenv("VMM_SIM_GRANULARITY", "4096", 0);
    setenv("VMM_SIM_DELAY_US", "0", 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    memset(&w, 0, sizeof w);
    w.data = data;
    w.left = size;
    bool on_cuda = next() & 1;
    open_world(fuzz_device ? fuzz_device : on_cuda ? "cuda:0" : "host");
    while (w.left) {
        operations[next() % LENGTH_OF(operations)]();
        check_everything();
    }
    close_world();
    return 0;
}
