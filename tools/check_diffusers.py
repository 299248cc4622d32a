"""Runs the tests of `fastgen.drop_in.diffusers` with the diffusers that is imported, as if its code were known: one line of JSON
for each check.

    PYTHONPATH=FOLDER python tools/check_diffusers.py        # FOLDER: pip install --target FOLDER diffusers==…

What the drop-in asks about, which is what has to be known, comes out as "code". With --fingerprints no tests are run.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

from report import report  # noqa: E402

found = {}


class Trusting(dict):
    """A table of known code that knows all, and notes what it was asked for."""

    def get(self, name, default=None):
        return Noting(name)


class Noting:
    def __init__(self, name):
        self.name = name

    def __contains__(self, code):
        assert code is not None, f"{self.name} has no fingerprint"
        found[self.name] = code
        return True


def code():
    """The fingerprint of each method that the drop-in stands for."""
    table = table_of_known_code()
    table.KNOWN = Trusting()
    import fastgen.drop_in.diffusers.vae

    assert Path(fastgen.__file__).is_relative_to(ROOT), f"{fastgen.__file__} is not of this tree"
    fastgen.drop_in.diffusers.patch().unpatch()
    fastgen.drop_in.diffusers.vae.patch().unpatch()
    table.KNOWN = {name: (value,) for name, value in found.items()}
    return found


def table_of_known_code():
    """The drop-in's module `_known_code`, imported before the package around it, which reads the table while it is imported."""
    name = "fastgen.drop_in.diffusers._known_code"
    spec = importlib.util.spec_from_file_location(name, ROOT / "fastgen/drop_in/diffusers/_known_code.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counting:
    def __init__(self):
        self.passed, self.failed = 0, []

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed
        if report.failed:
            self.failed.append(report.nodeid)


def tested():
    import pytest

    counting = Counting()
    tests = map(str, sorted(ROOT.glob("tests/test_drop_in_diffusers*.py")))
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *tests]
    stdout, sys.stdout = sys.stdout, sys.stderr  # the lines of JSON have stdout for themselves
    try:
        ended = pytest.main(arguments, plugins=[counting])
    finally:
        sys.stdout = stdout
    assert ended == 0, f"{len(counting.failed)} tests failed, {counting.failed[:1]} among them"
    return counting.passed


def version():
    import diffusers

    return diffusers.__version__


if __name__ == "__main__":
    checks = {"diffusers": version, "code": code, "tested": tested}
    if "--fingerprints" in sys.argv:
        checks["tested"] = lambda: 0
    report(checks)
