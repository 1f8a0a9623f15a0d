/* driver_hip.c - AMD's HIP runtime behind the driver table; most of it is driver_gpu.h.
 *
 * Experimental: it has run against the simulated driver of the tests, and on no GPU. Where HIP
 * differs from CUDA, or is known to fail:
 *   - the current device is a number of the thread's, always set; there is no stack of contexts;
 *   - a mapping is unmapped and given access by itself: over several at once, unmapping and the
 *     access of the last ones have failed in several releases of ROCm;
 *   - no event stands for a whole device, and one on the null stream does not wait for streams
 *     that were created non-blocking, which those of frameworks are. The fence therefore waits
 *     for the device;
 *   - a captured stream cannot wait for an event recorded outside: releases before ROCm 6.4 do
 *     not know the flag, and later ones have failed with it for events without timing;
 *   - stream 0 is the default stream, and 1 means nothing before ROCm 6.2.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hip_abi.h"

#define GPU(name) hip##name
/* What has another name there. */
#define hipCtxSynchronize hipDeviceSynchronize
#define hipEventCreate hipEventCreateWithFlags
#define hipLaunchKernel hipModuleLaunchKernel
#define hipStreamGetCaptureInfo hipStreamGetCaptureInfo_v2
#define hipMemAlloc hipMalloc
#define hipMemFree hipFree
#define hipMemHostAlloc hipHostMalloc
#define hipMemFreeHost hipHostFree
#define hipStreamCreate hipStreamCreateWithFlags
#define GPU_VENDOR "HIP"
#define GPU_DEVICE "hip"
#define GPU_EXTERNAL_WAITS false

typedef hipError_t gpu_result;
typedef hipDeviceptr_t gpu_address;
typedef hipMemGenericAllocationHandle_t gpu_handle;
typedef hipMemAllocationProp gpu_properties;
typedef hipMemAccessDesc gpu_access;
typedef hipStream_t gpu_stream;
typedef hipEvent_t gpu_event;
typedef hipModule_t gpu_module;
typedef hipFunction_t gpu_function;
typedef hipStreamCaptureMode gpu_capture_mode;
typedef hipStreamCaptureStatus gpu_capture_status;
typedef unsigned long long gpu_capture_id;
typedef hipGraph_t gpu_graph;
typedef hipUserObject_t gpu_user_object;

#define GPU_SUCCESS hipSuccess
#define GPU_ERROR_OUT_OF_MEMORY hipErrorOutOfMemory
#define GPU_ERROR_NOT_READY hipErrorNotReady
#define GPU_ERROR_CAPTURE_FIRST hipErrorStreamCaptureUnsupported
#define GPU_ERROR_CAPTURE_LAST hipErrorStreamCaptureWrongThread
#define GPU_CAPTURE_MODE_RELAXED hipStreamCaptureModeRelaxed
#define GPU_CAPTURE_STATUS_NONE hipStreamCaptureStatusNone
#define GPU_CAPTURE_STATUS_ACTIVE hipStreamCaptureStatusActive
#define GPU_CAPTURE_STATUS_INVALIDATED hipStreamCaptureStatusInvalidated
#define GPU_EVENT_DISABLE_TIMING hipEventDisableTiming
#define GPU_ALLOCATION_PINNED hipMemAllocationTypePinned
#define GPU_LOCATION_DEVICE hipMemLocationTypeDevice
#define GPU_ACCESS_READWRITE hipMemAccessFlagsProtReadWrite
#define GPU_GRANULARITY_MINIMUM hipMemAllocationGranularityMinimum
#define GPU_GRANULARITY_RECOMMENDED hipMemAllocationGranularityRecommended
#define GPU_STREAM_NON_BLOCKING hipStreamNonBlocking
#define GPU_USER_OBJECT_NO_SYNC hipUserObjectNoDestructorSync
#define GPU_USER_OBJECT_MOVE hipGraphUserObjectMove
#define GPU_N_KERNELS 5

typedef struct gpu_device {
    int index;
    hipDevice_t device;
    unsigned max_blocks; /* of one launch, so that all of them run at once */
    hipFunction_t kernels[GPU_N_KERNELS];
    hipStream_t stream;      /* for control blocks; NULL before its first use. Atomic */
    const char *kernel_form; /* "hipfb", NULL before they are loaded */
    struct gpu_device *next;
} gpu_device;

