/* The simulated driver: misuse of work on streams, late and unordered work, calls where none may
 * be made; and their right use. */
#include "sim_cases.h"

/* ---- work -------------------------------------------------------------------------------------- */
static void write_without_access(void) {
    mapped();
    fill(stream);
}

static void write_read_only(void) {
    mapped();
    grant(base, GRANULE, CU_MEM_ACCESS_FLAGS_PROT_READ);
    fill(stream);
}

static void write_past_the_mapping(void) {
    usable();
    OK(cuMemsetD8Async(base + 1, 1, GRANULE, stream));
}

static void copy_a_huge_pitch(void) {
    usable();
    const CUDA_MEMCPY2D copy = {.srcMemoryType = CU_MEMORYTYPE_HOST,
                                .srcHost = &base,
                                .srcPitch = 8,
                                .dstMemoryType = CU_MEMORYTYPE_DEVICE,
                                .dstDevice = base,
                                .dstPitch = (size_t)1 << 31,
                                .WidthInBytes = 4,
                                .Height = 2};
    sim.cuMemcpy2DAsync_v2(&copy, stream);
}

static void use_a_destroyed_stream(void) {
    usable();
    OK(cuStreamDestroy_v2(stream));
    sim.cuMemsetD8Async(base, 1, 1, stream);
}

static void use_a_destroyed_event(void) {
    CUevent event;
    begin();
    OK(cuEventCreate(&event, 0));
    OK(cuEventDestroy_v2(event));
    sim.cuEventRecord(event, stream);
}

static CUfunction append_kernel(void) {
    static const char ptx[] =
        ".version 6.3\n.target sm_75\n.entry " VMM_APPEND_KERNEL "\n" /* by name: */;
    CUmodule module;
    CUfunction function;
    OK(cuModuleLoadData(&module, ptx));
    OK(cuModuleGetFunction(&function, module, VMM_APPEND_KERNEL));
    GIVES(cuModuleGetFunction(&function, module, "no_such_kernel"), CUDA_ERROR_NOT_FOUND);
    return function;
}

/* Copy 3 x 8 bytes, 16 apart at the source, dense at the destination. */
static int launch(CUdeviceptr dst, CUdeviceptr src, unsigned unit, unsigned threads) {
    vmm_append_args args = {{{.dst = dst,
                              .src = src,
                              .n_units = 24 / unit,
                              .run_units = 8 / unit,
                              .unit_bytes = unit,
                              .n_outer = 1,
                              .count = {3},
                              .dst_stride = {8},
                              .src_stride = {16}}}};
    void *params[] = {&args};
    CUfunction kernel = append_kernel();
    return sim.cuLaunchKernel(kernel, 1, 1, 1, threads, 1, 1, 0, stream, params, NULL);
}

static void launch_over_unmapped(void) {
    usable();
    launch(base + GRANULE - 16, base, 8, VMM_APPEND_BLOCK_THREADS);
}

static void launch_misaligned(void) {
    usable();
    launch(base + 4, base + 64, 8, VMM_APPEND_BLOCK_THREADS);
}

static void launch_other_threads(void) {
    usable();
    launch(base, base + 64, 8, 64);
}

static void right_launch(void) {
    usable();
    uint64_t *memory = (uint64_t *)(uintptr_t)base;
    for (uint64_t i = 0; i < 6; i++)
        memory[64 + i] = i;
    CHECK(launch(base, base + 512, 4, VMM_APPEND_BLOCK_THREADS) == CUDA_SUCCESS);
    OK(cuStreamSynchronize(stream));
    CHECK(memory[0] == 0 && memory[1] == 2 && memory[2] == 4);
    close_all();
}

static void load_garbage(void) {
    CUmodule module;
    begin();
    sim.cuModuleLoadData(&module, "not a kernel");
}

