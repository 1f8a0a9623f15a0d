/* spec.zero: every row that grow takes reads zero, also after truncation, and in blocks that
 * held another tensor's data. Without it, appended rows are what was appended all the same. */
#include "check.h"

static const int64_t shape[] = {3, 0, 1024}; /* uint8 */

static void check_zero(const fixture *f, const vmm_tensor *tensor, size_t begin, size_t end) {
    uint8_t *rows = read_rows(f, tensor, begin, end);

    for (size_t i = 0; i < (end - begin) * vmm_row_bytes(tensor); i++)
        if (rows[i])
            FAIL("byte %zu after row %zu is %d", i, begin, rows[i]);
    free(rows);
}

static void run(const fixture *f, vmm_layout layout) {
    size_t many = 100 + 3 * f->granularity_bytes / 1024;
    vmm_spec spec = {.ndim = 3,
                     .shape = shape,
                     .axis = 1,
                     .dtype = VMM_UINT8,
                     .capacity = 2 * many,
                     .layout = layout,
                     .zero = 1};
    model dirty = model_open(f, &spec); /* leaves blocks full of data in the pool */
    model_append(&dirty, VMM_UINT8, many, VMM_MEMORY_HOST, NULL);
    model_check(&dirty);
    model_close(&dirty);

    model m = model_open(f, &spec);
    void *out;
    CHECK_OK(vmm_grow(m.tensor, 10, &out));
    CHECK(out == m.base);
    check_zero(f, m.tensor, 0, 10);
    m.length = 10;
    memset(m.numbers, 0, 10 * sizeof *m.numbers);
    model_append(&m, VMM_UINT8, 20, VMM_MEMORY_HOST, NULL);
    CHECK_OK(vmm_truncate(m.tensor, 5, NULL));
    m.length = 5;
    CHECK_OK(vmm_grow(m.tensor, many, NULL)); /* mapped ones and new ones in one call */
    check_zero(f, m.tensor, 0, 5 + many);
    CHECK_OK(vmm_grow(m.tensor, 0, NULL));
    CHECK_OK(vmm_truncate(m.tensor, 0, NULL));
    m.length = 0;
    model_append(&m, VMM_UINT8, 7, VMM_MEMORY_HOST, NULL);
    CHECK_OK(vmm_trim(m.tensor));
    CHECK_OK(vmm_grow(m.tensor, many, NULL));
    check_zero(f, m.tensor, 7, 7 + many);
    model_check_rows(&m, 0, 7);

    vmm_tensor *fork;
    CHECK_OK(vmm_fork(m.tensor, 7, &fork));
    CHECK_OK(vmm_grow(fork, 3, NULL));
    check_zero(f, fork, 7, 10);
    CHECK_OK(vmm_close(fork));
    model_close(&m);
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);

    for (int layout = VMM_LAYOUT_SEQ; layout <= VMM_LAYOUT_C; layout++)
        run(&f, (vmm_layout)layout);
    fixture_close(&f);
    return 0;
}
