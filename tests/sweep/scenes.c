/* scenes.c - the operations of vmm.h that can fail, each with what it finds. */
#include "sweep.h"

#include <errno.h>

#include "../../libvmm/src/append.h"

#define FIRST (&w->models[0])
#define SECOND (&w->models[1])

/* ---- what most scenes begin with, and how they end ------------------------------------------- */

static void nothing(world *w) {
    (void)w;
}

static void one_tensor(world *w) {
    vmm_spec spec = world_spec(w);
    model *m = world_tensor(w, &spec, FIRST_ROWS);
    world_provide(w, m, &spec, MORE_ROWS);
}

static void two_tensors(world *w) {
    vmm_spec spec = world_spec(w);
    model *m = world_tensor(w, &spec, FIRST_ROWS);
    world_tensor(w, &spec, FIRST_ROWS);
    world_provide(w, m, &spec, 2 * MORE_ROWS);
}

static void check_appended(world *w) {
    world_appended(FIRST, &w->sources[0]);
}

static vmm_status append_on(world *w, vmm_stream stream) {
    return vmm_append(FIRST->tensor, &w->sources[0].array, stream);
}

static vmm_status run_append(world *w) {
    return append_on(w, w->streams[0]);
}

static vmm_status run_append_elsewhere(world *w) {
    return append_on(w, w->streams[1]);
}

/* ---- devices, pools, reservations -------------------------------------------------------------- */

static vmm_status run_query(world *w) {
    return vmm_device_query(w->f.device, &w->info);
}

static void check_query(world *w) {
    CHECK_SIZE(w->info.granularity_bytes, 4096);
    CHECK(w->info.total_bytes >= w->info.free_bytes && w->info.free_bytes > 0);
    CHECK_OK(vmm_device_query(w->f.device, &w->info)); /* gives back what this one could not */
    CHECK(w->info.reservable_bytes >= 1 * GIB);
}

static vmm_status run_pool_create(world *w) {
    return vmm_pool_create(w->f.device, 0, 0, &w->other_pool);
}

static int count_calls(void *user, size_t needed_bytes) {
    (void)needed_bytes;
    ++*(int *)user;
    return 0;
}

static void prepare_on_oom(world *w) {
    CHECK_OK(vmm_pool_on_oom(w->f.pool, count_calls, &w->done));
}

static vmm_status run_on_oom(world *w) {
    return vmm_pool_on_oom(w->f.pool, count_calls, w);
}

static void check_on_oom(world *w) {
    CHECK_OK(vmm_pool_on_oom(w->f.pool, NULL, w)); /* it is there, and once */
    CHECK_STATUS(vmm_pool_on_oom(w->f.pool, NULL, w), VMM_ERR_INVALID);
}

/* Its thread sleeps, since nothing grows: the calls are the operation's own. */
static vmm_status run_set_lookahead(world *w) {
    return vmm_pool_set_lookahead(w->f.pool, 64 * KIB);
}

static void check_set_lookahead(world *w) {
    CHECK_SIZE(vmm_pool_lookahead(w->f.pool), 64 * KIB);
    CHECK_OK(vmm_pool_set_lookahead(w->f.pool, 0));
    CHECK_SIZE(vmm_pool_lookahead(w->f.pool), 0);
}

static vmm_status run_reserve(world *w) {
    vmm_spec spec = world_spec(w);
    return vmm_reserve(w->f.pool, &spec, &w->made);
}

static void check_reserve(world *w) {
    CHECK_SIZE(vmm_length(w->made), 0);
    CHECK_OK(vmm_grow(w->made, 3, NULL));
}

/* So many closed tensors are queued that a reservation looks after them. No two have the same
 * geometry, so that none takes another's over. */
static void many_closed(world *w) {
    vmm_spec spec = world_spec(w);
    vmm_tensor *tensor;
    for (int i = 0; i < 70; i++) {
        spec.capacity += 16;
        CHECK_OK(vmm_reserve(w->f.pool, &spec, &tensor));
        if (i % 16 == 0)
            CHECK_OK(vmm_grow(tensor, 1, NULL));
        CHECK_OK(vmm_close(tensor));
    }
}

/* A closed tensor of the same geometry: its range and its blocks are there for the next. */
static void closed_before(world *w) {
    vmm_spec spec = world_spec(w);
    model closed = model_open(&w->f, &spec);
    model_append(&closed, VMM_UINT8, FIRST_ROWS + MORE_ROWS, VMM_MEMORY_HOST, w->streams[0]);
    model_close(&closed);
    world_wait(w);
}

/* The same on a tensor that has taken one over: some of its growth finds blocks, some does not. */
static void taken_over(world *w) {
    vmm_spec spec = world_spec(w);
    model closed = model_open(&w->f, &spec);
    model_append(&closed, VMM_UINT8, FIRST_ROWS + MORE_ROWS / 2, VMM_MEMORY_HOST, w->streams[0]);
    model_close(&closed);
    world_wait(w);
    one_tensor(w);
}

static void append_taken_over(world *w) {
    taken_over(w);
    world_rows(w, FIRST, MORE_ROWS, VMM_MEMORY_DEVICE, DENSE);
}

