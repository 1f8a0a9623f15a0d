/* driver_cuda.c - NVIDIA's driver behind the driver table; most of it is driver_gpu.h.
 *
 * libcuda is found when the first device is opened; nothing links it, nor the CUDA runtime.
 * What is learnt of a device (its primary context, the loaded kernels) stays for the life
 * of the process: other libraries share that context, and no one can tell when the last
 * of them has finished with it.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>

#include "cuda_abi.h"

#define GPU(name) cu##name
#define GPU_VENDOR "CUDA"
#define GPU_DEVICE "cuda"
#define GPU_EXTERNAL_WAITS true

typedef CUresult gpu_result;
typedef CUdeviceptr gpu_address;
typedef CUmemGenericAllocationHandle gpu_handle;
typedef CUmemAllocationProp gpu_properties;
typedef CUmemAccessDesc gpu_access;
typedef CUstream gpu_stream;
typedef CUevent gpu_event;
typedef CUmodule gpu_module;
typedef CUfunction gpu_function;
typedef CUstreamCaptureMode gpu_capture_mode;
typedef CUstreamCaptureStatus gpu_capture_status;
typedef uint64_t gpu_capture_id;
typedef CUgraph gpu_graph;
typedef CUuserObject gpu_user_object;

#define GPU_SUCCESS CUDA_SUCCESS
#define GPU_ERROR_OUT_OF_MEMORY CUDA_ERROR_OUT_OF_MEMORY
#define GPU_ERROR_NOT_READY CUDA_ERROR_NOT_READY
#define GPU_ERROR_CAPTURE_FIRST CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
#define GPU_ERROR_CAPTURE_LAST CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD
#define GPU_CAPTURE_MODE_RELAXED CU_STREAM_CAPTURE_MODE_RELAXED
#define GPU_CAPTURE_STATUS_NONE CU_STREAM_CAPTURE_STATUS_NONE
#define GPU_CAPTURE_STATUS_ACTIVE CU_STREAM_CAPTURE_STATUS_ACTIVE
#define GPU_CAPTURE_STATUS_INVALIDATED CU_STREAM_CAPTURE_STATUS_INVALIDATED
#define GPU_EVENT_DISABLE_TIMING CU_EVENT_DISABLE_TIMING
#define GPU_ALLOCATION_PINNED CU_MEM_ALLOCATION_TYPE_PINNED
#define GPU_LOCATION_DEVICE CU_MEM_LOCATION_TYPE_DEVICE
#define GPU_ACCESS_READWRITE CU_MEM_ACCESS_FLAGS_PROT_READWRITE
#define GPU_GRANULARITY_MINIMUM CU_MEM_ALLOC_GRANULARITY_MINIMUM
#define GPU_GRANULARITY_RECOMMENDED CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
#define GPU_STREAM_NON_BLOCKING CU_STREAM_NON_BLOCKING
#define GPU_USER_OBJECT_NO_SYNC CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
#define GPU_USER_OBJECT_MOVE CU_GRAPH_USER_OBJECT_MOVE
#define GPU_N_KERNELS 5

typedef struct gpu_device {
    int index;
    CUdevice device;
    CUcontext context;
    unsigned max_blocks; /* of one launch, so that all of them run at once */
    CUfunction kernels[GPU_N_KERNELS];
    CUstream stream;         /* for control blocks; NULL before its first use. Atomic */
    const char *kernel_form; /* "fatbin", "ptx", NULL before they are loaded */
    struct gpu_device *next;
} gpu_device;

typedef struct gpu_switch {
    bool is_pushed;
} gpu_switch;

static struct {
    pthread_mutex_t lock;
    bool is_loaded;
    uint64_t process; /* that loaded it */
    int version;
    cuda_calls calls;
    gpu_device *devices;
} driver = {.lock = PTHREAD_MUTEX_INITIALIZER};

#include "driver_gpu.h"

/* Blocks of the append kernel that run at once on one multiprocessor: its registers allow 12. */
#define BLOCKS_PER_MULTIPROCESSOR 12

/* append_image.S */
#define HIDDEN __attribute__((visibility("hidden")))
extern const unsigned char vmm_append_fatbin[] HIDDEN, vmm_append_fatbin_end[] HIDDEN;
extern const char vmm_append_ptx[] HIDDEN, vmm_append_ptx_end[] HIDDEN;

