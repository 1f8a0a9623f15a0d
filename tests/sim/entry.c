/* entry.c - what makes the simulator a CUDA driver: entry points by name and version, the names
 * of calls and errors, the kinds of code. In the library under HIP's names, hip_entry.c. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "sim.h"

#define FATBIN_MAGIC 0xBA55ED50u

/* Name, the CUDA version that brought this form of it, the exported symbol. Several forms of a
 * name stand in the order of their versions. Forms before CUDA 11.0 that differ are left out. */
#define ENTRIES(X)                                                                                 \
    X(cuGetProcAddress, 11030, cuGetProcAddress)                                                   \
    X(cuGetProcAddress, 12000, cuGetProcAddress_v2)                                                \
    X(cuInit, 2000, cuInit)                                                                        \
    X(cuDriverGetVersion, 2020, cuDriverGetVersion)                                                \
    X(cuGetErrorName, 6000, cuGetErrorName)                                                        \
    X(cuGetErrorString, 6000, cuGetErrorString)                                                    \
    X(cuDeviceGetCount, 2000, cuDeviceGetCount)                                                    \
    X(cuDeviceGet, 2000, cuDeviceGet)                                                              \
    X(cuDeviceGetName, 2000, cuDeviceGetName)                                                      \
    X(cuDeviceGetUuid, 11040, cuDeviceGetUuid_v2)                                                  \
    X(cuDeviceTotalMem, 3020, cuDeviceTotalMem_v2)                                                 \
    X(cuDeviceGetAttribute, 2000, cuDeviceGetAttribute)                                            \
    X(cuDevicePrimaryCtxRetain, 7000, cuDevicePrimaryCtxRetain)                                    \
    X(cuDevicePrimaryCtxRelease, 11000, cuDevicePrimaryCtxRelease_v2)                              \
    X(cuDevicePrimaryCtxGetState, 7000, cuDevicePrimaryCtxGetState)                                \
    X(cuCtxGetCurrent, 4000, cuCtxGetCurrent)                                                      \
    X(cuCtxSetCurrent, 4000, cuCtxSetCurrent)                                                      \
    X(cuCtxPushCurrent, 4000, cuCtxPushCurrent_v2)                                                 \
    X(cuCtxPopCurrent, 4000, cuCtxPopCurrent_v2)                                                   \
    X(cuCtxGetDevice, 2000, cuCtxGetDevice)                                                        \
    X(cuCtxGetDevice, 13000, cuCtxGetDevice_v2)                                                    \
    X(cuCtxGetStreamPriorityRange, 5050, cuCtxGetStreamPriorityRange)                              \
    X(cuCtxSynchronize, 2000, cuCtxSynchronize)                                                    \
    X(cuCtxSynchronize, 13000, cuCtxSynchronize_v2)                                                \
    X(cuCtxRecordEvent, 12050, cuCtxRecordEvent)                                                   \
    X(cuThreadExchangeStreamCaptureMode, 10010, cuThreadExchangeStreamCaptureMode)                 \
    X(cuMemGetInfo, 3020, cuMemGetInfo_v2)                                                         \
    X(cuMemGetAllocationGranularity, 10020, cuMemGetAllocationGranularity)                         \
    X(cuMemAddressReserve, 10020, cuMemAddressReserve)                                             \
    X(cuMemAddressFree, 10020, cuMemAddressFree)                                                   \
    X(cuMemCreate, 10020, cuMemCreate)                                                             \
    X(cuMemRelease, 10020, cuMemRelease)                                                           \
    X(cuMemMap, 10020, cuMemMap)                                                                   \
    X(cuMemUnmap, 10020, cuMemUnmap)                                                               \
    X(cuMemSetAccess, 10020, cuMemSetAccess)                                                       \
    X(cuMemGetAccess, 10020, cuMemGetAccess)                                                       \
    X(cuMemExportToShareableHandle, 10020, cuMemExportToShareableHandle)                           \
    X(cuMemImportFromShareableHandle, 10020, cuMemImportFromShareableHandle)                       \
    X(cuMemAlloc, 3020, cuMemAlloc_v2)                                                             \
    X(cuMemFree, 3020, cuMemFree_v2)                                                               \
    X(cuMemHostAlloc, 2020, cuMemHostAlloc)                                                        \
    X(cuMemFreeHost, 2000, cuMemFreeHost)                                                          \
    X(cuMemGetAddressRange, 3020, cuMemGetAddressRange_v2)                                         \
    X(cuPointerGetAttribute, 4000, cuPointerGetAttribute)                                          \
    X(cuMemcpy, 4000, cuMemcpy)                                                                    \
    X(cuMemcpyAsync, 4000, cuMemcpyAsync)                                                          \
    X(cuMemcpyHtoD, 3020, cuMemcpyHtoD_v2)                                                         \
    X(cuMemcpyDtoH, 3020, cuMemcpyDtoH_v2)                                                         \
    X(cuMemcpyDtoD, 3020, cuMemcpyDtoD_v2)                                                         \
    X(cuMemcpyHtoDAsync, 3020, cuMemcpyHtoDAsync_v2)                                               \
    X(cuMemcpyDtoHAsync, 3020, cuMemcpyDtoHAsync_v2)                                               \
    X(cuMemcpyDtoDAsync, 3020, cuMemcpyDtoDAsync_v2)                                               \
    X(cuMemcpy2D, 3020, cuMemcpy2D_v2)                                                             \
    X(cuMemcpy2DAsync, 3020, cuMemcpy2DAsync_v2)                                                   \
    X(cuMemsetD8, 3020, cuMemsetD8_v2)                                                             \
    X(cuMemsetD8Async, 3020, cuMemsetD8Async)                                                      \
    X(cuMemsetD2D8Async, 3020, cuMemsetD2D8Async)                                                  \
    X(cuModuleLoadData, 2000, cuModuleLoadData)                                                    \
    X(cuModuleLoadDataEx, 2010, cuModuleLoadDataEx)                                                \
    X(cuModuleGetFunction, 2000, cuModuleGetFunction)                                              \
    X(cuModuleUnload, 2000, cuModuleUnload)                                                        \
    X(cuFuncLoad, 12040, cuFuncLoad)                                                               \
    X(cuFuncGetAttribute, 2020, cuFuncGetAttribute)                                                \
    X(cuOccupancyMaxActiveBlocksPerMultiprocessor, 6050,                                           \
      cuOccupancyMaxActiveBlocksPerMultiprocessor)                                                 \
    X(cuLaunchKernel, 4000, cuLaunchKernel)                                                        \
    X(cuLaunchHostFunc, 10000, cuLaunchHostFunc)                                                   \
    X(cuEventCreate, 2000, cuEventCreate)                                                          \
    X(cuEventDestroy, 4000, cuEventDestroy_v2)                                                     \
    X(cuEventRecord, 2000, cuEventRecord)                                                          \
    X(cuEventRecordWithFlags, 11010, cuEventRecordWithFlags)                                       \
    X(cuEventQuery, 2000, cuEventQuery)                                                            \
    X(cuEventSynchronize, 2000, cuEventSynchronize)                                                \
    X(cuEventElapsedTime, 2000, cuEventElapsedTime)                                                \
    X(cuStreamCreate, 2000, cuStreamCreate)                                                        \
    X(cuStreamCreateWithPriority, 5050, cuStreamCreateWithPriority)                                \
    X(cuStreamDestroy, 4000, cuStreamDestroy_v2)                                                   \
    X(cuStreamQuery, 2000, cuStreamQuery)                                                          \
    X(cuStreamSynchronize, 2000, cuStreamSynchronize)                                              \
    X(cuStreamWaitEvent, 3020, cuStreamWaitEvent)                                                  \
    X(cuStreamGetCtx, 9020, cuStreamGetCtx)                                                        \
    X(cuStreamGetCtx, 12050, cuStreamGetCtx_v2)                                                    \
    X(cuStreamGetFlags, 5050, cuStreamGetFlags)                                                    \
    X(cuStreamGetPriority, 5050, cuStreamGetPriority)                                              \
    X(cuStreamIsCapturing, 10000, cuStreamIsCapturing)                                             \
    X(cuStreamGetCaptureInfo, 10010, cuStreamGetCaptureInfo)                                       \
    X(cuStreamGetCaptureInfo, 11030, cuStreamGetCaptureInfo_v2)                                    \
    X(cuStreamGetCaptureInfo, 12030, cuStreamGetCaptureInfo_v3)                                    \
    X(cuStreamBeginCapture, 10010, cuStreamBeginCapture_v2)                                        \
    X(cuStreamEndCapture, 10000, cuStreamEndCapture)                                               \
    X(cuGraphInstantiate, 11000, cuGraphInstantiate_v2)                                            \
    X(cuGraphInstantiateWithFlags, 11040, cuGraphInstantiateWithFlags)                             \
    X(cuGraphInstantiateWithParams, 12000, cuGraphInstantiateWithParams)                           \
    X(cuUserObjectCreate, 11030, cuUserObjectCreate)                                               \
    X(cuUserObjectRetain, 11030, cuUserObjectRetain)                                               \
    X(cuUserObjectRelease, 11030, cuUserObjectRelease)                                             \
    X(cuGraphRetainUserObject, 11030, cuGraphRetainUserObject)                                     \
    X(cuGraphReleaseUserObject, 11030, cuGraphReleaseUserObject)                                   \
    X(cuGraphGetNodes, 10000, cuGraphGetNodes)                                                     \
    X(cuGraphLaunch, 10000, cuGraphLaunch)                                                         \
    X(cuGraphDestroy, 10000, cuGraphDestroy)                                                       \
    X(cuGraphExecDestroy, 10000, cuGraphExecDestroy)

