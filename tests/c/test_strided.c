/* Sources of any strides whose last dimension is dense: transposed, reversed, broadcast,
 * padded, misaligned; elements of 1 to 16 bytes; up to eight dimensions; from host memory
 * and, on a GPU, from device memory. */
#include "check.h"

#define N_ROUNDS 400

static size_t product(const int64_t *shape, int ndim) {
    size_t n = 1;

    for (int d = 0; d < ndim; d++)
        n *= (size_t)shape[d];
    return n;
}

/* A layout of an array in a buffer: strides by chance, the first element's offset, the bytes
 * in all. Dimensions lie in any order; some run backwards, some have padding, some repeat. */
typedef struct placement {
    int64_t strides[VMM_MAX_NDIM];
    size_t offset, bytes;
} placement;

static placement place(const int64_t *shape, int ndim, size_t itemsize, uint64_t *seed) {
    placement p = {.offset = 0};
    int order[VMM_MAX_NDIM];
    size_t extent = itemsize;

    for (int d = 0; d < ndim; d++)
        order[d] = d;
    for (int d = 0; d + 2 < ndim; d++) { /* all but the last change places */
        int other = d + (int)random_below(seed, (uint32_t)(ndim - 1 - d)), kept = order[d];
        order[d] = order[other];
        order[other] = kept;
    }
    for (int k = ndim - 1; k >= 0; k--) {
        int d = order[k];
        uint32_t kind = d == ndim - 1 ? 0 : random_below(seed, 8);

        if (kind == 1) {
            p.strides[d] = 0; /* broadcast */
            continue;
        }
        if (kind == 2)
            extent += itemsize * random_below(seed, 4); /* padding */
        p.strides[d] = (int64_t)extent;
        if (kind == 3) { /* reversed */
            p.strides[d] = -(int64_t)extent;
            p.offset += (size_t)(shape[d] ? shape[d] - 1 : 0) * extent;
        }
        extent *= (size_t)(shape[d] ? shape[d] : 1);
    }
    p.bytes = extent;
    return p;
}

static void run(const fixture *f, vmm_memory memory, uint64_t seed) {
    static const unsigned bits[] = {8, 16, 32, 64, 128};
    int64_t shape[VMM_MAX_NDIM], rows[VMM_MAX_NDIM], index[VMM_MAX_NDIM] = {0};
    int ndim = 1 + (int)random_below(&seed, VMM_MAX_NDIM);
    vmm_spec spec = {.ndim = ndim,
                     .shape = shape,
                     .axis = (int)random_below(&seed, (uint32_t)ndim),
                     .dtype = {0, (uint8_t)bits[random_below(&seed, 5)], 1},
                     .capacity = 64,
                     .layout = (vmm_layout)random_below(&seed, 3)};
    size_t itemsize = spec.dtype.bits / 8u, n_lanes, misaligned;
    vmm_tensor *tensor;

    for (int d = 0; d < ndim; d++)
        shape[d] = 1 + (int64_t)random_below(&seed, ndim > 5 ? 3 : 6);
    if (random_below(&seed, 4) == 0)
        shape[ndim - 1] *= 16; /* runs that take wide accesses */
    CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
    n_lanes = vmm_lane_count(tensor);
    if (f->is_gpu && n_lanes > 24) { /* a block for each lane is too much here */
        CHECK_OK(vmm_close(tensor));
        return;
    }
    for (int part = 0; part < 3; part++) {
        size_t length = vmm_length(tensor), n_rows = random_below(&seed, 9), n;
        rows_shape(tensor, n_rows, rows);
        placement p = place(rows, ndim, itemsize, &seed);
        /* Sources need no alignment but the element's; 16-byte elements get 8. */
        misaligned = random_below(&seed, 4) * (itemsize < 8 ? itemsize : 8);
        uint8_t *buffer = malloc(p.bytes + misaligned), *expected, *actual;
        vmm_array source = {.data = buffer + misaligned + p.offset,
                            .memory = memory,
                            .dtype = spec.dtype,
                            .ndim = ndim,
                            .shape = rows,
                            .strides = p.strides};
        void *on_device = NULL;

        CHECK(buffer);
        for (size_t i = 0; i < p.bytes + misaligned; i++)
            buffer[i] = (uint8_t)random_below(&seed, 256);
        if (memory == VMM_MEMORY_DEVICE) {
            on_device = device_alloc(f, p.bytes + misaligned);
            write_device(f, on_device, buffer, p.bytes + misaligned);
            source.data = (uint8_t *)on_device + misaligned + p.offset;
        }
        CHECK_OK(vmm_append(tensor, &source, NULL));
        CHECK_SIZE(vmm_length(tensor), length + n_rows);

        n = product(rows, ndim);
        expected = malloc(n * itemsize + 1);
        CHECK(expected);
        for (size_t k = 0; k < n; k++) {
            const uint8_t *element = buffer + misaligned + p.offset;
            for (int d = 0; d < ndim; d++)
                element += index[d] * p.strides[d];
            memcpy(expected + k * itemsize, element, itemsize);
            for (int d = ndim - 1; d >= 0 && ++index[d] == rows[d]; d--)
                index[d] = 0;
        }
        actual = read_rows(f, tensor, length, length + n_rows);
        if (memcmp(actual, expected, n * itemsize) != 0)
            FAIL("part %d of a tensor of %d dimensions, axis %d, layout %d, elements of %zu bytes, "
                 "source on %s: not what was appended",
                 part, ndim, spec.axis, (int)spec.layout, itemsize,
                 memory == VMM_MEMORY_DEVICE ? "the device" : "the host");
        if (on_device)
            device_free(f, on_device);
        free(actual);
        free(expected);
        free(buffer);
    }
    CHECK_OK(vmm_close(tensor));
}

