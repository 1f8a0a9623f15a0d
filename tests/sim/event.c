/* event.c - events: copies of a stream's clock, and the time at which it was reached. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <time.h>

#include "sim.h"

static sim_handles events;
static long n_live;

long sim_live_events(void) {
    return n_live;
}

sim_event *sim_event_of(CUevent handle, CUresult *status) {
    *status = CUDA_SUCCESS;
    bool is_event = sim_handles_has(&events, handle);
    if (is_event && handle->magic == SIM_EVENT_ALIVE)
        return handle;
    *status =
        sim_refuse(CUDA_ERROR_INVALID_HANDLE,
                   is_event ? "event %p was destroyed before" : "%p is no event", (void *)handle);
    return NULL;
}

void sim_event_note_time(sim_event *event) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->time_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

CUresult cuEventCreate(CUevent *out, unsigned flags) {
    CUresult status = sim_enter(SIM_cuEventCreate);
    if (status)
        return status;
    if (!out || flags > 7 || (flags & CU_EVENT_INTERPROCESS))
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "flags 0x%x", flags));
    sim_event *event = sim_alloc(sizeof *event);
    *event = (sim_event){.magic = SIM_EVENT_ALIVE, .context = sim_current(), .flags = flags};
    sim_handles_add(&events, event);
    n_live++;
    *out = event;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuEventDestroy_v2(CUevent handle) {
    CUresult status = sim_enter(SIM_cuEventDestroy);
    if (status)
        return status;
    sim_event *event = sim_event_of(handle, &status);
    if (!event)
        return sim_leave(status);
    event->magic = SIM_EVENT_DEAD;
    free(event->clock);
    free(event->frontier);
    event->clock = NULL;
    event->frontier = NULL;
    n_live--;
    return sim_leave(CUDA_SUCCESS);
}

static void set_clock(sim_event *event, const sim_clock *clock) {
    free(event->clock);
    free(event->frontier);
    event->clock = sim_clock_copy(clock);
    event->frontier = NULL;
    event->capture_id = 0;
    event->capture = NULL;
    event->recorded = true;
}

CUresult sim_event_record_now(sim_event *event, sim_stream *stream) {
    CUresult status = CUDA_SUCCESS;
    if (!(event->flags & CU_EVENT_DISABLE_TIMING)) {
        sim_op op = {.kind = SIM_OP_TIME, .name = "event", .u.event = event};
        status = sim_enqueue(stream, &op);
    }
    set_clock(event, sim_stream_order(stream));
    return status;
}

void sim_events_forget(const sim_capture *capture) {
    for (size_t i = 0; i < events.n; i++) {
        sim_event *event = events.item[i];
        if (event->capture == capture)
            event->capture = NULL;
    }
}

static CUresult record(CUevent handle, CUstream stream_handle, unsigned flags) {
    CUresult status;
    sim_event *event = sim_event_of(handle, &status);
    sim_stream *stream = event ? sim_stream_of(stream_handle, &status) : NULL;
    if (!stream)
        return status;
    if (event->context != stream->context)
        return sim_refuse(CUDA_ERROR_INVALID_HANDLE,
                          "the event belongs to device %d, the stream to device %d",
                          event->context->device, stream->context->device);
    if (flags & ~(unsigned)CU_EVENT_RECORD_EXTERNAL)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "flags 0x%x", flags);
    if (stream->capture) {
        if (!flags)
            return sim_capture_record(stream, event);
        sim_op op = {.kind = SIM_OP_RECORD, .name = "external event record", .u.event = event};
        return sim_capture_add(stream, &op);
    }
    if (flags)
        return sim_refuse(CUDA_ERROR_ILLEGAL_STATE, "external, but the stream is not capturing");
    if (stream->legacy && (status = sim_capture_implicit(stream)))
        return status;
    return sim_event_record_now(event, stream);
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    CUresult status = sim_enter(SIM_cuEventRecord);
    return status ? status : sim_leave(record(event, stream, 0));
}

CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags) {
    CUresult status = sim_enter(SIM_cuEventRecordWithFlags);
    return status ? status : sim_leave(record(event, stream, flags));
}

CUresult cuCtxRecordEvent(CUcontext context, CUevent handle) {
    CUresult status = sim_enter(SIM_cuCtxRecordEvent);
    if (status)
        return status;
    if (sim.driver_version < 12050)
        return sim_leave(sim_refuse(CUDA_ERROR_NOT_SUPPORTED, "this driver does not have it"));
    sim_event *event = sim_event_of(handle, &status);
    if (!event)
        return sim_leave(status);
    if (!context)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_CONTEXT, "no context"));
    if (!sim_check_context(context) || event->context != context)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_HANDLE, "the event is not of context %p",
                                    (void *)context));
    status = sim_capture_context(context);
    if (status)
        return sim_leave(status);
    sim_clock *clock = sim_context_clock(context);
    set_clock(event, clock);
    free(clock);
    return sim_leave(CUDA_SUCCESS);
}

/* An event of a capture says nothing about work: there is none yet. */
static CUresult check_captured(const sim_event *event) {
    if (!event->capture_id)
        return CUDA_SUCCESS;
    if (event->capture)
        sim_capture_invalidate(event->capture);
    return sim_refuse(event->capture ? CUDA_ERROR_CAPTURED_EVENT : CUDA_ERROR_INVALID_VALUE,
                      "event %p was last recorded in a capture", (const void *)event);
}

