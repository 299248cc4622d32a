// The arguments of an element-wise op as plain C data: filled by the op layer (which knows torch), read by the CPU and CUDA
// drivers (which do not).
#pragma once
#include "philox.h"
#include "torch_generator.h"

namespace fastgen {

// kUInt8 is that of data alone, which is an input: a byte u stands for u/127.5 − 1 (bytes.h).
enum DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16, kUInt8 };

FG_HD int64_t size_of(DType dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : dtype == kUInt8 ? 1 : 2; }

// (B, *event) in memory: contiguous, or channels-last with an event of `spatial` positions of `channels` elements each. The
// noise index j is the logical one, channel · spatial + position, in both.
struct Geometry {
  int64_t batch, event;
  int64_t channels = 0, spatial = 0;  // 0 where contiguous
  FG_HD bool channels_last() const { return channels > 0; }
};

// Element (b, j) of a contiguous operand is at b·batch_stride + j; of a channels-last one, channel c of position p is at
// b·batch_stride + p·position_stride + c.
struct Operand {
  void* data = nullptr;
  DType dtype = kFloat32;
  int64_t batch_stride = 0, position_stride = 0;
};

// A table of `columns` coefficients, float or double, for each of `count` timesteps. A sample's row is that of its own timestep
// t[b], or where t is null that of `index`.
struct Rows {
  const void* table = nullptr;
  int64_t count = 0, columns = 0;
  const int64_t* t = nullptr;
  int64_t index = 0;
};

// kTorchNoise: what torch.randn would have drawn on the CPU, from a generator's state (cpu_torch_noise.h). The CPU's alone.
enum NoiseKind : int32_t { kNoNoise, kGivenNoise, kSeededNoise, kTorchNoise };

struct Noise {
  NoiseKind kind = kNoNoise;
  const int64_t* seeds = nullptr;  // null: `seed`
  bool per_sample = false;         // seeds, or states, has one for each sample, else one for the batch
  int64_t seed = 0, offset = 0;
  bool offset_is_t = false;
  const TorchState* states = nullptr;  // before, and in `final_states` after what is drawn
  TorchState* final_states = nullptr;
  DType dtype = kFloat32;  // to which torch's normals are rounded
  bool fused = true;       // whether their arithmetic has fused multiplications and additions
};

// How many thread blocks of a CUDA launch share a sum at most: about as many as a large GPU runs at a time.
constexpr int64_t kMostSums = 1024;

// Where these blocks leave their sums. Beside the sums of each block is its flag, which it sets to the launch's number: see
// device_sum.h.
struct SumScratch {
  double* sums = nullptr;
  uint64_t* flags = nullptr;
  uint64_t launch_number = 0;
};

constexpr int kMaxInputs = 5, kMaxOutputs = 3, kMaxColumns = 14;

// Below this many elements the event of a batch is too short for a vector loop of its own, and tiles span several samples.
constexpr int64_t kSmallEvent = 64;

struct Elementwise {
  Geometry geometry;
  Rows rows;
  Noise noise;
  Operand in[kMaxInputs];  // the op's inputs in its own order; given noise is the one after them
  Operand out[kMaxOutputs];
  bool is_double = false;  // compute in float64 (and a float64 table), else in float32

  FG_HD bool small_events() const { return geometry.event < kSmallEvent && geometry.batch > 1; }
  // The work of the CPU driver is a range of units: samples where events are small, positions where channels-last, else elements.
  FG_HD int64_t elements_per_unit() const {
    return small_events() ? geometry.event : geometry.channels_last() ? geometry.channels : 1;
  }
};

// The row of sample b: columns of the table, NaN for a timestep outside it.
template <class R> FG_HD void table_row(const Rows& rows, int64_t b, int columns, R* row) {
  const int64_t t = rows.t ? rows.t[b] : rows.index;
  const bool inside = t >= 0 && t < rows.count;
  const R* from = static_cast<const R*>(rows.table) + (inside ? t : 0) * rows.columns;
  for (int k = 0; k < columns; ++k)
    row[k] = inside ? from[k] : static_cast<R>(NAN);
}

FG_HD Stream stream_of(const Elementwise& a, int64_t b) {
  const Noise& n = a.noise;
  const int64_t t = a.rows.t ? a.rows.t[b] : a.rows.index;
  return {n.seeds ? n.seeds[n.per_sample ? b : 0] : n.seed, n.offset_is_t ? t : n.offset, n.per_sample ? 0 : b};
}

}  // namespace fastgen
