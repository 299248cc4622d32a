// The element-wise driver of the CPU: tiles that fit the first-level cache, converted to the type of the arithmetic where they
// are not in it, with the row of coefficients of each sample and the noise beside them. An op supplies
//
//   static constexpr int kInputs, kOutputs, kColumns;
//   static constexpr int kSums;                           how many outputs, the last ones, are not written, but handed to
//   void add(int sum, int64_t b, int64_t samples, const R* values, int64_t n) const;   n values of `samples` samples from b on
//   void load_row(int64_t b, R* row) const;               the kColumns coefficients of sample b
//   bool own_rows() const;                                whether these may differ between samples
//   static bool noiseless(const R* row);                  whether this row takes no noise
//   template <bool kNoise, class C> void apply(const C& row, const Tile<R>& t, int64_t first) const;
//                                                         t.n whole vectors; row.get(column, first + i) goes with t.in[…][i]
#pragma once
#include "cpu_convert.h"
#include "cpu_noise.h"
#include "cpu_torch_noise.h"

namespace fastgen {
namespace {  // internal linkage: the linker must not swap one instruction set's copy for another's

constexpr int64_t kTile = 1024;
constexpr int kMaxResults = kMaxOutputs + 1;  // with what is added up
// Without noise, a tile that is converted: each operand is read by a loop of its own, too short for the processor to see a stream
// in it, so what comes kFar elements later is fetched by hand. Tiles of 1024, or no fetching, leave ddpm_step(noise=) of 10 M
// bfloat16 elements at 0.4 … 0.6 of copy's bytes per second; with these it is 0.9 (AMD EPYC, Zen 4, 2 threads).
constexpr int64_t kConvertedTile = 256, kFar = 512;
constexpr int64_t kTileBuffer = kTile + kNormalsPerBlock + 8;  // room for the last block of normals and for a vector tail
static_assert(kTileBuffer >= kTile + kTorchBlock * TorchPairs::kBlocks, "of torch's normals too, see `TorchNormals::fill`");

template <class R> struct Tile {
  int64_t n = 0;
  const R* in[kMaxInputs] = {};
  const R* z = nullptr;
  R* out[kMaxResults] = {};

  // The part of the tile from element `begin` on, of `most` elements at most.
  FG_HD Tile part(int64_t begin, int64_t most) const {
    Tile part = *this;
    part.n = n - begin < most ? n - begin : most;
    for (const R*& x : part.in)
      if (x) x += begin;
    if (z) part.z += begin;
    for (R*& x : part.out)
      if (x) x += begin;
    return part;
  }
};

// The coefficients of one sample, the same for the whole tile …
template <class R> struct SampleRow {
  Vec<R> values[kMaxColumns];
  template <int kColumns> FG_HD void set(const R* row) {
    for (int k = 0; k < kColumns; ++k)
      values[k] = splat<Vec<R>>(row[k]);
  }
  FG_HD Vec<R> get(int column, int64_t) const { return values[column]; }
};
// … or one for each element, where a tile spans several samples.
template <class R> struct ElementRows {
  const R (*values)[kTileBuffer];
  FG_HD Vec<R> get(int column, int64_t i) const { return load(values[column] + i); }
};

// The coefficients of a row that go with the elements from i on, as many as v has.
template <class Row, class V> FG_HD V column_of(const Row& row, int column, const V&, int64_t i) { return row.get(column, i); }
template <class Row, class V> FG_HD Twice<V> column_of(const Row& row, int column, const Twice<V>&, int64_t i) {
  constexpr int64_t lanes = sizeof(V) / sizeof(typename Lanes<V>::Real);
  return twice(row.get(column, i), row.get(column, i + lanes));
}

template <class R> struct Buffers {
  alignas(64) R in[kMaxInputs][kTileBuffer];
  alignas(64) R z[kTileBuffer];
  alignas(64) R run[kTileBuffer];
  alignas(64) R out[kMaxResults][kTileBuffer];
  alignas(64) R columns[kMaxColumns][kTileBuffer];
};

template <class R> constexpr DType kNative = sizeof(R) == 4 ? kFloat32 : kFloat64;

// The sum of up to a tile's values: at most 128 terms a lane in R (32 with AVX-512), the rest in float64.
template <class R> FG_HD double sum_of(const R* values, int64_t n) {
  constexpr int lanes = kLanes<R>;
  Vec<R> even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    even += load(values + i);
    odd += load(values + i + lanes);
  }
  double sum = 0;
  for (int k = 0; k < lanes; ++k)
    sum += static_cast<double>(even[k]) + static_cast<double>(odd[k]);
  for (; i < n; ++i)
    sum += static_cast<double>(values[i]);
  return sum;
}

template <class R, class Op> struct Driver {
  static constexpr int kWritten = Op::kOutputs - Op::kSums;
  const Elementwise& a;
  const Op& op;
  const int inputs = Op::kInputs + (a.noise.kind == kGivenNoise);
  bool converts = false;  // some operand is not of the type of the arithmetic
  Buffers<R> buffers;
  TorchNormals torch;

  Driver(const Elementwise& arguments, const Op& op_) : a(arguments), op(op_) {
    for (int i = 0; i < inputs; ++i)
      converts = converts || (a.in[i].data && a.in[i].dtype != kNative<R>);
    for (int i = 0; i < kWritten; ++i)
      converts = converts || (a.out[i].data && a.out[i].dtype != kNative<R>);
  }

  void run(int64_t begin, int64_t end) {
    if (a.small_events()) {
      small_events(begin, end);
    } else if (a.geometry.channels_last()) {
      channels_last(begin, end);
    } else {
      contiguous(begin, end);
    }
  }

 private:
  void contiguous(int64_t begin, int64_t end) {
    const int64_t event = a.geometry.event;
    for (int64_t b = begin / event, j = begin % event; b * event + j < end; ++b, j = 0) {
      const int64_t stop = end - b * event < event ? end - b * event : event;
      SampleState s(*this, b);
      // without noise to make or dtypes to convert nothing is buffered, and the sample is one tile
      const int64_t most = s.made || Op::kSums > 0 ? kTile : converts ? kConvertedTile : stop;
      for (; j < stop; j += most) {
        const int64_t n = stop - j < most ? stop - j : most;
        const R* z = nullptr;
        if (s.made) {
          z = normals(s.stream, b, j, n);
        } else if (converts && Op::kSums == 0) {
          ahead_of(b, j + kFar).fetch(0, n);
        }
        tile(s.row, s.noise, b, j, n, z);
      }
      torch_finish(b, stop);
    }
  }

  // The noise of elements j … j+n-1 of sample b, made in buffers.z.
  FG_HD const R* normals(const Stream& stream, int64_t b, int64_t j, int64_t n) {
    if (a.noise.kind == kTorchNoise) return torch_normals_of(b, j, n);
    return fill_normals(stream, j, n, buffers.z, ahead_of(b, j));
  }
  FG_HD const R* torch_normals_of(int64_t b, int64_t j, int64_t n) {
    if constexpr (sizeof(R) == 4) return torch.fill(a.noise, a.geometry, b, j, n, buffers.z, ahead_of(b, j));
    return nullptr;  // the op layer lets no float64 come here
  }
  // Before element j of sample b all is drawn that is to be, or is not looked at.
  FG_HD void torch_finish(int64_t b, int64_t j) {
    if (a.noise.kind == kTorchNoise) torch.finish(a.noise, a.geometry, b, j);
  }

  // What the tile from element j of sample b on reads and writes; nothing for randn, which reads nothing.
  FG_HD Ahead ahead_of(int64_t b, int64_t j) const {
    Ahead ahead;
    for (int i = 0; i < inputs; ++i)
      ahead.add(a.in[i], b * a.in[i].batch_stride + j);
    for (int i = 0; i < kWritten && inputs > 0; ++i)
      ahead.add(a.out[i], b * a.out[i].batch_stride + j);
    return ahead;
  }

  // A block is `width` channels of `rows` positions. Its noise is made channel by channel, in the logical order, and transposed.
  void channels_last(int64_t begin, int64_t end) {
    const int64_t channels = a.geometry.channels, spatial = a.geometry.spatial;
    const int64_t width = channels < kTile / 4 ? channels : kTile / 4;
    const int64_t rows = kTile / width / 4 * 4;
    for (int64_t b = begin / spatial, p = begin % spatial; b * spatial + p < end; ++b, p = 0) {
      const int64_t stop = end - b * spatial < spatial ? end - b * spatial : spatial;
      SampleState s(*this, b);
      for (int64_t next; p < stop; p = next) {
        next = p - p % 4 + rows < stop ? p - p % 4 + rows : stop;
        for (int64_t c = 0; c < channels; c += width) {
          const int64_t w = channels - c < width ? channels - c : width;
          if (s.made) transposed_normals(s.stream, c, w, p, next - p);
          // a tile is one run of memory in the output: all positions of the block, or one where the channels are split
          const int64_t step = w == channels ? next - p : 1;
          for (int64_t q = p; q < next; q += step)
            tile(s.row, s.noise, b, q * channels + c, step * w, s.made ? buffers.z + (q - p) * w : nullptr, step, w);
        }
      }
    }
  }

  // buffers.z[q][i] = the normal of channel c + i at position p + q, for `w` channels and `rows` positions.
  void transposed_normals(const Stream& stream, int64_t c, int64_t w, int64_t p, int64_t rows) {
    if (rows < kNormalsPerBlock) return short_runs(stream, c, w, p, rows);
    R* const z = buffers.z;
    for (int64_t i = 0; i < w; ++i) {
      const R* normals = fill_normals(stream, (c + i) * a.geometry.spatial + p, rows, buffers.run);
      for (int64_t q = 0; q < rows; ++q)
        z[q * w + i] = normals[q];
    }
  }
  // Runs that are too short for a block of their own share blocks. A tag is (channel, position of the group's first element + 3).
  void short_runs(const Stream& stream, int64_t c, int64_t w, int64_t p, int64_t rows) {
    R* const z = buffers.z;
    auto place = [&](int64_t tag, const R* normals) {
      const int64_t i = tag >> 32, first = (tag & 0xFFFFFFFF) - 3;
      for (int64_t k = first < 0 ? -first : 0; k < 4 && first + k < rows; ++k)
        z[(first + k) * w + i] = normals[k];
    };
    GroupQueue<R, decltype(place)> queue{place};
    for (int64_t i = 0; i < w; ++i) {
      const int64_t j = (c + i) * a.geometry.spatial + p;
      for (int64_t group = j / 4; 4 * group < j + rows; ++group)
        queue.add(group, stream, i << 32 | (4 * group - j + 3));
    }
    queue.flush();
  }

  void small_events(int64_t begin, int64_t end) {
    const Geometry& g = a.geometry;
    const int64_t event = g.event, per_tile = event ? kTile / event : 1;
    if (event == 0) return;
    const SampleState first(*this, begin);
    const bool own_rows = op.own_rows(), noise = own_rows ? a.noise.kind != kNoNoise : first.noise;
    for (int64_t b0 = begin; b0 < end; b0 += per_tile) {
      const int64_t samples = end - b0 < per_tile ? end - b0 : per_tile, n = samples * event;
      const R* z = nullptr;
      if (noise && a.noise.kind == kSeededNoise) {
        normals_of(b0, samples);
        z = buffers.z;
      } else if (a.noise.kind == kTorchNoise) {
        z = torch_normals_of_samples(b0, samples, noise);
      }
      const int64_t positions = g.channels_last() ? samples * g.spatial : samples, width = n / positions;
      if (own_rows) {
        spread_rows(b0, samples);
        tile(ElementRows<R>{buffers.columns}, noise, b0, 0, n, z, positions, width, samples);
      } else {
        tile(first.row, noise, b0, 0, n, z, positions, width, samples);
      }
    }
  }

  // torch's noise for these samples. Where it is not wanted nothing is made, but the generators go on.
  const R* torch_normals_of_samples(int64_t b, int64_t samples, bool wanted) {
    const int64_t event = a.geometry.event;
    const R* z = nullptr;
    if constexpr (sizeof(R) == 4) {
      if (wanted && !a.noise.per_sample) z = torch_normals_of(b, 0, samples * event);
      for (int64_t s = 0; s < samples; ++s) {
        if (wanted && a.noise.per_sample) {
          __builtin_memcpy(buffers.run + s * event, torch_normals_of(b + s, 0, event), event * sizeof(R));
          z = buffers.run;
        }
        torch_finish(b + s, event);
      }
    }
    return z;
  }

  // buffers.z = the noise of these samples, in the order of memory.
  void normals_of(int64_t b, int64_t samples) {
    const Geometry& g = a.geometry;
    R* const z = buffers.z;
    if (g.channels_last()) {
      int64_t place_of[kSmallEvent];
      for (int64_t j = 0, c = 0; c < g.channels; ++c)
        for (int64_t p = 0; p < g.spatial; ++p)
          place_of[j++] = p * g.channels + c;
      queued_normals(b, samples, kSmallEvent, [&](int64_t tag, const R* normals) {
        R* const sample = z + tag / kSmallEvent * g.event;
        for (int64_t j = tag % kSmallEvent, k = 0; k < 4 && j + k < g.event; ++k)
          sample[place_of[j + k]] = normals[k];
      });
    } else {  // the normals that a sample's last group has too many of are overwritten by the next sample's first group
      queued_normals(b, samples, g.event,
                     [z](int64_t tag, const R* normals) { __builtin_memcpy(z + tag, normals, 4 * sizeof(R)); });
    }
  }
  template <class Place> FG_HD void queued_normals(int64_t b, int64_t samples, int64_t each, const Place& place) {
    GroupQueue<R, Place> queue{place};
    for (int64_t s = 0; s < samples; ++s) {
      const Stream stream = stream_of(a, b + s);
      for (int64_t j = 0; j < a.geometry.event; j += 4)
        queue.add(j / 4, stream, s * each + j);
    }
    queue.flush();
  }

  // Writes the row of each sample beside each of its elements.
  void spread_rows(int64_t b, int64_t samples) {
    const int64_t event = a.geometry.event;
    R row[kMaxColumns];
    for (int64_t s = 0; s < samples; ++s) {
      op.load_row(b + s, row);
      for (int k = 0; k < Op::kColumns; ++k)
        for (int64_t j = 0; j < event; j += kLanes<R>)  // the last vector reaches into the next sample, whose own come later
          store(buffers.columns[k] + s * event + j, splat<Vec<R>>(row[k]));
    }
  }

  struct SampleState {
    SampleRow<R> row;
    Stream stream{};
    bool noise, made;  // whether the sample takes noise, and whether that is made here
    FG_HD SampleState(Driver& d, int64_t b) {
      R values[kMaxColumns];
      d.op.load_row(b, values);
      row.template set<Op::kColumns>(values);
      noise = d.a.noise.kind != kNoNoise && !Op::noiseless(values);
      made = noise && d.a.noise.kind != kGivenNoise;
      if (noise && d.a.noise.kind == kSeededNoise) stream = stream_of(d.a, b);
    }
  };

  // n elements from element `first` (in memory order) of sample b on, `rows` runs of `width` elements: a run is what lies together
  // in every operand. `samples` of them are spanned.
  template <class C> FG_HD void tile(const C& coefficients, bool noise, int64_t b, int64_t first, int64_t n, const R* z,
                                     int64_t rows = 1, int64_t width = 0, int64_t samples = 1) {
    Tile<R> t;
    t.n = n;
    for (int i = 0; i < inputs; ++i)
      if (a.in[i].data) t.in[i] = gathered(a.in[i], b, first, n, rows, width, samples, buffers.in[i]);
    t.z = a.noise.kind == kGivenNoise ? t.in[Op::kInputs] : z;
    bool direct[kMaxOutputs];
    for (int i = 0; i < kWritten; ++i) {
      const Operand& out = a.out[i];
      direct[i] = out.dtype == kNative<R> && one_run(out, samples);
      t.out[i] = !out.data ? nullptr : direct[i] ? static_cast<R*>(out.data) + b * out.batch_stride + first : buffers.out[i];
    }
    for (int k = kWritten; k < Op::kOutputs; ++k)
      t.out[k] = buffers.out[k];
    if (noise) {
      vectors<true>(coefficients, t);
    } else {
      vectors<false>(coefficients, t);
    }
    if constexpr (Op::kSums > 0) {
      for (int k = 0; k < Op::kSums; ++k)
        op.add(k, b, samples, t.out[kWritten + k], n);
    }
    for (int i = 0; i < kWritten; ++i)
      if (t.out[i] && !direct[i]) scatter(t.out[i], a.out[i], b, first, n, rows, width, samples);
  }

  // Whether what a tile has of an operand lies together in it.
  FG_HD bool one_run(const Operand& x, int64_t samples) const {
    const Geometry& g = a.geometry;
    return (samples == 1 || x.batch_stride == g.event) && (!g.channels_last() || x.position_stride == g.channels);
  }
  // f(begin, count, offset) for each run of a tile whose positions are further apart in an operand than their channels are many, as
  // in the halves of a learned variance's output; or whose samples are.
  template <class F> FG_HD void each_run(const Operand& x, int64_t b, int64_t first, int64_t n, int64_t rows, int64_t width,
                                         int64_t samples, const F& f) const {
    const Geometry& g = a.geometry;
    if (!g.channels_last() || x.position_stride == g.channels) {
      const int64_t each = n / samples;
      for (int64_t s = 0; s < samples; ++s)
        f(s * each, each, (b + s) * x.batch_stride + first);
      return;
    }
    const int64_t per_sample = rows / samples, p = first / g.channels, c = first % g.channels;
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t q = 0; q < per_sample; ++q)
        f((s * per_sample + q) * width, width, (b + s) * x.batch_stride + (p + q) * x.position_stride + c);
  }
  FG_HD void scatter(const R* from, const Operand& out, int64_t b, int64_t first, int64_t n, int64_t rows, int64_t width,
                     int64_t samples) const {
    if (one_run(out, samples)) return write(from, n, out, b * out.batch_stride + first);
    each_run(out, b, first, n, rows, width, samples,
             [&](int64_t begin, int64_t count, int64_t offset) { write(from + begin, count, out, offset); });
  }

