/* probe.h - what the probes share: the driver by name, saying what it answered.
 *
 * A probe asks the driver one thing and says each answer: TRY() the code of a call, say()
 * what can be seen of the state afterwards. It prepares by MUST() calls, frees nothing (its
 * process ends), and is put into the list of its file.
 */
#ifndef PROBE_H
#define PROBE_H

#define _GNU_SOURCE

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../sim/cuda_abi.h"

#define LENGTH_OF(array) (sizeof(array) / sizeof(array)[0])

/* The entry point, the CUDA version whose form of it is asked for, and its declaration. */
#define ENTRY_POINTS(X)                                                                            \
    X(cuInit, 2000, cuInit)                                                                        \
    X(cuDriverGetVersion, 2020, cuDriverGetVersion)                                                \
    X(cuGetErrorName, 6000, cuGetErrorName)                                                        \
    X(cuGetErrorString, 6000, cuGetErrorString)                                                    \
    X(cuDeviceGetCount, 2000, cuDeviceGetCount)                                                    \
    X(cuDeviceGet, 2000, cuDeviceGet)                                                              \
    X(cuDeviceGetName, 2000, cuDeviceGetName)                                                      \
    X(cuDeviceGetAttribute, 2000, cuDeviceGetAttribute)                                            \
    X(cuDevicePrimaryCtxRetain, 7000, cuDevicePrimaryCtxRetain)                                    \
    X(cuDevicePrimaryCtxGetState, 7000, cuDevicePrimaryCtxGetState)                                \
    X(cuCtxGetCurrent, 4000, cuCtxGetCurrent)                                                      \
    X(cuCtxSetCurrent, 4000, cuCtxSetCurrent)                                                      \
    X(cuCtxPushCurrent, 4000, cuCtxPushCurrent_v2)                                                 \
    X(cuCtxPopCurrent, 4000, cuCtxPopCurrent_v2)                                                   \
    X(cuCtxGetDevice, 2000, cuCtxGetDevice)                                                        \
    X(cuCtxSynchronize, 2000, cuCtxSynchronize)                                                    \
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
    X(cuModuleLoadData, 2000, cuModuleLoadData)                                                    \
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
    X(cuStreamGetFlags, 5050, cuStreamGetFlags)                                                    \
    X(cuStreamGetPriority, 5050, cuStreamGetPriority)                                              \
    X(cuStreamIsCapturing, 10000, cuStreamIsCapturing)                                             \
    X(cuStreamGetCaptureInfo, 11030, cuStreamGetCaptureInfo_v2)                                    \
    X(cuStreamBeginCapture, 10010, cuStreamBeginCapture_v2)                                        \
    X(cuStreamEndCapture, 10000, cuStreamEndCapture)                                               \
    X(cuGraphInstantiateWithFlags, 11040, cuGraphInstantiateWithFlags)                             \
    X(cuUserObjectCreate, 11030, cuUserObjectCreate)                                               \
    X(cuUserObjectRelease, 11030, cuUserObjectRelease)                                             \
    X(cuGraphRetainUserObject, 11030, cuGraphRetainUserObject)                                     \
    X(cuGraphGetNodes, 10000, cuGraphGetNodes)                                                     \
    X(cuGraphLaunch, 10000, cuGraphLaunch)                                                         \
    X(cuGraphDestroy, 10000, cuGraphDestroy)                                                       \
    X(cuGraphExecDestroy, 10000, cuGraphExecDestroy)

typedef struct cuda_api {
#define ENTRY_FIELD(name, version, declaration) __typeof__(declaration) *name;
    ENTRY_POINTS(ENTRY_FIELD)
#undef ENTRY_FIELD
    __typeof__(cuGetProcAddress_v2) *cuGetProcAddress;
} cuda_api;
extern cuda_api cuda;

/* ---- answers ---------------------------------------------------------------------------- */
/* Add to the line of the running probe. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* A status without "CUDA_ERROR_"; "OK". */
const char *code_name(CUresult code);
CUresult say_code(const char *what, CUresult code);
/* End the probe if a preparation failed. */
void must(const char *what, CUresult code);

#define TRY(name, ...) say_code(#name, cuda.name(__VA_ARGS__))
/* The same under another word, where one call is tried in several ways. */
#define TRY_AS(word, name, ...) say_code(word, cuda.name(__VA_ARGS__))
#define MUST(name, ...) must(#name, cuda.name(__VA_ARGS__))

/* ---- what probes begin with --------------------------------------------------------------- */
extern CUcontext context; /* of device 0, current */
extern size_t granule;
extern const CUmemAllocationProp block_prop;

CUdeviceptr new_space(size_t n_granules);
CUmemGenericAllocationHandle new_block(size_t n_granules);
/* A new block of that size, mapped there; `flags` as in cuMemSetAccess, -1 for none given. */
CUmemGenericAllocationHandle put_block(CUdeviceptr at, size_t n_granules, int flags);
CUresult set_access(CUdeviceptr at, size_t bytes, int flags);
CUstream new_stream(unsigned flags);
CUevent new_event(void);

/* What is mapped, a sign for each granule: '.' nothing, '-' without access, 'r', 'w'. */
const char *map_of(CUdeviceptr base, size_t n_granules);
/* The first byte there once everything has run; -1 if it cannot be read. */
int byte_at(CUdeviceptr address);
/* A fault is told by the call or by the next synchronise: the first code that is none. */
CUresult settled(CUresult code);

/* Work on the stream that is not done until go(). */
void hold(CUstream stream);
void go(void);
/* Run on another thread, with the context current there. */
void elsewhere(void (*function)(void *), void *argument);

/* ---- the lists ------------------------------------------------------------------------------ */
typedef struct probe {
    const char *name;
    void (*run)(void);
    bool raw;   /* nothing was called before, not even cuInit */
    bool alone; /* in a process of its own: what it does may show later */
} probe;
#define PROBE(function) {#function, function, false, false}
#define ALONE(function) {#function, function, false, true}
#define RAW(function) {#function, function, true, true}

typedef struct probe_list {
    const char *name;
    const probe *probes;
    size_t n_probes;
} probe_list;
extern const probe_list reserve_probes, map_probes, access_probes, use_probes, pointer_probes,
    driver_probes, stream_probes, capture_probes, unsafe_probes;

#endif /* PROBE_H */
