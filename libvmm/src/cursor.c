/* cursor.c - the lengths of a tensor where its device reads them. */
#include "cursor.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "process.h"

static bool on_device(const vmm_tensor *tensor) {
    return tensor->pool->device->ops->is_async;
}

/* ---- making it ------------------------------------------------------------------------ */

/* The control block as it is in device memory: nothing is mapped as far as it knows, for what
 * is may still be taken back by the call that is under way. */
static vmm_status write_control(vmm_tensor *tensor, tensor_cursor *cursor) {
    size_t n = cursor->n_entries, bytes = VMM_CURSOR_BYTES(n);
    char *image = memset(cursor->control->mirror, 0, bytes);
    uint32_t shown = (uint32_t)tensor->length;
    memcpy(image + VMM_CURSOR_WORDS(n), &shown, sizeof shown);
    for (size_t i = 0; i < n; i++) {
        uint32_t length = (uint32_t)lanes_length(tensor, i), behind = shown - length;
        memcpy(image + i * sizeof length, &length, sizeof length);
        memcpy(image + VMM_CURSOR_STATE(n) + 8 * i, &length, sizeof length);
        memcpy(image + VMM_CURSOR_BEHIND(n) + i * sizeof behind, &behind, sizeof behind);
    }
    vmm_status status =
        DRIVER(tensor->pool, tensor->driver_calls, write, cursor->control->address, image, bytes);
    cursor->shown_mapped = shown;
    return status;
}

vmm_status cursor_make(vmm_tensor *tensor) {
    if (tensor->cursor)
        return VMM_OK;
    if (tensor->spec.capacity > INT32_MAX)
        return vmm_fail(VMM_ERR_OVERFLOW, "cursor",
                        "a capacity of %zu rows does not fit the 32 bits of a cursor: reserve at "
                        "most %d rows",
                        tensor->spec.capacity, INT32_MAX);
    size_t n = vmm_length_count(tensor);
    if (n > VMM_CURSOR_MAX_ENTRIES)
        return vmm_fail(VMM_ERR_UNSUPPORTED, "cursor",
                        "a cursor of %zu entries: at most %d are possible", n,
                        VMM_CURSOR_MAX_ENTRIES);
    tensor_cursor *cursor = calloc(1, sizeof *cursor + 2 * n * sizeof(size_t));
    if (!cursor)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "cursor", "no host memory left");
    cursor->n_entries = n;
    cursor->next = (size_t *)(cursor + 1);
    cursor->before = cursor->next + n;
    vmm_status status = VMM_OK;
    if (on_device(tensor)) {
        status =
            control_take(tensor->pool, tensor->driver_calls, VMM_CURSOR_BYTES(n), &cursor->control);
        if (!status) {
            cursor->values = (int32_t *)cursor->control->address;
            status = write_control(tensor, cursor);
            if (status)
                control_put(cursor->control); /* the write may yet arrive */
        }
    } else {
        cursor->values = malloc(n * sizeof *cursor->values);
        for (size_t i = 0; cursor->values && i < n; i++)
            cursor->values[i] = (int32_t)lanes_length(tensor, i);
        if (!cursor->values)
            status = vmm_fail(VMM_ERR_OUT_OF_MEMORY, "cursor", "no host memory left");
    }
    if (status) {
        free(cursor);
        return status;
    }
    tensor->cursor = cursor;
    return VMM_OK;
}

void cursor_free(vmm_tensor *tensor) {
    tensor_cursor *cursor = tensor->cursor;
    if (!cursor)
        return;
    if (cursor->control)
        control_put(cursor->control);
    else
        free(cursor->values);
    free(cursor);
}

size_t cursor_graph_count(const vmm_tensor *tensor) {
    return tensor->cursor ? __atomic_load_n(&tensor->cursor->graphs, __ATOMIC_ACQUIRE) : 0;
}

/* ---- keeping it current ----------------------------------------------------------------- */

