#include "gan_loss/gan_loss.h"

#include <cmath>

#include "declared/gan_loss.h"

namespace fastgen {
FG_KERNELS(gan_loss, GanLossArguments)
namespace {

// Every element has its own memory, without gaps: then the order in which a sum takes them is the memory's.
bool dense(const View& x) {
  if (x.contiguous) return true;
  int64_t step = 1;
  for (bool found = true; found && step < x.numel;) {
    found = false;
    for (int64_t d = 0; d < x.dim && !found; ++d) {
      found = x.sizes[d] > 1 && x.strides[d] == step;
      if (found) step *= x.sizes[d];
    }
  }
  return step == x.numel;
}

// The arguments of a call, and what its pointers point to.
struct Call {
  std::vector<Tensor> copies, gradients;
  std::vector<GanSegment> segments;
  std::optional<View> like;
  GanLossArguments a;
  DType dtype = kFloat32;  // of the loss
  int64_t elements = 0;

  // Of the tensors, the first `o.real` are of real samples.
  Call(const GanLossOperands& o, bool with_gradients) {
    const int64_t tensors = static_cast<int64_t>(o.logits.size()), fake = tensors - o.real;
    STD_TORCH_CHECK(tensors > 0, "logits: expected at least one tensor");
    STD_TORCH_CHECK(0 <= o.real && o.real <= tensors, "real: expected 0 … ", tensors, ", got ", o.real);
    STD_TORCH_CHECK(o.kind >= kDiscriminatorLoss && o.kind <= kMinimaxLoss, "kind: expected 0 … 2, got ", o.kind);
    STD_TORCH_CHECK(o.reduction == kMean || o.reduction == kSum, "reduction: expected 1 (mean) or 2 (sum), got ", o.reduction);
    STD_TORCH_CHECK(0.0 <= o.smoothing && o.smoothing < 1.0, "smoothing: expected 0 ≤ s < 1, got ", o.smoothing);
    segments.reserve(tensors);
    if (with_gradients) gradients.reserve(tensors);
    for (int64_t k = 0; k < tensors; ++k) {
      std::optional<View> view(o.logits[k]);
      if (!like) like.emplace(o.logits[0]);
      STD_TORCH_CHECK(view->same_device(*like), "logits: expected tensors on one device");
      GanSegment s;
      s.dtype = view->dtype("logits");
      if (!dense(*view)) {
        copies.push_back(torch::stable::contiguous(o.logits[k]));
        view.emplace(copies.back());
      }
      if (with_gradients) gradients.push_back(empty_strided(view->dim, view->sizes, view->strides, view->numel, s.dtype, *view));
      s.real = k < o.real;
      if (s.dtype == kFloat64) dtype = kFloat64;
      const double one = o.kind == kMinimaxLoss ? -1.0 : 1.0, count = static_cast<double>(view->numel);
      s.factor = o.reduction == kMean ? one / count : one;
      s.target = s.real ? 1.0 - o.smoothing : o.kind == kNonSaturatingLoss ? 1.0 : 0.0;
      s.mean = 1.0 / (count * static_cast<double>(s.real ? o.real : fake));
      s.right = o.real > 0 && fake > 0 ? s.mean / 2 : s.mean;
      s.logits = view->data;
      s.gradient = with_gradients ? gradients.back().mutable_data_ptr() : nullptr;
      s.count = view->numel;
      if (s.count == 0) {  // a mean of nothing
        if (o.reduction == kMean) a.starts[kGanLoss] = NAN;
        a.starts[s.real ? kRealProbability : kFakeProbability] = a.starts[kRightShare] = a.starts[kValue] = NAN;
        continue;
      }
      s.first_block = a.blocks;
      a.blocks += blocks_of(s.count, kGanBlock);
      elements += s.count;
      segments.push_back(s);
    }
    a.segments = segments.data();
    a.count = static_cast<int>(segments.size());
  }
  Call(const Call&) = delete;

