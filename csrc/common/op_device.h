// What depends on the device that an op is compiled for: all such branches of the op layer but those of the ops themselves. An op
// file is compiled twice: into the CPU library, and with FG_CUDA into the CUDA one, where the same op launches CUDA kernels. A
// third build is the tests' own, FG_DEVICE_ON_HOST: a CPU library whose ops run the CUDA kernels' code on the host.
//
//   FG_DEVICE                              the dispatch key that the op's functions are registered for
//   FG_DEVICE_KERNELS                      defined where the kernels are those of CUDA, on a GPU or on the host
//   FG_KERNELS(op, Arguments)              declares the kernels of `op`
//   FG_RUN(op, arguments, like, cost)      runs them on the device of `like`
//   prepare_memory(fresh, bytes)           called with every new tensor
//   kTimestepsAreVisible                   whether an op may look at the timesteps in a tensor
#pragma once
#ifdef FG_CUDA
#include <cuda_runtime_api.h>
#else
#include <sys/mman.h>
#endif

#include "common/isa.h"
#include "common/op_tensor.h"

#ifdef FG_CUDA
#define FG_DEVICE CUDA
#else
#define FG_DEVICE CPU
#endif
#if defined(FG_CUDA) || defined(FG_DEVICE_ON_HOST)
#define FG_DEVICE_KERNELS
#endif

namespace fastgen {

// ---- memory --------------------------------------------------------------------------------------------------------------------

#ifdef FG_CUDA
inline void prepare_memory(const Tensor&, int64_t) {}
#else
// glibc maps every allocation from 32 MiB on anew, and each 4 KiB page of it faults at its first write. At 64 MiB of output that
// made a seeded q_sample 2.3 ns per element where writing to an existing tensor took 0.77; with 2 MiB pages it is 1.1 (AMD EPYC
// guest, 2 cores). It is a hint only: without transparent huge pages nothing changes.
constexpr int64_t kMappedAnew = 32 << 20;
inline void prepare_memory(const Tensor& fresh, int64_t bytes) {
  if (bytes < kMappedAnew) return;
  constexpr int64_t huge = 2 << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t begin = (address + huge - 1) / huge * huge;
  const uintptr_t end = (address + bytes) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
#endif

// ---- the GPU's kernels ---------------------------------------------------------------------------------------------------------

#ifdef FG_CUDA
// Runs `launch(arguments, stream)`, an extern-C launcher that returns a cudaError_t, on the data's device and current stream.
template <class Arguments> void run_cuda(int (*launch)(const Arguments&, void*), const Arguments& arguments, const View& like) {
  const torch::stable::accelerator::DeviceGuard guard(like.device_index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.device_index, &stream));
  const int error = launch(arguments, stream);
  STD_TORCH_CHECK(error == 0, "CUDA kernel launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}
#elif defined(FG_DEVICE_ON_HOST)
extern "C" __attribute__((weak)) const char* fastgen_device_fault(int error);  // of tests/ptx, where that runs the kernels

template <class Arguments> void run_cuda(int (*launch)(const Arguments&, void*), const Arguments& arguments, const View&) {
  const int error = launch(arguments, nullptr);
  STD_TORCH_CHECK(error == 0, "CUDA kernel launch failed: ", fastgen_device_fault ? fastgen_device_fault(error) : "");
}
#endif

#ifdef FG_DEVICE_KERNELS
// A host that looked at them would wait for the GPU. A timestep outside the table makes its sample NaN instead.
constexpr bool kTimestepsAreVisible = false;

#define FG_RUN(op, arguments, like, cost) run_cuda(fastgen_##op##_cuda, arguments, like)
#define FG_KERNELS(op, Arguments) extern "C" int fastgen_##op##_cuda(const Arguments&, void* stream);
#else

// ---- the CPU's kernels ---------------------------------------------------------------------------------------------------------

constexpr bool kTimestepsAreVisible = true;

// Where no noise is made, a step waits for memory, and then 512-bit accesses are the slower ones: given noise, ddpm_step and
// q_sample reach 1.02 … 1.13 and 0.88 … 1.00 of torch.add's bytes per second with 256 bits, 0.83 … 0.96 and 0.74 … 0.89 with 512
// (AMD EPYC, Zen 4; neither stores past the cache nor prefetching by hand changed that). Not so with bfloat16, whose rounding takes
// ten instructions: there 512 bits take 0.8 of the time. The values are the same, but not the order in which values are summed:
// that must not depend on what else is written, so what has sums does not look at the outputs.
inline Isa isa_for(const Elementwise& a, bool sums = false) {
  if (a.noise.kind == kTorchNoise && !a.noise.fused) return Isa::kDefault;  // which has no fused multiplication and addition
  bool wide = a.noise.kind == kSeededNoise || a.noise.kind == kTorchNoise;
  for (const Operand& out : a.out)
    wide = wide || (!sums && out.data && out.dtype == kBFloat16);
  return isa() == Isa::kAvx512 && !wide ? Isa::kAvx2 : isa();
}

// The unit at which share k of `shares` begins, where torch's noise comes from one generator. A share that begins further on has
// more of the generator's words to go past before its own, each in a tenth of the time of a normal; shares of these lengths end
// together. By that count equal ones would take 1.3 times as long with 16 threads, and with however many the speed is at most ten
// times that of one.
inline int64_t torch_share(int64_t units, int64_t k, int64_t shares) {
  constexpr double kept = 0.9;
  double power = 1, power_of_k = 1;
  for (int64_t i = 0; i < shares; ++i) {
    if (i == k) power_of_k = power;
    power *= kept;
  }
  return k == shares ? units : static_cast<int64_t>((1 - power_of_k) / (1 - power) * static_cast<double>(units));
}

// Runs the kernel of this processor over torch's threads. `cost`: elements that are worth a thread, fewer where each costs more.
template <class Arguments> void run_cpu(CpuKernel<Arguments> kernel, const Arguments& arguments, const View&, int64_t cost) {
  const int64_t elements = arguments.geometry.batch * arguments.geometry.event;
  if (elements == 0) return;
  const int64_t per_unit = arguments.elements_per_unit(), units = elements / per_unit;
  if (elements <= cost) return kernel(arguments, 0, units);
  if (arguments.noise.kind == kTorchNoise && !arguments.noise.per_sample) {
    const int64_t threads = torch::stable::get_num_threads(), shares = elements / cost < threads ? elements / cost : threads;
    torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
      const int64_t begin = torch_share(units, first, shares), end = torch_share(units, last, shares);
      if (begin < end) kernel(arguments, begin, end);
    });
    return;
  }
  torch::stable::parallel_for(0, units, cost / per_unit > 0 ? cost / per_unit : 1,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// `cost`: blocks that are worth a thread.
template <class Arguments>
void run_blocks(CpuKernel<Arguments> kernel, const Arguments& arguments, int64_t blocks, int64_t cost = 1) {
  if (blocks <= cost) return kernel(arguments, 0, blocks);
  torch::stable::parallel_for(0, blocks, cost, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

#define FG_RUN(op, arguments, like, cost) run_cpu(op##_cpu(isa_for(arguments)), arguments, like, cost)
#define FG_KERNELS(op, Arguments) FG_CPU_KERNELS(op, Arguments)
#endif

}  // namespace fastgen
