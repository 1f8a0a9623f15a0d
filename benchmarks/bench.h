/* bench.h - what the C benchmarks share: arguments, timing, percentiles, a table, JSON.
 *
 * A benchmark is a program: bench_x [DEVICE] [--out FOLDER]. It prints a table and writes
 * FOLDER/bench_x-c-MACHINE.json (by default into benchmarks/results, where that exists). Its
 * Python twin, bench_x.py, uses the same ids, so that compare.py can put them side by side.
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

#define BENCH_MAX_ROWS 64
#define BENCH_MAX_SAMPLES 20000

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
    double p50_ns, p99_ns;
    size_t n;
} bench_row;

typedef struct bench {
    const char *name;         /* "bench_append" */
    const char *not_measured; /* a sentence */
    const char *out;          /* folder, or NULL */
    vmm_device *device;
    vmm_device_info info;
    bool is_cuda;
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
             b->is_cuda ? b->info.description : "", b->is_cuda ? ", " : "", cpu,
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
        else if (argv[i][0] != '-')
            device = argv[i];
        else {
            fprintf(stderr, "usage: %s [host | cuda:N] [--out FOLDER]\n", name);
            exit(2);
        }
    }
    vmm_status status = vmm_device_open(device, &b->device);
    if (status == VMM_ERR_NO_DRIVER || status == VMM_ERR_NO_DEVICE)
        BENCH_SKIP("%s", vmm_last_error()->message);
    BENCH_OK(status);
    BENCH_OK(vmm_device_query(b->device, &b->info));
    b->is_cuda = b->info.kind == VMM_DEVICE_CUDA;
    bench_describe_machine(b);
    printf("%s, libvmm %d.%d.%d on %s: %s\n", name, VMM_VERSION_MAJOR, VMM_VERSION_MINOR,
           VMM_VERSION_PATCH, b->info.name, b->machine);
    printf("%-36s %12s %12s %9s  %s\n", "", "p50", "p99", "samples", "times less than");
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
    va_list arguments;
    char p50[32], p99[32];

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
    b->n_samples = 0;
    bench_format_ns(row->p50_ns, p50);
    bench_format_ns(row->p99_ns, p99);
    printf("%-36s %12s %12s %9zu", row->id, p50, p99, row->n);
    const bench_row *base = bench_find(b, baseline);
    if (base && row->p50_ns > 0)
        printf("  %.4g x %s", base->p50_ns / row->p50_ns, baseline);
    printf("\n");
    fflush(stdout);
    return row->p50_ns;
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
                "    {\"id\": \"%s\", \"baseline\": \"%s\", \"p50_ns\": %.1f, \"p99_ns\": %.1f, "
                "\"n\": %zu}%s\n",
                row->id, row->baseline, row->p50_ns, row->p99_ns, row->n,
                i + 1 < b->n_rows ? "," : "");
    }
    fprintf(file, "  ]\n}\n");
    fclose(file);
    printf("written: %s\n", path);
}

#endif /* BENCH_H */
