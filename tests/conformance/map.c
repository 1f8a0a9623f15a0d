/* map.c - mapping, unmapping, and how long a block lives. */
#include "probe.h"

#define RW CU_MEM_ACCESS_FLAGS_PROT_READWRITE

static void map_grants_no_access(void) {
    CUdeviceptr base = new_space(4);
    CUmemGenericAllocationHandle block = new_block(1);
    TRY(cuMemMap, base, granule, 0, block, 0);
    say("%s", map_of(base, 4));
}

static void map_twice(void) {
    CUdeviceptr base = new_space(4);
    CUmemGenericAllocationHandle block = put_block(base, 1, RW);
    TRY_AS("the same block", cuMemMap, base, granule, 0, block, 0);
    TRY_AS("another block", cuMemMap, base, granule, 0, new_block(1), 0);
    say("%s", map_of(base, 4));
}

static void map_over_a_mapping(void) {
    CUdeviceptr base = new_space(8);
    CUmemGenericAllocationHandle large = new_block(4);
    put_block(base + 2 * granule, 1, RW);
    TRY_AS("from before it", cuMemMap, base, 4 * granule, 0, large, 0);
    TRY_AS("from it on", cuMemMap, base + 2 * granule, 4 * granule, 0, large, 0);
    put_block(base + 4 * granule, 4, RW);
    TRY_AS("into a larger one", cuMemMap, base + 5 * granule, granule, 0, new_block(1), 0);
    say("%s", map_of(base, 8));
}

static void map_with_an_offset(void) {
    CUdeviceptr base = new_space(4);
    CUmemGenericAllocationHandle large = new_block(2);
    TRY_AS("of 4 KiB", cuMemMap, base, granule, 4096, large, 0);
    TRY_AS("of a granule", cuMemMap, base, granule, granule, large, 0);
    TRY_AS("and the whole size", cuMemMap, base, 2 * granule, granule, large, 0);
    say("%s", map_of(base, 4));
}

static void map_another_size(void) {
    CUdeviceptr base = new_space(4);
    CUmemGenericAllocationHandle large = new_block(2);
    TRY_AS("less", cuMemMap, base, granule, 0, large, 0);
    TRY_AS("more", cuMemMap, base, 4 * granule, 0, large, 0);
    TRY_AS("0", cuMemMap, base, 0, 0, large, 0);
    TRY_AS("4 KiB", cuMemMap, base, 4096, 0, large, 0);
    say("%s", map_of(base, 4));
}

static void map_misaligned(void) {
    CUdeviceptr base = new_space(4);
    CUmemGenericAllocationHandle block = new_block(1);
    TRY_AS("1 byte", cuMemMap, base + 1, granule, 0, block, 0);
    TRY_AS("4 KiB", cuMemMap, base + 4096, granule, 0, block, 0);
    TRY_AS("half a granule", cuMemMap, base + granule / 2, granule, 0, block, 0);
    say("%s", map_of(base, 4));
}

static void map_outside(void) {
    CUdeviceptr base = new_space(4), memory;
    CUmemGenericAllocationHandle large = new_block(2);
    MUST(cuMemAlloc, &memory, 2 * granule);
    TRY_AS("over the end", cuMemMap, base + 3 * granule, 2 * granule, 0, large, 0);
    TRY_AS("at 0", cuMemMap, 0, 2 * granule, 0, large, 0);
    TRY_AS("over cuMemAlloc's", cuMemMap, memory, 2 * granule, 0, large, 0);
    say("%s", map_of(base, 4));
}

static void map_flags_and_no_handle(void) {
    CUdeviceptr base = new_space(4);
    TRY_AS("flags 1", cuMemMap, base, granule, 0, new_block(1), 1);
    TRY_AS("handle 0", cuMemMap, base, granule, 0, 0, 0);
    say("%s", map_of(base, 4));
}

static void map_at_two_addresses(void) {
    CUdeviceptr base = new_space(4);
    CUmemGenericAllocationHandle block = put_block(base, 1, RW);
    TRY(cuMemMap, base + 2 * granule, granule, 0, block, 0);
    must("cuMemSetAccess", set_access(base + 2 * granule, granule, CU_MEM_ACCESS_FLAGS_PROT_READ));
    MUST(cuMemsetD8, base + 9, 42, 1);
    say("%s, %s", map_of(base, 4),
        byte_at(base + 2 * granule + 9) == 42 ? "written through" : "not the same memory");
    TRY_AS("unmap the first", cuMemUnmap, base, granule);
    say("%s", byte_at(base + 2 * granule + 9) == 42 ? "still there" : "lost");
}

/* ---- unmapping ---------------------------------------------------------------------------- */
static void unmap_one(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 1, RW);
    put_block(base + granule, 1, RW);
    TRY(cuMemUnmap, base, granule);
    say("%s", map_of(base, 4));
    TRY_AS("again", cuMemUnmap, base, granule);
    say("%s", map_of(base, 4));
}

static void unmap_several_at_once(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 1, RW);
    put_block(base + granule, 2, RW);
    put_block(base + 3 * granule, 1, -1);
    TRY(cuMemUnmap, base, 4 * granule);
    say("%s", map_of(base, 4));
}

