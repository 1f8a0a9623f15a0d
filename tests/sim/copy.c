/* copy.c - copies and fills: the operations and their entry points. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "sim.h"

#define MAX_PITCH 0x7FFFFFFFu

/* ---- operations ------------------------------------------------------------------------------ */
static CUresult touch_rows(const sim_visit *visit, uintptr_t base, size_t pitch, size_t width,
                           size_t height, bool write) {
    if (pitch == width)
        return sim_touch(visit, base, width * height, write);
    for (size_t row = 0; row < height; row++) {
        CUresult status = sim_touch(visit, base + row * pitch, width, write);
        if (status)
            return status;
    }
    return CUDA_SUCCESS;
}

static CUresult check_host(const sim_visit *visit, uintptr_t address) {
    const sim_space *space = sim_space_find(address);
    if (!space || space->kind == SIM_SPACE_HOST)
        return CUDA_SUCCESS;
    return sim_refuse(CUDA_ERROR_INVALID_VALUE,
                      "%s takes 0x%zx for host memory; it is the device's", visit->name,
                      (size_t)address);
}

CUresult sim_copy_check(const sim_copy *copy, const sim_visit *visit) {
    if (!copy->width || !copy->height)
        return CUDA_SUCCESS;
    CUresult status = copy->src_device ? touch_rows(visit, copy->src, copy->src_pitch, copy->width,
                                                    copy->height, false)
                                       : check_host(visit, copy->src);
    if (status)
        return status;
    return copy->dst_device
               ? touch_rows(visit, copy->dst, copy->dst_pitch, copy->width, copy->height, true)
               : check_host(visit, copy->dst);
}

void sim_copy_run(const sim_copy *copy) {
    if (copy->height == 1 && copy->width == 4 && !((copy->dst | copy->src) & 3)) {
        /* At once, as the copy engine does: a kernel may be reading the word. */
        uint32_t word = __atomic_load_n((const uint32_t *)(uintptr_t)copy->src, __ATOMIC_RELAXED);
        __atomic_store_n((uint32_t *)(uintptr_t)copy->dst, word, __ATOMIC_RELAXED);
        return;
    }
    for (size_t row = 0; row < copy->height; row++)
        memmove((char *)copy->dst + row * copy->dst_pitch,
                (const char *)copy->src + row * copy->src_pitch, copy->width);
}

void sim_fill_run(const sim_copy *place, unsigned char value) {
    for (size_t row = 0; row < place->height; row++)
        memset((char *)place->dst + row * place->dst_pitch, value, place->width);
}

CUresult sim_op_check(const sim_op *op, const sim_visit *visit) {
    switch (op->kind) {
    case SIM_OP_COPY: return sim_copy_check(&op->u.copy, visit);
    case SIM_OP_FILL:
        return touch_rows(visit, op->u.fill.place.dst, op->u.fill.place.dst_pitch,
                          op->u.fill.place.width, op->u.fill.place.height, true);
    case SIM_OP_KERNEL: return op->u.launch.kernel->check(op, visit);
    default: return CUDA_SUCCESS;
    }
}

void sim_op_run(const sim_op *op) {
    switch (op->kind) {
    case SIM_OP_COPY: sim_copy_run(&op->u.copy); break;
    case SIM_OP_FILL: sim_fill_run(&op->u.fill.place, op->u.fill.value); break;
    case SIM_OP_KERNEL: op->u.launch.kernel->run(op); break;
    case SIM_OP_HOST: op->u.host.call(op->u.host.user_data); break;
    default: break;
    }
}

sim_op sim_op_copy(const sim_op *op) {
    sim_op copy = *op;
    if (op->kind == SIM_OP_KERNEL) {
        copy.u.launch.params = sim_alloc(op->u.launch.kernel->param_bytes);
        memcpy(copy.u.launch.params, op->u.launch.params, op->u.launch.kernel->param_bytes);
    }
    return copy;
}

void sim_op_drop(sim_op *op) {
    if (op->kind == SIM_OP_KERNEL)
        free(op->u.launch.params);
}

