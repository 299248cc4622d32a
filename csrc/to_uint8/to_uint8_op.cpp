#include "to_uint8/to_uint8.h"

#include "declared/to_uint8.h"

namespace fastgen {
FG_KERNELS(to_uint8, ToUint8Arguments)
namespace {

// Writes the bytes of `x` to `out`, which is channels-last or contiguous.
void run(const Tensor& x, const View& out, bool channels_last) {
  const View view(x);
  const bool from_channels_last = view.channels_last();
  std::optional<Tensor> copy;  // of strides that no kernel takes
  if (!from_channels_last && !view.contiguous) copy = torch::stable::contiguous(x);
  ToUint8Arguments a;
  a.data = copy ? View(*copy).data : view.data;
  a.dtype = view.dtype("x");
  a.out = static_cast<uint8_t*>(out.data);
  a.count = view.numel;
  if (from_channels_last != channels_last && a.count > 0) {
    const int64_t channels = view.sizes[1], spatial = view.numel / view.sizes[0] / channels;
    a.rows = channels_last ? channels : spatial;
    a.columns = channels_last ? spatial : channels;
  }
#ifdef FG_DEVICE_KERNELS
  run_cuda(fastgen_to_uint8_cuda, a, view);
#else
  constexpr int64_t cost = kUnseededGrain / kToUint8Block;
  run_blocks(to_uint8_cpu(isa()), a, to_uint8_blocks(a), a.transposes() ? kUnseededGrain / ToUint8Tile::kElements : cost);
#endif
}

Tensor to_uint8(const ToUint8Operands& o, bool channels_last) {
  const View view(o.x);
  STD_TORCH_CHECK(!channels_last || view.dim >= 3, "channels_last: expected shape (B, C, ...) of x");
  view.dtype("x");
  const Tensor out = empty(view.sizes, view.dim, channels_last, kUInt8, view);
  const View out_view(out);
  run(o.x, out_view, out_view.channels_last());
  return out;
}

void to_uint8_out(const ToUint8Operands& o, const Tensor& out) {
  const View view(o.x), out_view(out);
  view.dtype("x");
  check_out(out_view, kUInt8, view, {&o.x});
  const bool channels_last = out_view.channels_last();
  if (channels_last || out_view.contiguous) return run(o.x, out_view, channels_last);
  const Tensor own = empty(view.sizes, view.dim, false, kUInt8, view);
  run(o.x, View(own), false);
  torch::stable::copy_(const_cast<Tensor&>(out), own);
}

}  // namespace
}  // namespace fastgen
