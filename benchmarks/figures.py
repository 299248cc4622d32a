"""The figures that pages quote: prose with every number taken from the committed results. What was not measured is said to be so.

`block` is the text of docs/performance.md between its marks, `headline` that of README.md.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter

from .measured import OURS, RATE_DIGITS, VERSIONS, Case, Measured, plural, short, size_name, table
from .plots import PLOTS

ABSENT = "not measured"
LEAST, MOST_COLUMNS = 500_000, 4  # elements of the first column; the largest sizes are shown
MOST_NAMED = 5  # of the cases where a peer wins
PLAIN = {"dtype": "float32", "layout": "contiguous"}
BOTH = "forward + backward"
STEP = {"op": "ddpm_step", "mode": "seed", "output": "out"}
NOISING = {"op": "q_sample", "mode": "seed", "output": "out"}
TRAINING = {"op": "diffusion_loss", "mode": "seed", "passes": BOTH}
GAN = {"op": "gan_loss", "passes": BOTH}
# what fastgen runs, beside what, the peer, and which cases it is
ROWS = (
    ("`ddpm_step(seed=, out=)`", "eager with `randn_like`", "eager", STEP),
    ("", "the same under `torch.compile`", "torch.compile", STEP),
    ("`q_sample(seed=, out=)`", "eager with `randn_like`", "eager", NOISING),
    ("", "the same under `torch.compile`", "torch.compile", NOISING),
    ("`q_sample`, `diffusion_loss` and backward", "eager with `randn_like`, `mse_loss`", "eager", TRAINING),
    ("", "the same under `torch.compile`", "torch.compile", TRAINING),
    ("`discriminator_loss` and backward", "eager with target tensors", "eager", GAN),
    ("", "the same under `torch.compile`", "torch.compile", GAN),
    ("`bce_with_logits`", "eager", "eager", {"op": "bce_with_logits", "passes": "forward"}),
    ("`bce_with_logits` and its backward", "eager", "eager", {"op": "bce_with_logits", "passes": BOTH}),
    ("`ddpm_step(noise=, out=)`", "share of the limit", "limit", STEP | {"mode": "noise"}),
    ("`q_sample(noise=, out=)`", "share of the limit", "limit", NOISING | {"mode": "noise"}),
)
SCHEDULERS = (
    ('`DDPMScheduler.step`, `rng="fused"`', {"op": "diffusers DDPMScheduler.step", "mode": "fused"}),
    ("`DDIMScheduler.step`, η = 0: no noise", {"op": "diffusers DDIMScheduler.step", "mode": ""}),
    ('`DDIMScheduler.step`, η = 1, `rng="fused"`', {"op": "diffusers DDIMScheduler.step", "mode": "fused"}),
    ("`DDPMScheduler.step` with diffusers' own noise", {"op": "diffusers DDPMScheduler.step", "mode": "exact"}),
    ("`DDIMScheduler.step`, η = 1, with diffusers' own noise", {"op": "diffusers DDIMScheduler.step", "mode": "exact"}),
    ("`add_noise`", {"op": "diffusers add_noise"}),
)
HEADLINE = (("eager", "eager PyTorch"), ("torch.compile", "`torch.compile`"))
SEEDED_STEP = "Vectors<DdpmStepPlain<float, bf16, bf16, bf16>, seed>", "90"  # the kernel whose machine code is told
TRITON_STEP = "Triton ddpm_step_kernel, seed, bf16", "90"  # the same step in Triton


def cell(case: Case | None, peer: str) -> str:
    number = case and case.ratio(peer)
    if not number:
        return ABSENT
    return short(number, 2) + (" ×" if peer != "limit" else "") + (" (noisy)" if case.noisy(peer) else "")


def between(numbers, digits: int = 2) -> str:
    """1.04 to 1.13, or the one number that both are."""
    low, high = short(min(numbers), digits), short(max(numbers), digits)
    return low if low == high else f"{low} to {high}"


def prose(*sentences: str) -> list[str]:
    """Lines of a paragraph."""
    return [textwrap.fill(" ".join(sentences), 132, break_long_words=False, break_on_hyphens=False), ""]


# ---- the operations --------------------------------------------------------------------------------------------------


def sizes(found: Measured) -> list[str]:
    """The columns: the largest sizes that at least half as many of the rows have as have any."""
    calls = [wanted for call, _, _, wanted in ROWS if call]
    counted, elements = Counter(), {}
    for wanted in calls:
        for case in found.of("throughput", **PLAIN, **wanted):
            if case["elements"] >= LEAST:
                counted[size_name(case["elements"])] += 1
                elements[size_name(case["elements"])] = case["elements"]
    common = [name for name, count in counted.items() if 2 * count >= max(counted.values())]
    return sorted(common, key=elements.get)[-MOST_COLUMNS:]


def by_size(found: Measured, wanted: dict) -> dict[str, Case]:
    return {size_name(case["elements"]): case for case in found.of("throughput", **PLAIN, **wanted)}


def operations(found: Measured) -> list[str]:
    columns = sizes(found)
    rows = []
    for call, beside, peer, wanted in ROWS:
        cases = by_size(found, wanted)
        share = cases[columns[-1]].says(OURS, "share of limit") if columns and columns[-1] in cases else None
        shares = ("" if not call else ABSENT if share is None else short(share, 2)) if peer != "limit" else ""
        rows.append([call, beside, *([cell(cases.get(size), peer) for size in columns] or [ABSENT]), shares])
    heads = [f"{size} elements" for size in columns] or ["half a million elements or more"]
    return table(["call", "beside", *heads, f"share of the limit{f', {columns[-1]}' if columns else ''}"], rows, left=2)


def flatness(found: Measured) -> str:
    """Over the sizes, of what writes no new tensor: how fast the system maps those is its own affair."""
    columns, varies = sizes(found), {OURS: [], "limit": []}
    for call, _, _, wanted in ROWS:
        cases = [case for size, case in by_size(found, wanted).items() if call and wanted.get("passes") != BOTH and size in columns]
        for peer, factors in varies.items():
            times = [case.time(peer) / case["elements"] for case in cases if peer in case.entries]
            factors += [max(times) / min(times)] if len(times) > 1 else []
    if not (varies[OURS] and varies["limit"]):
        return f"How the time per element varies with the size: {ABSENT}."
    ours, limit = (between(factors, 3) for factors in varies.values())
    sized = f"From {columns[0]} to {columns[-1]} elements"
    return f"{sized} the time per element of the calls without a backward varies {ours} times, the limit's {limit} times."


def small_calls(found: Measured) -> str:
    cases = [case for case in found.of("overhead", elements=16) if case.ratio("limit") and case.time()]
    if not cases:
        return f"What a call on 16 elements costs: {ABSENT}."
    limits = ", ".join(dict.fromkeys(f"`{case['limit']}`" for case in cases))
    times = between([1 / case.ratio("limit") for case in cases])
    return f"A call on 16 elements takes {between([1e6 * case.time() for case in cases])} µs, {times} times as long as {limits}."


# ---- targets, and where a peer wins ----------------------------------------------------------------------------------


def missed(cases: list[Case], peer: str) -> str:
    """By how much these cases of one call miss their one target."""
    target, limit = cases[0].says(peer, "target"), f"`{cases[0]['limit']}`"
    if peer != "limit":
        said = [f"{short(case.ratio(peer))} × ({case.where})" for case in cases]
        return f"beside {peer} {', '.join(said)}; we want {target:g} ×"
    if cases[0]["kind"] == "overhead":  # a small call is told by how much longer it takes
        said = [f"{short(1 / case.ratio(peer))} × on {plural(case['elements'], 'element')}" for case in cases]
        return f"the time of {limit} {', '.join(said)}; we want at most {short(1 / target, 2)} ×"
    said = [f"{short(case.ratio(peer))} ({case.where})" for case in cases]
    return f"share of the limit, {limit}, {', '.join(said)}; we want {target:g}"


def targets(found: Measured) -> list[str]:
    """Those that are missed, by call and peer, and how many are too noisy."""
    judged = [(case, peer) for case in found.cases for peer in case.entries if case.says(peer, "target") is not None]
    if not judged:
        return prose(f"Our aims: {ABSENT}.")
    groups, verdicts = {}, Counter(case.says(peer, "met") for case, peer in judged)
    for case, peer in judged:
        if case.says(peer, "met") == "NO":
            groups.setdefault((case.label, case["kind"], peer, case.says(peer, "target")), []).append(case)
    count, noisy = verdicts["NO"], verdicts["noisy"]
    said = f"Of our {plural(len(judged), 'aim')}, {count or 'none'} {'are' if count > 1 else 'is'} missed"
    said += f" and {noisy} {'are' if noisy > 1 else 'is'} too noisy to judge" if noisy else ""
    lines = [f"- `{label}`: {missed(cases, peer)}" for (label, _, peer, _), cases in groups.items()]
    return prose(said + (":" if lines else ".")) + ([*lines, ""] if lines else [])


def wins(found: Measured, report: str) -> str:
    lost = sorted(found.lost, key=lambda pair: pair[0].ratio(pair[1]))
    compared = sum(case.ratio(peer) is not None for case in found.cases for peer in case.peers)
    if not compared:
        return f"Where a peer is faster: {ABSENT}."
    if not lost:
        return f"No peer is faster in any of {plural(compared, 'comparison')}."
    named = []
    for case, peer in lost[:MOST_NAMED]:
        where = f" ({case.where})" if case.where else ""
        named.append(f"`{case.label}`{where}, {peer} in {cell(case, peer)} our time")
    more = f"; {len(lost) - MOST_NAMED} more are in the report" if len(lost) > MOST_NAMED else ""
    where = f"[all of them]({report}#where-a-peer-wins)"
    return f"A peer is faster in {len(lost)} of {plural(compared, 'comparison')} ({where}): {'; '.join(named)}{more}."


# ---- diffusers, whole programs ---------------------------------------------------------------------------------------


def schedulers(found: Measured) -> list[str]:
    timed = [*found.of("overhead", dtype="float32"), *found.of("throughput", dtype="float32")]
    rows = [
        (call, {tuple(case["shape"]): case for case in timed if all(case[key] == value for key, value in wanted.items())})
        for call, wanted in SCHEDULERS
    ]
    shapes = sorted({shape for _, cases in rows for shape in cases}, key=lambda shape: (len(shape), shape[-1]))
    if not shapes:
        return prose(f"Steps of diffusers' schedulers: {ABSENT}.")
    cells = [[call, *(cell(cases.get(shape), "diffusers") for shape in shapes)] for call, cases in rows]
    times = []
    for call, cases in rows:
        case = cases.get(shapes[0])
        if case and case.time() and case.time("diffusers"):
            times.append(f"{call} {short(1e6 * case.time())}, diffusers' {short(1e6 * case.time('diffusers'))}")
    return [
        *prose("A step of diffusers' schedulers outside the network, theirs and the drop-in's on the same tensors:"),
        *table(["call", *map(str, shapes)], cells),
        *(prose(f"In µs at {shapes[0]}: {'; '.join(times)}.") if times else []),
    ]


def programs(found: Measured) -> list[str]:
    cases = found.of("end_to_end")
    if not cases:
        return prose(f"Whole programs with fastgen and without: {ABSENT}.")
    rows = []
    for case in cases:
        rates, peaks = [], []
        for peer in (OURS, case.off):
            rate, peak = case.says(peer, "rate"), case.says(peer, "peak_bytes")
            rates.append(f"{short(rate, RATE_DIGITS)} {case['unit']}" if rate else ABSENT)
            peaks.append(f"{short(peak / 1e6)} MB" if peak else ABSENT)
        without = f"{rates[1]} ({case.off})" if case.off else ABSENT
        rows.append([case["what"], rates[0], without, cell(case, case.off), *peaks])
    return [
        *table(["whole programs", "with fastgen", "without", "times as fast", "peak memory", "without"], rows),
        *prose(
            "A rate is the number of all steps that were timed, divided by all the time that they took; the programs ran in turns,",
            "round by round, and “times as fast” is the quotient of the two rates.",
        ),
    ]


def robot(text: str | None, file: str) -> str:
    """From what examples/robot_policy.py printed."""
    loop = "A robot's control loop ([examples/robot_policy.py](../examples/robot_policy.py))"
    head = text and re.search(r"(\d+) steps, actions (\(.*?\)), (\d+) thread", text)
    chains = dict(re.findall(r"^(\S.*?)\s{2,}([\d.]+) ms", text or "", re.MULTILINE))
    names = ("diffusers DDPMScheduler", "plain PyTorch", "fastgen.Sampler", "the network alone")
    if not head or not all(name in chains for name in names):
        return f"{loop}: {ABSENT}."
    theirs, plain, ours, network = (short(float(chains[name])) for name in names)
    said = f"{head[1]} DDPM steps of a small MLP for actions of shape {head[2]}, {plural(int(head[3]), 'thread')}"
    return (
        f"{loop}, {said} ([its output]({file})): {theirs} ms with diffusers' scheduler, {plain} ms in plain PyTorch "
        f"written by hand, {ours} ms with `fastgen.Sampler`, of which the network takes {network} ms."
    )


def imported(found: Measured) -> str:
    case = next(iter(found.of("import")), None)
    if case is None or not case["fastgen s"]:
        return f"What `import fastgen` adds to `import torch`: {ABSENT}."
    return f"`import fastgen` adds {short(1e3 * case['fastgen s'], 2)} ms to `import torch`."


# ---- machine code ----------------------------------------------------------------------------------------------------


def main_path(kernels: list[dict], wanted: tuple[str, str]) -> tuple[float, float] | None:
    """Instructions per element, and those of special functions, of one kernel's main path; wanted: its label and architecture."""
    found = next((kernel for kernel in kernels if (kernel["label"], kernel["arch"]) == wanted), None)
    return (found["instructions"], found["special"]) if found and found["instructions"] is not None else None


