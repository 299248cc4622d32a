"""ddpm_step and ddim_step: values of every option, noise sources, shapes, layouts, out=, gradients."""

import itertools

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
)

import fastgen
from fastgen._core.tables import Coefficients, step_columns
from fastgen._ops.ddpm_step import step_with

PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("posterior", "beta", "learned", "learned_range")
BOUNDS = ("unbounded", "clip", "threshold")
STEPS = {"ddpm": fastgen.ddpm_step, "ddim": fastgen.ddim_step}
# one of each kind of kernel: plain, clipped, thresholded, learned variance, DDIM with noise
KINDS = {
    "plain": (fastgen.ddpm_step, {}),
    "clip": (fastgen.ddpm_step, {"clip": 1.0}),
    "threshold": (fastgen.ddpm_step, {"threshold": True}),
    "learned": (fastgen.ddpm_step, {"variance": "learned_range", "clip": 1.5, "prediction": "v_prediction"}),
    "ddim": (fastgen.ddim_step, {"eta": 0.7}),
    "guided": (fastgen.ddpm_step, {"clip": 1.0, "guidance_scale": 3.0}),
}
SCALE = 50  # of the largest terms, those of x0 from epsilon, at the last step of `schedule`


def bounds(kind, batch, device, dtype=torch.float64):
    """clip= or threshold= that bound some elements and not others."""
    return {
        "unbounded": {},
        "clip": {"clip": 1.25},
        "threshold": {"threshold": torch.linspace(0.7, 2.1, batch, dtype=dtype, device=device)},
    }[kind]


