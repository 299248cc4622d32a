#include "common/cuda_launch.cuh"

#include "q_posterior/q_posterior_device.h"

FG_CUDA_KERNEL(q_posterior, QPosteriorArguments) {
  fastgen::run_on_device<fastgen::QPosteriorDevice, true>(arguments, fastgen::Launch(stream));
  return fastgen::last_error();
}