def architectures(kernels: list[dict]) -> str:
    return ", ".join(dict.fromkeys(f"sm_{kernel['arch']}" if kernel["arch"].isdigit() else kernel["arch"] for kernel in kernels))


def triton(kernels: list[dict]) -> str:
    """The same of Triton's kernels."""
    step, spilt = main_path(kernels, TRITON_STEP), sum(kernel["spilled"] > 0 for kernel in kernels)
    told = f"{step[0]:.0f} instructions per element on sm_{TRITON_STEP[1]}" if step else ABSENT
    return f"Of {len(kernels)} Triton kernels, for {architectures(kernels)}, {spilt or 'none'} spill; the same step: {told}."


def cuda(code: dict | None, results: str, timed: bool) -> str:
    """What can be counted without a GPU; `timed`: whether there are results of one."""
    first = "" if timed else "**The CUDA kernels have not been run on a GPU yet.** "
    if code is None:
        return f"{first}Their machine code: {ABSENT} (`make machine-code`)."
    made = [kernel for kernel in code["kernels"] if kernel["label"].startswith("Triton")]
    kernels = [kernel for kernel in code["kernels"] if kernel not in made]
    spilt = sum(kernel["spilled"] > 0 for kernel in kernels)
    spills = f"{spilt} of {len(kernels)} CUDA kernels spill" if spilt else f"none of {len(kernels)} CUDA kernels spills"
    found, step = main_path(kernels, SEEDED_STEP), ABSENT
    if found:
        step = f"{found[0]:.0f} instructions per element on sm_{SEEDED_STEP[1]}, {found[1]:g} of them special functions"
    sentences = [
        f"{first}What can be counted without a GPU (`make machine-code`, [machine_code.txt]({results}/machine_code.txt)):",
        f"for {architectures(kernels)} {spills}; a seeded bfloat16 `ddpm_step`: {step}.",
        "Their PTX passes the tests of the values, instruction by instruction (`python tests/device_on_ptx.py`).",
        *([triton(made)] if made else []),
    ]
    return " ".join(sentences)


