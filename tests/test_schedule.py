"""Schedules: every constructor against its published formula, derived schedules, tables, and what kind of object it is."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

import fastgen
from fastgen import Schedule

CONSTRUCTORS = {
    "linear": Schedule.linear,
    "scaled_linear": Schedule.scaled_linear,
    "cosine": Schedule.cosine,
    "sigmoid": Schedule.sigmoid,
    "from_betas": lambda steps: Schedule.from_betas(np.linspace(0.01, 0.3, steps)),
}
CPU = torch.device("cpu")


# ---- constructors ---------------------------------------------------------------------------------------------------


def test_linear():
    """Ho et al. 2020, section 4: constants increasing linearly from 1e-4 to 0.02, T = 1000."""
    schedule = Schedule.linear()
    assert len(schedule) == 1000
    np.testing.assert_allclose(schedule.betas, [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)], rtol=1e-13)
    np.testing.assert_allclose(Schedule.linear(5, 0.1, 0.5).betas, [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-14)
    assert Schedule.linear(1, 0.1, 0.5).betas.tolist() == [0.1]


def test_scaled_linear():
    """Latent diffusion: the square root of β is linear."""
    schedule = Schedule.scaled_linear()
    root = np.sqrt(schedule.betas)
    np.testing.assert_allclose(root[[0, -1]] ** 2, [0.00085, 0.012], rtol=1e-13)
    np.testing.assert_allclose(np.diff(root), (math.sqrt(0.012) - math.sqrt(0.00085)) / 999, rtol=1e-9)


@pytest.mark.parametrize("steps, s", [(1000, 0.008), (50, 0.008), (50, 0.02), (1, 0.008)])
def test_cosine(steps, s):
    """Nichol & Dhariwal 2021, equation (17): ᾱ_t = f(t)/f(0) until β is cut off at 0.999."""
    schedule = Schedule.cosine(steps, s=s)
    f = [math.cos((t / steps + s) / (1 + s) * math.pi / 2) ** 2 for t in range(steps + 1)]
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], np.divide(f[1:-1], f[0]), rtol=1e-10)
    np.testing.assert_allclose(schedule.betas, [min(1 - b / a, 0.999) for a, b in zip(f, f[1:], strict=False)], rtol=1e-10)
    assert schedule.betas[-1] == 0.999 and Schedule.cosine(steps, max_beta=0.5).betas.max() == 0.5


def test_sigmoid():
    schedule = Schedule.sigmoid(7, 0.01, 0.2)
    expected = [0.01 + (0.2 - 0.01) / (1 + math.exp(-s)) for s in (-6, -4, -2, 0, 2, 4, 6)]
    np.testing.assert_allclose(schedule.betas, expected, rtol=1e-13)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda b: torch.tensor(b, dtype=torch.float64)])
def test_from_betas(kind):
    betas = [0.125, 0.25, 0.5]  # exact in float32 as well
    schedule = Schedule.from_betas(kind(betas))
    assert schedule.betas.tolist() == betas
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.875, 0.65625, 0.328125], rtol=1e-15)
    assert schedule == Schedule.from_betas(betas)


@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_arrays(constructor):
    """Every array from its definition in Ho et al. 2020, in exact or compensated arithmetic."""
    schedule = constructor(100)
    cumprod = [math.exp(math.fsum(math.log1p(-b) for b in schedule.betas[: t + 1])) for t in range(100)]
    prev = [1.0, *cumprod[:-1]]
    np.testing.assert_allclose(schedule.alphas, 1 - schedule.betas, rtol=0)
    np.testing.assert_allclose(schedule.alphas_cumprod, cumprod, rtol=1e-12)
    np.testing.assert_allclose(schedule.alphas_cumprod_prev, prev, rtol=1e-12)
    tilde = schedule.betas * (1 - np.array(prev)) / (1 - np.array(cumprod))
    np.testing.assert_allclose(schedule.posterior_variance, tilde, rtol=1e-9, atol=0)
    assert schedule.timesteps.tolist() == list(range(100))
    assert schedule.posterior_variance[0] == 0 and len(schedule) == 100
    for name in ("betas", "alphas", "alphas_cumprod", "alphas_cumprod_prev", "posterior_variance"):
        assert getattr(schedule, name).dtype == np.float64 and getattr(schedule, name).shape == (100,)
    assert schedule.timesteps.dtype == np.int64


# ---- derived schedules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, steps, spacing, expected",
    [
        (1000, 5, None, [0, 200, 400, 600, 800]),
        (1000, 5, "leading", [0, 200, 400, 600, 800]),
        (1000, 5, "trailing", [199, 399, 599, 799, 999]),
        (1000, 5, "linspace", [0, 250, 500, 749, 999]),  # 249.75, 499.5, 749.25: halves round to even
        (10, 4, "leading", [0, 2, 4, 6]),
        (10, 4, "trailing", [1, 4, 7, 9]),  # 10, 7.5, 5, 2.5 rounded, minus 1
        (10, 4, "linspace", [0, 3, 6, 9]),
        (10, 10, "leading", list(range(10))),
        (10, 10, "trailing", list(range(10))),
        (10, 10, "linspace", list(range(10))),
        (10, 1, "leading", [0]),
        (10, 1, "trailing", [9]),
        (10, 1, "linspace", [0]),
        (10, [1, 2, 9], None, [1, 2, 9]),
        (10, (9,), None, [9]),
        (10, np.array([0, 5]), None, [0, 5]),
        (10, torch.tensor([0, 5]), None, [0, 5]),
        (10, range(0, 10, 3), None, [0, 3, 6, 9]),
    ],
)
def test_respaced_steps(total, steps, spacing, expected):
    assert Schedule.linear(total).respace(steps, spacing).timesteps.tolist() == expected


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 49, 99, 100])
def test_respace_keeps_the_marginals(steps, spacing):
    """ᾱ stays that of the kept steps; β becomes what leads from one kept step to the next."""
    schedule = Schedule.linear(100, 1e-3, 0.1)
    respaced = schedule.respace(steps, spacing)
    kept = schedule.alphas_cumprod[respaced.timesteps]
    assert len(respaced) == steps and len(set(respaced.timesteps.tolist())) == steps
    np.testing.assert_array_equal(respaced.alphas_cumprod, kept)
    np.testing.assert_allclose(np.cumprod(1 - respaced.betas), kept, rtol=1e-12)
    previous = np.concatenate([[-1], respaced.timesteps[:-1]])
    skipped = [schedule.alphas[a + 1 : b + 1].prod() for a, b in zip(previous, respaced.timesteps, strict=True)]
    np.testing.assert_allclose(respaced.alphas, skipped, rtol=1e-12)
    if 1 < steps < 50:
        assert np.all(respaced.betas[1:] > 1.5 * schedule.betas[respaced.timesteps][1:])


def test_respaced_timesteps_lead_back_to_the_first_schedule():
    twice = Schedule.linear(100).respace(50).respace([0, 10, 20])
    assert twice.timesteps.tolist() == [0, 20, 40]
    np.testing.assert_array_equal(twice.alphas_cumprod, Schedule.linear(100).alphas_cumprod[[0, 20, 40]])


@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_rescale_zero_terminal_snr(constructor):
    """Lin et al. 2023, algorithm 1: √ᾱ is shifted and scaled, first value kept, last value 0."""
    schedule = constructor(100)
    rescaled = schedule.rescale_zero_terminal_snr()
    root, first, last = (np.sqrt(a) for a in (schedule.alphas_cumprod, *schedule.alphas_cumprod[[0, -1]]))
    np.testing.assert_allclose(np.sqrt(rescaled.alphas_cumprod), (root - last) * first / (first - last), rtol=1e-12)
    assert rescaled.alphas_cumprod[-1] == 0.0 and rescaled.betas[-1] == 1.0
    assert rescaled.alphas_cumprod[0] == pytest.approx(schedule.alphas_cumprod[0], rel=1e-15)
    np.testing.assert_allclose(np.cumprod(rescaled.alphas), rescaled.alphas_cumprod, rtol=1e-9, atol=0)


STEPS = [fastgen.ddpm_step, fastgen.ddim_step]


@pytest.mark.parametrize("step", STEPS)
def test_epsilon_prediction_is_refused_where_the_snr_is_zero(device, step):
    schedule = Schedule.linear(50).rescale_zero_terminal_snr()
    x, out = torch.ones(2, 3, device=device), torch.full((2, 3), 7.0, device=device)
    with pytest.raises(ValueError, match="^t: .*signal-to-noise ratio of zero.*v_prediction"):
        step(x, x, 49, schedule, out=out)
    t = torch.tensor([3, 49], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="^t: .*signal-to-noise ratio of zero.*v_prediction"):
            step(x, x, t, schedule, out=out)
        assert torch.all(out == 7)
    else:
        assert torch.equal(step(x, x, t, schedule).isnan().all(1).cpu(), torch.tensor([False, True]))
    assert step(x, x, 48, schedule).isfinite().all()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions_work_where_the_snr_is_zero(device, step, prediction):
    """There x_t is pure noise: x0 is −v, or the sample, and says all there is about the mean."""
    schedule = Schedule.linear(50).rescale_zero_terminal_snr()
    x, m = torch.tensor([[3.0, -1.0]], device=device), torch.tensor([[0.5, 0.25]], device=device)
    for t in (49, torch.tensor([49], device=device)):
        y, x0 = step(x, m, t, schedule, prediction=prediction, noise=torch.zeros_like(x), return_x0=True)
        torch.testing.assert_close(x0, m if prediction == "sample" else -m)
        direction = x * (1 - schedule.alphas_cumprod[48]) ** 0.5 if step is fastgen.ddim_step else 0.0
        torch.testing.assert_close(y, schedule.alphas_cumprod[48] ** 0.5 * x0 + direction)


def test_beta_of_one_is_allowed_at_the_end_only(device):
    schedule = Schedule.from_betas([0.1, 0.2, 1.0])
    assert schedule.alphas_cumprod[-1] == 0
    x = torch.ones(1, 2, device=device)
    assert torch.equal(fastgen.q_sample(x, 2, schedule, noise=2 * x), 2 * x)
    with pytest.raises(ValueError, match="^betas: .* at index 1"):
        Schedule.from_betas([0.1, 1.0, 0.2])


# ---- the object -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "make, argument",
    [
        (
            lambda: fastgen.Schedule.from_betas([1e-17, 1e-3]),
            r"betas: .* falls at every step .* alphas_cumprod\[0\] = 1.0 after 1.0",
        ),
        (
            lambda: fastgen.Schedule.from_betas([1e-3, 1e-17]),
            r"betas: .* falls at every step .* alphas_cumprod\[1\] = 0.999 after 0.999",
        ),
        (lambda: fastgen.Schedule.from_betas([0.9] * 400), r"betas: .* above 2.2e-308 .* alphas_cumprod\[307\] = "),
        (
            lambda: fastgen.Schedule.linear(100_000),
            r"steps, beta_start, beta_end: .* above 2.2e-308 .* alphas_cumprod\[83",
        ),
        (
            lambda: fastgen.Schedule.linear(90_000),
            r"steps, beta_start, beta_end: .* above 2.2e-308 .* alphas_cumprod\[",
        ),
        (lambda: fastgen.Schedule.scaled_linear(10**6), "steps, beta_start, beta_end: .* above 2.2e-308"),
        (lambda: fastgen.Schedule.sigmoid(10**6), "steps, beta_start, beta_end: .* above 2.2e-308"),
        (lambda: fastgen.Schedule.sigmoid(2, 1e-18, 1e-17), "steps, beta_start, beta_end: .* falls at every step"),
        (lambda: fastgen.Schedule.cosine(10, s=1e30), "steps, s, max_beta: .* falls at every step"),
        (lambda: fastgen.Schedule([0.5, 0.5], [0.5, float("nan")], [0, 1], "own"), "schedule: "),
    ],
)
def test_a_schedule_that_no_step_could_use_is_refused_when_it_is_made(make, argument):
    with pytest.raises(ValueError, match=f"^{argument}"):
        make()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["posterior", "beta", "learned_range"])
def test_the_longest_schedules_give_finite_steps(device, prediction, variance):
    for schedule in (fastgen.Schedule.linear(17_000), fastgen.Schedule.from_betas([0.9] * 77), fastgen.Schedule.cosine(100_000)):
        assert np.isfinite(schedule.posterior_variance).all()
        x = torch.full((1, 2), 0.5, device=device)
        m = x.repeat(1, 2) if variance == "learned_range" else x
        for t in (0, len(schedule) - 1):
            for clip in (None, 1.0):
                y = fastgen.ddpm_step(x, m, t, schedule, prediction=prediction, variance=variance, clip=clip, seed=0)
                assert y.isfinite().all()


@pytest.mark.filterwarnings("error")
def test_what_float32_does_not_hold_is_refused_where_it_is_needed(device):
    schedule, x = fastgen.Schedule.linear(20_000), torch.full((1, 2), 0.5, device=device)
    last = len(schedule) - 1
    with pytest.raises(
        ValueError, match="^schedule: .* float32 holds, got 3.42e.38 at step 18726, where alphas_cumprod is 8.54e-78"
    ):
        fastgen.ddpm_step(x, x, last, schedule, clip=1.0, seed=0)
    for prediction in ("sample", "v_prediction"):
        assert fastgen.ddpm_step(x, x, last, schedule, prediction=prediction, clip=1.0, seed=0).isfinite().all()
    assert fastgen.q_sample(x, last, schedule, seed=0).isfinite().all()
    assert fastgen.ddpm_step(x.double(), x.double(), last, schedule, clip=1.0, seed=0).isfinite().all()


def test_immutable():
    schedule = Schedule.linear(10)
    for name in ("betas", "name", "something_new"):
        with pytest.raises(AttributeError):
            setattr(schedule, name, 1)
    with pytest.raises(AttributeError):
        del schedule.betas
    for name in ("betas", "alphas", "alphas_cumprod", "alphas_cumprod_prev", "posterior_variance", "timesteps"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(schedule, name)[0] = 0
    betas = np.array([0.1, 0.2])
    copied = Schedule.from_betas(betas)
    betas[0] = 0.9
    assert copied.betas[0] == 0.1


def test_equality_and_hash():
    schedule = Schedule.linear(10)
    same = Schedule.from_betas(np.linspace(1e-4, 0.02, 10))
    assert schedule == Schedule.linear(10) == same and hash(schedule) == hash(Schedule.linear(10)) == hash(same)
    others = [Schedule.linear(11), Schedule.linear(10, beta_end=0.03), Schedule.linear(20).respace(10), "linear", None]
    for other in others:
        assert schedule != other
    assert len({schedule, same, *others}) == 1 + len(others)
    # the same ᾱ, but the network is given other timesteps
    late, early = Schedule.from_betas([0.1, 0.2]).respace([1]), Schedule.from_betas([1 - 0.9 * 0.8])
    assert late.alphas_cumprod[0] == pytest.approx(early.alphas_cumprod[0], rel=1e-15) and late != early


@pytest.mark.parametrize("make", [lambda s: s, lambda s: s.respace(5), lambda s: s.rescale_zero_terminal_snr()])
@pytest.mark.parametrize("clone", [lambda s: pickle.loads(pickle.dumps(s)), copy.copy, copy.deepcopy])
def test_copies(make, clone):
    schedule = make(Schedule.linear(20))
    schedule.q_sample_table(CPU, torch.float32)  # a cached table does not get in the way
    twin = clone(schedule)
    assert twin == schedule and hash(twin) == hash(schedule) and repr(twin) == repr(schedule)
    assert not twin.betas.flags.writeable


@pytest.mark.parametrize(
    "schedule, words",
    [
        (Schedule.linear(1000), ["Schedule.linear(1000", "beta_start=0.0001", "1000 steps"]),
        (Schedule.cosine(1000).respace(50, "trailing"), ["cosine(1000", "respace(50", "'trailing'", "50 steps"]),
        (Schedule.linear(10).respace([1, 2]), ["linear(10", "respace([1, 2])", "2 steps"]),
        (Schedule.linear(10).rescale_zero_terminal_snr(), ["linear(10", "rescale_zero_terminal_snr()", "… 0"]),
        (Schedule.from_betas([0.1, 0.2]), ["from_betas([0.1, 0.2])", "2 steps"]),
    ],
)
def test_repr(schedule, words):
    text = repr(schedule)
    assert all(word in text for word in words) and "\n" not in text
    if "from_betas" not in text:  # the text builds the same schedule
        assert eval(text, {"Schedule": Schedule}) == schedule


# ---- tables ---------------------------------------------------------------------------------------------------------

TABLES = {
    "q_sample": lambda s, *where: s.q_sample_table(*where),
    "q_step": lambda s, *where: s.q_step_table(*where),
    "q_posterior": lambda s, *where: s.q_posterior_table(*where),
    "ddpm_step": lambda s, *where: s.ddpm_step_table("epsilon", "posterior", *where),
    "ddim_step": lambda s, *where: s.ddim_step_table("epsilon", 0.5, *where),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_are_cached_per_device_and_precision(device, table):
    schedule = Schedule.linear(10)
    where = torch.zeros(0, device=device).device
    single = table(schedule, where, torch.float32)
    assert single.rows.dtype == torch.float32 and single.rows.device == where and single.rows.shape[0] == 10
    for dtype in (torch.float16, torch.bfloat16):
        assert table(schedule, where, dtype) is single
    double = table(schedule, where, torch.float64)
    assert double.rows.dtype == torch.float64 and table(schedule, where, torch.float64) is double
    # float64 on the host, cast once
    assert torch.equal(double.rows.to(torch.float32), single.rows)
    assert table(Schedule.linear(10), where, torch.float32) is not single


def test_tables_made_in_inference_mode_serve_autograd(device):
    schedule = Schedule.linear(10)
    with torch.inference_mode():
        fastgen.q_sample(torch.ones(2, 3, device=device), 4, schedule, seed=0)
    x0 = torch.ones(2, 3, device=device, requires_grad=True)
    fastgen.q_sample(x0, 4, schedule, seed=0).sum().backward()
    torch.testing.assert_close(x0.grad, torch.full_like(x0, schedule.alphas_cumprod[4] ** 0.5))


def test_timestep_tensor(device):
    schedule = Schedule.linear(100).respace(4)
    tensor = schedule.timestep_tensor(device)
    assert tensor.tolist() == [0, 25, 50, 75] and tensor.dtype == torch.int64 and tensor.device.type == device.type
    assert schedule.timestep_tensor(device) is tensor
    assert schedule.timestep_tensor().device.type == "cpu"


# ---- errors ---------------------------------------------------------------------------------------------------------

BAD = [
    (lambda: Schedule.linear(0), ValueError, "steps"),
    (lambda: Schedule.linear(-3), ValueError, "steps"),
    (lambda: Schedule.linear(2.5), TypeError, "steps"),
    (lambda: Schedule.linear("10"), TypeError, "steps"),
    (lambda: Schedule.linear(10, beta_start=0.0), ValueError, "beta_start"),
    (lambda: Schedule.linear(10, beta_end=1.0), ValueError, "beta_end"),
    (lambda: Schedule.linear(10, beta_end=math.nan), ValueError, "beta_end"),
    (lambda: Schedule.linear(10, beta_start="a"), TypeError, "beta_start"),
    (lambda: Schedule.scaled_linear(10, beta_start=-0.1), ValueError, "beta_start"),
    (lambda: Schedule.sigmoid(10, beta_end=2), ValueError, "beta_end"),
    (lambda: Schedule.sigmoid(10, beta_end=10**400), ValueError, "beta_end"),
    (lambda: Schedule.linear(10, beta_end=np.float32("nan")), ValueError, "beta_end"),
    (lambda: Schedule.linear(10, beta_end=np.array(0.5)), TypeError, "beta_end"),
    (lambda: Schedule.cosine(0), ValueError, "steps"),
    (lambda: Schedule.cosine(10, s=-0.1), ValueError, "s"),
    (lambda: Schedule.cosine(10, s=math.nan), ValueError, "s"),
    (lambda: Schedule.cosine(10, s=math.inf), ValueError, "s"),
    (lambda: Schedule.cosine(10, s="a"), TypeError, "s"),
    (lambda: Schedule.cosine(10, max_beta=1.0), ValueError, "max_beta"),
    (lambda: Schedule.cosine(10, max_beta="a"), TypeError, "max_beta"),
    (lambda: Schedule.from_betas([]), ValueError, "betas"),
    (lambda: Schedule.from_betas([[0.1]]), ValueError, "betas"),
    (lambda: Schedule.from_betas([0.1, 0.0]), ValueError, "betas"),
    (lambda: Schedule.from_betas([0.1, -0.1]), ValueError, "betas"),
    (lambda: Schedule.from_betas([0.1, 1.1]), ValueError, "betas"),
    (lambda: Schedule.from_betas([0.1, math.nan, 0.2]), ValueError, "betas"),
    (lambda: Schedule.from_betas([0.1, math.inf]), ValueError, "betas"),
    (lambda: Schedule.from_betas(["a"]), TypeError, "betas"),
    (lambda: Schedule.from_betas(None), ValueError, "betas"),
    (lambda: Schedule.linear(10).respace(0), ValueError, "steps"),
    (lambda: Schedule.linear(10).respace(11), ValueError, "steps"),
    (lambda: Schedule.linear(10).respace(2.0), TypeError, "steps"),
    (lambda: Schedule.linear(10).respace("5"), TypeError, "steps"),
    (lambda: Schedule.linear(10).respace(5, "sideways"), ValueError, "spacing"),
    (lambda: Schedule.linear(10).respace([0, 1], "leading"), ValueError, "spacing"),
    (lambda: Schedule.linear(10).respace([]), ValueError, "steps"),
    (lambda: Schedule.linear(10).respace([1, 1]), ValueError, "steps"),
    (lambda: Schedule.linear(10).respace([2, 1]), ValueError, "steps"),
    (lambda: Schedule.linear(10).respace([-1, 1]), ValueError, "steps"),
    (lambda: Schedule.linear(10).respace([1, 10]), ValueError, "steps"),
    (lambda: Schedule.linear(10).respace([0.5]), TypeError, "steps"),
    (lambda: Schedule.linear(1).rescale_zero_terminal_snr(), ValueError, "schedule"),
]


@pytest.mark.parametrize("make, error, argument", BAD)
def test_bad_arguments(make, error, argument):
    with pytest.raises(error, match=f"^{argument}: expected .*"):
        make()


def test_a_single_step_without_signal_has_no_epsilon(device):
    x = torch.ones(1, 2, device=device)
    with pytest.raises(ValueError, match="^schedule: "):
        fastgen.ddpm_step(x, x, 0, Schedule.from_betas([1.0]))


def test_timestep_tensor_is_an_ordinary_one_whoever_asked_first():
    schedule = fastgen.Schedule.linear(7)
    with torch.inference_mode():
        schedule.timestep_tensor()
    assert not schedule.timestep_tensor().is_inference()
    other = fastgen.Schedule.linear(8)
    with torch._subclasses.FakeTensorMode():
        other.timestep_tensor()
    assert other.timestep_tensor().tolist() == list(range(8))
