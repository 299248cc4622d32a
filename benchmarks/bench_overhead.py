"""Calls on 16 elements beside one `torch.add` of 16, and losses of (64, 1) logits: what a call costs apart from its work."""

from dataclasses import replace

import torch

from . import peers


def cases(grid):
    logits = [((64, 1), torch.float32, False)]
    losses = [
        replace(case, overhead=True)
        for make in (peers.bce_with_logits, peers.gan_loss)
        for passes in (peers.FORWARD, peers.BACKWARD)
        for case in grid.over(logits, make, passes)
    ]
    return [replace(case, device=grid.device) for case in peers.calls_of_16()] + losses


def test_overhead(measure, case, peer):
    measure(case, peer)
