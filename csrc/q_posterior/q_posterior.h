// q(x_{t−1} | x_t, x_0): mean = mean_from_x0·x0 + mean_from_x·x_t; its variance and log-variance are in the table. Host and device.
#pragma once
#include "common/elementwise.h"

namespace fastgen {

struct QPosteriorColumns {
  enum { kMeanFromX0, kMeanFromX, kVariance, kLogVariance, kCount };
};

template <class V> FG_HD V q_posterior_mean(V mean_from_x0, V x0, V mean_from_x, V x) {
  return fma(mean_from_x0, x0, mean_from_x * x);
}

struct QPosteriorArguments : Elementwise {
  void *variance = nullptr, *log_variance = nullptr;  // (B,), of the type of the arithmetic
};

}  // namespace fastgen
