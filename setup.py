"""Builds the two libraries by ninja: fastgen/_fastgen_cpu.so, and fastgen/_fastgen_cuda.so where nvcc is.

Not torch.utils.cpp_extension: with a CPU-only torch it refuses to build CUDA, and its extensions are tied to one Python and one
torch. These use LibTorch's stable ABI only, so that one build serves torch 2.10 and newer and every Python.

Environment: FASTGEN_CUDA=0|1 forces either (default: whether nvcc is found), CUDA_HOME, or an nvcc on the PATH or in
/usr/local/cuda/bin, is the toolkit, FASTGEN_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST the targets: "8.0;9.0+PTX", "80;90+PTX" or "all".
Without them, the GPUs that nvidia-smi finds; without those, all.
"""

import contextlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
DECLARATIONS = runpy.run_path(str(ROOT / "csrc/declarations.py"))
STEMS = DECLARATIONS["DECLARED"]["STEMS"]
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10
CUDA_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
OLDEST_GPU = (7, 5)
USUAL_CUDA = Path("/usr/local/cuda")
# Processor seconds of g++ for a file, and of nvcc for a file and an architecture, on average (EPYC, nvcc 13.0, sm_90). The longest
# file, ddpm_step_cuda.cu, takes 74, the shortest 3.
CXX_SECONDS, NVCC_SECONDS, NVCC_LONGEST = 12, 18, 74
SMI_SECONDS = 10

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


def say(*lines: str) -> None:
    """Lines for whoever waits. pip and its like show a build's output with -v or after a failure only: then they go to the
    terminal itself, where there is one and this runs in its foreground, beside pip's spinner but on lines of their own."""
    hidden = not sys.stderr.isatty() and any(
        name in os.environ for name in ("_PYPROJECT_HOOKS_BUILD_BACKEND", "PEP517_BUILD_BACKEND")
    )
    if hidden:
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            if os.tcgetpgrp(terminal.fileno()) == os.getpgrp():  # else writing may stop the process
                terminal.write("".join(f"\nfastgen: {line}" for line in lines) + "\n")
                return
    for line in lines:
        print(f"fastgen: {line}", file=sys.stderr)


def fail(text: str) -> NoReturn:
    raise SystemExit(f"fastgen: {text}")


def torch_directory() -> Path:
    """Where torch's headers and libraries are; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail("torch >= 2.10 must be installed to build, see README.md")
    return Path(spec.origin).parent


def compiler() -> str:
    """The C++ compiler's command."""
    cxx = os.environ.get("CXX") or "g++"
    if shutil.which(shlex.split(cxx)[0]) is None:
        fail(f"there is no C++ compiler: {cxx} was not found (CXX names another than g++)")
    return cxx


def ninja_program() -> str:
    """On the PATH, or where pip puts it: beside Python in an environment that is not active, or in the user's own folder."""
    places = [Path(sys.executable).parent, sysconfig.get_path("scripts"), sysconfig.get_path("scripts", "posix_user")]
    found = shutil.which("ninja") or shutil.which("ninja-build") or shutil.which("ninja", path=os.pathsep.join(map(str, places)))
    return found or fail("there is no ninja: `pip install ninja`")


