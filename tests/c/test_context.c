/* What libvmm does around every call of a GPU's driver fails: making the device current, leaving
 * the thread's capture mode. (The sweeps leave these calls alone, since undoing relies on them.)
 * Whichever it is, the operation says so, has changed nothing, and can be made again. On the
 * simulated driver only. */
#include "check.h"

#include "../sim/vmm_sim.h"

#define REFUSED 201 /* CUDA's and HIP's code for a context that is not valid */

static const int64_t shape[] = {0, 4096}; /* uint8 */

static fixture f;
static void *stream;
static __typeof__(vmm_sim_fail) *sim_fail;
static __typeof__(vmm_sim_fail_none) *sim_fail_none;
static __typeof__(vmm_sim_failed) *sim_failed;

/* ---- the operations -------------------------------------------------------------------- */

/* What one attempt has. */
typedef struct world {
    model m;
    vmm_array source;
    int64_t source_shape[2];
    uint8_t *host;
    void *device;
    vmm_tensor *made;
    vmm_event *event;
    void *memory;
    void *exec; /* of a graph that appends to it */
} world;

#define N_ROWS 3

static vmm_status do_reserve(world *w) {
    vmm_spec spec = *vmm_spec_of(w->m.tensor);
    spec.capacity++; /* that no tensor has had */
    return vmm_reserve(f.pool, &spec, &w->made);
}

static vmm_status do_map(world *w) {
    return vmm_map(w->m.tensor, vmm_capacity(w->m.tensor));
}

static vmm_status do_append_host(world *w) {
    w->source.data = w->host;
    w->source.memory = VMM_MEMORY_HOST;
    return vmm_append(w->m.tensor, &w->source, stream);
}

static vmm_status do_append_device(world *w) {
    w->source.data = w->device;
    w->source.memory = VMM_MEMORY_DEVICE;
    return vmm_append(w->m.tensor, &w->source, stream);
}

static vmm_status do_cursor(world *w) {
    int32_t *address;
    return vmm_cursor(w->m.tensor, stream, &address);
}

static vmm_status do_fork(world *w) {
    return vmm_fork(w->m.tensor, vmm_length(w->m.tensor), &w->made);
}

static vmm_status do_handoff(world *w) {
    return vmm_handoff(w->m.tensor, VMM_STREAM_PER_THREAD);
}

static vmm_status do_event(world *w) {
    return vmm_event_record(f.device, stream, &w->event);
}

static vmm_status do_is_capturing(world *w) {
    int capturing;
    (void)w;
    return vmm_stream_is_capturing(f.device, stream, &capturing);
}

static vmm_status do_alloc(world *w) {
    return vmm_pool_alloc(f.pool, 1, stream, &w->memory);
}

static vmm_status do_trim(world *w) {
    return vmm_trim(w->m.tensor);
}

static const struct operation {
    const char *name;
    vmm_status (*run)(world *w);
    bool appends, has_graph;
} operations[] = {
    {"reserve", do_reserve, false, false},
    {"map", do_map, false, false},
    {"append, host memory", do_append_host, true, false},
    {"append, device memory", do_append_device, true, false},
    {"cursor", do_cursor, false, false},
    {"fork", do_fork, false, false},
    {"handoff", do_handoff, false, false},
    {"event_record", do_event, false, false},
    {"stream_is_capturing", do_is_capturing, false, false},
    {"pool_alloc", do_alloc, false, false},
    {"trim, behind a graph", do_trim, false, true},
};

/* ---- an attempt -------------------------------------------------------------------------- */

static void capture(world *w) {
    w->source.shape = w->source_shape;
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(do_append_device(w));
    w->exec = end_capture(stream);
}

static world world_open(bool has_graph) {
    vmm_spec spec = {.ndim = 2,
                     .shape = shape,
                     .dtype = VMM_UINT8,
                     .capacity = 8 * f.granularity_bytes / 4096,
                     .block_bytes = f.granularity_bytes};
    world w = {.m = model_open(&f, &spec), .source_shape = {N_ROWS, 4096}};

    model_append(&w.m, VMM_UINT8, f.granularity_bytes / 4096 - 1, VMM_MEMORY_HOST, stream);
    w.host = make_rows(w.m.tensor, last_number + 1, N_ROWS);
    w.device = device_alloc(&f, N_ROWS * 4096);
    write_device(&f, w.device, w.host, N_ROWS * 4096);
    w.source = (vmm_array){.dtype = VMM_UINT8, .ndim = 2};
    if (has_graph)
        capture(&w);
    synchronize(&f);
    return w;
}

