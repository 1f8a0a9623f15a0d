/* vmm.h - tensors that grow in place.
 *
 * libvmm reserves a large range of addresses once and backs it with physical
 * memory as the data grows. The address of a row never changes and nothing is
 * ever copied to make room, so appending costs the copy of what is new and no
 * more. The same code runs on NVIDIA GPUs (CUDA's virtual memory management
 * calls), on AMD GPUs (HIP's, experimental) and on the host (anonymous memory).
 *
 * This header is the manual. It goes from the simple to the advanced:
 *
 *   1. A first program          7. Streams and hand-off
 *   2. Words                    8. Graphs
 *   3. Errors                   9. Pins: memory others are looking at
 *   4. Devices                 10. Statistics
 *   5. Pools, tensors          11. Threads, processes, exit
 *   6. Growing, appending, shrinking
 *
 * ---- 1. A first program ---------------------------------------------------
 *
 *     #include <stdio.h>
 *     #include <vmm.h>
 *
 *     int main(void) {
 *         vmm_device *device; vmm_pool *pool; vmm_tensor *cache;
 *         int64_t shape[] = {0, 4};                   // grows along axis 0
 *         vmm_spec spec = {.ndim = 2, .shape = shape, .axis = 0,
 *                          .dtype = VMM_FLOAT32, .capacity = 1000000};
 *         float row[1][4] = {{1, 2, 3, 4}};
 *         int64_t row_shape[] = {1, 4};
 *         vmm_array source = {.data = row, .memory = VMM_MEMORY_HOST,
 *                             .dtype = VMM_FLOAT32, .ndim = 2, .shape = row_shape};
 *
 *         if (vmm_device_open("host", &device) ||
 *             vmm_pool_create(device, 0, 0, &pool) ||
 *             vmm_reserve(pool, &spec, &cache) ||
 *             vmm_append(cache, &source, NULL)) {
 *             fprintf(stderr, "%s\n", vmm_last_error()->message);
 *             return 1;
 *         }
 *         float *data = vmm_base(cache);
 *         printf("%zu row(s), the first begins with %g\n", vmm_length(cache), data[0]);
 *         vmm_close(cache); vmm_pool_close(pool); vmm_device_close(device);
 *         return 0;
 *     }
 *
 * Build it with: cc first.c $(pkg-config --cflags --libs vmm)
 *
 * ---- 2. Words ---------------------------------------------------------------
 *
 * row       what one step along the growth axis holds; for a key/value cache,
 *           one token's worth
 * lane      a slice of the reservation that begins on a block boundary and grows
 *           on its own; the layout says how many there are
 * capacity  rows of address space, fixed when the tensor is reserved
 * mapped    rows backed by memory
 * length    rows in use. Always length <= mapped <= capacity
 * block     one physical allocation, the unit of mapping: a multiple of the
 *           device's granularity (2 MiB on current GPUs, a page on the host)
 *
 * Sizes are in bytes where the name says `_bytes`, in rows where it says `_rows`.
 */
#ifndef VMM_H
#define VMM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define VMM_API __attribute__((visibility("default")))
#else
#define VMM_API
#endif

#define VMM_VERSION_MAJOR 0
#define VMM_VERSION_MINOR 1
#define VMM_VERSION_PATCH 0

/* The library's version at run time: major * 10000 + minor * 100 + patch. */
VMM_API int vmm_version(void);

/* ---- 3. Errors --------------------------------------------------------------
 *
 * Every call that can fail returns a vmm_status, VMM_OK being 0. A call that fails
 * has changed nothing: lengths, mapping and contents are as before, nothing has
 * leaked, and the same call may be made again. (Blocks that a pool kept free may have
 * gone back to the driver: that was tried before giving up.) Errors in the
 * arguments are found before the driver is called. Nothing in this library ends
 * the process.
 */
#define VMM_STATUSES(X)                                                                            \
    X(OK, "no error")                                                                              \
    X(ERR_INVALID, "an argument is not valid")                                                     \
    X(ERR_OVERFLOW, "a size does not fit the machine's address space")                             \
    X(ERR_DTYPE, "the element type is another than the tensor's")                                  \
    X(ERR_SHAPE, "the shape does not fit the tensor")                                              \
    X(ERR_CAPACITY, "more rows than the capacity")                                                 \
    X(ERR_OUT_OF_MEMORY, "no memory left, or the pool's budget is exhausted")                      \
    X(ERR_PINNED, "an export still covers these rows")                                             \
    X(ERR_BUSY, "the object is in use")                                                            \
    X(ERR_CLOSED, "the object has been closed")                                                    \
    X(ERR_FORKED, "the object belongs to the parent process")                                      \
    X(ERR_NO_DRIVER, "the driver library cannot be used here")                                     \
    X(ERR_NO_DEVICE, "there is no such device")                                                    \
    X(ERR_UNSUPPORTED, "the device cannot do this")                                                \
    X(ERR_CAPTURING, "not possible while a stream is being captured")                              \
    X(ERR_DRIVER, "the driver refused a call")

typedef enum vmm_status {
#define VMM_STATUS_ENUM(name, text) VMM_##name,
    VMM_STATUSES(VMM_STATUS_ENUM)
#undef VMM_STATUS_ENUM
} vmm_status;

/* What the calling thread's last failed call says of itself. Overwritten by the next
 * failure on this thread, untouched by successes. */
typedef struct vmm_error {
    vmm_status status;
    int driver_code;       /* the driver's own code (CUresult, errno), 0 where it had no part */
    const char *operation; /* the driver's call ("cuMemCreate"), else the verb ("append") */
    char message[512];     /* a sentence: what was wrong and, where it is known, what to do */
} vmm_error;

/* Never NULL. Valid until the next failure on this thread, or the thread's end. */
VMM_API const vmm_error *vmm_last_error(void);

/* The name ("VMM_ERR_CAPACITY") and the one-line meaning of a status. Never NULL. */
VMM_API const char *vmm_status_name(vmm_status status);
VMM_API const char *vmm_status_text(vmm_status status);

/* ---- 4. Devices ------------------------------------------------------------- */

