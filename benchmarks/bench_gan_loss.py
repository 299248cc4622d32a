"""The discriminator's loss, without target tensors: forward, and forward plus backward to the logits."""

from . import peers


def cases(grid):
    return [peers.gan_loss(*size, mode) for size in grid for mode in ("forward", "backward")]


def test_gan_loss(measure, case, peer):
    measure(case, peer)
