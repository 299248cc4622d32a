"""The contract on the machine code of the CUDA kernels. Needs nvcc and a disassembler, but no GPU.

FASTGEN_CUDA=0, which `make test` sets where there is no GPU, skips it: compiling takes minutes the first time (see
tools/machine_code.py for the cache). Every op is compiled for sm_80 and sm_90, or read out of the library that `make cuda` has
built for them, and for one older GPU and one newer in turns; --all: for all.
"""

import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, under every import mode of pytest

from fastgen._core import declared
from tools import bound, machine_code, sass

# Patterns of labels (`machine_code.label`): `python -m tools.machine_code` prints them.
# Kernels that must move their tensors in 128-bit accesses.
FAST = r"^(sum_kernel<Added<)?(Vectors|Tiles|BceVectors|GanVectors|ToUint8Vectors|.*\bBceVectorSum)<"
# The same, but with a loop over tensors around the loop over vectors, in which the main path is not always found.
NESTED = r"\bGanVectorSums<"
# Whose main path may have another loop, which moves no vectors: over the elements of a decoder, or over the other blocks' flags,
# where the path that is found of a sum is the last block's.
LOOPED = r"\bVlbTermsItems<|^sum_kernel<Added<\w+<(Steps|StepLogProbItems)<"
LOADS_NOTHING = r"\bRandn<|\bQSample<float, u8, .*, seed>"  # or bytes alone, of which a few are much
SEEDED_STEP = r"^(Vectors|Tiles)<DdpmStepPlain<float, bf16, bf16, bf16>, seed>"
# The share of an H100's copy speed that is predicted of kernels bound by instructions: the four sums of a GAN's monitors, and noise
# alone, which reads nothing and writes two bytes for each number that Philox makes.
SHORT_OF_COPY = {
    "sum_kernel<GanVectorSums<f32, true>>": 0.72,
    **{f"sum_kernel<GanVectorSums<{half}, true>>": 0.63 for half in ("f16", "bf16")},
    **{f"Vectors<Randn<float, {half}, {half}, {half}>, seed>": 0.63 for half in ("f16", "bf16")},
}
LEAST_SPECIAL, MOST_INSTRUCTIONS = 2, 40  # for each element of that step; a prototype had 2 and 36
# Losses of half precision: for each logit, of a loop over vectors or a whole thread. 22 are what an H100 issues in the time that it
# reads two bytes in (33 · 10¹² a second beside 3.0 · 10¹² bytes).
HALF_FORWARD = (
    r"^(BceVectors<BceTypes<b?f16, b?f16>, false>|sum_kernel<(BceVectorSum<BceTypes<b?f16, b?f16>>|GanVectorSums<b?f16, false>)>)"
)
HALF_BACKWARD = r"^(BceVectors<BceTypes<b?f16, b?f16>, true>|GanVectors<b?f16>)"
MOST_FORWARD, MOST_BACKWARD = 22, 28
# A multiprocessor must have room for so many warps of each kernel, in three blocks: less, and all wait for memory at a time.
LEAST_WARPS = 12
# What each multiprocessor must have asked memory for at a time if that is never to wait, by count and not measured: what memory
# moves, some nine tenths of what is said of A100, H100, B200 and RTX 5090, in 600 ns, which is assumed for an answer. A thread
# of ONE_TO_FOUR asks for up to four vectors of each operand, and where there is little work for one: a quarter must be enough,
# but on a B200, which needs two; one of ONE_OR_TWO asks for two at most. Its q_sample that makes noise issues some 33 instructions
# an element, of 4 bytes in bfloat16: at 148 · 128 lanes of 1.85 GHz that is 4.2 of its 7.0 TB/s, so 0.6 of the bytes keep it busy.
# reparameterize's backward issues 90 an element of 10 bytes, 3.9 TB/s, and its sample with the divergence 90 an element of 6 bytes,
# 2.3 TB/s.
LEAST_BYTES = {"80": 1.4e12 * 6e-7 / 108, "90": 3.0e12 * 6e-7 / 132, "100": 7.0e12 * 6e-7 / 148, "120": 1.6e12 * 6e-7 / 170}
ALWAYS_ONE = "VlbTermsItems|ReparameterizeKl|ReparameterizeGradient|GaussianKlItems"
ONE_OR_TWO = r"^Vectors<Reparameterize<"
ONE_TO_FOUR = rf"^(sum_kernel<Added<)?Vectors<(?!({ALWAYS_ONE})<)"
MAKES_NOISE, SHARE_WITH_NOISE = r"(^Vectors<QSample<|\b(VlbTermsItems|ReparameterizeGradient)<).*, seed>", {"100": 0.6}
SAMPLES_AND_ADDS, SHARE_WITH_KL = r"\bReparameterizeKl<.*, seed>", {"100": 0.4}
# Beside bytes, whose loads are of 32 or 64 bits and not counted, those of the network's output are so much of what is asked for.
# Those that make noise besides read three bytes or five for each number of it, which takes as long.
BOUND_BY_NOISE = r"\bDiffusionLossItems<float, u8, .*, seed>"
BESIDE_BYTES, SHARE_BESIDE_BYTES = r"\bDiffusionLossItems<float, u8, (\w+),", {"f32": 4 / 5, "bf16": 2 / 3}
SHORT_ON_B200, SHARE_ON_B200 = r"\bDiffusionLossItems<float, u8, f32, false>, no noise", 0.9  # it has 20 warps, of registers
FLAGS_AT_A_TIME = 8  # that a thread of the last block looks for: of 1024 blocks, 128 threads
LEAST_MEANWHILE = 15  # wide multiplications of that step, of 40 for the first vector's noise, before the vector is waited for
MOST_NARROW_LOADS = 24  # of a thread: the row of its sample, its timestep and seed, and whether there are any
MOST_NARROW_STORES = 2  # of the thread that is first in a sample: q_posterior's variance and its logarithm

