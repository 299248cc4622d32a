"""Images as bytes: public function, eager reference, fake. Nothing to differentiate."""

from __future__ import annotations

import torch

from .._core import checks, dispatch


def to_uint8(x: torch.Tensor, *, channels_last: bool | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The bytes of images that are numbers within −1 … 1, in one launch:

        u = round((x' + 1)·127.5),   x' = x clamped to −1 … 1

    rounded to the nearest whole number, and to the even one of two that are as near. It is the way back from the bytes that
    `q_sample`, `diffusion_loss`, `vlb_terms`, `prior_kl` and `variational_bound` take for data: of x = u/127.5 − 1 it returns u, of
    all 256 bytes, and so it does where x was rounded to float16 or bfloat16 in between.

    Args:
        x: any shape, float16, bfloat16, float32 or float64, contiguous or channels-last; other strides are copied first.
        channels_last: the layout of the result in memory. True: channels-last, of an x of shape (B, C, *spatial), so that
            `.movedim(1, -1)` of the result is contiguous, as image libraries want it. False: contiguous. None: that of x.
        out: where to write, uint8, in its own layout; then channels_last is None.

    Returns the shape of x in uint8. NaN becomes 0, −∞ 0 and +∞ 255. Arithmetic is in float64 where x is that, else in float32, with
    one rounding in the sum and one in the product. Not differentiable: the result carries no gradient to an x that requires one.

    Raises TypeError for wrong types or dtypes, ValueError for wrong shapes, devices or layouts, before anything is written.

    Source: Ho et al. 2020, section 3.3, whose scaling of {0, 1, …, 255} to −1 … 1 this undoes.
    """
    checks.tensor("x", x)
    if channels_last is not None:
        checks.boolean("channels_last", channels_last)
        if out is not None:
            raise ValueError(f"channels_last: expected None with out=, whose layout is its own, got {channels_last}")
    if channels_last and x.dim() < 3:
        raise ValueError(f"channels_last: expected True for an x of shape (B, C, ...) only, got it for {tuple(x.shape)}")
    if x.requires_grad:
        x = x.detach()
    if out is not None:
        checks.output(out, x.shape, torch.uint8, x.device, {"x": x})
    elif channels_last is None:
        channels_last = dispatch.is_channels_last(x)
    backend = dispatch.backend_for(x.device)
    if backend == "eager":
        y = reference(x)
        return out.copy_(y) if out is not None else _laid_out(y, channels_last)
    if out is None:
        return dispatch.op("to_uint8", backend)(x, channels_last)
    dispatch.op("to_uint8_out", backend)(x, out=out)
    return dispatch.written(out)


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(x):
    """The kernel in plain PyTorch, but for the layout."""
    x = x.to(checks.compute_dtype(x.dtype))
    x = torch.where(x > -1.0, x, -1.0).clamp(max=1.0)  # NaN is not
    return ((x + 1.0) * 127.5).round().to(torch.uint8)


def _laid_out(y, channels_last):
    return y.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else y.contiguous()


# ---- fake -----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("to_uint8")
def _fake(o, channels_last=False):
    return dispatch.empty_like(o.x, torch.uint8, channels_last=channels_last)
