"""Runs tests on the CUDA kernels as nvcc has compiled them, without a GPU: `python tests/device_on_ptx.py [pytest's arguments]`.

nvcc compiles the `.cu` files, host code and kernels, to PTX, the text that ptxas makes machine code of. A machine on the host
(tests/ptx) takes the place of the CUDA runtime and runs that text instruction by instruction, in the blocks and threads of the real
launches. Together they make a library that takes the place of the CPU kernels in a copy of the package, and the tests of the values
run on it. Every access to memory is checked: alignment, bounds of the tensors, races on shared memory; what nothing has written is
NaN. A kernel that no test reaches fails the run. Needs nvcc and g++; without nvcc, device_on_host.py runs in its place.

--arch 90 (default) is the GPU that the text is for; --settings "order=2 seed=1 resident=8" what the machine does to the order of
things (`Settings` in tests/ptx/machine.h). --triton runs the kernels of the Triton backend, as Triton compiles them, in place of
nvcc's; each takes a second to compile, so "--share 0/20" takes every 20th test.

--cuda runs the CUDA library itself on devices that tests/fake_cuda.cpp adds to a torch without CUDA: test_cuda.py, as far as
neither graphs nor asynchronous streams matter. Those devices are written for the torch that development pins; with another one
nothing is run. The package has to be built in its place, since the CPU library defines the ops.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import device_on_host
import device_tests
import torch
from device_tests import CSRC, LIBRARIES, ROOT, STEMS, TESTS, TORCH

sys.path.insert(0, str(ROOT))
from tools import machine_code  # noqa: E402  # for nvcc and setup.py's flags of it

PTX = ROOT / "tests/ptx"
MORE_TESTS = ["tests/test_ptx.py", "tests/test_ptx_orders.py"]
FAULTS = "tests/test_ptx_faults.py"
CUDA_TESTS = ["tests/test_cuda.py", "tests/test_fake_cuda.py"]
CPU_LIBRARY = ROOT / "fastgen/_fastgen_cpu.so"
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


def cpu_lines(here: Path) -> list[str]:
    """ninja's, of a library whose ops on the CPU's tensors run the kernels."""
    objects = [f"{here}/isa.o", *(f"{here}/{op}_{part}.o" for op in STEMS for part in ("op", "cuda"))]
    return [
        device_tests.rule("cxx", f"g++ {device_tests.op_flags(here)}"),
        f"rule link\n  command = g++ -shared -o $out $in {LIBRARIES}",
        f"build {here}/isa.o: cxx {CSRC}/common/isa.cpp",
        *(f"build {here}/{op}_op.o: cxx {CSRC}/{op}/{op}_op.cpp" for op in STEMS),
        f"build {here}/fastgen/_fastgen_cpu.so: link {' '.join(objects)}",
    ]


def cuda_lines(here: Path, arch: str) -> list[str]:
    """ninja's, of the CUDA library, with the kernels' objects of `here`, and of the devices that it runs on."""
    cuda = here / "cuda"
    library = ("-DFG_CUDA", "-DUSE_CUDA", f"-I{machine_code.toolkit()}/include")
    named_so = "-Wl,-soname,libtorch_cuda.so"  # the one that the CUDA library needs
    archs = f"-DFG_CUDA_ARCHS='\"{int(arch) / 10}+PTX\"'"
    objects = [f"{cuda}/cuda_info.o", *(f"{cuda}/{op}_op.o" for op in STEMS), *(f"{here}/{op}_cuda.o" for op in STEMS)]
    torch_includes = f"-isystem {TORCH}/include -isystem {TORCH}/include/torch/csrc/api/include"
    return [
        device_tests.rule("cuda_cxx", f"g++ {device_tests.op_flags(here, library=library)} {archs}"),
        device_tests.rule("devices", f"g++ -std=c++20 -O1 -fPIC -fvisibility=hidden {torch_includes}"),
        f"rule devices_link\n  command = g++ -shared {named_so} -Wl,-rpath,{TORCH}/lib -o $out $in {LIBRARIES} -lc10",
        f"rule cuda_link\n  command = g++ -shared -o $out $in -L{cuda} -ltorch_cuda {LIBRARIES}",
        f"build {cuda}/fake_cuda.o: devices {ROOT}/tests/fake_cuda.cpp",
        f"build {cuda}/libtorch_cuda.so: devices_link {cuda}/fake_cuda.o",
        f"build {cuda}/cuda_info.o: cuda_cxx {CSRC}/common/cuda_info.cpp",
        *(f"build {cuda}/{op}_op.o: cuda_cxx {CSRC}/{op}/{op}_op.cpp" for op in STEMS),
        f"build {cuda}/fastgen/_fastgen_cuda.so: cuda_link {' '.join(objects)} | {cuda}/libtorch_cuda.so",
    ]


def cuda_problem() -> str:
    """ "" where fake_cuda.cpp, which uses torch's unstable interfaces, fits the torch that is here; else why not."""
    pinned = re.search(r"^torch==(\S+)", (ROOT / "requirements/dev.txt").read_text(), re.MULTILINE)[1]
    if torch.__version__.partition("+")[0] != pinned:
        return f"torch is {torch.__version__}, and the fake devices are written for {pinned}"
    if torch.version.cuda:
        return f"torch {torch.__version__} has devices of its own"
    return ""


