/* Stands in for libtorch_cuda.so at link time, so that the CUDA library builds beside a CPU-only torch and "-z defs" can still
   prove that nothing else is undefined. Never shipped, never loaded. */
int aoti_torch_get_current_cuda_stream(int device, void** stream) { return (void)device, (void)stream, 1; }
