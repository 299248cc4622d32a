"""The log-probability of a reverse step, and its gradient to the network's output."""

from . import peers


def cases(grid):
    return grid.over(grid.contiguous + grid.channels_last, peers.step_log_prob)


def test_step_log_prob(measure, case, peer):
    measure(case, peer)
