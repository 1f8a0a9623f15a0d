/* capture.c - what a capture is, what ends it badly, what a graph does. */
#define _GNU_SOURCE
#include <time.h>

#include "probe.h"

#define NON_BLOCKING CU_STREAM_NON_BLOCKING
#define GLOBAL CU_STREAM_CAPTURE_MODE_GLOBAL
#define THREAD_LOCAL CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
#define RELAXED CU_STREAM_CAPTURE_MODE_RELAXED

static CUstream captured(unsigned flags, int mode) {
    CUstream stream = new_stream(flags);
    MUST(cuStreamBeginCapture, stream, mode);
    return stream;
}

/* A block to write to, made before the capture. */
static CUdeviceptr memory(void) {
    CUdeviceptr base = new_space(1);
    put_block(base, 1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    MUST(cuMemsetD8, base, 0, granule);
    MUST(cuCtxSynchronize);
    return base;
}

static void say_state(const char *word, CUstream stream) {
    static const char *const names[] = {"none", "active", "invalidated"};
    int state = -1;
    CUresult code = cuda.cuStreamIsCapturing(stream, &state);
    if (code)
        say_code(word, code);
    else
        say("%s %s", word, state >= 0 && state < 3 ? names[state] : "?");
}

static void say_end(CUstream stream) {
    CUgraph graph = NULL;
    size_t n = 0;
    if (TRY_AS("end", cuStreamEndCapture, stream, &graph) == CUDA_SUCCESS) {
        MUST(cuGraphGetNodes, graph, NULL, &n);
        say("%zu nodes", n);
        MUST(cuGraphDestroy, graph);
    } else {
        say("%s", graph ? "a graph" : "no graph");
    }
}

/* ---- beginning and ending ------------------------------------------------------------------ */
static void begin_and_end(void) {
    CUstream stream = new_stream(NON_BLOCKING);
    say_state("before", stream);
    TRY(cuStreamBeginCapture, stream, GLOBAL);
    say_state("in it", stream);
    TRY_AS("begin again", cuStreamBeginCapture, stream, GLOBAL);
    say_state("then", stream);
    say_end(stream);
    say_state("after", stream);
    TRY_AS("end again", cuStreamEndCapture, stream, &(CUgraph){NULL});
}

static void begin_where_it_cannot_be(void) {
    TRY_AS("0", cuStreamBeginCapture, NULL, RELAXED);
    TRY_AS("legacy", cuStreamBeginCapture, CU_STREAM_LEGACY, RELAXED);
    TRY_AS("mode 3", cuStreamBeginCapture, new_stream(NON_BLOCKING), 3);
    CUgraph graph = NULL;
    if (TRY_AS("the thread's", cuStreamBeginCapture, CU_STREAM_PER_THREAD, RELAXED) == CUDA_SUCCESS)
        TRY_AS("end", cuStreamEndCapture, CU_STREAM_PER_THREAD, &graph);
}

static void end_elsewhere(void *stream) {
    CUgraph graph = NULL;
    TRY_AS("elsewhere", cuStreamEndCapture, stream, &graph);
}

static void end_on_another_thread(void) {
    static const char *const names[] = {"global", "thread-local", "relaxed"};
    for (int mode = GLOBAL; mode <= RELAXED; mode++) {
        CUstream stream = captured(NON_BLOCKING, mode);
        say("%s", names[mode]);
        elsewhere(end_elsewhere, stream);
        say_state("then", stream);
        if (mode != RELAXED)
            say_end(stream);
    }
}

static void end_on_a_joined_stream(void) {
    CUstream stream = captured(NON_BLOCKING, RELAXED), other = new_stream(NON_BLOCKING);
    CUevent event = new_event();
    MUST(cuEventRecord, event, stream);
    MUST(cuStreamWaitEvent, other, event, 0);
    say_end(other);
    say_state("origin", stream);
    say_state("joined", other);
    say_end(stream);
}

static void unjoined(void) {
    CUdeviceptr base = memory();
    CUstream stream = captured(NON_BLOCKING, RELAXED), other = new_stream(NON_BLOCKING);
    CUevent event = new_event();
    MUST(cuEventRecord, event, stream);
    MUST(cuStreamWaitEvent, other, event, 0);
    MUST(cuMemsetD8Async, base, 1, 64, other);
    say_end(stream);
    say_state("other", other);
}

static void joined_without_work(void) {
    CUstream stream = captured(NON_BLOCKING, RELAXED), other = new_stream(NON_BLOCKING);
    CUevent event = new_event();
    MUST(cuEventRecord, event, stream);
    MUST(cuStreamWaitEvent, other, event, 0);
    say_end(stream);
    say_state("other", other);
}

static void destroy_while_capturing(void) {
    CUstream stream = NULL;
    MUST(cuStreamCreate, &stream, NON_BLOCKING);
    MUST(cuStreamBeginCapture, stream, RELAXED);
    TRY(cuStreamDestroy, stream);
}

/* ---- ids ------------------------------------------------------------------------------------- */
static uint64_t id_of(const char *word, CUstream stream, int *state) {
    uint64_t id = 0;
    *state = -1;
    TRY_AS(word, cuStreamGetCaptureInfo, stream, state, &id, NULL, NULL, NULL);
    return id;
}

static void capture_ids(void) {
    CUstream a = captured(NON_BLOCKING, RELAXED), b = captured(NON_BLOCKING, RELAXED),
             c = new_stream(NON_BLOCKING);
    CUevent event = new_event();
    int state;
    uint64_t first = id_of("of one", a, &state), second = id_of("of another", b, &state);
    say("state %d", state);
    say("%s", first && second && first != second ? "distinct" : "the same or 0");
    MUST(cuEventRecord, event, a);
    MUST(cuStreamWaitEvent, c, event, 0);
    say("%s", id_of("of the joined", c, &state) == first ? "its origin's" : "its own");
    id_of("of the legacy one", NULL, &state);
    say("state %d", state);
    say_end(a);
    MUST(cuStreamBeginCapture, a, RELAXED);
    say("%s", id_of("of the next", a, &state) != first ? "a new one" : "the old one");
}

static void capture_info_of_the_invalidated(void) {
    CUstream stream = captured(NON_BLOCKING, RELAXED);
    CUevent event = new_event();
    int state;
    say_code("fence", cuda.cuCtxRecordEvent(context, event));
    id_of("info", stream, &state);
    say("state %d", state);
    say_state("then", stream);
    say_end(stream);
}

/* ---- events ------------------------------------------------------------------------------------- */
static void event_of_a_capture(void) {
    CUstream stream = captured(NON_BLOCKING, RELAXED);
    CUevent event = new_event();
    TRY(cuEventRecord, event, stream);
    TRY(cuEventQuery, event);
    say_state("then", stream);
    say_end(stream);
    TRY_AS("after the end", cuEventQuery, event);
    TRY_AS("after the end", cuEventSynchronize, event);
    TRY_AS("waited for", cuStreamWaitEvent, new_stream(NON_BLOCKING), event, 0);
}

static void synchronise_with_an_event_of_a_capture(void) {
    CUstream stream = captured(NON_BLOCKING, RELAXED);
    CUevent event = new_event();
    MUST(cuEventRecord, event, stream);
    TRY(cuEventSynchronize, event);
    say_state("then", stream);
    say_end(stream);
}

static void wait_for_an_event_of_the_outside(void) {
    CUstream other = new_stream(NON_BLOCKING);
    CUevent event = new_event();
    MUST(cuEventRecord, event, other);
    CUstream stream = captured(NON_BLOCKING, RELAXED);
    TRY(cuStreamWaitEvent, stream, event, 0);
    say_state("then", stream);
    say_end(stream);
}

static void wait_for_an_event_never_recorded(void) {
    CUevent event = new_event();
    CUstream stream = captured(NON_BLOCKING, RELAXED);
    TRY(cuStreamWaitEvent, stream, event, 0);
    say_state("then", stream);
    say_end(stream);
}

static void wait_as_external(void) {
    CUstream other = new_stream(NON_BLOCKING);
    CUevent event = new_event();
    MUST(cuEventRecord, event, other);
    MUST(cuEventSynchronize, event);
    CUstream stream = captured(NON_BLOCKING, RELAXED);
    TRY(cuStreamWaitEvent, stream, event, CU_EVENT_WAIT_EXTERNAL);
    TRY(cuEventRecordWithFlags, event, stream, CU_EVENT_RECORD_EXTERNAL);
    say_state("then", stream);
    say_end(stream);
    TRY_AS("the event", cuEventQuery, event);
}

static void wait_as_external_for_an_event_of_the_capture(void) {
    CUstream stream = captured(NON_BLOCKING, RELAXED);
    CUevent event = new_event();
    MUST(cuEventRecord, event, stream);
    TRY(cuStreamWaitEvent, stream, event, CU_EVENT_WAIT_EXTERNAL);
    say_state("then", stream);
    say_end(stream);
}

static void legacy_waits_for_a_capture(void) {
    CUstream stream = captured(NON_BLOCKING, RELAXED);
    CUevent event = new_event();
    MUST(cuEventRecord, event, stream);
    TRY(cuStreamWaitEvent, NULL, event, 0);
    say_state("then", stream);
    say_end(stream);
}

static void merge_two_captures(void) {
    CUstream a = captured(NON_BLOCKING, RELAXED), b = captured(NON_BLOCKING, RELAXED);
    CUevent event = new_event();
    MUST(cuEventRecord, event, a);
    TRY(cuStreamWaitEvent, b, event, 0);
    say_state("a", a);
    say_state("b", b);
    say_end(a);
    say_end(b);
}

/* ---- the captured stream itself, and the legacy one -------------------------------------------- */
static void use_the_captured_stream(void) {
    static const char *const names[] = {"query", "synchronise", "copy from pageable memory",
                                        "get its context", "host function"};
    CUdeviceptr base = memory();
    static char host[64];
    for (size_t i = 0; i < LENGTH_OF(names); i++) {
        CUcontext found;
        CUstream stream = captured(NON_BLOCKING, RELAXED);
        say_code(names[i], i == 0   ? cuda.cuStreamQuery(stream)
                           : i == 1 ? cuda.cuStreamSynchronize(stream)
                           : i == 2 ? cuda.cuMemcpyHtoDAsync(base, host, sizeof host, stream)
                           : i == 3 ? cuda.cuStreamGetCtx(stream, &found)
                                    : cuda.cuLaunchHostFunc(stream, (CUhostFn)free, NULL));
        say_state("then", stream);
        say_end(stream);
    }
}

static void use_an_invalidated_stream(void) {
    CUdeviceptr base = memory();
    CUevent event = new_event();
    CUstream stream = captured(NON_BLOCKING, RELAXED);
    say_code("fence", cuda.cuCtxRecordEvent(context, event));
    TRY(cuMemsetD8Async, base, 1, 64, stream);
    TRY(cuEventRecord, event, stream);
    TRY(cuStreamWaitEvent, stream, event, 0);
    TRY(cuStreamQuery, stream);
    say_end(stream);
    TRY_AS("after the end", cuMemsetD8Async, base, 1, 64, stream);
    say("%d written", byte_at(base));
}

/* Each call on the legacy stream in a capture of its own, of a stream with `flags`. */
static void use_the_legacy_stream(unsigned flags) {
    static const char *const names[] = {"fill", "query",      "synchronise", "record",
                                        "wait", "capturing?", "info",        "copy at once"};
    CUdeviceptr base = memory();
    CUevent event = new_event();
    static char host[64];
    for (size_t i = 0; i < LENGTH_OF(names); i++) {
        int state = 99;
        CUstream stream = captured(flags, RELAXED);
        say_code(names[i], i == 0   ? cuda.cuMemsetD8Async(base, 1, 64, NULL)
                           : i == 1 ? cuda.cuStreamQuery(NULL)
                           : i == 2 ? cuda.cuStreamSynchronize(NULL)
                           : i == 3 ? cuda.cuEventRecord(event, NULL)
                           : i == 4 ? cuda.cuStreamWaitEvent(NULL, event, 0)
                           : i == 5 ? cuda.cuStreamIsCapturing(NULL, &state)
                           : i == 6
                               ? cuda.cuStreamGetCaptureInfo(NULL, &state, NULL, NULL, NULL, NULL)
                               : cuda.cuMemcpyHtoD(base, host, sizeof host));
        say_state("then", stream);
        say_end(stream);
        MUST(cuCtxSynchronize);
    }
}

static void legacy_stream_beside_a_blocking_capture(void) {
    use_the_legacy_stream(0);
}

static void legacy_stream_beside_a_non_blocking_capture(void) {
    use_the_legacy_stream(NON_BLOCKING);
}

static void blocking_stream_beside_a_blocking_capture(void) {
    CUdeviceptr base = memory();
    CUstream other = new_stream(0), stream = captured(0, RELAXED);
    TRY_AS("fill", cuMemsetD8Async, base, 1, 64, other);
    TRY_AS("synchronise", cuStreamSynchronize, other);
    say_state("then", stream);
    say_end(stream);
}

/* ---- the thread's mode ------------------------------------------------------------------------- */
static void exchange_modes(void) {
    int mode = RELAXED;
    TRY_AS("relaxed", cuThreadExchangeStreamCaptureMode, &mode);
    say("was %d", mode);
    mode = THREAD_LOCAL;
    TRY_AS("thread-local", cuThreadExchangeStreamCaptureMode, &mode);
    say("was %d", mode);
    mode = 3;
    TRY_AS("3", cuThreadExchangeStreamCaptureMode, &mode);
    mode = GLOBAL;
    TRY_AS("global", cuThreadExchangeStreamCaptureMode, &mode);
    say("was %d", mode);
}

/* ---- graphs --------------------------------------------------------------------------------------- */
static void replay(void) {
    CUdeviceptr base = memory();
    CUstream stream = captured(NON_BLOCKING, GLOBAL);
    CUgraph graph;
    CUgraphExec exec;
    TRY(cuMemsetD8Async, base, 5, 64, stream);
    TRY(cuMemcpyDtoDAsync, base + 64, base, 64, stream);
    MUST(cuStreamEndCapture, stream, &graph);
    TRY(cuGraphInstantiateWithFlags, &exec, graph, 0);
    TRY(cuGraphDestroy, graph);
    say("%d before", byte_at(base + 64));
    for (int i = 0; i < 2; i++) {
        TRY(cuGraphLaunch, exec, stream);
        say("%d after", byte_at(base + 64));
        MUST(cuMemsetD8, base, 0, 128);
        MUST(cuCtxSynchronize);
    }
    TRY(cuGraphExecDestroy, exec);
}

/* ---- what graphs keep ---------------------------------------------------------------------------- */
static _Atomic int n_gone;

static void gone(void *user) {
    (void)user;
    n_gone++;
}

/* The driver may take its time: a second at most. */
static void say_gone(const char *word, int expected) {
    struct timespec pause = {0, 1000000};
    for (int i = 0; i < 1000 && n_gone < expected; i++)
        nanosleep(&pause, NULL);
    say("%s %d gone", word, n_gone);
}

static CUgraph graph_of_capture(CUstream stream) {
    CUgraph graph = NULL;
    int state;
    MUST(cuStreamGetCaptureInfo, stream, &state, NULL, &graph, NULL, NULL);
    return graph;
}

/* Retained while its graph is being captured; it goes with the last that was made of it. */
static void user_object(void) {
    CUdeviceptr base = memory();
    CUstream stream = captured(NON_BLOCKING, GLOBAL);
    CUuserObject object;
    CUgraph graph;
    CUgraphExec exec;
    n_gone = 0;
    TRY(cuUserObjectCreate, &object, NULL, gone, 1, CU_USER_OBJECT_NO_DESTRUCTOR_SYNC);
    TRY(cuGraphRetainUserObject, graph_of_capture(stream), object, 1, CU_GRAPH_USER_OBJECT_MOVE);
    MUST(cuMemsetD8Async, base, 1, 1, stream);
    MUST(cuStreamEndCapture, stream, &graph);
    MUST(cuGraphInstantiateWithFlags, &exec, graph, 0);
    MUST(cuGraphDestroy, graph);
    say_gone("graph destroyed,", 0);
    MUST(cuGraphLaunch, exec, stream);
    MUST(cuStreamSynchronize, stream);
    MUST(cuGraphExecDestroy, exec);
    say_gone("executable destroyed,", 1);
}

static void user_object_of_a_capture_given_up(void) {
    CUstream stream = captured(NON_BLOCKING, GLOBAL);
    CUuserObject object;
    CUgraph graph = NULL;
    n_gone = 0;
    MUST(cuUserObjectCreate, &object, NULL, gone, 1, CU_USER_OBJECT_NO_DESTRUCTOR_SYNC);
    MUST(cuGraphRetainUserObject, graph_of_capture(stream), object, 1, CU_GRAPH_USER_OBJECT_MOVE);
    cuda.cuCtxSynchronize(); /* invalidates the capture */
    TRY(cuStreamEndCapture, stream, &graph);
    say_gone("", 1);
}

static void user_object_released(void) {
    CUuserObject object;
    n_gone = 0;
    MUST(cuUserObjectCreate, &object, NULL, gone, 1, CU_USER_OBJECT_NO_DESTRUCTOR_SYNC);
    TRY(cuUserObjectRelease, object, 1);
    say_gone("", 1);
}

/* A copy on a stream of its own, and the wait for it, leave a capture whole, in whatever mode. */
static void copy_and_wait_beside_a_capture(void) {
    CUdeviceptr base = memory(), plain = 0;
    for (int mode = GLOBAL; mode <= RELAXED; mode++) {
        CUstream stream = captured(NON_BLOCKING, mode), own = NULL;
        int relaxed = RELAXED, byte = 7, back = 0;
        void *host = NULL;
        MUST(cuThreadExchangeStreamCaptureMode, &relaxed);
        TRY_AS("allocate", cuMemAlloc, &plain, 64);
        TRY_AS("host", cuMemHostAlloc, &host, 64, 0);
        TRY_AS("stream", cuStreamCreate, &own, NON_BLOCKING);
        TRY_AS("write", cuMemcpyHtoDAsync, plain, &byte, sizeof byte, own);
        TRY_AS("wait", cuStreamSynchronize, own);
        TRY_AS("read", cuMemcpyDtoHAsync, &back, plain, sizeof back, own);
        TRY_AS("wait", cuStreamSynchronize, own);
        MUST(cuThreadExchangeStreamCaptureMode, &relaxed);
        say("%d", back);
        MUST(cuMemsetD8Async, base, 1, 1, stream);
        say_end(stream);
        MUST(cuMemFree, plain);
        MUST(cuMemFreeHost, host);
    }
}

/* Blocks mapped behind those a graph touches leave it as it was. */
static void replay_after_growth(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    CUstream stream = captured(NON_BLOCKING, GLOBAL);
    CUgraph graph;
    CUgraphExec exec;
    MUST(cuMemsetD8Async, base, 5, 64, stream);
    MUST(cuStreamEndCapture, stream, &graph);
    MUST(cuGraphInstantiateWithFlags, &exec, graph, 0);
    put_block(base + granule, 2, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    TRY(cuGraphLaunch, exec, stream);
    say("%d after", byte_at(base));
    say("%s", map_of(base, 4));
}

static const probe probes[] = {
    PROBE(begin_and_end),
    PROBE(begin_where_it_cannot_be),
    PROBE(end_on_another_thread),
    PROBE(end_on_a_joined_stream),
    PROBE(unjoined),
    PROBE(joined_without_work),
    PROBE(capture_ids),
    PROBE(capture_info_of_the_invalidated),
    PROBE(user_object),
    PROBE(user_object_of_a_capture_given_up),
    PROBE(user_object_released),
    PROBE(copy_and_wait_beside_a_capture),
    PROBE(event_of_a_capture),
    PROBE(synchronise_with_an_event_of_a_capture),
    PROBE(wait_for_an_event_of_the_outside),
    PROBE(wait_for_an_event_never_recorded),
    PROBE(wait_as_external),
    PROBE(wait_as_external_for_an_event_of_the_capture),
    PROBE(legacy_waits_for_a_capture),
    PROBE(merge_two_captures),
    PROBE(use_the_captured_stream),
    PROBE(use_an_invalidated_stream),
    PROBE(legacy_stream_beside_a_blocking_capture),
    PROBE(legacy_stream_beside_a_non_blocking_capture),
    PROBE(blocking_stream_beside_a_blocking_capture),
    PROBE(exchange_modes),
    PROBE(replay),
    PROBE(replay_after_growth),
    ALONE(destroy_while_capturing),
};
const probe_list capture_probes = {"captures", probes, LENGTH_OF(probes)};
