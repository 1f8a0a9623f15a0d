/* device.c - the driver's start, devices, primary contexts, the current context. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "sim.h"

#define STACK_DEPTH 64

static sim_context contexts[SIM_MAX_DEVICES];
static _Thread_local sim_context *stack[STACK_DEPTH];
static _Thread_local int depth;

sim_context *sim_current(void) {
    if (depth)
        return stack[depth - 1];
    return sim_vendor_here.has_default_device && sim.process ? &contexts[0] : NULL;
}

sim_context *sim_context_of(int device) {
    return &contexts[device];
}

sim_context *sim_check_context(CUcontext context) {
    for (int i = 0; i < sim.n_devices; i++)
        if (context == &contexts[i] && contexts[i].retained)
            return context;
    return NULL;
}

static CUresult check_device(CUdevice device) {
    if (device >= 0 && device < sim.n_devices)
        return CUDA_SUCCESS;
    return sim_refuse(CUDA_ERROR_INVALID_DEVICE, "device %d does not exist", device);
}

CUresult cuInit(unsigned flags) {
    CUresult status = sim_enter(SIM_cuInit);
    if (status)
        return status;
    if (flags)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "flags are not 0"));
    if (sim.n_devices == 0)
        return sim_leave(CUDA_ERROR_NO_DEVICE);
    if (!sim.process) {
        for (int i = 0; i < sim.n_devices; i++) {
            contexts[i].device = i;
            contexts[i].retained = sim_vendor_here.has_default_device;
        }
        sim_memory_init();
        sim.process = getpid();
    }
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuDriverGetVersion(int *version) {
    CUresult status = sim_enter(SIM_cuDriverGetVersion);
    if (status)
        return status;
    *version = sim.driver_version;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuDeviceGetCount(int *count) {
    CUresult status = sim_enter(SIM_cuDeviceGetCount);
    if (status)
        return status;
    *count = sim.n_devices;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    CUresult status = sim_enter(SIM_cuDeviceGet);
    if (status)
        return status;
    /* Asking for a device that is not there is how one finds out: no misuse. */
    if (ordinal < 0 || ordinal >= sim.n_devices)
        return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    *device = ordinal;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    CUresult status = sim_enter(SIM_cuDeviceGetName);
    if (status)
        return status;
    status = check_device(device);
    if (status == CUDA_SUCCESS && length > 0)
        snprintf(name, (size_t)length, "Simulated GPU %d", device);
    return sim_leave(status);
}

CUresult cuDeviceGetUuid_v2(unsigned char *uuid, CUdevice device) {
    CUresult status = sim_enter(SIM_cuDeviceGetUuid);
    if (status)
        return status;
    status = check_device(device);
    if (status == CUDA_SUCCESS) {
        memcpy(uuid, "vmm-sim-device-", 15);
        uuid[15] = (unsigned char)('0' + device);
    }
    return sim_leave(status);
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    CUresult status = sim_enter(SIM_cuDeviceTotalMem);
    if (status)
        return status;
    status = check_device(device);
    if (status == CUDA_SUCCESS)
        *bytes = sim.memory;
    return sim_leave(status);
}

