/* The cursor by itself: what can have one and what it answers, its control block behind a fence,
 * entries by the hundred and of different lengths, and whether a stream is being captured.
 * test_graphs.c has what graphs do with it. */
#include "check.h"

#include <semaphore.h>

#include "../../libvmm/src/cursor_job.h"
#include "../sim/vmm_sim.h"

static fixture f;
static void *stream, *other;

static vmm_spec spec_of(int ndim, const int64_t *shape, int axis, vmm_layout layout) {
    return (vmm_spec){.ndim = ndim,
                      .shape = shape,
                      .axis = axis,
                      .dtype = VMM_UINT8,
                      .layout = layout,
                      .capacity = 300,
                      .block_bytes = f.granularity_bytes};
}

static vmm_tensor *reserve(int ndim, const int64_t *shape, int axis, vmm_layout layout) {
    vmm_spec spec = spec_of(ndim, shape, axis, layout);
    vmm_tensor *tensor;

    CHECK_OK(vmm_reserve(f.pool, &spec, &tensor));
    return tensor;
}

/* `n_rows` rows of one byte value in device memory, for all of a tensor or one lane of it. */
typedef struct source {
    vmm_array array;
    int64_t shape[VMM_MAX_NDIM];
} source;

static void source_open(source *out, const vmm_tensor *tensor, size_t n_rows, uint8_t byte) {
    size_t bytes = n_rows * vmm_row_bytes(tensor);
    uint8_t *host = malloc(bytes + 1);

    CHECK(host);
    memset(host, byte, bytes);
    *out = (source){.array = {.data = device_alloc(&f, bytes),
                              .memory = f.is_gpu ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST,
                              .dtype = VMM_UINT8,
                              .ndim = vmm_ndim(tensor)}};
    rows_shape(tensor, n_rows, out->shape);
    out->array.shape = out->shape;
    if (bytes)
        write_device(&f, (void *)(uintptr_t)out->array.data, host, bytes);
    free(host);
}

static void source_close(source *s) {
    synchronize(&f);
    device_free(&f, (void *)(uintptr_t)s->array.data);
}

static void append(vmm_tensor *tensor, size_t n_rows, uint8_t byte) {
    source s;

    source_open(&s, tensor, n_rows, byte);
    CHECK_OK(vmm_append(tensor, &s.array, stream));
    source_close(&s);
}

/* What the device has is what the host has. */
static void check_cursor(vmm_tensor *tensor) {
    size_t n = vmm_length_count(tensor);
    int32_t *address, *values = malloc(n * sizeof *values);

    CHECK(values);
    CHECK_OK(vmm_cursor(tensor, stream, &address));
    synchronize(&f);
    read_device(&f, values, (uintptr_t)address, n * sizeof *values);
    for (size_t i = 0; i < n; i++)
        CHECK_SIZE((size_t)values[i], vmm_lengths(tensor)[i]);
    free(values);
}

/* Rows [begin, end) of a lane, of any layout that has them one behind the other, are `byte`. */
static void check_rows(const vmm_tensor *tensor, size_t lane, size_t begin, size_t end,
                       uint8_t byte) {
    size_t row = vmm_row_bytes(tensor) / vmm_lane_count(tensor), bytes = (end - begin) * row;
    uint8_t *rows = malloc(bytes + 1);

    CHECK(rows);
    synchronize(&f);
    read_device(&f, rows, (uintptr_t)vmm_base(tensor) + lane * vmm_lane_bytes(tensor) + begin * row,
                bytes);
    for (size_t i = 0; i < bytes; i++)
        if (rows[i] != byte)
            FAIL("lane %zu, byte %zu behind row %zu: %d, not %d", lane, i, begin, rows[i], byte);
    free(rows);
}

/* A graph of one append to each tensor. */
static void *capture(size_t n, vmm_tensor *const *tensors, const vmm_array *sources) {
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_append_many(n, tensors, sources, stream));
    return end_capture(stream);
}

static void close_captured(vmm_tensor *tensor) {
    wait_for_unpinned(tensor);
    CHECK_OK(vmm_close(tensor));
}

/* ---- what it answers ----------------------------------------------------------------------- */

