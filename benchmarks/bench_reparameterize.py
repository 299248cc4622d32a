"""A sample of a variational autoencoder's posterior, with the noise given and from a seed; and with its divergence, and the
gradients to the parameters."""

from . import peers


def cases(grid):
    samples = [
        case for mode in ("noise", "seed") for case in grid.over(grid.contiguous + grid.channels_last, peers.reparameterize, mode)
    ]
    return samples + grid.over(grid.contiguous + grid.channels_last, peers.posterior)


def test_reparameterize(measure, case, peer):
    measure(case, peer)
