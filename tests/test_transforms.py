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


@pytest.mark.parametrize("op", [lambda s, x: fastgen.q_sample(x, 7, s), lambda s, x: fastgen.ddpm_step(x, x.sin(), 7, s)])
def test_vmap_without_a_seed(device, schedule, op):
    """One seed is drawn for all that is mapped, or one for each, or none may be: torch's own three kinds of randomness."""
    x = normal((4, 5), 0, device=device).expand(3, 4, 5)

    def mapped(randomness):
        torch.manual_seed(0)
        return torch.vmap(lambda x: op(schedule, x), randomness=randomness)(x)

    same, different = mapped("same"), mapped("different")
    assert torch.equal(same[0], same[1]) and torch.equal(same[1], same[2])
    assert not any(torch.equal(different[i], different[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    assert torch.equal(different, mapped("different"))  # torch.manual_seed governs it
    with pytest.raises(RuntimeError, match="randomness error mode"):
        mapped("error")
    gradients = torch.vmap(torch.func.grad(lambda x: (op(schedule, x) ** 2).sum()), randomness="different")(x)
    assert gradients.isfinite().all() and not torch.equal(gradients[0], gradients[1])


# ---- tracers --------------------------------------------------------------------------------------------------------

TRACED = {
    "q_sample": lambda s, x, t: fastgen.q_sample(x, t, s, seed=3),
    "q_step": lambda s, x, t: fastgen.q_step(x, t, s, noise=x.cos()),
    "q_posterior": lambda s, x, t: fastgen.q_posterior(x, x.sin(), t, s)[0],
    "ddpm_step": lambda s, x, t: fastgen.ddpm_step(x, x.sin(), t, s, seed=3, threshold=x.amax(1).abs() + 1),
    "ddim_step": lambda s, x, t: fastgen.ddim_step(x, x.sin(), t, s, eta=0.5, seed=3),
    "diffusion_loss": lambda s, x, t: fastgen.diffusion_loss(x, x.sin(), t, s, seed=3, weighting="min_snr"),
}


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("function", TRACED.values(), ids=TRACED)
def test_timesteps_of_a_tracer_are_not_looked_at(device, function, mode):
    """The table, made inside, is a constant of the graph; a graph of symbols serves other batches and timesteps."""
    x, t = normal((4, 5), 0, device=device), torch.tensor(T, device=device)
    graph = make_fx(lambda x, t: function(fastgen.Schedule.linear(40), x, t), tracing_mode=mode)(x, t)
    if mode == "symbolic":
        x, t = normal((7, 5), 1, device=device), torch.arange(7, device=device)
    assert_close(graph(x, t), function(fastgen.Schedule.linear(40), x, t), scale=50)


def test_a_graph_draws_its_seed_anew(device, schedule):
    x, t = normal((4, 5), 0, device=device), torch.tensor(T, device=device)
    for mode in ("real", "symbolic"):
        graph = make_fx(lambda x, t: fastgen.q_sample(x, t, schedule), tracing_mode=mode)(x, t)
        torch.manual_seed(0)
        first, second = graph(x, t), graph(x, t)
        torch.manual_seed(0)
        assert not torch.equal(first, second) and torch.equal(graph(x, t), first)


def test_fake_tensors_alone(device):
    schedule = fastgen.Schedule.linear(40)
    with FakeTensorMode():
        x, t = torch.ones(4, 5, device=device), torch.ones(4, dtype=torch.int64, device=device)
        assert (
            fastgen.ddpm_step(x, x, t, schedule).shape == fastgen.q_sample(x, t, schedule, out=torch.empty_like(x)).shape == (4, 5)
        )
    x, t = normal((4, 5), 0, device=device), torch.tensor(T, device=device)
    assert fastgen.ddpm_step(x, x, t, schedule).isfinite().all()  # nothing fake was kept


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
