"""Normal noise: by the contract, as an H100 has it, and torch's own of the CPU; beside torch's generator."""

from . import peers


def cases(grid):
    return [
        case
        for points, make in (
            (grid.contiguous, peers.randn),
            (grid.contiguous, peers.randn_torch_cuda),
            (grid.backward, peers.torch_randn),
        )
        for case in grid.over(points, make)
    ]


def test_randn(measure, case, peer):
    measure(case, peer)
