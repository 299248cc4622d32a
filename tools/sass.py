"""Reads the machine code of a kernel: the listing that `nvdisasm -c` prints, its control flow, and the main path through it.

Knows text only: no compiler, no GPU. `machine_code` makes the listings.

The main path is the one that a thread takes whose vectors are all inside and aligned. Without running the kernel it is known by
what it does: of all ways from the entry to the end it makes the most 128-bit stores, then the most 128-bit loads, and of those
it is the shortest. What only some threads do (a scalar tail, the slow path of a division, a row of NaN) then drops out by itself.
A loop is passed once, the code behind a call is part of the path.

Two kinds of shortcut do as much and must be ruled out. One skips what always runs, because two branches go together in a way
that the graph does not show. Such a path reads registers that nothing on it has written (a thread loads its row where the sample
is another than before, which at first it always is), or loads vectors and reads none of them. The other is real but not the one
meant: where a row needs no noise, a seeded kernel may skip the generator. Hence `least_special`, the special-function operations
that a path must have: Box–Muller takes four for a pair. (Philox's wide multiplications, 20 for four elements, do not tell:
addresses and rows need dozens a thread.)
"""

from __future__ import annotations

import functools
import heapq
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

SECTION = re.compile(r"\s*\.section\s+(\S+?),")
LABEL = re.compile(r"([.$\w]\S*):\s*$")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*$")
TARGET = re.compile(r"`\((\S+)\)")
TABLE = re.compile(r'BRANCH_TARGETS ([^"]+)"')
REGISTER = re.compile(r"\bR(\d+)\b")
PREDICATE = re.compile(r"!?U?P[\dTR]")
CLEARED_BITS = re.compile(r"(R\d+), \1, 0x([0-9a-f]+), RZ, 0xc0, !PT")
NOT_WRITING = ("ST", "STG", "STS", "STL", "RED", "REDG", "BRA", "BRX", "CALL", "RET", "EXIT", "WARPSYNC", "R2UR", "NOP", "BMOV")
ATTEMPTS = 12  # at a path that a thread can take
FAR = 10**6  # more instructions than a kernel has
END = -1  # the successor of a block that ends the thread or, in a subroutine, returns


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate before it, "" if none
    opcode: str
    operands: str

    @property
    def stem(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def conditional(self) -> bool:
        """Whether a branch or an exit may be passed by: a guard, or a predicate before the target (BRA.U !UP0, BRA.DIV UR4)."""
        other = self.operands.partition("`")[0] if self.stem in ("BRA", "EXIT") else ""
        return self.guard not in ("", "PT", "UPT") or other != ""

    @property
    def written(self) -> range:
        """The registers that it writes, by number. Where the width is not known from the name, rather one too many."""
        return _registers(self.opcode, self.operands)[0]

    @property
    def read(self) -> frozenset[int]:
        """The registers that it reads; of a pair or a quadruple the first."""
        return _registers(self.opcode, self.operands)[1]

    @property
    def bits(self) -> int:
        """How wide a memory access is."""
        widths = re.findall(r"\.[US]?(8|16|64|128|256)\b", self.opcode)
        return int(widths[-1]) if widths else 32


@functools.cache
def _registers(opcode: str, operands: str) -> tuple[range, frozenset[int]]:
    """What an instruction writes and reads."""
    found = [int(number) for number in REGISTER.findall(operands)]
    first = next((x for x in operands.split(", ") if not PREDICATE.fullmatch(x)), "")
    if opcode.partition(".")[0] in NOT_WRITING or not REGISTER.match(first):
        return range(0), frozenset(found)
    cleared = CLEARED_BITS.fullmatch(operands) if opcode == "LOP3.LUT" else None
    if cleared and int(cleared[2], 16).bit_count() == 31:
        # One bit of a register is cleared. ptxas keeps predicates as bits of one, and clears one before it has written any; of
        # diffusion_loss's sums no path would be left, were that a use of what was there before.
        return range(found[0], found[0] + 1), frozenset()
    width = 2 if re.search(r"^D|64|WIDE|^CS2R$|^F\w+2\b", opcode) else 1
    width = 4 if ".128" in opcode else 8 if ".256" in opcode else width
    return range(found[0], found[0] + width), frozenset(found[1:])


# ---- classes of instructions -----------------------------------------------------------------------------------------

# The first that matches. Conversions to and from integers and float64 share the special-function units with MUFU.
CLASSES = {
    "special": r"MUFU\b",
    "conversion": r"(I2F|F2I|F2F|I2I|FRND)\b",
    "fp32": r"F(ADD|MUL|FMA|SETP|SEL|SET|MNMX|CHK|SWZADD|ADD2|MUL2|FMA2|MNMX3)\b",
    "fp16": r"(H(ADD2|MUL2|FMA2|SETP2|SET2|MNMX2)|F2FP)\b",
    "fp64": r"D(ADD|MUL|FMA|SETP|MNMX)\b",
    "move": r"(MOV|IMAD\.MOV|CS2R|S2R|S2UR|R2UR|P2R|R2P)\b",
    "flag": r"LDG\b\S*\.64\.STRONG\.GPU\b",  # what another block leaves for the last one
    "load": r"(LDG|LD)\b",
    "store": r"(STG|ST)\b",
    "local": r"(LDL|STL)\b",
    "shared": r"(LDS|STS|LDSM|STSM|LDGSTS|ATOMS)\b",
    "constant": r"(LDC|LDCU|ULDC)\b",
    "atomic": r"(ATOM|ATOMG|RED|REDG)\b",
    "control": r"(VOTE|VOTEU|ELECT|BRA|BRX|BRXU|EXIT|CALL|RET|BSSY|BSYNC|BREAK|BMOV|WARPSYNC|YIELD|NOP|JMP|JMX|KILL|NANOSLEEP)\b",
    "barrier": r"(BAR|DEPBAR|MEMBAR|FENCE|ERRBAR|CCTL|SYNCS|UCGABAR\w*)\b",
    "exchange": r"(SHFL|MATCH|REDUX)\b",
    "uniform": r"U[A-Z]",
    "integer": r"(I2FP|IADD|IADD3|IMAD|IMUL|ISETP|IMNMX|IABS|ISCADD|IDP|VIADD|VIMNMX|VIADDMNMX|VABSDIFF|VIMNMX3|LOP|LOP3|SHF|SHL|"
    r"SHR|LEA|SEL|PRMT|POPC|FLO|BREV|BMSK|SGXT|PLOP3|LEPC)\b",
}
_CLASSES = [(name, re.compile(pattern)) for name, pattern in CLASSES.items()]
_known: dict[str, str] = {}
WIDE = re.compile(r"U?IMAD\.(WIDE|HI)\b")


def class_of(opcode: str) -> str:
    if opcode not in _known:
        _known[opcode] = next((name for name, pattern in _CLASSES if pattern.match(opcode)), "other")
    return _known[opcode]


def counts(instructions) -> dict[str, int]:
    """How many instructions of each class, the wide multiplications, and the memory accesses by width: {"load 128": 2, …}."""
    found = Counter(class_of(i.opcode) for i in instructions)
    found["wide multiplication"] = sum(bool(WIDE.match(i.opcode)) for i in instructions)
    found.update(f"{class_of(i.opcode)} {i.bits}" for i in instructions if class_of(i.opcode) in ("load", "store"))
    return {name: count for name, count in sorted(found.items()) if count}


def multiplied_meanwhile(instructions) -> int:
    """The wide multiplications from the last 128-bit load that comes before any such vector is read to the first instruction that
    reads one: in a seeded kernel mostly Philox's, 20 for four elements."""
    loaded, count = set(), 0
    for i in instructions:
        if not loaded.isdisjoint(i.read):
            break
        loaded.difference_update(i.written)
        count += bool(WIDE.match(i.opcode))
        if class_of(i.opcode) == "load" and i.bits >= 128:
            loaded.update(i.written)
            count = 0
    return count


# ---- control flow ----------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """Instructions that run one after another; a call ends one too."""

    instructions: list[Instruction]
    successors: list[int]
    callee: int | None = None  # the first block of the subroutine called before the successors
    may_call: bool = False  # the call depends on a predicate


@dataclass
class Function:
    """A kernel and the subroutines in its section; the entry is block 0."""

    name: str
    blocks: list[Block] = field(default_factory=list)

    def reachable(self, entry: int = 0) -> list[int]:
        """Blocks that can run, subroutines included: padding and what no branch leads to is left out."""
        seen, stack = {entry}, [entry]
        while stack:
            block = self.blocks[stack.pop()]
            for after in (*block.successors, block.callee):
                if after is not None and after != END and after not in seen:
                    seen.add(after)
                    stack.append(after)
        return sorted(seen)

    @property
    def instructions(self) -> list[Instruction]:
        return [i for block in self.reachable() for i in self.blocks[block].instructions]


def parse(listing: str) -> dict[str, Function]:
    """The functions of a listing by their symbols."""
    functions, name, code, labels = {}, None, [], {}

    def finish():
        if name is not None and code:
            functions[name] = Function(name, _blocks(name, code, labels))

    for line in listing.splitlines():
        if match := SECTION.match(line):
            finish()
            section = match[1].strip('"')
            name, code, labels = section.removeprefix(".text.") if section.startswith(".text.") else None, [], {}
        elif match := LABEL.match(line):
            labels[match[1]] = len(code)
        elif name is not None and (match := INSTRUCTION.match(line)):
            code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    finish()
    return functions


def _blocks(name: str, code: list[Instruction], labels: dict[str, int]) -> list[Block]:
    ends = ("BRA", "BRX", "BRXU", "EXIT", "CALL", "RET", "JMP", "JMX", "KILL")
    starts = {0, *labels.values(), *(i + 1 for i, x in enumerate(code) if x.stem in ends)}
    starts = sorted(start for start in starts if start < len(code))
    number = {start: index for index, start in enumerate(starts)}

    def target(label: str) -> int:
        if label not in labels:
            raise ValueError(f"{name}: no label {label}")
        return number[labels[label]]

    blocks = []
    for index, start in enumerate(starts):
        stop = starts[index + 1] if index + 1 < len(starts) else len(code)
        last, successors, callee = code[stop - 1], [], None
        if last.stem in ("EXIT", "RET", "KILL"):
            successors = [END]
        elif last.stem in ("BRX", "BRXU"):
            table = TABLE.search(last.operands)
            if table is None:
                raise ValueError(f"{name}: {last.opcode} at {last.address:#x} has no table of targets")
            successors = [target(label) for label in table[1].split(",")]
        elif last.stem == "BRA":
            successors = [target(TARGET.search(last.operands)[1])]
        elif last.stem == "CALL":
            label = TARGET.search(last.operands)
            # a call out of the section (printf, assert) counts as one instruction
            callee = target(label[1]) if label and label[1] in labels else None
        elif last.stem in ("JMP", "JMX"):
            raise ValueError(f"{name}: {last.opcode} at {last.address:#x} is not understood")
        # after a branch that may be passed by, after a call, and where only a label ended the block
        if (last.stem not in ends or last.stem == "CALL" or last.conditional) and stop < len(code):
            successors.append(index + 1)
        blocks.append(Block(code[start:stop], list(dict.fromkeys(successors)), callee, last.conditional))
    for block in blocks:
        # sm_80 leaves a loop by a call that never comes back: a branch
        if block.callee is not None and not any(blocks[k].instructions[-1].stem == "RET" for k in _routine(blocks, block.callee)):
            block.successors = [block.callee, *(block.successors if block.may_call else ())]
            block.callee = None
    return blocks


def _routine(blocks: list[Block], entry: int) -> list[int]:
    """The blocks from `entry` to the end, without those of subroutines."""
    seen, stack = {entry}, [entry]
    while stack:
        new = [after for after in blocks[stack.pop()].successors if after != END and after not in seen]
        seen.update(new)
        stack += new
    return sorted(seen)


# ---- main path -------------------------------------------------------------------------------------------------------


@dataclass
class Path:
    instructions: list[Instruction]
    stores: int  # 128-bit accesses
    loads: int
    body: list[Instruction]  # those of the path in the largest innermost loop that makes such accesses, none if there is none
    other_loops: int  # loops on the path that make none: they count once, however often they run
    impossible: list[range]  # registers read but not written before, or loaded but not read: if any, no thread takes this path

    @property
    def loop(self) -> int:
        return len(self.body)

    @property
    def counts(self) -> dict[str, int]:
        return counts(self.instructions)


class _Key(NamedTuple):
    """What ways on from a block are told apart by."""

    stores: int = 0  # 128-bit
    loads: int = 0
    special: int = 0
    live: frozenset[range] = frozenset()  # watched registers that it reads before it writes them

    def beats(self, other: _Key) -> bool:
        return self.stores >= other.stores and self.loads >= other.loads and self.special >= other.special


class _Step(NamedTuple):
    """The cheapest way on from a block with some key."""

    cost: int
    after: int
    key: _Key | None  # at the block after; None: leave by the shortest way
    callee_key: _Key | None


class _Facts(NamedTuple):
    """What the search needs to know of a block."""

    stores: int
    loads: int
    special: int
    cost: int
    written: set[int]
    overwritten: set[int]  # of these, whatever the predicates are
    exposed: set[int]  # registers read before the block writes them
    loaded: set[range]  # by 128-bit loads, and not read within the block


def _facts(instructions: list[Instruction]) -> _Facts:
    written, overwritten, exposed, loaded, vectors, special = set(), set(), set(), set(), Counter(), 0
    for instruction in instructions:
        exposed |= instruction.read - written
        written.update(instruction.written)
        if instruction.guard in ("", "PT"):
            overwritten.update(instruction.written)
        loaded = {registers for registers in loaded if instruction.read.isdisjoint(registers)}
        kind = class_of(instruction.opcode)
        vectors[kind] += instruction.bits // 128
        special += kind == "special"
        if kind == "load" and instruction.bits >= 128:
            loaded.add(instruction.written)
    return _Facts(vectors["store"], vectors["load"], special, len(instructions), written, overwritten, exposed, loaded)


class _Search:
    """Dynamic programming from the ends of a function back to its entry.

    A table has the ways on from a block: {key: cheapest step}, without those that another beats in everything. Edges that lead
    back (a loop's) are cut: a path that takes one has passed the loop, and from the loop's head leaves the kernel by the shortest
    way that makes no further vectors.
    """

    def __init__(self, function: Function, facts: list[_Facts], least_special, watched: frozenset[range], hasty: bool):
        self.blocks, self.facts, self.least_special, self.watched = function.blocks, facts, least_special, watched
        # more are told apart from fewer only as far as it matters
        self.most_special = least_special(*(sum(facts[block][k] for block in function.reachable()) for k in range(2)))
        self.stores = any(facts[block].stores for block in function.reachable())
        self.tables: dict[int, dict[_Key, _Step]] = {}
        self.entered: set[int] = set()
        self.leaving: dict[int, tuple[int, int]] = {}  # block: (cost, block after it)
        self.back: set[tuple[int, int]] = set()
        # what a path has at most before each block, and must have in all; hasty searches drop what falls short of it
        self.before: dict[int, list[int]] = {}
        self.least = (0, 0, 0)
        if hasty:
            self._bound()
        self._enter(0)

    def vectors(self, block: int) -> int:
        """128-bit stores, or in a kernel that has none, loads."""
        return self.facts[block].stores if self.stores else self.facts[block].loads

    def _enter(self, entry: int):
        """Fills the tables of the blocks from `entry` to the end of its routine, callees first."""
        self.entered.add(entry)
        order = self._order(entry)
        for callee in (self.blocks[block].callee for block in order):
            if callee is not None and callee not in self.entered:
                self._enter(callee)
            elif callee is not None and callee not in self.tables:
                raise ValueError("a recursive call is not understood")
        self._leave(order)
        for block in order:
            self.tables[block] = self._table(block)

    def _bound(self):
        """The most 128-bit stores that a path makes, then the most loads, and the special functions that go with them."""
        order = self._order(0)
        own = {block: self.facts[block][:3] for block in order}
        for block in order:
            if (callee := self.blocks[block].callee) is not None:
                routine = [self.facts[k][:3] for k in _routine(self.blocks, callee)]
                own[block] = tuple(map(sum, zip(own[block], *routine, strict=True)))
        best: dict[int, tuple[int, int]] = {}
        for block in order:
            onward = [best[after] for after in self.blocks[block].successors if after in best] or [(0, 0)]
            stores, loads = max(onward)
            best[block] = own[block][0] + stores, own[block][1] + loads
        self.before = {block: [0, 0, 0] for block in order}
        for block in reversed(order):
            for after in self.blocks[block].successors:
                if after != END and (block, after) not in self.back:
                    sums = (a + b for a, b in zip(self.before[block], own[block], strict=True))
                    self.before[after] = list(map(max, self.before[after], sums))
        self.least = (*best[0], self.least_special(*best[0]))

    def _order(self, entry: int) -> list[int]:
        """Depth first, successors before their predecessors; notes the edges that lead back."""
        order, active, done, stack = [], {entry}, set(), [(entry, iter(self.blocks[entry].successors))]
        while stack:
            block, successors = stack[-1]
            for after in successors:
                if after in active:
                    self.back.add((block, after))
                elif after != END and after not in done:
                    active.add(after)
                    stack.append((after, iter(self.blocks[after].successors)))
                    break
            else:
                stack.pop()
                active.remove(block)
                done.add(block)
                order.append(block)
        return order

    def _shortest_call(self, block: int) -> tuple[int, _Key] | None:
        """The subroutine that must be called at the end of a block, and the key of its shortest way."""
        callee = self.blocks[block].callee
        if callee is None or self.blocks[block].may_call:
            return None
        return callee, min(self.tables[callee], key=lambda key: self.tables[callee][key].cost)

    def _leave(self, order: list[int]):
        """The shortest way from each block to the end that makes no vectors, or the fewest (Dijkstra, from the end)."""
        before: dict[int, list[int]] = {}
        for block in order:
            for after in self.blocks[block].successors:
                before.setdefault(after, []).append(block)
        queue = [(0, END)]
        while queue:
            cost, at = heapq.heappop(queue)
            for block in before.get(at, ()):
                call = self._shortest_call(block)
                total = cost + self.facts[block].cost + (self.tables[call[0]][call[1]].cost if call else 0)
                total += FAR * self.vectors(block)
                if block not in self.leaving or total < self.leaving[block][0]:
                    self.leaving[block] = total, at
                    heapq.heappush(queue, (total, block))

    def _table(self, index: int) -> dict[_Key, _Step]:
        block, own, table = self.blocks[index], self.facts[index], {}
        exposed = {registers for registers in self.watched if not own.exposed.isdisjoint(registers)}
        needed = own.loaded & self.watched
        before = self.before.get(index, self.least)
        # (key of the callee, its key's numbers, its cost) of each way through the block
        calls = [(None, _Key(), 0)]
        written = own.written
        if block.callee is not None:
            calls = calls if block.may_call else []
            calls += [(key, key, step.cost) for key, step in self.tables[block.callee].items()]
            written = written | self._written_by(block.callee)
        # a vector that a predicate may leave as it was loaded is still to be read; a register so written counts as written
        gone = {r for r in self.watched if (written if len(r) == 1 else own.overwritten).issuperset(r)}
        for after in block.successors:
            if after == END:
                ways = [(None, _Key(), 0)]
            elif (index, after) in self.back:
                ways = [(None, _Key(), self.leaving[after][0])] if after in self.leaving else []
            else:
                ways = [(key, key, step.cost) for key, step in self.tables[after].items()]
            for next_key, onward, cost in ways:
                if not needed <= onward.live:
                    continue
                for callee_key, called, callee_cost in calls:
                    key = _Key(
                        own.stores + onward.stores + called.stores,
                        own.loads + onward.loads + called.loads,
                        min(own.special + onward.special + called.special, self.most_special),
                        (onward.live - gone) | exposed,
                    )
                    if any(a + b < c for a, b, c in zip(before, key, self.least, strict=False)):
                        continue
                    total = own.cost + cost + callee_cost
                    if key not in table or total < table[key].cost:
                        table[key] = _Step(total, after, next_key, callee_key)
        kept: dict[frozenset, list[_Key]] = {}
        for key in sorted(table, key=lambda key: table[key].cost):
            rivals = kept.setdefault(key.live, [])
            if not any(rival.beats(key) for rival in rivals):
                rivals.append(key)
        return {key: table[key] for keys in kept.values() for key in keys}

    def _written_by(self, callee: int) -> set[int]:
        blocks, seen, stack = set(), {callee}, [callee]
        while stack:
            block = self.blocks[stack.pop()]
            blocks |= {register for i in block.instructions for register in i.written}
            for after in (*block.successors, block.callee):
                if after not in (None, END) and after not in seen:
                    seen.add(after)
                    stack.append(after)
        return blocks

    def walk(self, block: int, key: _Key | None) -> list[int]:
        """The blocks of a path, those of subroutines included. key None: on the way out of a loop."""
        path = []
        while block != END:
            path.append(block)
            if key is None:
                if call := self._shortest_call(block):
                    path += self.walk(*call)
                block = self.leaving[block][1]
            else:
                step = self.tables[block][key]
                if step.callee_key is not None:
                    path += self.walk(self.blocks[block].callee, step.callee_key)
                block, key = step.after, step.key
        return path

    def best(self) -> list[int] | None:
        """The blocks of the main path; None where what is watched rules out every path."""
        # a whole vector that is live here is one whose registers other numbers use one by one
        steps = {key: step for key, step in self.tables[0].items() if all(len(registers) > 1 for registers in key.live)}
        if not steps:
            return None
        most = max(key[:2] for key in steps)
        keys = [key for key in steps if key[:2] == most]
        enough = [key for key in keys if key.special >= self.least_special(*most)]
        # where none has enough, the one that has the most
        key = min(enough, key=lambda k: steps[k].cost) if enough else max(keys, key=lambda k: k.special)
        return self.walk(0, key)

    def loop(self, tail: int, head: int) -> set[int]:
        """The blocks of the loop that the edge from `tail` back to `head` closes."""
        before: dict[int, list[int]] = {}
        for index, block in enumerate(self.blocks):
            for after in block.successors:
                before.setdefault(after, []).append(index)
        body, stack = {head, tail}, [tail] if tail != head else []
        while stack:
            for block in before.get(stack.pop(), ()):
                if block not in body:
                    body.add(block)
                    stack.append(block)
        return body


def _impossible(instructions: list[Instruction]) -> list[range]:
    facts = _facts(instructions)
    return sorted([range(register, register + 1) for register in facts.exposed] + list(facts.loaded), key=lambda r: r.start)


def _attempt(function: Function, facts: list[_Facts], least_special, hasty: bool):
    """The search that found a path and the path's blocks; None where a hasty search finds none that a thread can take."""
    watched, result = frozenset(), None
    # all registers at once would tell apart more ways than there are blocks; those of the last path's mistakes are few
    for _ in range(ATTEMPTS):
        search = _Search(function, facts, least_special, watched, hasty)
        blocks = search.best()
        # what is watched must not rule out the vectors: better a path that is marked than the way out at the entry
        if blocks is None or result and sum(map(search.vectors, blocks)) < sum(map(search.vectors, result[1])):
            break
        result = search, blocks
        wrong = _impossible([i for block in blocks for i in function.blocks[block].instructions])
        if not wrong:
            return result
        if watched.issuperset(wrong):
            break
        watched |= frozenset(wrong)
    return None if hasty else result


def main_path(function: Function, least_special=lambda stores, loads: 0) -> Path | None:
    """The main path, or None where the function makes no 128-bit access.

    least_special(stores, loads): the special-function operations that a path with so many 128-bit accesses must have.
    """
    facts = [_facts(block.instructions) for block in function.blocks]
    if not any(facts[block].stores or facts[block].loads for block in function.reachable()):
        return None
    search, blocks = _attempt(function, facts, least_special, hasty=True) or _attempt(function, facts, least_special, hasty=False)
    loops, others = [], 0
    for tail, head in search.back:
        passed = search.loop(tail, head).intersection(blocks)
        if any(search.vectors(block) for block in passed):
            loops.append(passed)
        elif tail in passed or len(passed) > 1:  # more than its test
            others += 1
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    bodies = [[i for block in sorted(loop) for i in function.blocks[block].instructions] for loop in innermost]
    body = max(bodies, key=len, default=[])
    instructions = [i for block in blocks for i in function.blocks[block].instructions]
    stores, loads = (sum(facts[block][k] for block in blocks) for k in range(2))
    return Path(instructions, stores, loads, body, others, _impossible(instructions))
