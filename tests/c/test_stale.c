/* The launch that moves a cursor fails: no row that a graph has appended is lost or miscounted,
 * whether the device has moved it all the same, in part, or not. On the simulated driver only. */
#include "check.h"

#include "../sim/vmm_sim.h"

#define LAUNCH_FAILED 719
#define N_LANES 130 /* of other lengths than their neighbours: more than one launch sets */

static fixture f;
static void *stream;
static __typeof__(vmm_sim_fail) *fail;

/* A tensor, a graph that appends a row to it, and the row. */
typedef struct scene {
    model m;
    vmm_array row;
    int64_t shape[VMM_MAX_NDIM];
    void *exec;
    uint32_t number;
} scene;

static void write_row(scene *s) {
    synchronize(&f);
    s->number = ++last_number;
    uint8_t *row = make_rows(s->m.tensor, s->number, 1);
    write_device(&f, (void *)(uintptr_t)s->row.data, row, vmm_row_bytes(s->m.tensor));
    synchronize(&f);
    free(row);
}

static void capture(scene *s) {
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_append(s->m.tensor, &s->row, stream));
    s->exec = end_capture(stream);
}

static void scene_open(scene *s, const vmm_spec *spec) {
    s->exec = NULL;
    s->m = model_open(&f, spec);
    s->row = (vmm_array){.data = device_alloc(&f, vmm_row_bytes(s->m.tensor)),
                         .memory = VMM_MEMORY_DEVICE,
                         .dtype = spec->dtype,
                         .ndim = spec->ndim,
                         .shape = s->shape};
    rows_shape(s->m.tensor, 1, s->shape);
}

static void scene_close(scene *s) {
    CHECK_CUDA(cuda()->graph_exec_destroy(s->exec));
    synchronize(&f);
    wait_for_unpinned(s->m.tensor);
    model_close(&s->m);
    device_free(&f, (void *)(uintptr_t)s->row.data);
}

static void eager(scene *s) {
    write_row(s);
    CHECK_OK(vmm_append(s->m.tensor, &s->row, stream));
    model_extend(&s->m, s->number, 1);
}

static void replay(scene *s) {
    write_row(s);
    CHECK_OK(vmm_map(s->m.tensor, vmm_length(s->m.tensor) + 4));
    CHECK_CUDA(cuda()->graph_launch(s->exec, stream));
    CHECK_CUDA(cuda()->stream_synchronize(stream));
}

static void advance(scene *s) {
    CHECK_OK(vmm_advance(s->m.tensor, 1));
    model_extend(&s->m, s->number, 1);
}

static void fail_append(scene *s) {
    write_row(s);
    CHECK(fail("cuLaunchKernel", 2, LAUNCH_FAILED, 1) == 0); /* behind that of the copy */
    CHECK_STATUS(vmm_append(s->m.tensor, &s->row, stream), VMM_ERR_DRIVER);
}

static const vmm_spec plain = {
    .ndim = 2, .shape = (int64_t[]){0, 96}, .dtype = VMM_UINT8, .capacity = 2000};

/* What is replayed after the failure and not followed is noticed by whoever would write over it. */
static void test_replayed_after_it(void) {
    scene s;

    scene_open(&s, &plain);
    eager(&s);
    capture(&s);
    for (int i = 0; i < 4; i++) {
        int32_t *cursor;
        fail_append(&s);
        replay(&s);
        switch (i) {
        case 0: CHECK_STATUS(vmm_append(s.m.tensor, &s.row, stream), VMM_ERR_BUSY); break;
        case 1: CHECK_STATUS(vmm_grow(s.m.tensor, 1, NULL), VMM_ERR_BUSY); break;
        case 2: CHECK_STATUS(vmm_trim(s.m.tensor), VMM_ERR_BUSY); break;
        default: CHECK_STATUS(vmm_cursor(s.m.tensor, stream, &cursor), VMM_ERR_BUSY);
        }
        CHECK(strstr(vmm_last_error()->message, "advance(1)"));
        advance(&s);
        model_check(&s.m);
        replay(&s); /* and it goes on from there, by the graph and without */
        advance(&s);
        eager(&s);
        model_check(&s.m);
    }
    scene_close(&s);
}

/* Once it has been found right, following costs no driver call again. */
static void test_mended(void) {
    scene s;

    scene_open(&s, &plain);
    capture(&s);
    CHECK(!vmm_advance_waits(s.m.tensor));
    fail_append(&s);
    CHECK(vmm_advance_waits(s.m.tensor));
    replay(&s);
    advance(&s);
    CHECK(!vmm_advance_waits(s.m.tensor));
    replay(&s);
    uint64_t calls = total_calls(s.m.tensor);
    advance(&s);
    CHECK_SIZE(total_calls(s.m.tensor), calls);
    /* Nothing has been replayed since, or it cannot be known. */
    fail_append(&s);
    CHECK_STATUS(vmm_advance(s.m.tensor, 1), VMM_ERR_BUSY);
    CHECK(strstr(vmm_last_error()->message, "truncate(2)"));
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_STATUS(vmm_advance(s.m.tensor, 1), VMM_ERR_CAPTURING);
    drop_capture(stream);
    CHECK_SIZE(vmm_length(s.m.tensor), 2);
    /* The failure alone: the next append is as any other. */
    eager(&s);
    model_check(&s.m);
    scene_close(&s);
}

/* ---- moved in part ------------------------------------------------------------------------ */

