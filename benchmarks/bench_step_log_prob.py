"""The log-probability of a reverse step, and its gradient to the network's output; a step that comes with it; and what a step
contributes to the weight of a trajectory."""

from . import peers


def cases(grid):
    makers = peers.ddpm_step_log_prob, peers.step_log_weight
    return grid.over(grid.contiguous + grid.channels_last, peers.step_log_prob) + [
        case for make in makers for case in grid.over(grid.contiguous, make)
    ]


def test_step_log_prob(measure, case, peer):
    measure(case, peer)
