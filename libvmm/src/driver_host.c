/* driver_host.c - the host's memory behind the driver table.
 *
 * A reservation is an anonymous mapping without access. A block has no existence of its
 * own: opening it (set_access) populates its part of the reservation there and then, so that
 * running out of memory is an error of the growth and never a signal on first touch. Not map,
 * which comes once for each block: all that a growth adds to a lane is opened in one call, and
 * gets huge pages where it holds whole ones, whatever the size of its blocks.
 * Reservations are kept out of forked children and ask for huge pages, which make the first
 * touch three to five times cheaper.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "driver.h"
#include "error.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; the libc's header may be older */
#endif

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif

#define HUGE_PAGE_BYTES ((size_t)2 << 20)
/* From this size on, ask how much memory there is before populating: the kernel would
 * rather kill a process than fail a page fault. Below, the question costs more than it
 * saves. */
#define CHECKED_BYTES ((size_t)16 << 20)

static vmm_status fail(const char *call, int code, size_t bytes) {
    vmm_size_text size;
    vmm_status status = code == ENOMEM || code == EAGAIN ? VMM_ERR_OUT_OF_MEMORY : VMM_ERR_DRIVER;
    return vmm_fail_driver(status, code, call, "[%s][%s] for %s of host memory", call,
                           strerror(code), vmm_format_bytes(bytes, &size));
}

/* Addresses, not memory, whatever the code: giving memory back would not help. */
static vmm_status fail_reserve(const char *call, int code, size_t bytes) {
    vmm_size_text size;
    return vmm_fail_driver(VMM_ERR_DRIVER, code, call,
                           "[%s][%s]: %s of addresses were refused, ask for a smaller capacity",
                           call, strerror(code), vmm_format_bytes(bytes, &size));
}

static vmm_status host_open(int index, void **state) {
    (void)index;
    *state = NULL;
    return VMM_OK;
}

static void host_close(void *state) {
    (void)state;
}

/* The value of a "Name:   123 kB" line of /proc/meminfo, in bytes; `fallback` without it. */
static size_t meminfo(const char *name, size_t fallback) {
    char line[128];
    size_t value = fallback, length = strlen(name);
    FILE *file = fopen("/proc/meminfo", "re");
    if (!file)
        return fallback; /* GCOVR_EXCL_LINE: every machine of ours has /proc */
    while (fgets(line, sizeof line, file)) {
        if (strncmp(line, name, length) == 0 && line[length] == ':') {
            value = (size_t)strtoull(line + length + 1, NULL, 10) * 1024;
            break;
        }
    }
    fclose(file);
    return value;
}

static vmm_status host_query(void *state, vmm_device_info *out) {
    (void)state;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t total = (size_t)sysconf(_SC_PHYS_PAGES) * page;
    out->granularity_bytes = page;
    out->recommended_bytes = HUGE_PAGE_BYTES;
    out->total_bytes = total;
    out->free_bytes = meminfo("MemAvailable", total);
    snprintf(out->description, sizeof out->description, "host memory");
    snprintf(out->kernel, sizeof out->kernel, "memcpy");
    return VMM_OK;
}

/* Addresses that the kernel would not take back (it may have to split a mapping, and there is
 * a limit to how many there are): no memory lies behind them. The next reservation tries
 * again. */
