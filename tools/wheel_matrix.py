"""Installs a wheel beside the newest torch of every minor version from 2.10 on, checks it there, and writes README.md's table.

    python tools/wheel_matrix.py dist/*.whl [--torch 2.13 …]

What there is, pip is asked: versions as they are on PyPI (on Linux x86-64 the CUDA builds, with the nvidia-* packages that they
need), and "+cpu" builds where the index that pip is configured with has them. Each runs on another of the Pythons found, and the
last minor version before 2.10 shows what an older one gets. The environments are kept in build/matrix for the next run while the
disk has room. What fails becomes a row; the exit status tells.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MATRIX = ROOT / "build/matrix"
OLDEST = (2, 10)
CHECKS = ("imported", "symbols", "ops", "opcheck", "compile")
BEGIN, END = "<!-- wheel-matrix: written by `make wheel-matrix` -->", "<!-- /wheel-matrix -->"
NEEDED, ROOMY = 12 << 30, 25 << 30  # bytes: a CUDA build and its packages with room to spare; below the other, nothing is kept


def pythons():
    """{"3.11": interpreter} of those supported, on the PATH or in pyenv's folder; the one that runs this comes first."""
    candidates = [sys.executable]
    candidates += [shutil.which(f"python3.{minor}") or "" for minor in range(10, 20)]
    candidates += map(str, sorted(Path.home().glob(".pyenv/versions/3.*/bin/python3"), reverse=True))
    found = {}
    for candidate in filter(None, candidates):
        code = "import sys, venv, ensurepip; print('{}.{}'.format(*sys.version_info))"
        run = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        version = run.stdout.strip()
        if run.returncode == 0 and tuple(map(int, version.split("."))) >= (3, 10):
            found.setdefault(version, candidate)
    return found


def offered(python):
    """{minor version: its newest release} of torch that pip has for `python`, of the plain versions and of the +cpu ones."""
    command = [sys.executable, "-m", "pip", "--python", python, "index", "versions", "torch"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    listed = re.search(r"Available versions: (.*)", said)
    releases = {"": {}, "+cpu": {}}
    for version in reversed(listed.group(1).split(", ") if listed else []):  # newest last
        if match := re.fullmatch(r"(\d+)\.(\d+)\.\d+(|\+cpu)", version):
            releases[match.group(3)][int(match.group(1)), int(match.group(2))] = version
    return releases


def rows(found):
    """(torch version, Python) of each row, and the minor versions that have no CPU build."""
    releases = {version: offered(python) for version, python in found.items()}
    minors = sorted({minor for kinds in releases.values() for minor in kinds[""]})
    if not minors:
        sys.exit("pip lists no torch at all: is its index reachable? (pip index versions torch)")
    wanted, without = [], []
    for index, minor in enumerate([minor for minor in minors if minor < OLDEST][-1:] + [m for m in minors if m >= OLDEST]):
        for build in ("", "+cpu") if minor >= OLDEST else ("",):
            fitting = [version for version in found if minor in releases[version][build]]
            if fitting:
                python = fitting[index % len(fitting)]
                wanted.append((releases[python][build][minor], python))
            else:
                without.append("{}.{}".format(*minor))
    return wanted, without


def free():
    return shutil.disk_usage(MATRIX).free


def install(environment, interpreter, torch):
    """A virtual environment with that very build of torch; "===": for "==" a +cpu build would be a newer 2.13.0."""
    if (environment / "installed").exists():
        return
    shutil.rmtree(environment, ignore_errors=True)
    kept = sorted(MATRIX.glob("*/installed"), key=lambda path: path.stat().st_mtime)
    while free() < NEEDED and kept:
        shutil.rmtree(kept.pop(0).parent)
    if free() < NEEDED:
        raise RuntimeError(f"not installed: {free() >> 30} GB free on the disk")
    pip(interpreter, "-m", "venv", str(environment))
    # torch's metadata name everything that importing it needs; pytest and numpy are for the checks
    packages = (f"torch==={torch}", "numpy", "pytest")
    pip(environment / "bin/python", "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-compile", *packages)
    (environment / "installed").touch()


def pip(python, *arguments):
    run = subprocess.run([str(python), *arguments], capture_output=True, text=True)
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if "ERROR" in line or "Error" in line]
        raise RuntimeError("not installed: " + (errors[-1] if errors else run.stderr[-200:]).strip())


def check(torch, python, interpreter, wheel):
    """The answers of tools/check_wheel.py: what was reached before it failed or crashed, and what made it stop."""
    environment = MATRIX / f"torch-{torch}-py{python}"
    answers = {"environment": f"{torch}, , Python {python}"}
    try:
        install(environment, interpreter, torch)
        pip(environment / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel))
    except RuntimeError as error:
        return answers | {"imported": str(error)}
    command = [environment / "bin/python", "-I", ROOT / "tools/check_wheel.py"]
    # a cache of its own: what another torch compiled must not be taken for this one's
    own = {"TORCHINDUCTOR_CACHE_DIR": str(environment / "inductor")}
    run = subprocess.run(command, cwd=MATRIX, env=os.environ | own, capture_output=True, text=True)
    for line in run.stdout.splitlines():
        if line.startswith("{"):
            answers |= json.loads(line)
    if run.returncode < 0:
        missing = next((name for name in CHECKS if name not in answers), CHECKS[-1])
        answers[missing] = f"no: ended by signal {-run.returncode}"
    (MATRIX / f"torch-{torch}-py{python}.log").write_text(run.stdout + run.stderr)
    if free() < ROOMY:
        shutil.rmtree(environment)
    return answers


def table(results, without, wheel):
    lines = ["| torch | build | Python | imported | symbols resolved | CPU ops | opcheck | compile |", "| --- " * 8 + "|"]
    for answers in results:
        torch, build, python = answers["environment"].split(", ")
        cells = [torch, build, python.removeprefix("Python "), *(answers.get(name, "–") for name in CHECKS)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    note = f"{wheel.name}, {time.strftime('%Y-%m-%d')}, without a GPU: no kernel of the CUDA library was launched."
    if without:
        note += f" The index had no CPU build of {', '.join(without)}; the CUDA builds run the same CPU ops."
    return "\n".join([*lines, "", note])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", help="only these minor versions, and README.md is left alone")
    arguments = parser.parse_args()
    MATRIX.mkdir(parents=True, exist_ok=True)
    found = pythons()
    wanted, without = rows(found)
    if arguments.torch:
        wanted = [(torch, python) for torch, python in wanted if torch.rpartition(".")[0] in arguments.torch]
    results = []
    for torch, python in wanted:
        start = time.time()
        results.append(check(torch, python, found[python], arguments.wheel.resolve()))
        print(f"{time.time() - start:.0f} s: {results[-1]}", file=sys.stderr, flush=True)
    written = table(results, without, arguments.wheel)
    print(written)
    if not arguments.torch:
        readme = (ROOT / "README.md").read_text()
        before, rest = readme.split(BEGIN)
        (ROOT / "README.md").write_text(f"{before}{BEGIN}\n\n{written}\n\n{END}{rest.split(END)[1]}")
    sys.exit(any(answers.get(name, "no").startswith("no") for answers in results for name in CHECKS))


if __name__ == "__main__":
    main()