typedef struct vmm_device vmm_device;

typedef enum vmm_device_kind {
    VMM_DEVICE_HOST = 0,
    VMM_DEVICE_CUDA = 1,
    VMM_DEVICE_HIP = 2,
} vmm_device_kind;

/* vmm_device_open() - the device of that name.
 *   name   "host" (or "cpu"), "cuda:N", "cuda" (the same as "cuda:0"), "hip:N", "hip"
 * The CUDA driver library is loaded at the first use of a "cuda" name: libcuda.so.1, or
 * what the environment variable VMM_CUDA_LIBRARY names. The device's primary context
 * is retained and stays so while the process lives; the caller's current context is
 * left as it was found. Opening a device twice gives the same device, counted.
 * "hip" names are AMD GPUs, experimental: the code has run on none yet. The HIP runtime
 * (ROCm 5.3 or later) is the libamdhip64.so that the process uses already, else the first
 * that is found, or what VMM_HIP_LIBRARY names. The append kernel is there if the library
 * was built where there was a HIP compiler, for the GPUs that were named then (gfx90a and
 * gfx942 by default), or in the file that VMM_HIP_KERNELS names; else opening returns
 * VMM_ERR_UNSUPPORTED.
 * Returns VMM_ERR_INVALID (a name of another form), VMM_ERR_NO_DRIVER,
 * VMM_ERR_NO_DEVICE, VMM_ERR_UNSUPPORTED (a GPU without virtual memory management),
 * VMM_ERR_FORKED (a GPU in a child of a process that uses CUDA), VMM_ERR_DRIVER.
 * Thread-safe. */
VMM_API vmm_status vmm_device_open(const char *name, vmm_device **out);

/* Gives one opening back. Pools keep their device for themselves, so the order of
 * closing does not matter. NULL is ignored. Thread-safe. */
VMM_API void vmm_device_close(vmm_device *device);

typedef struct vmm_device_info {
    vmm_device_kind kind;
    int index;                /* N of "cuda:N" or "hip:N"; 0 for the host */
    char name[128];           /* the name vmm_device_open() took: "cuda:0" */
    char description[128];    /* "NVIDIA H100 80GB HBM3", "host memory" */
    size_t granularity_bytes; /* the smallest block, and what every block is a multiple of */
    size_t recommended_bytes; /* the driver's recommended granularity */
    size_t reservable_bytes;  /* the largest single reservation, found by trying powers of two */
    size_t free_bytes;        /* physical memory not in use, now */
    size_t total_bytes;       /* physical memory of the device */
    int driver_version;       /* CUDA: 13000 for 13.0; HIP: 60342134 for 6.3.42134; host: 0 */
    int exportable_handles;   /* 1 if blocks could be exported as file descriptors */
    char kernel[32];          /* the append kernel's form: "fatbin", "ptx", "hipfb", "memcpy" */
} vmm_device_info;

/* vmm_device_query() - fill `out`. Makes a dozen driver calls; not for a hot path.
 * Returns VMM_ERR_DRIVER, VMM_ERR_FORKED. Thread-safe. */
VMM_API vmm_status vmm_device_query(vmm_device *device, vmm_device_info *out);

/* ---- 5. Pools and tensors ---------------------------------------------------
 *
 * A pool holds the physical blocks of one device: it creates them, keeps those that
 * tensors gave back, stays within a budget. On a GPU, memory that is given back is
 * queued, because kernels submitted earlier may still touch it. Blocks that vmm_trim()
 * gave back serve the next growth, behind one fence for all that is queued. What a
 * closed tensor had stays mapped and is recycled: the next tensor of the same geometry
 * (pool, lanes, bytes of a lane, block size) takes its addresses and blocks over, and
 * grows over them without a driver call. A recycled range is unmapped when memory is
 * short (the budget, the device), when more lies idle than was ever in use at once,
 * and by vmm_pool_trim(). With a CUDA driver before 12.5 and on HIP a fence waits for the device, so
 * none is taken to open a tensor: what was closed is taken over only once a growth that had run out
 * of memory has waited.
 */
typedef struct vmm_pool vmm_pool;

/* For `block_bytes`: sizes that grow with the tensor, from the device's granularity
 * on, such that what a lane has mapped beyond its length stays within one eighth of it
 * plus one smallest block. Where a block of such a size cannot be had, and from then on while
 * about as much is in use, growth takes no more than it needs in smallest blocks: all lanes,
 * and all tensors of one call, can fill the budget or the device to the last of them. */
#define VMM_BLOCK_AUTO SIZE_MAX

/* vmm_pool_create() - a pool on a device.
 *   block_bytes   size of every block: a multiple of the granularity, or VMM_BLOCK_AUTO.
 *                 0 is VMM_BLOCK_AUTO. A tensor may ask for another.
 *   max_bytes     budget: what the pool holds in all, in use, queued, recycled, mapped ahead
 *                 and free, never exceeds it. 0 for no budget.
 * No driver call. Returns VMM_ERR_INVALID, VMM_ERR_OUT_OF_MEMORY, VMM_ERR_FORKED. */
VMM_API vmm_status vmm_pool_create(vmm_device *device, size_t block_bytes, size_t max_bytes,
                                   vmm_pool **out);

/* vmm_pool_trim() - return to the driver what is free, recycled or mapped ahead, and what is
 * queued and no longer touched by the device.
 *   wait   0: only what can be had without waiting; else wait for the device
 * Returns VMM_ERR_CAPTURING when something is queued, between vmm_pool_capture_begin() and _end()
 * and while a stream is captured that blocks the default stream (what needs no fence has been
 * returned all the same), VMM_ERR_CLOSED, VMM_ERR_DRIVER, VMM_ERR_FORKED. Thread-safe. */
VMM_API vmm_status vmm_pool_trim(vmm_pool *pool, int wait);

