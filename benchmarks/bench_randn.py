"""Normal noise from a seed, beside torch's generator; and torch's own noise, made by fastgen and by torch."""

from . import peers


def cases(grid):
    return grid.over(grid.contiguous, peers.randn) + grid.over(grid.backward, peers.torch_randn)


def test_randn(measure, case, peer):
    measure(case, peer)
