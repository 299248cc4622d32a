"""q_posterior: the mean and variances of q(x_{t−1} | x_t, x_0)."""

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, LAYOUTS, SHAPES, TIMESTEPS, array, assert_close, assert_derivatives, assert_same, normal, on

import fastgen


@pytest.mark.pairs
@pytest.mark.parametrize("x0_dtype", DTYPES)
@pytest.mark.parametrize("x_t_dtype", DTYPES)
@pytest.mark.parametrize("t", TIMESTEPS.values(), ids=TIMESTEPS)
def test_values(device, schedule, t, x0_dtype, x_t_dtype):
    x0, x_t = normal((3, 4, 5, 6), 0, x0_dtype, device), normal((3, 4, 5, 6), 1, x_t_dtype, device)
    mean, variance, log_variance = fastgen.q_posterior(x0, x_t, on(device, t), schedule)
    dtype = torch.promote_types(x0_dtype, x_t_dtype)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == dtype and variance.dtype == log_variance.dtype == precision
    assert mean.shape == x0.shape and variance.shape == log_variance.shape == (3, 1, 1, 1)
    expected_mean, expected_variance = reference.q_posterior(array(x0), array(x_t), schedule.betas, t)
    assert_close(mean, expected_mean, scale=5)
    assert_close(variance, np.broadcast_to(expected_variance, (3, 1, 1, 1)))
    # β̃_0 is 0, and its logarithm that of β̃_1
    _, replaced = reference.q_posterior(array(x0), array(x_t), schedule.betas, np.maximum(t, 1))
    assert_close(log_variance, np.broadcast_to(np.log(replaced), (3, 1, 1, 1)), scale=20)


def test_schedule_of_one_step(device):
    """There is no β̃_1 to replace β̃_0 by; β_0 does."""
    x = torch.ones(2, 3, device=device)
    mean, variance, log_variance = fastgen.q_posterior(x, 2 * x, 0, fastgen.Schedule.from_betas([0.25]))
    assert_close(mean, np.ones((2, 3)))
    assert torch.all(variance == 0)
    assert_close(log_variance, np.full((2, 1), np.log(0.25)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_sample", [False, True], ids=["int_t", "tensor_t"])
def test_shapes(device, schedule, shape, per_sample):
    x0, x_t = normal(shape, 0, device=device), normal(shape, 1, device=device)
    t = (torch.arange(shape[0], device=device) * 7) % 40 if per_sample else 17
    mean, variance, log_variance = fastgen.q_posterior(x0, x_t, t, schedule)
    assert mean.shape == shape and variance.shape == log_variance.shape == (shape[0],) + (1,) * (len(shape) - 1)
    expected, _ = reference.q_posterior(array(x0), array(x_t), schedule.betas, t.cpu().numpy() if per_sample else t)
    assert_close(mean, expected, scale=5)


def test_a_million_elements(device, schedule):
    """Many tiles, many threads and a tail."""
    x0, x_t = normal((1, 2**20 + 3), 0, device=device), normal((1, 2**20 + 3), 1, device=device)
    mean, _, _ = fastgen.q_posterior(x0, x_t, 17, schedule)
    assert_close(mean, reference.q_posterior(array(x0), array(x_t), schedule.betas, 17)[0], scale=5)


@pytest.mark.pairs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 4, 5, 3)])
def test_layouts(device, schedule, shape, layout, other):
    x0, x_t = normal(shape, 0, device=device), normal(shape, 1, device=device)
    for t in (9, torch.arange(shape[0], device=device)):
        actual = fastgen.q_posterior(LAYOUTS[layout](x0), LAYOUTS[other](x_t), t, schedule)
        for a, e in zip(actual, fastgen.q_posterior(x0, x_t, t, schedule), strict=True):
            assert_same(a, e)
        if layout == "channels_last":
            assert actual[0].movedim(1, -1).is_contiguous()


def test_timesteps_with_strides(device, schedule):
    x = normal((3, 40), 0, device=device)
    expected = fastgen.q_posterior(x, x, torch.tensor([5, 5, 5], device=device), schedule)
    for t in (torch.tensor([5], device=device).expand(3), torch.full((3, 2), 5, device=device)[:, 1]):
        for a, e in zip(fastgen.q_posterior(x, x, t, schedule), expected, strict=True):
            assert_same(a, e)


def test_nan_and_inf_flow_through(device, schedule):
    x0, x_t = normal((2, 133), 0, device=device), normal((2, 133), 1, device=device)
    x0[0, 130], x_t[0, 4], x_t[1, 5], x0[1, 7] = torch.nan, torch.inf, torch.nan, -torch.inf
    mean, variance, _ = fastgen.q_posterior(x0, x_t, 9, schedule)
    assert_close(mean, reference.q_posterior(array(x0), array(x_t), schedule.betas, 9)[0], scale=5)
    assert mean.isnan().sum() == 2 and mean.isinf().sum() == 2 and variance.isfinite().all()


def test_results_are_the_callers_own(device, schedule):
    """Writing into one result changes neither another nor the schedule's table."""
    x = torch.ones(3, 4, device=device)
    expected = [y.clone() for y in fastgen.q_posterior(x, x, 5, schedule)]
    for y in fastgen.q_posterior(x, x, 5, schedule):
        y.fill_(7)
    for a, e in zip(fastgen.q_posterior(x, x, 5, schedule), expected, strict=True):
        assert_same(a, e)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [9, 0, [39, 0]])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(device, schedule, t, layout):
    x0 = LAYOUTS[layout](normal((2, 2, 3, 2), 0, torch.float64, device)).requires_grad_()
    x_t = normal((2, 2, 3, 2), 1, torch.float64, device).requires_grad_()
    t = on(device, t)
    mean = lambda x0, x_t: fastgen.q_posterior(x0, x_t, t, schedule)[0]  # noqa: E731
    for f, inputs in [
        (mean, (x0, x_t)),
        (lambda x0: mean(x0, x_t.detach()), (x0,)),
        (lambda x_t: mean(x0.detach(), x_t), (x_t,)),
    ]:
        assert_derivatives(device, f, inputs)


@pytest.mark.parametrize("t", [9, [39, 0, 5]])
def test_gradients_are_the_coefficients(device, schedule, t):
    x0 = normal((3, 40), 0, torch.bfloat16, device).requires_grad_()
    x_t, gradient = normal((3, 40), 1, device=device).requires_grad_(), normal((3, 40), 2, device=device)
    mean, variance, log_variance = fastgen.q_posterior(x0, x_t, on(device, t), schedule)
    assert mean.requires_grad and not variance.requires_grad and not log_variance.requires_grad
    mean.backward(gradient)
    g, zero = array(gradient), np.zeros((3, 40))
    assert x0.grad.dtype == torch.bfloat16 and x_t.grad.dtype == torch.float32
    assert_close(x0.grad, reference.q_posterior(g, zero, schedule.betas, t)[0])
    assert_close(x_t.grad, reference.q_posterior(zero, g, schedule.betas, t)[0])


def test_gradients_are_recorded_only_where_asked(device, schedule):
    x = torch.ones(2, 3, device=device)
    assert not fastgen.q_posterior(x, x, 3, schedule)[0].requires_grad
    with torch.no_grad():
        assert not fastgen.q_posterior(x.clone().requires_grad_(), x, 3, schedule)[0].requires_grad
