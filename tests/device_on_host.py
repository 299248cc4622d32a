"""Runs tests on the CUDA kernels' own code, compiled for the host: `python tests/device_on_host.py [pytest's arguments]`.

The functions that a CUDA thread executes (csrc/common/device_driver.h, csrc/*/*_device.h) compile under g++ as well. Here they
make a library that takes the place of the CPU kernels in a copy of the package, each op running thread after thread, and the
tests of the values run on it: which element reads which coefficient row, which Philox group and lane, every layout, tail and
dtype. A misaligned 128-bit access ends the run, and a kernel that no test reaches fails it. What it cannot show: the hardware's
special functions, memory order, speed.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/device_on_host"
WAYS = BUILD / "ways"  # of each process of pytest's: ways, ways.gw0, ways.gw1
DECLARATIONS = runpy.run_path(str(ROOT / "csrc/declarations.py"))
STEMS = DECLARATIONS["DECLARED"]["STEMS"]
SMALLER = 1024  # times: the tensors in which a thread takes several vectors; see kManyItems in csrc/common/index.h
TESTS = [*(f"tests/test_{op}.py" for op in STEMS), "tests/test_half_precision.py", "tests/test_device_code.py"]
# Not optimised: g++ then takes 80 s where -O1 takes 230 (two of three minutes of it on ddpm_step_cuda.cu alone), for tests that
# run on few elements.
FLAGS = [
    *("-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-march=native", "-Wno-unknown-pragmas"),
    *("-DFG_DEVICE_ON_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"),
    f"-DFG_MANY_ITEMS={256 * 1024 // SMALLER}",
    "-DFG_CHECK_ALIGNED(p)=if(reinterpret_cast<uintptr_t>(p)%16)__builtin_trap()",
]


def ninja_file() -> str:
    torch_directory, csrc = Path(torch.__file__).parent, ROOT / "csrc"
    includes = [
        f"-I{csrc}",
        f"-I{BUILD}",
        f"-isystem {torch_directory}/include",
        f"-isystem {torch_directory}/include/torch/csrc/api/include",
    ]
    flags = " ".join(f"'{flag}'" for flag in FLAGS) + " " + " ".join(includes)
    lines = [
        f"rule cxx\n  command = g++ -MMD -MF $out.d {flags} -x c++ -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = g++ -shared -o $out $in -L{torch_directory}/lib -ltorch_cpu",
    ]
    sources = [csrc / "common/isa.cpp", *(csrc / f"{op}/{op}_{part}" for op in STEMS for part in ("op.cpp", "cuda.cu"))]
    objects = [f"{BUILD}/{source.stem}.o" for source in sources]
    lines += [f"build {o}: cxx {source}" for o, source in zip(objects, sources, strict=True)]
    lines.append(f"build {BUILD}/fastgen/_fastgen_cpu.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build() -> None:
    package = BUILD / "fastgen"
    skipped = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastgen", package, ignore=skipped, dirs_exist_ok=True)  # it looks for the library beside itself
    DECLARATIONS["write"](BUILD)
    (BUILD / "build.ninja").write_text(ninja_file())
    ninja = Path(sys.executable).parent / "ninja"
    subprocess.check_call([ninja if ninja.exists() else "ninja", "-C", BUILD, "--quiet"])


def unreached() -> list[str]:
    """The kernels that no test ran, as C++ types."""
    runs = [dict(map(str.split, path.read_text().splitlines())) for path in BUILD.glob(f"{WAYS.name}*")]
    names = [name for name in runs[0] if all(run[name] == "0" for run in runs)]
    return subprocess.run(["c++filt", "--types", *names], capture_output=True, text=True).stdout.splitlines() if names else []


def main() -> int:
    build()
    # the working directory comes first on the path of `python -m pytest`: from there the package above is the one imported
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    options += ["--not-backend", "eager", "-n", "2", "--dist", "worksteal"]
    arguments = sys.argv[1:]
    some = any(a.startswith("tests/") or a == "-k" for a in arguments)
    chosen = [str(ROOT / a) if a.startswith("tests/") else a for a in (arguments if some else [*arguments, *TESTS])]
    for old in BUILD.glob(f"{WAYS.name}*"):
        old.unlink()
    environment = os.environ | {"FASTGEN_WAYS": str(WAYS), "FASTGEN_SMALLER": str(SMALLER)}
    status = subprocess.call([sys.executable, "-m", "pytest", *options, *chosen], cwd=BUILD, env=environment)
    if status or some:
        return status
    print(*(f"no test reaches {kernel}" for kernel in unreached()), sep="\n")
    return int(bool(unreached()))


if __name__ == "__main__":
    sys.exit(main())