def build(arch: str, cuda: bool) -> Path:
    here = folder(arch)
    here.mkdir(parents=True, exist_ok=True)
    lines = [
        *machine_lines(here),
        device_tests.rule("nvcc", f"{machine_code.toolkit()}/bin/nvcc {nvcc_flags(arch)}"),
        *(f"build {here}/{op}_cuda.o: nvcc {CSRC}/{op}/{op}_cuda.cu" for op in STEMS),
        *(cuda_lines(here, arch) if cuda else cpu_lines(here)),
    ]
    device_tests.make(here, lines)
    if cuda:
        device_tests.copy_package(here / "cuda")
        linked = here / "cuda/fastgen" / CPU_LIBRARY.name
        linked.unlink(missing_ok=True)
        linked.symlink_to(CPU_LIBRARY)  # a copy would be written over while another run has it loaded
    return here


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="90")
    parser.add_argument("--settings", default="", help="of the machine: FASTGEN_PTX")
    parser.add_argument("--triton", action="store_true", help="the Triton backend's kernels")
    parser.add_argument("--cuda", action="store_true", help="the CUDA library itself, on fake devices")
    parser.add_argument("--faults", action="store_true", help="and whether faults that are put in are noticed")
    options, arguments = parser.parse_known_args()
    if options.cuda and not CPU_LIBRARY.exists():
        print(f"device_on_ptx: {CPU_LIBRARY} is missing: build the package in its place first", file=sys.stderr)
        return 1
    if options.cuda and (problem := cuda_problem()):
        print(f"device_on_ptx: --cuda is skipped: {problem}", file=sys.stderr)
        return 0
    try:
        here = build(options.arch, options.cuda)
    except machine_code.Missing as missing:
        if options.cuda:
            print(f"device_on_ptx: --cuda is skipped: {missing}", file=sys.stderr)
            return 0
        print(f"device_on_ptx: {missing}: tests/device_on_host.py runs the code of the kernels' threads instead", file=sys.stderr)
        return device_on_host.main(arguments)
    library = str(here / "libptx.so")
    environment = {"LD_PRELOAD": library, "FASTGEN_PTX_MACHINE": library, "FASTGEN_PTX": options.settings}
    if options.cuda:
        environment |= {"FASTGEN_FAKE_CUDA": str(here / "cuda/libtorch_cuda.so"), "FASTGEN_PTX_ARCH": options.arch}
        environment["PYTHONPATH"] = os.pathsep.join((str(here / "cuda"), str(ROOT / "tests")))
        arguments = ["-p", "fake_cuda", "--device", "cuda", "--not-backend", "triton", *arguments]
        return device_tests.run_tests(here / "cuda", None, arguments, environment, CUDA_TESTS)
    if options.triton:
        environment |= {"PYTHONPATH": os.pathsep.join((str(here), str(ROOT / "tests"))), "FASTGEN_PTX_ARCH": options.arch}
        return device_tests.run_tests(here, None, ["-p", "triton_on_ptx", "--backend", "triton", *arguments], environment, TESTS)
    tests = [*TESTS, *MORE_TESTS, *([FAULTS] if options.faults else [])]
    return device_tests.run_tests(here, here / "launched", ["--not-backend", "eager", *arguments], environment, tests)


if __name__ == "__main__":
    sys.exit(main())
