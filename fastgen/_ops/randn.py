"""What a seed denotes, by the contract or as torch has it on a CUDA GPU, and torch's own noise: public functions, eager reference,
fakes. Nothing to differentiate."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch

from .._core import checks, dispatch, rng, torch_cuda, torch_noise
from .._core.torch_cuda import TorchCudaGenerator

STREAMS = ("fastgen", "torch-cuda")


def randn(
    shape: Sequence[int],
    *,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    stream: Literal["fastgen", "torch-cuda"] = "fastgen",
    device_like: str | None = None,
    multiprocessors: int | None = None,
    threads_per_multiprocessor: int | None = None,
    generator: TorchCudaGenerator | None = None,
) -> torch.Tensor:
    """Standard normal noise as a pure function of (seed, offset, sample, element): the contract of random numbers,
    docs/random_numbers.md.

    The same on every backend and device up to rounding, and independent of batch size with one seed per sample:
    `randn((B, *event), seed=seeds)[i]` equals `randn((1, *event), seed=seeds[i:i+1])[0]`.

    With stream="torch-cuda" the numbers are, on any device, what torch draws on a CUDA GPU:

        torch.manual_seed(seed)
        torch.randn(shape, device="cuda")

    to some 1e-6, since a GPU's sine and cosine are approximations (1e-12 of float64). From more than
    256·multiprocessors·⌊threads_per_multiprocessor/256⌋ elements on (an H100's 270,336) they depend on the GPU, so it is named.

    Args:
        shape: (B, *event), a sequence of ints.
        seed: int, or int64 tensor of 1 element (one stream for the batch) or of B elements (one per sample; with "torch-cuda"
            sample i is `torch.randn((1, *event))` of a generator of its own, as diffusers draws with a list of them). Required
            unless `generator` is given.
        offset: int within 0 … 2⁶³−1. Reverse steps use t, the initial x_T uses T, `q_sample` uses 0 unless told. With "torch-cuda":
            how far the generator had come, `torch.Generator.get_offset()`, a multiple of 4; `TorchCudaGenerator` counts it.
        dtype: float16, bfloat16, float32 or float64; torch's default dtype if None.
        device: where the result is; torch's default device if None.
        stream: "fastgen", the contract, or "torch-cuda".
        device_like: for "torch-cuda", the name of the GPU: a key of `TorchCudaGenerator.CARDS`.
        multiprocessors, threads_per_multiprocessor: of the GPU instead, `multi_processor_count` and
            `max_threads_per_multi_processor` of `torch.cuda.get_device_properties`. With no GPU given, and the result on a CUDA
            GPU, they are that one's.
        generator: a `TorchCudaGenerator`, in place of seed, offset and the GPU; it moves on.

    Returns a contiguous tensor. Float32 and half precision compute in float32, float64 in float64.
    Raises TypeError or ValueError naming the argument; of "torch-cuda" also beyond 2³¹ bytes, where torch launches several kernels.

    Source: Salmon et al. 2011 (Philox4x32-10); Box & Muller 1958. Of "torch-cuda": DistributionTemplates.h of torch's
    ATen/native/cuda, the same from torch 2.10 to 2.14, and cuRAND's curand_normal.h.
    """
    shape = checks.shape(shape)
    dtype = checks.floating_dtype(torch.get_default_dtype() if dtype is None else dtype)
    device = checks.device(device)
    checks.option("stream", stream, STREAMS)
    gpu = {
        "device_like": device_like,
        "multiprocessors": multiprocessors,
        "threads_per_multiprocessor": threads_per_multiprocessor,
    }
    if generator is not None:
        _check_generator(generator, seed, offset, gpu)
        count = math.prod(shape)
        torch_cuda.check_size(count, dtype)
        begin = generator.taken(count, dtype, device)
        return _torch_cuda(shape, None, generator._seed, begin, generator._threads, dtype, device)
    if stream == "fastgen":
        for name, value in gpu.items():
            if value is not None:
                raise ValueError(f'{name}: expected None unless stream="torch-cuda", got {value!r}')
    if seed is None:
        raise TypeError("seed: expected an int or an int64 tensor, got None")
    seeds, one_seed = rng.check_seed(seed, shape[0], device)
    if stream == "torch-cuda":
        offset = torch_cuda.check_offset(offset)
        threads = torch_cuda.threads_of(*gpu.values(), device=device)
        torch_cuda.check_size(math.prod(shape[1:] if seeds is not None and seeds.numel() > 1 else shape), dtype)
        return _torch_cuda(shape, seeds, one_seed, offset, threads, dtype, device)
    offset = rng.check_offset(offset)
    backend = dispatch.backend_for(device)
    if backend == "eager":
        return reference(shape, seeds, one_seed, offset, dtype, device)
    out = torch.empty(shape, dtype=dtype, device=device)
    dispatch.op("randn", backend)(out, seeds, one_seed, offset)
    return out


def _check_generator(generator, seed, offset, gpu):
    if not isinstance(generator, TorchCudaGenerator):
        raise TypeError(f"generator: expected a fastgen.TorchCudaGenerator, got {type(generator).__name__}")
    for name, value in (("seed", seed), ("offset", offset or None), *gpu.items()):
        if value is not None:
            raise ValueError(f"generator, {name}: expected at most one, got both")


def _torch_cuda(shape, seeds, seed, offset, threads, dtype, device):
    backend = dispatch.backend_for(device)
    if backend == "eager":
        return torch_cuda_reference(shape, seeds, seed, offset, threads, dtype, device)
    out = torch.empty(shape, dtype=dtype, device=device)
    dispatch.op("randn_torch_cuda", backend)(out, seeds, seed, offset, threads)
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

    Where the numbers are made by fastgen's kernel: on the CPU, of float32, float16 and bfloat16, from 8192 elements on, as
    far as the kernel's numbers were found to be those of the running torch; `fastgen.backend_info()` says whether they were.
    Anything else calls torch.randn. Of several threads that draw from one generator docs/random_numbers.md tells.

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


def torch_cuda_reference(shape, seeds, seed, offset, threads, dtype, device):
    """torch's numbers on a CUDA GPU, in plain PyTorch: csrc/randn/randn.h. The words that cuRAND rounds to float32 are rounded so,
    and all else is computed in float64."""
    each = seeds is not None and seeds.numel() > 1
    samples, count = (shape[0], math.prod(shape[1:])) if each else (1, math.prod(shape))
    launch, turns = torch_cuda.launched(count, threads, dtype)
    index = functools.partial(torch.arange, dtype=torch.int64, device=device)
    if seeds is None:
        seeds = torch.full((1,), seed, dtype=torch.int64, device=device)
    seeds = seeds.reshape(-1, 1, 1).to(device)
    counter = offset // 4 + index(turns).reshape(-1, 1)
    words = rng.philox4x32(
        (counter & rng._MASK, counter >> 32 & rng._MASK, index(launch), torch.zeros_like(counter)),
        (seeds & rng._MASK, seeds >> 32 & rng._MASK),
    )
    make = _curand_doubles if dtype is torch.float64 else _curand_floats
    z = torch.stack(make(*words), dim=-2)  # (samples, turns, numbers of a thread, threads)
    return z.reshape(samples, math.prod(z.shape[1:]))[:, :count].reshape(shape).to(dtype).contiguous()


def _curand_floats(r0, r1, r2, r3):
    return [z for a, b in ((r0, r1), (r2, r3)) for z in _curand_pair(a, b)]


def _curand_pair(a, b):
    real = torch.float32 if a.device.type == "mps" else torch.float64  # MPS has no float64
    rounded = lambda x: x.to(torch.float32).to(real)  # noqa: E731
    two_pi = 6.283185482025146484375  # the float
    u = rounded(rounded(a) * 2.0**-32 + 2.0**-33)
    angle = rounded(rounded(b) * (two_pi * 2.0**-32) + two_pi * 2.0**-33)
    radius = torch.sqrt(-2.0 * torch.log(u))
    return torch.sin(angle) * radius, torch.cos(angle) * radius


def _curand_doubles(r0, r1, r2, r3):
    a, b = r0 ^ r1 << 21, r2 ^ r3 << 21
    u = a.to(torch.float64) * 2.0**-53 + 2.0**-54
    angle = math.pi * (b.to(torch.float64) * 2.0**-52 + 2.0**-53)
    radius = torch.sqrt(-2.0 * torch.log(u))
    return torch.sin(angle) * radius, torch.cos(angle) * radius


# ---- fakes ----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("randn", "randn_torch_cuda")
def _fake(out, operands, threads=None):
    return None


@dispatch.register_fake("torch_randn")
def _fake_torch_randn(out, states, fused):
    return None


@dispatch.register_fake("torch_skip")
def _fake_torch_skip(states, words):
    return None
