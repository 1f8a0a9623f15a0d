/* driver.h - what a driver can do: one table of the verbs of CUDA's virtual memory
 * management, and nothing that decides anything.
 *
 * Preconditions of every entry, kept by the callers (pool.c, range.c, tensor.c):
 *   - addresses and sizes handed to map, unmap and set_access are multiples of the
 *     granularity; unmap gets whole blocks, the ones that one map call made;
 *   - free gets exactly one reservation, with nothing mapped in it;
 *   - nothing that the device may still touch is unmapped (a fence has passed).
 * Every entry returns a status and, when it fails, has recorded the driver's code and its
 * call's name by vmm_fail_driver(). Entries are thread-safe, leave the caller's current
 * context and capture mode as they found them, and never wait for the device unless their
 * name says synchronize, or fence_waits() that fence does.
 */
#ifndef VMM_DRIVER_H
#define VMM_DRIVER_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cursor_job.h"
#include "vmm.h"

typedef uint64_t driver_handle; /* of one physical block */
typedef void *driver_event;

typedef struct driver_ops {
    vmm_device_kind kind;
    /* Work may still run when a call has returned: memory is queued, not unmapped, and
     * fence, events and streams mean something. Where it is false, `copy` and everything
     * from `launch` on are NULL and never called: the CPU copies by itself (append.c). */
    bool is_async;
    /* set_access takes one block at a time, as map made it. */
    bool access_by_block;
    const char *device_name; /* "cuda": the name without its index */

    /* Open device `index`; `state` is handed to every other entry. */
    vmm_status (*open)(int index, void **state);
    void (*close)(void *state);
    /* Fill description, granularity, recommended, free, total, driver_version,
     * exportable_handles and kernel of `out`. */
    vmm_status (*query)(void *state, vmm_device_info *out);

    vmm_status (*reserve)(void *state, size_t bytes, size_t alignment, uintptr_t *out);
    vmm_status (*free)(void *state, uintptr_t base, size_t bytes);
    vmm_status (*create)(void *state, size_t bytes, driver_handle *out);
    vmm_status (*release)(void *state, driver_handle handle, size_t bytes);
    vmm_status (*map)(void *state, uintptr_t address, size_t bytes, driver_handle handle);
    vmm_status (*unmap)(void *state, uintptr_t address, size_t bytes);
    vmm_status (*set_access)(void *state, uintptr_t address, size_t bytes);

    /* Zero bytes, and copy host memory in, on `stream`. One piece in one call: two-dimensional
     * copies are refused when their rows lie in different blocks. The source of a copy may not
     * be reused before stream_synchronize. */
    vmm_status (*fill)(void *state, uintptr_t dst, size_t bytes, vmm_stream stream);
    vmm_status (*copy)(void *state, uintptr_t dst, const void *src, size_t bytes,
                       vmm_stream stream);
    /* Run the append kernel over jobs, at most VMM_APPEND_JOBS (or _JOBS_WIDE, _PIECES) of them. On
     * a stream that is being captured nothing is launched: `captured` says so, and the call
     * succeeds. */
    vmm_status (*launch)(void *state, const vmm_append_args *args, size_t n_jobs, vmm_stream stream,
                         bool *captured);
    vmm_status (*launch_wide)(void *state, const vmm_append_args_wide *args, size_t n_jobs,
                              vmm_stream stream, bool *captured);
    vmm_status (*launch_pieces)(void *state, const vmm_append_args_pieces *args, size_t n_pieces,
                                vmm_stream stream, bool *captured);
    /* Append at the rows that the device keeps; set these rows, not on a stream that is being
     * captured (`captured` as above). The number of blocks of each job is filled in. */
    vmm_status (*launch_cursor)(void *state, vmm_cursor_args *args, size_t n_jobs,
                                vmm_stream stream);
    vmm_status (*set_cursor)(void *state, const vmm_cursor_set_args *args, vmm_stream stream,
                             bool *captured);

    /* Memory for control blocks: of the device, and of the host such that the device can write
     * it, at the same address. Allowed while any stream is captured. */
    vmm_status (*allocate)(void *state, size_t bytes, uintptr_t *out);
    vmm_status (*allocate_host)(void *state, size_t bytes, void **out);
    void (*deallocate)(void *state, uintptr_t address);
    void (*deallocate_host)(void *state, void *address);
    /* Copy a few bytes, and wait until they have arrived; ordered with no other work. After a
     * failure they may arrive yet, so what they are read from, or written to, stays. */
    vmm_status (*write)(void *state, uintptr_t dst, const void *src, size_t bytes);
    vmm_status (*read)(void *state, void *dst, uintptr_t src, size_t bytes);

    /* Call `release(user)` once the graph that `stream` is being captured into is gone, with all
     * that is made of it; if this call fails, it is called, too. Perhaps on another thread, where
     * it must not call the driver. */
    vmm_status (*retain)(void *state, vmm_stream stream, void (*release)(void *user), void *user);

    /* Is `stream` one of this device (VMM_ERR_INVALID if not), and is it capturing? The
     * capture's identity tells two captures apart; 0 for none. */
    vmm_status (*stream_check)(void *state, vmm_stream stream);
    vmm_status (*stream_capture)(void *state, vmm_stream stream, uint64_t *capture_id);
    vmm_status (*stream_synchronize)(void *state, vmm_stream stream);

    vmm_status (*event_create)(void *state, driver_event *out);
    void (*event_destroy)(void *state, driver_event event);
    vmm_status (*event_record)(void *state, driver_event event, vmm_stream stream);
    /* `external`: the waiting stream is being captured and the event was recorded outside. */
    vmm_status (*event_wait)(void *state, vmm_stream stream, driver_event event, bool external);
    vmm_status (*event_query)(void *state, driver_event event, bool *done);
    vmm_status (*event_synchronize)(void *state, driver_event event);
    /* Record `event` behind everything submitted to the device so far, on every stream.
     * VMM_ERR_CAPTURING, and nothing is recorded, while a blocking stream is captured; in the
     * capture of another stream it must not be called, which it would end. */
    vmm_status (*fence)(void *state, driver_event event);
    /* Does fence wait for the device, for want of such an event? */
    bool (*fence_waits)(void *state);
} driver_ops;

extern const driver_ops driver_host_ops;
extern const driver_ops driver_cuda_ops;
extern const driver_ops driver_hip_ops;

/* A device that is open. Devices are shared: one for each name, see device.c. */
struct vmm_device {
    const driver_ops *ops;
    void *state;
    int index;
    size_t granularity_bytes;
    uint64_t process; /* the one that opened it, see process.h */
    size_t references;
    uintptr_t trial_base; /* of a reservation that a query has not been able to give back */
    size_t trial_bytes;   /* 0 for none */
    /* Between the question whether anyone captures and the fence that must not meet a capture;
     * held across driver calls. Taken behind a pool's work lock, before its other one. */
    pthread_mutex_t fence_lock;
    int captures; /* brackets that are open, on any pool of the device; under fence_lock */
    pthread_mutex_t graph_lock;        /* never held across a driver call */
    struct vmm_graph_pins *graph_pins; /* that are open, see graph_pins.c */
    struct vmm_device *next;
    struct vmm_pool *abandoned; /* pools that were released, not yet empty; see pool.c */
    char name[32];
};

#endif /* VMM_DRIVER_H */
