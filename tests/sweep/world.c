/* world.c - what an operation finds before it, and what must be left after it. */
#include "sweep.h"

/* ---- the simulator -------------------------------------------------------------------- */

const simulator *the_simulator(void) {
    static simulator it;
    if (!it.fail) {
        void *library = cuda_library();
        *(void **)&it.failed_call = dlsym(library, "vmm_sim_failed_call");
        *(void **)&it.failed = dlsym(library, "vmm_sim_failed");
        *(void **)&it.fail_none = dlsym(library, "vmm_sim_fail_none");
        *(void **)&it.reset = dlsym(library, "vmm_sim_reset");
        *(void **)&it.calls = dlsym(library, "vmm_sim_calls");
        *(void **)&it.live = dlsym(library, "vmm_sim_live");
        *(void **)&it.live_objects = dlsym(library, "vmm_sim_live_objects");
        *(void **)&it.fail = dlsym(library, "vmm_sim_fail");
        CHECK(it.fail && it.failed_call);
    }
    return &it;
}

/* ---- rows --------------------------------------------------------------------------------- */

/* Lay dense rows out so that each dimension has a gap behind it. */
static uint8_t *spread(const uint8_t *dense, const int64_t *shape, int ndim, size_t itemsize,
                       int64_t *strides, size_t *bytes) {
    int64_t index[VMM_MAX_NDIM] = {0}, extent = (int64_t)itemsize;
    size_t n = 1;
    for (int d = ndim - 1; d >= 0; d--) {
        strides[d] = extent;
        extent = extent * shape[d] + 16;
        n *= (size_t)shape[d];
    }
    uint8_t *spread = calloc(1, (size_t)extent);
    CHECK(spread);
    for (size_t i = 0; i < n; i++) {
        size_t offset = 0;
        for (int d = 0; d < ndim; d++)
            offset += (size_t)(index[d] * strides[d]);
        memcpy(spread + offset, dense + i * itemsize, itemsize);
        for (int d = ndim - 1; d >= 0 && ++index[d] == shape[d]; d--)
            index[d] = 0;
    }
    *bytes = (size_t)extent;
    return spread;
}

rows *world_rows(world *w, const model *m, size_t n_rows, vmm_memory memory, rows_form form) {
    CHECK(w->n_sources < MAX_SOURCES);
    rows *r = &w->sources[w->n_sources++];
    size_t bytes = n_rows * vmm_row_bytes(m->tensor);
    int ndim = vmm_ndim(m->tensor);
    r->first_number = last_number + 1;
    r->n_rows = n_rows;
    last_number += (uint32_t)n_rows;
    rows_shape(m->tensor, n_rows, r->shape);
    uint8_t *data = make_rows(m->tensor, r->first_number, n_rows);
    r->array = (vmm_array){.memory = w->config->is_gpu ? memory : VMM_MEMORY_HOST,
                           .dtype = VMM_UINT8,
                           .ndim = ndim,
                           .shape = r->shape};
    if (form == STRIDED) {
        uint8_t *strided = spread(data, r->shape, ndim, 1, r->strides, &bytes);
        free(data);
        data = strided;
        r->array.strides = r->strides;
    }
    r->memory = data;
    if (r->array.memory == VMM_MEMORY_DEVICE) {
        r->memory = device_alloc(&w->f, bytes);
        write_device(&w->f, r->memory, data, bytes);
        free(data);
    }
    r->array.data = r->memory;
    return r;
}

void world_appended(model *m, const rows *source) {
    model_extend(m, source->first_number, source->n_rows);
}

/* ---- making ------------------------------------------------------------------------------- */

/* 512 bytes to a row. With the 4 KiB blocks of the simulator and the host, FIRST_ROWS take
 * three blocks of one lane, four of two or of four, and MORE_ROWS as many again. */
vmm_spec world_spec(const world *w) {
    static const int64_t shape[] = {2, 0, 2, 128}, shape_c[] = {2, 2, 0, 128};
    bool is_c = w->config->layout == VMM_LAYOUT_C;
    return (vmm_spec){.ndim = 4,
                      .shape = is_c ? shape_c : shape,
                      .axis = is_c ? 2 : 1,
                      .dtype = VMM_UINT8,
                      .capacity = 256,
                      .layout = w->config->layout};
}

model *world_tensor(world *w, const vmm_spec *spec, size_t n_rows) {
    CHECK(w->n_models < MAX_TENSORS);
    model *m = &w->models[w->n_models++];
    *m = model_open(&w->f, spec);
    if (n_rows)
        model_append(m, VMM_UINT8, n_rows, VMM_MEMORY_HOST, w->streams[0]);
    return m;
}

void world_wait(const world *w) {
    if (!w->is_capturing) /* then whoever began it has waited */
        synchronize(&w->f);
}

