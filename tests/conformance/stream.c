/* stream.c - streams, events, and the fence over a whole context. */
#include "probe.h"

#include <unistd.h>

#define NON_BLOCKING CU_STREAM_NON_BLOCKING

/* ---- streams ---------------------------------------------------------------------------- */
static void say_context(const char *word, CUstream stream) {
    CUcontext found = NULL;
    if (TRY_AS(word, cuStreamGetCtx, stream, &found) == CUDA_SUCCESS)
        say("%s", found == context ? "the primary one" : found ? "another" : "none");
}

static void stream_contexts(void) {
    say_context("of 0", NULL);
    say_context("of the legacy stream", CU_STREAM_LEGACY);
    say_context("of the thread's stream", CU_STREAM_PER_THREAD);
    say_context("of a stream", new_stream(0));
}

static void stream_creation(void) {
    CUstream stream = NULL;
    unsigned flags = 99;
    TRY_AS("flags 0", cuStreamCreate, &stream, 0);
    TRY(cuStreamGetFlags, stream, &flags);
    say("%u", flags);
    TRY_AS("non-blocking", cuStreamCreate, &stream, NON_BLOCKING);
    TRY(cuStreamGetFlags, stream, &flags);
    say("%u", flags);
    TRY_AS("flags 2", cuStreamCreate, &stream, 2);
    TRY_AS("destroy 0", cuStreamDestroy, NULL);
    TRY_AS("destroy the legacy stream", cuStreamDestroy, CU_STREAM_LEGACY);
}

static void stream_priorities(void) {
    static const int asked[] = {0, -1, -5, -99, 5};
    for (size_t i = 0; i < LENGTH_OF(asked); i++) {
        CUstream stream = NULL;
        int priority = 99;
        MUST(cuStreamCreateWithPriority, &stream, NON_BLOCKING, asked[i]);
        MUST(cuStreamGetPriority, stream, &priority);
        say("%d becomes %d", asked[i], priority);
    }
}

static void default_streams(void) {
    unsigned flags = 99;
    int priority = 99;
    TRY_AS("query 0", cuStreamQuery, NULL);
    TRY_AS("query legacy", cuStreamQuery, CU_STREAM_LEGACY);
    TRY_AS("query the thread's", cuStreamQuery, CU_STREAM_PER_THREAD);
    TRY_AS("synchronise 0", cuStreamSynchronize, NULL);
    TRY_AS("flags of 0", cuStreamGetFlags, NULL, &flags);
    say("%u", flags);
    TRY_AS("flags of the thread's", cuStreamGetFlags, CU_STREAM_PER_THREAD, &flags);
    say("%u", flags);
    TRY_AS("priority of 0", cuStreamGetPriority, NULL, &priority);
    say("%d", priority);
}

static void stream_queries(void) {
    CUstream stream = new_stream(NON_BLOCKING), blocking = new_stream(0);
    hold(stream);
    TRY_AS("busy", cuStreamQuery, stream);
    TRY_AS("another", cuStreamQuery, blocking);
    TRY_AS("legacy beside a non-blocking one", cuStreamQuery, NULL);
    go();
    TRY(cuStreamSynchronize, stream);
    TRY_AS("done", cuStreamQuery, stream);
    hold(blocking);
    TRY_AS("blocking busy", cuStreamQuery, blocking);
    go();
    MUST(cuCtxSynchronize);
    TRY_AS("all done", cuStreamQuery, NULL);
}

/* Does work on the second stream wait for work on the first? */
static void say_order(const char *word, CUstream first, CUstream second) {
    CUevent event = new_event();
    hold(first);
    MUST(cuEventRecord, event, second);
    CUresult code = cuda.cuEventQuery(event);
    for (int i = 0; i < 50 && code == CUDA_ERROR_NOT_READY; i++) {
        usleep(1000); /* an event behind nothing passes soon */
        code = cuda.cuEventQuery(event);
    }
    go();
    MUST(cuCtxSynchronize);
    say("%s %s", word, code == CUDA_ERROR_NOT_READY ? "waits" : code_name(code));
}

