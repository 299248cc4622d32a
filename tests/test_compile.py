"""Every op under torch.compile(fullgraph=True), forward and backward, without growing numbers of recompilations."""

import io

import pytest
import torch
from conftest import DEVICES, assert_close, assert_same, channels_last, normal
from torch._dynamo.testing import CompileCounterWithBackend

import fastgen
from fastgen._core import rng

SHAPE = (3, 4, 5)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", dynamic=None):
    """`function` compiled without graph breaks, and the counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic), counter


def later(t):
    """Timesteps none of which is 0."""
    return t.clamp(min=1) if isinstance(t, torch.Tensor) else max(t, 1)


def _with_kl(z, kl):
    return z + kl.reshape(-1, *[1] * (z.dim() - 1))


FORWARD = {
    "q_sample": lambda s, x, m, t, seed: fastgen.q_sample(x, t, s, seed=seed, offset=3),
    "q_step": lambda s, x, m, t, seed: fastgen.q_step(x, t, s, noise=m),
    "q_posterior": lambda s, x, m, t, seed: fastgen.q_posterior(x, m, t, s),
    "ddpm_step": lambda s, x, m, t, seed: fastgen.ddpm_step(x, m, t, s, seed=seed),
    "ddpm_step_clip_x0": lambda s, x, m, t, seed: fastgen.ddpm_step(x, m, t, s, clip=1.0, seed=seed, return_x0=True),
    "ddpm_step_learned": lambda s, x, m, t, seed: fastgen.ddpm_step(
        x, torch.cat([m, x], 1), t, s, variance="learned", threshold=x.abs().amax((1, 2)), seed=seed
    ),
    "ddpm_step_guided": lambda s, x, m, t, seed: fastgen.ddpm_step(
        x, m, t, s, seed=seed, unconditional_output=m.sin(), guidance_scale=7.5
    ),
    "ddim_step_guided_out": lambda s, x, m, t, seed: fastgen.ddim_step(
        x, m, t, s, clip=1.0, unconditional_output=m.sin(), guidance_scale=2, return_x0=True, out=torch.empty_like(x)
    ),
    "ddim_step": lambda s, x, m, t, seed: fastgen.ddim_step(x, m, t, s, eta=0.5, prediction="v_prediction", seed=seed),
    "ddim_step_out": lambda s, x, m, t, seed: fastgen.ddim_step(x, m, t, s, out=torch.empty_like(x)),
    "randn": lambda s, x, m, t, seed: fastgen.randn((3, 7), seed=seed, offset=2, device=x.device) + x[0, 0, 0],
    "randn_torch_cuda": lambda s, x, m, t, seed: (
        fastgen.randn((3, 7), seed=seed, offset=4, device=x.device, stream="torch-cuda", device_like="A100") + x[0, 0, 0]
    ),
    "diffusion_loss": lambda s, x, m, t, seed: fastgen.diffusion_loss(m, x, t, s, seed=seed, weighting="min_snr"),
    "diffusion_loss_v": lambda s, x, m, t, seed: fastgen.diffusion_loss(
        m.bfloat16(), x, t, s, seed=seed, prediction="v_prediction", loss="huber", weighting=x[:, 0, 0].abs(), reduction="none"
    ),
    "vlb_terms": lambda s, x, m, t, seed: fastgen.vlb_terms(m, x, t, s, seed=seed, clip=1.0),
    "vlb_terms_learned": lambda s, x, m, t, seed: fastgen.vlb_terms(
        torch.cat([m, x], 1), x, t, s, x_t=m.cos(), variance="learned_range", reduction="mean", unit="bits_per_dim"
    ),
    "hybrid": lambda s, x, m, t, seed: fastgen.diffusion_loss(
        torch.cat([m, x], 1), x, t, s, seed=seed, variance="learned_range", weighting=x[:, 0, 0].abs(), reduction="none"
    ),
    "step_log_prob": lambda s, x, m, t, seed: fastgen.step_log_prob(m.sin(), x, m, later(t), s, clip=1.0, over="mean"),
    "step_log_prob_learned": lambda s, x, m, t, seed: fastgen.step_log_prob(
        m.sin(), x.bfloat16(), torch.cat([m, x], 1), 3, s, variance="learned"
    ),
    "step_log_prob_ddim": lambda s, x, m, t, seed: fastgen.step_log_prob(m, x, x, later(t), s, method="ddim", eta=0.5),
    "step_with_log_prob": lambda s, x, m, t, seed: fastgen.ddpm_step(x, m, later(t), s, seed=seed, return_log_prob=True),
    "step_with_log_prob_learned": lambda s, x, m, t, seed: fastgen.ddpm_step(
        x, torch.cat([m, x], 1), later(t), s, noise=m.cos(), variance="learned", clip=1.0, return_x0=True, return_log_prob=True
    ),
    "step_with_log_prob_ddim": lambda s, x, m, t, seed: fastgen.ddim_step(
        *(x.bfloat16(), m.bfloat16(), later(t), s), seed=seed, eta=0.5, return_log_prob=True, log_prob_over="mean"
    ),
    "reparameterize": lambda s, x, m, t, seed: fastgen.reparameterize(x, m, seed=seed, offset=2),
    "reparameterize_kl": lambda s, x, m, t, seed: fastgen.reparameterize(
        *torch.cat([x, m], 1).chunk(2, 1), seed=seed, clamp=(-30.0, 20.0), return_kl=True
    ),
    "reparameterize_noise": lambda s, x, m, t, seed: fastgen.reparameterize(x, m.bfloat16(), noise=m.cos(), return_kl=True),
    "gaussian_kl": lambda s, x, m, t, seed: fastgen.gaussian_kl(x, m, m.sin(), x.cos(), clamp=(-30.0, 20.0), reduction="mean"),
    "gaussian_kl_halves": lambda s, x, m, t, seed: fastgen.gaussian_kl(*torch.cat([x, m], 1).chunk(2, 1)),
    "to_uint8": lambda s, x, m, t, seed: fastgen.to_uint8(x.unsqueeze(-1), channels_last=True),
    "to_uint8_out": lambda s, x, m, t, seed: fastgen.to_uint8(x.bfloat16(), out=torch.empty(x.shape, dtype=torch.uint8)),
    "q_sample_bytes": lambda s, x, m, t, seed: fastgen.q_sample(fastgen.to_uint8(x), t, s, seed=seed),
    "q_sample_bytes_noise": lambda s, x, m, t, seed: fastgen.q_sample(fastgen.to_uint8(x), t, s, noise=m.bfloat16()),
    "losses_bytes": lambda s, x, m, t, seed: (
        fastgen.diffusion_loss(m, fastgen.to_uint8(x), t, s, seed=seed, prediction="v_prediction"),
        fastgen.vlb_terms(m, fastgen.to_uint8(x), t, s, seed=seed),
        fastgen.prior_kl(fastgen.to_uint8(x), s),
    ),
    "bce_with_logits": lambda s, x, m, t, seed: fastgen.bce_with_logits(x, m.sigmoid(), m.abs(), "sum", x[0].abs()),
    "discriminator_loss": lambda s, x, m, t, seed: fastgen.discriminator_loss([x, m[0]], m, label_smoothing=0.1),
    "discriminator_loss_monitors": lambda s, x, m, t, seed: tuple(fastgen.discriminator_loss(x, m, monitors=True)[1]),
    "generator_loss": lambda s, x, m, t, seed: fastgen.generator_loss(x[..., ::2], kind="minimax", reduction="sum"),
    "generator_loss_none": lambda s, x, m, t, seed: fastgen.generator_loss(x, reduction="none"),
}


@pytest.mark.pairs(eager=1)  # whose program is ten times as large, and takes as much longer
@pytest.mark.parametrize("per_sample", [False, True], ids=["ints", "tensors"])
@pytest.mark.parametrize("function", FORWARD.values(), ids=FORWARD)
def test_forward(device, schedule, function, per_sample):
    x, m = normal(SHAPE, 0, device=device), normal(SHAPE, 1, device=device)
    t, seed = (torch.tensor([39, 0, 5], device=device), torch.tensor([5, -1, 2**40], device=device)) if per_sample else (7, 11)
    fast, counter = compiled(lambda x, m, t, seed: function(schedule, x, m, t, seed))
    actual, expected = fast(x, m, t, seed), function(schedule, x, m, t, seed)
    for a, e in zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]:
        assert_same(a, e)
    assert counter.frame_count == 1


BACKWARD = {
    "q_sample": lambda s, x, m, t: fastgen.q_sample(x, t, s, noise=m),
    "ddpm_step": lambda s, x, m, t: fastgen.ddpm_step(x, m, t, s, seed=3),
    "ddpm_step_guided": lambda s, x, m, t: fastgen.ddpm_step(x, m, t, s, seed=3, unconditional_output=x.sin(), guidance_scale=1.5),
    "ddpm_step_clip": lambda s, x, m, t: fastgen.ddpm_step(x, m, t, s, seed=3, clip=1.0, return_x0=True)[1],
    "diffusion_loss": lambda s, x, m, t: fastgen.diffusion_loss(m, x, t, s, seed=3, prediction="v_prediction"),
    "diffusion_loss_each": lambda s, x, m, t: fastgen.diffusion_loss(m, x, t, s, noise=x.detach(), loss="l1", reduction="none"),
    "vlb_terms": lambda s, x, m, t: fastgen.vlb_terms(torch.cat([m, m], 1), x.detach(), t, s, seed=3, variance="learned"),
    "hybrid": lambda s, x, m, t: fastgen.diffusion_loss(torch.cat([m, m], 1), x.detach(), t, s, seed=3, variance="learned"),
    "step_log_prob": lambda s, x, m, t: fastgen.step_log_prob(m.detach().sin(), x, m, later(t), s, clip=1.0),
    "step_with_log_prob": lambda s, x, m, t: fastgen.ddpm_step(x, m, later(t), s, seed=3, return_log_prob=True)[1],
    "step_log_prob_m": lambda s, x, m, t: fastgen.step_log_prob(
        x.detach().sin(), x.detach(), torch.cat([m, x], 1), later(t), s, variance="learned", over="mean"
    ),
    "reparameterize": lambda s, x, m, t: fastgen.reparameterize(x, m, seed=3, clamp=(-30.0, 20.0)),
    "reparameterize_kl": lambda s, x, m, t: _with_kl(*fastgen.reparameterize(x, m, noise=x.detach().cos(), return_kl=True)),
    "gaussian_kl": lambda s, x, m, t: fastgen.gaussian_kl(x, m, m.sin(), x.cos()),
    "losses_bytes": lambda s, x, m, t: (
        fastgen.diffusion_loss(m, fastgen.to_uint8(x), t, s, seed=3, prediction="v_prediction", reduction="none")
        + fastgen.vlb_terms(m, fastgen.to_uint8(x), t, s, seed=3)
    ),
    "bce_with_logits": lambda s, x, m, t: fastgen.bce_with_logits(x, m.sigmoid(), reduction="none"),
    "discriminator_loss": lambda s, x, m, t: fastgen.discriminator_loss(x, [m, x[0]], label_smoothing=0.1),
    "discriminator_loss_monitors": lambda s, x, m, t: fastgen.discriminator_loss(x, m, monitors=True)[0],
    "generator_loss": lambda s, x, m, t: fastgen.generator_loss([x, m[..., ::2]], kind="minimax", reduction="sum"),
}


@pytest.mark.parametrize("function", BACKWARD.values(), ids=BACKWARD)
def test_backward(device, schedule, function):
    x, m, g = (normal(SHAPE, seed, device=device) for seed in range(3))
    t = torch.tensor([39, 0, 5], device=device)
    fast, _ = compiled(lambda x, m, t: function(schedule, x, m, t))
    gradients = []
    for f in (fast, lambda x, m, t: function(schedule, x, m, t)):
        leaves = x.clone().requires_grad_(), m.clone().requires_grad_()
        y = f(*leaves, t)
        y.backward(g.expand(y.shape) if y.dim() == g.dim() else g[(0,) * g.dim()].expand(y.shape))
        gradients.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    assert gradients[0]
    for a, e in zip(*gradients, strict=True):
        assert_close(a, e, scale=50)
        assert a.any()


# inductor takes its time, so it runs on the backend that would be chosen for the device, and on no other


@pytest.mark.parametrize("device", DEVICES)
def test_training_step_with_inductor(device, schedule):
    """Algorithm 4.1 of the lecture note, compiled to kernels of inductor's beside fastgen's."""

    def loss(x0, t, weight, seed):
        noise = fastgen.randn(x0.shape, seed=seed, device=x0.device)
        x_t = fastgen.q_sample(x0, t, schedule, seed=seed)
        m = torch.tanh(x_t * weight)
        loss = ((m - noise) ** 2).mean() + fastgen.diffusion_loss(m, x0, t, schedule, seed=seed, prediction="v_prediction")
        return loss + fastgen.bce_with_logits(x_t * weight, x0.sigmoid())

    x0, t = channels_last(normal((3, 4, 5, 1), 0, device=device)), torch.tensor([39, 0, 5], device=device)
    results = []
    for f in (compiled(loss, "inductor")[0], loss):
        weight = torch.full((4, 1, 1), 0.5, device=device, requires_grad=True)
        value = f(x0, t, weight, 3)
        results.append([value, *torch.autograd.grad(value, weight)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("device", DEVICES)
def test_sampling_loop_with_inductor(device, schedule):
    """Algorithm 4.2; then steps with noise that nobody chose, fresh on every call and governed by torch.manual_seed."""

    def step(x, t, seed=None):
        return fastgen.ddpm_step(x, torch.tanh(x), t, schedule, clip=1.0, seed=seed)

    fast, counter = compiled(step, "inductor")
    x = y = normal(SHAPE, 0, device=device)
    seeds = torch.tensor([1, 2, 3], device=device)
    for t in reversed(range(40)):
        x, y = fast(x, t, seeds), step(y, t, seeds)
        torch.testing.assert_close(x, y)
    assert counter.frame_count <= 4
    torch.manual_seed(3)
    first, second = fast(x, 7), fast(x, 7)
    torch.manual_seed(3)
    assert_same(fast(x, 7), first)
    assert not torch.equal(first, second)


# ---- recompilations -------------------------------------------------------------------------------------------------


def test_int_timesteps_and_seeds_do_not_recompile_without_bound(device, schedule):
    """One program for the first, one for any other, and one each for 0 and 1, which dynamo never generalises."""

    def step(x, t, seed):
        return fastgen.ddpm_step(fastgen.q_sample(x, t, schedule, seed=seed), x, t, schedule, seed=seed)

    fast, counter = compiled(step)
    x = normal(SHAPE, 0, device=device)
    for t in range(40):
        seed = 1000 - 100 * t  # negative ones too
        assert_close(fast(x, t, seed), step(x, t, seed), scale=50)
    assert counter.frame_count <= 6


def test_batch_sizes_do_not_recompile_without_bound(device, schedule):
    def step(x, t, seeds):
        return fastgen.ddpm_step(x, x, t, schedule, seed=seeds)

    fast, counter = compiled(step)
    for batch in (2, 3, 4, 7, 16):
        x, t = normal((batch, 5), 0, device=device), torch.arange(batch, device=device)
        assert_close(fast(x, t, t + 5), step(x, t, t + 5), scale=50)
    assert counter.frame_count <= 3


DYNAMIC = {
    "q_sample": lambda s, x, t: fastgen.q_sample(x, t, s, seed=1),
    "q_posterior": lambda s, x, t: fastgen.q_posterior(x, x.sin(), t, s)[0],
    "ddpm_step": lambda s, x, t: fastgen.ddpm_step(x, x.sin(), t, s, seed=1),
    "ddim_step": lambda s, x, t: fastgen.ddim_step(x, x.sin(), t, s),
    "diffusion_loss": lambda s, x, t: fastgen.diffusion_loss(x.sin(), x, t, s, seed=1, reduction="none"),
    "diffusion_loss_min_snr": lambda s, x, t: fastgen.diffusion_loss(x.sin(), x, t, s, noise=x.cos(), weighting="min_snr"),
    "vlb_terms": lambda s, x, t: fastgen.vlb_terms(x.sin(), x, t, s, seed=1, unit="bits_per_dim", reduction="mean"),
    "hybrid": lambda s, x, t: fastgen.diffusion_loss(torch.cat([x, x.sin()], 1), x, t, s, seed=1, variance="learned_range"),
    "step_log_prob": lambda s, x, t: fastgen.step_log_prob(x, x.sin(), x.cos(), t + 1, s, over="mean"),
    "discriminator_loss": lambda s, x, t: fastgen.discriminator_loss(x, x[1:]),
}


@pytest.mark.pairs(eager=1)
@pytest.mark.parametrize("per_sample", [False, True], ids=["ints", "tensors"])
@pytest.mark.parametrize("function", DYNAMIC.values(), ids=DYNAMIC)
def test_dynamic_shapes_from_the_start(device, schedule, function, per_sample):
    """Then numbers are symbols too: timesteps, the length of a table, what an argument is by default."""
    fast, counter = compiled(lambda x, t: function(schedule, x, t), dynamic=True)
    compilations = []
    for batch in (4, 3, 7):
        x, t = normal((batch, 5), 0, device=device), torch.arange(batch, device=device) if per_sample else 3 * batch
        assert_close(fast(x, t), function(schedule, x, t), scale=50)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


def test_numbers_of_a_table_are_constants_wherever_they_come_from(device, schedule):
    """A program for each eta, also where dynamo would keep it a symbol, and the same one again."""

    def step(x, eta):
        return fastgen.ddim_step(x, x.sin(), 5, schedule, eta=eta, noise=x.cos())  # whose program is smaller than a seed's

    fast, counter = compiled(step, dynamic=True)
    x = normal(SHAPE, 0, device=device)
    for eta in (0.3, 0.0, 0.7):
        assert_close(fast(x, eta), step(x, eta), scale=50)
    compilations = counter.frame_count
    for eta in (0.0, 0.3):
        assert_close(fast(x, eta), step(x, eta), scale=50)
    assert counter.frame_count == compilations


def test_one_tensor_in_two_places(device, schedule):
    """Dynamo refuses it in an autograd.Function."""
    a, b = (normal((3, 4), seed, device=device) for seed in (0, 1))
    w = b.abs()
    for loss in (
        lambda a: fastgen.bce_with_logits(a, a),
        lambda a: fastgen.bce_with_logits(a, a.detach(), w, "mean", w),
        lambda a: fastgen.discriminator_loss(a, a),
        lambda a: fastgen.discriminator_loss([a, b, a], (b,)),
        lambda a: fastgen.diffusion_loss(a, a, 5, schedule, seed=1, prediction="v_prediction"),
    ):
        gradients = []
        for f in (compiled(loss)[0], loss):
            leaf = a.clone().requires_grad_()
            gradients += torch.autograd.grad(f(leaf), leaf)
        assert_close(gradients[0], gradients[1])


def test_tensor_timesteps_and_seeds_never_recompile(device, schedule):
    fast, counter = compiled(lambda x, t, seed: fastgen.q_sample(x, t, schedule, seed=seed))
    x = normal(SHAPE, 0, device=device)
    for k in range(5):
        t, seed = torch.tensor([k, 39 - k, 3], device=device), torch.tensor([k], device=device)
        assert_same(fast(x, t, seed), fastgen.q_sample(x, t, schedule, seed=seed))
    assert counter.frame_count == 1


def test_schedules_in_turn(device, schedule):
    """A table is a constant of the graph; another schedule is another graph, and neither takes the other's place."""
    fast, counter = compiled(lambda x, t, schedule: fastgen.q_sample(x, t, schedule, seed=1))
    x, t = normal(SHAPE, 0, device=device), torch.tensor([3, 0, 9], device=device)
    schedules = [schedule, fastgen.Schedule.cosine(10), schedule.respace(10)]
    for s in schedules * 2:
        assert_same(fast(x, t, s), fastgen.q_sample(x, t, s, seed=1))
    assert counter.frame_count == 3