static void unmap_a_part(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 2, RW);
    put_block(base + 2 * granule, 2, RW);
    TRY_AS("the first half", cuMemUnmap, base, granule);
    TRY_AS("the second half", cuMemUnmap, base + granule, granule);
    TRY_AS("one and a half", cuMemUnmap, base, 3 * granule);
    TRY_AS("4 KiB", cuMemUnmap, base, 4096);
    TRY_AS("from 4 KiB on", cuMemUnmap, base + 4096, 2 * granule);
    say("%s", map_of(base, 4));
}

static void unmap_over_a_gap(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 1, RW);
    put_block(base + 2 * granule, 1, RW);
    TRY(cuMemUnmap, base, 3 * granule);
    say("%s", map_of(base, 4));
}

static void unmap_past_the_last(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 1, RW);
    TRY_AS("into the unmapped", cuMemUnmap, base, 2 * granule);
    say("%s", map_of(base, 4));
    put_block(base + 3 * granule, 1, RW);
    TRY_AS("out of the reservation", cuMemUnmap, base + 3 * granule, 2 * granule);
    say("%s", map_of(base, 4));
}

static void unmap_nothing(void) {
    CUdeviceptr base = new_space(4), memory;
    MUST(cuMemAlloc, &memory, granule);
    TRY_AS("what is reserved", cuMemUnmap, base, granule);
    TRY_AS("0 bytes", cuMemUnmap, base, 0);
    TRY_AS("0", cuMemUnmap, 0, granule);
    TRY_AS("cuMemAlloc's", cuMemUnmap, memory, granule);
}

static void remap_has_no_access(void) {
    CUdeviceptr base = new_space(4);
    CUmemGenericAllocationHandle block = put_block(base, 1, RW);
    MUST(cuMemUnmap, base, granule);
    TRY(cuMemMap, base, granule, 0, block, 0);
    say("%s", map_of(base, 4));
}

/* ---- the life of a block -------------------------------------------------------------------- */
static size_t free_memory(void) {
    size_t free_bytes = 0, total;
    MUST(cuMemGetInfo, &free_bytes, &total);
    return free_bytes;
}

/* What a step took from the device's memory or gave back, in blocks. */
static void say_memory(const char *word, size_t before, size_t bytes) {
    long long lost = (long long)before - (long long)free_memory();
    say("%s %lld held", word, (lost + (long long)bytes / 2) / (long long)bytes);
}

static void memory_lives_as_long_as_handle_or_mapping(void) {
    const size_t n = 32, bytes = n * granule;
    CUdeviceptr base = new_space(n);
    size_t before = free_memory();
    CUmemGenericAllocationHandle block = new_block(n);
    say_memory("created:", before, bytes);
    MUST(cuMemMap, base, bytes, 0, block, 0);
    TRY(cuMemRelease, block);
    say_memory("released while mapped:", before, bytes);
    must("cuMemSetAccess", set_access(base, bytes, RW));
    MUST(cuMemsetD8, base, 3, bytes);
    say("%s", byte_at(base + bytes - 1) == 3 ? "usable" : "not usable");
    TRY(cuMemUnmap, base, bytes);
    say_memory("unmapped:", before, bytes);
}

static void memory_lives_until_the_release(void) {
    const size_t n = 32, bytes = n * granule;
    CUdeviceptr base = new_space(n);
    size_t before = free_memory();
    CUmemGenericAllocationHandle block = put_block(base, n, RW);
    MUST(cuMemsetD8, base, 9, bytes);
    MUST(cuCtxSynchronize);
    TRY(cuMemUnmap, base, bytes);
    say_memory("unmapped:", before, bytes);
    MUST(cuMemMap, base, bytes, 0, block, 0);
    must("cuMemSetAccess", set_access(base, bytes, RW));
    say("contents %s", byte_at(base + 1) == 9 ? "kept" : "lost");
    MUST(cuMemUnmap, base, bytes);
    TRY(cuMemRelease, block);
    say_memory("released:", before, bytes);
}

static void map_again_after_the_release_while_mapped(void) {
    CUdeviceptr base = new_space(4);
    CUmemGenericAllocationHandle block = put_block(base, 1, RW);
    MUST(cuMemRelease, block);
    TRY(cuMemMap, base + granule, granule, 0, block, 0);
    say("%s", map_of(base, 4));
}

static void release_twice_while_mapped(void) {
    CUdeviceptr base = new_space(4);
    CUmemGenericAllocationHandle block = put_block(base, 1, RW);
    TRY(cuMemRelease, block);
    TRY_AS("again", cuMemRelease, block);
    say("%s", map_of(base, 4));
}

static const probe probes[] = {
    PROBE(map_grants_no_access),
    PROBE(map_twice),
    PROBE(map_over_a_mapping),
    PROBE(map_with_an_offset),
    PROBE(map_another_size),
    PROBE(map_misaligned),
    PROBE(map_outside),
    PROBE(map_flags_and_no_handle),
    PROBE(map_at_two_addresses),
    PROBE(unmap_one),
    PROBE(unmap_several_at_once),
    PROBE(unmap_a_part),
    PROBE(unmap_over_a_gap),
    PROBE(unmap_past_the_last),
    PROBE(unmap_nothing),
    PROBE(remap_has_no_access),
    PROBE(memory_lives_as_long_as_handle_or_mapping),
    PROBE(memory_lives_until_the_release),
    ALONE(map_again_after_the_release_while_mapped),
    ALONE(release_twice_while_mapped),
};
const probe_list map_probes = {"mapping", probes, LENGTH_OF(probes)};
