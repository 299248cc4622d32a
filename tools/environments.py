"""Environments with another torch, what a script says in one, and a table in the docs: what the two matrices share.

What there is, pip is asked: versions as they are on PyPI (on Linux x86-64 the CUDA builds, with the nvidia-* packages that they
need), and "+cpu" builds where the index that pip is configured with has them. The environments are kept in build/matrix for the
next run while the disk has room.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MATRIX = ROOT / "build/matrix"
PAGE = ROOT / "docs/versions.md"  # which has the tables
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


def offered(found):
    """{Python: {"" or "+cpu": {minor version: its newest release}}} of torch, of the plain versions and of the +cpu ones."""
    releases = {}
    for name, python in found.items():
        command = [sys.executable, "-m", "pip", "--python", python, "index", "versions", "torch"]
        said = subprocess.run(command, capture_output=True, text=True).stdout
        listed = re.search(r"Available versions: (.*)", said)
        releases[name] = {"": {}, "+cpu": {}}
        for version in reversed(listed.group(1).split(", ") if listed else []):  # newest last
            if match := re.fullmatch(r"(\d+)\.(\d+)\.\d+(|\+cpu)", version):
                releases[name][match.group(3)][int(match.group(1)), int(match.group(2))] = version
    if not any(kinds[""] for kinds in releases.values()):
        sys.exit("pip lists no torch at all: is its index reachable? (pip index versions torch)")
    return releases


def free():
    return shutil.disk_usage(MATRIX).free


def environment_of(torch, python):
    return MATRIX / f"torch-{torch}-py{python}"


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


def answers_of(environment, script, checks, variables):
    """The answers of a script of tools/report.py's kind: what was reached before it failed or crashed, and what made it stop.

    A log is left beside the environment, which itself is removed where the disk is short of room.
    """
    command = [environment / "bin/python", "-I", ROOT / "tools" / script]
    run = subprocess.run(command, cwd=MATRIX, env=os.environ | variables, capture_output=True, text=True)
    answers = {}
    for line in run.stdout.splitlines():
        if line.startswith("{"):
            answers |= json.loads(line)
    if run.returncode < 0:
        missing = next((name for name in checks if name not in answers), checks[-1])
        answers[missing] = f"no: ended by signal {-run.returncode}"
    environment.with_name(f"{environment.name}-{Path(script).stem}.log").write_text(run.stdout + run.stderr)
    if free() < ROOMY:
        shutil.rmtree(environment)
    return answers


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def markers(name):
    """What a table's place in the page begins and ends with."""
    return f"<!-- {name}: written by `make {name}` -->", f"<!-- /{name} -->"


def write_page(name, written, page=PAGE):
    begin, end = markers(name)
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n\n{written}\n\n{end}{rest.split(end)[1]}")


def failed(results, checks):
    return any(answers.get(name, "no").startswith("no") for answers in results for name in checks)