static int attribute_value(int attribute) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: return 0x7FFFFFFF;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 3;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY: return 1;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: return !sim_lacks("vmm");
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: return 1;
    default: return 0;
    }
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    CUresult status = sim_enter(SIM_cuDeviceGetAttribute);
    if (status)
        return status;
    status = check_device(device);
    if (status == CUDA_SUCCESS && (attribute < 1 || attribute > CU_DEVICE_ATTRIBUTE_LAST))
        status = sim_refuse(CUDA_ERROR_INVALID_VALUE, "no attribute has the number %d", attribute);
    if (status == CUDA_SUCCESS)
        *value = attribute_value(attribute);
    return sim_leave(status);
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    CUresult status = sim_enter(SIM_cuDevicePrimaryCtxRetain);
    if (status)
        return status;
    status = check_device(device);
    if (status == CUDA_SUCCESS) {
        contexts[device].retained++;
        *context = &contexts[device];
    }
    return sim_leave(status);
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    CUresult status = sim_enter(SIM_cuDevicePrimaryCtxRelease);
    if (status)
        return status;
    status = check_device(device);
    if (status)
        return sim_leave(status);
    sim_context *context = &contexts[device];
    if (!context->retained)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_CONTEXT,
                                    "primary context %d is released once too often", device));
    if (context->retained == 1) {
        for (sim_stream *s = sim.streams; s; s = s->next)
            if (s->context == context && s->created && s->magic == SIM_STREAM_ALIVE)
                return sim_leave(sim_refuse(CUDA_SUCCESS,
                                            "primary context %d is destroyed with stream %p alive",
                                            device, (void *)s));
        const sim_space *space;
        for (size_t i = 0; (space = sim_space_at(i)); i++)
            if (space->context == context)
                return sim_leave(sim_refuse(
                    CUDA_SUCCESS, "primary context %d is destroyed with memory in use", device));
    }
    context->retained--;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    CUresult status = sim_enter(SIM_cuDevicePrimaryCtxGetState);
    if (status)
        return status;
    status = check_device(device);
    if (status == CUDA_SUCCESS) {
        *flags = 0;
        *active = contexts[device].retained > 0;
    }
    return sim_leave(status);
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    CUresult status = sim_enter(SIM_cuCtxGetCurrent);
    if (status)
        return status;
    *context = sim_current();
    return sim_leave(CUDA_SUCCESS);
}

static CUresult check_handle(CUcontext context) {
    if (sim_check_context(context))
        return CUDA_SUCCESS;
    return sim_refuse(CUDA_ERROR_INVALID_CONTEXT, "%p is no context, or one that was released",
                      (void *)context);
}

CUresult cuCtxSetCurrent(CUcontext context) {
    CUresult status = sim_enter(SIM_cuCtxSetCurrent);
    if (status)
        return status;
    status = context ? check_handle(context) : CUDA_SUCCESS;
    if (status)
        return sim_leave(status);
    /* The top of the stack is replaced; no context takes it away. */
    if (!context)
        depth -= depth > 0;
    else if (depth)
        stack[depth - 1] = context;
    else
        stack[depth++] = context;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    CUresult status = sim_enter(SIM_cuCtxPushCurrent);
    if (status)
        return status;
    status = context ? check_handle(context) : sim_refuse(CUDA_ERROR_INVALID_VALUE, "no context");
    if (status == CUDA_SUCCESS && depth == STACK_DEPTH)
        status = sim_refuse(CUDA_ERROR_INVALID_CONTEXT, "%d contexts pushed: is a pop missing?",
                            STACK_DEPTH);
    if (status == CUDA_SUCCESS)
        stack[depth++] = context;
    return sim_leave(status);
}

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    CUresult status = sim_enter(SIM_cuCtxPopCurrent);
    if (status)
        return status;
    if (!depth)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_CONTEXT, "the thread's stack is empty"));
    depth--;
    if (context)
        *context = stack[depth];
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuCtxGetDevice(CUdevice *device) {
    CUresult status = sim_enter(SIM_cuCtxGetDevice);
    if (status)
        return status;
    *device = sim_current()->device;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuCtxGetDevice_v2(CUdevice *device, CUcontext context) {
    CUresult status = sim_enter(SIM_cuCtxGetDevice);
    if (status)
        return status;
    status = context ? check_handle(context) : CUDA_SUCCESS;
    if (status == CUDA_SUCCESS)
        *device = (context ? context : sim_current())->device;
    return sim_leave(status);
}

CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    CUresult status = sim_enter(SIM_cuCtxGetStreamPriorityRange);
    if (status)
        return status;
    if (least)
        *least = 0;
    if (greatest)
        *greatest = -5;
    return sim_leave(CUDA_SUCCESS);
}
