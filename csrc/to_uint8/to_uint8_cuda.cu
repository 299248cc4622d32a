#include "common/cuda_launch.cuh"

#include "to_uint8/to_uint8_device.h"

FG_CUDA_KERNEL(to_uint8, ToUint8Arguments) {
  fastgen::run_to_uint8(arguments, fastgen::Launch(stream));
  return fastgen::last_error();
}
