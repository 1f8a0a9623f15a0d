/* control.c - the way into and out of every call: what is allowed, counted, made to fail. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sim.h"

sim_state sim = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

#define MAX_RULES 32
#define ANY_CALL SIM_N_CALLS

typedef struct rule {
    sim_call call;
    long nth;
    int times;
    CUresult code;
} rule;

static const struct {
    const char *name; /* CUDA's */
    int flags;
} calls[SIM_N_CALLS] = {
#define CALL_ENTRY(name, flags) {#name, flags},
    SIM_CALLS(CALL_ENTRY)
#undef CALL_ENTRY
};

static long counts[SIM_N_CALLS];
static rule rules[MAX_RULES];
static size_t n_rules;
static long n_failed, n_reports;
static const char *first_failed; /* by a rule for any call */
static char last_report[512];
static unsigned long long random_state = 1;
static _Thread_local sim_call this_call;

const char *sim_call_name(sim_call call) {
    return sim_vendor_here.names[call];
}

void *sim_alloc(size_t bytes) {
    void *p = calloc(1, bytes ? bytes : 1);
    if (!p) {
        fprintf(stderr, "vmm-sim: the simulator itself is out of memory\n");
        abort();
    }
    return p;
}

void *sim_grow(void *old, size_t bytes) {
    void *p = realloc(old, bytes);
    if (!p) {
        fprintf(stderr, "vmm-sim: the simulator itself is out of memory\n");
        abort();
    }
    return p;
}

/* xorshift64*: the same seed gives the same delays for the same order of calls. */
unsigned long long sim_random(void) {
    unsigned long long x = random_state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    random_state = x;
    return x * 0x2545F4914F6CDD1Dull;
}

/* ---- reports -------------------------------------------------------------------------- */
static void report(const char *who, const char *format, va_list arguments) {
    char text[448];
    vsnprintf(text, sizeof text, format, arguments);
    snprintf(last_report, sizeof last_report, "vmm-sim: %s: %s", who, text);
    n_reports++;
    fprintf(stderr, "%s\n", last_report);
    if (sim.aborts)
        abort();
}

CUresult sim_refuse(CUresult status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    report(sim_call_name(this_call), format, arguments);
    va_end(arguments);
    return status;
}

CUresult sim_late(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    report("late work", format, arguments);
    va_end(arguments);
    sim.poison = CUDA_ERROR_ILLEGAL_ADDRESS;
    sim_cancel_work();
    return sim.poison;
}

/* ---- rules ---------------------------------------------------------------------------- */
static bool find_call(const char *name, sim_call *out) {
    for (int i = 0; i < SIM_N_CALLS; i++) {
        const char *here = sim_call_name((sim_call)i);
        if (here && (strcmp(here, name) == 0 || strcmp(calls[i].name, name) == 0)) {
            *out = (sim_call)i;
            return true;
        }
    }
    if (strcmp(name, "*") != 0)
        return false;
    *out = ANY_CALL;
    return true;
}

static int add_rule(const char *name, long nth, int code, int times) {
    sim_call call;
    if (n_rules == MAX_RULES || nth < 1 || times == 0 || !find_call(name, &call))
        return -1;
    rules[n_rules++] = (rule){call, nth, times, code};
    return 0;
}

static CUresult injected(sim_call call) {
    CUresult status = CUDA_SUCCESS;
    for (size_t i = 0; i < n_rules; i++) {
        rule *r = &rules[i];
        if (r->times == 0 ||
            (r->call != call && !(r->call == ANY_CALL && !(calls[call].flags & SIM_BRACKET))))
            continue;
        if (r->nth > 1) {
            r->nth--;
            continue;
        }
        if (r->times > 0)
            r->times--;
        if (r->call == ANY_CALL && !first_failed)
            first_failed = sim_call_name(call);
        if (status == CUDA_SUCCESS)
            status = r->code;
    }
    for (size_t i = n_rules; i-- > 0;)
        if (rules[i].times == 0)
            rules[i] = rules[--n_rules];
    n_failed += status != CUDA_SUCCESS;
    return status;
}

/* ---- in and out ------------------------------------------------------------------------- */
static bool has_status(sim_call call) {
    return !(call == SIM_cuStreamGetCtx && sim_vendor_here.always_knows_streams);
}

