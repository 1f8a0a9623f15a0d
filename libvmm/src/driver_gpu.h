/* driver_gpu.h - what the drivers of CUDA and HIP have in common: the code behind the driver
 * table, included once by driver_cuda.c and once by driver_hip.c. Here are errors, opening, memory
 * and work; the rest is in driver_gpu_streams.h.
 *
 * HIP follows CUDA call by call, under other names and types. So this file is the code, and
 * the file that includes it gives it, before the #include:
 *   GPU(name)      the vendor's call of that name: GPU(MemMap) is cuMemMap or hipMemMap
 *   GPU_VENDOR, GPU_DEVICE      "CUDA" and "cuda", as messages and device names have them
 *   GPU_EXTERNAL_WAITS          whether a capture can wait for an event from outside it
 *   gpu_*, GPU_*   the vendor's types and values
 *   gpu_device     with at least the fields used here
 *   driver         what is learnt once for the process
 * and, behind it, the functions declared here first, in which the vendors differ.
 */
#ifndef VMM_DRIVER_GPU_H
#define VMM_DRIVER_GPU_H

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "driver.h"
#include "error.h"
#include "process.h"

#define SET_ACCESS_ATTEMPTS 8

/* The kernels of the image. */
typedef enum gpu_kernel {
    GPU_KERNEL_APPEND,
    GPU_KERNEL_APPEND_WIDE,
    GPU_KERNEL_APPEND_PIECES,
    GPU_KERNEL_APPEND_CURSOR,
    GPU_KERNEL_CURSOR,
} gpu_kernel;

static const char *const kernel_names[GPU_N_KERNELS] = {
    [GPU_KERNEL_APPEND] = VMM_APPEND_KERNEL,
    [GPU_KERNEL_APPEND_WIDE] = VMM_APPEND_KERNEL_WIDE,
    [GPU_KERNEL_APPEND_PIECES] = VMM_APPEND_KERNEL_PIECES,
    [GPU_KERNEL_APPEND_CURSOR] = VMM_APPEND_KERNEL_CURSOR,
    [GPU_KERNEL_CURSOR] = VMM_CURSOR_KERNEL,
};

/* ---- What the vendor's file has to say -------------------------------------------- */

/* Name and text of a code; either may be left NULL. */
static void describe(gpu_result code, const char **name, const char **text);
/* Make the device the thread's, and what was the thread's before so again. */
static vmm_status switch_to(const gpu_device *device, gpu_switch *before);
static void switch_back(gpu_switch *before);
/* Find the driver library and all of its calls. Under the lock. */
static vmm_status load(void);
/* Fill the record of a device that has not been opened before. What it retains stays. */
static vmm_status find_device(int index, gpu_device *out);
static vmm_status load_kernels(gpu_device *device);
/* So that no launch loads it later, which would be within someone's capture. */
static gpu_result load_function(gpu_function function, const char **operation);
/* The vendor's handle of a stream. */
static gpu_stream stream_of(vmm_stream stream);
static vmm_status check_stream(const gpu_device *device, gpu_stream stream);
static vmm_status is_exportable(const gpu_device *device, int *out);
static vmm_status record_fence(const gpu_device *device, gpu_event event);
static bool fence_waits(void *state);

