"""Runs tests on the CUDA kernels' own code, compiled for the host: `python tests/device_on_host.py [pytest's arguments]`.

The functions that a CUDA thread executes (csrc/common/device_driver.h, csrc/*/*_device.h) compile under g++ as well. Here they
make a library that takes the place of the CPU kernels in a copy of the package, each op running thread after thread, and the
tests of the values run on it: which element reads which coefficient row, which Philox group and lane, every layout, tail and
dtype. A misaligned 128-bit access ends the run, and a kernel that no test reaches fails it. It needs g++ only. What it cannot
show: what nvcc makes of the code, how it is launched, sums between threads, the hardware's special functions, memory order, speed;
most of these device_on_ptx.py does.
"""

import sys

import device_tests
from device_tests import CSRC, LIBRARIES, ROOT, STEMS

BUILD = ROOT / "build/device_on_host"
# Not optimised: g++ then takes 80 s where -O1 takes 230 (two of three minutes of it on ddpm_step_cuda.cu alone), for tests that
# run on few elements.
CHECKED = "-DFG_CHECK_ALIGNED(p)=if(reinterpret_cast<uintptr_t>(p)%16)__builtin_trap()"


def build() -> None:
    lines = [
        device_tests.rule("cxx", f"g++ {device_tests.op_flags(BUILD, CHECKED)} -x c++"),
        f"rule link\n  command = g++ -shared -o $out $in {LIBRARIES}",
    ]
    sources = [CSRC / "common/isa.cpp", *(CSRC / f"{op}/{op}_{part}" for op in STEMS for part in ("op.cpp", "cuda.cu"))]
    objects = [f"{BUILD}/{source.stem}.o" for source in sources]
    lines += [f"build {o}: cxx {source}" for o, source in zip(objects, sources, strict=True)]
    lines.append(f"build {BUILD}/fastgen/_fastgen_cpu.so: link {' '.join(objects)}")
    device_tests.make(BUILD, lines)


def main(arguments: list[str]) -> int:
    build()
    return device_tests.run_tests(BUILD, BUILD / "launched", ["--not-backend", "eager", *arguments], {}, device_tests.TESTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
