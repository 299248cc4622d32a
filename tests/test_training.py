"""How models are trained: on several processes, in mixed precision, with gradients scaled or accumulated."""

import subprocess
import sys
from pathlib import Path

import distributed_training
import pytest
import torch
from conftest import assert_same
from torch import nn
from torch.nn import functional as F

import fastgen

pytestmark = pytest.mark.usefixtures("one_thread")
WORKER = Path(distributed_training.__file__)
NO_GLOO = not (torch.distributed.is_available() and torch.distributed.is_gloo_available())


@pytest.mark.skipif(NO_GLOO, reason="this torch has no gloo")
@pytest.mark.parametrize("world_size", [2])
def test_training_does_not_depend_on_the_number_of_processes(world_size, tmp_path):
    """Two processes under DistributedDataParallel end with the weights of one, to the rounding of float64: the noise of a sample is
    that of its own seed, wherever it lies in whichever batch."""
    files = [tmp_path / f"{rank}.pt" for rank in range(world_size)]
    command = [sys.executable, str(WORKER)]
    arguments = [[str(rank), str(world_size), str(tmp_path / "store"), str(file)] for rank, file in enumerate(files)]
    running = [subprocess.Popen([*command, *a], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for a in arguments]
    alone = distributed_training.train()
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    results = [torch.load(file) for file in files]
    assert_same(torch.cat([result["x_t"] for result in results], dim=1), alone["x_t"])
    for name, value in alone["weights"].items():
        for result in results:
            torch.testing.assert_close(result["weights"][name], value, rtol=1e-9, atol=1e-12, msg=name)
    shares = torch.tensor([result["losses"] for result in results])
    torch.testing.assert_close(shares.mean(0), torch.tensor(alone["losses"]))
    assert not torch.equal(shares[0], shares[1])


def batch(schedule, step, device, size=16):
    """x0, the timesteps and a seed for each sample."""
    generator = torch.Generator().manual_seed(step)
    x0 = torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1
    t = torch.randint(len(schedule), (size,), generator=generator)
    return x0.to(device), t.to(device), (torch.arange(size) + step * size).to(device)


def network(device):
    """Of linear layers: half-precision convolutions are slow on a CPU."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.Unflatten(1, (1, 8, 8))
    return nn.Sequential(*layers).to(device)


def test_mixed_precision_training(device, schedule):
    """Under autocast the network's output is bfloat16 and the loss float32; the curve stays with that of float32."""
    curves = []
    for enabled in (False, True):
        model = network(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for step in range(25):
            x0, t, seeds = batch(schedule, step, device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                m = model(fastgen.q_sample(x0, t, schedule, seed=seeds))
                loss = fastgen.diffusion_loss(m, x0, t, schedule, seed=seeds)
            assert m.dtype == (torch.bfloat16 if enabled else torch.float32) and loss.dtype == torch.float32
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-5:].mean() < 0.9 * curves[0][:5].mean()
    torch.testing.assert_close(curves[1], curves[0], rtol=0.05, atol=0)
    assert not torch.equal(curves[1], curves[0])


def test_scaled_gradients(device, schedule):
    """What a GradScaler does: a loss times 2¹⁶ has gradients times 2¹⁶, bit for bit."""
    gradients = []
    for scale in (1.0, 2.0**16):
        model = network(device)
        x0, t, seeds = batch(schedule, 0, device)
        m = model(fastgen.q_sample(x0, t, schedule, seed=seeds))
        (fastgen.diffusion_loss(m, x0, t, schedule, seed=seeds) * scale).backward()
        gradients.append([p.grad / scale for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_same(a, b)


def test_accumulated_gradients(device, schedule):
    """Micro-batches of a batch give its gradient: the same samples have the same noise."""
    gradients = []
    for parts in ([slice(0, 16)], [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 16)]):
        model = network(device).double()
        x0, t, seeds = batch(schedule, 0, device)
        for part in parts:
            x = x0[part].double()
            m = model(fastgen.q_sample(x, t[part], schedule, seed=seeds[part]))
            (fastgen.diffusion_loss(m, x, t[part], schedule, seed=seeds[part]) / len(parts)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_fused_training_is_that_by_hand(device, schedule):
    """Ten steps beside F.mse_loss on a stored noise tensor: the same losses to rounding."""
    curves = []
    for fused in (True, False):
        model = network(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for step in range(10):
            x0, t, seeds = batch(schedule, step, device)
            if fused:
                m = model(fastgen.q_sample(x0, t, schedule, seed=seeds))
                loss = fastgen.diffusion_loss(m, x0, t, schedule, seed=seeds)
            else:
                noise = fastgen.randn(x0.shape, seed=seeds, device=device)
                bar = torch.tensor(schedule.alphas_cumprod, device=device, dtype=torch.float32)[t].reshape(-1, 1, 1, 1)
                loss = F.mse_loss(model(bar.sqrt() * x0 + (1 - bar).sqrt() * noise), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    torch.testing.assert_close(*curves, rtol=1e-5, atol=0)
    assert curves[0].std() > 1e-3