static void test_answers(void) {
    static const int64_t shape[] = {0, 64};
    vmm_tensor *t = reserve(2, shape, 0, VMM_LAYOUT_SEQ);
    int32_t *address = (int32_t *)&address, *again;

    CHECK(!vmm_has_cursor(t));
    CHECK_STATUS(vmm_cursor(t, stream, NULL), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_cursor(NULL, stream, &address), VMM_ERR_INVALID);
    CHECK(!address && !vmm_has_cursor(t)); /* what is refused makes none */
    CHECK_STATUS(vmm_advance(NULL, 1), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_advance(t, 0), VMM_ERR_INVALID);
    CHECK(strstr(vmm_last_error()->message, "captured"));
    append(t, 3, 1);
    check_cursor(t);
    CHECK(vmm_has_cursor(t));
    CHECK_STATUS(vmm_advance(t, 1), VMM_ERR_INVALID); /* a cursor is no capture */
    CHECK_OK(vmm_cursor(t, VMM_STREAM_NONE, &address));
    append(t, 50, 2);
    CHECK_OK(vmm_cursor(t, stream, &again));
    CHECK(again == address);
    check_cursor(t);
    CHECK_OK(vmm_truncate(t, 7, stream));
    check_cursor(t);
    CHECK_OK(vmm_close(t));
}

static vmm_tensor *growing;

static int use_while_growing(void *user, size_t needed_bytes) {
    int32_t *address;

    (void)needed_bytes;
    CHECK_STATUS(vmm_advance(growing, 1), VMM_ERR_BUSY);
    CHECK_STATUS(vmm_cursor(growing, VMM_STREAM_NONE, &address), VMM_ERR_BUSY);
    ++*(int *)user;
    return 0;
}

static void test_busy(void) {
    const int64_t shape[] = {0, (int64_t)f.granularity_bytes};
    vmm_spec spec = spec_of(2, shape, 0, VMM_LAYOUT_SEQ);
    vmm_pool *pool;
    int n_calls = 0;

    CHECK_OK(vmm_pool_create(f.device, f.granularity_bytes, f.granularity_bytes, &pool));
    CHECK_OK(vmm_reserve(pool, &spec, &growing));
    CHECK_OK(vmm_pool_on_oom(pool, use_while_growing, &n_calls));
    CHECK_STATUS(vmm_grow(growing, 2, NULL), VMM_ERR_OUT_OF_MEMORY);
    CHECK(n_calls == 1);
    CHECK_OK(vmm_close(growing));
    CHECK_OK(vmm_pool_close(pool));
}

/* 32 bits for a row, and 16 for the index of an entry, as the device has them. */
static void test_what_fits(void) {
    static const int64_t one[] = {0}, many[] = {65536, 0}, large[] = {5000, 0};
    vmm_spec longest = spec_of(1, one, 0, VMM_LAYOUT_SEQ);
    vmm_spec widest = spec_of(2, many, 1, VMM_LAYOUT_LANE);
    vmm_tensor *t;
    int32_t *address;

    longest.capacity = INT32_MAX;
    CHECK_OK(vmm_reserve(f.pool, &longest, &t));
    CHECK_OK(vmm_cursor(t, stream, &address));
    CHECK_OK(vmm_close(t));
    longest.capacity++;
    CHECK_OK(vmm_reserve(f.pool, &longest, &t));
    CHECK_STATUS(vmm_cursor(t, stream, &address), VMM_ERR_OVERFLOW);
    CHECK(!address && !vmm_has_cursor(t));
    append(t, 3, 1); /* and goes on without one */
    CHECK_OK(vmm_close(t));

    /* One that is larger than what is there for many. */
    widest.shape = large;
    widest.capacity = 1;
    CHECK_OK(vmm_reserve(f.pool, &widest, &t));
    check_cursor(t);
    CHECK_OK(vmm_close(t));

    widest.shape = many;
    CHECK_OK(vmm_reserve(f.pool, &widest, &t));
    CHECK_STATUS(vmm_cursor(t, stream, &address), VMM_ERR_UNSUPPORTED);
    CHECK(strstr(vmm_last_error()->message, "65535"));
    CHECK_OK(vmm_close(t));
}

/* Appended to together, one has a cursor and one has none. */
static void test_one_of_two(void) {
    static const int64_t shape[] = {0, 64};
    vmm_tensor *t[] = {reserve(2, shape, 0, VMM_LAYOUT_SEQ), reserve(2, shape, 0, VMM_LAYOUT_SEQ)};
    int32_t *address;
    source s;

    CHECK_OK(vmm_cursor(t[1], VMM_STREAM_NONE, &address));
    source_open(&s, t[0], 2, 1);
    const vmm_array arrays[] = {s.array, s.array};
    CHECK_OK(vmm_append_many(2, t, arrays, stream));
    CHECK(!vmm_has_cursor(t[0]));
    for (size_t i = 0; i < LENGTH_OF(t); i++) {
        check_cursor(t[i]);
        check_rows(t[i], 0, 0, 2, 1);
        CHECK_OK(vmm_close(t[i]));
    }
    source_close(&s);
}

