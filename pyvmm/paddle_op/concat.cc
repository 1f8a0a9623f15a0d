/* concat.cc - a Paddle operator that appends where concat copies.
 *
 * vmm_concat(cache, rows) equals concat([cache, rows], axis) in value. Where the memory of
 * `cache` is that of a growable tensor and `cache` shows all its rows, the new rows are
 * appended behind them and nothing else is copied; otherwise the cache is copied once, into a
 * new growable tensor. Either way a tensor that was handed out earlier stays as it is.
 *
 * Paddle makes an operator's inputs contiguous before its kernel sees them, by a copy that
 * nobody is told of, and the kernels of its static executor take every tensor for contiguous.
 * So the growth axis must be the first that is not of size 1: then memory is in C order
 * whatever the length, nothing is copied on the way in, and what goes out is right to all.
 * With any other axis this is Paddle's concat.
 *
 * pyvmm.paddle_op builds this and knows the rest.
 */
#include <paddle/extension.h>
#include <paddle/phi/core/dense_tensor.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <vmm.h>

namespace {

/* Keeps the rows [0, n) of a growable tensor in place for the Paddle tensors that show them.
 * Not from_blob(): its deleters are known by address, and one address has several of these.
 * The size is that of the rows: numpy(), print() and save() read an allocation whole, and what
 * lies behind the rows may not be backed by memory. */
class PinnedRows : public phi::Allocation {
  public:
    PinnedRows(vmm_tensor *tensor, vmm_pin *pin, size_t n_bytes, const phi::Place &place)
        : phi::Allocation(vmm_base(tensor), n_bytes, place), pin_(pin) {
    }
    ~PinnedRows() override {
        vmm_unpin(pin_);
    }

