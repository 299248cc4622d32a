"""The two `GaussianDiffusion`s, with and without the patch: the same numbers, the same random draws, by the kernels."""

import ast
import contextlib
import copy
import enum
import functools
import gc
import importlib.util
import inspect
import itertools
import logging
import os
import pickle
import random
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_threads
from dispatched import Dispatched
from guided_diffusion_like import Extra, Inpainting, LossType, MeanType, SpacedDiffusion, VarType
from guided_diffusion_like import GaussianDiffusion as Guided

from fastgen._core import dispatch, torch_noise
from fastgen.drop_in import _denoising_diffusion_pytorch, _gaussian, _guided_diffusion
from fastgen.drop_in._gaussian import code
from fastgen.drop_in._source import fingerprint, syntax_tree
from fastgen.drop_in.gaussian_diffusion import patch

T = 8
LOG = "fastgen.drop_in"
if find_spec("torchvision") is None:
    sys.path.append(str(Path(__file__).parent / "stand_in"))
# accelerate and the rest of what the package imports
ddp = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
pytestmark = pytest.mark.usefixtures("one_thread")  # so small networks only wait for a second
OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")


class Quiet(ddp.tqdm):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{**options, "disable": True})


Quiet.__module__ = "tqdm"  # as which a fingerprint counts it


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(ddp, "tqdm", Quiet)


# What of the stand-ins for guided-diffusion and its kin is to count as known code, and how it differs
LIKE = {
    Guided: {},
    Extra: {"dit": True},
    SpacedDiffusion: {"forwards": True},
}


@pytest.fixture(autouse=True)
def stand_ins_are_known(monkeypatch):
    for kind, how in LIKE.items():
        for name, method in _guided_diffusion.METHODS.items():
            if name in vars(kind):
                monkeypatch.setitem(method.known, fingerprint(vars(kind)[name]), code("a stand-in of the tests", **how))
    _gaussian._found.clear()
    yield
    _gaussian._found.clear()


def unet(**options):
    torch.manual_seed(0)
    return ddp.Unet(dim=8, dim_mults=(1, 2), flash_attn=False, **options)


def diffusion(objective="pred_v", kind=None, self_condition=False, **options):
    return (kind or ddp.GaussianDiffusion)(
        unet(self_condition=self_condition), image_size=8, timesteps=T, objective=objective, **options
    )


def images(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(seed)).to(dtype)


def flat(result):
    if isinstance(result, dict):
        return [result[key] for key in sorted(result)]
    return list(result) if isinstance(result, (tuple, list)) else [result]


def close(ours, theirs, tolerance=1e-5):
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def with_and_without(target, call, tolerance=1e-5, kernels=None, **options):
    """Runs `call` without and with a patch of `target`, from one state of every generator, which has to end alike."""
    results, states, counts = [], [], []
    for patched in (False, True):
        torch.manual_seed(7)
        random.seed(7)
        with patch(target, **options) if patched else contextlib.nullcontext(), Dispatched() as ops:
            results.append(call())
        states.append((torch.get_rng_state().tolist(), random.getstate()))
        counts.append(ops.of_fastgen())
    # And without the counter, under which the kernels make no noise of torch's, but torch itself.
    torch.manual_seed(7)
    random.seed(7)
    with pytest.MonkeyPatch.context() as context, patch(target, **options):
        for what in ("IN_AN_OP", "TO_FILL"):
            context.setattr(torch_noise, what, (torch_noise.LEAST, torch_noise.LEAST))
        results.append(call())
    states.append((torch.get_rng_state().tolist(), random.getstate()))
    assert states[0] == states[1] == states[2]
    assert counts[0] == 0 and (counts[1] > 0 if kernels is None else counts[1] == kernels)
    for patched in results[1:]:
        close(patched, results[0], tolerance)
    return results[1]


# ---- denoising-diffusion-pytorch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("self_condition", [False, True])
def test_sampling(objective, self_condition):
    d = diffusion(objective, self_condition=self_condition)
    with_and_without(d, lambda: d.sample(2), kernels=T)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1])
@pytest.mark.parametrize("self_condition", [False, True])
def test_ddim_sampling(objective, eta, self_condition):
    d = diffusion(objective, self_condition=self_condition, sampling_timesteps=3, ddim_sampling_eta=eta)
    assert d.is_ddim_sampling
    with_and_without(d, lambda: d.sample(2), kernels=3, tolerance=1e-4)


@pytest.mark.parametrize("steps", [T, 3])
def test_all_timesteps_are_returned(steps):
    d = diffusion(sampling_timesteps=steps)
    assert with_and_without(d, lambda: d.sample(2, return_all_timesteps=True)).shape == (2, steps + 1, 3, 8, 8)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_schedules(schedule):
    # "linear" has betas beyond 1 for fewer than 20 steps
    d = ddp.GaussianDiffusion(Affine(), image_size=8, timesteps=25, objective="pred_noise", beta_schedule=schedule)
    with_and_without(d, lambda: d.sample(1), kernels=25)


def test_samples_are_inference_tensors_as_before():
    d = diffusion()
    with patch(d):
        assert d.sample(1).is_inference() and all(x.is_inference() for x in d.p_sample(images(), 3))


def test_interpolation():
    d = diffusion()
    with_and_without(d, lambda: d.interpolate(images(), images(seed=1), t=4))


def train(d, x, **options):
    """The loss, and the gradients to the network and to the images."""
    x = x.clone().requires_grad_(not d.immiscible)  # which reads x by NumPy
    d.zero_grad()
    loss = d(x, **options)
    loss.sum().backward()
    return [loss.detach(), *(p.grad.clone() for p in (x, *d.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "made",
    [
        {},
        {"min_snr_loss_weight": True},
        {"offset_noise_strength": 0.1},
        {"immiscible": True},
        {"self_condition": True},
        {"auto_normalize": False},
    ],
    ids=str,
)
def test_training(objective, made):
    d = diffusion(objective, **made)
    with_and_without(d, lambda: train(d, images()), 1e-4, kernels=4 if made == {} and objective != "pred_x0" else None)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_each_sample(objective):
    d = diffusion(objective, min_snr_loss_weight=True)
    times = torch.tensor([0, T - 1])
    with_and_without(d, lambda: train(d, images(), times=times, loss_reduction="none"))
    with_and_without(d, lambda: train(d, images(), times=times, noise=images(seed=3), offset_noise_strength=0.2))


def test_offset_noise_goes_into_the_callers_noise_as_before():
    d, noises = diffusion(), [images(seed=3), images(seed=3), images(seed=3)]
    with_and_without(d, lambda: d(images(), times=torch.tensor([1, 2]), noise=noises.pop(), offset_noise_strength=0.2))
    noise = images(seed=3)
    with patch(d):
        d(images(), noise=noise, offset_noise_strength=0.2)
    assert not torch.equal(noise, images(seed=3))


def test_gradients_to_the_noise():
    d, noise = diffusion(), images(seed=3).requires_grad_()

    def run():
        return torch.autograd.grad(d(images(), times=torch.tensor([1, 2]), noise=noise), noise)

    with_and_without(d, run)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("clip", [True, False])
def test_the_parts(objective, clip):
    d, x, t = diffusion(objective), images().requires_grad_(), torch.tensor([0, 5])
    with torch.no_grad():
        with_and_without(d, lambda: d.q_sample(x, t), kernels=1)
        with_and_without(d, lambda: d.q_sample(x_start=x, t=t, noise=images(seed=1)), kernels=1)
        with_and_without(d, lambda: d.q_posterior(x, images(seed=1), t), kernels=1)
        with_and_without(d, lambda: d.p_mean_variance(x, t, clip_denoised=clip), kernels=1)
        for step in (0, 5, T - 1):
            with_and_without(d, lambda step=step: d.p_sample(x, step), kernels=1)

    def gradients():
        results = d.q_sample(x, t), d.q_posterior(x, x, t)[0], *d.p_mean_variance(x, t, clip_denoised=clip)[::3]
        return [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in results]

    with_and_without(d, gradients, tolerance=1e-4)


class Affine(torch.nn.Module):
    """A network of any dtype, for any shape."""

    channels = out_dim = 3
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, dtype=None):
        super().__init__()
        self.dtype, self.scale = dtype, torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t, x_self_cond=None):
        return (self.scale.to(x.dtype) * x + 0.01).to(self.dtype or x.dtype)