static void order_of_the_legacy_stream(void) {
    CUstream blocking = new_stream(0);
    say_order("legacy after blocking", blocking, NULL);
    say_order("blocking after legacy", NULL, blocking);
    say_order("blocking after blocking", new_stream(0), new_stream(0));
}

static void destroy_a_busy_stream(void) {
    CUdeviceptr base = new_space(1);
    CUstream stream = NULL;
    CUevent event = new_event();
    put_block(base, 1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    MUST(cuMemsetD8, base, 0, 64);
    MUST(cuCtxSynchronize);
    MUST(cuStreamCreate, &stream, NON_BLOCKING);
    hold(stream);
    MUST(cuMemsetD8Async, base, 7, 64, stream);
    TRY(cuStreamDestroy, stream);
    TRY(cuCtxRecordEvent, context, event);
    TRY(cuEventQuery, event);
    go();
    TRY(cuEventSynchronize, event);
    say("%d written", byte_at(base));
}

/* ---- events ------------------------------------------------------------------------------- */
static void event_flags(void) {
    CUevent event;
    TRY_AS("0", cuEventCreate, &event, 0);
    TRY_AS("blocking", cuEventCreate, &event, CU_EVENT_BLOCKING_SYNC);
    TRY_AS("without time", cuEventCreate, &event, CU_EVENT_DISABLE_TIMING);
    TRY_AS("8", cuEventCreate, &event, 8);
    TRY_AS("interprocess with time", cuEventCreate, &event, CU_EVENT_INTERPROCESS);
}

static void event_never_recorded(void) {
    CUevent event = new_event(), timed = NULL;
    float time;
    MUST(cuEventCreate, &timed, 0);
    TRY(cuEventQuery, event);
    TRY(cuEventSynchronize, event);
    TRY(cuStreamWaitEvent, new_stream(NON_BLOCKING), event, 0);
    TRY(cuEventElapsedTime, &time, timed, timed);
    TRY(cuEventDestroy, event);
}

static void event_recorded(void) {
    CUstream stream = new_stream(NON_BLOCKING);
    CUevent event = new_event();
    hold(stream);
    TRY(cuEventRecord, event, stream);
    TRY(cuEventQuery, event);
    go();
    TRY(cuEventSynchronize, event);
    TRY(cuEventQuery, event);
}

/* The last record counts, for queries and for waits made before it, too. */
static void event_recorded_twice(void) {
    CUstream stream = new_stream(NON_BLOCKING), waiter = new_stream(NON_BLOCKING);
    CUevent event = new_event(), after = new_event();
    MUST(cuEventRecord, event, stream);
    MUST(cuStreamWaitEvent, waiter, event, 0);
    hold(stream);
    MUST(cuEventRecord, event, stream);
    TRY(cuEventQuery, event);
    MUST(cuEventRecord, after, waiter);
    TRY_AS("the wait before", cuEventSynchronize, after);
    MUST(cuStreamWaitEvent, waiter, event, 0);
    MUST(cuEventRecord, after, waiter);
    TRY_AS("the wait after", cuEventQuery, after);
    go();
    TRY_AS("then", cuEventSynchronize, after);
}

static void event_destroyed_while_pending(void) {
    CUstream stream = new_stream(NON_BLOCKING), waiter = new_stream(NON_BLOCKING);
    CUevent event = new_event();
    hold(stream);
    MUST(cuEventRecord, event, stream);
    MUST(cuStreamWaitEvent, waiter, event, 0);
    TRY(cuEventDestroy, event);
    TRY_AS("the waiter", cuStreamQuery, waiter);
    go();
    TRY(cuStreamSynchronize, waiter);
}

static void event_times(void) {
    CUstream stream = new_stream(NON_BLOCKING);
    CUevent a, b, untimed = new_event();
    float time = -1;
    MUST(cuEventCreate, &a, 0);
    MUST(cuEventCreate, &b, 0);
    MUST(cuEventRecord, a, stream);
    MUST(cuEventRecord, untimed, stream);
    hold(stream);
    MUST(cuEventRecord, b, stream);
    TRY_AS("pending", cuEventElapsedTime, &time, a, b);
    go();
    MUST(cuEventSynchronize, b);
    TRY_AS("passed", cuEventElapsedTime, &time, a, b);
    say("%s", time >= 0 ? "in order" : "negative");
    TRY_AS("without time", cuEventElapsedTime, &time, a, untimed);
}

static void external_outside_a_capture(void) {
    CUstream stream = new_stream(NON_BLOCKING);
    CUevent event = new_event();
    TRY(cuEventRecordWithFlags, event, stream, CU_EVENT_RECORD_EXTERNAL);
    TRY(cuStreamWaitEvent, stream, event, CU_EVENT_WAIT_EXTERNAL);
    TRY_AS("record flags 2", cuEventRecordWithFlags, event, stream, 2);
    TRY_AS("wait flags 2", cuStreamWaitEvent, stream, event, 2);
}

/* ---- the fence ------------------------------------------------------------------------------ */
static void fence_stands_behind_every_stream(void) {
    CUstream streams[] = {new_stream(NON_BLOCKING), new_stream(0), CU_STREAM_PER_THREAD, NULL};
    static const char *const names[] = {"non-blocking", "blocking", "the thread's", "legacy"};
    CUevent event = new_event();
    TRY_AS("idle", cuCtxRecordEvent, context, event);
    MUST(cuEventSynchronize, event);
    for (size_t i = 0; i < LENGTH_OF(streams); i++) {
        hold(streams[i]);
        TRY_AS(names[i], cuCtxRecordEvent, context, event);
        TRY(cuEventQuery, event);
        go();
        TRY(cuEventSynchronize, event);
    }
}

static void fence_only_what_was_before(void) {
    CUstream stream = new_stream(NON_BLOCKING);
    CUevent event = new_event();
    MUST(cuCtxRecordEvent, context, event);
    hold(stream);
    TRY(cuEventSynchronize, event);
    TRY(cuEventQuery, event);
}

static void fence_waited_for_by_a_stream(void) {
    CUstream stream = new_stream(NON_BLOCKING), waiter = new_stream(NON_BLOCKING);
    CUevent event = new_event();
    hold(stream);
    MUST(cuCtxRecordEvent, context, event);
    TRY(cuStreamWaitEvent, waiter, event, 0);
    TRY(cuStreamQuery, waiter);
    go();
    TRY(cuStreamSynchronize, waiter);
}

static void fence_of_other_events(void) {
    CUevent timed;
    MUST(cuEventCreate, &timed, 0);
    TRY_AS("with time", cuCtxRecordEvent, context, timed);
    TRY_AS("no context", cuCtxRecordEvent, NULL, new_event());
}

static const probe probes[] = {
    PROBE(stream_contexts),
    PROBE(stream_creation),
    PROBE(stream_priorities),
    PROBE(default_streams),
    PROBE(stream_queries),
    PROBE(order_of_the_legacy_stream),
    PROBE(destroy_a_busy_stream),
    PROBE(event_flags),
    PROBE(event_never_recorded),
    PROBE(event_recorded),
    PROBE(event_recorded_twice),
    PROBE(event_destroyed_while_pending),
    PROBE(event_times),
    PROBE(external_outside_a_capture),
    PROBE(fence_stands_behind_every_stream),
    PROBE(fence_only_what_was_before),
    PROBE(fence_waited_for_by_a_stream),
    PROBE(fence_of_other_events),
};
const probe_list stream_probes = {"streams and events", probes, LENGTH_OF(probes)};
