/* memory.c - virtual memory management: reserve, create, map, access and their undoing.
 *
 * Physical memory is an extent of one sparse memfd, so that any number of blocks needs one
 * descriptor; extents are never used twice, they are punched out when a block goes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sim.h"

#define HANDLE_BASE 0x5100000000000000ull /* far from any address or small number */
#define JUNK 0xA5
#define JUNK_LIMIT (256ull << 20) /* memory in use past which new blocks are left as they are */

static int arena = -1;
static off_t arena_end;
static sim_block **blocks; /* by handle - HANDLE_BASE; NULL once released */
static size_t n_blocks, blocks_capacity;
static unsigned long long used[SIM_MAX_DEVICES];

void sim_memory_init(void) {
    arena = memfd_create("vmm-sim", MFD_CLOEXEC);
    if (arena < 0) {
        perror("vmm-sim: memfd_create");
        abort();
    }
}

unsigned long long sim_memory_used(int device) {
    return used[device];
}

/* ---- blocks -------------------------------------------------------------------------------- */
static void fill_with_junk(const sim_block *block) {
    unsigned long long all = 0;
    for (int i = 0; i < SIM_MAX_DEVICES; i++)
        all += used[i];
    if (!sim.junk || all > JUNK_LIMIT)
        return;
    size_t span = (block->bytes + 4095) & ~(size_t)4095;
    void *p = mmap(NULL, span, PROT_WRITE, MAP_SHARED, block->fd, block->offset);
    if (p != MAP_FAILED) {
        memset(p, JUNK, span);
        munmap(p, span);
    }
}

/* NULL when the device is full. */
sim_block *sim_block_create(int device, size_t bytes, bool exportable) {
    if (bytes > sim.memory - used[device])
        return NULL;
    off_t span = (off_t)((bytes + 4095) & ~(size_t)4095);
    sim_block *block = sim_alloc(sizeof *block);
    *block = (sim_block){.device = device, .bytes = bytes, .exportable = exportable};
    block->fd = exportable ? memfd_create("vmm-sim-block", MFD_CLOEXEC) : arena;
    block->offset = exportable ? 0 : arena_end;
    if (block->fd < 0 || ftruncate(block->fd, block->offset + span) != 0) {
        perror("vmm-sim: memory of a block");
        abort();
    }
    if (!exportable)
        arena_end += span;
    used[device] += bytes;
    fill_with_junk(block);
    return block;
}

void sim_block_drop(sim_block *block) {
    if (!block->released || block->n_mappings)
        return;
    if (block->handle)
        blocks[block->handle - HANDLE_BASE] = NULL;
    if (block->exportable)
        close(block->fd);
    else
        fallocate(block->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, block->offset,
                  (off_t)((block->bytes + 4095) & ~(size_t)4095));
    used[block->device] -= block->bytes;
    sim_race_forget(block);
    free(block);
}

static CUmemGenericAllocationHandle new_handle(sim_block *block) {
    if (n_blocks == blocks_capacity) {
        blocks_capacity = blocks_capacity ? 2 * blocks_capacity : 64;
        blocks = sim_grow(blocks, blocks_capacity * sizeof(sim_block *));
    }
    blocks[n_blocks] = block;
    block->handle = HANDLE_BASE + n_blocks++;
    return block->handle;
}

/* A released handle stands for its block as long as that is mapped. */
static sim_block *any_block_of(CUmemGenericAllocationHandle handle) {
    bool known = handle >= HANDLE_BASE && handle - HANDLE_BASE < n_blocks;
    return known ? blocks[handle - HANDLE_BASE] : NULL;
}

static sim_block *block_of(CUmemGenericAllocationHandle handle, CUresult *status) {
    bool known = handle >= HANDLE_BASE && handle - HANDLE_BASE < n_blocks;
    sim_block *block = any_block_of(handle);
    if (block && block->released)
        block = NULL;
    *status = CUDA_SUCCESS;
    if (!block)
        *status =
            sim_refuse(CUDA_ERROR_INVALID_VALUE,
                       known ? "handle 0x%llx was released before" : "0x%llx is no handle", handle);
    return block;
}

long sim_live_handles(void) {
    long n = 0;
    for (size_t i = 0; i < n_blocks; i++)
        n += blocks[i] && !blocks[i]->released;
    return n;
}

void sim_list_handles(void) {
    for (size_t i = 0; i < n_blocks; i++)
        if (blocks[i] && !blocks[i]->released)
            fprintf(stderr, "vmm-sim: exit:   handle 0x%llx of %zu bytes, mapped %zu times\n",
                    blocks[i]->handle, blocks[i]->bytes, blocks[i]->n_mappings);
}

