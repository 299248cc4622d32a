"""diffusion_loss: values, targets, weightings, reductions, gradients, and that no noise is ever stored."""

import itertools
import os

import numpy as np
import pytest
import reference
import torch
from conftest import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    TIMESTEPS,
    array,
    assert_close,
    assert_derivatives,
    assert_same,
    channels_last,
    normal,
    on,
    unaligned,
)
from torch.nn import functional as F

import fastgen
from fastgen._ops.diffusion_loss import LOSSES, REDUCTIONS
from fastgen.schedule import PREDICTIONS

SHAPE = (3, 4, 5, 6)
HALF = (torch.bfloat16, torch.float16)


def data(shape, device, dtype=torch.float32, x0_dtype=None):
    """A model's output and x0."""
    return normal(shape, 0, dtype, device), normal(shape, 1, x0_dtype or dtype, device)


def truth(m, x0, schedule, t, noise, prediction="epsilon", weight=1.0, **options):
    target = reference.diffusion_target(array(x0), schedule.betas, t, array(noise), prediction)
    return reference.diffusion_loss(array(m), target, weight, **options)


def seeded_noise(x0, seed, offset=0):
    precision = torch.float64 if x0.dtype == torch.float64 else torch.float32
    return fastgen.randn(x0.shape, seed=seed, offset=offset, dtype=precision, device=x0.device)


