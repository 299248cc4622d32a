"""The CPU kernels' instruction sets, chosen at run time, agree to rounding."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastgen

pytestmark = pytest.mark.skipif(not fastgen._core.backends.HAS_OPS, reason="the compiled library is absent")

# the inputs are NumPy's, since ATen's functions round by instruction set too
RESULTS = """
import numpy as np, torch, fastgen

def of_torch(dtype):
    x = torch.empty(3, 217, dtype=dtype).zero_()
    states = torch.Generator().manual_seed(3).get_state()
    if dtype is not torch.float64:
        torch.ops.fastgen.torch_randn(x, states, True)
    return torch.cat([x.double().view(-1), states[8:24].double()])

def results():
    schedule = fastgen.Schedule.linear(40, 1e-3, 0.2)
    made = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        grid = np.linspace(-2, 2, 3 * 5 * 217).reshape(3, 5, 217)
        x, m, z = (torch.tensor(values, dtype=dtype) for values in (grid, np.sin(7 * grid), np.cos(5 * grid)))
        v = torch.cat([z, m], 1)
        x.view(-1)[[3, 100, 3000]] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        t, s = torch.tensor([0, 17, 39]), torch.tensor([0.5, 1.0, 1.5])
        leaf = (4 * z).requires_grad_()
        fastgen.bce_with_logits(leaf, m.abs(), pos_weight=torch.tensor(2.0)).backward()
        card = {"multiprocessors": 1, "threads_per_multiprocessor": 512}
        for name, y in {
            "randn": fastgen.randn((3, 217), seed=-5, offset=2**32, dtype=dtype),
            "torch_cuda": fastgen.randn((3, 2170), seed=-5, offset=8, dtype=dtype, stream="torch-cuda", **card),
            "torch": of_torch(dtype),
            "tiny": fastgen.randn((217, 3), seed=torch.arange(217), dtype=dtype),
            "q_sample": fastgen.q_sample(x, t, schedule, seed=3),
            "channels_last": fastgen.q_sample(last, 17, schedule, seed=3),
            "posterior": fastgen.q_posterior(x, m, t, schedule)[0],
            "ddpm": fastgen.ddpm_step(x, m, t, schedule, noise=z),
            "learned": fastgen.ddpm_step(x, v, t, schedule, variance="learned_range", clip=1.0, seed=torch.tensor([1, 2, 3])),
            "ddim": fastgen.ddim_step(x, m, 17, schedule, eta=0.5, threshold=s, seed=3),
            "bce": fastgen.bce_with_logits(x * 8, m.abs(), reduction="none"),
            "mean": fastgen.bce_with_logits(leaf.detach(), m.abs()),
            "gradient": leaf.grad,
        }.items():
            made[f"{name}_{dtype}".replace("torch.", "")] = y.double().numpy()
    return made
"""
MAIN = """
import sys, numpy as np
np.savez(sys.argv[1], capability=torch.ops.fastgen.cpu_capability(), **results())
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_instruction_sets_agree(capability, tmp_path):
    path = os.pathsep.join([os.path.dirname(os.path.dirname(fastgen.__file__)), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "FASTGEN_BACKEND": "cpp", "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", RESULTS + MAIN, tmp_path / "made.npz"], env=environment, check=True)
    with np.load(tmp_path / "made.npz") as other:
        if capability == "avx2" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            pytest.skip("this processor has no AVX2")
        assert str(other["capability"]) == capability.upper()
        namespace = {}
        exec(RESULTS, namespace)
        with fastgen.use_backend("cpp"):
            here = namespace["results"]()
        assert len(here) == 52
        for name, values in here.items():
            # the same formulas and polynomials, but for fused multiply-adds: at most one rounding of the dtype apart
            eps = torch.finfo(getattr(torch, name.rsplit("_", 1)[1])).eps
            atol = 1e-13 if name.endswith("float64") else 2e-6
            np.testing.assert_allclose(other[name], values, rtol=1.01 * eps, atol=atol, equal_nan=True, err_msg=name)
            assert np.isfinite(values).mean() > 0.99
