"""The reverse step: DDPM's, with the noise given and from a seed, and DDIM's, without noise."""

from . import peers


def cases(grid):
    modes = [(mode, output) for mode in ("noise", "seed") for output in ("out", "fresh")]
    ddpm = [peers.ddpm_step(*size, *mode) for size in grid for mode in modes]
    return ddpm + [peers.ddim_step(*size, output) for size in grid for output in ("out", "fresh")]


def test_ddpm_step(measure, case, peer):
    measure(case, peer)