/* Setting it is refused: it is set by the next that can, and by whoever asks for it. */
static void test_set_again(void) {
    static const int64_t shape[] = {0, 64};
    vmm_tensor *t = reserve(2, shape, 0, VMM_LAYOUT_SEQ);
    __typeof__(vmm_sim_fail) *let_fail;

    *(void **)&let_fail = f.is_gpu ? dlsym(cuda_library(), "vmm_sim_fail") : NULL;
    append(t, 5, 1);
    check_cursor(t);
    if (let_fail) {
        for (int asked = 0; asked < 2; asked++) {
            CHECK(let_fail("cuLaunchKernel", 1, 999, 1) == 0);
            CHECK_STATUS(vmm_grow(t, 1, NULL), VMM_ERR_DRIVER);
            CHECK_SIZE(vmm_length(t), asked ? 6 : 5);
            if (asked)
                check_cursor(t);
            CHECK_OK(vmm_grow(t, 1, NULL));
            check_cursor(t);
        }
        CHECK(let_fail("cuLaunchKernel", 1, 999, 1) == 0);
        CHECK_STATUS(vmm_truncate(t, 3, stream), VMM_ERR_DRIVER);
        CHECK_SIZE(vmm_length(t), 7);
        check_cursor(t);
    }
    CHECK_OK(vmm_close(t));
}

/* ---- many entries ------------------------------------------------------------------------------ */

/* A tensor of so many lanes, with two rows of ones each, and up to four of twos behind them. */
static vmm_tensor *ragged(int64_t n_lanes, size_t *counts) {
    const int64_t shape[] = {n_lanes, 0, 16};
    vmm_tensor *t = reserve(3, shape, 1, VMM_LAYOUT_LANE);
    source s;

    append(t, 2, 1);
    check_cursor(t);
    source_open(&s, t, 4, 2);
    for (size_t i = 0; i < (size_t)n_lanes; i++)
        counts[i] = i % 5;
    CHECK_OK(vmm_append_lanes(1, &t, &s.array, (size_t)n_lanes, NULL, counts, stream));
    source_close(&s);
    check_cursor(t);
    CHECK(vmm_is_ragged(t));
    return t;
}

/* More lengths than one launch sets, no two neighbours the same; in more than one cell. */
static void test_hundreds_of_lengths(void) {
    size_t counts[150];
    vmm_tensor *t = ragged(LENGTH_OF(counts), counts);

    CHECK_OK(vmm_truncate_lanes(t, LENGTH_OF(counts), NULL, counts, stream));
    check_cursor(t);
    CHECK_OK(vmm_close(t));
}

/* A graph appends to each of so many entries, of different lengths; the host finds out that it
 * has, follows it, and goes on. */
static void test_ragged_replays(void) {
    size_t counts[100];
    vmm_tensor *t = ragged(LENGTH_OF(counts), counts);
    source s;

    source_open(&s, t, 3, 3);
    void *exec = capture(1, &t, &s.array);
    for (size_t step = 0; step < 4; step++) {
        CHECK_OK(vmm_map(t, vmm_length(t) + 3));
        CHECK_CUDA(cuda()->graph_launch(exec, stream));
        if (step == 2) {
            CHECK_STATUS(vmm_append(t, &s.array, stream), VMM_ERR_BUSY);
            CHECK(strstr(vmm_last_error()->message, "advance(3)"));
        }
        CHECK_OK(vmm_advance(t, 3));
        CHECK_SIZE(vmm_length(t), 2 + 4 + 3 * (step + 1));
    }
    for (size_t i = 0; i < LENGTH_OF(counts); i++) {
        CHECK_SIZE(vmm_lengths(t)[i], 2 + counts[i] + 4 * 3);
        check_rows(t, i, 0, 2, 1);
        check_rows(t, i, 2, 2 + counts[i], 2);
        check_rows(t, i, 2 + counts[i], 2 + counts[i] + 4 * 3, 3);
    }
    check_cursor(t);
    /* Past what is mapped by the longest lane nothing is appended to the shorter ones, either. */
    size_t mapped = vmm_mapped(t);
    while (vmm_length(t) + 3 <= mapped) {
        CHECK_CUDA(cuda()->graph_launch(exec, stream));
        CHECK_OK(vmm_advance(t, 3));
    }
    CHECK_CUDA(cuda()->graph_launch(exec, stream));
    CHECK_STATUS(vmm_advance(t, 3), VMM_ERR_CAPACITY);
    check_cursor(t);
    source_close(&s);
    CHECK_CUDA(cuda()->graph_exec_destroy(exec));
    close_captured(t);
}

