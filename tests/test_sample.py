"""The whole chain: it is the loop over the steps that it says it is, sample i depends on its own seed only, and neither threads
nor exceptions nor CUDA graphs (a stand-in of which runs here) change anything."""

import contextlib
import copy
import gc
import inspect
import io
import itertools
import logging
import pickle
import subprocess
import sys
import threading
import weakref
from collections import Counter, namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import distributed_sampling
import numpy as np
import pytest
import reference
import torch
from conftest import array, assert_close, assert_same, channels_last, interpreted
from dispatched import Dispatched
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastgen
from fastgen import _sampling
from fastgen.schedule import PREDICTIONS, VARIANCES

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (3, 2, 4, 5)
SEEDS = [11, -5, 2**63 - 1]


def tame(x, t, shift=0.0):
    """A network that is elementwise, so that the bits of a sample do not depend on its batch."""
    return torch.tanh(x) * (1 + t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype) / 100) + shift


def wide(x, t):
    return torch.cat([tame(x, t), 0.3 * x.sin()], dim=1)


def by_hand(model, shape, schedule, *, step=fastgen.ddpm_step, seed, dtype=torch.float32, device="cpu", **options):
    """The loop that everybody writes."""
    x = fastgen.randn(shape, seed=seed, offset=len(schedule), dtype=dtype, device=device)
    for t in reversed(range(len(schedule))):
        timesteps = torch.full((shape[0],), int(schedule.timesteps[t]), device=device)
        x = step(x, model(x, timesteps), t, schedule, seed=seed, **options)
    return x


METHODS = {
    "ddpm": (tame, {}),
    "beta": (tame, {"variance": "beta", "clip": 1.0}),
    "learned": (wide, {"variance": "learned"}),
    "learned_range": (wide, {"variance": "learned_range", "clip": 2.0}),
    "sample": (tame, {"prediction": "sample"}),
    "v": (tame, {"prediction": "v_prediction", "clip": 1.5}),
    "ddim": (tame, {"method": "ddim"}),
    "ddim eta": (tame, {"method": "ddim", "eta": 0.6, "clip": 1.0, "prediction": "v_prediction"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_is_the_loop_by_hand(backend, device, schedule, name):
    if interpreted(device) and name not in ("ddpm", "ddim eta"):
        pytest.skip("two are enough for the interpreter")
    model, options = METHODS[name]
    short = schedule.respace(3 if interpreted(device) else 6)
    made = fastgen.sample(model, SHAPE, short, seed=5, device=device, **options)
    options = dict(options)
    step = fastgen.ddim_step if options.pop("method", "ddpm") == "ddim" else fastgen.ddpm_step
    assert_same(made, by_hand(model, SHAPE, short, step=step, seed=5, device=device, **options))
    assert made.device == device and made.is_contiguous()


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_against_float64(backend, device, schedule, method):
    """The chain in NumPy, from the papers and the random-number contract alone."""
    short = schedule.respace(3 if interpreted(device) else 8)
    x = reference.normals(SHAPE, SEEDS, offset=len(short))
    for t in reversed(range(len(short))):
        m, z = array(torch.tanh(torch.tensor(x))), reference.normals(SHAPE, SEEDS, offset=t)
        if method == "ddpm":
            x, _ = reference.ddpm_step(x, m, short.betas, t, z, clip=1.0)
        else:
            x, _ = reference.ddim_step(x, m, short.betas, t, z, eta=0.5, clip=1.0)
    options = {"method": method, "clip": 1.0, "sample_seeds": SEEDS, "device": device, **({"eta": 0.5} if method == "ddim" else {})}
    # each step's rounding goes through the ones after it
    assert_close(fastgen.sample(lambda x, t: torch.tanh(x), SHAPE, short, **options), x, scale=100)


def test_backends_agree(schedule):
    made = []
    for name in ("eager", *[b for b in fastgen.available_backends("cpu") if b == "cpp"]):
        with fastgen.use_backend(name):
            made.append(fastgen.sample(tame, SHAPE, schedule, seed=1, clip=1.0))
    for other in made[1:]:
        torch.testing.assert_close(other, made[0], rtol=0, atol=1e-4)


def test_respacing(schedule):
    seen = []

    def model(x, t):
        assert t.dtype == torch.int64 and t.shape == (3,)
        seen.append(t.unique().item())
        return tame(x, t)

    made = fastgen.sample(model, SHAPE, schedule, steps=4, seed=5)
    assert seen == [30, 20, 10, 0]
    assert_same(made, by_hand(tame, SHAPE, schedule.respace(4), seed=5))
    for spacing, visited in {"leading": [30, 20, 10, 0], "trailing": [39, 29, 19, 9], "linspace": [39, 26, 13, 0]}.items():
        seen.clear()
        made = fastgen.sample(model, SHAPE, schedule, steps=4, spacing=spacing, seed=5)
        assert seen == visited
        assert_same(made, by_hand(tame, SHAPE, schedule.respace(4, spacing), seed=5))
    seen.clear()
    fastgen.sample(model, SHAPE, schedule, steps=[3, 39], seed=5)
    assert seen == [39, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(schedule, dtype):
    made = fastgen.sample(tame, SHAPE, schedule, steps=5, seed=5, dtype=dtype)
    assert_same(made, by_hand(tame, SHAPE, schedule.respace(5), seed=5, dtype=dtype))
    assert made.dtype == dtype


def test_a_float32_chain_with_a_half_precision_network(schedule):
    made = fastgen.sample(lambda x, t: tame(x, t).bfloat16(), SHAPE, schedule, steps=5, seed=5)
    assert made.dtype == torch.float32
    with pytest.raises(TypeError, match="^model: expected an output no wider than the chain's torch.bfloat16, got torch.float32"):
        fastgen.sample(lambda x, t: x.float(), SHAPE, schedule, steps=5, dtype=torch.bfloat16)


@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 2, 4, 5)])
def test_a_channels_last_network_gets_channels_last_input(schedule, shape):
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    seen = []

    def model(x, t):
        seen.append(x.is_contiguous(memory_format=layout) and not x.is_contiguous())
        return channels_last(tame(x, t))

    made = fastgen.sample(model, shape, schedule, steps=4, seed=5)
    assert seen == [False, True, True, True]
    assert made.is_contiguous(memory_format=layout)
    assert_same(made.contiguous(), fastgen.sample(tame, shape, schedule, steps=4, seed=5))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (5,), (3, 7)])
def test_shapes(schedule, shape):
    made = fastgen.sample(tame, shape, schedule, steps=3, seed=5)
    assert_same(made, by_hand(tame, shape, schedule.respace(3), seed=5))


# ---- dynamic thresholding ---------------------------------------------------------------------------------------------


def bold(x, t):
    """Whose x0 goes beyond any bound here, whatever it predicts."""
    return 2.5 * x.sin() + x / 2


def bolder(x, t):
    return torch.cat([bold(x, t), 0.3 * x.cos()], dim=1)


def imagen(schedule, p, c=1.0, model=bold, method="ddpm", prediction="epsilon", guided=None, **options):
    """The chain with the thresholding of Saharia et al. 2022, section 2.3, for data within ±c, in NumPy; and all bounds."""
    learned = options.get("variance", "").startswith("learned")
    step, bounds = reference.ddim_step if method == "ddim" else reference.ddpm_step, []
    x = reference.normals(SHAPE, SEEDS, offset=len(schedule))
    for t in reversed(range(len(schedule))):
        m = array(model(torch.tensor(x), t))
        if guided is not None:
            m = reference.guided(array(model(torch.tensor(x), t) + 0.5), m, guided, learned)
        m, v = np.split(m, 2, axis=1) if learned else (m, m[:, :0])
        x0 = reference.predicted_x0(x, m, schedule.betas, t, prediction)
        s = np.maximum(np.quantile(np.abs(x0).reshape(len(x0), -1), p, axis=1), c).reshape(-1, 1, 1, 1)
        x0 = np.clip(x0, -s, s) / s * c
        z = reference.normals(SHAPE, SEEDS, offset=t)
        x, _ = step(x, np.concatenate([x0, v], axis=1), schedule.betas, t, z, prediction="sample", **options)
        bounds.append(s)
    return x, np.stack(bounds)


THRESHOLDED = {
    "ddpm": {},
    "beta": {"variance": "beta", "prediction": "v_prediction"},
    "learned": {"variance": "learned", "prediction": "sample"},
    "learned_range": {"variance": "learned_range"},
    "ddim": {"method": "ddim"},
    "ddim noise": {"method": "ddim", "eta": 0.6, "prediction": "v_prediction"},
}


@pytest.mark.parametrize("guided", [None, 3.0])
@pytest.mark.parametrize(("p", "clip"), [(0.9, None), (0.37, 0.5), (1.0, 2.0)])
@pytest.mark.parametrize("name", THRESHOLDED)
def test_dynamic_thresholding(backend, device, schedule, name, p, clip, guided):
    if interpreted(device) and (name, p, guided) not in (("learned_range", 0.9, 3.0), ("ddim noise", 0.37, None)):
        pytest.skip("two are enough for the interpreter")
    options, short = THRESHOLDED[name], schedule.respace(3 if interpreted(device) else 6)
    model = bolder if "learned" in name else bold
    expected, bounds = imagen(short, p, 1.0 if clip is None else clip, model, guided=guided, **options)
    assert (bounds > bounds.min()).any()  # else the quantile would not matter
    kwargs = {}
    if guided is not None:
        kwargs = {"model_kwargs": {"shift": torch.full((3, 1, 1, 1), 0.5, device=device)}, "guidance_scale": guided}
        kwargs["unconditional_kwargs"] = {"shift": torch.zeros(3, 1, 1, 1, device=device)}
    made = fastgen.sample(
        *(lambda x, t, shift=0.0: model(x, t) + shift, SHAPE, short),
        **{"sample_seeds": SEEDS, "threshold": p, "clip": clip, "device": device, **options, **kwargs},
    )
    assert_close(made, expected, scale=100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_quantile_is_that_of_an_unrounded_x0(schedule, dtype, monkeypatch):
    """The network's rounding is in it, the step's is not."""
    seen, made_here = [], _sampling.chain.dynamic_bound
    monkeypatch.setattr(_sampling.chain, "dynamic_bound", lambda x0, *a: seen.append((x0, made_here(x0, *a))) or seen[-1][1])
    short = schedule.respace(4)
    made, trajectory = fastgen.sample(bold, SHAPE, short, dtype=dtype, seed=5, threshold=0.7, return_trajectory=True)
    assert made.dtype == dtype
    for x, y, (x0, bound), t in zip(trajectory, trajectory[1:], seen, reversed(range(4)), strict=False):
        m, wide = bold(x, t), torch.float64 if dtype == torch.float64 else torch.float32
        expected = reference.predicted_x0(array(x), array(m), short.betas, t, "epsilon")
        assert x0.dtype == bound.dtype == wide
        assert_close(x0, expected, scale=100)
        assert_close(bound, np.maximum(np.quantile(np.abs(expected).reshape(3, -1), 0.7, axis=1), 1.0), scale=100)
        assert_same(y, fastgen.ddpm_step(x, m, t, short, threshold=bound, seed=5))


def test_a_float32_chain_of_a_half_precision_network_is_thresholded(schedule):
    short = schedule.respace(4)
    made = fastgen.sample(lambda x, t: bold(x, t).bfloat16(), SHAPE, short, sample_seeds=SEEDS, threshold=0.9)
    expected, _ = imagen(short, 0.9, model=lambda x, t: bold(x.float(), t).bfloat16())
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), torch.tensor(expected), rtol=0, atol=0.03)  # where the two round apart


