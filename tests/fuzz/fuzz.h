/* fuzz.h - what the files of the fuzzer share.
 *
 *   fuzz_vmm.c   one input: the moves in turn, the end
 *   world.c      the input's bytes, calls that are made to fail, what there is and its books
 *   pools.c      pools, look-ahead, callbacks, allocations
 *   tensors.c    tensors and pins
 *   appends.c    appending, from sources that are right and wrong
 *   graphs.c     cursors, captured appends, replays
 *   streams.c    streams, events, devices, nothing at all
 *   shadow.h     what a tensor must hold, and sources
 *
 * A move takes its arguments from the input, makes a call by TRY(), and brings the shadows up to
 * date. After each move all books are compared.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include "shadow.h"

#define MAX_TENSORS 6
#define MAX_POOLS 2
#define MAX_PINS 8
#define MAX_EVENTS 4
#define MAX_ALLOCATIONS 4
#define MAX_GRAPHS 3
#define BIT(status) (1u << (status))
/* What a call may return when a driver call was made to fail. */
#define INJECTED                                                                                   \
    (BIT(VMM_ERR_DRIVER) | BIT(VMM_ERR_OUT_OF_MEMORY) | BIT(VMM_ERR_CAPTURING) |                   \
     BIT(VMM_ERR_INVALID) | BIT(VMM_ERR_NO_DEVICE) | BIT(VMM_ERR_UNSUPPORTED))
#define OK_OR_NO_MEMORY (BIT(VMM_OK) | BIT(VMM_ERR_OUT_OF_MEMORY))

/* "host" or "cuda:0": every input on this device; NULL: the input says on which. */
extern const char *fuzz_device;

typedef struct pool_slot {
    vmm_pool *pool;
    size_t block_bytes, max_bytes, lookahead_bytes;
    size_t n_captures;
    size_t n_hooks;
    bool has_hidden; /* tensors of it were given up under pins: the books cannot be compared */
} pool_slot;

/* A graph that appends a source to each of its tensors, several times. */
typedef struct graph {
    void *exec, *stream;
    int times;
    size_t n;
    struct {
        shadow *of;
        source source;
    } jobs[MAX_TENSORS]; /* that have rows */
} graph;

extern struct fuzz_world {
    const uint8_t *data;
    size_t left;
    fixture f;
    pool_slot pools[MAX_POOLS];
    shadow *tensors[MAX_TENSORS];
    size_t n_tensors;
    shadow *busy[MAX_TENSORS]; /* in the call that is being made */
    size_t n_busy;
    struct {
        vmm_pin *pin;
        shadow *of;
        size_t n_rows;
    } pins[MAX_PINS];
    size_t n_pins;
    graph graphs[MAX_GRAPHS];
    size_t n_graphs;
    struct {
        uint8_t *pointer;
        size_t bytes, mapped_bytes;
        int pool;
        uint8_t contents;
    } allocations[MAX_ALLOCATIONS];
    size_t n_allocations;
    vmm_event *events[MAX_EVENTS];
    size_t n_events;
    struct {
        bool armed;
        uint8_t call, nth, code, times;
    } failure;
    long failed_before;
    bool any_failed;
    long events_before, allocations_before, host_allocations_before;
} w;

/* Made once: the simulator keeps what is left of a stream. */
extern void *streams[2];

/* ---- world.c ------------------------------------------------------------------------------ */

uint8_t next(void);
#define PICK(table) ((table)[next() % LENGTH_OF(table)])

void world_open(const char *device);
/* At the end nothing is alive. */
void world_close(void);
void check_everything(void);

/* Make the call; end the program if what it returns is neither expected nor injected. */
#define TRY(expected, call) (arm(), settle((call), (expected), #call))
/* The failure that was asked for meets the next call of libvmm, and none of ours. */
void arm(void);
vmm_status settle(vmm_status status, unsigned expected, const char *call);

shadow *any_tensor(void);
int any_pool(void); /* -1: there is none */
vmm_stream any_stream(void);
shadow *add_tensor(vmm_tensor *tensor, const vmm_spec *spec, int pool);
/* It has been closed, or given up under what keeps it. */
void remove_tensor(shadow *s);
/* One thing less keeps it: a pin, a graph. */
void drop_keeper(shadow *s);
size_t pinned_rows(const shadow *s);

/* Around a call that may map: a callback must leave these tensors alone. What is mapped is read
 * anew after a success, and checked after a failure. */
void begin(shadow *s);
void end(vmm_status status);
bool is_busy(const shadow *s);

/* ---- pools.c, for the others --------------------------------------------------------------- */

/* Brackets are open, so that no fence may be taken. */
bool is_capturing(void);
void free_allocation(size_t i);

/* ---- tensors.c, for the end -------------------------------------------------------------------- */

void close_tensor(shadow *s);

/* ---- appends.c, for graphs.c ----------------------------------------------------------------- */

/* A source for `s` of rows that fit. */
void make_source(source *src, const shadow *s, bool on_device);

/* ---- graphs.c, for the others ------------------------------------------------------------------ */

/* What a call may return that starts from the host's lengths, instead of `expected`. */
unsigned expected_with_graphs(const shadow *s, unsigned expected);
/* The same for a truncation, which gives up what the host has not followed. */
unsigned expected_of_truncation(const shadow *s, unsigned expected);
/* The cursor has been set to the host's lengths. */
void cursor_is_current(shadow *s);
/* The rows that are in use, and the cursor, are what they must be. */
void check_tensor(shadow *s);
void destroy_graph(size_t i);

/* ---- the moves ----------------------------------------------------------------------------------- */

void do_pool_create(void);
void do_pool_trim(void);
void do_pool_close(void);
void do_pool_release(void);
void do_bracket(void);
void do_hook(void);
void do_lookahead(void);
void do_alloc(void);
void do_free(void);

void do_reserve(void);
void do_map(void);
void do_map_many(void);
void do_grow(void);
void do_truncate(void);
void do_truncate_lanes(void);
void do_trim(void);
void do_fork(void);
void do_close(void);
void do_release(void);
void do_find(void);
void do_pin(void);
void do_unpin(void);

void do_append(void);
void do_append_many(void);
void do_append_lanes(void);

void do_cursor(void);
void do_capture(void);
void do_replay(void);
void do_advance(void);
void do_destroy_graph(void);

void do_handoff(void);
void do_stream_wait(void);
void do_event(void);
void do_device(void);
void do_nothing(void);
void do_less(void);
void do_failure(void);

#endif /* FUZZ_H */
