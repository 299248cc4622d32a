"""What nvcc makes of every kernel: registers, spills, and instructions per element of the main path. Needs no GPU:

    python -m tools.machine_code [--arch 80 90 100 120 gfx942] [--only TEXT] [--json FILE [--dirty]]

Compiles csrc/*/*_cuda.cu as setup.py does, one cubin for each architecture, kept under build/machine_code until a source, a
flag or nvcc changes. What ptxas says gives registers, stack and spills; the listing of nvdisasm gives the rest (see `sass`).
Triton's kernels, and AMD's GPUs, for which there are no others, come from `triton_code`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from . import bound, sass

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build/machine_code"
ARCHS = ("80", "90", "100", "120")  # of the report


# ---- what a kernel's name says ---------------------------------------------------------------------------------------

BYTES = {"Float64": 8, "Float32": 4, "Float16": 2, "BFloat16": 2, "UInt8": 1}
TYPE = re.compile(rf"\b({'|'.join(BYTES)})\b")
SPECIAL = 2  # special-function operations for each normal that is made: a logarithm, a root, a sine and a cosine for two
SEEDED = re.compile(r"NoiseKind\)2")


@dataclass(frozen=True)
class Reading:
    """How many bytes the main path moves for each element, which has all optional operands.

    `stored` lists the types of what is stored, and `loaded` of what is loaded, which counts in a kernel that stores no vectors:
    by their place among the types in the kernel's name, or by name.
    """

    pattern: str
    stored: tuple[int | str, ...] = (-1,)
    loaded: tuple[int | str, ...] = ()


# The first that is found in the demangled name.
READINGS = (
    Reading(r"\bDdpmStep(Guided)?Device<", stored=(-1, -1)),  # y and x0
    Reading(r"\bBceVectorSum<\S*Weighted<\S*BceWideTypes<", loaded=(0, "Float32", "Float32", "Float32")),  # and two weights
    Reading(r"\bBceVectorSum<\S*Weighted<", loaded=(0, 1, 0, 0)),
    Reading(r"\bBceVectorSum<\S*BceWideTypes<", loaded=(0, "Float32")),  # input and target
    Reading(r"\bBceVectorSum<", loaded=(0, 1)),
    Reading(r"\bBceVectors<\S*BceWideTypes<.*false", stored=("Float32",)),
    Reading(r"\bBceVectors<", stored=(0,)),
    Reading(r"\bAdded<.*\bDiffusionLossItems<[^>]*\bUInt8\b.*NoiseKind\)1", loaded=(1, 1)),  # beside bytes: the output, noise
    Reading(r"\bAdded<.*\bDiffusionLossItems<[^>]*\bUInt8\b", loaded=(1,)),
    Reading(r"\bAdded<.*\bDiffusionLossItems<.*NoiseKind\)1", loaded=(0, 1, 0)),  # x0, the output, noise
    Reading(r"\bAdded<.*\bDiffusionLossItems<", loaded=(0, 1)),
    Reading(r"\bDiffusionLossItems<", stored=(-1, -1)),  # by the output and by x0
    Reading(r"\bAdded<.*\bVlbTermsItems<.*NoiseKind\)2", loaded=(0, 1, 1)),  # x0, the output's halves
    Reading(r"\bAdded<.*\bVlbTermsItems<", loaded=(0, 1, 1, 0)),  # and x_t or noise
    Reading(r"\bVlbTermsItems<", stored=(-1, -1)),  # by the output's halves
    Reading(r"\bAdded<.*\bStepLog(Prob|Weight)Items<", loaded=(0, 1, 1, 0)),  # x_t, the output's halves, x_{t−1}
    Reading(r"\bStepLogProbItems<", stored=(-1, -1, -1)),  # by the output's halves and by x_t
    Reading(r"\bReparameterizeGradientDevice<", stored=(-1, -1)),  # by log σ² and by μ
    Reading(r"\bAdded<.*\bGaussianKlItems<", loaded=(0, 0, 0, 0)),  # the parameters of both
    Reading(r"\bGaussianKlItems<", stored=(0, 0, 0)),  # by log σ², μ and log σ'²
    Reading(r"\bGanVectorSums<", loaded=(0,)),
    Reading(r"\bToUint8Vectors<", loaded=(0,)),  # its stores are of as many bytes as four or eight elements have
    Reading(""),
)
# What makes a name short, in this order.
SHORTER = (
    (r"\bfastgen::|\(anonymous namespace\)::", ""),
    (r"^void |\bdevice_kernel|Device\b", ""),
    (r"\(NoiseKind\)0", "no noise"),
    (r"\(NoiseKind\)1", "noise"),
    (r"\(NoiseKind\)2", "seed"),
    (r"\bUInt8\b", "u8"),
    (r"\bB?Float(16|32|64)\b", lambda match: match[0].replace("BFloat", "bf").replace("Float", "f")),
    (r"\((?:bool|int)\)", ""),
    (r" >", ">"),
    (r"^<(.*)>$", r"\1"),
)


def label(kernel: str) -> str:
    """The template and its arguments, without those of the call: Vectors<DdpmStep<float, bf16, bf16, bf16>, seed>."""
    name = without_parameters(kernel)
    for pattern, to in SHORTER:
        name = re.sub(pattern, to, name)
    return name


def without_parameters(kernel: str) -> str:
    depth = 0
    for end in range(len(kernel) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(kernel[end], 0)
        if depth == 0:
            return kernel[:end] if kernel.endswith(")") else kernel
    return kernel


def element_bytes(kernel: str) -> tuple[int, int]:
    """Bytes of 128-bit stores and loads for each element; 0 where the name does not say."""
    name = without_parameters(kernel)
    reading = next(reading for reading in READINGS if re.search(reading.pattern, name))
    types = TYPE.findall(name)
    if not types:
        return 0, 0
    stored, loaded = ([which if isinstance(which, str) else types[which] for which in k] for k in (reading.stored, reading.loaded))
    return sum(BYTES[found] for found in stored), sum(BYTES[found] for found in loaded)


# ---- tools -----------------------------------------------------------------------------------------------------------


class Missing(RuntimeError):
    """A tool that is not on this machine; says where it was looked for."""


@functools.cache
def settings() -> dict:
    """The names in setup.py, which is run without building anything."""
    if importlib.util.find_spec("setuptools") is None:
        raise Missing("setuptools: not installed, and setup.py, which has the flags, imports it")
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"), run_name="settings")


def default_archs() -> list[str]:
    """Those of a wheel: ["75", "80", …]."""
    archs = re.search(r'^CUDA_ARCHS = "(.+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    return ["".join(version) for version in re.findall(r"(\d+)\.(\d+[a-z]?)", archs)]


@functools.cache
def toolkit() -> Path:
    home = settings()["cuda_home"]()
    if home is None:
        raise Missing("nvcc: neither in $CUDA_HOME/bin nor on the PATH")
    return home


@functools.cache
def disassembler(name: str = "nvdisasm") -> Path:
    """nvdisasm or cuobjdump: Triton's, else the toolkit's, else the one on the PATH."""
    places = []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin" / name)
    if (home := settings()["cuda_home"]()) is not None:
        places.append(home / "bin" / name)
    places += [Path(found)] if (found := shutil.which(name)) else []
    for place in places:
        if place.exists():
            return place
    looked = ["Triton is not installed"] if triton is None else []
    looked += [f"no {place}" for place in places] + ["not on the PATH"]
    raise Missing(f"{name}: {', '.join(looked)} (pip install triton)")


def run(*command, **options) -> subprocess.CompletedProcess:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result


@functools.cache
def nvcc_flags() -> tuple[str, ...]:
    """setup.py's flags of a .cu file, less what names files and architectures."""
    with tempfile.TemporaryDirectory() as directory:  # it may leave files there
        ninja = settings()["ninja_file"](Path(directory), Path(directory), toolkit())
    return *without_files(re.search(r"rule nvcc\n  command = \S+ (.*)", ninja)[1]), "-Xptxas", "-v"


