"""Checks the installed fastgen, in the environment and beside the torch that run this: one line of JSON for each check.

    python -I tools/check_wheel.py          # -I: neither the working directory nor PYTHONPATH can shadow what is installed

The tests' own calls and samples are used (tests/test_compile.py, tests/test_dispatch.py), hence pytest and numpy are needed. Where
torch is too old for the libraries, it is checked that every function works without them.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

from report import report  # noqa: E402


def imported():
    """From where it was installed, with every module that the sources have."""
    import fastgen

    package = Path(fastgen.__file__).parent
    assert package != ROOT / "fastgen", f"{package} is the source tree"
    sources = {path.relative_to(ROOT / "fastgen") for path in (ROOT / "fastgen").rglob("*.py")}
    absent = sorted(str(path) for path in sources if not (package / path).exists())
    assert not absent, f"not in the wheel: {absent}"
    assert all((package / f"_fastgen_{name}.so").exists() for name in ("cpu", "cuda")), "a library is not in the wheel"
    reason = fastgen._core.backends._UNAVAILABLE["cpu"]
    assert not reason or "older than" in reason, reason
    return "yes" if not reason else "yes, eager only"


def symbols():
    """Every symbol of both libraries resolved and every op registered; beside a CPU-only torch, libtorch_cuda.so is a stand-in."""
    import fastgen

    if not fastgen._core.backends.HAS_OPS:
        return "–"
    if torch.version.cuda is None:
        ctypes.CDLL(str(ROOT / "build/ninja/libtorch_cuda.so"), mode=os.RTLD_NOW | os.RTLD_GLOBAL)
    ctypes.CDLL(str(Path(fastgen.__file__).parent / "_fastgen_cuda.so"), mode=os.RTLD_NOW)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastgen::") and has(name, "CPU")]
    shared = {f"fastgen::{name}" for name, op in fastgen._core.declared.OPS.items() if op.cuda}
    absent = [name for name in names if not has(name, "CUDA") and name.split(".")[0] in shared]
    assert names and not absent, f"no CUDA kernel registered: {absent}"
    return "both" if torch.version.cuda else "both (stand-in)"


def calls():
    """(name, call) of every public function with ints, then with tensors."""
    from conftest import normal
    from test_compile import FORWARD, SHAPE

    import fastgen

    schedule, x, m = fastgen.Schedule.linear(40, 1e-3, 0.2), normal(SHAPE, 0), normal(SHAPE, 1)
    for name, function in FORWARD.items():
        for t, seed in ((7, 11), (torch.tensor([39, 0, 5]), torch.tensor([5, -1, 2**40]))):
            yield name, lambda x=x, function=function, t=t, seed=seed: function(schedule, x, m, t, seed)


def ops():
    """The compiled kernels agree with eager PyTorch; normals may differ by 1e-3 where the radius is near 0."""
    import fastgen

    names = set()
    for name, call in calls():
        with fastgen.use_backend("eager"):
            expected = call()
        with fastgen.use_backend("cpp" if fastgen._core.backends.HAS_OPS else None):
            torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        names.add(name)
    return f"{len(names)} calls"


def opcheck():
    import fastgen

    if not fastgen._core.backends.HAS_OPS:
        return "–"
    from test_dispatch import op_samples

    names = []
    for name, arguments, keywords in op_samples():
        torch.library.opcheck(getattr(torch.ops.fastgen, name).default, arguments, keywords)
        names.append(name)
    return f"{len(set(names))} ops"


def compiles():
    """One op with inductor and no graph break."""
    import fastgen

    if not fastgen._core.backends.HAS_OPS:
        return "–"
    (call,) = [call for name, call in calls() if name == "ddpm_step"][:1]
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(), call(), rtol=1e-5, atol=1e-5)
    return "yes"


if __name__ == "__main__":
    report({"imported": imported, "symbols": symbols, "ops": ops, "opcheck": opcheck, "compile": compiles})
