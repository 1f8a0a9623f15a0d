/* lanes.c - lanes of different lengths.
 *
 * While they are all the same, `length` says it and `lengths` means nothing: the tensor is
 * even, and growing it touches no lane. A tensor whose lanes differ is ragged: `lengths` has
 * them, `length` the largest. Mapping knows of neither: every lane is mapped as far as the
 * longest needs, for whoever reads [0, length) reads all of it.
 */
#include "cursor.h"
#include "error.h"

static void set_lane(vmm_tensor *tensor, size_t lane, size_t n_rows) {
    __atomic_store_n(&tensor->lengths[lane], n_rows, __ATOMIC_RELAXED);
}

/* Have `lengths` say what it means. */
static void spell_out(vmm_tensor *tensor) {
    if (!tensor->is_ragged)
        for (size_t lane = 0; lane < tensor->n_lengths; lane++)
            set_lane(tensor, lane, tensor->length);
}

/* After `lengths` has changed. */
static void sum_up(vmm_tensor *tensor) {
    size_t least = tensor->lengths[0], most = least;
    for (size_t lane = 1; lane < tensor->n_lengths; lane++) {
        size_t n_rows = tensor->lengths[lane];
        least = n_rows < least ? n_rows : least;
        most = n_rows > most ? n_rows : most;
    }
    __atomic_store_n(&tensor->is_ragged, least != most, __ATOMIC_RELEASE);
    tensor_set_length(tensor, most);
}

size_t lanes_least(const vmm_tensor *tensor) {
    size_t least = tensor->length;
    for (size_t lane = 0; lane < tensor->n_lengths; lane++)
        least = lanes_length(tensor, lane) < least ? lanes_length(tensor, lane) : least;
    return least;
}

size_t lanes_used_rows(const vmm_tensor *tensor) {
    size_t n_rows = 0;
    for (size_t lane = 0; lane < tensor->n_lengths; lane++)
        n_rows += lanes_length(tensor, lane);
    return n_rows;
}

vmm_status lanes_check(vmm_tensor *tensor, const lane_list *list, const char *operation) {
    size_t n_lengths = tensor->n_lengths;
    if (!list->lanes && list->n != n_lengths)
        return vmm_fail(VMM_ERR_INVALID, operation,
                        "no lanes are named, which stands for all %zu, but there are entries for "
                        "%zu",
                        n_lengths, list->n);
    if (!list->lanes)
        return VMM_OK;
    size_t *seen = tensor->lengths + n_lengths, mark = ++tensor->seen_mark;
    for (size_t i = 0; i < list->n; i++) {
        size_t lane = list->lanes[i];
        if (lane >= n_lengths)
            return vmm_fail(VMM_ERR_INVALID, operation,
                            "lane %zu is out of range: the tensor has %zu (the indices of "
                            "dimension 0 in layouts lane and c, else one)",
                            lane, n_lengths);
        if (seen[lane] == mark)
            return vmm_fail(VMM_ERR_INVALID, operation, "lane %zu is named twice", lane);
        seen[lane] = mark;
    }
    return VMM_OK;
}

void lanes_extend(vmm_tensor *tensor, const lane_list *list, size_t n_rows) {
    size_t n = list ? list->n : tensor->n_lengths;
    spell_out(tensor);
    for (size_t i = 0; i < n; i++) {
        size_t lane = lane_at(list, i);
        set_lane(tensor, lane, tensor->lengths[lane] + lane_count(list, i, n_rows));
    }
    sum_up(tensor);
}

void lanes_cut(vmm_tensor *tensor, size_t n_rows) {
    for (size_t lane = 0; lane < tensor->n_lengths; lane++)
        if (tensor->lengths[lane] > n_rows)
            set_lane(tensor, lane, n_rows);
    sum_up(tensor);
}

void lanes_copy(vmm_tensor *to, const vmm_tensor *from, size_t n_rows) {
    for (size_t lane = 0; lane < to->n_lengths; lane++)
        set_lane(to, lane, lanes_length(from, lane));
    lanes_cut(to, n_rows);
}

void lanes_set(vmm_tensor *tensor, const lane_list *list) {
    spell_out(tensor);
    for (size_t i = 0; i < list->n; i++)
        set_lane(tensor, lane_at(list, i), list->counts[i]);
    sum_up(tensor);
}

size_t vmm_length_count(const vmm_tensor *tensor) {
    return tensor->n_lengths;
}

int vmm_is_ragged(const vmm_tensor *tensor) {
    return tensor->is_ragged;
}

const size_t *vmm_lengths(vmm_tensor *tensor) {
    spell_out(tensor);
    return tensor->lengths;
}

vmm_status vmm_truncate_lanes(vmm_tensor *tensor, size_t n_lanes, const size_t *lanes,
                              const size_t *n_rows, vmm_stream stream) {
    static const char *const operation = "truncate";
    const lane_list list = {n_lanes, lanes, n_rows};
    vmm_status status = tensor_check(tensor, operation);
    if (status)
        return status;
    if (n_lanes && !n_rows)
        return vmm_fail(VMM_ERR_INVALID, operation, "n_rows is NULL");
    status = lanes_check(tensor, &list, operation);
    for (size_t i = 0; i < n_lanes && !status; i++) {
        size_t lane = lane_at(&list, i), length = lanes_length(tensor, lane);
        if (n_rows[i] > length)
            status = vmm_fail(VMM_ERR_INVALID, operation,
                              "%zu rows are more than the length of lane %zu, %zu: append() adds "
                              "rows",
                              n_rows[i], lane, length);
    }
    if (status)
        return status;
    size_t pinned, least;
    bool allowed = pin_allows(tensor, &list, &pinned, &least);
    if (allowed && stream != VMM_STREAM_NONE) {
        status = order_check_stream(tensor, &stream, operation);
        if (!status)
            status = order_add_wait(tensor, stream);
    }
    if (!status && allowed)
        status = cursor_before_truncate(tensor, &stream);
    if (status)
        return status;
    if (!pin_truncate_lanes(tensor, &list, &pinned, &least))
        return vmm_fail(VMM_ERR_PINNED, operation,
                        "an export covers rows up to %zu: drop it before truncating a lane to %zu",
                        pinned, least);
    return cursor_truncate(tensor, stream);
}
