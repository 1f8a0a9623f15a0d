/* unsafe.c - which calls a capture prohibits, to which thread, in which modes.
 *
 * One probe for each call: for each mode of the capture (g)lobal, (t)hread-local and (r)elaxed
 * six cells, the call on the thread that captures in each mode of that thread, then on another.
 * A cell is the code, 0 for success, with "!" if the capture was invalidated:
 *     g: 900! 900! 0 / 900! 0 0
 */
#include "probe.h"

/* What the calls are made on, new for each cell and made before the capture. */
typedef struct setting {
    CUstream stream, other;
    CUevent event, recorded;
    CUdeviceptr base, allocated; /* base: [mapped with access, mapped without, nothing] */
    CUmemGenericAllocationHandle spare;
    void *pinned;
    CUresult (*call)(struct setting *);
    int thread_mode;
    CUresult code;
} setting;

static char host[64];

#define CALL(name, ...)                                                                            \
    static CUresult call_##name(setting *s) {                                                      \
        (void)s;                                                                                   \
        return cuda.name(__VA_ARGS__);                                                             \
    }
static CUdeviceptr new_base;
static CUmemGenericAllocationHandle new_handle;
static CUevent made_event;
static CUstream made_stream;
static CUcontext found_context;
static CUmodule module;
static void *new_pinned;
static size_t bytes_a, bytes_b;
static int number;
static unsigned long long flags;
static const CUmemLocation location = {CU_MEM_LOCATION_TYPE_DEVICE, 0};
static const CUmemAccessDesc access_rw = {{CU_MEM_LOCATION_TYPE_DEVICE, 0},
                                          CU_MEM_ACCESS_FLAGS_PROT_READWRITE};

CALL(cuMemAddressReserve, &new_base, granule, 0, 0, 0)
CALL(cuMemAddressFree, new_base, granule)
CALL(cuMemCreate, &new_handle, granule, &block_prop, 0)
CALL(cuMemRelease, s->spare)
CALL(cuMemMap, s->base + 2 * granule, granule, 0, s->spare, 0)
CALL(cuMemUnmap, s->base + granule, granule)
CALL(cuMemSetAccess, s->base + granule, granule, &access_rw, 1)
CALL(cuMemGetAccess, &flags, &location, s->base)
CALL(cuMemGetAllocationGranularity, &bytes_a, &block_prop, 0)
CALL(cuMemGetInfo, &bytes_a, &bytes_b)
CALL(cuMemAlloc, &new_base, 64)
CALL(cuMemFree, s->allocated)
CALL(cuMemHostAlloc, &new_pinned, 64, 0)
CALL(cuMemFreeHost, s->pinned)
CALL(cuPointerGetAttribute, &number, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, s->base)
CALL(cuMemGetAddressRange, &new_base, &bytes_a, s->base)
CALL(cuMemcpyHtoD, s->base, host, sizeof host)
CALL(cuMemcpyDtoH, host, s->base, sizeof host)
CALL(cuMemcpyDtoD, s->base, s->base + 4096, 64)
CALL(cuMemsetD8, s->base, 1, 64)
CALL(cuMemcpyHtoDAsync, s->base, host, sizeof host, s->other)
CALL(cuMemcpyDtoHAsync, host, s->base, sizeof host, s->other)
CALL(cuMemsetD8Async, s->base, 1, 64, s->other)
CALL(cuLaunchHostFunc, s->other, (CUhostFn)free, NULL)
CALL(cuEventCreate, &made_event, CU_EVENT_DISABLE_TIMING)
CALL(cuEventDestroy, s->event)
CALL(cuEventRecord, s->event, s->other)
CALL(cuEventQuery, s->recorded)
CALL(cuEventSynchronize, s->recorded)
CALL(cuStreamWaitEvent, s->other, s->recorded, 0)
CALL(cuStreamCreate, &made_stream, CU_STREAM_NON_BLOCKING)
CALL(cuStreamQuery, s->other)
CALL(cuStreamSynchronize, s->other)
CALL(cuStreamGetCtx, s->other, &found_context)
CALL(cuStreamIsCapturing, s->other, &number)
CALL(cuCtxGetCurrent, &found_context)
CALL(cuCtxSynchronize)
CALL(cuCtxRecordEvent, context, s->event)
CALL(cuDevicePrimaryCtxRetain, &found_context, 0)
CALL(cuDeviceGetAttribute, &number, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 0)
CALL(cuModuleLoadData, &module, "this is no code")

static CUresult call_cuStreamDestroy(setting *s) {
    (void)s;
    return cuda.cuStreamDestroy(made_stream);
}

