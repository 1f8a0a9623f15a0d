/* graphs.c - cursors, and graphs that append.
 *
 * The device counts a tensor's rows by itself. What it counts is `ahead` of the host: of replays
 * that have not been followed, or behind it, where advance() was told too much. Then the host may
 * not write, and is told so. After a driver call that was made to fail the device may not have
 * been told what is mapped, and it may be that the next call will set the cursor: `unsure`.
 *
 * Replays are launched one at a time, and waited for: what orders them is not the library's.
 */
#include "fuzz.h"

/* ---- what the device counts ---------------------------------------------------------------- */

unsigned expected_with_graphs(const shadow *s, unsigned expected) {
    bool asks = s->is_captured && (s->n_graphs || s->ahead > 0);
    unsigned refused = 0;

    if (!s->is_captured && !s->may_be_captured)
        return expected;
    if (is_capturing())
        refused = BIT(VMM_ERR_CAPTURING); /* to look takes a fence */
    else if (s->ahead)
        refused = BIT(VMM_ERR_BUSY);
    else
        return expected;
    return asks && !s->unsure ? refused : expected | refused;
}

unsigned expected_of_truncation(const shadow *s, unsigned expected) {
    if ((!s->is_captured && !s->may_be_captured) || !is_capturing())
        return expected;
    return s->n_graphs && !s->unsure ? BIT(VMM_ERR_CAPTURING) : expected | BIT(VMM_ERR_CAPTURING);
}

void cursor_is_current(shadow *s) {
    s->ahead = 0;
    s->unsure = false;
    shadow_forget(s);
}

/* The tensor may have got one. */
static void find_cursor(shadow *s) {
    if (vmm_has_cursor(s->tensor) && !s->cursor)
        CHECK_OK(vmm_cursor(s->tensor, VMM_STREAM_NONE, &s->cursor));
}

void check_tensor(shadow *s) {
    int32_t *values;

    if (s->cursor) {
        CHECK(values = malloc(s->n_lanes * sizeof *values));
        synchronize(&w.f);
        read_device(&w.f, values, (uintptr_t)s->cursor, s->n_lanes * sizeof *values);
        long long ahead = values[0] - (long long)s->lengths[0];
        for (size_t lane = 0; lane < s->n_lanes; lane++)
            CHECK(values[lane] - (long long)s->lengths[lane] == ahead);
        free(values);
        if (ahead != s->ahead && !(s->unsure && ahead == 0))
            FAIL("the cursor is %lld ahead of the host, not %lld", ahead, s->ahead);
        s->ahead = ahead;
    }
    shadow_check_rows(s, &w.f);
}

static bool can_have_cursor(const shadow *s) {
    return s->spec.capacity <= INT32_MAX && s->n_lanes <= 65535;
}

void do_cursor(void) {
    shadow *s = any_tensor();
    vmm_stream stream = any_stream();
    int32_t *address = NULL;

    if (!s)
        return;
    unsigned expected = can_have_cursor(s)              ? BIT(VMM_OK)
                        : s->spec.capacity <= INT32_MAX ? BIT(VMM_ERR_UNSUPPORTED)
                                                        : BIT(VMM_ERR_OVERFLOW);
    vmm_status status = TRY(expected, vmm_cursor(s->tensor, stream, &address));
    CHECK(!status == (address != NULL) && (!s->cursor || !address || address == s->cursor));
    find_cursor(s);
    check_tensor(s);
}

/* ---- capturing ------------------------------------------------------------------------------- */

/* The driver may take its time to let go of what a graph kept. */
static void wait_until_dropped(const void *base, const vmm_tensor *tensor, size_t n_pins) {
    struct timespec pause = {0, 1000000};
    vmm_tensor *found = NULL;

    for (int i = 0; i < 5000; i++) {
        if (!tensor)
            CHECK_OK(vmm_find(base, &found));
        if (tensor ? vmm_pin_count(tensor) == n_pins : !found)
            return;
        vmm_release(found);
        nanosleep(&pause, NULL);
    }
    FAIL("a graph is gone, and still keeps a tensor");
}

