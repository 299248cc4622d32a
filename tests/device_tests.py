"""What device_on_host.py and device_on_ptx.py share: a copy of the package with a library whose ops run the CUDA kernels' code in
the place of the CPU's, and the tests of the values, which run on it."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
DECLARATIONS = runpy.run_path(str(CSRC / "declarations.py"))
STEMS = DECLARATIONS["DECLARED"]["STEMS"]
SMALLER = 1024  # times: the tensors in which a thread takes several vectors; see kManyItems in csrc/common/index.h
MANY_ITEMS = f"-DFG_MANY_ITEMS={256 * 1024 // SMALLER}"
TESTS = [*(f"tests/test_{op}.py" for op in STEMS), "tests/test_randn_torch_cuda.py"]
TESTS += ["tests/test_half_precision.py", "tests/test_device_code.py"]
TORCH = Path(torch.__file__).parent
LIBRARIES = f"-L{TORCH}/lib -ltorch_cpu"


def op_flags(build: Path, *more: str, library: tuple[str, ...] = ("-DFG_DEVICE_ON_HOST",)) -> str:
    """g++'s, of an op's file in such a library."""
    flags = [
        *("-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-march=native", "-Wno-unknown-pragmas"),
        *(*library, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", MANY_ITEMS),
    ]
    includes = [f"-I{CSRC}", f"-I{build}", f"-isystem {TORCH}/include", f"-isystem {TORCH}/include/torch/csrc/api/include"]
    return " ".join((*(f"'{flag}'" for flag in (*flags, *more)), *includes))


def rule(name: str, command: str) -> str:
    """Of a compiler, g++ or nvcc, which writes what it has included."""
    return f"rule {name}\n  command = {command} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"


def copy_package(build: Path) -> None:
    """It looks for its libraries beside itself."""
    shutil.copytree(ROOT / "fastgen", build / "fastgen", ignore=shutil.ignore_patterns("*.so", "__pycache__"), dirs_exist_ok=True)


def make(build: Path, lines: list[str]) -> None:
    """Copies the package, and runs ninja."""
    copy_package(build)
    DECLARATIONS["write"](build)
    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = Path(sys.executable).parent / "ninja"
    subprocess.check_call([ninja if ninja.exists() else "ninja", "-C", build, "--quiet"])


def run_tests(build: Path, reports: Path | None, arguments: list[str], environment: dict[str, str], tests: list[str]) -> int:
    """pytest's status, or 1 where a kernel was not reached by all tests together. Each process writes to a file `reports`* how
    often each kernel ran: lines that begin with its name and that number. `tests`: the files, unless the arguments name some."""
    # the working directory comes first on the path of `python -m pytest`: from there the copy of the package is the one imported
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    options += ["-n", "2", "--dist", "worksteal"]
    named = any(a.startswith("tests/") for a in arguments)
    some = named or any(a in ("-k", "--op", "--share") for a in arguments)  # which reach some kernels only
    chosen = [str(ROOT / a) if a.startswith("tests/") else a for a in (arguments if named else [*arguments, *tests])]
    environment = os.environ | {"FASTGEN_SMALLER": str(SMALLER)} | environment
    if reports:
        environment["FASTGEN_LAUNCHED"] = str(reports)
        for old in build.glob(f"{reports.name}*"):
            old.unlink()
    status = subprocess.call([sys.executable, "-m", "pytest", *options, *chosen], cwd=build, env=environment)
    if status or some or not reports:
        return status
    missed = unreached(reports)
    print(*(f"no test reaches {kernel}" for kernel in missed), sep="\n")
    return int(bool(missed))


def unreached(reports: Path) -> list[str]:
    """The kernels that no test ran, as C++."""
    runs = [
        {line.split()[0]: line.split()[1] for line in path.read_text().splitlines()}
        for path in reports.parent.glob(f"{reports.name}*")
    ]
    names = [name for name in max(runs, key=len) if all(run.get(name, "0") == "0" for run in runs)]
    filtered = subprocess.run(["c++filt", "--types", *names], capture_output=True, text=True) if names else None
    return filtered.stdout.splitlines() if filtered else []
