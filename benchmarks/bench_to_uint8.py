"""Images as bytes: to them, and noising that takes them for data."""

from . import peers


def cases(grid):
    return grid.over(grid.contiguous + grid.channels_last, peers.to_uint8) + grid.over(grid.contiguous, peers.q_sample_bytes)


def test_to_uint8(measure, case, peer):
    measure(case, peer)
