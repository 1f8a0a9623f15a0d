/* world.c - the input's bytes, calls that are made to fail, what there is and its books. */
#include "fuzz.h"
#include "vmm_sim.h"

struct fuzz_world w;
void *streams[2];

/* ---- the input ------------------------------------------------------------------------- */

uint8_t next(void) {
    if (w.left == 0)
        return 0;
    w.left--;
    return *w.data++;
}

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

void arm(void) {
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

vmm_status settle(vmm_status status, unsigned expected, const char *call) {
    bool injected = false;

    if (w.f.is_gpu && sim.fail) {
        injected = sim.failed() > w.failed_before;
        sim.fail_none();
    }
    if (injected)
        expected |= INJECTED;
    w.any_failed |= injected;
    for (size_t i = 0; i < w.n_tensors && injected; i++)
        w.tensors[i]->unsure = true;
    if (!(expected & BIT(status)))
        FAIL("%s\n  returned %s%s; the last error: %s", call, vmm_status_name(status),
             injected ? " (a driver call failed)" : "", vmm_last_error()->message);
    if (status)
        CHECK(vmm_last_error()->status == status && vmm_last_error()->message[0]);
    return status;
}

void do_failure(void) {
    w.failure.armed = true;
    w.failure.call = next(), w.failure.nth = next();
    w.failure.code = next(), w.failure.times = next();
}

/* ---- what there is ------------------------------------------------------------------------ */

shadow *any_tensor(void) {
    return w.n_tensors ? w.tensors[next() % w.n_tensors] : NULL;
}

int any_pool(void) {
    int i = next() % MAX_POOLS;
    return w.pools[i].pool ? i : w.pools[!i].pool ? !i : -1;
}

vmm_stream any_stream(void) {
    vmm_stream all[] = {NULL,       VMM_STREAM_LEGACY, VMM_STREAM_PER_THREAD,
                        streams[0], streams[1],        VMM_STREAM_NONE};
    return PICK(all);
}

size_t pinned_rows(const shadow *s) {
    size_t most = 0;
    for (size_t i = 0; i < w.n_pins; i++)
        if (w.pins[i].of == s && w.pins[i].n_rows > most)
            most = w.pins[i].n_rows;
    return most;
}

shadow *add_tensor(vmm_tensor *tensor, const vmm_spec *spec, int pool) {
    shadow *s = malloc(sizeof *s);

    CHECK(s);
    shadow_init(s, tensor, spec, pool);
    w.tensors[w.n_tensors++] = s;
    return s;
}

void remove_tensor(shadow *s) {
    for (size_t i = 0; i < w.n_tensors; i++)
        if (w.tensors[i] == s)
            w.tensors[i] = w.tensors[--w.n_tensors];
    s->tensor = NULL;
    if (s->n_pins == 0)
        shadow_free(s);
}

void drop_keeper(shadow *s) {
    if (--s->n_pins == 0 && !s->tensor)
        shadow_free(s);
}

bool is_busy(const shadow *s) {
    for (size_t i = 0; i < w.n_busy; i++)
        if (w.busy[i] == s)
            return true;
    return false;
}

void begin(shadow *s) {
    w.busy[w.n_busy++] = s;
}

void end(vmm_status status) {
    for (size_t i = 0; i < w.n_busy; i++)
        if (!status)
            w.busy[i]->mapped = vmm_mapped(w.busy[i]->tensor);
    w.n_busy = 0;
}

/* ---- the books ------------------------------------------------------------------------------ */

static void check_pool(const pool_slot *slot) {
    size_t held = held_bytes(slot->pool), in_use = 0; /* first: look-ahead may take more */
    vmm_pool_stats stats;

    CHECK_OK(vmm_pool_statistics(slot->pool, &stats));
    CHECK_SIZE(stats.max_bytes, slot->max_bytes);
    CHECK_SIZE(vmm_pool_block_bytes(slot->pool), slot->block_bytes);
    CHECK(held <= stats.peak_bytes && stats.peak_bytes <= stats.max_bytes);
    CHECK_SIZE(vmm_pool_lookahead(slot->pool), slot->lookahead_bytes);
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
    if (!w.f.is_gpu && !slot->lookahead_bytes) /* whose thread may still have to look */
        CHECK(stats.queued_bytes == 0 && stats.free_bytes == 0 && stats.parked_bytes == 0);
}

void check_everything(void) {
    for (size_t i = 0; i < w.n_tensors; i++)
        shadow_check_books(w.tensors[i]);
    for (int i = 0; i < MAX_POOLS; i++)
        if (w.pools[i].pool)
            check_pool(&w.pools[i]);
}

/* ---- its begin and its end ------------------------------------------------------------------- */

void world_open(const char *device) {
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
        sim.live_objects(NULL, &w.events_before, &w.allocations_before, &w.host_allocations_before);
    CHECK_OK(vmm_pool_create(w.f.device, 0, 64 * w.f.granularity_bytes, &pool));
    w.pools[0] = (pool_slot){
        .pool = pool, .block_bytes = VMM_BLOCK_AUTO, .max_bytes = 64 * w.f.granularity_bytes};
}

/* What is left of all that was there; in text, "" for nothing. */
static bool is_left(char *text, size_t size) {
    long handles = 0, mappings = 0, reservations = 0, events = 0, allocations = 0, host = 0;

    if (!w.f.is_gpu || !sim.live)
        return false;
    sim.live(&handles, &mappings, &reservations, NULL);
    sim.live_objects(NULL, &events, &allocations, &host);
    events -= w.events_before, allocations -= w.allocations_before;
    host -= w.host_allocations_before;
    if (w.any_failed) /* what the driver would not destroy or free is lost */
        events = allocations = host = 0;
    snprintf(text, size,
             "%ld handles, %ld mappings, %ld reservations, %ld events, %ld allocations, %ld of "
             "host memory are left",
             handles, mappings, reservations, events, allocations, host);
    /* Fewer than before: of a pool that an earlier input gave up, and whose thread has ended. */
    return handles || mappings || reservations || events > 0 || allocations > 0 || host > 0;
}

/* Pools that were given up are swept by the calls of another, once their threads have ended. */
static void sweep_given_up(void) {
    struct timespec pause = {0, 1000000};
    char text[200];
    vmm_pool *pool;

    CHECK_OK(vmm_pool_create(w.f.device, 0, 0, &pool));
    for (int i = 0; i < 3; i++) {
        synchronize(&w.f);
        CHECK_OK(vmm_pool_trim(pool, 1));
    }
    for (int i = 0; i < 5000 && is_left(text, sizeof text); i++) {
        nanosleep(&pause, NULL);
        CHECK_OK(vmm_pool_trim(pool, 1));
    }
    CHECK_OK(vmm_pool_close(pool));
    if (is_left(text, sizeof text))
        FAIL("%s", text);
}

void world_close(void) {
    w.failure.armed = false;
    for (int i = 0; i < MAX_POOLS; i++)
        while (w.pools[i].n_captures) {
            CHECK_OK(vmm_pool_capture_end(w.pools[i].pool));
            w.pools[i].n_captures--;
        }
    while (w.n_graphs)
        destroy_graph(0);
    while (w.n_pins)
        do_unpin();
    while (w.n_tensors)
        close_tensor(w.tensors[0]);
    while (w.n_allocations)
        free_allocation(0);
    while (w.n_events)
        vmm_event_close(w.events[--w.n_events]);
    for (int i = 0; i < MAX_POOLS; i++)
        if (w.pools[i].pool) {
            w.f.pool = w.pools[i].pool;
            CHECK_OK(vmm_pool_set_lookahead(w.f.pool, 0));
            CHECK_OK(vmm_pool_trim(w.f.pool, 1));
            CHECK_SIZE(held_bytes(w.f.pool), 0);
            CHECK_OK(vmm_pool_close(w.f.pool));
        }
    sweep_given_up();
    vmm_device_close(w.f.device);
}
