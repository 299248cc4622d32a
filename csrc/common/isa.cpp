// The choice of instruction set, and the op that tells it.
#include "common/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace fastgen {

Isa isa() {
  static const Isa chosen = [] {
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (const char* capability = std::getenv("ATEN_CPU_CAPABILITY")) {  // ATen's own override, with ATen's names
      if (!std::strcmp(capability, "default")) avx2 = avx512 = false;
      if (!std::strcmp(capability, "avx2")) avx512 = false;
    }
    return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kDefault;
  }();
  return chosen;
}

namespace {
std::string cpu_capability() {
  switch (isa()) {
    case Isa::kAvx512: return "AVX512";
    case Isa::kAvx2: return "AVX2";
    default: return "DEFAULT";
  }
}
}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen, m) { m.def("cpu_capability() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(fastgen, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&fastgen::cpu_capability)); }