/* ---- reservations ---------------------------------------------------------------------------- */
static bool aligned(unsigned long long value) {
    return value % sim.granularity == 0;
}

CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
    CUresult status = sim_enter(SIM_cuMemAddressReserve);
    if (status)
        return status;
    if (!address || !bytes || !aligned(bytes) || flags)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                    "%zu bytes (granularity %zu), flags %llu", bytes,
                                    sim.granularity, flags));
    if (alignment & (alignment - 1))
        return sim_leave(
            sim_refuse(CUDA_ERROR_INVALID_VALUE, "alignment %zu is no power of two", alignment));
    if (bytes > (size_t)64 << 40)
        return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    if (alignment < sim.granularity)
        alignment = sim.granularity;
    size_t span = bytes + alignment;
    char *p = mmap((void *)(uintptr_t)hint, span, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    size_t before = (alignment - (uintptr_t)p % alignment) % alignment;
    if (before)
        munmap(p, before);
    if (span - before > bytes)
        munmap(p + before + bytes, span - before - bytes);
    sim_space_add(SIM_SPACE_VMM, (uintptr_t)p + before, bytes, bytes);
    *address = (uintptr_t)p + before;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    CUresult status = sim_enter(SIM_cuMemAddressFree);
    if (status)
        return status;
    sim_space *space = sim_space_find(address);
    if (!space || space->kind != SIM_SPACE_VMM || space->base != address || space->bytes != bytes)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                    "0x%llx of %zu bytes is not one reservation (%s 0x%zx of %zu)",
                                    address, bytes, space ? "it lies in" : "none there:",
                                    space ? (size_t)space->base : 0, space ? space->bytes : 0));
    if (space->n_map)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                    "0x%llx of %zu bytes still has %zu mappings", address, bytes,
                                    space->n_map));
    munmap((void *)space->base, space->span);
    sim_space_remove(space);
    return sim_leave(CUDA_SUCCESS);
}

/* ---- physical memory --------------------------------------------------------------------------- */
static CUresult check_prop(const CUmemAllocationProp *prop) {
    if (!prop || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED ||
        prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
        (prop->requestedHandleTypes != CU_MEM_HANDLE_TYPE_NONE &&
         prop->requestedHandleTypes != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR))
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "properties other than pinned memory of a "
                                                    "device, private or as file descriptor");
    if (prop->location.id < 0 || prop->location.id >= sim.n_devices)
        return sim_refuse(CUDA_ERROR_INVALID_DEVICE, "device %d does not exist", prop->location.id);
    if (prop->allocFlags.compressionType || prop->allocFlags.usage)
        return sim_refuse(CUDA_ERROR_NOT_SUPPORTED, "allocation flags are not modelled");
    return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop,
                                       int option) {
    CUresult status = sim_enter(SIM_cuMemGetAllocationGranularity);
    if (status)
        return status;
    check_prop(prop); /* the driver does not look */
    if (option != CU_MEM_ALLOC_GRANULARITY_MINIMUM &&
        option != CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)
        status = sim_refuse(CUDA_ERROR_INVALID_VALUE, "option %d", option);
    if (status == CUDA_SUCCESS)
        *granularity = sim.granularity;
    return sim_leave(status);
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes,
                     const CUmemAllocationProp *prop, unsigned long long flags) {
    CUresult status = sim_enter(SIM_cuMemCreate);
    if (status)
        return status;
    status = check_prop(prop);
    if (status)
        return sim_leave(status);
    if (!handle || !bytes || !aligned(bytes) || flags)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                    "%zu bytes (granularity %zu), flags %llu", bytes,
                                    sim.granularity, flags));
    sim_block *block =
        sim_block_create(prop->location.id, bytes,
                         prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (!block)
        return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    *handle = new_handle(block);
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    CUresult status = sim_enter(SIM_cuMemRelease);
    if (status)
        return status;
    sim_block *block = block_of(handle, &status);
    if (!block)
        return sim_leave(status);
    block->released = true;
    if (!block->n_mappings)
        blocks[handle - HANDLE_BASE] = NULL;
    sim_block_drop(block);
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuMemExportToShareableHandle(void *out, CUmemGenericAllocationHandle handle, int type,
                                      unsigned long long flags) {
    CUresult status = sim_enter(SIM_cuMemExportToShareableHandle);
    if (status)
        return status;
    sim_block *block = block_of(handle, &status);
    if (!block)
        return sim_leave(status);
    if (!out || flags || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || !block->exportable)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                    "the block was not created to be exported as type %d", type));
    int fd = fcntl(block->fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return sim_leave(CUDA_ERROR_OPERATING_SYSTEM);
    *(int *)out = fd;
    return sim_leave(CUDA_SUCCESS);
}

