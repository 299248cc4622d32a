"""The U-Net of DDPM (Ho et al. 2020, appendix B): ε_θ(x_t, t), sized by its arguments."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F


class UNet(nn.Module):
    """A denoising network m = f(x, t) of the shape of x:

        conv → levels of residual blocks, halving the resolution between levels → middle (block, attention, block)
             → the levels in reverse, doubling it, each block fed the matching activation of the way down → norm, SiLU, conv

    Level i has `base_channels · channel_multipliers[i]` channels at resolution `image_size / 2^i`. Every residual block is
    shifted by an MLP of the sinusoidal embedding of t. Blocks at `attention_resolution` are followed by self-attention.

    Args:
        in_channels: C of x.
        out_channels: of the result; in_channels if None. Give 2·C for a learned variance.
        base_channels: channels at full resolution, a multiple of `groups`; the embedding of t has 4 times as many.
        channel_multipliers: one factor per level.
        blocks: residual blocks per level on the way down; the way up has one more.
        attention_resolution: one of the levels' resolutions; the lowest if None.
        image_size: height and width of x, divisible by 2^(levels − 1).
        dropout: probability inside the residual blocks.
        groups: of every group normalisation.

    forward(x, t): x (B, in_channels, image_size, image_size), t int64 (B,) → (B, out_channels, image_size, image_size).

    The output layer, and the last layer of every residual branch, start at zero: an untrained network returns 0, and each
    block starts as the identity. Raises ValueError or TypeError naming the argument.

    Source: Ho et al. 2020, appendix B and its released code.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int | None = None,
        base_channels: int = 32,
        channel_multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        attention_resolution: int | None = None,
        image_size: int = 8,
        dropout: float = 0.0,
        groups: int = 8,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        counts = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "base_channels": base_channels,
            "blocks": blocks,
            "image_size": image_size,
            "groups": groups,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}: expected an int ≥ 1, got {value!r}")
        if not channel_multipliers or min(channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers: expected ints ≥ 1, got {channel_multipliers!r}")
        if base_channels % groups or base_channels % 2:
            raise ValueError(f"base_channels: expected an even multiple of groups={groups}, got {base_channels}")
        levels = len(channel_multipliers)
        if image_size % 2 ** (levels - 1):
            raise ValueError(f"image_size: expected a multiple of {2 ** (levels - 1)} for {levels} levels, got {image_size}")
        resolutions = [image_size >> level for level in range(levels)]
        attention_resolution = resolutions[-1] if attention_resolution is None else attention_resolution
        if attention_resolution not in resolutions:
            raise ValueError(f"attention_resolution: expected one of {resolutions}, got {attention_resolution}")
        self.in_channels, self.out_channels, self.image_size = in_channels, out_channels, image_size

        embedding = 4 * base_channels
        self.embed = nn.Sequential(nn.Linear(base_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        def stage(inner, outer, resolution):
            return _Stage(inner, outer, embedding, dropout, groups, attention=resolution == attention_resolution)

        self.head = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        channels = base_channels
        skips = [channels]
        self.down = nn.ModuleList()
        for resolution, multiplier in zip(resolutions, channel_multipliers, strict=True):
            for _ in range(blocks):
                self.down.append(stage(channels, base_channels * multiplier, resolution))
                channels = base_channels * multiplier
                skips.append(channels)
            if resolution != resolutions[-1]:
                self.down.append(_Downsample(channels))
                skips.append(channels)
        self.middle = nn.ModuleList(
            [
                _Stage(channels, channels, embedding, dropout, groups, attention=True),
                _Stage(channels, channels, embedding, dropout, groups, attention=False),
            ]
        )
        self.up = nn.ModuleList()
        for resolution, multiplier in zip(reversed(resolutions), reversed(channel_multipliers), strict=True):
            for _ in range(blocks + 1):
                self.up.append(stage(channels + skips.pop(), base_channels * multiplier, resolution))
                channels = base_channels * multiplier
            if resolution != resolutions[0]:
                self.up.append(_Upsample(channels))
        self.tail = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), _zeroed(nn.Conv2d(channels, out_channels, 3, padding=1))
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        expected = (self.in_channels, self.image_size, self.image_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x: expected shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        if t.dtype != torch.int64:
            raise TypeError(f"t: expected an int64 tensor, got {t.dtype}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t: expected shape ({x.shape[0]},), one timestep per sample, got {tuple(t.shape)}")
        first = cast(nn.Linear, self.embed[0])
        sinusoids = _sinusoids(t, first.in_features).to(first.weight.dtype)
        embedding = F.silu(self.embed(sinusoids))
        x = self.head(x)
        skips = [x]
        for layer in self.down:
            x = layer(x, embedding)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, embedding)
        for layer in self.up:
            if isinstance(layer, _Stage):
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, embedding)
        return self.tail(x)


def _sinusoids(t: torch.Tensor, channels: int) -> torch.Tensor:
    """(B,) ↦ (B, channels): sin(t·f_i) and cos(t·f_i) with f_i falling geometrically from 1 to 10⁻⁴.

    In float32 whatever the network computes in: half precision cannot tell t = 999 from t = 1000.
    """
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / max(half - 1, 1)
    angles = t.unsqueeze(1).float() * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class _Stage(nn.Module):
    """A residual block, followed by self-attention where asked for.

    y = shortcut(x) + conv(dropout(silu(norm(conv(silu(norm(x))) + W·embedding))))
    """

    def __init__(self, inner: int, outer: int, embedding: int, dropout: float, groups: int, attention: bool):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(groups, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.shift = nn.Linear(embedding, outer)
        self.second = nn.Sequential(
            nn.GroupNorm(groups, outer), nn.SiLU(), nn.Dropout(dropout), _zeroed(nn.Conv2d(outer, outer, 3, padding=1))
        )
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)
        self.attention = _Attention(outer, groups) if attention else nn.Identity()

    def forward(self, x, embedding):
        h = self.first(x) + self.shift(embedding)[:, :, None, None]
        return self.attention(self.shortcut(x) + self.second(h))


class _Attention(nn.Module):
    """Single-head self-attention over the pixels, residual: x + W·softmax(qᵀk/√C)·v."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # (B, pixels, C) each
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.project(h.transpose(1, 2).reshape(x.shape))


class _Downsample(nn.Conv2d):
    """A convolution of stride 2; takes the embedding as every layer on the way does, and ignores it."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, embedding):
        return super().forward(x)


class _Upsample(nn.Conv2d):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x, embedding):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
