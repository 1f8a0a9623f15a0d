/* driver_cuda.c - NVIDIA's driver behind the driver table.
 *
 * libcuda is found when the first device is opened; nothing links it, nor the CUDA runtime.
 * What is learnt of a device (its primary context, the loaded kernels) stays for the life
 * of the process: other libraries share that context, and no one can tell when the last
 * of them has finished with it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cuda_abi.h"
#include "driver.h"
#include "error.h"
#include "process.h"

/* Blocks of the append kernel that run at once on one multiprocessor: its registers allow 12. */
#define BLOCKS_PER_MULTIPROCESSOR 12
#define SET_ACCESS_ATTEMPTS 8

/* append_image.S */
#define HIDDEN __attribute__((visibility("hidden")))
extern const unsigned char vmm_append_fatbin[] HIDDEN, vmm_append_fatbin_end[] HIDDEN;
extern const char vmm_append_ptx[] HIDDEN, vmm_append_ptx_end[] HIDDEN;

typedef struct cuda_device {
    int index;
    CUdevice device;
    CUcontext context;
    unsigned max_blocks; /* of one launch, so that all of them run at once */
    CUfunction append, append_wide;
    const char *kernel_form; /* "fatbin", "ptx", NULL before they are loaded */
    struct cuda_device *next;
} cuda_device;

