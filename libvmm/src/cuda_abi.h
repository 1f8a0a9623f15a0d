/* cuda_abi.h - the part of CUDA's driver interface that driver_cuda.c uses, declared here so
 * that building needs no CUDA headers. The names are NVIDIA's; sizes, offsets and values
 * are those of cuda.h for 64-bit Linux, where they have not changed since the versions named
 * below.
 */
#ifndef VMM_CUDA_ABI_H
#define VMM_CUDA_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef unsigned long long CUmemGenericAllocationHandle;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUgraph_st *CUgraph;
typedef struct CUuserObject_st *CUuserObject;

typedef enum CUresult {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_CONTEXT_IS_DESTROYED = 709,
    /* What a call has to say about a stream capture lies between these two. */
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
    CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
    CUDA_ERROR_UNKNOWN = 999,
} CUresult;

typedef enum CUdevice_attribute {
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
    CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103,
} CUdevice_attribute;

typedef enum CUmemAllocationType {
    CU_MEM_ALLOCATION_TYPE_PINNED = 1,
} CUmemAllocationType;

typedef enum CUmemLocationType {
    CU_MEM_LOCATION_TYPE_DEVICE = 1,
} CUmemLocationType;

typedef enum CUmemAllocationHandleType {
    CU_MEM_HANDLE_TYPE_NONE = 0,
} CUmemAllocationHandleType;

typedef enum CUmemAllocationGranularity_flags {
    CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0,
    CU_MEM_ALLOC_GRANULARITY_RECOMMENDED = 1,
} CUmemAllocationGranularity_flags;

typedef enum CUmemAccess_flags {
    CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3,
} CUmemAccess_flags;

typedef struct CUmemLocation {
    CUmemLocationType type;
    int id;
} CUmemLocation;

typedef struct CUmemAllocationProp {
    CUmemAllocationType type;
    CUmemAllocationHandleType requestedHandleTypes;
    CUmemLocation location;
    void *win32HandleMetaData;
    struct {
        unsigned char compressionType;
        unsigned char gpuDirectRDMACapable;
        unsigned short usage;
        unsigned char reserved[4];
    } allocFlags;
} CUmemAllocationProp;

typedef struct CUmemAccessDesc {
    CUmemLocation location;
    CUmemAccess_flags flags;
} CUmemAccessDesc;

typedef enum CUstreamCaptureStatus {
    CU_STREAM_CAPTURE_STATUS_NONE = 0,
    CU_STREAM_CAPTURE_STATUS_ACTIVE = 1,
    CU_STREAM_CAPTURE_STATUS_INVALIDATED = 2,
} CUstreamCaptureStatus;

typedef enum CUstreamCaptureMode {
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0,
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
    CU_STREAM_CAPTURE_MODE_RELAXED = 2,
} CUstreamCaptureMode;

enum {
    CU_STREAM_NON_BLOCKING = 1,
    CU_USER_OBJECT_NO_DESTRUCTOR_SYNC = 1,
    CU_GRAPH_USER_OBJECT_MOVE = 1,
    CU_EVENT_DISABLE_TIMING = 2,
    CU_EVENT_WAIT_DEFAULT = 0,
    CU_EVENT_WAIT_EXTERNAL = 1,
    CU_GET_PROC_ADDRESS_LEGACY_STREAM = 1, /* a NULL stream is the legacy one */
};

/* The two entries taken by dlsym(): the second is what CUDA 11 drivers have. */
typedef CUresult cuGetProcAddress_v2_type(const char *symbol, void **address, int version,
                                          uint64_t flags, int *found);
typedef CUresult cuGetProcAddress_type(const char *symbol, void **address, int version,
                                       uint64_t flags);

/* Every other entry: X(name, version, need, parameters). `version` is the first CUDA that
 * has the entry with these parameters, which is what cuGetProcAddress is asked for: a later
 * one may give another signature under the same name. */