class Convolution(Affine):
    """Which autocast does in half precision; the library's Unet does not run under autocast on the CPU."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x, t, x_self_cond=None):
        return self.layer(x)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("network", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("data", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(objective, network, data):
    d = ddp.GaussianDiffusion(Affine(network), image_size=8, timesteps=T, objective=objective)
    x, t = images(dtype=data), torch.tensor([1, 6])
    with torch.no_grad():
        for call in (lambda: d.p_sample(x, 4), lambda: d.q_sample(x, t), lambda: d.q_posterior(x, x, t)):
            with_and_without(d, call)
        with_and_without(d, lambda: d.p_mean_variance(x, t))
        with_and_without(d, lambda: d.ddim_sample((2, 3, 8, 8)), 1e-5 if network.itemsize >= 4 else 2e-2)
        tolerance = 1e-5 if data.itemsize >= 4 and network.itemsize >= 4 else 5e-3
        with_and_without(d, lambda: d.p_losses(x, t), tolerance) if network.itemsize >= 4 else None


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_buffers_of_another_dtype(change):
    d = ddp.GaussianDiffusion(Affine(), image_size=8, timesteps=T)
    with patch(d):
        d.p_sample(images(), 4)
        getattr(d, change)()
        x = images(dtype=d.betas.dtype)
        torch.manual_seed(0)
        ours = *d.p_sample(x, 4), d.q_sample(x, torch.tensor([2, 6]))
    torch.manual_seed(0)
    close(ours, (*d.p_sample(x, 4), d.q_sample(x, torch.tensor([2, 6]))), {"half": 1e-2, "bfloat16": 5e-2}.get(change, 1e-10))


def test_autocast():
    d = ddp.GaussianDiffusion(Convolution(), image_size=8, timesteps=T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with_and_without(d, lambda: d.sample(1), kernels=T, tolerance=2e-2)
        loss = with_and_without(d, lambda: d(images()), tolerance=1e-4)
    assert loss.dtype == torch.float32


def test_changed_buffers_are_noticed():
    d, other = diffusion("pred_noise"), diffusion("pred_noise", beta_schedule="cosine")
    t = torch.tensor([3, 4])

    def check():
        ours = d.p_mean_variance(images(), t)
        undone = pytest.MonkeyPatch()
        with undone.context() as m:
            m.setattr(torch.compiler, "is_compiling", lambda: True)  # which is when the original runs
            close(ours, d.p_mean_variance(images(), t))
        return ours[0]

    with patch(d), torch.no_grad():
        first = check()
        d.load_state_dict(other.state_dict())  # in place
        second = check()
        d.posterior_mean_coef1 = d.posterior_mean_coef1 * 2  # another tensor
        third = check()
        d.posterior_mean_coef2.mul_(0.5)
        fourth = check()
        d.objective = "pred_v"
        fifth = check()
    assert len({x.sum().item() for x in (first, second, third, fourth, fifth)}) == 5


def test_layouts_and_odd_tensors():
    d = ddp.GaussianDiffusion(Affine(), image_size=8, timesteps=T)
    t = torch.tensor([3])
    with torch.no_grad():
        x = images().to(memory_format=torch.channels_last)
        assert with_and_without(d, lambda: d.p_sample(x, 4)[0]).is_contiguous(memory_format=torch.channels_last)
        for x in (images(2, 8, 3, 8).transpose(1, 2), images(1, 3, 8, 8).expand(2, -1, -1, -1), images(2, 3, 8, 16)[..., ::2]):
            with_and_without(d, lambda x=x: d.p_sample(x, 4))
            with_and_without(d, lambda x=x: d.q_sample(x, t.expand(2)))
        with_and_without(d, lambda: d.q_sample(images(0, 3, 8, 8), t[:0]))
        with_and_without(d, lambda: d.p_sample(images(1, 3), 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d.q_sample(images(), torch.tensor([1, 2]), noise=images(1, 3, 8, 8)),
        lambda d: d.q_sample(images(), torch.tensor([1])),
        lambda d: d.q_posterior(images(), images(1, 3, 8, 8), torch.tensor([1, 2])),
        lambda d: d.p_sample(images(), torch.tensor(3)),
        lambda d: d.p_sample(images(), np.int64(3)),
        lambda d: d.p_losses(images(), torch.tensor([1, 2]), noise=images(dtype=torch.float64)),
        lambda d: d.p_losses(images(), torch.tensor([3])),
    ],
)
def test_what_is_not_covered_runs_the_original_and_says_so(caplog, call):
    d = ddp.GaussianDiffusion(Affine(), image_size=8, timesteps=T)
    with torch.no_grad(), caplog.at_level(logging.DEBUG, LOG):
        torch.manual_seed(0)
        expected = call(d)
        with patch(d):
            assert "original" not in caplog.text
            torch.manual_seed(0)
            close(call(d), expected)
    assert "not fastgen but the original runs" in caplog.text


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d.q_sample(images(), torch.tensor([1, 2, 3])),
        lambda d: d.q_sample(images(), torch.tensor([1.0, 2.0])),
        lambda d: d.p_sample(images(), 3, clip_denoised=False),
        lambda d: d.p_sample(images(), 3, None, False),
        lambda d: d.p_losses(images(2, 3, 8), torch.tensor([1, 2])),
        lambda d: d.q_sample(None, torch.tensor([1, 2])),
    ],
)
def test_errors_are_the_librarys(call):
    d = diffusion()
    with pytest.raises(Exception) as theirs:  # noqa: B017
        call(d)
    with patch(d), pytest.raises(type(theirs.value)) as ours:
        call(d)
    assert str(ours.value) == str(theirs.value)


def test_a_timestep_outside_the_schedule_is_an_error():
    d = diffusion()
    with patch(d), pytest.raises(ValueError, match="t: expected timesteps within 0 … 7, got 8"):
        d.q_sample(images(), torch.tensor([1, T]))
    with patch(d), pytest.raises(ValueError, match="t: expected a timestep within 0 … 7, got -1"):
        d.p_sample(images(), -1)


def test_a_class_is_patched_with_its_subclasses():
    class Own(ddp.GaussianDiffusion):
        def p_mean_variance(self, *arguments, **keywords):
            mean, *rest = super().p_mean_variance(*arguments, **keywords)
            return mean + 1, *rest

    class Renamed(ddp.GaussianDiffusion):
        pass

    own, renamed = diffusion(kind=Own), diffusion(kind=Renamed)
    assert own.model.state_dict().keys() == renamed.model.state_dict().keys()
    with_and_without(ddp.GaussianDiffusion, lambda: renamed.sample(1), kernels=T)
    with_and_without(ddp.GaussianDiffusion, lambda: own.sample(1), kernels=T)  # of p_mean_variance, by super()
    with_and_without(ddp.GaussianDiffusion, lambda: train(own, images()))
    with_and_without(Own, lambda: own.sample(1), kernels=T)  # of q_posterior, since the base's p_mean_variance is not patched
    with_and_without(Own, lambda: own.q_sample(images(), torch.tensor([1, 2])), kernels=1)


def test_overriding_instances_and_formulas_fall_through(caplog):
    class Own(ddp.GaussianDiffusion):
        def predict_start_from_v(self, x_t, t, v):
            return 0.5 * super().predict_start_from_v(x_t, t, v)

    d, e = diffusion(kind=Own), diffusion()
    e.q_posterior = lambda x_start, x_t, t: [x + 1 for x in ddp.GaussianDiffusion.q_posterior(e, x_start, x_t, t)]
    with caplog.at_level(logging.DEBUG, LOG):
        with_and_without(ddp.GaussianDiffusion, lambda: d.p_sample(images(), 4), kernels=1)  # q_posterior
        with_and_without(ddp.GaussianDiffusion, lambda: e.p_sample(images(), 4), kernels=1)
    assert "Own.p_sample: not fastgen but the original runs: the code of predict_start_from_v is not known" in caplog.text
    assert (
        "GaussianDiffusion.p_sample: not fastgen but the original runs: the code of q_posterior is the object's own" in caplog.text
    )


@pytest.mark.parametrize("as_class", [False, True])
def test_learned_variances_and_weighted_objectives(as_class):
    learned = pytest.importorskip("denoising_diffusion_pytorch.learned_gaussian_diffusion").LearnedGaussianDiffusion
    weighted = pytest.importorskip("denoising_diffusion_pytorch").WeightedObjectiveGaussianDiffusion
    d = learned(unet(learned_variance=True), image_size=8, timesteps=T, objective="pred_noise")
    target = ddp.GaussianDiffusion if as_class else d
    with_and_without(target, lambda: d.sample(1))
    with_and_without(target, lambda: train(d, images()), 1e-3)  # the bound's gradient divides by small variances
    # At t = 7 what the network says of ε becomes x0 times 137. Of 40 draws of the noise, a gradient in float32 is at its worst
    # element 2.5e-5 from float64 in the median and at most 1.8e-4 in the library, 1.9e-5 and 1.3e-4 with our q_sample.
    d = weighted(unet(out_dim=8), image_size=8, timesteps=T)
    with_and_without(weighted if as_class else d, lambda: train(d, images()), 1e-4)


def test_look_alikes_keep_what_differs(caplog):
    kinds = [pytest.importorskip(f"denoising_diffusion_pytorch.{m}") for m in ("guided_diffusion", "classifier_free_guidance")]
    guided, free = (kind.GaussianDiffusion(Affine(), image_size=8, timesteps=T) for kind in kinds)
    with caplog.at_level(logging.INFO, LOG):
        with_and_without(guided, lambda: guided.q_sample(images(), torch.tensor([1, 2])), kernels=1)
        with_and_without(guided, lambda: [guided.p_sample(images(), 3)[0], guided.p_losses(images(), torch.tensor([1, 2]))])
        with_and_without(free, lambda: free.q_sample(images(), torch.tensor([1, 2])), kernels=0)
    assert "3 of 6 methods of GaussianDiffusion run on fastgen; not p_sample: its code is not known; ddim_sample" in caplog.text
    assert "1 of 6 methods of GaussianDiffusion run on fastgen; not q_sample: its code is not known; p_mean_var" in caplog.text


class Wider(ddp.GaussianDiffusion):
    """As in a fork that clips x0 to ±3."""

    def p_mean_variance(self, x, t, x_self_cond=None, clip_denoised=True):
        x_start = self.model_predictions(x, t, x_self_cond).pred_x_start
        if clip_denoised:
            x_start.clamp_(-3.0, 3.0)
        return *self.q_posterior(x_start=x_start, x_t=x, t=t), x_start


@pytest.mark.parametrize("target", ["itself", "its class", "its base"])
def test_a_fork_that_clips_elsewhere_keeps_its_bounds(target):
    d, x = Wider(Affine(), image_size=8, timesteps=T, objective="pred_x0"), 9 * images()
    target = {"itself": d, "its class": Wider, "its base": ddp.GaussianDiffusion}[target]
    with_and_without(target, lambda: d.p_sample(x, 5))
    with patch(target) as p:
        assert d.p_sample(x, 5)[1].abs().max() == 3.0
        if target is not ddp.GaussianDiffusion:
            assert p.skipped["Wider.p_sample"] == "the code of p_mean_variance is not known"
            assert p.skipped["Wider.p_mean_variance"] == "its code is not known"
            assert p.covered == tuple(f"Wider.{name}" for name in ("q_sample", "q_posterior", "ddim_sample", "p_losses"))


def written_again(tmp_path, kind, old, new, count=-1):
    """The module of `kind` as a copy in which `old` is replaced by `new`."""
    text = Path(inspect.getsourcefile(kind)).read_text()
    assert old in text
    name = f"{kind.__module__}_{next(COPIES)}"
    path = tmp_path / f"{name.rpartition('.')[2]}.py"
    path.write_text(text.replace(old, new, count))
    spec = importlib.util.spec_from_file_location(name, path)
    made = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(made)
    finally:
        del sys.modules[name]
    return getattr(made, kind.__name__)


COPIES = itertools.count()
# What is changed in denoising-diffusion-pytorch, and the methods that then keep their own code
CHANGES = [
    (
        "posterior_mean_coef2, t, x_t.shape) * x_t",
        "posterior_mean_coef2, t, x_t.shape) * -x_t",
        "q_posterior p_mean_variance p_sample",
    ),
    ("x_start.clamp_(-1., 1.)", "x_start.clamp_(-3., 3.)", "p_mean_variance p_sample"),
    ("x_self_cond = None, clip_denoised = True", "x_self_cond = None, clip_denoised = False", "p_mean_variance p_sample"),
    ("min = -1., max = 1.", "min = -2., max = 2.", "p_mean_variance p_sample ddim_sample"),
    ("(0.5 * model_log_variance).exp()", "(0.4 * model_log_variance).exp()", "p_sample"),
    ("c = (1 - alpha_next", "c = 2 * (1 - alpha_next", "ddim_sample"),
    ("t, x_start.shape) * noise\n        )", "t, x_start.shape) * 2 * noise\n        )", "q_sample"),
    ("t, x_start.shape) * noise -", "t, x_start.shape) * noise +", "p_losses"),
    ("loss = F.mse_loss(", "loss = F.l1_loss(", "p_losses"),
    ("loss_reduction = 'mean'):\n        b, c, h, w", "loss_reduction = 'none'):\n        b, c, h, w", "p_losses"),
    ("sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise", "betas, t, x_t.shape) * noise", "p_mean_variance p_sample ddim_sample"),
    ("    out = a.gather(-1, t)", "    out = 2 * a.gather(-1, t)", "all"),
    ("['pred_noise', 'pred_x_start']", "['pred_x_start', 'pred_noise']", "p_mean_variance p_sample ddim_sample"),
    ("def exists(x):\n    return x is not None", "def exists(x):\n    return bool(x)", "q_sample p_losses"),
    ("@torch.inference_mode()\n    def p_sample(", "@torch.enable_grad()\n    def p_sample(", "p_sample"),
    ("from functools import partial", "from functools import partialmethod as partial", "p_mean_variance p_sample ddim_sample"),
]


@pytest.mark.parametrize("old, new, changed", CHANGES, ids=[new[:30] for _, new, _ in CHANGES])
def test_a_copy_with_a_change_keeps_what_is_changed(tmp_path, old, new, changed):
    kind = written_again(tmp_path, ddp.GaussianDiffusion, old, new)
    every = [name for name, method in _denoising_diffusion_pytorch.METHODS.items() if method.make]
    changed = every if changed == "all" else changed.split()
    with patch(kind) as p:
        assert p.covered == tuple(f"GaussianDiffusion.{name}" for name in every if name not in changed)
        assert set(p.skipped) == {f"GaussianDiffusion.{name}" for name in changed}
        assert all("known" in why for why in p.skipped.values())
        assert all(
            getattr(kind, name) is vars(kind)[name] and not hasattr(vars(kind)[name], "_fastgen_replaces") for name in changed
        )


def test_a_copy_without_a_change_is_known(tmp_path):
    kind = written_again(tmp_path, ddp.GaussianDiffusion, "# constants", "# names")
    with patch(kind) as p:
        assert len(p.covered) == 6 and not p.skipped


def test_a_method_without_a_source_is_left_alone():
    class Made(ddp.GaussianDiffusion):
        exec("def q_posterior(self, x_start, x_t, t):\n    return x_start, x_t, t")

    with patch(Made) as p:
        assert p.skipped["Made.q_posterior"] == "its code is without a source to compare"
        assert {name.rpartition(".")[2] for name in p.skipped} == {"q_posterior", "p_mean_variance", "p_sample"}


def test_a_class_that_is_changed_under_a_patch_is_noticed(monkeypatch):
    d = ddp.GaussianDiffusion(Affine(), image_size=8, timesteps=T, objective="pred_x0")
    with patch(d):
        before = d.p_sample(images(), 4)
        monkeypatch.setattr(ddp.GaussianDiffusion, "p_mean_variance", Wider.p_mean_variance)
        monkeypatch.setattr(ddp.GaussianDiffusion, "model_predictions", lambda self, x, t, *_: ddp.ModelPrediction(x, 0 * x))
        assert not d.p_sample(images(), 4)[1].any() and before[1].any()


def reads(kind, name):
    """The attributes that a method reads of self, in its class and those above."""
    found = set()
    for function in (vars(c)[name] for c in kind.__mro__ if name in vars(c)):
        nodes = [n for n in ast.walk(syntax_tree(inspect.unwrap(function))) if isinstance(n, ast.Attribute)]
        found |= {n.attr for n in nodes if isinstance(n.value, ast.Name) and n.value.id == "self"}
    return found


def nothing_is_forgotten(kind, methods):
    """What a method of the table calls of its object is in what stands there as fused, whose code has to be known, or as called by
    the replacement too."""
    for name, method in methods.items():
        if _gaussian._known(kind, name, methods)[1]:
            continue
        on_the_way = [other for other in (name, *method.fuses) if hasattr(kind, other)]
        allowed = {*on_the_way, *(other for fused in on_the_way for other in methods[fused].calls)}
        everything = set()
        for other in on_the_way:
            everything |= reads(kind, other)
            for attribute in reads(kind, other) - allowed:
                found = getattr(kind, attribute, None)
                assert not callable(found) and not isinstance(found, property), f"{name} → {other} → {attribute}"
        assert set(on_the_way[1:]) <= everything, name  # nor is anything in the table that no one calls


def test_the_table_forgets_nothing():
    one = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d").GaussianDiffusion1D
    for kind in (ddp.GaussianDiffusion, one):
        nothing_is_forgotten(kind, _denoising_diffusion_pytorch.METHODS)
    for kind in (Guided, Extra, *guided_sources()):
        nothing_is_forgotten(kind, _guided_diffusion.METHODS)


# What every version has that is known, of denoising-diffusion-pytorch; tools/known_code.py runs these with older ones
@pytest.mark.parametrize("dimensions", [2, 1])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("self_condition", [False, True])
def test_known_denoising_diffusions(dimensions, objective, self_condition, monkeypatch):
    module = ddp
    if dimensions == 1:
        module = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d")
        monkeypatch.setattr(module, "tqdm", Quiet)
    kind = module.GaussianDiffusion if dimensions == 2 else module.GaussianDiffusion1D
    where, event = ({"image_size": 8}, (3, 8, 8)) if dimensions == 2 else ({"seq_length": 16}, (3, 16))

    def make(**options):
        net = Affine()
        net.self_condition = self_condition
        return kind(net, timesteps=T, objective=objective, beta_schedule="cosine", **where, **options)

    d, x, t = make(), images(2, *event).requires_grad_(), torch.tensor([1, T - 1])
    with patch(d) as p:
        covered = {name.rpartition(".")[2] for name in p.covered}
    assert covered >= {"q_sample", "q_posterior", "p_mean_variance", "p_sample"}

    def gradients(y):
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *d.model.parameters()), allow_unused=True)[:1]]

    def raises(call):
        """Of the library alone: Affine has no argument self_cond, by which some versions pass it."""
        try:
            call()
        except (TypeError, RuntimeError):
            return True
        return False

    with_and_without(d, lambda: gradients(d.q_sample(x, t)), kernels=2)
    with_and_without(d, lambda: gradients(d.q_posterior(x, x, t)[0]))
    for clip in (True, False):
        with_and_without(d, lambda clip=clip: gradients(d.p_mean_variance(x, t, clip_denoised=clip)[0]))
    for step in (0, 3, T - 1):
        with_and_without(d, lambda step=step: d.p_sample(x, step), kernels=1)
    if not raises(lambda: d.sample(2)):
        with_and_without(d, lambda: d.sample(2), kernels=T)
    for eta in (0.0, 0.5, 1.0):
        e = make(sampling_timesteps=3, ddim_sampling_eta=eta)
        if "ddim_sample" in covered and not raises(lambda e=e: e.sample(2)):
            with_and_without(e, lambda e=e: e.sample(2), kernels=3)
    if "p_losses" in covered and not raises(lambda: d.p_losses(x.detach(), t)):
        for seed in range(3):  # of the draw that decides upon self-conditioning

            def losses(seed=seed):
                random.seed(seed)
                return gradients(d.p_losses(x, t)), gradients(d.p_losses(x, t, images(2, *event, seed=seed)))

            with_and_without(d, lambda losses=losses: [y for pair in losses() for y in pair])


def test_the_installed_version_is_all_known():
    one = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d").GaussianDiffusion1D
    for kind in (ddp.GaussianDiffusion, one):
        with patch(kind) as p:
            assert len(p.covered) == 6 and not p.skipped
            assert repr(p) == f"6 of 6 methods of {kind.__name__} run on fastgen"


def test_other_objects_are_refused():
    for thing in (object(), torch.nn.Linear(1, 1), ddp.Unet):
        with pytest.raises(TypeError, match="obj_or_class: expected a GaussianDiffusion"):
            patch(thing)
    with pytest.raises(ValueError, match="rng: expected one of 'exact', 'fused'"):
        patch(diffusion(), rng="philox")


def test_nothing_is_left_on_the_object():
    d = diffusion()
    keys, attributes, own = list(d.state_dict()), set(vars(d)), dict(vars(ddp.GaussianDiffusion))
    first, second, third = patch(d), patch(d), patch(ddp.GaussianDiffusion)
    d.sample(1)
    assert list(d.state_dict()) == keys and not list(d.parameters())[0].grad
    first.unpatch()
    with Dispatched() as ops:
        d.sample(1)
    assert ops.of_fastgen() == T
    third.unpatch()
    second.unpatch()
    assert set(vars(d)) == attributes and dict(vars(ddp.GaussianDiffusion)) == own
    with_and_without(d, lambda: d.sample(1), kernels=T)


def test_an_object_is_not_kept_alive():
    d = ddp.GaussianDiffusion(Affine(), image_size=8, timesteps=T)
    with patch(d):
        d.sample(1)
    gone = weakref.ref(d)
    del d
    gc.collect()
    assert gone() is None


def test_copies_and_pickles():
    d = ddp.GaussianDiffusion(Affine(), image_size=8, timesteps=T)  # the Unet cannot be pickled
    with patch(d):
        d.p_sample(images(), 3)
        copied, pickled = copy.deepcopy(d), pickle.loads(pickle.dumps(d))
        for other in (copied, pickled):
            other.betas.zero_()
            other.sqrt_alphas_cumprod.zero_()
            other.sqrt_one_minus_alphas_cumprod.zero_()
            assert not other.q_sample(images(), torch.tensor([1, 2])).any()  # its own buffers, not the first one's
        assert d.q_sample(images(), torch.tensor([1, 2])).any()
        with Dispatched() as ops:
            pickled.sample(1)
    assert ops.of_fastgen() == 0


@pytest.mark.parametrize("steps", [T, 4])
def test_fused_noise(steps):
    d = diffusion(sampling_timesteps=steps, ddim_sampling_eta=1.0)
    with patch(d, rng="fused"):
        results = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            with Dispatched() as ops:
                results.append((d.sample(2), d(images()), d.q_sample(images(), torch.tensor([6, 7]))))
            assert ops["aten.randn_like"] == 0
    for same, other, shape in zip(results[0], results[1], results[2], strict=True):
        assert torch.equal(same, other) and not torch.equal(same, shape)
    x = images(64, 3, 8, 8)
    with patch(d, rng="fused"), torch.no_grad():
        z = d.q_sample(x, torch.full((64,), T - 1)) - d.sqrt_alphas_cumprod[-1] * x
    assert abs(z.std() / d.sqrt_one_minus_alphas_cumprod[-1] - 1) < 0.03


def test_fused_noise_trains():
    """The loss is that of the noise which was added: a network that knows it has none."""
    d = ddp.GaussianDiffusion(Affine(), image_size=8, timesteps=T, objective="pred_noise", auto_normalize=False)
    x, seen = images(), []
    known = lambda y, t, _: seen.append((y, t)) or (y - a[t] * x) / s[t]  # noqa: E731
    a, s = (b.reshape(-1, 1, 1, 1) for b in (d.sqrt_alphas_cumprod, d.sqrt_one_minus_alphas_cumprod))
    d.model.forward = known
    with patch(d, rng="fused"):
        assert d(x) < 1e-8 and len(seen) == 1


def test_threads_share_an_object():
    d = ddp.GaussianDiffusion(Affine(), image_size=8, timesteps=T)
    x, t = images(), torch.tensor([1, 6])
    expected = d.q_sample(x, t, noise=x), d.p_mean_variance(x, t)[0].detach()

    def work(_):
        for _ in range(20):
            with patch(d), torch.no_grad():
                for a, b in zip((d.q_sample(x, t, noise=x), d.p_mean_variance(x, t)[0]), expected, strict=True):
                    assert torch.allclose(a, b, atol=1e-5)

    in_threads(4, work)
    assert "q_sample" not in vars(d)


def test_buffers_made_in_inference_mode_fall_through(caplog):
    with torch.inference_mode():
        d = ddp.GaussianDiffusion(Affine(), image_size=8, timesteps=T)
    with caplog.at_level(logging.DEBUG, LOG), torch.inference_mode():
        with_and_without(d, lambda: d.p_sample(images(), 3), kernels=0)
    assert "inference mode" in caplog.text


def test_a_compiled_program_has_the_original():
    d = ddp.GaussianDiffusion(Affine(), image_size=8, timesteps=T)
    t = torch.tensor([1, 6])
    with patch(d):
        compiled = torch.compile(lambda x, z: d.q_posterior(x, z, t)[0], backend="aot_eager", fullgraph=True)
        close(compiled(images(), images(seed=1)), d.q_posterior(images(), images(seed=1), t)[0])


# ---- guided-diffusion -----------------------------------------------------------------------------------------------------

BETAS = np.linspace(1e-3, 0.3, T)
LEARNED = (VarType.LEARNED, VarType.LEARNED_RANGE)


class Network(torch.nn.Module):
    """Small, random, and with a second half of channels for a learned variance; it sees its timesteps and its keyword."""

    def __init__(self, variance, dtype=None):
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Conv2d(3, 6 if variance in LEARNED else 3, 3, padding=1)
        self.dtype = dtype

    def forward(self, x, t, y=0.0):
        return (0.3 * self.layer(x.float()) * (1 + 0.01 * t.float().reshape(-1, 1, 1, 1)) + y).to(self.dtype or x.dtype)


def guided(mean=MeanType.EPSILON, variance=VarType.FIXED_SMALL, **options):
    return Guided(BETAS, mean, variance, **options), Network(variance)


@pytest.mark.parametrize("mean", [MeanType.EPSILON, MeanType.START_X])
@pytest.mark.parametrize("variance", VarType)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("method, options", [("p_sample", {}), ("ddim_sample", {}), ("ddim_sample", {"eta": 0.7})])
def test_guided_sampling(mean, variance, clip, method, options):
    d, model = guided(mean, variance)
    with_and_without(d, lambda: d.sample(method, model, (2, 3, 4, 4), clip_denoised=clip, **options), 1e-4, kernels=T)


@pytest.mark.parametrize("mean", [MeanType.EPSILON, MeanType.START_X])
@pytest.mark.parametrize("variance", VarType)
@pytest.mark.parametrize("clip", [True, False])
def test_guided_parts(mean, variance, clip):
    d, model = guided(mean, variance, rescale_timesteps=True)
    x, t = images(3, 3, 4, 4).requires_grad_(), torch.tensor([0, 5, T - 1])

    def run():
        out = d.p_mean_variance(model, x, t, clip_denoised=clip, model_kwargs={"y": 0.1})
        parts = [*flat(out), d.q_sample(x, t), *d.q_posterior_mean_variance(x, images(3, 3, 4, 4, seed=1), t)]
        inputs = [x, *model.parameters()]
        gradients = [
            torch.autograd.grad(y.square().sum(), inputs, retain_graph=True, allow_unused=True) for y in parts if y.requires_grad
        ]
        return [*parts, *(g for each in gradients for g in each if g is not None)]

    results = with_and_without(d, run, 1e-4)
    assert all(y.shape == x.shape for y in results[:8])


@pytest.mark.parametrize("mean", [MeanType.EPSILON, MeanType.START_X])
@pytest.mark.parametrize("data", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("network", [torch.float16, torch.float32])
def test_guided_dtypes(mean, data, network):
    d, model, x, t = Guided(BETAS, mean), Network(None, network), images(2, 3, 4, 4, dtype=data), torch.tensor([0, 5])
    with torch.no_grad():
        for call in (
            lambda: d.p_sample(model, x, t),
            lambda: d.ddim_sample(model, x, t, eta=0.5),
            lambda: d.p_mean_variance(model, x, t),
            lambda: d.q_sample(x, t),
            lambda: d.q_posterior_mean_variance(x, x, t),
        ):
            with_and_without(d, call, kernels=1)


@pytest.mark.parametrize("target", [SpacedDiffusion, Guided, None], ids=["its class", "its base", "itself"])
@pytest.mark.parametrize("method", ["p_sample", "ddim_sample"])
def test_spaced_steps(target, method):
    d, model = SpacedDiffusion([0, 2, 5, 7], BETAS, model_var_type=VarType.LEARNED_RANGE), Network(VarType.LEARNED_RANGE)
    with_and_without(target or d, lambda: d.sample(method, model, (2, 3, 4, 4)), 1e-4, kernels=4)
    with_and_without(target or d, lambda: d.p_mean_variance(model, images(), torch.tensor([0, 3])), kernels=1)


class Improved(Guided):
    """improved-diffusion's methods know no cond_fn."""

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        return super().p_sample(model, x, t, clip_denoised, denoised_fn, None, model_kwargs)

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        return super().ddim_sample(model, x, t, clip_denoised, denoised_fn, None, model_kwargs, eta)