static struct {
    pthread_mutex_t lock;
    bool is_loaded;
    uint64_t process; /* that loaded it */
    int version;
    cuda_calls calls;
    cuda_device *devices;
} driver = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void after_fork_in_child(void) {
    pthread_mutex_init(&driver.lock, NULL);
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

/* ---- Errors ------------------------------------------------------------------ */

static vmm_status status_of(CUresult code) {
    if (code == CUDA_SUCCESS)
        return VMM_OK;
    if (code == CUDA_ERROR_OUT_OF_MEMORY)
        return VMM_ERR_OUT_OF_MEMORY;
    if (code >= CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED &&
        code <= CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD)
        return VMM_ERR_CAPTURING;
    return VMM_ERR_DRIVER;
}

/* Record "[cuMemCreate][CUDA_ERROR_OUT_OF_MEMORY] out of memory", then `hint`. */
static vmm_status fail(vmm_status status, CUresult code, const char *operation, const char *hint) {
    const char *name = NULL, *text = NULL;
    driver.calls.cuGetErrorName(code, &name);
    driver.calls.cuGetErrorString(code, &text);
    return vmm_fail_driver(status, (int)code, operation, "[%s][%s] %s%s", operation,
                           name ? name : "unknown code", text ? text : "no text", hint);
}

static vmm_status checked(CUresult code, const char *operation) {
    return code == CUDA_SUCCESS ? VMM_OK : fail(status_of(code), code, operation, "");
}

/* Call the driver; what has failed is recorded under the name that was called. */
#define CALL(name, ...) checked(driver.calls.name(__VA_ARGS__), #name)

/* ---- The caller's context and capture mode -------------------------------------- */

/* Between enter() and leave() the device's context is current. */
typedef struct visit {
    bool is_pushed;
    bool is_relaxed;
    CUstreamCaptureMode mode; /* the thread's own */
} visit;

static vmm_status enter(const cuda_device *device, visit *visit) {
    CUcontext current = NULL;
    visit->is_pushed = visit->is_relaxed = false;
    vmm_status status = CALL(cuCtxGetCurrent, &current);
    if (status || current == device->context)
        return status;
    status = CALL(cuCtxPushCurrent, device->context);
    visit->is_pushed = !status;
    return status;
}

/* Return `status`, that of the work in between. What fails here is not reported: the work
 * is done, and there is nothing to undo it with. */
static vmm_status leave(visit *visit, vmm_status status) {
    CUcontext ours;
    if (visit->is_relaxed)
        driver.calls.cuThreadExchangeStreamCaptureMode(&visit->mode);
    if (visit->is_pushed)
        driver.calls.cuCtxPopCurrent(&ours);
    return status;
}

/* enter() for calls that a capture in global mode, on any thread, would otherwise forbid
 * to this one: those that manage memory, create, query or wait. */
static vmm_status enter_relaxed(const cuda_device *device, visit *visit) {
    vmm_status status = enter(device, visit);
    if (status)
        return status;
    visit->mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    status = CALL(cuThreadExchangeStreamCaptureMode, &visit->mode);
    if (status)
        return leave(visit, status);
    visit->is_relaxed = true;
    return VMM_OK;
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

/* dlsym() and cuGetProcAddress() give functions as pointers to data. */
#define STORE_FUNCTION(to, address) memcpy((to), &(address), sizeof(address))

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

/* Under the lock. A failure leaves everything to be tried again; the library then stays
 * open, for once it has run it may have threads. */
static vmm_status load(void) {
    if (driver.is_loaded && driver.process != vmm_process)
        return vmm_fail(VMM_ERR_FORKED, "device_open",
                        "CUDA cannot be used in a process forked from one that uses it: "
                        "start this one by spawn; device='host' works");
    if (driver.is_loaded)
        return VMM_OK;

    const char *name = getenv("VMM_CUDA_LIBRARY");
    if (!name || !*name)
        name = "libcuda.so.1";
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *why = dlerror();
        bool is_missing = !why || strstr(why, "No such file");
        return vmm_fail(VMM_ERR_NO_DRIVER, "device_open",
                        "no CUDA driver: %s%s; device='host' works", is_missing ? name : why,
                        is_missing ? " not found" : "");
    }
    vmm_status status = resolve_entries(library, name);
    if (status)
        return status;
    CUresult code = driver.calls.cuInit(0);
    if (code != CUDA_SUCCESS)
        return fail(VMM_ERR_NO_DRIVER, code, "cuInit", "; device='host' works");
    driver.process = vmm_process;
    driver.is_loaded = true;
    return VMM_OK;
}

/* Whether the build embedded a fatbin. The compiler takes two symbols for two addresses
 * unless it is kept from knowing where one of the pointers comes from. */
static bool has_fatbin(void) {
    const unsigned char *begin = vmm_append_fatbin;
    __asm__("" : "+r"(begin));
    return begin != vmm_append_fatbin_end;
}

/* Load both kernels of `image`, in the current context, and with them their code: a
 * function that is loaded at its first launch would be so within someone's capture. */
static CUresult load_image(cuda_device *device, const void *image, const char **operation) {
    CUmodule module;
    CUfunction functions[2];
    static const char *const names[] = {VMM_APPEND_KERNEL, VMM_APPEND_KERNEL_WIDE};
    *operation = "cuModuleLoadData";
    CUresult code = driver.calls.cuModuleLoadData(&module, image);
    if (code != CUDA_SUCCESS)
        return code;
    for (int i = 0; i < 2 && code == CUDA_SUCCESS; i++) {
        *operation = "cuModuleGetFunction";
        code = driver.calls.cuModuleGetFunction(&functions[i], module, names[i]);
        if (code == CUDA_SUCCESS && driver.calls.cuFuncLoad) {
            *operation = "cuFuncLoad";
            code = driver.calls.cuFuncLoad(functions[i]);
        }
    }
    if (code != CUDA_SUCCESS) {
        driver.calls.cuModuleUnload(module);
        return code;
    }
    device->append = functions[0];
    device->append_wide = functions[1];
    return CUDA_SUCCESS;
}

/* Drivers before CUDA 13 load no code that CUDA 13 has built, and a fatbin holds none for
 * GPUs older than the oldest it was built for. The PTX is written for both. */
static vmm_status load_kernels(cuda_device *device) {
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

/* Make the record of a device. From here on its context is retained, so the record stays
 * even when no kernel can be loaded. */
static vmm_status retain_device(int index, cuda_device **out) {
    int count, is_supported, n_multiprocessors;
    cuda_device found = {.index = index};
    vmm_status status = CALL(cuDeviceGetCount, &count);
    if (status)
        return status;
    if (index < 0 || index >= count)
        return vmm_fail(VMM_ERR_NO_DEVICE, "device_open",
                        "no device 'cuda:%d': the CUDA driver sees %d", index, count);
    if ((status = CALL(cuDeviceGet, &found.device, index)) ||
        (status = CALL(cuDeviceGetAttribute, &is_supported,
                       CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, found.device)) ||
        (status = CALL(cuDeviceGetAttribute, &n_multiprocessors,
                       CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, found.device)))
        return status;
    if (!is_supported)
        return vmm_fail(VMM_ERR_UNSUPPORTED, "device_open",
                        "'cuda:%d' does not support virtual memory management", index);
    found.max_blocks =
        (n_multiprocessors > 0 ? (unsigned)n_multiprocessors : 1) * BLOCKS_PER_MULTIPROCESSOR;

    cuda_device *device = malloc(sizeof *device);
    if (!device)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "device_open", "no host memory left");
    status = CALL(cuDevicePrimaryCtxRetain, &found.context, found.device);
    if (status) {
        free(device);
        return status;
    }
    found.next = driver.devices;
    *device = found;
    driver.devices = device;
    *out = device;
    return VMM_OK;
}

static vmm_status open_device(int index, cuda_device **out) {
    cuda_device *device = driver.devices;
    while (device && device->index != index)
        device = device->next;
    if (!device) {
        /* Retaining may create the context, which a capture elsewhere would forbid. */
        CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
        vmm_status status = CALL(cuThreadExchangeStreamCaptureMode, &mode);
        if (status)
            return status;
        status = retain_device(index, &device);
        driver.calls.cuThreadExchangeStreamCaptureMode(&mode);
        if (status)
            return status;
    }
    if (!device->kernel_form) {
        visit visit;
        vmm_status status = enter_relaxed(device, &visit);
        if (!status)
            status = leave(&visit, load_kernels(device));
        if (status)
            return status;
    }
    *out = device;
    return VMM_OK;
}

static vmm_status cuda_open(int index, void **state) {
    cuda_device *device = NULL;
    pthread_mutex_lock(&driver.lock);
    vmm_status status = load();
    if (!status)
        status = open_device(index, &device);
    pthread_mutex_unlock(&driver.lock);
    *state = device;
    return status;
}

static void cuda_close(void *state) {
    (void)state; /* kept for the next open, see above */
}

/* ---- Memory ------------------------------------------------------------------- */

static CUmemAllocationProp block_properties(const cuda_device *device) {
    return (CUmemAllocationProp){
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_NONE,
        .location = {CU_MEM_LOCATION_TYPE_DEVICE, device->device},
    };
}

static vmm_status query_device(const cuda_device *device, vmm_device_info *out) {
    CUmemAllocationProp properties = block_properties(device);
    vmm_status status;
    if ((status = CALL(cuDeviceGetName, out->description, (int)sizeof out->description,
                       device->device)) ||
        (status = CALL(cuMemGetAllocationGranularity, &out->granularity_bytes, &properties,
                       CU_MEM_ALLOC_GRANULARITY_MINIMUM)) ||
        (status = CALL(cuMemGetAllocationGranularity, &out->recommended_bytes, &properties,
                       CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)) ||
        (status = CALL(cuMemGetInfo, &out->free_bytes, &out->total_bytes)) ||
        (status =
             CALL(cuDeviceGetAttribute, &out->exportable_handles,
                  CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device->device)))
        return status;
    out->driver_version = driver.version;
    snprintf(out->kernel, sizeof out->kernel, "%s", device->kernel_form);
    return VMM_OK;
}

static vmm_status cuda_query(void *state, vmm_device_info *out) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, query_device(state, out));
}