/* vmm_pool_set_lookahead() - a thread of the pool maps blocks ahead of the growth of its
 * tensors, so that growth finds them mapped and makes no driver call.
 *   max_bytes   the most that is mapped ahead over all tensors; 0 ends the thread and gives
 *               back what it had mapped. Off at first.
 * How far ahead depends on how fast a tensor takes memory into use: 20 ms of that, and at least
 * one block while it grows; when it has not grown for a second the blocks are released. They
 * count within the budget (lookahead_bytes), and all are given up before out of memory is
 * reported. The thread takes nothing that is queued or recycled, runs no callbacks, waits for
 * no fence, and does not report: where the driver refuses, growth will hear of it. Its driver
 * calls count as the pool's, never as a tensor's. vmm_pool_close() and the process's exit end
 * it; a forked child has none.
 * Returns VMM_ERR_OUT_OF_MEMORY (no thread to be had: nothing has changed), VMM_ERR_FORKED.
 * Thread-safe. */
VMM_API vmm_status vmm_pool_set_lookahead(vmm_pool *pool, size_t max_bytes);
/* What it may map ahead, 0 while it is off. */
VMM_API size_t vmm_pool_lookahead(const vmm_pool *pool);

/* vmm_pool_on_oom() - call `callback` before running out of memory is reported.
 * It runs on the thread that needs memory, with no lock of the library held; it may
 * free memory anywhere, close other tensors and trim the pool, but must not use the
 * tensor that is growing (its calls return VMM_ERR_BUSY). It returns non-zero if it
 * freed something; the pool then tries once more. `needed_bytes` is what the growth
 * still lacks over all lanes, and all tensors of the call in this pool, in whole blocks. A
 * NULL callback removes the entry of that `user`. Several may be registered; they run in the
 * order of registration.
 * Returns VMM_ERR_INVALID (nothing to remove), VMM_ERR_OUT_OF_MEMORY. Thread-safe. */
typedef int (*vmm_oom_callback)(void *user, size_t needed_bytes);
VMM_API vmm_status vmm_pool_on_oom(vmm_pool *pool, vmm_oom_callback callback, void *user);

/* vmm_pool_capture_begin(), _end() - bracket a stream capture anywhere in the process.
 * A fence would invalidate the capture, so between the two none is taken: queued memory
 * stays queued, and a pool that can only go on with it reports out of memory. Without them none
 * is taken either while a stream is captured that blocks the default stream, or the one that the
 * call names or the tensor was last written on; of others the driver tells nothing. They nest
 * and count. _end() without _begin() returns VMM_ERR_INVALID. Thread-safe. */
VMM_API vmm_status vmm_pool_capture_begin(vmm_pool *pool);
VMM_API vmm_status vmm_pool_capture_end(vmm_pool *pool);

/* vmm_pool_close() - return all memory and free the pool. Waits for the device where
 * memory is queued. Returns VMM_ERR_BUSY while tensors of it live, VMM_ERR_CAPTURING,
 * VMM_ERR_DRIVER: the pool then still exists and is as before. */
VMM_API vmm_status vmm_pool_close(vmm_pool *pool);

/* vmm_pool_release() - give the pool up without failing and without a driver call: from a
 * destructor, on any thread. Tensors of it go on. What it holds is returned by a later
 * call on any pool of the device, once nothing uses it. Capture brackets of it that are open
 * end. NULL is ignored. */
VMM_API void vmm_pool_release(vmm_pool *pool);

typedef void *vmm_stream; /* a CUstream. NULL is the legacy default stream. Ignored on the host */
#define VMM_STREAM_LEGACY ((vmm_stream)1)
#define VMM_STREAM_PER_THREAD ((vmm_stream)2)
#define VMM_STREAM_NONE ((vmm_stream)(intptr_t)-1) /* where a call says that it takes it */

/* vmm_pool_alloc() - memory of a fixed size, for the allocator of a framework: so that its
 * tensors and those that grow share one budget.
 *   bytes    at least 1; a whole number of blocks is taken, one block under VMM_BLOCK_AUTO
 *   stream   the one whose work needs the memory; if it is being captured, no fence is taken
 * Runs no out-of-memory callback, since the caller may hold locks that they want.
 * Returns VMM_ERR_INVALID, VMM_ERR_OVERFLOW, VMM_ERR_OUT_OF_MEMORY, VMM_ERR_DRIVER,
 * VMM_ERR_FORKED. Cost: one driver call and three for each block. Thread-safe. */
VMM_API vmm_status vmm_pool_alloc(vmm_pool *pool, size_t bytes, vmm_stream stream, void **out);

/* vmm_pool_free() - give an allocation back: as vmm_close() does, with no driver call on a GPU,
 * so also during a capture and after work on the memory has been submitted. NULL is ignored,
 * and so is everything in a forked child.
 * Returns VMM_ERR_INVALID for what is no allocation of this pool. Thread-safe. */
VMM_API vmm_status vmm_pool_free(vmm_pool *pool, void *pointer);

/* Element types have DLPack's codes, so that a DLDataType can be copied over. `bits` is a
 * multiple of 8 and `lanes` is 1. The library moves elements and never reads them. */
typedef struct vmm_dtype {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} vmm_dtype;

#ifdef __cplusplus
#define VMM_DTYPE_(code, bits) (vmm_dtype{(uint8_t)(code), (uint8_t)(bits), 1})
#else
#define VMM_DTYPE_(code, bits) ((vmm_dtype){(code), (bits), 1})
#endif
#define VMM_INT8 VMM_DTYPE_(0, 8)
#define VMM_INT16 VMM_DTYPE_(0, 16)
#define VMM_INT32 VMM_DTYPE_(0, 32)
#define VMM_INT64 VMM_DTYPE_(0, 64)
#define VMM_UINT8 VMM_DTYPE_(1, 8)
#define VMM_UINT16 VMM_DTYPE_(1, 16)
#define VMM_UINT32 VMM_DTYPE_(1, 32)
#define VMM_UINT64 VMM_DTYPE_(1, 64)
#define VMM_FLOAT16 VMM_DTYPE_(2, 16)
#define VMM_FLOAT32 VMM_DTYPE_(2, 32)
#define VMM_FLOAT64 VMM_DTYPE_(2, 64)
#define VMM_BFLOAT16 VMM_DTYPE_(4, 16)
#define VMM_COMPLEX64 VMM_DTYPE_(5, 64)
#define VMM_COMPLEX128 VMM_DTYPE_(5, 128)
#define VMM_BOOL VMM_DTYPE_(6, 8)
#define VMM_FLOAT8_E4M3FN VMM_DTYPE_(10, 8)
#define VMM_FLOAT8_E5M2 VMM_DTYPE_(12, 8)

