/* hip_abi.h - the part of AMD's HIP runtime interface that driver_hip.c uses, declared here so
 * that building needs no HIP headers. The names are AMD's; sizes, offsets and values are those
 * of hip_runtime_api.h for 64-bit Linux. tests/c/test_hip_abi.c compares them with a real one.
 */
#ifndef VMM_HIP_ABI_H
#define VMM_HIP_ABI_H

#include <stddef.h>
#include <stdint.h>

/* The first ROCm with what is used here: its 5.1 had the calls, but with other properties for
 * a block (hipMemAllocationProp), and no attribute to ask whether a device can. */
#define HIP_VERSION_NEEDED 50300000 /* major * 10^7 + minor * 10^5 + build */

typedef int hipDevice_t;
typedef void *hipDeviceptr_t;
typedef struct ihipMemGenericAllocationHandle *hipMemGenericAllocationHandle_t;
typedef struct ihipStream_t *hipStream_t;
typedef struct ihipEvent_t *hipEvent_t;
typedef struct ihipModule_t *hipModule_t;
typedef struct ihipModuleSymbol_t *hipFunction_t;
typedef struct ihipGraph *hipGraph_t;
typedef struct hipGraphNode *hipGraphNode_t;
typedef struct hipUserObject *hipUserObject_t;

typedef enum hipError_t {
    hipSuccess = 0,
    hipErrorInvalidValue = 1,
    hipErrorOutOfMemory = 2,
    hipErrorNoDevice = 100,
    hipErrorInvalidDevice = 101,
    hipErrorNoBinaryForGpu = 209,
    hipErrorNotReady = 600,
    /* What a call has to say about a stream capture lies between these two. */
    hipErrorStreamCaptureUnsupported = 900,
    hipErrorStreamCaptureWrongThread = 908,
    hipErrorUnknown = 999,
} hipError_t;

typedef enum hipDeviceAttribute_t {
    hipDeviceAttributeMultiprocessorCount = 63,
    hipDeviceAttributeVirtualMemoryManagementSupported = 89,
    hipDeviceAttributeLast = 20000, /* so that the enum has HIP's size */
} hipDeviceAttribute_t;

typedef enum hipMemAllocationType {
    hipMemAllocationTypePinned = 1,
} hipMemAllocationType;

typedef enum hipMemLocationType {
    hipMemLocationTypeDevice = 1,
} hipMemLocationType;

typedef enum hipMemAllocationHandleType {
    hipMemHandleTypeNone = 0,
} hipMemAllocationHandleType;

typedef enum hipMemAllocationGranularity_flags {
    hipMemAllocationGranularityMinimum = 0,
    hipMemAllocationGranularityRecommended = 1,
} hipMemAllocationGranularity_flags;

typedef enum hipMemAccessFlags {
    hipMemAccessFlagsProtReadWrite = 3,
} hipMemAccessFlags;

typedef struct hipMemLocation {
    hipMemLocationType type;
    int id;
} hipMemLocation;

typedef struct hipMemAllocationProp {
    hipMemAllocationType type;
    hipMemAllocationHandleType requestedHandleType;
    hipMemLocation location;
    void *win32HandleMetaData;
    struct {
        unsigned char compressionType;
        unsigned char gpuDirectRDMACapable;
        unsigned short usage;
    } allocFlags;
} hipMemAllocationProp;

typedef struct hipMemAccessDesc {
    hipMemLocation location;
    hipMemAccessFlags flags;
} hipMemAccessDesc;

typedef enum hipStreamCaptureStatus {
    hipStreamCaptureStatusNone = 0,
    hipStreamCaptureStatusActive = 1,
    hipStreamCaptureStatusInvalidated = 2,
} hipStreamCaptureStatus;

typedef enum hipStreamCaptureMode {
    hipStreamCaptureModeGlobal = 0,
    hipStreamCaptureModeThreadLocal = 1,
    hipStreamCaptureModeRelaxed = 2,
} hipStreamCaptureMode;

#define hipEventDisableTiming 0x2
#define hipStreamNonBlocking 0x1
#define hipUserObjectNoDestructorSync 0x1
#define hipGraphUserObjectMove 0x1

/* Every entry: X(result, name, parameters), all of them required and found by dlsym(). The first
 * are those that ROCm 5.3 has brought. */
#define HIP_CALLS_OF_5_3(X)                                                                        \
    X(hipError_t, hipUserObjectCreate,                                                             \
      (hipUserObject_t * object, void *user, void (*destroy)(void *user), unsigned n_references,   \
       unsigned flags))                                                                            \
    X(hipError_t, hipUserObjectRelease, (hipUserObject_t object, unsigned n_references))           \
    X(hipError_t, hipGraphRetainUserObject,                                                        \
      (hipGraph_t graph, hipUserObject_t object, unsigned n_references, unsigned flags))