/* ---- allocations ------------------------------------------------------------------------------- */

/* Not a whole number of blocks. */
#define ALLOCATED_BYTES 10000

static vmm_status run_alloc(world *w) {
    return vmm_pool_alloc(w->f.pool, ALLOCATED_BYTES, w->streams[0], &w->memory);
}

/* Every byte is there, and the pool knows it again. */
static void check_alloc(world *w) {
    memset(w->memory, 0x5a, ALLOCATED_BYTES);
    CHECK_OK(vmm_pool_free(w->f.pool, w->memory));
    CHECK_STATUS(vmm_pool_free(w->f.pool, w->memory), VMM_ERR_INVALID);
    CHECK_OK(run_alloc(w));
}

static void allocated(world *w) {
    one_tensor(w);
    CHECK_OK(run_alloc(w));
}

static vmm_status run_free(world *w) {
    vmm_status status = vmm_pool_free(w->f.pool, w->memory);
    if (!status)
        w->memory = NULL;
    return status;
}

/* ---- growing ----------------------------------------------------------------------------------- */

static vmm_status run_map(world *w) {
    return vmm_map(FIRST->tensor, FIRST_ROWS + MORE_ROWS);
}

static void check_map(world *w) {
    CHECK(vmm_mapped(FIRST->tensor) >= FIRST_ROWS + MORE_ROWS);
}

static vmm_status run_map_two(world *w) {
    vmm_tensor *const tensors[] = {FIRST->tensor, SECOND->tensor};
    const size_t n_rows[] = {FIRST_ROWS + MORE_ROWS, FIRST_ROWS + MORE_ROWS / 2};
    return vmm_map_many(2, tensors, n_rows);
}

static void check_map_two(world *w) {
    check_map(w);
    CHECK(vmm_mapped(SECOND->tensor) >= FIRST_ROWS + MORE_ROWS / 2);
}

static vmm_status run_grow(world *w) {
    return vmm_grow(FIRST->tensor, MORE_ROWS, NULL);
}

/* The new rows are written, as a kernel would. */
static void check_grow(world *w) {
    uint8_t *rows = make_rows(FIRST->tensor, last_number + 1, MORE_ROWS);
    CHECK_SIZE(vmm_length(FIRST->tensor), FIRST->length + MORE_ROWS);
    copy_rows(&w->f, FIRST->tensor, FIRST->length, FIRST->length + MORE_ROWS, rows, true);
    model_extend(FIRST, last_number + 1, MORE_ROWS);
    last_number += MORE_ROWS;
    free(rows);
}

static void first_rows(world *w) {
    vmm_spec spec = world_spec(w);
    world_tensor(w, &spec, 0);
    world_provide(w, FIRST, &spec, MORE_ROWS);
}

static void zero_tensor(world *w) {
    vmm_spec spec = world_spec(w);
    spec.zero = 1;
    model *m = world_tensor(w, &spec, FIRST_ROWS);
    world_provide(w, m, &spec, MORE_ROWS);
}

static void check_zero(world *w) {
    size_t end = FIRST_ROWS + MORE_ROWS;
    uint8_t *rows;
    CHECK_SIZE(vmm_length(FIRST->tensor), end);
    rows = read_rows(&w->f, FIRST->tensor, FIRST_ROWS, end);
    for (size_t i = 0; i < MORE_ROWS * vmm_row_bytes(FIRST->tensor); i++)
        CHECK(rows[i] == 0);
    free(rows);
    memset(FIRST->numbers + FIRST_ROWS, 0, MORE_ROWS * sizeof *FIRST->numbers);
    FIRST->length = end;
}

/* At 32 KiB the blocks of "auto" become larger than the smallest. */
static void long_tensor(world *w) {
    vmm_spec spec = world_spec(w);
    model *m = world_tensor(w, &spec, 4 * FIRST_ROWS);
    world_provide(w, m, &spec, 2 * MORE_ROWS);
}

/* Parked blocks that have no access: growing over them must give it, should they stay. On the
 * host an unmap fails half-way, on a GPU a growth and its undoing do. */
static void blocks_without_access(world *w) {
    one_tensor(w);
    if (w->config->is_gpu) {
        the_simulator()->reset();
        CHECK(the_simulator()->fail("cuMemSetAccess", 1, 999, 1) == 0);
        CHECK(the_simulator()->fail("cuMemUnmap", 1, 999, -1) == 0);
        CHECK_STATUS(vmm_grow(FIRST->tensor, MORE_ROWS, NULL), VMM_ERR_DRIVER);
        the_simulator()->fail_none();
    } else {
        CHECK_OK(vmm_map(FIRST->tensor, FIRST_ROWS + MORE_ROWS));
        faults_arm(FAULT_SYSTEM, 2, ENOMEM, -1); /* behind the first call, which closes them */
        CHECK_OK(vmm_trim(FIRST->tensor));
        faults_disarm();
    }
}

