"""The diffusion ops under torch.func's transforms and forward-mode AD; bce_with_logits has its own tests of them."""

import pytest
import torch
from conftest import assert_close, normal
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastgen

T = [39, 0, 5, 17]
# of a schedule, data of shape (4, 5) and timesteps of shape (4,), differentiable
OPS = {
    "q_sample": lambda s, x, t: fastgen.q_sample(x, t, s, seed=3),
    "q_sample_seeds": lambda s, x, t: fastgen.q_sample(x, 7, s, seed=torch.arange(4, device=x.device)),
    "q_step_noise": lambda s, x, t: fastgen.q_step(x, t, s, noise=x.cos()),
    "q_posterior": lambda s, x, t: fastgen.q_posterior(x, x.sin(), t, s)[0],
    "ddpm_step": lambda s, x, t: fastgen.ddpm_step(x, x.sin(), t, s, seed=3),
    "ddpm_step_clip": lambda s, x, t: fastgen.ddpm_step(x, x.sin(), t, s, noise=x.cos(), clip=1.0, return_x0=True)[1],
    "ddpm_step_learned": lambda s, x, t: fastgen.ddpm_step(
        x.unsqueeze(1), torch.stack([x.sin(), x.cos()], 1), t, s, variance="learned", seed=5
    ),
    "ddim_step": lambda s, x, t: fastgen.ddim_step(x, x.sin(), 5, s, eta=0.5, seed=3, prediction="v_prediction"),
}


@pytest.mark.parametrize("function", OPS.values(), ids=OPS)
def test_transforms(device, schedule, function):
    xs, t = normal((3, 4, 5), 0, torch.float64, device), torch.tensor(T, device=device)
    op = lambda x: function(schedule, x, t)  # noqa: E731
    expected, gradients = [], []
    for x in xs:
        leaf = x.clone().requires_grad_()
        expected.append(op(leaf))
        gradients += torch.autograd.grad(expected[-1].square().sum(), leaf)
    expected, gradients = torch.stack(expected).detach(), torch.stack(gradients)
    assert_close(torch.vmap(op)(xs), expected, scale=50)
    gradient = torch.func.grad(lambda x: op(x).square().sum())
    assert_close(gradient(xs[0]), gradients[0], scale=50)
    assert_close(torch.vmap(gradient)(xs), gradients, scale=50)
    _, tangent = torch.func.jvp(lambda x: op(x).square().sum(), (xs[0],), (xs[1],))
    assert_close(tangent, (gradients[0] * xs[1]).sum(), scale=500)
    assert_close(torch.func.jacfwd(op)(xs[0]), torch.func.jacrev(op)(xs[0]), scale=50)
    assert_close(torch.autograd.functional.jacobian(op, xs[0], vectorize=True), torch.func.jacrev(op)(xs[0]), scale=50)


def test_vmap_over_timesteps_and_seeds(device, schedule):
    x, t = normal((3, 4, 5), 0, torch.float64, device), torch.tensor([T, T[::-1], T], device=device)
    seeds = torch.tensor([[1, 2, 3, 4], [5, 6, 7, -8], [9, 9, 9, 2**40]], device=device)
    step = lambda x, t, seed: fastgen.ddpm_step(x, x.sin(), t, schedule, seed=seed)  # noqa: E731
    expected = torch.stack([step(*arguments) for arguments in zip(x, t, seeds, strict=True)])
    assert_close(torch.vmap(step)(x, t, seeds), expected, scale=50)
    noise = lambda seed: fastgen.randn((4, 5), seed=seed, device=device, dtype=torch.float64)  # noqa: E731
    assert_close(torch.vmap(noise)(seeds), torch.stack([noise(seed) for seed in seeds]), scale=50)


def test_timesteps_outside_the_schedule_are_seen_through_vmap(device, schedule):
    x, t = normal((3, 4), 0, device=device), torch.tensor([[1, 2, 3, 4], [1, 2, 40, 4], [1, 2, 3, 4]], device=device)
    op = torch.vmap(lambda x, t: fastgen.q_sample(x, t, schedule, seed=1))
    if device.type == "cpu":
        with pytest.raises(ValueError, match="^t: expected timesteps within 0 … 39, got 40"):
            op(x, t)
    else:
        assert torch.equal(op(x, t).isnan(), t == 40)


def test_what_is_kept_for_later_calls_is_no_transform_s_tensor(device):
    """The coefficient table that a call inside torch.func.grad is the first to need."""
    schedule, x = fastgen.Schedule.linear(7), normal((3, 4), 0, device=device)
    torch.func.grad(lambda x: fastgen.diffusion_loss(x, x.detach(), 5, schedule, seed=1))(x)
    torch.vmap(lambda x: fastgen.q_sample(x.unsqueeze(0), 5, schedule, seed=1))(x)
    tables = [table.rows for table in schedule._tables.values()]
    assert len(tables) == 2
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(rows) for rows in tables)


# ---- tracers --------------------------------------------------------------------------------------------------------

LOSSES = {
    "bce": lambda s, x: fastgen.bce_with_logits(x, torch.full_like(x, 0.25)),
    "discriminator": lambda s, x: fastgen.discriminator_loss([x, x[1:]], x * 2, label_smoothing=0.1),
    "generator": lambda s, x: fastgen.generator_loss(x),
    "diffusion": lambda s, x: fastgen.diffusion_loss(x, x.detach(), 5, s, seed=1),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_backward_shows_no_value_to_a_tracer(device, schedule, loss):
    """make_fx and FakeTensorMode, forward and backward: whether the upstream gradient is 1 is not looked at."""
    x = normal((3, 4), 0, device=device)
    loss(schedule, x)  # tables are made outside

    def gradient(x):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(schedule, leaf), leaf)[0]

    expected = gradient(x)
    assert_close(make_fx(gradient)(x)(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert gradient(mode.from_tensor(x)).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_scaled_losses(device, schedule, loss, dtype):
    """loss/k of accumulated gradients, loss·2¹⁶ of a GradScaler: the gradient times as much, for float16 before it is rounded."""
    x, wide = normal((3, 40), 0, dtype, device), normal((3, 40), 0, dtype, device).double()
    for scale in (1.0, 0.25, 3.0, 2.0**-12 if dtype == torch.float16 else 2.0**16):
        leaf, exact = x.clone().requires_grad_(), wide.clone().requires_grad_()
        (loss(schedule, leaf) * scale).backward()
        with fastgen.use_backend("eager"):
            (loss(schedule, exact) * scale).backward()
        assert leaf.grad.dtype == dtype
        close = {"rtol": 5e-3, "atol": 1e-5 * scale + 2.0**-22} if dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-6 * scale}
        torch.testing.assert_close(leaf.grad.double(), exact.grad, **close)