/* The importer holds memory of its own in the simulator's books: the device's total is then
 * charged once in each process. */
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *os_handle,
                                        int type) {
    CUresult status = sim_enter(SIM_cuMemImportFromShareableHandle);
    if (status)
        return status;
    struct stat info;
    int fd = (int)(intptr_t)os_handle;
    if (!handle || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || fstat(fd, &info) != 0 ||
        info.st_size <= 0)
        return sim_leave(sim_refuse(CUDA_ERROR_UNKNOWN, "%d is no descriptor of a block", fd));
    sim_block *block = sim_alloc(sizeof *block);
    *block = (sim_block){
        .bytes = (size_t)info.st_size, .fd = fcntl(fd, F_DUPFD_CLOEXEC, 0), .exportable = true};
    if (block->fd < 0) {
        free(block);
        return sim_leave(CUDA_ERROR_OPERATING_SYSTEM);
    }
    used[0] += block->bytes;
    *handle = new_handle(block);
    return sim_leave(CUDA_SUCCESS);
}

/* ---- mappings ---------------------------------------------------------------------------------- */
CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
    CUresult status = sim_enter(SIM_cuMemMap);
    if (status)
        return status;
    sim_block *block = any_block_of(handle);
    if (block && block->released)
        sim_refuse(CUDA_SUCCESS, "handle 0x%llx was released before", handle);
    else
        block = block_of(handle, &status);
    if (!block)
        return sim_leave(status);
    if (offset || flags || bytes != block->bytes)
        return sim_leave(sim_refuse(
            flags || !bytes ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_NOT_SUPPORTED,
            "offset %zu, %zu bytes, flags %llu: a handle of %zu bytes maps whole, from 0, without",
            offset, bytes, flags, block->bytes));
    sim_space *space = sim_space_find(address);
    if (!space || space->kind != SIM_SPACE_VMM || !aligned(address) ||
        bytes > space->base + space->bytes - address)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                    "0x%llx of %zu bytes is not aligned space of one reservation",
                                    address, bytes));
    size_t index = sim_space_seek(space, address);
    if (index < space->n_map && space->map[index]->base < address + bytes)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                    "0x%llx of %zu bytes overlaps the mapping at 0x%zx (%zu bytes)",
                                    address, bytes, (size_t)space->map[index]->base,
                                    space->map[index]->bytes));
    if (mmap((void *)(uintptr_t)address, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, block->fd,
             block->offset) == MAP_FAILED)
        return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    madvise((void *)(uintptr_t)address, bytes, MADV_DONTFORK);
    sim_mapping *mapping = sim_alloc(sizeof *mapping);
    *mapping = (sim_mapping){.base = address, .bytes = bytes, .block = block};
    block->n_mappings++;
    sim_space_insert(space, index, mapping);
    return sim_leave(CUDA_SUCCESS);
}

/* Where the driver is more patient than a careful program: said, and gone on with. */
static CUresult say_gap(CUdeviceptr address, size_t bytes, uintptr_t at) {
    return sim_refuse(CUDA_SUCCESS, "0x%llx of %zu bytes is not mapped from 0x%zx on", address,
                      bytes, (size_t)at);
}

/* The mappings that lie in [address, address + bytes): space and the first one's index, or NULL
 * with *status. None may be cut. A gap is refused at the begin and the end where `ends_mapped`,
 * and reported elsewhere; *gap is where the first one is. */