  private:
    vmm_pin *pin_;
};

struct Release {
    void operator()(vmm_tensor *tensor) const {
        vmm_release(tensor);
    }
};
using Reference = std::unique_ptr<vmm_tensor, Release>;

/* How often each happened. */
std::atomic<uint64_t> n_appended, n_forked, n_moved, n_taken_in, n_copied;

void check(vmm_status status) {
    if (status == VMM_OK)
        return;
    const char *message = vmm_last_error()->message;
    switch (status) {
    case VMM_ERR_OUT_OF_MEMORY:
        PADDLE_THROW(common::errors::ResourceExhausted("vmm_concat: %s", message));
    case VMM_ERR_UNSUPPORTED:
    case VMM_ERR_NO_DRIVER:
    case VMM_ERR_NO_DEVICE: PADDLE_THROW(common::errors::Unavailable("vmm_concat: %s", message));
    default: PADDLE_THROW(common::errors::External("vmm_concat: %s", message));
    }
}

vmm_dtype dtype_of(const paddle::Tensor &x) {
    switch (x.dtype()) {
    case phi::DataType::BOOL: return VMM_BOOL;
    case phi::DataType::INT8: return VMM_INT8;
    case phi::DataType::INT16: return VMM_INT16;
    case phi::DataType::INT32: return VMM_INT32;
    case phi::DataType::INT64: return VMM_INT64;
    case phi::DataType::UINT8: return VMM_UINT8;
    case phi::DataType::FLOAT16: return VMM_FLOAT16;
    case phi::DataType::BFLOAT16: return VMM_BFLOAT16;
    case phi::DataType::FLOAT32: return VMM_FLOAT32;
    case phi::DataType::FLOAT64: return VMM_FLOAT64;
    case phi::DataType::COMPLEX64: return VMM_COMPLEX64;
    case phi::DataType::COMPLEX128: return VMM_COMPLEX128;
    case phi::DataType::FLOAT8_E4M3FN: return VMM_FLOAT8_E4M3FN;
    case phi::DataType::FLOAT8_E5M2: return VMM_FLOAT8_E5M2;
    default: PADDLE_THROW(common::errors::InvalidType("vmm_concat: no tensors of %s", x.dtype()));
    }
}

/* ---- where tensors come from ------------------------------------------------------ */

std::mutex pools_lock;
/* By the device's name. A tensor without rows, so that its pool cannot be closed. */
std::map<std::string, Reference> pools;

std::string device_of(const paddle::Tensor &x) {
    if (x.is_cpu())
        return "host";
    if (x.is_gpu())
        return "cuda:" + std::to_string(x.place().GetDeviceId());
    PADDLE_THROW(common::errors::Unimplemented("vmm_concat: tensors on %s are not supported, "
                                               "only those on cpu and gpu",
                                               x.place().DebugString()));
}

Reference tensor_at(const void *base) {
    vmm_tensor *tensor;
    check(vmm_find(base, &tensor));
    return Reference(tensor);
}

vmm_pool *pool_of(const std::string &device) {
    std::lock_guard<std::mutex> guard(pools_lock);
    Reference &member = pools[device];
    if (!member) {
        vmm_device *opened;
        vmm_pool *pool;
        vmm_tensor *tensor;
        int64_t shape[] = {0};
        vmm_spec spec = {};
        spec.ndim = 1;
        spec.shape = shape;
        spec.dtype = VMM_UINT8;
        spec.capacity = 1;
        check(vmm_device_open(device.c_str(), &opened));
        vmm_status status = vmm_pool_create(opened, VMM_BLOCK_AUTO, 0, &pool);
        vmm_device_close(opened); /* the pool keeps it */
        check(status);
        check(vmm_reserve(pool, &spec, &tensor));
        member.reset(tensor);
    }
    return vmm_pool_of(member.get());
}

/* New tensors on `device` come from the pool of the tensor at `base`. */
void use_pool_of(const std::string &device, uintptr_t base) {
    Reference member = tensor_at((const void *)base);
    PD_CHECK(member, "vmm_concat: no growable tensor begins at ", base);
    std::lock_guard<std::mutex> guard(pools_lock);
    pools[device] = std::move(member);
}

bool is_contiguous(const paddle::Tensor &x) {
    return std::static_pointer_cast<phi::DenseTensor>(x.impl())->meta().is_contiguous();
}

vmm_stream stream_of(const paddle::Tensor &x) {
#ifdef PADDLE_WITH_CUDA
    if (x.is_gpu())
        return paddle::GetCurrentCUDAStream(x.place())->raw_stream();
#endif
    return nullptr;
}

/* ---- the concatenation -------------------------------------------------------------- */

/* The rows [0, n_rows) as a Paddle tensor; `meta` says how they lie. */
paddle::Tensor show(vmm_tensor *tensor, size_t n_rows, const phi::DenseTensorMeta &meta,
                    const phi::Place &place) {
    int64_t last = 0;
    for (int i = 0; i < meta.dims.size(); i++)
        last += (meta.dims[i] - 1) * meta.strides[i];
    size_t n_bytes = n_rows ? (last + 1) * phi::SizeOf(meta.dtype) : 0;
    vmm_pin *pin;
    check(vmm_pin_rows(tensor, n_rows, &pin));
    auto pinned = std::make_shared<PinnedRows>(tensor, pin, n_bytes, place);
    return paddle::Tensor(std::make_shared<phi::DenseTensor>(pinned, meta));
}

/* One call: `cache` and `rows`, as the kernel got them. */
struct Call {
    const paddle::Tensor &cache, &rows;
    size_t axis;
    size_t n_old, n_new;      /* rows */
    std::vector<int64_t> row; /* the shape without the axis */
    std::string device;
    vmm_dtype dtype;
    bool grows; /* the axis is the outermost in memory */