static void append_to_lanes(scene *s, const size_t *counts, vmm_status expected) {
    CHECK_STATUS(vmm_append_lanes(1, &s->m.tensor, &s->row, N_LANES, NULL, counts, stream),
                 expected);
}

/* Every second lane has a row more; then some lanes have been moved on and others not. */
static void open_in_part(scene *s) {
    static const int64_t lanes_shape[] = {N_LANES, 0, 32};
    size_t counts[N_LANES];
    vmm_spec spec = {.ndim = 3,
                     .shape = lanes_shape,
                     .axis = 1,
                     .dtype = VMM_UINT8,
                     .layout = VMM_LAYOUT_LANE,
                     .capacity = 100};

    scene_open(s, &spec);
    write_row(s);
    CHECK_OK(vmm_append(s->m.tensor, &s->row, stream));
    for (size_t i = 0; i < N_LANES; i++)
        counts[i] = i % 2;
    append_to_lanes(s, counts, VMM_OK);
}

static void fail_in_part(scene *s) {
    CHECK(fail("cuLaunchKernel", 3, LAUNCH_FAILED, 1) == 0);
    append_to_lanes(s, NULL, VMM_ERR_DRIVER);
}

static void check_in_part(scene *s, int32_t n_more) {
    int32_t *address, values[N_LANES];

    CHECK_OK(vmm_cursor(s->m.tensor, stream, &address));
    synchronize(&f);
    read_device(&f, values, (uintptr_t)address, sizeof values);
    for (size_t i = 0; i < N_LANES; i++) {
        CHECK_SIZE((size_t)values[i], 1 + i % 2 + (size_t)n_more);
        CHECK_SIZE(vmm_lengths(s->m.tensor)[i], 1 + i % 2 + (size_t)n_more);
    }
}

static void close_in_part(scene *s) {
    if (s->exec)
        CHECK_CUDA(cuda()->graph_exec_destroy(s->exec));
    synchronize(&f);
    wait_for_unpinned(s->m.tensor);
    CHECK_OK(vmm_close(s->m.tensor));
    free(s->m.numbers);
    device_free(&f, (void *)(uintptr_t)s->row.data);
}

/* A replay then appends to some lanes past a row that nobody counts: advance must not take it. */
static void test_in_part(void) {
    scene s;

    open_in_part(&s);
    capture(&s);
    replay(&s);
    CHECK_OK(vmm_advance(s.m.tensor, 1));
    check_in_part(&s, 1);
    fail_in_part(&s);
    CHECK_STATUS(vmm_append(s.m.tensor, &s.row, stream), VMM_ERR_BUSY);
    replay(&s);
    CHECK_STATUS(vmm_advance(s.m.tensor, 1), VMM_ERR_BUSY);
    CHECK(strstr(vmm_last_error()->message, "truncate(3)"));
    CHECK_SIZE(vmm_length(s.m.tensor), 3);
    CHECK_OK(vmm_truncate(s.m.tensor, 3, stream));
    check_in_part(&s, 1);
    replay(&s);
    CHECK_OK(vmm_advance(s.m.tensor, 1));
    check_in_part(&s, 2);
    close_in_part(&s);
}

/* Without a graph the next write sets it anew; a graph is not captured over one that is wrong. */
static void test_captured_after_it(void) {
    scene s;

    open_in_part(&s);
    check_in_part(&s, 0);
    fail_in_part(&s);
    check_in_part(&s, 0);
    fail_in_part(&s);
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_STATUS(vmm_append(s.m.tensor, &s.row, stream), VMM_ERR_BUSY);
    drop_capture(stream); /* it has survived that */
    CHECK_OK(vmm_append(s.m.tensor, &s.row, stream));
    check_in_part(&s, 1);
    capture(&s);
    replay(&s);
    CHECK_OK(vmm_advance(s.m.tensor, 1));
    check_in_part(&s, 2);
    close_in_part(&s);
}

/* A truncation on another stream has moved some lanes' cursor and failed: what sets it anew comes
 * behind that, and so does who reads it. */
static void test_order(void) {
    scene s;
    void *other;
    size_t lengths[N_LANES];

    CHECK_CUDA(cuda()->stream_create(&other, CUDA_STREAM_NON_BLOCKING));
    open_in_part(&s);
    append_to_lanes(&s, NULL, VMM_OK);
    check_in_part(&s, 1);
    for (size_t i = 0; i < N_LANES; i++)
        lengths[i] = 1 + i % 2;
    CHECK(fail("cuLaunchKernel", 2, LAUNCH_FAILED, 1) == 0);
    CHECK_STATUS(vmm_truncate_lanes(s.m.tensor, N_LANES, NULL, lengths, other), VMM_ERR_DRIVER);
    check_in_part(&s, 1);
    close_in_part(&s);
    CHECK_CUDA(cuda()->stream_destroy(other));
}

int main(int argc, char **argv) {
    f = fixture_open(argc, argv, 0, 0);
    if (!f.is_gpu)
        SKIP("graphs are of a GPU");
    cuda();
    *(void **)&fail = dlsym(cuda_library(), "vmm_sim_fail");
    if (!fail)
        SKIP("the driver is not the simulated one");
    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    test_replayed_after_it();
    test_mended();
    test_in_part();
    test_captured_after_it();
    test_order();
    CHECK_CUDA(cuda()->stream_destroy(stream));
    fixture_close(&f);
    return 0;
}
