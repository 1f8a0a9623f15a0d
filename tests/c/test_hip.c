/* What HIP does otherwise than CUDA, in libvmm and in the simulator. Every case is a process of
 * its own, with the simulated runtime as VMM_HIP_LIBRARY names it; the rest of HIP is tested
 * by the tests that run for each device. */
#include "check.h"

#include <sys/wait.h>
#include <unistd.h>

#include "../../libvmm/src/hip_abi.h"
#include "../sim/vmm_sim.h"

#define GRANULE 65536

static struct {
    hip_calls hip;
    int (*stream_create)(hipStream_t *, unsigned);
    int (*stream_destroy)(hipStream_t);
    int (*alloc)(void **, size_t);
    int (*free)(void *);
    __typeof__(vmm_sim_fail) *fail;
    __typeof__(vmm_sim_calls) *calls;
    __typeof__(vmm_sim_reports) *reports;
    __typeof__(vmm_sim_last_report) *last_report;
} sim;

static bool load(void) {
    const char *path = getenv("VMM_HIP_LIBRARY");
    void *library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    if (!library || !dlsym(library, "vmm_sim_version"))
        return false;
#define LOAD(result, name, parameters)                                                             \
    *(void **)&sim.hip.name = dlsym(library, #name);                                               \
    CHECK(sim.hip.name);
    HIP_CALLS(LOAD)
#undef LOAD
    *(void **)&sim.stream_create = dlsym(library, "hipStreamCreateWithFlags");
    *(void **)&sim.stream_destroy = dlsym(library, "hipStreamDestroy");
    *(void **)&sim.alloc = dlsym(library, "hipMalloc");
    *(void **)&sim.free = dlsym(library, "hipFree");
    *(void **)&sim.fail = dlsym(library, "vmm_sim_fail");
    *(void **)&sim.calls = dlsym(library, "vmm_sim_calls");
    *(void **)&sim.reports = dlsym(library, "vmm_sim_reports");
    *(void **)&sim.last_report = dlsym(library, "vmm_sim_last_report");
    CHECK(sim.stream_create && sim.stream_destroy && sim.alloc && sim.free && sim.fail &&
          sim.calls && sim.reports && sim.last_report);
    CHECK(!dlsym(library, "cuInit")); /* under HIP's names alone */
    return true;
}

static void refused(int code, const char *report) {
    CHECK(code != 0);
    CHECK(sim.reports() > 0);
    if (!strstr(sim.last_report(), report))
        FAIL("the report is \"%s\", without \"%s\"", sim.last_report(), report);
}

/* ---- the simulated runtime ---------------------------------------------------------------- */

static const hipMemAllocationProp properties = {.type = hipMemAllocationTypePinned,
                                                .location = {hipMemLocationTypeDevice, 0}};
static const hipMemAccessDesc access_0 = {{hipMemLocationTypeDevice, 0},
                                          hipMemAccessFlagsProtReadWrite};

/* A mapping is unmapped and given access by itself. */
static void mappings_one_by_one(void) {
    const hip_calls *hip = &sim.hip;
    hipMemGenericAllocationHandle_t handle[2];
    void *base;

    CHECK_CUDA(hip->hipInit(0));
    CHECK_CUDA(hip->hipMemAddressReserve(&base, 2 * GRANULE, 0, NULL, 0));
    for (int i = 0; i < 2; i++) {
        CHECK_CUDA(hip->hipMemCreate(&handle[i], GRANULE, &properties, 0));
        CHECK_CUDA(hip->hipMemMap((char *)base + i * GRANULE, GRANULE, 0, handle[i], 0));
    }
    refused(hip->hipMemSetAccess(base, 2 * GRANULE, &access_0, 1), "hipMemSetAccess: ");
    refused(hip->hipMemUnmap(base, 2 * GRANULE), "several mappings");
    for (int i = 0; i < 2; i++) {
        CHECK_CUDA(hip->hipMemSetAccess((char *)base + i * GRANULE, GRANULE, &access_0, 1));
        CHECK_CUDA(hip->hipMemUnmap((char *)base + i * GRANULE, GRANULE));
        CHECK_CUDA(hip->hipMemRelease(handle[i]));
    }
    refused(hip->hipMemRelease(handle[0]), "hipMemRelease: handle");
    CHECK_CUDA(hip->hipMemAddressFree(base, 2 * GRANULE));
    CHECK(sim.calls("hipMemUnmap") == 3 && sim.calls("cuMemUnmap") == 3);
}

static void streams(void) {
    const hip_calls *hip = &sim.hip;
    hipEvent_t event;
    hipStream_t stream;
    int device = -1;

    CHECK_CUDA(hip->hipInit(0));
    CHECK_CUDA(hip->hipGetDevice(&device));
    CHECK(device == 0);
    CHECK(hip->hipSetDevice(2) == 101); /* hipErrorInvalidDevice; a question, and no misuse */
    CHECK(sim.reports() == 0);
    CHECK_CUDA(sim.stream_create(&stream, 1));
    CHECK_CUDA(hip->hipEventCreateWithFlags(&event, hipEventDisableTiming));
    CHECK_CUDA(hip->hipEventRecord(event, NULL));
    refused(hip->hipEventRecord(event, (hipStream_t)1), "is no stream");
    refused(hip->hipStreamWaitEvent(stream, event, 1), "flags 0x1");
    /* It has no status, so that it is no stream is all it can say. */
    CHECK(sim.fail("hipGetStreamDeviceId", 1, 999, 1) == 0 && sim.fail("*", 1, 999, 1) == 0);
    CHECK(hip->hipGetStreamDeviceId(stream) == 0);
    CHECK(hip->hipEventQuery(event) == 999);
    CHECK(strcmp(hip->hipGetErrorName(hipErrorOutOfMemory), "hipErrorOutOfMemory") == 0);
    CHECK(strcmp(hip->hipGetErrorName((hipError_t)12345), "hipErrorUnknown") == 0);
    CHECK_CUDA(hip->hipEventDestroy(event));
    CHECK_CUDA(sim.stream_destroy(stream));
}

/* ---- libvmm --------------------------------------------------------------------------------- */

static void fails_to_open(vmm_status expected, const char *text) {
    vmm_device *device = NULL;

    for (int i = 0; i < 2; i++) { /* the second time, too */
        CHECK_STATUS(vmm_device_open("hip:0", &device), expected);
        CHECK(!device);
        if (!strstr(vmm_last_error()->message, text))
            FAIL("\"%s\" has no \"%s\"", vmm_last_error()->message, text);
    }
}

static void no_library(void) {
    setenv("VMM_HIP_LIBRARY", "/nowhere/libamdhip64.so", 1);
    fails_to_open(VMM_ERR_NO_DRIVER, "no HIP driver: /nowhere/libamdhip64.so not found");
    setenv("VMM_HIP_LIBRARY", "libm.so.6", 1);
    fails_to_open(VMM_ERR_NO_DRIVER, "libm.so.6 has no hip");
}

static void no_device(void) {
    setenv("VMM_SIM_DEVICES", "0", 1);
    fails_to_open(VMM_ERR_NO_DEVICE, "[hipInit][hipErrorNoDevice]");
}

static void too_old(void) {
    setenv("VMM_SIM_DRIVER_VERSION", "50221153", 1); /* that of Debian 12 */
    fails_to_open(VMM_ERR_NO_DRIVER, "is of version 5.2, ROCm 5.3 or later is needed");
}

static void no_kernels(void) {
    setenv("VMM_HIP_KERNELS", "/nowhere/append.hipfb", 1);
    fails_to_open(VMM_ERR_UNSUPPORTED, "/nowhere/append.hipfb, which cannot be read");
    setenv("VMM_HIP_KERNELS", "/dev/null", 1);
    fails_to_open(VMM_ERR_UNSUPPORTED, "or is empty");
}

/* A failure is reported by HIP's names, and leaves the device to be opened later. */
static void failures(void) {
    vmm_device *device;

    CHECK(load());
    CHECK(sim.fail("hipInit", 1, hipErrorUnknown, 1) == 0);
    CHECK_STATUS(vmm_device_open("hip:0", &device), VMM_ERR_NO_DRIVER);
    CHECK(strstr(vmm_last_error()->message, "[hipInit]"));
    CHECK(sim.fail("hipModuleLoadData", 1, hipErrorNoBinaryForGpu, 1) == 0);
    CHECK_STATUS(vmm_device_open("hip:0", &device), VMM_ERR_UNSUPPORTED);
    CHECK(strstr(vmm_last_error()->message, "HIP_ARCHS"));
    CHECK(vmm_last_error()->driver_code == hipErrorNoBinaryForGpu);
    CHECK(sim.fail("hipModuleLoadData", 1, hipErrorOutOfMemory, 1) == 0);
    CHECK_STATUS(vmm_device_open("hip:0", &device), VMM_ERR_OUT_OF_MEMORY);
    CHECK(sim.fail("hipDeviceGetAttribute", 1, hipErrorInvalidValue, 1) == 0);
    CHECK_OK(vmm_device_open("hip:0", &device)); /* its record has been made before */
    vmm_device_close(device);
}

/* The thread's own device stays current, and streams of another are refused. */
static void two_devices(void) {
    static const int64_t shape[] = {0, 16}, one_row[] = {1, 16};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 1000};
    vmm_device *device;
    vmm_pool *pool;
    vmm_tensor *tensor;
    hipStream_t foreign, own;
    void *row;
    int current = -1;

    setenv("VMM_SIM_DEVICES", "2", 1);
    CHECK(load());
    CHECK_OK(vmm_device_open("hip:1", &device));
    CHECK_CUDA(sim.hip.hipGetDevice(&current));
    CHECK(current == 0);
    CHECK_CUDA(sim.stream_create(&foreign, 1));
    CHECK_CUDA(sim.hip.hipSetDevice(1));
    CHECK_CUDA(sim.stream_create(&own, 1));
    CHECK_CUDA(sim.alloc(&row, 16));
    CHECK_CUDA(sim.hip.hipSetDevice(0));

    vmm_array source = {.data = row,
                        .memory = VMM_MEMORY_DEVICE,
                        .device_index = 1,
                        .dtype = VMM_UINT8,
                        .ndim = 2,
                        .shape = one_row};
    CHECK_OK(vmm_pool_create(device, 0, 0, &pool));
    CHECK_OK(vmm_reserve(pool, &spec, &tensor));
    CHECK_OK(vmm_append(tensor, &source, own));
    CHECK_OK(vmm_append(tensor, &source, NULL));
    CHECK_OK(vmm_append(tensor, &source, VMM_STREAM_PER_THREAD));
    CHECK_STATUS(vmm_append(tensor, &source, foreign), VMM_ERR_INVALID);
    CHECK(strstr(vmm_last_error()->message, "'hip:0', not to 'hip:1'"));
    CHECK(vmm_length(tensor) == 3);
    CHECK_OK(vmm_close(tensor));
    CHECK_OK(vmm_pool_close(pool)); /* with a fence, which waits for that device */
    vmm_device_close(device);
    CHECK_CUDA(sim.hip.hipGetDevice(&current));
    CHECK(current == 0);
    CHECK(sim.reports() == 0);
    CHECK_CUDA(sim.hip.hipSetDevice(1));
    CHECK_CUDA(sim.free(row));
    CHECK_CUDA(sim.stream_destroy(own));
    CHECK_CUDA(sim.stream_destroy(foreign));
}

/* What the next child runs. */
static void (*child_test)(void);
static bool child_has_simulator;

static int run_child_test(void) {
    if (child_has_simulator && !load())
        return 77;
    child_test();
    return 0;
}

static void run(void (*test)(void), bool with_simulator) {
    child_test = test;
    child_has_simulator = with_simulator;
    int status = in_child(run_child_test);
    if (status == 77)
        SKIP("VMM_HIP_LIBRARY does not name the simulated runtime");
    if (status != 0)
        FAIL("a child ended with status %d", status);
}

int main(int argc, char **argv) {
    if (argc < 2 || strcmp(argv[1], "hip:0") != 0)
        SKIP("for HIP alone");
    setenv("VMM_SIM_GRANULARITY", "65536", 1);
    setenv("VMM_SIM_STRICT", "return", 1);
    run(mappings_one_by_one, true);
    run(streams, true);
    run(no_library, false);
    run(no_device, false);
    run(too_old, false);
    run(no_kernels, false);
    run(failures, false);
    run(two_devices, false);
    return 0;
}