/* A source without rows is no part of the graph, and its tensor neither. */
static void test_empty_source(void) {
    static const int64_t shape[] = {0, 64};
    vmm_tensor *t[3];
    source s[3];
    vmm_array arrays[3];

    for (size_t i = 0; i < LENGTH_OF(t); i++) {
        t[i] = reserve(2, shape, 0, VMM_LAYOUT_SEQ);
        source_open(&s[i], t[i], i == 1 ? 0 : 1, (uint8_t)(i + 1));
        arrays[i] = s[i].array;
        CHECK_OK(vmm_map(t[i], 4));
    }
    void *exec = capture(LENGTH_OF(t), t, arrays);
    CHECK(vmm_has_cursor(t[0]) && !vmm_has_cursor(t[1]) && vmm_has_cursor(t[2]));
    CHECK_SIZE(vmm_pin_count(t[1]), 0);
    CHECK_CUDA(cuda()->graph_launch(exec, stream));
    CHECK_OK(vmm_advance(t[0], 1));
    CHECK_STATUS(vmm_advance(t[1], 1), VMM_ERR_INVALID);
    CHECK_OK(vmm_advance(t[2], 1));
    check_rows(t[0], 0, 0, 1, 1);
    check_rows(t[2], 0, 0, 1, 3);
    CHECK_CUDA(cuda()->graph_exec_destroy(exec));
    for (size_t i = 0; i < LENGTH_OF(t); i++) {
        source_close(&s[i]);
        close_captured(t[i]);
    }
}

/* ---- the control block ----------------------------------------------------------------------------- */

static void wait_for(void *semaphore) {
    sem_wait(semaphore);
}

/* Work that sets the cursor of a closed tensor is still to come: what it writes to is no one
 * else's until a fence has passed. */
static void test_behind_a_fence(void) {
    static const int64_t shape[] = {0, 64};
    vmm_pool *shared = f.pool;
    vmm_tensor *closed, *next;
    int32_t *its, *ours, *again;
    sem_t go;

    sem_init(&go, 0, 0);
    CHECK_OK(vmm_pool_create(f.device, 0, 0, &f.pool));
    closed = reserve(2, shape, 0, VMM_LAYOUT_SEQ);
    append(closed, 5, 1);
    CHECK_OK(vmm_cursor(closed, stream, &its));
    synchronize(&f);
    source s;
    source_open(&s, closed, 1, 2);
    CHECK_CUDA(cuda()->host_function(stream, wait_for, &go));
    CHECK_OK(vmm_append(closed, &s.array, stream)); /* sets it to 6, some time */
    CHECK_OK(vmm_close(closed));
    next = reserve(2, shape, 0, VMM_LAYOUT_SEQ);
    CHECK_OK(vmm_cursor(next, VMM_STREAM_NONE, &ours));
    sem_post(&go);
    check_cursor(next);
    source_close(&s);
    CHECK_OK(vmm_close(next));

    /* And then it is taken again. */
    CHECK_OK(vmm_pool_trim(f.pool, 1));
    next = reserve(2, shape, 0, VMM_LAYOUT_SEQ);
    CHECK_OK(vmm_cursor(next, VMM_STREAM_NONE, &again));
    CHECK(ours != its && again == its);
    CHECK_OK(vmm_close(next));
    CHECK_OK(vmm_pool_close(f.pool));
    f.pool = shared;
    sem_destroy(&go);
}

static struct {
    __typeof__(vmm_sim_fail) *fail;
    __typeof__(vmm_sim_hold) *hold;
    __typeof__(vmm_sim_go) *go;
} sim;

/* The device does its work while the stack and the heap are others'. */
static __attribute__((noinline)) void go_on(void) {
    enum { BYTES = 8192, CHUNKS = 64 };
    volatile uint8_t area[BYTES];
    void *chunks[CHUNKS];

    for (size_t i = 0; i < BYTES; i++)
        area[i] = 0x77;
    for (size_t i = 0; i < CHUNKS; i++)
        CHECK(chunks[i] = memset(malloc(8 * (i + 1)), 0x77, 8 * (i + 1)));
    sim.go();
    synchronize(&f);
    for (size_t i = 0; i < BYTES; i++)
        CHECK(area[i] == 0x77);
    for (size_t i = 0; i < CHUNKS; i++)
        free(chunks[i]);
}