static void right_old_driver(void) {
    static const uint32_t fatbin[] = {0xBA55ED50u, 1, 0, 0};
    CUmodule module;
    void *address;
    int found;
    begin();
    GIVES(cuModuleLoadData(&module, fatbin), CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    GIVES(cuModuleLoadData(&module, ".version 9.0\n.target sm_75\n"),
          CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    OK(cuGetProcAddress_v2("cuCtxRecordEvent", &address, 12000, 0, &found));
    CHECK(!address && found == CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
    OK(cuGetProcAddress_v2("cuMemAlloc", &address, 12000, 0, &found));
    CHECK(address == (void *)sim.cuMemAlloc_v2);
}

static void no_init(void) {
    int count;
    sim.cuDeviceGetCount(&count);
}

static void no_context(void) {
    CUstream created;
    OK(cuInit(0));
    sim.cuStreamCreate(&created, 0);
}

static void call_driver(void *unused) {
    int count;
    (void)unused;
    sim.cuDeviceGetCount(&count);
}

static void call_in_a_callback(void) {
    begin();
    OK(cuLaunchHostFunc(stream, call_driver, NULL));
    sim.vmm_sim_quiesce();
}

static void use_a_stream_of_another_device(void) {
    usable();
    OK(cuDevicePrimaryCtxRetain(&context, 1));
    OK(cuCtxSetCurrent(context));
    fill(stream);
}

static void call_in_a_forked_child(void) {
    int status;
    begin();
    pid_t child = fork();
    if (child == 0) {
        call_driver(NULL);
        _exit(0);
    }
    waitpid(child, &status, 0);
    CHECK(WIFSIGNALED(status));
    abort();
}

/* ---- late, unordered ------------------------------------------------------------------------------ */
static void unmap_without_a_fence(void) {
    usable();
    fill(stream);
    sim.cuMemUnmap(base, GRANULE);
}

/* It has run, but nobody asked: luck is no fence. */
static void unmap_by_luck(void) {
    usable();
    fill(stream);
    sim.vmm_sim_quiesce();
    sim.cuMemUnmap(base, GRANULE);
}

static void unmap_behind_an_early_fence(void) {
    CUevent event;
    usable();
    fill(stream);
    OK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(cuCtxRecordEvent(context, event));
    fill(stream);
    OK(cuEventSynchronize(event));
    sim.cuMemUnmap(base, GRANULE);
}

static void right_fence(void) {
    CUevent event;
    usable();
    sim.vmm_sim_hold();
    fill(stream);
    OK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(cuCtxRecordEvent(context, event));
    OK(cuStreamDestroy_v2(stream));
    GIVES(cuEventQuery(event), CUDA_ERROR_NOT_READY);
    CHECK(sim.vmm_sim_pending() == 1);
    sim.vmm_sim_go();
    while (sim.cuEventQuery(event) == CUDA_ERROR_NOT_READY)
        usleep(100);
    CHECK(*(char *)(uintptr_t)base == 1);
    close_all();
}

static void right_luck_where_it_is_allowed(void) {
    usable();
    fill(stream);
    sim.vmm_sim_quiesce();
    close_all();
}

static void write_on_two_streams(void) {
    usable();
    fill(stream);
    fill(other);
}

static void right_hand_off(void) {
    CUevent event, start, stop;
    CUstream blocking;
    float milliseconds = -1;
    usable();
    OK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(cuEventCreate(&start, 0));
    OK(cuEventCreate(&stop, 0));
    OK(cuStreamCreate(&blocking, 0));
    OK(cuEventRecord(start, stream));
    fill(stream);
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(other, event, 0));
    fill(other);
    OK(cuEventRecord(stop, other));
    OK(cuEventRecord(event, other));
    OK(cuStreamWaitEvent(NULL, event, 0)); /* the default stream, and so the blocking one */
    fill(blocking);
    fill(NULL);
    fill(blocking);
    OK(cuStreamSynchronize(blocking));
    OK(cuEventElapsedTime(&milliseconds, start, stop));
    CHECK(milliseconds >= 0);
    close_all();
}

static const test_case cases[] = {
    MISUSE(write_without_access, "mapped but without access"),
    MISUSE(write_read_only, "mapped but read-only"),
    MISUSE(write_past_the_mapping, "unmapped from"),
    MISUSE(copy_a_huge_pitch, "cuMemcpy2DAsync: destination pitch"),
    MISUSE(use_a_destroyed_stream, "was destroyed before"),
    MISUSE(use_a_destroyed_event, "cuEventRecord: event"),
    MISUSE(launch_over_unmapped, "cuLaunchKernel: " VMM_APPEND_KERNEL " writes"),
    MISUSE(launch_misaligned, "is no multiple of 8"),
    MISUSE(launch_other_threads, "made for blocks of 128"),
    RIGHT(right_launch),
    MISUSE(load_garbage, "of no kind that is known"),
    RIGHT_WITH(right_old_driver, "VMM_SIM_DRIVER_VERSION", "12000"),
    MISUSE(no_init, "called before cuInit"),
    MISUSE(no_context, "no context is current"),
    MISUSE(call_in_a_callback, "called inside a host callback"),
    MISUSE_WITH(use_a_stream_of_another_device, "belongs to device 0", "VMM_SIM_DEVICES", "2"),
    MISUSE(call_in_a_forked_child, "called in a forked child"),
    MISUSE(unmap_without_a_fence, "vmm-sim: late work: cuMemUnmap"),
    MISUSE(unmap_by_luck, "a fence is missing"),
    MISUSE(unmap_behind_an_early_fence, "a fence is missing"),
    RIGHT(right_fence),
    RIGHT_WITH(right_luck_where_it_is_allowed, "VMM_SIM_OBSERVE", "0"),
    MISUSE(write_on_two_streams, "nothing orders the two streams"),
    RIGHT_WITH(right_hand_off, "VMM_SIM_DELAY_US", "3000"),
};

int main(int argc, char **argv) {
    return run_cases(argc, argv, cases, LENGTH_OF(cases));
}
