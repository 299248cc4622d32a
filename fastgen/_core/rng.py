"""The random-number contract: noise is a pure function of (seed, offset, sample, element).

With j the element's index inside its sample in row-major order and b the sample's index (0 where every sample has a seed of
its own),

    key     = (seed mod 2³², seed div 2³²)                              from the seed's 64-bit two's complement
    counter = (j div 4, b, offset mod 2³², offset div 2³²)
    r0…r3   = Philox4x32-10(counter, key)                               Salmon et al., SC'11
    u = (r0 + ½)·2⁻³²,  φ = 2π·r1·2⁻³²,  z0 = √(−2 ln u)·cos φ,  z1 = √(−2 ln u)·sin φ;  r2, r3 give z2, z3
    z = z_{j mod 4}

This file has the contract in plain PyTorch (what the eager backend uses and any device runs) and the choice between the
`noise=`, `seed=` and `generator=` arguments. csrc/common/philox.h and csrc/common/normal.h say the same in C++.
"""

from __future__ import annotations

import math
import threading
from typing import overload

import torch

from . import checks, torch_cuda, torch_noise
from .dispatch import dispatch_modes, functorch_is_active
from .tables import plain_tensors

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter, key):
    """Philox4x32-10 on int64 tensors that hold 32-bit words: 4 counter words and 2 key words to 4 random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def _product(c, m):
    """High and low word of c·m, with m odd."""
    if checks.values_are_hidden():
        # what leaves int64 is undefined in the C++ that Inductor writes, and was miscompiled; this is c·m − (m div 2)·2³²
        p = (c - 2**31) * m + 2**31
        return (p >> 32) + (m >> 1), p & _MASK
    p = c * m  # wraps to the right 64 bits; the mask undoes the arithmetic shift
    return p >> 32 & _MASK, p & _MASK


def normals(shape, seeds, seed, offset, device, dtype):
    """The contract's normals of shape (B, *event), computed in float64 and cast to `dtype` once.

    `seeds` is an int64 tensor of one element or of B elements, or None, and `seed` the int used then. `offset` is an int or
    an int64 tensor of shape (B,).
    """
    batch, event = shape[0], math.prod(shape[1:])
    r0, r1, r2, r3 = _words(batch, (event + 3) // 4, seeds, seed, offset, device)
    pairs = (_box_muller(r0, r1), _box_muller(r2, r3))
    z = torch.stack([*pairs[0], *pairs[1]], dim=-1)
    return z.reshape(batch, 4 * r0.shape[1])[:, :event].reshape(shape).to(dtype).contiguous()


SEEDS_OFFSET = 1 << 62  # far from the offsets of all noise


def more_seeds(count, batch, seeds, seed, device):
    """(count, batch) seeds made from those of the samples: r0 + 2³²·r1 of the words of group k at an offset of their own."""
    r0, r1, _, _ = _words(batch, count, seeds, seed, SEEDS_OFFSET, device)
    return (r0 + torch.where(r1 < 2**31, r1, r1 - 2**32) * 2**32).T.contiguous()


def _words(batch, count, seeds, seed, offset, device):
    """r0 … r3 of the groups 0 … count−1 of each sample, (batch, count) each."""
    groups = torch.arange(count, dtype=torch.int64, device=device)
    samples = torch.arange(batch, dtype=torch.int64, device=device)
    if seeds is None:
        seeds = torch.full((1,), seed, dtype=torch.int64, device=device)
    elif seeds.numel() == batch:
        samples = torch.zeros_like(samples)
    seeds = seeds.reshape(-1, 1).to(device)
    if not isinstance(offset, torch.Tensor):
        offset = torch.full((1,), offset, dtype=torch.int64, device=device)
    offset = offset.reshape(-1, 1)
    return philox4x32(
        (groups & _MASK, samples.unsqueeze(1), offset & _MASK, offset >> 32 & _MASK),
        (seeds & _MASK, seeds >> 32 & _MASK),
    )


def _box_muller(r0, r1):
    # MPS has no float64
    real = torch.float32 if r0.device.type == "mps" else torch.float64
    radius = torch.sqrt(-2.0 * torch.log((r0.to(real) + 0.5) * 2.0**-32))
    angle = r1.to(real) * (2.0 * math.pi * 2.0**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def draw_seed(device: torch.device) -> tuple[torch.Tensor, None] | tuple[None, int]:
    """A 63-bit seed from torch's default CPU generator, so that `torch.manual_seed` governs it: (tensor, None) or (None, int).

    In a traced program it is a tensor in the graph, drawn anew at every call, and under vmap(randomness="different") a tensor with
    a seed for each call that is mapped. Raises RuntimeError during CUDA-graph capture.
    """
    if checks.values_are_hidden():
        # on the data's device: of a host tensor a CUDA graph would record the value, and every replay give the same noise
        return _seed_tensor(device), None
    if capturing(device):
        raise RuntimeError(
            "seed: expected an int64 tensor on the device during CUDA-graph capture, got none; a seed drawn on the host would "
            "be frozen into the graph, so pass seed=tensor and advance it on the device between replays"
        )
    try:
        return None, random_seed(None)
    except RuntimeError:  # of vmap, where one number cannot stand for different ones, or where nothing random is allowed
        if not functorch_is_active():
            raise
        return _seed_tensor(device), None  # in the latter case refused again, in torch's words


def drawn_seed(device: torch.device) -> int | torch.Tensor:
    """The same as what `seed=` takes: an int, or a tensor of one element."""
    drawn = draw_seed(device)
    return drawn[1] if drawn[0] is None else drawn[0]


def _seed_tensor(device: torch.device):
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Whether what is launched on `device` now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def random_seed(generator: torch.Generator | None) -> int:
    """63 random bits of a generator on the CPU, by default torch's."""
    if dispatch_modes() or functorch_is_active():  # which may not let an older tensor in
        return torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator).item()  # pyright: ignore[reportReturnType]  # of int64
    draw, drawn = scratch.bits
    if generator is None:
        draw()
    else:
        draw(generator=generator)
    return drawn()


