/* driver_gpu_streams.h - control blocks, graphs, streams, events and the fence: a part of
 * driver_gpu.h, which includes it.
 */
/* ---- Control blocks ------------------------------------------------------------- */

static vmm_status gpu_allocate(void *state, size_t bytes, uintptr_t *out) {
    visit visit;
    gpu_address address = 0;
    vmm_status status = enter_relaxed(state, &visit);
    if (!status)
        status = leave(&visit, CALL(GPU(MemAlloc), &address, bytes));
    *out = (uintptr_t)address;
    return status;
}

static vmm_status gpu_allocate_host(void *state, size_t bytes, void **out) {
    visit visit;
    *out = NULL;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(GPU(MemHostAlloc), out, bytes, 0));
}

static void gpu_deallocate(void *state, uintptr_t address) {
    visit visit;
    vmm_undo_begin(); /* no one could do anything about a failure */
    if (enter_relaxed(state, &visit) == VMM_OK)
        leave(&visit, CALL(GPU(MemFree), (gpu_address)address));
    vmm_undo_end();
}

static void gpu_deallocate_host(void *state, void *address) {
    visit visit;
    vmm_undo_begin();
    if (enter_relaxed(state, &visit) == VMM_OK)
        leave(&visit, CALL(GPU(MemFreeHost), address));
    vmm_undo_end();
}

/* The stream that no other work is on: made once, and kept as the context is. The driver's lock
 * is not held across the call: of two that are made at once one is destroyed. */
static vmm_status private_stream(gpu_device *device, gpu_stream *out) {
    *out = __atomic_load_n(&device->stream, __ATOMIC_ACQUIRE);
    if (*out)
        return VMM_OK;
    gpu_stream made = NULL, none = NULL;
    vmm_status status = CALL(GPU(StreamCreate), &made, GPU_STREAM_NON_BLOCKING);
    if (status)
        return status;
    if (!__atomic_compare_exchange_n(&device->stream, &none, made, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE)) {
        driver.calls.GPU(StreamDestroy)(made); /* unreached: by two threads at once */
        made = none;
    }
    *out = made;
    return VMM_OK;
}

/* Copy between the device and the host, and wait until it is done. */
static vmm_status copy_at_once(gpu_device *device, uintptr_t address, void *host, size_t bytes,
                               bool to_device) {
    visit visit;
    gpu_stream stream;
    vmm_status status = enter_relaxed(device, &visit);
    if (status)
        return status;
    status = private_stream(device, &stream);
    if (!status && to_device)
        status = CALL(GPU(MemcpyHtoDAsync), (gpu_address)address, host, bytes, stream);
    else if (!status)
        status = CALL(GPU(MemcpyDtoHAsync), host, (gpu_address)address, bytes, stream);
    if (!status)
        status = CALL(GPU(StreamSynchronize), stream);
    return leave(&visit, status);
}

static vmm_status gpu_write(void *state, uintptr_t dst, const void *src, size_t bytes) {
    return copy_at_once(state, dst, (void *)src, bytes, true);
}

static vmm_status gpu_read(void *state, void *dst, uintptr_t src, size_t bytes) {
    return copy_at_once(state, src, dst, bytes, false);
}

/* ---- Graphs ---------------------------------------------------------------------- */

static vmm_status retain_graph(vmm_stream stream, gpu_user_object object) {
    gpu_capture_status capture = GPU_CAPTURE_STATUS_NONE;
    gpu_graph graph = NULL;
    vmm_status status =
        CALL(GPU(StreamGetCaptureInfo), stream_of(stream), &capture, NULL, &graph, NULL, NULL);
    if (!status && capture != GPU_CAPTURE_STATUS_ACTIVE)
        /* unreached: the caller has asked; it takes another thread in between */
        status = vmm_fail(VMM_ERR_CAPTURING, GPU_NAME(StreamGetCaptureInfo),
                          "the capture of this stream has been invalidated: end it first");
    return status ? status
                  : CALL(GPU(GraphRetainUserObject), graph, object, 1, GPU_USER_OBJECT_MOVE);
}

static vmm_status gpu_retain(void *state, vmm_stream stream, void (*release)(void *user),
                             void *user) {
    visit visit;
    gpu_user_object object = NULL;
    vmm_status status = enter(state, &visit);
    if (!status) {
        status = CALL(GPU(UserObjectCreate), &object, user, release, 1, GPU_USER_OBJECT_NO_SYNC);
        if (status)
            leave(&visit, status);
    }
    if (status) {
        release(user);
        return status;
    }
    status = retain_graph(stream, object);
    /* This calls release(user). What the driver will not let go of, it never calls for. */
    if (status && driver.calls.GPU(UserObjectRelease)(object, 1) != GPU_SUCCESS)
        release(user);
    return leave(&visit, status);
}