def per_sample(weights, ndim):
    return array(weights).reshape(-1, *[1] * (ndim - 1))


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", TIMESTEPS.values(), ids=TIMESTEPS)
def test_values(device, schedule, prediction, loss, reduction, t):
    m, x0 = data(SHAPE, device)
    noise = normal(SHAPE, 2, device=device)
    actual = fastgen.diffusion_loss(
        m, x0, on(device, t), schedule, noise=noise, prediction=prediction, loss=loss, delta=0.7, reduction=reduction
    )
    assert actual.dtype == torch.float32 and actual.shape == (SHAPE[:1] if reduction == "none" else ())
    assert not actual.requires_grad
    assert_close(actual, truth(m, x0, schedule, t, noise, prediction, loss=loss, delta=0.7, reduction=reduction))


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x0_dtype", DTYPES)
@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dtypes(device, schedule, dtype, x0_dtype, noise_dtype, prediction):
    """A loss is never rounded to half precision: float32, or float64 where an operand is."""
    m, x0 = data((3, 8, 17), device, dtype, x0_dtype)
    noise = normal(m.shape, 2, noise_dtype, device)
    expected_dtype = torch.float64 if torch.float64 in (dtype, x0_dtype) else torch.float32
    for source, z in (({"noise": noise}, noise), ({"seed": 5}, None)):
        if z is None:
            z = fastgen.randn(x0.shape, seed=5, dtype=expected_dtype, device=device)
        actual = fastgen.diffusion_loss(m, x0, 9, schedule, prediction=prediction, **source)
        assert actual.dtype == expected_dtype
        assert_close(actual, truth(m, x0, schedule, 9, z, prediction))


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 0), (700, 3), (2, 17_001), (90, 1, 8, 8), (40, 3, 17)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")  # NumPy's
def test_shapes(device, schedule, shape, reduction, prediction):
    """The mean of nothing is NaN, its sum 0."""
    m, x0 = data(shape, device)
    t = torch.arange(shape[0], device=device) * 7 % 40
    actual = fastgen.diffusion_loss(m, x0, t, schedule, seed=t + 3, prediction=prediction, reduction=reduction)
    assert actual.shape == (shape[:1] if reduction == "none" else ())
    if m.numel() == 0 and reduction == "none":
        assert actual.isnan().all()
        return
    z = seeded_noise(x0, t + 3)
    assert_close(actual, truth(m, x0, schedule, t.tolist(), z, prediction, reduction=reduction))


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 8, 4, 8)])
def test_layouts(device, schedule, layout, other, prediction, reduction, shape):
    m, x0 = data(shape, device)
    t = torch.tensor([39, 0, 17][: shape[0]], device=device)
    for source in ({"seed": 7}, {"noise": normal(shape, 2, device=device)}):
        expected = fastgen.diffusion_loss(m, x0, t, schedule, prediction=prediction, reduction=reduction, **source)
        actual = fastgen.diffusion_loss(
            LAYOUTS[layout](m), LAYOUTS[other](x0), t, schedule, prediction=prediction, reduction=reduction, **source
        )
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype, x0_dtype", [(d, d) for d in DTYPES] + [(d, torch.float32) for d in HALF])
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, unaligned], ids=["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("source", ["seed", "noise", "none"])
@pytest.mark.parametrize("shape", [(2, 16, 8, 4), (1, 8, 31), (3, 5, 7)])
def test_every_kernel(device, schedule, dtype, x0_dtype, arrange, source, shape):
    """The types, layouts and noise sources that a kernel of their own is compiled for; forward and backward."""
    m, x0 = (arrange(v) for v in data(shape, device, dtype, x0_dtype))
    noise = arrange(normal(shape, 2, x0_dtype, device))
    given = {"seed": {"seed": 5}, "noise": {"noise": noise}, "none": {}}[source]
    z = seeded_noise(x0, 5).to(torch.float64 if torch.float64 in (dtype, x0_dtype) else torch.float32)
    z = noise if source == "noise" else z
    predictions = ("sample",) if source == "none" else ("epsilon", "v_prediction")
    for prediction, to_x0 in itertools.product(predictions, (False, True)):
        leaf, x_leaf = m.detach().requires_grad_(), x0.detach().requires_grad_(to_x0)
        actual = fastgen.diffusion_loss(leaf, x_leaf, 9, schedule, prediction=prediction, reduction="none", **given)
        assert_close(actual, truth(m, x0, schedule, 9, z, prediction, reduction="none"))
        actual.sum().backward()
        target = reference.diffusion_target(array(x0), schedule.betas, 9, array(z), prediction)
        slope = reference.diffusion_loss_slope(array(m), target) / m[0].numel()
        assert leaf.grad.stride() == m.stride() or arrange is unaligned
        assert_close(leaf.grad, slope)


@pytest.mark.parametrize("loss", LOSSES)
def test_agrees_with_torch(device, schedule, loss):
    """What a training loop computes by hand, with noise that exists."""
    m, x0 = data(SHAPE, device)
    t = torch.tensor([39, 0, 17], device=device)
    noise = seeded_noise(x0, 11, 2)
    by_hand = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": lambda a, b: F.huber_loss(a, b, delta=1.0)}[loss]
    assert_close(fastgen.diffusion_loss(m, x0, t, schedule, seed=11, offset=2, loss=loss), by_hand(m, noise))


def test_perfect_prediction_from_the_seed_alone(device, schedule):
    """A network that inverts q_sample exactly has no loss: the noise in x_t is the noise of the target, whatever the source."""
    x0, t = normal(SHAPE, 1, torch.float64, device), torch.tensor([39, 3, 17], device=device)
    bar = torch.tensor(schedule.alphas_cumprod, device=device)[t].reshape(-1, 1, 1, 1)
    for source in ({"seed": 5}, {"seed": 5, "offset": 9}, {"seed": torch.tensor([4, 4, -1], device=device)}):
        x_t = fastgen.q_sample(x0, t, schedule, **source)
        epsilon = (x_t - bar.sqrt() * x0) / (1 - bar).sqrt()
        v = bar.sqrt() * epsilon - (1 - bar).sqrt() * x0
        for prediction, m in (("epsilon", epsilon), ("sample", x0), ("v_prediction", v)):
            loss = fastgen.diffusion_loss(m, x0, t, schedule, prediction=prediction, **source)
            assert loss.item() < 1e-24
            other = fastgen.diffusion_loss(m, x0, t, schedule, prediction=prediction, seed=6)
            assert prediction == "sample" or other.item() > 0.01


def test_samples_with_seeds_of_their_own_do_not_depend_on_the_batch(device, schedule):
    m, x0 = data((5, 3, 70), device)
    t, seeds = torch.tensor([39, 0, 17, 3, 3], device=device), torch.tensor([9, -9, 2**40, 0, 1], device=device)
    whole = fastgen.diffusion_loss(m, x0, t, schedule, seed=seeds, prediction="v_prediction", reduction="none")
    for part in ([1], [4, 2], [0, 3, 1]):
        alone = fastgen.diffusion_loss(
            m[part], x0[part], t[part], schedule, seed=seeds[part], prediction="v_prediction", reduction="none"
        )
        assert_close(alone, whole[part])


# ---- weightings -----------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("gamma", [5.0, 1, 0.01])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [2, [0, 38, 39]])
def test_min_snr(device, schedule, prediction, gamma, reduction, t):
    m, x0 = data((3, 4, 33), device)
    z = seeded_noise(x0, 5)
    weight = reference.min_snr(schedule.betas, t, 3, prediction, gamma)
    actual = fastgen.diffusion_loss(
        m, x0, on(device, t), schedule, seed=5, prediction=prediction, weighting="min_snr", snr_gamma=gamma, reduction=reduction
    )
    assert_close(actual, truth(m, x0, schedule, t, z, prediction, weight, reduction=reduction))


def test_min_snr_is_one_weighting_of_one_error(device):
    """The same prediction said as ε, x0 or v has the same weighted loss, since it is that of x0 in all three."""
    schedule = fastgen.Schedule.cosine(50)
    m, x0 = data((4, 3, 33), device, torch.float64)
    t = torch.tensor([0, 10, 30, 48], device=device)
    bar = torch.tensor(schedule.alphas_cumprod, device=device)[t].reshape(-1, 1, 1)
    x_t = fastgen.q_sample(x0, t, schedule, seed=3)
    epsilon = (x_t - bar.sqrt() * m) / (1 - bar).sqrt()
    said = {"sample": m, "epsilon": epsilon, "v_prediction": bar.sqrt() * epsilon - (1 - bar).sqrt() * m}
    losses = [
        fastgen.diffusion_loss(y, x0, t, schedule, seed=3, prediction=p, weighting="min_snr", reduction="none")
        for p, y in said.items()
    ]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_min_snr_without_signal(device, schedule):
    """Zero terminal SNR: the limits, min(SNR, γ)/SNR → 1 and min(SNR, γ) → 0, not 0/0."""
    schedule = schedule.rescale_zero_terminal_snr()
    m, x0 = data((2, 9), device)
    plain = fastgen.diffusion_loss(m, x0, 39, schedule, seed=1)
    assert_same(fastgen.diffusion_loss(m, x0, 39, schedule, seed=1, weighting="min_snr"), plain)
    for prediction in ("sample", "v_prediction"):
        assert fastgen.diffusion_loss(m, x0, 39, schedule, seed=1, weighting="min_snr", prediction=prediction) == 0


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [2, [0, 38, 39]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_of_the_samples(device, schedule, dtype, t, reduction):
    m, x0 = data((3, 4, 33), device)
    weights = normal((3,), 4, dtype, device)
    z = seeded_noise(x0, 5)
    for w in (weights, torch.stack([weights, weights], 1)[:, 0]):
        actual = fastgen.diffusion_loss(m, x0, on(device, t), schedule, seed=5, weighting=w, reduction=reduction)
        assert_close(actual, truth(m, x0, schedule, t, z, weight=per_sample(weights, 3), reduction=reduction))


# ---- sums -----------------------------------------------------------------------------------------------------------


def test_long_sums_do_not_drift(device, schedule):
    """Equal terms, each of which a float32 running sum rounds the same way."""
    n = 2**22 + 5
    m = torch.full((1, n), 1.1, device=device)
    loss = fastgen.diffusion_loss(m, torch.zeros_like(m), 5, schedule, prediction="sample", reduction="sum")
    assert loss.item() == pytest.approx(n * float(m[0, 0].double()) ** 2, rel=4e-6)


def test_ten_to_the_eighth_elements(schedule):
    """Against float64, on the compiled kernel; a million values, a hundred times."""
    if "cpp" not in fastgen.available_backends("cpu") or "FASTGEN_LAUNCHED" in os.environ:  # the CUDA code on the host is too slow
        pytest.skip("needs the compiled CPU kernels")
    try:
        values = normal((1, 10**6), 3)
        m = values.repeat(1, 100)
    except RuntimeError as error:  # the allocator's
        pytest.skip(f"needs 400 MB: {error}")
    expected = 100 * float((values.double() ** 2).sum())
    loss = fastgen.diffusion_loss(m, m, 5, schedule, prediction="epsilon", noise=torch.zeros(1).expand(m.shape), reduction="sum")
    assert loss.item() == pytest.approx(expected, rel=1e-7)


# ---- NaN, infinity, timesteps outside ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_nan_and_inf(device, schedule, loss):
    m, x0 = data((4, 133), device)
    noise = normal((4, 133), 2, device=device)
    m[0, 130], m[1, 5], noise[2, 7] = torch.nan, torch.inf, torch.nan
    m.requires_grad_()
    losses = fastgen.diffusion_loss(m, x0, 9, schedule, noise=noise, loss=loss, reduction="none")
    assert losses.isnan().tolist() == [True, False, True, False] and losses[1] == torch.inf
    losses.sum().backward()
    assert m.grad.isnan().sum() == 2 and m.grad[0, 130].isnan() and m.grad[2, 7].isnan()


def test_noise_or_seed_is_needed(device, schedule):
    m, x0 = data((3, 20), device)
    for prediction in ("epsilon", "v_prediction"):
        with pytest.raises(ValueError, match="noise, seed: expected the one that q_sample was given"):
            fastgen.diffusion_loss(m, x0, 3, schedule, prediction=prediction)
    alone = fastgen.diffusion_loss(m, x0, 3, schedule, prediction="sample")
    assert_same(fastgen.diffusion_loss(m, x0, 3, schedule, prediction="sample", seed=9), alone)
    assert_same(fastgen.diffusion_loss(m, x0, 3, schedule, prediction="sample", noise=x0), alone)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [9, [9, 0]])
def test_gradcheck(device, schedule, prediction, loss, reduction, t):
    """Twice differentiable, in the output, in x0 and in noise and weights."""
    m, x0 = data((2, 3, 2), device, torch.float64)
    noise, w = normal((2, 3, 2), 2, torch.float64, device), torch.tensor([0.3, 2.0], dtype=torch.float64, device=device)
    t = on(device, t)

    def f(m, x0, noise=None, weights="min_snr", seed=5):
        source = {"seed": seed} if noise is None else {"noise": noise}
        options = {"prediction": prediction, "loss": loss, "delta": 0.9, "reduction": reduction, "weighting": weights}
        return fastgen.diffusion_loss(m, x0, t, schedule, **options, **source)

    def leaves(*tensors):
        return [v.clone().requires_grad_() for v in tensors]

    differs = prediction != "epsilon"
    cases = [(lambda m: f(m, x0), leaves(m)), (lambda m: f(m, x0, weights=w), leaves(m))]
    if differs:
        cases += [(f, leaves(m, x0)), (lambda x0: f(m, x0), leaves(x0))]
    if prediction != "sample":
        cases += [(lambda m, noise: f(m, x0, noise), leaves(m, noise))]
    cases += [(lambda m, w: f(m, x0, weights=w), leaves(m, w))]
    for function, inputs in cases:
        assert_derivatives(device, function, inputs)


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype, x0_dtype", [(d, d) for d in DTYPES] + [(d, torch.float32) for d in HALF])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(device, schedule, dtype, x0_dtype, loss, reduction):
    """Each in its tensor's dtype, against float64."""
    m, x0 = data((3, 8, 33), device, dtype, x0_dtype)
    t, w = [39, 0, 17], torch.tensor([0.5, 3.0, 1.0], device=device)
    m.requires_grad_(), x0.requires_grad_()
    source = {"seed": torch.tensor([5, 6, 7], device=device), "offset": 2}
    value = fastgen.diffusion_loss(
        m, x0, on(device, t), schedule, prediction="v_prediction", loss=loss, weighting=w, reduction=reduction, **source
    )
    upstream = normal(value.shape, 4, value.dtype, device)
    value.backward(upstream)
    assert m.grad.dtype == dtype and x0.grad.dtype == x0_dtype
    z = fastgen.randn(x0.shape, **source, dtype=value.dtype, device=device)
    target = reference.diffusion_target(array(x0), schedule.betas, t, array(z), "v_prediction")
    slope = reference.diffusion_loss_slope(array(m), target, per_sample(w, 3), loss)
    slope = slope * (per_sample(upstream, 3) if reduction == "none" else array(upstream))
    slope = slope / {"none": m[0].numel(), "mean": m.numel(), "sum": 1}[reduction]
    _, bar, _ = reference.coefficients(schedule.betas, t, 3)
    scale = np.abs(slope).max() + (1e-3 if dtype in HALF else 0)
    if loss != "l1":  # whose slope jumps where rounding decides the sign
        assert_close(m.grad, slope, scale=scale)
        assert_close(x0.grad, np.sqrt(1 - bar) * slope, scale=scale)
    else:
        assert (np.abs(array(m.grad) - slope) > 0.01 * scale).mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_more_than_once(device, schedule, dtype):
    """The gradient that the forward may have made is handed on once, and for g = 1 only; all backwards agree bit for bit."""
    m, x0 = data((3, 8, 33), device, dtype)
    loss = fastgen.diffusion_loss(m.requires_grad_(), x0, 9, schedule, seed=1, weighting="min_snr", loss="huber")
    (first,) = torch.autograd.grad(loss, m, retain_graph=True)
    kept = first.clone()
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-7 * (dtype == torch.float16)}
    first.fill_(torch.nan)  # whoever asked for it may write to it
    (second,) = torch.autograd.grad(loss, m, retain_graph=True)
    assert_same(second, kept)
    (half,) = torch.autograd.grad(0.5 * loss, m, retain_graph=True)
    torch.testing.assert_close(half, 0.5 * kept, **close)
    (slope,) = torch.autograd.grad(loss, m, create_graph=True)
    assert slope.requires_grad
    # in torch ops, whose normals are rounded differently
    torch.testing.assert_close(slope.detach(), kept, rtol=0.05, atol=1e-3 * float(kept.abs().max()))
    again = fastgen.diffusion_loss(m, x0, 9, schedule, seed=1, weighting="min_snr", loss="huber")
    (half_at_first,) = torch.autograd.grad(0.5 * again, m)
    assert_same(half_at_first, half)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_x0_that_is_not_read_is_not_kept(device, schedule, dtype):
    """With ε for the target, x0 may be overwritten before the backward, and may be an inference tensor."""
    m, x0 = data((3, 20), device, torch.float32, dtype)
    m.requires_grad_()
    loss = fastgen.diffusion_loss(m, x0, 3, schedule, seed=1)
    (expected,) = torch.autograd.grad(loss, m, retain_graph=True)
    x0.zero_()
    for g in (1.0, 2.0):
        assert_close(torch.autograd.grad(g * loss, m, retain_graph=True)[0], g * expected)
    (slope,) = torch.autograd.grad(loss, m, create_graph=True)
    torch.testing.assert_close(slope.detach(), expected, rtol=0.05, atol=1e-3 * float(expected.abs().max()))
    with torch.inference_mode():
        frozen = torch.ones_like(x0)
    assert fastgen.diffusion_loss(m, frozen, 3, schedule, seed=1).requires_grad


