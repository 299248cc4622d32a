// The bytes of images from numbers within −1 … 1: round((clamp(x) + 1)·127.5). The formula is byte_of_value in common/bytes.h.
#pragma once
#include "common/bytes.h"
#include "common/elementwise.h"

namespace fastgen {

// `count` elements, each of which becomes a byte at the same place of `out`. Or where out has the other of the two layouts, every
// sample is a matrix of `rows` × `columns` elements, contiguous ones, and becomes the transposed one: (C, H·W) to channels-last,
// (H·W, C) from it.
struct ToUint8Arguments {
  const void* data = nullptr;
  DType dtype = kFloat32;
  uint8_t* out = nullptr;
  int64_t count = 0;
  int64_t rows = 0, columns = 0;  // 0 where both have one layout

  FG_HD bool transposes() const { return rows > 0; }
  FG_HD Operand operand() const { return {const_cast<void*>(data), dtype, 0, 0}; }
};

// What the threads of the CPU share: blocks of so many bytes, of a transposed result so many of one sample.
constexpr int64_t kToUint8Block = 16384;

// The part of a transposition that fits a buffer: some whole rows, or one part of some.
struct ToUint8Tile {
  static constexpr int64_t kElements = 4096, kMostRows = 64;
  int64_t rows, columns, down, across;  // of a tile; how many tiles there are of a sample

  explicit ToUint8Tile(const ToUint8Arguments& a) {
    const bool narrow = a.columns <= kMostRows;  // whole rows
    columns = narrow ? a.columns : kElements / (a.rows < kMostRows ? a.rows : kMostRows);
    if (columns > a.columns) columns = a.columns;
    rows = narrow ? kElements / columns : kMostRows;
    if (rows > a.rows) rows = a.rows;
    down = (a.rows + rows - 1) / rows;
    across = (a.columns + columns - 1) / columns;
  }
  int64_t tiles() const { return down * across; }
};

// How many pieces of work there are for the CPU's threads.
inline int64_t to_uint8_blocks(const ToUint8Arguments& a) {
  if (a.count == 0) return 0;
  if (a.transposes()) return a.count / (a.rows * a.columns) * ToUint8Tile(a).tiles();
  return (a.count + kToUint8Block - 1) / kToUint8Block;
}

}  // namespace fastgen
