"""Normal noise from a seed, beside torch's generator."""

from . import peers


def cases(grid):
    return grid.over(grid.contiguous, peers.randn)


def test_randn(measure, case, peer):
    measure(case, peer)
