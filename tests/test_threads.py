"""The same bits on every run and for any number of threads.

These tests have a file of their own, the last to run: once the number of threads has been set, MKL splits even the smallest
arrays among them, which makes the eager backend's normals some ten times slower for the rest of the process.
"""

import pytest
import torch
from conftest import assert_close, assert_same, channels_last, interpreted, normal, transposed

import fastgen
from fastgen._ops.step_log_prob import step_log_weight

SHAPE = (3, 4, 9_001)  # enough for two threads, with an uneven split
T = [3, 0, 39]


def randn(schedule, x, t):
    yield fastgen.randn(x.shape, seed=5, dtype=x.dtype, device=x.device)
    yield fastgen.randn((20_001, 3), seed=5, dtype=x.dtype, device=x.device)
    card = {"stream": "torch-cuda", "multiprocessors": 7, "threads_per_multiprocessor": 1024}
    yield fastgen.randn(x.shape, seed=5, dtype=x.dtype, device=x.device, **card)
    yield fastgen.randn((2_001, 3), seed=torch.arange(2_001, device=x.device), dtype=x.dtype, device=x.device, **card)


def q_sample(schedule, x, t):
    yield fastgen.q_sample(x, t, schedule, noise=x.flip(0))
    for arrange in (torch.clone, channels_last, transposed):
        yield fastgen.q_sample(arrange(x), t, schedule, seed=-1)


def q_posterior(schedule, x, t):
    yield from fastgen.q_posterior(x, x.flip(0), t, schedule)


def ddpm_step(schedule, x, t):
    yield fastgen.ddpm_step(x, x.flip(0), t, schedule, noise=x.flip(2))
    yield from fastgen.ddpm_step(channels_last(x), x.flip(0), t, schedule, clip=1.0, seed=t, return_x0=True)


def learned_variance(schedule, x, t):
    yield fastgen.ddpm_step(x, torch.cat([x, x.flip(0)], 1), t, schedule, variance="learned_range", seed=3)


def bce_with_logits(schedule, x, t):
    for reduction in ("none", "mean", "sum"):
        leaf = x.clone().requires_grad_()
        loss = fastgen.bce_with_logits(leaf, x.flip(2).abs().clamp(max=1), x[0].abs(), reduction)
        yield loss.detach()
        yield torch.autograd.grad(loss.sum(), leaf)[0]


def vlb_terms(schedule, x, t):
    for arrange, options in ((torch.clone, {"seed": 5}), (channels_last, {"seed": t}), (channels_last, {"x_t": x.flip(2)})):
        leaf = arrange(torch.cat([x, x.flip(0)], 1)).requires_grad_()
        terms = fastgen.vlb_terms(leaf, x.flip(0), t, schedule, variance="learned_range", **options)
        yield terms.detach()
        yield torch.autograd.grad(terms.sum(), leaf)[0]


def step_log_prob(schedule, x, t):
    for arrange, options in ((torch.clone, {}), (channels_last, {"variance": "learned_range", "clip": 1.0})):
        m = torch.cat([x, x.flip(0)], 1) if options else x.flip(0)
        leaves = arrange(x).requires_grad_(), arrange(m).requires_grad_()
        made = fastgen.step_log_prob(x.flip(2), *leaves, t.clamp(min=1), schedule, **options)
        yield made.detach()
        yield from torch.autograd.grad(made.sum(), leaves)
    yield from fastgen.ddpm_step(x, x.flip(0), t.clamp(min=1), schedule, seed=3, return_log_prob=True)
    yield step_log_weight(x.flip(2), x, x.flip(0), t, schedule)


def gaussians(schedule, x, t):
    """The sample and the divergence of one, the divergence of two, and their gradients; of halves too."""
    for arrange, how in ((torch.clone, {"seed": 5}), (channels_last, {"seed": t}), (torch.clone, {"noise": x.flip(2)})):
        moments = arrange(torch.cat([x, x.flip(0)], 1)).requires_grad_()
        mean, log_variance = moments.chunk(2, 1)
        z, kl = fastgen.reparameterize(mean, log_variance, return_kl=True, **how)
        of_two = fastgen.gaussian_kl(mean, log_variance, x, x.flip(2))
        yield from (z.detach(), kl.detach(), of_two.detach(), fastgen.reparameterize(mean, log_variance, **how).detach())
        yield torch.autograd.grad(z.sum() + kl.sum() + of_two.sum(), moments)[0]


def to_uint8(schedule, x, t):
    for arrange in (torch.clone, channels_last, transposed):
        for layout in (False, True):
            yield fastgen.to_uint8(arrange(x), channels_last=layout)
    yield fastgen.q_sample(fastgen.to_uint8(x), t, schedule, seed=5, out=torch.empty_like(x))


def diffusion_loss(schedule, x, t):
    for arrange, options in (
        (torch.clone, {"seed": 5}),
        (channels_last, {"seed": t, "weighting": "min_snr"}),
        (torch.clone, {"noise": x.flip(2), "loss": "huber"}),
        (channels_last, {"noise": x.flip(2), "loss": "l1"}),
    ):
        for reduction in ("none", "mean", "sum"):
            leaf = arrange(x).requires_grad_()
            loss = fastgen.diffusion_loss(leaf, x.flip(0), t, schedule, prediction="v_prediction", reduction=reduction, **options)
            yield loss.detach()
            yield torch.autograd.grad(loss.sum(), leaf)[0]
    small = x.reshape(-1, 3)
    for reduction in ("none", "mean"):
        yield fastgen.diffusion_loss(small, small, 3, schedule, seed=5, reduction=reduction)


def gan_losses(schedule, x, t):
    leaves = x.clone().requires_grad_(), x[:2, :, ::3].clone().requires_grad_()
    for factor in (1.0, 2.0):  # the gradients of the forward pass, and of their own
        for scales in (leaves, ([leaves[0], leaves[1]], leaves[1])):
            loss, monitors = fastgen.discriminator_loss(*scales, label_smoothing=0.1, monitors=True)
            yield loss.detach()
            yield from monitors
            yield from torch.autograd.grad(factor * loss, leaves)
    yield fastgen.generator_loss(x, kind="minimax", reduction="sum")


@pytest.fixture
def with_threads():
    """Runs a function with a number of threads."""
    before = torch.get_num_threads()

    def run(threads, function, *arguments):
        torch.set_num_threads(threads)
        return list(function(*arguments))

    yield run
    torch.set_num_threads(before)


FUNCTIONS = [
    *(randn, q_sample, q_posterior, ddpm_step, learned_variance, bce_with_logits, diffusion_loss, gan_losses, vlb_terms),
    step_log_prob,
    gaussians,
    to_uint8,
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_number_of_threads_changes_no_bit(backend, device, schedule, with_threads, function, dtype):
    if interpreted(device):
        pytest.skip("Triton's interpreter has one thread")
    arguments = schedule, normal(SHAPE, 0, dtype, device), torch.tensor(T, device=device)
    two, one, again = (with_threads(threads, function, *arguments) for threads in (2, 1, 2))
    for a, b in zip(two, again, strict=True):
        assert_same(a, b)
    # PyTorch's own exponentials round by where a thread's share begins, so eager owes no more than that here
    eager = backend == "eager" and function in (
        *(learned_variance, bce_with_logits, diffusion_loss, gan_losses, vlb_terms),
        *(step_log_prob, gaussians),
    )
    for a, b in zip(two, one, strict=True):
        (assert_close if eager else assert_same)(a, b)
