"""Forward noising, with the noise given and from a seed, and its backward to x0."""

from dataclasses import replace

from . import peers


def cases(grid):
    given = [
        case
        for mode in ("noise", "seed")
        for case in (
            *grid.over(grid.contiguous, peers.q_sample, mode, "out"),
            *grid.over(grid.channels_last + grid.fresh, peers.q_sample, mode, "fresh"),
        )
    ]
    given += [replace(case, detail="points") for case in grid.over(grid.points, peers.q_sample, "seed", "out")]
    return given + [peers.backward(case, 1, 2) for case in grid.over(grid.backward, peers.q_sample, "seed", "fresh")]


def test_q_sample(measure, case, peer):
    measure(case, peer)
