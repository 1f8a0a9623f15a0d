/* A forked process: every call on what it inherited is refused, closing does nothing, the
 * parent goes on undisturbed, and on the host the child can begin anew (invariant 12). */
#include "check.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static const int64_t shape[] = {0, 4096}; /* uint8 */

static int on_oom(void *user, size_t needed_bytes) {
    (void)user, (void)needed_bytes;
    return 0;
}

/* Of a capture that nothing has been appended in; NULL on the host, which has none. */
static vmm_graph_pins *open_graph_pins(const fixture *f) {
    vmm_graph_pins *pins = NULL;
    void *stream;

    if (!f->is_gpu)
        return NULL;
    CHECK_CUDA(cuda()->stream_create(&stream, CUDA_STREAM_NON_BLOCKING));
    CHECK_CUDA(cuda()->begin_capture(stream, CUDA_CAPTURE_GLOBAL));
    CHECK_OK(vmm_graph_pins_open(f->device, stream, &pins));
    drop_capture(stream);
    CHECK_CUDA(cuda()->stream_destroy(stream));
    return pins;
}

static int be_the_child(fixture *f, model *m, vmm_pin *pin, vmm_event *before,
                        vmm_graph_pins *graph_pins) {
    int64_t row_shape[] = {1, 4096};
    uint8_t row[4096] = {0};
    vmm_array source = {.data = row, .dtype = VMM_UINT8, .ndim = 2, .shape = row_shape};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 100};
    vmm_device_info info;
    vmm_pool_stats pool_stats;
    vmm_tensor *tensor = NULL;
    vmm_device *device;
    vmm_pool *pool = NULL;
    vmm_pin *other = NULL;
    vmm_tensor_stats stats;
    vmm_event *event = NULL;
    vmm_graph_pins *others = graph_pins;
    int32_t *cursor = NULL;
    int done = -1;
    long seen = simulated_calls(f);

    CHECK_STATUS(vmm_append(m->tensor, &source, NULL), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_append_many(1, &m->tensor, &source, NULL), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_grow(m->tensor, 1, NULL), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_map(m->tensor, 1), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_truncate(m->tensor, 0, VMM_STREAM_NONE), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_trim(m->tensor), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_fork(m->tensor, 1, &tensor), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_handoff(m->tensor, NULL), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_pin_rows(m->tensor, 1, &other), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_reserve(f->pool, &spec, &tensor), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_pool_trim(f->pool, 1), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_pool_statistics(f->pool, &pool_stats), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_pool_create(f->device, 0, 0, &pool), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_device_query(f->device, &info), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_stats(m->tensor, &stats), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_cursor(m->tensor, NULL, &cursor), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_advance(m->tensor, 1), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_append_lanes(1, &m->tensor, &source, 1, NULL, NULL, NULL), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_truncate_lanes(m->tensor, 0, NULL, NULL, NULL), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_stream_is_capturing(f->device, NULL, &done), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_graph_pins_open(f->device, NULL, &others), VMM_ERR_FORKED);
    CHECK(!cursor && done == 0 && !others);
    done = -1;
    CHECK_STATUS(vmm_pool_on_oom(f->pool, on_oom, NULL), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_pool_capture_begin(f->pool), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_pool_capture_end(f->pool), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_stream_wait(f->device, NULL, NULL), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_event_record(f->device, NULL, &event), VMM_ERR_FORKED);
    CHECK_STATUS(vmm_event_query(before, &done), VMM_ERR_FORKED);
    CHECK(!event && done == -1);
    vmm_event_close(before);
    vmm_graph_pins_close(graph_pins);
    vmm_graph_pins_close(graph_pins); /* they are the parent's: nothing has been freed */
    CHECK_SIZE(vmm_length(m->tensor), m->length); /* what needs no driver still answers */
    CHECK(strstr(vmm_last_error()->message, "parent"));
    if (f->is_gpu)
        CHECK_STATUS(vmm_device_open(f->name, &device), VMM_ERR_FORKED);

    vmm_unpin(pin);
    CHECK_OK(vmm_close(m->tensor));
    vmm_release(m->tensor);
    CHECK_OK(vmm_pool_close(f->pool));
    vmm_pool_release(f->pool);
    vmm_device_close(f->device);
    CHECK(simulated_calls(f) == seen);

    CHECK_OK(vmm_device_open("host", &device));
    CHECK_OK(vmm_pool_create(device, 0, 0, &pool));
    CHECK_OK(vmm_reserve(pool, &spec, &tensor));
    for (int i = 0; i < 50; i++)
        CHECK_OK(vmm_append(tensor, &source, NULL));
    CHECK_OK(vmm_close(tensor));
    CHECK_OK(vmm_pool_close(pool));
    vmm_device_close(device);
    return 0;
}

int main(int argc, char **argv) {
    fixture f = fixture_open(argc, argv, 0, 0);
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 5000};
    vmm_pin *pin;
    vmm_event *event;
    int status;

    if (f.is_gpu)
        cuda();
    model m = model_open(&f, &spec);
    model_append(&m, VMM_UINT8, 500, VMM_MEMORY_HOST, NULL);
    CHECK_OK(vmm_pin_rows(m.tensor, 500, &pin));
    CHECK_OK(vmm_event_record(f.device, NULL, &event));
    vmm_graph_pins *graph_pins = open_graph_pins(&f);
    synchronize(&f);

    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0)
        exit(be_the_child(&f, &m, pin, event,
                          graph_pins)); /* by exit(), which writes down what was covered */
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);

    /* The memory is kept out of the child, so the parent copies no page on its next write. */
    model_append(&m, VMM_UINT8, 700, VMM_MEMORY_HOST, NULL);
    model_check(&m);
    CHECK_SIZE(vmm_pin_count(m.tensor), 1);
    vmm_unpin(pin);
    vmm_event_close(event);
    vmm_graph_pins_close(graph_pins);
    if (!f.is_gpu) { /* touching it there is a fault, not another's data */
        child = fork();
        if (child == 0) {
            volatile uint8_t *byte = m.base;
            signal(SIGSEGV, SIG_DFL); /* a sanitizer would report it */
            _exit(*byte == row_byte(m.numbers[0], 0) ? 3 : 4);
        }
        CHECK(waitpid(child, &status, 0) == child);
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    }
    model_close(&m);
    fixture_close(&f);
    return 0;
}
