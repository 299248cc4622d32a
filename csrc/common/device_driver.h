// The element-wise driver of CUDA, as functions of (thread block, thread) that compile for the host too, where the tests run them.
// Three ways through a tensor. All read and write each element once and make every Philox call once:
//
//   Vectors   contiguous and aligned: a thread has kVector consecutive elements of each operand in 128-bit accesses, and up to four
//             such vectors where there is work enough, all of whose loads are issued before the first is used;
//   Tiles     channels-last and aligned: four consecutive positions of kVector channels, so that the four lanes of each channel's
//             Philox call are the thread's own;
//   Groups    anything else: the four logical elements that share a Philox call, one access each.
//
// An op supplies, for the types that it is compiled for, what DeviceOp does not give it or gives it otherwise:
//
//   R; X, M, Out, Noise                            type of the arithmetic; Float32 … or Any: of input 0 (and of those inputs whose
//                                                  bits kStates has), of the other inputs, of the outputs, of given noise
//   kInputs, kAlways, kOutputs                     inputs, how many of them are never absent, outputs
//   kNoises, kNoiseInput                           the kinds of noise that it takes, as bits 1 << kind; which input given noise is
//   kBytesWith                                     the kinds of noise with which input 0 may be bytes and still have a fast way, as
//                                                  bits; beside outputs, or where kMixed other inputs, of float32 or bfloat16
//   kTiled                                         for which of these channels-last tensors are worth Tiles: without a seed the
//                                                  layout is of no consequence, unless an input has more channels than another
//   const Elementwise& arguments() const
//   Row row(int64_t b) const                       the coefficients of sample b
//   static bool noiseless(const Row&)              whether that sample takes no noise
//   void apply<kNoise, n>(row, in, z, out) const   in[kInputs][n], z[n] → out[kOutputs][n]; kNoise only where the row takes noise
//   void first_of_sample(b, row) const             called once for each sample
//   kUnroll                                        how many vectors a thread may have on the way; fewer than four for an op with
//                                                  many inputs, or with much to compute, each of whose vectors is code of its own
//   Sink                                           of sums: what takes the results
#pragma once
#include "device_convert.h"
#include "device_sum.h"
#include "normal.h"

#ifdef __CUDACC__
#define FG_NO_UNROLL _Pragma("unroll 1")
#else
#define FG_NO_UNROLL _Pragma("GCC unroll 1")
#endif