static const struct {
    const char *name;
    int version;
    void *address;
} entries[] = {
#define ENTRY(name, version, symbol) {#name, version, (void *)symbol},
    ENTRIES(ENTRY)
#undef ENTRY
};
#define N_ENTRIES (sizeof entries / sizeof entries[0])

/* ---- code ---------------------------------------------------------------------------------- */
/* What PTX says of itself, against what a driver of this version with an sm_90 takes. */
static CUresult check_ptx(const char *text) {
    const char *version = strstr(text, ".version"), *target = strstr(text, ".target");
    int major, minor, architecture;
    if (!version || sscanf(version, ".version %d.%d", &major, &minor) != 2 || !target ||
        sscanf(target, ".target sm_%d", &architecture) != 1)
        return CUDA_ERROR_INVALID_IMAGE;
    int newest = sim.driver_version / 1000 - 4; /* CUDA 12 speaks PTX 8, CUDA 13 PTX 9 */
    if (major > newest)
        return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    return architecture > 90 ? CUDA_ERROR_NO_BINARY_FOR_GPU : CUDA_SUCCESS;
}

static CUresult check_image(const void *image, const void **code, size_t *bytes) {
    uint32_t magic;
    memcpy(&magic, image, 1); /* a text may be shorter than four bytes */
    if ((magic & 0xFF) == 0x50 || (magic & 0xFF) == 0x7F) {
        memcpy(&magic, image, sizeof magic);
        if (magic == FATBIN_MAGIC) /* made by CUDA 13 */
            return sim.driver_version < 13000 ? CUDA_ERROR_UNSUPPORTED_PTX_VERSION : CUDA_SUCCESS;
        if (memcmp(image, "\177ELF", 4) == 0)
            return sim.driver_version < 13000 ? CUDA_ERROR_NO_BINARY_FOR_GPU : CUDA_SUCCESS;
    }
    *code = image;
    *bytes = strlen(image);
    return check_ptx(image);
}

