"""The contract on the machine code of the Triton kernels, compiled ahead of time: needs Triton, but no GPU.

FASTGEN_TRITON_ARCHS lists the targets ("80 90 100 120 gfx942" are all); without it only two. What is compiled is
tools/triton_code.py's CALLS, each of them on every target, for one of its dtypes on each of NVIDIA's in turns; --all: for all. It
runs in processes of its own, since in one of TRITON_INTERPRET=1 nothing can be compiled.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, under every import mode of pytest

from tools import amdgcn, machine_code, triton_code

TARGETS = os.environ.get("FASTGEN_TRITON_ARCHS", "90 gfx942").split()
FUSION = [target for target in TARGETS if target in ("90", "gfx942")]  # of each compiler one: the same code goes into it
MOST_NARROW_LOADS = 9  # of a thread: the row of its sample, its timestep and seed


def missing():
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        machine_code.disassembler("cuobjdump")
    except machine_code.Missing as missing:
        return str(missing)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
every_op = pytest.mark.parametrize("op", dict.fromkeys(call.op for call in triton_code.CALLS))
every_target = pytest.mark.parametrize("target", TARGETS)


@pytest.fixture(scope="module")
def processes():
    with triton_code.pool() as processes:
        yield processes
        processes.shutdown(cancel_futures=True)


@pytest.fixture(scope="module", autouse=True)
def compiling(request, processes):
    """Starts on what the tests that were selected will ask for, whose results there will be by op, target and job: the kernels,
    and their digests where floating-point operations may be fused."""
    calls = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    in_turns = not request.config.getoption("all")
    read, fused = {}, {}
    for op, target in dict.fromkeys((call["op"], call["target"]) for call in calls):
        jobs = triton_code.jobs([target], None, op, in_turns)
        read[op, target] = {job: processes.submit(triton_code.read, job) for job in jobs}
        if target in FUSION:
            jobs = triton_code.jobs([target], True, op, in_turns)
            fused[op, target] = {job: processes.submit(triton_code.digests, job) for job in jobs}
    return read, fused


@pytest.fixture
def kernels(compiling, op, target):
    return [kernel for future in compiling[0][op, target].values() for kernel in future.result()]


@every_target
@every_op
def test_nothing_is_spilled(op, target, kernels):
    assert kernels
    for kernel in kernels:
        used = kernel.resources
        if not kernel.fast and used.stack <= 8:  # the sums of all monitors at once, on sm_120
            continue
        assert used.stack == used.spill_stores == 0, f"{kernel.label}: {used}"
        # to AMD's scalar registers, which are spilled to lanes of a vector register: float64's polynomials have many constants, as
        # has the discretised decoder
        constants = kernel.label.endswith("f64") or op.startswith("vlb_terms")
        assert used.spill_loads == 0 or (target.startswith("gfx") and constants), f"{kernel.label}: {used}"
        assert "local" not in kernel.counts, kernel.label


@every_target
@every_op
def test_128_bit_accesses(op, target, kernels):
    fast = [kernel for kernel in kernels if kernel.fast]
    assert fast
    for kernel in fast:
        if target.startswith("gfx") and ("channels-last" in kernel.label or op.startswith(("vlb_terms", "to_uint8"))):
            # with 64 threads a warp, there are fewer elements for each: vlb_terms' tile is half the others', and to_uint8 loads
            # 64 bits at a time
            continue
        main = kernel.main
        stores, loads = main.accesses("store"), main.accesses("load")
        assert max(loads, default=0) >= 128 or op.startswith("randn"), f"{kernel.label}: {loads}"
        if kernel.adds:
            continue
        assert not main.impossible and not main.other_loops, f"{kernel.label}: the main path is not understood"
        narrow = {bits: count for bits, count in loads.items() if bits < 128}
        # q_posterior's variances are of a sample
        assert stores and (max if op == "q_posterior" else min)(stores) >= 128, f"{kernel.label}: {stores}"
        assert min(narrow, default=32) >= 32 and sum(narrow.values()) <= MOST_NARROW_LOADS, f"{kernel.label}: {loads}"


@every_target
@every_op
def test_threads_exchange_nothing(op, target, kernels):
    for kernel in kernels:
        if target.startswith("gfx") and "channels-last" in kernel.label:
            continue  # see above
        if kernel.fast and not kernel.adds:
            assert kernel.resources.shared == kernel.conversions == 0, kernel.label
            assert not {"shared", "exchange", "barrier"} & kernel.counts.keys(), f"{kernel.label}: {kernel.counts}"


@pytest.mark.parametrize("target", FUSION)
@every_op
def test_fusion_changes_nothing(op, target, kernels, compiling):
    """No result depends on Triton's default, nor on Inductor's, which launches with it. The launches say it all the same."""
    assert {kernel.fused for kernel in kernels} == {False}
    read, fused = (made[op, target] for made in compiling)
    for job, future in fused.items():
        usual = read[job._replace(fusion=None)].result()
        differ = [kernel.label for kernel, code in zip(usual, future.result(), strict=True) if kernel.code != code]
        assert not differ


FUSED = """
import torch, triton
import triton.language as tl
from tools import triton_code

