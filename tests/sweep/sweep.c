/* sweep.c - for every operation, on every kind of tensor: the k-th call fails, for every k.
 *
 *   sweep DEVICE [--json] [--only WORD]
 *
 * DEVICE is host, cuda:0 or hip:0; the latter two are the simulated driver's, CUDA's of the
 * version that VMM_SIM_DRIVER_VERSION names. --json prints a line for each sweep. */
#include "sweep.h"

#include <errno.h>
#include <signal.h>
#include <unistd.h>

#define CUDA_OUT_OF_MEMORY 2
#define CUDA_NOT_READY 600
#define CUDA_UNKNOWN 999

static const char *const kind_names[] = {"driver", "system", "allocation"};
static const char *const layout_names[] = {"seq", "lane", "c"};
static const char *const block_names[] = {"fresh", "recycled", "stale"};

/* ---- failing ---------------------------------------------------------------------------- */

void fault_arm(const fault *fault) {
    if (fault->kind != FAULT_DRIVER) {
        faults_arm(fault->kind, fault->nth, fault->code, fault->times);
        return;
    }
    the_simulator()->reset();
    CHECK(the_simulator()->fail(fault->call, fault->nth, fault->code, fault->times) == 0);
}

const char *fault_disarm(const fault *fault) {
    if (fault->kind != FAULT_DRIVER) {
        faults_disarm();
        return faults_failed_call();
    }
    the_simulator()->fail_none();
    if (strcmp(fault->call, "*") == 0)
        return the_simulator()->failed_call();
    return the_simulator()->failed() ? fault->call : NULL;
}

bool is_call(const char *call, const char *name) {
    if (strcmp(call, name) == 0)
        return true;
    if (strcmp(name, "cuLaunchKernel") == 0)
        return strcmp(call, "hipModuleLaunchKernel") == 0;
    return is_hip && strncmp(call, "hip", 3) == 0 && strcmp(call + 3, name + 2) == 0;
}

static vmm_status expected_status(const fault *fault, const char *call, int flags) {
    switch (fault->kind) {
    case FAULT_ALLOCATION: return VMM_ERR_OUT_OF_MEMORY;
    case FAULT_SYSTEM:
        /* A reservation begins with these two, and so does a fork. */
        if (fault->code != ENOMEM || strcmp(call, "mmap") == 0 ||
            (flags & TAKES_ADDRESSES && fault->nth == 2))
            return VMM_ERR_DRIVER;
        return VMM_ERR_OUT_OF_MEMORY;
    default:
        if (fault->code != CUDA_OUT_OF_MEMORY || is_call(call, "cuMemAddressReserve"))
            return VMM_ERR_DRIVER;
        return VMM_ERR_OUT_OF_MEMORY;
    }
}

void fault_check_error(const fault *fault, const char *call, vmm_status status, int flags) {
    const vmm_error *error = vmm_last_error();
    CHECK(error->status == status);
    if (flags & SHORT && strstr(error->message, "the pool's budget")) {
        CHECK_STATUS(status, VMM_ERR_OUT_OF_MEMORY);
        return;
    }
    if (fault->kind == FAULT_ALLOCATION) {
        CHECK_STATUS(status, VMM_ERR_OUT_OF_MEMORY);
        CHECK(error->driver_code == 0 && strstr(error->message, "host memory"));
        return;
    }
    char start[96];
    snprintf(start, sizeof start, "[%s][", error->operation);
    if (error->driver_code != fault->code || strncmp(error->message, start, strlen(start)) != 0)
        FAIL("the error is %d of %s: %s", error->driver_code, error->operation, error->message);
    /* Where several fail, one that the operation could do without may have been the first. These
     * it could not, and what failed while they were undone must not hide them. */
    static const char *const needed[] = {"cuMemMap",          "cuMemSetAccess",  "cuLaunchKernel",
                                         "cuMemcpyHtoDAsync", "cuMemsetD8Async", "mprotect"};
    bool is_needed = fault->times == 1;
    for (size_t i = 0; i < LENGTH_OF(needed) && !(flags & (CLOSES | FENCES)); i++)
        is_needed |= is_call(call, needed[i]);
    if (is_needed) {
        if (!is_call(error->operation, call))
            FAIL("the error is of %s, not of %s: %s", error->operation, call, error->message);
        if (status != expected_status(fault, call, flags))
            FAIL("%s is not the status for it: %s", vmm_status_name(status), error->message);
    }
}

/* ---- one attempt ---------------------------------------------------------------------------- */

/* For the message of a check that fails. */
static struct {
    bool is_running;
    const scene *scene;
    config config;
    fault fault;
    const char *call;
} current;