static void after_fork_in_child(void) {
    pthread_mutex_init(&driver.lock, NULL);
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

/* ---- Errors ------------------------------------------------------------------ */

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define GPU_NAME(name) TEXT(GPU(name))

static vmm_status status_of(gpu_result code) {
    if (code == GPU_SUCCESS)
        return VMM_OK; /* unreached: callers ask of failures alone */
    if (code == GPU_ERROR_OUT_OF_MEMORY)
        return VMM_ERR_OUT_OF_MEMORY;
    if (code >= GPU_ERROR_CAPTURE_FIRST && code <= GPU_ERROR_CAPTURE_LAST)
        return VMM_ERR_CAPTURING;
    return VMM_ERR_DRIVER;
}

/* Record "[cuMemCreate][CUDA_ERROR_OUT_OF_MEMORY] out of memory", then `hint`. */
static vmm_status fail(vmm_status status, gpu_result code, const char *operation,
                       const char *hint) {
    const char *name = NULL, *text = NULL;
    describe(code, &name, &text);
    return vmm_fail_driver(status, (int)code, operation, "[%s][%s] %s%s", operation,
                           name ? name : "unknown code", text ? text : "no text", hint);
}

static vmm_status checked(gpu_result code, const char *operation) {
    return code == GPU_SUCCESS ? VMM_OK : fail(status_of(code), code, operation, "");
}

/* Call the driver; what has failed is recorded under the name that was called. */
#define CALL(name, ...) checked(driver.calls.name(__VA_ARGS__), TEXT(name))

/* ---- The caller's device and capture mode --------------------------------------- */

/* Between enter() and leave() the device is current. */
typedef struct visit {
    gpu_switch before;
    bool is_relaxed;
    gpu_capture_mode mode; /* the thread's own */
} visit;

static vmm_status enter(const gpu_device *device, visit *visit) {
    visit->is_relaxed = false;
    return switch_to(device, &visit->before);
}

/* Return `status`, that of the work in between. What fails here is not reported: the work
 * is done, and there is nothing to undo it with. */
static vmm_status leave(visit *visit, vmm_status status) {
    if (visit->is_relaxed)
        driver.calls.GPU(ThreadExchangeStreamCaptureMode)(&visit->mode);
    switch_back(&visit->before);
    return status;
}

/* enter() for calls that a capture in global mode, on any thread, would otherwise forbid
 * to this one: those that manage memory, create, query or wait. */
static vmm_status enter_relaxed(const gpu_device *device, visit *visit) {
    vmm_status status = enter(device, visit);
    if (status)
        return status;
    visit->mode = GPU_CAPTURE_MODE_RELAXED;
    status = CALL(GPU(ThreadExchangeStreamCaptureMode), &visit->mode);
    if (status)
        return leave(visit, status);
    visit->is_relaxed = true;
    return VMM_OK;
}

/* ---- Loading and opening ---------------------------------------------------------- */

/* dlsym() and cuGetProcAddress() give functions as pointers to data. */
#define STORE_FUNCTION(to, address) memcpy((to), &(address), sizeof(address))

/* dlopen() the first of `names` that is there, or what the environment variable names. */
static vmm_status open_library(const char *variable, const char *const *names, void **out,
                               const char **name) {
    const char *chosen = getenv(variable), *why = NULL;
    const char *const only[] = {chosen, NULL};
    if (chosen && *chosen)
        names = only;
    /* One that the process uses already comes first: two would not see each other's memory. */
    for (int loaded = 1; loaded >= 0; loaded--)
        for (const char *const *each = names; *each; each++) {
            int flags = RTLD_NOW | RTLD_LOCAL | (loaded ? RTLD_NOLOAD : 0);
            *name = *each;
            *out = dlopen(*name, flags);
            if (*out)
                return VMM_OK;
            const char *error = loaded ? NULL : dlerror();
            if (error && !strstr(error, "No such file") && !why)
                why = strdup(error);
        }
    vmm_status status = vmm_fail(VMM_ERR_NO_DRIVER, "device_open",
                                 "no " GPU_VENDOR " driver: %s%s; device='host' works",
                                 why ? why : names[0], why ? "" : " not found");
    free((char *)why);
    return status;
}

static vmm_status fail_forked(void) {
    return vmm_fail(VMM_ERR_FORKED, "device_open",
                    GPU_VENDOR " cannot be used in a process forked from one that uses it: "
                               "start this one by spawn; device='host' works");
}

/* Load the kernels of `image`, in the current context, and with them their code: a
 * function that is loaded at its first launch would be so within someone's capture. */
static gpu_result load_image(gpu_device *device, const void *image, const char **operation) {
    gpu_module module;
    gpu_function functions[GPU_N_KERNELS];
    *operation = GPU_NAME(ModuleLoadData);
    gpu_result code = driver.calls.GPU(ModuleLoadData)(&module, image);
    if (code != GPU_SUCCESS)
        return code;
    for (int i = 0; i < GPU_N_KERNELS && code == GPU_SUCCESS; i++) {
        *operation = GPU_NAME(ModuleGetFunction);
        code = driver.calls.GPU(ModuleGetFunction)(&functions[i], module, kernel_names[i]);
        if (code == GPU_SUCCESS)
            code = load_function(functions[i], operation);
    }
    if (code != GPU_SUCCESS) {
        driver.calls.GPU(ModuleUnload)(module);
        return code;
    }
    memcpy(device->kernels, functions, sizeof functions);
    return GPU_SUCCESS;
}

/* Make the record of a device. From here on its context is retained, so the record stays
 * even when no kernel can be loaded. */
static vmm_status add_device(int index, gpu_device **out) {
    gpu_device *device = calloc(1, sizeof *device);
    if (!device)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "device_open", "no host memory left");
    device->index = index;
    vmm_status status = find_device(index, device);
    if (status) {
        free(device);
        return status;
    }
    device->next = driver.devices;
    driver.devices = device;
    *out = device;
    return VMM_OK;
}

