"""The reference networks: shapes, gradients to every parameter, argument errors."""

import subprocess
import sys

import pytest
import torch

from fastgen.models import Discriminator, Generator, UNet
from fastgen.models.unet import _sinusoids


@pytest.fixture(autouse=True)
def _seeded_on_one_thread():
    """So small networks gain nothing from a second thread, and on a busy machine wait for it most of the time."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def perturbed(network):
    """The network with every parameter moved: its zero-initialised layers would stop all gradients before them."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def assert_every_parameter_has_a_gradient(network):
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


def test_importing_fastgen_does_not_import_the_models():
    code = "import sys, fastgen; assert 'fastgen.models' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- U-Net ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (1, {}),
        (3, {"out_channels": 6}),  # a learned variance
        (1, {"channel_multipliers": (1,)}),
        (1, {"channel_multipliers": (1, 2, 3, 1), "blocks": 2}),
        (2, {"image_size": 12, "channel_multipliers": (2, 1), "attention_resolution": 12, "groups": 4}),
        (1, {"image_size": 1, "channel_multipliers": (1,), "dropout": 0.5}),
    ],
)
def test_unet_shapes(channels, options):
    network = UNet(channels, base_channels=8, **options)
    size = options.get("image_size", 8)
    y = network(torch.randn(3, channels, size, size), torch.tensor([0, 5, 999]))
    assert y.shape == (3, options.get("out_channels", channels), size, size)
    assert torch.all(y == 0)  # as an untrained network returns
    assert perturbed(network)(torch.randn(3, channels, size, size), torch.tensor([0, 5, 999])).abs().max() > 0


def test_unet_gradients_reach_every_parameter():
    # at least two channels per group: alone in its group, a channel would have its bias normalised away
    network = perturbed(UNet(2, base_channels=8, groups=4))
    x = torch.randn(4, 2, 8, 8, requires_grad=True)
    network(x, torch.tensor([0, 1, 500, 999])).square().sum().backward()
    assert_every_parameter_has_a_gradient(network)
    assert x.grad.abs().max() > 0


def test_unet_treats_samples_apart_and_tells_timesteps_apart():
    network = perturbed(UNet(1, base_channels=8)).double().eval()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64).repeat(3, 1, 1, 1)
    with torch.no_grad():
        y = network(x, torch.tensor([998, 999, 998]))
        alone = network(x[1:2], torch.tensor([999]))
    torch.testing.assert_close(y[1:2], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(y[0], y[2], rtol=0, atol=1e-10)
    assert (y[0] - y[1]).abs().max() > 1e-4


def test_unet_in_bfloat16_still_tells_neighbouring_timesteps_apart():
    network = perturbed(UNet(1, base_channels=8)).bfloat16().eval()
    y = network(torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16), torch.tensor([998, 999]))
    assert y.dtype == torch.bfloat16
    assert not torch.equal(y[0], y[1])


def test_sinusoids_are_the_formula():
    t = torch.tensor([0, 1, 999])
    f = torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4], dtype=torch.float64)
    expected = torch.cat([torch.sin(t[:, None] * f), torch.cos(t[:, None] * f)], dim=1)
    # an angle of 999 has a spacing of 6e-5 in float32
    torch.testing.assert_close(_sinusoids(t, 8).double(), expected, rtol=0, atol=2e-4)
    assert _sinusoids(t, 2).shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 6, "channel_multipliers": (1, 2, 4)}, "image_size: expected a multiple of 4 for 3 levels, got 6"),
        ({"base_channels": 12}, "base_channels: expected an even multiple of groups=8, got 12"),
        ({"base_channels": 3, "groups": 3}, "base_channels: expected an even multiple"),
        ({"attention_resolution": 2}, r"attention_resolution: expected one of \[8, 4\], got 2"),
        ({"channel_multipliers": ()}, "channel_multipliers: expected ints ≥ 1"),
        ({"channel_multipliers": (1, 0)}, "channel_multipliers: expected ints ≥ 1"),
        ({"blocks": 0}, "blocks: expected an int ≥ 1, got 0"),
        ({"in_channels": 0}, "in_channels: expected an int ≥ 1, got 0"),
        ({"out_channels": 0}, "out_channels: expected an int ≥ 1, got 0"),
    ],
)
def test_unet_refuses_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**options)


def test_unet_refuses_inputs_that_do_not_fit():
    network, t = UNet(1, base_channels=8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 1, 8, 8\), got \(2, 1, 8, 4\)"):
        network(torch.zeros(2, 1, 8, 4), t)
    with pytest.raises(ValueError, match=r"t: expected shape \(2,\), one timestep per sample, got \(1,\)"):
        network(torch.zeros(2, 1, 8, 8), t[:1])
    with pytest.raises(TypeError, match="t: expected an int64 tensor, got torch.float32"):
        network(torch.zeros(2, 1, 8, 8), t.float())


# ---- DCGAN ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16), (2, 64)])
def test_dcgan_shapes_and_gradients(channels, size):
    generator, discriminator = Generator(6, channels, 4, size), Discriminator(channels, 4, size)
    fake = generator(torch.randn(5, 6))
    assert fake.shape == (5, channels, size, size)
    assert fake.abs().max() <= 1
    logits = discriminator(fake)
    assert logits.shape == (5, 1)
    logits.square().sum().backward()
    assert_every_parameter_has_a_gradient(generator)
    assert_every_parameter_has_a_gradient(discriminator)


@pytest.mark.parametrize("size", [4, 7, 12, 0])
def test_dcgan_refuses_sizes_that_are_no_power_of_two(size):
    for make in (lambda: Generator(image_size=size), lambda: Discriminator(image_size=size)):
        with pytest.raises(ValueError, match=f"image_size: expected a power of two ≥ 8, got {size}"):
            make()


def test_dcgan_refuses_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="latent_dim: expected an int ≥ 1, got 0"):
        Generator(latent_dim=0)
    with pytest.raises(ValueError, match=r"z: expected shape \(B, 6\), got \(5, 7\)"):
        Generator(6, base_channels=4)(torch.zeros(5, 7))
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 1, 8, 8\), got \(5, 1, 16, 16\)"):
        Discriminator(base_channels=4)(torch.zeros(5, 1, 16, 16))
