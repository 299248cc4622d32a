"""The benchmarks' report, from made-up results: what it says, that the same numbers give the same bytes, that it is readable."""

import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, under every import mode of pytest

from benchmarks import figures, measured, plots, report

pytest.importorskip("matplotlib")

ENVIRONMENT = {
    "device": "cpu",
    "cpu": "AMD EPYC",
    "cores": 2,
    "cache_bytes": 32 * 2**20,
    "load": 0.25,
    "torch": "2.13.0+cpu",
    "triton": None,
    "diffusers": "0.38.0",
    "numpy": "2.4.6",
    "fastgen": "0.1.0",
    "backend": "cpp",
    "capability": "AVX512",
    "commit": "0123456789ab",
    "dirty": False,
}
SIZES = (10**3, 2**20 - 4096, 16 * 2**20)
CALLS = {  # call: (op, mode, passes, output, bytes per element)
    "q_sample(seed=, out=)": ("q_sample", "seed", "forward", "out", 8),
    "ddpm_step(seed=, out=)": ("ddpm_step", "seed", "forward", "out", 12),
    "ddpm_step(noise=, out=)": ("ddpm_step", "noise", "forward", "out", 16),
    "q_sample + diffusion_loss": ("diffusion_loss", "seed", "forward + backward", "fresh", 16),
    "discriminator_loss": ("gan_loss", "", "forward + backward", "scalar", 24),
    "bce_with_logits": ("bce_with_logits", "", "forward", "scalar", 8),
}
PEERS = {"limit": 0.8, "fastgen": 1.0, "eager": 10.0, "torch.compile": 40.0}  # times fastgen's time


def stats(median, spread=1.02):
    times = {"min": median / spread, "q1": 0.99 * median, "median": median, "q3": 1.01 * median, "max": median * spread}
    return times | {"mean": median, "stddev": 0.01 * median, "iqr": 0.02 * median, "rounds": 50, "data": [median] * 50}


def case(group, seconds, peers, spread=1.02, **info):
    """The entries of one case. peers: {peer: times of fastgen's time}."""
    entries = []
    for peer, times in peers.items():
        extra = {"peer": peer, "limit": "copy", "threads": 2, "target": None, "met": "", **info, **ENVIRONMENT}
        extra["ratio"] = {"median": times, "q1": 0.95 * times, "q3": 1.05 * times}
        extra["share of limit"] = peers["limit"] / times if "limit" in peers else None
        extra["GB/s"] = extra.get("bytes", 0) / (seconds * times) / 1e9
        made = {"group": group, "name": f"test[{group}-{peer}]", "fullname": f"b.py::test[{group}-{peer}]", "params": None}
        entries.append(made | {"extra_info": extra, "stats": stats(seconds * times, spread)})
    return entries


def throughput(call, elements, peers=PEERS, dtype="float32", layout="contiguous", ns=0.5, **info):
    op, mode, passes, output, each = CALLS[call]
    group = f"{call} {passes} {dtype} {layout} {elements} {info.get('kind', '')} {info.get('threads', '')}"
    described = {"op": op, "mode": mode, "passes": passes, "output": output, "call": call, "dtype": dtype, "layout": layout}
    described |= {"kind": "throughput", "shape": [elements], "elements": elements, "bytes": each * elements}
    return case(group, 1e-9 * ns * elements, peers, **described | info)


