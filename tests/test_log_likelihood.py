"""log_likelihood: equation (4.8) in float64, what it gives the network, and that neither chunks nor batches change a bit of it."""

import math
import os
import pickle
import sys

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, LAYOUTS, array, assert_same, channels_last, normal
from networks import Seen, pixels, tame, wide

import fastgen
from fastgen._likelihood.log_likelihood import _estimated
from fastgen.schedule import LEARNED_VARIANCES, PREDICTIONS, VARIANCES

SHAPE = (3, 4, 5, 6)
SEEDS = [5, -1, 2**40]


@pytest.fixture
def schedule():
    """Few steps, each of which is two launches or, in eager, many."""
    return fastgen.Schedule.linear(5, 0.02, 0.4)


def seeds_of(seed, batch, count):
    """Of the trajectories, (K, B): the contract's words r0 + 2³²·r1 of group k of sample b at the offset 2⁶²."""
    r = reference.words((batch, 4 * count), seed, offset=2**62).astype(np.uint64)
    return (r[..., 0] + (r[..., 1] << np.uint64(32))).astype(np.int64).T


def by_formula(model, x0, schedule, seed, count, decoder="gaussian", **options):
    """The log-weights (K, B), by the papers, in float64."""
    found = []
    for seeds in seeds_of(seed, len(x0), count):
        x_prev, log_weight = array(x0), 0.0
        for t in range(len(schedule)):
            z = reference.normals(x0.shape, seeds.tolist(), offset=t)
            x = np.sqrt(schedule.alphas[t]) * x_prev + np.sqrt(schedule.betas[t]) * z
            m = array(model(torch.tensor(x), torch.full((len(x),), int(schedule.timesteps[t]))))
            density = decoder if t == 0 else "gaussian"
            log_weight = log_weight + reference.step_log_weight(x_prev, x, m, schedule.betas, t, decoder=density, **options)
            if density == "discretized":
                log_weight -= reference.vlb_terms(m, x_prev, x, schedule.betas, 0, decoder=decoder, **options)
            x_prev = x
        found.append(log_weight)
    return np.stack(found)


def assert_same_result(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)