  // Returns where the tile's elements of an operand lie as R: in place if they are of type R and in one run, else in `buffer`.
  FG_HD const R* gathered(const Operand& in, int64_t b, int64_t first, int64_t n, int64_t rows, int64_t width, int64_t samples,
                          R* buffer) {
    if (one_run(in, samples)) {
      const int64_t offset = b * in.batch_stride + first;
      if (in.dtype == kNative<R>) return static_cast<const R*>(in.data) + offset;
      read(in, offset, n, buffer);
    } else {
      each_run(in, b, first, n, rows, width, samples,
               [&](int64_t begin, int64_t count, int64_t offset) { read(in, offset, count, buffer + begin); });
    }
    return buffer;
  }

  // Applies the op to whole vectors where they lie, and to the tail in a padded copy. Both go through the same vector code, so that
  // an element's bits do not depend on which it is in.
  template <bool kNoise, class C> FG_HD void vectors(const C& coefficients, const Tile<R>& t) {
    constexpr int64_t lanes = kLanes<R>;
    const int64_t whole = t.n / lanes * lanes, rest = t.n - whole;
    Tile<R> part = t;
    part.n = whole;
    if (whole) op.template apply<kNoise>(coefficients, part, 0);
    if (!rest) return;
    R in[kMaxInputs][lanes] = {}, z[lanes] = {}, out[kMaxResults][lanes];
    part.n = lanes;
    for (int i = 0; i < Op::kInputs; ++i) {
      if (!t.in[i]) continue;
      for (int64_t k = 0; k < rest; ++k)
        in[i][k] = t.in[i][whole + k];
      part.in[i] = in[i];
    }
    if (kNoise) {
      for (int64_t k = 0; k < rest; ++k)
        z[k] = t.z[whole + k];
      part.z = z;
    }
    for (int i = 0; i < Op::kOutputs; ++i)
      part.out[i] = t.out[i] ? out[i] : nullptr;
    op.template apply<kNoise>(coefficients, part, whole);
    for (int i = 0; i < Op::kOutputs; ++i)
      for (int64_t k = 0; t.out[i] && k < rest; ++k)
        t.out[i][whole + k] = out[i][k];
  }
};

// Runs Op<float> or Op<double>, whichever the arguments ask for.
template <template <class> class Op, class Arguments>
inline void run_elementwise(const Arguments& arguments, int64_t begin, int64_t end) {
  if (arguments.is_double) {
    Driver<double, Op<double>>(arguments, Op<double>{arguments}).run(begin, end);
  } else {
    Driver<float, Op<float>>(arguments, Op<float>{arguments}).run(begin, end);
  }
}

}  // namespace
}  // namespace fastgen
