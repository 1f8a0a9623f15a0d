/* Appends that are captured once and replayed while the tensor grows: the rows are right to the
 * last byte, past what is mapped nothing is written, the host follows, and a graph keeps its
 * tensor. On GPUs. */
#include "check.h"

#include <time.h>

#define MAX_TENSORS 40

static fixture f;
static void *stream;

/* Tensors that one graph appends a row each to, from sources that are written anew. */
typedef struct scene {
    size_t n;
    model model[MAX_TENSORS];
    vmm_array source[MAX_TENSORS];
    int64_t shape[MAX_TENSORS][VMM_MAX_NDIM];
    uint32_t first[MAX_TENSORS]; /* number of the first row in the source */
    size_t n_rows;
    void *exec;
} scene;

static vmm_spec spec_of(int ndim, const int64_t *shape, int axis, vmm_layout layout) {
    return (vmm_spec){.ndim = ndim,
                      .shape = (int64_t *)shape,
                      .axis = axis,
                      .dtype = VMM_UINT8,
                      .layout = layout,
                      .capacity = 2000};
}

static scene scene_open(size_t n, const vmm_spec *spec, size_t n_rows) {
    scene s = {.n = n, .n_rows = n_rows};

    for (size_t i = 0; i < n; i++) {
        s.model[i] = model_open(&f, spec);
        vmm_tensor *t = s.model[i].tensor;
        s.source[i] = (vmm_array){.data = device_alloc(&f, n_rows * vmm_row_bytes(t)),
                                  .memory = VMM_MEMORY_DEVICE,
                                  .dtype = spec->dtype,
                                  .ndim = spec->ndim};
        rows_shape(t, n_rows, s.shape[i]);
    }
    return s;
}

/* Of rows of `row_bytes` each in one lane, in blocks of the smallest size. */
static scene rows_open(size_t n, size_t row_bytes, size_t n_rows) {
    const int64_t shape[] = {0, (int64_t)row_bytes};
    vmm_spec spec = spec_of(2, shape, 0, VMM_LAYOUT_SEQ);

    spec.block_bytes = f.granularity_bytes;
    return scene_open(n, &spec, n_rows);
}

static void write_sources(scene *s) {
    synchronize(&f); /* they have been read */
    for (size_t i = 0; i < s->n; i++) {
        vmm_tensor *t = s->model[i].tensor;
        s->first[i] = last_number + 1;
        uint8_t *rows = make_rows(t, s->first[i], s->n_rows);
        last_number += (uint32_t)s->n_rows;
        write_device(&f, (void *)(uintptr_t)s->source[i].data, rows, s->n_rows * vmm_row_bytes(t));
        free(rows);
    }
    synchronize(
        &f); /* a copy from pageable memory may end after its call, and not every stream waits */
}

/* The tensors, which a scene that has been copied has elsewhere. */
static void gather(scene *s, vmm_tensor **tensors) {
    for (size_t i = 0; i < s->n; i++) {
        tensors[i] = s->model[i].tensor;
        s->source[i].shape = s->shape[i];
    }
}

static void capture(scene *s, int times) {
    vmm_tensor *tensors[MAX_TENSORS];
    size_t lengths[MAX_TENSORS];

    gather(s, tensors);
    for (size_t i = 0; i < s->n; i++)
        lengths[i] = vmm_length(tensors[i]);
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    for (int i = 0; i < times; i++)
        CHECK_OK(vmm_append_many(s->n, tensors, s->source, stream));
    s->exec = end_capture(stream);
    for (size_t i = 0; i < s->n; i++)
        CHECK_SIZE(vmm_length(tensors[i]), lengths[i]); /* nothing has been appended yet */
}

static void replay(scene *s) {
    CHECK_CUDA(cuda()->graph_launch(s->exec, stream));
}

static void advance(scene *s) {
    for (size_t i = 0; i < s->n; i++) {
        CHECK_OK(vmm_advance(s->model[i].tensor, s->n_rows));
        model_extend(&s->model[i], s->first[i], s->n_rows);
    }
}

static void step(scene *s) {
    write_sources(s);
    for (size_t i = 0; i < s->n; i++)
        CHECK_OK(vmm_map(s->model[i].tensor, vmm_length(s->model[i].tensor) + s->n_rows));
    replay(s);
    advance(s);
    CHECK_CUDA(cuda()->stream_synchronize(stream));
}

