#include "common/cuda_sum.cuh"

#include "vlb_terms/vlb_terms_device.h"

FG_CUDA_KERNEL(vlb_terms, VlbTermsArguments) {
  fastgen::run_vlb_terms(arguments, fastgen::SumLaunch(stream));
  return fastgen::last_error();
}
