"""Forward noising, with the noise given and from a seed."""

from . import peers


def cases(grid):
    modes = [(mode, output) for mode in ("noise", "seed") for output in ("out", "fresh")]
    return [peers.q_sample(*size, *mode) for size in grid for mode in modes]


def test_q_sample(measure, case, peer):
    measure(case, peer)
