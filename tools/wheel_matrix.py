"""Checks a wheel beside the newest torch of every minor version from 2.10 on, and writes the table of docs/versions.md.

    python tools/wheel_matrix.py dist/*.whl [--torch 2.13 …]

Plain versions and "+cpu" builds, as tools/environments.py finds them. Each runs on another of the Pythons found, and the last minor
version before 2.10 shows what an older one gets. What fails becomes a row; the exit status tells.
"""

import argparse
import sys
import time
from pathlib import Path

from environments import MATRIX, answers_of, environment_of, failed, install, offered, pip, pythons, table, write_page

OLDEST = (2, 10)
CHECKS = ("imported", "symbols", "ops", "opcheck", "compile")


def rows(found):
    """(torch version, Python) of each row, and the minor versions that have no CPU build."""
    releases = offered(found)
    minors = sorted({minor for kinds in releases.values() for minor in kinds[""]})
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


def check(torch, python, interpreter, wheel):
    """What tools/check_wheel.py says with the wheel installed beside that torch, or why it could not be."""
    environment = environment_of(torch, python)
    answers = {"environment": f"{torch}, , Python {python}"}
    try:
        install(environment, interpreter, torch)
        pip(environment / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel))
    except RuntimeError as error:
        return answers | {"imported": str(error)}
    # a cache of its own: what another torch compiled must not be taken for this one's
    own = {"TORCHINDUCTOR_CACHE_DIR": str(environment / "inductor")}
    return answers | answers_of(environment, "check_wheel.py", CHECKS, own)


def written(results, without, wheel):
    rows = []
    for answers in results:
        torch, build, python = answers["environment"].split(", ")
        rows.append([torch, build, python.removeprefix("Python "), *(answers.get(name, "–") for name in CHECKS)])
    note = f"{wheel.name}, {time.strftime('%Y-%m-%d')}, without a GPU: no kernel of the CUDA library was launched."
    if without:
        note += f" The index had no CPU build of {', '.join(without)}; the CUDA builds run the same CPU ops."
    head = ("torch", "build", "Python", "imported", "symbols resolved", "CPU ops", "opcheck", "compile")
    return "\n".join([*table(head, rows), "", note])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", help="only these minor versions, and docs/versions.md is left alone")
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
    text = written(results, without, arguments.wheel)
    print(text)
    if not arguments.torch:
        write_page("wheel-matrix", text)
    sys.exit(failed(results, CHECKS))


if __name__ == "__main__":
    main()