    Call(const paddle::Tensor &cache, const paddle::Tensor &rows, int64_t axis);
    vmm_array array_of(const paddle::Tensor &x, int at_axis, int64_t *shape,
                       int64_t *strides) const;
    void append(vmm_tensor *tensor, const paddle::Tensor &x) const;
    bool shows(const vmm_tensor *tensor) const;
    Reference make(size_t capacity) const;
    paddle::Tensor result(vmm_tensor *tensor) const;
};

Call::Call(const paddle::Tensor &cache, const paddle::Tensor &rows, int64_t axis)
    : cache(cache), rows(rows), axis(axis), row(cache.shape()), dtype(dtype_of(cache)) {
    int64_t ndim = row.size();
    if (axis < 0 || axis >= ndim || ndim > VMM_MAX_NDIM)
        PADDLE_THROW(common::errors::InvalidArgument(
            "vmm_concat: axis %d of a cache with %d dimensions; at most %d are possible", axis,
            ndim, VMM_MAX_NDIM));
    std::vector<int64_t> other = rows.shape();
    if (rows.dtype() != cache.dtype() || rows.place() != cache.place())
        PADDLE_THROW(common::errors::InvalidArgument(
            "vmm_concat: rows of %s on %s for a cache of %s on %s", rows.dtype(),
            rows.place().DebugString(), cache.dtype(), cache.place().DebugString()));
    n_old = row[axis];
    n_new = other.size() == row.size() ? other[axis] : 0;
    row.erase(row.begin() + axis);
    if (other.size() == row.size() + 1)
        other.erase(other.begin() + axis);
    if (other != row)
        PADDLE_THROW(common::errors::InvalidArgument(
            "vmm_concat: rows of shape [%s] for a cache of shape [%s]; all but axis %d must agree",
            common::make_ddim(rows.shape()), common::make_ddim(cache.shape()), axis));
    grows = std::all_of(row.begin(), row.begin() + axis, [](int64_t size) { return size == 1; });
    /* Paddle sees to it where it knows that a tensor has strides. */
    if (!is_contiguous(cache) || !is_contiguous(rows))
        PADDLE_THROW(common::errors::InvalidArgument("vmm_concat: inputs must be contiguous"));
    device = device_of(cache);
}

/* What x holds, in the dimensions of a tensor whose growth axis is `at_axis`. */
vmm_array Call::array_of(const paddle::Tensor &x, int at_axis, int64_t *shape,
                         int64_t *strides) const {
    vmm_array array = {};
    array.data = x.numel() ? x.data() : nullptr;
    array.memory = x.is_cpu() ? VMM_MEMORY_HOST : VMM_MEMORY_DEVICE;
    array.device_index = x.is_cpu() ? 0 : x.place().GetDeviceId();
    array.dtype = dtype;
    array.ndim = (int)row.size() + 1;
    array.shape = shape;
    array.strides = strides;
    int64_t stride = dtype.bits / 8;
    for (int i = array.ndim - 1, j = (int)row.size() - 1; i >= 0; i--)
        if (i != at_axis) {
            shape[i] = row[j--];
            strides[i] = stride;
            stride *= shape[i];
        }
    shape[at_axis] = x.shape()[axis];
    strides[at_axis] = stride;
    return array;
}

void Call::append(vmm_tensor *tensor, const paddle::Tensor &x) const {
    int64_t shape[VMM_MAX_NDIM], strides[VMM_MAX_NDIM];
    vmm_array array = array_of(x, vmm_axis(tensor), shape, strides);
    check(vmm_append(tensor, &array, stream_of(x)));
}

/* Whether `cache` is a view of the tensor's first rows. */
bool Call::shows(const vmm_tensor *tensor) const {
    vmm_dtype its = vmm_spec_of(tensor)->dtype;
    int at_axis = vmm_axis(tensor), ndim = vmm_ndim(tensor);
    if (its.code != dtype.code || its.bits != dtype.bits || ndim != (int)row.size() + 1 ||
        vmm_lane_count(tensor) != 1 || n_old > vmm_length(tensor))
        return false;
    for (int i = 0, j = 0; i < ndim; i++)
        if (i != at_axis && vmm_row_shape(tensor)[i] != row[j++])
            return false;
    return true;
}

Reference Call::make(size_t capacity) const {
    vmm_spec spec = {};
    std::vector<int64_t> shape = cache.shape();
    spec.ndim = (int)shape.size();
    spec.shape = shape.data();
    spec.axis = (int)axis;
    spec.dtype = dtype;
    /* Address space only: moving is to be rare, whatever was asked for. */
    spec.capacity = std::max(capacity, 2 * (n_old + n_new));
    vmm_tensor *tensor;
    check(vmm_reserve(pool_of(device), &spec, &tensor));
    return Reference(tensor);
}

paddle::Tensor Call::result(vmm_tensor *tensor) const {
    std::vector<int64_t> shape = cache.shape();
    shape[axis] = n_old + n_new;
    phi::DenseTensorMeta meta(cache.dtype(), common::make_ddim(shape));
    return show(tensor, n_old + n_new, meta, cache.place());
}

/* A tensor has one writer at a time, and Paddle's executor several threads. */
std::mutex &writer_of(const void *base) {
    static std::mutex locks[64];
    return locks[((uintptr_t)base >> 12) % 64];
}

std::vector<paddle::Tensor> concat(const paddle::Tensor &cache, const paddle::Tensor &rows,
                                   int64_t axis, int64_t capacity) {
    Call call(cache, rows, axis);
    if (!call.grows) {
        n_copied++;
        return {paddle::concat({cache, rows}, axis)};
    }
    Reference tensor;
    std::atomic<uint64_t> *count = &n_taken_in;
    if (cache.numel())
        tensor = tensor_at(cache.data());
    if (tensor) {
        std::lock_guard<std::mutex> guard(writer_of(cache.data()));
        if (call.shows(tensor.get())) {
            size_t has = vmm_capacity(tensor.get());
            if (vmm_length(tensor.get()) != call.n_old) {
                count = &n_forked;
                capacity = std::max<int64_t>(capacity, has);
            } else if (call.n_new > has - call.n_old) {
                count = &n_moved;
            } else {
                call.append(tensor.get(), rows);
                n_appended++;
                return {call.result(tensor.get())};
            }
        }
    }
    Reference made = call.make(capacity);
    call.append(made.get(), cache);
    call.append(made.get(), rows);
    (*count)++;
    return {call.result(made.get())};
}

/* -1 is a size that is not known yet. */
std::vector<std::vector<int64_t>> infer_shape(const std::vector<int64_t> &cache,
                                              const std::vector<int64_t> &rows, int64_t axis,
                                              int64_t capacity) {
    std::vector<int64_t> shape = cache;
    PD_CHECK(cache.size() == rows.size() && axis >= 0 && axis < (int64_t)cache.size(),
             "vmm_concat: cache and rows have ", cache.size(), " and ", rows.size(),
             " dimensions, and the axis is ", axis);
    for (size_t i = 0; i < shape.size(); i++) {
        if ((int64_t)i == axis)
            shape[i] = cache[i] < 0 || rows[i] < 0 ? -1 : cache[i] + rows[i];
        else if (shape[i] < 0)
            shape[i] = rows[i];
    }
    return {shape};
}

std::vector<paddle::DataType> infer_dtype(const paddle::DataType &cache, const paddle::DataType &) {
    return {cache};
}

} // namespace

PD_BUILD_OP(vmm_concat)
    .Inputs({"Cache", "Rows"})
    .Outputs({"Out"})
    .Attrs({"axis: int64_t", "capacity: int64_t"})
    .SetKernelFn(PD_KERNEL(concat))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(infer_dtype));

/* ---- for Python, in eager mode -------------------------------------------------------- */

PYBIND11_MODULE(PADDLE_EXTENSION_NAME, module) {
    module.def("counts", [] {
        return std::vector<uint64_t>{n_appended, n_forked, n_moved, n_taken_in, n_copied};
    });
    module.def("use_pool_of", &use_pool_of);
    /* The first rows of the tensor at `base`; the strides count elements. */
    module.def("show", [](uintptr_t base, const std::vector<int64_t> &shape,
                          const std::vector<int64_t> &strides, const paddle::Tensor &like) {
        Reference tensor = tensor_at((const void *)base);
        PD_CHECK(tensor, "no growable tensor begins at ", base);
        phi::DenseTensorMeta meta(like.dtype(), common::make_ddim(shape),
                                  common::make_ddim(strides));
        return show(tensor.get(), shape.at(vmm_axis(tensor.get())), meta, like.place());
    });
}