def test_change_of_backend_recompiles(device, schedule):
    fast, counter = compiled(lambda x: fastgen.ddpm_step(x, x, 5, schedule, seed=1))
    x = normal(SHAPE, 0, device=device)
    names = fastgen.available_backends(device)
    for name in names * 2:
        with fastgen.use_backend(name):
            assert_same(fast(x), fastgen.ddpm_step(x, x, 5, schedule, seed=1))
    assert counter.frame_count == len(names)


# ---- random numbers and errors --------------------------------------------------------------------------------------


def test_noise_that_nobody_chose_is_fresh_on_every_call(device, schedule):
    fast, counter = compiled(lambda x: fastgen.q_sample(x, 5, schedule))
    x = normal(SHAPE, 0, device=device)
    torch.manual_seed(3)
    first, second = fast(x), fast(x)
    torch.manual_seed(3)
    assert_same(fast(x), first)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert not torch.equal(fast(x), first)
    assert counter.frame_count == 1


def test_bad_arguments_are_refused_while_tracing(device, schedule):
    x = normal(SHAPE, 0, device=device)
    for bad in ({"noise": x[:2]}, {"noise": x, "seed": 1}, {"out": x[0]}):
        fast, _ = compiled(lambda x, bad=bad: fastgen.q_sample(x, 5, schedule, **bad))
        with pytest.raises(Exception, match="expected"):
            fast(x)