LIKE[Improved] = {}


def test_improved_diffusion():
    d, model, x, t = Improved(BETAS), Network(None), images(2, 3, 4, 4), torch.tensor([0, 5])
    with patch(d) as p:
        assert len(p.covered) == 9
    with torch.no_grad():
        with_and_without(d, lambda: d.p_sample(model, x, t, True, None, {"y": 0.2}), kernels=1)
        with_and_without(d, lambda: d.ddim_sample(model, x, t, True, None, {"y": 0.2}, 0.5), kernels=1)
        with_and_without(d, lambda: d.ddim_sample(model, x, t, eta=0.5), kernels=1)


def test_guided_fall_through(caplog):
    d, model = guided()
    x, t = images(2, 3, 4, 4), torch.tensor([0, 5])
    before = Guided(BETAS, MeanType.PREVIOUS_X), Network(None)
    condition = {"cond_fn": lambda x, t: x, "model_kwargs": {}}
    with torch.no_grad(), caplog.at_level(logging.DEBUG, LOG):
        with_and_without(before[0], lambda: before[0].sample("p_sample", before[1], (2, 3, 4, 4)), kernels=0)
        assert "p_sample: not fastgen but the original runs: a network that predicts MeanType.PREVIOUS_X" in caplog.text
        with_and_without(d, lambda: d.p_sample(model, x, t.int()), kernels=0)
        with_and_without(d, lambda: d.p_sample(model, x.double(), t, **condition), kernels=1)  # p_mean_variance
        assert "a condition on float64 data" in caplog.text
        own, x = Guided(BETAS), images(2, 3, 4, 4)
        own.condition_mean = lambda *_, **__: x
        assert torch.equal(*(with_and_without(own, lambda: own.p_sample(model, x, t, **condition))["sample"][0], x[0])[:2])
        assert "the code of condition_mean is the object's own" in caplog.text