  void multiply(const Tensor& upstream) {
    const View view(upstream);
    STD_TORCH_CHECK(view.numel == 1, "gradient: expected one element");
    STD_TORCH_CHECK(view.same_device(*like), "gradient: expected the device of the logits");
    a.upstream = view.data;
    a.upstream_dtype = view.dtype("gradient");
  }
  Tensor scalar() const { return empty(nullptr, 0, false, dtype, *like); }
  Tensor four() const {
    const int64_t size = kGanSums - 1;
    return empty(&size, 1, false, dtype, *like);
  }
  void run() const {
#ifdef FG_DEVICE_KERNELS
    run_cuda(fastgen_gan_loss_cuda, a, *like);
#else
    const auto kernel = gan_loss_cpu(isa());
    elements <= kUnseededGrain ? kernel(a, 0, a.blocks) : run_blocks(kernel, a, a.blocks);
#endif
  }
};

#ifndef FG_DEVICE_KERNELS
// Adds up the blocks of each segment, and what they are worth.
void add_segments(const GanLossArguments& a, const BlockSums& sums, double (&values)[kGanSums]) {
  for (int v = 0; v < kGanSums; ++v)
    values[v] = a.starts[v];
  for (int k = 0; k < a.count; ++k) {
    const GanSegment& s = a.segments[k];
    const int64_t next = k + 1 < a.count ? a.segments[k + 1].first_block : a.blocks;
    auto total = [&](GanTerm term) { return sums.total(term * a.blocks + s.first_block, term * a.blocks + next); };
    values[kGanLoss] += s.factor * total(kLossTerm);
    if (!a.monitors) continue;
    values[s.real ? kRealProbability : kFakeProbability] += s.mean * total(kProbabilityTerm);
    values[kRightShare] += s.right * total(kRightTerm);
    values[kValue] += s.mean * total(kLogTerm);
  }
}
#endif

// The loss; the monitors, which are the probabilities of real and of generated samples, the accuracy and the value; and the
// gradients of the loss by each of the logits.
std::vector<Tensor> gan_loss(const GanLossOperands& o, bool monitors, bool gradients) {
  Call call(o, gradients);
  GanLossArguments& a = call.a;
  a.monitors = monitors;
  std::vector<Tensor> results;
  results.reserve(2 + call.gradients.size());
  results.push_back(call.scalar());
  if (monitors) results.push_back(call.four());
#ifdef FG_DEVICE_KERNELS
  a.loss = {results[0].mutable_data_ptr(), call.dtype};
  if (monitors) a.monitored = {results[1].mutable_data_ptr(), call.dtype};
  std::optional<Scratch> scratch;
  if (call.elements > kThreads || a.count > 1) {  // else one thread block does it alone
    a.scratch = scratch.emplace(kGanSums + 1, *call.like).for_kernel;
    a.running = a.scratch.sums + kGanSums * kMostSums;
  }
  call.run();
  if (gradients) {  // a launch of their own
    a.backward = true;
    call.run();
  }
#else
  a.gradients = gradients;
  const BlockSums sums(a.blocks * (monitors ? kGanTerms : 1));
  a.sums = sums.data;
  call.run();
  double values[kGanSums];
  add_segments(a, sums, values);
  store_scalar(results[0].mutable_data_ptr(), call.dtype, values[kGanLoss]);
  if (monitors) {
    char* const to = static_cast<char*>(results[1].mutable_data_ptr());
    for (int v = kRealProbability; v < kGanSums; ++v)
      store_scalar(to + (v - 1) * size_of(call.dtype), call.dtype, values[v]);
  }
#endif
  for (Tensor& gradient : call.gradients)
    results.push_back(std::move(gradient));
  return results;
}

std::vector<Tensor> gan_loss_backward(const Tensor& gradient, const GanLossOperands& o) {
  Call call(o, true);
  call.multiply(gradient);
  call.a.backward = true;
  if (call.a.count > 0) call.run();
  return std::move(call.gradients);
}

}  // namespace
}  // namespace fastgen