def results():
    """A whole file: every kind, a peer that wins, a target missed, one too noisy, and a peer that was left out."""
    entries = [entry for call in CALLS for elements in SIZES for entry in throughput(call, elements)]
    entries += throughput("q_sample(seed=, out=)", SIZES[1], dtype="bfloat16", peers=PEERS | {"fastgen triton": 1.5})
    wins = {"limit": 0.5, "fastgen": 1.0, "eager": 0.8125}
    entries += throughput("bce_with_logits", SIZES[1], layout="channels_last", peers=wins)
    missed = throughput("discriminator_loss", 128, peers={"limit": 0.25, "fastgen": 1.0, "eager": 1.4})
    missed[2]["extra_info"] |= {"target": 4.0, "met": "NO"}
    noisy = throughput("ddpm_step(noise=, out=)", SIZES[2], dtype="bfloat16", spread=2.0)
    noisy[0]["extra_info"] |= {"target": 0.85, "met": "noisy"}
    entries += missed + noisy
    for name, call in (("t int", "ddpm_step(seed=), t int"), ("t tensor", "ddpm_step(seed=), t tensor")):
        shown = {"op": "ddpm_step", "mode": "seed", "passes": "forward", "output": "fresh", "call": call, "dtype": "float32"}
        shown |= {"kind": "overhead", "shape": [1, 1, 4, 4], "elements": 16, "bytes": 192, "layout": "contiguous"}
        entries += case(name, 4e-6, {"limit": 0.25, "fastgen": 1.0, "eager": 9.0}, **shown | {"limit": "torch.add"})
    for shape, kind, seconds in (([1, 16, 7], "overhead", 15e-6), ([64, 3, 32, 32], "throughput", 2e-4)):
        shown = {"op": "diffusers DDPMScheduler.step", "passes": "forward", "output": "fresh", "dtype": "float32", "kind": kind}
        shown |= {"shape": shape, "elements": math.prod(shape), "bytes": 16, "layout": "contiguous"}
        for mode, call in (("fused", 'DDPMScheduler.step, rng="fused"'), ("exact", "DDPMScheduler.step")):
            peers = {"limit": 0.1, "fastgen": 1.0, "diffusers": 12.0 if mode == "fused" else 1.5}
            entries += case(f"{call}{shape}", seconds, peers, **shown | {"mode": mode, "call": call})
    for count in (1, 2):
        peers = {"limit": 0.8, "fastgen": 1.0, "eager": 8.0}
        entries += throughput("ddpm_step(seed=, out=)", SIZES[2], peers, kind="threads", threads=count, ns=1.0 / count)
    for what, unit, peer, rate, ratio in (
        ("DDPM training", "steps/s", "eager", 12.5, 1.25),
        ("DDPM sampling, 1000 steps", "steps/s", "diffusers", 250.0, 2.0),
        ("GAN training", "iterations/s", "eager", 30.0, 0.9375),
    ):
        ends = case(what, 1 / rate, {"fastgen": 1.0, peer: ratio}, kind="end_to_end", what=what, unit=unit)
        for entry, times, peak in zip(ends, (1, ratio), (80_000_000, 120_000_000), strict=True):
            entry["extra_info"] |= {"rate": rate / times, "peak_bytes": peak if what != "GAN training" else None}
        entries += ends
    imported = case("import", 2.0, {"fastgen": 1.0}, kind="import")
    imported[0]["extra_info"] |= {"torch s": 1.9, "fastgen s": 0.03125, "fastgen's share": 0.016}
    return {
        "machine_info": {"node": "a"},
        "commit_info": {"id": ENVIRONMENT["commit"]},
        "datetime": "2026-11-23T10:00:00.000000+00:00",
        "benchmarks": entries + imported,
        "left_out": {"ddpm_step, 100M elements": "needs more than the 8 GiB of free memory"},
    }


def write(path, found):
    path.write_text(json.dumps(found))
    return path


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """Most tests ask for the same plots, which take seconds; that they are the same is held against another process."""
    draw, kept = plots.plots, {}

    def once(found):
        numbers = found.text()
        if numbers not in kept:
            kept[numbers] = draw(found)
        return dict(kept[numbers])

    once.draws = draw
    plots.plots = once
    yield
    plots.plots = draw


@pytest.fixture
def raw(tmp_path):
    return write(tmp_path / "raw.json", results())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "benchmarks/results"


CODE = {
    "environment": {"nvcc": "13.0.88", "triton": None, "commit": "aaaaaaaaaaaa", "dirty": False},
    "columns": ["registers", "spilled", "instructions", "special", "exact"],
    "kernels": [
        ["ddpm_step", "Vectors<DdpmStepPlain<float, bf16, bf16, bf16>, seed>", {"90": [80, 0, 36.15625, 2.0, True]}],
        ["ddpm_step", "DdpmElements<double>", {"90": [80, 0, None, None, None]}],
        ["ddpm_step", "Triton ddpm_step_kernel, seed, bf16", {"90": [80, 4, 51.125, 0.5625, True]}],
        ["ddpm_step", "Triton ddpm_step_kernel, seed, f64", {"gfx942": [80, 0, None, None, None]}],
    ],
}
ROBOT = """fastgen backend: cpp on cpu
100 steps, actions (1, 16, 7), 1 thread(s), torch 2.13.0+cpu, 200 rounds
                               chain      rate   outside the network    per step
the network alone            5.68 ms  176.0 Hz
fastgen.Sampler              7.74 ms  129.2 Hz               2.06 ms     20.6 µs
plain PyTorch                9.08 ms  110.2 Hz               3.39 ms     33.9 µs
diffusers DDPMScheduler     22.92 ms   43.6 Hz              17.24 ms    172.4 µs
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with results, whose pages have their figures."""
    folder = tmp_path_factory.mktemp("project")
    results_of = folder / "benchmarks/results"
    (folder / "docs").mkdir()
    for page in PAGES:
        (folder / page).write_text(f"# before\n\n{report.BEGIN}\nyesterday\n{report.END}\n\n## after\n")
    report.main([str(write(folder / "raw.json", results())), "--out", str(results_of)])
    write(results_of / "machine_code.json", CODE)
    (results_of / "amd-epyc-2-cores/robot_policy.txt").write_text(ROBOT)
    report.main(["--pages", str(folder), "--out", str(results_of)])
    return folder


@pytest.fixture
def page(project):
    """The page that has all the figures."""
    return project / report.PAGE