namespace fastgen {

struct Adder;
// What all ops name alike, and what most of them have in common.
template <class R_, class X_, class M_, class Out_, class Arguments> struct DeviceOp {
  using R = R_;
  using X = X_;
  using M = M_;
  using Out = Out_;
  using Noise = Out_;
  using Sink = Adder;
  static constexpr int kUnroll = 4, kStates = 1 << 0;
  static constexpr int kNoises = 1 << kNoNoise | 1 << kGivenNoise | 1 << kSeededNoise;
  static constexpr int kBytesWith = 0;
  Arguments a;

  const FG_HD Arguments& arguments() const { return a; }
  template <class Row> FG_HD void first_of_sample(int64_t, const Row&) const {}
};

// A sample's coefficients, column by column.
template <class R, int kCount> struct ColumnRow {
  R values[kCount];
  FG_HD R operator()(int column) const { return values[column]; }
};

// Whether the code of `apply` is so much that a kernel goes through the same copy of it again and again. A turn then finds its
// numbers in the same registers, to which they are moved, or picks them: an index that is no constant would need memory.
template <class Op> constexpr bool kOneCopy = Op::kUnroll == 1;
template <int n, class F> FG_HD auto picked(int index, const F& of) {
  auto found = of(0);
  FG_UNROLL
  for (int i = 1; i < n; ++i)
    found = i == index ? of(i) : found;
  return found;
}

// Elements of a vector: 16 bytes of the narrowest type, and no fewer than share a Philox call.
template <class Op> constexpr int kVector = Op::X::kBytes == 2 || Op::M::kBytes == 2 ? 8 : 4;
template <class Op, int k> struct TypeOfInput {
  using Type = std::conditional_t<(Op::kStates >> k & 1) != 0, typename Op::X, typename Op::M>;
};
constexpr int at_least_one(int n) { return n > 0 ? n : 1; }

// A vector of each operand, as it is in memory: one word of 16 bytes, or two where the operand is wider than the narrowest.
template <class Op> struct Raw {
  Words in[at_least_one(Op::kInputs)][2];
  Words noise[2];
};
// How many registers such a vector takes, of one operand and of all.
template <class T, class Op> constexpr int kRegisters = kVector<Op> * T::kBytes / 4;
template <class Op, NoiseKind kNoise, int k = 0> constexpr int raw_registers() {
  if constexpr (k < Op::kInputs) {
    return kRegisters<typename TypeOfInput<Op, k>::Type, Op> + raw_registers<Op, kNoise, k + 1>();
  } else {
    return kNoise == kGivenNoise ? kRegisters<typename Op::Noise, Op> : 0;
  }
}
// A vector of each operand in the type of the arithmetic.
template <class Op, int n> using Inputs = typename Op::R[at_least_one(Op::kInputs)][n];
template <class Op, int n> using Outputs = typename Op::R[Op::kOutputs][n];

// Reads the vector at position·position_stride + j of sample b from every operand; `position` only where kPositions.
template <class Op, NoiseKind kNoise, bool kPositions> struct Load {
  const Op& op;
  int64_t b, position, j;

  FG_HD int64_t offset(const Operand& x) const { return b * x.batch_stride + (kPositions ? position * x.position_stride : 0) + j; }
  template <int k = 0> FG_HD void into(Raw<Op>& raw) const {
    if constexpr (k < Op::kInputs) {
      const Operand& in = op.arguments().in[k];
      if (k < Op::kAlways || in.data) load_vector<typename TypeOfInput<Op, k>::Type, kVector<Op>>(in, offset(in), raw.in[k]);
      into<k + 1>(raw);
    } else if constexpr (kNoise == kGivenNoise) {
      const Operand& in = op.arguments().in[Op::kNoiseInput];
      load_vector<typename Op::Noise, kVector<Op>>(in, offset(in), raw.noise);
    }
  }
};

// A sink takes an op's results. This one writes them to memory.
struct Writer {
  template <class Op, NoiseKind kNoise, bool kPositions>
  FG_HD void vector(const Load<Op, kNoise, kPositions>& place, const typename Op::R (&out)[Op::kOutputs][kVector<Op>]) const {
    FG_UNROLL
    for (int k = 0; k < Op::kOutputs; ++k) {
      const Operand& to = place.op.arguments().out[k];
      if (k > 0 && !to.data) continue;
      Words words[2];
      FG_UNROLL
      for (int i = 0; i < kVector<Op>; i += 2)
        Op::Out::put_pair(words, i, out[k][i], out[k][i + 1]);
      store_vector<typename Op::Out, kVector<Op>>(to, place.offset(to), words);
    }
  }
  template <class Op, NoiseKind kNoise, bool kPositions>
  FG_HD void element(const Load<Op, kNoise, kPositions>& place, const typename Op::R (&out)[Op::kOutputs][1]) const {
    FG_UNROLL
    for (int k = 0; k < Op::kOutputs; ++k) {
      const Operand& to = place.op.arguments().out[k];
      if (k == 0 || to.data) store_one<typename Op::R, typename Op::Out>(to, place.offset(to), out[k][0]);
    }
  }
};
// This sink adds them up: the results of a vector in the type of the arithmetic, the sums of vectors in float64.
struct Adder {
  double sum = 0;
  template <class Place, class R, int n> FG_HD void vector(const Place&, const R (&out)[1][n]) {
    R few = out[0][0];
    FG_UNROLL
    for (int i = 1; i < n; ++i)
      few += out[0][i];
    sum += static_cast<double>(few);
  }
  template <class Place, class R> FG_HD void element(const Place&, const R (&out)[1][1]) { sum += static_cast<double>(out[0][0]); }
};
// This one writes the first result, whose op has no other that is written, and adds up the second.
struct WritingAdder {
  double sum = 0;
  template <class Place, class R, int n> FG_HD void vector(const Place& place, const R (&out)[2][n]) {
    Writer().vector(place, out);
    R few = out[1][0];
    FG_UNROLL
    for (int i = 1; i < n; ++i)
      few += out[1][i];
    sum += static_cast<double>(few);
  }
  template <class Place, class R> FG_HD void element(const Place& place, const R (&out)[2][1]) {
    Writer().element(place, out);
    sum += static_cast<double>(out[1][0]);
  }
};

// Computes the op's results from a vector's raw words, and hands them to a sink. Seeded noise is given to it as normals.
template <class Op, NoiseKind kNoise, bool kPositions> struct Apply {
  static constexpr int n = kVector<Op>;
  const Load<Op, kNoise, kPositions>& place;
  const typename Op::Row& row;
  const Raw<Op>& raw;

  template <bool kWithNoise, class Sink> FG_HD void run(typename Op::R* z, Sink& sink) const {
    Inputs<Op, n> in;
    Outputs<Op, n> out;
    unpack(in);
    if constexpr (kWithNoise && kNoise == kGivenNoise) {
      FG_UNROLL
      for (int i = 0; i < n; ++i)
        z[i] = Op::Noise::get(raw.noise, i);
    }
    place.op.template apply<kWithNoise, n>(row, in, z, out);
    sink.vector(place, out);
  }

 private:
  template <int k = 0> FG_HD void unpack(Inputs<Op, n>& in) const {
    if constexpr (k < Op::kInputs) {
      FG_UNROLL
      for (int i = 0; i < n; ++i)
        in[k][i] = TypeOfInput<Op, k>::Type::get(raw.in[k], i);
      unpack<k + 1>(in);
    }
  }
};

// What a thread keeps of the sample whose elements it has.
template <class Op, NoiseKind kNoise> struct Sample {
  int64_t b;
  typename Op::Row row;
  Stream stream;
  bool noise;

  FG_HD void enter(const Op& op, int64_t sample) {
    b = sample;
    row = op.row(b);
    noise = kNoise != kNoNoise && !Op::noiseless(row);
    if (kNoise == kSeededNoise) stream = stream_of(op.arguments(), b);
  }
};

// A seeded thread makes noise while its row and its vectors are on the way, though only the row says whether it takes any. The
// compiler would wait for both first: it would make noise behind the branch on the row and convert the vectors, which both of its
// sides do, before. It moves nothing over a place where the numbers are held. (bfloat16 step on sm_90: the row's first use moved
// from 14 instructions behind its load to 200, and the vectors' to behind the noise; 34 instead of 36 instructions per element.)
template <int n> FG_HD void hold([[maybe_unused]] float (&z)[n]) {
#ifdef __CUDA_ARCH__
  FG_UNROLL
  for (int i = 0; i < n; ++i)
    asm volatile("" : "+f"(z[i]));
#endif
}
template <int k = 0, class Op> FG_HD void hold([[maybe_unused]] Raw<Op>& raw) {
#ifdef __CUDA_ARCH__
  if constexpr (k < Op::kInputs) {
    FG_UNROLL
    for (int i = 0; i < kRegisters<typename TypeOfInput<Op, k>::Type, Op>; ++i)
      asm volatile("" : "+r"(raw.in[k][i / 4].w[i % 4]));
    hold<k + 1>(raw);
  }
#endif
}

// The elements 4·group … 4·group + 3 of a sample, one access each.
template <class Op, NoiseKind kNoise> struct Group {
  using R = typename Op::R;
  const Op& op;
  const Sample<Op, kNoise>& sample;
  Divider spatial;  // where channels-last

  template <class Sink> FG_HD void run(int64_t group, Sink& sink) const {
    const Elementwise& a = op.arguments();
    R z[4];
    if (kNoise == kSeededNoise && sample.noise) contract_normals(sample.stream, group, z);
    int64_t channel = 0, position = 4 * group;
    if (a.geometry.channels_last()) {
      channel = spatial.quotient(position);
      position -= channel * spatial.divisor;
    }
    auto element = [&](int k, R* own) {
      if (a.geometry.channels_last()) {
        one({op, sample.b, position, channel}, own, sink);
        if (++position == spatial.divisor) {
          position = 0;
          ++channel;
        }
      } else {
        one({op, sample.b, 0, position + k}, own, sink);
      }
    };
    if constexpr (kOneCopy<Op>) {
      FG_NO_UNROLL
      for (int k = 0; k < 4 && 4 * group + k < a.geometry.event; ++k) {
        element(k, z);
        FG_UNROLL
        for (int i = 0; i < 3; ++i)
          z[i] = z[i + 1];
      }
    } else {
      FG_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (4 * group + k >= a.geometry.event) return;
        element(k, z + k);
      }
    }
  }

