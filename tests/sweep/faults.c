/* faults.c - in front of the C library, see faults.h. */
#define _GNU_SOURCE
#include "faults.h"

#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <search.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <vmm.h>

/* ---- the C library's own ------------------------------------------------------------ */

static struct {
    void *(*malloc)(size_t);
    void *(*calloc)(size_t, size_t);
    void *(*realloc)(void *, size_t);
    void (*free)(void *);
    void *(*tsearch)(const void *, void **, int (*)(const void *, const void *));
    void *(*mmap)(void *, size_t, int, int, int, off_t);
    int (*munmap)(void *, size_t);
    int (*mprotect)(void *, size_t, int);
    int (*madvise)(void *, size_t, int);
} libc;

/* dlsym() itself may allocate where it keeps an error; it does without if refused. */
static bool is_resolving;

#define RESOLVE(name) (*(void **)&libc.name = dlsym(RTLD_NEXT, #name))

static bool resolved(void) {
    if (libc.madvise)
        return true;
    if (is_resolving)
        return false;
    is_resolving = true;
    RESOLVE(malloc), RESOLVE(calloc), RESOLVE(realloc), RESOLVE(free), RESOLVE(tsearch);
    RESOLVE(mmap), RESOLVE(munmap), RESOLVE(mprotect), RESOLVE(madvise);
    is_resolving = false;
    return true;
}

/* ---- who calls ------------------------------------------------------------------------ */

static uintptr_t libvmm_begin, libvmm_end;

static int find_libvmm(struct dl_phdr_info *info, size_t size, void *symbol) {
    (void)size;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        uintptr_t begin = info->dlpi_addr + header->p_vaddr, end = begin + header->p_memsz;
        if (header->p_type == PT_LOAD && (uintptr_t)symbol >= begin && (uintptr_t)symbol < end) {
            libvmm_begin = begin;
            libvmm_end = end;
            return 1;
        }
    }
    return 0;
}

void faults_begin(void) {
    void *symbol = dlsym(RTLD_DEFAULT, "vmm_reserve");
    dl_iterate_phdr(find_libvmm, symbol);
}

#define FROM_LIBVMM()                                                                              \
    ((uintptr_t)__builtin_return_address(0) >= libvmm_begin &&                                     \
     (uintptr_t)__builtin_return_address(0) < libvmm_end)

/* ---- failing -------------------------------------------------------------------------- */

/* Everything below is guarded by it; the simulated driver's threads come here, too. */
static bool lock;
static struct {
    bool is_armed;
    fault_kind kind;
    long nth, calls;
    int code, times;
    const char *failed;
} rule;

static void enter(void) {
    while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE))
        ;
}

static void leave(void) {
    __atomic_clear(&lock, __ATOMIC_RELEASE);
}

void faults_arm(fault_kind kind, long nth, int code, int times) {
    enter();
    memset(&rule, 0, sizeof rule);
    rule.is_armed = true;
    rule.kind = kind;
    rule.nth = nth, rule.code = code, rule.times = times;
    leave();
}

void faults_disarm(void) {
    enter();
    rule.is_armed = false;
    leave();
}

long faults_calls(void) {
    return rule.calls;
}

const char *faults_failed_call(void) {
    return rule.failed;
}

/* Must this call fail? Then errno is set. */
static bool fails(fault_kind kind, const char *name) {
    enter();
    bool failed = false;
    if (rule.is_armed && rule.kind == kind) {
        rule.calls++;
        failed = rule.nth && rule.calls >= rule.nth &&
                 (rule.times < 0 || rule.calls < rule.nth + rule.times);
    }
    if (failed && !rule.failed)
        rule.failed = name;
    leave();
    if (failed)
        errno = rule.code;
    return failed;
}

/* ---- what libvmm holds ------------------------------------------------------------------ */

/* A set of addresses: blocks of malloc, or pages that can be written. */
#define SET_ENTRIES ((size_t)1 << 16)
#define GONE ((uintptr_t)1)
typedef struct address_set {
    uintptr_t entries[SET_ENTRIES];
    size_t count;
} address_set;

static address_set blocks, pages;
static size_t reserved_bytes;
#define PAGE_BYTES ((size_t)4096)

static uintptr_t *find(address_set *set, uintptr_t address) {
    uintptr_t *spare = NULL;
    for (size_t i = (address >> 4) * 0x9E3779B97F4A7C15u >> 48;; i = (i + 1) % SET_ENTRIES) {
        uintptr_t *entry = &set->entries[i];
        if (*entry == address)
            return entry;
        if (*entry == GONE && !spare)
            spare = entry;
        if (!*entry)
            return spare ? spare : entry;
    }
}

static void put(address_set *set, uintptr_t address) {
    uintptr_t *entry = find(set, address);
    set->count += *entry != address;
    *entry = address;
}

