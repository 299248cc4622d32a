"""vlb_terms: values, the decoder's tails, gradients, and the divergence that the formula stands for."""

import math
from types import SimpleNamespace

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
    assert_derivatives,
    assert_same,
    channels_last,
    interpreted,
    normal,
    on,
    unaligned,
)

import fastgen
from fastgen._core import dispatch
from fastgen._ops.vlb_terms import CLAMPED_DECODERS, Operands, _run
from fastgen.schedule import LEARNED_VARIANCES, PREDICTIONS, VARIANCES

SHAPE = (3, 4, 5, 6)
DECODERS = ("discretized", "gaussian")


def pixels(shape, seed, dtype=torch.float32, device="cpu"):
    """Of the 256 values in −1 … 1, the ends among them."""
    values = np.random.default_rng(seed).integers(0, 256, shape)
    values.reshape(-1)[:2] = (0, 255)[: values.size]
    return torch.tensor(values / 127.5 - 1).to(device, dtype)


def data(shape, device, variance, dtype=torch.float32, x0_dtype=None):
    """A model's output, and x0."""
    wide = (shape[0], 2 * shape[1], *shape[2:]) if variance in LEARNED_VARIANCES else shape
    return normal(wide, 0, dtype, device), pixels(shape, 1, x0_dtype or dtype, device)


def noised(x0, t, schedule, noise):
    return reference.q_sample(array(x0), schedule.betas, t, array(noise))


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", TIMESTEPS.values(), ids=TIMESTEPS)
def test_values(device, schedule, prediction, variance, decoder, clip, t):
    m, x0 = data(SHAPE, device, variance, torch.float64)
    x_t = normal(SHAPE, 2, torch.float64, device)
    options = {"prediction": prediction, "variance": variance, "clip": clip, "decoder": decoder}
    actual = fastgen.vlb_terms(m, x0, on(device, t), schedule, x_t=x_t, **options)
    assert actual.dtype == torch.float64 and actual.shape == SHAPE[:1]
    expected = reference.vlb_terms(array(m), array(x0), array(x_t), schedule.betas, t, **options)
    np.testing.assert_allclose(array(actual), expected, rtol=1e-10)
    single = fastgen.vlb_terms(m.float(), x0.float(), on(device, t), schedule, x_t=x_t.float(), **options)
    assert single.dtype == torch.float32
    expected = reference.vlb_terms(array(m.float()), array(x0.float()), array(x_t.float()), schedule.betas, t, **options)
    np.testing.assert_allclose(array(single), expected, rtol=2e-5)


SIGMAS = (1e-3, 3e-3, 1e-2, 0.05, 0.0627, 0.0628, 0.3, 1.0, 3.9, 3.93, 10.0)
DISTANCES = (0.0, 1e-6, 1 / 255, 0.5, 1.0, 2.0, 5.0, 10.0, 37.0, 100.0)  # of the mean, in bins where below 0.01, else in deviations


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-11)], ids=["float32", "float64"])
def test_the_decoder_in_its_tails(device, schedule, dtype, bound):
    """The relative error of each log-probability, from bins that hold nearly all to those 100 deviations away."""
    cases = [(x0, s, d * sign) for s in SIGMAS for d in DISTANCES for sign in (1, -1) for x0 in (-1.0, 0.25, 1.0)]
    x0 = torch.tensor([[each[0]] for each in cases], dtype=torch.float64).to(device, dtype)
    v = torch.tensor([[2 * math.log(each[1])] for each in cases], dtype=torch.float64).to(device, dtype)
    mean = torch.tensor([[x + d * (s if abs(d) >= 0.01 else 1)] for x, s, d in cases], dtype=torch.float64).to(device, dtype)
    actual = fastgen.vlb_terms(
        torch.cat([mean, v], 1), x0, 0, schedule, x_t=torch.zeros_like(x0), prediction="sample", variance="learned"
    )
    truth = np.array(
        [-reference.log_bin(a, b, math.exp(c / 2)) for a, b, c in zip(*(array(x)[:, 0] for x in (x0, mean, v)), strict=True)]
    )
    known = truth > 1e-37  # what float32 holds
    worst = np.where(known, np.abs(array(actual) - truth) / np.where(known, truth, 1.0), 0.0)
    assert truth[known].min() < 1e-10 and truth.max() > 4000 and (array(actual)[~known] < 2e-37).all()
    if fastgen.backend(device) == "eager":
        bound *= 2  # torch's own exp and erfcx
    assert worst.max() < bound, (worst.max(), cases[int(worst.argmax())])


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x0_dtype", DTYPES)
@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variance", ["posterior", "learned_range"])
def test_dtypes(device, schedule, dtype, x0_dtype, noise_dtype, variance):
    """A term is never rounded to half precision: float32, or float64 where m or x0 is."""
    m, x0 = data((3, 8, 17), device, variance, dtype, x0_dtype)
    noise = normal(x0.shape, 2, noise_dtype, device)
    expected_dtype = torch.float64 if torch.float64 in (dtype, x0_dtype) else torch.float32
    for source, z in (({"noise": noise}, noise), ({"seed": 5}, None)):
        if z is None:
            z = fastgen.randn(x0.shape, seed=5, dtype=expected_dtype, device=device)
        actual = fastgen.vlb_terms(m, x0, 9, schedule, variance=variance, **source)
        assert actual.dtype == expected_dtype
        x_t = noised(x0, 9, schedule, z)
        expected = reference.vlb_terms(array(m), array(x0), x_t, schedule.betas, 9, "epsilon", variance)
        np.testing.assert_allclose(array(actual), expected, rtol=1e-5)