static const char *const names[SIM_N_CALLS] = {
#define CALL_NAME(name, flags) #name,
    SIM_CALLS(CALL_NAME)
#undef CALL_NAME
};

const sim_vendor sim_vendor_here = {
    .names = names, .driver_version = 13000, .check_image = check_image};

/* ---- entry points and errors ------------------------------------------------------------------ */
static const struct {
    CUresult value;
    const char *name, *text;
} errors[] = {
#define ERROR(value, name, text) {value, "CUDA_" #name, text},
    CUDA_STATUS_LIST(ERROR)
#undef ERROR
};
#define N_ERRORS (sizeof errors / sizeof errors[0])

static CUresult find(const char *name, void **out, int version, uint64_t flags, int *found) {
    if (!name || !out || version > sim.driver_version)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "version %d asked of a driver of version %d",
                          version, sim.driver_version);
    if (flags & ~(uint64_t)CU_GET_PROC_ADDRESS_LEGACY_STREAM)
        return sim_refuse(CUDA_ERROR_NOT_SUPPORTED, "flags %llu are not modelled",
                          (unsigned long long)flags);
    int state = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    *out = NULL;
    for (size_t i = 0; i < N_ENTRIES; i++) {
        if (strcmp(entries[i].name, name) != 0 || sim_lacks(name) ||
            entries[i].version > sim.driver_version)
            continue;
        if (state == CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND)
            state = CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
        if (entries[i].version <= version) {
            *out = entries[i].address;
            state = CU_GET_PROC_ADDRESS_SUCCESS;
        }
    }
    if (found)
        *found = state;
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress_v2(const char *symbol, void **out, int version, uint64_t flags,
                             int *found) {
    CUresult status = sim_enter(SIM_cuGetProcAddress);
    return status ? status : sim_leave(find(symbol, out, version, flags, found));
}

CUresult cuGetProcAddress(const char *symbol, void **out, int version, uint64_t flags) {
    CUresult status = cuGetProcAddress_v2(symbol, out, version, flags, NULL);
    return status || *out ? status : CUDA_ERROR_NOT_FOUND;
}

/* An unknown number is answered, not refused: asking is no misuse. */
static CUresult describe(sim_call call, CUresult error, const char **out, bool want_name) {
    CUresult status = sim_enter(call);
    if (status)
        return status;
    *out = NULL;
    for (size_t i = 0; i < N_ERRORS; i++)
        if (errors[i].value == error)
            *out = want_name ? errors[i].name : errors[i].text;
    return sim_leave(*out ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

CUresult cuGetErrorName(CUresult error, const char **out) {
    return describe(SIM_cuGetErrorName, error, out, true);
}

CUresult cuGetErrorString(CUresult error, const char **out) {
    return describe(SIM_cuGetErrorString, error, out, false);
}
