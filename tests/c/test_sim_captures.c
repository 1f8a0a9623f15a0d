/* The simulated driver: misuse of captures and their right use; calls that are made to fail. */
#include "sim_cases.h"

/* ---- captures --------------------------------------------------------------------------------------- */
static CUgraph graph;

static void captured(int mode) {
    OK(cuStreamBeginCapture_v2(stream, mode));
}

static void fence_in_a_capture(void) {
    CUevent event;
    begin();
    OK(cuEventCreate(&event, 0));
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    sim.cuCtxRecordEvent(context, event);
}

static void synchronize_in_a_capture(void) {
    begin();
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    sim.cuCtxSynchronize();
}

static void default_stream_in_a_capture(void) {
    CUstream blocking;
    usable();
    OK(cuStreamCreate(&blocking, 0));
    OK(cuStreamBeginCapture_v2(blocking, CU_STREAM_CAPTURE_MODE_RELAXED));
    sim.cuMemsetD8Async(base, 1, 1, NULL);
}

static void allocate_in_a_capture(void) {
    CUdeviceptr address;
    begin();
    captured(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    sim.cuMemAlloc_v2(&address, 1);
}

static void *create_block(void *relaxed) {
    int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    CUmemGenericAllocationHandle handle;
    if (relaxed)
        OK(cuThreadExchangeStreamCaptureMode(&mode));
    OK(cuMemCreate(&handle, GRANULE, &prop, 0));
    return NULL;
}

static void create_elsewhere(void *relaxed) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, create_block, relaxed) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

static void allocate_elsewhere(void) {
    begin();
    captured(CU_STREAM_CAPTURE_MODE_GLOBAL);
    create_elsewhere(NULL);
}

static void wait_for_the_outside(void) {
    CUevent event;
    begin();
    OK(cuEventCreate(&event, 0));
    OK(cuEventRecord(event, other));
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    sim.cuStreamWaitEvent(stream, event, 0);
}

static void query_a_captured_event(void) {
    CUevent event;
    begin();
    OK(cuEventCreate(&event, 0));
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    OK(cuEventRecord(event, stream));
    sim.cuEventQuery(event);
}

static void leave_work_unjoined(void) {
    CUevent event;
    usable();
    OK(cuEventCreate(&event, 0));
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(other, event, 0));
    fill(other);
    sim.cuStreamEndCapture(stream, &graph);
}

static void launch_over_what_was_unmapped(void) {
    CUgraphExec exec;
    usable();
    captured(CU_STREAM_CAPTURE_MODE_RELAXED);
    fill(stream);
    OK(cuStreamEndCapture(stream, &graph));
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(cuMemUnmap(base, GRANULE));
    sim.cuGraphLaunch(exec, stream);
}

/* Two streams, a hand-off from outside, a replay; growth by a relaxed thread meanwhile. */
static void right_capture(void) {
    CUevent event, outside;
    CUgraphExec exec;
    int state;
    usable();
    memset((void *)(uintptr_t)base, 0, GRANULE);
    OK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(cuEventCreate(&outside, CU_EVENT_DISABLE_TIMING));
    OK(cuEventRecord(outside, other));
    captured(CU_STREAM_CAPTURE_MODE_GLOBAL);
    create_elsewhere(&state);
    OK(cuStreamWaitEvent(stream, outside, CU_EVENT_WAIT_EXTERNAL));
    OK(cuMemsetD8Async(base, 5, 8, stream));
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(other, event, 0));
    OK(cuMemcpyDtoDAsync_v2(base + 8, base, 8, other));
    OK(cuEventRecord(event, other));
    OK(cuStreamWaitEvent(stream, event, 0));
    OK(cuStreamIsCapturing(other, &state));
    CHECK(state == CU_STREAM_CAPTURE_STATUS_ACTIVE);
    OK(cuStreamEndCapture(stream, &graph));
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(cuGraphDestroy(graph));
    CHECK(((char *)(uintptr_t)base)[8] == 0); /* nothing has run yet */
    for (int i = 0; i < 2; i++) {
        OK(cuGraphLaunch(exec, stream));
        OK(cuStreamSynchronize(stream));
        CHECK(((char *)(uintptr_t)base)[15] == 5);
    }
    OK(cuGraphExecDestroy(exec));
    close_all();
}

