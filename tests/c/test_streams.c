/* Streams of a GPU: no event on an append, one at a hand-off; writes on several streams in
 * order; sources and readers that are late; memory reclaimed under running work; captures
 * (invariants 6 and 9). On the host streams are ignored. */
#include "check.h"

#include <time.h>

#define ROW_BYTES 4096

static const int64_t shape[] = {0, ROW_BYTES}; /* uint8 */
static const int64_t one_row[] = {1, ROW_BYTES};

typedef struct calls {
    uint64_t launch, record, wait, all;
} calls;

static calls count_calls(const vmm_tensor *tensor) {
    vmm_tensor_stats stats;

    CHECK_OK(vmm_stats(tensor, &stats));
    return (calls){stats.driver_calls[VMM_CALL_launch], stats.driver_calls[VMM_CALL_event_record],
                   stats.driver_calls[VMM_CALL_event_wait], total_calls(tensor)};
}

static void check_calls(int line, const vmm_tensor *tensor, const calls *before, uint64_t launch,
                        uint64_t record, uint64_t wait) {
    calls now = count_calls(tensor);

    if (now.launch - before->launch != launch || now.record - before->record != record ||
        now.wait - before->wait != wait)
        FAIL("line %d: %d launches, %d events, %d waits: not %d, %d, %d", line,
             (int)(now.launch - before->launch), (int)(now.record - before->record),
             (int)(now.wait - before->wait), (int)launch, (int)record, (int)wait);
}
#define CHECK_CALLS(...) check_calls(__LINE__, __VA_ARGS__)

static void *new_stream(void) {
    void *stream;

    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    return stream;
}

static void sleep_ms(void *user) {
    struct timespec time = {0, (long)(intptr_t)user * 1000000};

    nanosleep(&time, NULL);
}

/* What is submitted to `stream` after this comes late. */
static void delay(void *stream) {
    CHECK_CUDA(cuda()->host_function(stream, sleep_ms, (void *)(intptr_t)20));
}

typedef struct rows {
    uint8_t *host; /* pinned: n rows with numbers from `first` on */
    uint8_t *device;
    uint32_t first;
    size_t n;
} rows;

static rows new_rows(const fixture *f, const vmm_tensor *tensor, size_t n) {
    rows r = {.first = last_number + 1, .n = n};
    uint8_t *data = make_rows(tensor, r.first, n);

    last_number += (uint32_t)n;
    CHECK_CUDA(cuda()->host_alloc((void **)&r.host, n * ROW_BYTES, 0));
    memcpy(r.host, data, n * ROW_BYTES);
    r.device = device_alloc(f, n * ROW_BYTES);
    write_device(f, r.device, data, n * ROW_BYTES);
    free(data);
    return r;
}

static void free_rows(const fixture *f, rows *r) {
    CHECK_CUDA(cuda()->synchronize());
    CHECK_CUDA(cuda()->host_free(r->host));
    device_free(f, r->device);
}

static vmm_array device_row(const rows *r, size_t i) {
    return (vmm_array){.data = r->device + i * ROW_BYTES,
                       .memory = VMM_MEMORY_DEVICE,
                       .dtype = VMM_UINT8,
                       .ndim = 2,
                       .shape = one_row};
}

static void submit_row(model *m, const rows *r, size_t i, void *stream) {
    vmm_array row = device_row(r, i);

    CHECK_OK(vmm_append(m->tensor, &row, stream));
}

static void append_row(model *m, const rows *r, size_t i, void *stream) {
    submit_row(m, r, i, stream);
    model_extend(m, r->first + (uint32_t)i, 1);
}

static vmm_spec make_spec(size_t capacity) {
    return (vmm_spec){.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = capacity};
}

