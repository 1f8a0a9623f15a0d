/* stream.c - streams, their threads, and how work gets into them and out. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

#include "sim.h"

#define DEFAULT_DELAY_US 20

static sim_stream *dead_streams; /* kept, so that their handles are known for what they are */
static _Thread_local sim_stream *per_thread[SIM_MAX_DEVICES];
static _Thread_local bool in_callback;

bool sim_in_callback(void) {
    return in_callback;
}

void sim_call_back(CUhostFn call, void *user_data) {
    bool before = in_callback;
    in_callback = true;
    call(user_data);
    in_callback = before;
}

/* ---- the threads ------------------------------------------------------------------------- */
static long draw_delay(void) {
    unsigned long long random = sim_random() >> 16;
    if (sim.delay_us >= 0)
        return sim.delay_us ? (long)(random % (unsigned long long)(sim.delay_us + 1)) : 0;
    return random % 8 ? 0 : (long)(random / 8 % DEFAULT_DELAY_US);
}

static void sleep_us(long us) {
    struct timespec time = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&time, NULL);
}

void sim_wake_streams(void) {
    for (sim_stream *s = sim.streams; s; s = s->next)
        if (s->started && s->sleeping && s->head)
            pthread_cond_signal(&s->wake);
    if (sim.n_waiting)
        pthread_cond_broadcast(&sim.changed);
}

static bool ready(const sim_stream *stream) {
    return stream->head && (!sim.held || sim.poison) && sim_clock_passed(stream->head->after);
}

/* A destroyed stream that has run everything: its place in the order stays known. */
static void bury(sim_stream *stream) {
    sim_stream **link = &sim.streams;
    while (*link != stream)
        link = &(*link)->next;
    *link = stream->next;
    sim_clock_merge(&stream->context->departed, stream->clock);
    free(stream->clock);
    stream->clock = NULL;
    sim_slot_give(stream->slot);
    stream->next = dead_streams;
    dead_streams = stream;
}

static void run_head(sim_stream *stream) {
    sim_work *work = stream->head;
    long delay = draw_delay();
    if (delay) {
        pthread_mutex_unlock(&sim.lock);
        sleep_us(delay);
        pthread_mutex_lock(&sim.lock);
    }
    if (!sim.poison) {
        stream->running = true;
        if (work->op.kind == SIM_OP_HOST)
            sim_observe(work->after); /* who is called back knows that all before has finished */
        pthread_mutex_unlock(&sim.lock);
        in_callback = work->op.kind == SIM_OP_HOST;
        sim_op_run(&work->op);
        in_callback = false;
        pthread_mutex_lock(&sim.lock);
        stream->running = false;
        if (work->op.kind == SIM_OP_TIME)
            sim_event_note_time(work->op.u.event);
    }
    stream->head = work->next;
    if (!stream->head)
        stream->tail = NULL;
    stream->n_queued--;
    sim_slot_completed(stream->slot);
    sim_op_drop(&work->op);
    free(work->after);
    free(work);
    sim_wake_streams();
}

static void *run_stream(void *argument) {
    sim_stream *stream = argument;
    prctl(PR_SET_TIMERSLACK, 1ul); /* so that short delays are short */
    pthread_mutex_lock(&sim.lock);
    while (stream->head || stream->magic == SIM_STREAM_ALIVE) {
        if (ready(stream)) {
            run_head(stream);
            continue;
        }
        stream->sleeping = true;
        pthread_cond_wait(&stream->wake, &sim.lock);
        stream->sleeping = false;
    }
    bury(stream);
    pthread_mutex_unlock(&sim.lock);
    return NULL;
}

static void start(sim_stream *stream) {
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;
    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGABRT);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, &attributes, run_stream, stream) != 0) {
        fprintf(stderr, "vmm-sim: no thread for a stream\n");
        abort();
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    stream->started = true;
}

void sim_cancel_work(void) {
    sim_wake_streams();
    sim.n_waiting++;
    for (sim_stream *s = sim.streams; s; s = s->next)
        while (s->running)
            pthread_cond_wait(&sim.changed, &sim.lock);
    sim.n_waiting--;
}

/* ---- which stream ---------------------------------------------------------------------------- */
static sim_stream *make_stream(sim_context *context) {
    sim_stream *stream = sim_alloc(sizeof *stream);
    *stream = (sim_stream){.magic = SIM_STREAM_ALIVE, .context = context};
    pthread_cond_init(&stream->wake, NULL);
    stream->slot = sim_slot_take();
    stream->next = sim.streams;
    sim.streams = stream;
    return stream;
}