static vmm_status cuda_reserve(void *state, size_t bytes, size_t alignment, uintptr_t *out) {
    visit visit;
    CUdeviceptr base = 0;
    vmm_status status = enter_relaxed(state, &visit);
    if (status)
        return status;
    CUresult code = driver.calls.cuMemAddressReserve(&base, bytes, alignment, 0, 0);
    if (code != CUDA_SUCCESS) {
        /* Addresses, not memory, whatever the code: giving memory back would not help. */
        vmm_size_text size;
        char hint[96];
        snprintf(hint, sizeof hint, ": %s of addresses were refused, ask for a smaller capacity",
                 vmm_format_bytes(bytes, &size));
        status = fail(VMM_ERR_DRIVER, code, "cuMemAddressReserve", hint);
    }
    *out = (uintptr_t)base;
    return leave(&visit, status);
}

static vmm_status cuda_free(void *state, uintptr_t base, size_t bytes) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(cuMemAddressFree, base, bytes));
}

static vmm_status cuda_create(void *state, size_t bytes, driver_handle *out) {
    visit visit;
    CUmemAllocationProp properties = block_properties(state);
    CUmemGenericAllocationHandle handle = 0;
    vmm_status status = enter_relaxed(state, &visit);
    if (status)
        return status;
    CUresult code = driver.calls.cuMemCreate(&handle, bytes, &properties, 0);
    if (code != CUDA_SUCCESS) {
        vmm_size_text size;
        char hint[64];
        snprintf(hint, sizeof hint, ", for a block of %s", vmm_format_bytes(bytes, &size));
        status = fail(status_of(code), code, "cuMemCreate", hint);
    }
    *out = handle;
    return leave(&visit, status);
}

