"""prior_kl: values, the digits of a small divergence, derivatives, and the divergence that the formula stands for."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, LAYOUTS, SHAPES, array, assert_derivatives, assert_same, normal

import fastgen
from fastgen._core.tables import VLB_TERMS_COLUMNS
from fastgen.schedule import Schedule

SHAPE = (3, 4, 5, 6)
SCHEDULES = {
    "much signal": fastgen.Schedule.linear(4, 1e-3, 0.1),  # ᾱ is 0.8
    "some signal": fastgen.Schedule.linear(40, 1e-3, 0.2),  # 0.01
    "little signal": fastgen.Schedule.linear(1000),  # 4e-5
    "one step": fastgen.Schedule.from_betas([0.3]),
    "respaced": fastgen.Schedule.linear(1000).respace(20),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(device, schedule, dtype):
    x0 = normal(SHAPE, 0, dtype, device)
    actual = fastgen.prior_kl(x0, schedule)
    assert actual.shape == SHAPE[:1] and actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference.prior_kl(array(x0), schedule.betas)
    np.testing.assert_allclose(array(actual), expected, rtol=1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("shape", [*SHAPES, (700, 3), (2, 17_001)])
def test_shapes(device, schedule, shape):
    """The divergence of no elements is 0."""
    x0 = normal(shape, 0, device=device)
    np.testing.assert_allclose(array(fastgen.prior_kl(x0, schedule)), reference.prior_kl(array(x0), schedule.betas), rtol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, schedule, layout):
    x0 = normal(SHAPE, 0, device=device)
    torch.testing.assert_close(fastgen.prior_kl(LAYOUTS[layout](x0), schedule), fastgen.prior_kl(x0, schedule), rtol=2e-6, atol=0)


@pytest.mark.parametrize("beta", [1e-12, 1e-3, 0.5, 0.75, 0.9, 1 - 1e-3, 1 - 1e-6, 1 - 2**-40])
def test_the_digits_of_a_small_divergence(device, beta):
    """Of an x0 of 0, whose divergence is −ᾱ − log(1 − ᾱ) alone: where ᾱ is 1e-12 it is 2.5e-25, and ᾱ's own digits are 1e-16."""
    schedule = fastgen.Schedule.from_betas([beta])
    for dtype, bound in ((torch.float64, 4e-15), (torch.float32, 3e-7)):
        x0 = torch.zeros((1, 1), dtype=dtype, device=device)
        actual = fastgen.prior_kl(x0, schedule).item()
        assert actual == pytest.approx(reference.prior_kl(np.zeros((1, 1)), schedule.betas).item(), rel=bound)
        assert actual > 0


