/* The simulated CUDA driver itself: every misuse it must catch is committed in a child of its
 * own, which must abort with the right message; what is right must pass. libvmm has no part
 * in this. Runs where VMM_CUDA_LIBRARY names the simulator. */
#include "check.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../libvmm/src/append.h"
#include "../sim/cuda_abi.h"
#include "../sim/vmm_sim.h"

#define GRANULE 65536

/* ---- the driver, loaded anew in each child ---------------------------------------------------- */
#define ENTRY_POINTS(X)                                                                            \
    X(cuInit)                                                                                      \
    X(cuGetProcAddress_v2)                                                                         \
    X(cuDeviceGetCount)                                                                            \
    X(cuDevicePrimaryCtxRetain)                                                                    \
    X(cuCtxSetCurrent)                                                                             \
    X(cuCtxSynchronize)                                                                            \
    X(cuCtxRecordEvent)                                                                            \
    X(cuThreadExchangeStreamCaptureMode)                                                           \
    X(cuMemGetAllocationGranularity)                                                               \
    X(cuMemAddressReserve)                                                                         \
    X(cuMemAddressFree)                                                                            \
    X(cuMemCreate)                                                                                 \
    X(cuMemRelease)                                                                                \
    X(cuMemMap)                                                                                    \
    X(cuMemUnmap)                                                                                  \
    X(cuMemSetAccess)                                                                              \
    X(cuMemAlloc_v2)                                                                               \
    X(cuMemFree_v2)                                                                                \
    X(cuMemHostAlloc)                                                                              \
    X(cuMemFreeHost)                                                                               \
    X(cuPointerGetAttribute)                                                                       \
    X(cuMemcpyHtoD_v2)                                                                             \
    X(cuMemcpyDtoH_v2)                                                                             \
    X(cuMemcpyDtoDAsync_v2)                                                                        \
    X(cuMemcpy2DAsync_v2)                                                                          \
    X(cuMemsetD8Async)                                                                             \
    X(cuModuleLoadData)                                                                            \
    X(cuModuleGetFunction)                                                                         \
    X(cuLaunchKernel)                                                                              \
    X(cuLaunchHostFunc)                                                                            \
    X(cuEventCreate)                                                                               \
    X(cuEventDestroy_v2)                                                                           \
    X(cuEventRecord)                                                                               \
    X(cuEventQuery)                                                                                \
    X(cuEventSynchronize)                                                                          \
    X(cuEventElapsedTime)                                                                          \
    X(cuStreamCreate)                                                                              \
    X(cuStreamDestroy_v2)                                                                          \
    X(cuStreamSynchronize)                                                                         \
    X(cuStreamWaitEvent)                                                                           \
    X(cuStreamIsCapturing)                                                                         \
    X(cuStreamBeginCapture_v2)                                                                     \
    X(cuStreamEndCapture)                                                                          \
    X(cuGraphInstantiateWithFlags)                                                                 \
    X(cuGraphLaunch)                                                                               \
    X(cuGraphDestroy)                                                                              \
    X(cuGraphExecDestroy)                                                                          \
    X(vmm_sim_version)                                                                             \
    X(vmm_sim_fail)                                                                                \
    X(vmm_sim_failed)                                                                              \
    X(vmm_sim_reset)                                                                               \
    X(vmm_sim_calls)                                                                               \
    X(vmm_sim_live)                                                                                \
    X(vmm_sim_hold)                                                                                \
    X(vmm_sim_go)                                                                                  \
    X(vmm_sim_quiesce)                                                                             \
    X(vmm_sim_pending)                                                                             \
    X(vmm_sim_reports)                                                                             \
    X(vmm_sim_last_report)

static struct {
#define FIELD(name) __typeof__(name) *name;
    ENTRY_POINTS(FIELD)
#undef FIELD
} sim;

