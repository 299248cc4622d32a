"""Tables and plots of what pytest-benchmark measured:

    python -m benchmarks.report FILE… [--out benchmarks/results]    one device's, into OUT/<device>/
    python -m benchmarks.report --pages [DIR]    all that is made from OUT/*/benchmarks.json, and the figures in DIR's pages
    python -m benchmarks.report --check [DIR]    exits with 1 and a diff where that would change a file

Several files are joined; a case that more than one has is the last one's, so `OUT/<device>/benchmarks.json new.json` renews some.
A folder holds benchmarks.json (the numbers, slim), report.md, and the plots. The pages are docs/performance.md, which has all the
figures that prose quotes, and README.md, which has one sentence of them; DIR is the project's folder unless told.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import os
import sys
from pathlib import Path

from . import figures, plots
from .measured import NOISY, OURS, PEERS, RATE_DIGITS, VERSIONS, Bad, Case, Measured, commits, joined, plural, short, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
SLIM, REPORT, CODE, ROBOT = "benchmarks.json", "report.md", "machine_code.json", "robot_policy.txt"
PAGE, README = "docs/performance.md", "README.md"
BEGIN, END = "<!-- figures: written by `make figures` from benchmarks/results -->", "<!-- /figures -->"
MOST_DIFFERENT = 60  # lines that --check shows of one file


# ---- tables ----------------------------------------------------------------------------------------------------------


def spread(case: Case, peer: str, scale: float) -> str:
    """A peer's time: the median, and the quartiles."""
    if case.time(peer) is None:
        return "not measured"
    median, low, high = (short(scale * (case.time(peer, which) or case.time(peer))) for which in ("median", "q1", "q3"))
    return f"{median} ({low}–{high})"


def ratio(case: Case, peer: str) -> str:
    """How many times fastgen's time the peer took; bold where the peer wins."""
    median, low, high = (case.ratio(peer, which) for which in ("median", "q1", "q3"))
    if median is None:
        return "–"
    said = short(median) + (f" ({short(low)}–{short(high)})" if low and high else "") + (" noisy" if case.noisy(peer) else "")
    return f"**{said}**" if median < 1 and peer != "limit" else said


def columns(cases: list[Case]) -> list[str]:
    return [peer for peer in PEERS if any(peer in case.peers for case in cases)]


def share(case: Case) -> str:
    found = case.says(OURS, "share of limit")
    return "–" if found is None else f"{short(found, 2)} of {case['limit']}" + (" noisy" if case.noisy("limit") else "")


def shape(case: Case) -> str:
    return "×".join(map(str, case["shape"] or ()))


def throughput(cases):
    peers = columns(cases)
    head = ["call", "dtype", "layout", "shape", "elements", "ns per element", "GB/s", "share of the limit", *peers]
    rows = []
    for case in cases:
        first = [f"`{case.label}`", case["dtype"], case["layout"], shape(case), f"{case['elements']:,}"]
        numbers = [spread(case, OURS, 1e9 / case["elements"]), short(case.says(OURS, "GB/s")), share(case)]
        rows.append(first + numbers + [ratio(case, peer) for peer in peers])
    return table(head, rows, left=4)


def overhead(cases):
    peers = columns(cases)
    rows = []
    for case in cases:
        limit = case.ratio("limit")
        times = f"{short(1 / limit)} × {case['limit']}" + (" noisy" if case.noisy("limit") else "") if limit else "–"
        first = [f"`{case.label}`", case["dtype"], shape(case), spread(case, OURS, 1e6), spread(case, "limit", 1e6), times]
        rows.append(first + [ratio(case, peer) for peer in peers])
    return table(["call", "dtype", "shape", "µs", "limit, µs", "of the limit", *peers], rows, left=3)


def threads(cases):
    """The speed-up is over the fewest threads."""
    counts = sorted({case["threads"] for case in cases})
    rows = []
    for series in plots.by_threads(cases):
        by_count = {case["threads"]: case for case in series}
        for peer in plots.peers_of(series):
            cells, first = [], None
            for count in counts:
                time = by_count[count].time(peer) if count in by_count else None
                first = first or time
                cells.append(f"{short(1e9 * time / series[0]['elements'])} ({short(first / time)} ×)" if time else "–")
            rows.append([f"`{series[0].label}`", series[0].variant, f"{series[0]['elements']:,}", peer, *cells])
    return table(["call", "dtype", "elements", "", *(plural(count, "thread") for count in counts)], rows, left=4)


