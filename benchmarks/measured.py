"""What was measured: pytest-benchmark's JSON of `benchmarks`, read, joined, slimmed and told apart into cases.

A case is a group of entries, one for each peer, that were timed in turns. The slim form is what is committed: the environment
once, what the reports tell and no samples, one case a line, sorted. Neither torch nor fastgen is needed to read it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .gpu_check import slug

KINDS = ("throughput", "overhead", "threads", "end_to_end", "import")
OURS = "fastgen"
PEERS = ("limit", OURS, "fastgen triton", "fastgen eager", "eager", "torch.compile", "diffusers", "guided-diffusion")
IN_ORDER = (
    "q_sample",
    "ddpm_step",
    "ddim_step",
    "q_posterior",
    "randn",
    "torch_randn",
    "randn_torch_cuda",
    "to_uint8",
    "q_sample_bytes",
    "diffusion_loss",
    "vlb_terms",
    "step_log_prob",
    "reparameterize",
    "gaussian_kl",
    "bce_with_logits",
    "gan_loss",
)
VERSIONS = ("torch", "triton", "diffusers", "numpy", "fastgen")
SAME = ("device", "cpu", "cores", "cache_bytes", *VERSIONS, "backend", "capability", "commit", "dirty")  # in one environment
STATS = ("min", "q1", "median", "q3")  # those that the reports tell
UNTOLD = ("ratios",)  # what they leave out of `extra_info`
UNREPORTED = ("triton host",)  # kinds of entries that have no peers to be told beside, and are for whoever runs the benchmarks
RATE_DIGITS = 4  # of a rate as it is shown: enough for the quotient of two of them to be what is shown of it
NOISY = 1.5  # times the best sample: a median above that is the machine's more than the code's


class Bad(ValueError):
    """A file that is not what it should be."""


# ---- text of numbers -------------------------------------------------------------------------------------------------


def short(number: float | None, digits: int = 3) -> str:
    """That many significant digits, never fewer than are left of the point: 0.0532, 9.80, 13.1, 1278."""
    if number is None:
        return "–"
    rounded = float(f"{number:.{digits}g}")
    if rounded == 0 or abs(rounded) >= 10 ** (digits - 1):
        return f"{number:.0f}"
    return f"{rounded:.{digits - 1 - math.floor(math.log10(abs(rounded)))}f}"


def size_name(elements: int) -> str:
    """ "16M" for 16·2²⁰, and decimal where it is (within 1%) 1, 2 or 5 times a power of ten: "100M" for 10⁸."""
    lead = elements / 10 ** math.floor(math.log10(elements)) if elements else 0
    decimal = any(abs(lead / round_one - 1) < 0.01 for round_one in (1, 2, 5, 10))
    for power, unit in ((2, "M"), (1, "k")):
        count = elements / (1000 if decimal else 1024) ** power
        if count >= 0.95:
            return f"{count:.0f}{unit}" if count >= 9.5 else f"{count:.2g}{unit}"
    return str(elements)


def table(head: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """Lines of Markdown: the first `left` columns to the left, the rest to the right; nothing without rows."""
    bars = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return [bars[0], "|" + " --- |" * left + " ---: |" * (len(head) - left), *bars[1:], ""] if rows else []


def plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What all peers of a group computed, and what each took. A peer that was not measured gives None."""

    group: str
    entries: dict[str, dict]  # by peer: {"extra_info", "stats", "environment"}

    def __getitem__(self, key: str):
        """What `extra_info` says of the case; it is alike for all peers."""
        return next((entry["extra_info"][key] for entry in self.entries.values() if key in entry["extra_info"]), None)

    @property
    def label(self) -> str:
        """As the call is written."""
        call = self["call"] or self["what"] or self["op"] or self.group
        return call if "backward" not in (self["passes"] or "") or "backward" in call else f"{call}, {self['passes']}"

    @property
    def variant(self) -> str:
        layout = self["layout"]
        return ", ".join(filter(None, (self["dtype"], "" if layout == "contiguous" else layout)))

    @property
    def where(self) -> str:
        """Which of the cases of a label: float32, 16M elements, 2 threads."""
        size = f"{size_name(self['elements'])} elements" if self["elements"] else ""
        threads = plural(self["threads"], "thread") if self["kind"] == "threads" else ""
        return ", ".join(filter(None, (self.variant, size, threads)))

    @property
    def peers(self) -> list[str]:
        """Those beside fastgen's default backend, without the limit."""
        return [peer for peer in PEERS if peer in self.entries and peer not in ("limit", OURS)]

    @property
    def off(self) -> str | None:
        """What runs in a whole program without fastgen."""
        return next(iter(self.peers), None)

    def says(self, peer: str, key: str):
        return self.entries[peer]["extra_info"].get(key) if peer in self.entries else None

    def time(self, peer: str = OURS, which: str = "median") -> float | None:
        """Seconds."""
        return self.entries[peer]["stats"].get(which) if peer in self.entries else None

    def ratio(self, peer: str, which: str = "median") -> float | None:
        """The peer's time ÷ fastgen's in the same round: the median, or a quartile, over the rounds. Of a whole program the median
        is not taken, but fastgen's rate ÷ the peer's, so that the three numbers which a reader sees agree with each other."""
        if self["kind"] == "end_to_end" and which == "median":
            ours, theirs = self.says(OURS, "rate"), self.says(peer, "rate")
            return ours / theirs if ours and theirs else None
        return (self.says(peer, "ratio") or {}).get(which)

    def noisy(self, peer: str) -> bool:
        """Whether the peer's times, or fastgen's beside them, are too scattered to judge by."""
        times = [(self.time(name), self.time(name, "min")) for name in (peer, OURS) if name in self.entries]
        return self.says(peer, "met") == "noisy" or any(low and median > NOISY * low for median, low in times)