@pytest.mark.pairs
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 0), (700, 3), (2, 17_001), (40, 3, 17)])
@pytest.mark.parametrize("source", ["x_t", "noise", "seed"])
@pytest.mark.parametrize("variance", ["posterior", "learned"])
def test_shapes(device, schedule, shape, source, variance):
    """The term of no elements is 0."""
    if variance == "learned" and len(shape) < 2:
        pytest.skip("has no channels")
    m, x0 = data(shape, device, variance)
    t = torch.arange(shape[0], device=device) * 7 % 40
    z = fastgen.randn(x0.shape, seed=t + 3, device=device)
    given = {"noise": z, "seed": t + 3, "x_t": fastgen.q_sample(x0, t, schedule, noise=z)}[source]
    actual = fastgen.vlb_terms(m, x0, t, schedule, variance=variance, decoder="gaussian", prediction="sample", **{source: given})
    assert actual.shape == shape[:1]
    x_t = noised(x0, t.tolist(), schedule, z)
    expected = reference.vlb_terms(array(m), array(x0), x_t, schedule.betas, t.tolist(), "sample", variance, decoder="gaussian")
    np.testing.assert_allclose(array(actual), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.pairs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("variance", ["posterior", "learned_range"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 8, 4, 8)])
def test_layouts(device, schedule, layout, other, variance, shape):
    """Of the gradients too, whose halves lie apart where channels are innermost."""
    m, x0 = data(shape, device, variance)
    t = torch.tensor([39, 0, 17][: shape[0]], device=device)
    for source in ({"seed": 7}, {"noise": normal(shape, 2, device=device)}, {"x_t": normal(shape, 2, device=device)}):
        found = []
        for a, b in ((torch.clone, torch.clone), (LAYOUTS[layout], LAYOUTS[other])):
            leaf = a(m).requires_grad_()
            terms = fastgen.vlb_terms(leaf, b(x0), t, schedule, variance=variance, clip=1.5, **source)
            found.append((terms.detach(), torch.autograd.grad(terms.sum(), leaf)[0]))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-6, atol=1e-6)
        assert_same(found[1][1], found[0][1])