# ---- guided-diffusion's sources, where they are, and the stand-in ----------------------------------------------------------


def guided_sources():
    """GaussianDiffusion and SpacedDiffusion of the repository at the path FASTGEN_GUIDED_DIFFUSION, if there is one."""
    root = os.environ.get("FASTGEN_GUIDED_DIFFUSION")
    if not root:
        return ()
    (path,) = [p for p in Path(root).glob("*/gaussian_diffusion.py") if (p.parent / "respace.py").exists()]
    if root not in sys.path:
        sys.path.insert(0, root)
    base, spaced = (importlib.import_module(f"{path.parent.name}.{name}") for name in ("gaussian_diffusion", "respace"))
    return base.GaussianDiffusion, spaced.SpacedDiffusion


def make_stand_in(mean, variance, spaced):
    return (
        SpacedDiffusion([0, 2, 5, 7], BETAS, model_mean_type=MeanType[mean], model_var_type=VarType[variance])
        if spaced
        else (Guided(BETAS, MeanType[mean], VarType[variance]))
    )


def make_extra(mean, variance, spaced):
    return Extra(BETAS, MeanType[mean], VarType[variance])


def make_real(mean, variance, spaced):
    if not guided_sources():
        pytest.skip("the path of a guided-diffusion is not given in FASTGEN_GUIDED_DIFFUSION")
    base, kind = guided_sources()
    names = vars(sys.modules[base.__module__])
    options = {
        "betas": BETAS,
        "model_mean_type": names["ModelMeanType"][mean],
        "model_var_type": names["ModelVarType"][variance],
        "loss_type": names["LossType"].MSE,
    }
    return kind(use_timesteps=[0, 2, 5, 7], **options) if spaced else base(**options)


