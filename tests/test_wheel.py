"""What `make wheel`, `make wheel-matrix` and `make triton-matrix` stand on, in seconds; the whole is in the Makefile."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastgen

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastgen.__file__).parent
LIBRARIES = [path for path in (PACKAGE / "_fastgen_cpu.so", PACKAGE / "_fastgen_cuda.so") if path.exists()]
# What manylinux_2_28 promises: glibc 2.28, and libstdc++ and libgcc_s of GCC 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8,)}


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_no_symbol_is_newer_than_manylinux_2_28(library):
    listed = subprocess.run(["readelf", "-V", "-W", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", listed)
    newer = [f"{name}_{version}" for name, version in needed if tuple(map(int, version.split("."))) > NEWEST[name]]
    assert needed and not newer


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_only_system_and_torch_libraries_are_needed(library):
    """No Python, and no CUDA runtime: it is linked in."""
    listed = subprocess.run(["readelf", "-d", "-W", library], capture_output=True, text=True, check=True).stdout
    needed = {name.split(".so")[0] for name in re.findall(r"Shared library: \[(.*)\]", listed)}
    system = {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "libpthread", "librt", "ld-linux-x86-64"}
    assert needed - system == ({"libtorch_cpu", "libtorch_cuda"} if "cuda" in library.name else {"libtorch_cpu"})


@pytest.fixture
def tool(monkeypatch):
    """Imports a module of tools/."""
    if not (ROOT / "tools").exists():
        pytest.skip("needs the source tree")
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module


def test_the_wheel_has_every_package():
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("needs the source tree")
    (listed,) = re.findall(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    folders = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("*.py")}
    assert set(re.findall(r'"(.*?)"', listed)) == folders


PYPI = "torch (2.12.0)\nAvailable versions: 2.12.0, 2.11.1, 2.11.1+cpu, 2.11.0, 2.10.0, 2.9.1, 2.9.0, 2.8.0, 2.12.0rc1\n"


@pytest.fixture
def pip_lists(tool, monkeypatch):
    done = subprocess.CompletedProcess([], 0, stdout=PYPI)
    monkeypatch.setattr(tool("environments").subprocess, "run", lambda *_, **__: done)


def test_matrix_takes_the_newest_release_of_each_minor_version(tool, pip_lists):
    wanted, without = tool("wheel_matrix").rows({"3.11": "python3.11", "3.12": "python3.12"})
    assert [torch for torch, _ in wanted] == ["2.9.1", "2.10.0", "2.11.1", "2.11.1+cpu", "2.12.0"]
    assert {python for _, python in wanted} == {"3.11", "3.12"} and without == ["2.10", "2.12"]


def test_triton_matrix_has_a_row_for_every_pair(tool, pip_lists):
    """A CPU build where there is one; a version that is not to be had is no reason to leave its row out."""
    matrix = tool("triton_matrix")
    rows = matrix.rows({"3.11": "python3.11"})
    assert [torch for _, torch, _, _ in rows] == ["2.10.0", "2.11.1+cpu", "2.12.0", None, None, None]
    assert rows[-1] == ((2, 15), None, "3.9.*", "")
    missing = matrix.absent((2, 15), "3.9.*")
    assert "| 2.15 |  |  | 3.9.* | not installed: pip has no such torch | – | – |" in matrix.written([missing])
    assert tool("environments").failed([missing], matrix.CHECKS)


def test_matrix_row_of_a_version_that_cannot_be_installed(tool, monkeypatch, tmp_path):
    """It says why, and does not stop the others."""
    monkeypatch.setattr(tool("environments"), "MATRIX", tmp_path)
    monkeypatch.setattr(tool("environments"), "free", lambda: 1 << 30)
    answers = tool("wheel_matrix").check("2.99.0", "3.11", sys.executable, Path("fastgen.whl"))
    written = tool("wheel_matrix").written([answers], ["2.98"], Path("fastgen.whl"))
    assert "| 2.99.0 |  | 3.11 | not installed: 1 GB free on the disk | – | – | – | – |" in written
    assert "no CPU build of 2.98" in written
    answers = tool("triton_matrix").check("2.99.0", "9.9.*", "3.11", sys.executable)
    assert answers["imported"] == "not installed: 1 GB free on the disk" and answers["triton"] == "9.9.*"


@pytest.mark.parametrize("name", ["wheel-matrix", "triton-matrix"])
def test_the_page_has_the_place_of_the_table(tool, name):
    page = tool("environments").PAGE.read_text()
    begin, end = tool("environments").markers(name)
    assert page.count(begin) == page.count(end) == 1 and page.index(begin) < page.index(end)


def test_a_table_is_written_between_its_marks(tool, tmp_path):
    page, (begin, end) = tmp_path / "page.md", tool("environments").markers("wheel-matrix")
    page.write_text(f"# before\n\n{begin}\nyesterday\n{end}\n\nafter\n")
    tool("environments").write_page("wheel-matrix", "| today |", page)
    assert page.read_text() == f"# before\n\n{begin}\n\n| today |\n\n{end}\n\nafter\n"
