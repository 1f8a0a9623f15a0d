/* device.c - the registry of open devices: one object for each name, counted. */
#include "device.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "pool.h"
#include "process.h"

uint64_t vmm_process = 1;

static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static vmm_device *registry;
/* Guards what a device has on trial; held across driver calls. */
static pthread_mutex_t trial_lock = PTHREAD_MUTEX_INITIALIZER;

/* The child has none of the parent's devices, and a lock may have been held by a thread that
 * does not exist here. */
static void after_fork_in_child(void) {
    vmm_process++;
    registry = NULL;
    pthread_mutex_init(&registry_lock, NULL);
    pthread_mutex_init(&trial_lock, NULL);
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

static const driver_ops *const gpus[] = {&driver_cuda_ops, &driver_hip_ops};

/* "host", "cpu", "cuda", "cuda:3", "hip:0" to ops and index. */
static vmm_status parse_name(const char *name, const driver_ops **ops, int *index) {
    *index = 0;
    if (name && (strcmp(name, "host") == 0 || strcmp(name, "cpu") == 0)) {
        *ops = &driver_host_ops;
        return VMM_OK;
    }
    for (size_t i = 0; name && i < sizeof gpus / sizeof gpus[0]; i++) {
        size_t length = strlen(gpus[i]->device_name);
        if (strncmp(name, gpus[i]->device_name, length) != 0)
            continue;
        const char *digits = name + length + 1;
        size_t n = name[length] == ':' ? strspn(digits, "0123456789") : 0;
        bool is_numbered = n >= 1 && n <= 4 && digits[n] == '\0';
        if (name[length] != '\0' && !is_numbered)
            break;
        *ops = gpus[i];
        *index = is_numbered ? atoi(digits) : 0;
        return VMM_OK;
    }
    return vmm_fail(VMM_ERR_INVALID, "device_open",
                    "unknown device '%.64s': known are 'host' (or 'cpu'), 'cuda:N' and 'hip:N'",
                    name ? name : "(null)");
}

static vmm_status open_locked(const driver_ops *ops, int index, vmm_device **out) {
    for (vmm_device *device = registry; device; device = device->next) {
        if (device->ops == ops && device->index == index) {
            device->references++;
            *out = device;
            return VMM_OK;
        }
    }
    vmm_device *device = calloc(1, sizeof *device);
    if (!device)
        return vmm_fail(VMM_ERR_OUT_OF_MEMORY, "device_open", "no host memory left");
    device->ops = ops;
    device->index = index;
    device->process = vmm_process;
    device->references = 1;
    pthread_mutex_init(&device->fence_lock, NULL);
    pthread_mutex_init(&device->graph_lock, NULL);
    vmm_status status = ops->open(index, &device->state);
    if (status)
        goto free_device;
    vmm_device_info info = {0};
    status = ops->query(device->state, &info);
    if (status)
        goto close_state;
    device->granularity_bytes = info.granularity_bytes;
    if (ops->kind == VMM_DEVICE_HOST)
        snprintf(device->name, sizeof device->name, "host");
    else
        snprintf(device->name, sizeof device->name, "%s:%d", ops->device_name, index);
    device->next = registry;
    registry = device;
    *out = device;
    return VMM_OK;

close_state:
    ops->close(device->state);
free_device:
    pthread_mutex_destroy(&device->fence_lock);
    pthread_mutex_destroy(&device->graph_lock);
    free(device);
    return status;
}

vmm_status vmm_device_open(const char *name, vmm_device **out) {
    const driver_ops *ops = NULL;
    int index;
    if (!out)
        return vmm_fail(VMM_ERR_INVALID, "device_open", "out is NULL");
    *out = NULL;
    vmm_status status = parse_name(name, &ops, &index);
    if (status)
        return status;
    pthread_mutex_lock(&registry_lock);
    status = open_locked(ops, index, out);
    pthread_mutex_unlock(&registry_lock);
    return status;
}

vmm_device *vmm_device_retain(vmm_device *device) {
    pthread_mutex_lock(&registry_lock);
    device->references++;
    pthread_mutex_unlock(&registry_lock);
    return device;
}

/* Give back what was reserved to try it. If the driver refuses, the next query tries again. */
static bool free_trial(vmm_device *device) {
    if (device->trial_bytes &&
        device->ops->free(device->state, device->trial_base, device->trial_bytes))
        return false;
    device->trial_bytes = 0;
    return true;
}

void vmm_device_close(vmm_device *device) {
    if (!device || device->process != vmm_process)
        return;
    pthread_mutex_lock(&registry_lock);
    bool last = --device->references == 0;
    if (last) {
        vmm_device **link = &registry;
        while (*link != device)
            link = &(*link)->next;
        *link = device->next;
    }
    pthread_mutex_unlock(&registry_lock);
    if (last) {
        vmm_undo_begin();
        free_trial(device);
        vmm_undo_end();
        device->ops->close(device->state);
        pthread_mutex_destroy(&device->fence_lock);
        pthread_mutex_destroy(&device->graph_lock);
        free(device);
    }
}

/* The largest power of two that can be reserved. Reserving costs microseconds and commits
 * nothing. */
static size_t largest_reservation(vmm_device *device) {
    size_t largest = 0;
    pthread_mutex_lock(&trial_lock);
    vmm_undo_begin(); /* running into the limit is no failure of this call */
    for (size_t bytes = (size_t)1 << 30; bytes && bytes <= SIZE_MAX / 4; bytes <<= 1) {
        if (!free_trial(device) ||
            device->ops->reserve(device->state, bytes, 0, &device->trial_base))
            break;
        largest = device->trial_bytes = bytes;
    }
    free_trial(device);
    vmm_undo_end();
    pthread_mutex_unlock(&trial_lock);
    return largest;
}

vmm_status vmm_device_query(vmm_device *device, vmm_device_info *out) {
    if (!device || !out)
        return vmm_fail(VMM_ERR_INVALID, "device_query", "device or out is NULL");
    if (device->process != vmm_process)
        return vmm_fail(VMM_ERR_FORKED, "device_query",
                        "%s was opened by the parent process: open it anew", device->name);
    vmm_device_info info = {.kind = device->ops->kind, .index = device->index};
    vmm_status status = device->ops->query(device->state, &info);
    if (status)
        return status;
    snprintf(info.name, sizeof info.name, "%s", device->name);
    info.reservable_bytes = largest_reservation(device);
    *out = info;
    return VMM_OK;
}

void vmm_device_abandon(vmm_device *device, vmm_pool *pool) {
    pthread_mutex_lock(&registry_lock);
    pool->next_abandoned = device->abandoned;
    __atomic_store_n(&device->abandoned, pool, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&registry_lock);
}

bool vmm_device_has_abandoned(vmm_device *device) {
    return __atomic_load_n(&device->abandoned, __ATOMIC_ACQUIRE) != NULL;
}

vmm_pool *vmm_device_take_abandoned(vmm_device *device) {
    pthread_mutex_lock(&registry_lock);
    vmm_pool *pools = device->abandoned;
    __atomic_store_n(&device->abandoned, NULL, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&registry_lock);
    return pools;
}