static void capture_begin(void *stream, vmm_pool *pool) {
    /* What maps meanwhile must take no fence. */
    CHECK_OK(vmm_pool_capture_begin(pool));
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
}

static void *capture_end(void *stream, vmm_pool *pool) {
    void *graph;
    int capturing = 0;

    CHECK_OK(vmm_stream_is_capturing(w.f.device, stream, &capturing));
    CHECK(capturing);
    CHECK_CUDA(cuda()->end_capture(stream, &graph));
    CHECK_OK(vmm_pool_capture_end(pool));
    return graph;
}

/* Of `n` tensors from the one at `first` on: those that have rows are the graph's. */
static unsigned choose_jobs(graph *g, size_t n, size_t first, vmm_tensor **tensors,
                            vmm_array *arrays, source *sources) {
    unsigned expected = OK_OR_NO_MEMORY | (is_hip ? BIT(VMM_ERR_CAPTURING) : 0);

    for (size_t i = 0; i < n; i++) {
        shadow *s = w.tensors[(first + i) % w.n_tensors];
        begin(s);
        make_source(&sources[i], s, true);
        tensors[i] = s->tensor;
        arrays[i] = sources[i].array;
        if (source_rows(&sources[i], s) == 0)
            continue;
        g->jobs[g->n].source = sources[i];
        g->jobs[g->n++].of = s;
        if (!can_have_cursor(s))
            expected = BIT(VMM_ERR_OVERFLOW) | BIT(VMM_ERR_UNSUPPORTED) | (expected & ~BIT(VMM_OK));
    }
    return expected;
}

/* The graph lives, and keeps its tensors; or it never came to be. */
static void keep_graph(const graph *g, void *captured, vmm_status status) {
    if (!status && g->n) {
        w.graphs[w.n_graphs] = *g;
        CHECK_CUDA(cuda()->instantiate(&w.graphs[w.n_graphs++].exec, captured, 0));
    }
    CHECK_CUDA(cuda()->graph_destroy(captured));
    for (size_t i = 0; i < g->n; i++) {
        shadow *s = g->jobs[i].of;
        find_cursor(s);
        if (!status) {
            s->is_captured = true;
            s->n_graphs++;
            s->n_pins++;
        } else {
            s->may_be_captured |= s->cursor != NULL;
            wait_until_dropped(s->base, s->tensor, s->n_pins);
        }
        check_tensor(s);
    }
}

void do_capture(void) {
    vmm_tensor *tensors[MAX_TENSORS];
    vmm_array arrays[MAX_TENSORS];
    source sources[MAX_TENSORS];
    graph g = {.stream = streams[next() & 1], .times = 1 + next() % 3};
    size_t n = 1 + next() % 3, first = next();
    shadow *of[MAX_TENSORS];

    if (!w.f.is_gpu || w.n_tensors == 0 || w.n_graphs == MAX_GRAPHS)
        return;
    if (n > w.n_tensors)
        n = w.n_tensors;
    unsigned expected = choose_jobs(&g, n, first, tensors, arrays, sources);
    memcpy(of, w.busy, n * sizeof *of);
    vmm_pool *pool = w.pools[of[0]->pool].pool;
    vmm_status status = VMM_OK;
    synchronize(&w.f);
    capture_begin(g.stream, pool);
    for (int i = 0; i < g.times && !status; i++)
        status = TRY(g.n ? expected : BIT(VMM_OK), vmm_append_many(n, tensors, arrays, g.stream));
    keep_graph(&g, capture_end(g.stream, pool), status);
    end(VMM_OK); /* also where only the first of several has mapped */
    for (size_t i = 0; i < n; i++)
        if (status || source_rows(&sources[i], of[i]) == 0)
            source_free(&sources[i], &w.f);
}