/* A budget of which a closed tensor's memory is a part: it comes back behind a fence. */
static void queued_memory(world *w) {
    vmm_spec spec = world_spec(w);
    world_tensor(w, &spec, FIRST_ROWS);
    model closed = model_open(&w->f, &spec);
    model_append(&closed, VMM_UINT8, FIRST_ROWS, VMM_MEMORY_HOST, w->streams[1]);
    model_close(&closed);
}

/* The same where a fence has passed, and of another geometry. */
static void recycled_memory(world *w) {
    vmm_spec spec = world_spec(w);
    world_tensor(w, &spec, FIRST_ROWS);
    spec.capacity *= 2;
    for (int i = 0; i < 2; i++) { /* the second looks for the first's */
        model closed = model_open(&w->f, &spec);
        model_grow(&closed, FIRST_ROWS, false);
        model_close(&closed);
        world_wait(w);
    }
}

static int close_second(void *user, size_t needed_bytes) {
    world *w = user;
    CHECK(needed_bytes > 0);
    if (!SECOND->tensor)
        return 0;
    CHECK_OK(vmm_close(SECOND->tensor));
    SECOND->tensor = NULL;
    return 1;
}

/* A budget that another tensor fills, until the callback closes it. */
static void full_budget(world *w) {
    vmm_spec spec = world_spec(w);
    world_tensor(w, &spec, FIRST_ROWS);
    world_tensor(w, &spec, FIRST_ROWS);
    CHECK_OK(vmm_pool_on_oom(w->f.pool, close_second, w));
}

/* A pool that was dropped while a tensor of it was queued. */
static void abandoned_pool(world *w) {
    vmm_spec spec = world_spec(w);
    vmm_pool *pool;
    vmm_tensor *tensor;
    one_tensor(w);
    CHECK_OK(vmm_pool_create(w->f.device, 0, 0, &pool));
    CHECK_OK(vmm_reserve(pool, &spec, &tensor));
    CHECK_OK(vmm_grow(tensor, FIRST_ROWS, NULL));
    CHECK_OK(vmm_close(tensor));
    vmm_pool_release(pool);
    w->has_abandoned_pool = true;
}

/* ---- appending --------------------------------------------------------------------------------- */

static void append_device(world *w) {
    one_tensor(w);
    world_rows(w, FIRST, MORE_ROWS, VMM_MEMORY_DEVICE, DENSE);
}

static void append_host(world *w) {
    one_tensor(w);
    world_rows(w, FIRST, MORE_ROWS, VMM_MEMORY_HOST, DENSE);
}

static void append_host_strided(world *w) {
    one_tensor(w);
    world_rows(w, FIRST, MORE_ROWS, VMM_MEMORY_HOST, STRIDED);
}

static void append_device_strided(world *w) {
    one_tensor(w);
    world_rows(w, FIRST, MORE_ROWS, VMM_MEMORY_DEVICE, STRIDED);
}

static void append_within(world *w) {
    append_device(w);
    CHECK_OK(vmm_map(FIRST->tensor, FIRST_ROWS + MORE_ROWS));
}

static void append_after_readers(world *w) {
    append_device(w);
    CHECK_OK(vmm_truncate(FIRST->tensor, FIRST_ROWS - 1, w->streams[1]));
    FIRST->length--;
}

static void append_device_two(world *w) {
    two_tensors(w);
    world_rows(w, FIRST, MORE_ROWS, VMM_MEMORY_DEVICE, DENSE);
    world_rows(w, SECOND, MORE_ROWS / 2, VMM_MEMORY_DEVICE, STRIDED);
}

static void append_host_two(world *w) {
    two_tensors(w);
    world_rows(w, FIRST, MORE_ROWS, VMM_MEMORY_HOST, DENSE);
    world_rows(w, SECOND, MORE_ROWS / 2, VMM_MEMORY_HOST, STRIDED);
}

static vmm_status run_append_two(world *w) {
    vmm_tensor *const tensors[] = {FIRST->tensor, SECOND->tensor};
    const vmm_array arrays[] = {w->sources[0].array, w->sources[1].array};
    return vmm_append_many(2, tensors, arrays, w->streams[1]);
}

static void check_appended_two(world *w) {
    world_appended(FIRST, &w->sources[0]);
    world_appended(SECOND, &w->sources[1]);
}

/* The first has a spare block of four, of which it needs one, and the second three: a budget that
 * both need whole. */
static void append_over_a_spare(world *w) {
    vmm_spec spec = world_spec(w);
    model *m = world_tensor(w, &spec, 8 * FIRST_ROWS);
    CHECK_OK(vmm_map(m->tensor, 8 * FIRST_ROWS + 1));
    CHECK_OK(vmm_trim(m->tensor));
    world_rows(w, m, 1, VMM_MEMORY_DEVICE, DENSE);
    world_rows(w, world_tensor(w, &spec, 0), MORE_ROWS, VMM_MEMORY_DEVICE, DENSE);
}

/* So many dimensions that the kernel needs the wide form of its jobs. */
static vmm_spec wide_spec(const world *w) {
    static const int64_t shape[] = {2, 0, 2, 2, 2, 2, 16};
    return (vmm_spec){.ndim = 7,
                      .shape = shape,
                      .axis = 1,
                      .dtype = VMM_UINT8,
                      .capacity = 256,
                      .layout = w->config->layout};
}