def mean_variance(d, model, x, t, options):
    """But for what a network returns besides."""
    out = d.p_mean_variance(model, x, t, **options)
    return [out[name] for name in ("mean", "variance", "log_variance", "pred_xstart")]


def toward(x, t, y):
    """A condition's gradient, which sees its timesteps and its keyword."""
    return 0.3 * (1 - x) * (1 + 0.01 * t.float().reshape(-1, 1, 1, 1)) + y


@pytest.mark.parametrize("make", [make_stand_in, make_extra, make_real])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
@pytest.mark.parametrize("variance", ["LEARNED", "LEARNED_RANGE", "FIXED_SMALL", "FIXED_LARGE"])
@pytest.mark.parametrize("spaced", [False, True])
def test_known_guided_diffusions(make, mean, variance, spaced):
    if (make is make_extra and (spaced or variance == "FIXED_LARGE")) or (make is make_stand_in and variance == "LEARNED"):
        pytest.skip("there is none")
    d, model = make(mean, variance, spaced), Network(VarType[variance])
    conditional = hasattr(d, "condition_mean")
    with patch(d) as p:
        assert len(p.covered) == 9 and not p.skipped
    x, t, wide = images(3, 3, 4, 4), torch.tensor([0, 2, d.num_timesteps - 1]), 1 + (mean == "EPSILON")
    with torch.no_grad():
        with_and_without(d, lambda: d.q_sample(x, t), kernels=1)
        with_and_without(d, lambda: d.q_posterior_mean_variance(x, images(3, 3, 4, 4, seed=1), t), kernels=1)
        for options, kernels in (
            ({}, 1),
            ({"clip_denoised": False, "model_kwargs": {"y": 0.1}}, 1),
            ({"denoised_fn": torch.tanh}, wide),
            ({"cond_fn": toward, "model_kwargs": {"y": 0.1}}, 2),
            ({"cond_fn": toward, "model_kwargs": {"y": 0.1}, "denoised_fn": torch.sin, "clip_denoised": False}, 1 + wide),
        ):
            if "cond_fn" not in options:
                with_and_without(d, lambda o=options: mean_variance(d, model, x, t, o), kernels=kernels)
            elif not conditional:
                continue
            for method, also in (("p_sample", {}), ("ddim_sample", {}), ("ddim_sample", {"eta": 1.0})):
                step = getattr(d, method).__name__
                with_and_without(d, lambda o={**options, **also}, s=step: getattr(d, s)(model, x, t, **o), 1e-5, kernels)


