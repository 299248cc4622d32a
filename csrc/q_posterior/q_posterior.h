// q(x_{t−1} | x_t, x_0): mean = U·x0 + V·x_t; its variance and log-variance are read off the table. Host and device.
#pragma once
#include "common/elementwise.h"

namespace fastgen {

struct QPosteriorColumns {
  enum { kU, kV, kVariance, kLogVariance, kCount };
};

template <class V> FG_HD V q_posterior_mean(V u, V x0, V v, V x) { return fma(u, x0, v * x); }

struct QPosteriorArguments : Elementwise {
  void *variance = nullptr, *log_variance = nullptr;  // (B,), of the type of the arithmetic
};

}  // namespace fastgen