def test_a_thresholded_sample_is_independent_of_its_batch(backend, device, schedule):
    """Also of one that is NaN, which stays alone with that; and of the layout."""
    if interpreted(device):
        pytest.skip("the quantile is torch's there too")
    elementwise = lambda x, t: 3 * torch.tanh(x)  # noqa: E731  (whose bits do not depend on the batch)

    def make(seeds, model=elementwise):
        shape = (len(seeds), *SHAPE[1:])
        return fastgen.sample(model, shape, schedule, steps=5, sample_seeds=seeds, device=device, threshold=0.8, guidance_scale=1.5,
                              unconditional_kwargs={})  # fmt: skip

    together = make(SEEDS)
    for i, seed in enumerate(SEEDS):
        assert_same(make([seed])[0], together[i])
    assert_same(make(SEEDS, lambda x, t: channels_last(elementwise(x, t))).contiguous(), together)

    def spoilt(x, t):
        m = elementwise(x, t)
        m[[1, 4], 0, 1, 1] = torch.nan
        return m

    made = make(SEEDS, spoilt)
    assert_same(made[[0, 2]], together[[0, 2]])
    assert made[1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (5,), (3, 1), (2, 3, 2, 2, 3)])
def test_shapes_that_are_thresholded(schedule, shape):
    made = fastgen.sample(bold, shape, schedule, steps=3, seed=5, threshold=0.9)
    assert made.shape == shape and made.isfinite().all()
    assert made.abs().max() <= 1.0 if made.numel() else True  # at t = 0 what is left is x0


@pytest.mark.parametrize(("p", "low", "high"), [(0.995, 1.0, None), (0.5, 0.0, 0.6), (1e-9, 0.0, None), (1.0, 0.1, 3.0)])
def test_bounds_against_the_quantile_of_float64(p, low, high):
    x0 = torch.randn(5, 3, 7, 11, generator=torch.Generator().manual_seed(0))
    expected = np.clip(np.quantile(np.abs(array(x0)).reshape(5, -1), p, axis=1), low, high)
    for x in (x0, channels_last(x0), x0.double()):
        assert_close(_sampling.chain.dynamic_bound(x, p, low, high), expected)
    assert_same(_sampling.chain.dynamic_bound(x0[2:3], p, low, high), _sampling.chain.dynamic_bound(x0, p, low, high)[2:3])
    x0[1, 0, 0, 0], x0[2, 1, 1, 1] = torch.nan, torch.inf
    made = _sampling.chain.dynamic_bound(x0, p, low, high)
    assert made.isnan().tolist() == [False, True, False, False, False]
    assert_close(made[[0, 3, 4]], expected[[0, 3, 4]])


def test_bounds_of_a_sample_larger_than_torchs_quantile_takes():
    x0 = torch.arange(2**24 + 2, dtype=torch.float64).flip(0)[None]
    assert_close(_sampling.chain.dynamic_bound(x0, 0.9999, 1.0), [0.9999 * (2**24 + 1)])


def test_bounds_do_not_wait_for_the_device():
    """Of a tensor that has no values there is none to see."""
    made = _sampling.chain.dynamic_bound(torch.empty(3, 2, 4, 5, device="meta", dtype=torch.bfloat16), 0.9, 1.0)
    assert (made.shape, made.dtype, made.device.type) == ((3,), torch.float32, "meta")


@pytest.mark.skipif("cpp" not in fastgen.available_backends("cpu"), reason="the CPU library was not built")
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"variance": "learned"}, {"method": "ddim", "eta": 0.5}])
def test_what_a_thresholded_step_launches(schedule, options):
    """Its kernel twice, and what takes the quantile; neither a copy of the network's output nor another guided one."""
    model = wide if "variance" in options else tame
    sampler = fastgen.Sampler(model, SHAPE, schedule, steps=5, threshold=0.9, **options)
    plain = fastgen.Sampler(model, SHAPE, schedule, steps=5, **options)
    counts, how = [], {"unconditional_kwargs": {}} if "guidance_scale" in options else {}
    with fastgen.use_backend("cpp"):
        for each in (sampler, plain):
            each(seed=3, **how)
            with Dispatched() as ops:
                each(seed=3, **how)
            counts.append(ops.counts)
    more = counts[0] - counts[1]
    step = "fastgen.ddim_step" if "method" in options else "fastgen.ddpm_step"
    assert counts[0]["fastgen.ddpm_step"] == 10 and counts[1][step] == 5
    views = {"aten.view", "aten.select", "aten._unsafe_view"}
    launches = {name: count for name, count in more.items() if name not in views and not name.startswith("fastgen")}
    assert launches == dict.fromkeys(["aten.abs", "aten.topk", "aten.lerp", "aten.minimum", "aten.clamp"], 5)


# ---- what the network returns and is made of --------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda m: (m, 1), lambda m: SimpleNamespace(sample=m), namedtuple("Out", "sample")])
def test_outputs_of_other_libraries(schedule, wrap):
    made = fastgen.sample(lambda x, t: wrap(tame(x, t)), SHAPE, schedule, steps=3, seed=5)
    assert_same(made, fastgen.sample(tame, SHAPE, schedule, steps=3, seed=5))


@pytest.mark.parametrize("returned", [None, (), [torch.zeros(SHAPE)], torch.distributions.Normal(0.0, 1.0)])
def test_other_outputs_are_refused(schedule, returned):
    with pytest.raises(TypeError, match="^model: expected it to return a tensor, a tuple"):
        fastgen.sample(lambda x, t: returned, SHAPE, schedule, steps=3)


