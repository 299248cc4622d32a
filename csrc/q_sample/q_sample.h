// q(x_t | x_0) and q(x_t | x_{t−1}): y = scale·x + sigma·z. Host and device.
#pragma once
#include "common/elementwise.h"

namespace fastgen {

struct QSampleColumns {
  enum { kScale, kSigma, kCount };
};

template <class V> FG_HD V q_sample(V scale, V x) { return scale * x; }

// y + sigma·z; where sigma is 0 the noise is not looked at, were it infinite or NaN.
template <class V> FG_HD V with_noise(V y, V sigma, V z) { return select(sigma == splat<V>(0.0), y, fma(sigma, z, y)); }

using QSampleArguments = Elementwise;

}  // namespace fastgen