static void set_up(setting *s) {
    MUST(cuStreamCreate, &s->stream, CU_STREAM_NON_BLOCKING);
    MUST(cuStreamCreate, &s->other, CU_STREAM_NON_BLOCKING);
    MUST(cuStreamCreate, &made_stream, CU_STREAM_NON_BLOCKING);
    s->event = new_event();
    s->recorded = new_event();
    s->base = new_space(3);
    MUST(cuMemRelease, put_block(s->base, 1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
    MUST(cuMemRelease, put_block(s->base + granule, 1, -1));
    s->spare = new_block(1);
    new_base = new_space(1);
    MUST(cuMemAlloc, &s->allocated, 64);
    MUST(cuMemHostAlloc, &s->pinned, 64, 0);
    MUST(cuMemsetD8Async, s->base, 0, 8192, s->other);
    MUST(cuEventRecord, s->recorded, s->other);
    MUST(cuCtxSynchronize);
}

/* So that hundreds of cells fit. What the call itself has taken away or made stays as it is. */
static void tear_down(setting *s) {
    for (size_t i = 0; i < 3; i++)
        cuda.cuMemUnmap(s->base + i * granule, granule);
    if (!(s->call == call_cuMemRelease && s->code == CUDA_SUCCESS))
        cuda.cuMemRelease(s->spare);
    cuda.cuMemAddressFree(s->base, 3 * granule);
    cuda.cuStreamDestroy(s->stream);
    cuda.cuStreamDestroy(s->other);
}

static void run_call(void *argument) {
    setting *s = argument;
    int mode = s->thread_mode;
    cuda.cuThreadExchangeStreamCaptureMode(&mode);
    s->code = s->call(s);
    cuda.cuThreadExchangeStreamCaptureMode(&mode);
}

static void add_cell(char *text, size_t size, CUresult (*call)(setting *), int capture_mode,
                     int thread_mode, bool other_thread) {
    setting s = {.call = call, .thread_mode = thread_mode};
    CUgraph graph = NULL;
    int state = CU_STREAM_CAPTURE_STATUS_NONE;
    set_up(&s);
    MUST(cuStreamBeginCapture, s.stream, capture_mode);
    if (other_thread)
        elsewhere(run_call, &s);
    else
        run_call(&s);
    cuda.cuStreamIsCapturing(s.stream, &state);
    cuda.cuStreamEndCapture(s.stream, &graph);
    if (graph)
        MUST(cuGraphDestroy, graph);
    MUST(cuCtxSynchronize);
    tear_down(&s);
    size_t n = strlen(text);
    snprintf(text + n, size - n, " %d%s", s.code,
             state == CU_STREAM_CAPTURE_STATUS_ACTIVE ? "" : "!");
}

static void ask(CUresult (*call)(setting *)) {
    for (int capture_mode = 0; capture_mode < 3; capture_mode++) {
        char text[128] = "";
        for (int other_thread = 0; other_thread < 2; other_thread++) {
            if (other_thread)
                strcat(text, " /");
            for (int mode = 0; mode < 3; mode++)
                add_cell(text, sizeof text, call, capture_mode, mode, other_thread);
        }
        say("%c:%s", "gtr"[capture_mode], text);
    }
}

#define CALLS(X)                                                                                   \
    X(cuMemAddressReserve)                                                                         \
    X(cuMemAddressFree)                                                                            \
    X(cuMemCreate)                                                                                 \
    X(cuMemRelease)                                                                                \
    X(cuMemMap)                                                                                    \
    X(cuMemUnmap)                                                                                  \
    X(cuMemSetAccess)                                                                              \
    X(cuMemGetAccess)                                                                              \
    X(cuMemGetAllocationGranularity)                                                               \
    X(cuMemGetInfo)                                                                                \
    X(cuMemAlloc)                                                                                  \
    X(cuMemFree)                                                                                   \
    X(cuMemHostAlloc)                                                                              \
    X(cuMemFreeHost)                                                                               \
    X(cuPointerGetAttribute)                                                                       \
    X(cuMemGetAddressRange)                                                                        \
    X(cuMemcpyHtoD)                                                                                \
    X(cuMemcpyDtoH)                                                                                \
    X(cuMemcpyDtoD)                                                                                \
    X(cuMemsetD8)                                                                                  \
    X(cuMemcpyHtoDAsync)                                                                           \
    X(cuMemcpyDtoHAsync)                                                                           \
    X(cuMemsetD8Async)                                                                             \
    X(cuLaunchHostFunc)                                                                            \
    X(cuEventCreate)                                                                               \
    X(cuEventDestroy)                                                                              \
    X(cuEventRecord)                                                                               \
    X(cuEventQuery)                                                                                \
    X(cuEventSynchronize)                                                                          \
    X(cuStreamWaitEvent)                                                                           \
    X(cuStreamCreate)                                                                              \
    X(cuStreamDestroy)                                                                             \
    X(cuStreamQuery)                                                                               \
    X(cuStreamSynchronize)                                                                         \
    X(cuStreamGetCtx)                                                                              \
    X(cuStreamIsCapturing)                                                                         \
    X(cuCtxGetCurrent)                                                                             \
    X(cuCtxSynchronize)                                                                            \
    X(cuCtxRecordEvent)                                                                            \
    X(cuDevicePrimaryCtxRetain)                                                                    \
    X(cuDeviceGetAttribute)                                                                        \
    X(cuModuleLoadData)

#define CALL_PROBE(name)                                                                           \
    static void probe_##name(void) {                                                               \
        ask(call_##name);                                                                          \
    }
CALLS(CALL_PROBE)

static const probe probes[] = {
#define CALL_ENTRY(name) {"in a capture, " #name, probe_##name, false, false},
    CALLS(CALL_ENTRY)
#undef CALL_ENTRY
};
const probe_list unsafe_probes = {"what a capture prohibits", probes, LENGTH_OF(probes)};
