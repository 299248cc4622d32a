"""The DCGAN pair (Radford et al. 2016): a generator of transposed convolutions and a discriminator of strided ones."""

from __future__ import annotations

import torch
from torch import nn


class Generator(nn.Module):
    """G: latent z → image in [−1, 1].

        z → transposed conv to 4×4 → (batch norm, ReLU, transposed conv of stride 2) until image_size → tanh

    Args:
        latent_dim: L.
        channels: C of the image.
        base_channels: channels of the last hidden layer; each layer before it has twice as many.
        image_size: height and width, a power of two ≥ 8.

    forward(z): z (B, L) → (B, C, image_size, image_size). Weights start as N(0, 0.02²).

    Raises ValueError naming the argument. Source: Radford et al. 2016, section 3 and figure 1.
    """

    def __init__(self, latent_dim: int = 64, channels: int = 1, base_channels: int = 32, image_size: int = 8):
        super().__init__()
        widths = _widths(image_size, base_channels, latent_dim=latent_dim, channels=channels)[::-1]
        self.latent_dim = latent_dim
        # a bias before batch normalisation would be subtracted again
        layers = [nn.ConvTranspose2d(latent_dim, widths[0], 4, bias=False)]
        for inner, outer in zip(widths, widths[1:], strict=False):
            layers += [nn.BatchNorm2d(inner), nn.ReLU(), nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1)]
        self.layers = nn.Sequential(*layers, nn.Tanh())
        _initialise(self)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z: expected shape (B, {self.latent_dim}), got {tuple(z.shape)}")
        return self.layers(z[:, :, None, None])


class Discriminator(nn.Module):
    """D: image → logit of being real; σ(logit) is the probability D(x) of the GAN papers.

        conv of stride 2, LeakyReLU(0.2) → (conv of stride 2, batch norm, LeakyReLU) until 4×4 → conv to one number

    Args: as `Generator`; base_channels are those of the first layer, each layer after it has twice as many.

    forward(x): x (B, C, image_size, image_size) → logits (B, 1). Weights start as N(0, 0.02²).

    Raises ValueError naming the argument. Source: Radford et al. 2016, section 3.
    """

    def __init__(self, channels: int = 1, base_channels: int = 32, image_size: int = 8):
        super().__init__()
        widths = _widths(image_size, base_channels, channels=channels)
        self.shape = (channels, image_size, image_size)
        # no batch normalisation on the images themselves: the paper found it unstable
        layers = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for inner, outer in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(inner, outer, 4, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4), nn.Flatten())
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: expected shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return self.layers(x)


def _widths(image_size: int, base_channels: int, **counts: int) -> list[int]:
    """The channels at resolutions image_size/2, image_size/4, …, 4."""
    for name, value in {"base_channels": base_channels, **counts}.items():
        if value < 1:
            raise ValueError(f"{name}: expected an int ≥ 1, got {value!r}")
    if image_size < 8 or image_size & (image_size - 1):
        raise ValueError(f"image_size: expected a power of two ≥ 8, got {image_size!r}")
    return [base_channels << level for level in range(image_size.bit_length() - 3)]


def _initialise(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
