"""What `make wheel` and `make wheel-matrix` stand on, in seconds; the whole of it is in the Makefile."""

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
def matrix():
    if not (ROOT / "tools").exists():
        pytest.skip("needs the source tree")
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import wheel_matrix
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return wheel_matrix


PYPI = "torch (2.12.0)\nAvailable versions: 2.12.0, 2.11.1, 2.11.1+cpu, 2.11.0, 2.10.0, 2.9.1, 2.9.0, 2.8.0, 2.12.0rc1\n"


def test_matrix_takes_the_newest_release_of_each_minor_version(matrix, monkeypatch):
    done = subprocess.CompletedProcess([], 0, stdout=PYPI)
    monkeypatch.setattr(matrix.subprocess, "run", lambda *_, **__: done)
    wanted, without = matrix.rows({"3.11": "python3.11", "3.12": "python3.12"})
    assert [torch for torch, _ in wanted] == ["2.9.1", "2.10.0", "2.11.1", "2.11.1+cpu", "2.12.0"]
    assert {python for _, python in wanted} == {"3.11", "3.12"} and without == ["2.10", "2.12"]


def test_matrix_row_of_a_version_that_cannot_be_installed(matrix, monkeypatch, tmp_path):
    """It says why, and does not stop the others."""
    monkeypatch.setattr(matrix, "MATRIX", tmp_path)
    monkeypatch.setattr(matrix, "free", lambda: 1 << 30)
    answers = matrix.check("2.99.0", "3.11", sys.executable, Path("fastgen.whl"))
    written = matrix.table([answers], ["2.98"], Path("fastgen.whl"))
    assert "| 2.99.0 |  | 3.11 | not installed: 1 GB free on the disk | – | – | – | – |" in written
    assert "no CPU build of 2.98" in written


def test_readme_has_the_place_of_the_table(matrix):
    readme = (ROOT / "README.md").read_text()
    assert readme.count(matrix.BEGIN) == readme.count(matrix.END) == 1 and readme.index(matrix.BEGIN) < readme.index(matrix.END)