def cuda_home() -> Path | None:
    """The CUDA toolkit, or None. An nvcc on the PATH may be a wrapper script: it is asked where its toolkit is."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home) if (Path(home) / "bin/nvcc").exists() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return USUAL_CUDA.resolve() if (USUAL_CUDA / "bin/nvcc").exists() else None
    dryrun = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"TOP=(\S+)", dryrun.stderr)
    return Path(top.group(1)).resolve() if top else None


def wanted_cuda() -> Path | None:
    """The toolkit to build the CUDA library with, or None; says in one line why it is not built."""
    choice, home = os.environ.get("FASTGEN_CUDA", ""), cuda_home()
    if choice not in ("", "0", "1"):
        fail(f"FASTGEN_CUDA must be 0, 1 or unset, not {choice!r}")
    if choice == "0":
        say("building the CPU library only (FASTGEN_CUDA=0)")
        return None
    if home is not None and shutil.which("gcc") is None:
        fail("the CUDA library needs gcc beside nvcc, and gcc was not found (FASTGEN_CUDA=0 builds the CPU library only)")
    if home is not None:
        return home
    if named := os.environ.get("CUDA_HOME"):
        missing = f"there is no nvcc in CUDA_HOME's bin, {named}/bin"
    else:
        missing = f"there is no nvcc on the PATH nor in {USUAL_CUDA}/bin"
    if choice == "1":
        fail(f"FASTGEN_CUDA=1, but {missing}")
    say(f"building the CPU library only, {missing} (FASTGEN_CUDA=1 makes this an error)")
    return None


# torch's names for its TORCH_CUDA_ARCH_LIST
NAMED_ARCHS = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


def cuda_archs(cuda: Path | None = None) -> tuple[list[str], str]:
    """The architectures to build for, as in TORCH_CUDA_ARCH_LIST, and why these. None of them where all GPUs here are too old."""
    for variable in ("FASTGEN_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        if archs := os.environ.get(variable):
            return listed(archs), f"as {variable} says"
    gpus, problem = gpus_here()
    if problem:
        return listed("all"), f"all of them, since {problem}"
    known = [tuple(map(int, divmod(int(number), 10))) for number in codes_of(cuda)]
    archs, remarks = [], []
    for gpu in gpus:
        older = [code for code in known if code <= gpu]
        if gpu < OLDEST_GPU or not older:
            remarks.append(f"{named(gpu)} is older than {named(OLDEST_GPU)}, the oldest served")
        elif gpu in known:
            archs.append(named(gpu))
        else:
            archs.append(f"{named(max(older))}+PTX")
            remarks.append(f"{named(gpu)} is newer than this nvcc knows, so its driver compiles it from PTX")
    one = "that of the GPU" if len(gpus) == 1 else "those of the GPUs"
    return list(dict.fromkeys(archs)), "; ".join([f"{one} that nvidia-smi finds", *remarks])


def listed(archs: str) -> list[str]:
    archs = CUDA_ARCHS if archs.strip().lower() == "all" else archs
    names = (NAMED_ARCHS.get(arch, arch) for arch in re.split(r"[;,\s]+", archs.strip(" ;,")))
    return list(dict.fromkeys(";".join(names).split(";")))


def named(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def gpus_here() -> tuple[list[tuple[int, int]], str]:
    """The compute capabilities of the GPUs here, each once, or why they are not known."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except FileNotFoundError:
        return [], "there is no nvidia-smi here to ask for GPUs"
    except (OSError, subprocess.TimeoutExpired) as error:
        slow = isinstance(error, subprocess.TimeoutExpired)
        return [], f"nvidia-smi gave no answer within {SMI_SECONDS} s" if slow else f"nvidia-smi cannot be run ({error})"
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", asked.stdout, re.MULTILINE)
    if asked.returncode != 0 or not found:
        said = (asked.stdout + asked.stderr).strip().splitlines() or [f"exit status {asked.returncode}"]
        return [], f"nvidia-smi names no GPU ({said[0].strip()})"
    return sorted({(int(major), int(minor)) for major, minor in found}), ""


def codes_of(cuda: Path | None) -> list[str]:
    """The machine code that nvcc can make: "75", "80" …; of an nvcc that does not tell, CUDA_ARCHS."""
    if cuda is not None:
        with contextlib.suppress(OSError):
            asked = subprocess.run([cuda / "bin/nvcc", "--list-gpu-code"], capture_output=True, text=True)
            if codes := re.findall(r"^sm_(\d+)$", asked.stdout, re.MULTILINE):
                return codes
    return [re.sub(r"\D", "", arch) for arch in CUDA_ARCHS.split(";")]


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


def ninja_file(build: Path, package: Path, cuda: Path | None, archs: Sequence[str] = tuple(CUDA_ARCHS.split(";"))) -> str:
    torch, csrc = torch_directory(), ROOT / "csrc"
    includes = f"-I{csrc} -I{build} -isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include"
    stable = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -DTORCH_STABLE_ONLY -DNDEBUG"
    cxx = compiler()
    lines = [
        "ninja_required_version = 1.5",
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {CXX_FLAGS} $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "  description = C++ $what",
        f"rule link\n  command = {cxx} -shared -o $out $in $flags\n  description = link $out",
        "rule stub\n  command = gcc -shared -fPIC $flags -o $out $in\n  description = stub $out",
    ]

    def compiled(source: str, name: str, flags: str) -> str:
        lines.append(f"build {build}/{name}.o: cxx {csrc}/{source}\n  flags = {flags}\n  what = {name}")
        return f"{build}/{name}.o"

    compat = compiled("common/compat_2_28.cpp", "compat_2_28", "")
    objects = [compat, compiled("common/isa.cpp", "isa", f"{includes} {stable}")]
    for op in STEMS:
        objects.append(compiled(f"{op}/{op}_op.cpp", f"{op}_op", f"{includes} {stable}"))
        for isa, flags in ISAS.items():
            isa_flags = f"-I{csrc} {KERNEL_FLAGS} -DFG_ISA={isa} {flags}"
            objects.append(compiled(f"{op}/{op}_cpu.cpp", f"{op}_{isa}", isa_flags))
    torch_libraries = f"{LINK_FLAGS} -L{torch}/lib -ltorch_cpu"
    lines.append(f"build {package}/_fastgen_cpu.so: link {' '.join(objects)}\n  flags = {torch_libraries}")
    if cuda is None:
        return "\n".join(lines) + "\n"

    nvcc_flags = (
        "-std=c++17 -O3 --fmad=false --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden "
        f"-Xfatbin -compress-all -I{csrc} {gencode_flags(archs)}"
    )
    lines += [
        f"rule nvcc\n  command = {cuda}/bin/nvcc -MD -MF $out.d {nvcc_flags} -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "  description = CUDA $what",
        # links the library's CUDA symbols where torch itself has none; never shipped, never loaded
        f"build {build}/libtorch_cuda.so: stub {csrc}/common/torch_cuda_stub.c\n  flags = -Wl,-soname,libtorch_cuda.so",
    ]
    info = compiled("common/cuda_info.cpp", "cuda_info", f"-I{cuda}/include -DFG_CUDA_ARCHS='\"{' '.join(archs)}\"'")
    cuda_objects = [compat, info]
    for op in STEMS:
        flags = f"{includes} {stable} -DFG_CUDA -DUSE_CUDA -I{cuda}/include"
        cuda_objects.append(compiled(f"{op}/{op}_op.cpp", f"{op}_op_cuda", flags))
        lines.append(f"build {build}/{op}_cuda.o: nvcc {csrc}/{op}/{op}_cuda.cu\n  what = {op}")
        cuda_objects.append(f"{build}/{op}_cuda.o")
    glibc = old_glibc(build / "glibc")  # not in ninja's own directory: nvcc puts that on the library path of its programs
    lines += glibc.values()
    cuda_libraries = f"-L{build} -ltorch_cuda -L{cuda}/lib64 -lcudart_static {' '.join(glibc)} -lpthread -ldl -lrt"
    lines.append(
        f"build {package}/_fastgen_cuda.so: link {' '.join(cuda_objects)} | {' '.join([f'{build}/libtorch_cuda.so', *glibc])}\n"
        f"  flags = {torch_libraries} {cuda_libraries}"
    )
    return "\n".join(lines) + "\n"