@dataclass
class Measured:
    """The results of one device."""

    entries: list[dict]
    left_out: dict[str, str] = field(default_factory=dict)  # {case: why}

    @cached_property
    def cases(self) -> list[Case]:
        groups = {}
        for entry in sorted(self.entries, key=_order):
            groups.setdefault(entry["group"], {})[entry["extra_info"]["peer"]] = entry
        return [Case(*group) for group in groups.items()]

    def of(self, kind: str, **wanted) -> list[Case]:
        """The cases of a kind of which `extra_info` says what is wanted."""
        found = (case for case in self.cases if case["kind"] == kind)
        return [case for case in found if all(case[key] == value for key, value in wanted.items())]

    @property
    def lost(self) -> list[tuple[Case, str]]:
        """(case, peer) wherever the peer is faster; the limit is no peer."""
        return [(case, peer) for case in self.cases for peer in case.peers if (case.ratio(peer) or 1) < 1]

    @cached_property
    def environments(self) -> list[dict]:
        """Those that differ by more than when and how busy: there the last date and the highest load stand for all."""
        found = {}
        for entry in self.entries:
            new = entry["environment"]
            old = found.setdefault(_environment_key(new), new)
            for key in ("load", "datetime"):
                latest = max((e[key] for e in (old, new) if e.get(key) is not None), default=None)
                old = found[_environment_key(new)] = old | {key: latest}
        return sorted(found.values(), key=lambda environment: (environment["datetime"] or "", _environment_key(environment)))

    @property
    def device(self) -> str:
        return device(self.environments[0])

    @property
    def slug(self) -> str:
        return slug(self.device)

    def text(self) -> str:
        """The slim JSON."""
        indices = {_environment_key(environment): i for i, environment in enumerate(self.environments)}
        cases = {}
        for entry in sorted(self.entries, key=_order):
            cases.setdefault((entry["group"], indices[_environment_key(entry["environment"])]), []).append(entry)
        lines = []
        for (group, environment), found in cases.items():
            infos = [entry["extra_info"] for entry in found]
            alike = {key: value for key, value in infos[0].items() if all(key in info and info[key] == value for info in infos)}
            alike.pop("peer", None)  # of a case with only one
            own = [{key: value for key, value in info.items() if key not in alike} for info in infos]
            peers = [{"extra_info": info, "stats": entry["stats"]} for info, entry in zip(own, found, strict=True)]
            lines.append({"group": group, "environment": environment, "extra_info": alike, "peers": peers})
        parts = (("environments", self.environments), ("benchmarks", lines))
        lists = [f' "{name}": [\n' + ",\n".join(f"  {_line(item)}" for item in items) + "\n ]" for name, items in parts]
        left_out = json.dumps(self.left_out, ensure_ascii=False, sort_keys=True, indent=2)
        return "{\n" + ",\n".join([*lists, f' "left_out": {left_out}']) + "\n}\n"


def device(environment: dict) -> str:
    if environment["device"] != "cpu":
        return str(environment["device"])
    return f"{environment['cpu']}, {plural(environment['cores'], 'core')}"


def _environment_key(environment):
    return json.dumps([environment[key] for key in SAME])