@pytest.fixture
def project(made, tmp_path):
    """A copy of it, with the results in `out`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def section(text, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def row(text, *cells):
    """The one line of a table that has all these cells."""
    (found,) = [line for line in text.splitlines() if all(f"| {cell} |" in line for cell in cells)]
    return [cell.strip() for cell in found.strip("|").split(" | ")]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report_says_what_was_measured(project, out):
    text = (out / "amd-epyc-2-cores/report.md").read_text()
    assert text.startswith("# AMD EPYC, 2 cores\n")
    head = text.partition("## ")[0]
    assert "torch 2.13.0+cpu, triton none, diffusers 0.38.0" in head and "cpp, AVX512" in head and "32 MiB" in head
    assert "34 cases, 2026-11-23, commit 0123456789ab, load 0.2" in head and "changes" not in head

    found = row(section(text, "Throughput"), "`ddpm_step(seed=, out=)`", "16,777,216")
    assert found[1:3] == ["float32", "contiguous"]
    assert found[5:8] == ["0.500 (0.495–0.505)", "24.0", "0.80 of copy"]
    assert found[8:] == ["–", "10.0 (9.50–10.5)", "40.0 (38.0–42.0)", "–"]  # triton, eager, torch.compile, diffusers
    found = row(section(text, "Calls on few elements"), "`ddpm_step(seed=), t int`")
    assert found[3:7] == ["4.00 (3.96–4.04)", "1.00 (0.990–1.01)", "4.00 × torch.add", "9.00 (8.55–9.45)"]
    assert row(section(text, "Threads"), "fastgen")[4:] == ["1.00 (1.00 ×)", "0.500 (2.00 ×)"]
    found = row(section(text, "End to end"), "DDPM sampling, 1000 steps")
    assert found[1:] == ["steps/s", "250.0", "125.0", "diffusers", "2.00 (1.90–2.10)", "80.0", "120"]
    assert "`import torch` 1900 ms, then `import fastgen` 31.2 ms." in section(text, "Import")


def test_a_winning_peer_is_shown(raw):
    lines = report.wins(measured.joined([raw]))
    assert len(lines) == 2 + 2 + 1  # head, two cases, the end of the table
    found = row("\n".join(lines), "`bce_with_logits`")
    assert found[2:] == ["float32, channels_last, 1M elements", "eager", "522 µs", "424 µs", "**0.812 (0.772–0.853)**"]
    assert row("\n".join(lines), "`GAN training`")[3:] == ["eager", "33.3 ms", "31.2 ms", "**0.938 (0.891–0.984)**"]
    write(raw, results() | {"benchmarks": throughput("bce_with_logits", SIZES[0])})
    assert report.wins(measured.joined([raw])) == ["None.", ""]


def test_limit_is_no_peer(raw):
    """It is faster than almost anything, which is not what a peer's winning means."""
    assert all(peer != "limit" for _, peer in measured.joined([raw]).lost)


def test_targets_missed_and_noisy(raw):
    text = "\n".join(report.targets(measured.joined([raw])))
    assert text.startswith("0 of 2 targets met.")
    assert row(text, "`discriminator_loss, forward + backward`")[4:] == ["1.40 (1.33–1.47)", "≥ 4", "NO"]
    assert row(text, "`ddpm_step(noise=, out=)`")[4:] == ["0.800 (0.760–0.840) noisy", "≥ 0.85", "noisy"]


def test_noisy_is_a_median_far_above_the_best(tmp_path):
    for spread, noisy in ((1.49, False), (1.51, True)):
        found = results() | {"benchmarks": throughput("bce_with_logits", SIZES[0], spread=spread)}
        (case,) = measured.joined([write(tmp_path / "b.json", found)]).cases
        assert case.noisy("eager") == case.noisy("limit") == noisy
        assert ("noisy" in report.ratio(case, "eager")) == noisy


def test_what_was_left_out_is_told(raw):
    text = "\n".join(report.left_out(measured.joined([raw])))
    assert "- ddpm_step, 100M elements: needs more than the 8 GiB of free memory" in text
    assert "- throughput, torch.compile, at float32, channels_last, 1M elements: `bce_with_logits`\n" in text + "\n"
    assert "`q_sample + diffusion_loss" not in text  # has all its peers


def test_machine_code_is_in_the_report(project, out):
    text = section((out / "amd-epyc-2-cores/report.md").read_text(), "Machine code")
    assert row(text, "`Vectors<DdpmStepPlain<float, bf16, bf16, bf16>, seed>`")[2:] == ["80 / 36.2 / 2.0"]
    assert "2 kernels without a main path" in text and "DdpmElements" not in text


def test_machine_code_of_the_repository():
    """The committed file has the form that is read here."""
    found = report.load(report.RESULTS / report.CODE)
    lines = report.machine_code(found)
    (head,) = [line for line in lines if line.startswith("| op")]
    assert "sm_80 | sm_90 | sm_100 | sm_120 | gfx942" in head
    with_path = {(kernel["op"], kernel["label"]) for kernel in found["kernels"] if kernel["instructions"] is not None}
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(with_path)