sim_stream *sim_stream_of(CUstream handle, CUresult *status) {
    *status = CUDA_SUCCESS;
    bool is_legacy = !handle || (handle == CU_STREAM_LEGACY && !sim_vendor_here.has_default_device);
    if (is_legacy || handle == CU_STREAM_PER_THREAD) {
        sim_context *context = sim_current();
        if (!context) {
            *status = sim_refuse(CUDA_ERROR_INVALID_CONTEXT,
                                 "a default stream, but no context is current in this thread");
            return NULL;
        }
        sim_stream **place =
            handle == CU_STREAM_PER_THREAD ? &per_thread[context->device] : &context->legacy;
        if (!*place) {
            *place = make_stream(context);
            (*place)->legacy = handle != CU_STREAM_PER_THREAD;
        }
        return *place;
    }
    for (sim_stream *s = sim.streams; s; s = s->next)
        if (s == handle && s->magic == SIM_STREAM_ALIVE)
            return s;
    bool known = false;
    for (sim_stream *s = sim.streams; s; s = s->next)
        known |= s == handle;
    for (sim_stream *s = dead_streams; s; s = s->next)
        known |= s == handle;
    *status =
        sim_refuse(CUDA_ERROR_INVALID_HANDLE,
                   known ? "stream %p was destroyed before" : "%p is no stream", (void *)handle);
    return NULL;
}

const sim_clock *sim_stream_order(sim_stream *stream) {
    sim_clock_merge(&stream->clock, sim.host);
    if (stream->legacy) {
        for (sim_stream *s = sim.streams; s; s = s->next)
            if (s->context == stream->context && !s->non_blocking)
                sim_clock_merge(&stream->clock, s->clock);
    } else if (!stream->non_blocking && stream->context->legacy) {
        sim_clock_merge(&stream->clock, stream->context->legacy->clock);
    }
    return stream->clock;
}

sim_clock *sim_context_clock(const sim_context *context) {
    sim_clock *clock = sim_clock_copy(context->departed);
    for (sim_stream *s = sim.streams; s; s = s->next)
        if (s->context == context)
            sim_clock_merge(&clock, s->clock);
    return clock;
}

/* ---- giving work to a stream ---------------------------------------------------------------- */
/* First look, then note, so that a refusal leaves nothing behind. */
static CUresult check_ranges(const sim_op *op, sim_visit *visit) {
    CUresult status = sim_op_check(op, visit);
    if (status == CUDA_ERROR_ILLEGAL_ADDRESS && op->kind != SIM_OP_KERNEL)
        return CUDA_ERROR_INVALID_VALUE; /* the driver looks at the addresses of copies itself */
    if (status == CUDA_ERROR_ILLEGAL_ADDRESS || status == CUDA_ERROR_MISALIGNED_ADDRESS)
        sim.poison = status;
    visit->note = true;
    return status ? status : sim_op_check(op, visit);
}

CUresult sim_enqueue(sim_stream *stream, sim_op *op) {
    while (stream->n_queued >= SIM_QUEUE_LIMIT && !sim.held && !sim.poison) {
        sim.n_waiting++;
        pthread_cond_wait(&sim.changed, &sim.lock);
        sim.n_waiting--;
    }
    sim_visit visit = {op->name,
                       stream->context->device,
                       stream->slot,
                       sim_slot_next(stream->slot),
                       sim_stream_order(stream),
                       false};
    CUresult status = sim.poison ? sim.poison : check_ranges(op, &visit);
    if (status) {
        sim_op_drop(op);
        return status;
    }
    sim_work *work = sim_alloc(sizeof *work);
    *work = (sim_work){.op = *op, .seq = visit.seq};
    if (op->kind == SIM_OP_HOST || !sim_clock_passed(stream->clock))
        work->after = sim_clock_copy(stream->clock);
    sim_slot_submitted(stream->slot);
    sim_clock_set(&stream->clock, stream->slot, visit.seq);
    if (stream->tail)
        stream->tail->next = work;
    else
        stream->head = work;
    stream->tail = work;
    stream->n_queued++;
    if (!stream->started)
        start(stream);
    if (stream->sleeping)
        pthread_cond_signal(&stream->wake);
    return CUDA_SUCCESS;
}

CUresult sim_submit(sim_stream *stream, sim_op *op) {
    CUresult status = CUDA_SUCCESS;
    if (sim_current() && stream->context != sim_current())
        status = sim_refuse(CUDA_ERROR_INVALID_HANDLE,
                            "the stream belongs to device %d, the current context to device %d",
                            stream->context->device, sim_current()->device);
    else if (stream->legacy)
        status = sim_capture_implicit(stream);
    if (status || stream->capture) {
        if (!status)
            status = sim_capture_add(stream, op);
        sim_op_drop(op);
        return status;
    }
    return sim_enqueue(stream, op);
}

/* ---- entry points ------------------------------------------------------------------------------ */
static CUresult create(sim_call call, CUstream *out, unsigned flags, int priority) {
    CUresult status = sim_enter(call);
    if (status)
        return status;
    if (!out || flags & ~(unsigned)CU_STREAM_NON_BLOCKING)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "flags 0x%x", flags));
    sim_stream *stream = make_stream(sim_current());
    stream->non_blocking = flags & CU_STREAM_NON_BLOCKING;
    stream->created = true;
    stream->priority = priority > 0 ? 0 : priority < -5 ? -5 : priority;
    *out = stream;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuStreamCreate(CUstream *out, unsigned flags) {
    return create(SIM_cuStreamCreate, out, flags, 0);
}

