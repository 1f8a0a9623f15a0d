/* paddle_device.cc - a custom device for Paddle whose memory comes from a pool of libvmm.
 *
 * The experiment behind "One budget" in docs/paddle.md, run by paddle_device.py; not a part of
 * pyvmm. The device is the host under another name: streams and events are nothing, copies are
 * memcpy. PADDLE_DEVICE_BUDGET is the pool's budget in bytes.
 */
#include <paddle/phi/backends/device_ext.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include <vmm.h>

namespace {

std::mutex lock;
vmm_pool *pool;
std::map<void *, vmm_tensor *> allocations;

size_t budget() {
    const char *bytes = std::getenv("PADDLE_DEVICE_BUDGET");
    return bytes ? std::strtoull(bytes, nullptr, 10) : 0;
}

C_Status allocate(const C_Device, void **out, size_t n_bytes) {
    std::lock_guard<std::mutex> guard(lock);
    vmm_tensor *tensor;
    int64_t shape[] = {0};
    vmm_spec spec = {};
    spec.ndim = 1;
    spec.shape = shape;
    spec.dtype = VMM_UINT8;
    spec.capacity = n_bytes;
    if (!pool) {
        vmm_device *device;
        if (vmm_device_open("host", &device) != VMM_OK ||
            vmm_pool_create(device, VMM_BLOCK_AUTO, budget(), &pool) != VMM_OK)
            return C_FAILED;
    }
    if (vmm_reserve(pool, &spec, &tensor) != VMM_OK)
        return C_FAILED;
    if (vmm_map(tensor, n_bytes) != VMM_OK) {
        vmm_close(tensor);
        return C_FAILED;
    }
    *out = vmm_base(tensor);
    allocations[*out] = tensor;
    return C_SUCCESS;
}

C_Status release(const C_Device, void *data, size_t) {
    std::lock_guard<std::mutex> guard(lock);
    vmm_close(allocations.at(data));
    allocations.erase(data);
    return C_SUCCESS;
}

template <typename... Arguments> C_Status nothing(Arguments...) {
    return C_SUCCESS;
}

template <typename Handle> C_Status make(const C_Device, Handle *out) {
    static char one;
    *out = reinterpret_cast<Handle>(&one);
    return C_SUCCESS;
}

C_Status copy(const C_Device, void *to, const void *from, size_t n_bytes) {
    std::memcpy(to, from, n_bytes);
    return C_SUCCESS;
}

C_Status copy_on(const C_Device device, C_Stream, void *to, const void *from, size_t n_bytes) {
    return copy(device, to, from, n_bytes);
}

C_Status count(size_t *out) {
    *out = 1;
    return C_SUCCESS;
}

C_Status list(size_t *out) {
    *out = 0;
    return C_SUCCESS;
}

C_Status one(const C_Device, size_t *out) {
    *out = 1;
    return C_SUCCESS;
}

C_Status current(const C_Device device) {
    device->id = 0;
    return C_SUCCESS;
}

C_Status statistics(const C_Device, size_t *total, size_t *available) {
    *total = *available = budget();
    return C_SUCCESS;
}

C_Status smallest(const C_Device, size_t *n_bytes) {
    *n_bytes = 512;
    return C_SUCCESS;
}

C_Status call_back(const C_Device device, C_Stream stream, C_Callback function, void *user) {
    C_Status status;
    function(device, stream, user, &status);
    return C_SUCCESS;
}

C_Status on_host(const C_Device, void **out, size_t n_bytes) {
    *out = std::malloc(n_bytes);
    return *out ? C_SUCCESS : C_FAILED;
}

C_Status free_on_host(const C_Device, void *data, size_t) {
    std::free(data);
    return C_SUCCESS;
}

} // namespace

extern "C" VMM_API void InitPlugin(CustomRuntimeParams *params) {
    PADDLE_CUSTOM_RUNTIME_CHECK_VERSION(params);
    params->device_type = const_cast<char *>("vmm");
    params->sub_device_type = const_cast<char *>("host");
    C_DeviceInterface *device = params->interface;
    std::memset(device, 0, sizeof *device);
    device->size = sizeof *device;
    device->initialize = nothing;
    device->finalize = nothing;
    device->init_device = nothing;
    device->set_device = nothing;
    device->get_device = current;
    device->deinit_device = nothing;
    device->create_stream = make;
    device->destroy_stream = nothing;
    device->synchronize_stream = nothing;
    device->stream_add_callback = call_back;
    device->stream_wait_event = nothing;
    device->create_event = make;
    device->destroy_event = nothing;
    device->record_event = nothing;
    device->synchronize_event = nothing;
    device->synchronize_device = nothing;
    device->device_memory_allocate = allocate;
    device->device_memory_deallocate = release;
    device->host_memory_allocate = on_host;
    device->host_memory_deallocate = free_on_host;
    device->unified_memory_allocate = on_host;
    device->unified_memory_deallocate = free_on_host;
    device->memory_copy_h2d = copy;
    device->memory_copy_d2h = copy;
    device->memory_copy_d2d = copy;
    device->async_memory_copy_h2d = copy_on;
    device->async_memory_copy_d2h = copy_on;
    device->async_memory_copy_d2d = copy_on;
    device->get_device_count = count;
    device->get_device_list = list;
    device->device_memory_stats = statistics;
    device->device_min_chunk_size = smallest;
    device->get_compute_capability = one;
    device->get_runtime_version = one;
    device->get_driver_version = one;
}