class _Scratch(threading.local):
    """A place for random bits, for each thread: to allocate one takes longer (1.4 µs) than to draw. NumPy reads it in a third of
    the time that Tensor.item takes."""

    def __init__(self):
        with plain_tensors():
            bits = torch.empty((), dtype=torch.int64, device="cpu")
        self.bits = bits.random_, bits.numpy().item


scratch = _Scratch()


@overload
def check_seed(seed: torch.Tensor, batch: int, device) -> tuple[torch.Tensor, None]: ...
@overload
def check_seed(seed: int, batch: int, device) -> tuple[None, int]: ...
def check_seed(seed, batch: int, device):
    """(tensor, None) for an int64 tensor of 1 or `batch` elements, (None, int) for an int, as the kernels take them."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int or an int64 tensor, got dtype {checks._dtype(seed.dtype)}")
        if seed.dim() > 1 or seed.numel() not in (1, batch):
            raise ValueError(f"seed: expected 1 element or shape ({batch},), one seed per sample, got {tuple(seed.shape)}")
        if seed.device == device:
            return seed.contiguous(), None
        if seed.device.type != "cpu":
            raise ValueError(f"seed: expected a tensor on {device} like the data or on the CPU, got one on {seed.device}")
        if torch.compiler.is_compiling():
            return seed.to(device), None
        if capturing(device):
            raise ValueError(
                f"seed: expected a tensor on {device} during CUDA-graph capture, got one on the CPU, which the graph would freeze"
            )
        # one host value is read where it lies, which costs no synchronisation; more are read before this returns, pinned or not
        return (seed if seed.numel() == 1 else seed.to(device)), None
    return None, check_seed_int("seed", seed, "an int or an int64 tensor")


def check_seed_int(name: str, seed, expected: str) -> int:
    """The int64 that has the 64 bits of `seed`."""
    seed = checks.integer(name, seed, expected)
    if not torch.compiler.is_compiling() and not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name}: expected a 64-bit int, -2**63 … 2**64-1, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def check_offset(offset) -> int:
    offset = checks.integer("offset", offset)
    if offset < 0 or offset >= 2**63:
        raise ValueError(f"offset: expected an int within 0 … 2**63-1, got {offset}")
    return offset


def check_generator(generator, device) -> None:
    if isinstance(generator, torch_cuda.TorchCudaGenerator):
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or fastgen.TorchCudaGenerator, got {type(generator).__name__}")
    if generator.device.type not in (device.type, "cpu"):
        raise ValueError(f"generator: expected one on {device} or on the CPU, got one on {generator.device}")


def noise_source(x_name, x, dtype, noise, seed, generator):
    """(noise, seeds, seed) as the kernels take them, from at most one of the three arguments; a fresh seed with none.

    That `noise` fits x is left to the caller.
    """
    if noise is not None:
        if seed is not None or generator is not None:
            raise ValueError(_several(noise, seed, generator))
        if not isinstance(noise, torch.Tensor):
            raise TypeError(f"noise: expected a tensor, got {type(noise).__name__}")
        return noise, None, None
    if seed is not None:
        if generator is not None:
            raise ValueError(_several(noise, seed, generator))
        seeds, seed = check_seed(seed, x.shape[0], x.device)
        return None, seeds, seed
    if generator is not None:
        check_generator(generator, x.device)
        if isinstance(generator, torch_cuda.TorchCudaGenerator):
            return generator.randn(x.shape, dtype=dtype, device=x.device), None, None
        z = torch_noise.randn(x.shape, generator, dtype, generator.device)
        return z.to(x.device), None, None
    seeds, seed = draw_seed(x.device)
    return None, seeds, seed


def _several(noise, seed, generator) -> str:
    given = [name for name, value in (("noise", noise), ("seed", seed), ("generator", generator)) if value is not None]
    return f"noise, seed, generator: expected at most one, got {' and '.join(given)}"
