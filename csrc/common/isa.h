// One kernel source, three instruction sets: each CPU kernel file is compiled with FG_ISA = default, avx2 and avx512, and the op
// layer picks one at run time. Such a file holds no torch, no STL and no function with external linkage but its entry point.
#pragma once
#include <stdint.h>

#define FG_ENTRY_(op, isa) fastgen_##op##_##isa
#define FG_ENTRY(op, isa) FG_ENTRY_(op, isa)

// Entry point of this translation unit's instruction set: the units begin … end-1 of the work.
#define FG_CPU_KERNEL(op, Arguments) \
  extern "C" __attribute__((visibility("hidden"))) void FG_ENTRY(op, FG_ISA)(const Arguments& arguments, int64_t begin, int64_t end)

namespace fastgen {

template <class Arguments> using CpuKernel = void (*)(const Arguments&, int64_t begin, int64_t end);

enum class Isa { kDefault, kAvx2, kAvx512 };
Isa isa();  // what the processor has, or less by ATEN_CPU_CAPABILITY

}  // namespace fastgen

// In the op layer: declares the three entry points of `op` and `op##_cpu(isa)`, which picks one.
#define FG_CPU_KERNELS(op, Arguments)                                         \
  extern "C" void fastgen_##op##_default(const Arguments&, int64_t, int64_t); \
  extern "C" void fastgen_##op##_avx2(const Arguments&, int64_t, int64_t);    \
  extern "C" void fastgen_##op##_avx512(const Arguments&, int64_t, int64_t);  \
  inline ::fastgen::CpuKernel<Arguments> op##_cpu(::fastgen::Isa isa) {       \
    switch (isa) {                                                            \
      case ::fastgen::Isa::kAvx512: return fastgen_##op##_avx512;             \
      case ::fastgen::Isa::kAvx2: return fastgen_##op##_avx2;                 \
      default: return fastgen_##op##_default;                                 \
    }                                                                         \
  }