def without_files(command: str) -> tuple[str, ...]:
    """The flags of ninja's command that say how, not what, nor for which GPU."""
    return (*shlex.split(re.sub(r"-MD|-MF \S+|-gencode=\S+|-Xptxas -v\b|-Xfatbin \S+|-c \$in|-o \$out|-I\S+", "", command)),)


@functools.cache
def demangler() -> str:
    for name in ("cu++filt", "c++filt"):
        if found := shutil.which(name) or next((str(p) for p in (toolkit() / "bin").glob(name)), None):
            return found
    raise Missing("c++filt: not on the PATH (it comes with binutils)")


# ---- compiling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """A cubin, and what ptxas said of it."""

    source: Path
    arch: str
    cubin: Path
    log: str


def sources(directory: Path = CSRC) -> list[Path]:
    return sorted(directory.glob("*/*_cuda.cu"))


def included(source: Path, include: Path) -> set[Path]:
    """The file and all that it includes by quotes, directly or not."""
    found, stack = set(), [source]
    while stack:
        path = stack.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            stack += [place.resolve() for place in (path.parent / name, include / name) if place.exists()][:1]
    return found


@functools.cache
def nvcc_version() -> str:
    return run(toolkit() / "bin/nvcc", "--version").stdout


def from_library(source: Path, arch: str) -> Compiled | None:
    """The cubin in the object file from which setup.py has linked the library: None unless that has code for the architecture, and
    ninja would not compile it again. What ptxas said is not kept there, so its words are put together from the cubin; what is
    spilled goes through local memory, whose accesses are counted in place of it."""
    build, target = ROOT / "build/ninja", ROOT / f"build/ninja/{source.stem}.o"
    if source.parent.parent != CSRC or not target.exists():
        return None
    rules = (build / "build.ninja").read_text()
    command = re.search(r"rule nvcc\n  command = (\S+) (.*)", rules)
    if command is None or Path(command[1]) != toolkit() / "bin/nvcc" or without_files(command[2]) != nvcc_flags()[:-2]:
        return None
    if f"arch=compute_{arch},code=sm_{arch}" not in command[2]:
        return None
    if "no work to do" not in run(settings()["ninja_program"](), "-C", build, "-n", target).stdout:
        return None
    try:
        extract = disassembler("cuobjdump")
    except Missing:
        return None
    stem = CACHE / f"{source.stem}.sm_{arch}.library"
    cubin, log = stem.with_suffix(".library.cubin"), stem.with_suffix(".library.txt")
    if not log.exists() or log.stat().st_mtime < target.stat().st_mtime:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            run(extract, "-xelf", f"sm_{arch}.cubin", target, cwd=directory)
            (found,) = Path(directory).glob("*.cubin")
            words = Path(directory, "log")
            words.write_text(as_of_ptxas(found))
            found.replace(cubin)
            words.replace(log)
    return Compiled(source, arch, cubin, log.read_text())


