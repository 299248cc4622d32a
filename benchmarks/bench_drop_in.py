"""Schedulers of diffusers, theirs and those of `fastgen.drop_in.diffusers`: a step outside the network. Losses and the bound of
guided-diffusion, theirs and patched, where its sources are at the path FASTGEN_GUIDED_DIFFUSION."""

import os
from dataclasses import replace

import pytest

from . import peers


def cases(grid):
    pytest.importorskip("diffusers")
    from . import drop_in

    shapes = [(1, 2, 4), peers.TINY] if grid.tiny else drop_in.SHAPES
    cases = [*drop_in.cases(shapes)]
    if drop_in.GUIDED in os.environ:
        cases += drop_in.guided_cases([peers.TINY] if grid.tiny else drop_in.IMAGES)
    return [replace(case, device=grid.device) for case in cases]


def test_drop_in(measure, case, peer):
    measure(case, peer)
