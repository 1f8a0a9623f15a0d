/* space.c - the address space: what is reserved, what is mapped, which work touches it. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "sim.h"

static sim_space **spaces; /* sorted by base */
static size_t n_spaces, spaces_capacity;

/* The index of the first space that ends behind `address`. */
static size_t seek(uintptr_t address) {
    size_t low = 0, high = n_spaces;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (spaces[middle]->base + spaces[middle]->span <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

sim_space *sim_space_find(uintptr_t address) {
    size_t i = seek(address);
    return i < n_spaces && spaces[i]->base <= address ? spaces[i] : NULL;
}

const sim_space *sim_space_at(size_t index) {
    return index < n_spaces ? spaces[index] : NULL;
}

sim_space *sim_space_add(sim_space_kind kind, uintptr_t base, size_t bytes, size_t span) {
    if (n_spaces == spaces_capacity) {
        spaces_capacity = spaces_capacity ? 2 * spaces_capacity : 64;
        spaces = sim_grow(spaces, spaces_capacity * sizeof(sim_space *));
    }
    sim_space *space = sim_alloc(sizeof *space);
    *space = (sim_space){.kind = kind, .base = base, .bytes = bytes, .span = span};
    size_t i = seek(base);
    memmove(spaces + i + 1, spaces + i, (n_spaces - i) * sizeof(sim_space *));
    spaces[i] = space;
    n_spaces++;
    return space;
}

void sim_space_remove(sim_space *space) {
    size_t i = seek(space->base);
    memmove(spaces + i, spaces + i + 1, (n_spaces - i - 1) * sizeof(sim_space *));
    n_spaces--;
    free(space->map);
    free(space);
}

size_t sim_space_seek(const sim_space *space, uintptr_t address) {
    size_t low = 0, high = space->n_map;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (space->map[middle]->base + space->map[middle]->bytes <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

void sim_space_insert(sim_space *space, size_t index, sim_mapping *mapping) {
    if (space->n_map == space->map_capacity) {
        space->map_capacity = space->map_capacity ? 2 * space->map_capacity : 8;
        space->map = sim_grow(space->map, space->map_capacity * sizeof(sim_mapping *));
    }
    memmove(space->map + index + 1, space->map + index,
            (space->n_map - index) * sizeof(sim_mapping *));
    space->map[index] = mapping;
    space->n_map++;
}

void sim_space_erase(sim_space *space, size_t index) {
    free(space->map[index]->uses);
    free(space->map[index]);
    space->n_map--;
    memmove(space->map + index, space->map + index + 1,
            (space->n_map - index) * sizeof(sim_mapping *));
}

/* ---- use by device work ------------------------------------------------------------------- */
static void note_use(sim_mapping *mapping, const sim_visit *visit) {
    for (size_t i = 0; i < mapping->n_uses; i++)
        if (mapping->uses[i].slot == visit->slot) {
            mapping->uses[i].seq = visit->seq;
            mapping->uses[i].name = visit->name;
            return;
        }
    mapping->uses = sim_grow(mapping->uses, (mapping->n_uses + 1) * sizeof(sim_use));
    mapping->uses[mapping->n_uses++] = (sim_use){visit->slot, visit->seq, visit->name};
}

bool sim_mapping_in_use(const sim_mapping *mapping) {
    for (size_t i = 0; i < mapping->n_uses; i++)
        if (!sim_observed(mapping->uses[i].slot, mapping->uses[i].seq))
            return true;
    return false;
}

CUresult sim_mapping_idle(const sim_mapping *mapping, const char *what) {
    for (size_t i = 0; i < mapping->n_uses; i++) {
        const sim_use *use = &mapping->uses[i];
        if (!sim_observed(use->slot, use->seq))
            return sim_late("%s of 0x%zx (%zu bytes) while %s number %llu of stream slot %zu, "
                            "submitted earlier, is not known to be finished: a fence is missing",
                            what, (size_t)mapping->base, mapping->bytes, use->name,
                            (unsigned long long)use->seq, use->slot);
    }
    return CUDA_SUCCESS;
}

void sim_note(const sim_visit *visit, uintptr_t address, size_t bytes) {
    const sim_space *space = sim_space_find(address);
    uintptr_t end = address + bytes;
    for (size_t i = space ? sim_space_seek(space, address) : 0;
         space && i < space->n_map && space->map[i]->base < end; i++)
        note_use(space->map[i], visit);
}

static CUresult touch_mapping(const sim_visit *visit, sim_mapping *mapping, uintptr_t address,
                              size_t bytes, bool write) {
    int access = mapping->access[visit->device];
    if (access == CU_MEM_ACCESS_FLAGS_PROT_NONE ||
        (write && access != CU_MEM_ACCESS_FLAGS_PROT_READWRITE))
        return sim_refuse(CUDA_ERROR_ILLEGAL_ADDRESS,
                          "%s %s 0x%zx (%zu bytes), mapped but %s for device %d", visit->name,
                          write ? "writes" : "reads", (size_t)address, bytes,
                          access ? "read-only" : "without access", visit->device);
    if (!visit->note)
        return CUDA_SUCCESS;
    note_use(mapping, visit);
    if (!sim.races || !mapping->block)
        return CUDA_SUCCESS;
    return sim_race_check(visit, mapping->block, address - mapping->base, bytes, write);
}

CUresult sim_touch(const sim_visit *visit, uintptr_t address, size_t bytes, bool write) {
    if (!bytes)
        return CUDA_SUCCESS;
    sim_space *space = sim_space_find(address);
    const char *verb = write ? "writes" : "reads";
    if (!space)
        return sim_refuse(CUDA_ERROR_ILLEGAL_ADDRESS,
                          "%s %s 0x%zx (%zu bytes), which is no device memory", visit->name, verb,
                          (size_t)address, bytes);
    uintptr_t end = address + bytes;
    for (size_t i = sim_space_seek(space, address); address < end; i++) {
        sim_mapping *mapping = i < space->n_map ? space->map[i] : NULL;
        if (!mapping || mapping->base > address)
            return sim_refuse(CUDA_ERROR_ILLEGAL_ADDRESS,
                              "%s %s %zu bytes up to 0x%zx, unmapped from 0x%zx on (%s 0x%zx of "
                              "%zu bytes)",
                              visit->name, verb, bytes, (size_t)end, (size_t)address,
                              space->kind == SIM_SPACE_VMM ? "reservation" : "allocation",
                              (size_t)space->base, space->bytes);
        uintptr_t stop =
            mapping->base + mapping->bytes < end ? mapping->base + mapping->bytes : end;
        CUresult status = touch_mapping(visit, mapping, address, stop - address, write);
        if (status)
            return status;
        address = stop;
    }
    return CUDA_SUCCESS;
}