def test_no_gradient_to_x0_where_the_target_is_the_noise(device, schedule):
    m, x0 = (v.requires_grad_() for v in data((3, 20), device))
    loss = fastgen.diffusion_loss(m, x0, 3, schedule, seed=1)
    to_m, to_x0 = torch.autograd.grad(loss, (m, x0), allow_unused=True)
    assert to_m.any() and (to_x0 is None or not to_x0.any())


def test_gradients_are_recorded_only_where_asked(device, schedule):
    m, x0 = data((3, 20), device)
    f = lambda m, x0: fastgen.diffusion_loss(m, x0, 3, schedule, seed=1, prediction="sample")  # noqa: E731
    assert not f(m, x0).requires_grad
    assert f(m.clone().requires_grad_(), x0).requires_grad and f(m, x0.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        assert not f(m.clone().requires_grad_(), x0).requires_grad


def test_a_seed_tensor_changed_before_the_backward_is_noticed(device, schedule):
    """The backward makes the forward's noise again: with another seed it would be another's gradient, in silence."""
    m, x0 = data((3, 20), device)
    seed = torch.tensor([1], device=device)
    loss = fastgen.diffusion_loss(m.requires_grad_(), x0, 3, schedule, seed=seed)
    seed += 1
    if fastgen.backend(device) == "eager":  # has stored the noise
        loss.backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.pairs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_gradients_in_any_layout(device, schedule, layout, other):
    m, x0 = data(SHAPE, device)
    leaf, x_leaf = LAYOUTS[layout](m).requires_grad_(), LAYOUTS[other](x0).requires_grad_()
    t, source = torch.tensor([39, 0, 17], device=device), {"seed": 5, "prediction": "v_prediction", "reduction": "none"}
    plain = m.clone().requires_grad_(), x0.clone().requires_grad_()
    g = normal((6,), 4, device=device)[::2]
    fastgen.diffusion_loss(leaf, x_leaf, t, schedule, **source).backward(g)
    fastgen.diffusion_loss(*plain, t, schedule, **source).backward(g)
    assert_close(leaf.grad, plain[0].grad)
    assert_close(x_leaf.grad, plain[1].grad)


def test_transforms(device, schedule):
    """torch.func and forward mode: the decomposed path, with the same noise."""
    m, x0 = data((3, 20), device, torch.float64)
    f = lambda m: fastgen.diffusion_loss(m, x0, 3, schedule, seed=1, prediction="v_prediction")  # noqa: E731
    leaf = m.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(f)(m), expected)
    tangent = normal(m.shape, 5, torch.float64, device)
    _, derivative = torch.func.jvp(f, (m,), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = f(torch.autograd.forward_ad.make_dual(m, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, derivative)
    several = torch.autograd.grad(f(leaf), leaf, torch.arange(3.0, dtype=torch.float64, device=device), is_grads_batched=True)
    torch.testing.assert_close(several[0], torch.stack([k * expected for k in range(3)]))
    both = torch.func.vmap(f)(torch.stack([m, 2 * m]))
    torch.testing.assert_close(both, torch.stack([f(m), f(2 * m)]))


# ---- what is allocated --------------------------------------------------------------------------------------------------


def allocated(function):
    """Bytes of each allocation that PyTorch's CPU allocator makes, in order, and the result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in events if event.nbytes() > 0], result


@pytest.mark.parametrize("per_sample, scale", [(False, 1.0), (True, 1.0), (True, 0.25), (False, 65536.0)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
def test_no_noise_tensor_ever_exists(schedule, arrange, prediction, per_sample, scale):
    """q_sample, loss and backward allocate x_t, the scalar and the gradient, and nothing of the size of x0 more."""
    if "cpp" not in fastgen.available_backends("cpu"):
        pytest.skip("there is no compiled library")
    x0 = arrange(normal((4, 3, 64, 64), 0))
    t, seed = (torch.tensor([5, 0, 39, 7]), torch.arange(4)) if per_sample else (5, 7)
    weights = torch.ones(4) if per_sample else "min_snr"

    def step():
        x_t = fastgen.q_sample(x0, t, schedule, seed=seed)
        m = x_t.detach().requires_grad_()  # a network without parameters
        loss = fastgen.diffusion_loss(m, x0, t, schedule, seed=seed, prediction=prediction, weighting=weights)
        (loss if scale == 1 else scale * loss).backward()
        return x_t, loss, m.grad

    step()  # tables are made once
    sizes, (x_t, loss, gradient) = allocated(step)
    assert x_t.shape == gradient.shape == x0.shape and loss.dim() == 0
    assert sum(size >= x0.nbytes // 8 for size in sizes) == 2, sizes  # x_t and the gradient
    assert max(sizes) == x0.nbytes
    # and the check can fail: the eager backend stores noise
    with fastgen.use_backend("eager"):
        assert sum(size >= x0.nbytes for size in allocated(step)[0]) > 4


# ---- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(device, schedule, dtype):
    """The network's output in half precision, x0 in float32: the loss and its gradient are those of float32 arithmetic."""
    x0, t = normal((4, 8), 0, device=device), torch.tensor([3, 0, 39, 7], device=device)
    weight = normal((8, 8), 1, device=device).requires_grad_()
    x_t = fastgen.q_sample(x0, t, schedule, seed=3)
    with torch.autocast(device.type, dtype=dtype):
        m = x_t @ weight
        loss = fastgen.diffusion_loss(m, x0, t, schedule, seed=3)
    assert m.dtype == dtype and loss.dtype == torch.float32
    assert_close(loss, truth(m, x0, schedule, t.tolist(), seeded_noise(x0, 3)))
    loss.backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all() and weight.grad.any()


def test_gradient_accumulation(device, schedule):
    """Seeds of the samples' own make the sum over micro-batches that of the whole batch."""
    x0, t = normal((6, 8), 0, torch.float64, device), torch.tensor([3, 0, 39, 7, 7, 20], device=device)
    seeds = torch.arange(6, device=device) + 100
    gradients = []
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 5), slice(5, 6)]):
        weight = normal((8, 8), 1, torch.float64, device).requires_grad_()
        for part in parts:
            x_t = fastgen.q_sample(x0[part], t[part], schedule, seed=seeds[part])
            loss = fastgen.diffusion_loss(x_t @ weight, x0[part], t[part], schedule, seed=seeds[part], reduction="sum")
            (loss / x0.numel()).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