 private:
  using Place = Load<Op, kNoise, true>;
  template <class Sink> FG_HD void one(const Place& place, R* z, Sink& sink) const {
    Inputs<Op, 1> in = {};
    Outputs<Op, 1> out;
    load(in, place);
    if (sample.noise) {
      if constexpr (kNoise == kGivenNoise) {
        const Operand& noise = op.arguments().in[Op::kNoiseInput];
        *z = load_one<R, typename Op::Noise>(noise, place.offset(noise));
      }
      op.template apply<kNoise != kNoNoise, 1>(sample.row, in, z, out);
    } else {
      op.template apply<false, 1>(sample.row, in, z, out);
    }
    sink.element(place, out);
  }
  template <int k = 0> FG_HD void load(Inputs<Op, 1>& in, const Place& place) const {
    if constexpr (k < Op::kInputs) {
      const Operand& from = op.arguments().in[k];
      if (k < Op::kAlways || from.data) in[k][0] = load_one<R, typename TypeOfInput<Op, k>::Type>(from, place.offset(from));
      load<k + 1>(in, place);
    }
  }
};

// Makes a kernel of a way: each thread does one item and writes its results.
template <class Way> struct EachThread {
  const FG_HD Way& way() const { return static_cast<const Way&>(*this); }
  int64_t blocks() const { return (way().items() + kThreads - 1) / kThreads; }
  FG_HD void operator()(int64_t block, int thread) const {
    const int64_t item = block * kThreads + thread;
    Writer writer;
    if (item < way().items()) way().item(item, writer);
  }
};

