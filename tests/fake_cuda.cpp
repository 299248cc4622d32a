// CUDA devices for a torch that was built for the CPU alone, so that the CUDA library's host code runs without a GPU: its dispatch,
// device guards, streams, allocations and copies. Takes the place of libtorch_cuda.so. The memory of the devices is the host's, and
// torch's own operators run on the CPU, on aliases of the devices' tensors; the kernels of the library run on the machine of
// tests/ptx, which takes the place of the CUDA runtime.
//
// All of it uses torch's unstable C++ interfaces, hence is for one version of torch. It has to be loaded before torch is imported:
// torch asks once which devices there are. Nothing is asynchronous here: an operator is done when it returns, streams have names
// and nothing else.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#define FG_EXPORTED extern "C" __attribute__((visibility("default")))

extern "C" void fastgen_ptx_devices(size_t alignment, void* (*launching)(const char* kernel));  // of tests/ptx/runtime.cpp

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using c10::Stream;

constexpr int kDevices = 2;  // one that is current, and another
constexpr int64_t kStreams = 1 << 16;
constexpr size_t kAlignment = 512;  // of torch's CUDA allocator; the machine knows a device's memory by it

Device cuda(int index) { return {c10::DeviceType::CUDA, static_cast<DeviceIndex>(index)}; }

constexpr int64_t kMemory = int64_t{4} << 30;  // bytes of a device, so that no test takes all of the host's

// ---- devices and streams -------------------------------------------------------------------------------------------------------

thread_local DeviceIndex current = 0;
thread_local c10::StreamId current_streams[kDevices] = {};
std::atomic<int64_t> streams_made{0};

// What CUDA's own functions take for the stream. Not null: that would be the default stream of whichever device is current, so
// that nobody could tell whether a launch was given torch's current stream or none.
void* handle(int device, c10::StreamId stream) { return reinterpret_cast<void*>((device + 1) * kStreams + stream); }

DeviceIndex exchange(DeviceIndex device) {
  TORCH_CHECK(device >= 0 && device < kDevices, "CUDA error: invalid device ordinal");
  return std::exchange(current, device);
}

