"""step_log_prob: values, gradients, and the density that it stands for; and the weights of trajectories, by the same kernels."""

import functools
import math
import os

import numpy as np
import pytest
import reference
import torch
from conftest import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    array,
    assert_derivatives,
    assert_same,
    channels_last,
    normal,
    on,
    unaligned,
)

import fastgen
from fastgen._ops.step_log_prob import forward_log_weight, step_log_weight
from fastgen.schedule import LEARNED_VARIANCES, PREDICTIONS, VARIANCES

SHAPE = (3, 4, 5, 6)
TIMESTEPS = {"second": 1, "middle": 17, "last": 39, "mixed": [39, 1, 17]}
DDIM = {"method": "ddim", "eta": 0.7}
METHODS = [{"variance": variance} for variance in VARIANCES] + [DDIM, {"method": "ddim", "eta": 1.0}]
NAMES = [*VARIANCES, "eta0.7", "eta1"]


def data(shape, device, learned=False, dtype=torch.float32, m_dtype=None):
    """x_{t−1}, x_t and a model's output. The first is about where the schedule's steps end: the mean is near x_t."""
    wide = (shape[0], 2 * shape[1], *shape[2:]) if learned else shape
    x_t = normal(shape, 0, dtype, device)
    return (x_t + 0.2 * normal(shape, 1, dtype, device)).to(dtype), x_t, normal(wide, 2, m_dtype or dtype, device)


def is_learned(options):
    return options.get("variance") in LEARNED_VARIANCES


def timesteps_are_seen(device):
    """Not on a GPU, nor where the CUDA kernels' code runs in the place of the CPU's."""
    return device.type == "cpu" and not (fastgen.backend(device) == "cpp" and "FASTGEN_SMALLER" in os.environ)


def truth(x_prev, x_t, m, schedule, t, method="ddpm", **options):
    step = reference.ddpm_step if method == "ddpm" else reference.ddim_step
    return reference.step_log_prob(array(x_prev), array(x_t), array(m), schedule.betas, t, step, **options)


def bound(expected, x_t):
    """What float32 owes a sum: terms of about 1, each off by a few roundings of x over σ."""
    return {"rtol": 2e-5, "atol": 2e-5 * max(1, math.prod(x_t.shape[1:]))}


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize("options", METHODS, ids=NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", TIMESTEPS.values(), ids=TIMESTEPS)
def test_values(device, schedule, prediction, options, clip, t):
    x_prev, x_t, m = data(SHAPE, device, is_learned(options), torch.float64)
    options = {"prediction": prediction, "clip": clip, **options}
    actual = fastgen.step_log_prob(x_prev, x_t, m, on(device, t), schedule, **options)
    assert actual.dtype == torch.float64 and actual.shape == SHAPE[:1]
    np.testing.assert_allclose(array(actual), truth(x_prev, x_t, m, schedule, t, **options), rtol=1e-11)
    x_prev, x_t, m = x_prev.float(), x_t.float(), m.float()
    single = fastgen.step_log_prob(x_prev, x_t, m, on(device, t), schedule, **options)
    assert single.dtype == torch.float32
    expected = truth(x_prev, x_t, m, schedule, t, **options)
    np.testing.assert_allclose(array(single), expected, **bound(expected, x_t))


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m_dtype", DTYPES)
@pytest.mark.parametrize("prev_dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"variance": "learned_range", "clip": 1.0}], ids=["posterior", "learned_range"])
def test_dtypes(device, schedule, dtype, m_dtype, prev_dtype, options):
    """Nothing is rounded to half precision, the mean neither: float32, or float64 where a tensor is."""
    x_prev, x_t, m = data((3, 8, 17), device, is_learned(options), dtype, m_dtype)
    x_prev = x_prev.to(prev_dtype)
    actual = fastgen.step_log_prob(x_prev, x_t, m, 9, schedule, **options)
    assert actual.dtype == (torch.float64 if torch.float64 in (dtype, m_dtype, prev_dtype) else torch.float32)
    expected = truth(x_prev, x_t, m, schedule, 9, **options)
    np.testing.assert_allclose(array(actual), expected, rtol=1e-11 if actual.dtype == torch.float64 else 1e-5)


@pytest.mark.pairs
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 0), (700, 3), (2, 17_001), (40, 3, 17), (2, 500_000)])
@pytest.mark.parametrize("options", [{}, {"variance": "learned"}, DDIM | {"clip": 0.8}], ids=["ddpm", "learned", "ddim"])
@pytest.mark.parametrize("over", ["sum", "mean"])
def test_shapes(device, schedule, shape, options, over):
    """That of no elements is 0."""
    if is_learned(options) and len(shape) < 2:
        pytest.skip("has no channels")
    x_prev, x_t, m = data(shape, device, is_learned(options))
    t = 1 + torch.arange(shape[0], device=device) * 7 % 39
    actual = fastgen.step_log_prob(x_prev, x_t, m, t, schedule, over=over, **options)
    assert actual.shape == shape[:1]
    expected = truth(x_prev, x_t, m, schedule, t.tolist(), **options)
    n = max(1, math.prod(shape[1:])) if over == "mean" else 1
    np.testing.assert_allclose(array(actual) * n, expected, **bound(expected, x_t))


