"""Which case is timed when, and for how long: breadth first, so that what no time is left for is the finest detail.

A "thing" is what is timed at one go: a `peers.Case` with all its peers, or the name of a whole program or of the import.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict

import torch

from . import common, peers

USUAL = 1_000_000  # elements of the case that says most of its op
LONGEST = 3.0  # seconds that the rounds of a case take at most, without its set-up
LEAST = 5  # rounds of a case, for a median with quartiles
FIRST, SHORT = 1.0, 0.2  # seconds that the rounds of a series' first case, and of any, last at least

# Seconds that a thing needs at least, as guessed until the first of its like was timed: AMD EPYC, 2 cores, an empty cache of
# Inductor's. The first of the 58 programs takes 9 to 17 s (g++ meets torch's headers), each of the others 1.2 (a forward) to 3.0 (a
# backward too); one that is in the cache, 0.10 to 0.15.
EACH = 0.4
PER_BYTE = 0.25 / 2**30
PROGRAM = 2.5  # one of torch.compile's
AGAIN = 0.2  # that program for another case
WHOLE = 15.0  # a whole program, or the import

clock = time.monotonic


# ---- order -----------------------------------------------------------------------------------------------------------


def series(thing):
    """Of which breadth first takes one thing after the other: an op and where its noise comes from."""
    return thing if isinstance(thing, str) else (thing.op, thing.mode)


def ranks(things) -> dict:
    """{thing: how many of its series come before it}: those go first that differ in the fewest ways from the usual one, and of
    these the ones with more peers, then those nearer to the usual size."""
    found, members = {}, defaultdict(list)
    for thing in things:
        members[series(thing)].append(thing)
    for several in members.values():
        if len(several) > 1:
            first = min(several, key=_unusual)
            several.sort(key=lambda case: (*_differences(case, first), -len(case.peers), _decades(case)))
        found |= {thing: rank for rank, thing in enumerate(several)}
    return found


def _decades(case):
    return abs(math.log10(case.elements / USUAL))


def _unusual(case):
    backward = case.passes == peers.BACKWARD
    several = bool(case.threads), case.overhead, backward, case.dtype != torch.float32, case.channels_last, bool(case.detail)
    return sum(several), _decades(case)


def _differences(case, first):
    """(how many, which: the coarser go first). A backward, and a call on few elements, has an output of its own."""
    size = not case.overhead and abs(math.log10(case.elements / first.elements)) > 0.5
    alike = case.passes == first.passes and not case.overhead
    ways = (
        case.passes != first.passes,
        case.overhead != first.overhead,
        case.dtype != first.dtype,
        size,
        case.channels_last != first.channels_last,
        alike and case.output != first.output,
        alike and case.detail != first.detail,
        case.threads != first.threads,
    )
    return sum(ways), [not way for way in ways]


# ---- time ------------------------------------------------------------------------------------------------------------


class Pace:
    """Sees to it that everything gets the least that it needs, and shares what is left of the time evenly.

    What the least is, the things that were timed tell: for each op and mode a time per byte that its peers move, and for all of
    them the time of a program of torch.compile.
    """

    def __init__(self, seconds: float):
        self.start = clock()
        self.end = self.start + seconds
        self.waiting: dict = {}  # {thing: its peers that are asked for}, in the order in which they will be
        self.programs: dict = {}  # {what a compiled program is known by: seconds}
        self.spent, self.moved = Counter(), Counter()  # by series: seconds, bytes
        self.begun = self.compiling = 0.0

    def late(self) -> bool:
        return clock() > self.end

    def begin(self, thing):
        """Takes a thing from those that wait."""
        self.asked = self.waiting.pop(thing, ())
        self.thing, self.begun, self.compiling = thing, clock(), 0.0

    def compiled(self, seconds: float):
        """The first call of the peer "torch.compile" took so long; it counts once for each program."""
        self.compiling = seconds
        self.programs.setdefault(peers.graph_of(self.thing), seconds)

    def rounds(self, one: float) -> float:
        """How long the rounds of the case may last, now that it is set up and one of them takes so long."""
        least, floor = LEAST * one, SHORT if series(self.thing) in self.moved else FIRST
        self.spent[series(self.thing)] += max(clock() - self.begun - self.compiling + least - EACH, 0.0)
        self.moved[series(self.thing)] += _moved(self.thing, self.asked)
        spare = self.end - clock() - least - self.needed(self.waiting)
        # not quite an even share: what was guessed too low is found at the expense of the cases that come last
        return min(max(least + 0.8 * spare / (1 + len(self.waiting)), floor), LONGEST)

    def minutes(self, left_out: dict) -> float:
        """As many as serve for what was left out too."""
        return (clock() - self.start + 1.2 * self.needed(left_out)) / 60

    def needed(self, things: dict) -> float:
        """Seconds that things need at least."""
        total = self.moved.total()
        usual = self.spent.total() / total if total else PER_BYTE
        seconds, programs = 0.0, set()
        for thing, asked in things.items():
            if isinstance(thing, str):
                seconds += WHOLE
                continue
            known = self.moved[series(thing)]
            seconds += EACH + _moved(thing, asked) * (self.spent[series(thing)] / known if known else usual)
            if "torch.compile" in asked:
                seconds += AGAIN
                programs.add(peers.graph_of(thing))
        each = statistics.median_low([PROGRAM, *self.programs.values()])  # whatever the very first took
        return seconds + each * len(programs - self.programs.keys())


def _moved(case, asked):
    """The bytes that the peers move at least: every set of buffers is used twice, and each sample is a call and one before it."""
    sets = 1 if peers.in_chain(case) else common.copies(case.bytes, case.device)
    return case.bytes * len(asked) * 2 * (sets + LEAST)


# ---- what was left out -----------------------------------------------------------------------------------------------


def closing(left_out: list, things, minutes: float) -> list[str]:
    """Says which of all things no time was left for, and how to get them. minutes: what all of them need."""
    if not left_out:
        return []
    total, rows = Counter(map(_op, things)), []
    counts = Counter(map(_op, left_out))
    for op, count in counts.items():
        where = dict.fromkeys(_where(thing) for thing in left_out if _op(thing) == op)
        rows.append((op, f"{count} of {total[op]}", ", ".join(where)))
    unseen = [op for op, count in counts.items() if count == total[op]]
    which = f"all of {', '.join(unseen)} among them" if unseen else "the finest detail of what was measured"
    return [
        *common.table(("left out", "cases", "elements, float32 unless told"), rows, left=3),
        f"No time was left for {len(left_out)} of {len(things)} cases, {which}. To get them: --minutes {math.ceil(minutes)}; or "
        f'some at a time, as with -k "{rows[0][0].split()[0]}": python -m benchmarks.report joins the JSON of several runs.',
    ]


def _op(thing):
    return thing if isinstance(thing, str) else thing.op


def _where(thing):
    if isinstance(thing, str):
        return "all of it"
    words = [peers.size_name(thing.elements), "" if thing.dtype == torch.float32 else common.DTYPES[thing.dtype]]
    words += ["backward"] * (thing.passes == peers.BACKWARD) + ["channels_last"] * thing.channels_last + [thing.detail]
    return " ".join(filter(None, [*words, f"{thing.threads} threads" if thing.threads else ""]))