class Near(Network):
    """Nearly right, so that at t = 0 no bin's probability is lost in the library's rounding of numbers near 1."""

    def __init__(self, mean, variance, x0):
        super().__init__(variance)
        self.mean, self.x0 = mean, x0

    def forward(self, x, t, y=0.0):
        alpha = torch.from_numpy(np.cumprod(1 - BETAS)).float()[t].reshape(-1, 1, 1, 1)
        right = self.x0 if self.mean == "START_X" else (x - alpha.sqrt() * self.x0) / (1 - alpha).sqrt()
        m = super().forward(x, t, y)
        return torch.cat([right + 0.1 * m[:, :3], m[:, 3:]], 1)


BOUNDS = ("training_losses", "_vb_terms_bpd", "calc_bpd_loop")  # the methods that need all that p_mean_variance does
LOSSES = ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL")


@pytest.mark.parametrize("make", [make_stand_in, make_extra, make_real])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
@pytest.mark.parametrize("variance", ["LEARNED", "LEARNED_RANGE", "FIXED_SMALL", "FIXED_LARGE"])
@pytest.mark.parametrize("spaced", [False, True])
def test_known_guided_bounds(make, mean, variance, spaced):
    """The losses, with the gradients of each of their parts, and the terms of the bound; the same draws besides."""
    if (make is make_extra and (spaced or variance == "FIXED_LARGE")) or (make is make_stand_in and variance == "LEARNED"):
        pytest.skip("there is none")
    d, x = make(mean, variance, spaced), images(3, 3, 4, 4).clamp(-1, 1)
    model, t = Near(mean, VarType[variance], x), torch.tensor([0, 2, d.num_timesteps - 1])

    def train(noise):
        losses = d.training_losses(model, x, t, {"y": 0.1}, noise)
        assert list(losses)[-1] == "loss" and all(loss.shape == (3,) for loss in losses.values())
        parts = [losses, {"loss": losses["loss"].square()}] if "vb" in losses else [losses]
        return [*losses.values(), *(g for part in parts for loss in part.values() for g in gradients_of(loss.sum(), model))]

    for loss in LOSSES:
        d.loss_type = type(d.loss_type)[loss]
        with_and_without(d, lambda: train(None), 1e-4)
        with_and_without(d, lambda: train(images(3, 3, 4, 4, seed=1)), 1e-4)
    for clip in (True, False):

        def terms(clip=clip):
            out = d._vb_terms_bpd(model, x, d.q_sample(x, t), t, clip_denoised=clip, model_kwargs={"y": 0.1})
            return [*out.values(), *(g for part in out.values() for g in gradients_of(part.sum(), model))]

        with_and_without(d, terms, 1e-4)
        of_a_term = 2 if dispatch.has("vlb_terms_and_error") else 3  # x_t, the term and x0's error
        kernels = of_a_term * d.num_timesteps + 1
        with_and_without(d, lambda clip=clip: d.calc_bpd_loop(model, x, clip, {"y": 0.1}), 1e-4, kernels=kernels)
    with_and_without(d, lambda: d._prior_bpd(x), kernels=1)