enum SyncDebugMode { kDefault, kWarn, kError };
std::atomic<int> sync_debug_mode{kDefault};
// Called where torch's CUDA code has the host wait for the device, and asks what torch.cuda.set_sync_debug_mode has set.
void host_waits(const std::string& operation) {
  TORCH_CHECK(sync_debug_mode != kError, "called a synchronizing CUDA operation: ", operation);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override { return cuda(exchange(device.index())); }
  Device getDevice() const override { return cuda(current); }
  void setDevice(Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }

  static DeviceIndex index(Device device) { return device.has_index() ? device.index() : current; }
  static Stream named(Device device, c10::StreamId id) { return Stream(Stream::UNSAFE, cuda(index(device)), id); }
  Stream getStream(Device device) const override { return named(device, current_streams[index(device)]); }
  Stream getDefaultStream(Device device) const override { return named(device, 0); }
  Stream getNewStream(Device device, int) const override { return named(device, ++streams_made); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream stream) const override {
    return named(stream.device(), std::exchange(current_streams[stream.device_index()], stream.id()));
  }
  void* getStreamNativeHandle(const Stream stream) const override { return handle(stream.device_index(), stream.id()); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  bool isStreamCapturing(const Stream&) const override { return false; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const Stream&) const override { host_waits("a stream's end"); }
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct CUDAHooks final : at::CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { exchange(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return device < 0 ? -1 : exchange(device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  void deviceSynchronize(DeviceIndex) const override {}
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// ---- what is done on the devices, for the tests that count it ------------------------------------------------------------------

struct Log {
  std::mutex mutex;
  bool on = false;
  std::vector<std::string> names;  // of the library's kernels, and of torch's operators, each of which stands for one
  void add(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (on) names.push_back(name);
  }
} log_;

void* launching(const char* kernel) {
  log_.add(kernel);
  return handle(current, current_streams[current]);
}

// ---- memory --------------------------------------------------------------------------------------------------------------------

struct Statistics {
  std::atomic<int64_t> allocations{0}, requested{0}, allocated{0};  // ever, bytes now, bytes now as torch's allocator rounds them
} statistics[kDevices];

struct Block {
  void* data;
  size_t bytes;
  DeviceIndex device;
  int64_t rounded() const { return static_cast<int64_t>((bytes + kAlignment - 1) / kAlignment * kAlignment); }
};

std::atomic<bool> out_of_reach{false};  // so that a test can have a kernel touch what is not the device's

void release(void* of) {
  const Block* const block = static_cast<Block*>(of);
  statistics[block->device].requested -= static_cast<int64_t>(block->bytes);
  statistics[block->device].allocated -= block->rounded();
  free(block->data);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, cuda(current)};
    void* data = nullptr;
    const bool fits = bytes <= static_cast<size_t>(kMemory - statistics[current].allocated);
    const size_t alignment = out_of_reach ? 2 * kAlignment : kAlignment;
    TORCH_CHECK_WITH(OutOfMemoryError, fits && posix_memalign(&data, alignment, bytes) == 0, "CUDA out of memory: ", bytes,
                     " bytes");
    Block* const block = new Block{data, bytes, current};
    statistics[current].allocations += 1;
    statistics[current].requested += static_cast<int64_t>(bytes);
    statistics[current].allocated += block->rounded();
    return {data, block, &release, cuda(current)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} memory;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &memory)

Tensor empty_strided_on(Device device, at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  const c10::DeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype);
}

// ---- torch's operators ---------------------------------------------------------------------------------------------------------

bool on_device(const Tensor& x) { return x.defined() && x.is_cuda(); }

// The same memory as a tensor of the CPU's.
Tensor alias_on_host(const Tensor& x) {
  if (!on_device(x)) return x;
  const auto options = x.options().device(at::kCPU).requires_grad(false);
  // an operator may resize an empty one, for which it needs an allocator
  if (x.numel() == 0) return at::empty_strided(x.sizes(), x.strides(), options);
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), [keep = x](void*) {}, options);
}

Tensor copy_on_device(const Tensor& x, Device device) {
  const Tensor made = empty_strided_on(device, x.sizes(), x.strides(), x.scalar_type());
  alias_on_host(made).copy_(x);
  return made;
}

// Where the values decide about shapes or go to the host, so that it has to wait for them.
const std::set<std::string> kWaiting = {"aten::_local_scalar_dense",
                                        "aten::nonzero",
                                        "aten::masked_select",
                                        "aten::equal",
                                        "aten::_unique2",
                                        "aten::bincount",
                                        "aten::repeat_interleave",
                                        "aten::unique_consecutive",
                                        "aten::unique_dim"};
// These may have indices on the CPU.
const std::set<std::string> kIndexing = {"aten::index", "aten::_index_put_impl_"};

// Runs an operator on the host, for which there is no function of its own below.
struct OnHost {
  const c10::OperatorHandle& op;
  const std::string name = op.schema().name();
  std::vector<std::pair<Tensor, Tensor>> aliases;  // and what they are aliases of
  Device device = cuda(current);
  bool some_here = false, some_elsewhere = false;  // given tensors

  explicit OnHost(const c10::OperatorHandle& o) : op(o) {}

  Tensor given(const Tensor& x) {
    if (!on_device(x)) {
      some_elsewhere = some_elsewhere || (x.defined() && x.dim() > 0);  // without dimensions it is taken for a number
      return x;
    }
    TORCH_CHECK(!some_here || device == x.device(), "Expected all tensors to be on the same device, but ", name,
                " was given some on ", device, " and on ", x.device());
    device = x.device(), some_here = true;
    return aliases.emplace_back(alias_on_host(x), x).first;
  }
  IValue given(const IValue& value) {
    if (value.isTensor()) return given(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& x : value.toTensorVector())
        list.push_back(given(x));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& x : value.toOptionalTensorVector())
        list.push_back(x ? std::optional<Tensor>(given(*x)) : x);
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      device = value.toDevice().has_index() ? value.toDevice() : cuda(current);
      return Device(at::kCPU);
    }
    return value;
  }
  Tensor made(const Tensor& result) {
    if (!result.defined() || !result.is_cpu()) return result;
    for (const auto& [alias, x] : aliases) {
      if (!alias.is_same(result)) continue;
      if (alias.sizes() != x.sizes())
        x.unsafeGetTensorImpl()->shallow_copy_from(copy_on_device(alias, x.device()).getIntrusivePtr());  // it was resized
      return x;
    }
    return copy_on_device(result, device);
  }
  IValue made(const IValue& value) {
    if (value.isTensor()) return made(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<Tensor> list;
    for (const Tensor& x : value.toTensorVector())
      list.push_back(made(x));
    return list;
  }

  void operator()(torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    TORCH_CHECK_NOT_IMPLEMENTED(name.rfind("aten::", 0) == 0, "Could not run '", name,
                                "' with arguments from the 'CUDA' backend: no kernel is registered for it");
    for (const auto& result : schema.returns())
      TORCH_CHECK_NOT_IMPLEMENTED(!result.alias_info() || result.alias_info()->isWrite(), "the fake devices lack the view ", name);
    if (kWaiting.count(name)) host_waits(name);
    log_.add(name);
    const size_t first = stack->size() - schema.arguments().size();
    for (size_t k = first; k < stack->size(); ++k)
      (*stack)[k] = given((*stack)[k]);
    TORCH_CHECK(!some_here || !some_elsewhere || kIndexing.count(name), "Expected all tensors to be on the same device, but ", name,
                " was given some on ", device, " and on the CPU");
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    for (size_t k = stack->size() - schema.returns().size(); k < stack->size(); ++k)
      (*stack)[k] = made((*stack)[k]);
  }
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { OnHost{op}(stack); }

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device && device->has_index() ? *device : cuda(current));
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype),
                                   format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  return empty_strided_on(device && device->has_index() ? *device : cuda(current), size, stride, c10::dtype_or_default(dtype));
}
Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.is_cuda() != from.is_cuda() && !non_blocking) host_waits("a copy between the host and a device");
  log_.add("aten::copy_");
  alias_on_host(to).copy_(alias_on_host(from));
  return to;
}
const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());  // the CPU's function allocates on the current device
  return at::native::resize_(self, size, format);
}
Tensor& set_(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}
void record_stream(Tensor&, Stream) {}  // of memory whose work is done

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("record_stream", record_stream);
  library.impl("set_.source_Storage_storage_offset", set_);
  library.impl("resize_", resize_);
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("unfold", TORCH_FN(at::native::unfold));
}