def _order(entry):
    info = entry["extra_info"]
    op = info.get("op") or ""
    texts = [str(info.get(key) or "") for key in ("call", "what", "mode", "passes", "output")]
    usual = [(info.get(key) != first, info.get(key) or "") for key, first in (("layout", "contiguous"), ("dtype", "float32"))]
    sizes = (info.get("elements") or 0, info.get("shape") or [], info.get("threads") or 0)
    ops = IN_ORDER.index(op) if op in IN_ORDER else len(IN_ORDER)
    return KINDS.index(info["kind"]), ops, op, texts, usual, sizes, entry["group"], PEERS.index(info["peer"])


def _line(item):
    return json.dumps(item, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _rounded(item):
    """Six digits of every float: what is beyond is noise."""
    if isinstance(item, dict):
        return {key: _rounded(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_rounded(value) for value in item]
    return float(f"{item:.6g}") if isinstance(item, float) else item


# ---- files -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Measured:
    """pytest-benchmark's file, or the slim form of it. `Bad` names the file, what was expected and what came."""
    expected = f"{path}: expected the JSON that `pytest benchmarks --benchmark-json=FILE` writes"
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise Bad(f"{expected}, got {error.strerror}") from None
    except ValueError as error:
        raise Bad(f"{expected}, got no JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("benchmarks"), list):
        came = f"an object with {', '.join(found) or 'nothing'}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise Bad(f'{expected}, an object with a list "benchmarks", got {came}')
    if not found["benchmarks"]:
        raise Bad(f'{expected}, got an empty list "benchmarks"')
    shared, raws = found.get("environments"), found["benchmarks"]
    if shared is not None:
        raws = [
            case | {"extra_info": case["extra_info"] | e["extra_info"], "stats": e["stats"]} for case in raws for e in case["peers"]
        ]
    reported = [raw for raw in raws if raw.get("extra_info", {}).get("kind") not in UNREPORTED]
    entries = [_entry(raw, shared, found.get("datetime"), expected) for raw in reported]
    if not entries:
        raise Bad(f"{expected}; expected a kind that is reported, got {', '.join(UNREPORTED)} alone")
    (name, count), *_ = Counter((entry["group"], entry["extra_info"]["peer"]) for entry in entries).most_common(1)
    if count > 1:
        raise Bad(f"{expected}; {name[0]}: expected one entry for each peer, got {count} of {name[1]}")
    return Measured(entries, found.get("left_out", {}))


def _entry(raw, shared, datetime, expected):
    info, stats = dict(raw.get("extra_info", {})), raw.get("stats", {})
    group = raw.get("group") or raw.get("fullname") or raw.get("name")
    info.setdefault("peer", OURS)
    for key, known in (("kind", KINDS), ("peer", PEERS)):
        if info.get(key) not in known:
            raise Bad(f"{expected}; {group}: extra_info[{key!r}]: expected one of {', '.join(known)}, got {info.get(key)!r}")
    if not isinstance(stats.get("median"), (int, float)):
        raise Bad(f"{expected}; {group}: stats['median']: expected seconds, got {stats.get('median')!r}")
    if shared is None:
        environment = {key: info.pop(key, None) for key in SAME} | {"load": info.pop("load", None), "datetime": datetime}
    else:
        environment = shared[raw["environment"]]
    if not environment["device"]:
        raise Bad(f'{expected}; {group}: extra_info["device"]: expected "cpu" or a GPU\'s name, got {environment["device"]!r}')
    told = {key: value for key, value in info.items() if key not in UNTOLD and value is not None}
    return _rounded(
        {
            "group": group,
            "environment": environment,
            "extra_info": told,
            "stats": {key: stats[key] for key in STATS if key in stats},
        }
    )


def joined(paths: list[Path]) -> Measured:
    """The files of one device as one; a group that several have is the last one's."""
    groups, left_out, first = {}, {}, None
    for path in paths:
        found = read(path)
        for entry in found.entries:
            name = device(entry["environment"])
            first = first or (name, path)
            if name != first[0]:
                raise Bad(f"{path}: expected results of {first[0]}, as in {first[1]}, got results of {name}")
        measured = {entry["group"]: [] for entry in found.entries}
        for entry in found.entries:
            measured[entry["group"]].append(entry)
        groups |= measured
        left_out = {case: why for case, why in left_out.items() if case not in measured} | found.left_out
    return Measured([entry for group in groups.values() for entry in group], left_out)


def commits(measured: Measured) -> list[tuple[dict, int]]:
    """Every environment, and how many cases were measured in it."""
    counted = Counter(_environment_key(next(iter(case.entries.values()))["environment"]) for case in measured.cases)
    return [(environment, counted[_environment_key(environment)]) for environment in measured.environments]
