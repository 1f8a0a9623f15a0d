/* hip_entry.c - the simulator under HIP's names: build/sim/libamdhip64.so.
 *
 * HIP follows CUDA call by call, so each of its calls is the simulator's of the same meaning,
 * counted, failed and reported by HIP's name. What HIP does otherwise stands here and in
 * sim_vendor_here: every thread has a current device, and from the start it is 0; a mapping is
 * unmapped and given access by itself; there is no handle for the default stream but 0; a
 * captured stream waits for nothing outside. The types are those of hip_abi.h, which
 * tests/c/test_hip_abi.c compares with AMD's own.
 */
#define _GNU_SOURCE
#include <string.h>

#include "../../libvmm/src/hip_abi.h"
#include "sim.h"

#define ARCHITECTURE "gfx942" /* of the simulated devices */
#define BUNDLE_MAGIC "__CLANG_OFFLOAD_BUNDLE__"
#define SIMULATED_MAGIC "vmm-sim code for " ARCHITECTURE
#define EM_AMDGPU 224

/* ---- names ------------------------------------------------------------------------------- */
static const char *const names[SIM_N_CALLS] = {
    [SIM_cuInit] = "hipInit",
    [SIM_cuDriverGetVersion] = "hipRuntimeGetVersion",
    [SIM_cuGetErrorName] = "hipGetErrorName",
    [SIM_cuGetErrorString] = "hipGetErrorString",
    [SIM_cuDeviceGetCount] = "hipGetDeviceCount",
    [SIM_cuDeviceGet] = "hipDeviceGet",
    [SIM_cuDeviceGetName] = "hipDeviceGetName",
    [SIM_cuDeviceGetAttribute] = "hipDeviceGetAttribute",
    [SIM_cuCtxGetCurrent] = "hipGetDevice",
    [SIM_cuCtxSetCurrent] = "hipSetDevice",
    [SIM_cuCtxSynchronize] = "hipDeviceSynchronize",
    [SIM_cuThreadExchangeStreamCaptureMode] = "hipThreadExchangeStreamCaptureMode",
    [SIM_cuMemGetInfo] = "hipMemGetInfo",
    [SIM_cuMemGetAllocationGranularity] = "hipMemGetAllocationGranularity",
    [SIM_cuMemAddressReserve] = "hipMemAddressReserve",
    [SIM_cuMemAddressFree] = "hipMemAddressFree",
    [SIM_cuMemCreate] = "hipMemCreate",
    [SIM_cuMemRelease] = "hipMemRelease",
    [SIM_cuMemMap] = "hipMemMap",
    [SIM_cuMemUnmap] = "hipMemUnmap",
    [SIM_cuMemSetAccess] = "hipMemSetAccess",
    [SIM_cuMemAlloc] = "hipMalloc",
    [SIM_cuMemFree] = "hipFree",
    [SIM_cuMemHostAlloc] = "hipHostMalloc",
    [SIM_cuMemFreeHost] = "hipHostFree",
    [SIM_cuMemcpyHtoD] = "hipMemcpyHtoD",
    [SIM_cuMemcpyDtoH] = "hipMemcpyDtoH",
    [SIM_cuMemcpyHtoDAsync] = "hipMemcpyHtoDAsync",
    [SIM_cuMemcpyDtoHAsync] = "hipMemcpyDtoHAsync",
    [SIM_cuMemcpyDtoDAsync] = "hipMemcpyDtoDAsync",
    [SIM_cuMemsetD8Async] = "hipMemsetD8Async",
    [SIM_cuModuleLoadData] = "hipModuleLoadData",
    [SIM_cuModuleGetFunction] = "hipModuleGetFunction",
    [SIM_cuModuleUnload] = "hipModuleUnload",
    [SIM_cuLaunchKernel] = "hipModuleLaunchKernel",
    [SIM_cuLaunchHostFunc] = "hipLaunchHostFunc",
    [SIM_cuEventCreate] = "hipEventCreateWithFlags",
    [SIM_cuEventDestroy] = "hipEventDestroy",
    [SIM_cuEventRecord] = "hipEventRecord",
    [SIM_cuEventQuery] = "hipEventQuery",
    [SIM_cuEventSynchronize] = "hipEventSynchronize",
    [SIM_cuStreamCreate] = "hipStreamCreateWithFlags",
    [SIM_cuStreamDestroy] = "hipStreamDestroy",
    [SIM_cuStreamQuery] = "hipStreamQuery",
    [SIM_cuStreamSynchronize] = "hipStreamSynchronize",
    [SIM_cuStreamWaitEvent] = "hipStreamWaitEvent",
    [SIM_cuStreamGetCtx] = "hipGetStreamDeviceId",
    [SIM_cuStreamGetCaptureInfo] = "hipStreamGetCaptureInfo_v2",
    [SIM_cuStreamBeginCapture] = "hipStreamBeginCapture",
    [SIM_cuStreamEndCapture] = "hipStreamEndCapture",
    [SIM_cuUserObjectCreate] = "hipUserObjectCreate",
    [SIM_cuUserObjectRelease] = "hipUserObjectRelease",
    [SIM_cuGraphRetainUserObject] = "hipGraphRetainUserObject",
    [SIM_cuGraphInstantiateWithFlags] = "hipGraphInstantiateWithFlags",
    [SIM_cuGraphLaunch] = "hipGraphLaunch",
    [SIM_cuGraphDestroy] = "hipGraphDestroy",
    [SIM_cuGraphExecDestroy] = "hipGraphExecDestroy",
};

