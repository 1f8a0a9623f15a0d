/* driver.c - the driver's start, entry points, errors by name, devices, contexts, and where it
 * must not be called. */
#include "probe.h"

#include <sys/wait.h>
#include <unistd.h>

/* ---- before the start ------------------------------------------------------------------- */
static void before_init(void) {
    int n = 0;
    CUcontext current;
    CUdeviceptr base;
    const char *name;
    TRY(cuDriverGetVersion, &n);
    TRY(cuGetErrorName, CUDA_ERROR_INVALID_VALUE, &name);
    TRY(cuDeviceGetCount, &n);
    TRY(cuCtxGetCurrent, &current);
    TRY(cuMemAddressReserve, &base, 2 << 20, 0, 0, 0);
    TRY(cuCtxSynchronize);
    TRY_AS("cuInit(1)", cuInit, 1);
    TRY(cuInit, 0);
    TRY(cuDeviceGetCount, &n);
}

static void without_a_context(void) {
    CUstream stream = new_stream(CU_STREAM_NON_BLOCKING);
    CUevent event = new_event(), other = NULL;
    CUstream created = NULL;
    CUcontext found = NULL;
    CUdeviceptr memory = 0, base = new_space(2);
    size_t free_bytes, total;
    int value = 0;
    static char host[64];
    put_block(base, 1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    MUST(cuCtxSetCurrent, NULL);
    TRY(cuCtxGetCurrent, &found);
    say("%s", found ? "there is one" : "none is current");
    TRY(cuCtxGetDevice, &value);
    TRY(cuCtxSynchronize);
    TRY(cuMemGetInfo, &free_bytes, &total);
    TRY(cuMemAlloc, &memory, 64);
    TRY(cuStreamCreate, &created, 0);
    TRY(cuEventCreate, &other, 0);
    CUdeviceptr space = 0;
    CUmemGenericAllocationHandle block = 0;
    TRY(cuMemAddressReserve, &space, granule, 0, 0, 0);
    TRY(cuMemCreate, &block, granule, &block_prop, 0);
    TRY(cuMemMap, space, granule, 0, block, 0);
    say_code("cuMemSetAccess", set_access(space, granule, CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
    TRY(cuMemUnmap, space, granule);
    TRY(cuMemRelease, block);
    TRY(cuMemAddressFree, space, granule);
    TRY(cuMemcpyHtoD, base, host, 64);
    TRY(cuMemsetD8Async, base, 1, 64, stream);
    TRY(cuEventRecord, event, stream);
    TRY(cuStreamWaitEvent, stream, event, 0);
    TRY(cuEventSynchronize, event);
    TRY(cuEventQuery, event);
    TRY(cuStreamSynchronize, stream);
    TRY(cuStreamQuery, stream);
    TRY(cuCtxRecordEvent, context, event);
    TRY(cuStreamGetCtx, stream, &found);
    TRY(cuStreamIsCapturing, stream, &value);
    TRY_AS("legacy cuStreamQuery", cuStreamQuery, CU_STREAM_LEGACY);
    TRY_AS("legacy cuStreamGetCtx", cuStreamGetCtx, CU_STREAM_LEGACY, &found);
    TRY(cuPointerGetAttribute, &value, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, base);
    TRY(cuEventDestroy, event);
}

static void in_a_forked_child(void) {
    int status = 0, n, codes[3] = {0};
    int ends[2];
    if (pipe(ends) != 0)
        return;
    pid_t child = fork();
    if (child == 0) {
        CUdeviceptr base;
        codes[0] = cuda.cuDeviceGetCount(&n);
        codes[1] = cuda.cuMemAddressReserve(&base, granule, 0, 0, 0);
        codes[2] = cuda.cuInit(0);
        _exit(write(ends[1], codes, sizeof codes) == sizeof codes ? 0 : 1);
    }
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || read(ends[0], codes, sizeof codes) != sizeof codes) {
        say("the child died");
        return;
    }
    say_code("cuDeviceGetCount", codes[0]);
    say_code("cuMemAddressReserve", codes[1]);
    say_code("cuInit", codes[2]);
}

/* ---- entry points, errors ------------------------------------------------------------------ */
static void look_up(const char *word, const char *name, int version) {
    void *address = NULL;
    int found = 99;
    TRY_AS(word, cuGetProcAddress, name, &address, version, CU_GET_PROC_ADDRESS_LEGACY_STREAM,
           &found);
    say("found %d, %s", found, address ? "an address" : "none");
}

static void entry_points(void) {
    void *address = NULL;
    look_up("known", "cuMemMap", 10020);
    look_up("with a suffix", "cuMemAlloc_v2", 12000);
    look_up("unknown", "cuNoSuchCall", 12000);
    look_up("older than the call", "cuCtxRecordEvent", 12000);
    look_up("newer than the driver", "cuMemMap", 99000);
    TRY_AS("unknown, not asked why", cuGetProcAddress, "cuNoSuchCall", &address, 12000, 0, NULL);
}

static void errors(void) {
    static const CUresult codes[] = {
#define STATUS_CODE(value, name, text) value,
        CUDA_STATUS_LIST(STATUS_CODE)
#undef STATUS_CODE
    };
    for (size_t i = 0; i < LENGTH_OF(codes); i++) {
        const char *name = NULL, *text = NULL;
        CUresult a = cuda.cuGetErrorName(codes[i], &name),
                 b = cuda.cuGetErrorString(codes[i], &text);
        if (a || b)
            say("%d %s %s", codes[i], code_name(a), code_name(b));
        else
            say("%d %s \"%s\"", codes[i], name, text);
    }
}

static void errors_unknown(void) {
    const char *name = "unchanged", *text = "unchanged";
    TRY(cuGetErrorName, 12345, &name);
    TRY(cuGetErrorString, 12345, &text);
    say("%s, %s", name ? name : "NULL", text ? text : "NULL");
    TRY_AS("-1", cuGetErrorName, -1, &name);
}

/* ---- devices, contexts --------------------------------------------------------------------- */
static void devices(void) {
    CUdevice device = -1;
    int value = 0, n = 0;
    char name[8];
    MUST(cuDeviceGetCount, &n);
    TRY_AS("the first", cuDeviceGet, &device, 0);
    TRY_AS("past the last", cuDeviceGet, &device, n);
    TRY_AS("-1", cuDeviceGet, &device, -1);
    TRY_AS("attribute VMM", cuDeviceGetAttribute, &value,
           CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 0);
    say("%d", value);
    TRY_AS("attribute export", cuDeviceGetAttribute, &value,
           CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, 0);
    say("%d", value);
    TRY_AS("attribute of device 99", cuDeviceGetAttribute, &value,
           CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 99);
    TRY_AS("attribute 0", cuDeviceGetAttribute, &value, 0, 0);
    TRY_AS("attribute 9999", cuDeviceGetAttribute, &value, 9999, 0);
    TRY_AS("a short name", cuDeviceGetName, name, (int)sizeof name, 0);
    say("%zu characters", strnlen(name, sizeof name));
    TRY_AS("name of device 99", cuDeviceGetName, name, (int)sizeof name, 99);
    TRY_AS("retain device 99", cuDevicePrimaryCtxRetain, &context, 99);
}

static void contexts(void) {
    CUcontext again = NULL, popped = NULL, current = NULL;
    unsigned flags = 0;
    int active = 0;
    TRY(cuDevicePrimaryCtxRetain, &again, 0);
    say("%s", again == context ? "the same" : "another");
    TRY(cuDevicePrimaryCtxGetState, 0, &flags, &active);
    say("active %d", active);
    TRY(cuCtxPushCurrent, context);
    TRY(cuCtxPopCurrent, &popped);
    say("%s", popped == context ? "ours" : "another");
    TRY_AS("pop the last", cuCtxPopCurrent, &popped);
    TRY_AS("pop nothing", cuCtxPopCurrent, &popped);
    TRY_AS("push NULL", cuCtxPushCurrent, NULL);
    TRY(cuCtxGetCurrent, &current);
    say("%s", current ? "one is current" : "none is current");
    TRY(cuCtxSetCurrent, context);
    TRY_AS("set none", cuCtxSetCurrent, NULL);
    TRY_AS("pop after that", cuCtxPopCurrent, &popped);
}

static void other_thread(void *unused) {
    (void)unused;
    CUcontext current = context;
    cuda.cuCtxSetCurrent(NULL);
    TRY(cuCtxGetCurrent, &current);
    say("%s", current ? "one is current" : "none is current");
}

static void contexts_by_thread(void) {
    CUcontext current = NULL;
    elsewhere(other_thread, NULL);
    TRY_AS("here", cuCtxGetCurrent, &current);
    say("%s", current == context ? "still ours" : "another");
}

/* ---- callbacks ---------------------------------------------------------------------------------- */
static CUresult callback_codes[8];
static CUevent callback_event;
static CUdeviceptr callback_space;

static void call_the_driver(void *unused) {
    const char *name;
    size_t free_bytes, total;
    CUcontext current;
    CUmemGenericAllocationHandle block;
    (void)unused;
    callback_codes[0] = cuda.cuGetErrorName(1, &name);
    callback_codes[1] = cuda.cuCtxGetCurrent(&current);
    callback_codes[2] = cuda.cuMemGetInfo(&free_bytes, &total);
    callback_codes[3] = cuda.cuEventQuery(callback_event);
    callback_codes[4] = cuda.cuMemCreate(&block, granule, &block_prop, 0);
    callback_codes[5] = cuda.cuMemUnmap(callback_space, granule);
    callback_codes[6] = cuda.cuStreamQuery(NULL);
}

static void in_a_host_callback(void) {
    static const char *const names[] = {"cuGetErrorName", "cuCtxGetCurrent", "cuMemGetInfo",
                                        "cuEventQuery",   "cuMemCreate",     "cuMemUnmap",
                                        "cuStreamQuery"};
    CUstream stream = new_stream(CU_STREAM_NON_BLOCKING);
    callback_event = new_event();
    callback_space = new_space(1);
    put_block(callback_space, 1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    TRY(cuLaunchHostFunc, stream, call_the_driver, NULL);
    TRY(cuStreamSynchronize, stream);
    for (size_t i = 0; i < LENGTH_OF(names); i++)
        say_code(names[i], callback_codes[i]);
    say("%s", map_of(callback_space, 1));
}

static void load_what_is_no_code(void) {
    CUmodule module;
    TRY(cuModuleLoadData, &module, "this is no code");
    TRY_AS("PTX of the future", cuModuleLoadData, &module,
           ".version 99.0\n.target sm_75\n.address_size 64\n");
}

static const probe probes[] = {
    RAW(before_init),          PROBE(entry_points),      PROBE(errors),
    PROBE(errors_unknown),     PROBE(devices),           PROBE(contexts),
    PROBE(contexts_by_thread), PROBE(without_a_context), ALONE(load_what_is_no_code),
    ALONE(in_a_host_callback), ALONE(in_a_forked_child),
};
const probe_list driver_probes = {"the driver, its devices and contexts", probes,
                                  LENGTH_OF(probes)};