@pytest.mark.skipif(not (report.ROOT / ".git").exists(), reason="not a clone")
def test_no_file_is_large():
    """What is committed is what the reports tell; whoever clones pays for the rest, in every version that there ever was."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=report.ROOT, capture_output=True, text=True, check=True).stdout
    sizes = {name: path.stat().st_size for name in listed.split("\0") if name and (path := report.ROOT / name).exists()}
    assert sizes and {name: size for name, size in sizes.items() if size > 300_000} == {}
    assert (report.RESULTS / report.CODE).stat().st_size <= 200_000


# ---- the slim JSON ---------------------------------------------------------------------------------------------------


def test_slim_json_gives_the_same_bytes(raw, out):
    report.main([str(raw), "--out", str(out)])
    folder = out / "amd-epyc-2-cores"
    first = files(folder)
    report.main([str(folder / "benchmarks.json"), "--out", str(out)])
    assert files(folder) == first
    assert {*first} == {"benchmarks.json", "report.md", *plots.PLOTS}


def test_slim_json_is_small_and_sorted(raw):
    found = measured.joined([raw])
    slim = json.loads(found.text())
    entries = [peer for case in slim["benchmarks"] for peer in case["peers"]]
    assert len(entries) == len(results()["benchmarks"])
    said = [*entries, *slim["benchmarks"]]
    assert all("data" not in entry["stats"] for entry in entries)
    assert not any(each["extra_info"].keys() & {*ENVIRONMENT, "ratios"} for each in said)
    (environment,) = slim["environments"]
    assert environment == ENVIRONMENT | {"datetime": "2026-11-23T10:00:00.000000+00:00"}
    text = [line.strip(" ,") for line in found.text().splitlines()]
    for case in slim["benchmarks"]:
        assert json.dumps(case, ensure_ascii=False, sort_keys=True, separators=(",", ":")) in text  # on a line of its own
    shuffled = results()
    shuffled["benchmarks"].reverse()
    assert measured.joined([write(raw, shuffled)]).text() == found.text()


def test_what_the_reports_do_not_tell(raw):
    """`make bench` times the Triton backend's launches as well, beside no peer: its own output says what came of it."""
    found = json.loads(raw.read_text())
    host = {"group": "triton host", "extra_info": {"kind": "triton host", "calls": {}, **ENVIRONMENT}, "stats": stats(9.0)}
    text = measured.joined([raw]).text()
    assert measured.joined([write(raw, found | {"benchmarks": [host, *found["benchmarks"]]})]).text() == text
    with pytest.raises(measured.Bad, match="expected a kind that is reported, got triton host alone"):
        measured.read(write(raw, found | {"benchmarks": [host]}))


def test_a_later_file_replaces_groups(tmp_path, raw):
    newer = {"datetime": "2026-11-24T10:00:00", "benchmarks": throughput("bce_with_logits", SIZES[1], {"fastgen": 1.0}, ns=0.25)}
    for entry in newer["benchmarks"]:
        entry["extra_info"] |= {"commit": "bbbbbbbbbbbb", "dirty": True}
    found = measured.joined([raw, write(tmp_path / "newer.json", newer)])
    (case,) = found.of("throughput", op="bce_with_logits", elements=SIZES[1], layout="contiguous")
    assert case.time() == pytest.approx(0.25e-9 * SIZES[1], rel=1e-5) and [*case.entries] == ["fastgen"]
    assert len(found.cases) == len(measured.joined([raw]).cases)
    assert [(e["commit"], count) for e, count in measured.commits(found)] == [("0123456789ab", 33), ("bbbbbbbbbbbb", 1)]
    assert "1 case, 2026-11-24, commit bbbbbbbbbbbb with changes in the tree" in "\n".join(report.header(found))


@pytest.mark.parametrize(
    ("elements", "name"),
    [(0, "0"), (16, "16"), (1000, "1k"), (12288, "12k"), (196608, "192k"), (10**6, "1M"), (2**20 - 4096, "1M"), (2 * 10**6, "2M")]
    + [(2**21, "2M"), (16 * 2**20, "16M"), (1365 * 12288, "16M"), (5461 * 12288, "64M"), (10**8, "100M")],
)
def test_size_names(elements, name):
    assert measured.size_name(elements) == name


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.05321, "0.0532"), (9.7999, "9.80"), (9.999, "10.0"), (13.14, "13.1"), (1278.4, "1278"), (0.0, "0"), (None, "–")],
)
def test_short_numbers(number, text):
    assert measured.short(number) == text


# ---- devices ---------------------------------------------------------------------------------------------------------


def on_gpu(found):
    for entry in found["benchmarks"]:
        entry["extra_info"]["device"] = "NVIDIA H100 80GB HBM3"
    return found