template <class Op, NoiseKind kNoise> struct Vectors : EachThread<Vectors<Op, kNoise>> {
  static constexpr int n = kVector<Op>, kUnroll = Op::kUnroll;
  static constexpr int kHeld = kUnroll * raw_registers<Op, kNoise>() + n * Op::kInputs;  // registers, see kBlocks
  Op op;
  VectorPlan plan;
  int64_t groups_left_over = 0;  // after the last whole item, of a batch that is one sample

  explicit Vectors(const Op& op_) : op(op_) {
    const Geometry& g = op.arguments().geometry;
    plan = VectorPlan(g.event / n, g.batch, kUnroll);
    groups_left_over = (g.event % n + plan.left_over * n + 3) / 4;
  }
  FG_HD int64_t items() const { return plan.items.count + groups_left_over; }

  template <class Sink> FG_HD void item(int64_t item, Sink& sink) const {
    Sample<Op, kNoise> sample;
    if (item >= plan.items.count) {
      sample.enter(op, 0);
      Group<Op, kNoise>{op, sample, Divider()}.run(plan.first_left_over() * (n / 4) + item - plan.items.count, sink);
      return;
    }
    const Place place = plan.items.at(item);
    Raw<Op> raw[kUnroll];
    FG_UNROLL
    for (int k = 0; k < kUnroll; ++k)
      if (k < plan.unroll) load(place, k).into(raw[k]);
    sample.enter(op, place.sample);
    if (place.index == 0) op.first_of_sample(sample.b, sample.row);
    FG_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      if (k >= plan.unroll) return;
      const Load<Op, kNoise, false> from = load(place, k);
      const Apply<Op, kNoise, false> apply{from, sample.row, raw[k]};
      typename Op::R z[n];
      if constexpr (kNoise == kSeededNoise) {
        FG_UNROLL
        for (int q = 0; q < n / 4; ++q)
          contract_normals(sample.stream, plan.vector(place.index, k) * (n / 4) + q, z + 4 * q);
        hold(z);
      }
      if (kNoise != kNoNoise && sample.noise) {
        if constexpr (kNoise == kSeededNoise) hold(raw[k]);
        apply.template run<kNoise != kNoNoise>(z, sink);
      } else {
        apply.template run<false>(z, sink);
      }
    }
  }

 private:
  FG_HD Load<Op, kNoise, false> load(const Place& place, int k) const {
    return {op, place.sample, 0, plan.vector(place.index, k) * n};
  }
};

