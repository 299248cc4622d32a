"""What is the Triton backend's own: the choice of tiles, 64-bit indices, its ops by themselves. In the interpreter, or on a GPU."""

import math

import pytest
import torch
from conftest import DEVICES, assert_same, channels_last, normal
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen

pytestmark = pytest.mark.backend("triton")
if not any("triton" in fastgen.available_backends(device) for device in DEVICES):
    pytest.skip("needs a GPU or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

import fastgen.triton  # noqa: E402

OPS, op = torch.ops.fastgen_triton, fastgen.triton.common.op


@pytest.fixture(params=DEVICES)
def device(request):
    if "triton" not in fastgen.available_backends(request.param):
        pytest.skip("not there without its interpreter")
    with fastgen.use_backend("triton"):
        yield request.param


# ---- tiles ----------------------------------------------------------------------------------------------------------

SIZES = [
    (1, 1),
    (1, 112),
    (5, 3),
    (300, 2),
    (64, 3072),
    (7, 5000),
    (1, 2**20),
    (2, 2**31),
    (2**31, 1),
    (2**20, 4096),
    (3, 0),
    (0, 3),
]


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("size, event", SIZES)
def test_tiles_cover_everything(size, event, itemsize):
    x = torch.empty(0, dtype={2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize])
    cut = op.tiling(op.Batch(size, event, 1, event, False), (x,), True, False)
    assert cut.tiles * cut.S >= size and cut.blocks * cut.E >= event
    assert (cut.tiles - 1) * cut.S < max(size, 1) and (cut.blocks - 1) * cut.E < max(event, 1)
    assert all(n & n - 1 == 0 for n in (cut.S, cut.E)) and cut.E >= 4
    assert min(8 if itemsize == 2 else 4, cut.E) == cut.V
    assert (event >= 2**30 or size >= 2**31 - cut.S) == cut.WIDE


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (2, 64, 4, 4), (1, 20, 2, 2), (3, 7, 4, 1)])
def test_tiles_of_channels_last_cover_everything(shape):
    batch = op.Batch(shape[0], math.prod(shape[1:]), shape[1], math.prod(shape[2:]), True)
    cut = op.tiling(batch, (torch.empty(0),), True, False)
    assert cut.tiles == shape[0] and op.driver.TILED.value == cut.LAYOUT
    across = -(-shape[1] // cut.E)
    assert cut.blocks % across == 0 and cut.blocks // across * cut.S * 4 >= batch.spatial and across * cut.E >= shape[1]


CALLS = {
    "randn": lambda s, x, t: fastgen.randn(x.shape, seed=t + 5, device=x.device),
    "randn_torch_cuda": lambda s, x, t: fastgen.randn(
        x.shape, seed=t + 5, device=x.device, stream="torch-cuda", multiprocessors=1, threads_per_multiprocessor=256
    ),
    "q_sample": lambda s, x, t: fastgen.q_sample(x, t, s, seed=2**40),
    "q_posterior": lambda s, x, t: torch.cat([y.flatten() for y in fastgen.q_posterior(x, x.sin(), t, s)]),
    "ddpm_step": lambda s, x, t: fastgen.ddpm_step(x, torch.cat([x, x.sin()], 1), t, s, variance="learned", clip=1.0, seed=t),
    "diffusion_loss": lambda s, x, t: fastgen.diffusion_loss(x.sin(), x, t, s, seed=3, reduction="none"),
}


@pytest.mark.parametrize("layout", [torch.clone, channels_last])
@pytest.mark.parametrize("shape", [(3, 2, 4, 6), (3, 2, 3, 3)])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_64_bit_indices_change_nothing(monkeypatch, device, schedule, call, shape, layout):
    x, t = layout(normal(shape, 0, device=device)), torch.tensor([39, 0, 7], device=device)
    expected, tiling = call(schedule, x, t), op.tiling
    monkeypatch.setattr(op, "tiling", lambda *arguments, **keywords: tiling(*arguments, **keywords)._replace(WIDE=True))
    assert_same(call(schedule, x, t), expected)


# ---- the ops by themselves ------------------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


def test_a_dispatch_mode_sees_the_op_and_the_kernel_runs(device, schedule):
    x = normal((3, 5), 0, device=device)
    expected = fastgen.q_sample(x, 5, schedule, seed=1)
    with Seen() as seen:
        actual = fastgen.q_sample(x, 5, schedule, seed=1)
    assert "fastgen_triton.q_sample.default" in seen.names
    assert_same(actual, expected)


def test_negative_bit(device, schedule):
    x = torch.view_as_complex(normal((3, 5, 2), 0, device=device)).conj().imag
    assert x.is_neg()
    y, one = x.clone().sigmoid(), torch._neg_view(torch.tensor(-2.0, device=device))
    assert_same(fastgen.q_sample(x, 5, schedule, noise=x), fastgen.q_sample(x.clone(), 5, schedule, noise=x.clone()))
    assert_same(fastgen.bce_with_logits(x, y, one), fastgen.bce_with_logits(x.clone(), y, one.clone()))
    assert_same(fastgen.generator_loss(x), fastgen.generator_loss(x.clone()))


def test_ops_refuse_what_would_touch_other_memory(device, schedule):
    x = normal((4, 6), 0, device=device)
    rows = {
        columns: torch.ones(40, columns, device=device)  # of each table
        for columns in (2, 3, 4, 10)
    }
    t, loss = torch.zeros(4, dtype=torch.int64, device=device), (None, None, 3, 0, None)
    bad = {
        "out too small": lambda: OPS.q_sample_out(x, rows[2], None, 0, None, None, 1, 0, x[:1].clone()),
        "out of another dtype": lambda: OPS.q_sample_out(x, rows[2], None, 0, None, None, 1, 0, x.half()),
        "x0 too small": lambda: OPS.ddpm_step_out(
            x, x, rows[10], None, 0, None, None, 1, None, None, False, x0=x[:1].clone(), out=x.clone()
        ),
        "noise too small": lambda: OPS.q_sample(x, rows[2], None, 0, x[:1]),
        "t too short": lambda: OPS.q_sample(x, rows[2], t[:3], 0),
        "t of int32": lambda: OPS.q_sample(x, rows[2], t.int(), 0),
        "seeds too few": lambda: OPS.q_sample(x, rows[2], None, 0, None, t[:3]),
        "table of another op": lambda: OPS.q_sample(x, rows[4], None, 0),
        "table of float64": lambda: OPS.q_sample(x, rows[2].double(), None, 0),
        "x_t of another shape": lambda: OPS.q_posterior(x, x[:, :3], rows[4], None, 0),
        "no variance": lambda: OPS.ddpm_step(x, x, rows[10], None, 0, learned=True),
        "no such unconditional": lambda: OPS.ddpm_step(x, x, rows[10], None, 0, unconditional=x[:1]),
        "unconditional of another dtype": lambda: OPS.ddpm_step(x, x, rows[10], None, 0, unconditional=x.half()),
        "threshold too short": lambda: OPS.ddpm_step(x, x, rows[10], None, 0, threshold=x[:3, 0].contiguous()),
        "x0 that is not read": lambda: OPS.diffusion_loss(x, x[:1], rows[3], None, 0, *loss, 0, 0, 1.0, 0),
        "no such loss": lambda: OPS.diffusion_loss(x, x, rows[3], None, 0, *loss, 0, 3, 1.0, 0),
        "gradient of another length": lambda: OPS.diffusion_loss_backward(x[:3, 0], x, x, rows[3], None, 0, *loss, 0, 0, 1.0, 0),
        "target too small": lambda: OPS.bce_with_logits(x, x[:1], None, None, 1),
        "weight too small": lambda: OPS.bce_with_logits(x, x, x[:1], None, 1),
        "no seed": lambda: OPS.randn(x, None, None, 0),
        "no seed of torch's": lambda: OPS.randn_torch_cuda(x, None, None, 0, 256),
        "offset between": lambda: OPS.randn_torch_cuda(x, None, 1, 2, 256),
    }
    for what, call in bad.items():
        with pytest.raises(RuntimeError):
            call()
            pytest.fail(what)