/* How memory is ordered. The shape is the same in all three; the strides differ.
 * Shape (batch, seq, heads, dim) with axis 1 lies in memory as
 *   VMM_LAYOUT_SEQ   seq, batch, heads, dim: one lane, an append is one dense copy
 *   VMM_LAYOUT_LANE  batch, seq, heads, dim: a lane for each index of dimension 0
 *   VMM_LAYOUT_C     as the shape says: a lane for each index of the dimensions before
 *                    the axis (here the same as LANE; they differ for axis 2)
 * Every lane begins on a block boundary and holds at least one block once it has a row. */
typedef enum vmm_layout {
    VMM_LAYOUT_SEQ = 0,
    VMM_LAYOUT_LANE = 1,
    VMM_LAYOUT_C = 2,
} vmm_layout;

#define VMM_MAX_NDIM 8

/* What a tensor is to be. Zero-initialise it; zero is the default of every field that
 * has one. */
typedef struct vmm_spec {
    int ndim;             /* 1 .. VMM_MAX_NDIM */
    const int64_t *shape; /* ndim sizes, each at least 1; shape[axis] is ignored: a tensor
                           * begins with length 0 */
    int axis;             /* the growth axis, 0 .. ndim - 1 */
    vmm_dtype dtype;
    size_t capacity; /* rows of address space, at least 1 */
    vmm_layout layout;
    size_t block_bytes; /* 0: the pool's; VMM_BLOCK_AUTO; or a multiple of the granularity */
    int zero;           /* non-zero: rows taken by vmm_grow() read zero */
} vmm_spec;

typedef struct vmm_tensor vmm_tensor;

/* vmm_reserve() - a tensor of length 0: address space only, no memory.
 * The base address stays what it is until the tensor is closed. New rows hold undefined
 * bytes, perhaps another tensor's old data, unless spec->zero is set.
 * Returns VMM_ERR_INVALID, VMM_ERR_OVERFLOW, VMM_ERR_OUT_OF_MEMORY, VMM_ERR_DRIVER (the
 * address range was refused: ask for a smaller capacity), VMM_ERR_CLOSED, VMM_ERR_FORKED.
 * Cost: one driver call; where a closed tensor of the same geometry is taken over, none, or one
 * fence and one query of it. That fence would end the capture of a stream that does not block the
 * default stream, as vmm_pool_capture_begin() says. Thread-safe. */
VMM_API vmm_status vmm_reserve(vmm_pool *pool, const vmm_spec *spec, vmm_tensor **out);

/* vmm_close() - give the memory back and free the tensor.
 * On a GPU the memory is queued in the pool, with no driver call; on the host it goes
 * back at once. Returns VMM_ERR_PINNED while pins exist (see 9.), VMM_ERR_BUSY from
 * within an out-of-memory callback of its own growth: the tensor then still exists.
 * In a forked child it does nothing. */
VMM_API vmm_status vmm_close(vmm_tensor *tensor);

/* vmm_release() - give the tensor up without failing: from a destructor, on any thread.
 * Without pins it is vmm_close(); with pins the memory goes with the last of them. The
 * tensor must not be used again. NULL is ignored. */
VMM_API void vmm_release(vmm_tensor *tensor);

/* vmm_find() - the tensor whose first row is at `base`, NULL in `out` where none lives.
 * For a caller that was handed memory and asks whose it is. A tensor lives until it is
 * closed, or released and without pins; the table that is asked keeps none alive. The
 * tensor in `out` is one reference more: give it back by vmm_release(). Until then
 * vmm_close() counts it as a pin. While anything holds an address that a tensor pinned,
 * no other tensor can have that address.
 * Returns VMM_ERR_FORKED (the parent process's), VMM_ERR_INVALID. No driver call, and no lock
 * that is held across one. Thread-safe. */
VMM_API vmm_status vmm_find(const void *base, vmm_tensor **out);

/* What a tensor is. The answers of the first group never change; no call fails or reaches
 * the driver. `strides` are in bytes, one for each dimension. */
VMM_API void *vmm_base(const vmm_tensor *tensor);
VMM_API size_t vmm_capacity(const vmm_tensor *tensor);
VMM_API int vmm_ndim(const vmm_tensor *tensor);
VMM_API int vmm_axis(const vmm_tensor *tensor);
VMM_API const int64_t *vmm_strides(const vmm_tensor *tensor);
VMM_API const int64_t *vmm_row_shape(const vmm_tensor *tensor); /* 1 at the axis */
VMM_API size_t vmm_row_bytes(const vmm_tensor *tensor);         /* over all lanes */
VMM_API size_t vmm_lane_count(const vmm_tensor *tensor);
VMM_API size_t vmm_lane_bytes(const vmm_tensor *tensor); /* address space of one lane */
VMM_API size_t vmm_length(const vmm_tensor *tensor);     /* the largest of vmm_lengths() */
VMM_API size_t vmm_mapped(const vmm_tensor *tensor);

/* What it was made of: the device and the pool, as long as the tensor lives, and the spec,
 * completed, for vmm_reserve() to make another like it. */
VMM_API vmm_device *vmm_device_of(const vmm_tensor *tensor);
VMM_API vmm_pool *vmm_pool_of(const vmm_tensor *tensor);
VMM_API const vmm_spec *vmm_spec_of(const vmm_tensor *tensor);

/* Two words that the library keeps with a tensor, NULL at first, and never looks at: for a
 * binding that reaches one tensor through several objects of its own. */
VMM_API void **vmm_user(vmm_tensor *tensor);

