"""The reverse step: DDPM's, with the noise given, from a seed and torch's own, and DDIM's, without noise; and their backward."""

from dataclasses import replace

from . import peers


def cases(grid):
    forward = [
        case
        for mode in ("noise", "seed")
        for case in (
            *grid.over(grid.contiguous, peers.ddpm_step, mode, "out"),
            *grid.over(grid.channels_last + grid.fresh, peers.ddpm_step, mode, "fresh"),
        )
    ]
    forward += grid.over(grid.contiguous, peers.ddim_step, "out") + grid.over(grid.channels_last, peers.ddim_step, "fresh")
    forward += grid.over(grid.backward, peers.ddpm_step, "generator", "out")
    forward += [replace(case, detail="points") for case in grid.over(grid.points, peers.ddpm_step, "seed", "out")]
    ddpm = grid.over(grid.backward, peers.ddpm_step, "seed", "fresh")
    ddim = grid.over(grid.backward, peers.ddim_step, "fresh")
    return forward + [peers.backward(case, 2, 3) for case in ddpm + ddim]


def test_ddpm_step(measure, case, peer):
    measure(case, peer)