static uint32_t mapped_on_device(const int32_t *cursor) {
    uint32_t mapped;

    read_device(&f, &mapped, (uintptr_t)cursor + VMM_CURSOR_WORDS(1), sizeof mapped);
    return mapped;
}

/* A copy to the control block cannot be waited for, and is made later: of what it was to copy. */
static void test_copied_late(void) {
    const int64_t shape[] = {0, (int64_t)f.granularity_bytes};
    vmm_tensor *t = reserve(2, shape, 0, VMM_LAYOUT_SEQ);
    int32_t *address;

    *(void **)&sim.fail = dlsym(cuda_library(), "vmm_sim_fail");
    *(void **)&sim.hold = dlsym(cuda_library(), "vmm_sim_hold");
    *(void **)&sim.go = dlsym(cuda_library(), "vmm_sim_go");
    if (sim.fail) {
        sim.hold();
        CHECK(sim.fail("cuStreamSynchronize", 1, 999, 1) == 0);
        CHECK_STATUS(vmm_cursor(t, VMM_STREAM_NONE, &address), VMM_ERR_DRIVER);
        go_on();
        CHECK_OK(vmm_cursor(t, VMM_STREAM_NONE, &address));
        CHECK_OK(vmm_map(t, 1));
        sim.hold();
        CHECK(sim.fail("cuStreamSynchronize", 1, 999, 2) == 0); /* taking it back fails, too */
        CHECK_STATUS(vmm_map(t, 2), VMM_ERR_DRIVER);
        go_on();
        CHECK_SIZE(vmm_mapped(t), 1);
        CHECK_SIZE(mapped_on_device(address), 1);
        CHECK_OK(vmm_map(t, 2));
        CHECK_SIZE(mapped_on_device(address), 2);
    }
    CHECK_OK(vmm_close(t));
}

/* Several are told of what is mapped for them; where one cannot be, all are told what was before. */
static void test_told_of_many(void) {
    const int64_t shape[] = {0, (int64_t)f.granularity_bytes};
    const size_t n_rows[] = {2, 3, 4};
    vmm_tensor *t[3];
    int32_t *address[3];

    for (int i = 0; i < 3; i++) {
        t[i] = reserve(2, shape, 0, VMM_LAYOUT_SEQ);
        CHECK_OK(vmm_map(t[i], 1));
        CHECK_OK(vmm_cursor(t[i], VMM_STREAM_NONE, &address[i]));
    }
    for (int at = 1; at <= 3 && sim.fail; at++) {
        CHECK(sim.fail("cuStreamSynchronize", at, 999, 1) == 0);
        CHECK_STATUS(vmm_map_many(3, t, n_rows), VMM_ERR_DRIVER);
        for (int i = 0; i < 3; i++) {
            CHECK_SIZE(vmm_mapped(t[i]), 1);
            CHECK_SIZE(mapped_on_device(address[i]), 1);
        }
    }
    CHECK_OK(vmm_map_many(3, t, n_rows));
    for (int i = 0; i < 3; i++) {
        CHECK_SIZE(mapped_on_device(address[i]), n_rows[i]);
        CHECK_OK(vmm_close(t[i]));
    }
}

/* ---- is it being captured -------------------------------------------------------------------------- */

/* The simulator ends a program that breaks a capture, but where it is to return. */
static void break_capture(void) {
    void (*strict)(int) = NULL;
    cu_pointer memory;

    *(void **)&strict = dlsym(cuda_library(), "vmm_sim_strict");
    if (strict)
        strict(0);
    CHECK(cuda()->alloc(&memory, 1) != 0);
    if (strict)
        strict(1);
}