TURNS = ("75", "86", "89"), ("120", "100")

SOURCES = {source.parent.name: source for source in machine_code.sources()}


def lacking(tool):
    """Why the tool is not used here, "" where it is."""
    try:
        tool()
        return "FASTGEN_CUDA=0" if os.environ.get("FASTGEN_CUDA") == "0" else ""
    except machine_code.Missing as missing:
        return str(missing)


NO_TOOLKIT, NO_DISASSEMBLER = lacking(machine_code.toolkit), lacking(machine_code.disassembler)
pytestmark = pytest.mark.skipif(bool(NO_TOOLKIT), reason=NO_TOOLKIT)
needs_disassembler = pytest.mark.skipif(bool(NO_DISASSEMBLER), reason=NO_DISASSEMBLER)
every_op = pytest.mark.parametrize("op", SOURCES)
every_arch = pytest.mark.parametrize("arch", machine_code.default_archs())
read_archs = pytest.mark.parametrize("arch", machine_code.ARCHS)


def asked_for(config, call):
    """The op and the architecture of a test's parameters; whether these are compiled."""
    op, arch = call.get("op", "ddpm_step"), call["arch"]
    turn = list(SOURCES).index(op)
    others = [archs[turn % len(archs)] for archs in TURNS]
    return op, arch, config.getoption("all") or arch in others or not any(arch in archs for archs in TURNS)


@pytest.fixture(autouse=True)
def in_turns(request):
    if not asked_for(request.config, request.node.callspec.params)[-1]:
        pytest.skip("it is another op's turn on this GPU; --all compiles every op for every GPU")