static CUresult allowed(sim_call call) {
    int flags = calls[call].flags;
    if (!(flags & SIM_EARLY) && !sim.process)
        return sim_refuse(CUDA_ERROR_NOT_INITIALIZED, "called before %s",
                          sim_call_name(SIM_cuInit));
    if (sim.poison && !(flags & SIM_EARLY) && has_status(call))
        return sim.poison;
    if ((flags & SIM_CONTEXT) && !sim_current())
        return sim_refuse(CUDA_ERROR_INVALID_CONTEXT, "no context is current in this thread");
    return flags & (SIM_UNSAFE | SIM_DOUBTFUL) ? sim_capture_unsafe(flags & SIM_UNSAFE)
                                               : CUDA_SUCCESS;
}

CUresult sim_enter(sim_call call) {
    this_call = call;
    bool always = (calls[call].flags & SIM_ALWAYS) != 0;
    /* Before the lock: in a forked child no one may be left to release it. */
    if (!always && sim.process && sim.process != getpid())
        return sim_refuse(CUDA_ERROR_NOT_INITIALIZED, "called in a forked child");
    if (!always && sim_in_callback()) {
        sim_refuse(CUDA_ERROR_NOT_PERMITTED, "called inside a host callback");
        if (call != SIM_cuEventQuery) /* the driver answers it, whatever its manual says */
            return CUDA_ERROR_NOT_PERMITTED;
    }
    pthread_mutex_lock(&sim.lock);
    counts[call]++;
    CUresult status = has_status(call) ? injected(call) : CUDA_SUCCESS;
    if (status == CUDA_SUCCESS)
        status = allowed(call);
    return status == CUDA_SUCCESS ? status : sim_leave(status);
}

CUresult sim_leave(CUresult status) {
    pthread_mutex_unlock(&sim.lock);
    return status;
}

/* ---- what tests ask ----------------------------------------------------------------------- */
int vmm_sim_version(void) {
    return 1;
}

int vmm_sim_fail(const char *call, long nth, int code, int times) {
    pthread_mutex_lock(&sim.lock);
    int status = call ? add_rule(call, nth, code, times) : -1;
    pthread_mutex_unlock(&sim.lock);
    return status;
}

long vmm_sim_failed(void) {
    pthread_mutex_lock(&sim.lock);
    long n = n_failed;
    pthread_mutex_unlock(&sim.lock);
    return n;
}

const char *vmm_sim_failed_call(void) {
    pthread_mutex_lock(&sim.lock);
    const char *name = first_failed;
    pthread_mutex_unlock(&sim.lock);
    return name;
}

void vmm_sim_fail_none(void) {
    pthread_mutex_lock(&sim.lock);
    n_rules = 0;
    pthread_mutex_unlock(&sim.lock);
}

void vmm_sim_reset(void) {
    pthread_mutex_lock(&sim.lock);
    memset(counts, 0, sizeof counts);
    n_rules = 0;
    n_failed = n_reports = 0;
    first_failed = NULL;
    last_report[0] = 0;
    sim.poison = CUDA_SUCCESS;
    pthread_mutex_unlock(&sim.lock);
}

long vmm_sim_calls(const char *name) {
    sim_call call;
    if (!name || !find_call(name, &call))
        return -1;
    pthread_mutex_lock(&sim.lock);
    long n = 0;
    for (int i = 0; i < SIM_N_CALLS; i++)
        if (call == ANY_CALL || (sim_call)i == call)
            n += counts[i];
    pthread_mutex_unlock(&sim.lock);
    return n;
}

const char *vmm_sim_call_name(size_t i) {
    for (int call = 0; call < SIM_N_CALLS; call++)
        if (sim_call_name((sim_call)call) && i-- == 0)
            return sim_call_name((sim_call)call);
    return NULL;
}

void vmm_sim_live(long *handles, long *mappings, long *reservations, unsigned long long *bytes) {
    pthread_mutex_lock(&sim.lock);
    long n_mappings = 0, n_reservations = 0;
    const sim_space *space;
    for (size_t i = 0; (space = sim_space_at(i)); i++)
        if (space->kind == SIM_SPACE_VMM) {
            n_reservations++;
            n_mappings += (long)space->n_map;
        }
    unsigned long long used = 0;
    for (int device = 0; device < SIM_MAX_DEVICES; device++)
        used += sim_memory_used(device);
    if (handles)
        *handles = sim_live_handles();
    if (mappings)
        *mappings = n_mappings;
    if (reservations)
        *reservations = n_reservations;
    if (bytes)
        *bytes = used;
    pthread_mutex_unlock(&sim.lock);
}

