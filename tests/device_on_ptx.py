"""Runs tests on the CUDA kernels as nvcc has compiled them, without a GPU: `python tests/device_on_ptx.py [pytest's arguments]`.

nvcc compiles the `.cu` files, host code and kernels, to PTX, the text that ptxas makes machine code of. A machine on the host
(tests/ptx) takes the place of the CUDA runtime and runs that text instruction by instruction, in the blocks and threads of the real
launches. Together they make a library that takes the place of the CPU kernels in a copy of the package, and the tests of the values
run on it. Every access to memory is checked: alignment, bounds of the tensors, races on shared memory; what nothing has written is
NaN. A kernel that no test reaches fails the run. Needs nvcc and g++; without nvcc, device_on_host.py runs in its place.

--arch 90 (default) is the GPU that the text is for; --settings "order=2 seed=1 resident=8" what the machine does to the order of
things (`Settings` in tests/ptx/machine.h). --triton runs the kernels of the Triton backend, as Triton compiles them, in place of
nvcc's; each takes a second to compile, so "--share 0/20" takes every 20th test.
"""

import argparse
import os
import sys
from pathlib import Path

import device_on_host
import device_tests
from device_tests import CSRC, LIBRARIES, ROOT, STEMS

sys.path.insert(0, str(ROOT))
from tools import machine_code  # noqa: E402  # for nvcc and setup.py's flags of it

PTX = ROOT / "tests/ptx"
MORE_TESTS = ["tests/test_ptx.py", "tests/test_ptx_orders.py"]
FAULTS = "tests/test_ptx_faults.py"
MACHINE_FLAGS = "-std=c++20 -O2 -ftree-vectorize -march=native -ffp-contract=off -fno-math-errno -fwrapv -fPIC -fvisibility=hidden"


def folder(arch: str) -> Path:
    return ROOT / f"build/device_on_ptx/{arch}"


def machine_lines(build: Path) -> list[str]:
    """ninja's, of the machine: build/libptx.so."""
    sources = sorted(PTX.glob("*.cpp"))
    objects = [f"{build}/ptx_{source.stem}.o" for source in sources]
    return [
        device_tests.rule("machine", f"g++ {MACHINE_FLAGS} -isystem {machine_code.toolkit()}/include"),
        # no library of torch's: every program that a test starts loads the machine
        "rule machine_link\n  command = g++ -shared -o $out $in",
        *(f"build {o}: machine {source}" for o, source in zip(objects, sources, strict=True)),
        f"build {build}/libptx.so: machine_link {' '.join(objects)}",
    ]


def nvcc_flags(arch: str) -> str:
    """Those of the library, but for PTX alone, not compressed, which the machine could not read."""
    flags = " ".join(f"'{flag}'" for flag in machine_code.nvcc_flags() if flag not in ("-Xptxas", "-v"))
    return f"{flags} --no-compress -I{CSRC} {device_tests.MANY_ITEMS} -gencode=arch=compute_{arch},code=compute_{arch}"


def build(arch: str) -> Path:
    here = folder(arch)
    here.mkdir(parents=True, exist_ok=True)
    lines = [
        *machine_lines(here),
        f"rule link\n  command = g++ -shared -o $out $in {LIBRARIES}",
        device_tests.rule("cxx", f"g++ {device_tests.op_flags(here)}"),
        device_tests.rule("nvcc", f"{machine_code.toolkit()}/bin/nvcc {nvcc_flags(arch)}"),
        f"build {here}/isa.o: cxx {CSRC}/common/isa.cpp",
        *(f"build {here}/{op}_op.o: cxx {CSRC}/{op}/{op}_op.cpp" for op in STEMS),
        *(f"build {here}/{op}_cuda.o: nvcc {CSRC}/{op}/{op}_cuda.cu" for op in STEMS),
    ]
    objects = [f"{here}/isa.o", *(f"{here}/{op}_{part}.o" for op in STEMS for part in ("op", "cuda"))]
    lines.append(f"build {here}/fastgen/_fastgen_cpu.so: link {' '.join(objects)}")
    device_tests.make(here, lines)
    return here


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="90")
    parser.add_argument("--settings", default="", help="of the machine: FASTGEN_PTX")
    parser.add_argument("--triton", action="store_true", help="the Triton backend's kernels")
    parser.add_argument("--faults", action="store_true", help="and whether faults that are put in are noticed")
    options, arguments = parser.parse_known_args()
    try:
        here = build(options.arch)
    except machine_code.Missing as missing:
        print(f"device_on_ptx: {missing}: tests/device_on_host.py runs the code of the kernels' threads instead", file=sys.stderr)
        return device_on_host.main(arguments)
    library = str(here / "libptx.so")
    environment = {"LD_PRELOAD": library, "FASTGEN_PTX_MACHINE": library, "FASTGEN_PTX": options.settings}
    if options.triton:
        environment |= {"PYTHONPATH": os.pathsep.join((str(here), str(ROOT / "tests"))), "FASTGEN_PTX_ARCH": options.arch}
        return device_tests.run_tests(here, None, ["-p", "triton_on_ptx", "--backend", "triton", *arguments], environment, [])
    more = [*MORE_TESTS, FAULTS] if options.faults else MORE_TESTS
    return device_tests.run_tests(here, here / "launched", ["--not-backend", "eager", *arguments], environment, more)


if __name__ == "__main__":
    sys.exit(main())
