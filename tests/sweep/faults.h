/* faults.h - calls that libvmm makes to the C library, counted and made to fail.
 *
 * The sweep program defines malloc, calloc, realloc, free, tsearch and mmap, munmap, mprotect,
 * madvise itself, so that libvmm.so finds them before the C library's. A call whose return address lies
 * within libvmm.so is counted, and may fail; those of everyone else (the simulated driver, the
 * program, the C library) go straight through. Nothing of this is known to libvmm.
 */
#ifndef FAULTS_H
#define FAULTS_H

#include <stdbool.h>
#include <stddef.h>

typedef enum fault_kind {
    FAULT_DRIVER,     /* the simulated driver's, not ours: vmm_sim_fail() */
    FAULT_SYSTEM,     /* mmap, munmap, mprotect, madvise */
    FAULT_ALLOCATION, /* malloc, calloc, realloc, tsearch */
    FAULT_KINDS
} fault_kind;

/* Not under a sanitizer: there only the simulated driver fails. */
bool faults_possible(void);

/* Find libvmm.so among what is loaded. Calls before this are not counted. */
void faults_begin(void);

/* From now on the `nth` call of that kind and `times - 1` after it fail with errno `code`, all
 * that follow if `times` < 0. `nth` 0 only counts. */
void faults_arm(fault_kind kind, long nth, int code, int times);
void faults_disarm(void);

/* Since faults_arm(): calls of its kind, and the name of the first that failed, or NULL. */
long faults_calls(void);
const char *faults_failed_call(void);

/* What libvmm has and has not given back: blocks of malloc, bytes of address space, and bytes
 * of those that can be written. */
long faults_live_blocks(void);
size_t faults_reserved_bytes(void);
size_t faults_open_bytes(void);

#endif /* FAULTS_H */
