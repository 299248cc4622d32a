// The state of torch's CPU generator, as `Generator.get_state()` gives it: Matsumoto & Nishimura's mt19937, and the second normal
// of a pair that is left over. No torch here.
#pragma once
#include <stdint.h>

namespace fastgen {

constexpr int kTwisted = 624;  // the words that one twist makes

struct TorchState {
  uint64_t seed;
  int32_t left, seeded;  // left − 1 words of `words` are not drawn yet
  uint64_t next;         // the first of them
  uint64_t words[kTwisted];
  double pair_y, pair_x, pair_radius;
  int32_t pair_is_left;
  float float_y;
  int32_t float_is_left;
};
constexpr int64_t kTorchStateBytes = 5056;
static_assert(sizeof(TorchState) == kTorchStateBytes, "the layout of torch's state");

}  // namespace fastgen
