"""Builds the two libraries by ninja: fastgen/_fastgen_cpu.so, and fastgen/_fastgen_cuda.so where nvcc is.

Not torch.utils.cpp_extension: with a CPU-only torch it refuses to build CUDA, and its extensions are tied to one Python and one
torch. These use LibTorch's stable ABI only, so that one build serves torch 2.10 and newer and every Python.

Environment: FASTGEN_CUDA=0|1 forces either (default: whether nvcc is found), CUDA_HOME or nvcc on the PATH names the toolkit,
FASTGEN_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST the targets ("8.0;9.0+PTX" or "80;90+PTX").
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
OPS = ("q_sample", "q_posterior", "ddpm_step", "randn", "bce_with_logits", "gan_loss", "diffusion_loss")
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10
CUDA_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"

CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -ffp-contract=off -Wall -Wextra"
# GCC 12 warns of its own intrinsics, and of vector attributes on template arguments, which do no harm here
KERNEL_FLAGS = "-fno-exceptions -Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized -Wno-missing-field-initializers"
AVX2 = "-mavx2 -mfma -mf16c"
ISAS = {
    "default": "",
    "avx2": AVX2,
    "avx512": f"-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512 {AVX2}",
}
# -lgcc before the shared libgcc_s that g++ adds: its conversions of half-precision floats would bind to GCC_12.0.0
LINK_FLAGS = "-Wl,-z,defs -Wl,--exclude-libs,ALL -Wl,--gc-sections -s -lgcc"
GLIBC = (2, 28)  # the oldest that the libraries run on: manylinux_2_28


def torch_directory() -> Path:
    """Where torch's headers and libraries are; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("fastgen: torch >= 2.10 must be installed to build, see README.md")
    return Path(spec.origin).parent