template <class Op, NoiseKind kNoise> struct Tiles : EachThread<Tiles<Op, kNoise>> {
  static constexpr int n = kVector<Op>, kNormals = kNoise == kSeededNoise ? 4 * n : 0;
  static constexpr int kHeld = (kOneCopy<Op> ? 1 : 4) * raw_registers<Op, kNoise>() + kNormals + n * Op::kInputs;
  Op op;
  ItemPlan plan;
  Divider vectors;  // of channels, at one position

  explicit Tiles(const Op& op_) : op(op_) {
    const Geometry& g = op.arguments().geometry;
    vectors = Divider(g.channels / n);
    plan = ItemPlan(vectors.divisor * (g.spatial / 4), g.batch);
  }
  FG_HD int64_t items() const { return plan.count; }

  template <class Sink> FG_HD void item(int64_t item, Sink& sink) const {
    const Place place = plan.at(item);
    const int64_t group = vectors.quotient(place.index), channel = (place.index - group * vectors.divisor) * n;
    Raw<Op> raw[4];  // of one copy the first, when its turn comes
    FG_UNROLL
    for (int r = 0; r < 4; ++r)
      if (!kOneCopy<Op>) load(place.sample, 4 * group + r, channel).into(raw[r]);
    Sample<Op, kNoise> sample;
    sample.enter(op, place.sample);
    if (place.index == 0) op.first_of_sample(sample.b, sample.row);
    typename Op::R z[4][n];
    if constexpr (kNoise == kSeededNoise) {
      const int64_t groups = op.arguments().geometry.spatial / 4;  // of a channel
      FG_UNROLL
      for (int i = 0; i < n; ++i) {
        typename Op::R lanes[4];
        contract_normals(sample.stream, (channel + i) * groups + group, lanes);
        FG_UNROLL
        for (int r = 0; r < 4; ++r)
          z[r][i] = lanes[r];
      }
      FG_UNROLL
      for (int r = 0; r < 4; ++r)
        hold(z[r]);
    }
    auto vector = [&](int r, Raw<Op>& own, typename Op::R(&normals)[n]) {
      const Load<Op, kNoise, true> from = load(place.sample, 4 * group + r, channel);
      if (kOneCopy<Op>) from.into(own);
      const Apply<Op, kNoise, true> apply{from, sample.row, own};
      if (kNoise != kNoNoise && sample.noise) {
        if constexpr (kNoise == kSeededNoise) hold(own);
        apply.template run<kNoise != kNoNoise>(normals, sink);
      } else {
        apply.template run<false>(normals, sink);
      }
    };
    if constexpr (kOneCopy<Op>) {
      FG_NO_UNROLL
      for (int r = 0; r < 4; ++r) {
        vector(r, raw[0], z[0]);
        FG_UNROLL
        for (int k = 0; k < 3; ++k)
          FG_UNROLL
        for (int i = 0; i < n; ++i)
          z[k][i] = z[k + 1][i];
      }
    } else {
      FG_UNROLL
      for (int r = 0; r < 4; ++r)
        vector(r, raw[r], z[r]);
    }
  }

 private:
  FG_HD Load<Op, kNoise, true> load(int64_t b, int64_t position, int64_t channel) const { return {op, b, position, channel}; }
};

