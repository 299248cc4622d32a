// Shared memory, for loads and stores and for what the lanes of a warp store together.
#pragma once
#include "values.h"

namespace ptx {

// Where it is, once the access is found to be right; `data`, where it is known, is what a store will put there.
u8* shared_place(Warp& w, const Instruction& i, int lane, u64 address, u32 bytes, bool writes, const void* data = nullptr);

}  // namespace ptx
