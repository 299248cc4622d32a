#include "common/cuda_launch.cuh"

#include "randn/randn_device.h"

FG_CUDA_KERNEL(randn, RandnArguments) {
  fastgen::run_on_device<fastgen::RandnDevice, false>(arguments, fastgen::Launch(stream));
  return fastgen::last_error();
}

FG_CUDA_KERNEL(randn_torch_cuda, TorchCudaArguments) {
  fastgen::run_randn_torch_cuda(arguments, fastgen::Launch(stream));
  return fastgen::last_error();
}
