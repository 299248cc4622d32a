"""The theory of the variational bound, as of what variational_bound, vlb_terms and prior_kl compute: theorem 8 of the lecture note
(Sunmook Choi, "Generative Models", 2023), Jensen's inequality before it, what the bound of a perfect model is, and equation (4.8),
which log_likelihood estimates.

Where data are N(μ, s²) and a model's x̂0 is linear in x_t, its chain is a Gaussian one. Then everything has a closed form that takes
nothing from fastgen: the likelihood, by carrying mean and variance through the chain; the bound, term by term; and the gap between
them, which is a divergence of two Gaussians over all of x_1 … x_T at once. Timesteps are 0-based: x_t here is the note's x_{t+1}.
"""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import array, interpreted, normal

import fastgen
from fastgen.schedule import LEARNED_VARIANCES, VARIANCES

MEAN, DEVIATION = 0.4, 0.6  # μ, s
ELEMENTS = 4  # of a sample, independent of each other
SCHEDULES = {
    "linear": fastgen.Schedule.linear(8, 0.02, 0.5),
    "cosine": fastgen.Schedule.cosine(6),
    "respaced": fastgen.Schedule.linear(1000).respace(7, spacing="trailing"),
    "much signal left": fastgen.Schedule.linear(5, 0.01, 0.1),
}