def test_noise_of_the_eager_backend_with_inductor():
    """In the C++ that Inductor writes, a product of signed integers that wraps is undefined, and was miscompiled."""

    def high(words, keys):
        return rng._product(words & 0xFFFFFFFF ^ keys & 0xFFFFFFFF, 0xD2511F53)[0]

    words, keys = torch.arange(2), torch.tensor([[5], [-1], [2**40]])
    assert_same(compiled(high, "inductor")[0](words, keys), high(words, keys))


def test_noise_on_the_default_device(schedule, backend, device):
    fast, _ = compiled(lambda x: x + fastgen.randn(SHAPE, seed=3))
    with device:
        x = normal(SHAPE, 0, device=device)
        assert_same(fast(x), x + fastgen.randn(SHAPE, seed=3))


def test_timesteps_outside_the_schedule(device, schedule):
    """A compiled program looks at the values of t only inside the op: it raises, or that sample is NaN; never other memory."""
    fast, _ = compiled(lambda x, t: fastgen.q_sample(x, t, schedule, seed=1))
    x, t = normal(SHAPE, 0, device=device), torch.tensor([3, 40, -1], device=device)
    fast(x, torch.tensor([3, 4, 5], device=device))
    if fastgen.backend(device) == "cpp" and device.type == "cpu":
        with pytest.raises(RuntimeError, match="t: expected timesteps within 0 … 39, got 40"):
            fast(x, t)
    else:
        assert fast(x, t).isnan().flatten(1).all(1).tolist() == [False, True, True]


