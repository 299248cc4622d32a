"""What the Triton kernels share. Each file mirrors the C++ header of its name in csrc/common, function by function."""
