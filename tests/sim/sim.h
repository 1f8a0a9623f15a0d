/* sim.h - inside the simulated CUDA driver, which is the simulated HIP runtime, too.
 *
 * One lock, sim.lock, guards everything and is never held while device work runs, is
 * delayed or is waited for. An entry point calls sim_enter(), which takes it, and ends with
 * sim_leave(), which gives it back.
 *
 * Order between pieces of device work is kept in clocks. Every stream has a slot; the work
 * of a slot is numbered from 1 and runs in that order. A clock says, for every slot, up to
 * which number something comes after it. A stream's clock is all that its next work comes
 * after, an event is a copy of one, and sim.host is what the host has seen finished.
 */
#ifndef SIM_H
#define SIM_H

#ifndef _GNU_SOURCE
#error "define _GNU_SOURCE before the first include"
#endif

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "cuda_abi.h"
#include "vmm_sim.h"

#define SIM_MAX_DEVICES 8
#define SIM_QUEUE_LIMIT 1024 /* pending work of a stream, past which a launch waits */

/* ---- calls (control.c) ---------------------------------------------------------------- */
enum {
    SIM_EARLY = 1,    /* allowed before cuInit */
    SIM_ALWAYS = 2,   /* changes nothing and is allowed anywhere: also forked or in a callback */
    SIM_CONTEXT = 4,  /* needs a current context */
    SIM_UNSAFE = 8,   /* prohibited while a stream is capturing, see capture.c */
    SIM_BRACKET = 16, /* not meant by a rule for "*" */
    SIM_DOUBTFUL = 32 /* as SIM_UNSAFE by the manual; reported, but CUDA 13 allows it */
};

