"""Normal noise from a seed, beside torch's generator."""

from . import peers


def cases(grid):
    return [peers.randn(*size) for size in grid]


def test_randn(measure, case, peer):
    measure(case, peer)
