// The torch side that all ops share, for the op files. Its parts, from the bottom up:
//
//   op_tensor.h      dtypes, and what an op reads of a tensor
//   op_checks.h      what a tensor must be, and the words where it is not
//   op_device.h      every branch on the device: memory, threads or streams, launching, registration
//   op_layout.h      inputs, the batch and outputs in one layout
//   op_arguments.h   coefficient rows, noise and how the work is shared, as plain C data
//   op_sums.h        the sums of a loss
//
// Everything here goes through LibTorch's stable ABI.
#pragma once
#include "common/op_arguments.h"
#include "common/op_sums.h"
