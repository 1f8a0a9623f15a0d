/* A first program: a cache of tokens that grows in place.
 *
 *     cc first.c $(pkg-config --cflags --libs vmm) -o first && ./first
 */
#include <stdint.h>
#include <stdio.h>
#include <vmm.h>

#define HEADS 2
#define DIM 4

static int failed(const char *what) {
    const vmm_error *error = vmm_last_error();

    fprintf(stderr, "%s: %s: %s\n", what, vmm_status_name(error->status), error->message);
    return 1;
}

int main(void) {
    vmm_device *device;
    vmm_pool *pool;
    vmm_tensor *cache;
    const int64_t shape[] = {0, HEADS, DIM}; /* grows along axis 0 */
    const int64_t token_shape[] = {1, HEADS, DIM};
    float token[1][HEADS][DIM] = {{{0}}};
    vmm_spec spec = {
        .ndim = 3, .shape = shape, .axis = 0, .dtype = VMM_FLOAT32, .capacity = 1000000};
    vmm_array source = {.data = token,
                        .memory = VMM_MEMORY_HOST,
                        .dtype = VMM_FLOAT32,
                        .ndim = 3,
                        .shape = token_shape};
    vmm_tensor_stats stats;

    if (vmm_device_open("host", &device))
        return failed("open");
    if (vmm_pool_create(device, VMM_BLOCK_AUTO, 0, &pool))
        return failed("pool");
    if (vmm_reserve(pool, &spec, &cache)) /* address space, no memory yet */
        return failed("reserve");
    const float (*data)[HEADS][DIM] = vmm_base(cache); /* and here it stays */

    for (int i = 0; i < 1000; i++) {
        token[0][0][0] = (float)i;
        if (vmm_append(cache, &source, NULL))
            return failed("append");
    }
    if (vmm_stats(cache, &stats))
        return failed("stats");
    printf("%zu tokens, %zu mapped, of %zu; token 999 begins with %g\n", vmm_length(cache),
           vmm_mapped(cache), vmm_capacity(cache), data[999][0][0]);
    printf("%zu bytes reserved, %zu of memory, %zu in use\n", stats.reserved_bytes,
           stats.mapped_bytes, stats.used_bytes);

    if (vmm_close(cache) || vmm_pool_close(pool))
        return failed("close");
    vmm_device_close(device);
    return 0;
}
