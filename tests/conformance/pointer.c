/* pointer.c - what the driver says of an address. */
#include "probe.h"

#define RW CU_MEM_ACCESS_FLAGS_PROT_READWRITE

/* Numbers are given relative to `base`, so that they are the same in every run. */
static void ask(const char *word, int attribute, CUdeviceptr address, CUdeviceptr base) {
    unsigned long long value = 0; /* wide enough for every one */
    CUresult code = cuda.cuPointerGetAttribute(&value, attribute, address);
    if (code) {
        say_code(word, code);
        return;
    }
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
        say("%s %s", word,
            value == (uintptr_t)context ? "the primary one"
            : value                     ? "another"
                                        : "none");
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR:
        if (value)
            say("%s +%llu KiB", word, (value - base) >> 10);
        else
            say("%s 0", word);
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE: say("%s %llu KiB", word, value >> 10); break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: say("%s %d", word, (int)value); break;
    default: say("%s %u", word, (unsigned)value & 0xFF); break;
    }
}

static void ask_all(CUdeviceptr address, CUdeviceptr base) {
    ask("type", CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address, base);
    ask("context", CU_POINTER_ATTRIBUTE_CONTEXT, address, base);
    ask("device", CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address, base);
    ask("device pointer", CU_POINTER_ATTRIBUTE_DEVICE_POINTER, address, base);
    ask("host pointer", CU_POINTER_ATTRIBUTE_HOST_POINTER, address, base);
    ask("managed", CU_POINTER_ATTRIBUTE_IS_MANAGED, address, base);
    ask("range from", CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address, base);
    ask("range of", CU_POINTER_ATTRIBUTE_RANGE_SIZE, address, base);
    ask("mapped", CU_POINTER_ATTRIBUTE_MAPPED, address, base);
    ask("mapping from", CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, address, base);
    ask("mapping of", CU_POINTER_ATTRIBUTE_MAPPING_SIZE, address, base);
}

static void ask_range(CUdeviceptr address, CUdeviceptr origin) {
    CUdeviceptr base = 0;
    size_t bytes = 0;
    if (TRY(cuMemGetAddressRange, &base, &bytes, address) == CUDA_SUCCESS)
        say("+%llu KiB, %zu KiB", (base - origin) >> 10, bytes >> 10);
}

static void address_reserved(void) {
    CUdeviceptr base = new_space(4);
    ask_all(base + granule, base);
    ask_range(base + granule, base);
}

static void address_mapped_without_access(void) {
    CUdeviceptr base = new_space(4);
    put_block(base + granule, 2, -1);
    ask_all(base + 2 * granule + 8, base);
    ask_range(base + 2 * granule + 8, base);
}

static void address_mapped(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 1, RW);
    put_block(base + granule, 2, RW);
    ask_all(base + 2 * granule + 8, base);
    ask_range(base + 2 * granule + 8, base);
    ask_range(base + 8, base);
}

static void address_behind_the_mapping(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 1, RW);
    ask_all(base + 2 * granule, base);
    ask_range(base + 2 * granule, base);
}

static void address_unmapped_again(void) {
    CUdeviceptr base = new_space(4);
    put_block(base, 1, RW);
    MUST(cuMemUnmap, base, granule);
    ask_all(base, base);
    ask_range(base, base);
}

static void address_freed(void) {
    CUdeviceptr base = new_space(4);
    MUST(cuMemAddressFree, base, 4 * granule);
    ask_all(base, base);
    ask_range(base, base);
}

static void address_of_an_alias(void) {
    CUdeviceptr base = new_space(4);
    CUmemGenericAllocationHandle block = put_block(base, 1, RW);
    MUST(cuMemMap, base + 3 * granule, granule, 0, block, 0);
    must("cuMemSetAccess", set_access(base + 3 * granule, granule, RW));
    ask_all(base + 3 * granule, base);
    ask_range(base + 3 * granule, base);
}

static void address_allocated(void) {
    CUdeviceptr memory;
    MUST(cuMemAlloc, &memory, granule);
    ask_all(memory + 4096, memory);
    ask_range(memory + 4096, memory);
}

static void address_pinned(void) {
    void *memory;
    MUST(cuMemHostAlloc, &memory, 65536, 0);
    ask_all((uintptr_t)memory + 4096, (uintptr_t)memory);
    ask_range((uintptr_t)memory + 4096, (uintptr_t)memory);
}

static void address_of_the_host(void) {
    static char memory[64];
    ask_all((uintptr_t)memory, (uintptr_t)memory);
    ask_range((uintptr_t)memory, (uintptr_t)memory);
}

static void address_0(void) {
    ask_all(0, 0);
    ask_range(0, 0);
}

static const probe probes[] = {
    PROBE(address_reserved),
    PROBE(address_mapped_without_access),
    PROBE(address_mapped),
    PROBE(address_behind_the_mapping),
    PROBE(address_unmapped_again),
    PROBE(address_freed),
    PROBE(address_of_an_alias),
    PROBE(address_allocated),
    PROBE(address_pinned),
    PROBE(address_of_the_host),
    PROBE(address_0),
};
const probe_list pointer_probes = {"what an address is", probes, LENGTH_OF(probes)};
