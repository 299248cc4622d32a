"""What a training step computes besides the network: q_sample, the loss and its gradient."""

from . import peers


def cases(grid):
    return grid.over(grid.contiguous + grid.channels_last, peers.diffusion_loss)


def test_diffusion_loss(measure, case, peer):
    measure(case, peer)