def end_to_end(cases):
    head = ["what", "unit", "with fastgen", "without", "", "times as fast", "peak memory, MB", "without"]
    rows = []
    for case in cases:
        off, rates, peaks = case.off, [], []
        for peer in (OURS, off):
            rates.append(short(case.says(peer, "rate"), RATE_DIGITS) if peer in case.entries else "not measured")
            peak = case.says(peer, "peak_bytes")
            peaks.append("–" if peak is None else short(peak / 1e6))
        rows.append([case["what"] or case.label, case["unit"] or "", *rates, off or "–", ratio(case, off), *peaks])
    timed = sorted({f"{plural(case['steps timed'], 'step')} ({case['what']})" for case in cases if case["steps timed"]})
    said = ["A sample of the time is " + ", ".join(timed) + "; a sampling step costs the same in a chain of any length.", ""]
    said += [
        "A rate is all steps ÷ all time, “times as fast” the quotient of the two rates; in parentheses the quartiles of rounds.",
        "",
    ]
    return table(head, rows, left=2) + (said if timed else [])


def imported(cases):
    for case in cases:
        ours, torch = case["fastgen s"], case["torch s"]
        if ours is None or torch is None:
            yield f"A process that imports it: {spread(case, OURS, 1e3)} ms."
        else:
            yield f"`import torch` {short(1e3 * torch)} ms, then `import fastgen` {short(1e3 * ours)} ms."
        yield ""


# ---- what is to be said plainly --------------------------------------------------------------------------------------


def wins(measured: Measured) -> list[str]:
    rows = []
    for case, peer in measured.lost:
        scale = 1e6 if (case.time() or 0) < 1e-2 else 1e3
        unit = "µs" if scale == 1e6 else "ms"
        seconds = [1 / case.says(name, "rate") if case.says(name, "rate") else case.time(name) for name in (OURS, peer)]
        times = [f"{short(scale * each)} {unit}" if each else "–" for each in seconds]
        rows.append([f"`{case.label}`", case["kind"], case.where, peer, *times, ratio(case, peer)])
    return table(["call", "kind", "case", "peer", "fastgen's time", "the peer's", "peer ÷ fastgen"], rows, left=4) or ["None.", ""]


def targets(measured: Measured) -> list[str]:
    judged = [(case, peer) for case in measured.cases for peer in case.entries if case.says(peer, "target") is not None]
    met = sum(case.says(peer, "met") == "yes" for case, peer in judged)
    rows = []
    for case, peer in judged:
        if (verdict := case.says(peer, "met")) != "yes":
            wanted = f"≥ {case.says(peer, 'target'):g}"
            rows.append([f"`{case.label}`", case["kind"], case.where, peer, ratio(case, peer), wanted, verdict or "not judged"])
    said = f"{met} of {plural(len(judged), 'target')} met." if judged else "No target is set."
    return [said, "", *table(["call", "kind", "case", "peer", "peer ÷ fastgen", "wanted", "met"], rows, left=4)]


def left_out(measured: Measured) -> list[str]:
    """What the benchmarks say they left out, and every peer that other sizes of the same call have and this one lacks."""
    lines, calls = [f"- {case}: {why}" for case, why in sorted(measured.left_out.items())], {}
    for _, found in itertools.groupby(measured.cases, lambda case: (case["kind"], case.label)):
        series = list(found)
        for peer in plots.peers_of(series):
            for case in series:
                if peer not in case.entries:
                    calls.setdefault((case["kind"], peer, case.where), []).append(f"`{series[0].label}`")
    lines += [f"- {kind}, {peer}, at {where}: {', '.join(names)}" for (kind, peer, where), names in sorted(calls.items())]
    return [*lines, ""] if lines else ["Nothing.", ""]