static vmm_status launch_sets(vmm_tensor *tensor, vmm_cursor_set_args *args, vmm_stream stream,
                              const char *operation) {
    bool captured = false;
    if (args->n_sets == 0)
        return VMM_OK;
    pool_count(tensor->pool, tensor->driver_calls, VMM_CALL_launch);
    const vmm_device *device = tensor->pool->device;
    vmm_status status = device->ops->set_cursor(device->state, args, stream, &captured);
    args->n_sets = 0;
    if (!status && captured)
        status = vmm_fail(VMM_ERR_CAPTURING, operation,
                          "the tensor has a cursor, and the stream that has to set it is being "
                          "captured: a graph would set it again at each replay");
    return status;
}

void cursor_extend_next(vmm_tensor *tensor, const lane_list *list, size_t n_rows) {
    tensor_cursor *cursor = tensor->cursor;
    for (size_t i = 0; i < cursor->n_entries; i++)
        cursor->next[i] = lanes_length(tensor, i);
    for (size_t i = 0, n = list ? list->n : cursor->n_entries; i < n; i++)
        cursor->next[lane_at(list, i)] += lane_count(list, i, n_rows);
    cursor->has_next = true;
}

/* Entries that are the same are set as one. */
static vmm_status set_entries(vmm_tensor *tensor, vmm_cursor_set_args *args, vmm_stream stream,
                              const char *operation) {
    const tensor_cursor *cursor = tensor->cursor;
    size_t n = cursor->n_entries, longest = 0;
    vmm_status status = VMM_OK;
    for (size_t i = 0; i < n; i++)
        longest = cursor->next[i] > longest ? cursor->next[i] : longest;
    for (size_t first = 0, end; first < n && !status; first = end) {
        for (end = first + 1; end < n && cursor->next[end] == cursor->next[first];)
            end++;
        if (args->n_sets == VMM_CURSOR_SETS)
            status = launch_sets(tensor, args, stream, operation);
        args->set[args->n_sets++] = (vmm_cursor_set){
            .control = cursor->control->address,
            .n_entries = (uint32_t)n,
            .first = (uint32_t)first,
            .count = (uint32_t)(end - first),
            .length = (uint32_t)cursor->next[first],
            .behind = (uint32_t)(longest - cursor->next[first]),
        };
    }
    return status;
}

vmm_status cursor_set(size_t n_tensors, vmm_tensor *const *tensors, vmm_stream stream,
                      const char *operation) {
    vmm_cursor_set_args args;
    vmm_status status = VMM_OK;
    args.n_sets = 0;
    for (size_t i = 0; i < n_tensors && !status; i++) {
        tensor_cursor *cursor = tensors[i]->cursor;
        if (!cursor || !cursor->has_next)
            continue;
        if (cursor->control) {
            status = set_entries(tensors[i], &args, stream, operation);
            continue;
        }
        for (size_t entry = 0; entry < cursor->n_entries; entry++)
            __atomic_store_n(&cursor->values[entry], (int32_t)cursor->next[entry],
                             __ATOMIC_RELAXED);
    }
    if (!status)
        status = launch_sets(tensors[0], &args, stream, operation);
    for (size_t i = 0; i < n_tensors; i++) {
        tensor_cursor *cursor = tensors[i]->cursor;
        if (cursor && cursor->has_next) {
            /* Refused for a capture, nothing has been launched, and it is what it was. */
            if (cursor->control && status != VMM_ERR_CAPTURING)
                cursor->stale = status;
            cursor->has_next = false;
        }
    }
    return status;
}

/* The cursor becomes what is next for it, as a write to the tensor. One that has failed may have
 * been submitted in part, unless it was refused for a capture. */
static vmm_status write_cursor(vmm_tensor *tensor, vmm_stream stream, const char *operation) {
    vmm_status status = cursor_set(1, &tensor, stream, operation);
    if (status != VMM_ERR_CAPTURING && on_device(tensor))
        order_after_write(tensor, stream);
    return status;
}

vmm_status cursor_grow(vmm_tensor *tensor, size_t n_rows, vmm_stream stream) {
    if (!tensor->cursor)
        return VMM_OK;
    cursor_extend_next(tensor, NULL, n_rows);
    return write_cursor(tensor, stream, "grow");
}

