"""The posterior of the forward process: mean, variance and log-variance, and the backward of the mean."""

from . import peers


def cases(grid):
    forward = grid.over(grid.contiguous + grid.channels_last, peers.q_posterior)
    return forward + [peers.backward(case, 2, 3) for case in grid.over(grid.backward, peers.q_posterior)]


def test_q_posterior(measure, case, peer):
    measure(case, peer)
