"""One call on 16 elements beside one `torch.add` of 16 elements: what a call costs apart from its work."""

from . import peers


def cases(grid):
    return peers.calls_of_16()


def test_overhead(measure, case, peer):
    measure(case, peer)
