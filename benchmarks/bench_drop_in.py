"""Schedulers of diffusers, theirs and those of `fastgen.drop_in.diffusers`: a step outside the network."""

import pytest

from . import common


def cases(grid):
    pytest.importorskip("diffusers")
    from . import drop_in

    return [*drop_in.cases([(1, 2, 4), common.TINY] if grid[0][0] == common.TINY else drop_in.SHAPES)]


def test_drop_in(measure, case, peer):
    measure(case, peer)
