/* tensor.h - rows, lanes, length: what the files of this layer share.
 *
 * tensor.c   what a tensor is, mapping and growing it, giving it up
 * lanes.c    lanes of different lengths
 * append.c   copying rows in
 * cursor.h   the lengths where the device reads them, and graphs that append
 * order.c    which stream waits for which
 * pin.c      who still looks at it
 * find.c     which one it is, by its address
 */
#ifndef VMM_TENSOR_H
#define VMM_TENSOR_H

#include "range.h"

struct vmm_pin {
    vmm_tensor *tensor;
    bool shows_rows; /* and is in the tensor's list; else it keeps the tensor alone */
    size_t n_rows;
    struct vmm_pin *previous, *next;
};

struct vmm_tensor {
    vmm_pool *pool;
    range *range;
    uint64_t process;

    /* The spec, completed. */
    vmm_spec spec; /* its shape points to row_shape */
    int64_t row_shape[VMM_MAX_NDIM];
    int64_t strides[VMM_MAX_NDIM];
    int order[VMM_MAX_NDIM]; /* dimensions by descending stride */
    size_t itemsize;
    size_t n_lanes;
    size_t lane_row_bytes;
    size_t row_bytes;

    /* Written by the one writer, read by anyone. */
    size_t length;
    size_t mapped;
    struct tensor_cursor *cursor; /* cursor.h; NULL for most */
    bool is_ragged;               /* lanes.c: the lanes differ in length, `length` is the largest */
    bool busy; /* a growth is under way: an out-of-memory callback may call back in */

    /* lanes.c: one length for each index of dimension 0 where lanes are made for it, else one;
     * behind them as many marks of what a list has named. */
    size_t n_lengths;
    size_t *lengths; /* that mean something while the tensor is ragged */
    size_t seen_mark;

    /* order.c */
    bool written;            /* last_stream means something */
    bool event_current;      /* `event` stands behind the last write */
    vmm_stream last_stream;  /* of the last write */
    vmm_stream known_stream; /* the last one found to be of this device */
    pool_event *event;
    vmm_stream *waits; /* that the next write must wait for */
    size_t n_waits;

    /* pin.c */
    size_t references; /* the owner, the pins, and what vmm_find() gave out; atomic */
    pthread_mutex_t pin_lock;
    vmm_pin *pins;     /* that show rows */
    size_t shown_rows; /* that any of them may show, beside those it names */

    vmm_tensor *next_found; /* find.c */
    void *user[2];          /* vmm_user() */

    uint64_t driver_calls[VMM_CALL_COUNT]; /* atomic */
};

/* May this call change the tensor: it exists, here, and no growth of it is under way. */
vmm_status tensor_check(const vmm_tensor *tensor, const char *operation);
/* May it change all of these: they are of one device, and none stands there twice. */
vmm_status tensor_check_many(size_t n_tensors, vmm_tensor *const *tensors, const char *operation);

/* Rows [0, n_rows) of a tensor become mapped, in a change that is kept or undone. */
typedef struct tensor_growth {
    vmm_tensor *tensor;
    size_t n_rows;
    size_t n_rows_before; /* that were mapped */
    range_change change;
} tensor_growth;

/* Map what is missing, of all or of none; the caller keeps it or undoes it. The whole sequence of
 * the pool's ways out of a shortage is in here, callbacks too: the caller has marked the tensors
 * busy. `stream` takes part, VMM_STREAM_NONE for none. */
vmm_status tensor_map(size_t n, tensor_growth *growths, vmm_stream stream);
/* Keep it; undo it, `touched` as in range_undo(). */
void tensor_keep(size_t n, tensor_growth *growths);
void tensor_unmap(size_t n, tensor_growth *growths, bool touched);

void tensor_set_length(vmm_tensor *tensor, size_t n_rows);
vmm_status tensor_fail_capacity(const vmm_tensor *tensor, const char *operation, size_t n_rows);

/* Lanes that a call names, and a number of rows for each. */
typedef struct lane_list {
    size_t n;
    const size_t *lanes;  /* NULL: 0 .. n-1, which are all */
    const size_t *counts; /* NULL: what the call says for all */
} lane_list;

