#include "common/cuda_launch.cuh"

#include "q_sample/q_sample_device.h"

FG_CUDA_KERNEL(q_sample, QSampleArguments) {
  fastgen::run_on_device<fastgen::QSampleDevice, false>(arguments, fastgen::Launch(stream));
  return fastgen::last_error();
}
