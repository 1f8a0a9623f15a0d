/* reserve.c - granularity, reservations, physical blocks, exporting them. */
#include "probe.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- granularity ------------------------------------------------------------------------ */
static void ask_granularity(const char *word, CUmemAllocationProp prop, int option) {
    size_t bytes = 0;
    if (TRY_AS(word, cuMemGetAllocationGranularity, &bytes, &prop, option) == CUDA_SUCCESS)
        say("%zu KiB", bytes >> 10);
}

static void granularity(void) {
    CUmemAllocationProp exportable = block_prop;
    exportable.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    ask_granularity("minimum", block_prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    ask_granularity("recommended", block_prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
    ask_granularity("exportable", exportable, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
}

static void granularity_of_nonsense(void) {
    CUmemAllocationProp prop = block_prop;
    ask_granularity("option 7", prop, 7);
    prop.type = 0;
    ask_granularity("type 0", prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    prop = block_prop;
    prop.location.type = 0;
    ask_granularity("location type 0", prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    prop = block_prop;
    prop.location.id = 99;
    ask_granularity("device 99", prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    prop.location.id = -1;
    ask_granularity("device -1", prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
}

/* ---- reservations --------------------------------------------------------------------------- */
static void reserve(const char *word, size_t bytes, size_t alignment, unsigned long long flags) {
    CUdeviceptr base = 0;
    size_t at_least = alignment ? alignment : granule;
    if (TRY_AS(word, cuMemAddressReserve, &base, bytes, alignment, 0, flags))
        return;
    if (base % at_least)
        say("not aligned to %zu", at_least);
    MUST(cuMemAddressFree, base, bytes);
}

static void reserve_sizes(void) {
    reserve("0 bytes", 0, 0, 0);
    reserve("1 byte", 1, 0, 0);
    reserve("4 KiB", 4096, 0, 0);
    reserve("a granule", granule, 0, 0);
    reserve("a granule and 4 KiB", granule + 4096, 0, 0);
    reserve("5 granules", 5 * granule, 0, 0);
    reserve("1 TiB", (size_t)1 << 40, 0, 0);
    reserve("64 TiB", (size_t)64 << 40, 0, 0);
    reserve("128 TiB", (size_t)128 << 40, 0, 0);
    reserve("2^63 bytes", (size_t)1 << 63, 0, 0);
}

static void reserve_alignments(void) {
    reserve("1", granule, 1, 0);
    reserve("3", granule, 3, 0);
    reserve("4 KiB", granule, 4096, 0);
    reserve("a granule", granule, granule, 0);
    reserve("3 granules", granule, 3 * granule, 0);
    reserve("1 GiB", granule, (size_t)1 << 30, 0);
    reserve("flags 1", granule, 0, 1);
}

static void free_of_another_size_or_address(void) {
    CUdeviceptr base = new_space(4);
    TRY_AS("half", cuMemAddressFree, base, 2 * granule);
    TRY_AS("twice as much", cuMemAddressFree, base, 8 * granule);
    TRY_AS("0 bytes", cuMemAddressFree, base, 0);
    TRY_AS("the second half", cuMemAddressFree, base + 2 * granule, 2 * granule);
    TRY_AS("from the middle", cuMemAddressFree, base + 2 * granule, 4 * granule);
    TRY_AS("the whole", cuMemAddressFree, base, 4 * granule);
}

static void free_twice(void) {
    CUdeviceptr base = new_space(4);
    MUST(cuMemAddressFree, base, 4 * granule);
    TRY(cuMemAddressFree, base, 4 * granule);
}

static void free_what_is_no_reservation(void) {
    CUdeviceptr memory;
    MUST(cuMemAlloc, &memory, granule);
    TRY_AS("0", cuMemAddressFree, 0, granule);
    TRY_AS("of cuMemAlloc", cuMemAddressFree, memory, granule);
}

static void free_with_a_mapping_left(void) {
    CUdeviceptr base = new_space(4);
    put_block(base + granule, 1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    TRY(cuMemAddressFree, base, 4 * granule);
    say("%s", map_of(base, 4));
    TRY(cuMemUnmap, base + granule, granule);
    TRY(cuMemAddressFree, base, 4 * granule);
}

/* ---- blocks -------------------------------------------------------------------------------- */
static void create(const char *word, size_t bytes, CUmemAllocationProp prop,
                   unsigned long long flags) {
    CUmemGenericAllocationHandle block = 0;
    if (TRY_AS(word, cuMemCreate, &block, bytes, &prop, flags) == CUDA_SUCCESS)
        MUST(cuMemRelease, block);
}

static void create_sizes(void) {
    create("0 bytes", 0, block_prop, 0);
    create("1 byte", 1, block_prop, 0);
    create("4 KiB", 4096, block_prop, 0);
    create("a granule", granule, block_prop, 0);
    create("a granule and 4 KiB", granule + 4096, block_prop, 0);
    create("3 granules", 3 * granule, block_prop, 0);
    create("4 TiB", (size_t)4 << 40, block_prop, 0);
    create("2^63 bytes", (size_t)1 << 63, block_prop, 0);
}

static void create_with_other_properties(void) {
    CUmemAllocationProp prop = block_prop;
    create("flags 1", granule, prop, 1);
    prop.type = 0;
    create("type 0", granule, prop, 0);
    prop = block_prop;
    prop.location.type = 0;
    create("location type 0", granule, prop, 0);
    prop = block_prop;
    prop.location.id = 99;
    create("device 99", granule, prop, 0);
    prop = block_prop;
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    create("exportable", granule, prop, 0);
}

static void create_until_it_is_full(void) {
    static CUmemGenericAllocationHandle blocks[4096];
    size_t free_bytes, total, n = 0, before;
    MUST(cuMemGetInfo, &before, &total);
    size_t bytes = total / 64 / granule * granule;
    CUresult code = CUDA_SUCCESS;
    while (n < LENGTH_OF(blocks) && !code)
        if (!(code = cuda.cuMemCreate(&blocks[n], bytes, &block_prop, 0)))
            n++;
    say_code("cuMemCreate", code);
    TRY_AS("and again", cuMemCreate, &blocks[n], bytes, &block_prop, 0);
    MUST(cuMemGetInfo, &free_bytes, &total);
    say("%s than a block is left", free_bytes < bytes ? "less" : "more");
    MUST(cuMemRelease, blocks[0]);
    TRY_AS("after a release", cuMemCreate, &blocks[0], bytes, &block_prop, 0);
    while (n > 0)
        MUST(cuMemRelease, blocks[--n]);
    MUST(cuMemGetInfo, &free_bytes, &total);
    say("all %s", free_bytes + bytes > before ? "is back" : "is not back");
}

static void release_twice(void) {
    CUmemGenericAllocationHandle block = new_block(1);
    TRY(cuMemRelease, block);
    TRY_AS("again", cuMemRelease, block);
}

static void release_of_0(void) {
    TRY(cuMemRelease, 0);
}

/* ---- exporting ------------------------------------------------------------------------------ */
static CUmemGenericAllocationHandle exportable_block(void) {
    CUmemAllocationProp prop = block_prop;
    CUmemGenericAllocationHandle block = 0;
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    MUST(cuMemCreate, &block, granule, &prop, 0);
    return block;
}

static void export_a_private_block(void) {
    int fd = -1;
    TRY(cuMemExportToShareableHandle, &fd, new_block(1), CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        0);
}

static void export_as_another_type(void) {
    int fd = -1;
    CUmemGenericAllocationHandle block = exportable_block();
    TRY_AS("type 0", cuMemExportToShareableHandle, &fd, block, 0, 0);
    TRY_AS("flags 1", cuMemExportToShareableHandle, &fd, block,
           CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 1);
}

static void export_and_import(void) {
    int fd = -1;
    CUdeviceptr base = new_space(2);
    CUmemGenericAllocationHandle block = exportable_block(), copy = 0;
    TRY(cuMemExportToShareableHandle, &fd, block, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    say("%s", fcntl(fd, F_GETFD) >= 0 ? "a descriptor" : "no descriptor");
    TRY(cuMemImportFromShareableHandle, &copy, (void *)(intptr_t)fd,
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    close(fd);
    MUST(cuMemMap, base, granule, 0, block, 0);
    MUST(cuMemMap, base + granule, granule, 0, copy, 0);
    must("cuMemSetAccess", set_access(base, 2 * granule, CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
    MUST(cuMemsetD8, base + 5, 77, 1);
    say("%s", byte_at(base + granule + 5) == 77 ? "the same memory" : "other memory");
}

static void import_nonsense(void) {
    CUmemGenericAllocationHandle block = 0;
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    TRY_AS("-1", cuMemImportFromShareableHandle, &block, (void *)(intptr_t)-1,
           CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    TRY_AS("/dev/null", cuMemImportFromShareableHandle, &block, (void *)(intptr_t)fd,
           CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
}

static const probe probes[] = {
    PROBE(granularity),
    PROBE(granularity_of_nonsense),
    PROBE(reserve_sizes),
    PROBE(reserve_alignments),
    PROBE(free_of_another_size_or_address),
    ALONE(free_twice),
    PROBE(free_what_is_no_reservation),
    PROBE(free_with_a_mapping_left),
    PROBE(create_sizes),
    PROBE(create_with_other_properties),
    PROBE(create_until_it_is_full),
    ALONE(release_of_0),
    ALONE(release_twice),
    PROBE(export_a_private_block),
    PROBE(export_as_another_type),
    PROBE(export_and_import),
    ALONE(import_nonsense),
};
const probe_list reserve_probes = {"addresses and blocks", probes, LENGTH_OF(probes)};
