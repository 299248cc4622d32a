// What fastgen/_core/backends.py asks the CUDA library before it trusts it. Neither function initialises CUDA.
#include <cuda_runtime_api.h>

#define FG_EXPORT extern "C" __attribute__((visibility("default")))

// The CUDA version of the runtime that is linked in, and the newest that the installed driver serves (0: no driver); 13000 is 13.0.
FG_EXPORT int fastgen_cuda_runtime_version() { return CUDART_VERSION; }
FG_EXPORT int fastgen_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// What it was compiled for, as FASTGEN_CUDA_ARCHS was given.
FG_EXPORT const char* fastgen_cuda_archs() { return FG_CUDA_ARCHS; }
