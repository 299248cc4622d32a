// Loops over a tile by two vectors at a time, see Twice, for formulas that are one chain of dependent steps.
#pragma once
#include "cpu_driver.h"

namespace fastgen {
namespace {

// f(v, i) for the elements from i on of two vectors, and of one where one is left: v says which by its type. n is whole vectors.
template <class R, class F> FG_HD void by_twos(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 2 * kLanes<R> <= n; i += 2 * kLanes<R>)
    f(Twice<Vec<R>>{}, i);
  if (i < n) f(Vec<R>{}, i);
}

// The coefficients of a row that go with the elements from i on, as many as v has.
template <class Row, class V> FG_HD V column_of(const Row& row, int column, const V&, int64_t i) { return row.get(column, i); }
template <class Row, class V> FG_HD Twice<V> column_of(const Row& row, int column, const Twice<V>&, int64_t i) {
  constexpr int64_t lanes = sizeof(V) / sizeof(typename Lanes<V>::Real);
  return twice(row.get(column, i), row.get(column, i + lanes));
}

}  // namespace
}  // namespace fastgen