@triton.jit
def kernel(x, CONTRACT: tl.constexpr):
    i = tl.arange(0, 128)
    a = tl.load(x + i)
    tl.store(x + i, tl.fma(a, a, a) if CONTRACT else a * a + a)

for contract in (False, True):
    launch = triton_code.Launch(kernel, (1,), (torch.empty(128),), {"CONTRACT": contract})
    for target in ("90", "gfx942"):
        print(len({triton_code.digest(triton_code.compiled(launch, target, fusion)) for fusion in (False, True)}))
"""


def test_fusion_would_be_seen(tmp_path):
    """In a kernel that leaves it to the compiler whether a product and a sum are one operation."""
    script = tmp_path / "fused.py"
    script.write_text(FUSED)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (machine_code.ROOT, *sys.path)))
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.split() == ["2", "2", "1", "1"], result.stdout + result.stderr


def test_every_kernel_is_called(processes):
    known, called = processes.submit(triton_code.kernel_names).result()
    assert known and known == called


# ---- the reader of AMD's assembly ------------------------------------------------------------------------------------

ASSEMBLY = """
	.text
kernel:                                 ; @kernel
.Lfunc_begin0:
	.loc	1 31 0
	s_load_dwordx8 s[4:11], s[0:1], 0x8
	s_cbranch_execnz .LBB0_3
.LBB0_1:                                ; the loop
	buffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
	global_load_ushort v5, v[6:7], off
	v_exp_f32_e32 v0, v0
	v_cvt_f32_i32_e32 v1, v1
	s_cbranch_scc1 .LBB0_1
.LBB0_2:
	global_store_dwordx2 v[6:7], v[0:1], off
	s_endpgm
.LBB0_3:                                ; behind the end, but no loop
	v_mov_b32_e32 v0, 0
	s_branch .LBB0_2
.Lfunc_end0:
	.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     0
    .vgpr_count:     26
    .vgpr_spill_count: 3
...
	.end_amdgpu_metadata
"""


def test_amd_assembly():
    lines = amdgcn.body(ASSEMBLY, "kernel")
    code = amdgcn.instructions(lines)
    assert len(code) == 11 and len(lines) == 14
    assert [line.split()[0] for line in amdgcn.loop(lines)] == [line.split()[0] for line in code[2:7]]
    assert amdgcn.counts(code) == {
        "constant": 1,
        "control": 4,
        "conversion": 1,
        "load": 2,
        "load 128": 1,
        "load 16": 1,
        "special": 1,
        "store": 1,
        "store 64": 1,
        "vector": 1,
    }
    assert amdgcn.metadata(ASSEMBLY) == {"vgpr_count": 26, "vgpr_spill_count": 3}
    assert amdgcn.loop([line for line in lines if "scc1" not in line]) == []
