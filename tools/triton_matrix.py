"""Runs the Triton backend under every supported pair of torch and Triton, and writes the table of docs/versions.md.

    python tools/triton_matrix.py [--torch 2.13 …]

The CPU library is this tree's (`make build`): one build serves every torch and Python of the table. What fails, or cannot be had,
becomes a row; the exit status tells.
"""

import argparse
import sys
import time

from environments import MATRIX, answers_of, environment_of, failed, install, offered, pip, pythons, table, write_page

PAIRS = {(2, 10): "3.6.*", (2, 11): "3.6.*", (2, 12): "3.7.1", (2, 13): "3.7.1", (2, 14): "3.8.*", (2, 15): "3.9.*"}
CHECKS = ("triton", "imported", "interpreted", "compiled")


def rows(found, minors=PAIRS):
    """(minor version, its newest torch or None, Triton, Python) of each pair; CPU builds where there are any, being small."""
    releases = offered(found)
    wanted = []
    for index, minor in enumerate(minors):
        build = "+cpu" if any(minor in kinds["+cpu"] for kinds in releases.values()) else ""
        fitting = [version for version in found if minor in releases[version][build]]
        # another Python for each, as in the matrix of wheels, whose environments then serve here too
        python = fitting[(index + 1) % len(fitting)] if fitting else ""
        torch = releases[python][build][minor] if fitting else None
        wanted.append((minor, torch, PAIRS[minor], python))
    return wanted


def absent(minor, triton):
    return {"environment": "{}.{}, , ".format(*minor), "triton": triton, "imported": "not installed: pip has no such torch"}


def check(torch, triton, python, interpreter):
    """What tools/check_triton.py says beside that pair, or why it could not be installed."""
    environment = environment_of(torch, python)
    answers = {"environment": f"{torch}, , Python {python}", "triton": triton}
    try:
        install(environment, interpreter, torch)
        # a CUDA build has brought it
        pip(environment / "bin/python", "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-compile", f"triton=={triton}")
    except RuntimeError as error:
        return answers | {"imported": str(error)}
    # a cache of its own: what another Triton compiled must not be taken for this one's
    own = {"TRITON_CACHE_DIR": str(environment / "triton"), "TRITON_INTERPRET": "0", "FASTGEN_BACKEND": ""}
    return answers | answers_of(environment, "check_triton.py", CHECKS, own)


def written(results):
    rows = []
    for answers in results:
        torch, build, python = answers["environment"].split(", ")
        rows.append([torch, build, python.removeprefix("Python "), *(answers.get(name, "–") for name in CHECKS)])
    head = ("torch", "build", "Python", "Triton", "imported", "tests in the interpreter", "kernels compiled for sm_90 and gfx942")
    note = f"{time.strftime('%Y-%m-%d')}, without a GPU: no kernel was launched on one. CUDA builds where pip had no CPU build."
    return "\n".join([*table(head, rows), "", note])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", help="only these minor versions, and docs/versions.md is left alone")
    arguments = parser.parse_args()
    MATRIX.mkdir(parents=True, exist_ok=True)
    found = pythons()
    results = []
    minors = [minor for minor in PAIRS if not arguments.torch or "{}.{}".format(*minor) in arguments.torch]
    for minor, torch, triton, python in rows(found, minors):
        start = time.time()
        answers = check(torch, triton, python, found[python]) if torch else absent(minor, triton)
        results.append(answers)
        print(f"{time.time() - start:.0f} s: {answers}", file=sys.stderr, flush=True)
    text = written(results)
    print(text)
    if not arguments.torch:
        write_page("triton-matrix", text)
    sys.exit(failed(results, CHECKS))


if __name__ == "__main__":
    main()