def header(measured: Measured) -> list[str]:
    def said(key):
        return ", ".join(dict.fromkeys(str(e[key]) for e in measured.environments if e.get(key) is not None))

    counts = sorted({case["threads"] for case in measured.cases if case["threads"]})
    cache = ", ".join(dict.fromkeys(f"{e['cache_bytes'] / 2**20:g} MiB" for e in measured.environments if e["cache_bytes"]))
    rows = [
        ["device", f"{measured.device}; last-level cache {cache or 'unknown'}"],
        ["host", f"{said('cpu')}, {said('cores')} cores; threads: {', '.join(map(str, counts)) or 'unknown'}"],
        ["versions", ", ".join(f"{name} {said(name) or 'none'}" for name in VERSIONS)],
        ["backend", ", ".join(filter(None, (said("backend"), said("capability"))))],
    ]
    for e, count in commits(measured):
        changes = " with changes in the tree" if e["dirty"] else ""
        load = "unknown" if e["load"] is None else f"{e['load']:.1f}" + (": busy, read the ratios" if e["load"] > 0.5 else "")
        day = (e["datetime"] or "on an unknown day")[:10]
        rows.append(["measured", f"{plural(count, 'case')}, {day}, commit {e['commit'] or 'none'}{changes}, load {load}"])
    return table(["", ""], rows, left=2)


# ---- machine code ----------------------------------------------------------------------------------------------------


def machine_code(found: dict | None) -> list[str]:
    """Of every kernel whose main path is known: registers of a thread; per element, instructions and special functions."""
    if found is None:
        return ["Not made: `make machine-code`.", ""]
    archs, cells, labels = [], {}, {}
    for kernel in found["kernels"]:
        labels.setdefault((kernel["op"], kernel["label"]), None)
        if kernel["instructions"] is not None:
            archs.append(kernel["arch"])
            about = "" if kernel["exact"] else "~"
            spilt = f", spills {kernel['spilled']}" if kernel["spilled"] else ""
            said = f"{kernel['registers']} / {about}{short(kernel['instructions'])} / {about}{kernel['special']:.1f}{spilt}"
            cells[kernel["op"], kernel["label"], kernel["arch"]] = said
    archs = sorted(set(archs), key=lambda arch: (not arch.isdigit(), len(arch), arch))
    known = [name for name in labels if any((*name, arch) in cells for arch in archs)]
    rows = [[op, f"`{label}`", *(cells.get((op, label, arch), "") for arch in archs)] for op, label in known]
    e = found["environment"]
    changes = " with changes in the tree" if e.get("dirty") else ""
    return [
        f"Made without a GPU by `make machine-code`: nvcc {e['nvcc']}, Triton {e['triton'] or 'none'}, "
        f"commit {e['commit'] or 'none'}{changes}.",
        "Each cell: registers of a thread / instructions per element / special-function operations per element, of the main path;",
        f"~: not exact. {plural(len(labels) - len(rows), 'kernel')} without a main path of vectors, and all else that was counted:",
        "[machine_code.txt](../machine_code.txt).",
        "",
        *table(["op", "kernel", *(f"sm_{arch}" if arch.isdigit() else arch for arch in archs)], rows, left=2),
    ]


# ---- files -----------------------------------------------------------------------------------------------------------


def markdown(measured: Measured, pictures, code: dict | None) -> str:
    parts = (
        ("Throughput", ("time_per_element.svg", "ratios.svg"), throughput(measured.of("throughput"))),
        ("Calls on few elements", ("overhead.svg",), overhead(measured.of("overhead"))),
        ("Threads", ("threads.svg",), threads(measured.of("threads"))),
        ("End to end", ("end_to_end.svg",), end_to_end(measured.of("end_to_end"))),
        ("Import", (), list(imported(measured.of("import")))),
        ("Where a peer wins", (), wins(measured)),
        ("Targets", (), targets(measured)),
        ("Left out", (), left_out(measured)),
        ("Machine code", (), machine_code(code)),
    )
    lines = [
        f"# {measured.device}",
        "",
        "Written by `python -m benchmarks.report`; the numbers are in [benchmarks.json](benchmarks.json).",
        "",
        *header(measured),
        "Times are medians, with quartiles in parentheses. The column of a peer is its time ÷ fastgen's in the same round: above 1",
        "fastgen is faster, below 1 (bold) the peer is. The limit moves as many bytes as the op must move, or is one small call of",
        "torch's; a share is the limit's time ÷ fastgen's. “noisy”: the median of either is more than "
        f"{NOISY:g} times its best sample.",
        "",
    ]
    for title, names, body in parts:
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"![{plots.PLOTS[name][1]}]({name})", ""] if name in pictures else []
        lines += body or ["Not measured.", ""]
    return "\n".join(lines).rstrip() + "\n"