CUresult cuStreamCreateWithPriority(CUstream *out, unsigned flags, int priority) {
    return create(SIM_cuStreamCreateWithPriority, out, flags, priority);
}

CUresult cuStreamDestroy_v2(CUstream handle) {
    CUresult status = sim_enter(SIM_cuStreamDestroy);
    if (status)
        return status;
    sim_stream *stream = sim_stream_of(handle, &status);
    if (!stream)
        return sim_leave(status);
    if (!stream->created)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_HANDLE, "a default stream"));
    if (stream->capture) {
        sim_refuse(CUDA_SUCCESS, "stream %p is being captured", (void *)handle);
        sim_capture_drop(stream->capture);
    }
    stream->magic = SIM_STREAM_DEAD;
    if (stream->started)
        pthread_cond_signal(&stream->wake);
    else
        bury(stream);
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuStreamQuery(CUstream handle) {
    CUresult status = sim_enter(SIM_cuStreamQuery);
    if (status)
        return status;
    sim_stream *stream = sim_stream_of(handle, &status);
    if (stream)
        status = sim_capture_prohibits(stream);
    if (status)
        return sim_leave(status);
    const sim_clock *clock = sim_stream_order(stream);
    if (!sim_clock_passed(clock))
        return sim_leave(CUDA_ERROR_NOT_READY);
    sim_observe(clock);
    return sim_leave(CUDA_SUCCESS);
}

static CUresult synchronize(sim_clock *clock) {
    sim_clock_wait(clock);
    sim_observe(clock);
    free(clock);
    return sim.poison;
}

CUresult cuStreamSynchronize(CUstream handle) {
    CUresult status = sim_enter(SIM_cuStreamSynchronize);
    if (status)
        return status;
    sim_stream *stream = sim_stream_of(handle, &status);
    if (stream)
        status = sim_capture_prohibits(stream);
    if (status)
        return sim_leave(status);
    return sim_leave(synchronize(sim_clock_copy(sim_stream_order(stream))));
}

static CUresult synchronize_context(sim_context *context) {
    CUresult status = sim_capture_context(context);
    return status ? status : synchronize(sim_context_clock(context));
}

CUresult cuCtxSynchronize(void) {
    CUresult status = sim_enter(SIM_cuCtxSynchronize);
    if (status)
        return status;
    return sim_leave(synchronize_context(sim_current()));
}

CUresult cuCtxSynchronize_v2(CUcontext handle) {
    CUresult status = sim_enter(SIM_cuCtxSynchronize);
    if (status)
        return status;
    sim_context *context = handle ? sim_check_context(handle) : sim_current();
    if (!context)
        return sim_leave(
            sim_refuse(CUDA_ERROR_INVALID_CONTEXT, "%p is no context", (void *)handle));
    return sim_leave(synchronize_context(context));
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext *context) {
    CUresult status = sim_enter(SIM_cuStreamGetCtx);
    if (status)
        return status;
    sim_stream *stream = sim_stream_of(handle, &status);
    if (stream)
        *context = stream->context;
    return sim_leave(status);
}

CUresult cuStreamGetCtx_v2(CUstream handle, CUcontext *context, void **green) {
    CUresult status = cuStreamGetCtx(handle, context);
    if (status == CUDA_SUCCESS && green)
        *green = NULL;
    return status;
}

CUresult cuStreamGetFlags(CUstream handle, unsigned *flags) {
    CUresult status = sim_enter(SIM_cuStreamGetFlags);
    if (status)
        return status;
    sim_stream *stream = sim_stream_of(handle, &status);
    if (stream)
        *flags = stream->non_blocking ? CU_STREAM_NON_BLOCKING : 0;
    return sim_leave(status);
}

CUresult cuStreamGetPriority(CUstream handle, int *priority) {
    CUresult status = sim_enter(SIM_cuStreamGetPriority);
    if (status)
        return status;
    sim_stream *stream = sim_stream_of(handle, &status);
    if (stream)
        *priority = stream->priority;
    return sim_leave(status);
}

/* ---- what tests ask -------------------------------------------------------------------------- */
void vmm_sim_hold(void) {
    pthread_mutex_lock(&sim.lock);
    sim.held = true;
    pthread_mutex_unlock(&sim.lock);
}

void vmm_sim_go(void) {
    pthread_mutex_lock(&sim.lock);
    sim.held = false;
    sim_wake_streams();
    pthread_mutex_unlock(&sim.lock);
}

long vmm_sim_pending(void) {
    pthread_mutex_lock(&sim.lock);
    long n = (long)sim_slots_pending();
    pthread_mutex_unlock(&sim.lock);
    return n;
}

void vmm_sim_quiesce(void) {
    pthread_mutex_lock(&sim.lock);
    sim.n_waiting++;
    while (sim_slots_pending())
        pthread_cond_wait(&sim.changed, &sim.lock);
    sim.n_waiting--;
    pthread_mutex_unlock(&sim.lock);
}