@pytest.mark.pairs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("third", ["contiguous", "channels_last"])
@pytest.mark.parametrize("options", [{}, {"variance": "learned_range"}], ids=["posterior", "learned_range"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 8, 4, 8)])
def test_layouts(device, schedule, layout, other, third, options, shape):
    """Of the gradients too, whose halves lie apart where channels are innermost."""
    t = torch.tensor([39, 1, 17][: shape[0]], device=device)
    tensors = data(shape, device, is_learned(options))
    found = []
    for arrange in ((torch.clone,) * 3, (LAYOUTS[third], LAYOUTS[layout], LAYOUTS[other])):
        x_prev, x_t, m = (change(x) for change, x in zip(arrange, tensors, strict=True))
        leaves = x_t.requires_grad_(), m.requires_grad_()
        made = fastgen.step_log_prob(x_prev, *leaves, t, schedule, clip=1.5, **options)
        found.append((made.detach(), *torch.autograd.grad(made.sum(), leaves)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-6, atol=1e-4)
    assert_same(found[1][1], found[0][1])
    assert_same(found[1][2], found[0][2])


@pytest.mark.parametrize(
    "dtype, m_dtype", [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, unaligned], ids=["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", ["posterior", "learned"])
@pytest.mark.parametrize("shape", [(2, 16, 8, 4), (1, 8, 31), (3, 5, 7)])
def test_every_kernel(device, schedule, dtype, m_dtype, arrange, clip, variance, shape):
    """The types and layouts that a kernel of their own is compiled for; forward and backward, to m alone and to x_t too, against
    eager."""
    x_prev, x_t, m = data(shape, device, variance == "learned", dtype, m_dtype)
    t = torch.tensor([20, 1, 5][: shape[0]], device=device)
    found = []
    for backend in (fastgen.backend(device), "eager"):
        with fastgen.use_backend(backend):
            x, leaf = arrange(x_t), arrange(m).requires_grad_()
            made = fastgen.step_log_prob(arrange(x_prev), x, leaf, t, schedule, variance=variance, clip=clip)
            upstream = torch.arange(1.0, 1 + len(x)).to(made)
            alone = torch.autograd.grad(made, leaf, upstream, retain_graph=True)
            again = fastgen.step_log_prob(arrange(x_prev), x.requires_grad_(), leaf, t, schedule, variance=variance, clip=clip)
            assert_same(again.detach(), made.detach())
            both = torch.autograd.grad(again, (leaf, x), upstream)
            assert_same(both[0], alone[0])
            found.append((made.detach(), *both))
    single = made.dtype != torch.float64
    np.testing.assert_allclose(array(found[0][0]), array(found[1][0]), rtol=1e-5 if single else 1e-12)
    for actual, expected in zip(found[0][1:], found[1][1:], strict=True):
        assert actual.dtype == expected.dtype
        rounding, largest = (2 * torch.finfo(actual.dtype).eps if single else 1e-12), max(1.0, expected.abs().max().item())
        np.testing.assert_allclose(array(actual), array(expected), rtol=rounding, atol=max(rounding / 4, 5e-6 * single) * largest)


@pytest.mark.parametrize("options", METHODS, ids=NAMES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_it_is_the_density_of_the_step(device, schedule, options, clip):
    """With x_{t−1} = μ + σ·z it is −½·Σ(z² + log 2π) − Σ log σ."""
    _, x_t, m = data(SHAPE, device, is_learned(options), torch.float64)
    step = fastgen.ddim_step if "method" in options else fastgen.ddpm_step
    others = {k: v for k, v in options.items() if k != "method"} | {"clip": clip}
    t, z = torch.tensor([39, 1, 17], device=device), normal(SHAPE, 3, torch.float64, device)
    x_prev, mean = (step(x_t, m, t, schedule, noise=noise, **others) for noise in (z, torch.zeros_like(z)))
    sigma = step(x_t, m, t, schedule, noise=torch.ones_like(z), **others) - mean
    expected = (-0.5 * (z**2 + math.log(2 * math.pi)) - sigma.log()).flatten(1).sum(1)
    actual = fastgen.step_log_prob(x_prev, x_t, m, t, schedule, clip=clip, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_the_mean_is_not_rounded(device, schedule):
    """Of a bfloat16 step it is that of float32: an x_{t−1} that is the rounded mean has less than the largest density."""
    x_t, m = normal(SHAPE, 0, torch.bfloat16, device), normal(SHAPE, 1, torch.bfloat16, device)
    rounded = fastgen.ddpm_step(x_t, m, 9, schedule, noise=torch.zeros_like(x_t))
    exact = fastgen.ddpm_step(x_t.float(), m.float(), 9, schedule, noise=torch.zeros_like(x_t))
    largest = fastgen.step_log_prob(exact, x_t, m, 9, schedule)
    assert (fastgen.step_log_prob(rounded, x_t, m, 9, schedule) < largest).all()


def test_a_schedule_without_signal_at_its_end(device):
    """And the ratio of two policies: the exponential of a difference of means over the event."""
    zero = fastgen.Schedule.linear(10, 0.01, 0.3).rescale_zero_terminal_snr()
    x_prev, x_t, m = data((2, 3, 4), device)
    for options in ({}, {"variance": "beta"}, DDIM):
        assert fastgen.step_log_prob(x_prev, x_t, m, 9, zero, prediction="v_prediction", **options).isfinite().all()
        with pytest.raises(ValueError, match="^t: .*signal-to-noise ratio of zero"):
            fastgen.step_log_prob(x_prev, x_t, m, 9, zero, **options)


def test_a_sample_does_not_depend_on_its_batch(device, schedule):
    x_prev, x_t, m = data(SHAPE, device, True)
    t = torch.tensor([39, 1, 17], device=device)
    together = fastgen.step_log_prob(x_prev, x_t, m, t, schedule, variance="learned")
    for b in range(3):
        one = slice(b, b + 1)
        assert_same(fastgen.step_log_prob(x_prev[one], x_t[one], m[one], t[one], schedule, variance="learned")[0], together[b])
        assert_same(fastgen.step_log_prob(x_prev[one], x_t[one], m[one], int(t[b]), schedule, variance="learned")[0], together[b])


def test_nan_and_infinity_stay_where_they_are(device, schedule):
    x_prev, x_t, m = data((4, 40), device)
    x_prev[0, 3], m[1, 5], x_t[2, 7] = torch.nan, torch.nan, torch.inf
    actual = fastgen.step_log_prob(x_prev, x_t, m, 9, schedule)
    assert not actual[:3].isfinite().any() and actual[3].isfinite()
    x_prev[0, 3], m[1, 5], x_t[2, 7] = 0.0, 0.0, 0.0
    assert_same(fastgen.step_log_prob(x_prev, x_t, m, 9, schedule)[3], actual[3])


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("options", METHODS, ids=NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [1, 9, [39, 1, 17]], ids=["second", "middle", "mixed"])
@pytest.mark.parametrize("over", ["sum", "mean"])
def test_gradcheck(device, schedule, prediction, options, clip, t, over):
    """Of m in both halves and of x_t, each alone and together, and of x_prev on the decomposed path."""
    x_prev, x_t, m = data((3, 2, 5), device, is_learned(options), torch.float64)
    f = lambda x_prev, x_t, m: fastgen.step_log_prob(  # noqa: E731
        x_prev, x_t, m, on(device, t), schedule, prediction=prediction, clip=clip, over=over, **options
    )
    for needed in ((False, False, True), (False, True, False), (False, True, True), (True, True, True)):
        leaves = [x.detach().requires_grad_(need) for x, need in zip((x_prev, x_t, m), needed, strict=True)]
        assert_derivatives(device, f, leaves)


def test_gradients_where_the_network_has_seen_x_t(device, schedule):
    """m is a function of x_t: the derivative by way of it is added once, in first and second derivatives."""
    x_prev, x_t, _ = data((2, 3, 4), device, dtype=torch.float64)

    def f(x_t):
        return fastgen.step_log_prob(x_prev, x_t, torch.sin(x_t), 9, schedule)

    assert_derivatives(device, f, (x_t.requires_grad_(),))
    same = lambda x: fastgen.step_log_prob(x_prev, x, x, 9, schedule)  # noqa: E731
    assert_derivatives(device, same, (x_t,))


def test_backward_more_than_once(device, schedule):
    x_prev, x_t, m = data(SHAPE, device, True)
    leaf = m.requires_grad_()
    made = fastgen.step_log_prob(x_prev, x_t, leaf, 9, schedule, variance="learned", over="mean").mean()
    first = torch.autograd.grad(made, leaf, retain_graph=True)[0]
    assert_same(torch.autograd.grad(made, leaf, retain_graph=True)[0], first)
    (twice,) = torch.autograd.grad(made, leaf, create_graph=True)
    torch.testing.assert_close(twice, first, rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(twice.square().sum(), leaf)[0].isfinite().all()


def test_a_policy_gradient(device, schedule):
    """The ratio of a policy to the one that sampled is 1 to begin with, and its gradient that of the log-probability."""
    x_prev, x_t, m = data((3, 4, 8), device)
    before = fastgen.step_log_prob(x_prev, x_t, m, 9, schedule, over="mean")
    leaf = m.clone().requires_grad_()
    now = fastgen.step_log_prob(x_prev, x_t, leaf, 9, schedule, over="mean")
    ratio = torch.exp(now - before)
    assert_same(ratio.detach(), torch.ones_like(before))
    found = torch.autograd.grad(ratio.sum(), leaf, retain_graph=True)[0]
    assert_same(found, torch.autograd.grad(now.sum(), leaf)[0])


def test_transforms(device, schedule):
    """torch.func and forward mode: the decomposed path."""
    x_prev, x_t, m = data((3, 20), device, dtype=torch.float64)
    f = lambda m: fastgen.step_log_prob(x_prev, x_t, m, 3, schedule).sum()  # noqa: E731
    leaf = m.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(f)(m), expected)
    tangent = normal(m.shape, 5, torch.float64, device)
    _, derivative = torch.func.jvp(f, (m,), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum())
    several = torch.autograd.grad(f(leaf), leaf, torch.arange(3.0, dtype=torch.float64, device=device), is_grads_batched=True)
    torch.testing.assert_close(several[0], torch.stack([k * expected for k in range(3)]))
    both = torch.func.vmap(f)(torch.stack([m, 2 * m]))
    torch.testing.assert_close(both, torch.stack([f(m), f(2 * m)]))


# ---- with the step --------------------------------------------------------------------------------------------------


def step_of(options):
    """ddpm_step or ddim_step with these options."""
    step = fastgen.ddim_step if options.get("method") == "ddim" else fastgen.ddpm_step
    return functools.partial(step, **{name: value for name, value in options.items() if name != "method"})


def sources(shape, device):
    return {
        "seed": {"seed": 5},
        "seeds": {"seed": torch.arange(shape[0], device=device) * 2**33 - 7},
        "noise": {"noise": normal(shape, 4, device=device)},
    }


@pytest.mark.pairs
@pytest.mark.parametrize(
    "dtype, m_dtype", [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)]
)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, unaligned], ids=["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("clip, guided", [(None, False), (1.0, False), (None, True)], ids=["", "clip", "guided"])
@pytest.mark.parametrize("options", METHODS[::2], ids=NAMES[::2])
@pytest.mark.parametrize("source", ["seed", "seeds", "noise"])
@pytest.mark.parametrize("shape", [(3, 16, 8, 4), (1, 8, 31), (3, 5, 7)])
def test_the_step_returns_it(device, schedule, dtype, m_dtype, arrange, clip, guided, options, source, shape):
    """x_{t−1} has the bits that it has without; the log-probability is that of what is returned, rounded as it is."""
    learned = is_learned(options)
    _, x_t, m = data(shape, device, learned, dtype, m_dtype)
    how, said = sources(shape, device)[source] | {"clip": clip}, array(m)
    if guided:
        how |= {"unconditional_output": arrange(m.flip(0)), "guidance_scale": 1.5}
        said = reference.guided(said, array(m.flip(0)), 1.5, learned)
    step, x_t, m, size = step_of(options), arrange(x_t), arrange(m), math.prod(shape[1:])
    for t in ([20, 1, 39][: shape[0]], 20):
        x_prev, found = step(x_t, m, on(device, t), schedule, return_log_prob=True, **how)
        plain = step(x_t, m, on(device, t), schedule, **how)
        assert_same(x_prev, plain)
        assert x_prev.stride() == plain.stride()
        expected = truth(x_prev, x_t, torch.tensor(said), schedule, t, clip=clip, **options)
        single = found.dtype == torch.float32
        assert single == (torch.float64 not in (dtype, m_dtype))
        np.testing.assert_allclose(array(found), expected, rtol=1e-5 if single else 1e-11, atol=2e-5 * size * single)


@pytest.mark.parametrize(
    "dtype, m_dtype", [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, unaligned], ids=["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("source", ["seed", "noise"])
@pytest.mark.parametrize("kind", ["fixed", "learned", "guided"])
def test_every_kernel_of_the_step(device, schedule, dtype, m_dtype, arrange, source, kind):
    """The types, layouts and sources of noise that one of its own is compiled for. Tiles of given noise are for halves alone."""
    shape, options = (2, 16, 8, 4), {"variance": "learned"} if kind == "learned" else {}
    _, x_t, m = (arrange(x) for x in data(shape, device, kind == "learned", dtype, m_dtype))
    t = torch.tensor([20, 1], device=device)
    how = options | {source: 5 if source == "seed" else arrange(normal(shape, 4, dtype, device))}
    said = m
    if kind == "guided":
        how |= {"unconditional_output": arrange(m.flip(0)), "guidance_scale": 1.5}
        said = torch.lerp(m.flip(0).double(), m.double(), 1.5).to(torch.promote_types(m_dtype, torch.float32))
    x_prev, found = fastgen.ddpm_step(x_t, m, t, schedule, return_log_prob=True, **how)
    assert_same(x_prev, fastgen.ddpm_step(x_t, m, t, schedule, **how))
    expected = fastgen.step_log_prob(x_prev, x_t, said, t, schedule, **options)
    torch.testing.assert_close(found, expected, rtol=5e-6, atol=5e-4)


@pytest.mark.pairs
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 0), (700, 3), (2, 17_001), (40, 3, 17), (2, 300_000)])
@pytest.mark.parametrize("options", [{}, {"variance": "learned"}, DDIM | {"clip": 0.8}], ids=["ddpm", "learned", "ddim"])
@pytest.mark.parametrize("over", ["sum", "mean"])
def test_shapes_of_the_step(device, schedule, shape, options, over):
    if is_learned(options) and len(shape) < 2:
        pytest.skip("has no channels")
    _, x_t, m = data(shape, device, is_learned(options))
    t = 1 + torch.arange(shape[0], device=device) * 7 % 39
    x_prev, found = step_of(options)(x_t, m, t, schedule, seed=3, return_log_prob=True, log_prob_over=over)
    assert_same(x_prev, step_of(options)(x_t, m, t, schedule, seed=3))
    expected = truth(x_prev, x_t, m, schedule, t.tolist(), **options)
    n = max(1, math.prod(shape[1:])) if over == "mean" else 1
    np.testing.assert_allclose(array(found) * n, expected, **bound(expected, x_t))


@pytest.mark.parametrize("options", METHODS, ids=NAMES)
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
def test_gradients_of_the_step(device, schedule, options, guided):
    """Those of x_{t−1} are the step's, those of the log-probability step_log_prob's with x_{t−1} held fixed."""
    _, x_t, m = data((3, 2, 5), device, is_learned(options), torch.float64)
    t, z, step = torch.tensor([39, 1, 17], device=device), normal(x_t.shape, 4, torch.float64, device), step_of(options)
    u, clip = m.cos(), 0.8
    leaves = [x.requires_grad_() for x in ((x_t, m, z, u) if guided else (x_t, m, z))]

    def both(x_t, m, z, u=None):
        guidance = {} if u is None else {"unconditional_output": u, "guidance_scale": 1.5}
        return step(x_t, m, t, schedule, noise=z, clip=clip, return_log_prob=True, **guidance)

    x_prev, found = both(*leaves)
    weights = normal(x_prev.shape, 7, torch.float64, device)
    guidance = {"unconditional_output": u, "guidance_scale": 1.5} if guided else {}
    plain = step(x_t, m, t, schedule, noise=z, clip=clip, **guidance)
    assert_same(x_prev.detach(), plain.detach())
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True) for y in (x_prev, plain)), strict=True):
        torch.testing.assert_close(a, b)
    m_guided = m
    if guided:
        channels = x_t.shape[1]
        m_guided = torch.cat([u[:, :channels] + 1.5 * (m[:, :channels] - u[:, :channels]), m[:, channels:]], 1)
    expected = fastgen.step_log_prob(x_prev.detach(), x_t, m_guided, t, schedule, clip=clip, **options)
    torch.testing.assert_close(found, expected)
    inputs = [x for x in leaves if x is not z]
    for a, b in zip(*(torch.autograd.grad(y.sum(), inputs, create_graph=True) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
        assert a.requires_grad


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0}], ids=["", "guided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_with_x0_and_into_a_tensor(device, schedule, guidance, dtype):
    _, x_t, m = data(SHAPE, device, dtype=dtype)
    how = {"seed": 5, "clip": 1.0} | ({"unconditional_output": m.flip(0), **guidance} if guidance else {})
    x_prev, found = fastgen.ddpm_step(x_t, m, 9, schedule, return_log_prob=True, **how)
    again, x0, second = fastgen.ddpm_step(x_t, m, 9, schedule, return_log_prob=True, return_x0=True, **how)
    assert_same(again, x_prev)
    assert_same(x0, fastgen.ddpm_step(x_t, m, 9, schedule, return_x0=True, **how)[1])
    torch.testing.assert_close(second, found, rtol=1e-5, atol=1e-3)
    out = x_t.clone()
    written, third = fastgen.ddpm_step(out, m, 9, schedule, return_log_prob=True, out=out, **how)
    assert written is out
    assert_same(out, x_prev)
    assert_same(third, found)
    rows = torch.full((2 * SHAPE[0], *SHAPE[1:]), 7.0, dtype=dtype, device=device)  # of a buffer of many steps, every other one
    written, fourth = fastgen.ddpm_step(x_t, m, 9, schedule, return_log_prob=True, out=rows[::2], **how)
    assert_same(rows[::2], x_prev)
    assert_same(fourth, found)
    assert (rows[1::2] == 7.0).all()


@pytest.mark.parametrize("arrange", [torch.clone, channels_last, lambda x: torch.cat([x, x])[::2]], ids=["", "last", "sliced"])
def test_into_a_tensor_while_compiling(device, schedule, arrange):
    _, x_t, m = data((2, 4, 3, 5), device)
    step = lambda out: fastgen.ddpm_step(x_t, m, 9, schedule, seed=3, return_log_prob=True, out=out)  # noqa: E731
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for expected, found in zip(*(f(arrange(torch.zeros_like(x_t))) for f in (step, compiled)), strict=True):
        assert_same(found, expected)


def test_into_a_tensor_that_does_not_fit(device, schedule):
    """It is left as it is."""
    _, x_t, m = data(SHAPE, device)
    step = functools.partial(fastgen.ddpm_step, x_t, m, 9, schedule, seed=5, return_log_prob=True)
    for out in (torch.full_like(x_t[:1], 7.0), torch.full_like(x_t, 7.0, dtype=torch.float64)):
        with pytest.raises((TypeError, ValueError), match="^out: "):
            step(out=out)
        assert (out == 7.0).all()
    buffer = torch.cat([x_t, x_t])
    with pytest.raises(ValueError, match="^out: expected memory apart from x_t"):
        fastgen.ddpm_step(buffer[1 : len(x_t) + 1], m, 9, schedule, seed=5, return_log_prob=True, out=buffer[: len(x_t)])
    leaf = m.clone().requires_grad_()
    with pytest.raises(ValueError, match="^out: expected no tensor that requires grad"):
        fastgen.ddpm_step(x_t, leaf, 9, schedule, seed=5, return_log_prob=True, out=torch.empty_like(x_t))


def test_steps_that_cannot_return_it(device, schedule):
    """And leave the generator and `out` as they are."""
    _, x_t, m = data(SHAPE, device)
    out, t = torch.full_like(x_t, 7.0), torch.tensor([17, 0, 39], device=device)
    cases = [
        (fastgen.ddpm_step, {"t": 0}, ValueError, "^t: .* the step to x_0 adds no noise"),
        (fastgen.ddim_step, {"t": 0, "eta": 0.5}, ValueError, "^t: .* the step to x_0 adds no noise"),
        (fastgen.ddim_step, {}, ValueError, "^eta: expected a number > 0 with return_log_prob, got 0.0; a step without noise"),
        (
            fastgen.ddpm_step,
            {"threshold": torch.ones(3, device=device)},
            ValueError,
            "^threshold: expected None with return_log_prob",
        ),
        (fastgen.ddpm_step, {"return_log_prob": 1}, TypeError, "^return_log_prob: expected a bool"),
        (fastgen.ddpm_step, {"log_prob_over": "event"}, ValueError, "^log_prob_over: expected one of"),
        (fastgen.ddpm_step, {"clip": -1.0}, ValueError, "^clip: "),
        (fastgen.ddpm_step, {"return_x0": 1}, TypeError, "^return_x0: "),
        (fastgen.ddpm_step, {"noise": x_t[:1]}, ValueError, "^noise: "),
    ]
    if device.type == "cpu":
        cases.append((fastgen.ddpm_step, {"t": t}, ValueError, "^t: expected timesteps within 1 … 39, got 0; the step to x_0"))
    state = torch.get_rng_state()
    for step, change, error, match in cases:
        with pytest.raises(error, match=match):
            step(**{"x_t": x_t, "model_output": m, "t": 9, "schedule": schedule, "return_log_prob": True, "out": out, **change})
    assert torch.equal(torch.get_rng_state(), state) and (out == 7.0).all()


def test_a_step_without_a_seed_draws_one(device, schedule):
    _, x_t, m = data(SHAPE, device)
    for how in ({}, {"generator": torch.Generator(device)}):
        made = []
        for more in ({"return_log_prob": True}, {}):
            torch.manual_seed(3)
            if how:
                how["generator"].manual_seed(4)
            y = fastgen.ddpm_step(x_t, m, 9, schedule, **how, **more)
            made.append(y[0] if more else y)
        assert_same(*made)


# ---- the weights of trajectories ----------------------------------------------------------------------------------------


FROM_THE_FIRST = {"first": 0, "middle": 17, "last": 39, "mixed": [39, 0, 17]}


def trajectory(shape, device, learned=False, dtype=torch.float64, m_dtype=None):
    """x_{t−1}, x_t and a model's output. A step of the forward process is as small as that."""
    x_t, x_prev, m = data(shape, device, learned, dtype, m_dtype)
    return x_prev, x_t, m


@pytest.mark.pairs
@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", FROM_THE_FIRST.values(), ids=FROM_THE_FIRST)
def test_log_weight_values(device, schedule, prediction, variance, clip, t):
    """At t = 0 too, where σ is not 0, and at the last step, which has the prior's density with it."""
    x_prev, x_t, m = trajectory(SHAPE, device, variance in LEARNED_VARIANCES)
    options = {"prediction": prediction, "variance": variance, "clip": clip}
    actual = step_log_weight(x_prev, x_t, m, on(device, t), schedule, **options)
    assert actual.dtype == torch.float64 and actual.shape == SHAPE[:1]
    expected = reference.step_log_weight(array(x_prev), array(x_t), array(m), schedule.betas, t, **options)
    np.testing.assert_allclose(array(actual), expected, rtol=1e-10)
    x_prev, x_t, m = x_prev.float(), x_t.float(), m.float()
    single = step_log_weight(x_prev, x_t, m, on(device, t), schedule, **options)
    assert single.dtype == torch.float32
    expected = reference.step_log_weight(array(x_prev), array(x_t), array(m), schedule.betas, t, **options)
    # w² and u² are some hundreds here, each off by a few roundings of x over σ
    np.testing.assert_allclose(array(single), expected, rtol=1e-4, atol=1e-4 * math.prod(SHAPE[1:]))


@pytest.mark.parametrize("dtype, m_dtype", [(d, m) for d in DTYPES for m in DTYPES])
@pytest.mark.parametrize("prev_dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"variance": "learned_range", "clip": 1.0}], ids=["posterior", "learned_range"])
def test_log_weight_dtypes(device, schedule, dtype, m_dtype, prev_dtype, options):
    x_prev, x_t, m = trajectory((3, 8, 17), device, is_learned(options), dtype, m_dtype)
    x_prev = x_prev.to(prev_dtype)
    actual = step_log_weight(x_prev, x_t, m, 9, schedule, **options)
    assert actual.dtype == (torch.float64 if torch.float64 in (dtype, m_dtype, prev_dtype) else torch.float32)
    expected = reference.step_log_weight(array(x_prev), array(x_t), array(m), schedule.betas, 9, **options)
    double = actual.dtype == torch.float64
    np.testing.assert_allclose(array(actual), expected, rtol=1e-10 if double else 1e-4, atol=0 if double else 1e-2)


@pytest.mark.parametrize("m_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, unaligned], ids=["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", ["posterior", "learned"])
@pytest.mark.parametrize("shape", [(2, 16, 8, 4), (1, 8, 31), (3, 5, 7), (700, 3), (3, 0), (0, 3), (2, 17_001)])
def test_every_kernel_of_the_log_weights(device, schedule, m_dtype, arrange, clip, variance, shape):
    """The types and layouts that a kernel of their own is compiled for, and sizes, against eager. Alone a sample is the same, but
    for the order in which a GPU adds up."""
    x_prev, x_t, m = (arrange(x) for x in trajectory(shape, device, variance == "learned", torch.float32, m_dtype))
    t = torch.arange(shape[0], device=device) * 7 % 40
    found = []
    for backend in (fastgen.backend(device), "eager"):
        with fastgen.use_backend(backend):
            found.append(step_log_weight(x_prev, x_t, m, t, schedule, variance=variance, clip=clip))
    double = m_dtype == torch.float64
    size = max(1, math.prod(shape[1:]))
    torch.testing.assert_close(*found, rtol=1e-11 if double else 1e-5, atol=1e-11 if double else 1e-5 * size)
    if fastgen.backend(device) != "eager":
        for b in range(min(shape[0], 3)):
            one = slice(b, b + 1)
            alone = step_log_weight(x_prev[one], x_t[one], m[one], int(t[b]), schedule, variance=variance, clip=clip)
            torch.testing.assert_close(alone[0], found[0][b], rtol=1e-13 if double else 1e-6, atol=1e-12 if double else 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"variance": "learned_range"}], ids=["posterior", "learned_range"])
def test_log_weight_layouts(device, schedule, layout, other, options):
    x_prev, x_t, m = trajectory((3, 4, 5, 6), device, is_learned(options), torch.float32)
    t = torch.tensor([39, 0, 17], device=device)
    expected = step_log_weight(x_prev, x_t, m, t, schedule, clip=1.5, **options)
    actual = step_log_weight(LAYOUTS[other](x_prev), LAYOUTS[layout](x_t), LAYOUTS[other](m), t, schedule, clip=1.5, **options)
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [40, 1])
def test_the_log_weight_of_the_forward_step_alone(device, schedule, dtype, steps):
    """For a decoder that is no density; with a chain of one step the prior is its."""
    schedule = schedule if steps == 40 else fastgen.Schedule.from_betas([0.3])
    x0, x_1, m = trajectory(SHAPE, device, dtype=dtype)
    actual = forward_log_weight(x0, x_1, schedule)
    expected = reference.step_log_weight(array(x0), array(x_1), array(m), schedule.betas, 0, prediction="sample", decoder="none")
    assert actual.dtype == dtype
    np.testing.assert_allclose(array(actual), expected, rtol=1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("t, got", [(40, 40), (-1, -1), ([1, 40, 3], 40)])
def test_log_weight_timesteps_outside(device, schedule, t, got):
    if isinstance(t, list) and not timesteps_are_seen(device):
        pytest.skip("they are not looked at")
    with pytest.raises(ValueError, match=rf"^t: expected .* within 0 … 39, got {got}$"):
        step_log_weight(*trajectory(SHAPE, device), on(device, t), schedule)


def test_the_log_weights_have_a_table_of_their_own(device, schedule):
    """Neither op takes the other's."""
    if fastgen.backend(device) == "eager":
        pytest.skip("there is no op")
    tensors = trajectory(SHAPE, device, dtype=torch.float32)
    of_steps = schedule.ddpm_step_table("epsilon", "posterior", device, torch.float32).rows
    of_weights = schedule.step_log_weight_table("epsilon", "posterior", device, torch.float32).rows
    for name, rows in (("step_log_weight", of_steps), ("step_log_prob", of_weights)):
        op = fastgen._core.dispatch.op(name, fastgen.backend(device))
        with pytest.raises(RuntimeError, match="rows: expected"):
            op(*tensors, rows, None, 9, None, False, 1.0)


def test_log_weights_are_compiled(device, schedule):
    x_prev, x_t, m = trajectory(SHAPE, device, dtype=torch.float32)
    t = torch.tensor([39, 0, 17], device=device)
    f = lambda x_prev, x_t, m, t: step_log_weight(x_prev, x_t, m, t, schedule, clip=1.0)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x_prev, x_t, m, t), f(x_prev, x_t, m, t))
    torch._dynamo.reset()


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", METHODS, ids=NAMES)
def test_a_step_without_noise(device, schedule, options):
    """Has no density."""
    x_prev, x_t, m = data(SHAPE, device, is_learned(options))
    with pytest.raises(ValueError, match=r"^t: expected a timestep within 1 … 39, got 0; the step to x_0 adds no noise"):
        fastgen.step_log_prob(x_prev, x_t, m, 0, schedule, **options)
    t = torch.tensor([17, 0, 39], device=device)
    if timesteps_are_seen(device):
        with pytest.raises(ValueError, match=r"^t: expected timesteps within 1 … 39, got 0; the step to x_0 adds no noise"):
            fastgen.step_log_prob(x_prev, x_t, m, t, schedule, **options)
    else:
        leaves = x_t.requires_grad_(), m.requires_grad_()
        made = fastgen.step_log_prob(x_prev, *leaves, t, schedule, **options)
        assert made.isnan().tolist() == [False, True, False]
        for gradient in torch.autograd.grad(made.sum(), leaves):
            assert gradient.isnan().flatten(1).all(1).tolist() == [False, True, False] and gradient[::2].isfinite().all()