/* No list at all stands for every lane and every row. */
static inline size_t lane_at(const lane_list *list, size_t i) {
    return list && list->lanes ? list->lanes[i] : i;
}

static inline size_t lane_count(const lane_list *list, size_t i, size_t n_rows) {
    return list && list->counts ? list->counts[i] : n_rows;
}

/* The length of one lane, by its index in dimension 0. On any thread. */
static inline size_t lanes_length(const vmm_tensor *tensor, size_t lane) {
    return __atomic_load_n(&tensor->is_ragged, __ATOMIC_ACQUIRE)
               ? __atomic_load_n(&tensor->lengths[lane], __ATOMIC_RELAXED)
               : __atomic_load_n(&tensor->length, __ATOMIC_RELAXED);
}

/* lanes.c: the shortest length; the rows in use of all lanes together. */
size_t lanes_least(const vmm_tensor *tensor);
size_t lanes_used_rows(const vmm_tensor *tensor);
/* Are these lanes of the tensor, each named once? */
vmm_status lanes_check(vmm_tensor *tensor, const lane_list *list, const char *operation);
/* Each lane becomes longer, by its count or by n_rows; */
void lanes_extend(vmm_tensor *tensor, const lane_list *list, size_t n_rows);
/* becomes what its count says; */
void lanes_set(vmm_tensor *tensor, const lane_list *list);
/* keeps n_rows at most (of a ragged tensor); is as long as another tensor's, n_rows at most. */
void lanes_cut(vmm_tensor *tensor, size_t n_rows);
void lanes_copy(vmm_tensor *to, const vmm_tensor *from, size_t n_rows);

/* Append what has been checked already; see vmm_append_many(). Without a list to every lane, without
 * `capturable` not on a stream that is being captured. */
vmm_status append_checked(size_t n_tensors, vmm_tensor *const *tensors, const vmm_array *sources,
                          const lane_list *list, vmm_stream stream, bool capturable);
/* The rows of a source; a source with strides, for which there is room in `strides`. */
size_t append_rows(const vmm_tensor *tensor, const vmm_array *source);
vmm_array append_with_strides(const vmm_tensor *tensor, const vmm_array *source, int64_t *strides);

/* order.c: NULL is the legacy stream; a stream of another device is refused. */
vmm_status order_check_stream(vmm_tensor *tensor, vmm_stream *stream, const char *operation);
/* Where a write goes that no one names a stream for: that of the last one. */
vmm_stream order_write_stream(const vmm_tensor *tensor);
/* Make `stream` wait for what the next write must come after. */
vmm_status order_before_write(vmm_tensor *tensor, vmm_stream stream);
/* The tensor has been written on `stream`: also when only a part of the work was submitted
 * before a failure, since that part still runs. */
void order_after_write(vmm_tensor *tensor, vmm_stream stream);
/* The next write waits for `stream`. */
vmm_status order_add_wait(vmm_tensor *tensor, vmm_stream stream);
/* The capture that `stream` is part of, 0 for none. */
vmm_status order_capture_of(vmm_tensor *tensor, vmm_stream stream, uint64_t *capture);
/* The same without a tensor, of any stream of the device. Checks the device. */
vmm_status order_capture_on(vmm_device *device, vmm_stream stream, const char *operation,
                            uint64_t *capture);

/* pin.c: shorten the tensor, unless a pin covers a row beyond; `pinned` says how far. */
bool pin_truncate(vmm_tensor *tensor, size_t n_rows, size_t *pinned);
/* The same for the lanes of a list; `least` is the count of one that is pinned. The first only
 * says whether it would be done. */
bool pin_allows(vmm_tensor *tensor, const lane_list *list, size_t *pinned, size_t *least);
bool pin_truncate_lanes(vmm_tensor *tensor, const lane_list *list, size_t *pinned, size_t *least);
void tensor_unreference(vmm_tensor *tensor);
/* Count one reference more, unless the last has gone. */
bool tensor_reference_live(vmm_tensor *tensor);
/* Free it, when the last reference has gone (tensor.c). */
void tensor_destroy(vmm_tensor *tensor);

/* find.c */
void find_add(vmm_tensor *tensor);
void find_remove(vmm_tensor *tensor);

#endif /* VMM_TENSOR_H */
