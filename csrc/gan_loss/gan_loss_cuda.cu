#include "common/cuda_sum.cuh"

#include "gan_loss/gan_loss_device.h"

FG_CUDA_KERNEL(gan_loss, GanLossArguments) {
  fastgen::run_gan_loss(arguments, fastgen::SumLaunch(stream));
  return fastgen::last_error();
}