@pytest.mark.parametrize(
    "dtype, x0_dtype", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, unaligned], ids=["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("source", ["seed", "noise", "x_t"])
@pytest.mark.parametrize("variance", ["posterior", "learned"])
@pytest.mark.parametrize("shape", [(2, 16, 8, 4), (1, 8, 31), (3, 5, 7)])
def test_every_kernel(device, schedule, dtype, x0_dtype, arrange, source, variance, shape):
    """The types, layouts and sources that a kernel of their own is compiled for; forward and backward, against eager."""
    m, x0 = data(shape, device, variance, dtype, x0_dtype)
    t = torch.tensor([20, 0, 5][: shape[0]], device=device)
    options = {"seed": 3} if source == "seed" else {source: arrange(normal(shape, 2, x0_dtype, device))}
    found = []
    for backend in (fastgen.backend(device), "eager"):
        with fastgen.use_backend(backend):
            leaf = arrange(m).requires_grad_()
            terms = fastgen.vlb_terms(leaf, arrange(x0), t, schedule, variance=variance, **options)
            found.append((terms.detach(), torch.autograd.grad(terms, leaf, torch.arange(1.0, 1 + len(x0)).to(terms))[0]))
    np.testing.assert_allclose(array(found[0][0]), array(found[1][0]), rtol=1e-12 if found[0][0].dtype == torch.float64 else 1e-5)
    # both are rounded to the dtype of m; in float64 what narrow bins lose to subtraction shows
    rounding = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-11
    largest = max(1.0, found[1][1].abs().max().item())
    np.testing.assert_allclose(
        array(found[0][1]),
        array(found[1][1]),
        rtol=rounding,
        atol=max(rounding / 4, 2e-6) * largest if dtype != torch.float64 else 1e-11 * largest,
    )


def test_a_divergence_is_what_samples_say(device, schedule):
    """E_q[log q(x_{t−1} | x_t, x0) − log p(x_{t−1} | x_t)] over samples of q, to their own error: the term without its formula."""
    count = 2_000 if interpreted(device) else 40_000
    m, x0 = data((1, 2, 3), device, "learned_range", torch.float64)
    x_t, t = normal(x0.shape, 2, torch.float64, device), 23
    term = fastgen.vlb_terms(m, x0, t, schedule, x_t=x_t, variance="learned_range").item()
    mean, variance, _ = fastgen.q_posterior(x0, x_t, t, schedule)
    model_mean = reference.ddpm_step(array(x_t), array(m), schedule.betas, t, 0.0, variance="learned_range")[0]
    _, log_variance = reference.vlb_variances(schedule.betas, t, 3, "learned_range", array(m[:, 2:]))
    samples = array(mean) + np.sqrt(array(variance)) * array(normal((count, 2, 3), 5, torch.float64))
    gaussian = lambda x, mean, variance: -0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)  # noqa: E731
    ratios = gaussian(samples, array(mean), array(variance)) - gaussian(samples, model_mean, np.exp(log_variance))
    each = ratios.reshape(count, -1).sum(1)
    assert abs(each.mean() - term) < 5 * each.std() / math.sqrt(count)


