#include "common/cuda_sum.cuh"

#include "gaussian_kl/gaussian_kl_device.h"

FG_CUDA_KERNEL(gaussian_kl, GaussianKlArguments) {
  fastgen::run_gaussian_kl(arguments, fastgen::SumLaunch(stream));
  return fastgen::last_error();
}
