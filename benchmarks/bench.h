/* bench.h - what the C benchmarks share: arguments, timing, percentiles, a table, JSON.
 *
 * A benchmark is a program: bench_x [DEVICE] [--out FOLDER] [--quick]. It prints a table and
 * writes FOLDER/bench_x-c-MACHINE.json (by default into benchmarks/results, where that exists).
 * Its Python twin, bench_x.py, uses the same ids, so that compare.py can put them side by side;
 * ids of baselines begin with "base/" and may differ, since each language has its own. --quick
 * goes through all of it with few samples: for the tests, its figures mean nothing.
 */
#ifndef BENCH_H
#define BENCH_H

#define _GNU_SOURCE
#include <ctype.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <vmm.h>

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define GIB ((size_t)1 << 30)

#define BENCH_MAX_ROWS 96
#define BENCH_MAX_SAMPLES 110000
#define BENCH_MAX_EXTRAS 16
#define BENCH_MANY 1000 /* from so many samples on a row has p99.9 and the maximum */

/* A skip: the benchmark cannot run here. */
#define BENCH_SKIP(...) (printf(__VA_ARGS__), printf("\n"), exit(0))
#define BENCH_OK(call)                                                                             \
    do {                                                                                           \
        if (call) {                                                                                \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call,                          \
                    vmm_last_error()->message);                                                    \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

typedef struct bench_row {
    char id[64];
    char baseline[64]; /* the id that this one is a multiple of; "" for none */
    double p50_ns, p99_ns, p999_ns, max_ns;
    size_t n;
    struct {
        const char *name; /* with its unit: "slack_bytes" */
        double value;
    } extra[BENCH_MAX_EXTRAS];
    size_t n_extra;
} bench_row;

typedef struct bench {
    const char *name;         /* "bench_append" */
    const char *not_measured; /* a sentence */
    const char *out;          /* folder, or NULL */
    vmm_device *device;
    vmm_device_info info;
    bool is_cuda, is_gpu;
    bool quick;
    char machine[256];
    bench_row rows[BENCH_MAX_ROWS];
    size_t n_rows;
    double samples[BENCH_MAX_SAMPLES]; /* of the row being measured */
    size_t n_samples;
    double began_ns;
} bench;

static inline double bench_now(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static inline void bench_describe_machine(bench *b) {
    char line[256], cpu[128] = "CPU";
    FILE *file = fopen("/proc/cpuinfo", "r");

    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':')) {
            snprintf(cpu, sizeof cpu, "%s", strchr(line, ':') + 2);
            cpu[strcspn(cpu, "\n")] = '\0';
            break;
        }
    if (file)
        fclose(file);
    snprintf(b->machine, sizeof b->machine, "%s%s%s, %ld cores",
             b->is_gpu ? b->info.description : "", b->is_gpu ? ", " : "", cpu,
             sysconf(_SC_NPROCESSORS_ONLN));
}

static inline void bench_open(bench *b, const char *name, int argc, char **argv) {
    const char *device = "host";
    struct stat folder;

    b->name = name;
    b->out = stat("benchmarks/results", &folder) == 0 ? "benchmarks/results" : NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--out") == 0 && i + 1 < argc)
            b->out = argv[++i];
        else if (strcmp(argv[i], "--quick") == 0)
            b->quick = true;
        else if (argv[i][0] != '-')
            device = argv[i];
        else {
            fprintf(stderr, "usage: %s [host | cuda:N | hip:N] [--out FOLDER] [--quick]\n", name);
            exit(2);
        }
    }
    if (b->out)
        mkdir(b->out, 0777); /* what keeps it from being there, opening a file in it tells */
    vmm_status status = vmm_device_open(device, &b->device);
    if (status == VMM_ERR_NO_DRIVER || status == VMM_ERR_NO_DEVICE)
        BENCH_SKIP("%s", vmm_last_error()->message);
    BENCH_OK(status);
    BENCH_OK(vmm_device_query(b->device, &b->info));
    b->is_cuda = b->info.kind == VMM_DEVICE_CUDA;
    b->is_gpu = b->info.kind != VMM_DEVICE_HOST;
    bench_describe_machine(b);
    printf("%s, libvmm %d.%d.%d on %s: %s\n", name, VMM_VERSION_MAJOR, VMM_VERSION_MINOR,
           VMM_VERSION_PATCH, b->info.name, b->machine);
    printf("%-36s %10s %10s %10s %10s %8s  %s\n", "", "p50", "p99", "p99.9", "max", "samples",
           "times less than");
}