static void eager(scene *s) {
    vmm_tensor *tensors[MAX_TENSORS];

    gather(s, tensors);
    write_sources(s);
    CHECK_OK(vmm_append_many(s->n, tensors, s->source, stream));
    for (size_t i = 0; i < s->n; i++)
        model_extend(&s->model[i], s->first[i], s->n_rows);
}

static void check_cursor(const model *m) {
    int32_t *address, values[64];
    size_t n = vmm_lane_count(m->tensor) > 1 ? (size_t)vmm_row_shape(m->tensor)[0] : 1;

    CHECK_OK(vmm_cursor(m->tensor, stream, &address));
    synchronize(&f);
    read_device(&f, values, (uintptr_t)address, n * sizeof values[0]);
    for (size_t i = 0; i < n; i++)
        CHECK_SIZE((size_t)values[i], m->length);
}

static void check(scene *s) {
    for (size_t i = 0; i < s->n; i++) {
        model_check(&s->model[i]);
        check_cursor(&s->model[i]);
    }
}

static void drop_graph(scene *s) {
    if (s->exec)
        CHECK_CUDA(cuda()->graph_exec_destroy(s->exec));
    s->exec = NULL;
}

static void scene_close(scene *s) {
    drop_graph(s);
    synchronize(&f);
    for (size_t i = 0; i < s->n; i++) {
        wait_for_unpinned(s->model[i].tensor);
        model_close(&s->model[i]);
        device_free(&f, (void *)(uintptr_t)s->source[i].data);
    }
}

/* ---- growing ----------------------------------------------------------------------------- */

/* Blocks of the smallest size: a row or a few in each, so that nearly every step maps. */
static void test_growth(void) {
    const int64_t rows[] = {0, (int64_t)f.granularity_bytes / 2};
    const int64_t lanes[] = {3, 0, 5, (int64_t)f.granularity_bytes / 16};
    vmm_spec specs[] = {
        spec_of(2, rows, 0, VMM_LAYOUT_SEQ),
        spec_of(4, lanes, 1, VMM_LAYOUT_LANE),
        spec_of(4, lanes, 1, VMM_LAYOUT_SEQ),
        spec_of(4, (int64_t[]){2, 3, 0, 4096}, 2, VMM_LAYOUT_C),
        spec_of(3, (int64_t[]){2, 0, 7}, 1, VMM_LAYOUT_LANE),
    };

    for (size_t i = 0; i < LENGTH_OF(specs); i++) {
        specs[i].capacity = 40;
        specs[i].block_bytes = f.granularity_bytes;
        scene s = scene_open(2, &specs[i], 1 + i % 2);
        eager(&s);
        capture(&s, 1);
        for (int j = 0; j < 12; j++)
            step(&s);
        check(&s);
        eager(&s); /* and on from there, without the graph, and with it */
        check(&s);
        step(&s);
        check(&s);
        scene_close(&s);
    }
}

static void test_hundreds_of_growths(void) {
    scene s = rows_open(1, f.granularity_bytes, 1);
    vmm_tensor_stats stats;

    capture(&s, 1);
    for (int i = 0; i < 300; i++)
        step(&s);
    CHECK_OK(vmm_stats(s.model[0].tensor, &stats));
    CHECK(stats.block_count >= 300);
    check(&s);
    scene_close(&s);
}

/* Several appends to a tensor in one graph, and more tensors than one launch takes. */
static void test_many(void) {
    scene s = rows_open(MAX_TENSORS, 96, 3);
    vmm_tensor_stats stats;

    capture(&s, 1);
    CHECK_OK(vmm_stats(s.model[0].tensor, &stats));
    CHECK_SIZE(stats.driver_calls[VMM_CALL_launch], (MAX_TENSORS + 13) / 14);
    for (int i = 0; i < 20; i++)
        step(&s);
    check(&s);
    drop_graph(&s);
    scene_close(&s);

    s = rows_open(2, 96, 1);
    capture(&s, 5);
    for (int i = 0; i < 10; i++) {
        write_sources(&s);
        replay(&s);
        for (int j = 0; j < 5; j++)
            advance(&s);
        synchronize(&f);
    }
    check(&s);
    scene_close(&s);
}

