"""The divergence of two diagonal Gaussians, and its gradients to the parameters of both."""

from . import peers


def cases(grid):
    return grid.over(grid.contiguous + grid.channels_last, peers.gaussian_kl)


def test_gaussian_kl(measure, case, peer):
    measure(case, peer)