template <class Op, NoiseKind kNoise> struct Groups : EachThread<Groups<Op, kNoise>> {
  static constexpr int kHeld = kOneCopy<Op> && kIsDouble<typename Op::R> ? 80 : 0;
  Op op;
  ItemPlan plan;
  // Channels-last with whole groups in a channel: items run over the channels first, as memory does.
  Divider channels, spatial;

  explicit Groups(const Op& op_) : op(op_) {
    const Geometry& g = op.arguments().geometry;
    // a sample without elements is one item, for first_of_sample
    plan = ItemPlan(g.event > 0 ? (g.event + 3) / 4 : 1, g.batch);
    if (!g.channels_last()) return;
    spatial = Divider(g.spatial);
    if (g.spatial % 4 == 0) channels = Divider(g.channels);
  }
  FG_HD int64_t items() const { return plan.count; }

  template <class Sink> FG_HD void item(int64_t item, Sink& sink) const {
    const Place place = plan.at(item);
    Sample<Op, kNoise> sample;
    sample.enter(op, place.sample);
    if (place.index == 0) op.first_of_sample(sample.b, sample.row);
    Group<Op, kNoise>{op, sample, spatial}.run(group_of(place.index), sink);
  }

  FG_HD int64_t group_of(int64_t index) const {
    if (channels.divisor <= 1) return index;
    const int64_t group = channels.quotient(index), channel = index - group * channels.divisor;
    return channel * (spatial.divisor / 4) + group;
  }
};

// Makes a Part for device_sum.h of a way: its results are added up, those of all samples together or those of each. The op supplies
// outputs(), scratch() and finish(output, sum).
template <class Way> struct Added {
  static constexpr int kValues = 1, kHeld = Way::kHeld + 16;  // 16 for the counters of the loop in `add`
  Way way;
  int64_t items;  // of an output
  SumPlan plan;
  SumScratch scratch;

  explicit Added(const Way& way_) : way(way_), items(way.items()), scratch(way.op.scratch()) {
    const int64_t outputs = way.op.outputs();
    if (outputs > 0) items /= outputs;
    plan = SumPlan(outputs, items);
  }
  FG_HD void add(int64_t output, int64_t first, int64_t step, double (&sum)[1]) const {
    typename decltype(Way::op)::Sink sink;
    for (int64_t i = first; i < items; i += step)
      way.item(output * items + i, sink);
    sum[0] += sink.sum;
  }
  FG_HD void finish(int64_t output, const double (&sum)[1]) const { way.op.finish(output, sum[0]); }
};

// ---- which way, on the host ----------------------------------------------------------------------------------------------------

// Whether the operands have the op's types and lie on 16-byte boundaries, sample after sample and position after position.
template <class Op> bool fits_words(const Op& op, bool positions) {
  const Elementwise& a = op.arguments();
  auto fits = [&](const Operand& x, DType dtype) {
    if (!x.data) return true;
    return x.dtype == dtype && aligned(x.data) && (a.geometry.batch == 1 || x.batch_stride % kVector<Op> == 0) &&
           (!positions || x.position_stride % kVector<Op> == 0);
  };
  for (int k = 0; k < Op::kInputs; ++k)
    if (!fits(a.in[k], Op::kStates >> k & 1 ? Op::X::kDType : Op::M::kDType)) return false;
  for (int k = 0; k < Op::kOutputs; ++k)
    if (!fits(a.out[k], Op::Out::kDType)) return false;
  return a.noise.kind != kGivenNoise || fits(a.in[Op::kNoiseInput], Op::Noise::kDType);
}

// Calls launch(way) with the fast way for these arguments; false where there is none.
template <NoiseKind kNoise, class Op, class Launch> bool launch_fast(const Op& op, Launch& launch) {
  const Geometry& g = op.arguments().geometry;
  constexpr int n = kVector<Op>;
  if (g.channels_last()) {
    if constexpr (!(Op::kTiled & 1 << kNoise)) return false;
    if (g.channels % n || g.spatial % 4 || g.event == 0 || !fits_words(op, true)) return false;
    if constexpr (Op::kTiled & 1 << kNoise) launch(Tiles<Op, kNoise>(op));
  } else {
    if (g.event < n || (g.batch > 1 && g.event % n) || !fits_words(op, false)) return false;
    launch(Vectors<Op, kNoise>(op));
  }
  return true;
}