/* ---- code objects -------------------------------------------------------------------------- */
static CUresult check_code_object(const unsigned char *image, size_t bytes) {
    uint16_t machine;
    if (bytes < 64 || memcmp(image, "\177ELF", 4) != 0)
        return CUDA_ERROR_INVALID_IMAGE;
    memcpy(&machine, image + 18, sizeof machine);
    return machine == EM_AMDGPU ? CUDA_SUCCESS : CUDA_ERROR_NO_BINARY_FOR_GPU;
}

/* A bundle of clang's: the magic, a count, and for each code object where it begins, its size,
 * the size of its target's name, and the name. Or the text that stands for one where there is
 * no compiler (tests/sim/append.simcode). */
static CUresult check_image(const void *image, const void **code, size_t *bytes) {
    const unsigned char *at = image;
    uint64_t n, entry[3];
    if (strncmp(image, SIMULATED_MAGIC, strlen(SIMULATED_MAGIC)) == 0) {
        *code = image;
        *bytes = strlen(image);
        return CUDA_SUCCESS;
    }
    if (strncmp(image, BUNDLE_MAGIC, strlen(BUNDLE_MAGIC)) != 0)
        return CUDA_ERROR_INVALID_IMAGE;
    at += strlen(BUNDLE_MAGIC);
    memcpy(&n, at, sizeof n);
    at += sizeof n;
    for (; n-- > 0; at += sizeof entry + entry[2]) {
        memcpy(entry, at, sizeof entry);
        const char *target = (const char *)at + sizeof entry;
        const size_t length = strlen(ARCHITECTURE);
        if (entry[2] < length || memcmp(target + entry[2] - length, ARCHITECTURE, length) != 0)
            continue;
        *code = (const unsigned char *)image + entry[0];
        *bytes = entry[1];
        return check_code_object(*code, *bytes);
    }
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
}

const sim_vendor sim_vendor_here = {
    .names = names,
    .driver_version = 60342134, /* ROCm 6.3 */
    .mappings_one_by_one = true,
    .has_default_device = true,
    .always_knows_streams = true,
    .check_image = check_image,
};

