/* sim_cases.h - for the tests of the simulated driver itself: every misuse that it must catch
 * is committed in a child of its own, which must abort with the right message; what is right
 * must pass. libvmm has no part in this. Runs where VMM_CUDA_LIBRARY names the simulator. */
#ifndef SIM_CASES_H
#define SIM_CASES_H

#include "check.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../libvmm/src/append.h"
#include "../sim/cuda_abi.h"
#include "../sim/vmm_sim.h"

#define GRANULE 65536

/* ---- the driver, loaded anew in each child ---------------------------------------------------- */
#define ENTRY_POINTS(X)                                                                            \
    X(cuInit)                                                                                      \
    X(cuGetProcAddress_v2)                                                                         \
    X(cuDeviceGetCount)                                                                            \
    X(cuDevicePrimaryCtxRetain)                                                                    \
    X(cuCtxSetCurrent)                                                                             \
    X(cuCtxSynchronize)                                                                            \
    X(cuCtxRecordEvent)                                                                            \
    X(cuThreadExchangeStreamCaptureMode)                                                           \
    X(cuMemGetAllocationGranularity)                                                               \
    X(cuMemAddressReserve)                                                                         \
    X(cuMemAddressFree)                                                                            \
    X(cuMemCreate)                                                                                 \
    X(cuMemRelease)                                                                                \
    X(cuMemMap)                                                                                    \
    X(cuMemUnmap)                                                                                  \
    X(cuMemSetAccess)                                                                              \
    X(cuMemAlloc_v2)                                                                               \
    X(cuMemFree_v2)                                                                                \
    X(cuMemHostAlloc)                                                                              \
    X(cuMemFreeHost)                                                                               \
    X(cuPointerGetAttribute)                                                                       \
    X(cuMemcpyHtoD_v2)                                                                             \
    X(cuMemcpyDtoH_v2)                                                                             \
    X(cuMemcpyDtoDAsync_v2)                                                                        \
    X(cuMemcpy2DAsync_v2)                                                                          \
    X(cuMemsetD8Async)                                                                             \
    X(cuModuleLoadData)                                                                            \
    X(cuModuleGetFunction)                                                                         \
    X(cuLaunchKernel)                                                                              \
    X(cuLaunchHostFunc)                                                                            \
    X(cuEventCreate)                                                                               \
    X(cuEventDestroy_v2)                                                                           \
    X(cuEventRecord)                                                                               \
    X(cuEventQuery)                                                                                \
    X(cuEventSynchronize)                                                                          \
    X(cuEventElapsedTime)                                                                          \
    X(cuStreamCreate)                                                                              \
    X(cuStreamDestroy_v2)                                                                          \
    X(cuStreamSynchronize)                                                                         \
    X(cuStreamWaitEvent)                                                                           \
    X(cuStreamIsCapturing)                                                                         \
    X(cuStreamBeginCapture_v2)                                                                     \
    X(cuStreamEndCapture)                                                                          \
    X(cuGraphInstantiateWithFlags)                                                                 \
    X(cuGraphLaunch)                                                                               \
    X(cuGraphDestroy)                                                                              \
    X(cuGraphExecDestroy)                                                                          \
    X(vmm_sim_version)                                                                             \
    X(vmm_sim_fail)                                                                                \
    X(vmm_sim_failed)                                                                              \
    X(vmm_sim_reset)                                                                               \
    X(vmm_sim_calls)                                                                               \
    X(vmm_sim_live)                                                                                \
    X(vmm_sim_hold)                                                                                \
    X(vmm_sim_go)                                                                                  \
    X(vmm_sim_quiesce)                                                                             \
    X(vmm_sim_pending)                                                                             \
    X(vmm_sim_reports)                                                                             \
    X(vmm_sim_last_report)

static struct {
#define FIELD(name) __typeof__(name) *name;
    ENTRY_POINTS(FIELD)
#undef FIELD
} sim;

