/* Driver libraries that lack something: each is an error that says what, and the host works on.
 * What can be had is used: the fatbin from CUDA 13 on, PTX before and where it is forced. */
#include "check.h"

static const char *expected_text;
static vmm_status expected_status;

static int open_refused(void) {
    vmm_device *device = (vmm_device *)&expected_status;

    for (int i = 0; i < 2; i++) { /* the second time, too */
        CHECK_STATUS(vmm_device_open("cuda:0", &device), expected_status);
        CHECK(!device);
        if (!strstr(vmm_last_error()->message, expected_text))
            FAIL("'%s' is not in '%s'", expected_text, vmm_last_error()->message);
        CHECK(expected_status != VMM_ERR_NO_DRIVER ||
              strstr(vmm_last_error()->message, "device='host' works"));
    }
    CHECK_OK(vmm_device_open("host", &device));
    vmm_device_close(device);
    return 0;
}

static void refused(const char *variable, const char *value, vmm_status status, const char *text) {
    char *before = getenv(variable) ? strdup(getenv(variable)) : NULL;

    expected_status = status;
    expected_text = text;
    setenv(variable, value, 1);
    CHECK(in_child(open_refused) == 0);
    if (before)
        setenv(variable, before, 1);
    else
        unsetenv(variable);
    free(before);
}

static int open_and_append(void) {
    char *arguments[] = {"", "cuda:0"};
    fixture f = fixture_open(2, arguments, 0, 0);
    int64_t shape[] = {0, 100};
    vmm_spec spec = {.ndim = 2, .shape = shape, .dtype = VMM_FLOAT32, .capacity = 1000};
    vmm_device_info info;
    model m = model_open(&f, &spec);

    CHECK_OK(vmm_device_query(f.device, &info));
    if (strcmp(info.kernel, expected_text) != 0)
        FAIL("the kernel is '%s', not '%s'", info.kernel, expected_text);
    model_append(&m, VMM_FLOAT32, 10, VMM_MEMORY_DEVICE, NULL);
    model_check(&m);
    model_close(&m);
    fixture_close(&f);
    return 0;
}

static void uses(const char *variable, const char *value, const char *kernel) {
    expected_text = kernel;
    setenv(variable, value, 1);
    CHECK(in_child(open_and_append) == 0);
    unsetenv(variable);
}

/* Did the build embed a fatbin? Without nvcc there is PTX alone. */
static int has_fatbin(void) {
    vmm_device *device;
    vmm_device_info info;

    CHECK_OK(vmm_device_open("cuda:0", &device));
    CHECK_OK(vmm_device_query(device, &info));
    vmm_device_close(device);
    return strcmp(info.kernel, "fatbin") == 0 ? 10 : 11;
}

static bool is_simulated(void) {
    char *path = getenv("VMM_CUDA_LIBRARY");
    return path && strstr(path, "/sim/");
}

int main(int argc, char **argv) {
    if (argc < 2 || strcmp(argv[1], "host") == 0)
        SKIP("the host has no driver library");
    if (!is_simulated())
        SKIP("only the simulated driver can lack something");
    /* No library; test_device.c has those that are missing and another. */
    refused("VMM_CUDA_LIBRARY", "/proc/self/cmdline", VMM_ERR_NO_DRIVER, "/proc/self/cmdline");
    /* A driver without a call, in general or in the form that is needed. */
    refused("VMM_SIM_LACKS", "cuMemMap", VMM_ERR_NO_DRIVER, "has no cuMemMap of CUDA 10.2");
    refused("VMM_SIM_LACKS", "cuDriverGetVersion", VMM_ERR_NO_DRIVER, "CUDA 11.3 or later");
    refused("VMM_SIM_DRIVER_VERSION", "11020", VMM_ERR_NO_DRIVER, "has no");
    /* A driver without devices; a device that cannot do it, or is not there. */
    refused("VMM_SIM_DEVICES", "0", VMM_ERR_NO_DRIVER, "CUDA_ERROR_NO_DEVICE");
    refused("VMM_SIM_LACKS", "vmm", VMM_ERR_UNSUPPORTED, "virtual memory management");

    int found = in_child(has_fatbin);
    CHECK(found == 10 || found == 11);
    const char *native = found == 10 ? "fatbin" : "ptx";
    uses("VMM_SIM_DRIVER_VERSION", "12080", "ptx");
    uses("VMM_SIM_LACKS", "cuFuncLoad", native);
    uses("VMM_SIM_LACKS", "cuCtxRecordEvent", native);
    uses("VMM_FORCE_PTX", "1", "ptx");
    uses("VMM_FORCE_PTX", "0", native);
    uses("VMM_FORCE_PTX", "", native);
    return 0;
}
