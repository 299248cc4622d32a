"""variational_bound: its parts, what it gives the network, and that neither chunks nor batches change a bit of it."""

import math
import pickle
import sys

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, LAYOUTS, array, assert_same, channels_last, normal
from networks import Seen, pixels, tame, wide

import fastgen
from fastgen.schedule import LEARNED_VARIANCES, PREDICTIONS, VARIANCES

SHAPE = (3, 4, 5, 6)
SEEDS = [5, -1, 2**40]


@pytest.fixture
def schedule():
    """Few steps, each of which is a launch or, in eager, many."""
    return fastgen.Schedule.linear(6, 0.02, 0.4)


def by_hand(model, x0, schedule, seed, timesteps=None, **options):
    """Timestep by timestep, with the public functions of the parts."""
    terms = []
    for t in timesteps or range(len(schedule)):
        x_t = fastgen.q_sample(x0, t, schedule, seed=seed, offset=t)
        m = model(x_t, torch.full((len(x0),), int(schedule.timesteps[t]), device=x0.device))
        terms.append(fastgen.vlb_terms(m, x0, t, schedule, x_t=x_t, **options))
    return torch.stack(terms, 1)


def assert_same_bound(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("decoder", ["discretized", "gaussian"])
@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("unit", ["nats", "bits_per_dim"])
def test_values(device, schedule, prediction, variance, clip, decoder, unit):
    """Theorem 8, equation (4.10), in float64: beside formulas of the papers."""
    x0, model = pixels((2, 3, 4), torch.float64, device), wide if variance in LEARNED_VARIANCES else tame
    options = {"prediction": prediction, "variance": variance, "clip": clip, "decoder": decoder}
    total, prior, terms = fastgen.variational_bound(model, x0, schedule, seed=7, unit=unit, **options)
    assert (total.shape, prior.shape, terms.shape) == ((2,), (2,), (2, 6))
    of_unit = 1.0 if unit == "nats" else 1.0 / (12 * math.log(2))
    np.testing.assert_allclose(array(prior), of_unit * reference.prior_kl(array(x0), schedule.betas), rtol=1e-12)
    for t in range(6):
        z = reference.normals(x0.shape, 7, offset=t)
        x_t = reference.q_sample(array(x0), schedule.betas, t, z)
        m = array(model(torch.tensor(x_t), torch.full((2,), t)))
        expected = reference.vlb_terms(m, array(x0), x_t, schedule.betas, t, **options)
        np.testing.assert_allclose(array(terms[:, t]), of_unit * expected, rtol=1e-9)
    np.testing.assert_allclose(array(total), array(prior) + array(terms).sum(1), rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device, schedule, dtype):
    """The network gets x0's dtype, and no sum is rounded to it."""
    x0, seen = pixels(SHAPE, dtype, device), Seen()
    bound = fastgen.variational_bound(seen, x0, schedule, seed=7)
    assert {x.dtype for x, *_ in seen.calls} == {dtype}
    assert {x.dtype for x in bound} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert_same(bound.terms, by_hand(tame, x0, schedule, 7, unit="bits_per_dim"))


def test_a_network_of_another_dtype(device, schedule):
    x0 = pixels(SHAPE, device=device)
    bound = fastgen.variational_bound(lambda x, t: tame(x, t).double(), x0, schedule, seed=7)
    assert bound.total.dtype == bound.terms.dtype == torch.float64
    half = fastgen.variational_bound(lambda x, t: tame(x, t).bfloat16(), x0, schedule, seed=7)
    assert half.total.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1,), (5,), (2, 129), (2, 2, 3, 4, 5)])