class Network(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.full((2, 1, 1), 0.5, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x, t, shift=None):
        assert not torch.is_grad_enabled()
        return torch.tanh(x * self.scale) + (0 if shift is None else shift)


def test_device_and_dtype_are_the_models(schedule):
    model = Network(torch.float64).train()
    sampler = fastgen.Sampler(model, SHAPE, schedule, steps=3)
    made = sampler(seed=1)
    assert (sampler.dtype, sampler.device) == (torch.float64, torch.device("cpu"))
    assert made.dtype == torch.float64 and not made.requires_grad
    assert model.training and torch.is_grad_enabled()
    assert fastgen.Sampler(model.eval(), SHAPE, schedule, dtype=torch.float32).dtype == torch.float32
    assert not model.training
    no_weights = fastgen.Sampler(nn.Identity(), SHAPE, schedule)
    assert (no_weights.dtype, no_weights.device.type) == (torch.float32, "cpu")


# ---- seeds ------------------------------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_its_seed(backend, device, schedule):
    steps = 3 if interpreted(device) else 8

    def make(seeds):
        shape = (len(seeds), *SHAPE[1:])
        return fastgen.sample(tame, shape, schedule, steps=steps, sample_seeds=seeds, device=device, clip=1.0)

    together = make(SEEDS)
    for i, seed in enumerate(SEEDS):
        assert_same(make([seed])[0], together[i])
    assert_same(make(SEEDS[::-1]), together.flip(0))
    assert_same(make(torch.tensor(SEEDS)), together)
    assert_same(make(torch.tensor(SEEDS, device=device)), together)


def test_one_seed(schedule):
    make = lambda **how: fastgen.sample(tame, SHAPE, schedule, steps=3, **how)  # noqa: E731
    made = make(seed=2**64 - 5)
    for seed in (-5, torch.tensor(-5), torch.tensor([-5])):
        assert_same(make(seed=seed), made)
    assert not torch.equal(made[0], made[1])
    torch.manual_seed(0)
    first, second = make(), make()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert_same(make(), first)


@pytest.mark.parametrize("seeds", [SEEDS, range(3), torch.tensor(SEEDS), np.array(SEEDS)])
def test_seeds_of_the_host_are_refused_in_a_capture(monkeypatch, seeds):
    """The copy that would bring them to the device would end the capture with an error of CUDA's."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    got = "one on the CPU" if isinstance(seeds, torch.Tensor) else type(seeds).__name__
    with pytest.raises(ValueError, match=f"^sample_seeds: expected a tensor on cuda:0 during CUDA-graph capture, .*, got {got}$"):
        _sampling.arguments._checked_sample_seeds(seeds, 3, torch.device("cuda", 0))
    with pytest.raises(TypeError, match="^sample_seeds: expected a sequence"):
        _sampling.arguments._checked_sample_seeds("abc", 3, torch.device("cuda", 0))
    assert _sampling.arguments._checked_sample_seeds(seeds, 3, torch.device("cpu")).tolist() == list(seeds)
    with FakeTensorMode():
        there = torch.zeros(3, dtype=torch.int64, device="cuda:0")
        assert _sampling.arguments._checked_sample_seeds(there, 3, torch.device("cuda", 0)) is there


NO_GLOO = not (torch.distributed.is_available() and torch.distributed.is_gloo_available())


@pytest.mark.skipif(NO_GLOO, reason="this torch has no gloo")
def test_two_processes_make_the_images_of_one(tmp_path):
    """In order, bit for bit, with an uneven split."""
    worker, result = Path(distributed_sampling.__file__), tmp_path / "images.pt"
    arguments = [[str(rank), "2", str(tmp_path / "store"), str(result)] for rank in range(2)]
    running = [
        subprocess.Popen([sys.executable, str(worker), *a], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for a in arguments
    ]
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    alone = distributed_sampling.sample()
    assert_same(torch.load(result), alone)
    assert alone.shape == (5, 1, 6, 6)


# ---- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ddpm", "ddim", "learned"])
def test_guidance(schedule, method):
    """One call of the network for both halves, combined by the step as two calls would be."""
    calls = []

    def model(x, t, shift, table, nested, name):
        assert name == "n" and table.shape == (7,)
        calls.append(x.shape[0])
        m = tame(x, t, shift) + table[0] + nested["more"][0]
        return torch.cat([m, 0.1 * m], 1) if method == "learned" else m

    condition = torch.linspace(0, 1, 3).reshape(3, 1, 1, 1)
    table = torch.arange(7.0)
    given = {"shift": condition, "table": table, "nested": {"more": [condition / 2, 3]}, "name": "n"}
    none = {"name": "n", "shift": condition * 0, "table": table.clone(), "nested": {"more": [condition * 0, 3]}}
    options = {"method": "ddim"} if method == "ddim" else {"variance": "learned"} if method == "learned" else {}
    kwargs = {"model_kwargs": given, "unconditional_kwargs": none}
    made = fastgen.sample(model, SHAPE, schedule, steps=4, seed=5, guidance_scale=2.5, **options, **kwargs)
    assert calls == [6, 6, 6, 6]
    assert given["shift"] is condition

    short = schedule.respace(4)
    x = fastgen.randn(SHAPE, seed=5, offset=4)
    step = fastgen.ddim_step if options.pop("method", None) else fastgen.ddpm_step
    for t in reversed(range(4)):
        timesteps = torch.full((3,), int(short.timesteps[t]))
        m, u = model(x, timesteps, **given), model(x, timesteps, **none)
        x = step(x, m, t, short, seed=5, unconditional_output=u, guidance_scale=2.5, **options)
    assert_same(made, x)


def test_guidance_of_unequal_arguments_is_refused(schedule):
    sampler = fastgen.Sampler(lambda x, t, **kwargs: x, SHAPE, schedule, steps=2, guidance_scale=1.5)
    good = {"c": torch.zeros(3, 2), "n": 1}
    sampler(model_kwargs=good, unconditional_kwargs=good)
    for bad, message in [
        ({}, "^unconditional_kwargs: expected the keys of model_kwargs"),
        ({**good, "c": torch.zeros(3, 3)}, r"^unconditional_kwargs\['c'\]: expected \(3, 2\)"),
        ({**good, "c": torch.zeros(3, 2, dtype=torch.float64)}, r"^unconditional_kwargs\['c'\]: expected"),
        ({**good, "c": 0.0}, r"^unconditional_kwargs\['c'\]: expected tensors"),
        ({**good, "c": [torch.zeros(3, 2)]}, "^unconditional_kwargs: expected values nested like"),
        ({**good, "n": 2}, r"^unconditional_kwargs\['n'\]: expected tensors, or what model_kwargs has"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampler(model_kwargs=good, unconditional_kwargs=bad)
    with pytest.raises(ValueError, match=r"^unconditional_kwargs\['c'\]: expected 3 as first dimension"):
        sampler(model_kwargs={"c": torch.zeros(2)}, unconditional_kwargs={"c": torch.ones(2)})
    for bad in ({"a": 1, "c": 2}, {"a": 1}, {"a": 1, "b": [2]}, [1, 2]):
        with pytest.raises(ValueError, match="^unconditional_kwargs: expected values nested like"):
            sampler(model_kwargs={"n": {"a": 1, "b": 2}}, unconditional_kwargs={"n": bad})
    equal = {"a": np.arange(3), "nan": float("nan"), "s": "x"}
    sampler(model_kwargs=equal, unconditional_kwargs={"a": np.arange(3), "nan": -float("nan"), "s": "x"})
    bad = SimpleNamespace(x=torch.zeros(2)), SimpleNamespace(x=torch.zeros(2))  # whose comparison raises
    for u, c in [(np.arange(3), np.arange(4)), (1, True), bad]:
        with pytest.raises(ValueError, match=r"^unconditional_kwargs\['a'\]: expected tensors, or what model_kwargs has"):
            sampler(model_kwargs={"a": c}, unconditional_kwargs={"a": u})
    with pytest.raises(ValueError, match=r"^unconditional_kwargs\['a'\]: expected dense tensors"):
        sampler(model_kwargs={"a": torch.ones(2).to_sparse()}, unconditional_kwargs={"a": torch.ones(2).to_sparse()})
    half = fastgen.Sampler(lambda x, t: x[:3], SHAPE, schedule, steps=2, guidance_scale=1.5)
    with pytest.raises(ValueError, match="^model: expected an output for 6 samples under guidance"):
        half(unconditional_kwargs={})


def test_the_order_of_keys_is_no_difference(schedule):
    def model(x, t, first, nested):
        return tame(x, t, first) + nested["a"] * nested["b"]

    values = [torch.linspace(0, k, 3).reshape(3, 1, 1, 1) for k in (1, 2, 3)]
    given = {"first": values[0], "nested": {"a": values[1], "b": values[2]}}
    none = {"first": values[1], "nested": {"a": values[2], "b": values[0]}}
    turned = {"nested": {"b": values[0], "a": values[2]}, "first": values[1]}
    sampler = fastgen.Sampler(model, SHAPE, schedule, steps=3, guidance_scale=1.5)
    expected = sampler(seed=1, model_kwargs=given, unconditional_kwargs=none)
    assert_same(sampler(seed=1, model_kwargs=given, unconditional_kwargs=turned), expected)


def test_a_shared_tensor_is_not_compared_where_that_would_wait(schedule):
    """Off the CPU it is the very tensor, or the same memory; two are refused unseen. A NaN makes comparing say "others"."""
    sampler = fastgen.Sampler(lambda x, t, table: x, SHAPE, schedule, steps=2, guidance_scale=1.5)
    table = torch.full((7, 2), torch.nan)
    for same in (table, table.view(7, 2), table[:]):
        sampler(model_kwargs={"table": table}, unconditional_kwargs={"table": same})
    for other in (table.clone(), torch.full((2, 7), torch.nan).T, table.expand(7, 2)[:, :1].expand(7, 2)):
        with pytest.raises(ValueError, match=r"^unconditional_kwargs\['table'\]: expected 3 .* the values of model_kwargs"):
            sampler(model_kwargs={"table": table}, unconditional_kwargs={"table": other})
    with FakeTensorMode():
        there, other = torch.zeros(7, device="cuda"), torch.zeros(7, device="cuda")
    sampler(model_kwargs={"table": there}, unconditional_kwargs={"table": there})
    with pytest.raises(ValueError, match=r"^unconditional_kwargs\['table'\]: expected 3 .* the very tensor of model_kwargs .*cuda"):
        sampler(model_kwargs={"table": there}, unconditional_kwargs={"table": other})


# ---- what runs --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("cpp" not in fastgen.available_backends("cpu"), reason="the CPU library was not built")
@pytest.mark.parametrize("options", [{}, {"method": "ddim", "eta": 0.5}, {"clip": 1.0, "sample_seeds": SEEDS}])
def test_a_step_is_the_network_and_one_op(schedule, options):
    """Not even a view: of aten's ops only the network's, and the allocation of x_T."""
    options = dict(options)
    seeds = {"sample_seeds": torch.tensor(options.pop("sample_seeds"))} if "sample_seeds" in options else {"seed": 3}
    sampler = fastgen.Sampler(lambda x, t: torch.sin(x), SHAPE, schedule, steps=5, **options)
    with fastgen.use_backend("cpp"):
        sampler(**seeds)
        with Dispatched() as ops:
            sampler(**seeds)
    step = "fastgen.ddim_step" if "method" in options else "fastgen.ddpm_step"
    assert ops.counts == {"aten.empty": 1, "fastgen.randn": 1, "aten.sin": 5, step: 5}


@pytest.mark.skipif("cpp" not in fastgen.available_backends("cpu"), reason="the CPU library was not built")
def test_guidance_puts_the_networks_input_together_and_takes_its_output_apart(schedule):
    """Once per step, the output as views; the arguments once per chain."""
    sampler = fastgen.Sampler(lambda x, t, c: torch.sin(x), SHAPE, schedule, steps=5, guidance_scale=2.0)
    kwargs = {"model_kwargs": {"c": torch.ones(3)}, "unconditional_kwargs": {"c": torch.zeros(3)}}
    with fastgen.use_backend("cpp"), Dispatched() as ops:
        sampler(seed=3, **kwargs)
    assert (ops["aten.cat"], ops["aten.split"], ops["aten.sin"], ops.of_fastgen()) == (6, 5, 5, 6)


ALIKE = {
    "ddpm": (tame, {}, {"seed": 3}),
    "clip": (tame, {"clip": 1.0}, {"seed": -3}),
    "seeds": (tame, {"variance": "beta"}, {"sample_seeds": SEEDS}),
    "learned": (wide, {"variance": "learned_range", "clip": 1.5}, {"sample_seeds": SEEDS}),
    "ddim": (tame, {"method": "ddim"}, {"seed": 3}),
    "ddim noise": (tame, {"method": "ddim", "eta": 0.5, "prediction": "v_prediction"}, {"seed": torch.tensor([3])}),
    "guided": (tame, {"guidance_scale": 2.0}, {"seed": 3, "unconditional_kwargs": {}}),
    "guided learned": (wide, {"guidance_scale": 2.0, "variance": "learned"}, {"seed": 3, "unconditional_kwargs": {}}),
}


@pytest.mark.parametrize("name", ALIKE)
def test_steps_alike_are_the_steps(backend, device, schedule, name, monkeypatch):
    """Of the compiled op only the first goes through the public function, and the others give the bits that it would."""
    if interpreted(device):
        pytest.skip("no compiled op")
    model, options, how = ALIKE[name]
    calls, step = [], "ddim_step" if options.get("method") == "ddim" else "ddpm_step"
    public = getattr(_sampling.chain, step)
    monkeypatch.setattr(_sampling.chain, step, lambda *a, **k: calls.append(1) or public(*a, **k))
    made = fastgen.sample(model, SHAPE, schedule, steps=5, device=device, **options, **how)
    assert len(calls) == (1 if fastgen.backend(device) == "cpp" else 5)
    calls.clear()
    monkeypatch.setattr(_sampling.chain, "steps_alike", lambda *a: None)
    assert_same(made, fastgen.sample(model, SHAPE, schedule, steps=5, device=device, **options, **how))
    assert len(calls) == 5


def test_a_later_step_that_is_not_like_the_first(schedule):
    """Another dtype is taken, and what is wrong gets its words."""
    mixed = lambda x, t: tame(x, t).bfloat16() if t[0] == 20 else tame(x, t)  # noqa: E731
    made = fastgen.sample(mixed, SHAPE, schedule, steps=4, seed=5)
    assert_same(made, by_hand(mixed, SHAPE, schedule.respace(4), seed=5))
    for bad, error, message in [
        (lambda x: x[:, :1], ValueError, r"^model_output: expected shape \(3, 2, 4, 5\) like x_t, got \(3, 1, 4, 5\)"),
        (lambda x: x.to("meta"), ValueError, "^model_output: expected a tensor on cpu"),
        (lambda x: x.double(), TypeError, "^model: expected an output no wider"),
        (lambda x: [x], TypeError, "^model: expected it to return a tensor"),
    ]:
        with pytest.raises(error, match=message):
            fastgen.sample(lambda x, t, bad=bad: x if t[0] == 30 else bad(x), SHAPE, schedule, steps=4, seed=5)


# ---- callback, trajectory, progress -----------------------------------------------------------------------------------


def test_callback_and_trajectory(schedule):
    seen = []
    options = {"steps": 4, "seed": 5}
    x, trajectory = fastgen.sample(
        tame, SHAPE, schedule, **options, callback=lambda *a: seen.append(a), return_trajectory=True, progress=False
    )
    assert [(step, t) for step, t, _ in seen] == [(0, 30), (1, 20), (2, 10), (3, 0)]
    assert all(type(t) is int for _, t, _ in seen)
    assert_same(x, fastgen.sample(tame, SHAPE, schedule, **options))
    assert_same(trajectory, torch.stack([fastgen.randn(SHAPE, seed=5, offset=4), *[x for _, _, x in seen]]))
    assert_same(trajectory[-1], x)


def test_a_callback_may_steer(schedule):
    """As inpainting does: what it writes is what the next step reads."""
    fixed = fastgen.sample(tame, SHAPE, schedule, steps=3, seed=5, callback=lambda step, t, x: x[:, :1].fill_(0.25))
    assert (fixed[:, :1] == 0.25).all() and not (fixed[:, 1:] == 0.25).any()


def test_progress(schedule, capsys):
    pytest.importorskip("tqdm")
    made = fastgen.sample(tame, SHAPE, schedule, steps=3, seed=5, progress=True)
    assert "3/3" in capsys.readouterr().err
    assert_same(made, fastgen.sample(tame, SHAPE, schedule, steps=3, seed=5))
    assert capsys.readouterr().err == ""


def test_progress_without_tqdm(schedule, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="^progress: expected tqdm to be installed"):
        fastgen.sample(tame, SHAPE, schedule, progress=True)


# ---- what is dropped while a chain runs -------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """The addresses of what ops read and none of them has made."""

    def __enter__(self):
        self.read, self.made = set(), []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        made = {self.place(x) for x in self.made}
        self.read |= {self.place(x) for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)} - made
        self.made += [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result

    @staticmethod
    def place(x):
        return x.untyped_storage().data_ptr()


READING = {
    "ddpm": {"clip": 1.0},
    "ddim": {"method": "ddim", "eta": 0.5},
    "guided": {"guidance_scale": 2.0},
    "thresholded": {"threshold": 0.9},
}


@pytest.mark.parametrize("backend", ["cpp", "eager"])
@pytest.mark.parametrize("options", READING.values(), ids=READING)
def test_the_stream_is_told_what_a_chain_reads(schedule, options, backend, monkeypatch):
    """As on CUDA, where the allocator would give the memory of a sampler's own schedule away while the chain still reads it."""
    if backend not in fastgen.available_backends("cpu"):
        pytest.skip("the CPU library was not built")
    sampler = fastgen.Sampler(tame, SHAPE, schedule, steps=4, **options)
    told, stream, here = set(), object(), _sampling.chain.randn
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, on: told.add((Reads.place(x), on)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_sampling.chain, "randn", lambda *a, **how: here(*a, **{**how, "device": "cpu"}))
    sampler._chain.device = torch.device("cuda", 0)
    with fastgen.use_backend(backend), Reads() as ops:
        sampler._chain.run(1, {})
    assert len(ops.read) == 2 + ("threshold" in options)  # timesteps and coefficients
    assert told == {(place, stream) for place in ops.read}


@pytest.mark.parametrize("options", READING.values(), ids=READING)
def test_a_graph_keeps_what_it_reads(schedule, options, log):
    """For it may be dropped, with the sampler and the schedule, while a replay is under way: each tells its stream of it."""
    sampler = recording(tame, SHAPE, schedule, steps=4, **options)
    sampler(seed=1, **({"unconditional_kwargs": {}} if "guidance_scale" in options else {}))
    graph = sampler._graphs._forms[0].graph
    with Reads() as ops:
        graph._graph.function()
    assert len(ops.read) == 3 + ("threshold" in options)  # the seed too
    told = []
    graph._graph.turn = lambda inputs: told.extend(map(Reads.place, inputs)) or contextlib.nullcontext()
    graph.replay(1, [])
    assert set(told) == ops.read


# ---- threads and exceptions -------------------------------------------------------------------------------------------


def test_threads_share_a_sampler(schedule):
    sampler = fastgen.Sampler(Network(), SHAPE, schedule, steps=10, method="ddim", eta=0.5)
    expected = [sampler(seed=seed) for seed in range(8)]
    made, start = [None] * 8, threading.Barrier(8)

    def work(seed):
        start.wait()
        made[seed] = [sampler(seed=seed) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, first in zip(made, expected, strict=True):
        for other in results:
            assert_same(other, first)


def test_a_call_inside_a_callback(schedule):
    sampler = fastgen.Sampler(tame, SHAPE, schedule, steps=4)
    inner = []
    outer = sampler(seed=1, callback=lambda step, t, x: inner.append(sampler(seed=2)))
    assert_same(outer, sampler(seed=1))
    for x in inner:
        assert_same(x, sampler(seed=2))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["callback", "network"])
def test_an_interrupted_chain_leaves_nothing_broken(schedule, error, where):
    armed = [True]

    def model(x, t):
        if where == "network" and armed[0] and t[0] == 10:
            raise error("stop")
        return tame(x, t)

    def callback(step, t, x):
        if where == "callback" and armed[0] and step == 2:
            raise error("stop")

    sampler = fastgen.Sampler(model, SHAPE, schedule, steps=4)
    with pytest.raises(error, match="stop"):
        sampler(seed=1, callback=callback, progress=True)
    assert torch.is_grad_enabled()
    armed[0] = False
    assert_same(sampler(seed=1, callback=callback), by_hand(tame, SHAPE, schedule.respace(4), seed=1))


# ---- one CUDA graph, of which a stand-in runs here --------------------------------------------------------------------


class Recorded:
    """In the place of `cuda_graph.Graph`: a replay calls the function again, which reads the static tensors and nothing else."""

    log: list = []
    fails, times = None, -1  # what a recording raises, and how many do; -1 for all

    def __init__(self, function, warm_up, device):
        self.log.append("record")
        warm_up()
        if Recorded.fails is not None and Recorded.times != 0:
            Recorded.times -= 1
            raise Recorded.fails
        self.function, self.output = function, function().clone()

    @contextlib.contextmanager
    def turn(self, inputs):
        self.log.append("turn")
        self.before = [x.clone() for x in inputs]
        yield
        self.log.append("over")

    def replay(self):
        self.log.append("replay")
        self.output.copy_(self.function())

    def finish(self):
        self.log.append("finish")


@pytest.fixture
def log(monkeypatch):
    """What graphs were asked to do."""
    monkeypatch.setattr(Recorded, "log", [])
    monkeypatch.setattr(Recorded, "fails", None)
    monkeypatch.setattr(Recorded, "times", -1)
    monkeypatch.setattr(_sampling.cuda_graph, "Graph", Recorded)
    monkeypatch.setattr(_sampling.cuda_graph, "usable", lambda device: True)
    return Recorded.log


def recording(*arguments, **options):
    """A sampler with cuda_graph=True, which the CPU is refused."""
    sampler = fastgen.Sampler(*arguments, **options)
    sampler._graphs.mode = True
    return sampler


REPLAY = ["turn", "replay", "over"]


class Tame(nn.Module):
    """`tame` as a module: "auto" records no other callable, since it cannot see what one reads."""

    def forward(self, x, t):
        return tame(x, t)


class Shifted(nn.Module):
    def forward(self, x, t, shift):
        return tame(x, t, shift)


def test_auto_does_not_record_what_it_cannot_see_into(schedule, log):
    sampler = fastgen.Sampler(tame, SHAPE, schedule, steps=4)
    for _ in range(3):
        sampler(seed=1)
    assert log == []


def test_an_attribute_of_the_network_is_part_of_the_form(schedule, log):
    network = Tame()
    network.observation, network.scale = torch.zeros(3), 1.0
    sampler = fastgen.Sampler(network, SHAPE, schedule, steps=4, cuda_graph="auto")
    for change in (lambda: None, lambda: setattr(network, "observation", torch.ones(3)), lambda: setattr(network, "scale", 2.0)):
        change()
        before = log.count("record")
        sampler(seed=1)
        assert log.count("record") == before  # of another form: step by step
        sampler(seed=1)
        assert log.count("record") == before + 1


def test_auto_records_the_second_call(schedule, log):
    sampler = fastgen.Sampler(Tame(), SHAPE, schedule, steps=4)
    expected = [by_hand(tame, SHAPE, schedule.respace(4), seed=seed) for seed in range(4)]
    assert_same(sampler(seed=0), expected[0])
    assert log == []
    results = []
    for seed in (1, 2, 3):
        results.append(sampler(seed=seed))
        assert log == ["record", *REPLAY * seed]
    for x, e in zip(results, expected[1:], strict=True):  # each a tensor of its own
        assert_same(x, e)
    sampler(seed=1, callback=lambda *a: None)
    sampler(seed=1, return_trajectory=True)
    assert log == ["record", *REPLAY * 3]


def test_never_and_at_once(schedule, log):
    never = fastgen.Sampler(tame, SHAPE, schedule, steps=4, cuda_graph=False)
    for _ in range(3):
        never(seed=1)
    assert log == []
    assert_same(recording(tame, SHAPE, schedule, steps=4)(seed=1), never(seed=1))
    assert log == ["record", *REPLAY]


def test_static_inputs_are_written_before_a_replay(schedule, log):
    """Seeds and the tensors among the arguments; those of the caller, of the recorded call too, are let alone."""
    sampler = recording(tame, SHAPE, schedule, steps=3)
    eager = fastgen.Sampler(tame, SHAPE, schedule, steps=3, cuda_graph=False)
    given = []
    for k in range(3):
        for seed in ({"sample_seeds": torch.tensor(SEEDS) + k}, {"seed": torch.tensor([3 + k])}):
            shift = torch.full((3, 1, 1, 1), 0.1 * k)
            given += [(x, x.clone()) for x in (shift, *seed.values())]
            assert_same(sampler(**seed, model_kwargs={"shift": shift}), eager(**seed, model_kwargs={"shift": shift}))
    assert log.count("record") == 2
    for x, before in given:
        assert_same(x, before)


def test_another_form_of_call_is_recorded_anew(schedule, log):
    model = Network()
    sampler = recording(lambda x, t, **kwargs: model(x, t, kwargs["shift"]), SHAPE, schedule, steps=2)
    count = 0
    for kwargs, how in [
        ({"shift": 0.0}, {"seed": 1}),
        ({"shift": 1.0}, {"seed": 1}),
        ({"shift": torch.zeros(3, 1, 1, 1)}, {"seed": 1}),
        ({"shift": torch.zeros(3, 2, 1, 1)}, {"seed": 1}),
        ({"shift": torch.zeros(3, 2, 1, 1), "other": None}, {"seed": 1}),
        ({"shift": torch.zeros(3, 2, 1, 1), "other": None}, {"sample_seeds": SEEDS}),
    ]:
        count += 1
        for _ in range(2):
            assert_same(sampler(model_kwargs=kwargs, **how), sampler(model_kwargs=kwargs, **how))
            assert log.count("record") == count
    with fastgen.use_backend("eager" if fastgen.backend() != "eager" else None):
        sampler(model_kwargs=kwargs, **how)
    assert log.count("record") == count + 1


def test_auto_records_no_call_that_comes_once(schedule, log):
    sampler = fastgen.Sampler(Shifted(), SHAPE, schedule, steps=2)
    for k in range(4):
        sampler(seed=1, model_kwargs={"shift": float(k)})
    assert log == []


def shifts(count):
    return [{"model_kwargs": {"shift": 0.1 * k}} for k in range(count)]


def test_forms_in_turn_have_a_graph_each(schedule, log):
    """Of each form the first call runs step by step and the second is recorded, whatever comes between."""
    sampler = fastgen.Sampler(Shifted(), SHAPE, schedule, steps=4)
    expected = [sampler(seed=1, **form, callback=lambda *a: None) for form in shifts(4)]
    for call in range(4):
        for form, x in zip(shifts(4), expected, strict=True):
            assert_same(sampler(seed=1, **form), x)
        assert log.count("record") == (4 if call else 0) and log.count("replay") == 4 * call
    assert "finish" not in log


def test_the_form_that_was_not_called_for_longest_gives_way(schedule, log):
    """Its memory before that of the next is asked for, and its replays over; called again it is recorded again."""
    sampler = recording(tame, SHAPE, schedule, steps=2)
    a, b, c, d, e = shifts(5)
    for form in (a, b, c, d, a):
        sampler(seed=1, **form)
    log.clear()
    sampler(seed=1, **e)
    assert log == ["finish", "record", *REPLAY]
    log.clear()
    for form in (a, c, d, e):
        sampler(seed=1, **form)
    assert log == REPLAY * 4
    expected = fastgen.sample(tame, SHAPE, schedule, steps=2, seed=1, **b)
    assert_same(sampler(seed=1, **b), expected)
    assert log == [*REPLAY * 4, "finish", "record", *REPLAY]


def test_more_forms_in_turn_than_graphs(schedule, log):
    """With "auto" none is recorded to be dropped before its replay: those that have a graph keep it, the rest run step by step."""
    sampler = fastgen.Sampler(Shifted(), SHAPE, schedule, steps=2)
    for _ in range(3):
        for form in shifts(5):
            sampler(seed=1, **form)
    assert log == []
    for form in shifts(4):
        for _ in range(2):
            sampler(seed=1, **form)
    log.clear()
    for _ in range(3):
        for form in shifts(5):
            sampler(seed=1, **form)
    assert log == REPLAY * 12
    sampler(seed=1, **shifts(5)[4])  # twice running, but
    assert log == [*REPLAY * 12, "finish", "record", *REPLAY]


def test_graphs_make_room_for_another(schedule, log):
    """And from then on there are no more of them than fitted."""
    sampler = recording(tame, SHAPE, schedule, steps=2)
    a, b, c = shifts(3)
    for form in (a, b):
        sampler(seed=1, **form)
    log.clear()
    Recorded.fails, Recorded.times = torch.OutOfMemoryError("CUDA out of memory"), 1
    assert_same(sampler(seed=1, **c), fastgen.sample(tame, SHAPE, schedule, steps=2, seed=1, **c))
    assert log == ["record", "finish", "finish", "record", *REPLAY]
    log.clear()
    for form in (c, b, a, b):
        sampler(seed=1, **form)
    assert log == [*REPLAY, "record", *REPLAY, "finish", "record", *REPLAY, *REPLAY]
    log.clear()
    Recorded.times = 2
    for records in (2, 1):  # then there is nothing to drop
        with pytest.raises(RuntimeError, match="^cuda_graph: the chain could not be recorded: CUDA out of memory"):
            sampler(seed=1, **c)
        assert log.count("record") == records
        log.clear()
        Recorded.times = 1


def test_two_forms_in_turn_with_room_for_one(schedule, log):
    sampler = fastgen.Sampler(Shifted(), SHAPE, schedule, steps=2)
    a, b = shifts(2)
    for form in (a, a, b):
        sampler(seed=1, **form)
    Recorded.fails, Recorded.times = torch.OutOfMemoryError("CUDA out of memory"), 1
    sampler(seed=1, **b)
    log.clear()
    for form in (a, b, a, b):
        sampler(seed=1, **form)
    assert log == REPLAY * 2


def test_autocast_on_and_off(schedule, log):
    """Two forms: of the CPU's ops autocast of CUDA says nothing, so only the records show it."""
    sampler = recording(tame, SHAPE, schedule, steps=2)
    for on in (False, True) * 3:
        torch.set_autocast_enabled("cuda", on)
        try:
            sampler(seed=1)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert log == ["record", *REPLAY] * 2 + REPLAY * 4


def test_a_graph_is_not_replayed_with_other_weights(schedule, log):
    model = Network()
    sampler = recording(model, SHAPE, schedule, steps=2)
    sampler(seed=1)
    model.scale.data.mul_(2)  # where they were: a replay reads them
    sampler(seed=1)
    assert log.count("record") == 1
    model.scale.data = model.scale.data * 2
    sampler(seed=1)
    assert log.count("record") == 2
    model.eval()
    sampler(seed=1)
    assert log.count("record") == 3


CHANGES = {
    "a module": lambda m: setattr(m, "act", nn.SiLU()),
    "one of the same class": lambda m: setattr(m, "act", nn.ReLU()),
    "a module that is there twice": lambda m: setattr(m, "third", m.act),
    "a class": lambda m: setattr(m.act, "__class__", nn.SiLU),
    "a hook": lambda m: m.act.register_forward_hook(lambda module, inputs, output: output + 1),
    "forward": lambda m: setattr(m, "forward", lambda x, t: x),
    "a list": lambda m: m.adapters.append("b"),
    "a dict": lambda m: m.scaling.update(a=2.0),
    "what a list holds": lambda m: m.adapters.__setitem__(0, True),
    "a nested list": lambda m: m.nested[0].append(3),
    "a dtype": lambda m: setattr(m, "compute", torch.float64),
    "an object": lambda m: setattr(m, "settings", SimpleNamespace()),
    "a long list": lambda m: setattr(m, "long", [0] * 2000),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_graph_is_not_replayed_after_a_change_of_the_network(schedule, log, change):
    model = Tame()
    model.act, model.second, model.adapters, model.scaling, model.nested = nn.ReLU(), nn.ReLU(), [1], {"a": 1.0}, [[1, 2]]
    model.third, model.compute, model.settings, model.long = model.second, torch.float32, SimpleNamespace(), [0] * 2000
    model.itself = [model.nested]
    model.itself.append(model.itself)
    sampler = recording(model, SHAPE, schedule, steps=2)
    for _ in range(2):
        sampler(seed=1)
    assert log.count("record") == 1
    change(model)
    for _ in range(2):
        sampler(seed=1)
    assert log.count("record") == 2


def test_a_graph_is_not_replayed_with_other_hooks_of_all_modules(schedule, log):
    sampler = recording(Tame(), SHAPE, schedule, steps=2)
    register = nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook
    for count, each in enumerate(register, 2):
        sampler(seed=1)
        handle = each(lambda *_: None)
        try:
            sampler(seed=1)
            assert log.count("record") == count
        finally:
            handle.remove()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_auto_records_no_torchscript(schedule, log):
    """Whose attributes are in C++, unseen. Where a graph is asked for, its weights count all the same, and its mode."""

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.jit.trace(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout()).eval(), torch.zeros(SHAPE))

        def forward(self, x, t):
            return self.inner(x)

    model = Scripted()
    auto, asked = fastgen.Sampler(model, SHAPE, schedule, steps=2), recording(model, SHAPE, schedule, steps=2)
    for _ in range(3):
        auto(seed=1)
    assert log == []
    asked(seed=1)
    asked(seed=1)
    assert log.count("record") == 1
    first = model.inner.double()  # other memory, and back
    first.float()
    asked(seed=1)
    assert log.count("record") == 2
    model.inner.train()
    asked(seed=1)
    assert log.count("record") == 3


def test_a_network_that_changes_while_it_is_looked_at(schedule, log):
    """As by another thread, whose forward fills a cache or sets an attribute for the first time."""

    class Busy(list):
        def __len__(self):
            key = f"made_{len(vars(model))}"
            model.cache[key] = 0
            setattr(model, key, 0)
            return 1

    model = Tame()
    model.busy, model.cache = Busy(), {"busy": Busy()}
    sampler = recording(model, SHAPE, schedule, steps=1)
    expected = fastgen.sample(tame, SHAPE, schedule, steps=1, seed=1)
    assert_same(sampler(seed=1), expected)
    assert len(model.cache) > 1


def test_opaque_arguments_are_not_recorded(schedule, log):
    class Opaque(nn.Module):
        def forward(self, x, t, condition):
            return x + condition.shift

    model, condition = Opaque(), SimpleNamespace(shift=torch.ones(()))
    sampler = fastgen.Sampler(model, SHAPE, schedule, steps=2)
    for _ in range(3):
        sampler(seed=1, model_kwargs={"condition": condition})
    assert log == []
    with pytest.raises(ValueError, match="^model_kwargs: expected tensors, numbers and strings with cuda_graph=True, got Simple"):
        recording(model, SHAPE, schedule, steps=2)(seed=1, model_kwargs={"condition": condition})


class Weight(torch.Tensor):
    """A tensor of another library's class, whose memory cannot be told from here."""


MEMORY = torch.zeros(4)
IN_ONE_PLACE = {
    "strides": lambda k: MEMORY.as_strided((2, 2), ((2, 1), (1, 2))[k]),
    "dtypes": lambda k: MEMORY.view((torch.float32, torch.int32)[k]),
    "shapes": lambda k: MEMORY[: k + 1],
    "subclass": lambda k: torch.ones(2).as_subclass(Weight),
    "sparse": lambda k: torch.ones(2).to_sparse(),
}


def test_an_id_that_is_used_again_is_no_identity(schedule, log):
    model = Tame()
    sampler = recording(model, SHAPE, schedule, steps=2)
    model.weight = MEMORY.as_subclass(Weight)
    sampler(seed=1)
    before, kept = id(model.weight), []
    del model.weight
    while id(made := MEMORY.as_subclass(Weight)) != before:
        kept.append(made)
        if len(kept) == 1000:
            pytest.skip("Python did not use the id again")
    model.weight = made
    sampler(seed=1)
    assert log.count("record") == 2


@pytest.mark.parametrize("make", IN_ONE_PLACE.values(), ids=IN_ONE_PLACE)
def test_other_weights_in_the_same_place_are_other_weights(schedule, log, make):
    """Python and the allocator give to the next tensor what the last one has left."""
    model = Tame()
    model.register_parameter("none", None)
    sampler = recording(model, SHAPE, schedule, steps=2)
    for k in range(2):
        model.weight = make(k)
        for _ in range(2):
            sampler(seed=1)
        assert log.count("record") == k + 1
        del model.weight


def test_what_cannot_be_recorded_runs_step_by_step(schedule, log, caplog):
    sampler = fastgen.Sampler(Tame(), SHAPE, schedule, steps=4)
    Recorded.fails = RuntimeError("operation not permitted when stream is capturing")
    expected = by_hand(tame, SHAPE, schedule.respace(4), seed=1)
    with caplog.at_level(logging.WARNING, logger="fastgen"):
        for _ in range(4):
            assert_same(sampler(seed=1), expected)
    assert log == ["record"]
    (warning,) = caplog.records
    assert warning.name == "fastgen" and "step by step from now on: operation not permitted" in warning.getMessage()
    sampler = recording(tame, SHAPE, schedule, steps=4)
    with pytest.raises(RuntimeError, match="^cuda_graph: the chain could not be recorded: operation not permitted"):
        sampler(seed=1)


def test_a_form_that_cannot_be_recorded_ends_the_graphs_of_the_others(schedule, log):
    sampler = fastgen.Sampler(Shifted(), SHAPE, schedule, steps=2)
    a, b = shifts(2)
    for form in (a, a, b):
        sampler(seed=1, **form)
    Recorded.fails = RuntimeError("operation not permitted when stream is capturing")
    log.clear()
    for form in (b, a, a, b, b):
        sampler(seed=1, **form)
    assert log == ["record", "finish"]


def test_a_thread_that_waited_for_a_failed_recording_runs_step_by_step(schedule, log):
    sampler, made = fastgen.Sampler(Tame(), SHAPE, schedule, steps=4), []
    first = sampler(seed=1)
    with sampler._graphs._lock:
        thread = threading.Thread(target=lambda: made.append(sampler(seed=1)))
        thread.start()
        thread.join(0.05)
        sampler._graphs.mode = False
    thread.join()
    assert_same(made[0], first)
    assert log == []


def test_an_interrupted_recording_is_made_at_the_next_call(schedule, log):
    sampler = recording(tame, SHAPE, schedule, steps=4)
    Recorded.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sampler(seed=1)
    Recorded.fails = None
    assert_same(sampler(seed=1), by_hand(tame, SHAPE, schedule.respace(4), seed=1))


def test_tensors_elsewhere_are_not_recorded(schedule, log):
    sampler = fastgen.Sampler(lambda x, t, where: tame(x, t), SHAPE, schedule, steps=2)
    for _ in range(3):
        sampler(seed=1, model_kwargs={"where": torch.empty(1, device="meta")})
    assert log == []
    sampler._graphs.mode = True
    with pytest.raises(ValueError, match="^model_kwargs: expected tensors on cpu"):
        sampler(seed=1, model_kwargs={"where": torch.empty(1, device="meta")})


def test_replays_of_threads_take_turns(schedule, log):
    sampler = recording(tame, SHAPE, schedule, steps=4)
    expected = [by_hand(tame, SHAPE, schedule.respace(4), seed=seed) for seed in range(4)]
    made = [None] * 4

    def work(seed):
        made[seed] = [sampler(seed=seed) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log == ["record", *REPLAY * 20]
    for results, first in zip(made, expected, strict=True):
        for other in results:
            assert_same(other, first)


def test_inference_mode(schedule, log):
    """What is recorded inside is written to outside."""
    sampler = recording(tame, SHAPE, schedule, steps=2)
    with torch.inference_mode():
        inside = sampler(seed=1, model_kwargs={"shift": torch.zeros(())})
    assert_same(sampler(seed=1, model_kwargs={"shift": torch.zeros(())}), inside.clone())


# ---- copies -----------------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """As a policy that averaging of weights copies: the network is a part of it, and the sampler's model is that network."""

    step = {"eta": 0.5, "clip": 1.5, "prediction": "v_prediction"}

    def __init__(self, schedule, **options):
        super().__init__()
        self.network = Network()
        self.sampler = fastgen.Sampler(self.network, SHAPE, schedule, steps=4, method="ddim", **self.step, **options)

    def forward(self, **how):
        return self.sampler(**how)

    @torch.no_grad()
    def by_hand(self, schedule, **how):
        return by_hand(self.network, SHAPE, schedule.respace(4), step=fastgen.ddim_step, **self.step, **how)


def saved(policy):
    file = io.BytesIO()
    torch.save(policy, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda policy: pickle.loads(pickle.dumps(policy)),
    "torch.save": saved,
    "AveragedModel": lambda policy: torch.optim.swa_utils.AveragedModel(policy).module,
    "ema_pytorch": lambda policy: pytest.importorskip("ema_pytorch").EMA(policy, include_online_model=False).ema_model,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("called", [False, True])
def test_the_copy_of_a_policy_samples_from_the_copys_network(schedule, log, make, called):
    """With the options of the first, no graph of its, and no lock in common."""
    policy = Policy(schedule)
    for _ in range(3 * called):
        assert_same(policy(seed=3), policy.by_hand(schedule, seed=3))
    log.clear()
    other = make(policy)
    assert other.sampler._model is other.network and other.network is not policy.network
    with policy.sampler._graphs._lock:  # else it would wait for ever
        made = other(seed=3)
    assert log == []
    assert_same(made, policy(seed=3))
    with torch.no_grad():
        policy.network.scale.zero_()
    assert_same(other(seed=3), made)
    assert not torch.equal(policy(seed=3), made)
    assert log.count("record") == 1 + (not called)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, COPIES["pickle"]])
def test_a_copy_has_the_options(schedule, make):
    guided = {"guidance_scale": 2.0, "dtype": torch.float64, "variance": "learned_range", "steps": [3, 10, 39], "threshold": 0.8}
    for model, options, how in [
        (Network(), {}, {"sample_seeds": SEEDS}),
        (Wide(), guided, {"seed": 1, "unconditional_kwargs": {}}),
        (wide, guided, {"seed": 1, "unconditional_kwargs": {}}),
    ]:
        sampler = fastgen.Sampler(model, SHAPE, schedule, cuda_graph=False, **options)
        other = make(sampler)
        assert (other.device, other.dtype) == (sampler.device, sampler.dtype)
        assert_same(other(**how), sampler(**how))
        assert other._graphs._lock is not sampler._graphs._lock and other._graphs.mode is False


class Wide(nn.Module):
    def forward(self, x, t):
        return wide(x, t)


def test_a_policy_whose_sampler_samples_from_the_policy_itself(schedule):
    """When the sampler's copy is made, that of the policy is not yet finished."""
    policy = Network()
    policy.sampler = fastgen.Sampler(policy, SHAPE, schedule, steps=3)
    for make in COPIES.values():
        other = make(policy)
        assert other.sampler._model is other
        assert_same(other.sampler(seed=1), policy.sampler(seed=1))
    policy.sampler = fastgen.Sampler(policy.forward, SHAPE, schedule, steps=3)
    assert copy.deepcopy(policy).sampler._model.__self__ is not policy


def test_averages_of_a_policy_are_what_is_sampled(schedule):
    policy = Policy(schedule)
    average = torch.optim.swa_utils.AveragedModel(policy, avg_fn=lambda mean, x, count: (mean + x) / 2)
    for scale in (0.5, 1.5):
        with torch.no_grad():
            policy.network.scale.fill_(scale)
        average.update_parameters(policy)
    with torch.no_grad():
        policy.network.scale.fill_(1.0)  # the mean of the two
    assert_same(average.module(seed=1), policy(seed=1))
    assert_same(average(seed=1), policy(seed=1))


def test_a_sampler_goes_where_its_model_goes(schedule):
    """Of those that were not told where to be. A tensor's dtype stands for its device, of which there is one here."""
    policy, told = Policy(schedule), Policy(schedule, dtype=torch.float32, device="cpu")
    for moved in (policy, copy.deepcopy(policy)):
        moved.to(torch.float64)
        made = moved(seed=1)
        assert (made.dtype, moved.sampler.dtype) == (torch.float64, torch.float64)
        assert_same(made, moved.by_hand(schedule, seed=1, dtype=torch.float64))
    assert moved.to("meta").sampler.device.type == "meta"
    told.network.bfloat16()
    assert (told.sampler.dtype, told(seed=1).dtype) == (torch.float32, torch.float32)
    told.to("meta")
    assert told.sampler.device.type == "cpu"
    graph = recording(Network(), SHAPE, schedule, steps=2)
    graph._model.double()
    with pytest.raises(ValueError, match="^cuda_graph: expected a CUDA device with True, got cpu"):
        graph(seed=1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_first_weight_is_the_first_of_the_models_parameters():
    shared = nn.Linear(2, 2)
    models = [
        nn.Sequential(nn.SiLU(), nn.Sequential(nn.Linear(2, 2, bias=False), shared), shared),
        nn.ModuleDict({"a": nn.Identity(), "b": nn.Sequential(), "c": shared}),
        nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False), torch.zeros(2)]),
        torch.jit.script(nn.Sequential(nn.SiLU(), nn.Linear(2, 2))),
        nn.Sequential(),
    ]
    models[1].register_module("none", None)
    models[0][1].whole = models[0]  # a module inside itself
    for model in models:
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        found = _sampling.network.first_weight(model)
        assert (found is None) == (first is None)
        assert first is None or found.data_ptr() == first.data_ptr()