#define SIM_CALLS(X)                                                                               \
    X(cuGetProcAddress, SIM_EARLY)                                                                 \
    X(cuInit, SIM_EARLY)                                                                           \
    X(cuDriverGetVersion, SIM_EARLY)                                                               \
    X(cuGetErrorName, SIM_EARLY | SIM_ALWAYS | SIM_BRACKET)                                        \
    X(cuGetErrorString, SIM_EARLY | SIM_ALWAYS | SIM_BRACKET)                                      \
    X(cuDeviceGetCount, 0)                                                                         \
    X(cuDeviceGet, 0)                                                                              \
    X(cuDeviceGetName, 0)                                                                          \
    X(cuDeviceGetUuid, 0)                                                                          \
    X(cuDeviceTotalMem, 0)                                                                         \
    X(cuDeviceGetAttribute, 0)                                                                     \
    X(cuDevicePrimaryCtxRetain, 0)                                                                 \
    X(cuDevicePrimaryCtxRelease, 0)                                                                \
    X(cuDevicePrimaryCtxGetState, 0)                                                               \
    X(cuCtxGetCurrent, SIM_BRACKET)                                                                \
    X(cuCtxSetCurrent, SIM_BRACKET)                                                                \
    X(cuCtxPushCurrent, SIM_BRACKET)                                                               \
    X(cuCtxPopCurrent, SIM_BRACKET)                                                                \
    X(cuCtxGetDevice, SIM_CONTEXT)                                                                 \
    X(cuCtxGetStreamPriorityRange, SIM_CONTEXT)                                                    \
    X(cuCtxSynchronize, SIM_CONTEXT)                                                               \
    X(cuCtxRecordEvent, 0)                                                                         \
    X(cuThreadExchangeStreamCaptureMode, SIM_BRACKET)                                              \
    X(cuMemGetInfo, SIM_CONTEXT)                                                                   \
    X(cuMemGetAllocationGranularity, 0)                                                            \
    X(cuMemAddressReserve, SIM_DOUBTFUL)                                                           \
    X(cuMemAddressFree, SIM_DOUBTFUL)                                                              \
    X(cuMemCreate, SIM_DOUBTFUL)                                                                   \
    X(cuMemRelease, SIM_DOUBTFUL)                                                                  \
    X(cuMemMap, SIM_DOUBTFUL)                                                                      \
    X(cuMemUnmap, SIM_DOUBTFUL)                                                                    \
    X(cuMemSetAccess, SIM_DOUBTFUL)                                                                \
    X(cuMemGetAccess, 0)                                                                           \
    X(cuMemExportToShareableHandle, 0)                                                             \
    X(cuMemImportFromShareableHandle, SIM_UNSAFE)                                                  \
    X(cuMemAlloc, SIM_CONTEXT | SIM_UNSAFE)                                                        \
    X(cuMemFree, SIM_UNSAFE)                                                                       \
    X(cuMemHostAlloc, SIM_CONTEXT | SIM_UNSAFE)                                                    \
    X(cuMemFreeHost, SIM_UNSAFE)                                                                   \
    X(cuMemGetAddressRange, SIM_CONTEXT)                                                           \
    X(cuPointerGetAttribute, 0)                                                                    \
    X(cuMemcpy, SIM_CONTEXT | SIM_DOUBTFUL)                                                        \
    X(cuMemcpyAsync, SIM_CONTEXT)                                                                  \
    X(cuMemcpyHtoD, SIM_CONTEXT | SIM_DOUBTFUL)                                                    \
    X(cuMemcpyDtoH, SIM_CONTEXT | SIM_DOUBTFUL)                                                    \
    X(cuMemcpyDtoD, SIM_CONTEXT | SIM_DOUBTFUL)                                                    \
    X(cuMemcpyHtoDAsync, SIM_CONTEXT)                                                              \
    X(cuMemcpyDtoHAsync, SIM_CONTEXT)                                                              \
    X(cuMemcpyDtoDAsync, SIM_CONTEXT)                                                              \
    X(cuMemcpy2D, SIM_CONTEXT | SIM_DOUBTFUL)                                                      \
    X(cuMemcpy2DAsync, SIM_CONTEXT)                                                                \
    X(cuMemsetD8, SIM_CONTEXT | SIM_DOUBTFUL)                                                      \
    X(cuMemsetD8Async, 0)                                                                          \
    X(cuMemsetD2D8Async, SIM_CONTEXT)                                                              \
    X(cuModuleLoadData, SIM_CONTEXT | SIM_DOUBTFUL)                                                \
    X(cuModuleLoadDataEx, SIM_CONTEXT | SIM_DOUBTFUL)                                              \
    X(cuModuleGetFunction, SIM_CONTEXT)                                                            \
    X(cuModuleUnload, SIM_CONTEXT | SIM_UNSAFE)                                                    \
    X(cuFuncLoad, 0)                                                                               \
    X(cuFuncGetAttribute, 0)                                                                       \
    X(cuOccupancyMaxActiveBlocksPerMultiprocessor, 0)                                              \
    X(cuLaunchKernel, SIM_CONTEXT)                                                                 \
    X(cuLaunchHostFunc, SIM_CONTEXT)                                                               \
    X(cuEventCreate, SIM_CONTEXT)                                                                  \
    X(cuEventDestroy, 0)                                                                           \
    X(cuEventRecord, 0)                                                                            \
    X(cuEventRecordWithFlags, 0)                                                                   \
    X(cuEventQuery, SIM_UNSAFE)                                                                    \
    X(cuEventSynchronize, SIM_UNSAFE)                                                              \
    X(cuEventElapsedTime, 0)                                                                       \
    X(cuStreamCreate, SIM_CONTEXT)                                                                 \
    X(cuStreamCreateWithPriority, SIM_CONTEXT)                                                     \
    X(cuStreamDestroy, 0)                                                                          \
    X(cuStreamQuery, SIM_UNSAFE)                                                                   \
    X(cuStreamSynchronize, SIM_UNSAFE)                                                             \
    X(cuStreamWaitEvent, 0)                                                                        \
    X(cuStreamGetCtx, 0)                                                                           \
    X(cuStreamGetFlags, 0)                                                                         \
    X(cuStreamGetPriority, 0)                                                                      \
    X(cuStreamIsCapturing, 0)                                                                      \
    X(cuStreamGetCaptureInfo, 0)                                                                   \
    X(cuStreamBeginCapture, 0)                                                                     \
    X(cuStreamEndCapture, 0)                                                                       \
    X(cuGraphInstantiate, SIM_CONTEXT)                                                             \
    X(cuGraphInstantiateWithFlags, SIM_CONTEXT)                                                    \
    X(cuGraphInstantiateWithParams, SIM_CONTEXT)                                                   \
    X(cuUserObjectCreate, 0)                                                                       \
    X(cuUserObjectRetain, 0)                                                                       \
    X(cuUserObjectRelease, 0)                                                                      \
    X(cuGraphRetainUserObject, 0)                                                                  \
    X(cuGraphReleaseUserObject, 0)                                                                 \
    X(cuGraphGetNodes, 0)                                                                          \
    X(cuGraphLaunch, SIM_CONTEXT)                                                                  \
    X(cuGraphDestroy, 0)                                                                           \
    X(cuGraphExecDestroy, 0)

