"""Normal noise from a seed, by the contract and as an H100 has it, beside torch's generator."""

from . import peers


def cases(grid):
    return grid.over(grid.contiguous, peers.randn) + grid.over(grid.contiguous, peers.randn_torch_cuda)


def test_randn(measure, case, peer):
    measure(case, peer)