void destroy_graph(size_t at) {
    graph g = w.graphs[at];

    w.graphs[at] = w.graphs[--w.n_graphs];
    CHECK_CUDA(cuda()->graph_exec_destroy(g.exec));
    synchronize(&w.f);
    for (size_t i = 0; i < g.n; i++) {
        shadow *s = g.jobs[i].of;
        s->n_graphs--;
        if (s->tensor || s->n_pins == 1)
            wait_until_dropped(s->base, s->tensor, s->n_pins - 1);
        drop_keeper(s);
        source_free(&g.jobs[i].source, &w.f);
    }
}

void do_destroy_graph(void) {
    if (w.n_graphs)
        destroy_graph(next() % w.n_graphs);
}

/* ---- replaying, following ---------------------------------------------------------------------- */

/* Map what the replays will need, or not; and tell the device what is, should a failure have
 * kept that from it. */
static void map_ahead(shadow *s, size_t n_rows, bool enough) {
    long long needed = (long long)s->length + s->ahead + (long long)n_rows;

    if (enough && needed > 0 && (size_t)needed <= s->spec.capacity) {
        begin(s);
        end(TRY(OK_OR_NO_MEMORY, vmm_map(s->tensor, (size_t)needed)));
    }
    CHECK_OK(vmm_map(s->tensor, s->length));
}

/* What one append of a graph does to a tensor. */
static void replay_job(shadow *s, const source *src) {
    size_t n_rows = source_rows(src, s);

    if ((long long)s->length + s->ahead + (long long)n_rows > (long long)s->mapped) {
        s->has_overflowed = true;
        return;
    }
    for (size_t lane = 0; lane < s->n_lanes; lane++)
        source_copy(src, s, lane, lane, (size_t)((long long)s->lengths[lane] + s->ahead), n_rows);
    s->ahead += (long long)n_rows;
}

void do_replay(void) {
    if (w.n_graphs == 0)
        return;
    graph *g = &w.graphs[next() % w.n_graphs];
    bool enough = next() % 4, anew = next() & 1;
    for (size_t i = 0; i < g->n; i++) {
        shadow *s = g->jobs[i].of;
        if (anew)
            source_write(&g->jobs[i].source, &w.f, next());
        if (!s->tensor)
            continue;
        map_ahead(s, (size_t)g->times * source_rows(&g->jobs[i].source, s), enough);
        CHECK_OK(vmm_handoff(s->tensor, g->stream));
        if (s->unsure) /* a failed call may have had it set */
            check_tensor(s);
    }
    synchronize(&w.f);
    CHECK_CUDA(cuda()->graph_launch(g->exec, g->stream));
    synchronize(&w.f);
    for (size_t i = 0; i < g->n; i++) {
        shadow *s = g->jobs[i].of;
        for (int k = 0; k < g->times && s->tensor; k++)
            replay_job(s, &g->jobs[i].source);
        if (s->tensor)
            check_tensor(s);
    }
}

void do_advance(void) {
    shadow *s = any_tensor();

    if (!s)
        return;
    const size_t rows[] = {s->ahead > 0 ? (size_t)s->ahead : 0, s->ahead > 1, 1, next(), SIZE_MAX};
    size_t n = PICK(rows);
    unsigned expected = BIT(VMM_OK);
    if (n > s->mapped - s->length || s->has_overflowed)
        expected = BIT(VMM_ERR_CAPACITY);
    if (!s->is_captured)
        expected = BIT(VMM_ERR_INVALID) | (s->may_be_captured ? expected : 0);
    vmm_status status = TRY(expected, vmm_advance(s->tensor, n));
    if (status == VMM_ERR_CAPACITY && n <= s->mapped - s->length)
        s->has_overflowed = false;
    if (!status) {
        shadow_add_to_all(s, n);
        s->ahead -= (long long)n;
    }
    check_tensor(s);
}
