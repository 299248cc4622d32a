// z itself: the contract's normals with nothing done to them. The generator is csrc/common/philox.h and normal.h.
#pragma once
#include "common/elementwise.h"

namespace fastgen {

using RandnArguments = Elementwise;

// States of torch's generator that go on by `words` words.
struct TorchSkipArguments {
  TorchState* states;
  int64_t words;
};

}  // namespace fastgen