CUresult cuEventQuery(CUevent handle) {
    CUresult status = sim_enter(SIM_cuEventQuery);
    if (status)
        return status;
    sim_event *event = sim_event_of(handle, &status);
    if (event)
        status = check_captured(event);
    if (status)
        return sim_leave(status);
    if (!sim_clock_passed(event->clock))
        return sim_leave(CUDA_ERROR_NOT_READY);
    sim_observe(event->clock);
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuEventSynchronize(CUevent handle) {
    CUresult status = sim_enter(SIM_cuEventSynchronize);
    if (status)
        return status;
    sim_event *event = sim_event_of(handle, &status);
    if (event)
        status = check_captured(event);
    if (status)
        return sim_leave(status);
    sim_clock *clock = sim_clock_copy(event->clock);
    sim_clock_wait(clock);
    sim_observe(clock);
    free(clock);
    return sim_leave(sim.poison);
}

CUresult cuEventElapsedTime(float *milliseconds, CUevent first, CUevent second) {
    CUresult status = sim_enter(SIM_cuEventElapsedTime);
    if (status)
        return status;
    sim_event *a = sim_event_of(first, &status);
    sim_event *b = a ? sim_event_of(second, &status) : NULL;
    if (!b)
        return sim_leave(status);
    if (!a->recorded || !b->recorded || ((a->flags | b->flags) & CU_EVENT_DISABLE_TIMING))
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_HANDLE,
                                    "an event that was not recorded or takes no time"));
    if ((status = check_captured(a)) || (status = check_captured(b)))
        return sim_leave(status);
    if (!sim_clock_passed(a->clock) || !sim_clock_passed(b->clock))
        return sim_leave(CUDA_ERROR_NOT_READY);
    *milliseconds = (float)((double)(int64_t)(b->time_ns - a->time_ns) * 1e-6);
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned flags) {
    CUresult status = sim_enter(SIM_cuStreamWaitEvent);
    if (status)
        return status;
    sim_event *event = sim_event_of(handle, &status);
    sim_stream *stream = event ? sim_stream_of(stream_handle, &status) : NULL;
    if (!stream)
        return sim_leave(status);
    if (flags & ~(unsigned)CU_EVENT_WAIT_EXTERNAL)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "flags 0x%x", flags));
    if (stream->capture && flags) {
        sim_op op = {.kind = SIM_OP_WAIT, .name = "external event wait", .u.event = event};
        return sim_leave(sim_capture_add(stream, &op));
    }
    if (stream->capture || event->capture_id)
        return sim_leave(sim_capture_wait(stream, event));
    if (flags)
        return sim_leave(
            sim_refuse(CUDA_ERROR_ILLEGAL_STATE, "external, but the stream is not capturing"));
    if (stream->legacy && (status = sim_capture_implicit(stream)))
        return sim_leave(status);
    sim_clock_merge(&stream->clock, event->clock);
    return sim_leave(CUDA_SUCCESS);
}