#define OK(call) CHECK_CUDA(sim.call)
#define GIVES(call, expected)                                                                      \
    do {                                                                                           \
        int code_ = sim.call;                                                                      \
        if (code_ != (expected))                                                                   \
            FAIL("%s returned %d, not %s", #call, code_, #expected);                               \
    } while (0)

static inline bool load(void) {
    void *library = dlopen(getenv("VMM_CUDA_LIBRARY"), RTLD_NOW | RTLD_LOCAL);
    if (!library || !dlsym(library, "vmm_sim_version"))
        return false;
#define LOAD(name)                                                                                 \
    *(void **)&sim.name = dlsym(library, #name);                                                   \
    CHECK(sim.name);
    ENTRY_POINTS(LOAD)
#undef LOAD
    return true;
}

/* ---- what most cases begin with --------------------------------------------------------------- */
static CUcontext context;
static CUdeviceptr base; /* eight granules of address space */
static CUmemGenericAllocationHandle first;
static CUstream stream, other;
static const CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                         .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};

static inline void begin(void) {
    OK(cuInit(0));
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxSetCurrent(context));
    OK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    OK(cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
}

static inline void reserved(void) {
    begin();
    OK(cuMemAddressReserve(&base, 8 * GRANULE, 0, 0, 0));
    OK(cuMemCreate(&first, GRANULE, &prop, 0));
}

static inline void grant(CUdeviceptr at, size_t bytes, int flags) {
    const CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, flags};
    OK(cuMemSetAccess(at, bytes, &access, 1));
}

static inline void mapped(void) {
    reserved();
    OK(cuMemMap(base, GRANULE, 0, first, 0));
}

static inline void usable(void) {
    mapped();
    grant(base, GRANULE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
}

static inline void close_all(void) {
    OK(cuMemUnmap(base, GRANULE));
    OK(cuMemRelease(first));
    OK(cuMemAddressFree(base, 8 * GRANULE));
}

static inline void fill(CUstream on) {
    OK(cuMemsetD8Async(base, 1, GRANULE, on));
}

/* ---- the cases ---------------------------------------------------------------------------------- */
typedef struct test_case {
    const char *name;
    void (*run)(void);
    const char *message; /* of the abort, "" for a fault; NULL: must pass */
    const char *setting, *value;
    bool exits; /* with status 1 and the message, when it is done */
} test_case;

#define MISUSE(function, message) {#function, function, message, NULL, NULL, false}
#define MISUSE_WITH(function, message, setting, value)                                             \
    {#function, function, message, setting, value, false}
#define RIGHT(function) {#function, function, NULL, NULL, NULL, false}
#define RIGHT_WITH(function, setting, value) {#function, function, NULL, setting, value, false}

static inline void run_child(const test_case *c, int output) {
    dup2(output, 1);
    dup2(output, 2);
    setenv("VMM_SIM_GRANULARITY", "65536", 1);
    unsetenv("VMM_SIM_CHECK_EXIT"); /* but for those that ask for it */
    if (c && c->setting)
        setenv(c->setting, c->value, 1);
    if (!load())
        exit(77);
    if (c)
        c->run();
    exit(0);
}

/* Returns waitpid's status; `text` gets what the child said. */
static inline int run_case(const test_case *c, char *text, size_t size) {
    int ends[2], status;
    size_t n = 0;
    ssize_t got;
    CHECK(pipe(ends) == 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        close(ends[0]);
        run_child(c, ends[1]);
    }
    close(ends[1]);
    while (n + 1 < size && (got = read(ends[0], text + n, size - 1 - n)) > 0)
        n += (size_t)got;
    text[n] = 0;
    close(ends[0]);
    CHECK(waitpid(child, &status, 0) == child);
    return status;
}

/* What main() returns. */
static inline int run_cases(int argc, char **argv, const test_case *cases, size_t n_cases) {
    char text[4096];
    int n_failed = 0;
    if (argc > 1 && strcmp(argv[1], "host") == 0)
        SKIP("the host has no simulated driver");
    if (!getenv("VMM_CUDA_LIBRARY"))
        SKIP("VMM_CUDA_LIBRARY is not set");
    int status = run_case(NULL, text, sizeof text);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        SKIP("VMM_CUDA_LIBRARY is not the simulator");
    for (size_t i = 0; i < n_cases; i++) {
        const test_case *c = &cases[i];
        status = run_case(c, text, sizeof text);
        bool passed;
        if (!c->message)
            passed = WIFEXITED(status) && WEXITSTATUS(status) == 0;
        else if (c->exits)
            passed = WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(text, c->message);
        else
            passed = WIFSIGNALED(status) && strstr(text, c->message) &&
                     WTERMSIG(status) == (*c->message ? SIGABRT : SIGSEGV);
        if (!passed)
            printf("%s: status 0x%x, said: %s\n", c->name, (unsigned)status, text);
        n_failed += !passed;
    }
    return n_failed ? 1 : 0;
}

#endif /* SIM_CASES_H */