/* ---- copies ---------------------------------------------------------------------------------- */
typedef enum place { HOST, DEVICE, EITHER } place;

static bool on_device(place where, uintptr_t address) {
    if (where != EITHER)
        return where == DEVICE;
    const sim_space *space = sim_space_find(address);
    return space && space->kind != SIM_SPACE_HOST;
}

/* Wait for the stream's work and note that the host has. */
static CUresult finish(sim_stream *stream) {
    sim_clock *clock = sim_clock_copy(stream->clock);
    sim_clock_wait(clock);
    sim_observe(clock);
    free(clock);
    return sim.poison;
}

static CUresult submit_copy(sim_call call, CUstream handle, const sim_copy *copy) {
    CUresult status;
    sim_stream *stream = sim_stream_of(handle, &status);
    sim_op op = {.kind = SIM_OP_COPY, .name = sim_call_name(call), .u.copy = *copy};
    return stream ? sim_submit(stream, &op) : status;
}

/* A copy on the default stream. The host waits when it has a side of it. */
static CUresult copy_now(sim_call call, uintptr_t dst, place to, uintptr_t src, place from,
                         size_t bytes) {
    CUresult status = sim_enter(call);
    if (status)
        return status;
    sim_copy copy = {dst, src, bytes, bytes, bytes, 1, on_device(to, dst), on_device(from, src)};
    status = submit_copy(call, NULL, &copy);
    if (status == CUDA_SUCCESS && !(copy.dst_device && copy.src_device))
        status = finish(sim_current()->legacy);
    return sim_leave(status);
}

static CUresult copy_later(sim_call call, uintptr_t dst, place to, uintptr_t src, place from,
                           size_t bytes, CUstream stream) {
    CUresult status = sim_enter(call);
    if (status)
        return status;
    sim_copy copy = {dst, src, bytes, bytes, bytes, 1, on_device(to, dst), on_device(from, src)};
    return sim_leave(submit_copy(call, stream, &copy));
}

CUresult cuMemcpy(CUdeviceptr dst, CUdeviceptr src, size_t bytes) {
    return copy_now(SIM_cuMemcpy, dst, EITHER, src, EITHER, bytes);
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr dst, const void *src, size_t bytes) {
    return copy_now(SIM_cuMemcpyHtoD, dst, DEVICE, (uintptr_t)src, HOST, bytes);
}

CUresult cuMemcpyDtoH_v2(void *dst, CUdeviceptr src, size_t bytes) {
    return copy_now(SIM_cuMemcpyDtoH, (uintptr_t)dst, HOST, src, DEVICE, bytes);
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr dst, CUdeviceptr src, size_t bytes) {
    return copy_now(SIM_cuMemcpyDtoD, dst, DEVICE, src, DEVICE, bytes);
}

CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    return copy_later(SIM_cuMemcpyAsync, dst, EITHER, src, EITHER, bytes, stream);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr dst, const void *src, size_t bytes, CUstream stream) {
    return copy_later(SIM_cuMemcpyHtoDAsync, dst, DEVICE, (uintptr_t)src, HOST, bytes, stream);
}

CUresult cuMemcpyDtoHAsync_v2(void *dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    return copy_later(SIM_cuMemcpyDtoHAsync, (uintptr_t)dst, HOST, src, DEVICE, bytes, stream);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    return copy_later(SIM_cuMemcpyDtoDAsync, dst, DEVICE, src, DEVICE, bytes, stream);
}

static bool side(int type, const void *host, CUdeviceptr device, uintptr_t *address, bool *is) {
    if (type != CU_MEMORYTYPE_HOST && type != CU_MEMORYTYPE_DEVICE && type != CU_MEMORYTYPE_UNIFIED)
        return false;
    *address = type == CU_MEMORYTYPE_HOST ? (uintptr_t)host : (uintptr_t)device;
    *is = on_device(type == CU_MEMORYTYPE_HOST     ? HOST
                    : type == CU_MEMORYTYPE_DEVICE ? DEVICE
                                                   : EITHER,
                    *address);
    return true;
}