/* ---- 6. Growing, appending, shrinking ---------------------------------------
 *
 * One writer at a time for each tensor (see 11.).
 *
 * Lanes may have lengths of their own: the sequences of a batch. Calls name a lane by its
 * index in dimension 0, in layout LANE, and in C where the axis is not 0 (with an axis of 2 or
 * more all lanes of one index grow together); every other tensor has one, index 0. While
 * lengths differ the tensor is ragged: vmm_length() is the largest of them, and every lane is
 * mapped as far as the longest needs, since whoever reads [0, length) reads all of it. Rows of
 * a lane past its own length can be read and hold undefined bytes, with spec.zero too (that
 * is about the rows that vmm_grow() takes). They become defined when they are appended, also
 * under a pin that covers them. vmm_append() to a ragged tensor puts rows behind each lane's
 * own length, vmm_grow() refuses it, and everything else goes by vmm_length(). As long as
 * lengths are the same none of this costs anything.
 */

/* How many lengths a tensor has: the size of dimension 0, or 1. Never changes. */
VMM_API size_t vmm_length_count(const vmm_tensor *tensor);

/* Whether lengths differ. */
VMM_API int vmm_is_ragged(const vmm_tensor *tensor);

/* The length of each lane, vmm_length_count() of them, until the next call on the tensor. For
 * the writer's thread. */
VMM_API const size_t *vmm_lengths(vmm_tensor *tensor);

/* vmm_map() - back the first `n_rows` rows with memory, as far as they are not yet.
 * The length does not change. Rows mapped by request stay until vmm_trim().
 *   n_rows   0 .. capacity
 * Returns VMM_ERR_CAPACITY, VMM_ERR_OUT_OF_MEMORY, VMM_ERR_DRIVER, VMM_ERR_BUSY,
 * VMM_ERR_FORKED.
 * Cost: none within mapped rows, nor over blocks that are mapped already, by look-ahead or from
 * a closed tensor; else at most three driver calls for each new block, none of which waits for
 * the device. */
VMM_API vmm_status vmm_map(vmm_tensor *tensor, size_t n_rows);

/* vmm_map_many() - back the first n_rows[i] rows of tensors[i], of all or of none. The tensors are
 * of one device, and each is named once. Where memory is short, those of VMM_BLOCK_AUTO take no
 * more than they need, so that what fits in all is had: one after the other, the first could take
 * what the last needs.
 * Returns VMM_ERR_INVALID, and what vmm_map() does. Cost: vmm_map()'s of each; where the last
 * writes to them were on different streams, the question for each whether it is captured. */
VMM_API vmm_status vmm_map_many(size_t n_tensors, vmm_tensor *const *tensors, const size_t *n_rows);

/* vmm_grow() - take the next `n_rows` rows into use.
 * Backs them with memory where they are not backed yet, and stores the address of the
 * first in `out` (in the first lane; NULL if it is not wanted). Rows already in use keep
 * their address and contents; the new ones hold undefined bytes, or zero for a tensor
 * with spec.zero (zeroed on the stream of the last append, so hand off before use: see 7.).
 *   n_rows   0 .. capacity - length
 * Returns, and costs, what vmm_map() does; with spec.zero one driver call more for each lane.
 * VMM_ERR_INVALID when the tensor is ragged: append to its lanes, or truncate them to one
 * length. */
VMM_API vmm_status vmm_grow(vmm_tensor *tensor, size_t n_rows, void **out);

/* Where an array lies. */
typedef enum vmm_memory {
    VMM_MEMORY_HOST = 0,   /* the CPU can read it; pageable or pinned */
    VMM_MEMORY_DEVICE = 1, /* memory of the GPU `device_index` */
} vmm_memory;

/* An array to read from. */
typedef struct vmm_array {
    const void *data; /* the first element; may be NULL if the array has none */
    vmm_memory memory;
    int device_index; /* for VMM_MEMORY_DEVICE */
    vmm_dtype dtype;
    int ndim;
    const int64_t *shape;
    const int64_t *strides; /* in bytes, any sign; NULL: dense in C order. The last dimension
                             * must be dense: its stride is the size of an element */
} vmm_array;

/* vmm_append() - grow by the rows of `source` and copy them in, on `stream`.
 * `source` has the tensor's dtype, rank and shape; along the axis it has any number of
 * rows, 0 included. Elements are never converted. It lies in device memory of the
 * tensor's GPU or in host memory; for a tensor on the host, in host memory.
 *   stream   where the copy runs. Work that writes a device source must have been ordered
 *            before it on this stream (vmm_stream_wait() does that), and the source
 *            must live until the copy is done. A host source has been read on return.
 * The stream must stay valid as long as the tensor. If the last append ran on another
 * stream, this one waits for it by event.
 * Returns VMM_ERR_INVALID (NULL, a strided last dimension, a stream or memory of another
 * device), VMM_ERR_DTYPE, VMM_ERR_SHAPE (rank, too), VMM_ERR_CAPACITY,
 * VMM_ERR_OUT_OF_MEMORY, VMM_ERR_CAPTURING (a host source while `stream` is captured),
 * VMM_ERR_DRIVER, VMM_ERR_BUSY, VMM_ERR_FORKED.
 * Cost within mapped rows: for a device source one kernel launch and nothing else; for a
 * host source one copy for each lane, the wait for them, and the question whether `stream`
 * is being captured. Beyond: vmm_map()'s. A stream seen for the first time is checked once. */
VMM_API vmm_status vmm_append(vmm_tensor *tensor, const vmm_array *source, vmm_stream stream);

/* vmm_append_many() - append to several tensors of one device at once: all or none.
 * With device sources it is one kernel launch for up to VMM_APPEND_MAX_FUSED tensors, if for
 * each the copy is of dense runs, as many and as far apart as for the others (layers of one
 * model); up to 32 with anything else. No tensor may be named twice (VMM_ERR_INVALID).
 * Otherwise as vmm_append(). */
#define VMM_APPEND_MAX_FUSED 160
VMM_API vmm_status vmm_append_many(size_t n_tensors, vmm_tensor *const *tensors,
                                   const vmm_array *sources, vmm_stream stream);