static void test_is_capturing(void) {
    int capturing = 7;
    void *graph = NULL;

    CHECK_STATUS(vmm_stream_is_capturing(NULL, stream, &capturing), VMM_ERR_INVALID);
    CHECK(capturing == 0);
    CHECK_STATUS(vmm_stream_is_capturing(f.device, stream, NULL), VMM_ERR_INVALID);
    capturing = 7;
    CHECK_OK(vmm_stream_is_capturing(f.device, NULL, &capturing));
    CHECK(capturing == 0);
    capturing = 7;
    CHECK_OK(vmm_stream_is_capturing(f.device, VMM_STREAM_LEGACY, &capturing));
    CHECK(capturing == 0);
    capturing = 7;
    CHECK_OK(vmm_stream_is_capturing(f.device, stream, &capturing));
    CHECK(capturing == 0);
    if (!f.is_gpu)
        return;
    CHECK_OK(vmm_stream_is_capturing(f.device, VMM_STREAM_PER_THREAD, &capturing));
    CHECK(capturing == 0);
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_stream_is_capturing(f.device, stream, &capturing));
    CHECK(capturing == 1);
    CHECK_OK(vmm_stream_is_capturing(f.device, other, &capturing));
    CHECK(capturing == 0);
    CHECK_OK(vmm_stream_is_capturing(f.device, NULL, &capturing)); /* and nothing breaks */
    CHECK(capturing == 0);
    CHECK_OK(vmm_stream_is_capturing(f.device, stream, &capturing));
    CHECK(capturing == 1);
    break_capture();
    capturing = 7;
    CHECK_STATUS(vmm_stream_is_capturing(f.device, stream, &capturing), VMM_ERR_CAPTURING);
    CHECK(capturing == 0);
    CHECK(cuda()->end_capture(stream, &graph) != 0);
    CHECK_OK(vmm_stream_is_capturing(f.device, stream, &capturing));
    CHECK(capturing == 0);
}

/* Nothing of a broken capture is kept, and the tensor is as it was. */
static void test_broken_capture(void) {
    static const int64_t shape[] = {0, 64};
    vmm_tensor *t = reserve(2, shape, 0, VMM_LAYOUT_SEQ);
    void *graph = NULL;
    vmm_graph_pins *pins, *late;
    source s;

    append(t, 2, 1);
    source_open(&s, t, 1, 2);
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_graph_pins_open(f.device, stream, &pins));
    break_capture();
    CHECK_STATUS(vmm_append(t, &s.array, stream), VMM_ERR_CAPTURING);
    late = pins;
    CHECK_STATUS(vmm_graph_pins_open(f.device, stream, &late), VMM_ERR_CAPTURING);
    CHECK(!late);
    CHECK(cuda()->end_capture(stream, &graph) != 0);
    vmm_graph_pins_close(pins);
    CHECK_SIZE(vmm_pin_count(t), 0);
    CHECK_SIZE(vmm_length(t), 2);
    CHECK_OK(vmm_append(t, &s.array, stream));
    check_rows(t, 0, 0, 2, 1);
    check_rows(t, 0, 2, 3, 2);
    source_close(&s);
    CHECK_OK(vmm_close(t));
}

/* The last write was on another stream, before the capture: the graph waits for it, or, where the
 * driver cannot have that, the append is refused. */
static void test_written_before(void) {
    static const int64_t shape[] = {0, 64};
    vmm_tensor *t = reserve(2, shape, 0, VMM_LAYOUT_SEQ);
    source first, second;

    source_open(&first, t, 2, 1);
    source_open(&second, t, 1, 2);
    CHECK_OK(vmm_append(t, &first.array, other));
    CHECK_OK(vmm_map(t, 3));
    if (is_hip) {
        CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
        CHECK_STATUS(vmm_append(t, &second.array, stream), VMM_ERR_CAPTURING);
        drop_capture(stream);
    } else {
        void *exec = capture(1, &t, &second.array);
        CHECK_CUDA(cuda()->graph_launch(exec, stream));
        CHECK_OK(vmm_advance(t, 1));
        check_rows(t, 0, 2, 3, 2);
        CHECK_CUDA(cuda()->graph_exec_destroy(exec));
    }
    check_rows(t, 0, 0, 2, 1);
    source_close(&first);
    source_close(&second);
    close_captured(t);
}

int main(int argc, char **argv) {
    f = fixture_open(argc, argv, 0, 0);
    if (f.is_gpu) {
        CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
        CHECK_CUDA(cuda()->stream_create(&other, CUDA_STREAM_NON_BLOCKING));
    }
    test_answers();
    test_busy();
    test_what_fits();
    test_one_of_two();
    test_set_again();
    test_hundreds_of_lengths();
    test_is_capturing();
    if (f.is_gpu) {
        test_ragged_replays();
        test_empty_source();
        test_behind_a_fence();
        test_copied_late();
        test_told_of_many();
        test_broken_capture();
        test_written_before();
        CHECK_CUDA(cuda()->stream_destroy(other));
        CHECK_CUDA(cuda()->stream_destroy(stream));
    }
    fixture_close(&f);
    return 0;
}
