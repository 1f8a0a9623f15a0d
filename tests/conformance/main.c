/* The conformance probes: what the CUDA driver answers, one line for each question.
 *
 *     build/tests/conformance > transcript
 *
 * asks the driver that VMM_CUDA_LIBRARY names, or libcuda.so.1. The simulated driver is to be
 * run with VMM_SIM_STRICT=return; its transcript must equal that of a real one, see
 * tests/python/test_conformance.py. Lines that begin with # say where it was made.
 *
 * Probes run in child processes: one that dies, hangs or loses its context is told in its
 * line, and the next goes on in a new process.
 *
 * Left out, for what the driver does with it is undefined, depends on timing, or harms others:
 *   - mapping a handle that was released and is mapped nowhere: the H100's driver dies of it
 *   - use of a stream, event, graph or module after its end, and of handles that never were:
 *     the driver follows the pointer
 *   - unmapping what a running kernel touches, and unordered access from two streams: the
 *     outcome depends on timing (the simulator reports both, tests/c/test_sim_work.c)
 *   - the host reading device memory: a fault there, memory on the simulator
 *   - destroying the primary context while others may use it
 *   - a stream of another device's context: needs two
 */
#include "probe.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROBE_LIMIT_S 30

enum { EXIT_DONE = 0, EXIT_LOST = 3, EXIT_NO_DRIVER = 77 };

cuda_api cuda;
CUcontext context;
size_t granule;
const CUmemAllocationProp block_prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                        .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};

static const probe_list *const lists[] = {
    &driver_probes,  &reserve_probes, &map_probes,     &access_probes, &use_probes,
    &pointer_probes, &stream_probes,  &capture_probes, &unsafe_probes,
};

/* ---- answers ---------------------------------------------------------------------------- */
static char line[16384];
static jmp_buf probe_end;

void say(const char *format, ...) {
    size_t n = strlen(line);
    va_list arguments;
    va_start(arguments, format);
    if (n && n + 2 < sizeof line) {
        memcpy(line + n, ", ", 3);
        n += 2;
    }
    vsnprintf(line + n, sizeof line - n, format, arguments);
    va_end(arguments);
}

const char *code_name(CUresult code) {
    static const struct {
        CUresult code;
        const char *name;
    } names[] = {
#define STATUS_NAME(value, name, text) {value, #name},
        CUDA_STATUS_LIST(STATUS_NAME)
#undef STATUS_NAME
    };
    static _Thread_local char number[16];
    if (code == CUDA_SUCCESS)
        return "OK";
    for (size_t i = 0; i < LENGTH_OF(names); i++)
        if (names[i].code == code)
            return names[i].name + strlen("ERROR_");
    snprintf(number, sizeof number, "%d", code);
    return number;
}

CUresult say_code(const char *what, CUresult code) {
    say("%s %s", what, code_name(code));
    return code;
}

void must(const char *what, CUresult code) {
    if (code == CUDA_SUCCESS)
        return;
    say("not probed: %s %s", what, code_name(code));
    longjmp(probe_end, 1);
}

/* ---- what probes begin with ----------------------------------------------------------------- */
CUdeviceptr new_space(size_t n_granules) {
    CUdeviceptr base = 0;
    MUST(cuMemAddressReserve, &base, n_granules * granule, 0, 0, 0);
    return base;
}

CUmemGenericAllocationHandle new_block(size_t n_granules) {
    CUmemGenericAllocationHandle block = 0;
    MUST(cuMemCreate, &block, n_granules * granule, &block_prop, 0);
    return block;
}

CUresult set_access(CUdeviceptr at, size_t bytes, int flags) {
    const CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, flags};
    return cuda.cuMemSetAccess(at, bytes, &access, 1);
}

CUmemGenericAllocationHandle put_block(CUdeviceptr at, size_t n_granules, int flags) {
    CUmemGenericAllocationHandle block = new_block(n_granules);
    MUST(cuMemMap, at, n_granules * granule, 0, block, 0);
    if (flags >= 0)
        must("cuMemSetAccess", set_access(at, n_granules * granule, flags));
    return block;
}