/* What models make: K transposed from (batch, seq, heads, dim), appended to (batch, heads,
 * seq, dim) along axis 2, one and many rows. */
static void test_transposed(const fixture *f) {
    enum { BATCH = 2, HEADS = 3, DIM = 64, ROWS = 5 };
    int64_t shape[] = {BATCH, HEADS, 0, DIM}, rows[] = {BATCH, HEADS, ROWS, DIM};
    int64_t strides[] = {ROWS * HEADS * DIM * 2, DIM * 2, HEADS * DIM * 2, 2};
    static uint16_t source_data[BATCH][ROWS][HEADS][DIM];
    vmm_array source = {
        .data = source_data, .dtype = VMM_BFLOAT16, .ndim = 4, .shape = rows, .strides = strides};

    for (size_t i = 0; i < sizeof source_data / 2; i++)
        ((uint16_t *)source_data)[i] = (uint16_t)(i * 40503u);
    for (int layout = VMM_LAYOUT_SEQ; layout <= VMM_LAYOUT_C; layout++) {
        vmm_spec spec = {.ndim = 4,
                         .shape = shape,
                         .axis = 2,
                         .dtype = VMM_BFLOAT16,
                         .capacity = 100,
                         .layout = (vmm_layout)layout};
        vmm_tensor *tensor;
        CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
        CHECK_OK(vmm_append(tensor, &source, NULL));
        CHECK_OK(vmm_append(tensor, &source, NULL));
        uint16_t *actual = (uint16_t *)read_rows(f, tensor, 0, 2 * ROWS);
        size_t k = 0;
        for (int b = 0; b < BATCH; b++)
            for (int h = 0; h < HEADS; h++)
                for (int r = 0; r < 2 * ROWS; r++)
                    for (int d = 0; d < DIM; d++)
                        CHECK(actual[k++] == source_data[b][r % ROWS][h][d]);
        free(actual);
        CHECK_OK(vmm_close(tensor));
    }
}

/* Dimensions of size 1 may have any stride, also the last, which is dense all the same. */
static void test_single_strides(const fixture *f) {
    int64_t shape[] = {1, 0, 1}, rows[] = {1, 3, 1}, strides[] = {-77, 4, 12345};
    float data[] = {1, 2, 3};
    vmm_array source = {
        .data = data, .dtype = VMM_FLOAT32, .ndim = 3, .shape = rows, .strides = strides};
    vmm_spec spec = {.ndim = 3, .shape = shape, .axis = 1, .dtype = VMM_FLOAT32, .capacity = 8};
    vmm_tensor *tensor;

    CHECK_OK(vmm_reserve(f->pool, &spec, &tensor));
    CHECK_OK(vmm_append(tensor, &source, NULL));
    float *actual = (float *)read_rows(f, tensor, 0, 3);
    CHECK(memcmp(actual, data, sizeof data) == 0);
    free(actual);
    CHECK_OK(vmm_close(tensor));
}

/* Sources none of whose dimensions can be copied as one with its neighbour: such copies take the
 * wide form of a job, of which a launch holds fewer. Many at once. */
static void test_many_apart(const fixture *f) {
    enum { N = 20, ROWS = 3, DIM = 8 };
    static const int64_t shape[] = {2, 2, 0, 2, 2, DIM}, rows[] = {2, 2, ROWS, 2, 2, DIM};
    vmm_spec spec = {.ndim = 6, .shape = shape, .axis = 2, .dtype = VMM_UINT8, .capacity = 50};
    int64_t strides[6], extent = 1;
    vmm_tensor *tensors[N];
    vmm_array sources[N];
    uint8_t *data[N];

    for (int d = 5; d >= 0; d--) {
        strides[d] = extent;
        extent = extent * rows[d] + DIM;
    }
    for (size_t i = 0; i < N; i++) {
        CHECK_OK(vmm_reserve(f->pool, &spec, &tensors[i]));
        CHECK(data[i] = malloc((size_t)extent));
        for (int64_t k = 0; k < extent; k++)
            data[i][k] = row_byte((uint32_t)i, (size_t)k);
        sources[i] = (vmm_array){
            .data = data[i], .dtype = VMM_UINT8, .ndim = 6, .shape = rows, .strides = strides};
        if (f->is_gpu) {
            sources[i].data = device_alloc(f, (size_t)extent);
            sources[i].memory = VMM_MEMORY_DEVICE;
            write_device(f, (void *)(uintptr_t)sources[i].data, data[i], (size_t)extent);
        }
    }
    CHECK_OK(vmm_append_many(N, tensors, sources, NULL));
    for (size_t i = 0; i < N; i++) {
        uint8_t *actual = read_rows(f, tensors[i], 0, ROWS);
        for (size_t k = 0; k < product(rows, 6); k++) {
            size_t rest = k, at = 0;
            for (int d = 5; d >= 0; d--) {
                at += rest % (size_t)rows[d] * (size_t)strides[d];
                rest /= (size_t)rows[d];
            }
            CHECK(actual[k] == data[i][at]);
        }
        free(actual);
        if (f->is_gpu)
            device_free(f, (void *)(uintptr_t)sources[i].data);
        free(data[i]);
        CHECK_OK(vmm_close(tensors[i]));
    }
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    test_transposed(&f);
    test_many_apart(&f);
    test_single_strides(&f);
    for (uint64_t round = 0; round < N_ROUNDS; round++)
        run(&f, f.is_gpu && round % 2 ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST, round);
    fixture_close(&f);
    return 0;
}