/* K and V are one launch, and an eager append to tensors with cursors is two. */
static void test_launches(void) {
    scene s = rows_open(2, 512, 1);
    vmm_tensor_stats before, after;

    eager(&s);
    CHECK_OK(vmm_stats(s.model[0].tensor, &before));
    CHECK_SIZE(before.driver_calls[VMM_CALL_launch], 1);
    capture(&s, 1);
    CHECK_OK(vmm_stats(s.model[0].tensor, &after));
    CHECK_SIZE(after.driver_calls[VMM_CALL_launch], 2);
    step(&s);
    eager(&s);
    CHECK_OK(vmm_stats(s.model[0].tensor, &after));
    CHECK_SIZE(after.driver_calls[VMM_CALL_launch], 4);
    before = after;
    uint64_t calls = total_calls(s.model[0].tensor);
    write_sources(&s);
    replay(&s);
    advance(&s);
    CHECK_SIZE(total_calls(s.model[0].tensor), calls); /* following costs no driver call */
    check(&s);
    scene_close(&s);
}

/* ---- overflow ------------------------------------------------------------------------------ */

static uint8_t *snapshot(const model *m, size_t n_rows) {
    size_t bytes = n_rows * vmm_row_bytes(m->tensor);
    uint8_t *data = malloc(bytes);

    CHECK(data);
    read_device(&f, data, (uintptr_t)m->base, bytes);
    return data;
}

static void test_overflow(void) {
    scene s = rows_open(1, f.granularity_bytes / 4, 1);
    vmm_tensor *t = s.model[0].tensor;

    capture(&s, 1);
    CHECK_OK(vmm_map(t, 4));
    size_t mapped = vmm_mapped(t);
    for (size_t i = 0; i < mapped; i++)
        step(&s);
    check(&s);
    uint8_t *before = snapshot(&s.model[0], mapped);
    replay(&s); /* past the end */
    CHECK_CUDA(cuda()->stream_synchronize(stream));
    uint8_t *after = snapshot(&s.model[0], mapped);
    CHECK(memcmp(before, after, mapped * vmm_row_bytes(t)) == 0);
    free(before);
    free(after);
    CHECK_STATUS(vmm_advance(t, 1), VMM_ERR_CAPACITY); /* the host knows by itself */
    CHECK(strstr(vmm_last_error()->message, "overflow"));
    check(&s);
    /* Mapped, but too late: the flag tells, and only once. */
    CHECK_OK(vmm_map(t, mapped + 1));
    CHECK_STATUS(vmm_advance(t, 1), VMM_ERR_CAPACITY);
    CHECK(strstr(vmm_last_error()->message, "overflow"));
    check(&s);
    step(&s);
    check(&s);
    eager(&s);
    check(&s);
    scene_close(&s);
}

/* Trimmed, so that what the graph would write is gone: an overflow, and no fault. */
static void test_trim(void) {
    scene s = rows_open(1, f.granularity_bytes / 2, 1);
    vmm_tensor *t = s.model[0].tensor;
    CHECK_OK(vmm_map(t, 20));
    capture(&s, 1);
    for (int i = 0; i < 4; i++)
        step(&s);
    CHECK_OK(vmm_trim(t));
    CHECK_SIZE(vmm_mapped(t), 4);
    CHECK_OK(vmm_pool_trim(f.pool, 1));
    replay(&s);
    CHECK_CUDA(cuda()->stream_synchronize(stream));
    CHECK_STATUS(vmm_advance(t, 1), VMM_ERR_CAPACITY);
    check(&s);
    CHECK_OK(vmm_map(t, 6));
    CHECK_STATUS(vmm_advance(t, 1), VMM_ERR_CAPACITY); /* that was the replay before */
    step(&s);
    step(&s);
    check(&s);
    scene_close(&s);
}

/* An overflow that a truncation has given up is not the next replay's. */
static void test_overflow_given_up(void) {
    scene s = rows_open(1, f.granularity_bytes / 2, 1);
    model *m = &s.model[0];
    capture(&s, 1);
    step(&s);
    step(&s);
    replay(&s);
    CHECK_OK(vmm_truncate(m->tensor, --m->length, stream));
    step(&s);
    step(&s);
    check(&s);
    scene_close(&s);
}