/* ---- errors ------------------------------------------------------------------------------- */
static const struct {
    int value;
    const char *name;
} errors[] = {
    {0, "hipSuccess"},
    {1, "hipErrorInvalidValue"},
    {2, "hipErrorOutOfMemory"},
    {3, "hipErrorNotInitialized"},
    {4, "hipErrorDeinitialized"},
    {100, "hipErrorNoDevice"},
    {101, "hipErrorInvalidDevice"},
    {200, "hipErrorInvalidImage"},
    {201, "hipErrorInvalidContext"},
    {205, "hipErrorMapFailed"},
    {206, "hipErrorUnmapFailed"},
    {208, "hipErrorAlreadyMapped"},
    {209, "hipErrorNoBinaryForGpu"},
    {211, "hipErrorNotMapped"},
    {214, "hipErrorECCNotCorrectable"},
    {304, "hipErrorOperatingSystem"},
    {400, "hipErrorInvalidHandle"},
    {401, "hipErrorIllegalState"},
    {500, "hipErrorNotFound"},
    {600, "hipErrorNotReady"},
    {700, "hipErrorIllegalAddress"},
    {701, "hipErrorLaunchOutOfResources"},
    {702, "hipErrorLaunchTimeOut"},
    {709, "hipErrorContextIsDestroyed"},
    {719, "hipErrorLaunchFailure"},
    {801, "hipErrorNotSupported"},
    {900, "hipErrorStreamCaptureUnsupported"},
    {901, "hipErrorStreamCaptureInvalidated"},
    {902, "hipErrorStreamCaptureMerge"},
    {903, "hipErrorStreamCaptureUnmatched"},
    {904, "hipErrorStreamCaptureUnjoined"},
    {905, "hipErrorStreamCaptureIsolation"},
    {906, "hipErrorStreamCaptureImplicit"},
    {907, "hipErrorCapturedEvent"},
    {908, "hipErrorStreamCaptureWrongThread"},
};

/* HIP names what it does not know, too. */
static const char *describe(sim_call call, hipError_t error, const char *unknown, bool want_name) {
    static const char *const texts[] = {
#define TEXT(value, name, text) [value] = text,
        CUDA_STATUS_LIST(TEXT)
#undef TEXT
    };
    const char *found = unknown;
    if (sim_enter(call))
        return unknown;
    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++)
        if (errors[i].value == (int)error)
            found = want_name ? errors[i].name : texts[error];
    sim_leave(CUDA_SUCCESS);
    return found;
}

const char *hipGetErrorName(hipError_t error) {
    return describe(SIM_cuGetErrorName, error, "hipErrorUnknown", true);
}

const char *hipGetErrorString(hipError_t error) {
    return describe(SIM_cuGetErrorString, error, "unknown error", false);
}

/* ---- the start, devices -------------------------------------------------------------------- */
int hipInit(unsigned flags) {
    return cuInit(flags);
}

int hipRuntimeGetVersion(int *version) {
    return cuDriverGetVersion(version);
}

int hipGetDeviceCount(int *count) {
    return cuDeviceGetCount(count);
}

int hipDeviceGet(int *device, int index) {
    return cuDeviceGet(device, index);
}

int hipDeviceGetName(char *name, int length, int device) {
    return cuDeviceGetName(name, length, device);
}

int hipDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case hipDeviceAttributeMultiprocessorCount:
        return cuDeviceGetAttribute(value, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
    case hipDeviceAttributeVirtualMemoryManagementSupported:
        return cuDeviceGetAttribute(value, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                                    device);
    default: return cuDeviceGetAttribute(value, -1, device); /* not modelled: refused */
    }
}

int hipGetDevice(int *device) {
    CUresult status = sim_enter(SIM_cuCtxGetCurrent);
    if (status)
        return status;
    *device = sim_current()->device;
    return sim_leave(CUDA_SUCCESS);
}

int hipSetDevice(int device) {
    if (device >= 0 && device < sim.n_devices)
        return cuCtxSetCurrent(sim_context_of(device));
    CUresult status = sim_enter(SIM_cuCtxSetCurrent);
    return status ? status : sim_leave(CUDA_ERROR_INVALID_DEVICE);
}

int hipDeviceSynchronize(void) {
    return cuCtxSynchronize();
}

int hipThreadExchangeStreamCaptureMode(int *mode) {
    return cuThreadExchangeStreamCaptureMode(mode);
}

/* ---- memory ---------------------------------------------------------------------------------- */
#define ADDRESS(pointer) ((CUdeviceptr)(uintptr_t)(pointer))
#define HANDLE(handle) ((CUmemGenericAllocationHandle)(uintptr_t)(handle))

