#include "common/cuda_sum.cuh"

#include "reparameterize/reparameterize_device.h"

FG_CUDA_KERNEL(reparameterize, ReparameterizeArguments) {
  fastgen::run_reparameterize(arguments, fastgen::SumLaunch(stream));
  return fastgen::last_error();
}