def plan_of(dry_run: str, archs: list[str], why: str) -> list[str]:
    """What there is to do according to `ninja -n`, how long that may take, and how to have less of it; nothing where it is done."""
    cxx, cuda = (len(re.findall(rf"^\[\d+/\d+\] {rule} ", dry_run, re.MULTILINE)) for rule in ("C\\+\\+", "CUDA"))
    if cxx + cuda == 0:
        return []
    cores, targets = len(os.sched_getaffinity(0)), len(archs) + sum("+PTX" in arch for arch in archs)
    # nvcc takes one architecture of a file after another, so more cores than files are of no use
    seconds = max((cxx * CXX_SECONDS + cuda * targets * NVCC_SECONDS) / cores, (cuda > 0) * targets * NVCC_LONGEST)
    about = f"some {max(1, round(seconds / 60))} min on {cores} core{'s' * (cores > 1)}; pip's -v shows the progress"
    if cuda == 0:
        return [f"compiling {cxx} C++ files, {about}"]
    return [
        f"compiling {cxx} C++ files, and {cuda} CUDA files for {' '.join(archs)} ({why}), {about}",
        'FASTGEN_CUDA_ARCHS="8.0;9.0+PTX" or "all" chooses other GPUs, FASTGEN_CUDA=0 leaves CUDA out',
    ]


class NinjaBuild(build_ext):
    def get_ext_filename(self, name):  # no cpython suffix: the libraries know nothing of Python
        return name.replace(".", "/") + ".so"

    def run(self):
        build = (ROOT / "build/ninja").resolve()
        package = ROOT / "fastgen" if self.inplace else Path(self.build_lib).resolve() / "fastgen"
        build.mkdir(parents=True, exist_ok=True)
        package.mkdir(parents=True, exist_ok=True)
        torch_directory(), compiler()  # they, and ninja, are missed before anything is written
        ninja = ninja_program()
        cuda = wanted_cuda()
        archs, why = cuda_archs(cuda) if cuda else ([], "")
        if cuda and not archs:
            if os.environ.get("FASTGEN_CUDA") == "1":
                archs, why = listed("all"), f"all of them, since FASTGEN_CUDA=1 ({why})"
            else:
                say(f"building the CPU library only: no GPU here would run the CUDA library ({why}; FASTGEN_CUDA=1 builds it)")
                cuda = None
        if cuda is None and not self.inplace:
            (package / "_fastgen_cuda.so").unlink(missing_ok=True)  # an earlier build's would be packaged
        DECLARATIONS["write"](build)
        (build / "build.ninja").write_text(ninja_file(build, package, cuda, archs))
        command = [ninja, "-C", str(build)]
        usual = os.environ | {"NINJA_STATUS": "[%f/%t] "}  # whatever the user would see before each line, `plan_of` reads this
        if plan := plan_of(subprocess.run([*command, "-n"], env=usual, capture_output=True, text=True).stdout, archs, why):
            say(*plan)
        if subprocess.call(command) != 0:
            fail("the build failed; what the compiler said is above")

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
