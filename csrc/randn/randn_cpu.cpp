#include "common/cpu_driver.h"  // before the formulas, which find the vector operations by their names
#include "common/isa.h"

#include "randn/randn.h"

namespace fastgen {
namespace {

template <class R> struct Randn {
  static constexpr int kInputs = 0, kOutputs = 1, kColumns = 0;
  static constexpr int kSums = 0;
  const RandnArguments& a;

  void load_row(int64_t, R*) const {}
  bool own_rows() const { return false; }
  static bool noiseless(const R*) { return false; }

  template <bool kNoise, class C> FG_HD void apply(const C&, const Tile<R>& t, int64_t) const {
    FG_UNROLL_4
    for (int64_t i = 0; i < t.n; i += kLanes<R>)
      store(t.out[0] + i, load(t.z + i));
  }
};

// ---- torch's numbers on a CUDA GPU ---------------------------------------------------------------------------------------------

// A piece of the work is what the 256 threads of one of torch's blocks make in a turn: kTorchCudaNormals<R> rows of 256 elements, T
// elements apart, of which the last ones may lie behind the end.
template <class R> struct TorchCudaRandn {
  static constexpr int kRows = kTorchCudaNormals<R>;
  const TorchCudaArguments& a;
  const int64_t columns;
  alignas(64) R rows[kRows * kTorchCudaBlock];  // words, then radii, then normals, each in the place of the one before

  explicit TorchCudaRandn(const TorchCudaArguments& arguments) : a(arguments), columns(a.threads / kTorchCudaBlock) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t column = piece % columns, turn = piece / columns % a.turns, sample = piece / columns / a.turns;
      const int64_t first = turn * kRows * a.threads + column * kTorchCudaBlock;
      const int live = static_cast<int>((a.event - first + a.threads - 1) / a.threads);
      const int used = live < kRows ? live : kRows;
      if (used <= 0) continue;
      const int64_t width = count(first);
      make_words(a.seed_of(sample), static_cast<uint64_t>(a.first + turn), column * kTorchCudaBlock, width);
      for (int pair = 0; 2 * pair < used; ++pair)
        make_normals(rows + 2 * pair * kTorchCudaBlock, width);
      for (int row = 0; row < used; ++row)
        write(rows + row * kTorchCudaBlock, count(first + row * a.threads), a.out, sample * a.event + first + row * a.threads);
    }
  }

 private:
  int64_t count(int64_t first) const { return a.event - first < kTorchCudaBlock ? a.event - first : kTorchCudaBlock; }

  // Of `width` threads, and of up to kTogether more.
  void make_words(int64_t seed, uint64_t counter, int64_t thread, int64_t width) {
    const KeySchedule k0(static_cast<uint32_t>(seed), 0x9E3779B9u), k1(static_cast<uint64_t>(seed) >> 32, 0xBB67AE85u);
    const Words<kSideBySide> low = splat_words<kSideBySide>(static_cast<uint32_t>(counter));
    const Words<kSideBySide> high = splat_words<kSideBySide>(counter >> 32), zero = splat_words<kSideBySide>(0);
    Words<kSideBySide> threads;
    for (int k = 0; k < kSideBySide; ++k)
      for (int lane = 0; lane < kGroupsPerBlock; ++lane)
        threads.of[k][lane] = static_cast<uint64_t>(thread + thread_of(k, lane));
    for (int64_t i = 0; i < width; i += kTogether) {
      store_words(philox4x32(low, high, threads, zero, RoundKey{k0.words}, RoundKey{k1.words}), rows + i);
      for (WordV& x : threads.of)
        x += kTogether;
    }
  }

  static constexpr int kTogether = kSideBySide * kGroupsPerBlock;
  static_assert(kTorchCudaBlock % kTogether == 0);
  // Words of floats are packed from the lanes of two vectors in turn.
  static constexpr int thread_of(int k, int lane) {
    return sizeof(R) == 8 ? k * kGroupsPerBlock + lane : k / 2 * 2 * kGroupsPerBlock + 2 * lane + k % 2;
  }
  static FG_HD void store_words(const Philox4<Words<kSideBySide>>& r, float* to) {
    for (int k = 0; k < kSideBySide; k += 2) {
      float* const place = to + k * kGroupsPerBlock;
      store(place, (FloatV)pack_words(r.r0.of[k], r.r0.of[k + 1]));
      store(place + kTorchCudaBlock, (FloatV)pack_words(r.r1.of[k], r.r1.of[k + 1]));
      store(place + 2 * kTorchCudaBlock, (FloatV)pack_words(r.r2.of[k], r.r2.of[k + 1]));
      store(place + 3 * kTorchCudaBlock, (FloatV)pack_words(r.r3.of[k], r.r3.of[k + 1]));
    }
  }
  static FG_HD void store_words(const Philox4<Words<kSideBySide>>& r, double* to) {
    for (int k = 0; k < kSideBySide; ++k) {
      store(to + k * kGroupsPerBlock, (DoubleV)curand_bits(r.r0.of[k], r.r1.of[k]));
      store(to + k * kGroupsPerBlock + kTorchCudaBlock, (DoubleV)curand_bits(r.r2.of[k], r.r3.of[k]));
    }
  }

  // A row of words for radii and one for angles become two of normals. All radii first, as in `fill_normals`.
  static void make_normals(float* pair, int64_t width) {
    for (int64_t i = 0; i < width; i += kLanes<float>)
      store(pair + i, radius_of<FloatV>((UInt32V)load(pair + i)));
    for (int64_t i = 0; i < width; i += kLanes<float>) {
      FloatV z_sin, z_cos;
      curand_polar(load(pair + i), curand_angle<FloatV>((UInt32V)load(pair + kTorchCudaBlock + i)), z_sin, z_cos);
      store(pair + i, z_sin);
      store(pair + kTorchCudaBlock + i, z_cos);
    }
  }
  static void make_normals(double* pair, int64_t width) {
    for (int64_t i = 0; i < width; i += kLanes<double>)
      store(pair + i, curand_radius_double<DoubleV>((WordV)load(pair + i)));
    for (int64_t i = 0; i < width; i += kLanes<double>) {
      DoubleV z_sin, z_cos;
      curand_polar_double(load(pair + i), (WordV)load(pair + kTorchCudaBlock + i), z_sin, z_cos);
      store(pair + i, z_sin);
      store(pair + kTorchCudaBlock + i, z_cos);
    }
  }
};

}  // namespace

FG_CPU_KERNEL(randn, RandnArguments) { run_elementwise<Randn>(arguments, begin, end); }

FG_CPU_KERNEL(torch_skip, TorchSkipArguments) {
  for (int64_t i = begin; i < end; ++i) {
    const TorchState before = arguments.states[i];
    TorchWords words;
    words.load_state(before);
    words.skip(arguments.words);
    words.store_state(before, arguments.states[i]);
  }
}

FG_CPU_KERNEL(randn_torch_cuda, TorchCudaArguments) {
  if (arguments.out.dtype == kFloat64) {
    TorchCudaRandn<double>(arguments).run(begin, end);
  } else {
    TorchCudaRandn<float>(arguments).run(begin, end);
  }
}

}  // namespace fastgen