def test_folders_of_devices(raw, tmp_path):
    assert measured.joined([raw]).slug == "amd-epyc-2-cores"
    assert measured.joined([write(tmp_path / "gpu.json", on_gpu(results()))]).slug == "nvidia-h100-80gb-hbm3"


def test_a_gpu_has_a_section_of_its_own(project, page, tmp_path, out):
    assert "### AMD" not in page.read_text() and "have not been run on a GPU yet" in page.read_text()
    report.main([str(write(tmp_path / "gpu.json", on_gpu(results()))), "--out", str(out)])
    report.main(["--pages", str(project), "--out", str(out)])
    text = page.read_text()
    assert re.findall(r"^### (.*)", text, re.MULTILINE) == ["AMD EPYC, 2 cores", "NVIDIA H100 80GB HBM3"]
    assert "nvidia-h100-80gb-hbm3/ratios.svg" in text and "have not been run on a GPU yet" not in text


# ---- errors ----------------------------------------------------------------------------------------------------------


def refused(*arguments):
    with pytest.raises(SystemExit) as error:
        report.main([str(argument) for argument in arguments])
    return str(error.value)


def test_mixed_devices_are_refused(raw, tmp_path, out):
    gpu = write(tmp_path / "gpu.json", on_gpu(results()))
    said = refused(raw, gpu, "--out", out)
    assert said == f"report: {gpu}: expected results of AMD EPYC, 2 cores, as in {raw}, got results of NVIDIA H100 80GB HBM3"
    mixed = results()
    mixed["benchmarks"][-1]["extra_info"]["cores"] = 4
    assert "got results of AMD EPYC, 4 cores" in refused(write(raw, mixed), "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "got"),
    [
        (None, "got No such file"),
        ("no json", "got no JSON"),
        ("[]", "got a list"),
        ('{"rows": []}', "got an object with rows"),
        ('{"benchmarks": []}', 'got an empty list "benchmarks"'),
        ('{"benchmarks": [{"group": "g", "extra_info": {"op": "q_sample"}}]}', "expected one of throughput, overhead, .* got None"),
        ('{"benchmarks": [{"group": "g", "extra_info": {"kind": "import", "peer": "us"}}]}', "expected one of limit, .* got 'us'"),
        ('{"benchmarks": [{"group": "g", "extra_info": {"kind": "import"}}]}', r"g: stats\['median'\]: expected seconds, got None"),
        ('{"benchmarks": [{"group": "g", "extra_info": {"kind": "import"}, "stats": {"median": 1}}]}', 'expected "cpu" or a GPU'),
    ],
)
def test_other_files_are_refused(tmp_path, out, text, got):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    said = refused(path, "--out", out)
    expected = f"report: {path}: expected the JSON that `pytest benchmarks --benchmark-json=FILE` writes"
    assert said.startswith(expected) and re.search(got, said)


def test_a_peer_twice_in_a_case_is_refused(raw, out):
    twice = results()
    twice["benchmarks"].append(twice["benchmarks"][0])
    assert "expected one entry for each peer, got 2 of limit" in refused(write(raw, twice), "--out", out)


def test_no_file_is_refused(capsys):
    assert refused() == "2"
    assert "FILE: expected pytest-benchmark's JSON, or --pages, or --check" in capsys.readouterr().err


def test_without_matplotlib(raw, out, monkeypatch):
    monkeypatch.setattr(plots, "plots", plots.plots.draws)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib: not installed" in refused(raw, "--out", out)


