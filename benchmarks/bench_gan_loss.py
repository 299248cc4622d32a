"""The discriminator's loss, without target tensors: forward, and forward plus backward to the logits."""

from . import peers


def cases(grid):
    return grid.over(grid.contiguous, peers.gan_loss) + grid.over(grid.backward, peers.gan_loss, peers.BACKWARD)


def test_gan_loss(measure, case, peer):
    measure(case, peer)