def test_the_decoder_is_a_distribution(device, schedule):
    """The probabilities of the 256 values add up to 1."""
    values = (torch.arange(256, dtype=torch.float64, device=device) / 127.5 - 1).view(256, 1)
    for sigma in (1e-3, 0.01, 0.2, 5.0):
        m = torch.tensor([[0.3, 2 * math.log(sigma)]], dtype=torch.float64, device=device).expand(256, 2)
        terms = fastgen.vlb_terms(m, values, 0, schedule, x_t=values, prediction="sample", variance="learned")
        torch.testing.assert_close(torch.exp(-terms).sum(), terms.new_tensor(1.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("floor, decoder", CLAMPED_DECODERS.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_decoders_of_other_libraries(device, schedule, floor, decoder, dtype):
    """Their probabilities to their rounding, and where nothing is clamped their gradients. They are for the drop-ins alone."""
    cases = [(x0, s, d * sign) for s in (0.01, 0.1, 1.0) for d in DISTANCES for sign in (1, -1) for x0 in (-1.0, 0.25, 1.0)]
    x0, sigma, distance = (torch.tensor(values, device=device, dtype=dtype)[:, None] for values in zip(*cases, strict=True))
    mean, v = x0 + distance * sigma, 2 * sigma.log()
    leaf = torch.cat([mean, v], 1).requires_grad_()
    rows = schedule.vlb_terms_table("sample", "learned", leaf.device, dtype).rows
    operands = (leaf, x0, rows, None, 0, x0, None, None, None, 0, None, True, decoder, 1.0, True, -1, 1.0, None, 1.0)
    found = {}
    for backend in (fastgen.backend(device), "eager"):
        with fastgen.use_backend(backend):
            plan = SimpleNamespace(backend=backend, call=None if backend == "eager" else dispatch.op("vlb_terms", backend))
            terms = _run(plan, Operands(*operands), False)
            found[backend] = terms.detach(), torch.autograd.grad(terms.sum(), leaf)[0]
    terms, gradient = found[fastgen.backend(device)]
    expected = reference.clamped_log_bin(*(array(x)[:, 0] for x in (x0, mean, sigma)), floor)
    np.testing.assert_allclose(np.exp(-array(terms)), np.exp(expected), rtol=0, atol=20 * torch.finfo(dtype).eps)
    assert terms.max().item() == pytest.approx(-math.log(floor), rel=1e-6)
    plain = array(terms) < 7  # the probability is some 1e-3, so rounding has not changed it
    atol = 10 * torch.finfo(dtype).eps * found["eager"][1].abs().max().item()
    np.testing.assert_allclose(
        array(gradient)[plain], array(found["eager"][1])[plain], rtol=2e3 * torch.finfo(dtype).eps, atol=atol
    )
    lost = array(terms) > -math.log(floor) - 1e-4
    assert lost.any() and not array(gradient)[lost].any()


def test_a_perfect_prediction(device, schedule):
    """Of the noise: the means meet, and with the posterior's variance nothing is left."""
    x0 = pixels((2, 3, 8, 8), 1, device=device)
    t = torch.tensor([5, 39], device=device)
    noise = fastgen.randn(x0.shape, seed=7, device=device)
    assert fastgen.vlb_terms(noise, x0, t, schedule, seed=7).abs().max() < 1e-6
    v = torch.full_like(noise, -1.0)  # the lower end of the range, which is the posterior's
    assert fastgen.vlb_terms(torch.cat([noise, v], 1), x0, t, schedule, seed=7, variance="learned_range").abs().max() < 1e-6


def test_units_and_reductions(device, schedule):
    m, x0 = data(SHAPE, device, "posterior")
    t = torch.tensor([39, 0, 17], device=device)
    nats = fastgen.vlb_terms(m, x0, t, schedule, seed=7)
    bits = fastgen.vlb_terms(m, x0, t, schedule, seed=7, unit="bits_per_dim")
    torch.testing.assert_close(bits, nats / (4 * 5 * 6 * math.log(2)))
    for reduction, expected in (("mean", nats.mean()), ("sum", nats.sum())):
        torch.testing.assert_close(fastgen.vlb_terms(m, x0, t, schedule, seed=7, reduction=reduction), expected)


def test_the_mean_of_nothing(device, schedule):
    x0 = torch.zeros(0, 3, 4, device=device)
    assert fastgen.vlb_terms(x0, x0, 5, schedule, seed=1).shape == (0,)
    assert fastgen.vlb_terms(x0[:, 0, 0], x0[:, 0, 0], 5, schedule, seed=1).shape == (0,)
    assert fastgen.vlb_terms(x0, x0, 5, schedule, seed=1, reduction="mean").isnan()
    assert fastgen.vlb_terms(x0, x0, 5, schedule, seed=1, reduction="sum") == 0


def test_where_nothing_is_learned_but_the_mean(device, schedule):
    x0 = pixels((2, 3), 1, device=device)
    with pytest.raises(ValueError, match="^detach_mean: expected False with variance='posterior'"):
        fastgen.vlb_terms(x0, x0, 5, schedule, seed=1, detach_mean=True)


def test_a_term_of_no_weight_is_left_out(device, schedule):
    """And not 0 times infinity."""
    m, x0 = data(SHAPE, device, "learned")
    m[0, 4:] = -1e30
    leaf = m.requires_grad_()
    loss = fastgen.diffusion_loss(leaf, x0, 9, schedule, seed=1, variance="learned", vlb_weight=0.0)
    torch.testing.assert_close(loss, fastgen.diffusion_loss(m[:, :4], x0, 9, schedule, seed=1))
    assert torch.autograd.grad(loss, leaf)[0].isfinite().all()


def test_a_clip_beyond_the_dtype(device, schedule):
    m, x0 = data(SHAPE, device, "posterior")
    assert_same(*(fastgen.vlb_terms(m, x0, 9, schedule, seed=1, clip=clip) for clip in (1e300, 1e30)))


def test_a_sample_does_not_depend_on_its_batch(device, schedule):
    m, x0 = data(SHAPE, device, "learned")
    t, seeds = torch.tensor([39, 0, 17], device=device), torch.tensor([5, -1, 2**40], device=device)
    together = fastgen.vlb_terms(m, x0, t, schedule, seed=seeds, offset=2, variance="learned")
    for b in range(3):
        alone = fastgen.vlb_terms(
            m[b : b + 1], x0[b : b + 1], t[b : b + 1], schedule, seed=seeds[b : b + 1], offset=2, variance="learned"
        )
        assert_same(alone[0], together[b])


def test_a_schedule_of_one_step_and_one_without_signal(device):
    x0 = pixels((2, 3), 1, device=device)
    one = fastgen.vlb_terms(torch.zeros_like(x0), x0, 0, fastgen.Schedule.from_betas([0.1]), seed=1)
    assert one.isfinite().all()
    zero = fastgen.Schedule.linear(10, 0.01, 0.3).rescale_zero_terminal_snr()
    assert fastgen.vlb_terms(torch.zeros_like(x0), x0, 9, zero, seed=1, prediction="v_prediction").isfinite().all()
    with pytest.raises(ValueError, match="^t: .*signal-to-noise ratio of zero"):
        fastgen.vlb_terms(torch.zeros_like(x0), x0, 9, zero, seed=1)


# ---- the hybrid loss ------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (5, 2), (2, 2, 9_001), (0, 3, 4)])
@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
@pytest.mark.parametrize("weighting", [None, "min_snr", "tensor"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("source", ["seed", "noise"])
def test_hybrid(device, schedule, shape, loss, weighting, reduction, prediction, source):
    check_hybrid(device, schedule, shape, torch.float32, torch.float32, torch.clone, loss, weighting, reduction, prediction, source)


@pytest.mark.pairs
@pytest.mark.parametrize("variance", LEARNED_VARIANCES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", ["seed", "noise"])
@pytest.mark.parametrize("dtype, x0_dtype", [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32)])
def test_hybrid_kernels(device, schedule, variance, layout, source, dtype, x0_dtype):
    options = "mse", "tensor", "mean", "v_prediction", source, variance
    check_hybrid(device, schedule, (3, 4, 5, 6), dtype, x0_dtype, LAYOUTS[layout], *options)


def check_hybrid(
    device, schedule, shape, dtype, x0_dtype, arrange, loss, weighting, reduction, prediction, source, variance="learned_range"
):
    """The simple loss plus λ·T times the term in bits, and so the gradient: each of them by themselves elsewhere."""
    m, x0 = map(arrange, data(shape, device, variance, dtype, x0_dtype))
    t = torch.arange(shape[0], device=device) * 13 % 40
    if weighting == "tensor":
        weighting = torch.linspace(0.5, 2.0, shape[0], device=device)
    noise = {"seed": 3} if source == "seed" else {"noise": normal(shape, 2, x0_dtype, device)}
    same = {"prediction": prediction, "reduction": "none", **noise}
    found = []
    for hybrid in (True, False):
        leaf = m.clone().requires_grad_()
        if hybrid:
            simple = {"loss": loss, "delta": 0.7, "weighting": weighting, "variance": variance, "vlb_weight": 0.02}
            value = fastgen.diffusion_loss(leaf, x0, t, schedule, **{**same, **simple, "reduction": reduction})
        else:
            half = leaf[:, : shape[1]]
            value = fastgen.diffusion_loss(half, x0, t, schedule, loss=loss, delta=0.7, weighting=weighting, **same)
            terms = fastgen.vlb_terms(leaf, x0, t, schedule, variance=variance, unit="bits_per_dim", detach_mean=True, **same)
            value = value + 0.02 * len(schedule) * terms
            if reduction == "sum":
                value = value * max(x0[:1].numel(), 1)
            value = value if reduction == "none" else value.mean() if reduction == "mean" else value.sum()
        found.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    # of the separate gradients one rounds twice
    rtol, grain = (1e-12, 1e-13) if dtype == torch.float64 else (2e-5, 2e-7 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=rtol, atol=1e-6 if dtype != torch.float64 else 1e-12, equal_nan=True)
    largest = found[1][1].abs().max().item() if found[1][1].numel() else 0.0
    torch.testing.assert_close(found[0][1], found[1][1], rtol=max(rtol, grain), atol=10 * grain * largest + 1e-30)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hybrid_derivatives(device, schedule, decoder, weighted, reduction):
    """Of m without the term, whose value depends on m though its gradient does not; of v and the weights with it."""
    m, x0 = data((3, 2, 5), device, "learned_range", torch.float64)
    t, weights = torch.tensor([39, 0, 17], device=device), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device)
    options = {"seed": 3, "variance": "learned_range", "decoder": decoder, "reduction": reduction}

    def loss(m, v, w, vlb_weight=0.01):
        options["weighting"] = w if weighted else None
        return fastgen.diffusion_loss(torch.cat([m, v], 1), x0, t, schedule, vlb_weight=vlb_weight, **options)

    m, v = m.chunk(2, 1)
    assert_derivatives(device, lambda m: loss(m, v, weights, 0.0), (m.clone().requires_grad_(),))
    assert_derivatives(device, lambda v: loss(m, v, weights), (v.clone().requires_grad_(),))
    if weighted:
        assert_derivatives(device, lambda w: loss(m, v, w), (weights.clone().requires_grad_(),))


def test_hybrid_options(device, schedule):
    m, x0 = data(SHAPE, device, "learned_range")
    loss = lambda **options: fastgen.diffusion_loss(m, x0, 9, schedule, **{"seed": 1, "variance": "learned_range", **options})  # noqa: E731
    torch.testing.assert_close(loss(vlb_weight=0.0), fastgen.diffusion_loss(m[:, :4], x0, 9, schedule, seed=1))
    assert_same(loss(), loss(vlb_weight=0.001, decoder="discretized"))
    for name, given, kind in (
        ("variance", {"variance": "posterior"}, ValueError),
        ("vlb_weight", {"vlb_weight": -1.0}, ValueError),
        ("vlb_weight", {"vlb_weight": "1"}, TypeError),
        ("decoder", {"decoder": "exact"}, ValueError),
        ("loss", {"loss": "l2"}, ValueError),
        ("reduction", {"reduction": "total"}, ValueError),
        ("noise, seed", {"seed": None}, ValueError),
        ("noise, seed", {"seed": None, "prediction": "sample"}, ValueError),
        ("delta", {"loss": "huber", "delta": 0.0}, ValueError),
        ("weighting", {"weighting": torch.ones(2, device=device)}, ValueError),
        ("t", {}, ValueError),
    ):
        with pytest.raises(kind, match=f"^{name}: expected"):
            loss(**given) if given else fastgen.diffusion_loss(m, x0, 40, schedule, seed=1, variance="learned")
    with pytest.raises(ValueError, match="^model_output: expected"):
        fastgen.diffusion_loss(x0, x0, 9, schedule, seed=1, variance="learned")


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0, 9, [39, 0, 17]], ids=["first", "middle", "mixed"])
def test_gradcheck(device, schedule, prediction, variance, decoder, clip, t):
    """Of m in both halves, and of x0 and x_t on the decomposed path."""
    m, x0 = data((3, 2, 5), device, variance, torch.float64)
    x_t = normal(x0.shape, 2, torch.float64, device)
    options = {"prediction": prediction, "variance": variance, "decoder": decoder, "clip": clip}
    f = lambda m: fastgen.vlb_terms(m, x0, on(device, t), schedule, x_t=x_t, **options)  # noqa: E731
    assert_derivatives(device, f, (m.requires_grad_(),))
    g = lambda x_t: fastgen.vlb_terms(m.detach(), x0, on(device, t), schedule, x_t=x_t, **options)  # noqa: E731
    assert_derivatives(device, g, (x_t.requires_grad_(),))


@pytest.mark.parametrize("variance", ["posterior", "learned"])
def test_gradients_of_the_decoder_in_its_tails(device, schedule, variance):
    """Float32 against float64's own derivatives, by the mean and by the variance."""
    cases = [(x0, s, d * sign) for s in SIGMAS for d in DISTANCES for sign in (1, -1) for x0 in (-1.0, 0.25, 1.0)]
    x0 = torch.tensor([[each[0]] for each in cases], device=device)
    v = torch.tensor([[2 * math.log(each[1])] for each in cases], device=device)
    mean = torch.tensor([[x + d * s] for x, s, d in cases], device=device)
    m = torch.cat([mean, v], 1) if variance == "learned" else mean
    found = []
    for dtype, backend in ((torch.float32, fastgen.backend(device)), (torch.float64, "eager")):
        with fastgen.use_backend(backend):
            leaf = m.to(dtype).requires_grad_()
            x = x0.to(dtype)
            terms = fastgen.vlb_terms(leaf, x, 0, schedule, x_t=torch.zeros_like(x), prediction="sample", variance=variance)
            found.append(array(torch.autograd.grad(terms.sum(), leaf)[0]))
    np.testing.assert_allclose(
        found[0], found[1], rtol=3e-4, atol=2e-6 * np.abs(found[1]).max() if variance == "posterior" else 1e-5
    )


def test_detached_mean(device, schedule):
    """Only v gets a gradient, the one that it has anyway."""
    m, x0 = data(SHAPE, device, "learned_range")
    t = torch.tensor([39, 0, 17], device=device)
    gradients = []
    for detach in (False, True):
        leaf = m.clone().requires_grad_()
        terms = fastgen.vlb_terms(leaf, x0, t, schedule, seed=7, variance="learned_range", detach_mean=detach)
        gradients.append(torch.autograd.grad(terms.sum(), leaf)[0])
    assert not gradients[1][:, :4].any() and gradients[0][:, :4].all()
    assert_same(gradients[1][:, 4:], gradients[0][:, 4:])


def test_backward_more_than_once(device, schedule):
    m, x0 = data(SHAPE, device, "learned")
    leaf = m.requires_grad_()
    terms = fastgen.vlb_terms(leaf, x0, 9, schedule, seed=7, variance="learned", reduction="mean")
    first = torch.autograd.grad(terms, leaf, retain_graph=True)[0]
    assert_same(torch.autograd.grad(terms, leaf, retain_graph=True)[0], first)
    (twice,) = torch.autograd.grad(terms, leaf, create_graph=True)
    torch.testing.assert_close(twice, first, rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(twice.square().sum(), leaf)[0].isfinite().all()


@pytest.mark.skipif(not dispatch.has("vlb_terms_and_gradient"), reason="an op of the CPU alone")
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (5, 2), (40, 3, 17), (2, 2, 9_001), (0, 3, 4), (3, 2, 0)])
@pytest.mark.parametrize("loss, source", [(-1, "x_t"), (-1, "seed"), (0, "noise"), (0, "seed"), (1, "seed"), (2, "noise")])
@pytest.mark.parametrize("each_sample", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_the_forward_makes_ahead(schedule, shape, loss, source, each_sample, dtype):
    """The forward's and the backward's bits, of an upstream gradient of 1; and the two parts of a hybrid loss."""
    m, x0 = data(shape, "cpu", "learned", dtype)
    rows = schedule.vlb_terms_table("epsilon", "learned", x0.device, torch.promote_types(dtype, torch.float32), "uniform").rows
    t, z = torch.arange(shape[0]) * 13 % 40, normal(shape, 2, dtype)
    given = {"x_t": (z, None, None), "noise": (None, z, None), "seed": (None, None, 3)}[source]
    o = Operands(
        *(m, x0, rows, t, 0, *given[:2], None, given[2], 0, None, True, 0, 0.3, each_sample, loss, 0.7, None, 0.02),
    )
    gradient = torch.ones(shape[:1] if each_sample else (), dtype=rows.dtype)
    for detach in (False, True):
        terms, _, made = torch.ops.fastgen.vlb_terms_and_gradient(*o, detach, False)
        assert_same(terms, torch.ops.fastgen.vlb_terms(*o))
        assert_same(made, torch.ops.fastgen.vlb_terms_backward(gradient, *o, detach))
        if loss >= 0:
            term, simple, again = torch.ops.fastgen.vlb_terms_and_gradient(*o, detach, True)
            assert_same(again, made)
            assert_same(simple, torch.ops.fastgen.vlb_terms(*o._replace(vlb_weight=0.0)))
            assert_same(term, torch.ops.fastgen.vlb_terms(*o._replace(loss=-1, vlb_weight=1.0, scale=0.3 * 0.02)))


@pytest.mark.skipif(not dispatch.has("vlb_terms_and_error"), reason="an op of the CPU alone")
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (5, 2), (40, 3, 17), (2, 2, 9_001), (0, 3, 4), (3, 2, 0)])
@pytest.mark.parametrize("source", ["x_t", "noise", "seed"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_error_beside_the_terms(schedule, shape, source, clip, dtype):
    m, x0 = data(shape, "cpu", "learned", dtype)
    rows = schedule.vlb_terms_table("epsilon", "learned", x0.device, torch.promote_types(dtype, torch.float32)).rows
    t, z = torch.arange(shape[0]) * 13 % 40, normal(shape, 2, dtype)
    given = {"x_t": (z, None, None), "noise": (None, z, None), "seed": (None, None, 3)}[source]
    o = Operands(*(m, x0, rows, t, 0, *given[:2], None, given[2], 0, clip, True, 0, 0.3, True, -1, 1.0, None, 1.0))
    terms, error = torch.ops.fastgen.vlb_terms_and_error(*o)
    assert_same(terms, torch.ops.fastgen.vlb_terms(*o))
    if source == "noise":
        x_t = fastgen.q_sample(x0.to(rows.dtype), t, schedule, noise=z)
    else:
        x_t = z if source == "x_t" else fastgen.q_sample(x0.to(rows.dtype), t, schedule, seed=3)
    found = reference_x0(x_t.double(), m[:, : shape[1]].double(), t, schedule, clip)
    expected = (x0.double() - found).square().flatten(1).mean(1)
    rtol = 1e-5 if rows.dtype == torch.float32 else 1e-11
    torch.testing.assert_close(error, expected.to(rows.dtype), rtol=rtol, atol=1e-6, equal_nan=True)  # of nothing


def reference_x0(x_t, m, t, schedule, clip):
    """What a network that predicts ε says x0 is."""
    alpha = torch.from_numpy(schedule.alphas_cumprod)[t].reshape(-1, *[1] * (x_t.dim() - 1))
    found = (x_t - (1 - alpha).sqrt() * m) / alpha.sqrt()
    return found if clip is None else found.clamp(-clip, clip)


def test_every_backward_has_the_same_bits(device, schedule):
    """The first one multiplies what the forward may have made, a later one makes it anew."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        m, x0 = data(SHAPE, device, "learned", dtype)
        leaf, upstream = m.requires_grad_(), torch.tensor([0.3, -1.7, 2.0], dtype=torch.promote_types(dtype, torch.float32))
        terms = fastgen.vlb_terms(leaf, x0, 9, schedule, seed=7, variance="learned")
        hybrid = fastgen.diffusion_loss(leaf, x0, 9, schedule, seed=7, variance="learned", reduction="none")
        for result in (terms, hybrid, hybrid.mean()):
            g = upstream.to(device) if result.dim() else torch.tensor(0.3, device=device, dtype=result.dtype)
            first, second = (torch.autograd.grad(result, leaf, g, retain_graph=True)[0] for _ in range(2))
            assert_same(first, second)


def test_transforms(device, schedule):
    """torch.func and forward mode: the decomposed path, with the same noise."""
    m, x0 = data((3, 20), device, "posterior", torch.float64)
    f = lambda m: fastgen.vlb_terms(m, x0, 3, schedule, seed=1, reduction="sum")  # noqa: E731
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


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_one_source_of_x_t(device, schedule):
    m, x0 = data(SHAPE, device, "posterior")
    for given in ({}, {"x_t": x0, "seed": 1}, {"x_t": x0, "noise": x0}):
        with pytest.raises(ValueError, match="^x_t, noise, seed: expected"):
            fastgen.vlb_terms(m, x0, 9, schedule, **given)
    with pytest.raises(TypeError, match="^x_t: expected no float64"):
        fastgen.vlb_terms(m, x0, 9, schedule, x_t=x0.double())