static vmm_status open_device(int index, gpu_device **out) {
    gpu_device *device = driver.devices;
    while (device && device->index != index)
        device = device->next;
    if (!device) {
        /* Retaining may create the context, which a capture elsewhere would forbid. */
        gpu_capture_mode mode = GPU_CAPTURE_MODE_RELAXED;
        vmm_status status = CALL(GPU(ThreadExchangeStreamCaptureMode), &mode);
        if (status)
            return status;
        status = add_device(index, &device);
        driver.calls.GPU(ThreadExchangeStreamCaptureMode)(&mode);
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

static vmm_status gpu_open(int index, void **state) {
    gpu_device *device = NULL;
    pthread_mutex_lock(&driver.lock);
    vmm_status status = driver.is_loaded && driver.process != vmm_process ? fail_forked() : VMM_OK;
    if (!status && !driver.is_loaded)
        status = load();
    if (!status) {
        driver.is_loaded = true;
        driver.process = vmm_process;
        status = open_device(index, &device);
    }
    pthread_mutex_unlock(&driver.lock);
    *state = device;
    return status;
}

static void gpu_close(void *state) {
    (void)state; /* kept for the next open: other libraries share what the device has */
}

/* ---- Memory ------------------------------------------------------------------- */

static gpu_properties block_properties(const gpu_device *device) {
    return (gpu_properties){
        .type = GPU_ALLOCATION_PINNED,
        .location = {GPU_LOCATION_DEVICE, device->device},
    };
}

static vmm_status query_device(const gpu_device *device, vmm_device_info *out) {
    gpu_properties properties = block_properties(device);
    vmm_status status;
    if ((status = CALL(GPU(DeviceGetName), out->description, (int)sizeof out->description,
                       device->device)) ||
        (status = CALL(GPU(MemGetAllocationGranularity), &out->granularity_bytes, &properties,
                       GPU_GRANULARITY_MINIMUM)) ||
        (status = CALL(GPU(MemGetAllocationGranularity), &out->recommended_bytes, &properties,
                       GPU_GRANULARITY_RECOMMENDED)) ||
        (status = CALL(GPU(MemGetInfo), &out->free_bytes, &out->total_bytes)) ||
        (status = is_exportable(device, &out->exportable_handles)))
        return status;
    out->driver_version = driver.version;
    snprintf(out->kernel, sizeof out->kernel, "%s", device->kernel_form);
    return VMM_OK;
}

static vmm_status gpu_query(void *state, vmm_device_info *out) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, query_device(state, out));
}