static CUresult check_pitch(const char *which, size_t pitch, size_t x, size_t width,
                            size_t height) {
    if (pitch > MAX_PITCH && height > 1)
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "%s pitch %zu is above the device's maximum %u",
                          which, pitch, MAX_PITCH);
    if (pitch < x + width && (height > 1 || pitch))
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "%s pitch %zu is less than %zu", which, pitch,
                          x + width);
    return CUDA_SUCCESS;
}

static CUresult read_2d(const CUDA_MEMCPY2D *from, sim_copy *copy) {
    if (!from ||
        !side(from->srcMemoryType, from->srcHost, from->srcDevice, &copy->src, &copy->src_device) ||
        !side(from->dstMemoryType, from->dstHost, from->dstDevice, &copy->dst, &copy->dst_device))
        return sim_refuse(CUDA_ERROR_INVALID_VALUE, "a memory type other than host or device");
    CUresult status =
        check_pitch("source", from->srcPitch, from->srcXInBytes, from->WidthInBytes, from->Height);
    if (status == CUDA_SUCCESS)
        status = check_pitch("destination", from->dstPitch, from->dstXInBytes, from->WidthInBytes,
                             from->Height);
    copy->src += from->srcY * from->srcPitch + from->srcXInBytes;
    copy->dst += from->dstY * from->dstPitch + from->dstXInBytes;
    copy->src_pitch = from->srcPitch;
    copy->dst_pitch = from->dstPitch;
    copy->width = from->WidthInBytes;
    copy->height = from->Height;
    return status;
}

CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *description, CUstream stream) {
    CUresult status = sim_enter(SIM_cuMemcpy2DAsync);
    if (status)
        return status;
    sim_copy copy;
    status = read_2d(description, &copy);
    return sim_leave(status ? status : submit_copy(SIM_cuMemcpy2DAsync, stream, &copy));
}

CUresult cuMemcpy2D_v2(const CUDA_MEMCPY2D *description) {
    CUresult status = sim_enter(SIM_cuMemcpy2D);
    if (status)
        return status;
    sim_copy copy;
    status = read_2d(description, &copy);
    if (status == CUDA_SUCCESS)
        status = submit_copy(SIM_cuMemcpy2D, NULL, &copy);
    if (status == CUDA_SUCCESS && !(copy.dst_device && copy.src_device))
        status = finish(sim_current()->legacy);
    return sim_leave(status);
}

/* ---- fills ------------------------------------------------------------------------------------ */
static CUresult fill(sim_call call, CUdeviceptr dst, size_t pitch, unsigned char value,
                     size_t width, size_t height, CUstream handle) {
    CUresult status = sim_enter(call);
    if (status)
        return status;
    if (height > 1 && pitch < width)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                    "pitch %zu is less than the width %zu", pitch, width));
    sim_stream *stream = sim_stream_of(handle, &status);
    sim_op op = {.kind = SIM_OP_FILL, .name = sim_call_name(call)};
    op.u.fill.place = (sim_copy){.dst = dst, .dst_pitch = pitch, .width = width, .height = height};
    op.u.fill.value = value;
    return sim_leave(stream ? sim_submit(stream, &op) : status);
}

CUresult cuMemsetD8_v2(CUdeviceptr dst, unsigned char value, size_t n) {
    return fill(SIM_cuMemsetD8, dst, n, value, n, 1, NULL);
}

CUresult cuMemsetD8Async(CUdeviceptr dst, unsigned char value, size_t n, CUstream stream) {
    return fill(SIM_cuMemsetD8Async, dst, n, value, n, 1, stream);
}

CUresult cuMemsetD2D8Async(CUdeviceptr dst, size_t pitch, unsigned char value, size_t width,
                           size_t height, CUstream stream) {
    return fill(SIM_cuMemsetD2D8Async, dst, pitch, value, width, height, stream);
}