@pytest.mark.parametrize("t, got", [(40, 40), (-1, -1), ([1, 40, 3], 40), ([-2, 0, 3], -2)])
def test_timesteps_outside(device, schedule, t, got):
    if isinstance(t, list) and not timesteps_are_seen(device):
        pytest.skip("they are not looked at")
    with pytest.raises(ValueError, match=rf"^t: expected .* within 1 … 39, got {got}$"):
        fastgen.step_log_prob(*data(SHAPE, device), on(device, t), schedule)


def test_nothing_is_read_outside_the_table(device, schedule):
    """The op itself refuses, or makes NaN, what Python has not looked at."""
    if fastgen.backend(device) == "eager":
        pytest.skip("there is no op")
    x_prev, x_t, m = data(SHAPE, device)
    rows = schedule.ddpm_step_table("epsilon", "posterior", x_t.device, torch.float32).rows
    t = torch.tensor([17, 0, 2**40], device=device)
    call = lambda: fastgen._core.dispatch.op("step_log_prob", fastgen.backend(device))(  # noqa: E731
        x_prev, x_t, m, rows, t, 0, None, False, 1.0
    )
    if fastgen.backend(device) == "cpp" and timesteps_are_seen(device):
        with pytest.raises(RuntimeError, match="t: expected"):
            call()
    else:
        assert call().isnan().tolist() == [False, True, True]