def test_a_copy_of_a_subclass_keeps_its_attributes(schedule):
    class Named(fastgen.Sampler):
        pass

    sampler = Named(Double(), SHAPE, schedule)
    sampler.name = "walk"
    clone = copy.deepcopy(sampler)
    assert type(clone) is Named and clone.name == "walk"
    assert_same(clone(seed=1), sampler(seed=1))


class Double(torch.nn.Module):
    """With parameters of its own making, as wrappers of quantised or sharded networks have them."""

    def parameters(self, recurse=True):
        yield torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x, t):
        return 0.5 * x


def test_the_dtype_is_that_of_what_the_model_calls_its_parameters(schedule):
    assert fastgen.Sampler(Double(), SHAPE, schedule).dtype == torch.float64


def test_seeds_that_are_drawn_under_transforms_and_tracers(schedule):
    chain = lambda x: x + fastgen.sample(lambda x, t: 0.5 * x, (2, 3), schedule.respace(4))  # noqa: E731
    x = torch.zeros(3, 2, 3)
    different = torch.vmap(chain, randomness="different")(x)
    assert not torch.equal(different[0], different[1]) and torch.equal(*torch.vmap(chain, randomness="same")(x)[:2])
    for mode in ("real", "symbolic"):
        graph = make_fx(chain, tracing_mode=mode)(x[0])
        assert graph(x[0]).isfinite().all() and not torch.equal(graph(x[0]), graph(x[0]))