/* vmm_append_lanes() - append to some lanes, to each behind its own length: all or none.
 *   sources   as for vmm_append_many(), but that dimension 0 has the size `n_lanes`: index i of
 *             it goes to lane lanes[i]. (A tensor with one length takes a whole source.)
 *   lanes     the same for all tensors, each 0 .. vmm_length_count() - 1, once, in any order;
 *             NULL for all, and then n_lanes is vmm_length_count()
 *   counts    the first counts[i] rows of index i are taken; NULL for all rows
 * Where every lane gets one dense piece, it is one kernel launch for up to VMM_APPEND_MAX_FUSED
 * pieces: 64 sequences of any lengths, keys and values. On the host and from host memory one
 * copy for each lane. Returns what vmm_append_many() does; VMM_ERR_INVALID for bad lanes and
 * counts, VMM_ERR_CAPACITY where one lane is full. */
VMM_API vmm_status vmm_append_lanes(size_t n_tensors, vmm_tensor *const *tensors,
                                    const vmm_array *sources, size_t n_lanes, const size_t *lanes,
                                    const size_t *counts, vmm_stream stream);

/* vmm_truncate() - the length becomes `n_rows`, of a ragged tensor that of each lane that is
 * longer; what lay beyond is given up. Memory stays mapped: vmm_trim() returns it.
 *   n_rows   0 .. length
 *   stream   the next append waits for what has been submitted to this stream by then (a
 *            kernel that still reads the rows given up), so it must be valid until then;
 *            VMM_STREAM_NONE for nothing
 * Returns VMM_ERR_INVALID (above the length, a stream of another device), VMM_ERR_PINNED
 * when a pin covers a row beyond, VMM_ERR_OUT_OF_MEMORY, VMM_ERR_BUSY, VMM_ERR_FORKED.
 * No driver call that waits, maps or frees. */
VMM_API vmm_status vmm_truncate(vmm_tensor *tensor, size_t n_rows, vmm_stream stream);

/* vmm_truncate_lanes() - the length of lane lanes[i] becomes n_rows[i], 0 .. its length.
 * `lanes` as for vmm_append_lanes(), the rest as for vmm_truncate(). */
VMM_API vmm_status vmm_truncate_lanes(vmm_tensor *tensor, size_t n_lanes, const size_t *lanes,
                                      const size_t *n_rows, vmm_stream stream);

/* vmm_trim() - give back every block that holds no row in use.
 * Always allowed, also under pins. On a GPU the blocks are queued in the pool, and taken
 * back if the tensor grows before the pool needs them.
 * Returns VMM_ERR_BUSY, VMM_ERR_FORKED; for a tensor that has a cursor (see 8.) VMM_ERR_CAPTURING
 * and VMM_ERR_DRIVER, too. No driver call on a GPU without one. */
VMM_API vmm_status vmm_trim(vmm_tensor *tensor);

/* vmm_fork() - a new tensor with the same spec and pool that holds the first `n_rows` rows.
 * The rows are copied, on the stream of the last append (the legacy default stream, if there
 * was none). Both grow on their own. Lanes that are shorter stay so.
 *   n_rows   0 .. length
 * Returns VMM_ERR_INVALID and what vmm_reserve() and vmm_append() return. */
VMM_API vmm_status vmm_fork(vmm_tensor *tensor, size_t n_rows, vmm_tensor **out);

/* ---- 7. Streams and hand-off -------------------------------------------------
 *
 * No event is recorded on an append. The tensor remembers the stream of its last write,
 * and an event is recorded when someone on another stream asks for the data.
 */

/* vmm_handoff() - make `stream` wait for every write to the tensor so far.
 * Nothing to do on the stream of the last append. VMM_STREAM_NONE is ignored.
 * Inside a capture: an append that was captured can be handed to streams of the same
 * capture only (VMM_ERR_CAPTURING); one made before the capture becomes an external wait.
 * Returns VMM_ERR_INVALID (a stream of another device), VMM_ERR_CAPTURING,
 * VMM_ERR_DRIVER, VMM_ERR_FORKED. */
VMM_API vmm_status vmm_handoff(vmm_tensor *tensor, vmm_stream stream);

/* vmm_add_reader() - make the next write to the tensor wait for what has been submitted to
 * `stream` by then, such as a kernel that reads rows which are truncated away and written anew.
 * It may be called before that is submitted; the stream must be valid until the write.
 * VMM_STREAM_NONE is ignored.
 * Returns VMM_ERR_INVALID (a stream of another device), VMM_ERR_DRIVER, VMM_ERR_OUT_OF_MEMORY (of
 * the host), VMM_ERR_FORKED. No driver call for a stream that the tensor knows. */
VMM_API vmm_status vmm_add_reader(vmm_tensor *tensor, vmm_stream stream);

/* The stream of the last write, NULL where there was none or on the host. */
VMM_API vmm_stream vmm_last_stream(const vmm_tensor *tensor);

/* vmm_stream_wait() - make `waiter` wait for what has been submitted to `producer`.
 * Does nothing on the host, and where the two are the same stream. */
VMM_API vmm_status vmm_stream_wait(vmm_device *device, vmm_stream waiter, vmm_stream producer);

/* vmm_event_*() - to learn when the work submitted to a stream so far is done, for instance
 * that an append has read its source. On the host an event is done when it is made.
 * Recording returns VMM_ERR_CAPTURING while `stream` is captured: such an event would never be
 * done. It also returns VMM_ERR_INVALID (a stream of another device), VMM_ERR_OUT_OF_MEMORY,
 * VMM_ERR_DRIVER, VMM_ERR_FORKED. */
typedef struct vmm_event vmm_event;
VMM_API vmm_status vmm_event_record(vmm_device *device, vmm_stream stream, vmm_event **out);
VMM_API vmm_status vmm_event_query(vmm_event *event, int *done);
VMM_API void vmm_event_close(vmm_event *event); /* NULL is ignored */

