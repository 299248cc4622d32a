"""Large calls with 1, 2, 4 … threads of the CPU."""

from dataclasses import replace

import torch

from . import peers


def cases(grid):
    if grid.device != "cpu":
        return []
    most = torch.get_num_threads()
    counts = [*range(1, most + 1)] if most <= 4 else [*(2**k for k in range(most.bit_length())), most]
    points = [(grid.large, torch.float32, False)]
    made = [
        *grid.over(points, peers.ddpm_step, "seed", "out"),
        *grid.over(points, peers.ddpm_step, "noise", "out"),
        *grid.over(points, peers.bce_with_logits),
        *grid.over(points, peers.diffusion_loss),
    ]
    return [replace(case, threads=threads) for case in made for threads in dict.fromkeys(counts)]


def test_threads(measure, case, peer):
    measure(case, peer)
