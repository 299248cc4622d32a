#include "common/cuda_launch.cuh"

#include "ddpm_step/ddpm_step_device.h"

FG_CUDA_KERNEL(ddpm_step, DdpmStepArguments) {
  fastgen::run_ddpm_step(arguments, fastgen::Launch(stream));
  return fastgen::last_error();
}