static void describe(CUresult code, const char **name, const char **text) {
    driver.calls.cuGetErrorName(code, name);
    driver.calls.cuGetErrorString(code, text);
}

static vmm_status switch_to(const gpu_device *device, gpu_switch *before) {
    CUcontext current = NULL;
    before->is_pushed = false;
    vmm_status status = CALL(cuCtxGetCurrent, &current);
    if (status || current == device->context)
        return status;
    status = CALL(cuCtxPushCurrent, device->context);
    before->is_pushed = !status;
    return status;
}

static void switch_back(gpu_switch *before) {
    CUcontext ours;
    if (before->is_pushed)
        driver.calls.cuCtxPopCurrent(&ours);
}

/* ---- Loading ----------------------------------------------------------------- */

enum { OPTIONAL, REQUIRED };
static const struct entry {
    const char *name;
    int version;
    int need;
    size_t offset;
} entries[] = {
#define CUDA_CALL_ENTRY(name, version, need, parameters)                                           \
    {#name, version, need, offsetof(cuda_calls, name)},
    CUDA_CALLS(CUDA_CALL_ENTRY)
#undef CUDA_CALL_ENTRY
};

typedef struct finder {
    cuGetProcAddress_v2_type *v2;
    cuGetProcAddress_type *v1;
} finder;

/* NULL if the driver does not have it, which it says in several ways. */
static void *find(const finder *finder, const char *name, int version) {
    const uint64_t flags = CU_GET_PROC_ADDRESS_LEGACY_STREAM;
    void *address = NULL;
    int found;
    CUresult code = finder->v2 ? finder->v2(name, &address, version, flags, &found)
                               : finder->v1(name, &address, version, flags);
    return code == CUDA_SUCCESS ? address : NULL;
}

static vmm_status resolve_entries(void *library, const char *library_name) {
    finder finder;
    void *address = dlsym(library, "cuGetProcAddress_v2");
    STORE_FUNCTION(&finder.v2, address);
    address = dlsym(library, "cuGetProcAddress");
    STORE_FUNCTION(&finder.v1, address);
    /* The version comes first: asking for what is newer is an error. */
    if (finder.v2 || finder.v1) {
        address = find(&finder, "cuDriverGetVersion", 2020);
        STORE_FUNCTION(&driver.calls.cuDriverGetVersion, address);
    } else {
        address = NULL;
    }
    if (!address || driver.calls.cuDriverGetVersion(&driver.version) != CUDA_SUCCESS)
        return vmm_fail(VMM_ERR_NO_DRIVER, "device_open",
                        "no CUDA driver: %s is no libcuda of CUDA 11.3 or later; "
                        "device='host' works",
                        library_name);
    for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
        const struct entry *entry = &entries[i];
        address =
            entry->version <= driver.version ? find(&finder, entry->name, entry->version) : NULL;
        if (!address && entry->need == REQUIRED)
            return vmm_fail(VMM_ERR_NO_DRIVER, "device_open",
                            "no CUDA driver: %s has no %s of CUDA %d.%d; device='host' works",
                            library_name, entry->name, entry->version / 1000,
                            entry->version % 1000 / 10);
        STORE_FUNCTION((char *)&driver.calls + entry->offset, address);
    }
    return VMM_OK;
}

/* A failure leaves everything to be tried again; the library then stays open, for once it
 * has run it may have threads. */
static vmm_status load(void) {
    static const char *const names[] = {"libcuda.so.1", NULL};
    const char *name = NULL;
    void *library = NULL;
    vmm_status status = open_library("VMM_CUDA_LIBRARY", names, &library, &name);
    if (!status)
        status = resolve_entries(library, name);
    if (status)
        return status;
    CUresult code = driver.calls.cuInit(0);
    if (code != CUDA_SUCCESS)
        status = fail(VMM_ERR_NO_DRIVER, code, "cuInit", "; device='host' works");
    return status;
}

/* Whether the build embedded a fatbin. The compiler takes two symbols for two addresses
 * unless it is kept from knowing where one of the pointers comes from. */
static bool has_fatbin(void) {
    const unsigned char *begin = vmm_append_fatbin;
    __asm__("" : "+r"(begin));
    return begin != vmm_append_fatbin_end;
}

/* Drivers before CUDA 13 load no code that CUDA 13 has built, and a fatbin holds none for
 * GPUs older than the oldest it was built for. The PTX is written for both. */