typedef enum sim_call {
#define SIM_CALL_ID(name, flags) SIM_##name,
    SIM_CALLS(SIM_CALL_ID)
#undef SIM_CALL_ID
        SIM_N_CALLS
} sim_call;

/* Take the lock and count the call. Any other answer than CUDA_SUCCESS is the call's own,
 * and the lock is not held. */
CUresult sim_enter(sim_call call);
/* Give the lock back; returns `status`. */
CUresult sim_leave(CUresult status);
/* The misuse of the present call: print it and abort, or return `status`. */
CUresult sim_refuse(CUresult status, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same for device work that goes wrong by itself: the context is lost with it. */
CUresult sim_late(const char *format, ...) __attribute__((format(printf, 1, 2)));
const char *sim_call_name(sim_call call);
unsigned long long sim_random(void);
/* VMM_SIM_LACKS names it. */
bool sim_lacks(const char *what);

/* In what the library is CUDA's or HIP's: in entry.c and hip_entry.c, of which it has one. */
typedef struct sim_vendor {
    const char *const *names; /* of the calls; NULL for those that it does not have */
    int driver_version;
    bool mappings_one_by_one; /* are unmapped and given access */
    bool has_default_device;  /* every thread has a current device from the start */
    /* The call for whose a stream is has no status: all that it can say is that this is none. */
    bool always_knows_streams;
    /* Take what a module is loaded from, and find in it where the names of kernels stand: NULL
     * where that cannot be told. */
    CUresult (*check_image)(const void *image, const void **code, size_t *bytes);
} sim_vendor;
extern const sim_vendor sim_vendor_here;

typedef struct sim_state {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* work finished, or may start */
    _Atomic pid_t process;  /* that called cuInit; 0 before */
    int n_devices;
    int driver_version;
    size_t granularity;
    unsigned long long memory; /* of each device */
    long delay_us;             /* < 0: the default */
    bool aborts, observe, races, junk, check_exit;
    CUresult poison; /* under VMM_SIM_STRICT=return, after device work went wrong */
    bool held;
    int n_waiting;
    struct sim_clock *host;
    struct sim_stream *streams;
    struct sim_capture *captures; /* not ended */
} sim_state;
extern sim_state sim;

/* ---- contexts (device.c) -------------------------------------------------------------- */
typedef struct sim_context {
    int device;
    int retained;
    struct sim_stream *legacy;  /* made at its first use */
    struct sim_clock *departed; /* of streams that are no more */
} sim_context;

sim_context *sim_current(void);
sim_context *sim_context_of(int device);
/* NULL if it is none. */
sim_context *sim_check_context(CUcontext context);

/* ---- clocks (clock.c) ----------------------------------------------------------------- */
typedef struct sim_clock {
    size_t n;
    uint64_t seq[];
} sim_clock;

uint64_t sim_clock_at(const sim_clock *clock, size_t slot);
void sim_clock_set(sim_clock **clock, size_t slot, uint64_t seq);
/* *into becomes the later of both in every slot. `from` may be NULL: the beginning. */
void sim_clock_merge(sim_clock **into, const sim_clock *from);
sim_clock *sim_clock_copy(const sim_clock *from);
bool sim_clock_passed(const sim_clock *clock); /* has all before it run? */
void sim_clock_wait(const sim_clock *clock);   /* lets go of the lock meanwhile */
void sim_observe(const sim_clock *clock);      /* the host has seen all before it finished */
bool sim_observed(size_t slot, uint64_t seq);
size_t sim_slot_take(void);
void sim_slot_give(size_t slot);
uint64_t sim_slot_next(size_t slot);
void sim_slot_submitted(size_t slot);
void sim_slot_completed(size_t slot);
uint64_t sim_slots_pending(void);

/* ---- memory (space.c, memory.c, alloc.c, race.c) ---------------------------------------- */
typedef struct sim_use { /* the last work of a slot that touches a mapping */
    size_t slot;
    uint64_t seq;
    const char *name;
} sim_use;

typedef struct sim_block { /* physical memory */
    CUmemGenericAllocationHandle handle;
    int device;
    size_t bytes;
    int fd; /* and where in it the memory lies */
    off_t offset;
    bool released;
    bool exportable;
    size_t n_mappings;
    struct sim_accesses *accesses;
} sim_block;

typedef struct sim_mapping {
    uintptr_t base;
    size_t bytes;
    sim_block *block;
    int access[SIM_MAX_DEVICES];
    sim_use *uses;
    size_t n_uses;
} sim_mapping;

typedef enum sim_space_kind { SIM_SPACE_VMM, SIM_SPACE_ALLOC, SIM_SPACE_HOST } sim_space_kind;

typedef struct sim_space { /* a reservation, or an allocation with its one mapping */
    sim_space_kind kind;
    uintptr_t base;
    size_t bytes;      /* as asked for */
    size_t span;       /* of the host's mapping */
    sim_mapping **map; /* sorted by address */
    size_t n_map, map_capacity;
    sim_context *context; /* of an allocation */
} sim_space;

sim_space *sim_space_find(uintptr_t address); /* that holds the address, or NULL */
sim_space *sim_space_add(sim_space_kind kind, uintptr_t base, size_t bytes, size_t span);
void sim_space_remove(sim_space *space);
/* The index of the first mapping that ends behind `address`; n_map if none does. */
size_t sim_space_seek(const sim_space *space, uintptr_t address);
void sim_space_insert(sim_space *space, size_t index, sim_mapping *mapping);
void sim_space_erase(sim_space *space, size_t index);
const sim_space *sim_space_at(size_t index); /* NULL past the end */
/* Is anything that touches the mapping not known to be finished? Reports it if so. */
CUresult sim_mapping_idle(const sim_mapping *mapping, const char *what);
bool sim_mapping_in_use(const sim_mapping *mapping);

void sim_memory_init(void);
sim_block *sim_block_create(int device, size_t bytes, bool exportable);
void sim_block_drop(sim_block *block); /* frees it once nothing holds it */
unsigned long long sim_memory_used(int device);
long sim_live_handles(void);
void sim_list_handles(void);

/* A piece of work that is about to be submitted. */
typedef struct sim_visit {
    const char *name;
    int device;
    size_t slot;
    uint64_t seq;
    const sim_clock *clock; /* what comes before it */
    bool note;              /* false: only look whether it may */
} sim_visit;

/* The work may touch any of these bytes, as far as they are mapped. */
void sim_note(const sim_visit *visit, uintptr_t address, size_t bytes);
/* The work touches these bytes of device memory. Refuses what is not mapped or accessible. */
CUresult sim_touch(const sim_visit *visit, uintptr_t address, size_t bytes, bool write);
CUresult sim_race_check(const sim_visit *visit, sim_block *block, uintptr_t offset, size_t bytes,
                        bool write);
void sim_race_forget(sim_block *block);

/* ---- device work (stream.c, copy.c, launch.c) ------------------------------------------- */
struct sim_op;

typedef struct sim_kernel {
    const char *name;
    size_t param_bytes; /* of its one parameter, by value */
    CUresult (*check)(const struct sim_op *op, const sim_visit *visit);
    void (*run)(const struct sim_op *op);
} sim_kernel;

typedef struct sim_copy {
    uintptr_t dst, src;
    size_t dst_pitch, src_pitch, width, height;
    bool dst_device, src_device;
} sim_copy;

typedef enum sim_op_kind {
    SIM_OP_COPY,
    SIM_OP_FILL,
    SIM_OP_KERNEL,
    SIM_OP_HOST,
    SIM_OP_TIME,   /* note the time for an event */
    SIM_OP_RECORD, /* in a graph: record an external event */
    SIM_OP_WAIT,   /* in a graph: wait for an external event */
    SIM_OP_EMPTY   /* in a graph: an event recorded before anything else */
} sim_op_kind;

typedef struct sim_op {
    sim_op_kind kind;
    const char *name;
    union {
        sim_copy copy;
        struct {
            sim_copy place;
            unsigned char value;
        } fill;
        struct {
            const sim_kernel *kernel;
            unsigned grid[3], block[3];
            void *params;
        } launch;
        struct {
            CUhostFn call;
            void *user_data;
        } host;
        struct sim_event *event;
    } u;
} sim_op;

typedef struct sim_work {
    sim_op op;
    uint64_t seq;
    sim_clock *after;
    struct sim_work *next;
} sim_work;

#define SIM_STREAM_ALIVE 0x57AEA11Eu
#define SIM_STREAM_DEAD 0x57AEDEADu

typedef struct sim_stream {
    uint32_t magic;
    sim_context *context;
    bool non_blocking, legacy, running;
    bool created; /* by cuStreamCreate, not by the simulator */
    int priority;
    size_t slot;
    sim_clock *clock;
    sim_work *head, *tail;
    size_t n_queued;
    pthread_cond_t wake;
    bool started, sleeping;
    struct sim_capture *capture;
    struct sim_nodes *frontier; /* in it: what the next node comes after */
    struct sim_stream *next;
} sim_stream;

/* The stream that a handle means (0, 1 and 2 too); reports and returns NULL if it is none,
 * with *status what to answer. */
sim_stream *sim_stream_of(CUstream handle, CUresult *status);
/* Everything that a stream's next work comes after, the default stream's rules included. */
const sim_clock *sim_stream_order(sim_stream *stream);
/* Give work to a stream, or to the graph it is being captured into. Takes op's parameters
 * over, also when it fails. */
CUresult sim_submit(sim_stream *stream, sim_op *op);
/* The part of sim_submit() behind the capture. */
CUresult sim_enqueue(sim_stream *stream, sim_op *op);
void sim_op_drop(sim_op *op);
sim_op sim_op_copy(const sim_op *op);
CUresult sim_op_check(const sim_op *op, const sim_visit *visit);
void sim_op_run(const sim_op *op);
/* A copy of all that has been given to a context, for the caller to free. */
sim_clock *sim_context_clock(const sim_context *context);
/* Under VMM_SIM_STRICT=return, when the context is lost: nothing queued will run. */
void sim_cancel_work(void);
/* Let everyone look again who waits for work to finish or to be let go. */
void sim_wake_streams(void);
bool sim_in_callback(void);
/* Call a function of the program's that may not call the driver. */
void sim_call_back(CUhostFn call, void *user_data);

CUresult sim_copy_check(const sim_copy *copy, const sim_visit *visit);
void sim_copy_run(const sim_copy *copy);
void sim_fill_run(const sim_copy *place, unsigned char value);
extern const sim_kernel sim_append_kernel, sim_append_kernel_wide, sim_append_kernel_pieces;
extern const sim_kernel sim_append_kernel_cursor, sim_cursor_kernel;
const sim_kernel *sim_find_kernel(const char *name);
/* For tests of the simulator that bring kernels of their own. 0, or -1 when it is full. */
int sim_register_kernel(const sim_kernel *kernel);

/* ---- events (event.c) --------------------------------------------------------------- */
#define SIM_EVENT_ALIVE 0xE7E27A11u
#define SIM_EVENT_DEAD 0xE7E2DEADu

typedef struct sim_event {
    uint32_t magic;
    sim_context *context;
    unsigned flags;
    bool recorded;
    sim_clock *clock;
    uint64_t time_ns;
    struct sim_capture *capture; /* last recorded in it, not as external */
    struct sim_nodes *frontier;
    uint64_t capture_id; /* that one's, which may have ended */
} sim_event;

sim_event *sim_event_of(CUevent handle, CUresult *status);
void sim_event_note_time(sim_event *event);
/* Record on a stream that is not capturing. */
CUresult sim_event_record_now(sim_event *event, sim_stream *stream);
void sim_events_forget(const struct sim_capture *capture);
long sim_live_events(void);

/* ---- captures and graphs (capture.c, graph.c) -------------------------------------------- */
typedef struct sim_nodes { /* indices of graph nodes */
    size_t n;
    size_t index[];
} sim_nodes;

typedef struct sim_node {
    sim_op op;
    sim_nodes *after;
} sim_node;

/* Something that graphs keep alive. */
typedef struct sim_user_object {
    uint32_t magic;
    unsigned long n_references;
    CUhostFn destroy;
    void *user_data;
} sim_user_object;

typedef struct sim_graph {
    uint32_t magic;
    sim_node *node;
    size_t n_nodes, capacity;
    sim_user_object **kept; /* one for each reference */
    size_t n_kept;
} sim_graph;

typedef struct sim_capture {
    uint64_t id;
    int mode;
    bool invalid;
    pthread_t thread;
    sim_stream *origin;
    sim_graph *graph;
    struct sim_capture *next;
} sim_capture;

/* Refuse a potentially unsafe call of this thread, as its capture mode says. */
CUresult sim_capture_unsafe(bool refused);
/* End a capture without a graph. */
void sim_capture_drop(sim_capture *capture);
/* Refuse use of the legacy stream while a blocking stream captures. */
CUresult sim_capture_implicit(const sim_stream *stream);
/* Refuse a call that makes no sense on a capturing stream. */
CUresult sim_capture_prohibits(const sim_stream *stream);
/* Refuse a call that takes in every stream of a context. */
CUresult sim_capture_context(const sim_context *context);
CUresult sim_capture_add(sim_stream *stream, const sim_op *op);
CUresult sim_capture_record(sim_stream *stream, sim_event *event);
CUresult sim_capture_wait(sim_stream *stream, sim_event *event);
void sim_capture_invalidate(sim_capture *capture);

sim_graph *sim_graph_new(void);
size_t sim_graph_add(sim_graph *graph, const sim_op *op, const sim_nodes *after);
void sim_graph_free(sim_graph *graph);

/* ---- memory for the simulator itself: these never fail ------------------------------------ */
void *sim_alloc(size_t bytes);
void *sim_grow(void *old, size_t bytes);

typedef struct sim_handles {
    void **item;
    size_t n, n_sorted, capacity;
} sim_handles;
void sim_handles_add(sim_handles *handles, void *handle);
bool sim_handles_has(sim_handles *handles, const void *handle);

#endif /* SIM_H */