/* ---- 8. Graphs ----------------------------------------------------------------
 *
 * A graph that is captured once can append at every replay, while the tensor grows: the row
 * that is next is a word on the device, the cursor. vmm_append() and vmm_append_many() of device
 * sources, on a stream that is being captured, add a kernel to the graph that appends at the
 * cursor and moves it on, and append nothing now: the host's length stays. Then, for each replay:
 *
 *     vmm_map(tensor, vmm_length(tensor) + n);       // ahead; no driver call on most steps
 *     cuGraphLaunch(graph, stream);
 *     vmm_advance(tensor, n);                        // the host follows; no wait
 *
 * The kernel knows how many rows are mapped. Past them it writes nothing, moves no cursor and
 * sets a flag, which vmm_advance() reports. vmm_map() has told the device when it returns, so
 * it must return before the graph is launched. For a graph that appends to several tensors there is
 * vmm_map_many(). One that does, or that appends several times, overflows for each tensor by itself;
 * truncate those that are ahead.
 *
 * Between a replay and its vmm_advance(), vmm_grow(), vmm_append() and vmm_trim() return
 * VMM_ERR_BUSY. To be certain of that they wait for the device, as long as a graph lives that
 * appends to the tensor, and once after; and so does vmm_truncate(), which gives up what has not
 * been followed, the flag of an overflow included.
 *
 * Where append, grow or truncate has returned the driver's error, the device may have moved the
 * cursor all the same. The next of these calls sets it anew; with a graph that appends it looks
 * first, as above, and so do vmm_cursor() and vmm_advance() until then: VMM_ERR_BUSY says where
 * the cursor is, if that is neither the host's length nor what is being followed. Meanwhile no
 * append is captured (VMM_ERR_BUSY).
 *
 * A graph that appends pins the tensor (see 9.) until it and all that was instantiated of it are
 * destroyed, which some drivers notice a moment later. Truncating, trimming and mapping are
 * allowed meanwhile; what a replay finds trimmed away is an overflow. The graph does so by a user
 * object of CUDA's, for which the driver charges each launch of it (1.7 us on an H100, driver
 * 580): whoever knows when the graph ends can have the pins instead, vmm_graph_pins_open().
 *
 * cuGraphExecUpdate() has the executable graph pin what the graph pins that it was updated from,
 * and no longer what it pinned before. hipGraphExecUpdate() leaves it as it was: keep that graph as
 * long as the executable one. No driver moves a pin where single nodes of an executable graph are
 * changed.
 *
 * A replay is ordered by its stream like any work, and the library does not see it: launch it on
 * the stream that was captured, or order streams yourself. Not captured: host sources and
 * vmm_append_lanes() (VMM_ERR_CAPTURING). While appends to a tensor are being captured, growing,
 * truncating, trimming and forking it return VMM_ERR_CAPTURING.
 */

/* vmm_cursor() - the lengths of the tensor in memory of its device, for kernels to read:
 * vmm_length_count() of them, in `out`. Made by the first call or the first captured append;
 * from then on kept current, in stream order, by append, grow, truncate and replays. The
 * address stays. No one else may write there.
 *   stream   work that it is given from now on finds the cursor current; VMM_STREAM_NONE for
 *            no such order. On the host it is ignored.
 * Returns VMM_ERR_INVALID, VMM_ERR_OVERFLOW (a capacity above INT32_MAX), VMM_ERR_UNSUPPORTED
 * (more than 65535 lengths), VMM_ERR_OUT_OF_MEMORY, VMM_ERR_CAPTURING, VMM_ERR_DRIVER,
 * VMM_ERR_BUSY, VMM_ERR_FORKED.
 * Cost: the first call allocates a few hundred bytes, which no budget counts; others what
 * vmm_handoff() does. With a cursor, append, grow and truncate launch one more kernel, and
 * whatever maps or trims writes one word and waits until it is there. Allowed in a capture. */
VMM_API vmm_status vmm_cursor(vmm_tensor *tensor, vmm_stream stream, int32_t **out);

/* Whether the tensor has one, so that vmm_grow() is more than counting. */
VMM_API int vmm_has_cursor(const vmm_tensor *tensor);

/* vmm_advance() - the host follows replays that have appended: every length becomes `n_rows`
 * more. The rows are there once the replays have run.
 * Returns VMM_ERR_INVALID (no append has been captured), VMM_ERR_BUSY, VMM_ERR_FORKED;
 * VMM_ERR_CAPACITY for an overflow: more rows than are mapped, or a replay has set the flag,
 * which is taken back. Such a replay has appended nothing: map more, and replay again.
 * No driver call; where setting the cursor has failed (see above) it waits for the device, and
 * returns VMM_ERR_BUSY, VMM_ERR_CAPTURING and VMM_ERR_DRIVER, too. */
VMM_API vmm_status vmm_advance(vmm_tensor *tensor, size_t n_rows);

/* Whether it would wait: for those who hold a lock that others need meanwhile. */
VMM_API int vmm_advance_waits(const vmm_tensor *tensor);

/* vmm_graph_pins_open() - be who keeps the tensors of a graph. Call it while `stream` is being
 * captured, before what appends: a tensor that is appended to later in this capture, from any
 * stream of it, is pinned until `out` is closed, and not by the graph.
 * Returns VMM_ERR_INVALID (NULL, a stream of another device, or one that is not being captured),
 * VMM_ERR_CAPTURING (the capture has been invalidated), VMM_ERR_DRIVER, VMM_ERR_OUT_OF_MEMORY,
 * VMM_ERR_FORKED. Two driver calls. Thread-safe. */
typedef struct vmm_graph_pins vmm_graph_pins;
VMM_API vmm_status vmm_graph_pins_open(vmm_device *device, vmm_stream stream, vmm_graph_pins **out);

/* vmm_graph_pins_close() - drop these pins: when the graph and all that was instantiated of it
 * have been destroyed, or the capture has failed. Replays may still be in flight. Never fails;
 * NULL is ignored. Thread-safe. */
VMM_API void vmm_graph_pins_close(vmm_graph_pins *pins);

