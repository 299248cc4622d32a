"""The reader of machine code, on listings and kernels whose main path is known."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, under every import mode of pytest

from tools import machine_code, sass

ROOT = Path(__file__).resolve().parents[1]

# As nvdisasm -c prints it: a tail that stores one by one, a slow path that a call takes, and padding.
LISTING = """\t.target\tsm_90

//--------------------- .text._Z4tailPf --------------------------
\t.section\t.text._Z4tailPf,"ax",@progbits
\t.align\t128
.text._Z4tailPf:
        .type           _Z4tailPf,@function
        .other          _Z4tailPf,@"STO_CUDA_ENTRY STV_DEFAULT"
_Z4tailPf:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0030*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0040*/                   IMAD.WIDE.U32 R2, R0, 0x10, R2 ;
        /*0050*/                   ISETP.GT.U32.AND P0, PT, R0, 0x40, PT ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/                   BSSY B0, `(.L_x_1) ;
        /*0090*/                   MUFU.RCP R8, R4.reuse ;
        /*00a0*/                   FCHK P0, R4, R5 ;
        /*00b0*/                   FFMA R4, -R5, R8, R4 ;
        /*00c0*/              @!P0 BRA `(.L_x_0) ;
        /*00d0*/                   MOV R10, 0xf0 ;
        /*00e0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath) ;
.L_x_0:
        /*00f0*/                   BSYNC B0 ;
.L_x_1:
        /*0100*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0110*/                   EXIT ;
.L_x_2:
        /*0120*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0130*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0140*/                   EXIT ;
        .weak           $__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath
        .type           $__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath,@function
$__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:
        /*0150*/                   FMUL R4, R4, R5 ;
        /*0160*/                   RET.REL.NODEC R10 `(_Z4tailPf) ;
.L_x_3:
        /*0170*/                   BRA `(.L_x_3);
        /*0180*/                   NOP;
        /*0190*/                   NOP;