#define OK(call) CHECK_CUDA(sim.call)
#define GIVES(call, expected)                                                                      \
    do {                                                                                           \
        int code_ = sim.call;                                                                      \
        if (code_ != (expected))                                                                   \
            FAIL("%s returned %d, not %s", #call, code_, #expected);                               \
    } while (0)

static bool load(void) {
    void *library = dlopen(getenv("VMM_CUDA_LIBRARY"), RTLD_NOW | RTLD_LOCAL);
    if (!library || !dlsym(library, "vmm_sim_version"))
        return false;
#define LOAD(name)                                                                                 \
    *(void **)&sim.name = dlsym(library, #name);                                                   \
    CHECK(sim.name);
    ENTRY_POINTS(LOAD)
#undef LOAD
    return true;
}

/* ---- what most cases begin with --------------------------------------------------------------- */
static CUcontext context;
static CUdeviceptr base; /* eight granules of address space */
static CUmemGenericAllocationHandle first;
static CUstream stream, other;
static const CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                         .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};

static void begin(void) {
    OK(cuInit(0));
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxSetCurrent(context));
    OK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    OK(cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
}

static void reserved(void) {
    begin();
    OK(cuMemAddressReserve(&base, 8 * GRANULE, 0, 0, 0));
    OK(cuMemCreate(&first, GRANULE, &prop, 0));
}

static void grant(CUdeviceptr at, size_t bytes, int flags) {
    const CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, flags};
    OK(cuMemSetAccess(at, bytes, &access, 1));
}

static void mapped(void) {
    reserved();
    OK(cuMemMap(base, GRANULE, 0, first, 0));
}

