"""Gives pytest-benchmark samples that were measured elsewhere: in turns with other peers, or in other processes.

    clock = Replay()

    @pytest.mark.benchmark(timer=clock.read)
    def test_something(benchmark):
        clock.play(benchmark, samples)  # their statistics become those of this entry

pytest-benchmark times one test after the other, but peers can be compared only where they take turns. So its timer is a clock
that every round sets to that round's sample, and nothing else moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle


class Replay:
    def __init__(self):
        self._now = 0.0

    def read(self) -> float:
        """The timer."""
        return self._now

    def play(self, benchmark, samples: Sequence[float]) -> None:
        """One round of the fixture `benchmark` for each of `samples`, seconds; exact, since each round begins at 0.

        ValueError where there are none.
        """
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        turns = cycle(samples)  # without an end: --benchmark-cprofile runs a round more

        def begin():
            self._now = 0.0
            return (next(turns),), {}

        def end(second):
            self._now = second

        benchmark.pedantic(end, setup=begin, rounds=len(samples))
