#include "common/cuda_sum.cuh"

#include "gan_loss/gan_loss_device.h"

namespace fastgen {
namespace {

struct GanLaunch : Launch {
  using Launch::Launch;
  template <class Part> void sum(const Part& part) const { launch_sum(part, *this); }
};

}  // namespace
}  // namespace fastgen

FG_CUDA_KERNEL(gan_loss, GanLossArguments) {
  fastgen::run_gan_loss(arguments, fastgen::GanLaunch(stream));
  return fastgen::last_error();
}