static vmm_status gpu_reserve(void *state, size_t bytes, size_t alignment, uintptr_t *out) {
    visit visit;
    gpu_address base = 0;
    vmm_status status = enter_relaxed(state, &visit);
    if (status)
        return status;
    gpu_result code =
        driver.calls.GPU(MemAddressReserve)(&base, bytes, alignment, (gpu_address)0, 0);
    if (code != GPU_SUCCESS) {
        /* Addresses, not memory, whatever the code: giving memory back would not help. */
        vmm_size_text size;
        char hint[96];
        snprintf(hint, sizeof hint, ": %s of addresses were refused, ask for a smaller capacity",
                 vmm_format_bytes(bytes, &size));
        status = fail(VMM_ERR_DRIVER, code, GPU_NAME(MemAddressReserve), hint);
    }
    *out = (uintptr_t)base;
    return leave(&visit, status);
}

static vmm_status gpu_free(void *state, uintptr_t base, size_t bytes) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(GPU(MemAddressFree), (gpu_address)base, bytes));
}

static vmm_status gpu_create(void *state, size_t bytes, driver_handle *out) {
    visit visit;
    gpu_properties properties = block_properties(state);
    gpu_handle handle = (gpu_handle)0;
    vmm_status status = enter_relaxed(state, &visit);
    if (status)
        return status;
    gpu_result code = driver.calls.GPU(MemCreate)(&handle, bytes, &properties, 0);
    if (code != GPU_SUCCESS) {
        vmm_size_text size;
        char hint[64];
        snprintf(hint, sizeof hint, ", for a block of %s", vmm_format_bytes(bytes, &size));
        status = fail(status_of(code), code, GPU_NAME(MemCreate), hint);
    }
    *out = (driver_handle)(uintptr_t)handle;
    return leave(&visit, status);
}

static vmm_status gpu_release(void *state, driver_handle handle, size_t bytes) {
    visit visit;
    (void)bytes;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(GPU(MemRelease), (gpu_handle)(uintptr_t)handle));
}

static vmm_status gpu_map(void *state, uintptr_t address, size_t bytes, driver_handle handle) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status
                  : leave(&visit, CALL(GPU(MemMap), (gpu_address)address, bytes, 0,
                                       (gpu_handle)(uintptr_t)handle, 0));
}

static vmm_status gpu_unmap(void *state, uintptr_t address, size_t bytes) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(GPU(MemUnmap), (gpu_address)address, bytes));
}

static vmm_status gpu_set_access(void *state, uintptr_t address, size_t bytes) {
    visit visit;
    const gpu_device *device = state;
    const gpu_access access = {
        .location = {GPU_LOCATION_DEVICE, device->device},
        .flags = GPU_ACCESS_READWRITE,
    };
    vmm_status status = enter_relaxed(device, &visit);
    if (status)
        return status;
    /* Under WSL2 it is not ready now and then when threads map at once: wait for 50 us, then
     * each time twice as long, 6 ms in all. */
    struct timespec pause = {.tv_nsec = 50 * 1000};
    gpu_result code = driver.calls.GPU(MemSetAccess)((gpu_address)address, bytes, &access, 1);
    for (int i = 1; code == GPU_ERROR_NOT_READY && i < SET_ACCESS_ATTEMPTS; i++) {
        nanosleep(&pause, NULL);
        pause.tv_nsec *= 2;
        code = driver.calls.GPU(MemSetAccess)((gpu_address)address, bytes, &access, 1);
    }
    return leave(&visit, checked(code, GPU_NAME(MemSetAccess)));
}

/* ---- Work on streams -------------------------------------------------------------- */

static vmm_status gpu_copy(void *state, uintptr_t dst, const void *src, size_t bytes,
                           vmm_stream stream) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status
                  : leave(&visit, CALL(GPU(MemcpyHtoDAsync), (gpu_address)dst, (void *)src, bytes,
                                       stream_of(stream)));
}

static vmm_status gpu_fill(void *state, uintptr_t dst, size_t bytes, vmm_stream stream) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status
                  : leave(&visit,
                          CALL(GPU(MemsetD8Async), (gpu_address)dst, 0, bytes, stream_of(stream)));
}

