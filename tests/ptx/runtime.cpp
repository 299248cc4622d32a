// What nvcc's host code calls of the CUDA runtime, the memory that a kernel may touch, and what Python calls. This library has to
// be loaded first (LD_PRELOAD): torch's tensors on the CPU are then memory that it knows, and the rest is none that a kernel may
// touch.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

#include "machine.h"

#define FG_EXPORTED extern "C" __attribute__((visibility("default")))

extern "C" void* __libc_memalign(size_t alignment, size_t size);
extern "C" void __libc_free(void* data);

// ---- memory --------------------------------------------------------------------------------------------------------------------

namespace {

constexpr size_t kTorchAlignment = 64;     // of every tensor's memory on the CPU, which torch asks of posix_memalign
size_t known_alignment = kTorchAlignment;  // of the memory that a kernel may touch: a multiple

struct Allocations {
  std::mutex mutex;
  std::map<uintptr_t, uintptr_t> begins;  // by end
  std::vector<void*> kept;                // freed while launches wait that may read it
  bool keeps = false;
  std::atomic<uint64_t> changes{0};
};
// Held by what changes the allocations, whose own memory comes through here too: its thread is not looked at meanwhile.
thread_local bool changing = false;
struct Changing {
  const std::lock_guard<std::mutex> lock;
  explicit Changing(Allocations& all) : lock(all.mutex) { changing = true; }
  ~Changing() { changing = false; }
};
Allocations& allocations() {  // never destroyed: memory is freed until the very end
  static Allocations* const all = new Allocations;
  return *all;
}

}  // namespace

FG_EXPORTED int posix_memalign(void** data, size_t alignment, size_t size) {
  *data = __libc_memalign(alignment, size);
  if (*data == nullptr) return 12;  // ENOMEM
  if (alignment != known_alignment || size == 0) return 0;
  memset(*data, 0xFF, size);  // NaN, of every floating type
  Allocations& all = allocations();
  const Changing changing_here(all);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(*data);
  all.begins[begin + size] = begin;
  return 0;
}

FG_EXPORTED void free(void* data) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (begin % kTorchAlignment || begin == 0 || changing) return __libc_free(data);
  Allocations& all = allocations();
  {
    const Changing changing_here(all);
    const auto found = all.begins.upper_bound(begin);
    if (found != all.begins.end() && found->second == begin) {
      if (all.keeps) return all.kept.push_back(data);
      all.begins.erase(found);
      ++all.changes;
    }
  }
  __libc_free(data);
}

bool ptx::is_allocated(uint64_t address, uint64_t bytes) {
  struct Range {
    uintptr_t begin = 1, end = 0;
    uint64_t change = ~0ull;
  };
  static thread_local Range ranges[4];  // a kernel reads and writes a few tensors in turns
  static thread_local int next = 0;
  Allocations& all = allocations();
  const uint64_t change = all.changes;
  for (const Range& range : ranges)
    if (range.change == change && address >= range.begin && address < range.end && bytes <= range.end - address) return true;
  const Changing changing_here(all);
  const auto found = all.begins.lower_bound(address + bytes);
  if (address + bytes < address || found == all.begins.end() || address < found->second) return false;
  ranges[next++ % 4] = {found->second, found->first, change};
  return true;
}

// ---- launches ------------------------------------------------------------------------------------------------------------------