static CUstream streams[64]; /* of the running probe */
static size_t n_streams;

CUstream new_stream(unsigned flags) {
    CUstream stream = NULL;
    MUST(cuStreamCreate, &stream, flags);
    if (n_streams < LENGTH_OF(streams))
        streams[n_streams++] = stream;
    return stream;
}

CUevent new_event(void) {
    CUevent event = NULL;
    MUST(cuEventCreate, &event, CU_EVENT_DISABLE_TIMING);
    return event;
}

const char *map_of(CUdeviceptr base, size_t n_granules) {
    static char text[64];
    const CUmemLocation location = {CU_MEM_LOCATION_TYPE_DEVICE, 0};
    for (size_t i = 0; i < n_granules; i++) {
        unsigned long long flags = 0;
        CUresult code = cuda.cuMemGetAccess(&flags, &location, base + i * granule);
        text[i] = code ? '.' : flags == 0 ? '-' : flags == 1 ? 'r' : flags == 3 ? 'w' : '?';
    }
    text[n_granules] = 0;
    return text;
}

int byte_at(CUdeviceptr address) {
    unsigned char byte;
    if (cuda.cuCtxSynchronize() || cuda.cuMemcpyDtoH(&byte, address, 1))
        return -1;
    return byte;
}

CUresult settled(CUresult code) {
    return code ? code : cuda.cuCtxSynchronize();
}

static sem_t gate;
static int n_held;

static void wait_at_gate(void *unused) {
    (void)unused;
    while (sem_wait(&gate) != 0 && errno == EINTR)
        ;
}

void hold(CUstream stream) {
    MUST(cuLaunchHostFunc, stream, wait_at_gate, NULL);
    n_held++;
}

void go(void) {
    for (; n_held; n_held--)
        sem_post(&gate);
}

typedef struct errand {
    void (*function)(void *);
    void *argument;
} errand;

static void *run_errand(void *argument) {
    const errand *errand = argument;
    cuda.cuCtxSetCurrent(context);
    errand->function(errand->argument);
    return NULL;
}

void elsewhere(void (*function)(void *), void *argument) {
    pthread_t thread;
    errand errand = {function, argument};
    if (pthread_create(&thread, NULL, run_errand, &errand) != 0)
        must("pthread_create", CUDA_ERROR_OPERATING_SYSTEM);
    pthread_join(thread, NULL);
}

