/* Random sequences of calls, in every layout, against a model in plain memory
 * (invariants 1, 2 and 4). */
#include "check.h"

typedef struct arrangement {
    int ndim;
    int64_t shape[VMM_MAX_NDIM];
    int axis;
    vmm_dtype dtype;
    size_t capacity;
    int block_granules; /* of the granularity; 0: auto */
} arrangement;

static const arrangement arrangements[] = {
    {1, {0}, 0, {2, 32, 1}, 700, 0},          {2, {0, 5}, 0, {0, 8, 1}, 900, 1},
    {2, {3, 0}, 1, {2, 64, 1}, 300, 0},       {3, {2, 0, 7}, 1, {2, 16, 1}, 500, 2},
    {4, {2, 0, 3, 8}, 1, {4, 16, 1}, 400, 0}, {4, {2, 3, 0, 8}, 2, {5, 128, 1}, 200, 0},
    {4, {1, 1, 0, 1}, 2, {6, 8, 1}, 1000, 3}, {5, {2, 1, 3, 2, 0}, 4, {0, 32, 1}, 150, 0},
};

/* Rows that are large enough for the mapping to matter, on a device with large blocks too. */
static const arrangement large = {3, {2, 0, 40 * 1024}, 1, {2, 32, 1}, 260, 0};

static void run(const fixture *f, const arrangement *a, vmm_layout layout, int n_steps,
                uint64_t seed) {
    vmm_spec spec = {.ndim = a->ndim,
                     .shape = a->shape,
                     .axis = a->axis,
                     .dtype = a->dtype,
                     .capacity = a->capacity,
                     .layout = layout,
                     .block_bytes = a->block_granules
                                        ? (size_t)a->block_granules * f->granularity_bytes
                                        : VMM_BLOCK_AUTO};
    model m = model_open(f, &spec);
    vmm_memory device = f->is_gpu ? VMM_MEMORY_DEVICE : VMM_MEMORY_HOST;

    CHECK(vmm_length(m.tensor) == 0 && vmm_mapped(m.tensor) == 0);
    CHECK_SIZE(vmm_capacity(m.tensor), a->capacity);
    model_check_books(&m);
    for (int step = 0; step < n_steps; step++) {
        size_t room = a->capacity - m.length, n;

        switch (random_below(&seed, 12)) {
        case 0:
        case 1:
        case 2:
        case 3:
            n = random_below(&seed, 4) ? random_below(&seed, 4) : random_below(&seed, 60);
            n = n < room ? n : room;
            model_append(&m, a->dtype, n, random_below(&seed, 2) ? device : VMM_MEMORY_HOST, NULL);
            break;
        case 4:
        case 5:
            n = random_below(&seed, 30);
            n = n < room ? n : room;
            model_grow(&m, n, random_below(&seed, 4) != 0);
            break;
        case 6:
            n = m.length - random_below(&seed, (uint32_t)(m.length < 20 ? m.length : 20) + 1);
            CHECK_OK(vmm_truncate(m.tensor, n, random_below(&seed, 2) ? NULL : VMM_STREAM_NONE));
            m.length = n;
            break;
        case 7:
            if (random_below(&seed, 4) == 0) {
                CHECK_OK(vmm_truncate(m.tensor, 0, VMM_STREAM_NONE));
                m.length = 0;
            }
            break;
        case 8: {
            size_t mapped_before = vmm_mapped(m.tensor);
            n = random_below(&seed, (uint32_t)a->capacity + 1);
            CHECK_OK(vmm_map(m.tensor, n));
            CHECK(vmm_mapped(m.tensor) >= (n > mapped_before ? n : mapped_before));
            break;
        }
        case 9: CHECK_OK(vmm_trim(m.tensor)); break;
        case 10: {
            model fork = {.fixture = f, .numbers = calloc(a->capacity, sizeof(uint32_t))};
            n = m.length ? random_below(&seed, (uint32_t)m.length + 1) : 0;
            CHECK(fork.numbers);
            CHECK_OK(vmm_fork(m.tensor, n, &fork.tensor));
            fork.base = vmm_base(fork.tensor);
            CHECK(fork.base != m.base);
            memcpy(fork.numbers, m.numbers, n * sizeof(uint32_t));
            fork.length = n;
            CHECK_SIZE(vmm_capacity(fork.tensor), a->capacity);
            for (int d = 0; d < a->ndim; d++)
                CHECK(vmm_strides(fork.tensor)[d] == vmm_strides(m.tensor)[d]);
            model_check(&fork);
            if (n < a->capacity)
                model_append(&fork, a->dtype, 1, VMM_MEMORY_HOST, NULL);
            model_check(&fork);
            if (random_below(&seed, 2)) { /* go on with the fork */
                model swap = m;
                m = fork;
                fork = swap;
            }
            model_close(&fork);
            break;
        }
        default:
            if (random_below(&seed, 8) == 0) {
                model_close(&m);
                m = model_open(f, &spec);
            }
        }
        if (random_below(&seed, 6) == 0)
            model_check(&m);
        else
            model_check_books(&m);
    }
    model_check(&m);
    model_close(&m);
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    for (int layout = VMM_LAYOUT_SEQ; layout <= VMM_LAYOUT_C; layout++) {
        for (size_t i = 0; i < LENGTH_OF(arrangements); i++)
            run(&f, &arrangements[i], (vmm_layout)layout, 250, 1 + i);
        run(&f, &large, (vmm_layout)layout, f.is_gpu ? 60 : 120, 99);
    }
    fixture_close(&f);
    return 0;
}
