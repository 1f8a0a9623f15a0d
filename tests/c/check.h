/* check.h - what the C tests share. Each test is a program: exit status 0 is a pass, 77 a
 * skip whose last line says why, anything else a failure.
 *
 *   CHECK, CHECK_OK, CHECK_STATUS   end the program with file and line
 *   struct fixture                  a device and a pool, from argv[1]
 *   cuda()                          the GPU driver that libvmm uses, called directly
 *   model_*                         what a tensor must hold, row by row
 *   in_child()                      a test in a process of its own
 */
#ifndef CHECK_H
#define CHECK_H

#define _GNU_SOURCE

#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <vmm.h>

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define GIB ((size_t)1 << 30)
#define LENGTH_OF(array) (sizeof(array) / sizeof(array)[0])

/* Limits on memory mean nothing under a sanitizer, which needs much itself, and under valgrind,
 * which does not enforce them. */
static inline bool has_memory_limits(void) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return false;
#else
    const char *preloaded = getenv("LD_PRELOAD");
    return !preloaded || !strstr(preloaded, "vgpreload");
#endif
}

#define FAIL(...)                                                                                  \
    do {                                                                                           \
        printf("%s:%d: ", __FILE__, __LINE__);                                                     \
        printf(__VA_ARGS__);                                                                       \
        printf("\n");                                                                              \
        exit(1);                                                                                   \
    } while (0)

#define SKIP(...)                                                                                  \
    do {                                                                                           \
        printf(__VA_ARGS__);                                                                       \
        printf("\n");                                                                              \
        exit(77);                                                                                  \
    } while (0)

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            FAIL("not so: %s", #condition);                                                        \
    } while (0)