void world_provide(world *w, model *m, const vmm_spec *spec, size_t n_rows) {
    vmm_pool_stats stats;
    if (w->config->blocks == BLOCKS_RECYCLED) {
        model closed = model_open(&w->f, spec), next = model_open(&w->f, spec);
        model_grow(&closed, 2 * n_rows, false);
        CHECK_OK(vmm_truncate(closed.tensor, 0, VMM_STREAM_NONE));
        CHECK_OK(vmm_trim(closed.tensor));
        world_wait(w);
        /* This looks for memory, and takes back what is queued; where that means to wait for the
         * device, only when the driver has none. */
        if (is_hip)
            CHECK(the_simulator()->fail("cuMemCreate", 1, 2, 1) == 0);
        model_grow(&next, 1, false);
        model_close(&next);
        model_close(&closed);
        CHECK_OK(vmm_pool_statistics(w->f.pool, &stats));
        CHECK(stats.free_bytes > 0);
    }
    if (w->config->blocks == BLOCKS_STALE) {
        size_t length = m->length;
        model_grow(m, n_rows / 2, false);
        CHECK_OK(vmm_truncate(m->tensor, length, VMM_STREAM_NONE));
        m->length = length;
        CHECK_OK(vmm_trim(m->tensor));
        CHECK_OK(vmm_pool_statistics(w->f.pool, &stats));
        CHECK(stats.queued_bytes > 0);
    }
}

void world_open(world *w, const config *config, const scene *scene) {
    static snapshot at_start;
    static vmm_stream streams[2]; /* each has a thread of the simulator's, so they are kept */
    size_t budget = 0;
    memset(w, 0, sizeof *w);
    last_number = 0;
    w->config = config;
    w->f = (fixture){.name = config->device, .is_gpu = config->is_gpu};
    w->f.granularity_bytes = 4096;
    w->at_start = &at_start;
    w->at_start->live_blocks = faults_live_blocks();
    w->at_start->reserved_bytes = faults_reserved_bytes();
    if (config->is_gpu)
        the_simulator()->live_objects(NULL, &w->at_start->events, NULL, NULL);
    CHECK_OK(vmm_device_open(config->device, &w->f.device));
    if (scene->max_blocks)
        budget = scene->max_blocks * w->f.granularity_bytes;
    CHECK_OK(vmm_pool_create(w->f.device, config->is_fixed ? w->f.granularity_bytes : 0, budget,
                             &w->f.pool));
    for (int i = 0; config->is_gpu && i < 2; i++) {
        if (!streams[i])
            CHECK_CUDA(cuda()->stream_create(&streams[i], CUDA_STREAM_NON_BLOCKING));
        w->streams[i] = streams[i];
    }
    scene->prepare(w);
    world_wait(w);
    if (config->is_gpu) {
        the_simulator()->live(NULL, NULL, NULL, &w->other_bytes);
        the_simulator()->live_objects(NULL, NULL, &w->allocations, NULL);
        w->other_bytes -= held_bytes(w->f.pool) + (w->other_pool ? held_bytes(w->other_pool) : 0);
    }
}

/* ---- comparing ---------------------------------------------------------------------------- */

void snapshot_take(snapshot *s, const world *w) {
    memset(s, 0, sizeof *s);
    CHECK_OK(vmm_pool_statistics(w->f.pool, &s->pool));
    s->held_bytes = held_bytes(w->f.pool);
    for (size_t i = 0; i < w->n_models; i++) {
        vmm_tensor_stats stats;
        if (!w->models[i].tensor)
            continue;
        CHECK_OK(vmm_stats(w->models[i].tensor, &stats));
        s->length[i] = vmm_length(w->models[i].tensor);
        s->mapped[i] = vmm_mapped(w->models[i].tensor);
        s->blocks[i] = stats.block_count;
    }
    s->reserved_bytes = faults_reserved_bytes();
    if (w->config->is_gpu)
        the_simulator()->live(&s->handles, &s->mappings, &s->reservations, NULL);
}

void snapshot_compare(const snapshot *before, const snapshot *after, const scene *scene,
                      bool exact) {
    bool has_closed = scene->flags & CLOSES && !after->blocks[1];
    for (int i = 0; i < (has_closed ? 1 : MAX_TENSORS); i++) {
        CHECK_SIZE(after->length[i], before->length[i]);
        CHECK_SIZE(after->mapped[i], before->mapped[i]);
        CHECK_SIZE(after->blocks[i], before->blocks[i]);
    }
    if (!has_closed)
        CHECK_SIZE(after->pool.in_use_bytes, before->pool.in_use_bytes);
    if (exact) {
        CHECK_SIZE(after->pool.free_bytes, before->pool.free_bytes);
        CHECK_SIZE(after->pool.queued_bytes, before->pool.queued_bytes);
        CHECK_SIZE(after->pool.parked_bytes, before->pool.parked_bytes);
        CHECK(after->handles == before->handles && after->mappings == before->mappings);
        CHECK(after->reservations == before->reservations);
        CHECK_SIZE(after->reserved_bytes, before->reserved_bytes);
    } else if (!(scene->flags & (SUBMITS | SEVERAL))) {
        if (after->held_bytes > before->held_bytes + after->pool.parked_bytes)
            FAIL("%zu bytes held, %zu of them parked, and %zu before", after->held_bytes,
                 after->pool.parked_bytes, before->held_bytes);
    }
}