# ---- the block -------------------------------------------------------------------------------------------------------


def device(found: Measured, folder: str, robot_said: str | None) -> list[str]:
    e, report, runs = found.environments[-1], f"{folder}/report.md", {}
    for each in found.environments:
        run = ", ".join(filter(None, (each["backend"], each["capability"], (each["datetime"] or "")[:10])))
        commit = (each["commit"] or "none") + (" with changes in the tree" if each["dirty"] else "")
        runs.setdefault(run, {})[commit] = None
    versions = ", ".join(f"{name} {e[name]}" for name in VERSIONS if e[name])
    measured = "; ".join(f"{run}, commit {' and '.join(commits)}" for run, commits in runs.items())
    limits = ", ".join(dict.fromkeys(f"`{case['limit']}`" for case in found.of("throughput") if case["limit"])) or ABSENT
    pictures = [name for name in ("time_per_element.svg", "ratios.svg") if PLOTS[name][0](found) is not None]
    return [
        *prose(
            f"Measured on {found.device}, {versions} ({measured}):",
            "float32, contiguous, large inputs colder than the cache, medians of the paired ratios (3 ×: the peer takes three",
            f"times as long). The limit that shares are of: {limits}. Every size, bfloat16, channels-last, threads, what was too",
            f"noisy or left out: [the report]({report}).",
        ),
        *(f"![{PLOTS[name][1]}]({folder}/{name})\n" for name in pictures),
        *operations(found),
        *prose(small_calls(found), flatness(found), imported(found)),
        *prose(wins(found, report)),
        *targets(found),
        *schedulers(found),
        *programs(found),
        *prose(robot(robot_said, f"{folder}/robot_policy.txt")),
    ]