static vmm_status cuda_release(void *state, driver_handle handle, size_t bytes) {
    visit visit;
    (void)bytes;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(cuMemRelease, handle));
}

static vmm_status cuda_map(void *state, uintptr_t address, size_t bytes, driver_handle handle) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(cuMemMap, address, bytes, 0, handle, 0));
}

static vmm_status cuda_unmap(void *state, uintptr_t address, size_t bytes) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(cuMemUnmap, address, bytes));
}

static vmm_status cuda_set_access(void *state, uintptr_t address, size_t bytes) {
    visit visit;
    const cuda_device *device = state;
    const CUmemAccessDesc access = {
        .location = {CU_MEM_LOCATION_TYPE_DEVICE, device->device},
        .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    vmm_status status = enter_relaxed(device, &visit);
    if (status)
        return status;
    /* Under WSL2 it is not ready now and then when threads map at once: wait for 50 us, then
     * each time twice as long, 6 ms in all. */
    struct timespec pause = {.tv_nsec = 50 * 1000};
    CUresult code = driver.calls.cuMemSetAccess(address, bytes, &access, 1);
    for (int i = 1; code == CUDA_ERROR_NOT_READY && i < SET_ACCESS_ATTEMPTS; i++) {
        nanosleep(&pause, NULL);
        pause.tv_nsec *= 2;
        code = driver.calls.cuMemSetAccess(address, bytes, &access, 1);
    }
    return leave(&visit, checked(code, "cuMemSetAccess"));
}

/* ---- Work on streams -------------------------------------------------------------- */

static vmm_status cuda_copy(void *state, uintptr_t dst, const void *src, size_t bytes,
                            vmm_stream stream) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(cuMemcpyHtoDAsync, dst, src, bytes, stream));
}

static vmm_status cuda_fill(void *state, uintptr_t dst, size_t bytes, vmm_stream stream) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(cuMemsetD8Async, dst, 0, bytes, stream));
}

/* One thread for each unit of the largest job, until the device is full: then each takes
 * several. The parameters stay where the caller has them; the driver copies them. */
