/* fuzz_vmm.c - the bytes of an input become calls of vmm.h, with arguments that are right and
 * wrong, in any order, on the host and on the simulated CUDA driver, some of whose calls are
 * made to fail. After each call: the status is one that fits, a failure has changed nothing,
 * contents and books are those of the shadows, the pools stay within their budgets. At the
 * end nothing is alive.
 *
 * `make fuzz` links it to libFuzzer; tests/c/test_fuzz_corpus.c runs the corpus through it.
 */
#include "fuzz.h"

const char *fuzz_device;

/* New ones come last, so that inputs go on meaning what they did. */
static void (*const moves[])(void) = {
    do_reserve, do_append,    do_grow,         do_append,         do_failure,    do_truncate,
    do_trim,    do_map,       do_fork,         do_append_many,    do_pin,        do_unpin,
    do_close,   do_release,   do_pool_trim,    do_pool_create,    do_pool_close, do_pool_release,
    do_bracket, do_hook,      do_handoff,      do_stream_wait,    do_event,      do_device,
    do_nothing, do_alloc,     do_append_lanes, do_failure,        do_free,       do_find,
    do_capture, do_replay,    do_advance,      do_replay,         do_cursor,     do_destroy_graph,
    do_less,    do_lookahead, do_append_lanes, do_truncate_lanes, do_capture,    do_map_many,
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    /* Small pages, so that small inputs map many; read when the simulator is loaded. */
    setenv("VMM_SIM_GRANULARITY", "4096", 0);
    setenv("VMM_SIM_DELAY_US", "0", 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    memset(&w, 0, sizeof w);
    w.data = data;
    w.left = size;
    bool on_cuda = next() & 1;
    world_open(fuzz_device ? fuzz_device : on_cuda ? "cuda:0" : "host");
    while (w.left) {
        moves[next() % LENGTH_OF(moves)]();
        check_everything();
    }
    world_close();
    return 0;
}
