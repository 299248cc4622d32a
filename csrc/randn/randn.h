// z itself: the contract's normals with nothing done to them. The generator is csrc/common/philox.h and normal.h.
#pragma once
#include "common/elementwise.h"

namespace fastgen {

using RandnArguments = Elementwise;

}  // namespace fastgen
