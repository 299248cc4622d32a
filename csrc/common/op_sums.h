// Where the kernels of an op that adds up leave their sums, and how the CPU library writes the total.
#pragma once
#include <atomic>
#include <random>
#include <vector>

#include "common/index.h"  // kThreads: more work than a thread block has threads needs Scratch
#include "common/op_arguments.h"
#include "common/sum_blocks.h"

namespace fastgen {

inline int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

// ---- of the GPU's kernels ------------------------------------------------------------------------------------------------------

// The memory of `values` sums side by side, and of the flags beside them.
struct Scratch {
  Tensor numbers;
  SumScratch for_kernel;

  Scratch(int values, const View& like) : Scratch(values * kMostSums, kMostSums, like) {}

 private:
  Scratch(int64_t sums, int64_t flags, const View& like) : numbers(doubles(sums + flags, like)) {
    static std::atomic<uint64_t> launches{std::random_device()() * 0x9E3779B97F4A7C15u};
    for_kernel.sums = static_cast<double*>(numbers.mutable_data_ptr());
    for_kernel.flags = reinterpret_cast<uint64_t*>(for_kernel.sums + sums);
    for_kernel.launch_number = ++launches | 1ull << 63;  // never 0, which a flag is between launches
  }
  static Tensor doubles(int64_t count, const View& like) { return empty(&count, 1, false, kFloat64, like); }
};

// ---- of the CPU's kernels ------------------------------------------------------------------------------------------------------

// The sum of each block of the work. How the work is cut into blocks does not depend on the threads. A few sums are on the stack.
struct BlockSums {
  static constexpr int64_t kFew = 256;
  double few[kFew];
  std::vector<double> many;
  int64_t count;
  double* data;

  explicit BlockSums(int64_t blocks) : many(blocks > kFew ? blocks : 0), count(blocks), data(blocks > kFew ? many.data() : few) {}
  BlockSums(const BlockSums&) = delete;
  double total(int64_t begin, int64_t end) const {
    double sum = 0;
    for (int64_t block = begin; block < end; ++block)
      sum += data[block];
    return sum;
  }
  double total() const { return total(0, count); }
};

#ifndef FG_DEVICE_KERNELS
// Runs a kernel that adds up elements, of each sample or of all, and writes the results: see cpu_sums.h. `second`: of a kernel that
// has two sums side by side, the other's result and scale.
template <class Arguments>
void run_sample_sums(CpuKernel<Arguments> kernel, Arguments& a, bool each_sample, void* second = nullptr, double second_scale = 1) {
  const SumBlocks blocks(a);
  const int64_t batch = a.geometry.batch;
  const bool own = each_sample && a.small_events() && a.geometry.event > 0;
  const BlockSums sums(own ? 0 : blocks.count * (second ? 2 : 1));
  if (!own) a.sums = sums.data;
  for (int64_t block = blocks.count; block < sums.count; ++block)
    sums.data[block] = 0;  // the kernel itself sets the first of them
  const int64_t per_block = blocks.count ? batch * a.geometry.event / blocks.count : 0;
  run_blocks(kernel, a, blocks.count, grain(a.noise) / (per_block + 1) + 1);
  auto write = [&](auto* result, int64_t first, double scale) {
    using R = std::remove_pointer_t<decltype(result)>;
    auto total = [&](int64_t begin, int64_t end) { return static_cast<R>(sums.total(first + begin, first + end) * scale); };
    for (int64_t b = 0; each_sample && b < batch; ++b)
      result[b] = total(b * blocks.per_sample, (b + 1) * blocks.per_sample);
    if (!each_sample) *result = total(0, blocks.count);
  };
  auto write_to = [&](void* result, int64_t first, double scale) {
    a.is_double ? write(static_cast<double*>(result), first, scale) : write(static_cast<float*>(result), first, scale);
  };
  if (own) return;
  write_to(a.result, 0, a.scale);
  if (second) write_to(second, blocks.count, second_scale);
}

#define FG_RUN_SUMS(op, arguments, like, each_sample) run_sample_sums(op##_cpu(isa_for(arguments, true)), arguments, each_sample)
#else
// The same on the device. What one thread block for each sum does alone needs no scratch; without elements each sample is an item.
template <class Arguments> void run_device_sums(int (*launch)(const Arguments&, void*), Arguments& a, const View& like) {
  std::optional<Scratch> scratch;
  if (like.numel > kThreads || like.sizes[0] > kThreads) a.scratch = scratch.emplace(1, like).for_kernel;
  run_cuda(launch, a, like);
}

#define FG_RUN_SUMS(op, arguments, like, each_sample) run_device_sums(fastgen_##op##_cuda, arguments, like)
#endif

inline void store_scalar(void* data, DType dtype, double value) {
  switch (dtype) {
    case kFloat32: *static_cast<float*>(data) = static_cast<float>(value); break;
    case kFloat64: *static_cast<double*>(data) = value; break;
    case kFloat16: *static_cast<torch::headeronly::Half*>(data) = static_cast<float>(value); break;
    case kBFloat16: *static_cast<torch::headeronly::BFloat16*>(data) = static_cast<float>(value); break;
    case kUInt8: break;  // no result
  }
}

}  // namespace fastgen