def gradients_of(loss, model):
    """Where it depends on the network at all."""
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return [g for g in found if g is not None]


def test_a_training_step_in_one_launch_back():
    """What is differentiated is the sum, which the parts share; each of them is right by itself, and so is a second derivative."""
    d = Guided(BETAS, MeanType.EPSILON, VarType.LEARNED_RANGE, loss_type=LossType.RESCALED_MSE)
    m, x = images(3, 6, 4, 4, seed=4).requires_grad_(), images(3, 3, 4, 4).clamp(-1, 1)
    t, noise = torch.tensor([0, 2, T - 1]), images(3, 3, 4, 4, seed=1)
    with patch(d):
        with Dispatched() as ops:
            losses = d.training_losses(lambda *_: m, x, t, noise=noise)
            losses["loss"].mean().backward(retain_graph=True)
        assert ops.of_fastgen() == 4  # q_sample, the two parts, and one launch back
        with Dispatched() as ops:
            apart = torch.autograd.grad(losses["mse"].mean() + 2 * losses["vb"].mean(), m, retain_graph=True)[0]
        assert ops.of_fastgen() == 2
        torch.testing.assert_close(apart[:, :3], m.grad[:, :3])
        torch.testing.assert_close(apart[:, 3:], 2 * m.grad[:, 3:])
        alone = torch.autograd.grad(losses["vb"].mean(), m, retain_graph=True)[0]
        torch.testing.assert_close(alone[:, 3:], m.grad[:, 3:])
        assert not alone[:, :3].any()
        (twice,) = torch.autograd.grad(losses["loss"].mean(), m, create_graph=True)
        torch.testing.assert_close(twice, m.grad, rtol=1e-4, atol=1e-6)
        assert torch.autograd.grad(twice.square().sum(), m)[0].isfinite().all()
        losses = d.training_losses(lambda *_: m, x, t, noise=noise)
        square = torch.ones(3, 3)  # whose row and column begin at one address
        square[0, 1] = 5.0
        found = torch.autograd.grad((losses["mse"], losses["vb"]), m, (square[0], square[:, 0]), retain_graph=True)[0]
        parts = [
            torch.autograd.grad(losses[name], m, g, retain_graph=True)[0]
            for name, g in zip(("mse", "vb"), (square[0], square[:, 0]), strict=True)
        ]
        torch.testing.assert_close(found, parts[0] + parts[1])


def test_bounds_that_fall_through(caplog):
    d, model = guided(variance=VarType.LEARNED_RANGE)
    x, t = images(2, 3, 4, 4), torch.tensor([0, 5])
    odd = enum.Enum("LossType", "HUBER")
    with torch.no_grad(), caplog.at_level(logging.DEBUG, LOG):
        with_and_without(d, lambda: d.training_losses(model, x.bfloat16(), t)["mse"], 0.1)
        assert "training_losses: not fastgen but the original runs: x_start is of half precision" in caplog.text
        with_and_without(d, lambda: d.training_losses(model, x, t.int())["mse"], kernels=0)
        assert "t is no int64 tensor" in caplog.text
        with patch(d), pytest.raises(NotImplementedError):
            d.loss_type = odd.HUBER
            d.training_losses(model, x, t)
        d.loss_type = LossType.MSE
        with torch.enable_grad():
            y = x.clone().requires_grad_()
            with_and_without(d, lambda: torch.autograd.grad(d.training_losses(model, y, t)["loss"].sum(), y), 1e-4)
        assert "gradients to the data or the noise" in caplog.text
        d.loss_type, d.q_sample = LossType.KL, lambda x_start, t, noise=None: x_start
        with_and_without(d, lambda: d.training_losses(model, x, t)["loss"], 1e-4)
        assert "training_losses: the code of q_sample is the object's own" in caplog.text
    with pytest.raises(TypeError, match="unexpected keyword"), patch(d):
        d.training_losses(model, x, t, weights=1)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