static void usable(void) {
    mapped();
    grant(base, GRANULE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
}

static void close_all(void) {
    OK(cuMemUnmap(base, GRANULE));
    OK(cuMemRelease(first));
    OK(cuMemAddressFree(base, 8 * GRANULE));
}

static void fill(CUstream on) {
    OK(cuMemsetD8Async(base, 1, GRANULE, on));
}

/* ---- memory ------------------------------------------------------------------------------------ */
static void map_twice(void) {
    CUmemGenericAllocationHandle second;
    mapped();
    OK(cuMemCreate(&second, GRANULE, &prop, 0));
    sim.cuMemMap(base, GRANULE, 0, second, 0);
}

static void map_over_the_middle(void) {
    CUmemGenericAllocationHandle large;
    reserved();
    OK(cuMemMap(base + 2 * GRANULE, GRANULE, 0, first, 0));
    OK(cuMemCreate(&large, 4 * GRANULE, &prop, 0));
    sim.cuMemMap(base, 4 * GRANULE, 0, large, 0);
}

static void map_misaligned(void) {
    reserved();
    sim.cuMemMap(base + 4096, GRANULE, 0, first, 0);
}

static void map_outside(void) {
    CUmemGenericAllocationHandle large;
    reserved();
    OK(cuMemCreate(&large, 2 * GRANULE, &prop, 0));
    sim.cuMemMap(base + 7 * GRANULE, 2 * GRANULE, 0, large, 0);
}

static void map_with_an_offset(void) {
    reserved();
    sim.cuMemMap(base, GRANULE, 4096, first, 0);
}

static void map_a_part(void) {
    CUmemGenericAllocationHandle large;
    reserved();
    OK(cuMemCreate(&large, 2 * GRANULE, &prop, 0));
    sim.cuMemMap(base, GRANULE, 0, large, 0);
}

static void map_a_released_handle(void) {
    reserved();
    OK(cuMemRelease(first));
    sim.cuMemMap(base, GRANULE, 0, first, 0);
}

static void release_twice(void) {
    mapped();
    OK(cuMemRelease(first));
    sim.cuMemRelease(first);
}

static void create_an_odd_size(void) {
    CUmemGenericAllocationHandle handle;
    begin();
    sim.cuMemCreate(&handle, GRANULE + 4096, &prop, 0);
}

static void access_unmapped(void) {
    mapped();
    grant(base, 2 * GRANULE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
}

static void unmap_a_part(void) {
    CUmemGenericAllocationHandle large;
    reserved();
    OK(cuMemCreate(&large, 2 * GRANULE, &prop, 0));
    OK(cuMemMap(base, 2 * GRANULE, 0, large, 0));
    sim.cuMemUnmap(base, GRANULE);
}

static void unmap_nothing(void) {
    reserved();
    sim.cuMemUnmap(base, GRANULE);
}

static void free_with_a_mapping(void) {
    mapped();
    sim.cuMemAddressFree(base, 8 * GRANULE);
}

static void free_another_size(void) {
    reserved();
    sim.cuMemAddressFree(base, 4 * GRANULE);
}

static void host_reads_unmapped(void) {
    mapped();
    signal(SIGSEGV, SIG_DFL); /* a sanitizer has its own */
    printf("%d\n", *(volatile char *)(uintptr_t)base);
}

/* Whole life, several mappings unmapped at once, alias of a block, memory counted and back. */
static void right_memory(void) {
    CUdeviceptr alias;
    long handles, mappings, reservations;
    unsigned long long bytes;
    CUmemGenericAllocationHandle second;
    int is_mapped = -1, type = 0;
    usable();
    OK(cuMemCreate(&second, 2 * GRANULE, &prop, 0));
    OK(cuMemMap(base + GRANULE, 2 * GRANULE, 0, second, 0));
    grant(base, 3 * GRANULE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    OK(cuMemRelease(second)); /* while mapped: memory stays */
    memset((void *)(uintptr_t)base, 7, 3 * GRANULE);
    OK(cuMemAddressReserve(&alias, GRANULE, 0, 0, 0));
    OK(cuMemMap(alias, GRANULE, 0, first, 0));
    grant(alias, GRANULE, CU_MEM_ACCESS_FLAGS_PROT_READ);
    CHECK(*(char *)(uintptr_t)alias == 7);
    OK(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, base));
    CHECK(type == CU_MEMORYTYPE_DEVICE);
    OK(cuPointerGetAttribute(&is_mapped, CU_POINTER_ATTRIBUTE_MAPPED, base + 7 * GRANULE));
    CHECK(is_mapped == 0);
    GIVES(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, (uintptr_t)&alias),
          CUDA_ERROR_INVALID_VALUE);
    sim.vmm_sim_live(&handles, &mappings, &reservations, &bytes);
    CHECK(handles == 1 && mappings == 3 && reservations == 2 && bytes == 3 * GRANULE);
    OK(cuMemUnmap(base, 3 * GRANULE));
    OK(cuMemUnmap(alias, GRANULE));
    OK(cuMemRelease(first));
    OK(cuMemAddressFree(alias, GRANULE));
    OK(cuMemAddressFree(base, 8 * GRANULE));
    sim.vmm_sim_live(&handles, &mappings, &reservations, &bytes);
    CHECK(handles == 0 && mappings == 0 && reservations == 0 && bytes == 0);
}

static void right_out_of_memory(void) {
    CUmemGenericAllocationHandle handle[16];
    int n = 0;
    CUdeviceptr huge;
    begin();
    while (n < 16 && sim.cuMemCreate(&handle[n], GRANULE, &prop, 0) == CUDA_SUCCESS)
        n++;
    CHECK(n == 4);
    OK(cuMemRelease(handle[0]));
    OK(cuMemCreate(&handle[0], GRANULE, &prop, 0));
    GIVES(cuMemAlloc_v2(&huge, 1), CUDA_ERROR_OUT_OF_MEMORY);
    GIVES(cuMemAddressReserve(&huge, (size_t)128 << 40, 0, 0, 0), CUDA_ERROR_OUT_OF_MEMORY);
}

/* ---- work -------------------------------------------------------------------------------------- */
static void write_without_access(void) {
    mapped();
    fill(stream);
}

static void write_read_only(void) {
    mapped();
    grant(base, GRANULE, CU_MEM_ACCESS_FLAGS_PROT_READ);
    fill(stream);
}

static void write_past_the_mapping(void) {
    usable();
    OK(cuMemsetD8Async(base + 1, 1, GRANULE, stream));
}

static void copy_a_huge_pitch(void) {
    usable();
    const CUDA_MEMCPY2D copy = {.srcMemoryType = CU_MEMORYTYPE_HOST,
                                .srcHost = &base,
                                .srcPitch = 8,
                                .dstMemoryType = CU_MEMORYTYPE_DEVICE,
                                .dstDevice = base,
                                .dstPitch = (size_t)1 << 31,
                                .WidthInBytes = 4,
                                .Height = 2};
    sim.cuMemcpy2DAsync_v2(&copy, stream);
}

static void use_a_destroyed_stream(void) {
    usable();
    OK(cuStreamDestroy_v2(stream));
    sim.cuMemsetD8Async(base, 1, 1, stream);
}

static void use_a_destroyed_event(void) {
    CUevent event;
    begin();
    OK(cuEventCreate(&event, 0));
    OK(cuEventDestroy_v2(event));
    sim.cuEventRecord(event, stream);
}

static CUfunction append_kernel(void) {
    static const char ptx[] =
        ".version 6.3\n.target sm_75\n.entry " VMM_APPEND_KERNEL "\n" /* by name: */;
    CUmodule module;
    CUfunction function;
    OK(cuModuleLoadData(&module, ptx));
    OK(cuModuleGetFunction(&function, module, VMM_APPEND_KERNEL));
    GIVES(cuModuleGetFunction(&function, module, "no_such_kernel"), CUDA_ERROR_NOT_FOUND);
    return function;
}

/* Copy 3 x 8 bytes, 16 apart at the source, dense at the destination. */
static int launch(CUdeviceptr dst, CUdeviceptr src, unsigned unit, unsigned threads) {
    vmm_append_args args = {{{.dst = dst,
                              .src = src,
                              .n_units = 24 / unit,
                              .run_units = 8 / unit,
                              .unit_bytes = unit,
                              .n_outer = 1,
                              .count = {3},
                              .dst_stride = {8},
                              .src_stride = {16}}}};
    void *params[] = {&args};
    CUfunction kernel = append_kernel();
    return sim.cuLaunchKernel(kernel, 1, 1, 1, threads, 1, 1, 0, stream, params, NULL);
}

static void launch_over_unmapped(void) {
    usable();
    launch(base + GRANULE - 16, base, 8, VMM_APPEND_BLOCK_THREADS);
}

static void launch_misaligned(void) {
    usable();
    launch(base + 4, base + 64, 8, VMM_APPEND_BLOCK_THREADS);
}

static void launch_other_threads(void) {
    usable();
    launch(base, base + 64, 8, 64);
}

static void right_launch(void) {
    usable();
    uint64_t *memory = (uint64_t *)(uintptr_t)base;
    for (uint64_t i = 0; i < 6; i++)
        memory[64 + i] = i;
    CHECK(launch(base, base + 512, 4, VMM_APPEND_BLOCK_THREADS) == CUDA_SUCCESS);
    OK(cuStreamSynchronize(stream));
    CHECK(memory[0] == 0 && memory[1] == 2 && memory[2] == 4);
    close_all();
}

static void load_garbage(void) {
    CUmodule module;
    begin();
    sim.cuModuleLoadData(&module, "not a kernel");
}

static void right_old_driver(void) {
    static const uint32_t fatbin[] = {0xBA55ED50u, 1, 0, 0};
    CUmodule module;
    void *address;
    int found;
    begin();
    GIVES(cuModuleLoadData(&module, fatbin), CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    GIVES(cuModuleLoadData(&module, ".version 9.0\n.target sm_75\n"),
          CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    OK(cuGetProcAddress_v2("cuCtxRecordEvent", &address, 12000, 0, &found));
    CHECK(!address && found == CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
    OK(cuGetProcAddress_v2("cuMemAlloc", &address, 12000, 0, &found));
    CHECK(address == (void *)sim.cuMemAlloc_v2);
}

static void no_init(void) {
    int count;
    sim.cuDeviceGetCount(&count);
}

static void no_context(void) {
    CUstream created;
    OK(cuInit(0));
    sim.cuStreamCreate(&created, 0);
}

static void call_driver(void *unused) {
    int count;
    (void)unused;
    sim.cuDeviceGetCount(&count);
}

static void call_in_a_callback(void) {
    begin();
    OK(cuLaunchHostFunc(stream, call_driver, NULL));
    sim.vmm_sim_quiesce();
}

static void use_a_stream_of_another_device(void) {
    usable();
    OK(cuDevicePrimaryCtxRetain(&context, 1));
    OK(cuCtxSetCurrent(context));
    fill(stream);
}

static void call_in_a_forked_child(void) {
    int status;
    begin();
    pid_t child = fork();
    if (child == 0) {
        call_driver(NULL);
        _exit(0);
    }
    waitpid(child, &status, 0);
    CHECK(WIFSIGNALED(status));
    abort();
}

/* ---- late, unordered ------------------------------------------------------------------------------ */
static void unmap_without_a_fence(void) {
    usable();
    fill(stream);
    sim.cuMemUnmap(base, GRANULE);
}

/* It has run, but nobody asked: luck is no fence. */
static void unmap_by_luck(void) {
    usable();
    fill(stream);
    sim.vmm_sim_quiesce();
    sim.cuMemUnmap(base, GRANULE);
}

static void unmap_behind_an_early_fence(void) {
    CUevent event;
    usable();
    fill(stream);
    OK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(cuCtxRecordEvent(context, event));
    fill(stream);
    OK(cuEventSynchronize(event));
    sim.cuMemUnmap(base, GRANULE);
}

static void right_fence(void) {
    CUevent event;
    usable();
    sim.vmm_sim_hold();
    fill(stream);
    OK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(cuCtxRecordEvent(context, event));
    OK(cuStreamDestroy_v2(stream));
    GIVES(cuEventQuery(event), CUDA_ERROR_NOT_READY);
    CHECK(sim.vmm_sim_pending() == 1);
    sim.vmm_sim_go();
    while (sim.cuEventQuery(event) == CUDA_ERROR_NOT_READY)
        usleep(100);
    CHECK(*(char *)(uintptr_t)base == 1);
    close_all();
}

static void right_luck_where_it_is_allowed(void) {
    usable();
    fill(stream);
    sim.vmm_sim_quiesce();
    close_all();
}

static void write_on_two_streams(void) {
    usable();
    fill(stream);
    fill(other);
}

static void right_hand_off(void) {
    CUevent event, start, stop;
    CUstream blocking;
    float milliseconds = -1;
    usable();
    OK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(cuEventCreate(&start, 0));
    OK(cuEventCreate(&stop, 0));
    OK(cuStreamCreate(&blocking, 0));
    OK(cuEventRecord(start, stream));
    fill(stream);
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(other, event, 0));
    fill(other);
    OK(cuEventRecord(stop, other));
    OK(cuEventRecord(event, other));
    OK(cuStreamWaitEvent(NULL, event, 0)); /* the default stream, and so the blocking one */
    fill(blocking);
    fill(NULL);
    fill(blocking);
    OK(cuStreamSynchronize(blocking));
    OK(cuEventElapsedTime(&milliseconds, start, stop));
    CHECK(milliseconds >= 0);
    close_all();
}

/* ---- captures --------------------------------------------------------------------------------------- */
static CUgraph graph;

static void captured(int mode) {
    OK(cuStreamBeginCapture_v2(stream, mode));
}

static void fence_in_a_capture(void) {
    CUevent event;
    begin();
    OK(cuEventCreate(&event, 0));
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    sim.cuCtxRecordEvent(context, event);
}

static void synchronize_in_a_capture(void) {
    begin();
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    sim.cuCtxSynchronize();
}

static void default_stream_in_a_capture(void) {
    CUstream blocking;
    usable();
    OK(cuStreamCreate(&blocking, 0));
    OK(cuStreamBeginCapture_v2(blocking, CU_STREAM_CAPTURE_MODE_RELAXED));
    sim.cuMemsetD8Async(base, 1, 1, NULL);
}

static void allocate_in_a_capture(void) {
    CUdeviceptr address;
    begin();
    captured(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    sim.cuMemAlloc_v2(&address, 1);
}

static void *create_block(void *relaxed) {
    int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    CUmemGenericAllocationHandle handle;
    if (relaxed)
        OK(cuThreadExchangeStreamCaptureMode(&mode));
    OK(cuMemCreate(&handle, GRANULE, &prop, 0));
    return NULL;
}

static void create_elsewhere(void *relaxed) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, create_block, relaxed) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

static void allocate_elsewhere(void) {
    begin();
    captured(CU_STREAM_CAPTURE_MODE_GLOBAL);
    create_elsewhere(NULL);
}

static void wait_for_the_outside(void) {
    CUevent event;
    begin();
    OK(cuEventCreate(&event, 0));
    OK(cuEventRecord(event, other));
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    sim.cuStreamWaitEvent(stream, event, 0);
}

static void query_a_captured_event(void) {
    CUevent event;
    begin();
    OK(cuEventCreate(&event, 0));
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    OK(cuEventRecord(event, stream));
    sim.cuEventQuery(event);
}

static void leave_work_unjoined(void) {
    CUevent event;
    usable();
    OK(cuEventCreate(&event, 0));
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(other, event, 0));
    fill(other);
    sim.cuStreamEndCapture(stream, &graph);
}

static void launch_over_what_was_unmapped(void) {
    CUgraphExec exec;
    usable();
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    fill(stream);
    OK(cuStreamEndCapture(stream, &graph));
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(cuMemUnmap(base, GRANULE));
    sim.cuGraphLaunch(exec, stream);
}

/* Two streams, a hand-off from outside, a replay; growth by a relaxed thread meanwhile. */
static void right_capture(void) {
    CUevent event, outside;
    CUgraphExec exec;
    int state;
    usable();
    memset((void *)(uintptr_t)base, 0, GRANULE);
    OK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(cuEventCreate(&outside, CU_EVENT_DISABLE_TIMING));
    OK(cuEventRecord(outside, other));
    captured(CU_STREAM_CAPTURE_MODE_GLOBAL);
    create_elsewhere(&state);
    OK(cuStreamWaitEvent(stream, outside, CU_EVENT_WAIT_EXTERNAL));
    OK(cuMemsetD8Async(base, 5, 8, stream));
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(other, event, 0));
    OK(cuMemcpyDtoDAsync_v2(base + 8, base, 8, other));
    OK(cuEventRecord(event, other));
    OK(cuStreamWaitEvent(stream, event, 0));
    OK(cuStreamIsCapturing(other, &state));
    CHECK(state == CU_STREAM_CAPTURE_STATUS_ACTIVE);
    OK(cuStreamEndCapture(stream, &graph));
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(cuGraphDestroy(graph));
    CHECK(((char *)(uintptr_t)base)[8] == 0); /* nothing has run yet */
    for (int i = 0; i < 2; i++) {
        OK(cuGraphLaunch(exec, stream));
        OK(cuStreamSynchronize(stream));
        CHECK(((char *)(uintptr_t)base)[15] == 5);
    }
    OK(cuGraphExecDestroy(exec));
    close_all();
}

/* ---- made to fail; what the driver returns -------------------------------------------------------- */
static void right_failures(void) {
    begin();
    sim.vmm_sim_reset();
    CHECK(sim.vmm_sim_fail("cuMemAddressReserve", 2, CUDA_ERROR_OUT_OF_MEMORY, 1) == 0);
    CHECK(sim.vmm_sim_fail("no such call", 1, 1, 1) == -1);
    OK(cuMemAddressReserve(&base, GRANULE, 0, 0, 0));
    GIVES(cuMemAddressReserve(&base, GRANULE, 0, 0, 0), CUDA_ERROR_OUT_OF_MEMORY);
    OK(cuMemAddressReserve(&base, GRANULE, 0, 0, 0));
    CHECK(sim.vmm_sim_fail("*", 2, CUDA_ERROR_NOT_READY, 2) == 0);
    OK(cuCtxSynchronize());
    OK(cuCtxSetCurrent(context)); /* not meant by "*" */
    GIVES(cuCtxSynchronize(), CUDA_ERROR_NOT_READY);
    GIVES(cuMemCreate(&first, GRANULE, &prop, 0), CUDA_ERROR_NOT_READY);
    OK(cuMemCreate(&first, GRANULE, &prop, 0));
    CHECK(sim.vmm_sim_calls("cuMemAddressReserve") == 3 && sim.vmm_sim_failed() == 3);
    CHECK(sim.vmm_sim_calls("*") == 8);
}

static void right_rules_of_the_environment(void) {
    begin();
    OK(cuMemAddressReserve(&base, GRANULE, 0, 0, 0));
    GIVES(cuMemCreate(&first, GRANULE, &prop, 0), 719);
    GIVES(cuMemCreate(&first, GRANULE, &prop, 0), 719);
    OK(cuMemCreate(&first, GRANULE, &prop, 0));
}

static void right_returns(void) {
    int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    usable();
    GIVES(cuMemMap(base, GRANULE, 0, first, 0), CUDA_ERROR_INVALID_VALUE);
    GIVES(cuMemsetD8Async(base, 1, 2 * GRANULE, stream), CUDA_ERROR_INVALID_VALUE);
    CHECK(sim.vmm_sim_reports() == 2 && strstr(sim.vmm_sim_last_report(), "cuMemsetD8Async"));
    captured(CU_STREAM_CAPTURE_MODE_GLOBAL);
    GIVES(cuCtxSynchronize(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    GIVES(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    CHECK(!graph);
    captured(CU_STREAM_CAPTURE_MODE_GLOBAL);
    GIVES(cuMemRelease(first), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    OK(cuThreadExchangeStreamCaptureMode(&mode));
    CHECK(mode == CU_STREAM_CAPTURE_MODE_GLOBAL);
    OK(cuMemRelease(first));
    GIVES(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    fill(stream);
    sim.cuMemUnmap(base, GRANULE); /* too early: the context is lost */
    GIVES(cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
    GIVES(cuMemAddressFree(base, 8 * GRANULE), CUDA_ERROR_ILLEGAL_ADDRESS);
}

static void leave_things_behind(void) {
    mapped();
}

/* ---- the cases ---------------------------------------------------------------------------------- */
typedef struct test_case {
    const char *name;
    void (*run)(void);
    const char *message; /* of the abort; NULL: must pass */
    const char *setting, *value;
} test_case;

#define MISUSE(function, message) {#function, function, message, NULL, NULL}
#define RIGHT(function) {#function, function, NULL, NULL, NULL}
#define RIGHT_WITH(function, setting, value) {#function, function, NULL, setting, value}

static const test_case cases[] = {
    MISUSE(map_twice, "vmm-sim: cuMemMap: "),
    MISUSE(map_over_the_middle, "overlaps the mapping"),
    MISUSE(map_misaligned, "is not aligned space"),
    MISUSE(map_outside, "of one reservation"),
    MISUSE(map_with_an_offset, "cuMemMap: offset 4096"),
    MISUSE(map_a_part, "maps whole"),
    MISUSE(map_a_released_handle, "was released before"),
    MISUSE(release_twice, "cuMemRelease: handle"),
    MISUSE(create_an_odd_size, "cuMemCreate: "),
    MISUSE(access_unmapped, "cuMemSetAccess: "),
    MISUSE(unmap_a_part, "cuts the mapping"),
    MISUSE(unmap_nothing, "cuMemUnmap: "),
    MISUSE(free_with_a_mapping, "still has 1 mappings"),
    MISUSE(free_another_size, "is not one reservation"),
    MISUSE(host_reads_unmapped, ""),
    RIGHT_WITH(right_memory, "VMM_SIM_CHECK_EXIT", "1"),
    RIGHT_WITH(right_out_of_memory, "VMM_SIM_MEMORY", "262144"),
    MISUSE(write_without_access, "mapped but without access"),
    MISUSE(write_read_only, "mapped but read-only"),
    MISUSE(write_past_the_mapping, "unmapped from"),
    MISUSE(copy_a_huge_pitch, "cuMemcpy2DAsync: destination pitch"),
    MISUSE(use_a_destroyed_stream, "was destroyed before"),
    MISUSE(use_a_destroyed_event, "cuEventRecord: event"),
    MISUSE(launch_over_unmapped, "cuLaunchKernel: " VMM_APPEND_KERNEL " writes"),
    MISUSE(launch_misaligned, "is no multiple of 8"),
    MISUSE(launch_other_threads, "made for blocks of 128"),
    RIGHT(right_launch),
    MISUSE(load_garbage, "neither a fatbin"),
    RIGHT_WITH(right_old_driver, "VMM_SIM_DRIVER_VERSION", "12000"),
    MISUSE(no_init, "called before cuInit"),
    MISUSE(no_context, "no context is current"),
    MISUSE(call_in_a_callback, "called inside a host callback"),
    {"use_a_stream_of_another_device", use_a_stream_of_another_device, "belongs to device 0",
     "VMM_SIM_DEVICES", "2"},
    MISUSE(call_in_a_forked_child, "called in a forked child"),
    MISUSE(unmap_without_a_fence, "vmm-sim: late work: cuMemUnmap"),
    MISUSE(unmap_by_luck, "a fence is missing"),
    MISUSE(unmap_behind_an_early_fence, "a fence is missing"),
    RIGHT(right_fence),
    RIGHT_WITH(right_luck_where_it_is_allowed, "VMM_SIM_OBSERVE", "0"),
    MISUSE(write_on_two_streams, "nothing orders the two streams"),
    RIGHT_WITH(right_hand_off, "VMM_SIM_DELAY_US", "3000"),
    MISUSE(fence_in_a_capture, "cuCtxRecordEvent: a fence"),
    MISUSE(synchronize_in_a_capture, "cuCtxSynchronize: a fence"),
    MISUSE(default_stream_in_a_capture, "the default stream is used"),
    MISUSE(allocate_in_a_capture, "cuMemAlloc: unsafe"),
    MISUSE(allocate_elsewhere, "cuMemCreate: unsafe"),
    MISUSE(wait_for_the_outside, "was recorded outside"),
    MISUSE(query_a_captured_event, "was last recorded in a capture"),
    MISUSE(leave_work_unjoined, "was not joined"),
    MISUSE(launch_over_what_was_unmapped, "cuGraphLaunch: "),
    RIGHT(right_capture),
    RIGHT(right_failures),
    RIGHT_WITH(right_rules_of_the_environment, "VMM_SIM_FAIL", "cuMemCreate:1:719:2"),
    RIGHT_WITH(right_returns, "VMM_SIM_STRICT", "return"),
    {"leave_things_behind", leave_things_behind, "1 handles, 1 mappings, 1 reservations are left",
     "VMM_SIM_CHECK_EXIT", "1"},
};

static void run_child(const test_case *c, int output) {
    dup2(output, 1);
    dup2(output, 2);
    setenv("VMM_SIM_GRANULARITY", "65536", 1);
    if (c && c->setting)
        setenv(c->setting, c->value, 1);
    if (!load())
        exit(77);
    if (c)
        c->run();
    exit(0);
}

/* Returns waitpid's status; `text` gets what the child said. */
static int run_case(const test_case *c, char *text, size_t size) {
    int ends[2], status;
    size_t n = 0;
    ssize_t got;
    CHECK(pipe(ends) == 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        close(ends[0]);
        run_child(c, ends[1]);
    }
    close(ends[1]);
    while (n + 1 < size && (got = read(ends[0], text + n, size - 1 - n)) > 0)
        n += (size_t)got;
    text[n] = 0;
    close(ends[0]);
    CHECK(waitpid(child, &status, 0) == child);
    return status;
}

int main(int argc, char **argv) {
    char text[4096];
    int n_failed = 0;
    if (argc > 1 && strcmp(argv[1], "host") == 0)
        SKIP("the host has no simulated driver");
    if (!getenv("VMM_CUDA_LIBRARY"))
        SKIP("VMM_CUDA_LIBRARY is not set");
    unsetenv("VMM_SIM_CHECK_EXIT"); /* the cases that leave nothing behind ask for it */
    int status = run_case(NULL, text, sizeof text);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        SKIP("VMM_CUDA_LIBRARY is not the simulator");
    for (size_t i = 0; i < LENGTH_OF(cases); i++) {
        const test_case *c = &cases[i];
        status = run_case(c, text, sizeof text);
        bool passed;
        if (!c->message)
            passed = WIFEXITED(status) && WEXITSTATUS(status) == 0;
        else if (c->run == leave_things_behind)
            passed = WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(text, c->message);
        else
            passed = WIFSIGNALED(status) && strstr(text, c->message) &&
                     WTERMSIG(status) == (*c->message ? SIGABRT : SIGSEGV);
        if (!passed)
            printf("%s: status 0x%x, said: %s\n", c->name, (unsigned)status, text);
        n_failed += !passed;
    }
    return n_failed ? 1 : 0;
}