static vmm_status load_kernels(gpu_device *device) {
    const char *forced = getenv("VMM_FORCE_PTX"), *operation;
    bool is_forced = forced && *forced && strcmp(forced, "0") != 0;
    if (!is_forced && has_fatbin() && driver.version >= 13000 &&
        load_image(device, vmm_append_fatbin, &operation) == CUDA_SUCCESS) {
        device->kernel_form = "fatbin";
        return VMM_OK;
    }
    CUresult code = load_image(device, vmm_append_ptx, &operation);
    if (code != CUDA_SUCCESS)
        return fail(code == CUDA_ERROR_OUT_OF_MEMORY ? VMM_ERR_OUT_OF_MEMORY : VMM_ERR_UNSUPPORTED,
                    code, operation, ": this GPU does not load the append kernel");
    device->kernel_form = "ptx";
    return VMM_OK;
}

static CUresult load_function(CUfunction function, const char **operation) {
    if (!driver.calls.cuFuncLoad)
        return CUDA_SUCCESS;
    *operation = "cuFuncLoad";
    return driver.calls.cuFuncLoad(function);
}

static vmm_status find_device(int index, gpu_device *out) {
    int count, is_supported, n_multiprocessors;
    vmm_status status = CALL(cuDeviceGetCount, &count);
    if (status)
        return status;
    if (index < 0 || index >= count)
        return vmm_fail(VMM_ERR_NO_DEVICE, "device_open",
                        "no device 'cuda:%d': the CUDA driver sees %d", index, count);
    if ((status = CALL(cuDeviceGet, &out->device, index)) ||
        (status = CALL(cuDeviceGetAttribute, &is_supported,
                       CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, out->device)) ||
        (status = CALL(cuDeviceGetAttribute, &n_multiprocessors,
                       CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, out->device)))
        return status;
    if (!is_supported)
        return vmm_fail(VMM_ERR_UNSUPPORTED, "device_open",
                        "'cuda:%d' does not support virtual memory management", index);
    out->max_blocks =
        (n_multiprocessors > 0 ? (unsigned)n_multiprocessors : 1) * BLOCKS_PER_MULTIPROCESSOR;
    return CALL(cuDevicePrimaryCtxRetain, &out->context, out->device);
}

static vmm_status is_exportable(const gpu_device *device, int *out) {
    return CALL(cuDeviceGetAttribute, out,
                CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device->device);
}

/* ---- Streams and the fence -------------------------------------------------------- */

static CUstream stream_of(vmm_stream stream) {
    return stream;
}

static vmm_status check_stream(const gpu_device *device, CUstream stream) {
    CUcontext context = NULL, popped;
    CUdevice other;
    CUresult code = driver.calls.cuStreamGetCtx(stream, &context);
    if (code == CUDA_ERROR_INVALID_HANDLE || code == CUDA_ERROR_INVALID_CONTEXT ||
        code == CUDA_ERROR_CONTEXT_IS_DESTROYED)
        return fail(VMM_ERR_INVALID, code, "cuStreamGetCtx", ": this is no stream");
    if (code != CUDA_SUCCESS || context == device->context)
        return checked(code, "cuStreamGetCtx");
    /* Another context of the same device will do: the stream of a green context has one. */
    vmm_status status = CALL(cuCtxPushCurrent, context);
    if (status)
        return status; /* unreached: a push that is refused for a stream of another context */
    status = CALL(cuCtxGetDevice, &other);
    driver.calls.cuCtxPopCurrent(&popped);
    if (!status && other != device->device)
        status = vmm_fail(VMM_ERR_INVALID, "cuStreamGetCtx",
                          "the stream belongs to 'cuda:%d', not to 'cuda:%d'", (int)other,
                          device->index);
    return status;
}

/* Drivers before 12.5 have no event that stands for a whole context. */
static vmm_status record_fence(const gpu_device *device, CUevent event) {
    if (driver.calls.cuCtxRecordEvent)
        return CALL(cuCtxRecordEvent, device->context, event);
    return record_waited_fence(event);
}

static bool fence_waits(void *state) {
    (void)state;
    return !driver.calls.cuCtxRecordEvent;
}

const driver_ops driver_cuda_ops = {.kind = VMM_DEVICE_CUDA, GPU_DRIVER_OPS};