def test_a_sampler_is_copied_while_other_threads_use_it(schedule, log):
    policy, over, errors = Policy(schedule), threading.Event(), []
    expected = policy(seed=1)

    def work():
        try:
            while not over.is_set():
                assert_same(policy(seed=1), expected)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for make in (*COPIES.values(), copy.copy) * 3:
            assert_same(make(policy).sampler(seed=1), expected)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not errors


def test_a_sampler_is_copied_inside_its_own_recording(schedule, log):
    """There the lock is held, which a copy does not wait for."""

    class Copying(Tame):
        def forward(self, x, t):
            copies.append(copy.copy(sampler))
            return super().forward(x, t)

    copies = []
    sampler = recording(Copying(), SHAPE, schedule, steps=2)
    thread = threading.Thread(target=sampler, kwargs={"seed": 1}, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and copies and not copies[0]._graphs._lock.locked()


def test_a_model_that_cannot_be_pickled(schedule):
    sampler = fastgen.Sampler(lambda x, t: x, SHAPE, schedule, steps=2)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(sampler)
    assert_same(copy.deepcopy(sampler)(seed=1), sampler(seed=1))


# ---- how torch.cuda is asked for it -----------------------------------------------------------------------------------


class Cuda:
    """In the place of torch.cuda: writes down what is asked of it, and keeps the books of the allocator as a version of torch does.
    With `invalid`, a capture that an error ended fails to end."""

    def __init__(self, version=(2, 13), invalid=False):
        self.log, self.version, self.invalid = [], version, invalid
        self.underway, self.uses, self.pools = set(), Counter(), itertools.count()
        self.stream = contextlib.contextmanager(lambda stream: self._inside(f"stream {stream.name}"))
        self.device = contextlib.contextmanager(lambda device: self._inside("device"))
        self.caller = self.Stream(name="caller")

    def Event(self):
        asked = lambda what: lambda *stream: self.log.append(" on ".join([what, *[s.name for s in stream]]))  # noqa: E731
        return SimpleNamespace(record=asked("record"), synchronize=asked("synchronize"))

    def Stream(self, device="cuda", name="side"):
        waits = lambda kind: lambda other: self.log.append(f"{name} waits for {getattr(other, 'name', kind)}")  # noqa: E731
        return SimpleNamespace(name=name, device="cpu", wait_stream=waits("stream"), wait_event=waits("event"))

    def CUDAGraph(self):
        graph = SimpleNamespace(replay=lambda: self.log.append("replay"), pool=None, ended=False)
        graph.reset = partial(self._reset, graph)
        return graph

    def current_stream(self):
        return self.caller

    def current_device(self):
        return 0

    def graph_pool_handle(self):
        return 0, next(self.pools)

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode, pool=None):
        assert capture_error_mode == "thread_local"
        graph.pool = pool or (next(self.pools), 0)
        self.underway.add(graph.pool)
        self.uses[graph.pool] += 1
        self.log.append("begin")
        try:
            yield
        except BaseException:
            self.log.append("broken")
            if self.invalid:
                if self.version >= (2, 13):
                    self.underway.remove(graph.pool)
                raise RuntimeError("capture invalidated") from None
            self._ended(graph)
            raise
        self._ended(graph)
        self.log.append("end")

    def _ended(self, graph):
        self.underway.remove(graph.pool)
        graph.ended = True

    def _reset(self, graph):
        if graph.pool is not None and (graph.ended or self.version >= (2, 14)):
            self._release(0, graph.pool)
            graph.pool = None

    def _end(self, device, pool):
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def _release(self, device, pool):
        assert self.uses[pool] > 0, "torch would say so at every later empty_cache()"
        self.uses[pool] -= 1

    def _inside(self, name):
        self.log.append(f"> {name}")
        try:
            yield
        finally:
            self.log.append(f"< {name}")


