/* open.c - vmm_device_open() fails in each place. What a driver is asked when it is loaded, it is
 * asked once in a process: each attempt has one. */
#include "sweep.h"

#include <sys/wait.h>
#include <unistd.h>

enum { NO_SUCH_CALL = 10, REFUSED, ABSORBED };

/* Is the device in working order? */
static void use(vmm_device *device) {
    int64_t shape[] = {0, 64};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_UINT8, .capacity = 1000};
    vmm_pool *pool;
    vmm_tensor *tensor;
    CHECK_OK(vmm_pool_create(device, 0, 0, &pool));
    CHECK_OK(vmm_reserve(pool, &spec, &tensor));
    CHECK_OK(vmm_grow(tensor, 100, NULL));
    CHECK_OK(vmm_close(tensor));
    CHECK_OK(vmm_pool_trim(pool, 1));
    CHECK_SIZE(held_bytes(pool), 0);
    CHECK_OK(vmm_pool_close(pool));
}

/* What a failure may be called depends on how far the driver has come. */
static void check_error(const fault *fault, const char *call, vmm_status status) {
    const vmm_error *error = vmm_last_error();
    bool is_lookup =
        strcmp(call, "cuGetProcAddress") == 0 || strcmp(call, "cuDriverGetVersion") == 0;
    CHECK(error->status == status && error->message[0]);
    if (fault->kind != FAULT_DRIVER)
        CHECK(status == VMM_ERR_OUT_OF_MEMORY && strstr(error->message, "no host memory"));
    else if (is_lookup)
        CHECK(status == VMM_ERR_NO_DRIVER && strstr(error->message, "no CUDA driver"));
    else
        CHECK(status >= VMM_ERR_OUT_OF_MEMORY && error->driver_code == fault->code &&
              strncmp(error->operation, is_hip ? "hip" : "cu", is_hip ? 3 : 2) == 0);
    if (fault->kind == FAULT_DRIVER && !is_lookup && fault->times == 1)
        CHECK(is_call(error->operation, call));
}

static int attempt(const char *name, const fault *fault) {
    vmm_device *device;
    long before = faults_live_blocks();
    fault_arm(fault);
    vmm_status status = vmm_device_open(name, &device);
    const char *call = fault_disarm(fault);
    if (status) {
        CHECK(call && !device);
        check_error(fault, call, status);
        /* The record of the device's context, which stays retained. */
        CHECK(faults_live_blocks() <= before + 1);
        CHECK_OK(vmm_device_open(name, &device));
    }
    use(device);
    vmm_device_close(device);
    CHECK(faults_live_blocks() <= before + 1);
    return status ? REFUSED : call ? ABSORBED : NO_SUCH_CALL;
}

bool sweep_open(const char *device, const fault *fault, tally *tally) {
    int status;
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        int outcome = attempt(device, fault);
        say_no_more();
        exit(outcome); /* not _exit(): what was covered is to be written down */
    }
    CHECK(waitpid(child, &status, 0) == child);
    if (!WIFEXITED(status) || WEXITSTATUS(status) < NO_SUCH_CALL)
        FAIL("device_open ended with status %x", status);
    if (WEXITSTATUS(status) == NO_SUCH_CALL)
        return false;
    tally->points++;
    tally->refused += WEXITSTATUS(status) == REFUSED;
    tally->absorbed += WEXITSTATUS(status) == ABSORBED;
    return true;
}