# ---- plots -----------------------------------------------------------------------------------------------------------


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    """As WCAG 2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(scope="module")
def svgs(tmp_path_factory):
    raw = write(tmp_path_factory.mktemp("plots") / "raw.json", results())
    return plots.plots(measured.joined([raw]))


def test_colours_have_contrast_on_light_and_dark_pages():
    pages = plots.COLOURS["page"]
    assert pages == ("#ffffff", "#0d1117")
    for role, colours in plots.COLOURS.items():
        for page, colour in zip(pages, colours, strict=True):
            assert role in ("page", "grid") or contrast(page, colour) >= 4.5, f"{role} {colour} on {page}"
    assert len({light for light, _ in plots.COLOURS.values()}) == len(plots.COLOURS)  # or one would be darkened as another


def test_every_colour_of_a_plot_has_its_dark_one(svgs):
    light = {light: dark for light, dark in plots.COLOURS.values()}
    for name, svg in svgs.items():
        style = re.search(r"<style>\n@media \(prefers-color-scheme: dark\) {\n(.*?)\n}\n</style>", svg, re.DOTALL)[1]
        darker = dict(re.findall(r'\[style\*="((?:fill|stroke): #\w+)"\] { ((?:fill|stroke): #\w+) !important }', style))
        tree = xml.fromstring(svg)
        used = set()
        for element in tree.iter():
            assert not {"fill", "stroke"} & element.attrib.keys(), name  # the rules look at styles
            declared = re.findall(r"(fill|stroke): ([^;]+)", element.get("style", ""))
            used |= {(what, colour) for what, colour in declared if colour != "none"}
            if element.tag.endswith("}text"):
                assert ("fill", plots.light("text")) in declared, name
        assert len(used) > 3
        for what, colour in used:
            assert darker[f"{what}: {colour}"] == f"{what}: {light[colour]}", name
        (background, *_) = [e.get("style") for e in tree.iter() if e.tag.endswith("}path")]
        assert background == f"fill: {plots.light('page')}", name  # hence readable whatever the page's own theme is


def test_plots_show_the_peers_and_the_limit(svgs):
    assert {*svgs} == {*plots.PLOTS}
    time = svgs["time_per_element.svg"]
    assert all(f">{peer}</text>" in time for peer in ("limit", "fastgen", "eager", "torch.compile", "diffusers"))
    assert all(f">{call}" in time for call in ("ddpm_step(seed=, out=)", "q_sample(seed=, out=)", "bce_with_logits"))
    assert re.search(rf'stroke-dasharray: [\d.,]+;[^"]*stroke: {plots.light("limit")}', time)
    assert ">µs per call</text>" in svgs["overhead.svg"]
    assert ">threads" in svgs["threads.svg"] and ">peak memory of the work, MB</text>" in svgs["end_to_end.svg"]


def test_bars_warn_where_a_peer_wins(tmp_path):
    def drawn(times):
        found = results() | {"benchmarks": throughput("bce_with_logits", SIZES[0], {"limit": 0.5, "fastgen": 1.0, "eager": times})}
        return plots.plots(measured.joined([write(tmp_path / "b.json", found)]))["ratios.svg"]

    warning = f'style="fill: {plots.light(plots.WINS)}'
    assert warning in drawn(0.8125) and "0.81 ×, the peer wins" in drawn(0.8125)
    assert warning not in drawn(1.25) and "the peer wins" not in drawn(1.25)


def test_plots_without_numbers_are_left_out(tmp_path, raw, out):
    """And an old one goes."""
    report.main([str(raw), "--out", str(out)])
    assert (out / "amd-epyc-2-cores/threads.svg").exists()
    found = results() | {"benchmarks": throughput("bce_with_logits", SIZES[0])}
    report.main([str(write(tmp_path / "b.json", found)), "--out", str(out)])
    left = files(out / "amd-epyc-2-cores")
    assert {*left} == {"benchmarks.json", "report.md", "time_per_element.svg", "ratios.svg"}
    assert "Not measured." in section(left["report.md"].decode(), "Threads") and b"threads.svg" not in left["report.md"]


def test_the_same_numbers_give_the_same_bytes(raw, out):
    """In another process, with another hash seed, other settings of matplotlib and another name of the file."""
    report.main([str(raw), "--out", str(out)])
    first = files(out / "amd-epyc-2-cores")
    (raw.parent / "matplotlibrc").write_text("font.size: 20\nsvg.fonttype: path\naxes.linewidth: 3\n")
    again = raw.rename(raw.with_name("again.json"))
    environment = {"PYTHONPATH": str(report.ROOT), "PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(raw.parent)}
    command = [sys.executable, "-m", "benchmarks.report", again, "--out", out / "other"]
    subprocess.run(command, env=environment, cwd=raw.parent, check=True, stdout=subprocess.DEVNULL)
    assert files(out / "other/amd-epyc-2-cores") == first


# ---- pages -----------------------------------------------------------------------------------------------------------

PAGES = (report.PAGE, report.README)


def test_the_page_tells_runs_apart(raw):
    """By day, backend and instruction set, with the commits of each."""
    found = measured.joined([raw])
    first = found.environments[0]
    later = [first | {"capability": "AVX2", "datetime": "2027-01-02T03:04:05", "commit": commit} for commit in ("abc", "def")]
    found.environments.extend(later)
    said = " ".join(" ".join(figures.device(found, "results", None)).split())
    assert said.count("; cpp, AVX2, 2027-01-02, commit abc and def): float32") == 1


def test_the_page_has_the_figures(page):
    text = page.read_text()
    assert text.startswith(f"# before\n\n{report.BEGIN}\n\nMeasured on AMD EPYC, 2 cores, torch 2.13.0+cpu")
    assert text.endswith(f"\n\n{report.END}\n\n## after\n") and "yesterday" not in text
    assert row(text, "call", "beside")[2:] == ["1M elements", "16M elements", "share of the limit, 16M"]
    assert row(text, "`ddpm_step(seed=, out=)`")[1:] == ["eager with `randn_like`", "10 ×", "10 ×", "0.80"]
    assert row(text, "`ddpm_step(noise=, out=)`")[2:4] == ["0.80", "0.80"]
    assert row(text, "`q_sample(noise=, out=)`")[2:4] == ["not measured"] * 2
    flat = " ".join(text.split())
    assert " (cpp, AVX512, " in flat and flat.count(", commit ") == 1  # of one run
    assert "A call on 16 elements takes 4.0 µs, 4.0 times as long as `torch.add`." in flat
    assert "`import fastgen` adds 31 ms to `import torch`." in flat
    assert "A peer is faster in 2 of 54 comparisons" in flat
    assert "`bce_with_logits` (float32, channels_last, 1M elements), eager in 0.81 × our time" in flat
    assert "Of our 2 aims, 1 is missed and 1 is too noisy to judge:" in flat
    assert "- `discriminator_loss, forward + backward`: beside eager 1.40 × (float32, 128 elements); we want 4 ×" in flat
    assert row(text, '`DDPMScheduler.step`, `rng="fused"`')[1:] == ["12 ×", "12 ×"]
    assert row(text, "`add_noise`")[1:] == ["not measured", "not measured"]
    assert row(text, "GAN training")[1:4] == ["30.00 iterations/s", "32.00 iterations/s (eager)", "0.94 ×"]
    assert "22.9 ms with diffusers' scheduler, 9.08 ms in plain PyTorch" in flat
    assert "36 instructions per element on sm_90, 2 of them special functions" in flat
    assert "none of 2 CUDA kernels spills" in flat
    assert "Of 2 Triton kernels, for sm_90, gfx942, 1 spill; the same step: 51 instructions per element on sm_90." in flat
    assert max(map(len, (line for line in text.splitlines() if not line.startswith(("|", "-", "!"))))) <= 132


def block(path, entries):
    """The page's figures of these entries, without machine code."""
    found = measured.joined([write(path / "raw.json", results() | {"benchmarks": entries})])
    return figures.block([found], "results", None, {})


