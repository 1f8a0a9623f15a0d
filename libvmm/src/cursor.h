/* cursor.h - the lengths of a tensor in memory that its device reads, and graphs that append.
 *
 * cursor.c   making it, keeping it current, following what graphs have done
 * captured.c appends that become part of a graph
 */
#ifndef VMM_CURSOR_H
#define VMM_CURSOR_H

#include "control.h"
#include "tensor.h"

/* Of a tensor that has been asked for its cursor, or captured. */
typedef struct tensor_cursor {
    control_block *control; /* NULL on the host */
    int32_t *values;        /* on the tensor's device */
    size_t n_entries;
    size_t *next, *before; /* what cursor_set() makes of it; what a truncation goes back to */
    bool has_next;         /* for cursor_set() */
    size_t shown_mapped;   /* what the device has been told; never more than is mapped */
    bool stale; /* setting it has failed: what the device has is known by looking alone */
    /* A graph has been captured that appends, so what the device has may be ahead of the host. */
    bool is_captured, may_differ;
    uint64_t last_capture; /* that has pinned it */
    size_t graphs;         /* that live. Atomic */
} tensor_cursor;

/* The tensor has one, of the present lengths; nothing to do if it had. */
vmm_status cursor_make(vmm_tensor *tensor);
void cursor_free(vmm_tensor *tensor);
/* How many graphs live that append to it. */
size_t cursor_graph_count(const vmm_tensor *tensor);

/* Before a write that starts from the host's lengths: have graphs moved the cursor of any of
 * them? Waits for the device where one might have. VMM_ERR_BUSY if so. `settle` alone waits. */
vmm_status cursor_check(size_t n_tensors, vmm_tensor *const *tensors, vmm_stream stream,
                        const char *operation);
vmm_status cursor_settle(vmm_tensor *tensor, vmm_stream stream);

/* What the cursor is to become, from the host's lengths on: each of the list's lanes longer by
 * its count, or by n_rows. */
void cursor_extend_next(vmm_tensor *tensor, const lane_list *list, size_t n_rows);
/* Have all that have such a thing become it, behind what `stream` has been given. Not while that
 * is captured: VMM_ERR_CAPTURING. */
vmm_status cursor_set(size_t n_tensors, vmm_tensor *const *tensors, vmm_stream stream,
                      const char *operation);

/* Before the lengths are extended by `n_rows`, and the cursor alone of all the tensor is written. */
vmm_status cursor_grow(vmm_tensor *tensor, size_t n_rows, vmm_stream stream);
/* Around a truncation: the first may choose the stream, the second follows the host's lengths, or
 * puts them back. */
vmm_status cursor_before_truncate(vmm_tensor *tensor, vmm_stream *stream);
vmm_status cursor_truncate(vmm_tensor *tensor, vmm_stream stream);

/* Tell the device how many rows may be written: before any of them is given up, and after they
 * have been mapped for good. */
vmm_status cursor_show_mapped(vmm_tensor *tensor, size_t n_rows);
/* The latter, for a call that has succeeded: what fails is tried again by the next one. */
void cursor_show_growth(vmm_tensor *tensor);

/* captured.c: append on a stream that is being captured. */
vmm_status append_captured(size_t n_tensors, vmm_tensor *const *tensors, const vmm_array *sources,
                           vmm_stream stream, bool *submitted);

#endif /* VMM_CURSOR_H */
