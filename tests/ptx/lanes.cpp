// What the lanes of a warp do together: all lanes of the instruction's own mask are there when it is done.
#include "values.h"

namespace ptx {
namespace {

enum Way { kUp, kDown, kButterfly, kIndex };

template <Way kWay> void shuffle(Warp& w, const Instruction& i, Mask mask) {
  u32 from[kLanes], made[kLanes];
  Predicate inside[kLanes];
  memcpy(from, w.at<u32>(i.s[0]), sizeof from);  // the result may be where it was
  const u32 *distance = w.at<u32>(i.s[1]), *bounds = w.at<u32>(i.s[2]);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int clamp = bounds[lane] & 31, segment = bounds[lane] >> 8 & 31, n = distance[lane] & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int other = kWay == kUp ? lane - n : kWay == kDown ? lane + n : kWay == kButterfly ? lane ^ n : first | (n & ~segment);
    inside[lane] = kWay == kUp ? other >= last : other <= last;
    if (!inside[lane]) other = lane;
    if ((mask >> lane & 1) && !(mask >> other & 1))
      fault(w, i, lane, "a shuffle from lane " + std::to_string(other) + ", which takes no part");
    made[lane] = from[other];
  }
  for_lanes(mask, w.at<u32>(i.d[0]), [&](int lane) { return made[lane]; });
  if (i.d[1] != kNone) for_lanes(mask, w.at<Predicate>(i.d[1]), [&](int lane) { return inside[lane]; });
}

// ldmatrix and stmatrix of 8×8 elements of 16 bits, `count` of them: lane l has of each the 32 bits at row l/4, columns 2·(l%4) and
// 2·(l%4)+1, or transposed (flags), where lanes 8k … 8k+7 have the addresses of the rows of matrix k.
template <bool kStores> void matrices(Warp& w, const Instruction& i, Mask mask) {
  if (mask != kAll) fault(w, i, __builtin_ctz(mask), "a matrix of part of a warp");
  u16 parts[4][2 * kLanes];
  if (kStores)
    for (int k = 0; k < i.count; ++k)
      memcpy(parts[k], w.at<u32>(i.s[1 + k]), sizeof parts[k]);
  for (int k = 0; k < i.count; ++k)
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * k + row;
      const u64 address = address_of(w, i, lane);
      if (address % 16) fault(w, i, lane, "misaligned: a row of a matrix");
      u8* const at = shared_place(w, i, lane, address, 16, kStores);
      for (int column = 0; column < 8; ++column) {
        u16& part = parts[k][i.flags ? 8 * column + row : 8 * row + column];  // lane 4·column + row/2, its half row%2
        if (kStores)
          memcpy(at + 2 * column, &part, 2);
        else
          memcpy(&part, at + 2 * column, 2);
      }
    }
  if (!kStores)
    for (int k = 0; k < i.count; ++k)
      if (i.d[k] != kNone) memcpy(w.at<u32>(i.d[k]), parts[k], sizeof parts[k]);
}

}  // namespace

void enter_lanes(Opcodes& opcodes) {
  auto shuffles = [&](const std::string& way, Function run) { opcodes["shfl.sync." + way + ".b32"] = {run, 4, {4, 4, 4, 4}}; };
  shuffles("up", shuffle<kUp>), shuffles("down", shuffle<kDown>), shuffles("bfly", shuffle<kButterfly>),
      shuffles("idx", shuffle<kIndex>);
  for (const std::string count : {"x1", "x2", "x4"})
    for (const std::string space : {".shared.b16", ".shared::cta.b16"})
      for (u32 transposed = 0; transposed < 2; ++transposed) {
        const std::string name = "matrix.sync.aligned.m8n8." + count + (transposed ? ".trans" : "") + space;
        opcodes["ld" + name] = {matrices<false>, 4, {}, transposed}, opcodes["st" + name] = {matrices<true>, 4, {}, transposed};
      }
}

}  // namespace ptx