static void test_events(const fixture *f) {
    vmm_spec spec = make_spec(400);
    model m = model_open(f, &spec);
    void *s1 = new_stream(), *s2 = new_stream(), *s3 = new_stream();
    rows r = new_rows(f, m.tensor, 100);
    size_t i = 0;
    calls before;

    CHECK_OK(vmm_map(m.tensor, 400));
    append_row(&m, &r, i++, s1); /* its stream is looked at once */
    before = count_calls(m.tensor);
    while (i < 30)
        append_row(&m, &r, i++, s1);
    CHECK(count_calls(m.tensor).all - before.all == 29); /* launches, and nothing else */
    CHECK_OK(vmm_handoff(m.tensor, s1));
    CHECK_OK(vmm_handoff(m.tensor, VMM_STREAM_NONE));
    CHECK_CALLS(m.tensor, &before, 29, 0, 0);

    CHECK_OK(vmm_handoff(m.tensor, s2));
    CHECK_CALLS(m.tensor, &before, 29, 1, 1);
    CHECK_OK(vmm_handoff(m.tensor, s3)); /* the event still stands */
    CHECK_CALLS(m.tensor, &before, 29, 1, 2);

    before = count_calls(m.tensor);
    append_row(&m, &r, i++, s2); /* another stream: it waits for the last one */
    append_row(&m, &r, i++, s2);
    calls now = count_calls(m.tensor);
    CHECK(now.launch - before.launch == 2 && now.record - before.record <= 1);
    CHECK(now.wait - before.wait == 1);

    before = count_calls(m.tensor); /* truncation names a stream that still reads */
    CHECK_OK(vmm_truncate(m.tensor, 20, s3));
    m.length = 20;
    append_row(&m, &r, i++, s2);
    CHECK_CALLS(m.tensor, &before, 1, 1, 1);
    append_row(&m, &r, i++, s2);
    CHECK_CALLS(m.tensor, &before, 2, 1, 1);

    before = count_calls(m.tensor); /* its own stream needs no wait */
    CHECK_OK(vmm_truncate(m.tensor, 15, s2));
    m.length = 15;
    append_row(&m, &r, i++, s2);
    CHECK_CALLS(m.tensor, &before, 1, 0, 0);

    before = count_calls(m.tensor); /* so does a reader, of rows that all stay */
    CHECK_OK(vmm_add_reader(m.tensor, s3));
    CHECK_OK(vmm_add_reader(m.tensor, VMM_STREAM_NONE));
    append_row(&m, &r, i++, s2);
    CHECK_CALLS(m.tensor, &before, 1, 1, 1);
    CHECK_OK(vmm_handoff(m.tensor, s1));
    CHECK_OK(vmm_add_reader(m.tensor, s2)); /* behind the event that s1 waits for */
    append_row(&m, &r, i++, s1);
    CHECK_CALLS(m.tensor, &before, 2, 3, 3);
    CHECK_STATUS(vmm_add_reader(NULL, s1), VMM_ERR_INVALID);

    model_check(&m);
    CHECK_STATUS(vmm_append(m.tensor, &(vmm_array){0}, s1), VMM_ERR_DTYPE);
    vmm_array row = device_row(&r, 0);
    CHECK_STATUS(vmm_append(m.tensor, &row, VMM_STREAM_NONE), VMM_ERR_INVALID);
    CHECK_OK(vmm_append(m.tensor, &row, VMM_STREAM_LEGACY));
    CHECK_OK(vmm_append(m.tensor, &row, VMM_STREAM_PER_THREAD));
    free_rows(f, &r);
    model_close(&m);
    CHECK_OK(vmm_pool_trim(f->pool, 1));
    CHECK_CUDA(cuda()->stream_destroy(s1));
    CHECK_CUDA(cuda()->stream_destroy(s2));
    CHECK_CUDA(cuda()->stream_destroy(s3));
}

/* A source that is written late, appends that go back and forth between two streams, and a
 * reader on a third. */
static void test_order(const fixture *f) {
    vmm_spec spec = make_spec(4000);
    model m = model_open(f, &spec);
    void *producer = new_stream(), *s[2] = {new_stream(), new_stream()}, *reader = new_stream();
    rows late = new_rows(f, m.tensor, 20);
    uint8_t *copy;

    CHECK_CUDA(cuda()->host_alloc((void **)&copy, 20 * ROW_BYTES, 0));
    for (int round = 0; round < 3; round++) {
        CHECK_CUDA(cuda()->stream_synchronize(NULL));
        delay(producer);
        CHECK_CUDA(
            cuda()->to_device_async((uintptr_t)late.device, late.host, 20 * ROW_BYTES, producer));
        CHECK_OK(vmm_stream_wait(f->device, s[0], producer));
        size_t begin = m.length;
        for (size_t i = 0; i < 20; i++) {
            if (i % 7 == 3)
                delay(s[i / 7 % 2]);
            if (i == 1)
                CHECK_OK(vmm_stream_wait(f->device, s[1], producer));
            append_row(&m, &late, i, s[i / 3 % 2]);
        }
        CHECK_OK(vmm_handoff(m.tensor, reader));
        CHECK_CUDA(cuda()->to_host_async(copy, (uintptr_t)m.base + begin * ROW_BYTES,
                                         20 * ROW_BYTES, reader));
        CHECK_CUDA(cuda()->stream_synchronize(reader));
        CHECK(memcmp(copy, late.host, 20 * ROW_BYTES) == 0);
        /* The reader is late; the next round's appends to these rows wait for it. */
        delay(reader);
        CHECK_CUDA(cuda()->to_host_async(copy, (uintptr_t)m.base + begin * ROW_BYTES,
                                         20 * ROW_BYTES, reader));
        CHECK_OK(vmm_truncate(m.tensor, begin, reader));
        m.length = begin;
        for (size_t i = 0; i < 20; i++)
            append_row(&m, &late, 19 - i, s[round % 2]);
        CHECK_CUDA(cuda()->stream_synchronize(reader));
        CHECK(memcmp(copy, late.host, 20 * ROW_BYTES) == 0);
        model_check(&m);
    }
    free_rows(f, &late);
    CHECK_CUDA(cuda()->host_free(copy));
    model_close(&m);
    CHECK_OK(vmm_pool_trim(f->pool, 1));
    CHECK_CUDA(cuda()->stream_destroy(producer));
    CHECK_CUDA(cuda()->stream_destroy(s[0]));
    CHECK_CUDA(cuda()->stream_destroy(s[1]));
    CHECK_CUDA(cuda()->stream_destroy(reader));
}

