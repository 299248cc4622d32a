"""Images as bytes: the kernel and the ops. The formula is byte_of_value in common/bytes.py."""

import math

import torch
import triton
import triton.language as tl

from .._core import dispatch
from .common import op
from .common.bytes import byte_of_value
from .common.driver import flat_elements
from .common.op import wrap_triton


@triton.jit
def place_of(i, rows, columns):
    """Where the element lies whose byte is the result's i-th, each sample of which is the transpose of rows × columns elements."""
    sample = i // (rows * columns)
    within = i - sample * (rows * columns)
    column = within // rows
    return sample * (rows * columns) + (within - column * rows) * columns + column


@triton.jit(do_not_specialize=["rows", "columns"])
def to_uint8_kernel(out, x, count, rows, columns, TRANSPOSES: tl.constexpr, WIDE: tl.constexpr, E: tl.constexpr):
    R: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    begin, element, inside = flat_elements(tl.program_id(0), count, E)
    if TRANSPOSES:
        # a division of 64 bits takes some hundred instructions
        i = begin + element if WIDE else begin.to(tl.int32) + element
        value = tl.load(x + place_of(i, rows, columns), mask=inside)
    else:
        value = tl.load(x + begin + element, mask=inside)
    tl.store(out + begin + element, byte_of_value(value.to(R)), mask=inside)


def _run(x, out, channels_last):
    """Into `out`, which is channels-last or contiguous."""
    from_channels_last = dispatch.is_channels_last(x)
    x = op.operand(x, x, from_channels_last)
    count, rows, columns = x.numel(), 1, 1
    transposes = from_channels_last != channels_last
    if transposes:
        channels, spatial = x.shape[1], math.prod(x.shape[2:])
        rows, columns = (channels, spatial) if channels_last else (spatial, channels)
    tile = op.flat_tile(count, (x,))
    op.launch(
        wrap_triton(to_uint8_kernel),
        *(triton.cdiv(count, tile), x, out, x, count, rows, columns),
        TRANSPOSES=transposes,
        WIDE=count >= 2**31 - tile,
        E=tile,
    )


def to_uint8(o, channels_last):
    if channels_last and o.x.dim() < 3:
        raise RuntimeError(f"channels_last: expected shape (B, C, ...) of x, got {tuple(o.x.shape)}")
    out = op.empty_like(o.x, torch.uint8, channels_last=channels_last)
    _run(o.x, out, dispatch.is_channels_last(out))
    return out


def to_uint8_out(o, out):
    x = o.x
    if out.dim() != x.dim() or out.device != x.device or out.dtype != torch.uint8:
        raise RuntimeError(f"out: expected uint8 on {x.device} of shape {tuple(x.shape)}, got {out.dtype}, {tuple(out.shape)}")
    torch._check(out.shape == x.shape, lambda: f"out: expected shape {tuple(x.shape)}, got {tuple(out.shape)}")
    channels_last = dispatch.is_channels_last(out)
    if channels_last or out.is_contiguous():
        return _run(x, out, channels_last)
    own = op.empty_like(x, torch.uint8, channels_last=False)
    _run(x, own, False)
    out.copy_(own)
