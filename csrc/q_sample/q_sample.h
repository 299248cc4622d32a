// q(x_t | x_0) and q(x_t | x_{t−1}): y = scale·x + sigma·z. Host and device.
#pragma once
#include "common/elementwise.h"

namespace fastgen {

struct QSampleColumns {
  enum { kScale, kSigma, kCount };
};

template <class V> FG_HD V q_sample(V scale, V x) { return scale * x; }

template <class V> FG_HD V add_noise(V y, V sigma, V z) { return fma(sigma, z, y); }

// The same; where sigma is 0 the noise is not looked at, were it infinite or NaN.
template <class V> FG_HD V with_noise(V y, V sigma, V z) { return select(sigma == splat<V>(0.0), y, add_noise(y, sigma, z)); }

using QSampleArguments = Elementwise;

}  // namespace fastgen
