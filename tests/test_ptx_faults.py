"""Faults are put into the CUDA code one by one, and the PTX machine has to notice each: by a wrong value, or by itself."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import ptx_machine
import pytest

pytestmark = pytest.mark.skipif(not ptx_machine.LIBRARY, reason="needs the machine: python tests/device_on_ptx.py")
ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    op: str  # of which the kernels are compiled again: the ones that take the least time
    file: str
    good: str
    bad: str
    notice: str = "AssertionError"  # of a wrong value; or what the machine says


SUM, LAUNCH, DRIVER, ELEMENTS = "common/cuda_sum.cuh", "common/cuda_launch.cuh", "common/device_driver.h", "common/elementwise.h"
STORE_SUMS = "        FG_UNROLL\n        for (int i = 0; i < n; ++i)\n          sums[blockIdx.x * n + i] = values[i];\n"
STORE_FLAG = "        store_flag(flags + blockIdx.x, part.scratch.launch_number);\n"
ITEM = "const int64_t item = block * kThreads + thread;"
FAULTS = {
    # sums
    "no barrier before the warps' sums are read": Fault(
        "gan_loss", SUM, "  __syncthreads();\n  if (threadIdx.x == 0)", "  if (threadIdx.x == 0)", "a race on shared memory"
    ),
    "no barrier behind them": Fault(
        "gan_loss",
        SUM,
        "values[i] += warps[w][i];\n  }\n  __syncthreads();",
        "values[i] += warps[w][i];\n  }",
        "a race on shared memory",
    ),
    "a flag that is not released": Fault("gan_loss", SUM, "st.release.gpu", "st.relaxed.gpu"),
    "a flag before the sums": Fault("gan_loss", SUM, STORE_SUMS + STORE_FLAG, STORE_FLAG + STORE_SUMS),
    "no fence behind the flags": Fault("gan_loss", SUM, "    acquire_flags();\n", ""),
    "flags that are not taken away": Fault("gan_loss", SUM, "flags[k] = 0;", "flags[k] = part.scratch.launch_number;"),
    "a shuffle of half a warp": Fault(
        "gan_loss", SUM, "__shfl_down_sync(0xFFFFFFFF,", "__shfl_down_sync(0x0000FFFF,", "a lane that its mask leaves out"
    ),
    "half of a shuffle's distances": Fault("gan_loss", SUM, "distance = 16", "distance = 8"),
    "a block too few": Fault(
        "gan_loss", SUM, "static_cast<unsigned>(blocks), kThreads", "static_cast<unsigned>(blocks - 1), kThreads"
    ),
    "items that two threads add": Fault(
        "gan_loss", SUM, "chunk * plan.threads + threadIdx.x", "chunk * (plan.threads - 1) + threadIdx.x"
    ),
    "a sum that is left out": Fault(
        "gan_loss", SUM, "first + k * kThreads < end ? theirs[k]", "first + k * kThreads + 1 < end ? theirs[k]"
    ),
    # elements
    "half the threads": Fault("randn", LAUNCH, "kThreads, 0, stream>>>(way)", "kThreads / 2, 0, stream>>>(way)"),
    "threads without a bound": Fault("randn", DRIVER, "if (item < way().items()) way()", "way()", "no such memory"),
    "a dropped tail": Fault(
        "randn", DRIVER, "(g.event % n + plan.left_over * n + 3) / 4", "(g.event % n + plan.left_over * n) / 4"
    ),
    "a group without an end": Fault("randn", DRIVER, "if (4 * group + k >= a.geometry.event) return;", "", "no such memory"),
    "an index of too few bits": Fault("randn", DRIVER, ITEM, ITEM.replace("block *", "static_cast<uint8_t>(block) *")),
    "swapped lanes": Fault(
        "randn", "common/normal.h", "box_muller<R>(r.r2, r.r3, z[2], z[3]);", "box_muller<R>(r.r2, r.r3, z[3], z[2]);"
    ),
    "another group's noise": Fault("randn", DRIVER, "k) * (n / 4) + q, z", "k) * (n / 4), z"),
    "a wrong row stride": Fault(
        "q_posterior", ELEMENTS, "(inside ? t : 0) * rows.columns", "(inside ? t : 0) * (rows.columns - 1)"
    ),
    "a timestep outside the table that is looked up": Fault(
        "q_posterior", ELEMENTS, "inside = t >= 0 && t < rows.count", "inside = true", "no such memory"
    ),
    "vectors where nothing is aligned": Fault(
        "q_posterior", DRIVER, "x.dtype == dtype && aligned(x.data)", "x.dtype == dtype", "misaligned: 16 bytes"
    ),
    "a sample's row for the next one": Fault("q_posterior", DRIVER, "row = op.row(b);", "row = op.row(b > 0 ? b - 1 : b);"),
    "a wrong stride of samples": Fault("q_posterior", DRIVER, "return b * x.batch_stride +", "return b * (x.batch_stride - 4) +"),
}
OPS = ("gan_loss", "randn", "q_posterior")

CHECK = '''
import sys
from unittest import mock

sys.path.insert(0, {tests!r})
import torch

import ptx_machine
import fastgen

DEVIATION = {{torch.float32: 2e-5, torch.bfloat16: 1e-2}}

def calls(op):
    """Each a function, what it reads besides, and whether it is to run again with other data."""
    normal = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if op == "gan_loss":
        for count in (100_003, 300):
            x, y = normal(count), normal(count, seed=1)
            yield lambda x=x, y=y: fastgen.discriminator_loss(x, y), x
        z = normal(40, 500)
        yield lambda: fastgen.generator_loss(z, reduction="sum"), z
    elif op == "randn":
        for shape in ((1, 1_300_001), (3, 7), (2, 3, 8, 8)):
            for dtype in (torch.float32, torch.bfloat16):
                yield lambda shape=shape, dtype=dtype: fastgen.randn(shape, seed=5, dtype=dtype), None
    else:
        schedule = fastgen.Schedule.linear(40, 1e-3, 0.2)
        for x in (normal(3, 4, 33), normal(3, 4, 8), normal(1, 999), normal(2 * 64 + 1)[1:].view(2, 64)):
            for t in (17, torch.tensor([39, 0, 17][: len(x)])):
                yield lambda x=x, y=x.cos(), t=t: fastgen.q_posterior(x, y, t, schedule)[0], x
        # a timestep outside the table, which on a GPU the host does not see
        x, rows = normal(2, 64), schedule.q_posterior_table(torch.device("cpu"), torch.float32).rows
        operands = x, x, rows, torch.tensor([3, 10**6]), 0
        yield (lambda: torch.ops.fastgen.q_posterior(*operands)[0]), None

def same(a, b):
    torch.testing.assert_close(a.float(), b.float(), rtol=DEVIATION[a.dtype], atol=DEVIATION[a.dtype], equal_nan=True)

def expected(call):
    """By eager PyTorch."""
    ops = fastgen._ops.q_posterior
    by_reference = mock.patch.object(torch.ops.fastgen, "q_posterior", lambda *o: ops.reference(ops.Operands(*o)))
    with fastgen.use_backend("eager"), by_reference:
        return call()

for adversary in ({{}}, {{"order": 2, "seed": 1, "resident": 16}}, {{"order": 2, "seed": 2, "resident": 16, "delayed": 1}}):
    for call, data in calls({op!r}):
        with ptx_machine.settings(**adversary):
            same(call(), expected(call))
            if data is None or "order" not in adversary:
                continue
            with ptx_machine.launches_wait():
                made = call()
                ptx_machine.run_waiting()
                data.mul_(-0.5)
                ptx_machine.run_waiting()
                again = made.clone()
            same(again, expected(call))
print("right")
'''


def checked(fault: Fault | None, op: str, folder: Path):
    """The output of the check, beside a package whose kernels of this op are compiled from faulty sources."""
    sys.path.insert(0, str(ROOT))
    import device_on_ptx

    arch = re.search(r"device_on_ptx/(\w+)/", ptx_machine.LIBRARY)[1]
    here = device_on_ptx.folder(arch)
    shutil.copytree(here / "fastgen", folder / "fastgen", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    if fault:
        path = folder / "csrc" / fault.file
        text = path.read_text()
        assert fault.good in text, f"{fault.file} has no {fault.good!r} any more"
        path.write_text(text.replace(fault.good, fault.bad))
    source, made = folder / f"csrc/{op}/{op}_cuda.cu", folder / f"{op}_cuda.o"
    nvcc = device_on_ptx.machine_code.toolkit() / "bin/nvcc"
    environment = os.environ | {"LD_PRELOAD": ""}
    flags = device_on_ptx.nvcc_flags(arch).replace(str(ROOT / "csrc"), str(folder / "csrc"))
    shell(f"{nvcc} {flags} -c {source} -o {made}", environment)
    objects = [made, *(each for each in here.glob("*.o") if each.name != made.name and not each.name.startswith("ptx_"))]
    library = folder / "fastgen/_fastgen_cpu.so"
    shell(f"g++ -shared -o {library} {' '.join(map(str, objects))} {device_on_ptx.LIBRARIES}", environment)
    code = CHECK.format(tests=str(ROOT / "tests"), op=op)
    environment = os.environ | {"PYTHONPATH": str(folder), "FASTGEN_LAUNCHED": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


def shell(command, environment):
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("op", OPS)
def test_no_fault_is_seen_where_none_is(op, tmp_path):
    done = checked(None, op, tmp_path)
    assert done.stdout == "right\n", done.stderr[-2000:]


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_noticed(name, tmp_path):
    fault = FAULTS[name]
    done = checked(fault, fault.op, tmp_path)
    assert "right" not in done.stdout
    assert fault.notice in done.stderr, done.stderr[-2000:]
