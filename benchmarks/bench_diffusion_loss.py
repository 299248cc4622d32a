"""What a training step computes besides the network: q_sample, the loss and its gradient."""

from . import peers


def cases(grid):
    return [peers.diffusion_loss(*size) for size in grid]


def test_diffusion_loss(measure, case, peer):
    measure(case, peer)