static CUmemAllocationProp properties_of(const hipMemAllocationProp *from) {
    return (CUmemAllocationProp){
        .type = from->type,
        .requestedHandleTypes = from->requestedHandleType,
        .location = {from->location.type, from->location.id},
        .win32HandleMetaData = from->win32HandleMetaData,
        .allocFlags = {.compressionType = from->allocFlags.compressionType,
                       .gpuDirectRDMACapable = from->allocFlags.gpuDirectRDMACapable,
                       .usage = from->allocFlags.usage},
    };
}

int hipMemGetInfo(size_t *available, size_t *total) {
    return cuMemGetInfo_v2(available, total);
}

int hipMemGetAllocationGranularity(size_t *out, const hipMemAllocationProp *properties, int which) {
    CUmemAllocationProp same = properties_of(properties);
    return cuMemGetAllocationGranularity(out, &same, which);
}

int hipMemAddressReserve(void **base, size_t bytes, size_t alignment, void *wanted,
                         unsigned long long flags) {
    CUdeviceptr address = 0;
    int status = cuMemAddressReserve(&address, bytes, alignment, ADDRESS(wanted), flags);
    if (!status)
        *base = (void *)(uintptr_t)address;
    return status;
}

int hipMemAddressFree(void *base, size_t bytes) {
    return cuMemAddressFree(ADDRESS(base), bytes);
}

int hipMemCreate(hipMemGenericAllocationHandle_t *out, size_t bytes,
                 const hipMemAllocationProp *properties, unsigned long long flags) {
    CUmemAllocationProp same = properties_of(properties);
    CUmemGenericAllocationHandle handle = 0;
    int status = cuMemCreate(&handle, bytes, &same, flags);
    if (!status)
        *out = (hipMemGenericAllocationHandle_t)(uintptr_t)handle;
    return status;
}

int hipMemRelease(hipMemGenericAllocationHandle_t handle) {
    return cuMemRelease(HANDLE(handle));
}

int hipMemMap(void *address, size_t bytes, size_t offset, hipMemGenericAllocationHandle_t handle,
              unsigned long long flags) {
    return cuMemMap(ADDRESS(address), bytes, offset, HANDLE(handle), flags);
}

int hipMemUnmap(void *address, size_t bytes) {
    return cuMemUnmap(ADDRESS(address), bytes);
}

int hipMemSetAccess(void *address, size_t bytes, const hipMemAccessDesc *access, size_t count) {
    CUmemAccessDesc same[SIM_MAX_DEVICES];
    for (size_t i = 0; i < count && i < SIM_MAX_DEVICES; i++)
        same[i] =
            (CUmemAccessDesc){{access[i].location.type, access[i].location.id}, access[i].flags};
    return cuMemSetAccess(ADDRESS(address), bytes, same, count);
}

int hipMalloc(void **out, size_t bytes) {
    CUdeviceptr address = 0;
    int status = cuMemAlloc_v2(&address, bytes);
    *out = (void *)(uintptr_t)address;
    return status;
}

int hipFree(void *address) {
    return cuMemFree_v2(ADDRESS(address));
}

int hipHostMalloc(void **out, size_t bytes, unsigned flags) {
    return cuMemHostAlloc(out, bytes, flags);
}

int hipHostFree(void *address) {
    return cuMemFreeHost(address);
}

int hipMemcpyHtoD(void *dst, void *src, size_t bytes) {
    return cuMemcpyHtoD_v2(ADDRESS(dst), src, bytes);
}

int hipMemcpyDtoH(void *dst, void *src, size_t bytes) {
    return cuMemcpyDtoH_v2(dst, ADDRESS(src), bytes);
}

int hipMemcpyHtoDAsync(void *dst, void *src, size_t bytes, CUstream stream) {
    return cuMemcpyHtoDAsync_v2(ADDRESS(dst), src, bytes, stream);
}

int hipMemcpyDtoHAsync(void *dst, void *src, size_t bytes, CUstream stream) {
    return cuMemcpyDtoHAsync_v2(dst, ADDRESS(src), bytes, stream);
}

int hipMemcpyDtoDAsync(void *dst, void *src, size_t bytes, CUstream stream) {
    return cuMemcpyDtoDAsync_v2(ADDRESS(dst), ADDRESS(src), bytes, stream);
}

