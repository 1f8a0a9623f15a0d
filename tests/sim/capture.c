/* capture.c - what may not be done while streams are captured, and the capturing itself. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "sim.h"

static _Thread_local int thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
static uint64_t last_id;

void sim_capture_invalidate(sim_capture *capture) {
    capture->invalid = true;
}

/* ---- what is prohibited ------------------------------------------------------------------------ */
CUresult sim_capture_unsafe(bool refused) {
    if (thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED)
        return CUDA_SUCCESS;
    sim_capture *hit = NULL;
    for (sim_capture *c = sim.captures; c; c = c->next) {
        bool ours = pthread_equal(c->thread, pthread_self());
        bool prohibits = ours ? c->mode != CU_STREAM_CAPTURE_MODE_RELAXED
                              : c->mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
                                    thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (prohibits && !c->invalid) {
            if (refused)
                sim_capture_invalidate(c);
            hit = c;
        }
    }
    if (!hit)
        return CUDA_SUCCESS;
    return sim_refuse(refused ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS,
                      "unsafe while stream %p is captured by %s thread: the calling thread's "
                      "capture mode is %s",
                      (void *)hit->origin,
                      pthread_equal(hit->thread, pthread_self()) ? "this" : "another",
                      thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL ? "global" : "thread-local");
}

static sim_capture *blocking_capture(const sim_context *context) {
    for (sim_stream *s = sim.streams; s; s = s->next)
        if (s->context == context && s->capture && !s->non_blocking)
            return s->capture;
    return NULL;
}

CUresult sim_capture_implicit(const sim_stream *stream) {
    sim_capture *capture = blocking_capture(stream->context);
    if (!capture)
        return CUDA_SUCCESS;
    sim_capture_invalidate(capture);
    return sim_refuse(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                      "the default stream is used while blocking stream %p is captured",
                      (void *)capture->origin);
}

CUresult sim_capture_prohibits(const sim_stream *stream) {
    if (stream->legacy)
        return sim_capture_implicit(stream);
    if (!stream->capture)
        return CUDA_SUCCESS;
    sim_capture_invalidate(stream->capture);
    return sim_refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "stream %p is being captured",
                      (const void *)stream);
}

CUresult sim_capture_context(const sim_context *context) {
    sim_capture *hit = NULL;
    for (sim_capture *c = sim.captures; c; c = c->next)
        if (c->origin->context == context && !c->invalid) {
            sim_capture_invalidate(c);
            hit = c;
        }
    if (!hit)
        return CUDA_SUCCESS;
    return sim_refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                      "a fence over the context while stream %p is captured", (void *)hit->origin);
}

CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    CUresult status = sim_enter(SIM_cuThreadExchangeStreamCaptureMode);
    if (status)
        return status;
    if (!mode)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "no mode"));
    if (*mode < CU_STREAM_CAPTURE_MODE_GLOBAL || *mode > CU_STREAM_CAPTURE_MODE_RELAXED)
        sim_refuse(CUDA_SUCCESS, "mode %d", *mode);
    int before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return sim_leave(CUDA_SUCCESS);
}

/* ---- recording ------------------------------------------------------------------------------- */
static sim_nodes *nodes_of(const sim_nodes *a, const sim_nodes *b) {
    size_t n = (a ? a->n : 0) + (b ? b->n : 0);
    sim_nodes *nodes = sim_alloc(sizeof *nodes + n * sizeof nodes->index[0]);
    for (size_t i = 0; a && i < a->n; i++)
        nodes->index[nodes->n++] = a->index[i];
    for (size_t i = 0; b && i < b->n; i++) {
        bool there = false;
        for (size_t j = 0; a && j < a->n; j++)
            there |= a->index[j] == b->index[i];
        if (!there)
            nodes->index[nodes->n++] = b->index[i];
    }
    return nodes;
}

static void set_frontier(sim_stream *stream, sim_nodes *nodes) {
    free(stream->frontier);
    stream->frontier = nodes;
}

CUresult sim_capture_add(sim_stream *stream, const sim_op *op) {
    if (stream->capture->invalid)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    size_t index = sim_graph_add(stream->capture->graph, op, stream->frontier);
    sim_nodes *nodes = sim_alloc(sizeof *nodes + sizeof nodes->index[0]);
    nodes->n = 1;
    nodes->index[0] = index;
    set_frontier(stream, nodes);
    return CUDA_SUCCESS;
}

CUresult sim_capture_record(sim_stream *stream, sim_event *event) {
    if (stream->capture->invalid)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    free(event->clock);
    free(event->frontier);
    event->clock = NULL;
    event->frontier = nodes_of(stream->frontier, NULL);
    event->capture = stream->capture;
    event->capture_id = stream->capture->id;
    event->recorded = true;
    return CUDA_SUCCESS;
}