def block(devices: list[Measured], results: str, code: dict | None, robots: dict[str, str]) -> str:
    """The figures of docs/performance.md. results: the folder, as that page links to it; robots: by device."""
    lines = []
    for found in devices:
        lines += [f"### {found.device}", ""] if len(devices) > 1 else []
        lines += device(found, f"{results}/{found.slug}", robots.get(found.slug))
    timed = any(e["device"] != "cpu" for found in devices for e in found.environments)
    return "\n".join([*lines, *prose(cuda(code, results, timed))])


def headline(devices: list[Measured], page: str) -> str:
    """README's sentences, of the first device. page: docs/performance.md, as README links to it."""
    found = devices[0]
    cases = {size: [case for case in (by_size(found, call).get(size) for call in (STEP, NOISING)) if case] for size in sizes(found)}
    size, shown = next(
        ((size, cases[size]) for size in reversed(cases) if any(case.ratio("eager") for case in cases[size])), ("", [])
    )
    calls = [
        f"`{case.label}` is {' and '.join(f'{cell(case, peer)} as fast as {name}' for peer, name in HEADLINE if case.ratio(peer))}"
        for case in shown
    ]
    elements = f" with {size} float32 elements" if calls else ""
    times = [case.ratio(case.off) for case in found.of("end_to_end") if case.off and case.ratio(case.off)]
    programs = (
        f"whole programs, most of whose time is the network's, are {between(times)} ×" if times else f"whole programs: {ABSENT}"
    )
    said = "; ".join([*(calls or [f"single ops: {ABSENT}"]), programs])
    return "\n".join(prose(f"Measured on {found.device}{elements}: {said}. [How fast]({page}) has all of it, with what is slower."))