def put_in_the_place_of_torch(fake, monkeypatch, functions=("_cuda_endAllocateToPool", "_cuda_releasePool")):
    allocator = SimpleNamespace(**dict(zip(functions, (fake._end, fake._release), strict=False)))
    around = SimpleNamespace(cuda=fake, _C=allocator, is_autocast_enabled=lambda device: False, empty=torch.empty)
    monkeypatch.setattr(_sampling.cuda_graph, "torch", around)
    monkeypatch.setattr(_sampling.cuda_graph, "_broken", [])
    return fake


VERSIONS = [((2, 10), False), *(((2, minor), True) for minor in (10, 13, 14))]


@pytest.fixture(params=VERSIONS, ids=["ends", "2.10", "2.13", "2.14"])
def cuda(request, monkeypatch):
    return put_in_the_place_of_torch(Cuda(*request.param), monkeypatch)


def test_order_of_a_recording_and_a_replay(cuda):
    log = cuda.log
    graph = _sampling.cuda_graph.Graph(lambda: log.append("chain") or "x", lambda: log.append("warm up"), "cuda")
    assert graph.output == "x"
    recorded = ["begin", "chain", "end"]
    assert log == [
        *["> device", "side waits for caller", "> stream side", "warm up", *recorded, "< stream side", "caller waits for side"],
        "< device",
    ]
    log.clear()
    lent = SimpleNamespace(record_stream=lambda stream: log.append(f"lent to {stream.name}"))
    with graph.turn([lent]):
        log.append("write")
        graph.replay()
    assert log == ["> device", "caller waits for event", "lent to caller", "write", "replay", "record on caller", "< device"]
    log.clear()
    with pytest.raises(KeyboardInterrupt), graph.turn([]):
        raise KeyboardInterrupt
    assert log == ["> device", "caller waits for event", "record on caller", "< device"]
    log.clear()
    graph.finish()
    assert log == ["synchronize"]


