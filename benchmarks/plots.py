"""The report's plots, as SVG that is readable on a light page and on a dark one; the same numbers give the same bytes.

No one colour is readable on both: the contrasts of white and #0d1117 with any colour multiply to 18.9, and 4.5 twice needs 20.3.
So a plot is drawn for a light page, its own background with it, and a style sheet replaces each colour where the reader's
system is dark.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable

from .measured import OURS, PEERS, RATE_DIGITS, Case, Measured, short, size_name

# role: (light, dark). Peers take the colours of Okabe and Ito, shifted until each has a contrast of 4.5 with its page.
COLOURS = {
    "page": ("#ffffff", "#0d1117"),
    "grid": ("#d1d9e0", "#3d444d"),
    "text": ("#1f2328", "#e6edf3"),
    "limit": ("#59636e", "#9198a1"),
    OURS: ("#0072b2", "#56b4e9"),
    "fastgen triton": ("#9a6700", "#e69f00"),
    "fastgen eager": ("#332288", "#b7a9f5"),
    "eager": ("#c15500", "#d55e00"),
    "torch.compile": ("#00805d", "#009e73"),
    "diffusers": ("#a6508a", "#cc79a7"),
    "guided-diffusion": ("#6b6600", "#d9d24a"),
}
WINS = "eager"  # the colour of a bar where a peer wins: vermillion beside blue is told apart by everybody
# besides colour, so that a line can be told without it
MARKERS = dict(zip(PEERS, ("", "o", "s", "P", "^", "D", "v", "X"), strict=True))
STYLE = {
    "svg.hashsalt": "fastgen",  # ids do not change from run to run
    "svg.fonttype": "none",  # text stays text: small, and a diff shows it
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],  # the first comes with matplotlib and is wide
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.markersize": 4,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.5,
}
WIDTH = 10  # inches


class Missing(RuntimeError):
    """matplotlib is not installed."""


def light(role: str) -> str:
    return COLOURS[role][0]


def drawn(draw: Callable, title: str) -> str:
    """The SVG of the figure that `draw` returns."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Missing(f"matplotlib: not installed ({error}), and it draws the plots: pip install -r requirements/dev.txt") from None
    page, text, grid = light("page"), light("text"), light("grid")
    colours = {"figure.facecolor": page, "axes.facecolor": page, "savefig.facecolor": page, "grid.color": grid}
    colours |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), text)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what the user's own file says
        matplotlib.rcParams.update(STYLE | colours)
        figure = draw(lambda height: Figure((WIDTH, height), layout="constrained"))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Title": title, "Date": None, "Creator": None})
    return themed(file.getvalue())


def themed(svg: str) -> str:
    """With the style sheet for dark pages, and numbers of two decimals: the further ones may depend on the processor. Without
    indentation, a tenth of the file."""
    pairs = [(what, *colours) for colours in COLOURS.values() for what in ("fill", "stroke")]
    dark = (f'[style*="{what}: {here}"] {{ {what}: {there} !important }}' for what, here, there in pairs)
    sheet = "\n".join(("<style>", "@media (prefers-color-scheme: dark) {", *dark, "}", "</style>"))
    head, body = re.match(r"(.*?<svg[^>]*>)(.*)", svg, re.DOTALL).groups()
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"-?\b\d+\.\d{3,}", lambda n: f"{round(float(n[0]), 2) + 0.0:g}", tag[0]), body)
    return "\n".join(line.strip() for line in f"{head}\n{sheet}{body}".splitlines()) + "\n"


# ---- what is shown ---------------------------------------------------------------------------------------------------


def families(cases: list[Case]) -> list[list[Case]]:
    """For each op, mode and passes, the sizes of one variant: float32, contiguous and with out= where there are such."""

    def preference(variant):
        dtype, layout, output, _ = variant
        return len(variants[variant]), dtype == "float32", layout == "contiguous", output == "out"

    found = {}
    for case in cases:
        found.setdefault((case["op"], case["mode"], case["passes"]), []).append(case)
    chosen = []
    for family in found.values():
        variants = {}
        for case in family:
            variants.setdefault((case["dtype"], case["layout"], case["output"], case["call"]), []).append(case)
        chosen.append(sorted(variants[max(variants, key=preference)], key=lambda case: case["elements"]))
    return chosen


def at_common_size(cases: list[Case]) -> list[Case]:
    """One case of each family: at the largest of the sizes that the most families have, else at its own largest."""
    found = families(cases)
    counted = Counter(case["elements"] for family in found for case in family)
    common = max(counted, key=lambda elements: (counted[elements], elements), default=None)
    return [next((case for case in family if case["elements"] == common), family[-1]) for family in found]


def peers_of(cases: list[Case]) -> list[str]:
    return [peer for peer in PEERS if any(peer in case.entries for case in cases)]