def assert_same_but_for_sums(device, actual, expected):
    """A GPU's sums over an event have another order where there are more or fewer of them, and are float32 at the end."""
    if device.type == "cpu" and "FASTGEN_SMALLER" not in os.environ:  # where the CUDA kernels take the place of the CPU's
        assert_same_result(actual, expected)
    for a, e, tolerance in zip(actual, expected, (2e-6, 1e-2, 1e-2), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("decoder", ["discretized", "gaussian"])
@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values(device, schedule, prediction, variance, clip, decoder, dtype):
    """Estimate, error and effective sample size are those of the log-weights of the papers' formulas."""
    x0, model = pixels((2, 2, 3), dtype, device), wide if variance in LEARNED_VARIANCES else tame
    options = {"prediction": prediction, "variance": variance, "clip": clip, "decoder": decoder}
    found = fastgen.log_likelihood(model, x0, schedule, trajectories=4, seed=7, **options)
    assert all(each.dtype == torch.float64 and each.shape == (2,) for each in found)
    log_weights = by_formula(model, x0, schedule, 7, 4, **options)
    weights = np.exp(log_weights - log_weights.max(0))
    double = dtype == torch.float64
    np.testing.assert_allclose(array(found.estimate), np.log(weights.mean(0)) + log_weights.max(0), rtol=1e-10 if double else 2e-4)
    assert (array(found.estimate) >= log_weights.mean(0)).all()  # Jensen
    error = weights.std(0, ddof=1) / 2 / weights.mean(0)
    np.testing.assert_allclose(array(found.error), error, rtol=1e-8 if double else 1e-2)
    np.testing.assert_allclose(array(found.ess), weights.sum(0) ** 2 / (weights**2).sum(0), rtol=1e-8 if double else 1e-2)


def test_it_is_made_of_public_functions(device, schedule):
    """The trajectories are those of q_step, and but for t = 0, where the step adds no noise, the densities step_log_prob's."""
    x0, log_weight = pixels(SHAPE, torch.float64, device), 0.0
    x_prev, seeds = x0, torch.tensor(seeds_of(7, 3, 1)[0], device=device)
    for t in range(len(schedule)):
        x = fastgen.q_step(x_prev, t, schedule, seed=seeds, offset=t)
        m = tame(x, torch.full((3,), t, device=device))
        z = fastgen.randn(SHAPE, seed=seeds, offset=t, dtype=torch.float64, device=device)
        forward = -0.5 * (z.square() + math.log(2 * math.pi * schedule.betas[t])).flatten(1).sum(1)
        if t == 0:
            log_weight = -fastgen.vlb_terms(m, x0, 0, schedule, x_t=x, decoder="gaussian") - forward
        else:
            log_weight = log_weight + fastgen.step_log_prob(x_prev, x, m, t, schedule) - forward
        x_prev = x
    log_weight = log_weight - 0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    found = fastgen.log_likelihood(tame, x0, schedule, trajectories=1, seed=7)
    torch.testing.assert_close(found.estimate, log_weight, rtol=1e-10, atol=1e-9)
    assert found.error.isnan().all() and (found.ess == 1.0).all()


def test_of_log_weights():
    """Also of ones that no exponential holds, of equal ones, and where there is no probability at all."""
    log_weights = torch.tensor([[-1e4, 0.0, 800.0, -math.inf, -math.inf], [-1e4 + math.log(3), 0.0, -math.inf, -math.inf, 2.0]])
    estimate, error, ess = _estimated(log_weights.double())
    expected = torch.tensor([-1e4 + math.log(2), 0.0, 800.0 - math.log(2), -math.inf, 2.0 - math.log(2)])
    torch.testing.assert_close(estimate, expected.double(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(ess[:3], torch.tensor([1.6, 2.0, 1.0]).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(error[:3], torch.tensor([0.5, 0.0, 1.0]).double(), rtol=1e-4, atol=1e-12)
    assert _estimated(torch.tensor([[math.nan, 1.0], [0.0, 1.0]]).double()).estimate.isnan().tolist() == [True, False]


def test_the_sums_do_not_depend_on_the_batch():
    log_weights = 3.0 * normal((57, 37), 0, torch.float64)
    together = _estimated(log_weights)
    for b in (0, 5, 36):
        assert_same_result(_estimated(log_weights[:, b : b + 1]), [each[b : b + 1] for each in together])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device, schedule, dtype):
    """No trajectory is in half precision: the network gets float32, and what comes of the same data in float32 is the same."""
    x0, seen = pixels(SHAPE, dtype, device), Seen()
    found = fastgen.log_likelihood(seen, x0, schedule, trajectories=2, seed=7)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x, *_ in seen.calls} == {computed} and found.estimate.dtype == torch.float64
    assert_same_result(found, fastgen.log_likelihood(tame, x0.to(computed), schedule, trajectories=2, seed=7))


@pytest.mark.parametrize("decoder", ["gaussian", "discretized"])
def test_bytes(device, schedule, decoder):
    x0 = torch.arange(256, dtype=torch.uint8, device=device).view(2, 4, 32)
    found = fastgen.log_likelihood(tame, x0, schedule, trajectories=2, seed=7, decoder=decoder)
    numbers = (x0.double() / 127.5 - 1).float()
    assert_same_result(found, fastgen.log_likelihood(tame, numbers, schedule, trajectories=2, seed=7, decoder=decoder))


@pytest.mark.parametrize("m_dtype", DTYPES)
def test_a_network_of_another_dtype(device, schedule, m_dtype):
    x0 = pixels(SHAPE, device=device)
    model = lambda x, t: tame(x, t).to(m_dtype)  # noqa: E731
    found = fastgen.log_likelihood(model, x0, schedule, trajectories=2, seed=7)
    assert found.estimate.dtype == torch.float64 and found.estimate.isfinite().all()
    double = fastgen.log_likelihood(lambda x, t: model(x, t).double(), x0.double(), schedule, trajectories=2, seed=7)
    torch.testing.assert_close(found.estimate, double.estimate, rtol=2e-3 if m_dtype.itemsize == 2 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1,), (5,), (2, 129), (2, 2, 3, 4, 5)])