namespace {

struct Binary {
  const void* data;
  std::unique_ptr<ptx::Module> module;
};
struct Registered {
  Binary* binary;
  std::string name;
  ptx::Kernel* kernel = nullptr;
};
struct Machine {
  std::mutex mutex;
  std::map<const void*, Registered> registered;  // by the address of nvcc's function on the host
  bool holds = false;
  std::vector<std::vector<std::unique_ptr<ptx::Launch>>> held;  // by stream
  std::string error;
  void* (*launching)(const char* kernel) = nullptr;  // see fastgen_ptx_devices
};
Machine& machine() {
  static Machine* const the = new Machine;
  return *the;
}
struct Configured {
  ptx::Launch launch;
  void* stream;
};
thread_local std::vector<Configured> configured;  // by <<<…>>>
thread_local cudaError_t last_error = cudaSuccess;
thread_local size_t stream = 0;

// The PTX text in what nvcc has embedded, whose layout CUDA does not document: a header, then for each architecture one more with a
// kind (1: PTX), its own size, that of the data, and that of the data where it is compressed.
std::string embedded(const void* fatbin) {
  const char* const bytes = static_cast<const char*>(fatbin);
  auto read = [](const char* from, auto value) {
    memcpy(&value, from, sizeof value);
    return value;
  };
  const char* entry = bytes + read(bytes + 6, uint16_t());
  const char* const end = entry + read(bytes + 8, uint64_t());
  while (entry < end) {
    const uint32_t header = read(entry + 4, uint32_t());
    const uint64_t size = read(entry + 8, uint64_t());
    if (read(entry, uint16_t()) == 1) {
      if (read(entry + 16, uint32_t())) throw std::runtime_error("the PTX is compressed: nvcc needs --no-compress");
      return std::string(entry + header, strnlen(entry + header, size));
    }
    entry += header + size;
  }
  throw std::runtime_error("there is no PTX: nvcc needs code=compute_…");
}

ptx::Kernel& kernel_of(Registered& function) {
  if (!function.kernel) {
    if (!function.binary->module) function.binary->module = ptx::parse(embedded(function.binary->data));
    function.kernel = function.binary->module->kernels.at(function.name).get();
  }
  return *function.kernel;
}

constexpr size_t kSharedBytes = 48 * 1024, kMostSharedBytes = 227 * 1024;  // of a block: without asking, and where Triton asks

ptx::Launch launch_of(dim3 grid, dim3 block, size_t shared) {
  return {nullptr, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, static_cast<uint32_t>(shared), {}};
}
void launch(ptx::Kernel& kernel, ptx::Launch launch, void** arguments, size_t most_shared) {
  ptx::parse_body(kernel);  // which finds the shared memory
  launch.kernel = &kernel;
  const ptx::Size &grid = launch.grid, &block = launch.block;
  const uint64_t threads = block.count();
  const bool fits = grid.count() && grid.x <= 0x7FFFFFFF && grid.y <= 0xFFFF && grid.z <= 0xFFFF && threads && block.z <= 64;
  if (!fits || threads > kernel.most_threads || kernel.shared_bytes > kSharedBytes ||
      launch.dynamic_shared + kernel.shared_bytes > most_shared)
    throw std::runtime_error("a launch that no GPU takes: " + std::to_string(grid.x) + " × " + std::to_string(grid.y) + " × " +
                             std::to_string(grid.z) + " blocks of " + std::to_string(threads) + " threads, of " + kernel.name);
  launch.parameters.resize(kernel.parameter_bytes);
  for (size_t n = 0; n < kernel.parameters.size(); ++n)
    memcpy(launch.parameters.data() + kernel.parameters[n].offset, arguments[n], kernel.parameters[n].size);
  Machine& m = machine();
  if (!m.holds) return ptx::run({{&launch}});
  if (m.held.size() <= stream) m.held.resize(stream + 1);
  m.held[stream].push_back(std::make_unique<ptx::Launch>(std::move(launch)));
}

template <class F> cudaError_t guarded(F f) {
  const std::lock_guard<std::mutex> lock(machine().mutex);
  try {
    f();
    return cudaSuccess;
  } catch (const std::exception& error) {
    machine().error = error.what();
    return cudaErrorLaunchFailure;
  }
}

// Every kernel of the library, with the number of launches and instructions, is written to the file $FASTGEN_LAUNCHED at the end.
struct Report {
  ~Report() {
    const char* const path = machine().registered.empty() ? nullptr : getenv("FASTGEN_LAUNCHED");
    FILE* const file = path ? fopen(path, "w") : nullptr;
    if (!file) return;
    for (const auto& [host, each] : machine().registered)
      fprintf(file, "%s %lld %lld\n", each.name.c_str(), static_cast<long long>(each.kernel ? each.kernel->launches : 0),
              static_cast<long long>(each.kernel ? each.kernel->instructions : 0));
    fclose(file);
  }
} report;

void set(const std::string& text) {
  ptx::Settings made;
  size_t words = 0;
  for (size_t at = 0; (at = text.find_first_not_of(' ', at)) < text.size(); ++words)
    at = std::min(text.find(' ', at), text.size());
  auto taken = [&](const std::string& name, int& value) {
    const size_t at = (" " + text).find(" " + name + "=");
    if (at != std::string::npos) value = atoi(text.c_str() + at + name.size() + 1);
    return at != std::string::npos;
  };
  const size_t known = taken("order", made.order) + taken("seed", made.seed) + taken("resident", made.resident) +
                       taken("delayed", made.delayed) + taken("perturbed", made.perturbed) + taken("turn", made.turn);
  if (known != words) throw std::runtime_error("not all are settings: " + text);
  if (made.resident < 1 || made.turn < 1) throw std::runtime_error("resident, turn: expected 1 or more");
  ptx::settings = made;
}
[[maybe_unused]] const bool set_by_environment = (set(getenv("FASTGEN_PTX") ? getenv("FASTGEN_PTX") : ""), true);

}  // namespace