#define HIP_CALLS_BEFORE(X)                                                                        \
    X(const char *, hipGetErrorName, (hipError_t code))                                            \
    X(const char *, hipGetErrorString, (hipError_t code))                                          \
    X(hipError_t, hipInit, (unsigned flags))                                                       \
    X(hipError_t, hipRuntimeGetVersion, (int *version))                                            \
    X(hipError_t, hipGetDeviceCount, (int *count))                                                 \
    X(hipError_t, hipDeviceGet, (hipDevice_t * device, int index))                                 \
    X(hipError_t, hipDeviceGetName, (char *name, int length, hipDevice_t device))                  \
    X(hipError_t, hipDeviceGetAttribute, (int *value, hipDeviceAttribute_t attribute, int device)) \
    X(hipError_t, hipGetDevice, (int *device))                                                     \
    X(hipError_t, hipSetDevice, (int device))                                                      \
    X(hipError_t, hipDeviceSynchronize, (void))                                                    \
    X(hipError_t, hipThreadExchangeStreamCaptureMode, (hipStreamCaptureMode * mode))               \
    X(hipError_t, hipMemGetInfo, (size_t *available, size_t *total))                               \
    X(hipError_t, hipMemGetAllocationGranularity,                                                  \
      (size_t *granularity, const hipMemAllocationProp *properties,                                \
       hipMemAllocationGranularity_flags which))                                                   \
    X(hipError_t, hipMemAddressReserve,                                                            \
      (void **base, size_t bytes, size_t alignment, void *wanted, unsigned long long flags))       \
    X(hipError_t, hipMemAddressFree, (void *base, size_t bytes))                                   \
    X(hipError_t, hipMemCreate,                                                                    \
      (hipMemGenericAllocationHandle_t * handle, size_t bytes,                                     \
       const hipMemAllocationProp *properties, unsigned long long flags))                          \
    X(hipError_t, hipMemRelease, (hipMemGenericAllocationHandle_t handle))                         \
    X(hipError_t, hipMemMap,                                                                       \
      (void *address, size_t bytes, size_t offset, hipMemGenericAllocationHandle_t handle,         \
       unsigned long long flags))                                                                  \
    X(hipError_t, hipMemUnmap, (void *address, size_t bytes))                                      \
    X(hipError_t, hipMemSetAccess,                                                                 \
      (void *address, size_t bytes, const hipMemAccessDesc *access, size_t count))                 \
    X(hipError_t, hipMemcpyHtoDAsync,                                                              \
      (hipDeviceptr_t dst, void *src, size_t bytes, hipStream_t stream))                           \
    X(hipError_t, hipMemcpyDtoHAsync,                                                              \
      (void *dst, hipDeviceptr_t src, size_t bytes, hipStream_t stream))                           \
    X(hipError_t, hipMalloc, (void **address, size_t bytes))                                       \
    X(hipError_t, hipFree, (void *address))                                                        \
    X(hipError_t, hipHostMalloc, (void **address, size_t bytes, unsigned flags))                   \
    X(hipError_t, hipHostFree, (void *address))                                                    \
    X(hipError_t, hipMemsetD8Async,                                                                \
      (hipDeviceptr_t dst, unsigned char value, size_t bytes, hipStream_t stream))                 \
    X(hipError_t, hipModuleLoadData, (hipModule_t * module, const void *image))                    \
    X(hipError_t, hipModuleUnload, (hipModule_t module))                                           \
    X(hipError_t, hipModuleGetFunction,                                                            \
      (hipFunction_t * function, hipModule_t module, const char *name))                            \
    X(hipError_t, hipModuleLaunchKernel,                                                           \
      (hipFunction_t function, unsigned grid_x, unsigned grid_y, unsigned grid_z,                  \
       unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,                \
       hipStream_t stream, void **parameters, void **extra))                                       \
    X(int, hipGetStreamDeviceId, (hipStream_t stream))                                             \
    X(hipError_t, hipStreamGetCaptureInfo_v2,                                                      \
      (hipStream_t stream, hipStreamCaptureStatus * status, unsigned long long *id,                \
       hipGraph_t *graph, const hipGraphNode_t **dependencies, size_t *n_dependencies))            \
    X(hipError_t, hipStreamCreateWithFlags, (hipStream_t * stream, unsigned flags))                \
    X(hipError_t, hipStreamDestroy, (hipStream_t stream))                                          \
    X(hipError_t, hipStreamSynchronize, (hipStream_t stream))                                      \
    X(hipError_t, hipStreamWaitEvent, (hipStream_t stream, hipEvent_t event, unsigned flags))      \
    X(hipError_t, hipEventCreateWithFlags, (hipEvent_t * event, unsigned flags))                   \
    X(hipError_t, hipEventDestroy, (hipEvent_t event))                                             \
    X(hipError_t, hipEventRecord, (hipEvent_t event, hipStream_t stream))                          \
    X(hipError_t, hipEventQuery, (hipEvent_t event))                                               \
    X(hipError_t, hipEventSynchronize, (hipEvent_t event))

#define HIP_CALLS(X)                                                                               \
    HIP_CALLS_BEFORE(X)                                                                            \
    HIP_CALLS_OF_5_3(X)

typedef struct hip_calls {
#define HIP_CALL_FIELD(result, name, parameters) result(*name) parameters;
    HIP_CALLS(HIP_CALL_FIELD)
#undef HIP_CALL_FIELD
} hip_calls;

#endif /* VMM_HIP_ABI_H */