/* A trim after a replay that the host has not followed would lose its row. */
static void test_trim_before_advance(void) {
    scene s = rows_open(1, f.granularity_bytes / 2, 1);
    vmm_tensor *t = s.model[0].tensor;
    capture(&s, 1);
    for (int i = 0; i < 4; i++)
        step(&s);
    write_sources(&s);
    CHECK_OK(vmm_map(t, 6));
    replay(&s);
    CHECK_STATUS(vmm_trim(t), VMM_ERR_BUSY);
    CHECK(strstr(vmm_last_error()->message, "advance(1)"));
    CHECK_SIZE(vmm_mapped(t), 6);
    CHECK_OK(vmm_pool_trim(f.pool, 1));
    advance(&s);
    step(&s);
    check(&s);
    CHECK_OK(vmm_truncate(t, s.model[0].length = 3, VMM_STREAM_NONE));
    CHECK_OK(vmm_trim(t));
    CHECK_SIZE(vmm_mapped(t), 4);
    step(&s);
    check(&s);
    scene_close(&s);
}

/* ---- what the host has not followed ------------------------------------------------------------ */

static void test_forgotten_advance(void) {
    const int64_t shape[] = {2, 0, 64};
    vmm_spec spec = spec_of(3, shape, 1, VMM_LAYOUT_LANE);
    scene s = scene_open(1, &spec, 1);
    vmm_tensor *t = s.model[0].tensor;
    vmm_tensor *tensors[MAX_TENSORS];

    gather(&s, tensors);
    capture(&s, 1);
    step(&s);
    write_sources(&s);
    replay(&s);
    CHECK_STATUS(vmm_append(t, &s.source[0], stream), VMM_ERR_BUSY);
    CHECK(strstr(vmm_last_error()->message, "advance(1)"));
    CHECK_STATUS(vmm_grow(t, 1, NULL), VMM_ERR_BUSY);
    advance(&s);
    check(&s);
    eager(&s);
    check(&s);
    /* More than the graph has done. */
    CHECK_OK(vmm_advance(t, 1));
    CHECK_STATUS(vmm_grow(t, 1, NULL), VMM_ERR_BUSY);
    CHECK_OK(vmm_truncate(t, s.model[0].length, VMM_STREAM_NONE));
    check(&s);
    /* A truncation gives up what has not been followed. */
    replay(&s);
    CHECK_OK(vmm_truncate(t, s.model[0].length, stream));
    eager(&s);
    check(&s);
    /* Also once the graph is gone. */
    write_sources(&s);
    replay(&s);
    synchronize(&f);
    drop_graph(&s);
    wait_for_unpinned(t);
    CHECK_STATUS(vmm_append(t, &s.source[0], stream), VMM_ERR_BUSY);
    advance(&s);
    eager(&s);
    check(&s);
    uint64_t calls = total_calls(t);
    eager(&s);
    CHECK_SIZE(total_calls(t), calls + 2); /* no one can replay it: nothing is asked any more */
    check(&s);
    scene_close(&s);
}

static void test_truncate(void) {
    scene s = rows_open(2, 1024, 2);

    capture(&s, 1);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 6; i++)
            step(&s);
        for (size_t i = 0; i < s.n; i++) {
            model *m = &s.model[i];
            m->length -= 5;
            CHECK_OK(vmm_truncate(m->tensor, m->length, round ? stream : VMM_STREAM_NONE));
        }
        check(&s);
        if (round)
            for (size_t i = 0; i < s.n; i++)
                model_grow(&s.model[i], 3, true);
        check(&s);
    }
    step(&s);
    check(&s);
    scene_close(&s);
}

/* ---- inside a capture ------------------------------------------------------------------------ */