static void say_where(void) {
    const config *c = &current.config;
    const fault *f = &current.fault;
    if (!current.is_running)
        return;
    printf("  in: %s (%s, %s, %s blocks, %s); %s call %ld (%s) with code %d, %d time(s)\n",
           current.scene ? current.scene->name : "device_open", c->device, layout_names[c->layout],
           block_names[c->blocks], c->is_fixed ? "fixed" : "auto", kind_names[f->kind], f->nth,
           current.call ? current.call : "not yet", f->code, f->times);
}

void say_no_more(void) {
    current.is_running = false;
}

static void on_signal(int number) {
    printf("signal %d: memory that should be accessible is not\n", number);
    say_where();
    fflush(stdout);
    _exit(1);
}

/* Nothing but the operation's own undoing has come between, so the driver has what it had. */
static bool is_exact(const scene *scene, const config *config, const fault *fault,
                     const char *call) {
    static const char *const undoing[] = {"cuMemUnmap", "cuMemRelease", "cuMemAddressFree",
                                          "munmap"};
    for (size_t i = 0; i < LENGTH_OF(undoing); i++)
        if (is_call(call, undoing[i]))
            return false;
    return fault->times == 1 && fault->code != CUDA_OUT_OF_MEMORY &&
           config->blocks != BLOCKS_STALE && !(scene->flags & (SUBMITS | FENCES));
}

/* Returns false when the operation makes no such call. */
static bool attempt(const scene *scene, const config *config, const fault *fault, tally *tally) {
    world w;
    snapshot before, after;
    world_open(&w, config, scene);
    snapshot_take(&before, &w);
    fault_arm(fault);
    if (config->is_gpu && scene->flags & BUSY && fault->kind == FAULT_DRIVER)
        CHECK(the_simulator()->fail("cuEventQuery", 1, CUDA_NOT_READY, 1) == 0);
    vmm_status status = scene->run(&w);
    const char *call = current.call = fault_disarm(fault);
    bool was_refused = status != VMM_OK;
    if (call && fault->kind == FAULT_DRIVER &&
        (fault->times != 1 || is_call(call, "cuEventDestroy")))
        w.lost_events = the_simulator()->calls("cuEventDestroy");
    if (was_refused) {
        CHECK(call);
        fault_check_error(fault, call, status, scene->flags);
        CHECK(!w.made && !w.memory);
        snapshot_take(&after, &w);
        snapshot_compare(&before, &after, scene, is_exact(scene, config, fault, call));
        world_check(&w);
        CHECK_OK(scene->run(&w));
        snapshot_take(&before, &w);
        CHECK_SIZE(before.pool.parked_bytes, 0);
        tally->parked += after.pool.parked_bytes > 0;
    }
    scene->check(&w);
    world_check(&w);
    world_close(&w);
    if (!call)
        return false;
    tally->points++;
    tally->refused += was_refused;
    tally->absorbed += !was_refused;
    return true;
}

/* ---- all of them ---------------------------------------------------------------------------- */

static bool as_json;
static tally total;
static long n_sweeps;

static void report(const char *operation, const config *c, int flags, fault_kind kind,
                   const tally *t) {
    total.points += t->points, total.refused += t->refused;
    total.absorbed += t->absorbed, total.parked += t->parked;
    n_sweeps++;
    if (!as_json)
        return;
    const char *version = c->is_gpu ? getenv("VMM_SIM_DRIVER_VERSION") : NULL;
    printf("{\"operation\": \"%s\", \"device\": \"%s\", \"driver\": %s, \"layout\": \"%s\", "
           "\"blocks\": \"%s\", \"block_size\": \"%s\", \"fault\": \"%s\", \"calls\": %ld, "
           "\"points\": %ld, \"refused\": %ld, \"absorbed\": %ld, \"parked\": %ld}\n",
           operation, c->device, version ? version : "0",
           flags & ONE_LAYOUT ? "-" : layout_names[c->layout],
           flags & ONE_BLOCKS ? "-" : block_names[c->blocks],
           flags & ONE_SIZE ? "-"
           : c->is_fixed    ? "fixed"
                            : "auto",
           kind_names[kind], t->calls, t->points, t->refused, t->absorbed, t->parked);
}

static bool try_fault(const scene *scene, const config *config, const fault *fault, tally *tally) {
    current.is_running = true, current.call = NULL;
    current.scene = scene, current.config = *config, current.fault = *fault;
    return scene ? attempt(scene, config, fault, tally) : sweep_open(config->device, fault, tally);
}