static bool take(address_set *set, uintptr_t address) {
    uintptr_t *entry = find(set, address);
    if (*entry != address)
        return false;
    *entry = GONE;
    /* A run of what is gone, at whose end nothing is, need not be searched any more. */
    for (size_t i = (size_t)(entry - set->entries);
         !set->entries[(i + 1) % SET_ENTRIES] && set->entries[i] == GONE;
         i = (i + SET_ENTRIES - 1) % SET_ENTRIES)
        set->entries[i] = 0;
    set->count--;
    return true;
}

static void open_pages(void *address, size_t bytes, bool are_open) {
    for (size_t at = 0; at < bytes && (are_open || pages.count); at += PAGE_BYTES) {
        if (are_open)
            put(&pages, (uintptr_t)address + at);
        else
            take(&pages, (uintptr_t)address + at);
    }
}

long faults_live_blocks(void) {
    return (long)blocks.count;
}

size_t faults_reserved_bytes(void) {
    return reserved_bytes;
}

size_t faults_open_bytes(void) {
    return pages.count * PAGE_BYTES;
}

/* ---- in front of the C library ------------------------------------------------------------ */

/* A sanitizer stands there itself, before anyone could ask for the next in line: under one only
 * the simulated driver fails, and these are called by no one. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define IN_FRONT(name) faults_##name
#define IS_IN_FRONT false
#else
#define IN_FRONT(name) name
#define IS_IN_FRONT true
#endif

bool faults_possible(void) {
    return IS_IN_FRONT;
}

static void *noted(void *block) {
    enter();
    if (block)
        put(&blocks, (uintptr_t)block);
    leave();
    return block;
}

void *IN_FRONT(malloc)(size_t bytes) {
    if (!resolved())
        return NULL;
    if (!FROM_LIBVMM())
        return libc.malloc(bytes);
    return fails(FAULT_ALLOCATION, "malloc") ? NULL : noted(libc.malloc(bytes));
}

void *IN_FRONT(calloc)(size_t count, size_t bytes) {
    if (!resolved())
        return NULL;
    if (!FROM_LIBVMM())
        return libc.calloc(count, bytes);
    return fails(FAULT_ALLOCATION, "calloc") ? NULL : noted(libc.calloc(count, bytes));
}

void *IN_FRONT(realloc)(void *old, size_t bytes) {
    if (!resolved())
        return NULL;
    if (!FROM_LIBVMM())
        return libc.realloc(old, bytes);
    if (fails(FAULT_ALLOCATION, "realloc"))
        return NULL;
    enter();
    bool was_known = old && take(&blocks, (uintptr_t)old);
    leave();
    void *block = libc.realloc(old, bytes);
    if (!block && was_known)
        noted(old);
    return noted(block);
}

void IN_FRONT(free)(void *block) {
    if (!block || !resolved())
        return;
    /* Whoever it is: libvmm's last act in a function is a jump, and we return to its caller. */
    enter();
    take(&blocks, (uintptr_t)block);
    leave();
    libc.free(block);
}

/* It allocates by itself. A node begins where its block does. */
void *IN_FRONT(tsearch)(const void *key, void **root, int (*compare)(const void *, const void *)) {
    resolved();
    if (!FROM_LIBVMM())
        return libc.tsearch(key, root, compare);
    return fails(FAULT_ALLOCATION, "tsearch") ? NULL : noted(libc.tsearch(key, root, compare));
}

void *IN_FRONT(mmap)(void *address, size_t bytes, int protection, int flags, int file,
                     off_t offset) {
    resolved();
    bool ours = FROM_LIBVMM();
    if (ours && fails(FAULT_SYSTEM, "mmap"))
        return MAP_FAILED;
    void *mapped = libc.mmap(address, bytes, protection, flags, file, offset);
    if (ours && mapped != MAP_FAILED) {
        enter();
        reserved_bytes += bytes;
        leave();
    }
    return mapped;
}

int IN_FRONT(munmap)(void *address, size_t bytes) {
    resolved();
    bool ours = FROM_LIBVMM();
    if (ours && fails(FAULT_SYSTEM, "munmap"))
        return -1;
    int status = libc.munmap(address, bytes);
    if (ours && !status) {
        enter();
        reserved_bytes -= bytes;
        open_pages(address, bytes, false);
        leave();
    }
    return status;
}

int IN_FRONT(mprotect)(void *address, size_t bytes, int protection) {
    resolved();
    bool ours = FROM_LIBVMM();
    if (ours && fails(FAULT_SYSTEM, "mprotect"))
        return -1;
    int status = libc.mprotect(address, bytes, protection);
    if (ours && !status) {
        enter();
        open_pages(address, bytes, protection != PROT_NONE);
        leave();
    }
    return status;
}

int IN_FRONT(madvise)(void *address, size_t bytes, int advice) {
    resolved();
    if (FROM_LIBVMM() && fails(FAULT_SYSTEM, "madvise"))
        return -1;
    return libc.madvise(address, bytes, advice);
}