@pytest.fixture(scope="module", autouse=True)
def compiling(request):
    """Starts on what the tests that were selected will ask for, on all cores: the code and its kernels by op and architecture."""
    wanted: dict = {}
    for item in request.session.items:
        if item.path == request.path and hasattr(item, "callspec"):
            op, arch, compiles = asked_for(request.config, item.callspec.params)
            if compiles:
                reads = "kernels" in item.fixturenames and not NO_DISASSEMBLER
                wanted[op, arch] = wanted.get((op, arch), False) or reads
    with machine_code.in_processes() as pool:
        yield {
            (op, arch): pool.submit(machine_code.compiled_and_read, SOURCES[op], arch, reads)
            for (op, arch), reads in wanted.items()
        }
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def code(compiling, request):
    call = request.node.callspec.params
    return compiling[call.get("op", "ddpm_step"), call["arch"]].result()[0]


@pytest.fixture
def kernels(compiling, request):
    call = request.node.callspec.params
    return compiling[call.get("op", "ddpm_step"), call["arch"]].result()[1]


def fast(kernels):
    return [kernel for kernel in kernels if re.search(FAST, kernel.label)]


@every_arch
@every_op
def test_nothing_is_spilled(op, arch, code):
    found = machine_code.resources(code.log)
    names = machine_code.demangled(found)
    spilled = [
        f"{machine_code.label(names[symbol])}: stack {used.stack}, spilled {used.spill_stores + used.spill_loads} bytes"
        for symbol, used in found.items()
        if used.stack or used.spill_stores or used.spill_loads
    ]
    assert found
    assert not spilled


@every_arch
@every_op
def test_blocks_take_turns(op, arch, code):
    found, threads = machine_code.resources(code.log), machine_code.threads_of_a_block()
    warps = {symbol: machine_code.resident_warps(used.registers, arch, threads) for symbol, used in found.items()}
    names = machine_code.demangled(found)
    few = [f"{machine_code.label(names[symbol])}: {warps[symbol]} warps" for symbol in found if warps[symbol] < LEAST_WARPS]
    assert found
    assert not few


