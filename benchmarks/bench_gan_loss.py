"""The discriminator's loss, without target tensors: forward, and forward plus backward to the logits."""

from . import peers


def cases(grid):
    forward = grid.over(grid.contiguous + grid.channels_last, peers.gan_loss)
    return forward + grid.over(grid.backward, peers.gan_loss, peers.BACKWARD)


def test_gan_loss(measure, case, peer):
    measure(case, peer)