static void append_wide(world *w) {
    vmm_spec spec = wide_spec(w);
    model *m = world_tensor(w, &spec, FIRST_ROWS);
    world_provide(w, m, &spec, MORE_ROWS);
    world_rows(w, m, MORE_ROWS, VMM_MEMORY_DEVICE, STRIDED);
}

/* One narrow job and one wide: a launch may fail behind another. */
static void append_both_forms(world *w) {
    vmm_spec spec = wide_spec(w);
    append_wide(w);
    world_rows(w, world_tensor(w, &spec, FIRST_ROWS), MORE_ROWS, VMM_MEMORY_DEVICE, DENSE);
}

/* Rows for the last lane alone. */
static void one_lane(world *w, vmm_memory memory) {
    one_tensor(w);
    world_rows(w, FIRST, MORE_ROWS, memory, DENSE)->shape[0] = 1;
}

static void append_lane_device(world *w) {
    one_lane(w, VMM_MEMORY_DEVICE);
}

static void append_lane_host(world *w) {
    one_lane(w, VMM_MEMORY_HOST);
}

static vmm_status run_append_lane(world *w) {
    const size_t last[] = {1};
    return vmm_append_lanes(1, &FIRST->tensor, &w->sources[0].array, 1, last, NULL, w->streams[0]);
}

/* The lane has the rows; without them the tensor is as it was. */
static void check_append_lane(world *w) {
    const size_t last[] = {1}, before[] = {FIRST_ROWS}, *lengths = vmm_lengths(FIRST->tensor);
    size_t pre, post, end = FIRST_ROWS + MORE_ROWS;
    CHECK(vmm_is_ragged(FIRST->tensor) && vmm_length(FIRST->tensor) == end);
    CHECK(lengths[0] == FIRST_ROWS && lengths[1] == end);
    uint8_t *rows = read_rows(&w->f, FIRST->tensor, FIRST_ROWS, end);
    row_pieces(FIRST->tensor, &pre, &post);
    for (size_t p = 0; p < pre / 2; p++)
        for (size_t i = 0; i < MORE_ROWS * post; i++)
            CHECK(rows[(pre / 2 + p) * MORE_ROWS * post + i] ==
                  row_byte(w->sources[0].first_number + (uint32_t)(i / post), p * post + i % post));
    free(rows);
    CHECK_OK(vmm_truncate_lanes(FIRST->tensor, 1, last, before, w->streams[0]));
    CHECK(!vmm_is_ragged(FIRST->tensor));
}

/* Many lanes, each of which is one block. */
static vmm_spec lanes_spec(const int64_t *shape) {
    return (vmm_spec){.ndim = 3,
                      .shape = shape,
                      .axis = 1,
                      .dtype = VMM_UINT8,
                      .capacity = 256,
                      .layout = VMM_LAYOUT_LANE};
}

/* More lanes than pieces fit a launch, all of them mapped: a launch may fail behind another. */
static void append_pieces(world *w) {
    static const int64_t shape[] = {VMM_APPEND_PIECES + 1, 0, 16};
    vmm_spec spec = lanes_spec(shape);
    model *m = world_tensor(w, &spec, FIRST_ROWS);
    world_rows(w, m, MORE_ROWS, VMM_MEMORY_DEVICE, DENSE);
}

static vmm_status run_append_pieces(world *w) {
    return vmm_append_lanes(1, &FIRST->tensor, &w->sources[0].array, VMM_APPEND_PIECES + 1, NULL,
                            NULL, w->streams[1]);
}

/* ---- shrinking, copying -------------------------------------------------------------------------- */

static vmm_status run_truncate(world *w) {
    return vmm_truncate(FIRST->tensor, FIRST_ROWS / 2, w->streams[1]);
}

static void check_truncate(world *w) {
    FIRST->length = FIRST_ROWS / 2;
    model_append(FIRST, VMM_UINT8, 3, VMM_MEMORY_HOST, w->streams[0]);
}

static vmm_status run_truncate_lane(world *w) {
    const size_t last[] = {vmm_length_count(FIRST->tensor) - 1}, n_rows[] = {FIRST_ROWS / 2};
    return vmm_truncate_lanes(FIRST->tensor, 1, last, n_rows, w->streams[1]);
}

static void check_truncate_lane(world *w) {
    size_t n = vmm_length_count(FIRST->tensor);
    CHECK_SIZE(vmm_lengths(FIRST->tensor)[n - 1], FIRST_ROWS / 2);
    CHECK(vmm_is_ragged(FIRST->tensor) == (n > 1));
    CHECK_OK(vmm_truncate(FIRST->tensor, FIRST_ROWS / 2, VMM_STREAM_NONE));
    check_truncate(w);
}

static void more_mapped(world *w) {
    one_tensor(w);
    CHECK_OK(vmm_map(FIRST->tensor, FIRST_ROWS + 2 * MORE_ROWS));
}

