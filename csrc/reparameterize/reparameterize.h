// A sample of a diagonal Gaussian as a function of its parameters, z = μ + σ·ε with σ = exp(½·log σ²); with it, from the same
// exponential, the divergence from N(0, I), see gaussian_kl.h. Host and device.
#pragma once
#include "gaussian_kl/gaussian_kl.h"

namespace fastgen {

// The inputs: log σ², μ, and backward the gradient of z; given noise comes after them. A backward needs μ where the divergence has
// a gradient too. Its out[0] and out[1] are the derivatives by log σ² and μ, the latter only with that of the divergence: without,
// it is the gradient itself. `result` is null where only z is wanted.
struct ReparameterizeArguments : GaussianKlArguments {
  bool backward = false;
};

template <class V> FG_HD V half_log_variance(const LogVarianceBounds& bounds, V log_variance) {
  return splat<V>(0.5) * clamped(bounds, log_variance);
}
template <class V> FG_HD V sigma_of(const LogVarianceBounds& bounds, V log_variance) {
  return exp(half_log_variance(bounds, log_variance));
}
template <class V> FG_HD V reparameterize(V sigma, V mean, V z) { return fma(sigma, z, mean); }

// The derivative of z by log σ², times the gradient of z.
template <class V> FG_HD V z_by_log_variance(V gradient, V sigma, V z) { return splat<V>(0.5) * gradient * (sigma * z); }

}  // namespace fastgen
