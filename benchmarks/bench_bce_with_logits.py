"""The GAN loss: forward, and forward plus backward to the logits."""

from . import peers


def cases(grid):
    forward = grid.over(grid.contiguous + grid.channels_last, peers.bce_with_logits)
    return forward + grid.over(grid.backward, peers.bce_with_logits, peers.BACKWARD)


def test_bce_with_logits(measure, case, peer):
    measure(case, peer)