/* Two sizes that must be equal, both shown when they are not. */
#define CHECK_SIZE(actual, expected)                                                               \
    do {                                                                                           \
        size_t actual_ = (actual), expected_ = (expected);                                         \
        if (actual_ != expected_)                                                                  \
            FAIL("%s is %zu, not %s = %zu", #actual, actual_, #expected, expected_);               \
    } while (0)

#define CHECK_STATUS(call, expected)                                                               \
    do {                                                                                           \
        vmm_status status_ = (call);                                                               \
        if (status_ != (expected))                                                                 \
            FAIL("%s\n  returned %s, not %s; the last error: %s", #call, vmm_status_name(status_), \
                 vmm_status_name(expected), vmm_last_error()->message);                            \
        if (status_ != VMM_OK && vmm_last_error()->status != status_)                              \
            FAIL("%s\n  returned %s, but vmm_last_error() has %s", #call,                          \
                 vmm_status_name(status_), vmm_status_name(vmm_last_error()->status));             \
    } while (0)

#define CHECK_OK(call) CHECK_STATUS(call, VMM_OK)

/* ---- the GPU's driver, for what libvmm does not do ----------------------------------- */

typedef unsigned long long cu_pointer;

/* X(name, CUDA's symbol, HIP's, parameters). HIP has pointers where CUDA has addresses, which
 * are passed in the same way, and a device's number where CUDA has a context: what only one of
 * them has is NULL in the other. */
#define CUDA_CALLS(X)                                                                              \
    X(init, "cuInit", "hipInit", (unsigned))                                                       \
    X(device_get, "cuDeviceGet", "hipDeviceGet", (int *, int))                                     \
    X(retain, "cuDevicePrimaryCtxRetain", NULL, (void **, int))                                    \
    X(set_current, "cuCtxSetCurrent", NULL, (void *))                                              \
    X(get_current, "cuCtxGetCurrent", NULL, (void **))                                             \
    X(set_device, NULL, "hipSetDevice", (int))                                                     \
    X(synchronize, "cuCtxSynchronize", "hipDeviceSynchronize", (void))                             \
    X(memory_info, "cuMemGetInfo_v2", "hipMemGetInfo", (size_t *, size_t *))                       \
    X(alloc, "cuMemAlloc_v2", "hipMalloc", (cu_pointer *, size_t))                                 \
    X(free, "cuMemFree_v2", "hipFree", (cu_pointer))                                               \
    X(to_host, "cuMemcpyDtoH_v2", "hipMemcpyDtoH", (void *, cu_pointer, size_t))                   \
    X(to_device, "cuMemcpyHtoD_v2", "hipMemcpyHtoD", (cu_pointer, const void *, size_t))           \
    X(to_host_async, "cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync",                                 \
      (void *, cu_pointer, size_t, void *))                                                        \
    X(to_device_async, "cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync",                               \
      (cu_pointer, const void *, size_t, void *))                                                  \
    X(host_alloc, "cuMemHostAlloc", "hipHostMalloc", (void **, size_t, unsigned))                  \
    X(host_free, "cuMemFreeHost", "hipHostFree", (void *))                                         \
    X(stream_create, "cuStreamCreate", "hipStreamCreateWithFlags", (void **, unsigned))            \
    X(stream_destroy, "cuStreamDestroy_v2", "hipStreamDestroy", (void *))                          \
    X(stream_synchronize, "cuStreamSynchronize", "hipStreamSynchronize", (void *))                 \
    X(host_function, "cuLaunchHostFunc", "hipLaunchHostFunc", (void *, void (*)(void *), void *))  \
    X(begin_capture, "cuStreamBeginCapture_v2", "hipStreamBeginCapture", (void *, int))            \
    X(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode",                                  \
      "hipThreadExchangeStreamCaptureMode", (int *))                                               \
    X(end_capture, "cuStreamEndCapture", "hipStreamEndCapture", (void *, void **))                 \
    X(instantiate, "cuGraphInstantiateWithFlags", "hipGraphInstantiateWithFlags",                  \
      (void **, void *, unsigned long long))                                                       \
    X(graph_launch, "cuGraphLaunch", "hipGraphLaunch", (void *, void *))                           \
    X(graph_destroy, "cuGraphDestroy", "hipGraphDestroy", (void *))                                \
    X(graph_exec_destroy, "cuGraphExecDestroy", "hipGraphExecDestroy", (void *))

typedef struct cuda_api {
#define CUDA_FIELD(name, symbol, hip_symbol, parameters) int(*name) parameters;
    CUDA_CALLS(CUDA_FIELD)
#undef CUDA_FIELD
} cuda_api;

#define CUDA_STREAM_NON_BLOCKING 1
#define CUDA_CAPTURE_GLOBAL 0
#define CUDA_CAPTURE_THREAD_LOCAL 1

#define CHECK_CUDA(call)                                                                           \
    do {                                                                                           \
        int code_ = (call);                                                                        \
        if (code_)                                                                                 \
            FAIL("%s returned %d", #call, code_);                                                  \
    } while (0)

/* Whether the test's GPU is AMD's; fixture_open() finds out. One for all files of a program. */
__attribute__((weak)) bool is_hip;

static inline void *cuda_library(void) {
    static void *library;

    if (!library) {
        const char *path = getenv(is_hip ? "VMM_HIP_LIBRARY" : "VMM_CUDA_LIBRARY");
        if (!path || !*path)
            path = is_hip ? "libamdhip64.so" : "libcuda.so.1";
        library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!library)
            SKIP("%s", dlerror());
    }
    return library;
}

/* The driver, with device 0 current on the calling thread. To be called once before other
 * threads do. */
static inline const cuda_api *cuda(void) {
    static cuda_api api;
    static bool is_loaded;
    static void *context;
    static _Thread_local bool is_current;

    if (!is_loaded) {
#define CUDA_LOAD(name, cuda_symbol, hip_symbol, parameters)                                       \
    {                                                                                              \
        const char *symbol = is_hip ? hip_symbol : cuda_symbol;                                    \
        if (symbol && !(*(void **)&api.name = dlsym(cuda_library(), symbol)))                      \
            FAIL("the driver has no %s", symbol);                                                  \
    }
        CUDA_CALLS(CUDA_LOAD)
#undef CUDA_LOAD
        int device;
        CHECK_CUDA(api.init(0));
        CHECK_CUDA(api.device_get(&device, 0));
        if (!is_hip)
            CHECK_CUDA(api.retain(&context, device));
        is_loaded = true;
    }
    if (!is_current && !is_hip) {
        CHECK_CUDA(api.set_current(context));
        is_current = true;
    }
    return &api;
}

/* ---- a device and a pool ------------------------------------------------------------ */

typedef struct fixture {
    const char *name; /* "host", "cuda:0", "hip:0" */
    bool is_gpu;      /* a GPU, AMD's included */
    vmm_device *device;
    vmm_pool *pool;
    size_t granularity_bytes;
} fixture;

static inline fixture fixture_open(int argc, char **argv, size_t block_bytes, size_t max_bytes) {
    fixture f = {.name = argc > 1 ? argv[1] : "host"};
    vmm_device_info info;
    vmm_status status = vmm_device_open(f.name, &f.device);

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (status == VMM_ERR_NO_DRIVER || status == VMM_ERR_NO_DEVICE)
        SKIP("%s", vmm_last_error()->message);
    CHECK_OK(status);
    CHECK_OK(vmm_device_query(f.device, &info));
    f.is_gpu = info.kind != VMM_DEVICE_HOST;
    if (f.is_gpu) /* the host, opened beside it, changes nothing */
        is_hip = info.kind == VMM_DEVICE_HIP;
    f.granularity_bytes = info.granularity_bytes;
    CHECK_OK(vmm_pool_create(f.device, block_bytes, max_bytes, &f.pool));
    return f;
}

/* Closes both, and finds what the test has leaked. */
static inline void fixture_close(fixture *f) {
    vmm_pool_stats stats;

    CHECK_OK(vmm_pool_trim(f->pool, 1));
    CHECK_OK(vmm_pool_statistics(f->pool, &stats));
    CHECK_SIZE(stats.in_use_bytes, 0);
    CHECK_SIZE(stats.free_bytes, 0);
    CHECK_SIZE(stats.queued_bytes, 0);
    CHECK_SIZE(stats.parked_bytes, 0);
    CHECK_OK(vmm_pool_close(f->pool));
    vmm_device_close(f->device);
}

/* Driver calls by vmm_stats(): all of them, or one kind. */
static inline uint64_t total_calls(const vmm_tensor *tensor) {
    vmm_tensor_stats stats;
    uint64_t sum = 0;

    CHECK_OK(vmm_stats(tensor, &stats));
    for (int i = 0; i < VMM_CALL_COUNT; i++)
        sum += stats.driver_calls[i];
    return sum;
}

static inline uint64_t pool_calls(vmm_pool *pool) {
    vmm_pool_stats stats;
    uint64_t sum = 0;

    CHECK_OK(vmm_pool_statistics(pool, &stats));
    for (int i = 0; i < VMM_CALL_COUNT; i++)
        sum += stats.driver_calls[i];
    return sum;
}

static inline vmm_pool_stats pool_stats(vmm_pool *pool) {
    vmm_pool_stats stats;

    CHECK_OK(vmm_pool_statistics(pool, &stats));
    return stats;
}

static inline size_t held_bytes(vmm_pool *pool) {
    vmm_pool_stats stats = pool_stats(pool);

    return stats.in_use_bytes + stats.free_bytes + stats.queued_bytes + stats.lookahead_bytes +
           stats.recycled_bytes + stats.parked_bytes;
}

/* Copy from a device's memory once all that was submitted to it is done. */
static inline void read_device(const fixture *f, void *dst, uintptr_t src, size_t bytes) {
    if (f->is_gpu)
        CHECK_CUDA(cuda()->to_host(dst, src, bytes));
    else
        memcpy(dst, (const void *)src, bytes);
}

static inline void synchronize(const fixture *f) {
    if (f->is_gpu)
        CHECK_CUDA(cuda()->synchronize());
}

/* The driver may take its time to let go of what a graph kept. */
static inline void wait_for_unpinned(vmm_tensor *tensor) {
    struct timespec pause = {0, 1000000};

    for (int i = 0; i < 5000 && vmm_pin_count(tensor); i++)
        nanosleep(&pause, NULL);
    CHECK_SIZE(vmm_pin_count(tensor), 0);
}

/* Memory of the device, for sources. */
static inline void *device_alloc(const fixture *f, size_t bytes) {
    if (f->is_gpu) {
        cu_pointer pointer;
        CHECK_CUDA(cuda()->alloc(&pointer, bytes ? bytes : 1));
        return (void *)(uintptr_t)pointer;
    }
    void *pointer = malloc(bytes ? bytes : 1);
    CHECK(pointer);
    return pointer;
}

static inline void device_free(const fixture *f, void *pointer) {
    if (f->is_gpu)
        CHECK_CUDA(cuda()->free((uintptr_t)pointer));
    else
        free(pointer);
}

static inline void write_device(const fixture *f, void *dst, const void *src, size_t bytes) {
    if (f->is_gpu)
        CHECK_CUDA(cuda()->to_device((uintptr_t)dst, src, bytes));
    else
        memcpy(dst, src, bytes);
}

/* How many driver calls there were, whatever libvmm's own count says: by the simulated
 * driver, which sees them all. 0 elsewhere. */
static inline long simulated_calls(const fixture *f) {
    long (*calls)(const char *) = NULL;

    if (f->is_gpu)
        *(void **)&calls = dlsym(cuda_library(), "vmm_sim_calls");
    return calls ? calls("*") : 0;
}

/* End a capture: the graph of it, to be launched; or nothing. */
static inline void *end_capture(void *stream) {
    void *graph, *exec;

    CHECK_CUDA(cuda()->end_capture(stream, &graph));
    CHECK_CUDA(cuda()->instantiate(&exec, graph, 0));
    CHECK_CUDA(cuda()->graph_destroy(graph));
    return exec;
}

static inline void drop_capture(void *stream) {
    void *graph;

    CHECK_CUDA(cuda()->end_capture(stream, &graph));
    CHECK_CUDA(cuda()->graph_destroy(graph));
}

/* ---- what a tensor must hold -------------------------------------------------------- */

/* Every row that is written gets a number of its own; its bytes follow from the number. */
static inline uint8_t row_byte(uint32_t number, size_t i) {
    uint32_t x = number * 2654435761u + (uint32_t)i * 2246822519u;

    x ^= x >> 15;
    return (uint8_t)(x * 2654435761u >> 24);
}

typedef struct model {
    const fixture *fixture;
    vmm_tensor *tensor;
    uint32_t *numbers; /* of the rows in use; 0: undefined bytes */
    size_t length;
    void *base;
} model;

static uint32_t last_number;

static inline model model_open(const fixture *f, const vmm_spec *spec) {
    model m = {.fixture = f, .numbers = calloc(spec->capacity, sizeof(uint32_t))};

    CHECK(m.numbers);
    CHECK_OK(vmm_reserve(f->pool, spec, &m.tensor));
    m.base = vmm_base(m.tensor);
    return m;
}

static inline void model_close(model *m) {
    CHECK_OK(vmm_close(m->tensor));
    free(m->numbers);
    memset(m, 0, sizeof *m);
}

/* Bytes of one row before the axis has its turn: a row is `*pre` pieces of `*post` bytes. */
static inline void row_pieces(const vmm_tensor *tensor, size_t *pre, size_t *post) {
    *pre = 1;
    for (int d = 0; d < vmm_axis(tensor); d++)
        *pre *= (size_t)vmm_row_shape(tensor)[d];
    *post = vmm_row_bytes(tensor) / *pre;
}

/* A dense source of `n_rows` new rows, in host memory that is the caller's to free. */
static inline uint8_t *make_rows(const vmm_tensor *tensor, uint32_t first_number, size_t n_rows) {
    size_t pre, post, row_bytes = vmm_row_bytes(tensor);
    uint8_t *data = malloc(n_rows * row_bytes + 1);

    CHECK(data);
    row_pieces(tensor, &pre, &post);
    for (size_t p = 0; p < pre; p++)
        for (size_t r = 0; r < n_rows; r++)
            for (size_t i = 0; i < post; i++)
                data[(p * n_rows + r) * post + i] =
                    row_byte(first_number + (uint32_t)r, p * post + i);
    return data;
}

/* Shape of `n_rows` rows of a tensor, for a vmm_array. */
static inline void rows_shape(const vmm_tensor *tensor, size_t n_rows,
                              int64_t shape[VMM_MAX_NDIM]) {
    memcpy(shape, vmm_row_shape(tensor), sizeof(int64_t) * (size_t)vmm_ndim(tensor));
    shape[vmm_axis(tensor)] = (int64_t)n_rows;
}

/* Note that `n_rows` rows with numbers from `first_number` on are now in use. */
static inline void model_extend(model *m, uint32_t first_number, size_t n_rows) {
    for (size_t r = 0; r < n_rows; r++)
        m->numbers[m->length + r] = first_number + (uint32_t)r;
    m->length += n_rows;
}

/* Append rows from host memory, or on CUDA from device memory. */
static inline void model_append(model *m, vmm_dtype dtype, size_t n_rows, vmm_memory memory,
                                vmm_stream stream) {
    int64_t shape[VMM_MAX_NDIM];
    uint32_t first = last_number + 1;
    uint8_t *host = make_rows(m->tensor, first, n_rows);
    vmm_array source = {.data = host,
                        .memory = memory,
                        .dtype = dtype,
                        .ndim = vmm_ndim(m->tensor),
                        .shape = shape};

    rows_shape(m->tensor, n_rows, shape);
    last_number += (uint32_t)n_rows;
    if (memory == VMM_MEMORY_DEVICE) {
        size_t bytes = n_rows * vmm_row_bytes(m->tensor);
        source.data = device_alloc(m->fixture, bytes);
        write_device(m->fixture, (void *)(uintptr_t)source.data, host, bytes);
    }
    CHECK_OK(vmm_append(m->tensor, &source, stream));
    if (memory == VMM_MEMORY_DEVICE) {
        synchronize(m->fixture);
        device_free(m->fixture, (void *)(uintptr_t)source.data);
    }
    memset(host, 0xee, n_rows * vmm_row_bytes(m->tensor)); /* it has been read, on return */
    free(host);
    model_extend(m, first, n_rows);
}

/* Copy rows [begin, end) out of the tensor or into it; `rows` is dense in C order. Goes by
 * the tensor's strides, with one copy for each lane. */
static inline void copy_rows(const fixture *f, const vmm_tensor *tensor, size_t begin, size_t end,
                             uint8_t *rows, bool into) {
    size_t lanes = vmm_lane_count(tensor), lane_row = vmm_row_bytes(tensor) / lanes;
    size_t n_rows = end - begin, lane_size = n_rows * lane_row, n = 1, piece;
    uintptr_t base = (uintptr_t)vmm_base(tensor) + begin * lane_row;
    uint8_t *lane_data = malloc(lanes * lane_size + 1);
    int ndim = vmm_ndim(tensor);
    int64_t shape[VMM_MAX_NDIM], index[VMM_MAX_NDIM] = {0};

    CHECK(lane_data);
    synchronize(f);
    for (size_t lane = 0; lane < lanes && n_rows && !into; lane++)
        read_device(f, lane_data + lane * lane_size, base + lane * vmm_lane_bytes(tensor),
                    lane_size);
    rows_shape(tensor, n_rows, shape);
    for (int d = 0; d < ndim; d++)
        n *= (size_t)shape[d];
    piece = n ? n_rows * vmm_row_bytes(tensor) / n : 0;
    if (vmm_strides(tensor)[ndim - 1] == (int64_t)piece && n) { /* whole inner runs */
        ndim--;
        n /= (size_t)shape[ndim];
        piece *= (size_t)shape[ndim];
    }
    for (size_t k = 0; k < n; k++) {
        size_t offset = 0, lane;
        for (int d = 0; d < ndim; d++)
            offset += (size_t)index[d] * (size_t)vmm_strides(tensor)[d];
        lane = offset / vmm_lane_bytes(tensor);
        offset -= lane * (vmm_lane_bytes(tensor) - lane_size);
        if (into)
            memcpy(lane_data + offset, rows + k * piece, piece);
        else
            memcpy(rows + k * piece, lane_data + offset, piece);
        for (int d = ndim - 1; d >= 0 && ++index[d] == shape[d]; d--)
            index[d] = 0;
    }
    for (size_t lane = 0; lane < lanes && n_rows && into; lane++)
        write_device(f, (void *)(base + lane * vmm_lane_bytes(tensor)),
                     lane_data + lane * lane_size, lane_size);
    free(lane_data);
}

/* Rows [begin, end) in C order, to be freed. */
static inline uint8_t *read_rows(const fixture *f, const vmm_tensor *tensor, size_t begin,
                                 size_t end) {
    uint8_t *rows = malloc((end - begin) * vmm_row_bytes(tensor) + 1);

    CHECK(rows);
    copy_rows(f, tensor, begin, end, rows, false);
    return rows;
}

/* Take rows into use and, if `fill`, write them as a kernel of the caller's would. */
static inline void model_grow(model *m, size_t n_rows, bool fill) {
    size_t lane_row = vmm_row_bytes(m->tensor) / vmm_lane_count(m->tensor);
    void *out = NULL;

    CHECK_OK(vmm_grow(m->tensor, n_rows, &out));
    CHECK((uint8_t *)out == (uint8_t *)m->base + m->length * lane_row);
    if (fill) {
        uint8_t *rows = make_rows(m->tensor, last_number + 1, n_rows);
        copy_rows(m->fixture, m->tensor, m->length, m->length + n_rows, rows, true);
        free(rows);
        model_extend(m, last_number + 1, n_rows);
        last_number += (uint32_t)n_rows;
    } else {
        memset(m->numbers + m->length, 0, n_rows * sizeof(uint32_t));
        m->length += n_rows;
    }
}

/* What must hold after every call: invariants 1 and 2, and the books. */
static inline void model_check_books(const model *m) {
    const vmm_tensor *t = m->tensor;
    vmm_tensor_stats stats;

    CHECK(vmm_base(t) == m->base);
    CHECK_SIZE(vmm_length(t), m->length);
    CHECK(vmm_length(t) <= vmm_mapped(t) && vmm_mapped(t) <= vmm_capacity(t));
    CHECK_OK(vmm_stats(t, &stats));
    CHECK_SIZE(stats.used_bytes, m->length * vmm_row_bytes(t));
    CHECK_SIZE(stats.slack_bytes, stats.mapped_bytes - stats.used_bytes);
    CHECK(stats.mapped_bytes >= vmm_mapped(t) * vmm_row_bytes(t));
    CHECK(stats.reserved_bytes >= vmm_capacity(t) * vmm_row_bytes(t));
    CHECK_SIZE(stats.reserved_bytes, vmm_lane_count(t) * vmm_lane_bytes(t));
    CHECK(stats.mapped_bytes <= stats.reserved_bytes);
    CHECK(!stats.mapped_bytes == !stats.block_count);
}

/* Rows [begin, end) hold what was written. Number 0: undefined bytes, not looked at. */
static inline void model_check_rows(const model *m, size_t begin, size_t end) {
    size_t pre, post, n_rows = end - begin;
    uint8_t *rows = read_rows(m->fixture, m->tensor, begin, end);

    row_pieces(m->tensor, &pre, &post);
    for (size_t p = 0; p < pre; p++)
        for (size_t r = 0; r < n_rows; r++) {
            uint32_t number = m->numbers[begin + r];
            for (size_t i = 0; i < post && number; i++) {
                uint8_t actual = rows[(p * n_rows + r) * post + i];
                if (actual != row_byte(number, p * post + i))
                    FAIL("row %zu of %zu, byte %zu: %d, not %d", begin + r, m->length, p * post + i,
                         actual, row_byte(number, p * post + i));
            }
        }
    free(rows);
}

static inline void model_check(const model *m) {
    model_check_books(m);
    model_check_rows(m, 0, m->length);
}

/* ---- a process of its own, which has opened nothing yet ------------------------------- */

/* A driver is looked for once in a process. Returns what `test` does. */
static inline int in_child(int (*test)(void)) {
    int status;
    pid_t child = fork();

    CHECK(child >= 0);
    if (child == 0)
        exit(test()); /* by exit(), which writes down what was covered */
    CHECK(waitpid(child, &status, 0) == child);
    if (!WIFEXITED(status))
        FAIL("the child ended with status %#x", (unsigned)status);
    return WEXITSTATUS(status);
}

/* ---- numbers by chance, the same in every run ---------------------------------------- */

static inline uint32_t random_below(uint64_t *state, uint32_t n) {
    *state += 0x9e3779b97f4a7c15u;
    uint64_t z = *state;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z >> 33) % n);
}

#endif /* CHECK_H */
