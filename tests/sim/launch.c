/* launch.c - modules, functions and launches. Kernels run as C functions of the same name. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sim.h"

#define MODULE_ALIVE 0x30D0A11Eu
#define MODULE_DEAD 0x30D0DEADu
#define MAX_KERNELS 16

typedef struct sim_module {
    uint32_t magic;
    sim_context *context;
    char *code; /* that has the names of its kernels; NULL where that is not known */
    size_t code_bytes;
} sim_module;

typedef struct sim_function {
    sim_module *module;
    const sim_kernel *kernel;
} sim_function;

static sim_handles modules, functions;
static const sim_kernel *kernels[MAX_KERNELS] = {&sim_append_kernel, &sim_append_kernel_wide,
                                                 &sim_append_kernel_cursor, &sim_cursor_kernel,
                                                 &sim_append_kernel_pieces};
static size_t n_kernels = 5;

int sim_register_kernel(const sim_kernel *kernel) {
    pthread_mutex_lock(&sim.lock);
    bool fits = n_kernels < MAX_KERNELS;
    if (fits)
        kernels[n_kernels++] = kernel;
    pthread_mutex_unlock(&sim.lock);
    return fits ? 0 : -1;
}

const sim_kernel *sim_find_kernel(const char *name) {
    for (size_t i = 0; i < n_kernels; i++)
        if (strcmp(kernels[i]->name, name) == 0)
            return kernels[i];
    return NULL;
}

/* ---- modules ----------------------------------------------------------------------------------- */
static CUresult load(sim_call call, CUmodule *out, const void *image) {
    CUresult status = sim_enter(call);
    if (status)
        return status;
    if (!out || !image)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "no image"));
    const void *code = NULL;
    size_t code_bytes = 0;
    status = sim_vendor_here.check_image(image, &code, &code_bytes);
    if (status == CUDA_ERROR_INVALID_IMAGE)
        return sim_leave(sim_refuse(status, "the image is of no kind that is known"));
    if (status)
        return sim_leave(status);
    sim_module *module = sim_alloc(sizeof *module);
    *module = (sim_module){MODULE_ALIVE, sim_current(), NULL, code_bytes};
    if (code) {
        module->code = sim_alloc(code_bytes);
        memcpy(module->code, code, code_bytes);
    }
    sim_handles_add(&modules, module);
    *out = module;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuModuleLoadData(CUmodule *out, const void *image) {
    return load(SIM_cuModuleLoadData, out, image);
}

CUresult cuModuleLoadDataEx(CUmodule *out, const void *image, unsigned n_options, int *options,
                            void **values) {
    (void)n_options, (void)options, (void)values;
    return load(SIM_cuModuleLoadDataEx, out, image);
}

static sim_module *module_of(CUmodule handle, CUresult *status) {
    bool known = sim_handles_has(&modules, handle);
    *status = CUDA_SUCCESS;
    if (known && handle->magic == MODULE_ALIVE)
        return handle;
    *status =
        sim_refuse(CUDA_ERROR_INVALID_HANDLE,
                   known ? "module %p was unloaded before" : "%p is no module", (void *)handle);
    return NULL;
}

CUresult cuModuleUnload(CUmodule handle) {
    CUresult status = sim_enter(SIM_cuModuleUnload);
    if (status)
        return status;
    sim_module *module = module_of(handle, &status);
    if (!module)
        return sim_leave(status);
    module->magic = MODULE_DEAD;
    free(module->code);
    module->code = NULL;
    return sim_leave(CUDA_SUCCESS);
}

CUresult cuModuleGetFunction(CUfunction *out, CUmodule handle, const char *name) {
    CUresult status = sim_enter(SIM_cuModuleGetFunction);
    if (status)
        return status;
    sim_module *module = module_of(handle, &status);
    if (!module)
        return sim_leave(status);
    const sim_kernel *kernel = name ? sim_find_kernel(name) : NULL;
    if (!kernel || (module->code && !memmem(module->code, module->code_bytes, name, strlen(name))))
        return sim_leave(CUDA_ERROR_NOT_FOUND);
    sim_function *function = sim_alloc(sizeof *function);
    *function = (sim_function){module, kernel};
    sim_handles_add(&functions, function);
    *out = function;
    return sim_leave(CUDA_SUCCESS);
}