def whiskers(case: Case, value: Callable) -> list[list[float]]:
    """How far the quartiles are from the median: matplotlib's xerr of one bar. The least is 0, whatever rounding says."""
    low, middle, high = (value(case, which) or value(case, "median") for which in ("q1", "median", "q3"))
    return [[max(middle - low, 0)], [max(high - middle, 0)]]


# ---- plots -----------------------------------------------------------------------------------------------------------


def plain(axis, values=()):
    """Ticks as people write numbers: 0.1, 1, 10; on a short logarithmic axis also at 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    wide = max(values, default=1) > 1000 * min(values, default=1)
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def panels(make, found: list, columns: int = 3, height: float = 2.4):
    """(figure, [(axes, what is in found)]), and room for a legend."""
    columns = min(columns, len(found))
    rows = -(-len(found) // columns)
    figure = make(height * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for empty in axes[len(found) :]:
        empty.axis("off")
    for left_or_last in axes[max(len(found) - columns, 0) : len(found)]:
        left_or_last.tick_params(labelbottom=True)
    return figure, list(zip(axes, found, strict=False))


def line(axes, peer: str, xs, ys):
    if peer == "limit":
        axes.plot(xs, ys, "--" if len(xs) > 1 else "_", color=light(peer), label=peer, zorder=3)
    else:
        axes.plot(xs, ys, MARKERS[peer] + "-", color=light(peer), label=peer, zorder=4 if peer == OURS else 2)


def say(axes, text: str, x: float, y: float, size: int = 8):
    """To the right of that point."""
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=size)


def legend(figure):
    """One for all panels, above them."""
    found = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    names = sorted(found, key=PEERS.index)
    figure.legend([found[name] for name in names], names, loc="outside upper center", ncols=len(PEERS))


def time_per_element(measured: Measured):
    found = families([case for case in measured.of("throughput") if case["elements"]])
    if not found:
        return None

    def draw(make):
        figure, shown = panels(make, found)
        every = []
        for axes, family in shown:
            axes.set(xscale="log", yscale="log")
            axes.set_title(f"{family[0].label}\n{family[0].variant}")
            for peer in peers_of(family):
                points = [(case["elements"], 1e9 * case.time(peer) / case["elements"]) for case in family if peer in case.entries]
                line(axes, peer, *zip(*points, strict=True))
                every += points
        xs, ys = zip(*every, strict=True)
        for axes, _ in shown:
            plain(axes.yaxis, ys)
            axes.xaxis.set_major_formatter(lambda value, _: size_name(round(value)))
            axes.xaxis.minorticks_off()
        figure.supxlabel("elements", fontsize=9)
        figure.supylabel("ns per element", fontsize=9)
        legend(figure)
        return figure

    return draw


def ratios(measured: Measured):
    bars = []
    for case in at_common_size(measured.of("throughput")):
        bars += [(case, peer) for peer in ("limit", *case.peers) if case.ratio(peer)]
    if not bars:
        return None

    def draw(make):
        figure = make(0.19 * len(bars) + 1.0)
        axes = figure.subplots()
        labels, previous = [], None
        for place, (case, peer) in enumerate(bars):
            ratio = case.ratio(peer)
            wins = ratio < 1 and peer != "limit"
            colour = light(WINS if wins else "limit" if peer == "limit" else OURS)
            bar = {"facecolor": light("page"), "edgecolor": colour} if peer == "limit" else {"color": colour}
            axes.barh(place, ratio - 1, left=1, height=0.7, **bar)
            axes.errorbar(ratio, place, xerr=whiskers(case, lambda c, q, p=peer: c.ratio(p, q)), color=light("text"), linewidth=0.8)
            high = max(ratio, case.ratio(peer, "q3") or ratio, 1)
            said = f"{short(ratio, 2)} ×{' noisy' if case.noisy(peer) else ''}{', the peer wins' if wins else ''}"
            say(axes, said, high, place, 7)
            first = f"{case.label}, {case.where}   " if case is not previous else ""
            labels.append(f"{first}{peer if peer != 'limit' else 'limit: ' + (case['limit'] or '')}")
            if first and place:
                axes.axhline(place - 0.5, color=light("grid"), linewidth=0.8)
            previous = case
        axes.set(xscale="log", ylim=(len(bars) - 0.4, -0.6))
        axes.set_xlabel("time of the peer ÷ time of fastgen; left of 1 the peer is faster")
        axes.set_yticks(range(len(bars)), labels, fontsize=7)
        axes.grid(False, axis="y")
        axes.margins(x=0.12)
        axes.axvline(1, color=light("text"), linewidth=1)
        plain(axes.xaxis, [case.ratio(peer) for case, peer in bars])
        return figure

    return draw


def overhead(measured: Measured):
    cases = measured.of("overhead")
    if not cases:
        return None

    def draw(make):
        figure = make(0.24 * len(cases) + 1.2)
        axes = figure.subplots()
        for peer in peers_of(cases):
            shown = [(place, case) for place, case in enumerate(cases) if peer in case.entries]
            for place, case in shown:
                spread = whiskers(case, lambda c, q, p=peer: 1e6 * (c.time(p, q) or c.time(p)))
                axes.errorbar(1e6 * case.time(peer), place, xerr=spread, color=light(peer), linewidth=1)
            times, places = [1e6 * case.time(peer) for _, case in shown], [place for place, _ in shown]
            size = 8 if peer == "limit" else 5
            axes.plot(times, places, MARKERS[peer] or "|", markersize=size, color=light(peer), label=peer)
        axes.set(xscale="log", ylim=(len(cases) - 0.5, -0.5), xlabel="µs per call")
        axes.set_yticks(range(len(cases)), [f"{case.label}, {tuple(case['shape'] or ())}" for case in cases], fontsize=8)
        plain(axes.xaxis, [1e6 * case.time(peer) for case in cases for peer in case.entries])
        legend(figure)
        return figure

    return draw


def by_threads(cases: list[Case]) -> list[list[Case]]:
    """The cases of each call and size, by the number of threads."""
    found = {}
    for case in cases:
        key = (case.label, case.variant, case["output"], case["elements"])
        found.setdefault(key, []).append(case)
    return [sorted(series, key=lambda case: case["threads"]) for series in found.values()]


def threads(measured: Measured):
    found = by_threads(measured.of("threads"))
    if not found:
        return None

    def draw(make):
        figure, shown = panels(make, found)
        most = max(case["threads"] for series in found for case in series)
        for axes, series in shown:
            axes.set_title(f"{series[0].label}\n{series[0].variant}, {size_name(series[0]['elements'])} elements")
            axes.plot((1, most), (1, most), ":", color=light("limit"), linewidth=1)  # as fast as there are threads
            for peer in peers_of(series):
                with_it = [case for case in series if peer in case.entries]
                one = with_it[0].time(peer) * with_it[0]["threads"]  # of one thread, where that was not measured
                line(axes, peer, [case["threads"] for case in with_it], [one / case.time(peer) for case in with_it])
            axes.set_xticks(sorted({case["threads"] for series in found for case in series}))
        figure.supxlabel("threads (dotted: twice as many, twice as fast)", fontsize=9)
        figure.supylabel("times as fast as on one", fontsize=9)
        legend(figure)
        return figure

    return draw


def end_to_end(measured: Measured):
    cases = [case for case in measured.of("end_to_end") if case.off and case.ratio(case.off)]
    if not cases:
        return None

    def draw(make):
        figure = make(0.5 * len(cases) + 1.2)
        left, right = figure.subplots(1, 2, sharey=True)
        for place, case in enumerate(cases):
            off = case.off
            ratio = case.ratio(off)
            left.barh(place, ratio, height=0.5, color=light(OURS if ratio >= 1 else WINS))
            left.errorbar(ratio, place, xerr=whiskers(case, lambda c, q, p=off: c.ratio(p, q)), color=light("text"), linewidth=0.8)
            high = max(ratio, case.ratio(off, "q3") or ratio)
            say(left, f"{short(ratio, 2)} ×", high, place)
            for shift, peer in ((-0.17, OURS), (0.17, off)):
                if peak := case.says(peer, "peak_bytes"):
                    right.barh(place + shift, peak / 1e6, height=0.3, color=light(peer), label=peer)
                    say(right, short(peak / 1e6), peak / 1e6, place + shift)
        left.axvline(1, color=light("text"), linewidth=1)
        left.set(xlabel="times as fast with fastgen as without", ylim=(len(cases) - 0.5, -0.5))
        left.margins(x=0.15)
        said = []
        for case in cases:
            on, without = (short(case.says(peer, "rate"), RATE_DIGITS) for peer in (OURS, case.off))
            said.append(f"{case['what']}\n{on} {case['unit']}, {case.off} {without}")
        left.set_yticks(range(len(cases)), said, fontsize=8)
        right.set(xlabel="peak memory of the work, MB")
        right.margins(x=0.15)
        for axes in (left, right):
            axes.grid(False, axis="y")
        legend(figure)
        return figure

    return draw


PLOTS = {
    "time_per_element.svg": (time_per_element, "Time per element against size"),
    "ratios.svg": (ratios, "Time of each peer ÷ time of fastgen"),
    "overhead.svg": (overhead, "What a small call costs"),
    "threads.svg": (threads, "Speed against threads"),
    "end_to_end.svg": (end_to_end, "Whole programs with fastgen and without"),
}


def plots(measured: Measured) -> dict[str, str]:
    """{file name: SVG} of those for which there are numbers."""
    made = {}
    for name, (plot, title) in PLOTS.items():
        if (draw := plot(measured)) is not None:
            made[name] = drawn(draw, title)
    return made
