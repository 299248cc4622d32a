#include "common/cuda_sum.cuh"

#include "step_log_prob/step_log_prob_device.h"

FG_CUDA_KERNEL(step_log_prob, StepLogProbArguments) {
  fastgen::run_step_log_prob(arguments, fastgen::SumLaunch(stream));
  return fastgen::last_error();
}