static struct {
    pthread_mutex_t lock;
    struct {
        char *address;
        size_t bytes;
    } ranges[16];
} kept = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void after_fork_in_child(void) {
    pthread_mutex_init(&kept.lock, NULL);
    memset(kept.ranges, 0, sizeof kept.ranges); /* kept out of the child or not, they stay */
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

/* Give back what is kept, then these; with 0 bytes what is kept alone. */
static void give_back(char *address, size_t bytes) {
    pthread_mutex_lock(&kept.lock);
    for (size_t i = 0; i < sizeof kept.ranges / sizeof kept.ranges[0]; i++) {
        if (kept.ranges[i].bytes && munmap(kept.ranges[i].address, kept.ranges[i].bytes) == 0)
            kept.ranges[i].bytes = 0;
        if (kept.ranges[i].bytes || !bytes)
            continue;
        if (munmap(address, bytes)) {
            kept.ranges[i].address = address;
            kept.ranges[i].bytes = bytes;
        }
        bytes = 0;
    }
    pthread_mutex_unlock(&kept.lock);
}

static vmm_status host_reserve(void *state, size_t bytes, size_t alignment, uintptr_t *out) {
    (void)state;
    if (bytes >= HUGE_PAGE_BYTES && alignment < HUGE_PAGE_BYTES)
        alignment = HUGE_PAGE_BYTES;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t spare = alignment > page ? alignment - page : 0;
    if (bytes > SIZE_MAX - spare)
        return fail_reserve("mmap", ENOMEM, bytes); /* GCOVR_EXCL_LINE: range.c refuses it before */
    char *address =
        mmap(NULL, bytes + spare, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED)
        return fail_reserve("mmap", errno, bytes);
    size_t before = spare ? (alignment - (uintptr_t)address % alignment) % alignment : 0;
    give_back(address, before);
    give_back(address + before + bytes, spare - before);
    address += before;
    if (madvise(address, bytes, MADV_DONTFORK)) {
        int code = errno;
        give_back(address, bytes);
        return fail_reserve("madvise", code, bytes);
    }
    madvise(address, bytes, MADV_HUGEPAGE); /* a wish: kernels without huge pages say no */
    *out = (uintptr_t)address;
    return VMM_OK;
}

static vmm_status host_free(void *state, uintptr_t base, size_t bytes) {
    (void)state;
    return munmap((void *)base, bytes) ? fail("munmap", errno, bytes) : VMM_OK;
}

static vmm_status host_create(void *state, size_t bytes, driver_handle *out) {
    (void)state, (void)bytes;
    *out = 1;
    return VMM_OK;
}

static vmm_status host_release(void *state, driver_handle handle, size_t bytes) {
    (void)state, (void)handle, (void)bytes;
    return VMM_OK;
}

/* Let the pages go. Under mlockall() they are locked, which takes another call to ignore;
 * returns 0 or errno. */
static int drop_pages(void *address, size_t bytes) {
    if (madvise(address, bytes, MADV_DONTNEED) == 0)
        return 0;
    if (errno != EINVAL)
        return errno;
    if (madvise(address, bytes, MADV_DONTNEED_LOCKED) == 0)
        return 0;
    /* GCOVR_EXCL_START: takes a kernel before 5.18 */
    munlock(address, bytes);
    return madvise(address, bytes, MADV_DONTNEED) ? errno : 0;
    /* GCOVR_EXCL_STOP */
}

/* Take the pages now. Kernels before 5.14 have no such call; there each page is touched. */
static int populate(char *address, size_t bytes) {
    int code;
    do
        code = madvise(address, bytes, MADV_POPULATE_WRITE) ? errno : 0;
    while (code == EAGAIN || code == EINTR);
    if (code == EINVAL) { /* GCOVR_EXCL_START: takes a kernel before 5.14 */
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        for (size_t at = 0; at < bytes; at += page)
            *(volatile char *)(address + at) = 0;
        return 0;
    } /* GCOVR_EXCL_STOP */
    return code == EFAULT ? ENOMEM : code;
}

static vmm_status host_map(void *state, uintptr_t address, size_t bytes, driver_handle handle) {
    (void)state, (void)address, (void)bytes, (void)handle;
    return VMM_OK;
}

/* What fails half-way may stay open, until its blocks are unmapped. */
static vmm_status host_set_access(void *state, uintptr_t address, size_t bytes) {
    (void)state;
    char *start = (char *)address;
    if (bytes >= CHECKED_BYTES && bytes > meminfo("MemAvailable", SIZE_MAX))
        return fail("mmap", ENOMEM, bytes); /* unreached: more than the machine has */
    if (mprotect(start, bytes, PROT_READ | PROT_WRITE))
        return fail("mprotect", errno, bytes);
    int code = populate(start, bytes);
    return code ? fail("madvise", code, bytes) : VMM_OK;
}

static vmm_status host_unmap(void *state, uintptr_t address, size_t bytes) {
    (void)state;
    /* Access first: if the kernel refuses (it may have to split a mapping), nothing has
     * changed yet. */
    if (mprotect((void *)address, bytes, PROT_NONE))
        return fail("mprotect", errno, bytes);
    int code = drop_pages((void *)address, bytes);
    if (code) {
        mprotect((void *)address, bytes, PROT_READ | PROT_WRITE);
        return fail("madvise", code, bytes);
    }
    return VMM_OK;
}

static vmm_status host_fill(void *state, uintptr_t dst, size_t bytes, vmm_stream stream) {
    (void)state, (void)stream;
    memset((void *)dst, 0, bytes);
    return VMM_OK;
}

const driver_ops driver_host_ops = {
    .kind = VMM_DEVICE_HOST,
    .is_async = false,
    .device_name = "host",
    .open = host_open,
    .close = host_close,
    .query = host_query,
    .reserve = host_reserve,
    .free = host_free,
    .create = host_create,
    .release = host_release,
    .map = host_map,
    .unmap = host_unmap,
    .set_access = host_set_access,
    .fill = host_fill,
};