static void test_refused_in_a_capture(void) {
    scene s = rows_open(1, 64, 1);
    vmm_tensor *t = s.model[0].tensor, *fork, *tensors[MAX_TENSORS];
    void *outside;

    gather(&s, tensors);
    CHECK_STATUS(vmm_advance(t, 1), VMM_ERR_INVALID); /* nothing has been captured */
    CHECK_STATUS(vmm_cursor(t, stream, NULL), VMM_ERR_INVALID);
    eager(&s);
    eager(&s);
    check_cursor(&s.model[0]);
    CHECK_CUDA(cuda()->stream_create(&outside, CUDA_STREAM_NON_BLOCKING));
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_STATUS(vmm_fork(t, 1, &fork), VMM_ERR_CAPTURING);
    CHECK_STATUS(vmm_grow(t, 1, NULL), VMM_ERR_CAPTURING);
    CHECK_STATUS(vmm_truncate(t, 1, VMM_STREAM_NONE), VMM_ERR_CAPTURING);
    CHECK_SIZE(vmm_length(t), 2);
    CHECK_OK(vmm_append(t, &s.source[0], stream));
    CHECK_STATUS(vmm_append(t, &s.source[0], outside), VMM_ERR_CAPTURING);
    CHECK_STATUS(vmm_grow(t, 1, NULL), VMM_ERR_CAPTURING);
    CHECK_STATUS(vmm_truncate(t, 1, stream), VMM_ERR_CAPTURING);
    CHECK_STATUS(vmm_truncate(t, 1, VMM_STREAM_NONE), VMM_ERR_CAPTURING);
    CHECK_STATUS(vmm_trim(t), VMM_ERR_CAPTURING);
    CHECK_OK(vmm_map(t, 100));
    CHECK_OK(vmm_append(t, &s.source[0], stream));
    s.exec = end_capture(stream); /* it has survived all that */
    check(&s);
    write_sources(&s);
    replay(&s);
    advance(&s);
    advance(&s);
    check(&s);
    scene_close(&s);
    CHECK_CUDA(cuda()->stream_destroy(outside));
}

/* What a capture has refused is no reason to write over what a replay appends. */
static void test_refused_then_replayed(void) {
    scene s = rows_open(1, 64, 1);
    vmm_tensor *t = s.model[0].tensor, *tensors[MAX_TENSORS];

    gather(&s, tensors);
    eager(&s);
    check_cursor(&s.model[0]);
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_STATUS(vmm_grow(t, 1, NULL), VMM_ERR_CAPTURING);
    CHECK_OK(vmm_append(t, &s.source[0], stream));
    s.exec = end_capture(stream);
    write_sources(&s);
    replay(&s);
    CHECK_STATUS(vmm_append(t, &s.source[0], stream), VMM_ERR_BUSY);
    advance(&s);
    check(&s);
    scene_close(&s);
}

/* ---- the graph's pin ---------------------------------------------------------------------------- */

static void test_close(void) {
    scene s = rows_open(1, 64, 1);
    vmm_tensor *t = s.model[0].tensor;

    capture(&s, 3);
    CHECK_SIZE(vmm_pin_count(t), 1); /* once for each graph */
    step(&s);
    CHECK_STATUS(vmm_close(t), VMM_ERR_PINNED);
    CHECK(strstr(vmm_last_error()->message, "graph"));
    drop_graph(&s);
    wait_for_unpinned(t);
    scene_close(&s);

    /* Released under a graph that lives: its replays go on, into memory that is still there. */
    s = rows_open(1, 64, 1);
    t = s.model[0].tensor;
    capture(&s, 1);
    CHECK_OK(vmm_map(t, 10));
    vmm_release(t);
    CHECK_STATUS(vmm_pool_close(f.pool), VMM_ERR_BUSY);
    for (int i = 0; i < 12; i++)
        replay(&s);
    CHECK_CUDA(cuda()->stream_synchronize(stream));
    drop_graph(&s);
    free(s.model[0].numbers);
    device_free(&f, (void *)(uintptr_t)s.source[0].data);
    for (int i = 0; i < 5000 && held_bytes(f.pool); i++) {
        struct timespec pause = {0, 1000000};
        nanosleep(&pause, NULL);
        CHECK_OK(vmm_pool_trim(f.pool, 1));
    }
    CHECK_SIZE(held_bytes(f.pool), 0);

    /* A capture that is given up keeps nothing. */
    vmm_tensor *tensors[MAX_TENSORS];
    s = rows_open(1, 64, 1);
    gather(&s, tensors);
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_append(tensors[0], s.source, stream));
    drop_capture(stream);
    wait_for_unpinned(tensors[0]);
    eager(&s);
    check(&s);
    scene_close(&s);
}

/* ---- kept by another --------------------------------------------------------------------- */

