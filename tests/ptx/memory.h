// What loads and stores share with the matrices that the lanes of a warp load or store together.
#pragma once
#include "values.h"

namespace ptx {

// What a lane of a load or a store names, in whatever space.
u64 address_of(const Warp& w, const Instruction& i, int lane);

// Where it is, once the access is found to be right; `data`, where it is known, is what a store will put there.
u8* shared_place(Warp& w, const Instruction& i, int lane, u64 address, u32 bytes, bool writes, const void* data = nullptr);

}  // namespace ptx
