/* What is mapped beyond the length: under "auto" at most one eighth of it plus one smallest
 * block for each lane, with few blocks; under a fixed size less than one block. After growth
 * of a fresh tensor in any steps, and after trim. */
#include "check.h"

static const int64_t shape[] = {2, 0, 4096}; /* uint8 */

typedef struct policy {
    size_t block_bytes, granularity_bytes;
} policy;

static void check_slack(const vmm_tensor *t, const policy *p) {
    size_t lanes = vmm_lane_count(t), used = vmm_length(t) * vmm_row_bytes(t) / lanes;
    size_t bound =
        p->block_bytes == VMM_BLOCK_AUTO ? used / 8 + p->granularity_bytes : p->block_bytes - 1;
    vmm_tensor_stats stats;

    CHECK_OK(vmm_stats(t, &stats));
    if (stats.mapped_bytes / lanes > used + bound)
        FAIL("%zu bytes mapped in each of %zu lanes for %zu in use: more than %zu beyond",
             stats.mapped_bytes / lanes, lanes, used, bound);
    if (p->block_bytes != VMM_BLOCK_AUTO) {
        CHECK_SIZE(stats.mapped_bytes, stats.block_count * p->block_bytes);
        return;
    }
    /* About eight blocks for each doubling; the bound is generous. */
    size_t doublings = 1, granules = used / p->granularity_bytes;
    while (granules >>= 1)
        doublings++;
    if (stats.block_count > lanes * (16 + 12 * doublings))
        FAIL("%zu blocks in %zu lanes for %zu bytes each", stats.block_count, lanes, used);
}

static void run(const fixture *f, vmm_layout layout, const policy *p, size_t step) {
    size_t granules = f->is_gpu ? 48 : 3000; /* in each lane, at the end */
    vmm_spec spec = {.ndim = 3,
                     .shape = shape,
                     .axis = 1,
                     .dtype = VMM_UINT8,
                     .capacity = granules * f->granularity_bytes / 4096 + 3,
                     .layout = layout,
                     .block_bytes = p->block_bytes};
    uint64_t seed = step;
    vmm_tensor *t;

    CHECK_OK(vmm_reserve(f->pool, &spec, &t));
    while (vmm_length(t) < spec.capacity) {
        size_t n = 1 + random_below(&seed, (uint32_t)step), room = spec.capacity - vmm_length(t);
        CHECK_OK(vmm_grow(t, n < room ? n : room, NULL));
        check_slack(t, p);
    }
    CHECK_SIZE(vmm_mapped(t), spec.capacity);
    while (vmm_length(t) > 0) {
        size_t n = 1 + random_below(&seed, (uint32_t)step * 3), length = vmm_length(t);
        CHECK_OK(vmm_truncate(t, length - (n < length ? n : length), VMM_STREAM_NONE));
        CHECK_OK(vmm_trim(t));
        check_slack(t, p);
    }
    CHECK_SIZE(vmm_mapped(t), 0);
    CHECK_OK(vmm_close(t));
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);
    size_t g = f.granularity_bytes;
    const policy policies[] = {{VMM_BLOCK_AUTO, g}, {g, g}, {3 * g, g}, {8 * g, g}};

    for (int layout = VMM_LAYOUT_SEQ; layout <= VMM_LAYOUT_C; layout++)
        for (size_t i = 0; i < LENGTH_OF(policies); i++) {
            run(&f, (vmm_layout)layout, &policies[i], g / 4096 * 3 + 5);
            run(&f, (vmm_layout)layout, &policies[i], g / 4096 * 40 + 1);
        }
    fixture_close(&f);
    return 0;
}