static size_t retains(const model *m) {
    vmm_tensor_stats stats;
    CHECK_OK(vmm_stats(m->tensor, &stats));
    return stats.driver_calls[VMM_CALL_retain];
}

/* The tensors are pinned by who was asked to, the graph has no object for it, and they can be
 * closed when the pins are, at once and with a replay in flight. */
static void test_graph_pins(void) {
    vmm_graph_pins *pins, *other;
    void *graph;

    CHECK_STATUS(vmm_graph_pins_open(f.device, stream, &pins), VMM_ERR_INVALID);
    CHECK(!pins);
    CHECK_STATUS(vmm_graph_pins_open(f.device, NULL, &pins), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_graph_pins_open(NULL, stream, &pins), VMM_ERR_INVALID);
    CHECK_STATUS(vmm_graph_pins_open(f.device, stream, NULL), VMM_ERR_INVALID);
    vmm_graph_pins_close(NULL);

    scene s = rows_open(2, f.granularity_bytes / 2, 1);
    vmm_tensor *tensors[2];
    gather(&s, tensors);
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_graph_pins_open(f.device, stream, &pins));
    CHECK_OK(vmm_append_many(2, tensors, s.source, stream));
    CHECK_OK(vmm_append(tensors[1], &s.source[1], stream));
    s.exec = end_capture(stream);
    CHECK_SIZE(retains(&s.model[0]) + retains(&s.model[1]), 0);

    /* Another capture, by a graph that keeps its tensor itself. */
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_append(tensors[0], &s.source[0], stream));
    CHECK_CUDA(cuda()->end_capture(stream, &graph));
    CHECK_SIZE(retains(&s.model[0]), 1);
    CHECK_SIZE(vmm_pin_count(tensors[0]), 2);
    CHECK_CUDA(cuda()->graph_destroy(graph));
    const struct timespec pause = {.tv_nsec = 1000000};
    for (int i = 0; i < 2000 && vmm_pin_count(tensors[0]) > 1; i++)
        nanosleep(&pause, NULL);
    CHECK_SIZE(vmm_pin_count(tensors[0]), 1);

    write_sources(&s);
    for (int i = 0; i < 2; i++)
        CHECK_OK(vmm_map(tensors[i], 2));
    replay(&s);
    CHECK_OK(vmm_advance(tensors[0], 1));
    CHECK_OK(vmm_advance(tensors[1], 2));
    model_extend(&s.model[0], s.first[0], 1);
    model_extend(&s.model[1], s.first[1], 1);
    model_extend(&s.model[1], s.first[1], 1);
    check(&s);
    for (int i = 0; i < 2; i++) {
        CHECK_SIZE(vmm_pin_count(tensors[i]), 1);
        CHECK_SIZE(vmm_pinned_rows(tensors[i]), 0);
        CHECK_STATUS(vmm_close(tensors[i]), VMM_ERR_PINNED);
        CHECK(strstr(vmm_last_error()->message, "graph"));
        CHECK_OK(vmm_map(tensors[i], 4));
    }

    /* Of a capture that nothing is appended in, and of one that has failed. */
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_graph_pins_open(f.device, stream, &other));
    vmm_graph_pins_close(other);
    CHECK_OK(vmm_graph_pins_open(f.device, stream, &other));
    CHECK_OK(vmm_append(tensors[0], &s.source[0], stream));
    CHECK_SIZE(vmm_pin_count(tensors[0]), 2);
    CHECK_CUDA(cuda()->end_capture(stream, &graph));
    vmm_graph_pins_close(other);
    CHECK_SIZE(vmm_pin_count(tensors[0]), 1);
    CHECK_CUDA(cuda()->graph_destroy(graph));

    write_sources(&s);
    replay(&s); /* in flight, or not */
    CHECK_CUDA(cuda()->graph_exec_destroy(s.exec));
    vmm_graph_pins_close(pins);
    for (int i = 0; i < 2; i++) {
        CHECK_SIZE(vmm_pin_count(tensors[i]), 0);
        CHECK_OK(vmm_close(tensors[i]));
        free(s.model[i].numbers);
    }
    CHECK_OK(vmm_pool_trim(f.pool, 1));
    for (int i = 0; i < 2; i++)
        device_free(&f, (void *)(uintptr_t)s.source[i].data);
}

