#include "common/cuda_sum.cuh"

#include "diffusion_loss/diffusion_loss_device.h"

FG_CUDA_KERNEL(diffusion_loss, DiffusionLossArguments) {
  fastgen::run_diffusion_loss(arguments, fastgen::SumLaunch(stream));
  return fastgen::last_error();
}
