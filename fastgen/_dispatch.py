"""What every op's Python side shares: calling the compiled op, storing into out=, gathering rows, registering fakes."""

from __future__ import annotations

import torch

from . import _backend, _checks


def call(op, arguments, table):
    """torch.ops.fastgen.<op>, with its report of a timestep outside the table as a ValueError."""
    try:
        return OPS[op](*arguments)
    except RuntimeError as error:
        raise _checks.translated(error, table) from None


def call_out(op, arguments, out, table):
    """torch.ops.fastgen.<op>_out, which writes to `out`; an `out` of another layout than the data is copied into."""
    try:
        OPS[op + "_out"](*arguments, out=out)
    except RuntimeError as error:
        raise _checks.translated(error, table) from None
    return out


def stored(result, out):
    return result if out is None else out.copy_(result)


def gathered(rows, t, index, dim):
    """The columns of each sample's row, shaped to broadcast against (B, *event); NaN for a timestep outside the table."""
    if t is None:
        return rows[index].unbind()
    inside = (t >= 0) & (t < rows.shape[0])
    row = torch.where(inside.unsqueeze(1), rows[t.clamp(0, rows.shape[0] - 1)], torch.nan)
    return row.reshape(t.shape[0], -1, *[1] * (dim - 1)).unbind(1)


def with_noise(y, sigma, noise):
    """y + sigma · noise; where sigma is 0 the noise is not looked at, were it infinite or NaN."""
    if noise is None:
        return y
    return torch.where(sigma == 0, y, y + sigma * noise.to(y.dtype))


def empty_like(x, dtype=None):
    """What a compiled op allocates: the layout of `x` if that is dense with the batch outermost and the channels either in
    their place or innermost, else contiguous."""
    if x.is_contiguous() or not is_channels_last(x):
        return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device)


def is_channels_last(x) -> bool:
    return x.dim() >= 3 and x.permute(0, *range(2, x.dim()), 1).is_contiguous()


def register_fakes(ops, fake):
    """The fakes of <op> and, where it has one, <op>_out, whose result is its argument `out`."""
    if not _backend.HAS_OPS:
        return
    for op in ops:
        torch.library.register_fake(f"fastgen::{op}", fake)
        OPS[op] = getattr(torch.ops.fastgen, op).default
        if hasattr(torch.ops.fastgen, op + "_out"):
            torch.library.register_fake(f"fastgen::{op}_out", lambda *arguments, **out: None)
            OPS[op + "_out"] = getattr(torch.ops.fastgen, op + "_out").default


OPS = {}