"""


def listing(*lines, name="k"):
    """A section in nvdisasm's format; a line is an instruction, with or without a predicate, or a label."""
    text, address = [f'\t.section\t.text.{name},"ax",@progbits', f".text.{name}:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
            continue
        guard, _, code = line.partition(" ") if line.startswith("@") else ("", "", line)
        text.append(f"        /*{address:04x}*/ {guard:>18} {code} ;")
        address += 16
    return "\n".join(text) + "\n"


def path(*lines, **options):
    return sass.main_path(sass.parse(listing(*lines))["k"], **options)


def addresses(result):
    return [i.address // 16 for i in result.instructions]


LOAD, STORE, ADDRESS = "LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4", "LDC.64 R2, c[0x0][0x210]"


def test_listing():
    functions = sass.parse(LISTING)
    assert list(functions) == ["_Z4tailPf"]
    function = functions["_Z4tailPf"]
    assert len(function.instructions) == 0x170 // 16  # no padding
    assert function.instructions[6] == (0x60, "P0", "BRA", "`(.L_x_2)")
    assert sass.counts(function.instructions) == {
        "constant": 3,  # LDC, LDC.64, ULDC.64
        "control": 8,
        "fp32": 3,
        "integer": 2,
        "load": 2,
        "load 128": 1,
        "load 32": 1,
        "move": 2,
        "special": 1,
        "store": 2,
        "store 128": 1,
        "store 32": 1,
        "wide multiplication": 1,
    }


def test_main_path_has_neither_the_tail_nor_the_slow_path():
    result = sass.main_path(sass.parse(LISTING)["_Z4tailPf"])
    assert addresses(result) == [*range(0x00, 0x0D), *range(0x0F, 0x12)]
    assert (result.stores, result.loads, result.loop, result.other_loops, result.impossible) == (1, 1, 0, 0, [])
    assert result.counts["special"] == 1


def test_straight_line():
    assert addresses(path(ADDRESS, LOAD, STORE, "EXIT", "NOP")) == [0, 1, 2, 3]


def test_no_vectors():
    assert path("LDG.E R4, desc[UR4][R2.64]", "STG.E.64 desc[UR4][R2.64], R4", "EXIT") is None


@pytest.mark.parametrize(
    "leave", ["@P0 EXIT", "@!P0 EXIT", "EXIT P0", "@P0 BRA `(.L_1)", "BRA.U !UP0, `(.L_1)", "BRA.DIV UR4, `(.L_1)"]
)
def test_what_may_leave_is_passed_by(leave):
    result = path(ADDRESS, leave, LOAD, STORE, ".L_1:", "EXIT")
    assert addresses(result) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("jump", ["BRA `(.L_1)", "@PT BRA `(.L_1)", "@UPT BRA `(.L_1)"])
def test_a_branch_that_always_goes_is_not(jump):
    assert addresses(path(ADDRESS, jump, LOAD, ".L_1:", STORE, "EXIT")) == [0, 1, 3, 4]


def test_branch_by_table():
    table = 'BRX R2 -0x20      (*"BRANCH_TARGETS .L_1,.L_2"*)'
    result = path(ADDRESS, table, ".L_1:", "EXIT", ".L_2:", LOAD, STORE, "EXIT")
    assert addresses(result) == [0, 1, 3, 4, 5]


def test_the_shortest_of_equals_with_the_most_loads():
    """.L_1 stores without having loaded (a row of NaN), .L_2 the same as what follows but slower."""
    nan = (".L_1:", "MOV R4, 0x7fc00000", STORE, "EXIT")
    slow = (".L_2:", LOAD, "FADD R4, R4, R5", "FADD R4, R4, R5", STORE, "EXIT")
    fast = (LOAD, "FMUL R4, R4, R5", STORE, "EXIT")
    result = path(ADDRESS, "@P0 BRA `(.L_1)", "@P1 BRA `(.L_2)", *fast, *nan, *slow)
    assert addresses(result) == [0, 1, 2, 3, 4, 5, 6]


def test_loop_tested_at_its_end():
    """A grid-stride loop: once round."""
    result = path(ADDRESS, "@P0 EXIT", ".L_1:", LOAD, "FADD R4, R4, R5", STORE, "@P0 BRA `(.L_1)", "EXIT")
    assert addresses(result) == [0, 1, 2, 3, 4, 5, 6]
    assert (result.stores, result.loop, result.other_loops) == (1, 4, 0)


def test_loop_tested_at_its_head():
    """Its head runs once more before the loop is left."""
    result = path(ADDRESS, ".L_1:", "@P0 BRA `(.L_2)", LOAD, STORE, "BRA `(.L_1)", ".L_2:", "EXIT")
    assert addresses(result) == [0, 1, 2, 3, 4, 1, 5]
    assert (result.stores, result.loop) == (1, 4)


def test_loop_without_vectors_is_noted():
    result = path(ADDRESS, LOAD, ".L_1:", "FADD R4, R4, R4", "@P0 BRA `(.L_1)", STORE, "EXIT")
    assert addresses(result) == [0, 1, 2, 3, 4, 5]
    assert (result.loop, result.other_loops) == (0, 1)


def test_nested_loops():
    inner = (".L_2:", "@P1 BRA `(.L_3)", LOAD, STORE, "BRA `(.L_2)")
    result = path(ADDRESS, ".L_1:", "@P0 BRA `(.L_4)", *inner, ".L_3:", "BRA `(.L_1)", ".L_4:", "EXIT")
    assert (result.stores, result.loads, result.loop) == (1, 1, 4)  # the inner one's
    assert addresses(result) == [0, 1, 2, 3, 4, 5, 2, 6, 1, 7]


@pytest.mark.parametrize(("call", "body"), [("CALL.REL.NOINC `($f)", True), ("@P0 CALL.REL.NOINC `($f)", False)])
def test_call(call, body):
    result = path(ADDRESS, LOAD, call, STORE, "EXIT", "$f:", "FADD R4, R4, R4", "@P0 FADD R4, R4, R4", "RET.REL.NODEC R10 `(k)")
    assert addresses(result) == ([0, 1, 2, 5, 6, 7, 3, 4] if body else [0, 1, 2, 3, 4])


def test_call_in_a_call_and_twice():
    inner, outer = ("$g:", "FADD R4, R4, R4", "RET.REL.NODEC R11 `(k)"), ("$f:", "CALL.REL.NOINC `($g)", "RET.REL.NODEC R10 `(k)")
    result = path(ADDRESS, LOAD, "CALL.REL.NOINC `($f)", "CALL.REL.NOINC `($g)", STORE, "EXIT", *outer, *inner)
    assert addresses(result) == [0, 1, 2, 6, 8, 9, 7, 3, 8, 9, 4, 5]


def test_a_call_that_does_not_come_back_is_a_branch():
    """How a loop ends on sm_80."""
    leave = ("@P0 CALL.REL.NOINC `(.L_2)", "BRA `(.L_1)")
    result = path(ADDRESS, ".L_1:", LOAD, STORE, *leave, ".L_2:", "FADD R4, R4, R4", "EXIT")
    assert addresses(result) == [0, 1, 2, 3, 5, 6]
    assert (result.loop, result.stores) == (3, 1)


def test_recursion_is_refused():
    with pytest.raises(ValueError, match="recursive"):
        path("CALL.REL.NOINC `($f)", STORE, "EXIT", "$f:", "@P0 CALL.REL.NOINC `($f)", "RET.REL.NODEC R10 `(k)")


def test_table_without_targets_is_refused():
    with pytest.raises(ValueError, match="no table"):
        path("BRX R2 -0x20", "EXIT")


def test_a_path_that_reads_what_nobody_wrote_is_not_taken():
    """The row (R8) is loaded where the sample is another than before: the graph alone would let both vectors skip it."""
    row = "LDG.E R8, desc[UR4][R2.64]"
    use = ("FMUL R4, R4, R8", STORE)
    lines = (ADDRESS, LOAD, "@P0 BRA `(.L_1)", row, ".L_1:", *use, LOAD, "@P1 BRA `(.L_2)", row, ".L_2:", *use, "EXIT")
    result = path(*lines)
    assert addresses(result) == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    assert result.impossible == []


def test_a_register_that_is_never_written_is_told():
    result = path(ADDRESS, LOAD, "FMUL R4, R4, R9", STORE, "EXIT")
    assert result.impossible == [range(9, 10)]


def test_predicates_kept_as_bits_of_a_register():
    """A bit may be cleared where nothing was written; two bits, or one set, are of a number."""
    clear, use = "LOP3.LUT R9, R9, 0xfffffffd, RZ, 0xc0, !PT", "FMUL R4, R4, R9"
    assert path(ADDRESS, LOAD, clear, use, STORE, "EXIT").impossible == []
    for other in ("LOP3.LUT R9, R9, 0xfffffffc, RZ, 0xc0, !PT", "LOP3.LUT R9, R9, 0x2, RZ, 0xfc, !PT"):
        assert path(ADDRESS, LOAD, other, use, STORE, "EXIT").impossible == [range(9, 10)]


def test_a_cleared_bit_does_not_hide_a_shortcut():
    """The row (R8) is loaded where the sample is another than before; the bit beside it says nothing of that."""
    row, clear = "LDG.E R8, desc[UR4][R2.64]", "LOP3.LUT R9, R9, 0xfffffffd, RZ, 0xc0, !PT"
    result = path(ADDRESS, LOAD, "@P0 BRA `(.L_1)", row, ".L_1:", clear, "FMUL R4, R4, R8", STORE, "EXIT")
    assert addresses(result) == list(range(8))
    assert result.impossible == []


def test_a_vector_that_a_predicate_may_overwrite_is_still_to_be_read():
    """Where an operand is absent, its registers are written otherwise."""
    otherwise = [f"@!P3 MOV R{register}, RZ" for register in range(4, 8)]
    store = "STG.E.128 desc[UR4][R2.64], RZ"
    result = path(ADDRESS, LOAD, ".L_1:", *otherwise, "@P1 BRA `(.L_2)", "FADD R8, R4, R5", ".L_2:", store, "EXIT")
    assert addresses(result) == list(range(10))
    assert result.impossible == []


def test_special_functions_that_must_be_there():
    """Without noise the path is shorter and stores as much."""
    normals = ("MUFU.LG2 R5, R4", "MUFU.SIN R6, R4")
    lines = (ADDRESS, LOAD, "@P0 BRA `(.L_1)", *normals, ".L_1:", STORE, "EXIT")
    assert addresses(path(*lines)) == [0, 1, 2, 5, 6]
    assert addresses(path(*lines, least_special=lambda stores, loads: 2 * stores)) == [0, 1, 2, 3, 4, 5, 6]


def test_multiplications_while_a_vector_is_on_its_way():
    wide, other = "IMAD.WIDE.U32 R10, R11, R12, RZ", "LDG.E.128 R20, desc[UR4][R2.64+0x10]"
    read = "FADD R12, R7, R10"
    instructions = path(
        ADDRESS, LOAD, wide, other, wide, wide, "LDG.E R13, desc[UR4][R2.64]", wide, read, wide, STORE, "EXIT"
    ).instructions
    assert sass.multiplied_meanwhile(instructions) == 3
    again = path(ADDRESS, LOAD, "MOV R7, RZ", wide, read, wide, STORE, "EXIT").instructions
    assert sass.multiplied_meanwhile(again) == 2  # R7 is no longer the vector's


def test_a_sum_counts_its_loads():
    result = path(ADDRESS, ".L_1:", LOAD, "FADD R4, R4, R5", "@P0 BRA `(.L_1)", "STG.E desc[UR4][R2.64], R4", "EXIT")
    assert (result.stores, result.loads, result.loop) == (0, 1, 3)


@pytest.mark.parametrize(
    ("opcode", "name", "bits"),
    [
        ("LDG.E", "load", 32),
        ("LDG.E.U16", "load", 16),
        ("LDG.E.64.CONSTANT", "load", 64),
        ("LDG.E.ENL2.256", "load", 256),
        ("LDG.E.64.STRONG.GPU", "flag", 64),
        ("LDG.E.128.STRONG.SYS", "load", 128),
        ("STG.E.EF.128", "store", 128),
        ("STG.E.U8", "store", 8),
        ("LDL.LU.64", "local", 64),
        ("ULDC.64", "constant", 64),
        ("LDCU.128", "constant", 128),
        ("MUFU.RCP64H", "special", 32),
        ("I2F.U32.RP", "conversion", 32),
        ("I2FP.F32.U32", "integer", 32),
        ("F2FP.BF16.F32.PACK_AB", "fp16", 32),
        ("IMAD.MOV.U32", "move", 32),
        ("IMAD.WIDE.U32", "integer", 32),
        ("UIADD3.X", "uniform", 32),
        ("FSETP.GEU.AND", "fp32", 32),
        ("BAR.SYNC.DEFER_BLOCKING", "barrier", 32),
    ],
)
def test_classes(opcode, name, bits):
    assert sass.class_of(opcode) == name
    if name in ("flag", "load", "store", "local", "constant"):
        assert sass.Instruction(0, "", opcode, "").bits == bits


# ---- names and ptxas -------------------------------------------------------------------------------------------------

VECTORS = (
    "fastgen::Vectors<fastgen::DdpmStepDevice<float, fastgen::Float32, fastgen::BFloat16, fastgen::Float32>, (fastgen::NoiseKind)2>"
)
KERNEL = f"void fastgen::(anonymous namespace)::device_kernel<{VECTORS} >({VECTORS})"


def test_label():
    assert machine_code.label(KERNEL) == "Vectors<DdpmStep<float, f32, bf16, f32>, seed>"
    assert machine_code.label("void f<int>(void (*)(int))") == "f<int>"
    assert machine_code.label("total(double*)") == "total"


def test_bytes_of_an_element():
    assert machine_code.element_bytes(KERNEL) == (8, 0)  # y and x0
    assert machine_code.element_bytes(KERNEL.replace("StepDevice", "StepPlainDevice")) == (4, 0)
    assert machine_code.element_bytes("copy(float*)") == (0, 0)


def test_resources():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Function properties for _Z6calleev
    4 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 1 barriers, 64 bytes smem, 696 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_80'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert machine_code.resources(log) == {
        "_Z1av": machine_code.Resources(38, 12, 12, 16, 64),
        "_Z1bv": machine_code.Resources(8, 0, 0, 0, 0),
    }


@pytest.mark.parametrize(
    ("registers", "arch", "threads", "warps"),
    [(137, "90", 256, 8), (137, "90", 128, 12), (168, "90", 128, 12), (169, "90", 128, 8), (255, "90", 128, 8)]
    + [(128, "90", 128, 16), (129, "90", 128, 12), (97, "90", 256, 16), (32, "90", 128, 64), (32, "75", 128, 32)],
)
def test_resident_warps(registers, arch, threads, warps):
    """As the CUDA occupancy calculator has it: in multiples of 8 registers a thread, in whole blocks."""
    assert machine_code.resident_warps(registers, arch, threads) == warps


# ---- a compiled file -------------------------------------------------------------------------------------------------

SOURCE = """
struct alignas(16) Vector { float x[4]; };
extern "C" __global__ void copy(const Vector* a, Vector* b) {
  const long i = blockIdx.x * 256l + threadIdx.x;
  b[i] = a[i];
}
// A division with a slow path, and a tail.
extern "C" __global__ void tail(const float* a, float* b, long n) {
  const long i = 4 * (blockIdx.x * 256l + threadIdx.x);
  if (i + 4 > n) {
    for (long k = i; k < n; ++k) b[k] = a[k] / a[0];
    return;
  }
  Vector v = *reinterpret_cast<const Vector*>(a + i);
  v.x[0] = v.x[0] / v.x[1];
  *reinterpret_cast<Vector*>(b + i) = v;
}
// An array with an index that the compiler cannot know.
extern "C" __global__ void local(const int* a, int* b) {
  int table[64];
  for (int k = 0; k < 64; ++k) table[(a[k] + k) & 63] = k;
  b[threadIdx.x] = table[a[threadIdx.x] & 63];
}
"""


@pytest.fixture(scope="module", params=machine_code.ARCHS)
def code(request, tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "known_cuda.cu"
    source.write_text(SOURCE)
    try:
        machine_code.disassembler()
        return machine_code.compiled(source, request.param, source.parent, source.parent / "cache")
    except machine_code.Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def kernels(code):
    return {kernel.name: kernel for kernel in machine_code.kernels(code)}


def test_compiled_copy(kernels):
    copy = kernels["copy"].main
    assert copy.accesses("load") == {128: 1} and copy.accesses("store") == {128: 1} and copy.share_of_128 == 1
    assert copy.instructions == kernels["copy"].instructions  # no branch
    assert not copy.impossible and copy.elements is None


def test_compiled_tail(kernels):
    tail = kernels["tail"].main
    assert tail.accesses("load") == {128: 1} and tail.accesses("store") == {128: 1}
    assert tail.counts["special"] == 1 and tail.instructions < kernels["tail"].instructions / 2
    assert not tail.impossible and not tail.other_loops


def test_compiled_local_array(kernels):
    local = kernels["local"]
    assert local.resources.stack >= 256 and local.counts["local"] > 0 and local.main is None
    assert all(kernels[name].resources.stack == 0 and "local" not in kernels[name].counts for name in ("copy", "tail"))


def test_cubin_agrees_with_ptxas(code):
    """Registers, stack and shared memory, as cuobjdump reads them."""
    try:
        tool = machine_code.disassembler("cuobjdump")
    except machine_code.Missing as missing:
        pytest.skip(str(missing))
    text = machine_code.run(tool, "-res-usage", code.cubin).stdout
    for symbol, used in machine_code.resources(code.log).items():
        line = text.partition(f"Function {symbol}:")[2].strip().splitlines()[0].split()
        assert [f"REG:{used.registers}", f"STACK:{used.stack}"] == line[:2]


def test_cache(code, monkeypatch):
    """A second request compiles nothing; another flag does."""
    monkeypatch.setattr(machine_code, "run", lambda *command, **options: pytest.fail(f"ran {command}"))
    arguments = code.source, code.arch, code.source.parent, code.cubin.parent
    assert machine_code.compiled(*arguments) == code
    monkeypatch.setattr(machine_code, "nvcc_flags", lambda: ("-O1",))
    with pytest.raises(pytest.fail.Exception, match="ran "):
        machine_code.compiled(*arguments)


def test_what_is_committed_has_a_line_for_each_kernel():
    used = machine_code.Resources(80, 0, 8, 4, 0)
    main = machine_code.MainPath(32.0, 1200, 0, 0, [], {}, {"instructions": 36.15625, "special": 2.0})
    found = [machine_code.Kernel("op", arch, "void f<Float32>(int)", used, 1500, {}, main) for arch in ("90", "100")]
    found.append(machine_code.Kernel("op", "90", "void g(int)", used, 20, {}, None))
    text = machine_code.slim(found, {"commit": "0123456789ab"})
    said = {"90": [80, 12, 36.1562, 2.0, True], "100": [80, 12, 36.1562, 2.0, True]}
    kernels = [["op", "f<f32>", said], ["op", "g", {"90": [80, 12, None, None, None]}]]
    assert json.loads(text) == {
        "environment": {"commit": "0123456789ab"},
        "columns": [*machine_code.COLUMNS],
        "kernels": kernels,
    }
    assert [line.strip(" ,") for line in text.splitlines()][-4:-2] == [json.dumps(kernel) for kernel in kernels]


def test_numbers_of_a_tree_with_changes_are_not_committed(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_code, "environment", lambda: {"dirty": True})
    monkeypatch.setattr(sys, "argv", ["machine_code", "--json", str(tmp_path / "code.json")])
    with pytest.raises(SystemExit, match="expected a tree without changes"):
        machine_code.main()
    assert not any(tmp_path.iterdir())


def test_included_files():
    source = ROOT / "csrc/ddpm_step/ddpm_step_cuda.cu"
    names = {path.name for path in machine_code.included(source, ROOT / "csrc")}
    assert {"ddpm_step_cuda.cu", "ddpm_step.h", "q_sample.h", "philox.h"} <= names


def test_missing_disassembler(monkeypatch, tmp_path):
    """Says what is missing, and where it was looked for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    find = machine_code.importlib.util.find_spec
    monkeypatch.setattr(machine_code.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    machine_code.disassembler.cache_clear()
    with pytest.raises(machine_code.Missing, match="nvdisasm: Triton is not installed.*not on the PATH"):
        machine_code.disassembler()
    machine_code.disassembler.cache_clear()