static vmm_status launch(const cuda_device *device, CUfunction kernel, const void *args,
                         size_t n_jobs, uint64_t n_units, vmm_stream stream) {
    if (n_units == 0)
        return VMM_OK;
    visit visit;
    uint64_t n_blocks = (n_units - 1) / VMM_APPEND_BLOCK_THREADS + 1;
    uint64_t max_blocks = device->max_blocks / n_jobs;
    if (n_blocks > max_blocks)
        n_blocks = max_blocks ? max_blocks : 1;
    void *parameters[] = {(void *)args};
    vmm_status status = enter(device, &visit);
    if (!status)
        status = leave(&visit, CALL(cuLaunchKernel, kernel, (unsigned)n_blocks, (unsigned)n_jobs, 1,
                                    VMM_APPEND_BLOCK_THREADS, 1, 1, 0, stream, parameters, NULL));
    return status;
}

static vmm_status cuda_launch(void *state, const vmm_append_args *args, size_t n_jobs,
                              vmm_stream stream) {
    const cuda_device *device = state;
    uint64_t n_units = 0;
    for (size_t i = 0; i < n_jobs; i++)
        n_units = args->job[i].n_units > n_units ? args->job[i].n_units : n_units;
    return launch(device, device->append, args, n_jobs, n_units, stream);
}

static vmm_status cuda_launch_wide(void *state, const vmm_append_args_wide *args, size_t n_jobs,
                                   vmm_stream stream) {
    const cuda_device *device = state;
    uint64_t n_units = 0;
    for (size_t i = 0; i < n_jobs; i++)
        n_units = args->job[i].n_units > n_units ? args->job[i].n_units : n_units;
    return launch(device, device->append_wide, args, n_jobs, n_units, stream);
}

/* ---- Streams ------------------------------------------------------------------- */

static vmm_status cuda_stream_check(void *state, vmm_stream stream) {
    const cuda_device *device = state;
    CUcontext context = NULL, popped;
    CUdevice other;
    if ((uintptr_t)stream <= (uintptr_t)VMM_STREAM_PER_THREAD)
        return VMM_OK;
    CUresult code = driver.calls.cuStreamGetCtx(stream, &context);
    if (code == CUDA_ERROR_INVALID_HANDLE || code == CUDA_ERROR_INVALID_CONTEXT ||
        code == CUDA_ERROR_CONTEXT_IS_DESTROYED)
        return fail(VMM_ERR_INVALID, code, "cuStreamGetCtx", ": this is no stream");
    if (code != CUDA_SUCCESS || context == device->context)
        return checked(code, "cuStreamGetCtx");
    /* Another context of the same device will do: the stream of a green context has one. */
    vmm_status status = CALL(cuCtxPushCurrent, context);
    if (status)
        return status;
    status = CALL(cuCtxGetDevice, &other);
    driver.calls.cuCtxPopCurrent(&popped);
    if (!status && other != device->device)
        status = vmm_fail(VMM_ERR_INVALID, "cuStreamGetCtx",
                          "the stream belongs to 'cuda:%d', not to 'cuda:%d'", (int)other,
                          device->index);
    return status;
}

static vmm_status cuda_stream_capture(void *state, vmm_stream stream, uint64_t *capture_id) {
    visit visit;
    CUstreamCaptureStatus capture = CU_STREAM_CAPTURE_STATUS_NONE;
    uint64_t id = 0;
    *capture_id = 0;
    vmm_status status = enter(state, &visit);
    if (status)
        return status;
    /* The legacy stream cannot say while a stream that it waits for is captured; that is
     * CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, which becomes VMM_ERR_CAPTURING. */
    status = leave(&visit, CALL(cuStreamGetCaptureInfo, stream, &capture, &id, NULL, NULL, NULL));
    if (status)
        return status;
    if (capture == CU_STREAM_CAPTURE_STATUS_INVALIDATED)
        return vmm_fail(VMM_ERR_CAPTURING, "cuStreamGetCaptureInfo",
                        "the capture of this stream has been invalidated: end it first");
    if (capture == CU_STREAM_CAPTURE_STATUS_ACTIVE)
        *capture_id = id;
    return VMM_OK;
}