def test_shapes(device, schedule, shape):
    """A batch of none gives no bounds, and events of nothing bounds of 0."""
    x0 = pixels(shape, device=device)
    bound = fastgen.variational_bound(tame, x0, schedule, seed=7, decoder="gaussian")
    assert bound.terms.shape == (shape[0], 6) and bound.total.shape == bound.prior.shape == shape[:1]
    assert bound.total.isfinite().all() and (math.prod(shape[1:]) or not bound.total.any())
    assert_same(bound.terms, by_hand(tame, x0, schedule, 7, decoder="gaussian", unit="bits_per_dim"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, schedule, layout):
    x0 = pixels(SHAPE, device=device)
    bound = fastgen.variational_bound(tame, LAYOUTS[layout](x0), schedule, seed=7)
    expected = fastgen.variational_bound(tame, x0, schedule, seed=7)
    torch.testing.assert_close(bound, expected, rtol=5e-6, atol=1e-7)


def test_the_network_gets_the_layout_of_the_data(device, schedule):
    for arrange, layout in ((torch.clone, torch.contiguous_format), (channels_last, torch.channels_last)):
        seen = Seen()
        fastgen.variational_bound(seen, arrange(pixels(SHAPE, device=device)), schedule, seed=7, chunk=4)
        assert [len(x) for x, *_ in seen.calls] == [12, 6]
        assert all(x.is_contiguous(memory_format=layout) for x, *_ in seen.calls)


# ---- what does not change it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [7, SEEDS], ids=["seed", "seeds"])
@pytest.mark.parametrize("variance", ["posterior", "learned_range"])
def test_chunks_do_not_change_it(device, schedule, seed, variance):
    x0, model = pixels(SHAPE, device=device), wide if variance in LEARNED_VARIANCES else tame
    seed = torch.tensor(seed, device=device) if isinstance(seed, list) else seed
    options = {"variance": variance, "decoder": "gaussian"}
    whole = fastgen.variational_bound(model, x0, schedule, seed=seed, **options)
    assert_same(whole.terms, by_hand(model, x0, schedule, seed, unit="bits_per_dim", **options))
    for chunk in (1, 2, 4, 100):
        assert_same_bound(fastgen.variational_bound(model, x0, schedule, seed=seed, chunk=chunk, **options), whole)


def test_batches_do_not_change_it(device, schedule):
    """With a seed for each sample; the seeds may lie on the host."""
    x0, seeds = pixels(SHAPE, device=device), torch.tensor(SEEDS)
    together = fastgen.variational_bound(tame, x0, schedule, seed=seeds.to(device))
    for part in ([0], [1], [2, 0]):
        alone = fastgen.variational_bound(tame, x0[part], schedule, seed=seeds[part])
        assert_same_bound(alone, [each[part] for each in together])


def test_the_total_does_not_depend_on_the_batch():
    """Of as many steps as models have: torch's own sum would add them in another order for another batch."""
    terms = normal((37, 1000), 0)
    from fastgen._likelihood.variational_bound import sum_of_columns

    torch.testing.assert_close(sum_of_columns(terms), terms.double().sum(1).float(), rtol=0, atol=1e-4)
    for b in (0, 5, 36):
        assert_same(sum_of_columns(terms[b : b + 1]), sum_of_columns(terms)[b : b + 1])
    for count in (1, 2, 3, 5, 8):
        assert_same(sum_of_columns(torch.arange(2 * count).view(2, count)), torch.arange(2 * count).view(2, count).sum(1))


def test_the_default_chunk(schedule):
    """As many timesteps as make 64 samples of the batch."""
    for batch, calls in ((1, [6]), (20, [60, 60]), (32, [64, 64, 64]), (70, [70] * 6)):
        seen = Seen()
        fastgen.variational_bound(seen, pixels((batch, 2)), schedule, seed=7)
        assert [len(x) for x, *_ in seen.calls] == calls


# ---- timesteps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [[4], [0, 5], (5, 0, 3, 3), range(1, 6, 2), np.array([2, 4]), torch.tensor([5, 1, 0])])
@pytest.mark.parametrize("chunk", [1, 3])
def test_some_timesteps(device, schedule, timesteps, chunk):
    x0 = pixels(SHAPE, device=device)
    every = fastgen.variational_bound(tame, x0, schedule, seed=7, unit="nats")
    some = fastgen.variational_bound(tame, x0, schedule, seed=7, unit="nats", timesteps=timesteps, chunk=chunk)
    columns = [int(t) for t in timesteps]
    assert_same(some.terms, every.terms[:, columns])
    assert_same(some.prior, every.prior)
    torch.testing.assert_close(some.total, every.prior + 6 / len(columns) * some.terms.sum(1))


def test_a_timestep_drawn_uniformly_is_unbiased(schedule):
    """The mean over the choices of one is the whole."""
    x0 = pixels(SHAPE, torch.float64)
    each = [fastgen.variational_bound(tame, x0, schedule, seed=7, timesteps=[t]).total for t in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(0), fastgen.variational_bound(tame, x0, schedule, seed=7).total)


def test_respaced(device):
    """The network is given the timesteps that the steps had before."""
    schedule, x0, seen = fastgen.Schedule.linear(1000).respace([3, 250, 999]), pixels(SHAPE, device=device), Seen()
    bound = fastgen.variational_bound(seen, x0, schedule, seed=7, chunk=2)
    given = [t.tolist() for _, t, _ in seen.calls]
    assert given == [[3] * 3 + [250] * 3, [999] * 3]
    assert all(t.dtype == torch.int64 and t.device == x0.device for _, t, _ in seen.calls)
    assert_same(bound.terms, by_hand(tame, x0, schedule, 7, unit="bits_per_dim"))


def test_the_network_has_a_tensor_of_its_own(schedule):
    """The schedule's is not what it gets, nor is an input that it keeps written over."""
    kept = []

    def model(x, t):
        kept.append((x, x.clone()))
        m = tame(x, t)
        t.zero_()
        return m

    fastgen.variational_bound(model, pixels(SHAPE), schedule, seed=7, chunk=2)
    assert schedule.timestep_tensor("cpu").tolist() == list(range(6))
    for x, copy in kept:
        assert_same(x, copy)


def test_without_signal_at_the_last_step(device, schedule):
    zero, x0 = schedule.rescale_zero_terminal_snr(), pixels(SHAPE, device=device)
    bound = fastgen.variational_bound(tame, x0, zero, seed=7, prediction="v_prediction")
    assert bound.terms.isfinite().all() and not bound.prior.any()
    with pytest.raises(ValueError, match="^schedule: expected coefficients for each of its 6 steps; .*signal-to-noise"):
        fastgen.variational_bound(tame, x0, zero, seed=7)
    with pytest.raises(ValueError, match="^timesteps: expected ints within 0 … 4, got 5; .*signal-to-noise"):
        fastgen.variational_bound(tame, x0, zero, seed=7, timesteps=[0, 5])
    before = fastgen.variational_bound(tame, x0, zero, seed=7, timesteps=range(5))
    assert_same(before.terms, by_hand(tame, x0, zero, 7, timesteps=range(5), unit="bits_per_dim"))


# ---- the network ----------------------------------------------------------------------------------------------------


class Wrapped:
    def __init__(self, sample):
        self.sample = sample


@pytest.mark.parametrize("wrap", [Wrapped, lambda m: (m, "more")], ids=["sample", "tuple"])
def test_wrapped_outputs(schedule, wrap):
    x0 = pixels(SHAPE)
    bound = fastgen.variational_bound(lambda x, t: wrap(tame(x, t)), x0, schedule, seed=7)
    assert_same_bound(bound, fastgen.variational_bound(tame, x0, schedule, seed=7))


@pytest.mark.parametrize("chunk", [1, 4, 6])
def test_model_kwargs(schedule, chunk):
    """Of tensors that go with the samples each timestep gets its own copy; of others, and what is no tensor, nothing changes."""
    x0, shift, table = pixels(SHAPE), normal((3, 1, 1, 1), 2), normal((5, 2), 3)
    seen = Seen(lambda x, t, shift, more, scale: tame(x, t, shift) * scale)
    bound = fastgen.variational_bound(
        seen,
        x0,
        schedule,
        seed=7,
        chunk=chunk,
        model_kwargs={"shift": shift, "more": {"labels": torch.arange(3), "all": [table]}, "scale": 0.5},
    )
    for x, _, kwargs in seen.calls:
        count = len(x) // 3
        assert_same(kwargs["shift"], torch.cat([shift] * count))
        assert kwargs["more"]["labels"].tolist() == [0, 1, 2] * count
        assert kwargs["more"]["all"][0] is table and kwargs["scale"] == 0.5
    assert_same(bound.terms, by_hand(lambda x, t: tame(x, t, shift) * 0.5, x0, schedule, 7, unit="bits_per_dim"))


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_is(schedule, training):
    model = torch.nn.Conv2d(4, 4, 1).train(training)
    seen = []

    def call(x, t):
        seen.append((model.training, torch.is_grad_enabled()))
        return model(x)

    x0 = pixels(SHAPE).requires_grad_()
    bound = fastgen.variational_bound(call, x0, schedule, seed=7)
    assert model.training is training and set(seen) == {(training, False)}
    assert not any(x.requires_grad for x in bound) and model.weight.grad is None and torch.is_grad_enabled()


def test_no_random_number_is_drawn(schedule):
    state = torch.get_rng_state()
    fastgen.variational_bound(tame, pixels(SHAPE), schedule, seed=7)
    assert torch.equal(torch.get_rng_state(), state)


# ---- progress, pickles ----------------------------------------------------------------------------------------------


def test_progress(schedule, capsys):
    pytest.importorskip("tqdm")
    x0 = pixels(SHAPE)
    bound = fastgen.variational_bound(tame, x0, schedule, seed=7, chunk=4, progress=True)
    shown = capsys.readouterr().err
    assert "variational bound" in shown and "6/6" in shown
    assert_same_bound(bound, fastgen.variational_bound(tame, x0, schedule, seed=7))
    assert capsys.readouterr().err == ""


def test_progress_without_tqdm(schedule, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="^progress: expected tqdm to be installed"):
        fastgen.variational_bound(tame, pixels(SHAPE), schedule, seed=7, progress=True)


def test_a_result_is_a_tuple_with_names(schedule):
    bound = fastgen.variational_bound(tame, pixels(SHAPE), schedule, seed=7)
    total, prior, terms = bound
    assert total is bound.total and prior is bound.prior and terms is bound.terms
    copy = pickle.loads(pickle.dumps(bound))
    assert type(copy) is fastgen.VariationalBound
    assert_same_bound(copy, bound)


# ---- arguments ------------------------------------------------------------------------------------------------------

ERRORS = [
    ({"model": 1}, TypeError, "model: expected a callable"),
    ({"x0": [1.0]}, TypeError, "x0: expected a tensor"),
    ({"x0": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x0: expected dtype"),
    ({"x0": torch.tensor(1.0)}, ValueError, r"x0: expected shape \(B, ...\)"),
    ({"x0": torch.ones(2), "variance": "learned"}, ValueError, r"x0: expected shape \(B, C, ...\) for a learned variance"),
    ({"schedule": 1000}, TypeError, "schedule: expected a fastgen.Schedule"),
    ({"seed": None}, TypeError, "seed: expected an int or an int64 tensor"),
    ({"seed": 1.5}, TypeError, "seed"),
    ({"seed": 2**64}, ValueError, "seed"),
    ({"seed": torch.arange(4)}, ValueError, r"seed: expected 1 element or shape \(3,\)"),
    ({"seed": torch.ones(3)}, TypeError, "seed"),
    ({"seed": torch.empty(3, dtype=torch.int64, device="meta")}, ValueError, "seed: expected a tensor on"),
    ({"timesteps": []}, ValueError, "timesteps: expected at least one"),
    ({"timesteps": [6]}, ValueError, "timesteps: expected ints within 0 … 5, got 6"),
    ({"timesteps": [0, -1]}, ValueError, "timesteps: expected ints within 0 … 5, got -1"),
    ({"timesteps": [0.5]}, TypeError, "timesteps: expected ints, got float"),
    ({"timesteps": [True]}, TypeError, "timesteps: expected ints, got bool"),
    ({"timesteps": 3}, TypeError, "timesteps: expected a sequence of ints or an int tensor, got int"),
    ({"timesteps": "3"}, TypeError, "timesteps"),
    ({"timesteps": torch.ones(2)}, TypeError, "timesteps: .* got dtype float32"),
    ({"timesteps": torch.tensor(2)}, ValueError, r"timesteps: expected shape \(K,\), got \(\)"),
    ({"chunk": 0}, ValueError, "chunk: expected an int ≥ 1, got 0"),
    ({"chunk": 1.0}, TypeError, "chunk: expected an int, got float"),
    ({"unit": "bits"}, ValueError, "unit"),
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

    good = {"model": model, "x0": pixels((3, 2)), "schedule": schedule, "seed": 7}
    with pytest.raises(error, match=f"^{message}"):
        fastgen.variational_bound(**{**good, **changed})


OUTPUTS = [
    (lambda x: None, TypeError, "model: expected it to return a tensor, a tuple .* got NoneType"),
    (lambda x: x[:3], ValueError, r"model: expected an output of shape \(18, 2\) for \(18, 2\), got \(3, 2\)"),
    (lambda x: x[:, :1], ValueError, r"model: expected an output of shape \(18, 2\)"),
    (lambda x: torch.cat([x, x], 1), ValueError, r"model: expected an output of shape \(18, 2\) for \(18, 2\), got \(18, 4\)"),
    (lambda x: x.long(), TypeError, "model_output: expected dtype"),
    (lambda x: x.to("meta"), ValueError, "model_output: expected a tensor on cpu like x0, got one on meta"),
]


@pytest.mark.parametrize("output, error, message", OUTPUTS)
def test_outputs_that_do_not_fit(schedule, output, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fastgen.variational_bound(lambda x, t: output(x), pixels((3, 2)), schedule, seed=7)


def test_a_learned_variance_has_twice_the_channels(schedule):
    with pytest.raises(ValueError, match=r"^model: expected an output of shape \(18, 4\) for \(18, 2\), got \(18, 2\)"):
        fastgen.variational_bound(tame, pixels((3, 2)), schedule, seed=7, variance="learned")
