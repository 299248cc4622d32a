"""The term of the variational bound with a learned variance, and its gradient to both halves of the network's output."""

from . import peers


def cases(grid):
    return grid.over(grid.contiguous + grid.channels_last, peers.vlb_terms)


def test_vlb_terms(measure, case, peer):
    measure(case, peer)