@pytest.mark.parametrize("clip", [False, True])
def test_learned_gaussian_diffusion(objective, clip, caplog):
    kind = pytest.importorskip("denoising_diffusion_pytorch.learned_gaussian_diffusion").LearnedGaussianDiffusion
    if fingerprint(kind.p_losses) not in _denoising_diffusion_pytorch.METHODS["p_losses"].known:
        pytest.skip("before 2.3.0 its p_losses is another")
    net = Affine()
    net.out_dim = 6
    d = kind(net, image_size=8, timesteps=T, objective=objective, vb_loss_weight=0.3)
    x, t = images().clamp(-1, 1), torch.tensor([0, T - 1])

    def forward(noised, t, x_self_cond=None):
        """Nearly the noise: see Near."""
        scale, sigma = (c[t].reshape(-1, 1, 1, 1) for c in (d.sqrt_alphas_cumprod, d.sqrt_one_minus_alphas_cumprod))
        right = (noised - scale * x) / sigma
        return torch.cat([right + 0.1 * net.scale * noised, 1 - 0.1 * (noised * net.scale).cos()], 1)

    net.forward = forward

    def train(**options):
        d.zero_grad()
        loss = d.p_losses(x, t, clip_denoised=clip, **options)
        loss.mean().backward()
        return [loss.detach(), net.scale.grad.clone()]

    with_and_without(d, train, 1e-4, kernels=3)
    with_and_without(d, lambda: train(noise=images(seed=1)), 1e-4, kernels=3)
    if "loss_reduction" in inspect.signature(kind.p_losses).parameters:
        with_and_without(d, lambda: train(loss_reduction="none"), 1e-4, kernels=3)
    with patch(d, rng="fused"):
        assert train()[0].isfinite()
    y = x.clone().requires_grad_()
    with_and_without(d, lambda: torch.autograd.grad(d.p_losses(y, t), y), 1e-4)
    with patch(d) as p, caplog.at_level(logging.DEBUG, LOG):
        assert not any("p_mean_variance" in name for name in p.covered)
        d.immiscible = True
        d.p_losses(x, t)
        assert "or immiscible diffusion" in caplog.text


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_nearer_to_float64_than_the_library(eta):
    """Steps from one x each, of 50 steps of a cosine schedule of 1000. The libraries' float32 differences (1 − ᾱ/ᾱ', 1 − ᾱ' − σ²)
    cost them 7e-6 and 1e-5 (η = 0, 1), with fastgen it is 5e-7; at the end of a chain 3e-6 and 6e-6 against 7e-7 and 5e-7.

    Self-conditioning amplifies what remains. On a cosine schedule the first x0 = recip·x − recipm1·ε, with recip 2e4, is rounded
    to 5e-4 on average and 7e-3 at most by denoising-diffusion-pytorch, to 3e-4 and 4e-3 by fastgen (the same x and ε), and the
    network sees it again. Its Unet, 50 of 1000 steps, six seeds: with η = 0 chains end 3e-6 to 9e-6 from float64 there and 1e-6 to
    2e-5 here, nearer in two of six; with η = 1 2e-6 to 1e-5 there, 9e-7 to 2e-6 here, nearer in all."""
    cosine = np.cos((np.arange(0, 1001, 20) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    d = Guided(np.minimum(1 - cosine[1:] / cosine[:-1], 0.999))
    x, m = (images(1, 3, 64, 64, seed=seed) for seed in (1, 2))
    theirs, ours = [], []
    for i in range(50):
        t, a, previous = torch.tensor([i]), d.alphas_cumprod[i], d.alphas_cumprod_prev[i]
        sigma = eta * np.sqrt((1 - previous) / (1 - a) * (1 - a / previous))
        x0 = ((x.double() - np.sqrt(1 - a) * m.double()) / np.sqrt(a)).clamp(-1, 1)
        torch.manual_seed(i)
        noise = torch.randn_like(x)
        exact = np.sqrt(previous) * x0 + np.sqrt(1 - previous - sigma**2) * (x - np.sqrt(a) * x0) / np.sqrt(1 - a) + sigma * noise
        for errors, made in ((theirs, contextlib.nullcontext), (ours, lambda: patch(d))):
            with made():
                torch.manual_seed(i)
                y = d.ddim_sample(lambda x, t: m, x, t, eta=eta)["sample"]
            errors.append((y - exact).abs().max().item())
    assert max(ours) < max(theirs) / 3 and np.median(ours) < np.median(theirs)


@pytest.mark.parametrize("make", [make_extra, make_real])
def test_what_a_network_returns_besides(make):
    d = make("EPSILON", "LEARNED_RANGE", False)
    x, t, network = images(2, 3, 4, 4), torch.tensor([0, 5]), Network(VarType.LEARNED_RANGE)
    if "extra" not in d.p_mean_variance(network, x, t):
        pytest.skip("there is none")

    def model(x, t):
        return network(x, t), "extra"

    with torch.no_grad():
        with_and_without(d, lambda: d.p_sample(model, x, t), kernels=1)
        with_and_without(d, lambda: d.ddim_sample(model, x, t), kernels=1)
        with patch(d):
            assert d.p_mean_variance(model, x, t)["extra"] == "extra" and d.p_mean_variance(network, x, t)["extra"] is None


def test_inpainting_inside_p_mean_variance_is_kept():
    d, network = Inpainting(BETAS, MeanType.START_X), Network(None)
    motion = 5 * images(2, 3, 4, 4)
    given = {"mask": images(2, 3, 4, 4, seed=1) > 0, "motion": motion}
    for target in (d, Inpainting, Guided):
        for method in ("p_sample", "ddim_sample"):

            def sample(method=method):
                return d.sample(method, network, (2, 3, 4, 4), clip_denoised=False, model_kwargs=given)

            x = with_and_without(target, sample, kernels=T)  # of q_posterior_mean_variance, or of the base's p_mean_variance
            assert torch.allclose(x[given["mask"]], motion[given["mask"]], rtol=1e-6)
    with patch(d) as p:
        assert p.covered == ("Inpainting.q_sample", "Inpainting.q_posterior_mean_variance", "Inpainting._prior_bpd")
        assert p.skipped == {
            "Inpainting.p_mean_variance": "its code is not known",
            **dict.fromkeys(
                map("Inpainting.{}".format, ("p_sample", "ddim_sample", *BOUNDS)), "the code of p_mean_variance is not known"
            ),
        }


# What is changed in the stand-in for guided-diffusion, and the methods that then keep their own code
STEPS = ("p_mean_variance", "p_sample", "ddim_sample")
GUIDED_CHANGES = [
    ("pred.clamp(-1, 1)", "pred.clamp(-3, 3)", " ".join((*STEPS, *BOUNDS))),
    ("u * x_start + v * x_t", "u * x_start - v * x_t", " ".join(("q_posterior_mean_variance", *STEPS, *BOUNDS))),
    ("recip * x_t - recipm1 * eps", "recip * x_t + recipm1 * eps", " ".join((*STEPS, *BOUNDS))),
    ("(recip * x_t - pred_xstart) / recipm1", "(recip * x_t - 2 * pred_xstart) / recipm1", "ddim_sample calc_bpd_loop"),
    ("x < -0.999", "x < -0.99", " ".join(BOUNDS)),
    ("-1.0 + other_log_variance", "-1.5 + other_log_variance", " ".join((*BOUNDS, "_prior_bpd"))),
    ("/ 1000.0)", "/ 100.0)", "training_losses"),
    ("f(1.0 - self.alphas_cumprod)", "f(1.5 - self.alphas_cumprod)", "_prior_bpd"),
    ("torch.exp(0.5 * out", "torch.exp(0.4 * out", "p_sample"),
    ("eta=0.0", "eta=1.0", "ddim_sample"),
    ("[t].float()", "[t].float() * 2", "all"),
    ("(t != 0).float()", "(t >= 0).float()", "p_sample ddim_sample"),
]


@pytest.mark.parametrize("old, new, changed", GUIDED_CHANGES, ids=[new for _, new, _ in GUIDED_CHANGES])
def test_a_copy_of_the_guided_one_with_a_change(tmp_path, old, new, changed):
    every = [name for name, method in _guided_diffusion.METHODS.items() if method.make]
    changed = every if changed == "all" else changed.split()
    with patch(written_again(tmp_path, Guided, old, new)) as p:
        assert {name.rpartition(".")[2] for name in p.skipped} == set(changed) and len(p.covered) == 9 - len(changed)


def test_spaced_steps_that_do_more_than_wrap(tmp_path):
    kind = written_again(
        tmp_path, SpacedDiffusion, "return super().p_mean_variance(self", "return 2 * super().p_mean_variance(self"
    )
    with patch(kind) as p:
        assert {name.rpartition(".")[2] for name in p.skipped} == {*STEPS, *BOUNDS}


def test_guided_errors_are_the_librarys():
    d, model = guided()
    for call in (
        lambda: d.q_sample(images(), torch.tensor([1, 2]), noise=images(1, 3, 8, 8)),
        lambda: d.q_posterior_mean_variance(images(), images(1, 3, 8, 8), torch.tensor([1, 2])),
    ):
        with patch(d), pytest.raises(AssertionError):
            call()


def test_guided_arrays_that_are_replaced_are_noticed():
    d, model = guided()
    x, t = images(), torch.tensor([1, 2])
    with patch(d), torch.no_grad():
        first = d.q_sample(x, t, noise=x)
        d.sqrt_alphas_cumprod = d.sqrt_alphas_cumprod * 0
        second = d.q_sample(x, t, noise=x)
    close(second, d.q_sample(x, t, noise=x))
    assert not torch.equal(first, second)


def test_guided_fused_noise_and_copies():
    d, model = guided(variance=VarType.LEARNED_RANGE)
    with patch(d, rng="fused"):
        results = []
        for copied in (d, copy.deepcopy(d)):
            torch.manual_seed(0)
            with Dispatched() as ops:
                results.append([copied.sample(m, model, (2, 3, 4, 4)) for m in ("p_sample", "ddim_sample")])
            assert ops["aten.randn_like"] == 0 and ops.of_fastgen() == 2 * T
        again = pickle.loads(pickle.dumps(d))
    close(results[0], results[1], 0.0)
    with_and_without(again, lambda: again.sample("p_sample", model, (2, 3, 4, 4)), kernels=T)


def test_a_wrapper_around_a_patched_method_is_the_users(caplog):
    """functools.wraps gives it the patch's mark too."""
    d, x = diffusion(), images()

    def wrapped(method):
        @functools.wraps(method)
        def mine(*arguments, **keywords):
            mean, *rest = method(*arguments, **keywords)
            return 0 * mean + 7, *rest

        return mine

    with patch(d):
        d.p_mean_variance = wrapped(d.p_mean_variance)
        assert d.p_sample(x, 0)[0].eq(7).all()
        assert "GaussianDiffusion.p_sample" in patch(d).skipped
    e = diffusion()
    with patch(ddp.GaussianDiffusion), pytest.MonkeyPatch().context() as undone:
        undone.setattr(ddp.GaussianDiffusion, "p_mean_variance", wrapped(ddp.GaussianDiffusion.p_mean_variance))
        assert e.p_sample(x, 0)[0].eq(7).all()


def test_a_helper_that_was_replaced_is_noticed_by_the_next_patch(monkeypatch):
    d = diffusion()
    with patch(d) as first:
        assert not first.skipped
    monkeypatch.setattr(ddp, "extract", lambda a, t, shape: 2 * a.gather(-1, t).reshape(len(t), *[1] * (len(shape) - 1)))
    with patch(d) as second:
        assert "GaussianDiffusion.q_sample" in second.skipped