static sim_space *whole_mappings(CUdeviceptr address, size_t bytes, bool ends_mapped, size_t *first,
                                 uintptr_t *gap, CUresult *status) {
    sim_space *space = sim_space_find(address);
    uintptr_t end = address + bytes, at = address;
    *status = CUDA_SUCCESS;
    *gap = end;
    if (!space || space->kind != SIM_SPACE_VMM || !bytes || !aligned(address) || !aligned(bytes) ||
        (ends_mapped && bytes > space->base + space->bytes - address)) {
        *status = sim_refuse(CUDA_ERROR_INVALID_VALUE,
                             "0x%llx of %zu bytes does not lie in one reservation", address, bytes);
        return NULL;
    }
    *first = sim_space_seek(space, address);
    for (size_t i = *first; i < space->n_map && space->map[i]->base < end; i++) {
        const sim_mapping *m = space->map[i];
        if (m->base < address || m->base + m->bytes > end) {
            *status = sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                 "0x%llx of %zu bytes cuts the mapping at 0x%zx (%zu bytes)",
                                 address, bytes, (size_t)m->base, m->bytes);
            return NULL;
        }
        if (sim_vendor_here.mappings_one_by_one && i > *first) {
            *status = sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                 "0x%llx of %zu bytes takes in several mappings: one at a time",
                                 address, bytes);
            return NULL;
        }
        if (m->base > at && *gap == end)
            *gap = at;
        at = m->base + m->bytes;
    }
    if (at < end && *gap == end)
        *gap = at;
    if (*gap == end)
        return space;
    if (ends_mapped && (*gap == address || at < end)) {
        *status =
            sim_refuse(CUDA_ERROR_INVALID_VALUE, "0x%llx of %zu bytes is not mapped from 0x%zx on",
                       address, bytes, (size_t)*gap);
        return NULL;
    }
    say_gap(address, bytes, *gap);
    return space;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    CUresult status = sim_enter(SIM_cuMemUnmap);
    if (status)
        return status;
    size_t first;
    uintptr_t gap;
    sim_space *space = whole_mappings(address, bytes, false, &first, &gap, &status);
    if (!space)
        return sim_leave(status);
    for (size_t i = first; i < space->n_map && space->map[i]->base < address + bytes; i++)
        if (sim_mapping_idle(space->map[i], "cuMemUnmap"))
            break;
    if (bytes > space->base + space->bytes - address)
        bytes = space->base + space->bytes - address;
    if (mmap((void *)(uintptr_t)address, bytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED) {
        perror("vmm-sim: cuMemUnmap"); /* more mappings than the kernel allows */
        abort();
    }
    while (first < space->n_map && space->map[first]->base < address + bytes) {
        sim_block *block = space->map[first]->block;
        sim_space_erase(space, first);
        block->n_mappings--;
        sim_block_drop(block);
    }
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc *desc,
                        size_t count) {
    CUresult status = sim_enter(SIM_cuMemSetAccess);
    if (status)
        return status;
    size_t first;
    uintptr_t gap;
    sim_space *space = whole_mappings(address, bytes, true, &first, &gap, &status);
    if (!space)
        return sim_leave(status);
    for (size_t i = 0; i < count; i++)
        if (desc[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE || desc[i].location.id < 0 ||
            desc[i].location.id >= sim.n_devices ||
            (desc[i].flags != CU_MEM_ACCESS_FLAGS_PROT_NONE &&
             desc[i].flags != CU_MEM_ACCESS_FLAGS_PROT_READ &&
             desc[i].flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE))
            return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                        "entry %zu: location type %d, id %d, flags %d", i,
                                        desc[i].location.type, desc[i].location.id, desc[i].flags));
    if (!count)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "no location is given"));
    for (; first < space->n_map && space->map[first]->base < gap; first++) {
        sim_mapping *mapping = space->map[first];
        int any = 0;
        for (size_t i = 0; i < count; i++) {
            if (mapping->access[desc[i].location.id] & ~desc[i].flags)
                sim_mapping_idle(mapping, "cuMemSetAccess, taking access away,");
            mapping->access[desc[i].location.id] = desc[i].flags;
        }
        for (int i = 0; i < SIM_MAX_DEVICES; i++)
            any |= mapping->access[i];
        int protection = any & 2 ? PROT_READ | PROT_WRITE : any ? PROT_READ : PROT_NONE;
        if (mprotect((void *)mapping->base, mapping->bytes, protection) != 0) {
            perror("vmm-sim: cuMemSetAccess");
            abort();
        }
    }
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location,
                        CUdeviceptr address) {
    CUresult status = sim_enter(SIM_cuMemGetAccess);
    if (status)
        return status;
    sim_space *space = sim_space_find(address);
    size_t i = space ? sim_space_seek(space, address) : 0;
    if (!space || i == space->n_map || space->map[i]->base > address)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "0x%llx is not mapped", address));
    if (location->type != CU_MEM_LOCATION_TYPE_DEVICE || location->id < 0 ||
        location->id >= sim.n_devices)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_DEVICE, "location type %d, id %d",
                                    location->type, location->id));
    /* Of other memory than this interface's the driver says nothing. */
    bool ours = space->kind == SIM_SPACE_VMM;
    *flags = ours ? (unsigned long long)space->map[i]->access[location->id] : 0;
    return sim_leave(CUDA_SUCCESS);
}