def test_without_signal_nothing_is_left(device, schedule):
    x0 = normal(SHAPE, 0, device=device)
    assert_same(fastgen.prior_kl(x0, schedule.rescale_zero_terminal_snr()), x0.new_zeros(3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_its_sample_only(device, schedule, value):
    x0 = normal(SHAPE, 0, device=device)
    good = fastgen.prior_kl(x0, schedule)
    x0[1, 2, 3, 4] = value
    for each in (schedule, schedule.rescale_zero_terminal_snr()):
        assert fastgen.prior_kl(x0, each).isnan().tolist() == [False, True, False]
    assert_same(fastgen.prior_kl(x0, schedule)[::2], good[::2])


def test_units_and_reductions(device, schedule):
    x0 = normal(SHAPE, 0, device=device)
    nats = fastgen.prior_kl(x0, schedule)
    torch.testing.assert_close(fastgen.prior_kl(x0, schedule, unit="bits_per_dim"), nats / (4 * 5 * 6 * math.log(2)))
    torch.testing.assert_close(fastgen.prior_kl(x0, schedule, reduction="mean"), nats.mean())
    torch.testing.assert_close(fastgen.prior_kl(x0, schedule, reduction="sum"), nats.sum())


def test_a_sample_does_not_depend_on_its_batch(device, schedule):
    x0 = normal(SHAPE, 0, device=device)
    together = fastgen.prior_kl(x0, schedule)
    assert_same(torch.cat([fastgen.prior_kl(x0[b : b + 1], schedule) for b in range(3)]), together)


def test_a_divergence_is_what_samples_say(device):
    """E_q[log q(x_T | x0) − log p(x_T)] over samples of q, to their own error."""
    schedule, x0 = SCHEDULES["much signal"], normal((1, 2, 3), 0, torch.float64, device)
    bar, count = schedule.alphas_cumprod[-1], 40_000
    mean = math.sqrt(bar) * array(x0)
    x_T = mean + math.sqrt(1 - bar) * np.random.default_rng(1).standard_normal((count, 2, 3))
    ratios = -0.5 * ((x_T - mean) ** 2 / (1 - bar) + math.log(1 - bar) - x_T**2)
    each = ratios.reshape(count, -1).sum(1)
    assert abs(each.mean() - fastgen.prior_kl(x0, schedule).item()) < 5 * each.std() / math.sqrt(count)


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_gradients(device, schedule):
    x0 = normal((3, 2, 5), 0, torch.float64, device).requires_grad_()
    assert_derivatives(device, lambda x: fastgen.prior_kl(x, schedule), (x0,))
    (gradient,) = torch.autograd.grad(fastgen.prior_kl(x0, schedule, reduction="sum"), x0)
    torch.testing.assert_close(gradient, schedule.alphas_cumprod[-1] * x0.detach())


def test_transforms(device, schedule):
    x0 = normal((3, 4), 0, torch.float64, device)
    f = lambda x: fastgen.prior_kl(x, schedule, reduction="sum")  # noqa: E731
    torch.testing.assert_close(torch.func.grad(f)(x0), schedule.alphas_cumprod[-1] * x0)
    torch.testing.assert_close(torch.func.vmap(f)(torch.stack([x0, 2 * x0])), torch.stack([f(x0), f(2 * x0)]))
    _, derivative = torch.func.jvp(f, (x0,), (torch.ones_like(x0),))
    torch.testing.assert_close(derivative, schedule.alphas_cumprod[-1] * x0.sum())


def test_compiled(device, schedule):
    torch._dynamo.reset()
    f = torch.compile(lambda x: fastgen.prior_kl(x, schedule, unit="bits_per_dim"), fullgraph=True, backend="aot_eager")
    x0 = normal(SHAPE, 0, device=device)
    assert_same(f(x0), fastgen.prior_kl(x0, schedule, unit="bits_per_dim"))
    torch._dynamo.reset()


# ---- arguments ------------------------------------------------------------------------------------------------------

ERRORS = [
    ({"x0": [1.0]}, TypeError, "x0: expected a tensor, got list"),
    ({"x0": torch.ones(3, dtype=torch.int64)}, TypeError, "x0: expected dtype float16"),
    ({"x0": torch.tensor(1.0)}, ValueError, r"x0: expected shape \(B, ...\)"),
    ({"schedule": 1000}, TypeError, "schedule: expected a fastgen.Schedule, got int"),
    ({"unit": "bits"}, ValueError, "unit: expected one of 'nats', 'bits_per_dim', got 'bits'"),
    ({"reduction": "batchmean"}, ValueError, "reduction: expected one of"),
]


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])  # without a plan, and with one
@pytest.mark.parametrize("changed, error, message", ERRORS)
def test_errors(device, changed, error, message, used):
    good = {"x0": normal((2, 3), 0, device=device), "schedule": fastgen.Schedule.linear(40)}
    if used:
        fastgen.prior_kl(**good)
    with pytest.raises(error, match=f"^{message}"):
        fastgen.prior_kl(**{**good, **changed})


def test_one_launch_by_the_kernel_of_vlb_terms(schedule):
    from dispatched import Dispatched

    x0 = normal(SHAPE, 0)
    if fastgen.backend("cpu") != "cpp":
        pytest.skip("the compiled library is absent")
    fastgen.prior_kl(x0, schedule)
    with Dispatched() as ops:
        fastgen.prior_kl(x0, schedule)
    assert dict(ops.counts) == {"fastgen.vlb_terms": 1}


def test_the_row_has_every_column():
    rows = Schedule.linear(10).prior_kl_table(torch.device("cpu"), torch.float64).rows
    assert rows.shape == (1, len(VLB_TERMS_COLUMNS))