static sim_function *function_of(CUfunction handle, CUresult *status) {
    *status = CUDA_SUCCESS;
    if (!sim_handles_has(&functions, handle))
        *status = sim_refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no function", (void *)handle);
    else if (handle->module->magic != MODULE_ALIVE)
        *status = sim_refuse(CUDA_ERROR_INVALID_HANDLE, "the module of %s was unloaded",
                             handle->kernel->name);
    return *status ? NULL : handle;
}

CUresult cuFuncLoad(CUfunction handle) {
    CUresult status = sim_enter(SIM_cuFuncLoad);
    if (status)
        return status;
    function_of(handle, &status);
    return sim_leave(status);
}

CUresult cuFuncGetAttribute(int *value, int attribute, CUfunction handle) {
    CUresult status = sim_enter(SIM_cuFuncGetAttribute);
    if (status)
        return status;
    if (function_of(handle, &status))
        *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; /* threads, registers */
    return sim_leave(status);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n_blocks, CUfunction handle,
                                                     int block_threads, size_t shared_bytes) {
    CUresult status = sim_enter(SIM_cuOccupancyMaxActiveBlocksPerMultiprocessor);
    if (status)
        return status;
    (void)shared_bytes;
    if (function_of(handle, &status))
        *n_blocks = block_threads > 0 ? 2048 / block_threads : 0;
    return sim_leave(status);
}

/* ---- launches ---------------------------------------------------------------------------------- */
static const void *parameters(const sim_kernel *kernel, void **params, void **extra) {
    if (params && !extra)
        return params[0];
    const void *buffer = NULL;
    size_t bytes = 0;
    for (void **e = extra; e && *e != CU_LAUNCH_PARAM_END; e += 2) {
        if (*e == CU_LAUNCH_PARAM_BUFFER_POINTER)
            buffer = e[1];
        else if (*e == CU_LAUNCH_PARAM_BUFFER_SIZE)
            bytes = *(const size_t *)e[1];
    }
    return !params && bytes == kernel->param_bytes ? buffer : NULL;
}

CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        CUstream stream_handle, void **params, void **extra) {
    CUresult status = sim_enter(SIM_cuLaunchKernel);
    if (status)
        return status;
    sim_function *function = function_of(handle, &status);
    sim_stream *stream = function ? sim_stream_of(stream_handle, &status) : NULL;
    if (!stream)
        return sim_leave(status);
    const sim_kernel *kernel = function->kernel;
    if (!grid_x || !grid_y || !grid_z || grid_x > 0x7FFFFFFFu || grid_y > 65535 || grid_z > 65535 ||
        !block_x || !block_y || !block_z || (uint64_t)block_x * block_y * block_z > 1024 ||
        block_z > 64 || shared_bytes > 49152)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE,
                                    "%s: grid (%u, %u, %u) of blocks (%u, %u, %u), %u shared bytes",
                                    kernel->name, grid_x, grid_y, grid_z, block_x, block_y, block_z,
                                    shared_bytes));
    if (function->module->context != stream->context)
        return sim_leave(sim_refuse(
            CUDA_ERROR_INVALID_HANDLE, "%s was loaded for device %d, the stream is of device %d",
            kernel->name, function->module->context->device, stream->context->device));
    const void *values = parameters(kernel, params, extra);
    if (!values)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "%s: no parameters", kernel->name));
    sim_op op = {.kind = SIM_OP_KERNEL, .name = kernel->name};
    op.u.launch.kernel = kernel;
    op.u.launch.params = sim_alloc(kernel->param_bytes);
    memcpy(op.u.launch.params, values, kernel->param_bytes);
    memcpy(op.u.launch.grid, (unsigned[]){grid_x, grid_y, grid_z}, sizeof op.u.launch.grid);
    memcpy(op.u.launch.block, (unsigned[]){block_x, block_y, block_z}, sizeof op.u.launch.block);
    return sim_leave(sim_submit(stream, &op));
}

CUresult cuLaunchHostFunc(CUstream stream_handle, CUhostFn call, void *user_data) {
    CUresult status = sim_enter(SIM_cuLaunchHostFunc);
    if (status)
        return status;
    sim_stream *stream = sim_stream_of(stream_handle, &status);
    if (!stream)
        return sim_leave(status);
    if (!call)
        return sim_leave(sim_refuse(CUDA_ERROR_INVALID_VALUE, "no function"));
    sim_op op = {.kind = SIM_OP_HOST, .name = "host function"};
    op.u.host.call = call;
    op.u.host.user_data = user_data;
    return sim_leave(sim_submit(stream, &op));
}
