#include "common/cpu_convert.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "to_uint8/to_uint8.h"

namespace fastgen {
namespace {

template <class R> struct ToUint8 {
  static constexpr int64_t kPart = 1024;
  const ToUint8Arguments& a;
  alignas(64) R values[kPart];
  alignas(64) typename Lanes<R>::Int rounded[kPart];
  alignas(64) uint8_t bytes[ToUint8Tile::kElements];

  explicit ToUint8(const ToUint8Arguments& arguments) : a(arguments) {}

  void run(int64_t begin, int64_t end) {
    if (a.transposes()) {
      for (int64_t block = begin; block < end; ++block)
        transpose(block);
      return;
    }
    const int64_t first = begin * kToUint8Block, last = end * kToUint8Block < a.count ? end * kToUint8Block : a.count;
    convert(first, last - first, a.out + first);
  }

 private:
  // The bytes of n elements, a few at a time: the second loop packs what the first one has rounded.
  FG_HD void convert(int64_t first, int64_t n, uint8_t* to) {
    constexpr DType native = sizeof(R) == 4 ? kFloat32 : kFloat64;
    for (int64_t i = 0; i < n; i += kPart) {
      const int64_t count = n - i < kPart ? n - i : kPart, whole = count / kLanes<R> * kLanes<R>;
      const R* x = static_cast<const R*>(a.data) + first + i;
      if (a.dtype != native) {
        read(a.operand(), first + i, count, values);
        x = values;
      }
      FG_UNROLL_4
      for (int64_t k = 0; k < whole; k += kLanes<R>)
        *reinterpret_cast<typename Lanes<Vec<R>>::Int*>(rounded + k) = byte_of_value(load(x + k));
      for (int64_t k = whole; k < count; ++k)
        rounded[k] = byte_of_value(x[k]);
      for (int64_t k = 0; k < count; ++k)
        to[i + k] = static_cast<uint8_t>(rounded[k]);
    }
  }

  // One tile of one sample: its bytes by rows into the buffer, from there by columns to the result.
  void transpose(int64_t block) {
    const ToUint8Tile tile(a);
    const int64_t sample = block / tile.tiles(), within = block % tile.tiles();
    const int64_t r = within / tile.across * tile.rows, c = within % tile.across * tile.columns;
    const int64_t rows = a.rows - r < tile.rows ? a.rows - r : tile.rows;
    const int64_t columns = a.columns - c < tile.columns ? a.columns - c : tile.columns;
    const int64_t origin = sample * a.rows * a.columns, first = origin + r * a.columns + c;
    if (columns == a.columns) {
      convert(first, rows * columns, bytes);
    } else {
      for (int64_t k = 0; k < rows; ++k)
        convert(first + k * a.columns, columns, bytes + k * columns);
    }
    uint8_t* const to = a.out + origin + c * a.rows + r;
    if (rows == 3 && a.rows == 3) return side_by_side<3>(columns, to);
    if (rows == 4 && a.rows == 4) return side_by_side<4>(columns, to);
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t k = 0; k < rows; ++k)
        to[i * a.rows + k] = bytes[k * columns + i];
  }

  // The same for as many channels as images have, which the compiler interleaves in registers.
  template <int kRows> FG_HD void side_by_side(int64_t columns, uint8_t* __restrict__ to) const {
    const uint8_t* __restrict__ from = bytes;
    for (int64_t i = 0; i < columns; ++i) {
      FG_UNROLL
      for (int k = 0; k < kRows; ++k)
        to[kRows * i + k] = from[k * columns + i];
    }
  }
};

}  // namespace

FG_CPU_KERNEL(to_uint8, ToUint8Arguments) {
  if (arguments.dtype == kFloat64) {
    ToUint8<double>(arguments).run(begin, end);
  } else {
    ToUint8<float>(arguments).run(begin, end);
  }
}

}  // namespace fastgen