@needs_disassembler
@read_archs
@pytest.mark.parametrize("op", declared.STEMS)
def test_memory_is_kept_busy(op, arch, kernels):
    loading = [kernel for kernel in fast(kernels) if not re.search(f"{LOADS_NOTHING}|{BOUND_BY_NOISE}", kernel.label)]
    for kernel in loading:
        most = 2 if re.search(ONE_OR_TWO, kernel.label) else 4 if re.search(ONE_TO_FOUR, kernel.label) else 1
        share = max(1, most // 2) if arch == "100" else most
        least = LEAST_BYTES[arch] * (SHARE_WITH_NOISE.get(arch, 1.0) if re.search(MAKES_NOISE, kernel.label) else 1.0)
        if re.search(SAMPLES_AND_ADDS, kernel.label):
            least *= SHARE_WITH_KL.get(arch, 1.0)
        if found := re.search(BESIDE_BYTES, kernel.label):
            least *= SHARE_BESIDE_BYTES[found[1]]
        if arch == "100" and re.search(SHORT_ON_B200, kernel.label):
            least *= SHARE_ON_B200
        assert kernel.bytes_in_flight / share >= least, f"{kernel.label}: {kernel.bytes_in_flight} bytes"


@needs_disassembler
@read_archs
def test_noise_is_made_while_loads_are_on_their_way(arch, kernels):
    (step,) = (kernel for kernel in kernels if re.search(SEEDED_STEP, kernel.label) and kernel.label.startswith("Vectors<"))
    assert step.main.multiplied_meanwhile >= LEAST_MEANWHILE, step.label


@needs_disassembler
@read_archs
@pytest.mark.parametrize("op", ["bce_with_logits", "diffusion_loss", "gan_loss"])
def test_flags_are_read_together(op, arch, code):
    """One after another, each of the last block's threads would wait for memory twice for each of its blocks."""
    functions = sass.parse(machine_code.run(machine_code.disassembler(), "-c", code.cubin).stdout)
    names = machine_code.demangled(functions)
    sums = {symbol: function for symbol, function in functions.items() if "sum_kernel<" in names[symbol]}
    assert sums
    for symbol, function in sums.items():
        most = 0
        for block in function.blocks:
            loaded = set()
            for instruction in block.instructions:
                if not loaded.isdisjoint(instruction.read):
                    loaded = set()
                if sass.class_of(instruction.opcode) == "flag":
                    loaded.update(instruction.written[:1])
                    most = max(most, len(loaded))
        assert most == FLAGS_AT_A_TIME, f"{machine_code.label(names[symbol])}: {most}"


@needs_disassembler
@read_archs
@every_op
def test_no_local_memory(op, arch, kernels):
    local = [kernel.label for kernel in kernels if kernel.counts.get("local")]
    assert not local


@needs_disassembler
@read_archs
@pytest.mark.parametrize("op", declared.STEMS)
def test_128_bit_accesses(op, arch, kernels):
    assert fast(kernels), f"no label is like {FAST}: {[kernel.label for kernel in kernels]}"
    for kernel in fast(kernels):
        main = kernel.main
        assert main is not None and main.elements, kernel.label
        loops = 1 if re.search(LOOPED, kernel.label) else 0
        assert not main.impossible and main.other_loops <= loops, f"{kernel.label}: the main path is not understood"
        stores, loads = main.accesses("store"), main.accesses("load")
        narrow = {bits: count for bits, count in loads.items() if bits < 128}
        few = sum(count for bits, count in stores.items() if bits < 128)
        assert few <= MOST_NARROW_STORES or not main.stores_vectors, f"{kernel.label}: {stores}"
        assert max(loads, default=0) >= 128 or re.search(LOADS_NOTHING, kernel.label), f"{kernel.label}: {loads}"
        assert min(narrow, default=32) >= 32 and sum(narrow.values()) <= MOST_NARROW_LOADS, f"{kernel.label}: {loads}"


@needs_disassembler
@read_archs
@pytest.mark.parametrize("op", ["gan_loss"])
def test_128_bit_loads_in_nested_loops(op, arch, kernels):
    nested = [kernel for kernel in kernels if re.search(NESTED, kernel.label)]
    assert len(nested) == 6
    for kernel in nested:
        assert kernel.counts.get("load 128", 0) >= 2, f"{kernel.label}: {kernel.counts}"


@needs_disassembler
@read_archs
def test_instructions_of_the_seeded_step(arch, kernels):
    steps = [kernel for kernel in kernels if re.search(SEEDED_STEP, kernel.label)]
    assert steps, f"no label is like {SEEDED_STEP}"
    for kernel in steps:
        each = kernel.main.per_element
        # fewer would mean that the path read is not the one that makes noise, or not all of it
        assert each["special"] >= LEAST_SPECIAL, f"{kernel.label}: {each}"
        assert each["instructions"] <= MOST_INSTRUCTIONS, f"{kernel.label}: {each}"


@needs_disassembler
@read_archs
@pytest.mark.parametrize("op, forward", [("bce_with_logits", 4), ("gan_loss", 2)])
def test_instructions_of_half_precision_losses(op, forward, arch, kernels):
    for pattern, count, special, most in ((HALF_FORWARD, forward, 1, MOST_FORWARD), (HALF_BACKWARD, 2, 2, MOST_BACKWARD)):
        found = [kernel for kernel in kernels if re.search(pattern, kernel.label)]
        assert len(found) == count, f"{pattern}: {[kernel.label for kernel in kernels]}"
        for kernel in found:
            each = kernel.main.per_element
            assert each["special"] >= special, f"{kernel.label}: {each}"  # else not all of the path
            assert each["instructions"] <= most, f"{kernel.label}: {each}"


@needs_disassembler
@read_archs
def test_predicted_share_of_copy_speed(arch, kernels):
    """By what tools/bound.py predicts of an H100."""
    if arch != "90":
        pytest.skip("the aim is an H100's")
    found = {kernel.label: made for kernel in kernels if (made := bound.predicted(kernel))}
    for name, made in found.items():
        half = re.search(r"\bb?f16\b", name)
        needed = SHORT_OF_COPY.get(name, bound.NEEDED["half" if half else "float32"])
        assert made.share >= needed, f"{name}: {made}"
