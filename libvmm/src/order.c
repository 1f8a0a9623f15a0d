/* order.c - streams and events: which work waits for which.
 *
 * A tensor remembers the stream of its last write and records no event until someone on
 * another stream has to wait for it.
 */
#include <stdlib.h>

#include "device.h"
#include "error.h"
#include "process.h"
#include "tensor.h"

static const driver_ops *ops_of(const vmm_tensor *tensor) {
    return tensor->pool->device->ops;
}

vmm_status order_check_stream(vmm_tensor *tensor, vmm_stream *stream, const char *operation) {
    vmm_device *device = tensor->pool->device;
    if (!*stream)
        *stream = VMM_STREAM_LEGACY;
    bool of_every_device = *stream == VMM_STREAM_LEGACY || *stream == VMM_STREAM_PER_THREAD;
    if (!device->ops->is_async || of_every_device || *stream == tensor->known_stream)
        return VMM_OK;
    if (*stream == VMM_STREAM_NONE)
        return vmm_fail(VMM_ERR_INVALID, operation, "a stream is needed");
    vmm_status status = DRIVER(tensor->pool, tensor->driver_calls, stream_check, *stream);
    if (!status)
        tensor->known_stream = *stream;
    return status;
}

/* Call the driver on behalf of a tensor, whose calls are counted, or of none (NULL). */
#define CALL(device, tensor, verb, ...)                                                            \
    (count((tensor), VMM_CALL_##verb), (device)->ops->verb((device)->state, __VA_ARGS__))

static void count(vmm_tensor *tensor, vmm_call call) {
    if (tensor)
        pool_count(tensor->pool, tensor->driver_calls, call);
}

vmm_status order_capture_of(vmm_tensor *tensor, vmm_stream stream, uint64_t *capture) {
    *capture = 0;
    if (!ops_of(tensor)->is_async)
        return VMM_OK;
    return CALL(tensor->pool->device, tensor, stream_capture, stream, capture);
}

/* `stream` waits for what `producer` has been given so far. With `current` the event
 * already stands behind it. */
static vmm_status wait_for(vmm_device *device, vmm_tensor *tensor, vmm_stream stream,
                           vmm_stream producer, driver_event event, bool *current) {
    uint64_t capture, producer_capture;
    vmm_status status = CALL(device, tensor, stream_capture, stream, &capture);
    if (!status)
        status = CALL(device, tensor, stream_capture, producer, &producer_capture);
    if (status)
        return status;
    if (producer_capture && producer_capture != capture) /* it would draw the stream into it */
        return vmm_fail(VMM_ERR_CAPTURING, "handoff",
                        "the work to wait for is part of a capture: only streams of the same "
                        "capture can wait for it before the graph runs");
    if (!*current) {
        status = CALL(device, tensor, event_record, event, producer);
        if (status)
            return status;
        /* An event recorded inside a capture means nothing outside it. */
        *current = producer_capture == 0;
    }
    return CALL(device, tensor, event_wait, stream, event, capture && !producer_capture);
}

vmm_stream vmm_last_stream(const vmm_tensor *tensor) {
    return tensor->written ? tensor->last_stream : NULL;
}

vmm_stream order_write_stream(const vmm_tensor *tensor) {
    return tensor->written ? tensor->last_stream : VMM_STREAM_LEGACY;
}

static vmm_status wait_for_last_write(vmm_tensor *tensor, vmm_stream stream) {
    if (!tensor->written || tensor->last_stream == stream)
        return VMM_OK;
    if (!tensor->event) {
        vmm_status status = pool_get_event(tensor->pool, &tensor->event);
        if (status)
            return status;
    }
    return wait_for(tensor->pool->device, tensor, stream, tensor->last_stream, tensor->event->event,
                    &tensor->event_current);
}

static vmm_status wait_for_readers(vmm_tensor *tensor, vmm_stream stream) {
    pool_event *event = NULL;
    vmm_status status = VMM_OK;
    for (size_t i = 0; i < tensor->n_waits && !status; i++) {
        bool current = false;
        if (tensor->waits[i] == stream)
            continue;
        if (!event)
            status = pool_get_event(tensor->pool, &event);
        if (!status)
            status = wait_for(tensor->pool->device, tensor, stream, tensor->waits[i], event->event,
                              &current);
    }
    pool_put_event(tensor->pool, event);
    return status;
}

vmm_status order_before_write(vmm_tensor *tensor, vmm_stream stream) {
    if (!ops_of(tensor)->is_async)
        return VMM_OK;
    vmm_status status = wait_for_last_write(tensor, stream);
    return status ? status : wait_for_readers(tensor, stream);
}

void order_after_write(vmm_tensor *tensor, vmm_stream stream) {
    tensor->written = true;
    tensor->last_stream = stream;
    tensor->event_current = false;
    tensor->n_waits = 0;
}

vmm_status order_add_wait(vmm_tensor *tensor, vmm_stream stream) {
    if (!ops_of(tensor)->is_async)
        return VMM_OK;
    if (tensor->written && stream == tensor->last_stream) {
        /* The event of the last write must stand behind the reader, too. */
        tensor->event_current = false;
        return VMM_OK;
    }
    for (size_t i = 0; i < tensor->n_waits; i++)
        if (tensor->waits[i] == stream)
            return VMM_OK;
    vmm_stream *grown = realloc(tensor->waits, (tensor->n_waits + 1) * sizeof *grown);
    if (!grown)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "truncate", "no host memory left");
    tensor->waits = grown;
    grown[tensor->n_waits++] = stream;
    return VMM_OK;
}

vmm_status vmm_handoff(vmm_tensor *tensor, vmm_stream stream) {
    if (!tensor)
        return vmm_fail(VMM_ERR_INVALID, "handoff", "tensor is NULL");
    if (tensor->process != vmm_process)
        return vmm_fail(VMM_ERR_FORKED, "handoff", "the tensor belongs to the parent process");
    if (!ops_of(tensor)->is_async || stream == VMM_STREAM_NONE)
        return VMM_OK;
    vmm_status status = order_check_stream(tensor, &stream, "handoff");
    /* A hand-off may lead to a write through a grown view, so it comes after readers, too. */
    return status ? status : order_before_write(tensor, stream);
}

vmm_status vmm_add_reader(vmm_tensor *tensor, vmm_stream stream) {
    if (!tensor)
        return vmm_fail(VMM_ERR_INVALID, "add_reader", "tensor is NULL");
    if (tensor->process != vmm_process)
        return vmm_fail(VMM_ERR_FORKED, "add_reader", "the tensor belongs to the parent process");
    if (!ops_of(tensor)->is_async || stream == VMM_STREAM_NONE)
        return VMM_OK;
    vmm_status status = order_check_stream(tensor, &stream, "add_reader");
    return status ? status : order_add_wait(tensor, stream);
}

/* ---- streams and events without a tensor ----------------------------------------- */

static vmm_status check_device(const vmm_device *device, const char *operation) {
    if (!device)
        return vmm_fail(VMM_ERR_INVALID, operation, "device is NULL");
    if (device->process != vmm_process)
        return vmm_fail(VMM_ERR_FORKED, operation,
                        "%s was opened by the parent process: open it anew", device->name);
    return VMM_OK;
}

struct vmm_event {
    vmm_device *device;
    driver_event event; /* unused on the host */
};

vmm_status vmm_event_record(vmm_device *device, vmm_stream stream, vmm_event **out) {
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, "event_record", "out is NULL");
    *out = NULL;
    vmm_status status = check_device(device, "event_record");
    if (status)
        return status;
    const driver_ops *ops = device->ops;
    uint64_t capture = 0;
    if (!stream)
        stream = VMM_STREAM_LEGACY;
    if (ops->is_async) {
        status = ops->stream_check(device->state, stream);
        if (!status)
            status = ops->stream_capture(device->state, stream, &capture);
    }
    if (status)
        return status;
    if (capture)
        return vmm_fail(VMM_ERR_CAPTURING, "event_record",
                        "an event within a capture is never done: record it after the graph has "
                        "been launched");
    vmm_event *event = calloc(1, sizeof *event);
    if (!event)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "event_record", "no host memory left");
    if (ops->is_async) {
        status = ops->event_create(device->state, &event->event);
        if (status) {
            free(event);
            return status;
        }
        status = ops->event_record(device->state, event->event, stream);
        if (status) {
            ops->event_destroy(device->state, event->event);
            free(event);
            return status;
        }
    }
    event->device = vmm_device_retain(device);
    *out = event;
    return VMM_OK;
}