def test_the_op_of_the_step_takes_noise(device, schedule):
    """For it is called for steps with noise alone."""
    if fastgen.backend(device) == "eager":
        pytest.skip("there is no op")
    _, x_t, m = data(SHAPE, device)
    rows = schedule.ddpm_step_table("epsilon", "posterior", x_t.device, torch.float32).rows
    op = fastgen._core.dispatch.op("ddpm_step_log_prob", fastgen.backend(device))
    with pytest.raises(RuntimeError, match="noise, seed: expected one of them"):
        op(x_t, m, rows, None, 9, None, False, 1.0, None, None, None, None, 1.0)


@pytest.mark.parametrize("variance", ["posterior", "learned_range"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (40, 3, 17), (2, 2, 9_001), (0, 3, 4), (3, 2, 0)])
def test_what_the_forward_makes_ahead(device, schedule, shape, clip, variance):
    """A gradient to m alone is that to m beside one to x_t, which is made in the backward; and every time the same."""
    for dtype, m_dtype in ((torch.float32, None), (torch.float64, None), (torch.bfloat16, None), (torch.float64, torch.float32)):
        tensors = x_prev, x_t, m = data(shape, device, variance != "posterior", dtype, m_dtype)
        log_prob = functools.partial(fastgen.step_log_prob, schedule=schedule, variance=variance, clip=clip)
        t = torch.arange(shape[0], device=device) * 13 % 39 + 1
        upstream = torch.linspace(-1.7, 2.0, shape[0], device=device, dtype=log_prob(*tensors, t).dtype)
        leaf = m.requires_grad_()
        alone = log_prob(x_prev, x_t, leaf, t)
        assert_same(alone, log_prob(x_prev, x_t, m.detach(), t))
        first, second = (torch.autograd.grad(alone, leaf, upstream, retain_graph=True)[0] for _ in range(2))
        assert_same(first, second)
        both = torch.autograd.grad(log_prob(x_prev, x_t.clone().requires_grad_(), leaf, t), leaf, upstream)[0]
        assert_same(first, both)


def test_eta_and_variance_are_one_method_s(device, schedule):
    tensors = data(SHAPE, device)
    for options, match in (
        ({"eta": 1.0}, "^eta: expected None with method='ddpm'"),
        ({"method": "ddim"}, "^eta: expected a number > 0 and ≤ 1 with method='ddim', got None"),
        ({"method": "ddim", "eta": 0}, "^eta: expected a number > 0 and ≤ 1, got 0.0; a step without noise has no density"),
        ({"method": "ddim", "eta": 1.5}, "^eta: expected a number > 0 and ≤ 1, got 1.5$"),
        ({"method": "ddim", "eta": 1.0, "variance": "beta"}, "^variance: expected None with method='ddim'"),
    ):
        with pytest.raises(ValueError, match=match):
            fastgen.step_log_prob(*tensors, 9, schedule, **options)
    same = [fastgen.step_log_prob(*tensors, 9, schedule, **options) for options in ({"method": "ddim", "eta": 1}, {})]
    torch.testing.assert_close(*same)  # of the posterior's variance