/* ---- the driver -------------------------------------------------------------------------------- */
static bool load(void) {
    const char *name = getenv("VMM_CUDA_LIBRARY");
    void *library = dlopen(name && *name ? name : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library)
        *(void **)&cuda.cuGetProcAddress = dlsym(library, "cuGetProcAddress_v2");
    if (!cuda.cuGetProcAddress) {
        fprintf(stderr, "no CUDA driver of version 12 or later: %s\n",
                library ? "it has no cuGetProcAddress_v2" : dlerror());
        return false;
    }
#define ENTRY_LOAD(name, version, declaration)                                                     \
    if (cuda.cuGetProcAddress(#name, (void **)&cuda.name, version,                                 \
                              CU_GET_PROC_ADDRESS_LEGACY_STREAM, NULL) ||                          \
        !cuda.name) {                                                                              \
        fprintf(stderr, "the driver has no %s of CUDA %d\n", #name, version);                      \
        return false;                                                                              \
    }
    ENTRY_POINTS(ENTRY_LOAD)
#undef ENTRY_LOAD
    return true;
}

static bool begin(void) {
    CUresult code = cuda.cuInit(0);
    if (!code)
        code = cuda.cuDevicePrimaryCtxRetain(&context, 0);
    if (!code)
        code = cuda.cuCtxSetCurrent(context);
    if (!code)
        code = cuda.cuMemGetAllocationGranularity(&granule, &block_prop,
                                                  CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    if (code)
        fprintf(stderr, "the CUDA driver cannot be used: %s\n", code_name(code));
    return !code;
}

/* ---- running ------------------------------------------------------------------------------------ */
/* Leave nothing behind that would change what the next probe sees. False: the context is lost. */
static bool tidy(void) {
    go();
    int mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    for (; n_streams; n_streams--) {
        int state = CU_STREAM_CAPTURE_STATUS_NONE;
        CUgraph graph = NULL;
        cuda.cuStreamIsCapturing(streams[n_streams - 1], &state);
        if (state != CU_STREAM_CAPTURE_STATUS_NONE)
            cuda.cuStreamEndCapture(streams[n_streams - 1], &graph);
        if (graph)
            cuda.cuGraphDestroy(graph);
    }
    cuda.cuThreadExchangeStreamCaptureMode(&mode);
    if (cuda.cuCtxSetCurrent(context))
        return false;
    return cuda.cuCtxSynchronize() == CUDA_SUCCESS;
}

static bool run(const probe *probe) {
    line[0] = 0;
    alarm(PROBE_LIMIT_S);
    if (setjmp(probe_end) == 0)
        probe->run();
    bool usable = probe->raw || tidy();
    alarm(0);
    if (!usable)
        say("the context is lost");
    for (char *c = line; *c; c++)
        if (*c == '\n')
            *c = ' ';
    printf("%s: %s\n", probe->name, line);
    fflush(stdout);
    return usable;
}

/* In a child: the probes from `first` on. Its last byte on `report` says how far it came. */
static void run_from(const probe_list *list, size_t first, int report) {
    sem_init(&gate, 0, 0);
    if (!load() || (!list->probes[first].raw && !begin()))
        _exit(EXIT_NO_DRIVER);
    for (size_t i = first; i < list->n_probes; i++) {
        bool alone = list->probes[i].alone;
        if (alone && i > first)
            _exit(EXIT_LOST);
        bool usable = run(&list->probes[i]);
        if (write(report, ".", 1) != 1 || alone || !usable)
            _exit(EXIT_LOST);
    }
    _exit(EXIT_DONE);
}

static int run_list(const probe_list *list) {
    size_t next = 0;
    printf("\n# %s\n", list->name);
    fflush(stdout);
    while (next < list->n_probes) {
        int ends[2], status;
        const size_t begun = next;
        char dots[64];
        ssize_t n;
        if (pipe(ends) != 0)
            return 1;
        pid_t child = fork();
        if (child == 0) {
            close(ends[0]);
            run_from(list, next, ends[1]);
        }
        close(ends[1]);
        while ((n = read(ends[0], dots, sizeof dots)) > 0)
            next += (size_t)n;
        close(ends[0]);
        if (child < 0 || waitpid(child, &status, 0) != child)
            return 1;
        if (WIFEXITED(status) && WEXITSTATUS(status) == EXIT_NO_DRIVER)
            return EXIT_NO_DRIVER;
        bool died = WIFSIGNALED(status);
        if (next < list->n_probes && (died || next == begun))
            printf("%s: %s\n", list->probes[next++].name,
                   !died                         ? "the process ended"
                   : WTERMSIG(status) == SIGALRM ? "the process hung"
                                                 : strsignal(WTERMSIG(status)));
        fflush(stdout);
    }
    return 0;
}

/* In a child, for a process that has used CUDA must not fork to go on with it. */
static void print_header(void) {
    char name[128] = "";
    int version = 0;
    if (!load() || !begin())
        _exit(EXIT_NO_DRIVER);
    cuda.cuDeviceGetName(name, sizeof name, 0);
    cuda.cuDriverGetVersion(&version);
    printf("# %s, driver %d\n", name, version);
    fflush(stdout);
    _exit(EXIT_DONE);
}

int main(void) {
    int status;
    pid_t child = fork();
    if (child == 0)
        print_header();
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status))
        return 1;
    status = WEXITSTATUS(status);
    for (size_t i = 0; !status && i < LENGTH_OF(lists); i++)
        status = run_list(lists[i]);
    return status;
}