[[maybe_unused]] const bool machine_knows = (fastgen_ptx_devices(kAlignment, launching), true);

}  // namespace

// A torch for the CPU knows no accelerator. This definition is found before its own, since this library is loaded first.
namespace at::accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) { return at::kCUDA; }
}  // namespace at::accelerator

// ---- of the library ------------------------------------------------------------------------------------------------------------

FG_EXPORTED int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  if (device < 0 || device >= kDevices) return 1;
  *stream = handle(device, current_streams[device]);
  return 0;
}

// ---- of Python -----------------------------------------------------------------------------------------------------------------

FG_EXPORTED int fake_cuda_devices() { return kDevices; }
FG_EXPORTED int64_t fake_cuda_memory() { return kMemory; }
FG_EXPORTED int fake_cuda_device() { return current; }
// The device that was current; −1 where there is no such one.
FG_EXPORTED int fake_cuda_exchange_device(int device) {
  return device < 0 || device >= kDevices ? -1 : std::exchange(current, static_cast<DeviceIndex>(device));
}
FG_EXPORTED void fake_cuda_set_sync_debug_mode(int mode) { sync_debug_mode = mode; }
// Whether what is allocated from now on is memory that no kernel may touch.
FG_EXPORTED void fake_cuda_put_out_of_reach(int on) { out_of_reach = on; }
// How many allocations there were, the bytes that are asked for now, and those bytes as torch's allocator rounds them.
FG_EXPORTED int64_t fake_cuda_statistic(int device, int which) {
  const Statistics& s = statistics[device];
  return which == 0 ? s.allocations : which == 1 ? s.requested : s.allocated;
}
FG_EXPORTED void fake_cuda_log(int on) {
  const std::lock_guard<std::mutex> lock(log_.mutex);
  log_.on = on;
  if (on) log_.names.clear();
}
FG_EXPORTED int64_t fake_cuda_logged() { return static_cast<int64_t>(log_.names.size()); }
FG_EXPORTED const char* fake_cuda_logged_name(int64_t n) { return log_.names[n].c_str(); }
