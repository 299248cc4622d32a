"""The posterior of the forward process: mean, variance and log-variance."""

from . import peers


def cases(grid):
    return [peers.q_posterior(*size) for size in grid]


def test_q_posterior(measure, case, peer):
    measure(case, peer)