/* Tensors are closed while work on them is under way, and their memory is wanted at once. */
static void test_reclaim(const fixture *f) {
    size_t granule = f->granularity_bytes, n = 2 * granule / ROW_BYTES;
    fixture tight = *f;
    vmm_spec spec = make_spec(8 * granule / ROW_BYTES);
    void *s[2] = {new_stream(), new_stream()};
    uint8_t *kept;

    CHECK_CUDA(cuda()->host_alloc((void **)&kept, n * ROW_BYTES, 0));
    CHECK_OK(vmm_pool_create(f->device, granule, 3 * granule, &tight.pool));
    for (int round = 0; round < 6; round++) {
        void *stream = s[round % 2];
        model m = model_open(&tight, &spec);
        rows r = new_rows(f, m.tensor, n);
        int64_t many[] = {(int64_t)n, ROW_BYTES};
        vmm_array source = device_row(&r, 0);

        source.shape = many;
        delay(stream);
        CHECK_OK(vmm_append(m.tensor, &source, stream));
        /* A reader on the same stream, which nobody told the library about. */
        CHECK_CUDA(cuda()->to_host_async(kept, (uintptr_t)m.base, n * ROW_BYTES, stream));
        model_close(&m);
        CHECK(held_bytes(tight.pool) <= 3 * granule);
        model next = model_open(&tight, &spec); /* needs what the other gave back */
        model_append(&next, VMM_UINT8, n, VMM_MEMORY_HOST, NULL);
        CHECK_CUDA(cuda()->stream_synchronize(stream));
        CHECK(memcmp(kept, r.host, n * ROW_BYTES) == 0);
        model_check(&next);
        model_close(&next);
        free_rows(f, &r);
    }
    CHECK_OK(vmm_pool_close(tight.pool));
    CHECK_CUDA(cuda()->host_free(kept));
    CHECK_CUDA(cuda()->stream_destroy(s[0]));
    CHECK_CUDA(cuda()->stream_destroy(s[1]));
}

static void test_done_events(const fixture *f) {
    void *stream = new_stream();
    vmm_event *event;
    int done = 1;

    delay(stream);
    CHECK_OK(vmm_event_record(f->device, stream, &event));
    CHECK_OK(vmm_event_query(event, &done));
    CHECK(!done);
    CHECK_CUDA(cuda()->stream_synchronize(stream));
    CHECK_OK(vmm_event_query(event, &done));
    CHECK(done);
    vmm_event_close(event);
    CHECK_CUDA(cuda()->stream_destroy(stream));
}