/* What has been freed becomes others', who fill it. */
static void reuse_freed(void) {
    enum { CHUNKS = 64 };
    void *chunks[CHUNKS];

    for (size_t i = 0; i < CHUNKS; i++)
        CHECK(chunks[i] = memset(malloc(8 * (i % 16 + 1)), 0x77, 8 * (i % 16 + 1)));
    for (size_t i = 0; i < CHUNKS; i++)
        free(chunks[i]);
}

/* Several keepers, closed in any order: those that are left get what is theirs, and no one asks
 * one that is gone. */
static void test_graph_pins_in_any_order(void) {
    static const int order[][3] = {{0, 1, 2}, {1, 0, 2}, {2, 0, 1}, {1, 2, 0}};
    scene s = rows_open(3, 64, 1);
    vmm_tensor *t[3];
    void *streams[3];
    vmm_graph_pins *pins[3];

    gather(&s, t);
    for (int i = 0; i < 3; i++)
        CHECK_CUDA(cuda()->stream_create(&streams[i], CUDA_STREAM_NON_BLOCKING));
    for (size_t k = 0; k < LENGTH_OF(order); k++) {
        for (int i = 0; i < 3; i++) {
            CHECK_CUDA(cuda()->begin_capture(streams[i], CUDA_CAPTURE_GLOBAL));
            CHECK_OK(vmm_graph_pins_open(f.device, streams[i], &pins[i]));
        }
        for (int closed = 0; closed < 3; closed++) {
            int keeper = order[k][closed];
            CHECK_OK(vmm_append(t[keeper], &s.source[keeper], streams[keeper]));
            CHECK_SIZE(vmm_pin_count(t[keeper]), 1);
            drop_capture(streams[keeper]);
            CHECK_SIZE(vmm_pin_count(t[keeper]), 1);
            vmm_graph_pins_close(pins[keeper]);
            CHECK_SIZE(vmm_pin_count(t[keeper]), 0);
            reuse_freed();
        }
    }
    for (int i = 0; i < 3; i++)
        CHECK_SIZE(retains(&s.model[i]), 0);

    /* Closed within its capture: what is appended from then on is the graph's to keep. */
    CHECK_CUDA(cuda()->begin_capture(streams[0], CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_graph_pins_open(f.device, streams[0], &pins[0]));
    vmm_graph_pins_close(pins[0]);
    reuse_freed();
    CHECK_OK(vmm_append(t[0], s.source, streams[0]));
    CHECK_SIZE(retains(&s.model[0]), 1);
    drop_capture(streams[0]);
    for (int i = 0; i < 3; i++)
        CHECK_CUDA(cuda()->stream_destroy(streams[i]));
    scene_close(&s);
}

/* ---- rows --------------------------------------------------------------------------------- */

/* What arrays showed that are gone is not pinned by a graph that lives. */
static void test_pins_no_rows(void) {
    scene s = rows_open(1, 64, 1);
    model *m = &s.model[0];
    vmm_pin *pin;

    capture(&s, 1);
    CHECK_OK(vmm_pin_rows(m->tensor, 0, &pin));
    eager(&s);
    eager(&s);
    vmm_pin_shown(m->tensor);
    CHECK_STATUS(vmm_truncate(m->tensor, 1, stream), VMM_ERR_PINNED);
    vmm_unpin(pin);
    CHECK_SIZE(vmm_pinned_rows(m->tensor), 0);
    CHECK_OK(vmm_truncate(m->tensor, m->length = 1, stream));
    step(&s);
    check(&s);
    scene_close(&s);
}

int main(int argc, char **argv) {
    f = fixture_open(argc, argv, 0, 0);
    if (!f.is_gpu)
        SKIP("graphs are of a GPU");
    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    test_growth();
    test_hundreds_of_growths();
    test_many();
    test_launches();
    test_overflow();
    test_trim();
    test_overflow_given_up();
    test_trim_before_advance();
    test_forgotten_advance();
    test_truncate();
    test_refused_in_a_capture();
    test_refused_then_replayed();
    test_close();
    test_graph_pins();
    test_graph_pins_in_any_order();
    test_pins_no_rows();
    CHECK_CUDA(cuda()->stream_destroy(stream));
    fixture_close(&f);
    return 0;
}