// Op<R, X, M, Out> is one of the op's instances; kMixed, whether a float32 state may meet half-precision inputs.
template <template <class, class, class, class> class Op, bool kMixed, NoiseKind kNoise, class Arguments, class Launch>
bool launch_fast_types(const Arguments& a, Launch& launch) {
  const DType x = Op<float, Any, Any, Any>::kInputs > 0 ? a.in[0].dtype : a.out[0].dtype;
  const DType m = kMixed ? a.in[1].dtype : x;
  if (x == kFloat32 && m == kFloat32) return launch_fast<kNoise>(Op<float, Float32, Float32, Float32>{a}, launch);
  if (x == kBFloat16 && m == kBFloat16) return launch_fast<kNoise>(Op<float, BFloat16, BFloat16, BFloat16>{a}, launch);
  if (x == kFloat16 && m == kFloat16) return launch_fast<kNoise>(Op<float, Float16, Float16, Float16>{a}, launch);
  if constexpr (kMixed) {
    if (x == kFloat32 && m == kBFloat16) return launch_fast<kNoise>(Op<float, Float32, BFloat16, Float32>{a}, launch);
    if (x == kFloat32 && m == kFloat16) return launch_fast<kNoise>(Op<float, Float32, Float16, Float32>{a}, launch);
  }
  if constexpr ((Op<float, Any, Any, Any>::kBytesWith & 1 << kNoise) != 0) {
    const DType other = kMixed ? m : a.out[0].dtype;
    if (x == kUInt8 && other == kFloat32) return launch_fast<kNoise>(Op<float, UInt8, Float32, Float32>{a}, launch);
    if (x == kUInt8 && other == kBFloat16) return launch_fast<kNoise>(Op<float, UInt8, BFloat16, BFloat16>{a}, launch);
  }
  return false;
}

template <template <class, class, class, class> class Op, bool kMixed, class Arguments, class Launch>
bool launch_fast_ways(const Arguments& a, Launch& launch) {
  constexpr int noises = Op<float, Any, Any, Any>::kNoises;
  if (a.is_double) return false;
  if constexpr (noises & 1 << kNoNoise)
    if (a.noise.kind == kNoNoise) return launch_fast_types<Op, kMixed, kNoNoise>(a, launch);
  if constexpr (noises & 1 << kGivenNoise)
    if (a.noise.kind == kGivenNoise) return launch_fast_types<Op, kMixed, kGivenNoise>(a, launch);
  if constexpr (noises & 1 << kSeededNoise)
    if (a.noise.kind == kSeededNoise) return launch_fast_types<Op, kMixed, kSeededNoise>(a, launch);
  return false;
}

template <class Op, class Launch> void launch_groups(const Op& op, Launch& launch) {
  const NoiseKind noise = op.arguments().noise.kind;
  if constexpr (Op::kNoises & 1 << kNoNoise)
    if (noise == kNoNoise) launch(Groups<Op, kNoNoise>(op));
  if constexpr (Op::kNoises & 1 << kGivenNoise)
    if (noise == kGivenNoise) launch(Groups<Op, kGivenNoise>(op));
  if constexpr (Op::kNoises & 1 << kSeededNoise)
    if (noise == kSeededNoise) launch(Groups<Op, kSeededNoise>(op));
}

// The one launch of an op: launch(way), way(block, thread) being for each of way.blocks() thread blocks of kThreads threads.
template <template <class, class, class, class> class Op, bool kMixed, class Arguments, class Launch>
void run_on_device(const Arguments& a, Launch launch) {
  if (a.geometry.batch == 0 || launch_fast_ways<Op, kMixed>(a, launch)) return;
  if (a.is_double) {
    launch_groups(Op<double, Any, Any, Any>{a}, launch);
  } else {
    launch_groups(Op<float, Any, Any, Any>{a}, launch);
  }
}

}  // namespace fastgen