@pytest.mark.parametrize("kind", measured.KINDS)
def test_page_of_one_kind_alone(tmp_path, kind):
    """Whatever is missing is said to be so."""
    entries = [entry for entry in results()["benchmarks"] if entry["extra_info"]["kind"] == kind]
    text = " ".join(block(tmp_path, entries).split())
    for part, said in {
        "overhead": "What a call on 16 elements costs: not measured.",
        "end_to_end": "Whole programs with fastgen and without: not measured.",
        "import": "What `import fastgen` adds to `import torch`: not measured.",
        "throughput": "How the time per element varies with the size: not measured.",
    }.items():
        assert (said in text) == (part != kind), said
    assert "Their machine code: not measured" in text and "robot_policy.py)): not measured." in text


def test_targets_of_small_calls_and_of_the_limit_in_the_page(tmp_path):
    """Told as people speak of them: how much longer, which share."""
    entries = [entry for entry in results()["benchmarks"] if entry["extra_info"].get("elements") in (16, SIZES[1])]
    for entry in entries:
        if entry["extra_info"]["peer"] == "limit" and entry["extra_info"]["op"] == "ddpm_step":
            entry["extra_info"] |= {"met": "NO", "target": 0.9}
    text = block(tmp_path, entries)
    assert "- `ddpm_step(seed=), t int`: the time of `torch.add` 4.00 × on 16 elements; we want at most 1.1 ×\n" in text
    assert "- `ddpm_step(seed=, out=)`: share of the limit, `copy`, 0.800 (float32, 1M elements); we want 0.9\n" in text


def test_flatness_in_the_page(tmp_path):
    """Without the backward of a loss, which writes new gradients."""
    times = {"q_sample(seed=, out=)": (0.5, 0.6), "bce_with_logits": (0.9, 0.9), "discriminator_loss": (1.0, 5.0)}
    entries = []
    for call, each in times.items():
        for elements, ns in zip(SIZES[1:], each, strict=True):
            entries += throughput(call, elements, ns=ns)
    text = " ".join(block(tmp_path, entries).split())
    assert "From 1M to 16M elements the time per element of the calls without a backward varies 1.00 to 1.20 times" in text


def checked(project, out):
    report.main(["--check", str(project), "--out", str(out)])


def test_check_passes_after_pages_and_fails_after_an_edit(project, page, out, capsys):
    checked(project, out)
    text = page.read_text()
    page.write_text(text.replace("| 40 × |", "| 41 × |", 1))
    capsys.readouterr()
    assert "make figures" in refused("--check", project, "--out", out)
    said = capsys.readouterr().out
    assert re.search(r"^-\|.* 41 × \|", said, re.MULTILINE) and re.search(r"^\+\|.* 40 × \|", said, re.MULTILINE)
    report.main(["--pages", str(project), "--out", str(out)])
    assert page.read_text() == text
    page.write_text(text.replace("## after", "## edited"))  # the rest of the page is free
    checked(project, out)
    readme = project / report.README
    readme.write_text(readme.read_text().replace("10 ×", "11 ×", 1))
    assert "make figures" in refused("--check", project, "--out", out)
    assert str(readme) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["report.md", "ratios.svg", "benchmarks.json"])