def as_of_ptxas(cubin: Path) -> str:
    """What `ptxas -v` says of each kernel in a cubin, as far as `resources` reads it."""
    usage = run(disassembler("cuobjdump"), "-res-usage", cubin).stdout
    functions, said = sass.parse(run(disassembler(), "-c", cubin).stdout), []
    for symbol, words in re.findall(r"Function (\S+):\s*\n(.*)", usage):
        used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", words)}
        accesses = [i for i in functions[symbol].instructions if i.stem in ("STL", "LDL")]
        stores, loads = (sum(i.bits // 8 for i in accesses if i.stem == stem) for stem in ("STL", "LDL"))
        said += [
            f"Compiling entry function '{symbol}'",
            f"{used['STACK'] + used['LOCAL']} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads",
            f"Used {used['REG']} registers, {used['SHARED']} bytes smem",
        ]
    return "\n".join(said)


def compiled(source: Path, arch: str, include: Path = CSRC, cache: Path = CACHE) -> Compiled:
    """The cubin of a source for an architecture: the library's, or from the cache where nothing has changed since."""
    if (built := from_library(source, arch)) is not None:
        return built
    flags = (*nvcc_flags(), f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin")
    digest = hashlib.sha256(repr((flags, nvcc_version())).encode())
    for path in sorted(included(source, include)):
        digest.update(str(path.name).encode() + path.read_bytes())
    stem = f"{source.stem}.sm_{arch}"
    cubin = cache / f"{stem}.{digest.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".txt")
    if not log.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f"{stem}.{os.getpid()}.part"  # another process may be at it too
        result = run(toolkit() / "bin/nvcc", *flags, f"-I{include}", source, "-o", part)
        part.replace(cubin)
        for old in cache.glob(f"{stem}.*"):
            if old != cubin and old.suffix != ".part":
                old.unlink(missing_ok=True)
        part.write_text(result.stderr)
        part.replace(log)  # the log last: where it is, the cubin is too
    return Compiled(source, arch, cubin, log.read_text())


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Resources:
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def resources(log: str) -> dict[str, Resources]:
    """Of every kernel, by its symbol, from ptxas -v; the stack includes that of functions that were not inlined."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        symbol = part.partition("'")[0]
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if used is None or not frames:
            raise ValueError(f"ptxas says nothing of {symbol}")
        sums = [sum(int(frame[k]) for frame in frames) for k in range(3)]
        found[symbol] = Resources(int(used[1]), *sums, int(shared[1]) if shared else 0)
    return found


REGISTERS, REGISTERS_AT_A_TIME = 65536, 256  # of a multiprocessor; what a warp of 32 threads is given is a multiple of the latter
MOST_WARPS = {"75": 32, "86": 48, "89": 48, "120": 48}  # on a multiprocessor; elsewhere 64


@functools.cache
def threads_of_a_block(include: Path = CSRC) -> int:
    return int(re.search(r"\bkThreads = (\d+);", (include / "common/index.h").read_text())[1])


def resident_warps(registers: int, arch: str, threads: int) -> int:
    """How many warps a multiprocessor has registers for, in whole thread blocks; our kernels use little shared memory."""
    each = -(-32 * max(registers, 1) // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
    of_a_block = threads // 32
    return min(REGISTERS // each, MOST_WARPS.get(arch, 64)) // of_a_block * of_a_block


def demangled(symbols) -> dict[str, str]:
    symbols = list(symbols)
    lines = run(demangler(), input="\n".join(symbols) + "\n").stdout.splitlines()
    return dict(zip(symbols, lines, strict=True))


@dataclass
class MainPath:
    """Of one thread."""

    elements: float | None  # None where the kernel's name does not say their type
    instructions: int
    loop: int
    other_loops: int
    impossible: list[list[int]]
    counts: dict[str, int]
    per_element: dict[str, float]  # instructions, and those of each class; of its loop over vectors, where it has one
    multiplied_meanwhile: int | None = None  # wide multiplications while the first vectors are on their way

    def accesses(self, kind: str) -> dict[int, int]:
        """{bits: number} of the global "load" or "store" accesses."""
        widths = (key.split() for key in self.counts if key.startswith(f"{kind} "))
        return {int(bits): self.counts[f"{kind} {bits}"] for _, bits in widths}

    @property
    def bytes_loaded(self) -> int:
        """By 128-bit accesses."""
        return sum(bits // 8 * n for bits, n in self.accesses("load").items() if bits >= 128)

    @property
    def stores_vectors(self) -> bool:
        """Whether it stores what it makes; else it adds it up."""
        return "store 128" in self.counts or "store 256" in self.counts

    @property
    def share_of_128(self) -> float:
        """The share of the bytes, loaded and stored, that 128-bit accesses move."""
        accesses = [(bits, n) for kind in ("load", "store") for bits, n in self.accesses(kind).items()]
        total = sum(bits * n for bits, n in accesses)
        return sum(bits * n for bits, n in accesses if bits >= 128) / total if total else 0.0


@dataclass
class Kernel:
    op: str
    arch: str
    name: str  # demangled
    resources: Resources
    instructions: int  # in the whole kernel
    counts: dict[str, int]
    main: MainPath | None  # None where it makes no 128-bit access

    @property
    def label(self) -> str:
        return label(self.name)

    @property
    def bytes_in_flight(self) -> int:
        """What the threads on a multiprocessor have asked memory for before the first of them uses any of it."""
        warps = resident_warps(self.resources.registers, self.arch, threads_of_a_block())
        return 32 * warps * self.main.bytes_loaded if self.main is not None else 0


def main_path(function: sass.Function, name: str) -> MainPath | None:
    stored, loaded = element_bytes(name)

    def elements(stores, loads):
        size, vectors = (stored, stores) if stores else (loaded, loads)
        return 16 * vectors / size if size else None

    special = SPECIAL if SEEDED.search(name) else 0
    path = sass.main_path(function, lambda *vectors: special * (elements(*vectors) or 0))
    if path is None:
        return None
    n = elements(path.stores, path.loads)
    # of the loop over vectors where there is one
    each = path.body or path.instructions
    found = sass.counts(each)
    vectors = (found.get(f"{kind} 128", 0) + 2 * found.get(f"{kind} 256", 0) for kind in ("store", "load"))
    each_n = elements(*vectors)
    per_element = {"instructions": len(each) / each_n} | {key: found[key] / each_n for key in found} if each_n else {}
    impossible = [list(registers) for registers in path.impossible]
    meanwhile = sass.multiplied_meanwhile(path.instructions)
    return MainPath(n, len(path.instructions), path.loop, path.other_loops, impossible, path.counts, per_element, meanwhile)


def kernels(code: Compiled) -> list[Kernel]:
    """What the machine code says, and ptxas, of every kernel in it."""
    functions = sass.parse(run(disassembler(), "-c", code.cubin).stdout)
    used, names, found = resources(code.log), demangled(functions), []
    for symbol, function in functions.items():
        instructions = function.instructions
        main = main_path(function, names[symbol])
        counts = sass.counts(instructions)
        found.append(Kernel(code.source.parent.name, code.arch, names[symbol], used[symbol], len(instructions), counts, main))
    return sorted(found, key=lambda kernel: kernel.label)


def compiled_and_read(source: Path, arch: str, reads: bool = True) -> tuple[Compiled, list[Kernel]]:
    return (code := compiled(source, arch)), kernels(code) if reads else []


def in_processes() -> ProcessPoolExecutor:
    """One for each core, to compile and to read in: reading takes a third of the time."""
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)))


# ---- report ----------------------------------------------------------------------------------------------------------


COLUMNS = ("registers", "spilled", "instructions", "special", "exact")  # of a kernel on one GPU, as `benchmarks.report` reads them


def row(kernel: Kernel) -> list:
    """COLUMNS: bytes that are spilled; for an element on the main path, null where there is none, how many instructions and
    special-function operations, and whether these are exact."""
    used, main = kernel.resources, kernel.main
    figures = [None] * 3
    if main is not None and main.elements:
        each = (round(main.per_element.get(key, 0.0), 4) for key in ("instructions", "special"))
        figures = [*each, not (main.other_loops or main.impossible)]
    return [used.registers, used.spill_stores + used.spill_loads, *figures]


def slim(found: list[Kernel], environment: dict) -> str:
    """The JSON that is committed: a line for each kernel, [op, label, {GPU: COLUMNS}]."""
    rows = {}
    for kernel in found:
        rows.setdefault((kernel.op, kernel.label), {})[kernel.arch] = row(kernel)
    texts = ",\n".join(f"  {json.dumps([*name, of_each])}" for name, of_each in rows.items())
    head = f' "environment": {json.dumps(environment)},\n "columns": {json.dumps(COLUMNS)}'
    return f'{{\n{head},\n "kernels": [\n{texts}\n ]\n}}\n'


def order(kernel: Kernel):
    """Triton's kernels stand beside the CUDA kernel that does the same, or at the end of their op."""
    cuda = getattr(kernel, "cuda", kernel.label)
    return kernel.op, cuda == "", cuda, kernel.label != cuda, kernel.label, len(kernel.arch), kernel.arch


def lines(found: list[Kernel]) -> list[str]:
    from benchmarks import common  # imports torch, which the tests of the contract need not

    head = ("sm", "registers", "stack", "spills", "warps", "KB loading")
    head += ("elements", "instr/elem", "special", "conversions", "128-bit", "binds", "of copy")
    cells = {}
    for kernel in found:
        used, main, resident, limit = kernel.resources, kernel.main, ("", ""), ("", "")
        if type(kernel) is Kernel:  # how many warps a Triton kernel's block has is its launch's choice
            warps = resident_warps(used.registers, kernel.arch, threads_of_a_block())
            resident = str(warps), f"{kernel.bytes_in_flight / 1000:.0f}" if main is not None else ""
            if expected := bound.predicted(kernel):
                limit = expected.binds, f"{expected.share:.2f}"
        figures = ("",) * 5
        if main is not None and main.elements:
            each = (main.per_element.get(key, 0.0) for key in ("instructions", "special", "conversion"))
            flag = "~" if main.other_loops or main.impossible else ""
            numbers = (f"{flag}{number:.1f}" for number in each)
            figures = (f"{main.elements:g}", *numbers, f"{100 * main.share_of_128:.0f}%")
        spills = str(used.spill_stores + used.spill_loads)
        row = kernel.label, kernel.arch, str(used.registers), str(used.stack), spills, *resident, *figures, *limit
        cells.setdefault(kernel.op, []).append(row)
    said = []
    for op, rows in cells.items():
        titles, dashes, *body = common.table(head, [row[1:] for row in rows], left=1)
        said += [op, "", titles, dashes]
        for label, of_each in itertools.groupby(zip(rows, body, strict=True), lambda pair: pair[0][0]):
            said += [label, *(line for _, line in of_each)]
        said.append("")
    return said


def environment() -> dict:
    from benchmarks import common

    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    version = run(disassembler(), "--version").stdout
    return {
        "nvcc": re.search(r"V([\d.]+)", nvcc_version())[1],
        "nvdisasm": re.search(r"V([\d.]+)", version)[1],
        "triton": triton,
        "flags": list(nvcc_flags()),
        "fastgen": common.environment()["fastgen"],
        "commit": common.environment()["commit"],
        "dirty": common.environment()["dirty"],
    }


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.machine_code", description=__doc__.split("\n")[0])
    archs = [*ARCHS, "gfx942"]
    parser.add_argument("--arch", nargs="+", default=archs, metavar="SM", help=f"default: {' '.join(archs)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose label has it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the reports say of each kernel there too")
    parser.add_argument("--dirty", action="store_true", help="write FILE from a tree with changes too, which no commit gives again")
    options = parser.parse_args()
    try:
        e = environment()
        if options.json and e["dirty"] is not False and not options.dirty:
            sys.exit(
                "machine_code: --json: expected a tree without changes, so that its commit says what was compiled (or --dirty)"
            )
        jobs = [(source, arch) for source in sources() for arch in options.arch if not arch.startswith("gfx")]
        with in_processes() as pool:
            found = [kernel for _, read in pool.map(compiled_and_read, *zip(*jobs, strict=True)) for kernel in read]
    except Missing as missing:
        sys.exit(f"machine_code: {missing}")
    if importlib.util.find_spec("triton") is not None:
        from . import triton_code  # imports torch, and this module

        found += triton_code.read_all([arch for arch in options.arch if arch in triton_code.TARGETS])
    found = sorted((kernel for kernel in found if options.only in kernel.label), key=order)
    changes = ", tree with changes" if e["dirty"] else ""
    print(f"nvcc {e['nvcc']}, nvdisasm {e['nvdisasm']}, Triton {e['triton'] or 'none'}, commit {e['commit'] or 'none'}{changes}")
    print(
        "per element of a thread whose vectors are all inside and aligned, with all options of the kernel on: of its loop over them"
    )
    print("where it has one, else its set-up included; Triton's: of the call that is named; AMD's registers are the vector ones")
    print("warps: that a multiprocessor has room for, in whole blocks; KB loading: what these ask memory for at a time")
    gpus = ", ".join(f"sm_{arch} the {gpu.name}" for arch, gpu in bound.GPUS.items())
    print(f"binds, of copy: predicted, not measured: what takes longest, the share of copy speed ({gpus}; tools/bound.py)")
    print("elements: of a thread; conversions: F2F, F2I, I2F; 128-bit: share of the bytes; ~: not exact (see sass.Path)\n")
    print(*lines(found), sep="\n")
    if options.json:
        options.json.write_text(slim(found, e))


if __name__ == "__main__":
    from tools import machine_code  # not a second time under the name that triton_code imports

    machine_code.main()
