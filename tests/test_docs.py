"""README.md and docs/: their blocks of Python run, their links lead somewhere, README stays short, the reference has every name.

A block that cannot run here says so in the line before it, `<!-- not run: REASON -->`; `NOT_RUN` counts these.
"""

import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgen

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "docs").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
README, CONTRACT = ROOT / "README.md", ROOT / "docs/random_numbers.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
MOST_WORDS = 1300
NOT_RUN: dict[str, int] = {}  # page: how many of its blocks do not run

BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+) -->\n+)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """(line, code, why it is not run or None) of each block."""
    text = page.read_text()
    return [(text.count("\n", 0, found.start("code")) + 1, found["code"], found["reason"]) for found in BLOCK.finditer(text)]


# ---- code ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_before(monkeypatch, tmp_path):
    """Ends what a page's code leaves behind: patches of other libraries, seeds, threads, files."""
    from fastgen.drop_in import _patch

    made, init = [], _patch.Patch.__init__
    monkeypatch.setattr(_patch.Patch, "__init__", lambda self, *args, **kwargs: init(self, *args, **kwargs) or made.append(self))
    monkeypatch.chdir(tmp_path)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    yield
    for patch in reversed(made):
        patch.unpatch()
    torch.set_rng_state(state)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread", "as_before")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_code_runs(page):
    """The blocks of a page in their order, in one namespace."""
    if "diffusers" in page.read_text():
        pytest.importorskip("diffusers")
    names = {"__name__": "page"}
    torch.manual_seed(0)
    for line, code, reason in blocks(page):
        if reason is None:
            # as many lines before it as on the page, so that a traceback has the page's
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def test_blocks_that_do_not_run():
    found = {name_of(page): [reason for *_, reason in blocks(page) if reason] for page in PAGES}
    for page, reasons in found.items():
        for reason in reasons:
            print(f"{page}: not run: {reason}")
    assert {page: len(reasons) for page, reasons in found.items() if reasons} == NOT_RUN


def test_every_block_of_python_is_found():
    """None is indented, or fenced otherwise."""
    for page in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~)\s*(?:py|python)\b", page.read_text(), re.MULTILINE)
        assert len(fences) == len(blocks(page)), name_of(page)


# ---- README ----------------------------------------------------------------------------------------------------------


def test_readme_is_short():
    """Code, tables and all."""
    words = len(README.read_text().split())
    assert words <= MOST_WORDS, f"README.md has {words} words"


def test_readme_says_what_has_not_run_where_it_promises_cuda():
    """In its first screen."""
    assert re.search(r"no kernel has run on a GPU", " ".join(README.read_text().split()[:150]), re.IGNORECASE)


# ---- links -----------------------------------------------------------------------------------------------------------


def slug(heading):
    """A heading's anchor, as GitHub and mkdocs make it of ASCII."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def anchors(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links(page):
    """In plain Markdown, too, which no mkdocs builds; links to elsewhere are not followed."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^()#\s]*)(?:#([^()\s]*))?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name_of(page)}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name_of(page)}: {target}#{anchor}"


def test_every_page_is_in_the_site():
    """mkdocs warns of a page that is not; but of no page that is not there at all."""
    nav = set(re.findall(r"([\w/]+\.md)\s*$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert nav == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page != README}


# ---- the reference ---------------------------------------------------------------------------------------------------


def test_the_reference_has_every_public_name():
    text = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    named = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(named) == len(set(named))
    assert {name.removeprefix("fastgen.") for name in named if name.count(".") == 1} == set(fastgen.__all__)
    listed = set(re.findall(r"\[`(\w+)`\]", (ROOT / "docs/api/index.md").read_text()))
    assert set(fastgen.__all__) <= listed


# ---- the contract of random numbers ----------------------------------------------------------------------------------


def rows_of(head):
    """The cells of the table of the contract that begins with this cell."""
    table = re.search(rf"^\| {head} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", CONTRACT.read_text(), re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.fixture(scope="module")
def contract():
    """The implementation that the page shows."""
    names = {}
    exec(blocks(CONTRACT)[0][1], names)
    return names


def hexadecimal(cell):
    return [int(word, 16) for word in cell.split()]


def test_known_answers_of_the_contract(contract):
    rows = rows_of("counter")
    assert len(rows) == 3
    for counter, key, words in rows:
        as_arrays = [np.array([word], np.uint32) for word in hexadecimal(counter)]
        assert [int(word[0]) for word in contract["philox4x32_10"](*as_arrays, hexadecimal(key))] == hexadecimal(words)


VECTORS = rows_of("seed")


@pytest.mark.parametrize("seed, offset, b, elements, words, normals", VECTORS, ids=[f"{row[0]}-{row[1]}" for row in VECTORS])
def test_vectors_of_the_contract(contract, backend, device, seed, offset, b, elements, words, normals):
    seed, offset, b, first = int(seed), int(offset), int(b), int(elements.split()[0])
    assert elements == f"{first} … {first + 3}" and first % 4 == 0
    shown = np.array(normals.split(), np.float64)
    assert [int(word) for word in contract["words"](first + 4, seed, offset, b)[:, first // 4]] == hexadecimal(words)
    assert contract["words"](1, 0).dtype == np.uint32
    np.testing.assert_allclose(contract["normals"](first + 4, seed, offset, b)[first:], shown, rtol=0, atol=5.1e-10)
    for dtype, tolerance in ((torch.float64, 5.1e-10), (torch.float32, 2e-5)):
        z = fastgen.randn((b + 1, first + 4), seed=seed, offset=offset, dtype=dtype, device=device)
        np.testing.assert_allclose(z[b, first:].cpu().numpy(), shown, rtol=0, atol=tolerance)


def test_vectors_are_of_all_kinds():
    """A negative seed and one past 2⁶³, an offset past 2³², a sample and a group that are not the first."""
    seeds, offsets, samples, elements = ([int(row[k].split()[0]) for row in VECTORS] for k in range(4))
    assert min(seeds) < 0 and max(seeds) >= 2**63 and max(offsets) > 2**32 and max(samples) > 0 and max(elements) > 0


# ---- files and versions that pages name -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_files_that_are_named_are_there(page):
    """`fastgen/schedule.py`, say; what stands for several (`csrc/<op>/`, `*`, `…`) is not looked at."""
    named = re.findall(
        r"`(?:\.\./)*((?:csrc|fastgen|tests|benchmarks|tools|examples|requirements|docs)/[\w./-]*)`", page.read_text()
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_commands_that_are_named_are_there(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", page.read_text(), re.MULTILINE)) <= targets
    modules = re.findall(r"python3? -m ((?:benchmarks|tools)\.\w+)", page.read_text())
    assert all((ROOT / module.replace(".", "/")).with_suffix(".py").exists() for module in modules)


def test_one_version():
    project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    cited = re.search(r"^version: (.*)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    changed = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert project == cited == changed == fastgen.__version__