int hipMemsetD8Async(void *dst, unsigned char value, size_t bytes, CUstream stream) {
    return cuMemsetD8Async(ADDRESS(dst), value, bytes, stream);
}

/* ---- kernels ----------------------------------------------------------------------------------- */
int hipModuleLoadData(CUmodule *out, const void *image) {
    return cuModuleLoadData(out, image);
}

int hipModuleUnload(CUmodule module) {
    return cuModuleUnload(module);
}

int hipModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
    return cuModuleGetFunction(out, module, name);
}

int hipModuleLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                          unsigned block_x, unsigned block_y, unsigned block_z,
                          unsigned shared_bytes, CUstream stream, void **params, void **extra) {
    return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes,
                          stream, params, extra);
}

int hipLaunchHostFunc(CUstream stream, CUhostFn call, void *user_data) {
    return cuLaunchHostFunc(stream, call, user_data);
}

/* ---- streams, events, graphs -------------------------------------------------------------------- */
int hipStreamCreateWithFlags(CUstream *out, unsigned flags) {
    return cuStreamCreate(out, flags);
}

int hipStreamDestroy(CUstream stream) {
    return cuStreamDestroy_v2(stream);
}

int hipStreamQuery(CUstream stream) {
    return cuStreamQuery(stream);
}

int hipStreamSynchronize(CUstream stream) {
    return cuStreamSynchronize(stream);
}

int hipStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    if (!flags)
        return cuStreamWaitEvent(stream, event, 0);
    CUresult status = sim_enter(SIM_cuStreamWaitEvent);
    return status ? status : sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "flags 0x%x", flags));
}

/* A device or -1, and no status. */
int hipGetStreamDeviceId(CUstream stream) {
    CUcontext context = NULL;
    return cuStreamGetCtx(stream, &context) ? -1 : context->device;
}

int hipStreamGetCaptureInfo_v2(CUstream stream, int *state, unsigned long long *id, CUgraph *graph,
                               const CUgraphNode **nodes, size_t *n_nodes) {
    uint64_t number = 0;
    int status = cuStreamGetCaptureInfo_v2(stream, state, &number, graph, nodes, n_nodes);
    if (!status && id)
        *id = number;
    return status;
}

int hipStreamBeginCapture(CUstream stream, int mode) {
    return cuStreamBeginCapture_v2(stream, mode);
}

int hipStreamEndCapture(CUstream stream, CUgraph *out) {
    return cuStreamEndCapture(stream, out);
}

int hipEventCreateWithFlags(CUevent *out, unsigned flags) {
    return cuEventCreate(out, flags);
}

int hipEventDestroy(CUevent event) {
    return cuEventDestroy_v2(event);
}

int hipEventRecord(CUevent event, CUstream stream) {
    return cuEventRecord(event, stream);
}

int hipEventQuery(CUevent event) {
    return cuEventQuery(event);
}

int hipEventSynchronize(CUevent event) {
    return cuEventSynchronize(event);
}

int hipUserObjectCreate(CUuserObject *out, void *user_data, CUhostFn destroy, unsigned n_references,
                        unsigned flags) {
    return cuUserObjectCreate(out, user_data, destroy, n_references, flags);
}

int hipUserObjectRelease(CUuserObject object, unsigned n_references) {
    return cuUserObjectRelease(object, n_references);
}

int hipGraphRetainUserObject(CUgraph graph, CUuserObject object, unsigned n_references,
                             unsigned flags) {
    return cuGraphRetainUserObject(graph, object, n_references, flags);
}

int hipGraphInstantiateWithFlags(CUgraphExec *out, CUgraph graph, unsigned long long flags) {
    return cuGraphInstantiateWithFlags(out, graph, flags);
}

int hipGraphLaunch(CUgraphExec exec, CUstream stream) {
    return cuGraphLaunch(exec, stream);
}

int hipGraphDestroy(CUgraph graph) {
    return cuGraphDestroy(graph);
}

int hipGraphExecDestroy(CUgraphExec exec) {
    return cuGraphExecDestroy(exec);
}