def load(path: Path) -> dict | None:
    """What `tools.machine_code --json` has written, with a dictionary for each kernel on each GPU; None where there is no file."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    kernels = [
        {"op": op, "label": label, "arch": arch, **dict(zip(found["columns"], row, strict=True))}
        for op, label, of_each in found["kernels"]
        for arch, row in of_each.items()
    ]
    return found | {"kernels": kernels}


def folder(measured: Measured, code: dict | None) -> dict[str, str | None]:
    """{name: text} of the files of a device's folder; None for a plot of which nothing was measured."""
    pictures = plots.plots(measured)
    texts = {SLIM: measured.text(), REPORT: markdown(measured, pictures, code)}
    return texts | {name: pictures.get(name) for name in plots.PLOTS}


def replaced(path: Path, block: str) -> str:
    """A page's text with this between its marks."""
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after:
        came = "none" if not begin else "no end" if not end else "two"
        raise Bad(f"{path}: expected one block from {BEGIN} to {END}, got {came}")
    return f"{before}{begin}\n\n{block}\n{end}{after}"


def pages(project: Path, results: Path, devices: list[Measured], code: dict | None) -> dict[Path, str]:
    """{file: text} of the pages that quote figures, as the results have them."""
    page, readme = project / PAGE, project / README
    robots = {found.slug: (results / found.slug / ROBOT) for found in devices}
    robots = {name: file.read_text() for name, file in robots.items() if file.exists()}
    linked = Path(os.path.relpath(results, page.parent)).as_posix()
    return {
        page: replaced(page, figures.block(devices, linked, code, robots)),
        readme: replaced(readme, figures.headline(devices, PAGE)),
    }


def everything(results: Path, project: Path) -> dict[Path, str | None]:
    """{file: text} of all that is made from the results of all devices."""
    made, devices, code = {}, [], load(results / CODE)
    for file in sorted(results.glob(f"*/{SLIM}")):
        found = joined([file])
        if file.parent.name != found.slug:
            raise Bad(f"{file}: expected the results of {file.parent.name}, got those of {found.device} ({found.slug})")
        devices.append(found)
        made |= {file.parent / name: text for name, text in folder(found, code).items()}
    if not devices:
        raise Bad(f"{results}: expected <device>/{SLIM}, which `python -m benchmarks.report FILE…` writes, got none")
    return made | pages(project, results, devices, code)


def write(made: dict[Path, str | None]):
    for file, text in made.items():
        if text is None:
            file.unlink(missing_ok=True)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


def differences(made: dict[Path, str | None]):
    """Lines of a diff from the files there are to those there should be."""
    for file, text in made.items():
        there = file.read_text() if file.exists() else None
        if there != text:
            before, after = ((side or "").splitlines(keepends=True) for side in (there, text))
            lines = list(difflib.unified_diff(before, after, str(file), f"{file} as the results have it", n=0))
            yield from (line.rstrip("\n") for line in lines[:MOST_DIFFERENT])
            if len(lines) > MOST_DIFFERENT:
                yield f"… {len(lines) - MOST_DIFFERENT} more lines"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0].rstrip(":") + ".")
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="pytest-benchmark's JSON, or a benchmarks.json, of one device"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    project = {"nargs": "?", "type": Path, "const": ROOT, "metavar": "DIR"}
    parser.add_argument("--pages", **project, help="write again all that is made from committed results, and the pages' figures")
    parser.add_argument("--check", **project, help="exit with 1 where that would change something, and say what")
    options = parser.parse_args(arguments)
    if not (options.files or options.pages or options.check):
        parser.error("FILE: expected pytest-benchmark's JSON, or --pages, or --check, got none of them")
    try:
        if options.files:
            found = joined(options.files)
            made = folder(found, load(options.out / CODE))
            write({options.out / found.slug / name: text for name, text in made.items()})
            print(options.out / found.slug / REPORT)
        if options.pages:
            write(everything(options.out, options.pages))
        if options.check and (lines := list(differences(everything(options.out, options.check)))):
            print(*lines, sep="\n")
            sys.exit("report: these files are not what the committed results give; `make figures` writes them")
    except (Bad, plots.Missing) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    main()