/* Appends inside a capture: within mapped rows and beyond, tensors dropped meanwhile. */
static void test_capture(const fixture *f, int mode) {
    fixture own = *f;
    vmm_spec spec = make_spec(6 * f->granularity_bytes / ROW_BYTES);
    void *stream = new_stream(), *outside = new_stream();
    vmm_event *event;
    int64_t row_shape[] = {1, ROW_BYTES};
    uint8_t host_row[ROW_BYTES] = {0};
    vmm_array host_source = {.data = host_row, .dtype = VMM_UINT8, .ndim = 2, .shape = row_shape};

    CHECK_OK(vmm_pool_create(f->device, 0, 0, &own.pool));
    model m = model_open(&own, &spec), dropped = model_open(&own, &spec);
    rows r = new_rows(f, m.tensor, 50);
    append_row(&m, &r, 0, stream);
    append_row(&dropped, &r, 0, stream);
    CHECK_OK(vmm_map(m.tensor, 20));

    CHECK_OK(vmm_pool_capture_begin(own.pool));
    CHECK_CUDA(cuda()->begin_capture(stream, mode));
    for (size_t i = 1; i < 10; i++)
        submit_row(&m, &r, i, stream);
    CHECK_OK(vmm_map(m.tensor, m.length + 2 * f->granularity_bytes / ROW_BYTES));
    submit_row(&m, &r, 10, stream);
    CHECK_STATUS(vmm_append(m.tensor, &host_source, stream), VMM_ERR_CAPTURING);
    CHECK_STATUS(vmm_handoff(m.tensor, outside), VMM_ERR_CAPTURING);
    CHECK_STATUS(vmm_stream_wait(f->device, outside, stream), VMM_ERR_CAPTURING);
    CHECK_STATUS(vmm_event_record(f->device, stream, &event), VMM_ERR_CAPTURING);
    CHECK(!event && strstr(vmm_last_error()->message, "capture"));
    CHECK_OK(vmm_handoff(m.tensor, stream));
    free(dropped.numbers);
    CHECK_OK(vmm_close(dropped.tensor));
    void *exec = end_capture(stream); /* nothing has invalidated it */
    CHECK_OK(vmm_pool_capture_end(own.pool));

    for (int replay = 0; replay < 3; replay++) {
        CHECK_CUDA(cuda()->graph_launch(exec, stream));
        CHECK_OK(vmm_advance(m.tensor, 10));
        model_extend(&m, r.first + 1, 10);
    }
    append_row(&m, &r, 11, stream);
    CHECK_CUDA(cuda()->stream_synchronize(stream));
    model_check(&m);
    CHECK_CUDA(cuda()->graph_exec_destroy(exec));
    free_rows(f, &r);
    wait_for_unpinned(m.tensor);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
    CHECK_CUDA(cuda()->stream_destroy(stream));
    CHECK_CUDA(cuda()->stream_destroy(outside));
}

/* The append's own stream is asked whether it is captured: queued memory then stays queued,
 * also for a program that does not say that it captures. */
static void test_capture_without_brackets(const fixture *f) {
    fixture own = *f;
    vmm_spec spec = make_spec(6 * f->granularity_bytes / ROW_BYTES);
    void *stream = new_stream();
    vmm_pool_stats stats;

    CHECK_OK(vmm_pool_create(f->device, f->granularity_bytes, 0, &own.pool));
    model m = model_open(&own, &spec), closed = model_open(&own, &spec);
    rows r = new_rows(f, m.tensor, 10);
    append_row(&closed, &r, 0, stream);
    append_row(&m, &r, 0, stream);
    CHECK_CUDA(cuda()->stream_synchronize(stream));
    CHECK_OK(vmm_truncate(closed.tensor, 0, VMM_STREAM_NONE));
    CHECK_OK(vmm_trim(closed.tensor)); /* for others to grow with, behind a fence */
    model_grow(&m, vmm_mapped(m.tensor) - m.length, false);
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    submit_row(&m, &r, 1, stream);
    drop_capture(stream);
    CHECK_OK(vmm_pool_statistics(own.pool, &stats));
    CHECK_SIZE(stats.driver_calls[VMM_CALL_fence], 0);
    CHECK_SIZE(stats.queued_bytes, f->granularity_bytes);
    free_rows(f, &r);
    model_close(&closed);
    model_close(&m);
    CHECK_OK(vmm_pool_close(own.pool));
    CHECK_CUDA(cuda()->stream_destroy(stream));
}

static void test_host(const fixture *f) {
    vmm_spec spec = make_spec(100);
    model m = model_open(f, &spec);
    void *any = (void *)0x1234;
    vmm_event *event;
    int done = 0;

    model_append(&m, VMM_UINT8, 10, VMM_MEMORY_HOST, any);
    model_append(&m, VMM_UINT8, 10, VMM_MEMORY_HOST, VMM_STREAM_PER_THREAD);
    CHECK_OK(vmm_handoff(m.tensor, any));
    CHECK_OK(vmm_stream_wait(f->device, any, NULL));
    CHECK_OK(vmm_truncate(m.tensor, 5, any));
    m.length = 5;
    CHECK_OK(vmm_event_record(f->device, any, &event));
    CHECK_OK(vmm_event_query(event, &done));
    CHECK(done);
    vmm_event_close(event);
    model_check(&m);
    model_close(&m);
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    if (f.is_gpu) {
        cuda();
        test_events(&f);
        test_order(&f);
        test_reclaim(&f);
        test_done_events(&f);
        test_capture(&f, CUDA_CAPTURE_GLOBAL);
        test_capture(&f, CUDA_CAPTURE_THREAD_LOCAL);
        test_capture_without_brackets(&f);
    } else {
        test_host(&f);
    }
    fixture_close(&f);
    return 0;
}
