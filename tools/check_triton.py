"""Checks the Triton backend of this tree beside the torch and the Triton that run this: one line of JSON for each check.

    python -I tools/check_triton.py

Needs no GPU: the tests run in Triton's interpreter, and the kernels are compiled ahead of time, for GPUs that need not be there.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

from report import report  # noqa: E402

# Every op on its samples; then, of the ops' own files, the values for each kind of timestep and dtype.
TESTS = ("tests/test_triton_samples.py", "tests/test_triton_direct.py", "tests/test_q_sample.py", "tests/test_q_posterior.py")
TARGETS = ("90", "gfx942")


def version():
    return importlib.metadata.version("triton")


def imported():
    """`import fastgen` leaves Triton alone; its Triton backend can be imported, and registers its ops."""
    before = "triton" in sys.modules  # brought by torch itself
    import fastgen

    assert Path(fastgen.__file__).is_relative_to(ROOT), f"{fastgen.__file__} is not of this tree"
    assert before or "triton" not in sys.modules, "import fastgen imports triton"
    assert fastgen._core.backends.HAS_OPS, fastgen._core.backends._UNAVAILABLE["cpu"]
    import fastgen.triton

    return f"yes, {len(fastgen.triton.FUNCTIONS)} ops"


def interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton and (samples or test_values)", *TESTS]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(run.stdout, run.stderr, file=sys.stderr)
    assert run.returncode == 0, (run.stdout.strip() or run.stderr.strip()).splitlines()[-1]
    return re.search(r"(\d+) passed", run.stdout).group(1)


def compiled():
    """Every way in which a kernel is compiled, each for one dtype: launched without fusion of its own accord, and compiling."""
    from tools import triton_code

    kernels, count = set(), 0
    for job in triton_code.jobs(TARGETS):
        if job.dtype is not triton_code.CALLS[job.call].dtypes[-1]:
            continue
        for launch in triton_code.launches(job.call, job.dtype):
            assert launch.options["enable_fp_fusion"] is False, f"{job.label}: Triton's default for fusion is left to it"
            made = triton_code.compiled(launch, job.target)
            assert made.metadata.enable_fp_fusion is False and {"cubin", "hsaco"} & made.asm.keys(), job.label
            kernels.add(launch.kernel.__name__)
            count += 1
    every, _ = triton_code.kernel_names()
    assert kernels == every, f"not compiled: {sorted(every - kernels)}"
    return f"{len(kernels)} ({count} variants)"


if __name__ == "__main__":
    report({"triton": version, "imported": imported, "interpreted": interpreted, "compiled": compiled})
