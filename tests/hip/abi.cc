/* abi.cc - libvmm/src/hip_abi.h against AMD's own header: compiling is the test, which
 * tests/python/test_hip.py does. Ours goes into a namespace, so that both have their names.
 */
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace ours {
#include "../../libvmm/src/hip_abi.h"
constexpr int disable_timing = hipEventDisableTiming, non_blocking = hipStreamNonBlocking;
constexpr int no_sync = hipUserObjectNoDestructorSync, move = hipGraphUserObjectMove;
} // namespace ours
#undef hipEventDisableTiming
#undef hipStreamNonBlocking
#undef hipUserObjectNoDestructorSync
#undef hipGraphUserObjectMove

#define __HIP_PLATFORM_AMD__ 1
#define __HIP_DISABLE_CPP_FUNCTIONS__ 1
#include <hip/hip_runtime_api.h>

#define SAME_VALUE(name) static_assert((int)ours::name == (int)::name, #name)
SAME_VALUE(hipSuccess);
SAME_VALUE(hipErrorInvalidValue);
SAME_VALUE(hipErrorOutOfMemory);
SAME_VALUE(hipErrorNoDevice);
SAME_VALUE(hipErrorInvalidDevice);
SAME_VALUE(hipErrorNoBinaryForGpu);
SAME_VALUE(hipErrorNotReady);
SAME_VALUE(hipErrorStreamCaptureUnsupported);
SAME_VALUE(hipErrorStreamCaptureWrongThread);
SAME_VALUE(hipErrorUnknown);
SAME_VALUE(hipDeviceAttributeMultiprocessorCount);
SAME_VALUE(hipMemAllocationTypePinned);
SAME_VALUE(hipMemLocationTypeDevice);
SAME_VALUE(hipMemHandleTypeNone);
SAME_VALUE(hipMemAllocationGranularityMinimum);
SAME_VALUE(hipMemAllocationGranularityRecommended);
SAME_VALUE(hipMemAccessFlagsProtReadWrite);
SAME_VALUE(hipStreamCaptureStatusNone);
SAME_VALUE(hipStreamCaptureStatusActive);
SAME_VALUE(hipStreamCaptureStatusInvalidated);
SAME_VALUE(hipStreamCaptureModeGlobal);
SAME_VALUE(hipStreamCaptureModeThreadLocal);
SAME_VALUE(hipStreamCaptureModeRelaxed);
static_assert(ours::disable_timing == hipEventDisableTiming, "hipEventDisableTiming");
static_assert(ours::non_blocking == hipStreamNonBlocking, "hipStreamNonBlocking");

#define SAME_SIZE(type) static_assert(sizeof(ours::type) == sizeof(::type), #type)
SAME_SIZE(hipError_t);
SAME_SIZE(hipDevice_t);
SAME_SIZE(hipDeviceptr_t);
SAME_SIZE(hipDeviceAttribute_t);
SAME_SIZE(hipMemGenericAllocationHandle_t);
SAME_SIZE(hipMemAllocationGranularity_flags);
SAME_SIZE(hipStreamCaptureStatus);
SAME_SIZE(hipStreamCaptureMode);
SAME_SIZE(hipMemLocation);
SAME_SIZE(hipMemAccessDesc);
SAME_SIZE(hipMemAllocationProp);

#define SAME_OFFSET(type, field)                                                                   \
    static_assert(offsetof(ours::type, field) == offsetof(::type, field), #type "." #field)
SAME_OFFSET(hipMemLocation, type);
SAME_OFFSET(hipMemLocation, id);
SAME_OFFSET(hipMemAccessDesc, location);
SAME_OFFSET(hipMemAccessDesc, flags);
#if HIP_VERSION >= HIP_VERSION_NEEDED
SAME_VALUE(hipDeviceAttributeVirtualMemoryManagementSupported);
SAME_OFFSET(hipMemAllocationProp, type);
SAME_OFFSET(hipMemAllocationProp, requestedHandleType);
SAME_OFFSET(hipMemAllocationProp, location);
SAME_OFFSET(hipMemAllocationProp, win32HandleMetaData);
SAME_OFFSET(hipMemAllocationProp, allocFlags);
#else
/* The properties of a block had another order, and the attribute came behind the last one:
 * why load() refuses such a runtime. */
static_assert(offsetof(::hipMemAllocationProp, type) != offsetof(ours::hipMemAllocationProp, type),
              "HIP_VERSION_NEEDED may be lower");
static_assert((int)ours::hipDeviceAttributeVirtualMemoryManagementSupported ==
                  (int)::hipDeviceAttributeMemoryPoolsSupported + 1,
              "hipDeviceAttributeVirtualMemoryManagementSupported");
#endif

/* Out here the types in our lists of parameters are AMD's. */
#define SAME_CALL(result, name, parameters)                                                        \
    static_assert(std::is_same<decltype(&::name), result(*) parameters>::value, #name);
HIP_CALLS_BEFORE(SAME_CALL)
#if HIP_VERSION >= HIP_VERSION_NEEDED
static_assert(ours::no_sync == hipUserObjectNoDestructorSync, "hipUserObjectNoDestructorSync");
static_assert(ours::move == hipGraphUserObjectMove, "hipGraphUserObjectMove");
HIP_CALLS_OF_5_3(SAME_CALL)
#endif