class Linear:
    """The model with x̂0 = slope_t·x_t + shift_t and the variances exp(log_variance_t), of one element of the data."""

    def __init__(self, schedule, kind, variance):
        self.schedule, self.variance, betas = schedule, variance, schedule.betas
        ts = np.arange(len(betas))
        bar = np.cumprod(1.0 - betas)
        prev = np.concatenate([[1.0], bar[:-1]])
        self.signal, self.noise = np.sqrt(bar), 1.0 - bar  # of q(x_t | x0) the factor and the variance
        self.from_x0 = np.sqrt(prev) * betas / (1.0 - bar)
        self.from_x = np.sqrt(1.0 - betas) * (1.0 - prev) / (1.0 - bar)
        self.posterior = betas * (1.0 - prev) / (1.0 - bar)  # β̃
        # the exact E[x0 | x_t] and Var[x0 | x_t], by the regression of x0 on x_t
        slope = self.signal * DEVIATION**2 / (self.signal**2 * DEVIATION**2 + self.noise)
        left = DEVIATION**2 * (1.0 - slope * self.signal)
        shift = MEAN * (1.0 - slope * self.signal)
        self.slope, self.shift = {
            "exact": (slope, shift),
            "constant": (0.0 * slope, 0.0 * shift),
            "too steep": (1.4 * slope, shift),
            "off": (slope, shift - 0.3),
        }[kind]
        if variance == "learned":
            self.log_variance = np.log(self.posterior + self.from_x0**2 * left)  # Var[x_{t−1} | x_t]
            if kind != "exact":
                self.log_variance += 0.3
        else:
            self.log_variance = reference.vlb_variances(betas, ts, 1, variance)[1]

    def network(self, x, t):
        """It says this x̂0 as an ε̂, and the logarithm of the variance where that is learned."""
        at = lambda values: torch.tensor(values).to(x)[t].view(-1, *[1] * (x.dim() - 1))  # noqa: E731
        found = at(self.slope) * x + at(self.shift)
        epsilon = (x - at(self.signal) * found) / at(np.sqrt(self.noise))
        return torch.cat([epsilon, at(self.log_variance).expand_as(x)], 1) if self.variance in LEARNED_VARIANCES else epsilon

    def variances(self):
        return np.exp(self.log_variance)

    def terms(self):
        """E[L_t] over data and noise."""
        error = ((1.0 - self.slope * self.signal) * MEAN - self.shift) ** 2
        error = error + (1.0 - self.slope * self.signal) ** 2 * DEVIATION**2 + self.slope**2 * self.noise  # E[(x0 − x̂0)²]
        v = self.variances()
        first = 0.5 * (math.log(2 * math.pi * v[0]) + error[0] / v[0])
        later = 0.5 * (np.log(v / np.where(self.posterior > 0, self.posterior, 1.0)) - 1.0)
        later += 0.5 * (self.posterior + self.from_x0**2 * error) / v
        return np.concatenate([[first], later[1:]])

    def prior(self):
        """E[L_T]."""
        signal, noise = self.signal[-1] ** 2, self.noise[-1]
        return 0.5 * (signal * (MEAN**2 + DEVIATION**2) + noise - 1.0 - math.log(noise))

    def steps(self):
        """gain, shift, variance of each p(x_{t−1} | x_t)."""
        return self.from_x0 * self.slope + self.from_x, self.from_x0 * self.shift, self.variances()

    def generated(self):
        """Mean and variance of p_θ(x0): what becomes of N(0, 1) on its way through the chain."""
        mean, variance = 0.0, 1.0
        for gain, shift, added in zip(*(column[::-1] for column in self.steps()), strict=True):
            mean, variance = gain * mean + shift, gain**2 * variance + added
        return mean, variance

    def negative_log_likelihood(self):
        """E[−log p_θ(x0)]"""
        mean, variance = self.generated()
        return 0.5 * (math.log(2 * math.pi * variance) + ((MEAN - mean) ** 2 + DEVIATION**2) / variance)

    def log_likelihood(self, x0):
        """log p_θ(x0) of each sample, (B,)."""
        mean, variance = self.generated()
        return reference.normal_log_density(array(x0), mean, variance).sum(1)

    def gap(self):
        """E[KL(q(x_1 … x_T | x0) ‖ p_θ(x_1 … x_T | x0))], of two Gaussians in T dimensions."""
        total = len(self.signal)
        # p: all of x_0 … x_T as a constant plus a matrix times T + 1 independent normals
        constant, matrix = np.zeros(total + 1), np.zeros((total + 1, total + 1))
        matrix[total, total] = 1.0
        for t, (gain, shift, added) in reversed(list(enumerate(zip(*self.steps(), strict=True)))):
            constant[t] = gain * constant[t + 1] + shift
            matrix[t] = gain * matrix[t + 1]
            matrix[t, t] = math.sqrt(added)
        covariance = matrix @ matrix.T
        by_x0 = covariance[1:, 0] / covariance[0, 0]
        p = covariance[1:, 1:] - np.outer(by_x0, covariance[0, 1:])
        # q: Cov(x_s, x_t | x0) = Var(x_s | x0)·√ᾱ_t/√ᾱ_s for s ≤ t
        ratio = self.signal / self.signal[:, None]
        upper = np.triu(self.noise[:, None] * ratio)
        q = upper + np.triu(upper, 1).T
        # the means, apart by slope·x0 + offset
        slope, offset = self.signal - by_x0, by_x0 * constant[0] - constant[1:]
        at_mean = slope * MEAN + offset
        apart = at_mean @ np.linalg.solve(p, at_mean) + DEVIATION**2 * slope @ np.linalg.solve(p, slope)
        determinants = np.linalg.slogdet(p)[1] - np.linalg.slogdet(q)[1]
        return 0.5 * (np.trace(np.linalg.solve(p, q)) - total + determinants + apart)

    def estimate(self, device, count):
        """variational_bound of `count` samples of the data."""
        count = 300 if interpreted(device) else count
        x0 = MEAN + DEVIATION * normal((count, ELEMENTS), 0, torch.float64, device)
        options = {"unit": "nats", "decoder": "gaussian", "variance": self.variance, "chunk": 2}
        return fastgen.variational_bound(self.network_of_the_schedule, x0, self.schedule, seed=11, **options)

    def network_of_the_schedule(self, x, timesteps):
        """As `network`, of the timesteps that the schedule had before it was respaced."""
        kept = self.schedule.timestep_tensor(x.device)
        return self.network(x, torch.searchsorted(kept, timesteps))


def assert_expected(samples, expected, sigmas=5.0):
    """That the mean of independent `samples` is what is expected, to its own error."""
    samples = array(samples)
    error = samples.std(0, ddof=1) / math.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - expected) <= sigmas * error + 1e-12 * np.abs(expected)).all(), (
        samples.mean(0),
        expected,
        error,
    )


def of_all_chains(function):
    """Runs the test with each schedule and each kind of variance."""
    function = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)(function)
    return pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])(function)


# ---- the exact reverse model ----------------------------------------------------------------------------------------