/* ---- Streams ------------------------------------------------------------------- */

static vmm_status gpu_stream_check(void *state, vmm_stream stream) {
    /* The default streams are every device's. */
    if ((uintptr_t)stream <= (uintptr_t)VMM_STREAM_PER_THREAD)
        return VMM_OK;
    return check_stream(state, stream_of(stream));
}

static vmm_status gpu_stream_capture(void *state, vmm_stream stream, uint64_t *capture_id) {
    visit visit;
    gpu_capture_status capture = GPU_CAPTURE_STATUS_NONE;
    gpu_capture_id id = 0;
    *capture_id = 0;
    vmm_status status = enter(state, &visit);
    if (status)
        return status;
    /* The default stream cannot say while a stream that it waits for is captured; that is an
     * error of its own (STREAM_CAPTURE_IMPLICIT), which becomes VMM_ERR_CAPTURING. */
    status = leave(&visit, CALL(GPU(StreamGetCaptureInfo), stream_of(stream), &capture, &id, NULL,
                                NULL, NULL));
    if (status)
        return status;
    if (capture == GPU_CAPTURE_STATUS_INVALIDATED)
        return vmm_fail(VMM_ERR_CAPTURING, GPU_NAME(StreamGetCaptureInfo),
                        "the capture of this stream has been invalidated: end it first");
    if (capture == GPU_CAPTURE_STATUS_ACTIVE)
        *capture_id = id;
    return VMM_OK;
}

static vmm_status gpu_stream_synchronize(void *state, vmm_stream stream) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(GPU(StreamSynchronize), stream_of(stream)));
}

/* ---- Events -------------------------------------------------------------------- */

static vmm_status gpu_event_create(void *state, driver_event *out) {
    visit visit;
    gpu_event event = NULL;
    vmm_status status = enter_relaxed(state, &visit);
    if (!status)
        status = leave(&visit, CALL(GPU(EventCreate), &event, GPU_EVENT_DISABLE_TIMING));
    *out = event;
    return status;
}

static void gpu_event_destroy(void *state, driver_event event) {
    visit visit;
    vmm_undo_begin(); /* no one could do anything about a failure */
    if (enter_relaxed(state, &visit) == VMM_OK)
        leave(&visit, CALL(GPU(EventDestroy), event));
    vmm_undo_end();
}

static vmm_status gpu_event_record(void *state, driver_event event, vmm_stream stream) {
    visit visit;
    vmm_status status = enter(state, &visit);
    return status ? status : leave(&visit, CALL(GPU(EventRecord), event, stream_of(stream)));
}

static vmm_status gpu_event_wait(void *state, vmm_stream stream, driver_event event,
                                 bool external) {
    visit visit;
    if (external && !GPU_EXTERNAL_WAITS)
        return vmm_fail(VMM_ERR_CAPTURING, GPU_NAME(StreamWaitEvent),
                        GPU_VENDOR " cannot wait, in a capture, for work submitted outside it: "
                                   "append on the captured stream before the capture begins");
    vmm_status status = enter(state, &visit);
    return status ? status
                  : leave(&visit, CALL(GPU(StreamWaitEvent), stream_of(stream), event, external));
}

static vmm_status gpu_event_query(void *state, driver_event event, bool *done) {
    visit visit;
    *done = false;
    vmm_status status = enter_relaxed(state, &visit);
    if (status)
        return status;
    gpu_result code = driver.calls.GPU(EventQuery)(event);
    *done = code == GPU_SUCCESS;
    return leave(&visit,
                 code == GPU_ERROR_NOT_READY ? VMM_OK : checked(code, GPU_NAME(EventQuery)));
}

static vmm_status gpu_event_synchronize(void *state, driver_event event) {
    visit visit;
    vmm_status status = enter_relaxed(state, &visit);
    return status ? status : leave(&visit, CALL(GPU(EventSynchronize), event));
}

/* Where no event stands for a whole device, the device is waited for, and the event is
 * recorded behind nothing, only so that it can be asked. */
static vmm_status record_waited_fence(gpu_event event) {
    vmm_status status = checked(driver.calls.GPU(CtxSynchronize)(), GPU_NAME(CtxSynchronize));
    return status ? status : CALL(GPU(EventRecord), event, NULL);
}

/* The default stream cannot answer while a blocking stream is captured, and asking does the
 * capture no harm, as the fence would. Nothing tells of other streams that are not named. */
static vmm_status gpu_fence(void *state, driver_event event) {
    visit visit;
    gpu_capture_status capture;
    vmm_status status = enter_relaxed(state, &visit);
    if (status)
        return status;
    status = CALL(GPU(StreamGetCaptureInfo), stream_of(VMM_STREAM_LEGACY), &capture, NULL, NULL,
                  NULL, NULL);
    return leave(&visit, status ? status : record_fence(state, event));
}