/* `times`, or a few of them where only the way through counts. */
static inline int bench_times(const bench *b, int times) {
    return !b->quick ? times : times > 100 ? times / 50 : times > 2 ? 2 : times;
}

static inline void bench_sample(bench *b, double ns) {
    if (b->n_samples < BENCH_MAX_SAMPLES)
        b->samples[b->n_samples++] = ns;
}

/* Bracket what is timed; `n` operations make one sample. */
static inline void bench_start(bench *b) {
    b->began_ns = bench_now();
}

static inline void bench_stop(bench *b, size_t n) {
    bench_sample(b, (bench_now() - b->began_ns) / (double)n);
}

static int bench_compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static inline void bench_format_ns(double ns, char out[32]) {
    if (ns < 1e3)
        snprintf(out, 32, "%.1f ns", ns);
    else if (ns < 1e6)
        snprintf(out, 32, "%.2f us", ns / 1e3);
    else
        snprintf(out, 32, "%.2f ms", ns / 1e6);
}

static inline const bench_row *bench_find(const bench *b, const char *id) {
    for (size_t i = 0; i < b->n_rows; i++)
        if (strcmp(b->rows[i].id, id) == 0)
            return &b->rows[i];
    return NULL;
}

/* End a row: its samples so far, under `id`. `baseline` is an earlier row's id, or "". */
static inline double bench_report(bench *b, const char *baseline, const char *format, ...) {
    bench_row *row = &b->rows[b->n_rows++];
    char text[4][32] = {"", "", "-", "-"};
    va_list arguments;

    if (b->n_rows > BENCH_MAX_ROWS || b->n_samples == 0)
        abort();
    va_start(arguments, format);
    vsnprintf(row->id, sizeof row->id, format, arguments);
    va_end(arguments);
    snprintf(row->baseline, sizeof row->baseline, "%s", baseline);
    qsort(b->samples, b->n_samples, sizeof(double), bench_compare);
    row->n = b->n_samples;
    row->p50_ns = b->samples[b->n_samples / 2];
    row->p99_ns = b->samples[(b->n_samples * 99 - 1) / 100];
    row->p999_ns = b->samples[(b->n_samples * 999 - 1) / 1000];
    row->max_ns = b->samples[b->n_samples - 1];
    b->n_samples = 0;
    bench_format_ns(row->p50_ns, text[0]);
    bench_format_ns(row->p99_ns, text[1]);
    if (row->n >= BENCH_MANY) {
        bench_format_ns(row->p999_ns, text[2]);
        bench_format_ns(row->max_ns, text[3]);
    }
    printf("%-36s %10s %10s %10s %10s %8zu", row->id, text[0], text[1], text[2], text[3], row->n);
    const bench_row *base = bench_find(b, baseline);
    if (base && row->p50_ns > 0)
        printf("  %.4g x %s", base->p50_ns / row->p50_ns, baseline);
    printf("\n");
    fflush(stdout);
    return row->p50_ns;
}

/* A count or a size that belongs to the row reported last. `name` lives on, and has its unit. */
static inline void bench_extra(bench *b, const char *name, double value) {
    bench_row *row = &b->rows[b->n_rows - 1];

    if (row->n_extra == BENCH_MAX_EXTRAS)
        abort();
    row->extra[row->n_extra].name = name;
    row->extra[row->n_extra++].value = value;
}

/* Bytes a second, of a row whose samples each moved `bytes`. */
static inline void bench_extra_rate(bench *b, size_t bytes) {
    bench_extra(b, "bytes", (double)bytes);
    bench_extra(b, "bytes_per_second", (double)bytes * 1e9 / b->rows[b->n_rows - 1].p50_ns);
}

/* ---- rows to append ------------------------------------------------------------------------- */

static inline char *bench_buffer(size_t bytes) {
    char *buffer = malloc(bytes);

    if (!buffer)
        abort();
    memset(buffer, 1, bytes);
    __asm__ volatile("" : : "r"(buffer) : "memory"); /* else a buffer that is only freed is none */
    return buffer;
}

/* One row of bytes where the device reads it best: on a GPU in a tensor of its own. */
typedef struct bench_source {
    int64_t shape[2];
    char *host;
    vmm_tensor *holder;
    vmm_array array;
} bench_source;

