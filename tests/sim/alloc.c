/* alloc.c - plain device memory, pinned host memory, and questions about an address. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>

#include "sim.h"

#define HOST_MAPPING ((size_t)2 << 20) /* what pinned memory is mapped in */

static size_t pages(size_t bytes) {
    return (bytes + 4095) & ~(size_t)4095;
}

static sim_space *add_allocation(sim_space_kind kind, void *p, size_t bytes, sim_block *block) {
    sim_space *space = sim_space_add(kind, (uintptr_t)p, bytes, pages(bytes));
    sim_mapping *mapping = sim_alloc(sizeof *mapping);
    *mapping = (sim_mapping){.base = space->base, .bytes = bytes, .block = block};
    for (int i = 0; i < SIM_MAX_DEVICES; i++)
        if (!block || i == block->device)
            mapping->access[i] = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    if (block)
        block->n_mappings = 1;
    space->context = sim_current();
    sim_space_insert(space, 0, mapping);
    return space;
}

static CUresult free_allocation(sim_space_kind kind, CUdeviceptr address) {
    sim_space *space = sim_space_find(address);
    if (!space || space->kind != kind || space->base != address)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "0x%llx is not the start of an allocation",
                          address);
    /* The real driver waits for the device here, so nothing can be late. */
    sim_clock *clock = sim_context_clock(space->context);
    sim_clock_wait(clock);
    sim_observe(clock);
    free(clock);
    space = sim_space_find(address);
    if (!space || space->kind != kind || space->base != address)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "0x%llx is freed by two threads", address);
    CUresult status = sim_mapping_idle(space->map[0], sim_call_name(SIM_cuMemFree));
    sim_block *block = space->map[0]->block;
    munmap((void *)space->base, space->span);
    sim_space_erase(space, 0);
    sim_space_remove(space);
    if (block) {
        block->n_mappings = 0;
        sim_block_drop(block);
    }
    return status;
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    CUresult status = sim_enter(SIM_cuMemAlloc);
    if (status)
        return status;
    if (!address || !bytes)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "%zu bytes", bytes));
    sim_block *block = sim_block_create(sim_current()->device, bytes, false);
    if (!block)
        return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    block->released = true; /* lives by its mapping alone */
    void *p =
        mmap(NULL, pages(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, block->fd, block->offset);
    if (p == MAP_FAILED) {
        sim_block_drop(block);
        return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    }
    madvise(p, pages(bytes), MADV_DONTFORK);
    *address = add_allocation(SIM_SPACE_ALLOC, p, bytes, block)->base;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    CUresult status = sim_enter(SIM_cuMemFree);
    if (status)
        return status;
    return sim_leave(address ? free_allocation(SIM_SPACE_ALLOC, address) : CUDA_SUCCESS);
}

CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    CUresult status = sim_enter(SIM_cuMemHostAlloc);
    if (status)
        return status;
    if (!address || !bytes || flags > 7)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "%zu bytes, flags %u", bytes, flags));
    void *p = mmap(NULL, pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    add_allocation(SIM_SPACE_HOST, p, bytes, NULL);
    *address = p;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuMemFreeHost(void *address) {
    CUresult status = sim_enter(SIM_cuMemFreeHost);
    if (status)
        return status;
    return sim_leave(free_allocation(SIM_SPACE_HOST, (uintptr_t)address));
}

CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    CUresult status = sim_enter(SIM_cuMemGetInfo);
    if (status)
        return status;
    if (available)
        *available = sim.memory - sim_memory_used(sim_current()->device);
    if (total)
        *total = sim.memory;
    return sim_leave(CUDA_SUCCESS);
}

/* ---- what an address is ------------------------------------------------------------------- */
/* Does any device have access? */
static bool is_open(const sim_mapping *mapping) {
    int any = 0;
    for (int i = 0; i < SIM_MAX_DEVICES; i++)
        any |= mapping->access[i];
    return any != 0;
}

static sim_mapping *mapping_at(const sim_space *space, CUdeviceptr address) {
    size_t i = sim_space_seek(space, address);
    return i < space->n_map && space->map[i]->base <= address ? space->map[i] : NULL;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    CUresult status = sim_enter(SIM_cuMemGetAddressRange);
    if (status)
        return status;
    const sim_space *space = sim_space_find(address);
    const sim_mapping *mapping = space ? mapping_at(space, address) : NULL;
    if (!mapping || !is_open(mapping))
        return sim_leave(CUDA_ERROR_NOT_FOUND);
    if (base)
        *base = mapping->base;
    if (bytes)
        *bytes = mapping->bytes;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuPointerGetAttribute(void *out, int attribute, CUdeviceptr address) {
    CUresult status = sim_enter(SIM_cuPointerGetAttribute);
    if (status)
        return status;
    const sim_space *space = sim_space_find(address);
    /* Host memory that CUDA does not know: the usual way to find that out, no misuse. */
    if (!space)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    const sim_mapping *mapping = mapping_at(space, address);
    bool host = space->kind == SIM_SPACE_HOST;
    if (!mapping)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)out = space->context; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *(unsigned *)out = host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
        if (!is_open(mapping))
            return sim_leave(CUDA_ERROR_INVALID_VALUE);
        *(CUdeviceptr *)out = address;
        break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        if (!host)
            return sim_leave(CUDA_ERROR_INVALID_VALUE);
        *(void **)out = (void *)(uintptr_t)address;
        break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)out = 0; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        *(int *)out = host ? space->context->device : mapping->block->device;
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr *)out = space->base; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)out = space->bytes; break;
    case CU_POINTER_ATTRIBUTE_MAPPED: *(unsigned *)out = 1; break;
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE:
        *(size_t *)out =
            host ? HOST_MAPPING * ((mapping->bytes - 1) / HOST_MAPPING + 1) : mapping->bytes;
        break;
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR: *(CUdeviceptr *)out = mapping->base; break;
    default: return sim_leave(sim_refuse(CUDA_ERROR_NOT_SUPPORTED, "attribute %d", attribute));
    }
    return sim_leave(CUDA_SUCCESS);
}
