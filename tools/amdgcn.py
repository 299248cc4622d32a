"""Reads the assembly of a kernel that Triton compiled for an AMD GPU, as `sass` reads NVIDIA's: text only.

Instructions are counted under the same names ("load 128", "special", "local", …), so that one report has both.
"""

from __future__ import annotations

import re
from collections import Counter

# The first that matches.
CLASSES = {
    "special": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)(_iflag|_legacy)?_f(16|32|64)",
    "conversion": r"v_cvt_",
    "load": r"(global|buffer|flat)_load_",
    "store": r"(global|buffer|flat)_store_",
    "atomic": r"(global|buffer|flat)_atomic_",
    "local": r"scratch_",
    "shared": r"ds_",
    "constant": r"s_(buffer_)?load_",
    "control": r"s_(c?branch|endpgm|nop|waitcnt|setpc|swappc|getpc)",
    "barrier": r"s_barrier",
    "exchange": r"v_(permlane|readlane|writelane)|\w+_dpp\b",
    "vector": r"v_",
    "scalar": r"s_",
}
BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def body(text: str, kernel: str) -> list[str]:
    """The kernel's instructions and labels, a line each, without comments and directives."""
    inside = re.search(rf"^{re.escape(kernel)}:(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)[1]
    found = (line.partition(";")[0].strip() for line in inside.splitlines())
    return [line for line in found if re.match(r"[a-z]\w+(\s|$)|\.LBB\w+:", line)]


def instructions(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith(".")]


def loop(lines: list[str]) -> list[str]:
    """The instructions of the largest loop; empty where there is none. A branch back need not be one: what hardly ever runs may
    stand behind the end."""
    labels = {line.rstrip(":"): k for k, line in enumerate(lines) if line.startswith(".")}
    after, before = [[] for _ in lines], [[] for _ in lines]
    for k, line in enumerate(lines):
        branch = re.match(r"s_(c?)branch\w*\s+(\S+)", line)
        following = [labels[branch[2]]] if branch else []
        if k + 1 < len(lines) and not line.startswith("s_endpgm") and not (branch and not branch[1]):
            following.append(k + 1)
        after[k] = following
        for other in following:
            before[other].append(k)

    def reached(start, edges):
        seen, stack = set(), [start]
        while stack:
            new = [k for k in edges[stack.pop()] if k not in seen]
            seen.update(new)
            stack += new
        return seen

    heads = {other for k in range(len(lines)) for other in after[k] if other <= k}
    loops = [reached(head, after) & reached(head, before) for head in heads]
    largest = max(loops, key=len, default=())
    return instructions([lines[k] for k in sorted(largest)])


def bits(instruction: str) -> int:
    """How wide a memory access is."""
    return BITS[re.match(r"\w+?_(?:load|store)_[us]?(byte|short|dwordx?\d?)", instruction)[1]]


def counts(code: list[str]) -> dict[str, int]:
    found = Counter()
    for line in code:
        name = next((name for name, pattern in CLASSES.items() if re.match(pattern, line)), "other")
        found[name] += 1
        if name in ("load", "store"):
            found[f"{name} {bits(line)}"] += 1
    return dict(sorted(found.items()))


def metadata(text: str) -> dict[str, int]:
    """The kernel's numbers in the metadata at the end: vgpr_count, vgpr_spill_count, private_segment_fixed_size, …"""
    note = text.rpartition("\t.amdgpu_metadata\n")[2]
    return {name: int(number) for name, number in re.findall(r"^ {4}\.(\w+): +(\d+)$", note, re.MULTILINE)}