def test_check_fails_where_a_result_was_edited(project, out, capsys, name):
    file = out / "amd-epyc-2-cores" / name
    file.write_text(file.read_text() + "\n")
    refused("--check", project, "--out", out)
    assert str(file) in capsys.readouterr().out
    file.write_text(file.read_text()[:-1])
    checked(project, out)


def test_check_fails_where_a_plot_is_missing_or_left_over(project, out, capsys):
    file = out / "amd-epyc-2-cores/threads.svg"
    kept = file.read_text()
    file.unlink()
    refused("--check", project, "--out", out)
    assert str(file) in capsys.readouterr().out
    file.write_text(kept)
    path = out / "amd-epyc-2-cores/benchmarks.json"
    found = json.loads(path.read_text())
    found["benchmarks"] = [entry for entry in found["benchmarks"] if entry["extra_info"]["kind"] != "threads"]
    write(path, found)
    refused("--check", project, "--out", out)
    assert f"--- {file}" in capsys.readouterr().out


@pytest.mark.parametrize("name", PAGES)
def test_without_marks(project, out, name):
    (project / name).write_text("# no block\n")
    assert refused("--check", project, "--out", out) == (
        f"report: {project / name}: expected one block from {report.BEGIN} to {report.END}, got none"
    )


def test_without_results(project, tmp_path, out):
    assert f"report: {tmp_path}: expected <device>/benchmarks.json" in refused("--check", project, "--out", tmp_path)
    moved = (out / "amd-epyc-2-cores").rename(out / "elsewhere")
    assert f"{moved / 'benchmarks.json'}: expected the results of elsewhere, got those of AMD EPYC" in refused(
        "--check", project, "--out", out
    )


@pytest.mark.parametrize("name", PAGES)
def test_pages_of_the_repository_have_a_place_for_the_figures(name):
    text = (report.ROOT / name).read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1 and text.index(report.BEGIN) < text.index(report.END)


def test_readme_has_one_sentence_of_the_figures(project):
    text = (project / report.README).read_text()
    assert text.startswith(f"# before\n\n{report.BEGIN}\n\nMeasured on AMD EPYC, 2 cores with 16M float32 elements: ")
    assert text.endswith(f"\n\n{report.END}\n\n## after\n") and "yesterday" not in text
    flat = " ".join(text.split())
    assert "`ddpm_step(seed=, out=)` is 10 × as fast as eager PyTorch and 40 × as fast as `torch.compile`; `q_sample" in flat
    assert "most of whose time is the network's, are 0.94 to 2.0 ×" in flat
    assert "[How fast](docs/performance.md)" in flat


def test_readme_without_numbers(tmp_path):
    for kind, said in (
        ("import", "cores: single ops: not measured; whole programs: not measured."),
        ("end_to_end", "cores: single ops: not measured; whole programs, "),
    ):
        entries = [entry for entry in results()["benchmarks"] if entry["extra_info"]["kind"] == kind]
        found = measured.joined([write(tmp_path / "raw.json", results() | {"benchmarks": entries})])
        assert said in " ".join(figures.headline([found], report.PAGE).split())


def test_rates_and_their_quotient_are_of_one_statistic(tmp_path):
    """A median of paired ratios beside rates of medians reads as an error: 14.1 against 12.8 steps/s, 0.96 ×."""
    entries = case("training", 0.1, {"fastgen": 1.0, "eager": 0.955}, kind="end_to_end", what="DDPM training", unit="steps/s")
    for entry, rate in zip(entries, (12.5, 12.5 / 1.1), strict=True):
        entry["extra_info"]["rate"] = rate
    found = measured.joined([write(tmp_path / "raw.json", results() | {"benchmarks": entries})])
    (training,) = found.cases
    assert training.ratio("eager") == pytest.approx(1.1, rel=1e-5) and training.ratio("eager", "q3") < 1.01
    assert row("\n".join(figures.programs(found)), "DDPM training")[1:4] == ["12.50 steps/s", "11.36 steps/s (eager)", "1.1 ×"]
    assert row("\n".join(report.end_to_end(found.cases)), "DDPM training")[2:6] == ["12.50", "11.36", "eager", "1.10 (0.907–1.00)"]
    assert not found.lost


def test_rates_of_the_page_of_the_repository():
    """Whoever divides the two rates finds the third number."""
    text = (report.ROOT / report.PAGE).read_text()
    table = re.search(r"^\| whole programs \|.*\n\|[-: |]*\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    for line in table.splitlines():
        _, ours, theirs, times, *_ = (cell.strip() for cell in line.strip("|").split(" | "))
        ours, theirs, times = (float(re.match(r"[\d.]+", cell)[0]) for cell in (ours, theirs, times))
        assert ours / theirs == pytest.approx(times, abs=0.051 if times >= 1 else 0.0051), line