@of_all_chains
def test_the_bound_is_the_likelihood_and_a_gap(schedule, variance):
    """In closed form: Theorem 8's terms, added up, are E[−log p] and the divergence of the two chains."""
    model = Linear(schedule, "exact", variance)
    bound = model.prior() + model.terms().sum()
    assert bound == pytest.approx(model.negative_log_likelihood() + model.gap(), rel=1e-9)


@of_all_chains
def test_the_bound_of_the_exact_reverse_mean(device, schedule, variance):
    """By variational_bound: every part, and the whole, is what the closed form says."""
    model = Linear(schedule, "exact", variance)
    total, prior, terms = model.estimate(device, 4000)
    assert_expected(prior, ELEMENTS * model.prior())
    assert_expected(terms, ELEMENTS * model.terms())
    assert_expected(total, ELEMENTS * (model.negative_log_likelihood() + model.gap()))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_perfect_model_is_left_with_the_prior(device, schedule):
    """With the exact mean and the exact variance of each step, the bound is the entropy of the data and KL(q(x_T) ‖ N(0, 1)): the
    loss of starting from the prior."""
    model = Linear(schedule, "exact", "learned")
    entropy = 0.5 * math.log(2 * math.pi * math.e * DEVIATION**2)
    mean, variance = model.signal[-1] * MEAN, model.signal[-1] ** 2 * DEVIATION**2 + model.noise[-1]
    least = entropy + 0.5 * (variance + mean**2 - 1.0 - math.log(variance))
    assert model.prior() + model.terms().sum() == pytest.approx(least, rel=1e-12)
    assert_expected(model.estimate(device, 4000).total, ELEMENTS * least)


