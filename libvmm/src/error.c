/* error.c - the thread's last failure, and the names of statuses and calls. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local vmm_error last_error = {VMM_OK, 0, "", "no error"};
static _Thread_local int undo_depth;

static void record(vmm_status status, int code, const char *operation, const char *format,
                   va_list arguments) {
    if (undo_depth > 0)
        return;
    last_error.status = status;
    last_error.driver_code = code;
    last_error.operation = operation;
    vsnprintf(last_error.message, sizeof last_error.message, format, arguments);
}

vmm_status vmm_fail(vmm_status status, const char *operation, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record(status, 0, operation, format, arguments);
    va_end(arguments);
    return status;
}

vmm_status vmm_fail_driver(vmm_status status, int code, const char *operation, const char *format,
                           ...) {
    va_list arguments;
    va_start(arguments, format);
    record(status, code, operation, format, arguments);
    va_end(arguments);
    return status;
}

void vmm_fail_note(const char *format, ...) {
    va_list arguments;
    size_t used = strlen(last_error.message);
    if (undo_depth > 0)
        return; /* unreached: what is undone adds no note */
    va_start(arguments, format);
    vsnprintf(last_error.message + used, sizeof last_error.message - used, format, arguments);
    va_end(arguments);
}

void vmm_fail_again(const vmm_error *error) {
    last_error = *error;
}

void vmm_undo_begin(void) {
    undo_depth++;
}

void vmm_undo_end(void) {
    undo_depth--;
}

const char *vmm_format_bytes(size_t bytes, vmm_size_text *out) {
    static const char *const units[] = {"KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    int unit = -1;
    while (value >= 1024 && unit < 3) {
        value /= 1024;
        unit++;
    }
    if (unit < 0)
        snprintf(out->text, sizeof out->text, "%zu bytes", bytes);
    else
        snprintf(out->text, sizeof out->text, "%.4g %s", value, units[unit]);
    return out->text;
}

const vmm_error *vmm_last_error(void) {
    return &last_error;
}

int vmm_version(void) {
    return VMM_VERSION_MAJOR * 10000 + VMM_VERSION_MINOR * 100 + VMM_VERSION_PATCH;
}

#define STATUS_NAME(name, text) "VMM_" #name,
#define STATUS_TEXT(name, text) text,
#define CALL_NAME(name) #name,
static const char *const status_names[] = {VMM_STATUSES(STATUS_NAME)};
static const char *const status_texts[] = {VMM_STATUSES(STATUS_TEXT)};
static const char *const call_names[] = {VMM_CALLS(CALL_NAME)};

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

const char *vmm_status_name(vmm_status status) {
    return (size_t)status < COUNT(status_names) ? status_names[status] : "VMM_UNKNOWN";
}

const char *vmm_status_text(vmm_status status) {
    return (size_t)status < COUNT(status_texts) ? status_texts[status] : "an unknown status";
}

const char *vmm_call_name(vmm_call call) {
    return (size_t)call < COUNT(call_names) ? call_names[call] : NULL;
}
