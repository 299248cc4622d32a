"""The GAN loss: forward, and forward plus backward to the logits."""

from . import peers


def cases(grid):
    return [peers.bce_with_logits(*size, mode) for size in grid for mode in ("forward", "backward")]


def test_bce_with_logits(measure, case, peer):
    measure(case, peer)
