/* access.c - granting access and asking for it. */
#include "probe.h"

#define NONE CU_MEM_ACCESS_FLAGS_PROT_NONE
#define RO CU_MEM_ACCESS_FLAGS_PROT_READ
#define RW CU_MEM_ACCESS_FLAGS_PROT_READWRITE

static void access_over_several_mappings(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 1, -1);
    put_block(base + granule, 2, -1);
    put_block(base + 3 * granule, 1, -1);
    say_code("the first two", set_access(base, 3 * granule, RW));
    say("%s", map_of(base, 4));
    say_code("all", set_access(base, 4 * granule, RO));
    say("%s", map_of(base, 4));
}

static void access_to_the_unmapped(void) {
    CUdeviceptr base = new_space(4);
    say_code("nothing mapped", set_access(base, granule, RW));
    put_block(base, 1, -1);
    say_code("one of two", set_access(base, 2 * granule, RW));
    say("%s", map_of(base, 4));
    put_block(base + 2 * granule, 1, -1);
    say_code("over a gap", set_access(base, 3 * granule, RW));
    say("%s", map_of(base, 4));
    say_code("out of the reservation", set_access(base + 2 * granule, 4 * granule, RW));
    say_code("address 0", set_access(0, granule, RW));
    say("%s", map_of(base, 4));
}

static void access_to_a_part(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 2, -1);
    put_block(base + 2 * granule, 2, -1);
    say_code("the first half", set_access(base, granule, RW));
    say("%s", map_of(base, 4));
    say_code("the second half", set_access(base + 3 * granule, granule, RW));
    say("%s", map_of(base, 4));
    say_code("one and a half", set_access(base, 3 * granule, RO));
    say("%s", map_of(base, 4));
    say_code("4 KiB", set_access(base, 4096, RW));
    say_code("0 bytes", set_access(base, 0, RW));
    say("%s", map_of(base, 4));
}

static void access_changes(void) {
    static const int flags[] = {RW, RO, RW, NONE, RO, NONE};
    CUdeviceptr base = new_space(1);
    put_block(base, 1, -1);
    for (size_t i = 0; i < LENGTH_OF(flags); i++) {
        say_code(flags[i] == RW   ? "rw"
                 : flags[i] == RO ? "ro"
                                  : "none",
                 set_access(base, granule, flags[i]));
        say("%s", map_of(base, 1));
    }
}

static void access_of_nonsense(void) {
    CUdeviceptr base = new_space(1);
    CUmemAccessDesc access[2] = {{{CU_MEM_LOCATION_TYPE_DEVICE, 0}, RW},
                                 {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, RO}};
    put_block(base, 1, -1);
    say_code("flags 2", set_access(base, granule, 2));
    say_code("flags 8", set_access(base, granule, 8));
    TRY_AS("no location", cuMemSetAccess, base, granule, access, 0);
    access[0].location.id = 99;
    TRY_AS("device 99", cuMemSetAccess, base, granule, access, 1);
    access[0].location.id = -1;
    TRY_AS("device -1", cuMemSetAccess, base, granule, access, 1);
    access[0].location = (CUmemLocation){0, 0};
    TRY_AS("location type 0", cuMemSetAccess, base, granule, access, 1);
    say("%s", map_of(base, 1));
    access[0].location = access[1].location;
    TRY_AS("a device twice", cuMemSetAccess, base, granule, access, 2);
}

static void ask_access(const char *word, CUdeviceptr address, int type, int id) {
    const CUmemLocation location = {type, id};
    unsigned long long flags = 99;
    if (TRY_AS(word, cuMemGetAccess, &flags, &location, address) == CUDA_SUCCESS)
        say("%llu", flags);
}

static void get_access(void) {
    CUdeviceptr base = new_space(4), memory;
    put_block(base, 2, -1);
    MUST(cuMemAlloc, &memory, granule);
    ask_access("none given", base, CU_MEM_LOCATION_TYPE_DEVICE, 0);
    must("cuMemSetAccess", set_access(base, 2 * granule, RW));
    ask_access("given", base, CU_MEM_LOCATION_TYPE_DEVICE, 0);
    ask_access("within the block", base + granule + 100, CU_MEM_LOCATION_TYPE_DEVICE, 0);
    ask_access("unmapped", base + 3 * granule, CU_MEM_LOCATION_TYPE_DEVICE, 0);
    ask_access("address 0", 0, CU_MEM_LOCATION_TYPE_DEVICE, 0);
    ask_access("cuMemAlloc's", memory, CU_MEM_LOCATION_TYPE_DEVICE, 0);
    ask_access("device 99", base, CU_MEM_LOCATION_TYPE_DEVICE, 99);
    ask_access("location type 0", base, 0, 0);
}

static const probe probes[] = {
    PROBE(access_over_several_mappings),
    PROBE(access_to_the_unmapped),
    PROBE(access_to_a_part),
    PROBE(access_changes),
    PROBE(access_of_nonsense),
    PROBE(get_access),
};
const probe_list access_probes = {"access", probes, LENGTH_OF(probes)};