// ---- of nvcc's host code -------------------------------------------------------------------------------------------------------

FG_EXPORTED void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const void* data;
    void* more;
  };
  return reinterpret_cast<void**>(new Binary{static_cast<Wrapper*>(wrapper)->data, nullptr});
}
FG_EXPORTED void __cudaRegisterFatBinaryEnd(void**) {}
FG_EXPORTED void __cudaUnregisterFatBinary(void**) {}
FG_EXPORTED void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                        int*) {
  machine().registered[host] = {reinterpret_cast<Binary*>(binary), name};
}
FG_EXPORTED unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* on) {
  configured.push_back({launch_of(grid, block, shared), on});
  return 0;
}
FG_EXPORTED cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream_of_it) {
  const ptx::Launch& last = configured.back().launch;
  *grid = dim3(last.grid.x, last.grid.y, last.grid.z), *block = dim3(last.block.x, last.block.y, last.block.z);
  *shared = last.dynamic_shared, *static_cast<void**>(stream_of_it) = configured.back().stream;
  configured.pop_back();
  return cudaSuccess;
}
FG_EXPORTED cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared,
                                         cudaStream_t on) {
  const cudaError_t error = guarded([&] {
    if (machine().launching && machine().launching(machine().registered.at(host).name.c_str()) != on)
      throw std::runtime_error("a launch on another stream than torch's current one of the current device");
    launch(kernel_of(machine().registered.at(host)), launch_of(grid, block, shared), arguments, kSharedBytes);
  });
  if (error) last_error = error;  // which stays until it is asked for, whatever is launched after
  return error;
}
FG_EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
FG_EXPORTED cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                           cudaStream_t s) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, s);
}
FG_EXPORTED cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
FG_EXPORTED const char* cudaGetErrorString(cudaError_t error) { return error ? machine().error.c_str() : "no error"; }
FG_EXPORTED cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
FG_EXPORTED const char* fastgen_device_fault(int error) { return error ? machine().error.c_str() : ""; }

// ---- of Python -----------------------------------------------------------------------------------------------------------------

// Each returns 0, or not, with a message in fastgen_device_fault.
FG_EXPORTED int fastgen_ptx_settings(const char* text) {
  return guarded([&] { set(text); });
}
FG_EXPORTED void* fastgen_ptx_module(const char* text) {
  ptx::Module* made = nullptr;
  guarded([&] { made = ptx::parse(text).release(); });
  return made;
}
FG_EXPORTED int fastgen_ptx_launch(void* module, const char* name, const unsigned* grid, unsigned threads, unsigned shared,
                                   void** arguments) {
  return guarded([&] {
    launch(*static_cast<ptx::Module*>(module)->kernels.at(name), launch_of({grid[0], grid[1], grid[2]}, threads, shared), arguments,
           kMostSharedBytes);
  });
}
// For devices of torch's (tests/fake_cuda.cpp): what a kernel may touch is no longer the memory of the CPU's tensors, but what is
// allocated with this alignment; and at each launch `launching` is told the kernel's name, and says which stream it has to be on.
FG_EXPORTED void fastgen_ptx_devices(size_t alignment, void* (*launching)(const char* kernel)) {
  known_alignment = alignment;
  machine().launching = launching;
}
// Launches wait, each on the stream that its thread has chosen, and the memory that they may read is not given back.
FG_EXPORTED void fastgen_ptx_hold() {
  machine().holds = true;
  allocations().keeps = true;
}
FG_EXPORTED void fastgen_ptx_stream(size_t number) { stream = number; }
// Runs what waits, as often as is said: as the replays of a graph.
FG_EXPORTED int fastgen_ptx_run(int times) {
  return guarded([&] {
    std::vector<std::vector<const ptx::Launch*>> streams;
    for (const auto& each : machine().held) {
      streams.emplace_back();
      for (const auto& held : each)
        streams.back().push_back(held.get());
    }
    for (int n = 0; n < times; ++n)
      ptx::run(streams);
  });
}
FG_EXPORTED void fastgen_ptx_release() {
  machine().holds = false;
  machine().held.clear();
  std::vector<void*> kept;
  {
    const Changing changing_here(allocations());
    allocations().keeps = false;
    kept.swap(allocations().kept);
  }
  for (void* each : kept)
    free(each);
}
