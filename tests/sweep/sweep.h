/* sweep.h - every call that can fail fails, once in each place.
 *
 * A scene is one operation of vmm.h with what has to be there before it. For each scene, in
 * each layout, with each kind of block, the sweep makes the k-th call fail that the operation
 * makes of its driver or of the C library, for k = 1, 2, ... until the operation makes no k-th
 * call. Each attempt has a world of its own: device, pool, tensors.
 *
 *   sweep.c   the loop over all of this, and the report
 *   world.c   a world: made, compared before and after, closed with nothing left
 *   scenes.c  the scenes
 *   open.c    opening a device, which needs a process for each attempt
 *   faults.c  the C library's calls
 */
#ifndef SWEEP_H
#define SWEEP_H

#include "check.h"
#include "faults.h"

/* Where growth finds its blocks. */
typedef enum block_kind {
    BLOCKS_FRESH,    /* created */
    BLOCKS_RECYCLED, /* in the pool's free list */
    BLOCKS_STALE,    /* trimmed off the same tensor, still mapped */
    BLOCK_KINDS
} block_kind;

typedef struct config {
    const char *device;
    bool is_gpu;
    vmm_layout layout;
    block_kind blocks;
    bool is_fixed; /* block size: fixed, or auto */
} config;

#define MAX_SOURCES 4
#define MAX_TENSORS 3

/* Rows to append: an array, and the numbers that its rows have in a model. */
typedef struct rows {
    vmm_array array;
    int64_t shape[VMM_MAX_NDIM], strides[VMM_MAX_NDIM];
    uint32_t first_number;
    size_t n_rows;
    void *memory;
} rows;

typedef struct world {
    const config *config;
    fixture f;
    model models[MAX_TENSORS]; /* the first one is what most scenes are about */
    size_t n_models;
    rows sources[MAX_SOURCES];
    size_t n_sources;
    vmm_stream streams[2];

    /* What scenes keep here is closed with the world. */
    vmm_pool *other_pool;
    vmm_device *other_device;
    vmm_event *event;
    vmm_pin *pin;
    vmm_tensor *made; /* by the operation */
    void *memory;     /* the same: an allocation of the pool */
    vmm_device_info info;
    int done;

    void *graph; /* of a capture that has ended */
    void *exec;  /* that appends, and goes with the world */
    bool is_capturing;
    bool is_kept; /* by a vmm_graph_pins: what the graph appends to */
    vmm_graph_pins *pins;

    long allocations;               /* of the device, before the operation */
    long lost_events;               /* that the driver has refused to destroy, and keeps */
    bool has_abandoned_pool;        /* whose books cannot be seen any more */
    unsigned long long other_bytes; /* of the device, that are not the pools' */
    struct snapshot *at_start;
} world;

typedef struct scene {
    const char *name;
    int flags;
    void (*prepare)(world *w);
    vmm_status (*run)(world *w);
    /* Is the result right, once it has succeeded? Brings the models up to date. */
    void (*check)(world *w);
    size_t max_blocks; /* of the pool's budget, in blocks of the granularity; 0: none */
} scene;

/* scene.flags: what makes no difference is swept once, */
enum {
    CUDA_ONLY = 1,
    ONE_LAYOUT = 2, /* seq */
    ONE_BLOCKS = 4, /* fresh */
    ONE_SIZE = 8,   /* auto */
    FENCES = 16,    /* with older drivers, too */
    LANES = 512,    /* in the layouts that have several */
    /* and what a failed call may do. */
    SUBMITS = 32,          /* it may have queued memory, or taken back what was queued */
    SEVERAL = 1024,        /* undoing one tensor, it may keep as free what was parked of another */
    CLOSES = 64,           /* its callback may have closed a tensor */
    TAKES_ADDRESSES = 128, /* running out of them is VMM_ERR_DRIVER: no memory would help */
    BUSY = 256,            /* the device answers the first query that it is not ready */
    SHORT = 1024,          /* the budget has refused a block before: of that is the error then */
};

extern const scene scenes[];
extern const size_t n_scenes;

/* ---- world.c ----------------------------------------------------------------------------- */

/* Rows that a tensor begins with, and that an operation adds. */
#define FIRST_ROWS 24
#define MORE_ROWS 24

void world_open(world *w, const config *config, const scene *scene);
/* Everything is closed, and nothing is left of it anywhere. */
void world_close(world *w);

vmm_spec world_spec(const world *w);
/* A tensor of that spec, with `n_rows` rows appended from the host. */
model *world_tensor(world *w, const vmm_spec *spec, size_t n_rows);
typedef enum rows_form { DENSE, STRIDED } rows_form;
/* The array of `n_rows` rows for a tensor; strided, no two of its dimensions are contiguous. */
rows *world_rows(world *w, const model *m, size_t n_rows, vmm_memory memory, rows_form form);
/* Provide blocks for `n_rows` rows as the config says: in the pool's free list, or stale behind
 * the rows of `m`. */
void world_provide(world *w, model *m, const vmm_spec *spec, size_t n_rows);
/* `m` has got the rows of `source`. */
void world_appended(model *m, const rows *source);
void world_wait(const world *w);

/* What must be the same after a failure. */
typedef struct snapshot {
    vmm_pool_stats pool;
    size_t held_bytes;
    size_t length[MAX_TENSORS], mapped[MAX_TENSORS], blocks[MAX_TENSORS];
    long handles, mappings, reservations, events, live_blocks;
    size_t reserved_bytes;
} snapshot;

void snapshot_take(snapshot *s, const world *w);
/* A call has failed: everything is as before. With `exact` the driver has what it had; else
 * some of what was held idle may have gone back, and what could not go back is parked. */
void snapshot_compare(const snapshot *before, const snapshot *after, const scene *scene,
                      bool exact);
/* Whatever has happened: the books agree with what the driver has, and rows that are mapped
 * can be read and written. */
void world_check(world *w);

/* The simulated driver's own interface. */
typedef struct simulator {
    int (*fail)(const char *, long, int, int);
    const char *(*failed_call)(void);
    long (*failed)(void);
    void (*fail_none)(void);
    void (*reset)(void);
    long (*calls)(const char *);
    void (*live)(long *, long *, long *, unsigned long long *);
    void (*live_objects)(long *, long *, long *, long *);
} simulator;
const simulator *the_simulator(void);

/* ---- sweep.c ----------------------------------------------------------------------------- */

/* The program ends well: no message of where it was. */
void say_no_more(void);

/* What is made to fail. */
typedef struct fault {
    fault_kind kind;
    const char *call; /* "*" or one name, of the driver's calls */
    long nth;
    int code;
    int times; /* in a row, < 0: all that follow */
} fault;

void fault_arm(const fault *fault);
/* Returns the first call that failed, or NULL. */
const char *fault_disarm(const fault *fault);
/* Is this the call that has that name, or HIP's that does what CUDA's of that name does? */
bool is_call(const char *call, const char *name);
/* The operation has failed: does the thread's last error say why? */
void fault_check_error(const fault *fault, const char *call, vmm_status status, int flags);

/* One line of the report. */
typedef struct tally {
    long calls;    /* of the operation when nothing fails */
    long points;   /* attempts: places, codes, and how many in a row */
    long refused;  /* of them the operation failed */
    long absorbed; /* it succeeded all the same */
    long parked;   /* of the refused: its undoing failed, too, and left memory parked */
} tally;

/* ---- open.c ------------------------------------------------------------------------------ */

/* Returns false when the operation makes no such call. */
bool sweep_open(const char *device, const fault *fault, tally *tally);

#endif /* SWEEP_H */