CUresult sim_capture_wait(sim_stream *stream, sim_event *event) {
    if (stream->capture && stream->capture->invalid)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (!event->recorded)
        return CUDA_SUCCESS; /* nothing to wait for */
    if (event->capture_id && !event->capture)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "event %p is of a capture that has ended",
                          (void *)event);
    if (!event->capture) {
        sim_capture_invalidate(stream->capture);
        return sim_refuse(CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
                          "stream %p is captured, event %p was recorded outside and is not waited "
                          "for as external",
                          (void *)stream, (void *)event);
    }
    if (stream->legacy) {
        sim_capture_invalidate(event->capture);
        return sim_refuse(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                          "the default stream cannot be captured");
    }
    if (stream->capture && stream->capture != event->capture) {
        sim_capture_invalidate(event->capture);
        sim_capture_invalidate(stream->capture);
        return sim_refuse(CUDA_ERROR_STREAM_CAPTURE_MERGE, "event and stream are of two captures");
    }
    stream->capture = event->capture;
    set_frontier(stream, nodes_of(stream->frontier, event->frontier));
    return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture_v2(CUstream handle, int mode) {
    CUresult status = sim_enter(SIM_cuStreamBeginCapture);
    if (status)
        return status;
    sim_stream *stream = sim_stream_of(handle, &status);
    if (!stream)
        return sim_leave(status);
    if (mode < CU_STREAM_CAPTURE_MODE_GLOBAL || mode > CU_STREAM_CAPTURE_MODE_RELAXED)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "mode %d", mode));
    if (stream->legacy)
        return sim_leave(sim_refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                                    "the default stream cannot be captured"));
    if (stream->capture)
        return sim_leave(sim_refuse(CUDA_ERROR_ILLEGAL_STATE, "stream %p is being captured already",
                                    (void *)handle));
    sim_capture *capture = sim_alloc(sizeof *capture);
    *capture = (sim_capture){.id = ++last_id,
                             .mode = mode,
                             .thread = pthread_self(),
                             .origin = stream,
                             .graph = sim_graph_new(),
                             .next = sim.captures};
    sim.captures = capture;
    stream->capture = capture;
    return sim_leave(CUDA_SUCCESS);
}

/* Does everything that was captured come before the origin's last node? */
static bool joined(const sim_capture *capture) {
    const sim_graph *graph = capture->graph;
    bool *reached = sim_alloc(graph->n_nodes);
    const sim_nodes *last = capture->origin->frontier;
    for (size_t i = 0; last && i < last->n; i++)
        reached[last->index[i]] = true;
    bool all = true;
    for (size_t i = graph->n_nodes; i-- > 0;) {
        const sim_nodes *after = graph->node[i].after;
        for (size_t j = 0; reached[i] && after && j < after->n; j++)
            reached[after->index[j]] = true;
        all = all && reached[i];
    }
    free(reached);
    return all;
}

static void end_capture(sim_capture *capture) {
    for (sim_stream *s = sim.streams; s; s = s->next)
        if (s->capture == capture) {
            s->capture = NULL;
            set_frontier(s, NULL);
        }
    sim_events_forget(capture);
    sim_capture **link = &sim.captures;
    while (*link != capture)
        link = &(*link)->next;
    *link = capture->next;
    free(capture);
}

void sim_capture_drop(sim_capture *capture) {
    sim_graph_free(capture->graph);
    end_capture(capture);
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph *out) {
    CUresult status = sim_enter(SIM_cuStreamEndCapture);
    if (status)
        return status;
    sim_stream *stream = sim_stream_of(handle, &status);
    if (!stream)
        return sim_leave(status);
    sim_capture *capture = stream->capture;
    if (!out || !capture)
        return sim_leave(sim_refuse(CUDA_ERROR_ILLEGAL_STATE, "stream %p is not being captured",
                                    (void *)handle));
    *out = NULL;
    if (capture->origin != stream) {
        sim_capture_invalidate(capture);
        return sim_leave(sim_refuse(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED,
                                    "the capture was begun on another stream, %p",
                                    (void *)capture->origin));
    }
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
        !pthread_equal(capture->thread, pthread_self())) {
        sim_capture_drop(capture);
        return sim_leave(sim_refuse(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD,
                                    "the capture was begun by another thread"));
    }
    sim_graph *graph = capture->graph;
    if (capture->invalid)
        status = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    else if (!joined(capture))
        status = sim_refuse(CUDA_ERROR_STREAM_CAPTURE_UNJOINED,
                            "work of another stream was not joined into stream %p", (void *)handle);
    end_capture(capture);
    if (status)
        sim_graph_free(graph);
    else
        *out = graph;
    return sim_leave(status);
}

/* ---- questions ------------------------------------------------------------------------------- */
static CUresult info(sim_call call, CUstream handle, int *state, uint64_t *id, CUgraph *graph) {
    CUresult status = sim_enter(call);
    if (status)
        return status;
    sim_stream *stream = sim_stream_of(handle, &status);
    if (!stream)
        return sim_leave(status);
    /* A question, and its answer: neither a misuse nor the end of the capture. */
    if (stream->legacy && blocking_capture(stream->context))
        return sim_leave(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    const sim_capture *capture = stream->capture;
    *state = !capture           ? CU_STREAM_CAPTURE_STATUS_NONE
             : capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    if (capture && id)
        *id = capture->id;
    if (capture && graph)
        *graph = capture->graph;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuStreamIsCapturing(CUstream stream, int *state) {
    return info(SIM_cuStreamIsCapturing, stream, state, NULL, NULL);
}

CUresult cuStreamGetCaptureInfo(CUstream stream, int *state, uint64_t *id) {
    return info(SIM_cuStreamGetCaptureInfo, stream, state, id, NULL);
}

CUresult cuStreamGetCaptureInfo_v2(CUstream stream, int *state, uint64_t *id, CUgraph *graph,
                                   const CUgraphNode **nodes, size_t *n_nodes) {
    /* What the next node would come after is not told. */
    if (nodes)
        *nodes = NULL;
    if (n_nodes)
        *n_nodes = 0;
    return info(SIM_cuStreamGetCaptureInfo, stream, state, id, graph);
}

CUresult cuStreamGetCaptureInfo_v3(CUstream stream, int *state, uint64_t *id, CUgraph *graph,
                                   const CUgraphNode **nodes, const void **edges, size_t *n_nodes) {
    if (edges)
        *edges = NULL;
    return cuStreamGetCaptureInfo_v2(stream, state, id, graph, nodes, n_nodes);
}