/* vmm_stream_is_capturing() - is it, in `out`: would an append on it be captured? 0 on the host,
 * for the default stream, and after a failure. Returns VMM_ERR_INVALID, VMM_ERR_CAPTURING (the
 * capture has been invalidated), VMM_ERR_DRIVER, VMM_ERR_FORKED. One driver call. */
VMM_API vmm_status vmm_stream_is_capturing(vmm_device *device, vmm_stream stream, int *out);

/* ---- 9. Pins: memory others are looking at -----------------------------------
 *
 * A pin says that someone outside reads rows of the tensor: a framework's tensor over
 * its memory, say. While a pin on the first n rows exists, truncating below n and closing
 * are refused with VMM_ERR_PINNED; growing and trimming are not. After vmm_release() the
 * memory lives as long as the last pin.
 */
typedef struct vmm_pin vmm_pin;

/* vmm_pin_rows() - pin the first `n_rows` rows; 0 pins the memory but no row.
 * Returns VMM_ERR_INVALID (above the length), VMM_ERR_OUT_OF_MEMORY, VMM_ERR_FORKED.
 * Thread-safe against everything but vmm_close() and vmm_release() of this tensor. */
VMM_API vmm_status vmm_pin_rows(vmm_tensor *tensor, size_t n_rows, vmm_pin **out);

/* vmm_pin_cursor() - pin the tensor for someone who reads its cursor, or appends at it, as graphs
 * do: it cannot be closed, and no row of it is pinned, whatever vmm_pin_shown() says.
 * Returns VMM_ERR_INVALID (NULL), VMM_ERR_OUT_OF_MEMORY, VMM_ERR_FORKED. Thread-safe as the
 * above. */
VMM_API vmm_status vmm_pin_cursor(vmm_tensor *tensor, vmm_pin **out);

/* vmm_unpin() - drop a pin. Never fails; makes no CUDA call and takes no lock that is held
 * across one, so it may run on any thread, inside a host callback of a stream, and after
 * the owner of the tensor is gone. NULL is ignored. */
VMM_API void vmm_unpin(vmm_pin *pin);

/* vmm_pin_shown() - from now on, and until no pin of rows is left (of 0 rows, too), any such pin
 * covers all rows that are in use now: for arrays that are cut out of the memory behind one that was pinned before
 * they were appended. Never fails. */
VMM_API void vmm_pin_shown(vmm_tensor *tensor);

/* The number of pins that exist, and the first row that may be truncated away. */
VMM_API size_t vmm_pin_count(const vmm_tensor *tensor);
VMM_API size_t vmm_pinned_rows(const vmm_tensor *tensor);

/* ---- 10. Statistics ---------------------------------------------------------- */

/* Driver calls, counted by name. */
/* clang-format off */
#define VMM_CALLS(X)          \
    X(reserve)                \
    X(free)                   \
    X(create)                 \
    X(release)                \
    X(map)                    \
    X(unmap)                  \
    X(set_access)             \
    X(copy)                   \
    X(fill)                   \
    X(launch)                 \
    X(event_record)           \
    X(event_wait)             \
    X(event_query)            \
    X(event_synchronize)      \
    X(fence)                  \
    X(stream_synchronize)     \
    X(stream_check)           \
    X(stream_capture)         \
    X(allocate)               \
    X(allocate_host)          \
    X(write)                  \
    X(read)                   \
    X(retain)
/* clang-format on */

typedef enum vmm_call {
#define VMM_CALL_ENUM(name) VMM_CALL_##name,
    VMM_CALLS(VMM_CALL_ENUM)
#undef VMM_CALL_ENUM
        VMM_CALL_COUNT
} vmm_call;

/* "map" for VMM_CALL_map, NULL out of range. */
VMM_API const char *vmm_call_name(vmm_call call);

typedef struct vmm_tensor_stats {
    size_t reserved_bytes; /* address space */
    size_t mapped_bytes;   /* memory in this tensor's blocks */
    size_t used_bytes;     /* length * row_bytes; of a ragged tensor, each lane's own */
    size_t slack_bytes;    /* mapped_bytes - used_bytes, 0 at least */
    size_t block_count;
    uint64_t driver_calls[VMM_CALL_COUNT]; /* made by calls on this tensor */
} vmm_tensor_stats;

typedef struct vmm_pool_stats {
    size_t in_use_bytes;    /* in blocks that tensors have mapped */
    size_t free_bytes;      /* in blocks that nothing maps, kept for the next growth */
    size_t queued_bytes;    /* given back, waiting for a fence */
    size_t lookahead_bytes; /* mapped ahead of growth */
    size_t recycled_bytes;  /* given back and still mapped, known not to be touched any more */
    size_t parked_bytes;    /* that the driver refused to take back; retried at each call */
    size_t peak_bytes;      /* the most that was ever held in all */
    size_t max_bytes;       /* the budget, 0 for none */
    uint64_t driver_calls[VMM_CALL_COUNT]; /* made for this pool and its tensors */
} vmm_pool_stats;

/* Fill `out`. No driver call. vmm_pool_statistics() is thread-safe; vmm_stats() is against
 * everything but vmm_close() and vmm_release() of this tensor, and while another thread changes
 * it, its figures may be of different moments. */
VMM_API vmm_status vmm_stats(const vmm_tensor *tensor, vmm_tensor_stats *out);
VMM_API vmm_status vmm_pool_statistics(vmm_pool *pool, vmm_pool_stats *out);

/* The block size of a pool: VMM_BLOCK_AUTO or bytes. */
VMM_API size_t vmm_pool_block_bytes(const vmm_pool *pool);

/* ---- 11. Threads, processes, exit ---------------------------------------------
 *
 * Devices and pools may be used from any thread. One tensor has one writer at a time:
 * the calls on it (map, grow, append, advance, cursor, truncate, trim, fork, handoff, close, release) must
 * not run at once; pins may be dropped at any time, and a reference that vmm_find() gave. Objects do not survive fork():
 * in the child every call on one returns VMM_ERR_FORKED, closing and releasing do
 * nothing, and "host" can be opened anew (the memory is kept out of the child).
 * Nothing need be closed at exit.
 */

#ifdef __cplusplus
}
#endif
#endif /* VMM_H */