void vmm_sim_live_objects(long *streams, long *events, long *allocations, long *host_allocations) {
    pthread_mutex_lock(&sim.lock);
    long n_streams = 0, n_spaces[3] = {0};
    const sim_space *space;
    for (size_t i = 0; (space = sim_space_at(i)); i++)
        n_spaces[space->kind]++;
    for (sim_stream *s = sim.streams; s; s = s->next)
        n_streams += s->magic == SIM_STREAM_ALIVE && !s->legacy && s->created;
    if (streams)
        *streams = n_streams;
    if (events)
        *events = sim_live_events();
    if (allocations)
        *allocations = n_spaces[SIM_SPACE_ALLOC];
    if (host_allocations)
        *host_allocations = n_spaces[SIM_SPACE_HOST];
    pthread_mutex_unlock(&sim.lock);
}

long vmm_sim_reports(void) {
    pthread_mutex_lock(&sim.lock);
    long n = n_reports;
    pthread_mutex_unlock(&sim.lock);
    return n;
}

const char *vmm_sim_last_report(void) {
    return last_report;
}

void vmm_sim_strict(int aborts) {
    pthread_mutex_lock(&sim.lock);
    sim.aborts = aborts != 0;
    pthread_mutex_unlock(&sim.lock);
}

bool sim_lacks(const char *what) {
    const char *lacking = getenv("VMM_SIM_LACKS");
    return lacking && strcmp(lacking, what) == 0;
}

/* ---- the environment, the end ------------------------------------------------------------- */
static unsigned long long number(const char *name, unsigned long long otherwise) {
    const char *text = getenv(name);
    if (!text || !*text)
        return otherwise;
    char *end;
    unsigned long long value = strtoull(text, &end, 0);
    if (*end) {
        fprintf(stderr, "vmm-sim: %s=%s is not a number\n", name, text);
        abort();
    }
    return value;
}

static void read_rules(const char *text) {
    char *copy = strdup(text ? text : ""), *rest = NULL;
    for (char *item = strtok_r(copy, ",", &rest); item; item = strtok_r(NULL, ",", &rest)) {
        char name[64];
        long nth;
        int code, times = 1;
        if (sscanf(item, " %63[^:]:%ld:%d:%d", name, &nth, &code, &times) < 3 ||
            add_rule(name, nth, code, times) != 0) {
            fprintf(stderr, "vmm-sim: VMM_SIM_FAIL: cannot use \"%s\"\n", item);
            abort();
        }
    }
    free(copy);
}

__attribute__((constructor)) static void begin(void) {
    const char *strict = getenv("VMM_SIM_STRICT"), *delay = getenv("VMM_SIM_DELAY_US");
    sim.aborts = !strict || strcmp(strict, "return") != 0;
    sim.n_devices = (int)number("VMM_SIM_DEVICES", 1);
    sim.memory = number("VMM_SIM_MEMORY", 4ull << 30);
    sim.granularity = number("VMM_SIM_GRANULARITY", 2u << 20);
    sim.driver_version =
        (int)number("VMM_SIM_DRIVER_VERSION", (unsigned long long)sim_vendor_here.driver_version);
    sim.delay_us = delay && *delay ? (long)number("VMM_SIM_DELAY_US", 0) : -1;
    sim.observe = number("VMM_SIM_OBSERVE", 1) != 0;
    sim.races = number("VMM_SIM_RACES", 1) != 0;
    sim.junk = number("VMM_SIM_JUNK", 1) != 0;
    sim.check_exit = number("VMM_SIM_CHECK_EXIT", 0) != 0;
    random_state = number("VMM_SIM_SEED", 1) * 0x9E3779B97F4A7C15ull | 1;
    if (sim.n_devices < 0 || sim.n_devices > SIM_MAX_DEVICES || sim.granularity < 4096 ||
        (sim.granularity & (sim.granularity - 1))) {
        fprintf(stderr, "vmm-sim: VMM_SIM_DEVICES or VMM_SIM_GRANULARITY cannot be used\n");
        abort();
    }
    read_rules(getenv("VMM_SIM_FAIL"));
}

__attribute__((destructor)) static void end(void) {
    if (!sim.check_exit || sim.process != getpid())
        return;
    long handles, mappings, reservations;
    vmm_sim_live(&handles, &mappings, &reservations, NULL);
    if (!handles && !mappings && !reservations)
        return;
    fprintf(stderr, "vmm-sim: exit: %ld handles, %ld mappings, %ld reservations are left\n",
            handles, mappings, reservations);
    pthread_mutex_lock(&sim.lock);
    sim_list_handles();
    const sim_space *space;
    for (size_t i = 0; (space = sim_space_at(i)); i++)
        if (space->kind == SIM_SPACE_VMM)
            fprintf(stderr, "vmm-sim: exit:   reservation 0x%zx of %zu bytes, %zu mappings\n",
                    (size_t)space->base, space->bytes, space->n_map);
    fflush(NULL);
    _exit(1);
}