def test_the_exact_reverse_mean():
    """What the closed form takes for it is E[x_{t−1} | x_t], by the regression of x_{t−1} on x_t."""
    for schedule in SCHEDULES.values():
        model = Linear(schedule, "exact", "learned")
        marginal = np.concatenate([[DEVIATION**2], model.signal**2 * DEVIATION**2 + model.noise])
        mean = MEAN * np.concatenate([[1.0], model.signal])
        gain, shift, variance = model.steps()
        regressed = np.sqrt(schedule.alphas) * marginal[:-1] / marginal[1:]
        np.testing.assert_allclose(gain, regressed, rtol=1e-9)
        np.testing.assert_allclose(shift, mean[:-1] - regressed * mean[1:], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(variance, marginal[:-1] - regressed**2 * marginal[1:], rtol=1e-9)


# ---- Theorem 8: equations (4.9) and (4.10) --------------------------------------------------------------------------


def log_density(x, mean, variance):
    """log N(x; mean, variance·I) of each sample."""
    variance = torch.as_tensor(variance, dtype=x.dtype, device=x.device)
    return (-0.5 * (torch.log(2 * math.pi * variance) + (x - mean) ** 2 / variance)).sum(1)


class Trajectories:
    """Forward ones, x_0 … x_T, by q_step alone, and the logarithms of all densities along them."""

    def __init__(self, device, variance, count):
        schedule = self.schedule = SCHEDULES["linear"]
        x0 = self.x0 = normal((count, 3), 0, torch.float64, device)
        self.variance, zeros = variance, torch.zeros_like(x0)
        self.x, self.m = [], []
        previous = x0
        self.log_forward, self.log_reverse, self.log_posterior, self.log_marginal = [], [], [], []
        for t in range(len(schedule)):
            x = fastgen.q_step(previous, t, schedule, seed=5, offset=t)
            m = self.network(x, t)
            self.x.append(x)
            self.m.append(m)
            sigma = self.variance_at(t, m)
            mean = fastgen.ddpm_step(x, m, t, schedule, noise=zeros, variance=variance)
            self.log_reverse.append(log_density(previous, mean, sigma))  # log p(x_{t−1} | x_t)
            self.log_forward.append(log_density(x, math.sqrt(schedule.alphas[t]) * previous, schedule.betas[t]))
            bar = schedule.alphas_cumprod[t]
            self.log_marginal.append(log_density(x, math.sqrt(bar) * x0, 1.0 - bar))  # log q(x_t | x0)
            if t > 0:
                mean, tilde, _ = fastgen.q_posterior(x0, x, t, schedule)
                self.log_posterior.append(log_density(previous, mean, tilde))  # log q(x_{t−1} | x_t, x0)
            previous = x
        self.log_prior = log_density(previous, 0.0, 1.0)

    def network(self, x, t):
        """Any will do."""
        m = torch.tanh(1.5 * x - 0.2) + 0.05 * t
        return torch.cat([m, torch.cos(x) - (2.0 if self.variance == "learned" else 0.0)], 1) if self.wide else m

    @property
    def wide(self):
        return self.variance in LEARNED_VARIANCES

    def variance_at(self, t, m):
        v = array(m[:, 3:]) if self.wide else None
        return torch.tensor(np.exp(reference.vlb_variances(self.schedule.betas, t, 2, self.variance, v)[1])).to(m)

    def as_written(self):
        """What (4.9) takes the mean of: −log p(x_T) − Σ log p(x_{t−1} | x_t)/q(x_t | x_{t−1})."""
        return -self.log_prior - sum(self.log_reverse) + sum(self.log_forward)

    def rewritten(self):
        """What (4.14) takes the mean of: the same by Bayes' rule, by which q(x_t | x_{t−1}) is q(x_{t−1} | x_t, x0) times
        q(x_t | x0)/q(x_{t−1} | x0), of which all but q(x_T | x0) cancel."""
        return -self.log_prior + self.log_marginal[-1] - self.log_reverse[0] + sum(self.ratios())

    def ratios(self):
        """log q(x_{t−1} | x_t, x0)/p(x_{t−1} | x_t) for t ≥ 1, whose means given x_t and x0 are the terms L_t."""
        return [q - p for q, p in zip(self.log_posterior, self.log_reverse[1:], strict=True)]

    def terms(self):
        """L_t of what these trajectories have passed through."""
        options = {"variance": self.variance, "decoder": "gaussian"}
        at = enumerate(zip(self.x, self.m, strict=True))
        return [fastgen.vlb_terms(m, self.x0, t, self.schedule, x_t=x, **options) for t, (x, m) in at]


@pytest.mark.parametrize("variance", VARIANCES)
def test_equations_4_9_and_4_14_on_every_trajectory(device, variance):
    """Telescoping changes nothing, whatever the trajectory: to rounding."""
    made = Trajectories(device, variance, 50)
    torch.testing.assert_close(made.rewritten(), made.as_written(), rtol=1e-11, atol=1e-10)
    # Bayes' rule itself, step by step
    for t in range(1, len(made.schedule)):
        by_bayes = made.log_posterior[t - 1] + made.log_marginal[t] - made.log_marginal[t - 1]
        torch.testing.assert_close(made.log_forward[t], by_bayes, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("variance", VARIANCES)
def test_equation_4_9_is_4_10(device, variance):
    """In the mean over shared trajectories, the whole and term by term. Each term of (4.10) scatters less than the ratio that it
    is the mean of: that is its use, since training draws one term at a time. Of the sum over a trajectory it need not be so: the
    ratios of a good model cancel each other's noise, and the terms do not."""
    made = Trajectories(device, variance, 300 if interpreted(device) else 6000)
    ratios, terms = made.ratios(), made.terms()
    assert_expected(made.as_written() - fastgen.prior_kl(made.x0, made.schedule) - sum(terms), 0.0)
    for ratio, term in zip(ratios, terms[1:], strict=True):
        assert_expected(ratio - term, 0.0)
        assert term.var() < ratio.var()


# ---- Jensen ---------------------------------------------------------------------------------------------------------


@of_all_chains
@pytest.mark.parametrize("kind", ["exact", "constant", "too steep", "off"])
def test_no_bound_is_below_the_likelihood(device, schedule, variance, kind):
    """E[bound] ≥ E[−log p], also of models that are wrong: by their closed forms, and by variational_bound."""
    model = Linear(schedule, kind, variance)
    bound, likelihood, gap = model.prior() + model.terms().sum(), model.negative_log_likelihood(), model.gap()
    assert gap >= 0 and bound == pytest.approx(likelihood + gap, rel=1e-9)
    total = model.estimate(device, 1000).total
    assert_expected(total, ELEMENTS * bound)
    error = total.std().item() / math.sqrt(len(total))
    assert total.mean().item() >= ELEMENTS * likelihood - 5 * error


def test_each_sample_of_data_has_its_own_bound(device):
    """Of one x0 the mean over the noise is not below −log p(x0): Jensen holds before the mean over data is taken."""
    model, count = Linear(SCHEDULES["linear"], "exact", "posterior"), 60 if interpreted(device) else 2000
    mean, variance = model.generated()
    for value in (-1.0, 0.4, 1.7):
        x0 = torch.full((count, 1), value, dtype=torch.float64, device=device)
        total = fastgen.variational_bound(model.network, x0, model.schedule, seed=3, unit="nats", decoder="gaussian").total
        of_x0 = 0.5 * (math.log(2 * math.pi * variance) + (value - mean) ** 2 / variance)
        assert total.mean().item() >= of_x0 - 5 * total.std().item() / math.sqrt(count)


# ---- equation (4.8): the likelihood itself --------------------------------------------------------------------------


def log_likelihood(model, x0, trajectories, seed=11):
    options = {"trajectories": trajectories, "seed": seed, "variance": model.variance, "chunk": max(1, 2000 // len(x0))}
    return fastgen.log_likelihood(model.network_of_the_schedule, x0, model.schedule, **options)


@pytest.mark.pairs(eager=1)
@of_all_chains
@pytest.mark.parametrize("kind", ["exact", "too steep"])
def test_the_mean_weight_is_the_likelihood(device, schedule, variance, kind):
    """Of x0 near the data's mean and far from it: to the estimate's own error where many trajectories have a say. Where a few have,
    it errs to the one side: by Markov's inequality a mean of weights is seldom far above what it is the mean of."""
    model, count = Linear(schedule, kind, variance), 100 if interpreted(device) else 3000
    x0 = torch.tensor([[0.4, 0.5], [-0.3, 1.1], [1.2, 1.6]], dtype=torch.float64, device=device)
    found = log_likelihood(model, x0, count)
    off, many = array(found.estimate) - model.log_likelihood(x0), array(found.ess) > 25
    assert many[0] or kind == "too steep"
    assert (np.abs(off) <= 5 * array(found.error))[many].all()
    assert (off < 5).all()


@pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])
def test_more_trajectories_come_nearer(device, variance):
    """The error is 1/√K of the scatter of the weights, and it says how far the estimate is off."""
    model, counts = Linear(SCHEDULES["linear"], "exact", variance), (25, 100) if interpreted(device) else (250, 4000)
    x0 = MEAN + DEVIATION * normal((20, 1), 1, torch.float64, device)
    few, many = (log_likelihood(model, x0, count) for count in counts)
    shrinks = (many.error / few.error).mean().item() * math.sqrt(counts[1] / counts[0])
    assert 0.7 < shrinks < 1.4
    off = (array(many.estimate) - model.log_likelihood(x0)) / array(many.error)
    assert np.abs(off).max() < 5 and 0.5 < np.sqrt(np.mean(off**2)) < 1.6  # standard normal, twenty of them


@pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])
@pytest.mark.parametrize("kind", ["exact", "off"])
def test_jensen_from_the_bound_to_the_likelihood(device, variance, kind):
    """Of one trajectory the estimate is in the mean minus the bound of the same x0: equation (4.9), which is (4.10). Of more it is
    between that and the likelihood, the higher the more there are."""
    model, copies = Linear(SCHEDULES["linear"], kind, variance), 100 if interpreted(device) else 1500
    x0 = torch.full((copies, 1), 0.9, dtype=torch.float64, device=device)
    options = {"seed": 3, "unit": "nats", "decoder": "gaussian", "variance": variance}
    bound = fastgen.variational_bound(model.network, x0, model.schedule, **options).total
    one, four, sixteen = (log_likelihood(model, x0, count).estimate for count in (1, 4, 16))
    assert_expected(one + bound, 0.0)
    error = 5 * one.std().item() / math.sqrt(copies)
    exact = model.log_likelihood(x0)[0]
    assert one.mean() < four.mean() + error and four.mean() < sixteen.mean() + error and sixteen.mean() < exact + error
    assert exact - sixteen.mean() < exact - one.mean() - error / 5