@pytest.mark.parametrize("decoder", ["gaussian", "discretized"])
def test_shapes(device, schedule, shape, decoder):
    """A batch of none gives no estimates, and events of nothing have the probability 1."""
    found = fastgen.log_likelihood(tame, pixels(shape, device=device), schedule, trajectories=3, seed=7, decoder=decoder)
    assert all(each.shape == shape[:1] and each.isfinite().all() for each in found)
    if not math.prod(shape[1:]):
        assert not found.estimate.any() and not found.error.any() and (found.ess == 3.0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variance", ["posterior", "learned_range"])
def test_layouts(device, schedule, layout, variance):
    x0, model = pixels(SHAPE, device=device), wide if variance in LEARNED_VARIANCES else tame
    options = {"trajectories": 3, "seed": 7, "variance": variance}
    found = fastgen.log_likelihood(model, LAYOUTS[layout](x0), schedule, **options)
    torch.testing.assert_close(found, fastgen.log_likelihood(model, x0, schedule, **options), rtol=1e-4, atol=1e-4)


def test_the_network_gets_the_layout_of_the_data(device, schedule):
    for arrange, layout in ((torch.clone, torch.contiguous_format), (channels_last, torch.channels_last)):
        seen = Seen()
        fastgen.log_likelihood(seen, arrange(pixels(SHAPE, device=device)), schedule, trajectories=3, seed=7, chunk=2)
        assert [len(x) for x, *_ in seen.calls] == [6] * 5 + [3] * 5
        assert all(x.is_contiguous(memory_format=layout) for x, *_ in seen.calls)


# ---- what does not change it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [7, SEEDS], ids=["seed", "seeds"])
@pytest.mark.parametrize("variance", ["posterior", "learned_range"])
@pytest.mark.parametrize("decoder", ["gaussian", "discretized"])
def test_chunks_do_not_change_it(device, schedule, seed, variance, decoder):
    x0, model = pixels(SHAPE, device=device), wide if variance in LEARNED_VARIANCES else tame
    seed = torch.tensor(seed, device=device) if isinstance(seed, list) else seed
    options = {"variance": variance, "decoder": decoder, "trajectories": 5, "seed": seed}
    whole = fastgen.log_likelihood(model, x0, schedule, **options)
    for chunk in (1, 2, 100):
        assert_same_but_for_sums(device, fastgen.log_likelihood(model, x0, schedule, chunk=chunk, **options), whole)


def test_batches_do_not_change_it(device, schedule):
    """With a seed for each sample; the seeds may lie on the host."""
    x0, seeds = pixels(SHAPE, device=device), torch.tensor(SEEDS)
    together = fastgen.log_likelihood(tame, x0, schedule, trajectories=2, seed=seeds.to(device))
    for part in ([0], [1], [2, 0]):
        alone = fastgen.log_likelihood(tame, x0[part], schedule, trajectories=2, seed=seeds[part])
        assert_same_but_for_sums(device, alone, [each[part] for each in together])


def test_no_number_is_used_twice(device, schedule):
    """No two steps share noise, of one trajectory or of two, and none that of the bound or of a chain; and the first of more
    trajectories are the same."""
    x0, seen, more = pixels((2, 3, 4), torch.float64, device), Seen(), Seen()
    fastgen.log_likelihood(seen, x0, schedule, trajectories=3, seed=7)
    fastgen.log_likelihood(more, x0, schedule, trajectories=5, seed=7)
    noise = [fastgen.randn(x0.shape, seed=7, offset=t, dtype=torch.float64, device=device) for t in range(len(schedule) + 1)]
    before = [x0] * 3
    for beta, (x, *_), (longer, *_) in zip(schedule.betas, seen.calls, more.calls, strict=True):
        assert_same(longer[:6], x)
        noise += [(a - math.sqrt(1.0 - beta) * b) / math.sqrt(beta) for a, b in zip(x.split(2), before, strict=True)]
        before = x.split(2)
    flat = torch.stack([z.flatten() for z in noise])
    assert len(flat) == 6 + 3 * 5
    nearest = torch.cdist(flat, flat).fill_diagonal_(math.inf).min()
    assert nearest > 1.0


def test_the_default_chunk(schedule):
    """As many trajectories as make 64 samples of the batch."""
    for batch, calls in ((1, [4]), (20, [60, 20]), (32, [64, 64]), (70, [70] * 4)):
        seen = Seen()
        fastgen.log_likelihood(seen, pixels((batch, 2)), schedule, trajectories=4, seed=7)
        assert [len(x) for x, *_ in seen.calls] == [n for n in calls for _ in range(5)]


def test_respaced(device):
    """The network is given the timesteps that the steps had before."""
    schedule, x0, seen = fastgen.Schedule.linear(1000).respace([3, 250, 999]), pixels(SHAPE, torch.float64, device), Seen()
    found = fastgen.log_likelihood(seen, x0, schedule, trajectories=2, seed=7)
    assert [t.tolist() for _, t, _ in seen.calls] == [[3] * 6, [250] * 6, [999] * 6]
    assert all(t.dtype == torch.int64 and t.device == x0.device for _, t, _ in seen.calls)
    log_weights = by_formula(tame, x0, schedule, 7, 2)
    np.testing.assert_allclose(array(found.estimate), np.logaddexp(*log_weights) - math.log(2), rtol=1e-9)


def test_the_network_has_a_tensor_of_its_own(schedule):
    """The schedule's is not what it gets, nor is an input that it keeps written over."""
    kept = []

    def model(x, t):
        kept.append((x, x.clone()))
        m = tame(x, t)
        t.zero_()
        return m

    x0 = pixels(SHAPE)
    before = x0.clone()
    fastgen.log_likelihood(model, x0, schedule, trajectories=3, seed=7, chunk=2)
    assert schedule.timestep_tensor("cpu").tolist() == list(range(5))
    assert_same(x0, before)
    for x, copy in kept:
        assert_same(x, copy)


def test_without_signal_at_the_last_step(device, schedule):
    zero, x0 = schedule.rescale_zero_terminal_snr(), pixels(SHAPE, device=device)
    assert fastgen.log_likelihood(tame, x0, zero, trajectories=2, seed=7, prediction="v_prediction").estimate.isfinite().all()
    with pytest.raises(ValueError, match="^schedule: expected coefficients for each of its 5 steps; .*signal-to-noise"):
        fastgen.log_likelihood(tame, x0, zero, trajectories=2, seed=7)


# ---- the network ----------------------------------------------------------------------------------------------------


class Wrapped:
    def __init__(self, sample):
        self.sample = sample


@pytest.mark.parametrize("wrap", [Wrapped, lambda m: (m, "more")], ids=["sample", "tuple"])
def test_wrapped_outputs(schedule, wrap):
    x0 = pixels(SHAPE)
    found = fastgen.log_likelihood(lambda x, t: wrap(tame(x, t)), x0, schedule, trajectories=2, seed=7)
    assert_same_result(found, fastgen.log_likelihood(tame, x0, schedule, trajectories=2, seed=7))


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_model_kwargs(schedule, chunk):
    """Of tensors that go with the samples each trajectory gets its own copy; of others, and what is no tensor, nothing changes."""
    x0, shift, table = pixels(SHAPE), normal((3, 1, 1, 1), 2), normal((5, 2), 3)
    seen = Seen(lambda x, t, shift, more, scale: tame(x, t, shift) * scale)
    kwargs = {"shift": shift, "more": {"labels": torch.arange(3), "all": [table]}, "scale": 0.5}
    found = fastgen.log_likelihood(seen, x0, schedule, trajectories=3, seed=7, chunk=chunk, model_kwargs=kwargs)
    for x, _, given in seen.calls:
        count = len(x) // 3
        assert_same(given["shift"], torch.cat([shift] * count))
        assert given["more"]["labels"].tolist() == [0, 1, 2] * count
        assert given["more"]["all"][0] is table and given["scale"] == 0.5
    model = lambda x, t: tame(x, t, shift) * 0.5  # noqa: E731
    assert_same_result(found, fastgen.log_likelihood(model, x0, schedule, trajectories=3, seed=7, chunk=1))


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_is(schedule, training):
    model = torch.nn.Conv2d(4, 4, 1).train(training)
    seen = []

    def call(x, t):
        seen.append((model.training, torch.is_grad_enabled()))
        return model(x)

    found = fastgen.log_likelihood(call, pixels(SHAPE).requires_grad_(), schedule, trajectories=2, seed=7)
    assert model.training is training and set(seen) == {(training, False)}
    assert not any(x.requires_grad for x in found) and model.weight.grad is None and torch.is_grad_enabled()


def test_no_random_number_is_drawn(schedule):
    state = torch.get_rng_state()
    fastgen.log_likelihood(tame, pixels(SHAPE), schedule, trajectories=2, seed=7)
    assert torch.equal(torch.get_rng_state(), state)


# ---- progress, pickles ----------------------------------------------------------------------------------------------


def test_progress(schedule, capsys):
    pytest.importorskip("tqdm")
    x0 = pixels(SHAPE)
    found = fastgen.log_likelihood(tame, x0, schedule, trajectories=3, seed=7, chunk=2, progress=True)
    shown = capsys.readouterr().err
    assert "log-likelihood" in shown and "15/15" in shown
    assert_same_result(found, fastgen.log_likelihood(tame, x0, schedule, trajectories=3, seed=7))
    assert capsys.readouterr().err == ""


def test_progress_without_tqdm(schedule, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="^progress: expected tqdm to be installed"):
        fastgen.log_likelihood(tame, pixels(SHAPE), schedule, trajectories=2, seed=7, progress=True)


def test_a_result_is_a_tuple_with_names(schedule):
    found = fastgen.log_likelihood(tame, pixels(SHAPE), schedule, trajectories=2, seed=7)
    estimate, error, ess = found
    assert estimate is found.estimate and error is found.error and ess is found.ess
    copy = pickle.loads(pickle.dumps(found))
    assert type(copy) is fastgen.LogLikelihood
    assert_same_result(copy, found)


# ---- arguments ------------------------------------------------------------------------------------------------------

ERRORS = [
    ({"model": 1}, TypeError, "model: expected a callable"),
    ({"x0": [1.0]}, TypeError, "x0: expected a tensor"),
    ({"x0": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x0: expected dtype"),
    ({"x0": torch.tensor(1.0)}, ValueError, r"x0: expected shape \(B, ...\)"),
    ({"x0": torch.ones(2), "variance": "learned"}, ValueError, r"x0: expected shape \(B, C, ...\) for a learned variance"),
    ({"schedule": 1000}, TypeError, "schedule: expected a fastgen.Schedule"),
    ({"seed": None}, TypeError, "seed: expected an int or an int64 tensor"),
    ({"seed": 2**64}, ValueError, "seed"),
    ({"seed": torch.arange(4)}, ValueError, r"seed: expected 1 element or shape \(3,\)"),
    ({"trajectories": 0}, ValueError, "trajectories: expected an int ≥ 1, got 0"),
    ({"trajectories": 2.0}, TypeError, "trajectories: expected an int, got float"),
    ({"trajectories": True}, TypeError, "trajectories: expected an int, got bool"),
    ({"chunk": 0}, ValueError, "chunk: expected an int ≥ 1, got 0"),
    ({"chunk": 1.0}, TypeError, "chunk: expected an int, got float"),
    ({"prediction": "noise"}, ValueError, "prediction"),
    ({"variance": "fixed"}, ValueError, "variance"),
    ({"clip": 0.0}, ValueError, "clip"),
    ({"clip": "1"}, TypeError, "clip"),
    ({"decoder": "bins"}, ValueError, "decoder"),
    ({"model_kwargs": [1]}, TypeError, "model_kwargs: expected a dict"),
    ({"progress": 1}, TypeError, "progress: expected a bool"),
]


@pytest.mark.parametrize("changed, error, message", ERRORS)
def test_errors_come_before_anything_runs(schedule, changed, error, message):
    def model(*arguments, **kwargs):
        raise AssertionError("the network was called")

    good = {"model": model, "x0": pixels((3, 2)), "schedule": schedule, "trajectories": 2, "seed": 7}
    with pytest.raises(error, match=f"^{message}"):
        fastgen.log_likelihood(**{**good, **changed})


OUTPUTS = [
    (lambda x: None, TypeError, "model: expected it to return a tensor, a tuple .* got NoneType"),
    (lambda x: x[:3], ValueError, r"model: expected an output of shape \(6, 2\) for \(6, 2\), got \(3, 2\)"),
    (lambda x: torch.cat([x, x], 1), ValueError, r"model: expected an output of shape \(6, 2\) for \(6, 2\), got \(6, 4\)"),
    (lambda x: x.long(), TypeError, "model_output: expected dtype"),
    (lambda x: x.to("meta"), ValueError, "model_output: expected a tensor on cpu like x_t, got one on meta"),
]


@pytest.mark.parametrize("output, error, message", OUTPUTS)
def test_outputs_that_do_not_fit(schedule, output, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fastgen.log_likelihood(lambda x, t: output(x), pixels((3, 2)), schedule, trajectories=2, seed=7)


def test_a_learned_variance_has_twice_the_channels(schedule):
    with pytest.raises(ValueError, match=r"^model: expected an output of shape \(6, 4\) for \(6, 2\), got \(6, 2\)"):
        fastgen.log_likelihood(tame, pixels((3, 2)), schedule, trajectories=2, seed=7, variance="learned")