/* `scene` NULL is opening the device. */
static void sweep(const scene *scene, const config *config, fault_kind kind) {
    /* A code that says that memory is short, and one that does not. */
    static const int codes[FAULT_KINDS][2] = {
        {CUDA_OUT_OF_MEMORY, CUDA_UNKNOWN}, {ENOMEM, EACCES}, {ENOMEM}};
    /* More than one in a row: the undoing fails, too. */
    static const struct {
        int times;
        bool one_code;
    } runs[] = {{1, false}, {2, true}, {3, true}, {-1, false}};
    tally tally = {0};
    for (size_t r = 0; r < LENGTH_OF(runs); r++)
        for (int c = runs[r].one_code; c < 2; c++) {
            int code = codes[kind][c] ? codes[kind][c] : codes[kind][0];
            fault fault = {kind, "*", 1, code, runs[r].times};
            if (c == 1 && !runs[r].one_code && !codes[kind][1])
                continue;
            while (try_fault(scene, config, &fault, &tally))
                fault.nth++;
            tally.calls = fault.nth - 1;
        }
    /* Under WSL2 a driver may say that it is not ready: it is asked again, eight times. */
    for (int n = 1; scene && kind == FAULT_DRIVER && !(scene->flags & BUSY) && n <= 8; n += 7) {
        fault fault = {kind, "cuMemSetAccess", 1, CUDA_NOT_READY, n};
        try_fault(scene, config, &fault, &tally);
    }
    report(scene ? scene->name : "device_open", config,
           scene ? scene->flags : ONE_LAYOUT | ONE_BLOCKS | ONE_SIZE, kind, &tally);
}

static void sweep_scene(const scene *scene, config config, fault_kind kind) {
    int flags = scene ? scene->flags : ONE_LAYOUT | ONE_BLOCKS | ONE_SIZE;
    if (flags & CUDA_ONLY && !config.is_gpu)
        return;
    int layouts = flags & ONE_LAYOUT ? 1 : 3;
    for (int layout = flags & LANES ? VMM_LAYOUT_LANE : 0; layout < layouts; layout++)
        for (int blocks = 0; blocks < (flags & ONE_BLOCKS ? 1 : BLOCK_KINDS); blocks++)
            for (int is_fixed = 0; is_fixed < (flags & ONE_SIZE ? 1 : 2); is_fixed++) {
                if (blocks && !config.is_gpu)
                    continue; /* the host's go back at once */
                config.layout = (vmm_layout)layout;
                config.blocks = (block_kind)blocks;
                config.is_fixed = is_fixed;
                sweep(scene, &config, kind);
            }
}

int main(int argc, char **argv) {
    config config = {.device = argc > 1 ? argv[1] : "host"};
    const char *only = "";
    for (int i = 2; i < argc; i++) {
        as_json |= strcmp(argv[i], "--json") == 0;
        if (strcmp(argv[i], "--only") == 0 && i + 1 < argc)
            only = argv[i + 1];
    }
    config.is_gpu = strcmp(config.device, "host") != 0;
    /* Before the driver is loaded. */
    setenv("VMM_SIM_GRANULARITY", "4096", 1);
    setenv("VMM_SIM_DELAY_US", "0", 1);
    is_hip = strncmp(config.device, "hip:", 4) == 0;
    if (!is_hip)
        setenv("VMM_SIM_DRIVER_VERSION", "13000", 0);
    bool is_old = !is_hip && atoi(getenv("VMM_SIM_DRIVER_VERSION")) < 12050;
    atexit(say_where);
    signal(SIGSEGV, on_signal);
    signal(SIGBUS, on_signal);
    faults_begin();
    if (config.is_gpu && !dlsym(cuda_library(), "vmm_sim_version"))
        SKIP("a real driver cannot be made to fail: the simulated one can");
    if (!config.is_gpu && !faults_possible())
        SKIP("under a sanitizer only the simulated driver can be made to fail");
    for (int kind = 0; kind < FAULT_KINDS; kind++) {
        if ((kind == FAULT_DRIVER && !config.is_gpu) || (kind == FAULT_SYSTEM && config.is_gpu) ||
            (is_old && kind != FAULT_DRIVER))
            continue;
        if (strstr("device_open", only))
            sweep_scene(NULL, config, (fault_kind)kind);
    }
    vmm_device *device; /* stays open: what it costs to load the driver is no part of the rest */
    CHECK_OK(vmm_device_open(config.device, &device));
    for (size_t i = 0; i < n_scenes; i++)
        for (int kind = 0; kind < FAULT_KINDS; kind++) {
            if ((kind == FAULT_DRIVER && !config.is_gpu) ||
                (kind == FAULT_SYSTEM && config.is_gpu) ||
                (is_old && (kind != FAULT_DRIVER || !(scenes[i].flags & FENCES))))
                continue;
            if (strstr(scenes[i].name, only))
                sweep_scene(&scenes[i], config, (fault_kind)kind);
        }
    vmm_device_close(device);
    say_no_more();
    if (!as_json)
        printf("%ld sweeps, %ld failure points: %ld refused (%ld with memory parked), "
               "%ld done all the same\n",
               n_sweeps, total.points, total.refused, total.parked, total.absorbed);
    return 0;
}