def broken():
    try:
        raise KeyError("something else before")
    except KeyError:
        raise ValueError("synchronised") from None


def test_a_failed_recording_is_cleared_away(cuda):
    """The chain's own error comes out, the stream is the caller's again, and a capture that ends well has followed."""
    with pytest.raises(ValueError, match="synchronised"):
        _sampling.cuda_graph.Graph(broken, lambda: None, "cuda")
    assert cuda.log[3:] == ["begin", "broken", "begin", "end", "< stream side", "caller waits for side", "< device"]
    _sampling.cuda_graph.Graph(lambda: None, lambda: None, "cuda")  # the lock is free


def test_a_failed_recording_gives_its_memory_back(cuda):
    """Once, by torch or by us; where torch ends the allocation and does not release, nothing tells whether it has."""
    with pytest.raises(ValueError, match="synchronised"):
        _sampling.cuda_graph.Graph(broken, lambda: None, "cuda")
    assert not cuda.underway
    assert cuda.uses[0, 0] == (cuda.version == (2, 13))
    # that allocation was ended by us: the graph stays, which torch's allocator of pinned memory goes on asking
    assert len(_sampling.cuda_graph._broken) == (cuda.version == (2, 10) and cuda.invalid)


def test_a_failed_recording_of_a_torch_without_the_allocators_functions(monkeypatch):
    cuda = put_in_the_place_of_torch(Cuda((2, 10), invalid=True), monkeypatch, ())
    with pytest.raises(ValueError, match="synchronised"):
        _sampling.cuda_graph.Graph(broken, lambda: None, "cuda")
    assert cuda.underway == {(0, 0)} and cuda.uses[0, 0] == 1


def test_an_error_keeps_no_recording_alive(cuda):
    """What a chain has allocated is free for the next attempt once its error has been dealt with."""

    class Memory:
        pass

    def chain():
        x = Memory()
        seen.append(weakref.ref(x))
        broken()

    seen = []
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            _sampling.cuda_graph.Graph(chain, lambda: None, "cuda")
        assert seen[0]() is None
    finally:
        gc.enable()


def test_a_failed_warm_up_is_waited_for(cuda):
    """Its launches may still read what the caller's stream is about to use again."""
    with pytest.raises(ValueError, match="synchronised"):
        _sampling.cuda_graph.Graph(lambda: None, broken, "cuda")
    assert cuda.log[2:] == ["> stream side", "< stream side", "caller waits for side", "< device"]


def test_a_network_may_record_in_its_warm_up(cuda):
    graphs = []
    record = lambda *a: graphs.append(_sampling.cuda_graph.Graph(lambda: None, *a, "cuda"))  # noqa: E731
    thread = threading.Thread(target=record, args=(lambda: record(lambda: None),), daemon=True)
    thread.start()
    thread.join(30)
    assert len(graphs) == 2