def in_numpy(options):
    return {k: array(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


class Case:
    """Inputs of one of KINDS, with a threshold and a second half of channels where it has them."""

    def __init__(self, kind, shape, device, dtype=torch.float32, m_dtype=None):
        self.step, options = KINDS[kind]
        self.options = dict(options)
        if options.get("threshold"):
            self.options.update(bounds("threshold", shape[0], device, torch.float32))
        self.x = normal(shape, 0, dtype, device)
        learned = options.get("variance", "").startswith("learned")
        m_shape = (shape[0], 2 * shape[1], *shape[2:]) if learned else shape
        self.m = normal(m_shape, 1, m_dtype or dtype, device)
        self.u = normal(m_shape, 3, m_dtype or dtype, device) if "guidance_scale" in options else None
        self.noise = normal(shape, 2, dtype, device)

    def __call__(self, t, schedule, x=None, m=None, **how):
        m = self.m if m is None else m
        if self.u is not None:
            how.setdefault("unconditional_output", self.u.to(m.dtype))
        return self.step(self.x if x is None else x, m, t, schedule, **self.options, **how)

    def expected(self, t, schedule, noise=None):
        formula = reference.ddpm_step if self.step is fastgen.ddpm_step else reference.ddim_step
        noise = self.noise if noise is None else noise
        options, m = in_numpy(self.options), array(self.m)
        if self.u is not None:
            m = reference.guided(m, array(self.u), options.pop("guidance_scale"))
        return formula(array(self.x), m, schedule.betas, t, array(noise), **options)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", TIMESTEPS.values(), ids=TIMESTEPS)
@pytest.mark.parametrize("prediction, variance, bound", list(itertools.product(PREDICTIONS, VARIANCES, BOUNDS)))
def test_ddpm_values(device, schedule, prediction, variance, bound, t, dtype):
    shape = (3, 4, 5, 6)
    m_shape = (3, 8, 5, 6) if variance.startswith("learned") else shape
    x, m, z = normal(shape, 0, dtype, device), normal(m_shape, 1, dtype, device), normal(shape, 2, dtype, device)
    options = {"prediction": prediction, "variance": variance, **bounds(bound, 3, device)}
    y, x0 = fastgen.ddpm_step(x, m, on(device, t), schedule, noise=z, return_x0=True, **options)
    expected = reference.ddpm_step(array(x), array(m), schedule.betas, t, array(z), **in_numpy(options))
    for actual, exact in zip((y, x0), expected, strict=True):
        assert actual.dtype == dtype and actual.shape == shape and not actual.requires_grad
        assert_close(actual, exact, SCALE)
    assert_same(fastgen.ddpm_step(x, m, on(device, t), schedule, noise=z, **options), y)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", TIMESTEPS.values(), ids=TIMESTEPS)
@pytest.mark.parametrize("prediction, eta, bound", list(itertools.product(PREDICTIONS, (0.0, 0.5, 1), BOUNDS)))
def test_ddim_values(device, schedule, prediction, eta, bound, t, dtype):
    shape = (3, 4, 5, 6)
    x, m, z = (normal(shape, seed, dtype, device) for seed in range(3))
    options = {"prediction": prediction, "eta": eta, **bounds(bound, 3, device)}
    y, x0 = fastgen.ddim_step(x, m, on(device, t), schedule, noise=z, return_x0=True, **options)
    expected = reference.ddim_step(array(x), array(m), schedule.betas, t, array(z), **in_numpy(options))
    for actual, exact in zip((y, x0), expected, strict=True):
        assert actual.dtype == dtype and actual.shape == shape and not actual.requires_grad
        assert_close(actual, exact, SCALE)
    if eta == 1 and t != 0:
        assert_close(
            y, fastgen.ddpm_step(x, m, on(device, t), schedule, noise=z, prediction=prediction, **bounds(bound, 3, device))
        )


@pytest.mark.parametrize("t", TIMESTEPS.values(), ids=TIMESTEPS)
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_equation_4_3(device, schedule, t, variance):
    """Algorithm 4.2 of the lecture note, with both choices of σ_t²."""
    x, m, z = (normal((3, 50), seed, torch.float64, device) for seed in range(3))
    mean = reference.mu_theta(array(x), array(m), schedule.betas, t)
    beta, bar, prev = reference.coefficients(schedule.betas, t, 2)
    sigma = np.sqrt(beta if variance == "beta" else (1 - prev) / (1 - bar) * beta)
    expected = mean + sigma * np.where(np.reshape(t, (-1, 1)) == 0, 0, array(z))
    assert_close(fastgen.ddpm_step(x, m, on(device, t), schedule, variance=variance, noise=z), expected, SCALE)


def test_deterministic_ddim_inverts_the_forward_process(device, schedule):
    """Given the true noise, η = 0 leads from x_t to x_{t−1} with the same noise, and at t = 0 to x0."""
    x0, noise = normal((2, 60), 0, torch.float64, device), normal((2, 60), 1, torch.float64, device)
    x = fastgen.q_sample(x0, 39, schedule, noise=noise)
    for t in reversed(range(40)):
        x = fastgen.ddim_step(x, noise, t, schedule)
        assert_close(x, fastgen.q_sample(x0, t - 1, schedule, noise=noise) if t else x0, SCALE)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_respaced_schedule(device, schedule, step):
    """t counts the kept steps, whose betas are not the old ones."""
    respaced = schedule.respace([0, 13, 39])
    x, m, z = (normal((3, 50), seed, torch.float64, device) for seed in range(3))
    formula = reference.ddpm_step if step is fastgen.ddpm_step else reference.ddim_step
    kept = np.cumprod(1 - schedule.betas)[[0, 13, 39]]
    betas = 1 - kept / np.array([1, *kept[:-1]])
    y = step(x, m, torch.tensor([0, 1, 2], device=device), respaced, noise=z, clip=1.0)
    assert_close(y, formula(array(x), array(m), betas, [0, 1, 2], array(z), clip=1.0)[0], SCALE)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype, m_dtype", list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("t", [17, [39, 0, 17]])
def test_dtypes(device, schedule, kind, dtype, m_dtype, t):
    """The promoted dtype, rounded once; noise of yet another dtype has no say in it."""
    case = Case(kind, (3, 4, 5, 6), device, dtype, m_dtype)
    result = torch.promote_types(dtype, m_dtype)
    for noise_dtype in (dtype, torch.float16, torch.float64):
        noise = case.noise.to(noise_dtype)
        y, x0 = case(on(device, t), schedule, noise=noise, return_x0=True)
        assert y.dtype == x0.dtype == result
        for actual, exact in zip((y, x0), case.expected(t, schedule, noise), strict=True):
            assert_close(actual, exact, SCALE)


@pytest.mark.parametrize("threshold_dtype", DTYPES)
def test_dtype_of_the_threshold(device, schedule, threshold_dtype):
    x, m = normal((3, 40), 0, device=device), normal((3, 40), 1, device=device)
    s = torch.tensor([0.5, 1.0, 1.5], dtype=threshold_dtype, device=device)  # exact in every dtype
    expected = fastgen.ddpm_step(x, m, 9, schedule, threshold=s.float(), seed=1)
    assert_same(fastgen.ddpm_step(x, m, 9, schedule, threshold=s, seed=1), expected)
    wide = torch.stack([s, 0 * s], dim=1)[:, 0]
    assert_same(fastgen.ddpm_step(x, m, 9, schedule, threshold=wide, seed=1), expected)


@pytest.mark.parametrize("t", [7, [7, 0, 3]])
def test_nan_and_inf_flow_through(device, schedule, kind, t):
    """NaN stays, ±inf stops at a clip, as in NumPy."""
    case = Case(kind, (3, 133, 1), device)
    case.x[0, [0, 130]], case.x[1, 5], case.x[2, 6] = torch.nan, torch.inf, -torch.inf
    case.m[1, [0, 9]], case.m[2, [6, 7]], case.m[0, 132] = torch.nan, torch.inf, -torch.inf
    case.noise[0, 7], case.noise[2, 131] = torch.nan, torch.inf
    if case.u is not None:
        case.u[0, 20], case.u[1, 30], case.u[2, [7, 31]] = torch.nan, torch.inf, -torch.inf
    y, x0 = case(on(device, t), schedule, noise=case.noise, return_x0=True)
    with np.errstate(invalid="ignore"):
        expected = case.expected(t, schedule)
    for actual, exact in zip((y, x0), expected, strict=True):
        # without a bound, the folded coefficients may meet inf − inf where the two-line formula does not, and the reverse
        if kind in ("plain", "ddim"):
            both = torch.tensor(np.isfinite(exact), device=device)
            assert torch.equal(actual.isfinite(), both)
            actual, exact = actual[both], exact[array(both) == 1]
        assert_close(actual, exact, SCALE)


# ---- guidance -------------------------------------------------------------------------------------------------------


GUIDED = {
    "ddpm": (fastgen.ddpm_step, {"variance": "beta"}),
    "learned": (fastgen.ddpm_step, {"variance": "learned_range", "prediction": "v_prediction"}),
    "ddim": (fastgen.ddim_step, {"eta": 0.5, "prediction": "sample"}),
    "still": (fastgen.ddim_step, {}),
}


@pytest.mark.pairs
@pytest.mark.parametrize("guided", GUIDED)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guidance(device, schedule, guided, bound, dtype):
    """By any number, to both results."""
    step, options = GUIDED[guided]
    learned, formula = guided == "learned", reference.ddpm_step if step is fastgen.ddpm_step else reference.ddim_step
    for shape, arrange, t, g in (
        ((3, 4, 5, 6), torch.clone, [39, 0, 17], 7.5),
        ((2, 3, 4, 7), channels_last, 17, -2),
        ((3, 2, 1), torch.clone, 9, 0.1),
    ):
        both = (shape[0], 2 * shape[1], *shape[2:]) if learned else shape
        x, z = (arrange(normal(shape, seed, dtype, device)) for seed in (0, 2))
        m, u = (arrange(normal(both, seed, dtype, device)) for seed in (1, 3))
        how = {**options, **bounds(bound, shape[0], device)}
        guidance = {"unconditional_output": u, "guidance_scale": g}
        mean = reference.guided(array(m), array(u), g, learned)
        expected = formula(array(x), mean, schedule.betas, t, array(z), **in_numpy(how))
        results = step(x, m, on(device, t), schedule, noise=z, return_x0=True, **guidance, **how)
        for actual, exact in zip(results, expected, strict=True):
            assert actual.dtype == dtype
            assert_close(actual, exact, 10 * SCALE)


@pytest.mark.parametrize("guided", GUIDED)
def test_guidance_that_leaves_one_output(device, schedule, guided):
    """By 0 the unconditional one, bit for bit; between two that are the same, that. The variance of the other is not read."""
    step, options = GUIDED[guided]
    x, m, u = (normal((3, 8, 5), seed, device=device) for seed in range(3))
    x, how = x[:, :4] if guided == "learned" else x, {**options, "clip": 1.0, "seed": 5}
    expected = step(x, m, 17, schedule, **how)
    assert_same(step(x, m, 17, schedule, unconditional_output=m, guidance_scale=2.5, **how), expected)
    same = torch.cat([u[:, :4], m[:, 4:]], dim=1) if guided == "learned" else u
    expected = step(x, same, 17, schedule, **how)
    if guided == "learned":
        u[:, 4:] = torch.nan
    assert_same(step(x, m, 17, schedule, unconditional_output=u, guidance_scale=0, **how), expected)


@pytest.mark.parametrize("guided", GUIDED)
def test_guidance_is_rounded_once(device, schedule, guided):
    """In half precision too; a recorded step gives the same numbers."""
    step, options = GUIDED[guided]
    m_shape = (3, 8, 9) if guided == "learned" else (3, 4, 9)
    for dtype in (torch.bfloat16, torch.float16):
        x, m, u = (normal(shape, seed, dtype, device) for seed, shape in enumerate(((3, 4, 9), m_shape, m_shape)))
        how = {**options, "seed": 3, "guidance_scale": 7.5, "return_x0": True}
        wide = step(x.float(), m.float(), 17, schedule, unconditional_output=u.float(), **how)
        for leaf in (u, u.clone().requires_grad_()):
            for actual, exact in zip(step(x, m, 17, schedule, unconditional_output=leaf, **how), wide, strict=True):
                assert actual.dtype == dtype and actual.requires_grad == leaf.requires_grad
                assert_close(actual, exact, SCALE)


@pytest.mark.parametrize("guided, bound", [("ddpm", "unbounded"), ("learned", "clip"), ("ddim", "threshold")])
def test_guidance_gradcheck(device, schedule, guided, bound):
    step, options = GUIDED[guided]
    shape, m_shape = (2, 1, 3), (2, 2, 3) if guided == "learned" else (2, 1, 3)
    x, m, u = (normal(s, i, torch.float64, device).requires_grad_() for i, s in enumerate((shape, m_shape, m_shape)))
    how = {**options, **bounds(bound, 2, device), "seed": 3, "guidance_scale": 1.5, "return_x0": True}
    t = on(device, [39, 0])
    assert_derivatives(device, lambda x, m, u: step(x, m, t, schedule, unconditional_output=u, **how), (x, m, u))
    y, _ = step(x.detach(), m.detach(), t, schedule, unconditional_output=u, **how)
    assert y.requires_grad  # by u alone


# ---- coefficients of another library --------------------------------------------------------------------------------


def coefficients(learned=False):
    """Rows of a step that weighs m beside the clipped x0; in the first one its weight W is 0, and so is sigma."""
    rng = np.random.default_rng(5)
    p, q, u, v, w = rng.uniform(0.3, 1.5, (5, 4))
    w[0], sigma = 0.0, np.array([0.0, 1.0, 1.0, 1.0]) * (1.0 if learned else rng.uniform(0.2, 1.0, 4))
    slope, intercept = rng.uniform(-0.5, 0.5, (2, 4)) if learned else (0.0, 0.0)
    return Coefficients("ddpm_step", step_columns(p, q, u, v, sigma, slope, intercept, w))


def weighed_step(x, m, rows, t, z, learned=False, clip=None, threshold=None):
    """(y, x0) in float64."""
    t = np.asarray(t)
    row = rows[t].reshape(*t.shape, *[1] * (x.ndim - 1), 10)
    p, q, u, v, _, _, sigma, slope, intercept, w = np.moveaxis(row, -1, 0)
    m, variance = np.split(m, 2, axis=1) if learned else (m, 0.0)
    x0 = p * x + q * m
    if clip is not None:
        x0 = np.clip(x0, -clip, clip)
    if threshold is not None:
        s = threshold.reshape(-1, *[1] * (x.ndim - 1))
        x0 = np.clip(x0, -s, s) / s
    return u * x0 + v * x + w * m + sigma * np.exp(slope * variance + intercept) * z, x0


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_weighed_beside_x0(device, bound, learned, dtype):
    table = coefficients(learned)
    for shape, arrange, t in (
        ((3, 4, 5, 6), torch.clone, [3, 0, 1]),
        ((2, 4, 4, 7), channels_last, 2),
        ((3, 2, 1), torch.clone, [1, 2, 0]),
    ):
        both = (shape[0], 2 * shape[1], *shape[2:]) if learned else shape
        x, z = (arrange(normal(shape, seed, dtype, device)) for seed in (0, 2))
        m, u = (arrange(normal(both, seed, dtype, device)) for seed in (1, 3))
        options = {"learned": learned, **bounds(bound, shape[0], device)}
        guided = reference.guided(array(m), array(u), 2.5, learned)
        for mean, how in ((array(m), {}), (guided, {"unconditional_output": u, "guidance_scale": 2.5})):
            y, x0 = step_with(table, x, m, on(device, t), noise=z, return_x0=True, **options, **how)
            expected = weighed_step(array(x), mean, table.rows, t, array(z), **in_numpy(options))
            for actual, exact in zip((y, x0), expected, strict=True):
                assert_close(actual, exact, SCALE)
    z = fastgen.randn(shape, seed=4, offset=2, dtype=dtype, device=device)
    expected, _ = weighed_step(array(x), array(m), table.rows, 2, array(z), **in_numpy(options))
    assert_close(step_with(table, x, m, 2, seed=4, **options), expected, SCALE)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_gradients_of_an_output_weighed_beside_x0(device, bound, learned):
    table, shape, m_shape = coefficients(learned), (2, 1, 3), (2, 2, 3) if learned else (2, 1, 3)
    x, m, z = (normal(s, i, torch.float64, device).requires_grad_() for i, s in enumerate((shape, m_shape, shape)))
    t, options = on(device, [3, 0]), {"learned": learned, **bounds(bound, 2, device)}
    assert_derivatives(device, lambda x, m, z: step_with(table, x, m, t, noise=z, return_x0=True, **options), (x, m, z))


def test_an_infinite_output_that_has_no_weight(device):
    """Is clipped, and where W is 0 not looked at any more."""
    table = coefficients()
    x, m = normal((2, 133), 0, device=device), normal((2, 133), 1, device=device)
    m[:, ::7], m[:, 1::7] = torch.inf, -torch.inf
    for bound in ("clip", "threshold"):
        options = bounds(bound, 2, device)
        y = step_with(table, x, m, on(device, [0, 1]), seed=1, **options)
        assert_close(
            y[:1], weighed_step(array(x), np.clip(array(m), -1e9, 1e9), table.rows, [0, 1], 0.0, **in_numpy(options))[0][:1]
        )
        assert torch.equal(y[1].isfinite(), m[1].isfinite())


# ---- the last step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_noise_at_step_zero(device, schedule, kind, bad):
    """At t = 0 the noise is not even looked at, and neither is a learned variance."""
    case = Case(kind, (3, 4, 33), device)
    for t in (0, torch.tensor([0, 0, 0], device=device)):
        expected = case(t, schedule, noise=torch.zeros_like(case.noise))
        assert expected.isfinite().all()
        assert_same(case(t, schedule, noise=torch.full_like(case.noise, bad)), expected)
        assert_same(case(t, schedule, seed=1), expected)
        assert_same(case(t, schedule), expected)
    t = torch.tensor([0, 7, 0], device=device)
    mixed = case(t, schedule, noise=torch.full_like(case.noise, bad))
    assert_same(mixed[[0, 2]], expected[[0, 2]])
    assert not mixed[1].isfinite().any()
    if kind == "learned":
        case.m[:, 4:] = bad
        assert_same(case(0, schedule, noise=case.noise), expected)
        assert_same(case(torch.zeros_like(t), schedule, seed=5), expected)


# ---- where noise comes from -----------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("t", [17, [0, 39, 17]])
@pytest.mark.parametrize("seed", [3, 2**64 - 1, torch.tensor([-8]), torch.tensor([5, -5, 2**62])])
def test_seed_uses_the_timestep_as_offset(device, schedule, kind, dtype, t, seed):
    case = Case(kind, (3, 5, 31), device, dtype)
    seed = seed.to(device) if isinstance(seed, torch.Tensor) else seed
    y = case(on(device, t), schedule, seed=seed)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    draw = lambda offset: fastgen.randn(case.x.shape, seed=seed, offset=offset, dtype=precision, device=device)  # noqa: E731
    noise = torch.stack([draw(offset)[i] for i, offset in enumerate(t)]) if isinstance(t, list) else draw(t)
    assert_close(y, case.expected(t, schedule, noise)[0], SCALE)
    assert_close(y, case(on(device, t), schedule, noise=noise).double(), SCALE)


def test_generator_gives_the_numbers_of_torch_randn(device, schedule, kind):
    """In the dtype of the result, and at t = 0 too, so that the generator advances as it would without fastgen."""
    case = Case(kind, (3, 5, 31), device, torch.bfloat16, torch.float32)
    generator = torch.Generator(device).manual_seed(11)
    eager = torch.Generator(device).manual_seed(11)
    for t in (9, 0, torch.tensor([1, 0, 39], device=device), 3):
        noise = torch.randn(case.x.shape, generator=eager, dtype=torch.float32, device=device)
        assert_same(case(t, schedule, generator=generator), case(t, schedule, noise=noise))


def test_manual_seed_governs_noise_that_nobody_chose(device, schedule, kind):
    case = Case(kind, (3, 5, 31), device)
    torch.manual_seed(1)
    first, second = case(9, schedule), case(9, schedule)
    torch.manual_seed(1)
    assert_same(case(9, schedule), first)
    assert not torch.equal(first, second)


def test_deterministic_ddim_draws_nothing(device, schedule):
    x, m = normal((3, 50), 0, device=device), normal((3, 50), 1, device=device)
    state = torch.get_rng_state()
    y = fastgen.ddim_step(x, m, 9, schedule)
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator(device)
    given = generator.get_state()
    for how in ({"seed": 3}, {"noise": torch.full_like(x, torch.nan)}, {"generator": generator}):
        assert_same(fastgen.ddim_step(x, m, 9, schedule, eta=0, **how), y)
    assert torch.equal(generator.get_state(), given)


def test_sample_is_independent_of_the_batch(device, schedule, kind):
    """Over several steps, at different timesteps, with per-sample seeds, a sample is what it is alone, bit for bit."""
    case = Case(kind, (3, 4, 9, 11), device)
    seeds, steps = torch.tensor([4, -4, 2**62 + 1], device=device), torch.tensor([39, 20, 2], device=device)
    for arrange in (torch.clone, channels_last):
        x = arrange(case.x)
        for k in range(3):
            x = case(steps - k, schedule, x=x, m=arrange(case.m), seed=seeds)
        for i in range(3):
            one = slice(i, i + 1)
            options = {k: v[one] if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
            options |= {} if case.u is None else {"unconditional_output": case.u[one]}
            alone = arrange(case.x)[one]
            for k in range(3):
                alone = case.step(alone, case.m[one], int(steps[i]) - k, schedule, seed=seeds[one], **options)
            assert_same(alone[0], x[i])


# ---- shapes, layouts, out= ------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_sample", [False, True], ids=["int_t", "tensor_t"])
def test_shapes(device, schedule, kind, shape, per_sample):
    if kind == "learned" and len(shape) == 1:
        shape = (*shape, 1)  # channels are needed
    case = Case(kind, shape, device)
    t = (torch.arange(shape[0], device=device) * 7 + 3) % 40 if per_sample else 17
    y, x0 = case(t, schedule, noise=case.noise, return_x0=True)
    for actual, exact in zip((y, x0), case.expected(t.cpu().numpy() if per_sample else t, schedule), strict=True):
        assert actual.shape == shape
        assert_close(actual, exact, SCALE)
    seeded, x0_again = case(t, schedule, seed=2, return_x0=True)
    noise = [fastgen.randn(shape, seed=2, offset=int(k), device=device)[i] for i, k in enumerate(t)] if per_sample else None
    noise = torch.stack(noise) if noise else fastgen.randn(shape, seed=2, offset=17, device=device)
    assert_close(seeded, case(t, schedule, noise=noise), SCALE)
    assert_same(x0_again, x0)


def test_a_million_elements(device, schedule):
    """Many tiles, many threads and a tail."""
    case = Case("clip", (1, 2**20 + 3), device)
    assert_close(case(17, schedule, noise=case.noise), case.expected(17, schedule)[0], SCALE)
    noise = fastgen.randn(case.x.shape, seed=2, offset=17, device=device)
    assert_close(case(17, schedule, seed=2), case(17, schedule, noise=noise), SCALE)


LAYOUT_CASES = [((3, 4, 5, 6), *layouts) for layouts in itertools.product(LAYOUTS, LAYOUTS)] + [
    (shape, *layouts)
    for shape in [(2, 3, 4, 5, 3), (3, 65, 3), (2, 300, 1, 3), (2, 1, 5, 7)]
    for layouts in [("channels_last", "channels_last"), ("contiguous", "channels_last"), ("channels_last", "sliced")]
]


@pytest.mark.pairs
@pytest.mark.parametrize("shape, layout, other", LAYOUT_CASES)
def test_layouts(device, schedule, kind, shape, layout, other):
    """Any strides of any input give the values of the contiguous tensors; contiguous and channels-last are kept."""
    case = Case(kind, shape, device)
    x, m, noise = LAYOUTS[layout](case.x), LAYOUTS[other](case.m), LAYOUTS[other](case.noise)
    for t in (9, torch.arange(shape[0], device=device)):
        for how, same in (({"noise": case.noise}, {"noise": noise}), ({"seed": 4}, {"seed": 4})):
            actual = case(t, schedule, x=x, m=m, return_x0=True, **same)
            for a, e in zip(actual, case(t, schedule, return_x0=True, **how), strict=True):
                assert_same(a, e)
            if layout == "channels_last":
                assert all(a.movedim(1, -1).is_contiguous() for a in actual)
            elif layout in ("contiguous", "unaligned"):
                assert all(a.is_contiguous() for a in actual)


def test_expanded_inputs(device, schedule):
    x, m = normal((3, 1, 4), 0, device=device), normal((1, 5, 4), 1, device=device)
    y = fastgen.ddpm_step(x.expand(3, 5, 4), m.expand(3, 5, 4), 9, schedule, seed=1)
    assert_same(y, fastgen.ddpm_step(x.repeat(1, 5, 1), m.repeat(3, 1, 1), 9, schedule, seed=1))


def test_timesteps_and_seeds_with_strides(device, schedule, kind):
    case = Case(kind, (3, 40), device)
    expected = case(torch.tensor([5, 5, 5], device=device), schedule, seed=torch.tensor([1, 1, 1], device=device))
    expanded = torch.tensor([5], device=device).expand(3), torch.tensor([1], device=device).expand(3)
    sliced = torch.full((3, 2), 5, device=device)[:, 1], torch.full((3, 2), 1, device=device)[:, 1]
    for t, seed in (expanded, sliced):
        assert_same(case(t, schedule, seed=seed), expected)


@pytest.mark.pairs
@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_out(device, schedule, kind, layout, out_layout, dtype):
    case = Case(kind, (3, 4, 5, 6), device, dtype, torch.bfloat16)
    case.x = LAYOUTS[layout](case.x)
    for how in ({"noise": case.noise}, {"seed": 3}):
        out = LAYOUTS[out_layout](torch.full_like(case.noise, torch.nan))
        strides = out.stride()
        y, x0 = case(9, schedule, return_x0=True, **how)
        assert case(9, schedule, out=out, **how) is out and out.stride() == strides
        assert_same(out, y)
        out.fill_(torch.nan)
        returned, returned_x0 = case(9, schedule, out=out, return_x0=True, **how)
        assert returned is out
        assert_same(out, y)
        assert_same(returned_x0, x0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_may_be_an_input(device, schedule, kind, layout):
    case = Case(kind, (3, 4, 5, 6), device)
    for t in (9, torch.tensor([9, 0, 39], device=device)):
        for how in ({"noise": case.noise}, {"seed": 3}):
            expected, expected_x0 = case(t, schedule, return_x0=True, **how)
            in_place = LAYOUTS[layout](case.x)
            returned, x0 = case(t, schedule, x=in_place, out=in_place, return_x0=True, **how)
            assert returned is in_place
            assert_same(in_place, expected)
            assert_same(x0, expected_x0)
            if case.m.shape == case.x.shape:
                in_place = LAYOUTS[layout](case.m)
                assert_same(case(t, schedule, m=in_place, out=in_place, **how), expected)
            if case.u is not None:
                in_place = LAYOUTS[layout](case.u)
                assert_same(case(t, schedule, unconditional_output=in_place, out=in_place, **how), expected)


# ---- gradients ------------------------------------------------------------------------------------------------------


GRADIENT_OPTIONS = [
    {"prediction": "epsilon", "variance": "beta"},
    {"prediction": "v_prediction", "variance": "learned"},
    {"prediction": "sample", "variance": "learned_range"},
]


@pytest.mark.pairs
@pytest.mark.parametrize("t", [9, [39, 0]])
@pytest.mark.parametrize("options", GRADIENT_OPTIONS, ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize("bound", BOUNDS)
def test_ddpm_gradcheck(device, schedule, options, bound, t):
    """First and second derivatives of both results, in everything that may have a gradient. The data lie off the kinks."""
    shape = (2, 1, 3)
    m_shape = (2, 2, 3) if options["variance"].startswith("learned") else shape
    x, m, z = (normal(s, i, torch.float64, device).requires_grad_() for i, s in enumerate((shape, m_shape, shape)))
    options = {**options, **bounds(bound, 2, device)}
    t = on(device, t)
    for f, inputs in [
        (lambda x, m, z: fastgen.ddpm_step(x, m, t, schedule, noise=z, return_x0=True, **options), (x, m, z)),
        (lambda x, m: fastgen.ddpm_step(x, m, t, schedule, seed=3, **options), (x, m)),
    ]:
        assert_derivatives(device, f, inputs)


@pytest.mark.parametrize("t", [9, [39, 0]])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("bound", BOUNDS)
def test_ddim_gradcheck(device, schedule, eta, bound, t):
    x, m, z = (normal((2, 2, 3), i, torch.float64, device).requires_grad_() for i in range(3))
    options = {"eta": eta, **bounds(bound, 2, device)}
    t = on(device, t)
    f = lambda x, m, z: fastgen.ddim_step(x, m, t, schedule, noise=z, return_x0=True, **options)  # noqa: E731
    inputs = (x, m, z) if eta else (x, m, z.detach())  # with η = 0 the noise is not part of the result
    assert_derivatives(device, f, inputs)


@pytest.mark.pairs
@pytest.mark.parametrize(
    "needed, through",
    [((0, 0, 1), "y"), *itertools.product([(1, 0, 0), (0, 1, 0), (1, 1, 1)], ["y", "x0", "both"])],
)
def test_gradients(device, schedule, kind, needed, through):
    """Float32 gradients, alone and together, through either result and both, against eager ones in float64."""
    case = Case(kind, (3, 4, 5, 6), device)
    weights = [
        normal(case.x.shape, seed, device=device) if through in (name, "both") else None for seed, name in ((5, "y"), (6, "x0"))
    ]
    t = torch.tensor([39, 0, 5], device=device)

    def gradients(dtype, arrange=torch.clone):
        leaves = [
            arrange(leaf.to(dtype)).requires_grad_(bool(need))
            for leaf, need in zip((case.x, case.m, case.noise), needed, strict=True)
        ]
        results = case(t, schedule, x=leaves[0], m=leaves[1], noise=leaves[2], return_x0=True)
        terms = [(y * w).sum() for y, w in zip(results, weights, strict=True) if w is not None]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return torch.autograd.grad(sum(terms), wanted, allow_unused=True, materialize_grads=True)

    with fastgen.use_backend("eager"):
        exact = gradients(torch.float64)
    for arrange in (torch.clone, channels_last):
        for a, e in zip(gradients(torch.float32, arrange), exact, strict=True):
            assert_close(a, e, SCALE)


@pytest.mark.parametrize("dtype, m_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_gradients_have_the_dtypes_of_the_inputs(device, schedule, kind, dtype, m_dtype):
    case = Case(kind, (3, 4, 5), device, dtype, m_dtype)
    leaves = case.x.requires_grad_(), case.m.requires_grad_(), case.noise.double().requires_grad_()
    case(9, schedule, noise=leaves[2]).sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [dtype, m_dtype, torch.float64]
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)


def test_no_gradient_beyond_the_bounds(device, schedule):
    """x0 outside ±clip passes none on; a NaN passes none on either."""
    m = torch.tensor([[0.5, 3.0, -3.0, torch.nan]], device=device, requires_grad=True)
    x = torch.zeros(1, 4, device=device)
    for bound in ({"clip": 1.0}, {"threshold": torch.ones(1, device=device)}):
        y = fastgen.ddpm_step(x, m, 9, schedule, prediction="sample", noise=x, **bound)
        (gradient,) = torch.autograd.grad(y[0, :3].sum(), m)
        assert gradient[0, 0] > 0 and not gradient[0, 1:].any()


def test_gradients_are_recorded_only_where_asked(device, schedule, kind):
    case = Case(kind, (2, 3, 4), device)
    assert not any(y.requires_grad for y in case(3, schedule, seed=1, return_x0=True))
    assert case(3, schedule, x=case.x.clone().requires_grad_(), seed=1).requires_grad
    assert case(3, schedule, m=case.m.clone().requires_grad_(), seed=1).requires_grad
    with torch.no_grad():
        x = case.x.clone().requires_grad_()
        assert not case(3, schedule, x=x, seed=1).requires_grad
        assert_same(case(3, schedule, x=x, seed=1, out=torch.empty_like(case.x)), case(3, schedule, seed=1))


@pytest.mark.parametrize(("noise", "error"), [(torch.zeros(1), ValueError), (torch.zeros(2, 3, dtype=torch.int64), TypeError)])
def test_noise_is_checked_where_none_is_added(device, noise, error):
    x = torch.ones(2, 3, device=device)
    with pytest.raises(error, match="^noise"):
        fastgen.ddim_step(x, x, 3, fastgen.Schedule.linear(10), noise=noise.to(device))


def test_learned_variance_at_t0_has_finite_gradients(device):
    x, noise = torch.ones(1, 1, 3, device=device), torch.ones(1, 1, 3, device=device, requires_grad=True)
    output = torch.cat([torch.ones_like(x), torch.full_like(x, 300.0)], dim=1).requires_grad_()
    schedule = fastgen.Schedule.linear(10)
    fastgen.ddpm_step(x, output, 0, schedule, variance="learned", noise=noise).sum().backward()
    assert torch.isfinite(output.grad).all() and torch.equal(noise.grad, torch.zeros_like(noise))