static vmm_status cuda_stream_synchronize(void *state, vmm_stream stream) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(cuStreamSynchronize, stream));
}

/* ---- Events -------------------------------------------------------------------- */

static vmm_status cuda_event_create(void *state, driver_event *out) {
    visit visit;
    CUevent event = NULL;
    vmm_status status = enter_relaxed(state, &visit);
    if (!status)
        status = leave(&visit, CALL(cuEventCreate, &event, CU_EVENT_DISABLE_TIMING));
    *out = event;
    return status;
}

static void cuda_event_destroy(void *state, driver_event event) {
    visit visit;
    vmm_undo_begin(); /* no one could do anything about a failure */
    if (enter_relaxed(state, &visit) == VMM_OK)
        leave(&visit, CALL(cuEventDestroy, event));
    vmm_undo_end();
}

static vmm_status cuda_event_record(void *state, driver_event event, vmm_stream stream) {
    visit visit;
    vmm_status status = enter(state, &visit);
    return status ? status : leave(&visit, CALL(cuEventRecord, event, stream));
}

static vmm_status cuda_event_wait(void *state, vmm_stream stream, driver_event event,
                                  bool external) {
    visit visit;
    unsigned flags = external ? CU_EVENT_WAIT_EXTERNAL : CU_EVENT_WAIT_DEFAULT;
    vmm_status status = enter(state, &visit);
    return status ? status : leave(&visit, CALL(cuStreamWaitEvent, stream, event, flags));
}

static vmm_status cuda_event_query(void *state, driver_event event, bool *done) {
    visit visit;
    *done = false;
    vmm_status status = enter_relaxed(state, &visit);
    if (status)
        return status;
    CUresult code = driver.calls.cuEventQuery(event);
    *done = code == CUDA_SUCCESS;
    return leave(&visit, code == CUDA_ERROR_NOT_READY ? VMM_OK : checked(code, "cuEventQuery"));
}

static vmm_status cuda_event_synchronize(void *state, driver_event event) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(cuEventSynchronize, event));
}

/* Drivers before 12.5 have no event that stands for a whole context. There the device is
 * waited for, and the event is recorded behind nothing, only so that it can be asked. */
static vmm_status record_fence(const cuda_device *device, CUevent event) {
    if (driver.calls.cuCtxRecordEvent)
        return CALL(cuCtxRecordEvent, device->context, event);
    vmm_status status = checked(driver.calls.cuCtxSynchronize(), "cuCtxSynchronize");
    return status ? status : CALL(cuEventRecord, event, NULL);
}

static vmm_status cuda_fence(void *state, driver_event event) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, record_fence(state, event));
}

const driver_ops driver_cuda_ops = {
    .kind = VMM_DEVICE_CUDA,
    .is_async = true,
    .open = cuda_open,
    .close = cuda_close,
    .query = cuda_query,
    .reserve = cuda_reserve,
    .free = cuda_free,
    .create = cuda_create,
    .release = cuda_release,
    .map = cuda_map,
    .unmap = cuda_unmap,
    .set_access = cuda_set_access,
    .copy = cuda_copy,
    .fill = cuda_fill,
    .launch = cuda_launch,
    .launch_wide = cuda_launch_wide,
    .stream_check = cuda_stream_check,
    .stream_capture = cuda_stream_capture,
    .stream_synchronize = cuda_stream_synchronize,
    .event_create = cuda_event_create,
    .event_destroy = cuda_event_destroy,
    .event_record = cuda_event_record,
    .event_wait = cuda_event_wait,
    .event_query = cuda_event_query,
    .event_synchronize = cuda_event_synchronize,
    .fence = cuda_fence,
};