static vmm_status run_trim(world *w) {
    return vmm_trim(FIRST->tensor);
}

static void check_trim(world *w) {
    vmm_tensor_stats stats;
    CHECK_OK(vmm_stats(FIRST->tensor, &stats));
    CHECK(stats.slack_bytes <= vmm_lane_count(FIRST->tensor) * (stats.used_bytes / 8 + 4096));
    model_append(FIRST, VMM_UINT8, MORE_ROWS, VMM_MEMORY_HOST, w->streams[0]);
}

static vmm_status run_fork(world *w) {
    return vmm_fork(FIRST->tensor, FIRST_ROWS - 3, &w->made);
}

static void check_fork(world *w) {
    model copy = *FIRST;
    copy.tensor = w->made;
    copy.base = vmm_base(w->made);
    copy.length = FIRST_ROWS - 3;
    model_check(&copy);
}

static vmm_status run_pin(world *w) {
    return vmm_pin_rows(FIRST->tensor, FIRST_ROWS, &w->pin);
}

static vmm_status run_pin_cursor(world *w) {
    return vmm_pin_cursor(FIRST->tensor, &w->pin);
}

static void check_pin(world *w) {
    CHECK_STATUS(vmm_close(FIRST->tensor), VMM_ERR_PINNED);
}

/* ---- streams ------------------------------------------------------------------------------------- */

static vmm_status run_handoff(world *w) {
    return vmm_handoff(FIRST->tensor, w->streams[1]);
}

static void handoff_after_readers(world *w) {
    vmm_stream none = VMM_STREAM_LEGACY;
    one_tensor(w);
    CHECK_OK(vmm_truncate(FIRST->tensor, FIRST_ROWS, none));
}

static vmm_status run_stream_wait(world *w) {
    return vmm_stream_wait(w->f.device, w->streams[1], w->streams[0]);
}

static vmm_status run_is_capturing(world *w) {
    return vmm_stream_is_capturing(w->f.device, w->streams[0], &w->done);
}

static void check_is_capturing(world *w) {
    CHECK(w->done == 0);
}

static vmm_status run_event_record(world *w) {
    return vmm_event_record(w->f.device, w->streams[0], &w->event);
}

static void recorded_event(world *w) {
    CHECK_OK(vmm_event_record(w->f.device, w->streams[0], &w->event));
}

static vmm_status run_event_query(world *w) {
    return vmm_event_query(w->event, &w->done);
}

static void check_event_query(world *w) {
    CHECK(w->done == 1);
}

/* ---- giving back --------------------------------------------------------------------------------- */

/* Something free, something queued, something in use. */
static void closed_tensors(world *w) {
    vmm_spec spec = world_spec(w);
    world_tensor(w, &spec, FIRST_ROWS);
    for (int i = 0; i < 2; i++) {
        model closed = model_open(&w->f, &spec);
        model_grow(&closed, FIRST_ROWS, false);
        model_close(&closed);
        world_wait(w);
    }
    CHECK_OK(vmm_map(FIRST->tensor, FIRST_ROWS + MORE_ROWS));
    CHECK_OK(vmm_trim(FIRST->tensor));
}

static vmm_status run_pool_trim(world *w) {
    return vmm_pool_trim(w->f.pool, 0);
}

static vmm_status run_pool_trim_wait(world *w) {
    return vmm_pool_trim(w->f.pool, 1);
}

static void check_pool_trim_wait(world *w) {
    vmm_pool_stats stats;
    CHECK_OK(vmm_pool_statistics(w->f.pool, &stats));
    CHECK_SIZE(stats.free_bytes, 0);
    CHECK_SIZE(stats.queued_bytes, 0);
    CHECK_SIZE(stats.parked_bytes, 0);
}

/* Without an event for the whole device (HIP, CUDA before 12.5) a fence waits for it: what is
 * queued stays. */
static void check_pool_trim(world *w) {
    bool waits = w->config->is_gpu && (is_hip || atoi(getenv("VMM_SIM_DRIVER_VERSION")) < 12050);
    vmm_pool_stats stats;
    if (waits) {
        CHECK_OK(vmm_pool_statistics(w->f.pool, &stats));
        CHECK_SIZE(stats.free_bytes, 0);
        CHECK(stats.queued_bytes > 0);
        CHECK_OK(vmm_pool_trim(w->f.pool, 1));
    }
    check_pool_trim_wait(w);
}

/* The pool that is closed is another one, so that the world's can be asked afterwards. */
static void other_pool(world *w) {
    vmm_pool *first = w->f.pool;
    vmm_spec spec = world_spec(w);
    CHECK_OK(vmm_pool_create(w->f.device, 0, 0, &w->other_pool));
    w->f.pool = w->other_pool;
    for (int i = 0; i < 2; i++) {
        model closed = model_open(&w->f, &spec);
        model_grow(&closed, FIRST_ROWS, false);
        model_close(&closed);
        world_wait(w);
    }
    w->f.pool = first;
}

static vmm_status run_pool_close(world *w) {
    vmm_status status = vmm_pool_close(w->other_pool);
    if (!status)
        w->other_pool = NULL;
    return status;
}

