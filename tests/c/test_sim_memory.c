/* The simulated driver: misuse of memory, and its right use. */
#include "sim_cases.h"

/* ---- memory ------------------------------------------------------------------------------------ */
static void map_twice(void) {
    CUmemGenericAllocationHandle second;
    mapped();
    OK(cuMemCreate(&second, GRANULE, &prop, 0));
    sim.cuMemMap(base, GRANULE, 0, second, 0);
}

static void map_over_the_middle(void) {
    CUmemGenericAllocationHandle large;
    reserved();
    OK(cuMemMap(base + 2 * GRANULE, GRANULE, 0, first, 0));
    OK(cuMemCreate(&large, 4 * GRANULE, &prop, 0));
    sim.cuMemMap(base, 4 * GRANULE, 0, large, 0);
}

static void map_misaligned(void) {
    reserved();
    sim.cuMemMap(base + 4096, GRANULE, 0, first, 0);
}

static void map_outside(void) {
    CUmemGenericAllocationHandle large;
    reserved();
    OK(cuMemCreate(&large, 2 * GRANULE, &prop, 0));
    sim.cuMemMap(base + 7 * GRANULE, 2 * GRANULE, 0, large, 0);
}

static void map_with_an_offset(void) {
    reserved();
    sim.cuMemMap(base, GRANULE, 4096, first, 0);
}

static void map_a_part(void) {
    CUmemGenericAllocationHandle large;
    reserved();
    OK(cuMemCreate(&large, 2 * GRANULE, &prop, 0));
    sim.cuMemMap(base, GRANULE, 0, large, 0);
}

static void map_a_released_handle(void) {
    reserved();
    OK(cuMemRelease(first));
    sim.cuMemMap(base, GRANULE, 0, first, 0);
}

static void release_twice(void) {
    mapped();
    OK(cuMemRelease(first));
    sim.cuMemRelease(first);
}

static void create_an_odd_size(void) {
    CUmemGenericAllocationHandle handle;
    begin();
    sim.cuMemCreate(&handle, GRANULE + 4096, &prop, 0);
}

static void access_unmapped(void) {
    mapped();
    grant(base, 2 * GRANULE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
}

static void unmap_a_part(void) {
    CUmemGenericAllocationHandle large;
    reserved();
    OK(cuMemCreate(&large, 2 * GRANULE, &prop, 0));
    OK(cuMemMap(base, 2 * GRANULE, 0, large, 0));
    sim.cuMemUnmap(base, GRANULE);
}

static void unmap_nothing(void) {
    reserved();
    sim.cuMemUnmap(base, GRANULE);
}

static void free_with_a_mapping(void) {
    mapped();
    sim.cuMemAddressFree(base, 8 * GRANULE);
}

static void free_another_size(void) {
    reserved();
    sim.cuMemAddressFree(base, 4 * GRANULE);
}

static void host_reads_unmapped(void) {
    mapped();
    signal(SIGSEGV, SIG_DFL); /* a sanitizer has its own */
    printf("%d\n", *(volatile char *)(uintptr_t)base);
}

/* Whole life, several mappings unmapped at once, alias of a block, memory counted and back. */
static void right_memory(void) {
    CUdeviceptr alias;
    long handles, mappings, reservations;
    unsigned long long bytes;
    CUmemGenericAllocationHandle second;
    int is_mapped = -1, type = 0;
    usable();
    OK(cuMemCreate(&second, 2 * GRANULE, &prop, 0));
    OK(cuMemMap(base + GRANULE, 2 * GRANULE, 0, second, 0));
    grant(base, 3 * GRANULE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    OK(cuMemRelease(second)); /* while mapped: memory stays */
    memset((void *)(uintptr_t)base, 7, 3 * GRANULE);
    OK(cuMemAddressReserve(&alias, GRANULE, 0, 0, 0));
    OK(cuMemMap(alias, GRANULE, 0, first, 0));
    grant(alias, GRANULE, CU_MEM_ACCESS_FLAGS_PROT_READ);
    CHECK(*(char *)(uintptr_t)alias == 7);
    OK(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, base));
    CHECK(type == CU_MEMORYTYPE_DEVICE);
    OK(cuPointerGetAttribute(&is_mapped, CU_POINTER_ATTRIBUTE_MAPPED, base));
    CHECK(is_mapped == 1);
    GIVES(cuPointerGetAttribute(&is_mapped, CU_POINTER_ATTRIBUTE_MAPPED, base + 7 * GRANULE),
          CUDA_ERROR_INVALID_VALUE);
    GIVES(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, (uintptr_t)&alias),
          CUDA_ERROR_INVALID_VALUE);
    sim.vmm_sim_live(&handles, &mappings, &reservations, &bytes);
    CHECK(handles == 1 && mappings == 3 && reservations == 2 && bytes == 3 * GRANULE);
    OK(cuMemUnmap(base, 3 * GRANULE));
    OK(cuMemUnmap(alias, GRANULE));
    OK(cuMemRelease(first));
    OK(cuMemAddressFree(alias, GRANULE));
    OK(cuMemAddressFree(base, 8 * GRANULE));
    sim.vmm_sim_live(&handles, &mappings, &reservations, &bytes);
    CHECK(handles == 0 && mappings == 0 && reservations == 0 && bytes == 0);
}

static void right_out_of_memory(void) {
    CUmemGenericAllocationHandle handle[16];
    int n = 0;
    CUdeviceptr huge;
    begin();
    while (n < 16 && sim.cuMemCreate(&handle[n], GRANULE, &prop, 0) == CUDA_SUCCESS)
        n++;
    CHECK(n == 4);
    OK(cuMemRelease(handle[0]));
    OK(cuMemCreate(&handle[0], GRANULE, &prop, 0));
    GIVES(cuMemAlloc_v2(&huge, 1), CUDA_ERROR_OUT_OF_MEMORY);
    GIVES(cuMemAddressReserve(&huge, (size_t)128 << 40, 0, 0, 0), CUDA_ERROR_OUT_OF_MEMORY);
}

static const test_case cases[] = {
    MISUSE(map_twice, "vmm-sim: cuMemMap: "),
    MISUSE(map_over_the_middle, "overlaps the mapping"),
    MISUSE(map_misaligned, "is not aligned space"),
    MISUSE(map_outside, "of one reservation"),
    MISUSE(map_with_an_offset, "cuMemMap: offset 4096"),
    MISUSE(map_a_part, "maps whole"),
    MISUSE(map_a_released_handle, "was released before"),
    MISUSE(release_twice, "cuMemRelease: handle"),
    MISUSE(create_an_odd_size, "cuMemCreate: "),
    MISUSE(access_unmapped, "cuMemSetAccess: "),
    MISUSE(unmap_a_part, "cuts the mapping"),
    MISUSE(unmap_nothing, "cuMemUnmap: "),
    MISUSE(free_with_a_mapping, "still has 1 mappings"),
    MISUSE(free_another_size, "is not one reservation"),
    MISUSE(host_reads_unmapped, ""),
    RIGHT_WITH(right_memory, "VMM_SIM_CHECK_EXIT", "1"),
    RIGHT_WITH(right_out_of_memory, "VMM_SIM_MEMORY", "262144"),
};

int main(int argc, char **argv) {
    return run_cases(argc, argv, cases, LENGTH_OF(cases));
}
