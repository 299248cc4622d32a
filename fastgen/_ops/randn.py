"""What a seed denotes, and torch's own noise: public functions, eager reference, fakes. Nothing to differentiate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._core import checks, dispatch, rng, torch_noise


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


def torch_randn(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
) -> torch.Tensor:
    """`torch.randn(shape, generator=generator, dtype=dtype, device=device)`, on the CPU faster: the same numbers, bit for bit, and
    the generator is left in the same state.

    Args:
        shape: (B, *event), a sequence of ints.
        generator: a `torch.Generator`; torch's default one of the device if None.
        dtype: float16, bfloat16, float32 or float64; torch's default dtype if None.
        device: where; that of the generator if None, or without one torch's default device.

    Where the numbers are made by fastgen's kernel: on the CPU, of float32, float16 and bfloat16, from 512 elements on, as far as
    the kernel's numbers were found to be those of the running torch; `fastgen.backend_info()` says whether they were. Anything
    else calls torch.randn. Draws from one generator by several threads at a time take different numbers, like torch's; beside a
    torch.randn of another thread from the same generator that is all but certain, since torch's lock cannot be had from outside.

    Returns a contiguous tensor. Raises TypeError or ValueError naming the argument.

    Source: Matsumoto & Nishimura 1998 (mt19937); Box & Muller 1958; the arithmetic is ATen's.
    """
    shape = checks.shape(shape)
    dtype = checks.floating_dtype(torch.get_default_dtype() if dtype is None else dtype)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    device = generator.device if device is None and generator is not None else checks.device(device)
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device}, got one on {generator.device}")
    return torch_noise.randn(shape, generator, dtype, device)


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(shape, seeds, seed, offset, dtype, device):
    """The contract in plain PyTorch."""
    return rng.normals(shape, seeds, seed, offset, device, dtype)


# ---- fakes ----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("randn")
def _fake(out, operands):
    return None


@dispatch.register_fake("torch_randn")
def _fake_torch_randn(out, states, fused):
    return None


@dispatch.register_fake("torch_skip")
def _fake_torch_skip(states, words):
    return None