/* ---- made to fail; what the driver returns -------------------------------------------------------- */
static void right_failures(void) {
    begin();
    sim.vmm_sim_reset();
    CHECK(sim.vmm_sim_fail("cuMemAddressReserve", 2, CUDA_ERROR_OUT_OF_MEMORY, 1) == 0);
    CHECK(sim.vmm_sim_fail("no such call", 1, 1, 1) == -1);
    OK(cuMemAddressReserve(&base, GRANULE, 0, 0, 0));
    GIVES(cuMemAddressReserve(&base, GRANULE, 0, 0, 0), CUDA_ERROR_OUT_OF_MEMORY);
    OK(cuMemAddressReserve(&base, GRANULE, 0, 0, 0));
    CHECK(sim.vmm_sim_fail("*", 2, CUDA_ERROR_NOT_READY, 2) == 0);
    OK(cuCtxSynchronize());
    OK(cuCtxSetCurrent(context)); /* not meant by "*" */
    GIVES(cuCtxSynchronize(), CUDA_ERROR_NOT_READY);
    GIVES(cuMemCreate(&first, GRANULE, &prop, 0), CUDA_ERROR_NOT_READY);
    OK(cuMemCreate(&first, GRANULE, &prop, 0));
    CHECK(sim.vmm_sim_calls("cuMemAddressReserve") == 3 && sim.vmm_sim_failed() == 3);
    CHECK(sim.vmm_sim_calls("*") == 8);
}

static void right_rules_of_the_environment(void) {
    begin();
    OK(cuMemAddressReserve(&base, GRANULE, 0, 0, 0));
    GIVES(cuMemCreate(&first, GRANULE, &prop, 0), 719);
    GIVES(cuMemCreate(&first, GRANULE, &prop, 0), 719);
    OK(cuMemCreate(&first, GRANULE, &prop, 0));
}

static void right_returns(void) {
    CUdeviceptr memory;
    int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    usable();
    GIVES(cuMemMap(base, GRANULE, 0, first, 0), CUDA_ERROR_INVALID_VALUE);
    GIVES(cuMemsetD8Async(base, 1, 2 * GRANULE, stream), CUDA_ERROR_INVALID_VALUE);
    CHECK(sim.vmm_sim_reports() == 2 && strstr(sim.vmm_sim_last_report(), "cuMemsetD8Async"));
    captured(CU_STREAM_CAPTURE_MODE_GLOBAL);
    GIVES(cuCtxSynchronize(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    GIVES(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    CHECK(!graph);
    captured(CU_STREAM_CAPTURE_MODE_GLOBAL);
    GIVES(cuMemAlloc_v2(&memory, 1), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    OK(cuThreadExchangeStreamCaptureMode(&mode));
    CHECK(mode == CU_STREAM_CAPTURE_MODE_GLOBAL);
    OK(cuMemRelease(first));
    GIVES(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    fill(stream);
    sim.cuMemUnmap(base, GRANULE); /* too early: the context is lost */
    GIVES(cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
    GIVES(cuMemAddressFree(base, 8 * GRANULE), CUDA_ERROR_ILLEGAL_ADDRESS);
}

static void leave_things_behind(void) {
    mapped();
}

static const test_case cases[] = {
    MISUSE(fence_in_a_capture, "cuCtxRecordEvent: a fence"),
    MISUSE(synchronize_in_a_capture, "cuCtxSynchronize: a fence"),
    MISUSE(default_stream_in_a_capture, "the default stream is used"),
    MISUSE(allocate_in_a_capture, "cuMemAlloc: unsafe"),
    MISUSE(allocate_elsewhere, "cuMemCreate: unsafe"),
    MISUSE(wait_for_the_outside, "was recorded outside"),
    MISUSE(query_a_captured_event, "was last recorded in a capture"),
    MISUSE(leave_work_unjoined, "was not joined"),
    MISUSE(launch_over_what_was_unmapped, "cuGraphLaunch: "),
    RIGHT(right_capture),
    RIGHT(right_failures),
    RIGHT_WITH(right_rules_of_the_environment, "VMM_SIM_FAIL", "cuMemCreate:1:719:2"),
    RIGHT_WITH(right_returns, "VMM_SIM_STRICT", "return"),
    {"leave_things_behind", leave_things_behind, "1 handles, 1 mappings, 1 reservations are left",
     "VMM_SIM_CHECK_EXIT", "1", true},
};

int main(int argc, char **argv) {
    return run_cases(argc, argv, cases, LENGTH_OF(cases));
}