/* Is the stream being captured? The default stream cannot be, and may not even be asked while
 * another one is. Between enter() and leave(). */
static vmm_status find_capture(vmm_stream stream, bool *captured) {
    gpu_capture_status capture = GPU_CAPTURE_STATUS_NONE;
    vmm_status status = VMM_OK;
    if (stream && stream != VMM_STREAM_LEGACY)
        status =
            CALL(GPU(StreamGetCaptureInfo), stream_of(stream), &capture, NULL, NULL, NULL, NULL);
    *captured = capture != GPU_CAPTURE_STATUS_NONE;
    return status;
}

/* The parameters stay where the caller has them; the driver copies them. With `captured`, only
 * on a stream that is not being captured. */
static vmm_status launch(const gpu_device *device, gpu_kernel kernel, const unsigned grid[3],
                         unsigned n_threads, const void *args, vmm_stream stream, bool *captured) {
    visit visit;
    void *parameters[] = {(void *)args};
    vmm_status status = enter(device, &visit);
    if (status)
        return status;
    if (captured)
        status = find_capture(stream, captured);
    if (!status && !(captured && *captured))
        status = CALL(GPU(LaunchKernel), device->kernels[kernel], grid[0], grid[1], grid[2],
                      n_threads, 1, 1, 0, stream_of(stream), parameters, NULL);
    return leave(&visit, status);
}

/* Blocks that give a thread to each of `n_units`, or as many as there may be. */
static unsigned block_count(uint64_t n_units, unsigned n_threads, uint64_t max_blocks) {
    uint64_t n_blocks = (n_units + n_threads - 1) / n_threads;
    if (n_blocks > max_blocks)
        n_blocks = max_blocks;
    return n_blocks ? (unsigned)n_blocks : 1;
}

/* One thread for each unit of the largest job, until the device is full: then each takes
 * several. */
static vmm_status launch_jobs(const gpu_device *device, gpu_kernel kernel, const void *args,
                              size_t n_jobs, uint64_t n_units, vmm_stream stream, bool *captured) {
    unsigned n_blocks = block_count(n_units, VMM_APPEND_BLOCK_THREADS, device->max_blocks / n_jobs);
    const unsigned grid[] = {n_blocks, (unsigned)n_jobs, 1};
    return launch(device, kernel, grid, VMM_APPEND_BLOCK_THREADS, args, stream, captured);
}

static vmm_status gpu_launch(void *state, const vmm_append_args *args, size_t n_jobs,
                             vmm_stream stream, bool *captured) {
    const gpu_device *device = state;
    uint64_t n_units = 0;
    for (size_t i = 0; i < n_jobs; i++)
        n_units = args->job[i].n_units > n_units ? args->job[i].n_units : n_units;
    return launch_jobs(device, GPU_KERNEL_APPEND, args, n_jobs, n_units, stream, captured);
}

static vmm_status gpu_launch_wide(void *state, const vmm_append_args_wide *args, size_t n_jobs,
                                  vmm_stream stream, bool *captured) {
    const gpu_device *device = state;
    uint64_t n_units = 0;
    for (size_t i = 0; i < n_jobs; i++)
        n_units = args->job[i].n_units > n_units ? args->job[i].n_units : n_units;
    return launch_jobs(device, GPU_KERNEL_APPEND_WIDE, args, n_jobs, n_units, stream, captured);
}

/* Blocks for each run. Where pieces differ in size, the share of those that need few goes to
 * those that need many: what is without work ends at once. */
static uint64_t blocks_for_pieces(const gpu_device *device, const vmm_append_args_pieces *args,
                                  size_t n_pieces) {
    uint64_t most = 0, n_blocks = device->max_blocks / (n_pieces * args->n_runs);
    for (size_t i = 0; i < n_pieces; i++)
        most = args->piece[i].n_units > most ? args->piece[i].n_units : most;
    most = block_count(most, VMM_APPEND_BLOCK_THREADS, UINT32_MAX);
    n_blocks = n_blocks ? n_blocks : 1;
    while (n_blocks < most) {
        uint64_t working = 0;
        for (size_t i = 0; i < n_pieces; i++) {
            uint64_t needed =
                block_count(args->piece[i].n_units, VMM_APPEND_BLOCK_THREADS, UINT32_MAX);
            working += needed < 2 * n_blocks ? needed : 2 * n_blocks;
        }
        if (working * args->n_runs > device->max_blocks)
            break;
        n_blocks *= 2;
    }
    return n_blocks < most ? n_blocks : most;
}

