"""Schedulers of diffusers, theirs and those of `fastgen.drop_in.diffusers`: a step outside the network."""

from dataclasses import replace

import pytest

from . import peers


def cases(grid):
    pytest.importorskip("diffusers")
    from . import drop_in

    shapes = [(1, 2, 4), peers.TINY] if grid.tiny else drop_in.SHAPES
    return [replace(case, device=grid.device) for case in drop_in.cases(shapes)]


def test_drop_in(measure, case, peer):
    measure(case, peer)