def cuda_home() -> Path | None:
    """The CUDA toolkit, or None. An nvcc on the PATH may be a wrapper script: it is asked where its toolkit is."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home) if (Path(home) / "bin/nvcc").exists() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dryrun = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"TOP=(\S+)", dryrun.stderr)
    return Path(top.group(1)).resolve() if top else None


def wanted_cuda() -> Path | None:
    """The toolkit to build the CUDA library with, or None; says in one line why it is not built."""
    choice, home = os.environ.get("FASTGEN_CUDA", ""), cuda_home()
    if choice not in ("", "0", "1"):
        raise SystemExit(f"fastgen: FASTGEN_CUDA must be 0, 1 or unset, not {choice!r}")
    if choice == "0":
        print("fastgen: building the CPU library only (FASTGEN_CUDA=0)", file=sys.stderr)
        return None
    if home is None:
        if choice == "1":
            raise SystemExit("fastgen: FASTGEN_CUDA=1, but there is no nvcc on the PATH nor in $CUDA_HOME/bin")
        print(
            "fastgen: building the CPU library only, no nvcc found (FASTGEN_CUDA=1 makes this an error)",
            file=sys.stderr,
        )
    return home


# torch's names for its TORCH_CUDA_ARCH_LIST
NAMED_ARCHS = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


def cuda_archs() -> list[str]:
    archs = os.environ.get("FASTGEN_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS
    named = (NAMED_ARCHS.get(arch, arch) for arch in re.split(r"[;,\s]+", archs.strip()))
    return list(dict.fromkeys(";".join(named).split(";")))


def gencode_flags(archs: list[str]) -> str:
    flags = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.?(\d[a-z]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(f"fastgen: expected architectures like '8.0;9.0+PTX', got {arch!r} in {';'.join(archs)!r}")
        number = match.group(1) + match.group(2)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(3):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def moved_functions() -> dict[str, dict[str, str]]:
    """{library of glibc 2.28: {function: its symbol version there}} of what libc.so.6 has since taken in under a newer version."""
    libc = subprocess.run(["gcc", "-print-file-name=libc.so.6"], capture_output=True, text=True).stdout.strip()
    listed = subprocess.run(["nm", "-D", "--defined-only", libc], capture_output=True, text=True).stdout
    functions = re.findall(r" T ((?:dl|pthread_|sem_|shm_)\w+)(@@?)GLIBC_([\d.]+)$", listed, re.MULTILINE)
    newest, old = {}, {}
    for name, mark, version in functions:
        number = tuple(map(int, version.split(".")))
        if mark == "@@":
            newest[name] = number
        elif number <= GLIBC:
            old[name] = max(number, old.get(name, ()))
    libraries: dict[str, dict[str, str]] = {}
    for name, number in sorted(old.items()):
        if newest.get(name, ()) > GLIBC:
            library = "libdl.so.2" if name.startswith("dl") else "librt.so.1" if name.startswith("shm_") else "libpthread.so.0"
            libraries.setdefault(library, {})[name] = "GLIBC_" + ".".join(map(str, number))
    return libraries


def old_glibc(directory: Path) -> dict[str, str]:
    """{path: build lines} of stand-ins for glibc 2.28's libdl, libpthread and librt, for linking only.

    glibc 2.34 moved all three into libc.so.6, and what static cudart calls would be bound to GLIBC_2.34. Linked with these it
    is bound to the old versions, which every later glibc still serves. Done in every build and not for the wheel alone, so
    that what the tests run is what is shipped.
    """
    directory.mkdir(exist_ok=True)
    lines = {}
    for library, functions in moved_functions().items():
        versions = {
            version: [name for name in functions if functions[name] == version] for version in sorted({*functions.values()})
        }
        source = "".join(f"void {name}(void) {{}}\n" for name in functions)
        script = "".join(f"{version} {{ {'; '.join(names)}; }};\n" for version, names in versions.items())
        path = directory / library
        for written, text in ((f"{path}.c", source), (f"{path}.map", script)):
            if not Path(written).exists() or Path(written).read_text() != text:  # else everything would be linked again
                Path(written).write_text(text)
        lines[str(path)] = (
            f"build {path}: stub {path}.c | {path}.map\n"
            f"  flags = -nostdlib -fno-builtin -w -Wl,-soname,{library},--version-script={path}.map"
        )
    return lines


def ninja_file(build: Path, package: Path, cuda: Path | None) -> str:
    torch, csrc = torch_directory(), ROOT / "csrc"
    includes = f"-I{csrc} -isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include"
    stable = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -DTORCH_STABLE_ONLY -DNDEBUG"
    cxx = os.environ.get("CXX", "g++")
    lines = [
        "ninja_required_version = 1.5",
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {CXX_FLAGS} $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared -o $out $in $flags",
        "rule stub\n  command = gcc -shared -fPIC $flags -o $out $in",
    ]

    def compiled(source: str, name: str, flags: str) -> str:
        lines.append(f"build {build}/{name}.o: cxx {csrc}/{source}\n  flags = {flags}")
        return f"{build}/{name}.o"

    compat = compiled("common/compat_2_28.cpp", "compat_2_28", "")
    objects = [compat, compiled("common/isa.cpp", "isa", f"{includes} {stable}")]
    for op in OPS:
        objects.append(compiled(f"{op}/{op}_op.cpp", f"{op}_op", f"{includes} {stable}"))
        for isa, flags in ISAS.items():
            isa_flags = f"-I{csrc} {KERNEL_FLAGS} -DFG_ISA={isa} {flags}"
            objects.append(compiled(f"{op}/{op}_cpu.cpp", f"{op}_{isa}", isa_flags))
    torch_libraries = f"{LINK_FLAGS} -L{torch}/lib -ltorch_cpu"
    lines.append(f"build {package}/_fastgen_cpu.so: link {' '.join(objects)}\n  flags = {torch_libraries}")
    if cuda is None:
        return "\n".join(lines) + "\n"

    archs = cuda_archs()
    nvcc_flags = (
        "-std=c++17 -O3 --fmad=false --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v "
        f"-Xfatbin -compress-all -I{csrc} {gencode_flags(archs)}"
    )
    lines += [
        f"rule nvcc\n  command = {cuda}/bin/nvcc -MD -MF $out.d {nvcc_flags} -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        # links the library's CUDA symbols where torch itself has none; never shipped, never loaded
        f"build {build}/libtorch_cuda.so: stub {csrc}/common/torch_cuda_stub.c\n  flags = -Wl,-soname,libtorch_cuda.so",
    ]
    info = compiled("common/cuda_info.cpp", "cuda_info", f"-I{cuda}/include -DFG_CUDA_ARCHS='\"{' '.join(archs)}\"'")
    cuda_objects = [compat, info]
    for op in OPS:
        flags = f"{includes} {stable} -DFG_CUDA -DUSE_CUDA -I{cuda}/include"
        cuda_objects.append(compiled(f"{op}/{op}_op.cpp", f"{op}_op_cuda", flags))
        lines.append(f"build {build}/{op}_cuda.o: nvcc {csrc}/{op}/{op}_cuda.cu")
        cuda_objects.append(f"{build}/{op}_cuda.o")
    glibc = old_glibc(build / "glibc")  # not in ninja's own directory: nvcc puts that on the library path of its programs
    lines += glibc.values()
    cuda_libraries = f"-L{build} -ltorch_cuda -L{cuda}/lib64 -lcudart_static {' '.join(glibc)} -lpthread -ldl -lrt"
    lines.append(
        f"build {package}/_fastgen_cuda.so: link {' '.join(cuda_objects)} | {' '.join([f'{build}/libtorch_cuda.so', *glibc])}\n"
        f"  flags = {torch_libraries} {cuda_libraries}"
    )
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    def get_ext_filename(self, name):  # no cpython suffix: the libraries know nothing of Python
        return name.replace(".", "/") + ".so"

    def run(self):
        build = (ROOT / "build/ninja").resolve()
        package = ROOT / "fastgen" if self.inplace else Path(self.build_lib).resolve() / "fastgen"
        build.mkdir(parents=True, exist_ok=True)
        package.mkdir(parents=True, exist_ok=True)
        cuda = wanted_cuda()
        if cuda is None and not self.inplace:
            (package / "_fastgen_cuda.so").unlink(missing_ok=True)  # an earlier build's would be packaged
        (build / "build.ninja").write_text(ninja_file(build, package, cuda))
        ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
        subprocess.check_call([ninja, "-C", str(build)])

    def get_outputs(self):
        return [str(path) for path in Path(self.build_lib, "fastgen").glob("_fastgen_*.so")]


class Py3NoneWheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("fastgen._fastgen_cpu", [])],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": Py3NoneWheel},
)
