#include "common/cuda_sum.cuh"

#include "bce_with_logits/bce_with_logits_device.h"

namespace fastgen {
namespace {

struct BceLaunch : Launch {
  using Launch::Launch;
  template <class Part> void sum(const Part& part) const { launch_sum(part, *this); }
};

}  // namespace
}  // namespace fastgen

FG_CUDA_KERNEL(bce_with_logits, BceWithLogitsArguments) {
  fastgen::run_bce_with_logits(arguments, fastgen::BceLaunch(stream));
  return fastgen::last_error();
}