/* Rows [0, mapped) of a tensor can be read and written, and those in use hold what they must.
 * The simulated device's memory lies in the process: to look at it directly takes a tenth of the
 * time of asking the driver for it, and where there is no access this is a signal. */
static void check_rows(const model *m) {
    static const fixture direct;
    model seen = *m;
    size_t mapped = vmm_mapped(m->tensor);
    uint8_t *rows = read_rows(&direct, m->tensor, 0, mapped);
    copy_rows(&direct, m->tensor, 0, mapped, rows, true);
    free(rows);
    seen.fixture = &direct;
    model_check(&seen);
}

void world_check(world *w) {
    size_t held = held_bytes(w->f.pool) + (w->other_pool ? held_bytes(w->other_pool) : 0);
    if (w->config->is_gpu && !w->has_abandoned_pool) {
        unsigned long long bytes;
        long allocations;
        the_simulator()->live(NULL, NULL, NULL, &bytes);
        /* Cursors lie in slabs, which no budget counts. */
        the_simulator()->live_objects(NULL, NULL, &allocations, NULL);
        bytes -= (unsigned long long)(allocations - w->allocations) * 64 * KIB;
        CHECK_SIZE(held, (size_t)(bytes - w->other_bytes));
    }
    if (!w->config->is_gpu) {
        vmm_pool_stats stats; /* what is parked may have lost its access */
        CHECK_OK(vmm_pool_statistics(w->f.pool, &stats));
        CHECK(faults_open_bytes() + stats.parked_bytes >= held);
    }
    world_wait(w);
    for (size_t i = 0; i < w->n_models; i++)
        if (w->models[i].tensor)
            check_rows(&w->models[i]);
}

/* ---- closing ------------------------------------------------------------------------------ */

static void close_pool(vmm_pool *pool) {
    vmm_pool_stats stats;
    CHECK_OK(vmm_pool_trim(pool, 1));
    CHECK_OK(vmm_pool_statistics(pool, &stats));
    CHECK_SIZE(stats.in_use_bytes, 0);
    CHECK_SIZE(held_bytes(pool), 0);
    CHECK_OK(vmm_pool_close(pool));
}

void world_close(world *w) {
    vmm_unpin(w->pin);
    vmm_event_close(w->event);
    if (w->exec) {
        CHECK_CUDA(cuda()->graph_exec_destroy(w->exec));
        wait_for_unpinned(w->models[0].tensor);
    }
    if (w->made)
        CHECK_OK(vmm_close(w->made));
    CHECK_OK(vmm_pool_free(w->f.pool, w->memory));
    for (size_t i = 0; i < w->n_models; i++)
        if (w->models[i].tensor)
            model_close(&w->models[i]);
        else
            free(w->models[i].numbers);
    if (!w->config->is_gpu) {
        /* Addresses that the kernel has refused to take back go with the next reservation. */
        vmm_spec spec = world_spec(w);
        vmm_tensor *next;
        CHECK_OK(vmm_reserve(w->f.pool, &spec, &next));
        CHECK_OK(vmm_close(next));
    }
    close_pool(w->f.pool);
    if (w->other_pool)
        close_pool(w->other_pool);
    vmm_device_close(w->other_device);
    for (size_t i = 0; i < w->n_sources; i++)
        if (w->sources[i].array.memory == VMM_MEMORY_DEVICE)
            device_free(&w->f, w->sources[i].memory);
        else
            free(w->sources[i].memory);
    vmm_device_close(w->f.device);
    if (w->config->is_gpu) {
        long handles, mappings, reservations, events;
        unsigned long long bytes;
        the_simulator()->live(&handles, &mappings, &reservations, &bytes);
        the_simulator()->live_objects(NULL, &events, NULL, NULL);
        if (handles || mappings || reservations || bytes ||
            events > w->at_start->events + w->lost_events)
            FAIL("left: %ld handles, %ld mappings, %ld reservations, %llu bytes, %ld events",
                 handles, mappings, reservations, bytes, events);
    }
    CHECK_SIZE(faults_reserved_bytes(), w->at_start->reserved_bytes);
    CHECK_SIZE(faults_open_bytes(), 0);
    if (faults_live_blocks() != w->at_start->live_blocks)
        FAIL("%ld allocations of libvmm are left", faults_live_blocks() - w->at_start->live_blocks);
}