typedef struct gpu_switch {
    bool is_switched;
    int device; /* the thread's own */
} gpu_switch;

static struct {
    pthread_mutex_t lock;
    bool is_loaded;
    uint64_t process; /* that loaded it */
    int version;
    hip_calls calls;
    gpu_device *devices;
} driver = {.lock = PTHREAD_MUTEX_INITIALIZER};

#include "driver_gpu.h"

/* Blocks of the append kernel that run at once on one compute unit: 32 waves of 64 threads. */
#define BLOCKS_PER_MULTIPROCESSOR (32 * 64 / VMM_APPEND_BLOCK_THREADS)

/* append_image.S */
#define HIDDEN __attribute__((visibility("hidden")))
extern const unsigned char vmm_append_hipfb[] HIDDEN, vmm_append_hipfb_end[] HIDDEN;

static void describe(hipError_t code, const char **name, const char **text) {
    *name = driver.calls.hipGetErrorName(code);
    *text = driver.calls.hipGetErrorString(code);
}

static vmm_status switch_to(const gpu_device *device, gpu_switch *before) {
    before->is_switched = false;
    vmm_status status = CALL(hipGetDevice, &before->device);
    if (status || before->device == device->device)
        return status;
    status = CALL(hipSetDevice, device->device);
    before->is_switched = !status;
    return status;
}

static void switch_back(gpu_switch *before) {
    if (before->is_switched)
        driver.calls.hipSetDevice(before->device);
}

/* ---- Loading ----------------------------------------------------------------- */

static const struct entry {
    const char *name;
    size_t offset;
} entries[] = {
#define HIP_CALL_ENTRY(result, name, parameters) {#name, offsetof(hip_calls, name)},
    HIP_CALLS(HIP_CALL_ENTRY)
#undef HIP_CALL_ENTRY
};

static vmm_status resolve_entries(void *library, const char *library_name) {
    for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
        void *address = dlsym(library, entries[i].name);
        if (!address)
            return vmm_fail(VMM_ERR_NO_DRIVER, "device_open",
                            "no HIP driver: %s has no %s: ROCm 5.3 or later is needed; "
                            "device='host' works",
                            library_name, entries[i].name);
        STORE_FUNCTION((char *)&driver.calls + entries[i].offset, address);
    }
    return VMM_OK;
}

/* A failure leaves everything to be tried again; the library then stays open, for once it
 * has run it may have threads. */
static vmm_status load(void) {
    /* Of several that are installed, the newest that has a name of its own. */
    static const char *const names[] = {"libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6",
                                        "libamdhip64.so.5", NULL};
    const char *name = NULL;
    void *library = NULL;
    vmm_status status = open_library("VMM_HIP_LIBRARY", names, &library, &name);
    if (!status)
        status = resolve_entries(library, name);
    if (status)
        return status;
    hipError_t code = driver.calls.hipInit(0);
    /* Without a GPU, ROCm 5 says the second. */
    if (code == hipErrorNoDevice || code == hipErrorInvalidDevice)
        return fail(VMM_ERR_NO_DEVICE, code, "hipInit", "; device='host' works");
    if (code != hipSuccess)
        return fail(VMM_ERR_NO_DRIVER, code, "hipInit", "; device='host' works");
    status = CALL(hipRuntimeGetVersion, &driver.version);
    if (!status && driver.version < HIP_VERSION_NEEDED)
        status = vmm_fail(VMM_ERR_NO_DRIVER, "device_open",
                          "no HIP driver: %s is of version %d.%d, ROCm 5.3 or later is needed; "
                          "device='host' works",
                          name, driver.version / 10000000, driver.version / 100000 % 100);
    return status;
}

/* Whether the build embedded kernels. The compiler takes two symbols for two addresses
 * unless it is kept from knowing where one of the pointers comes from. */
static bool has_hipfb(void) {
    const unsigned char *begin = vmm_append_hipfb;
    __asm__("" : "+r"(begin));
    return begin != vmm_append_hipfb_end;
}