static inline void bench_source_open(bench *b, vmm_pool *pool, size_t row_bytes,
                                     bench_source *source) {
    *source = (bench_source){.shape = {1, (int64_t)row_bytes}, .host = bench_buffer(row_bytes)};
    source->array =
        (vmm_array){.data = source->host, .dtype = VMM_UINT8, .ndim = 2, .shape = source->shape};
    if (!b->is_gpu)
        return;
    vmm_spec spec = {.ndim = 2, .shape = source->shape, .dtype = VMM_UINT8, .capacity = 1};
    BENCH_OK(vmm_reserve(pool, &spec, &source->holder));
    BENCH_OK(vmm_append(source->holder, &source->array, NULL));
    source->array.data = vmm_base(source->holder);
    source->array.memory = VMM_MEMORY_DEVICE;
    source->array.device_index = b->info.index;
}

static inline void bench_source_close(bench_source *source) {
    if (source->holder)
        BENCH_OK(vmm_close(source->holder));
    free(source->host);
}

/* Wait for what has been submitted to `stream`. So many launches fit the queue of a GPU without
 * the caller waiting for room: */
#define BENCH_IN_FLIGHT 256

static inline void bench_wait(bench *b, vmm_stream stream) {
    vmm_event *event;
    int done = !b->is_gpu;

    if (done)
        return;
    BENCH_OK(vmm_event_record(b->device, stream, &event));
    while (!done)
        BENCH_OK(vmm_event_query(event, &done));
    vmm_event_close(event);
}

/* Calls that have to do with memory, of a tensor or a pool: none of them is a copy or a launch. */
static inline uint64_t bench_mapping_calls(const uint64_t calls[VMM_CALL_COUNT]) {
    return calls[VMM_CALL_create] + calls[VMM_CALL_map] + calls[VMM_CALL_set_access] +
           calls[VMM_CALL_unmap] + calls[VMM_CALL_release] + calls[VMM_CALL_reserve] +
           calls[VMM_CALL_free];
}

/* Every non-alphanumeric run to one dash: "AMD EPYC 7763" to "amd-epyc-7763". */
static inline void bench_slug(const char *text, char *out, size_t room) {
    size_t n = 0;

    for (; *text && *text != ',' && n + 1 < room; text++) {
        if (isalnum((unsigned char)*text))
            out[n++] = (char)tolower((unsigned char)*text);
        else if (n && out[n - 1] != '-')
            out[n++] = '-';
    }
    while (n && out[n - 1] == '-')
        n--;
    out[n] = '\0';
}

static inline void bench_close(bench *b) {
    char slug[128], path[512];
    FILE *file;

    vmm_device_close(b->device);
    printf("not measured: %s\n", b->not_measured);
    if (!b->out)
        return;
    bench_slug(b->machine, slug, sizeof slug);
    snprintf(path, sizeof path, "%s/%s-c-%s.json", b->out, b->name, slug);
    file = fopen(path, "w");
    if (!file) {
        perror(path);
        exit(1);
    }
    fprintf(file,
            "{\n  \"benchmark\": \"%s\",\n  \"language\": \"c\",\n  \"machine\": \"%s\",\n"
            "  \"device\": \"%s\",\n  \"version\": \"%d.%d.%d\",\n"
            "  \"not_measured\": \"%s\",\n  \"rows\": [\n",
            b->name, b->machine, b->info.name, VMM_VERSION_MAJOR, VMM_VERSION_MINOR,
            VMM_VERSION_PATCH, b->not_measured);
    for (size_t i = 0; i < b->n_rows; i++) {
        const bench_row *row = &b->rows[i];
        fprintf(file,
                "    {\"id\": \"%s\", \"baseline\": \"%s\", \"p50_ns\": %.1f, \"p99_ns\": %.1f, ",
                row->id, row->baseline, row->p50_ns, row->p99_ns);
        if (row->n >= BENCH_MANY)
            fprintf(file, "\"p999_ns\": %.1f, \"max_ns\": %.1f, ", row->p999_ns, row->max_ns);
        fprintf(file, "\"n\": %zu", row->n);
        for (size_t j = 0; j < row->n_extra; j++)
            fprintf(file, "%s\"%s\": %.15g", j ? ", " : ", \"extra\": {", row->extra[j].name,
                    row->extra[j].value);
        fprintf(file, "%s}%s\n", row->n_extra ? "}" : "", i + 1 < b->n_rows ? "," : "");
    }
    fprintf(file, "  ]\n}\n");
    fclose(file);
    printf("written: %s\n", path);
}

#endif /* BENCH_H */
