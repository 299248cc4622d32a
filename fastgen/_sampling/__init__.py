"""A whole reverse chain: the public `sample` and `Sampler`, and the CUDA graph of a chain."""
