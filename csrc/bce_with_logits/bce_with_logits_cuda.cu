#include "common/cuda_sum.cuh"

#include "bce_with_logits/bce_with_logits_device.h"

FG_CUDA_KERNEL(bce_with_logits, BceWithLogitsArguments) {
  fastgen::run_bce_with_logits(arguments, fastgen::SumLaunch(stream));
  return fastgen::last_error();
}