vmm_status cursor_before_truncate(vmm_tensor *tensor, vmm_stream *stream) {
    tensor_cursor *cursor = tensor->cursor;
    if (!cursor)
        return VMM_OK;
    if (*stream == VMM_STREAM_NONE)
        *stream = order_write_stream(tensor);
    for (size_t i = 0; i < cursor->n_entries; i++)
        cursor->before[i] = lanes_length(tensor, i);
    vmm_status status = order_before_write(tensor, *stream);
    return status ? status : cursor_settle(tensor, *stream);
}

vmm_status cursor_truncate(vmm_tensor *tensor, vmm_stream stream) {
    tensor_cursor *cursor = tensor->cursor;
    if (!cursor)
        return VMM_OK;
    cursor_extend_next(tensor, NULL, 0);
    vmm_status status = write_cursor(tensor, stream, "truncate");
    if (status) {
        const lane_list all = {cursor->n_entries, NULL, cursor->before};
        lanes_set(tensor, &all);
    } else if (cursor->control) {
        /* Replays that have not appended are given up like those that have. */
        __atomic_store_n(cursor->control->flag, 0, __ATOMIC_RELAXED);
    }
    return status;
}

vmm_status cursor_show_mapped(vmm_tensor *tensor, size_t n_rows) {
    tensor_cursor *cursor = tensor->cursor;
    if (!cursor || !cursor->control || cursor->shown_mapped == n_rows)
        return VMM_OK;
    size_t at = VMM_CURSOR_WORDS(cursor->n_entries);
    uint32_t *word = (uint32_t *)(cursor->control->mirror + at);
    __atomic_store_n(word, (uint32_t)n_rows, __ATOMIC_RELAXED); /* an earlier copy may be late */
    vmm_status status = DRIVER(tensor->pool, tensor->driver_calls, write,
                               cursor->control->address + at, word, sizeof *word);
    cursor->shown_mapped = status ? SIZE_MAX : n_rows; /* it may have arrived, or not */
    return status;
}

void cursor_show_growth(vmm_tensor *tensor) {
    vmm_undo_begin();
    cursor_show_mapped(tensor, tensor->mapped);
    vmm_undo_end();
}

/* ---- following graphs ---------------------------------------------------------------------- */

vmm_status cursor_settle(vmm_tensor *tensor, vmm_stream stream) {
    if (!tensor->cursor || !tensor->cursor->may_differ)
        return VMM_OK;
    return pool_wait(tensor->pool, tensor->driver_calls, stream);
}

/* What is said of a cursor that could not be set, where it is elsewhere. */
static vmm_status fail_stale(const vmm_tensor *tensor, const char *operation, long long ahead) {
    if (ahead <= 0)
        return vmm_fail(VMM_ERR_BUSY, operation,
                        "setting the cursor has failed: truncate(%zu) sets it anew",
                        tensor->length);
    return vmm_fail(VMM_ERR_BUSY, operation,
                    "setting the cursor has failed, and it is %lld row(s) ahead of the host: "
                    "advance(%lld) if graphs have appended so many since, else truncate(%zu)",
                    ahead, ahead, tensor->length);
}

/* The device is at rest: does it have the host's lengths, and `n_rows` more of each? */
static vmm_status compare(vmm_tensor *tensor, size_t n_rows, const char *operation) {
    tensor_cursor *cursor = tensor->cursor;
    size_t n = cursor->n_entries;
    /* Asked first: a graph that goes meanwhile is looked at by the next call. */
    bool is_last = cursor_graph_count(tensor) == 0;
    int32_t *values = (int32_t *)cursor->control->mirror;
    vmm_status status = DRIVER(tensor->pool, tensor->driver_calls, read, values,
                               cursor->control->address, n * sizeof *values);
    for (size_t i = 0; i < n && !status; i++) {
        long long ahead = (long long)values[i] - (long long)lanes_length(tensor, i);
        if (ahead == (long long)n_rows)
            continue;
        if (cursor->stale)
            status = fail_stale(tensor, operation, ahead);
        else if (ahead > 0)
            status = vmm_fail(VMM_ERR_BUSY, operation,
                              "a graph has appended %lld row(s) that the host has not followed: "
                              "call advance(%lld) first, or truncate(%zu) to give them up",
                              ahead, ahead, tensor->length);
        else
            status = vmm_fail(VMM_ERR_BUSY, operation,
                              "advance() was told %lld row(s) more than graphs have appended: "
                              "truncate(%lld) first",
                              -ahead, (long long)values[i]);
    }
    if (!status && is_last)
        cursor->may_differ = false;
    return status;
}