static void world_close(world *w) {
    model_check(&w->m);
    if (w->made)
        CHECK_OK(vmm_close(w->made));
    vmm_event_close(w->event);
    CHECK_OK(vmm_pool_free(f.pool, w->memory));
    if (w->exec) {
        CHECK_CUDA(cuda()->graph_exec_destroy(w->exec));
        wait_for_unpinned(w->m.tensor);
    }
    model_close(&w->m);
    CHECK_OK(vmm_pool_trim(f.pool, 1)); /* so that each attempt makes the same calls */
    CHECK_SIZE(held_bytes(f.pool), 0);
    device_free(&f, w->device);
    free(w->host);
}

/* The operation, with no device current where the driver has that. */
static vmm_status run(const struct operation *o, world *w) {
    w->source.shape = w->source_shape;
    if (!is_hip)
        CHECK_CUDA(cuda()->set_current(NULL));
    return o->run(w);
}

/* Back to what a thread begins with, which is what the failing calls were about. */
static void restore(void) {
    int mode = CUDA_CAPTURE_GLOBAL;
    void *context;
    int device;

    CHECK_CUDA(cuda()->exchange_capture_mode(&mode));
    if (is_hip)
        return;
    CHECK_CUDA(cuda()->device_get(&device, 0));
    CHECK_CUDA(cuda()->retain(&context, device));
    CHECK_CUDA(cuda()->set_current(context));
}

/* Returns false when the operation makes no `nth` such call. */
static bool attempt(const struct operation *o, const char *call, long nth) {
    world w = world_open(o->has_graph);
    size_t length = w.m.length, mapped = vmm_mapped(w.m.tensor);
    long before = sim_failed();

    CHECK(sim_fail(call, nth, REFUSED, 1) == 0);
    vmm_status status = run(o, &w);
    sim_fail_none();
    bool was_called = sim_failed() > before;
    if (status) {
        if (status != VMM_ERR_DRIVER || vmm_last_error()->driver_code != REFUSED || !was_called)
            FAIL("%s, call %ld of %s: %s", o->name, nth, call, vmm_last_error()->message);
        CHECK_SIZE(vmm_length(w.m.tensor), length);
        CHECK_SIZE(vmm_mapped(w.m.tensor), mapped);
        CHECK(!w.made && !w.event && !w.memory);
        CHECK_OK(run(o, &w));
    }
    restore();
    if (o->appends) {
        model_extend(&w.m, last_number + 1, N_ROWS);
        last_number += N_ROWS;
    }
    world_close(&w);
    return was_called;
}

/* The stream that control blocks are written on is made at the first of these writes. */
static void test_first_write(void) {
    world w = world_open(false);

    CHECK(sim_fail("cuStreamCreate", 1, REFUSED, 1) == 0);
    CHECK_STATUS(do_cursor(&w), VMM_ERR_DRIVER);
    CHECK(!vmm_has_cursor(w.m.tensor));
    sim_fail_none();
    CHECK_OK(do_cursor(&w));
    world_close(&w);
}

/* What is no stream, by the code that CUDA has for it; the simulator ends at one. HIP's call for
 * it has no code. */
static void test_no_stream(void) {
    vmm_event *event;

    CHECK(sim_fail("cuStreamGetCtx", 1, 400, 1) == 0);
    CHECK_STATUS(vmm_event_record(f.device, stream, &event), VMM_ERR_INVALID);
    CHECK(!event && strstr(vmm_last_error()->message, "this is no stream"));
    sim_fail_none();
}

int main(int argc, char **argv) {
    static const char *const calls[] = {"cuCtxGetCurrent", "cuThreadExchangeStreamCaptureMode",
                                        "cuCtxPushCurrent"};

    f = fixture_open(argc, argv, 0, 0);
    if (!f.is_gpu)
        SKIP("the host has no contexts");
    cuda();
    *(void **)&sim_fail = dlsym(cuda_library(), "vmm_sim_fail");
    *(void **)&sim_fail_none = dlsym(cuda_library(), "vmm_sim_fail_none");
    *(void **)&sim_failed = dlsym(cuda_library(), "vmm_sim_failed");
    if (!sim_fail)
        SKIP("the driver is not the simulated one");
    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    test_first_write();
    if (!is_hip)
        test_no_stream();
    for (size_t o = 0; o < LENGTH_OF(operations); o++)
        for (size_t c = 0; c < LENGTH_OF(calls) - is_hip; c++) {
            long nth = 1;
            while (attempt(&operations[o], calls[c], nth))
                nth++;
            CHECK(nth > 1 || c == 1); /* not every call leaves the capture mode */
        }
    CHECK_CUDA(cuda()->stream_destroy(stream));
    fixture_close(&f);
    return 0;
}