/* The file that VMM_HIP_KERNELS names; stays mapped, for the runtime may keep pointers to it. */
static vmm_status map_file(const char *path, const void **out) {
    struct stat info;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    void *mapped = MAP_FAILED;
    if (file >= 0 && fstat(file, &info) == 0 && info.st_size > 0) /* unreached: no HIP compiler */
        mapped = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (file >= 0)
        close(file);
    if (mapped == MAP_FAILED)
        return vmm_fail(VMM_ERR_UNSUPPORTED, "device_open",
                        "VMM_HIP_KERNELS names %s, which cannot be read or is empty", path);
    *out = mapped; /* unreached: for a build without a HIP compiler */
    return VMM_OK;
}

static vmm_status load_kernels(gpu_device *device) {
    const char *path = getenv("VMM_HIP_KERNELS"), *operation;
    const void *image = vmm_append_hipfb;
    if (path && *path) {
        vmm_status status = map_file(path, &image);
        if (status)
            return status;
    } else if (!has_hipfb()) { /* unreached: a build without a HIP compiler */
        return vmm_fail(VMM_ERR_UNSUPPORTED, "device_open",
                        "libvmm was built without a HIP compiler, so it has no kernels for "
                        "'hip:%d': build it with hipcc, or clang 17 or later and lld, on PATH; or "
                        "have VMM_HIP_KERNELS name a file made by `make build/append.hipfb`",
                        device->index);
    }
    hipError_t code = load_image(device, image, &operation);
    if (code != hipSuccess)
        return fail(code == hipErrorOutOfMemory ? VMM_ERR_OUT_OF_MEMORY : VMM_ERR_UNSUPPORTED, code,
                    operation,
                    code == hipErrorNoBinaryForGpu
                        ? ": libvmm was built for other GPUs; HIP_ARCHS= of make names them"
                        : ": this GPU does not load the append kernel");
    device->kernel_form = "hipfb";
    return VMM_OK;
}

/* The code of a module is loaded with it. */
static hipError_t load_function(hipFunction_t function, const char **operation) {
    (void)function, (void)operation;
    return hipSuccess;
}

static vmm_status find_device(int index, gpu_device *out) {
    int count, is_supported = 0, n_multiprocessors;
    vmm_status status = CALL(hipGetDeviceCount, &count);
    if (status)
        return status;
    if (index < 0 || index >= count)
        return vmm_fail(VMM_ERR_NO_DEVICE, "device_open",
                        "no device 'hip:%d': the HIP runtime sees %d", index, count);
    if ((status = CALL(hipDeviceGet, &out->device, index)) ||
        (status = CALL(hipDeviceGetAttribute, &is_supported,
                       hipDeviceAttributeVirtualMemoryManagementSupported, out->device)) ||
        (status = CALL(hipDeviceGetAttribute, &n_multiprocessors,
                       hipDeviceAttributeMultiprocessorCount, out->device)))
        return status;
    if (!is_supported) /* unreached: all simulated GPUs do */
        return vmm_fail(VMM_ERR_UNSUPPORTED, "device_open",
                        "'hip:%d' does not support virtual memory management", index);
    out->max_blocks =
        (n_multiprocessors > 0 ? (unsigned)n_multiprocessors : 1) * BLOCKS_PER_MULTIPROCESSOR;
    return VMM_OK;
}

/* HIP has no attribute that tells. */
static vmm_status is_exportable(const gpu_device *device, int *out) {
    (void)device;
    *out = 0;
    return VMM_OK;
}

/* ---- Streams and the fence -------------------------------------------------------- */

static hipStream_t stream_of(vmm_stream stream) {
    return stream == VMM_STREAM_LEGACY ? NULL : stream;
}

static vmm_status check_stream(const gpu_device *device, hipStream_t stream) {
    int owner = driver.calls.hipGetStreamDeviceId(stream);
    if (owner < 0) /* unreached: what is no stream ends the simulator */
        return vmm_fail(VMM_ERR_INVALID, "hipGetStreamDeviceId", "%p is no stream", (void *)stream);
    if (owner != device->device)
        return vmm_fail(VMM_ERR_INVALID, "hipGetStreamDeviceId",
                        "the stream belongs to 'hip:%d', not to 'hip:%d'", owner, device->index);
    return VMM_OK;
}

static vmm_status record_fence(const gpu_device *device, hipEvent_t event) {
    (void)device;
    return record_waited_fence(event);
}

static bool fence_waits(void *state) {
    (void)state;
    return true;
}

const driver_ops driver_hip_ops = {.kind = VMM_DEVICE_HIP, .access_by_block = true, GPU_DRIVER_OPS};
