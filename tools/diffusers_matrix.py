"""Runs the tests of `fastgen.drop_in.diffusers` with several releases of diffusers, and writes which code they have run.

    python tools/diffusers_matrix.py                        # the newest of every minor version from 0.30 on: half an hour
    python tools/diffusers_matrix.py --diffusers 0.36.0 …   # only these releases, whatever the table says of others
    python tools/diffusers_matrix.py --fingerprints         # no tests: after a change of what a fingerprint is

The releases are installed one by one into folders of build/matrix, before this environment on the path, with what they need but
for torch and NumPy, which are this environment's. Every method that the drop-in stands for is taken for known while the tests run;
if all pass, its fingerprint goes into fastgen/drop_in/diffusers/_known_code.py, which is written anew, with the number of tests and
the date. A release with failures is named on the screen and not in the table, and the exit status tells.

On 2026-11-24, with torch 2.13, all tests passed with 0.32.2, 0.34.0, 0.36.0, 0.37.1 and 0.42.1; the newest releases of the other
minor versions from 0.32 on have one of these codes. 0.31.0 failed: up to that, DDPM's `previous_timestep` is t − T/n also where
the spacing is not "leading"; and 0.30.3, read and not run, gives one tensor from `step(return_dict=False)` and not two. Where they
are installed, what differs runs diffusers' own code.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time

from environments import MATRIX, ROOT, pip

TABLE = ROOT / "fastgen/drop_in/diffusers/_known_code.py"
FIRST = (0, 30)
HEAD = '''"""The code of diffusers that the tests of `fastgen.drop_in.diffusers` have run; written by tools/diffusers_matrix.py."""

'''


def releases():
    """The newest of every minor version, newest first."""
    said = subprocess.run([sys.executable, "-m", "pip", "index", "versions", "diffusers"], capture_output=True, text=True).stdout
    newest = {}
    for version in re.search(r"Available versions: (.*)", said).group(1).split(", "):
        if match := re.fullmatch(r"(\d+)\.(\d+)\.\d+", version):
            newest.setdefault((int(match.group(1)), int(match.group(2))), version)
    return [version for minor, version in newest.items() if minor >= FIRST]


def check(version, fingerprints_only):
    """What tools/check_diffusers.py says of a release."""
    import numpy

    folder = MATRIX / f"diffusers-{version}"
    if not (folder / "diffusers").exists():
        packages = (f"diffusers=={version}", f"numpy=={numpy.__version__}")
        pip(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(folder), *packages)
    environment = os.environ | {"PYTHONPATH": str(folder), "FASTGEN_BACKEND": ""}
    command = [sys.executable, str(ROOT / "tools/check_diffusers.py"), *(["--fingerprints"] if fingerprints_only else [])]
    run = subprocess.run(command, cwd=MATRIX, env=environment, capture_output=True, text=True)
    (MATRIX / f"diffusers-{version}.log").write_text(run.stdout + run.stderr)
    answers = {}
    for line in run.stdout.splitlines():
        answers |= json.loads(line)
    if answers.get("diffusers") != version:
        answers["tested"] = f"no: {answers.get('diffusers', run.stderr[-200:])} was imported"
    return answers


def table():
    """(RELEASES, KNOWN) as they are written now."""
    space = {}
    exec(TABLE.read_text(), space)
    return space.get("RELEASES", {}), space.get("KNOWN", {})


def write(releases, known):
    """releases: version → how many tests passed and when; known: name of a method → fingerprints."""
    lines = ["RELEASES = {  # how many tests passed, and when"]
    for version in sorted(releases, key=lambda version: [*map(int, version.split("."))]):
        lines.append(f'    "{version}": "{releases[version]}",')
    lines += ["}", "KNOWN = {"]
    for name, codes in known.items():
        inside = [f'"{code}",' for code in codes]
        if len(codes) == 1:
            lines.append(f'    "{name}": ({inside[0]}),')
        else:
            lines += [f'    "{name}": (', *(f"        {code}" for code in inside), "    ),"]
    TABLE.write_text(HEAD + "\n".join([*lines, "}", ""]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--diffusers", nargs="+", help="only these releases; what is known of others stays")
    parser.add_argument("--fingerprints", action="store_true", help="those of the releases in the table anew, without tests")
    arguments = parser.parse_args()
    MATRIX.mkdir(parents=True, exist_ok=True)
    tested, known = table() if arguments.diffusers or arguments.fingerprints else ({}, {})
    if arguments.fingerprints:
        known = {}
    failed = False
    for version in arguments.diffusers or (tested if arguments.fingerprints else releases()):
        start = time.time()
        try:
            answers = check(version, arguments.fingerprints)
        except RuntimeError as error:
            answers = {"tested": f"no: {error}"}
        print(f"{time.time() - start:.0f} s: diffusers {version}: {answers.get('tested')}", file=sys.stderr, flush=True)
        if str(answers.get("tested", "no")).startswith("no") or "code" not in answers:
            failed = True
            continue
        if not arguments.fingerprints:
            tested[version] = f"{answers['tested']} tests, {time.strftime('%Y-%m-%d')}"
        for name, code in answers["code"].items():
            known[name] = tuple(dict.fromkeys((*known.get(name, ()), code)))
    write(tested, known)
    sys.exit(failed)


if __name__ == "__main__":
    main()