# ---- torch.export ---------------------------------------------------------------------------------------------------


class Sampler(torch.nn.Module):
    """A network and one step with it; the schedule's table becomes a constant of the program."""

    def __init__(self, step, schedule):
        super().__init__()
        self.network, self.step, self.schedule = torch.nn.Conv2d(3, 3, 3, padding=1), step, schedule

    def forward(self, x, t, seeds):
        return self.step(x, self.network(x), t, self.schedule, seeds)


STEPS = {
    "q_sample": lambda x, m, t, schedule, seeds: fastgen.q_sample(m, t, schedule, seed=seeds),
    "ddpm_step": lambda x, m, t, schedule, seeds: fastgen.ddpm_step(x, m, t, schedule, clip=1.0, seed=seeds),
    "guided": lambda x, m, t, schedule, seeds: fastgen.ddpm_step(
        x, m, t, schedule, unconditional_output=m.flip(1), guidance_scale=7.5, seed=seeds
    ),
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not_strict"])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_export_of_a_step(device, schedule, backend, step, strict):
    """Of any batch size, saved and loaded; the ops are in the program as such."""
    sampler = Sampler(step, schedule).to(device).requires_grad_(False)

    def inputs(batch):
        t = torch.arange(batch, device=device)
        return normal((batch, 3, 4, 4), batch, device=device), 39 - t, 7 * t - 3

    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(sampler, inputs(3), dynamic_shapes=[{0: batch}] * 3, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    called = {str(node.target).split(".")[0] for node in loaded.graph.nodes if node.op == "call_function"}
    assert {"cpp": "fastgen", "triton": "fastgen_triton", "eager": "aten"}[backend] in called
    for size in (3, 5):
        assert_same(loaded.module()(*inputs(size)), sampler(*inputs(size)))
