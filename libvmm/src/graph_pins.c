/* graph_pins.c - what keeps a tensor while a graph lives that appends to it: a pin, held by the
 * graph itself or by someone who knows its end. */
#include "graph_pins.h"

#include <stdlib.h>

#include "cursor.h"
#include "device.h"
#include "error.h"
#include "process.h"

/* One for each tensor of a graph. */
typedef struct graph_pin {
    struct graph_pin *next; /* of the same vmm_graph_pins */
    vmm_tensor *tensor;
    vmm_pin *pin;
} graph_pin;

struct vmm_graph_pins {
    vmm_device *device;
    uint64_t capture;
    /* Under the device's graph_lock. */
    struct vmm_graph_pins *next;
    graph_pin *first;
};

/* When the graph is gone; on any thread, and without the driver. */
static void drop(void *user) {
    graph_pin *held = user;
    vmm_pin *pin = held->pin;
    __atomic_sub_fetch(&held->tensor->cursor->graphs, 1, __ATOMIC_RELEASE);
    free(held);
    vmm_unpin(pin);
}

/* Is there someone who keeps what this capture appends to? Then they have it. */
static bool give_to_keeper(vmm_device *device, uint64_t capture, graph_pin *held) {
    pthread_mutex_lock(&device->graph_lock);
    vmm_graph_pins *pins = device->graph_pins;
    while (pins && pins->capture != capture)
        pins = pins->next;
    if (pins) {
        held->next = pins->first;
        pins->first = held;
    }
    pthread_mutex_unlock(&device->graph_lock);
    return pins != NULL;
}

vmm_status graph_pins_add(vmm_tensor *tensor, vmm_stream stream, uint64_t capture) {
    graph_pin *held = malloc(sizeof *held);
    if (!held)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "append", "no host memory left");
    held->tensor = tensor;
    vmm_status status = vmm_pin_cursor(tensor, &held->pin);
    if (status) {
        free(held);
        return status;
    }
    __atomic_add_fetch(&tensor->cursor->graphs, 1, __ATOMIC_RELAXED);
    if (give_to_keeper(tensor->pool->device, capture, held))
        return VMM_OK;
    return DRIVER(tensor->pool, tensor->driver_calls, retain, stream, drop, held);
}

vmm_status vmm_graph_pins_open(vmm_device *device, vmm_stream stream, vmm_graph_pins **out) {
    uint64_t capture;
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, "graph_pins_open", "out is NULL");
    *out = NULL;
    vmm_status status = order_capture_on(device, stream, "graph_pins_open", &capture);
    if (!status && capture)
        status = device->ops->stream_check(device->state, stream);
    if (status)
        return status;
    if (!capture)
        return vmm_fail(VMM_ERR_INVALID, "graph_pins_open",
                        "the stream is not being captured: begin the capture first");
    vmm_graph_pins *pins = calloc(1, sizeof *pins);
    if (!pins)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "graph_pins_open", "no host memory left");
    pins->device = vmm_device_retain(device);
    pins->capture = capture;
    pthread_mutex_lock(&device->graph_lock);
    pins->next = device->graph_pins;
    device->graph_pins = pins;
    pthread_mutex_unlock(&device->graph_lock);
    *out = pins;
    return VMM_OK;
}

void vmm_graph_pins_close(vmm_graph_pins *pins) {
    if (!pins || pins->device->process != vmm_process)
        return;
    vmm_device *device = pins->device;
    pthread_mutex_lock(&device->graph_lock);
    vmm_graph_pins **link = &device->graph_pins;
    while (*link != pins)
        link = &(*link)->next;
    *link = pins->next;
    pthread_mutex_unlock(&device->graph_lock);
    while (pins->first) {
        graph_pin *held = pins->first;
        pins->first = held->next;
        drop(held);
    }
    free(pins);
    vmm_device_close(device);
}