vmm_status cursor_check(size_t n_tensors, vmm_tensor *const *tensors, vmm_stream stream,
                        const char *operation) {
    bool waited = false;
    vmm_status status = VMM_OK;
    for (size_t i = 0; i < n_tensors && !status; i++) {
        const tensor_cursor *cursor = tensors[i]->cursor;
        if (!cursor || !cursor->may_differ)
            continue;
        if (!waited)
            status = cursor_settle(tensors[i], stream);
        waited = true;
        if (!status)
            status = compare(tensors[i], 0, operation);
    }
    return status;
}

/* Setting it has failed; the lengths are the host's again, or still. */
static vmm_status set_anew(vmm_tensor *tensor, const char *operation) {
    cursor_extend_next(tensor, NULL, 0);
    return write_cursor(tensor, order_write_stream(tensor), operation);
}

/* ---- public ------------------------------------------------------------------------------ */

vmm_status vmm_cursor(vmm_tensor *tensor, vmm_stream stream, int32_t **out) {
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, "cursor", "out is NULL");
    *out = NULL;
    vmm_status status = tensor_check(tensor, "cursor");
    if (!status && stream != VMM_STREAM_NONE)
        status = order_check_stream(tensor, &stream, "cursor");
    if (!status)
        status = cursor_make(tensor);
    if (!status)
        status = cursor_show_mapped(tensor, tensor->mapped);
    if (!status && tensor->cursor->stale) {
        status = cursor_check(1, &tensor, order_write_stream(tensor), "cursor");
        if (!status)
            status = set_anew(tensor, "cursor");
    }
    if (!status && stream != VMM_STREAM_NONE)
        status = order_before_write(tensor, stream);
    if (!status)
        *out = tensor->cursor->values;
    return status;
}

int vmm_has_cursor(const vmm_tensor *tensor) {
    return tensor->cursor != NULL;
}

/* Setting it has failed, and graphs append: where they began is not known. */
int vmm_advance_waits(const vmm_tensor *tensor) {
    return tensor->cursor && tensor->cursor->stale && tensor->cursor->may_differ;
}

vmm_status vmm_advance(vmm_tensor *tensor, size_t n_rows) {
    vmm_status status = tensor_check(tensor, "advance");
    if (status)
        return status;
    tensor_cursor *cursor = tensor->cursor;
    if (!cursor || !cursor->is_captured)
        return vmm_fail(VMM_ERR_INVALID, "advance",
                        "no graph has been captured that appends to this tensor: append() and "
                        "grow() count their rows themselves");
    if (n_rows > tensor->mapped - tensor->length)
        return vmm_fail(VMM_ERR_CAPACITY, "advance",
                        "overflow: %zu row(s) after %zu are more than the %zu that are mapped, so "
                        "the replay has not written them: map(%zu) before the replay",
                        n_rows, tensor->length, tensor->mapped, tensor->length + n_rows);
    bool uncertain = vmm_advance_waits(tensor);
    if (uncertain)
        status = cursor_settle(tensor, order_write_stream(tensor));
    if (status)
        return status;
    if (__atomic_load_n(cursor->control->flag, __ATOMIC_ACQUIRE)) {
        __atomic_store_n(cursor->control->flag, 0, __ATOMIC_RELAXED);
        return vmm_fail(VMM_ERR_CAPACITY, "advance",
                        "overflow: a replay came to the end of the rows that were mapped and has "
                        "not appended: map() before the replay, and replay again");
    }
    if (uncertain)
        status = compare(tensor, n_rows, "advance");
    if (status)
        return status;
    if (tensor->is_ragged)
        lanes_extend(tensor, NULL, n_rows);
    else
        tensor_set_length(tensor, tensor->length + n_rows);
    if (uncertain) {
        vmm_undo_begin(); /* else it stays uncertain */
        set_anew(tensor, "advance");
        vmm_undo_end();
    }
    return VMM_OK;
}