#define CUDA_CALLS(X)                                                                              \
    X(cuGetErrorName, 6000, REQUIRED, (CUresult code, const char **out))                           \
    X(cuGetErrorString, 6000, REQUIRED, (CUresult code, const char **out))                         \
    X(cuInit, 2000, REQUIRED, (unsigned flags))                                                    \
    X(cuDriverGetVersion, 2020, REQUIRED, (int *version))                                          \
    X(cuDeviceGetCount, 2000, REQUIRED, (int *count))                                              \
    X(cuDeviceGet, 2000, REQUIRED, (CUdevice * device, int index))                                 \
    X(cuDeviceGetName, 2000, REQUIRED, (char *name, int length, CUdevice device))                  \
    X(cuDeviceGetAttribute, 2000, REQUIRED,                                                        \
      (int *value, CUdevice_attribute attribute, CUdevice device))                                 \
    X(cuDevicePrimaryCtxRetain, 7000, REQUIRED, (CUcontext * context, CUdevice device))            \
    X(cuCtxGetCurrent, 4000, REQUIRED, (CUcontext * context))                                      \
    X(cuCtxPushCurrent, 4000, REQUIRED, (CUcontext context))                                       \
    X(cuCtxPopCurrent, 4000, REQUIRED, (CUcontext * context))                                      \
    X(cuCtxGetDevice, 2000, REQUIRED, (CUdevice * device))                                         \
    X(cuCtxSynchronize, 2000, REQUIRED, (void))                                                    \
    X(cuCtxRecordEvent, 12050, OPTIONAL, (CUcontext context, CUevent event))                       \
    X(cuThreadExchangeStreamCaptureMode, 10010, REQUIRED, (CUstreamCaptureMode * mode))            \
    X(cuMemGetInfo, 3020, REQUIRED, (size_t *free, size_t *total))                                 \
    X(cuMemGetAllocationGranularity, 10020, REQUIRED,                                              \
      (size_t *granularity, const CUmemAllocationProp *properties,                                 \
       CUmemAllocationGranularity_flags which))                                                    \
    X(cuMemAddressReserve, 10020, REQUIRED,                                                        \
      (CUdeviceptr * base, size_t bytes, size_t alignment, CUdeviceptr wanted,                     \
       unsigned long long flags))                                                                  \
    X(cuMemAddressFree, 10020, REQUIRED, (CUdeviceptr base, size_t bytes))                         \
    X(cuMemCreate, 10020, REQUIRED,                                                                \
      (CUmemGenericAllocationHandle * handle, size_t bytes, const CUmemAllocationProp *properties, \
       unsigned long long flags))                                                                  \
    X(cuMemRelease, 10020, REQUIRED, (CUmemGenericAllocationHandle handle))                        \
    X(cuMemMap, 10020, REQUIRED,                                                                   \
      (CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,      \
       unsigned long long flags))                                                                  \
    X(cuMemUnmap, 10020, REQUIRED, (CUdeviceptr address, size_t bytes))                            \
    X(cuMemSetAccess, 10020, REQUIRED,                                                             \
      (CUdeviceptr address, size_t bytes, const CUmemAccessDesc *access, size_t count))            \
    X(cuMemcpyHtoDAsync, 3020, REQUIRED,                                                           \
      (CUdeviceptr dst, const void *src, size_t bytes, CUstream stream))                           \
    X(cuMemcpyDtoHAsync, 3020, REQUIRED,                                                           \
      (void *dst, CUdeviceptr src, size_t bytes, CUstream stream))                                 \
    X(cuMemAlloc, 3020, REQUIRED, (CUdeviceptr * address, size_t bytes))                           \
    X(cuMemFree, 3020, REQUIRED, (CUdeviceptr address))                                            \
    X(cuMemHostAlloc, 2020, REQUIRED, (void **address, size_t bytes, unsigned flags))              \
    X(cuMemFreeHost, 2000, REQUIRED, (void *address))                                              \
    X(cuMemsetD8Async, 3020, REQUIRED,                                                             \
      (CUdeviceptr dst, unsigned char value, size_t bytes, CUstream stream))                       \
    X(cuModuleLoadData, 2000, REQUIRED, (CUmodule * module, const void *image))                    \
    X(cuModuleUnload, 2000, REQUIRED, (CUmodule module))                                           \
    X(cuModuleGetFunction, 2000, REQUIRED,                                                         \
      (CUfunction * function, CUmodule module, const char *name))                                  \
    X(cuFuncLoad, 12040, OPTIONAL, (CUfunction function))                                          \
    X(cuLaunchKernel, 4000, REQUIRED,                                                              \
      (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,   \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream,                 \
       void **parameters, void **extra))                                                           \
    X(cuStreamGetCtx, 9020, REQUIRED, (CUstream stream, CUcontext * context))                      \
    X(cuStreamGetCaptureInfo, 11030, REQUIRED,                                                     \
      (CUstream stream, CUstreamCaptureStatus * status, uint64_t *id, CUgraph *graph,              \
       void *dependencies, void *n_dependencies))                                                  \
    X(cuUserObjectCreate, 11030, REQUIRED,                                                         \
      (CUuserObject * object, void *user, void (*destroy)(void *user), unsigned n_references,      \
       unsigned flags))                                                                            \
    X(cuUserObjectRelease, 11030, REQUIRED, (CUuserObject object, unsigned n_references))          \
    X(cuGraphRetainUserObject, 11030, REQUIRED,                                                    \
      (CUgraph graph, CUuserObject object, unsigned n_references, unsigned flags))                 \
    X(cuStreamCreate, 2000, REQUIRED, (CUstream * stream, unsigned flags))                         \
    X(cuStreamDestroy, 4000, REQUIRED, (CUstream stream))                                          \
    X(cuStreamSynchronize, 2000, REQUIRED, (CUstream stream))                                      \
    X(cuStreamWaitEvent, 3020, REQUIRED, (CUstream stream, CUevent event, unsigned flags))         \
    X(cuEventCreate, 2000, REQUIRED, (CUevent * event, unsigned flags))                            \
    X(cuEventDestroy, 4000, REQUIRED, (CUevent event))                                             \
    X(cuEventRecord, 2000, REQUIRED, (CUevent event, CUstream stream))                             \
    X(cuEventQuery, 2000, REQUIRED, (CUevent event))                                               \
    X(cuEventSynchronize, 2000, REQUIRED, (CUevent event))

typedef struct cuda_calls {
#define CUDA_CALL_FIELD(name, version, need, parameters) CUresult(*name) parameters;
    CUDA_CALLS(CUDA_CALL_FIELD)
#undef CUDA_CALL_FIELD
} cuda_calls;

#endif /* VMM_CUDA_ABI_H */