static vmm_status run_close(world *w) {
    vmm_status status = vmm_close(FIRST->tensor);
    if (!status)
        FIRST->tensor = NULL;
    return status;
}

/* The name, and where it runs and what it may do; then what comes before it, the call, whether
 * it was right; then the budget in blocks. */
#define ONCE (ONE_LAYOUT | ONE_BLOCKS | ONE_SIZE)
/* ---- cursors and graphs ------------------------------------------------------------------------ */

static void check_cursor_of(world *w, const model *m) {
    int32_t *address, values[8];
    size_t n = vmm_length_count(m->tensor);
    CHECK_OK(vmm_cursor(m->tensor, w->streams[0], &address));
    synchronize(&w->f);
    read_device(&w->f, values, (uintptr_t)address, n * sizeof values[0]);
    for (size_t i = 0; i < n; i++)
        CHECK_SIZE((size_t)values[i], vmm_lengths(m->tensor)[i]);
}

static vmm_status run_cursor(world *w) {
    int32_t *address;
    return vmm_cursor(FIRST->tensor, w->streams[1], &address);
}

static void check_cursor(world *w) {
    check_cursor_of(w, FIRST);
}

static void with_cursor(world *w) {
    one_tensor(w);
    CHECK_OK(run_cursor(w));
}

static void two_with_cursors(world *w) {
    two_tensors(w);
    CHECK_OK(run_cursor(w));
    check_cursor_of(w, SECOND);
}

static void append_with_cursors(world *w) {
    append_device_two(w);
    CHECK_OK(run_cursor(w));
    check_cursor_of(w, SECOND);
}

static void check_appended_with_cursors(world *w) {
    check_appended_two(w);
    check_cursor_of(w, FIRST);
    check_cursor_of(w, SECOND);
}

static void check_grow_with_cursor(world *w) {
    check_grow(w);
    check_cursor(w);
}

static void check_truncate_with_cursor(world *w) {
    check_cursor(w);
    check_truncate(w);
    check_cursor(w);
}

static void more_mapped_with_cursor(world *w) {
    more_mapped(w);
    CHECK_OK(run_cursor(w));
}

/* HIP's captures cannot wait for work outside of them. */
static void last_written_on(model *m, vmm_stream stream) {
    CHECK_OK(vmm_truncate(m->tensor, FIRST_ROWS - 1, VMM_STREAM_NONE));
    m->length--;
    model_append(m, VMM_UINT8, 1, VMM_MEMORY_HOST, stream);
}

static void append_captured(world *w) {
    append_device_two(w);
    for (size_t i = 0; is_hip && i < w->n_models; i++)
        last_written_on(&w->models[i], w->streams[1]);
    world_wait(w);
    CHECK_CUDA(cuda()->begin_capture(w->streams[1], CUDA_CAPTURE_GLOBAL));
    w->is_capturing = true;
}

static void append_captured_and_kept(world *w) {
    w->is_kept = true;
    append_captured(w);
}

/* The capture ends here, too: nothing can be looked at within. */
static vmm_status run_captured(world *w) {
    vmm_graph_pins *pins = NULL;
    vmm_status status = VMM_OK;
    if (!w->is_capturing)
        CHECK_CUDA(cuda()->begin_capture(w->streams[1], CUDA_CAPTURE_GLOBAL));
    if (w->is_kept)
        status = vmm_graph_pins_open(w->f.device, w->streams[1], &pins);
    if (!status)
        status = run_append_two(w);
    vmm_error error = *vmm_last_error();
    the_simulator()->fail_none();
    CHECK_CUDA(cuda()->end_capture(w->streams[1], &w->graph));
    w->is_capturing = false;
    if (status) {
        CHECK_CUDA(cuda()->graph_destroy(w->graph));
        vmm_graph_pins_close(pins);
    } else
        w->pins = pins;
    CHECK(error.status == vmm_last_error()->status);
    return status;
}

static void check_captured(world *w) {
    void *exec;
    CHECK_CUDA(cuda()->instantiate(&exec, w->graph, 0));
    CHECK_CUDA(cuda()->graph_destroy(w->graph));
    CHECK_OK(vmm_map(FIRST->tensor, FIRST_ROWS + MORE_ROWS));
    CHECK_OK(vmm_map(SECOND->tensor, FIRST_ROWS + MORE_ROWS / 2));
    CHECK_CUDA(cuda()->graph_launch(exec, w->streams[1]));
    CHECK_OK(vmm_advance(FIRST->tensor, MORE_ROWS));
    CHECK_OK(vmm_advance(SECOND->tensor, MORE_ROWS / 2));
    CHECK_CUDA(cuda()->graph_exec_destroy(exec));
    vmm_graph_pins_close(w->pins);
    check_appended_with_cursors(w);
}

/* A graph has appended a row, and may again: what starts from the host's lengths waits for the
 * device and looks. */