vmm_status vmm_event_query(vmm_event *event, int *done) {
    if (!event || !done)
        return vmm_fail(VMM_ERR_INVALID, "event_query", "event or done is NULL");
    vmm_status status = check_device(event->device, "event_query");
    bool passed = true;
    if (!status && event->device->ops->is_async)
        status = event->device->ops->event_query(event->device->state, event->event, &passed);
    if (!status)
        *done = passed;
    return status;
}

void vmm_event_close(vmm_event *event) {
    if (!event || event->device->process != vmm_process)
        return;
    if (event->device->ops->is_async)
        event->device->ops->event_destroy(event->device->state, event->event);
    vmm_device_close(event->device);
    free(event);
}

vmm_status vmm_stream_wait(vmm_device *device, vmm_stream waiter, vmm_stream producer) {
    vmm_status status = check_device(device, "stream_wait");
    if (status || !device->ops->is_async)
        return status;
    if (!waiter)
        waiter = VMM_STREAM_LEGACY;
    if (!producer)
        producer = VMM_STREAM_LEGACY;
    if (waiter == producer)
        return VMM_OK;
    const driver_ops *ops = device->ops;
    driver_event event;
    bool current = false;
    status = ops->stream_check(device->state, waiter);
    if (!status)
        status = ops->stream_check(device->state, producer);
    if (!status)
        status = ops->event_create(device->state, &event);
    if (status)
        return status;
    status = wait_for(device, NULL, waiter, producer, event, &current);
    ops->event_destroy(device->state, event);
    return status;
}

vmm_status order_capture_on(vmm_device *device, vmm_stream stream, const char *operation,
                            uint64_t *capture) {
    *capture = 0;
    vmm_status status = check_device(device, operation);
    /* The default stream is never captured, and while others are it may not be asked. */
    if (status || !device->ops->is_async || !stream || stream == VMM_STREAM_LEGACY)
        return status;
    return device->ops->stream_capture(device->state, stream, capture);
}

vmm_status vmm_stream_is_capturing(vmm_device *device, vmm_stream stream, int *out) {
    uint64_t capture;
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, "stream_is_capturing", "out is NULL");
    vmm_status status = order_capture_on(device, stream, "stream_is_capturing", &capture);
    *out = capture != 0;
    return status;
}
