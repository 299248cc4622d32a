"""What a seed denotes: public function, eager reference, fake. Nothing to differentiate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._core import checks, dispatch, rng


def randn(
    shape: Sequence[int],
    *,
    seed: int | torch.Tensor,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
) -> torch.Tensor:
    """Standard normal noise as a pure function of (seed, offset, sample, element): the contract of random numbers,
    docs/random_numbers.md.

    The same on every backend and device up to rounding, and independent of batch size with one seed per sample:
    `randn((B, *event), seed=seeds)[i]` equals `randn((1, *event), seed=seeds[i:i+1])[0]`.

    Args:
        shape: (B, *event), a sequence of ints.
        seed: int, or int64 tensor of 1 element (one stream for the batch) or of B elements (one per sample).
        offset: int within 0 … 2⁶³−1. Reverse steps use t, the initial x_T uses T, `q_sample` uses 0 unless told.
        dtype: float16, bfloat16, float32 or float64; torch's default dtype if None.
        device: where; torch's default device if None.

    Returns a contiguous tensor. Float32 and half precision compute in float32, float64 in float64.
    Raises TypeError or ValueError naming the argument.

    Source: Salmon et al. 2011 (Philox4x32-10); Box & Muller 1958.
    """
    shape = checks.shape(shape)
    dtype = checks.floating_dtype(torch.get_default_dtype() if dtype is None else dtype)
    device = checks.device(device)
    seeds, one_seed = rng.check_seed(seed, shape[0], device)
    offset = rng.check_offset(offset)
    backend = dispatch.backend_for(device)
    if backend == "eager":
        return reference(shape, seeds, one_seed, offset, dtype, device)
    out = torch.empty(shape, dtype=dtype, device=device)
    dispatch.op("randn", backend)(out, seeds, one_seed, offset)
    return out


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(shape, seeds, seed, offset, dtype, device):
    """The contract in plain PyTorch."""
    return rng.normals(shape, seeds, seed, offset, device, dtype)


# ---- fake -----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("randn")
def _fake(out, operands):
    return None