static void behind_a_graph(world *w) {
    static const int64_t shape[] = {4, 0, 16};
    vmm_spec spec = lanes_spec(shape);
    model *m = world_tensor(w, &spec, 0);
    model_append(m, VMM_UINT8, FIRST_ROWS, VMM_MEMORY_HOST, w->streams[1]);
    world_rows(w, m, MORE_ROWS, VMM_MEMORY_DEVICE, DENSE);
    rows *row = world_rows(w, m, 1, VMM_MEMORY_DEVICE, DENSE);
    world_wait(w);
    CHECK_CUDA(cuda()->begin_capture(w->streams[1], CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_append(m->tensor, &row->array, w->streams[1]));
    CHECK_CUDA(cuda()->end_capture(w->streams[1], &w->graph));
    CHECK_CUDA(cuda()->instantiate(&w->exec, w->graph, 0));
    CHECK_CUDA(cuda()->graph_destroy(w->graph));
    CHECK_CUDA(cuda()->graph_launch(w->exec, w->streams[1]));
    CHECK_OK(vmm_advance(m->tensor, 1));
    world_appended(m, row);
}

static void replayed_again(world *w) {
    behind_a_graph(w);
    CHECK_CUDA(cuda()->graph_launch(w->exec, w->streams[1]));
}

static vmm_status run_advance(world *w) {
    return vmm_advance(FIRST->tensor, 1);
}

static void check_advance(world *w) {
    world_appended(FIRST, &w->sources[1]);
    CHECK_SIZE(vmm_length(FIRST->tensor), FIRST->length);
}

/* clang-format off */
const scene scenes[] = {
    {"device_query", ONCE, nothing, run_query, check_query, 0},
    {"pool_create", ONCE, nothing, run_pool_create, nothing, 0},
    {"pool_on_oom", ONCE, prepare_on_oom, run_on_oom, check_on_oom, 0},
    {"pool_set_lookahead", ONCE, one_tensor, run_set_lookahead, check_set_lookahead, 0},
    {"reserve", ONE_BLOCKS | TAKES_ADDRESSES, one_tensor, run_reserve, check_reserve, 0},
    {"reserve, many closed before", ONCE | TAKES_ADDRESSES | FENCES, many_closed, run_reserve,
     check_reserve, 0},
    {"reserve, one like it closed before", CUDA_ONLY | ONE_BLOCKS | TAKES_ADDRESSES | FENCES,
     closed_before, run_reserve, check_reserve, 0},
    {"pool_alloc", ONE_LAYOUT | TAKES_ADDRESSES | SUBMITS, one_tensor, run_alloc, check_alloc, 0},
    {"pool_alloc, queued memory in the budget", CUDA_ONLY | ONE_BLOCKS | FENCES | SUBMITS,
     queued_memory, run_alloc, check_alloc, 8},
    {"pool_free", ONE_LAYOUT | ONE_BLOCKS, allocated, run_free, nothing, 0},
    {"map", 0, one_tensor, run_map, check_map, 0},
    {"map_many", SEVERAL, two_tensors, run_map_two, check_map_two, 0},
    {"grow", 0, one_tensor, run_grow, check_grow, 0},
    {"grow, the first rows", ONE_BLOCKS, first_rows, run_grow, check_grow, 0},
    {"grow, large blocks", ONE_LAYOUT, long_tensor, run_grow, check_grow, 0},
    {"grow, zero", SUBMITS, zero_tensor, run_grow, check_zero, 0},
    {"grow, blocks without access", ONE_BLOCKS | SUBMITS, blocks_without_access, run_grow,
     check_grow, 0},
    {"grow, queued memory in the budget", CUDA_ONLY | ONE_BLOCKS | FENCES, queued_memory, run_grow,
     check_grow, 8},
    {"grow, queued memory in use", CUDA_ONLY | ONE_BLOCKS | FENCES | BUSY, queued_memory, run_grow,
     check_grow, 8},
    {"grow, over recycled blocks", CUDA_ONLY | ONE_BLOCKS, taken_over, run_grow, check_grow, 0},
    {"grow, recycled memory in the budget", CUDA_ONLY | ONE_BLOCKS | FENCES, recycled_memory,
     run_grow, check_grow, 8},
    {"grow, on_oom callback", ONE_BLOCKS | FENCES | SUBMITS | CLOSES, full_budget, run_grow, check_grow, 8},
    {"grow, an abandoned pool", ONCE | FENCES, abandoned_pool, run_grow, check_grow, 0},
    {"append, device memory", SUBMITS, append_device, run_append, check_appended, 0},
    {"append, over recycled blocks", CUDA_ONLY | SUBMITS | ONE_BLOCKS, append_taken_over,
     run_append, check_appended, 0},
    {"append, device memory, strided", SUBMITS | ONE_BLOCKS, append_device_strided, run_append,
     check_appended, 0},
    {"append, host memory", SUBMITS, append_host, run_append, check_appended, 0},
    {"append, host memory, strided", SUBMITS, append_host_strided, run_append, check_appended, 0},
    {"append, within mapped rows", SUBMITS | ONE_BLOCKS, append_within, run_append, check_appended,
     0},
    {"append, another stream", SUBMITS | ONE_BLOCKS | CUDA_ONLY, append_device, run_append_elsewhere,
     check_appended, 0},
    {"append, after readers", SUBMITS | ONE_BLOCKS | CUDA_ONLY, append_after_readers, run_append,
     check_appended, 0},
    {"append, wide jobs", SUBMITS | ONE_BLOCKS, append_wide, run_append, check_appended, 0},
    {"append_many, device memory", SUBMITS, append_device_two, run_append_two, check_appended_two,
     0},
    {"append_many, host memory", SUBMITS, append_host_two, run_append_two, check_appended_two, 0},
    {"append_many, both kinds of jobs", SUBMITS | ONE_BLOCKS, append_both_forms, run_append_two,
     check_appended_two, 0},
    {"append_lanes, device memory", SUBMITS | LANES, append_lane_device, run_append_lane,
     check_append_lane, 0},
    {"append_lanes, host memory", SUBMITS | ONE_BLOCKS | LANES, append_lane_host, run_append_lane,
     check_append_lane, 0},
    {"append_lanes, pieces", SUBMITS | ONCE, append_pieces, run_append_pieces, check_appended, 0},
    {"truncate_lanes", ONE_BLOCKS, one_tensor, run_truncate_lane, check_truncate_lane, 0},
    {"truncate", ONE_BLOCKS, one_tensor, run_truncate, check_truncate, 0},
    {"trim", ONE_BLOCKS, more_mapped, run_trim, check_trim, 0},
    {"fork", SUBMITS | TAKES_ADDRESSES, one_tensor, run_fork, check_fork, 0},
    {"cursor", ONE_BLOCKS, one_tensor, run_cursor, check_cursor, 0},
    {"append_many, over a spare block", CUDA_ONLY | ONE_LAYOUT | ONE_BLOCKS | ONE_SIZE | FENCES |
     SUBMITS | SHORT, append_over_a_spare, run_append_two, check_appended_two, 28},
    {"append_many, with cursors", SUBMITS, append_with_cursors, run_append_two,
     check_appended_with_cursors, 0},
    {"append_many, captured", SUBMITS | CUDA_ONLY, append_captured, run_captured, check_captured,
     0},
    {"append_many, captured and kept", SUBMITS | CUDA_ONLY, append_captured_and_kept, run_captured, check_captured,
     0},
    {"grow, with a cursor", SUBMITS, with_cursor, run_grow, check_grow_with_cursor, 0},
    {"map, with a cursor", SUBMITS, with_cursor, run_map, check_map, 0},
    {"map_many, with cursors", SUBMITS, two_with_cursors, run_map_two, check_map_two, 0},
    {"truncate, with a cursor", ONE_BLOCKS | SUBMITS, with_cursor, run_truncate,
     check_truncate_with_cursor, 0},
    {"trim, with a cursor", ONE_BLOCKS | SUBMITS, more_mapped_with_cursor, run_trim, check_trim, 0},
    {"append, behind a graph", ONCE | CUDA_ONLY | SUBMITS | FENCES, behind_a_graph, run_append,
     check_appended, 0},
    {"grow, behind a graph", ONCE | CUDA_ONLY | SUBMITS | FENCES, behind_a_graph, run_grow,
     check_grow, 0},
    {"truncate, behind a graph", ONCE | CUDA_ONLY | SUBMITS | FENCES, behind_a_graph, run_truncate,
     check_truncate, 0},
    {"trim, behind a graph", ONCE | CUDA_ONLY | SUBMITS | FENCES, behind_a_graph, run_trim,
     check_trim, 0},
    {"advance", ONCE | CUDA_ONLY, replayed_again, run_advance, check_advance, 0},
    {"pin_rows", ONCE, one_tensor, run_pin, check_pin, 0},
    {"pin_cursor", ONCE, one_tensor, run_pin_cursor, check_pin, 0},
    {"handoff", ONCE | CUDA_ONLY, one_tensor, run_handoff, nothing, 0},
    {"handoff, after readers", ONCE | CUDA_ONLY, handoff_after_readers, run_handoff, nothing, 0},
    {"stream_wait", ONCE | CUDA_ONLY, one_tensor, run_stream_wait, nothing, 0},
    {"stream_is_capturing", ONCE | CUDA_ONLY, nothing, run_is_capturing, check_is_capturing, 0},
    {"event_record", ONCE, nothing, run_event_record, nothing, 0},
    {"event_query", ONCE, recorded_event, run_event_query, check_event_query, 0},
    {"pool_trim, wait 0", ONE_BLOCKS | FENCES, closed_tensors, run_pool_trim,
     check_pool_trim, 0},
    {"pool_trim, wait 1", ONE_BLOCKS | FENCES | BUSY, closed_tensors, run_pool_trim_wait,
     check_pool_trim_wait, 0},
    {"pool_close", ONE_BLOCKS | FENCES, other_pool, run_pool_close, nothing, 0},
    {"close", ONE_BLOCKS, one_tensor, run_close, nothing, 0},
};
/* clang-format on */
const size_t n_scenes = LENGTH_OF(scenes);
