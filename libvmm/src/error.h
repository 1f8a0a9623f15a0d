/* error.h - how a failure is recorded and returned. */
#ifndef VMM_ERROR_H
#define VMM_ERROR_H

#include "vmm.h"

#define VMM_PRINTF(string, first) __attribute__((format(printf, string, first)))

/* Record a failure of our own finding (`operation` is the verb: "append") and return
 * `status`, so that callers write `return vmm_fail(...)`. */
vmm_status vmm_fail(vmm_status status, const char *operation, const char *format, ...)
    VMM_PRINTF(3, 4);

/* The same for a driver's call: `code` is the driver's own, `operation` its call's name. */
vmm_status vmm_fail_driver(vmm_status status, int code, const char *operation, const char *format,
                           ...) VMM_PRINTF(4, 5);

/* Add a sentence to the failure just recorded. */
void vmm_fail_note(const char *format, ...) VMM_PRINTF(1, 2);

/* Make `error` the thread's last failure again, after calls of others that may have failed. */
void vmm_fail_again(const vmm_error *error);

/* What fails between the two is not recorded: while undoing, the first failure is the
 * one that the caller must hear of. They nest. */
void vmm_undo_begin(void);
void vmm_undo_end(void);

/* "12.0 MiB", into a buffer of the caller's. */
typedef struct vmm_size_text {
    char text[32];
} vmm_size_text;
const char *vmm_format_bytes(size_t bytes, vmm_size_text *out);

#endif /* VMM_ERROR_H */