static vmm_status gpu_launch_pieces(void *state, const vmm_append_args_pieces *args,
                                    size_t n_pieces, vmm_stream stream, bool *captured) {
    const gpu_device *device = state;
    const unsigned grid[] = {(unsigned)blocks_for_pieces(device, args, n_pieces),
                             (unsigned)n_pieces, (unsigned)args->n_runs};
    return launch(device, GPU_KERNEL_APPEND_PIECES, grid, VMM_APPEND_BLOCK_THREADS, args, stream,
                  captured);
}

static vmm_status gpu_launch_cursor(void *state, vmm_cursor_args *args, size_t n_jobs,
                                    vmm_stream stream) {
    const gpu_device *device = state;
    uint64_t n_entries = 0;
    unsigned grid[] = {1, 1, (unsigned)n_jobs};
    for (size_t i = 0; i < n_jobs; i++)
        n_entries += args->job[i].n_entries;
    for (size_t i = 0; i < n_jobs; i++) {
        vmm_cursor_job *job = &args->job[i];
        job->n_blocks = block_count(job->copy.n_units, VMM_CURSOR_BLOCK_THREADS,
                                    device->max_blocks / n_entries);
        grid[0] = job->n_blocks > grid[0] ? job->n_blocks : grid[0];
        grid[1] = job->n_entries > grid[1] ? job->n_entries : grid[1];
    }
    return launch(device, GPU_KERNEL_APPEND_CURSOR, grid, VMM_CURSOR_BLOCK_THREADS, args, stream,
                  NULL);
}

static vmm_status gpu_set_cursor(void *state, const vmm_cursor_set_args *args, vmm_stream stream,
                                 bool *captured) {
    static const unsigned grid[] = {1, 1, 1};
    return launch(state, GPU_KERNEL_CURSOR, grid, VMM_CURSOR_BLOCK_THREADS, args, stream, captured);
}

#include "driver_gpu_streams.h"

/* The table's entries but for what the vendor sets: kind and the like. */
#define GPU_DRIVER_OPS                                                                             \
    .is_async = true, .device_name = GPU_DEVICE, .open = gpu_open, .close = gpu_close,             \
    .query = gpu_query, .reserve = gpu_reserve, .free = gpu_free, .create = gpu_create,            \
    .release = gpu_release, .map = gpu_map, .unmap = gpu_unmap, .set_access = gpu_set_access,      \
    .copy = gpu_copy, .fill = gpu_fill, .launch = gpu_launch, .launch_wide = gpu_launch_wide,      \
    .launch_pieces = gpu_launch_pieces, .launch_cursor = gpu_launch_cursor,                        \
    .set_cursor = gpu_set_cursor, .allocate = gpu_allocate, .allocate_host = gpu_allocate_host,    \
    .deallocate = gpu_deallocate, .deallocate_host = gpu_deallocate_host, .write = gpu_write,      \
    .read = gpu_read, .retain = gpu_retain, .stream_check = gpu_stream_check,                      \
    .stream_capture = gpu_stream_capture, .stream_synchronize = gpu_stream_synchronize,            \
    .event_create = gpu_event_create, .event_destroy = gpu_event_destroy,                          \
    .event_record = gpu_event_record, .event_wait = gpu_event_wait,                                \
    .event_query = gpu_event_query, .event_synchronize = gpu_event_synchronize,                    \
    .fence = gpu_fence, .fence_waits = fence_waits

#endif /* VMM_DRIVER_GPU_H */
