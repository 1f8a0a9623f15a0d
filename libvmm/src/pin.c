/* pin.c - pins: who still looks at a tensor's rows, and what keeps its memory alive. */
#include <stdlib.h>

#include "cursor.h"
#include "error.h"
#include "process.h"

static vmm_status make_pin(vmm_tensor *tensor, const char *operation, vmm_pin **out) {
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, operation, "out is NULL");
    *out = NULL;
    if (!tensor)
        return vmm_fail(VMM_ERR_INVALID, operation, "tensor is NULL");
    if (tensor->process != vmm_process)
        return vmm_fail(VMM_ERR_FORKED, operation, "the tensor belongs to the parent process");
    vmm_pin *pin = calloc(1, sizeof *pin);
    if (!pin)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, operation, "no host memory left");
    pin->tensor = tensor;
    *out = pin;
    return VMM_OK;
}

vmm_status vmm_pin_rows(vmm_tensor *tensor, size_t n_rows, vmm_pin **out) {
    vmm_status status = make_pin(tensor, "pin_rows", out);
    if (status)
        return status;
    vmm_pin *pin = *out;
    pin->shows_rows = true;
    pin->n_rows = n_rows;
    pthread_mutex_lock(&tensor->pin_lock);
    size_t length = vmm_length(tensor);
    if (n_rows <= length) {
        if (!tensor->pins)
            tensor->shown_rows = 0;
        pin->next = tensor->pins;
        if (pin->next)
            pin->next->previous = pin;
        tensor->pins = pin;
        __atomic_fetch_add(&tensor->references, 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&tensor->pin_lock);
    if (n_rows > length) {
        free(pin);
        *out = NULL;
        return vmm_fail(VMM_ERR_INVALID, "pin_rows", "%zu rows are more than the length, %zu",
                        n_rows, length);
    }
    return VMM_OK;
}

vmm_status vmm_pin_cursor(vmm_tensor *tensor, vmm_pin **out) {
    vmm_status status = make_pin(tensor, "pin_cursor", out);
    if (!status)
        __atomic_fetch_add(&tensor->references, 1, __ATOMIC_RELAXED);
    return status;
}

static void unlink_pin(vmm_tensor *tensor, vmm_pin *pin) {
    pthread_mutex_lock(&tensor->pin_lock);
    if (pin->next)
        pin->next->previous = pin->previous;
    if (pin->previous)
        pin->previous->next = pin->next;
    else
        tensor->pins = pin->next;
    pthread_mutex_unlock(&tensor->pin_lock);
}

void vmm_unpin(vmm_pin *pin) {
    if (!pin || pin->tensor->process != vmm_process)
        return; /* a forked child leaves the parent's books alone */
    vmm_tensor *tensor = pin->tensor;
    if (pin->shows_rows)
        unlink_pin(tensor, pin);
    free(pin);
    tensor_unreference(tensor);
}

size_t vmm_pin_count(const vmm_tensor *tensor) {
    return __atomic_load_n(&tensor->references, __ATOMIC_RELAXED) - 1;
}

static size_t pinned_locked(const vmm_tensor *tensor) {
    size_t most = tensor->pins ? tensor->shown_rows : 0;
    for (const vmm_pin *pin = tensor->pins; pin; pin = pin->next)
        if (pin->n_rows > most)
            most = pin->n_rows;
    return most;
}

size_t vmm_pinned_rows(const vmm_tensor *tensor) {
    vmm_tensor *mutable_tensor = (vmm_tensor *)tensor; /* for its lock */
    pthread_mutex_lock(&mutable_tensor->pin_lock);
    size_t most = pinned_locked(tensor);
    pthread_mutex_unlock(&mutable_tensor->pin_lock);
    return most;
}

bool pin_truncate(vmm_tensor *tensor, size_t n_rows, size_t *pinned) {
    /* In one step: a pin made meanwhile would cover rows that are gone. */
    pthread_mutex_lock(&tensor->pin_lock);
    *pinned = n_rows < tensor->length ? pinned_locked(tensor) : 0;
    bool allowed = *pinned <= n_rows;
    if (allowed && tensor->is_ragged)
        lanes_cut(tensor, n_rows);
    else if (allowed)
        tensor_set_length(tensor, n_rows);
    pthread_mutex_unlock(&tensor->pin_lock);
    return allowed;
}

static bool allows_locked(const vmm_tensor *tensor, const lane_list *list, size_t *pinned,
                          size_t *least) {
    *pinned = pinned_locked(tensor);
    for (size_t i = 0; i < list->n; i++) {
        *least = list->counts[i];
        if (*least < *pinned && *least < lanes_length(tensor, lane_at(list, i)))
            return false;
    }
    return true;
}

bool pin_allows(vmm_tensor *tensor, const lane_list *list, size_t *pinned, size_t *least) {
    pthread_mutex_lock(&tensor->pin_lock);
    bool allowed = allows_locked(tensor, list, pinned, least);
    pthread_mutex_unlock(&tensor->pin_lock);
    return allowed;
}

bool pin_truncate_lanes(vmm_tensor *tensor, const lane_list *list, size_t *pinned, size_t *least) {
    pthread_mutex_lock(&tensor->pin_lock);
    bool allowed = allows_locked(tensor, list, pinned, least);
    if (allowed)
        lanes_set(tensor, list);
    pthread_mutex_unlock(&tensor->pin_lock);
    return allowed;
}

void vmm_pin_shown(vmm_tensor *tensor) {
    pthread_mutex_lock(&tensor->pin_lock);
    tensor->shown_rows = tensor->length;
    pthread_mutex_unlock(&tensor->pin_lock);
}

bool tensor_reference_live(vmm_tensor *tensor) {
    size_t count = __atomic_load_n(&tensor->references, __ATOMIC_RELAXED);
    while (count && !__atomic_compare_exchange_n(&tensor->references, &count, count + 1, true,
                                                 __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return count != 0;
}

void tensor_unreference(vmm_tensor *tensor) {
    if (__atomic_sub_fetch(&tensor->references, 1, __ATOMIC_ACQ_REL) == 0)
        tensor_destroy(tensor);
}

void vmm_release(vmm_tensor *tensor) {
    if (tensor && tensor->process == vmm_process)
        tensor_unreference(tensor);
}

vmm_status vmm_close(vmm_tensor *tensor) {
    if (tensor && tensor->process != vmm_process)
        return VMM_OK;
    vmm_status status = tensor_check(tensor, "close");
    if (status)
        return status;
    size_t pins = vmm_pin_count(tensor), graphs = cursor_graph_count(tensor);
    if (graphs)
        return vmm_fail(VMM_ERR_PINNED, "close",
                        "%zu captured graph(s) that append to this tensor still live: destroy "
                        "them first",
                        graphs);
    if (pins)
        return vmm_fail(VMM_ERR_PINNED, "close",
                        "%zu export(s) of this tensor still live: drop what was made from it "
                        "(framework tensors, memoryviews) first",
                        pins);
    tensor_unreference(tensor);
    return VMM_OK;
}