def test_a_sampler_inside_a_warm_up_runs_step_by_step(cuda):
    """To wait for its lock, which a thread may hold that waits for this recording, would be to wait for ever."""
    cuda.is_current_stream_capturing = lambda: False
    seen, usable = [], lambda: seen.append(_sampling.cuda_graph.usable(torch.device("cuda")))
    usable()
    _sampling.cuda_graph.Graph(usable, usable, "cuda")
    usable()
    with pytest.raises(ZeroDivisionError):
        _sampling.cuda_graph.Graph(usable, lambda: 1 / 0, "cuda")
    usable()
    assert seen == [True, False, False, True, True]


@pytest.mark.parametrize("waits", [True, False])
def test_a_replay_in_the_middle_of_another_threads_recording(cuda, monkeypatch, waits):
    """Where torch would refuse it, it comes after."""
    monkeypatch.setattr(_sampling.cuda_graph, "_replays_wait", waits)
    graph = _sampling.cuda_graph.Graph(lambda: None, lambda: None, "cuda")
    cuda.log.clear()
    thread = threading.Thread(target=graph.replay, daemon=True)

    def chain():
        thread.start()
        thread.join(0.1 if waits else 30)

    _sampling.cuda_graph.Graph(chain, lambda: None, "cuda")
    thread.join(30)
    seen = [what for what in cuda.log if what in ("begin", "replay", "end")]
    assert seen == (["begin", "end", "replay"] if waits else ["begin", "replay", "end"])


# ---- the list of options ----------------------------------------------------------------------------------------------


def parameters(function):
    """{name: (kind, default, type)} of all but self."""
    hints = get_type_hints(function)
    found = {name: (p.kind, p.default, hints.get(name)) for name, p in inspect.signature(function).parameters.items()}
    return {name: each for name, each in found.items() if name != "self"}


def test_the_signatures_are_the_list_of_options():
    """With its order, defaults and types; what else `sample` takes is what a sampler's call takes."""
    Options = _sampling.arguments.Options
    hints, keyword = get_type_hints(Options), inspect.Parameter.KEYWORD_ONLY
    options = {name: (keyword, default, hints[name]) for name, default in Options._field_defaults.items()}
    sampler, call, whole = map(parameters, (fastgen.Sampler.__init__, fastgen.Sampler.__call__, fastgen.sample))
    first = {name: sampler[name] for name in ("model", "shape", "schedule")}
    assert list(sampler.items()) == [*first.items(), *options.items()]
    assert whole == first | options | call
    assert [name for name in whole if name not in call] == list(sampler)
    returned = [get_type_hints(function)["return"] for function in (fastgen.sample, fastgen.Sampler.__call__)]
    assert returned[0] == returned[1]


def test_the_words_of_options_are_the_ones_that_are_accepted(schedule):
    assert get_args(_sampling.arguments.Prediction) == PREDICTIONS
    assert get_args(_sampling.arguments.Variance) == VARIANCES
    for spacing in get_args(_sampling.arguments.Spacing):
        schedule.respace(4, spacing)


def test_sample_passes_every_argument_on(schedule, monkeypatch):
    """Each to the call that takes it, as it is."""
    seen = {}

    class Noting:
        def __init__(self, **given):
            seen.update(given)

        def __call__(self, **given):
            assert given.keys().isdisjoint(seen)
            seen.update(given)
            return "x_0"

    given = {name: object() for name in parameters(fastgen.sample)}
    monkeypatch.setitem(fastgen.sample.__globals__, "Sampler", Noting)
    assert fastgen.sample(given.pop("model"), **given) == "x_0"
    assert {name: x for name, x in seen.items() if name != "model"} == given


# ---- errors -----------------------------------------------------------------------------------------------------------

ERRORS = [
    ({"model": None}, TypeError, "model: expected a callable, got NoneType"),
    ({"schedule": 10}, TypeError, "schedule: expected a fastgen.Schedule"),
    ({"shape": ()}, ValueError, "shape"),
    ({"shape": 3}, TypeError, "shape"),
    ({"shape": (3.0,)}, TypeError, "shape"),
    ({"shape": (3,), "variance": "learned"}, ValueError, "shape: expected .B, C"),
    ({"method": "euler"}, ValueError, "method: expected one of 'ddpm', 'ddim'"),
    ({"steps": 0}, ValueError, "steps"),
    ({"steps": 41}, ValueError, "steps"),
    ({"steps": 1.5}, TypeError, "steps"),
    ({"spacing": "trailing"}, ValueError, "spacing: expected None without steps, got 'trailing'"),
    ({"spacing": "even", "steps": 4}, ValueError, "spacing: expected 'leading', 'trailing' or 'linspace', got 'even'"),
    ({"spacing": 1, "steps": 4}, ValueError, "spacing: expected 'leading', .*, got 1"),
    ({"spacing": "leading", "steps": [1, 2]}, ValueError, "spacing: expected None where steps is a list, got 'leading'"),
    ({"eta": 0.5}, ValueError, "eta: expected None with method='ddpm'"),
    ({"method": "ddim", "eta": 1.5}, ValueError, "eta"),
    ({"method": "ddim", "eta": "0"}, TypeError, "eta"),
    ({"method": "ddim", "variance": "beta"}, ValueError, "variance: expected None with method='ddim'"),
    ({"variance": "fixed"}, ValueError, "variance"),
    ({"prediction": "noise"}, ValueError, "prediction"),
    ({"clip": 0.0}, ValueError, "clip"),
    ({"clip": True}, TypeError, "clip"),
    ({"threshold": 0.0}, ValueError, "threshold: expected a finite number > 0, got 0.0"),
    ({"threshold": -0.5}, ValueError, "threshold"),
    ({"threshold": 1.5}, ValueError, r"threshold: expected a number within \(0, 1\], got 1.5"),
    ({"threshold": float("nan")}, ValueError, "threshold"),
    ({"threshold": True}, TypeError, "threshold: expected a number, got bool"),
    ({"threshold": "0.9"}, TypeError, "threshold"),
    ({"threshold": torch.ones(3)}, TypeError, "threshold"),
    ({"threshold": 0.9, "clip": -1.0}, ValueError, "clip"),
    ({"guidance_scale": "2"}, TypeError, "guidance_scale"),
    ({"guidance_scale": float("nan")}, ValueError, "guidance_scale"),
    ({"guidance_scale": 2.0}, ValueError, "unconditional_kwargs: expected a dict like model_kwargs"),
    ({"guidance_scale": 2.0, "unconditional_kwargs": 1}, TypeError, "unconditional_kwargs: expected a dict"),
    ({"unconditional_kwargs": {}}, ValueError, "unconditional_kwargs: expected None without a guidance_scale"),
    ({"model_kwargs": [1]}, TypeError, "model_kwargs: expected a dict, got list"),
    ({"model_kwargs": {1: 2}}, TypeError, "model_kwargs: expected strings as keys"),
    ({"seed": 1, "sample_seeds": [1, 2, 3]}, ValueError, "seed, sample_seeds: expected at most one"),
    ({"seed": 1.0}, TypeError, "seed"),
    ({"seed": 2**64}, ValueError, "seed"),
    ({"seed": torch.tensor([1, 2, 3])}, ValueError, "seed: expected 1 element, got .3,.; seeds of the samples are sample_seeds="),
    ({"seed": torch.tensor([1.0])}, TypeError, "seed"),
    ({"sample_seeds": [1, 2]}, ValueError, "sample_seeds: expected 3 ints"),
    ({"sample_seeds": 1}, TypeError, "sample_seeds"),
    ({"sample_seeds": "abc"}, TypeError, "sample_seeds"),
    ({"sample_seeds": {1, 2, 3}}, TypeError, "sample_seeds: expected a sequence of ints or an int64 tensor, got set"),
    ({"sample_seeds": {1: 1, 2: 2, 3: 3}}, TypeError, "sample_seeds: expected a sequence of ints or an int64 tensor, got dict"),
    ({"sample_seeds": [1, 2, 3.0]}, TypeError, "sample_seeds"),
    ({"sample_seeds": [1, 2, 2**64]}, ValueError, "sample_seeds"),
    ({"sample_seeds": torch.tensor([1, 2])}, ValueError, "sample_seeds"),
    ({"sample_seeds": torch.tensor([1, 2, 3], dtype=torch.int32)}, TypeError, "sample_seeds"),
    ({"sample_seeds": torch.empty(3, dtype=torch.int64, device="meta")}, ValueError, "sample_seeds"),
    ({"device": "nowhere"}, ValueError, "device"),
    ({"device": 1.5}, TypeError, "device"),
    ({"dtype": torch.int64}, TypeError, "dtype"),
    ({"progress": 1}, TypeError, "progress"),
    ({"callback": 1}, TypeError, "callback"),
    ({"return_trajectory": None}, TypeError, "return_trajectory"),
    ({"cuda_graph": "always"}, ValueError, "cuda_graph"),
    ({"cuda_graph": 1}, ValueError, "cuda_graph"),
    ({"cuda_graph": np.array([1, 2])}, ValueError, "cuda_graph"),
    ({"method": np.array(["ddpm", "ddim"])}, ValueError, "method"),
    ({"cuda_graph": True}, ValueError, "cuda_graph: expected a CUDA device with True, got cpu"),
]


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS)
def test_errors_come_before_anything_runs(schedule, changed, error, message):
    def model(*arguments, **kwargs):
        raise AssertionError("the network was called")

    state = torch.get_rng_state()
    with pytest.raises(error, match=f"^{message}"):
        fastgen.sample(**{"model": model, "shape": SHAPE, "schedule": schedule, **changed})
    assert torch.equal(torch.get_rng_state(), state)


def test_zero_terminal_snr(schedule):
    """The last step has no coefficients for epsilon; for v it has."""
    zero = schedule.rescale_zero_terminal_snr()
    with pytest.raises(ValueError, match="^schedule: expected coefficients for each of its 40 steps; the last step t = 39"):
        fastgen.sample(tame, SHAPE, zero)
    assert fastgen.sample(tame, SHAPE, zero, prediction="v_prediction", clip=1.0, seed=1).isfinite().all()


def test_guidance_scale_has_to_be_finite(schedule):
    called = []
    for bad in (float("-inf"), float("inf"), float("nan")):
        with pytest.raises(ValueError, match="guidance_scale: expected a finite number"):
            fastgen.sample(lambda x, t: called.append(t) or x, (3,), schedule, guidance_scale=bad, unconditional_kwargs={})
    assert not called


def test_a_network_that_writes_to_its_timesteps_leaves_the_schedule_alone():
    schedule, seen = fastgen.Schedule.linear(4), []

    def network(x, t):
        seen.append(t.tolist())
        t.mul_(2)
        return x

    for _ in range(2):
        fastgen.sample(network, (1, 4), schedule, seed=1)
    assert seen == [[3], [2], [1], [0]] * 2
