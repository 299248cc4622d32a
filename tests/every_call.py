"""One call of every compiled kernel with every kind of argument: what tests of streams, graphs, memory and launches go through.

    compute-sanitizer --tool memcheck python tests/every_call.py [--device cuda]

runs each of them once on several small odd shapes, and makes its data on the CPU, so that hardly any kernel but fastgen's runs.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":  # as a program: the tests find fastgen by themselves
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import fastgen

SCHEDULE = fastgen.Schedule.linear(40, 1e-3, 0.2)


@dataclass
class Inputs:
    """The tensors that a call may take, of shape (B, C, ...)."""

    x: torch.Tensor
    m: torch.Tensor
    noise: torch.Tensor
    u: torch.Tensor  # what the network said without its condition, like m
    wide: torch.Tensor  # a network's output with a learned variance, 2C channels
    target: torch.Tensor
    weight: torch.Tensor
    gradient: torch.Tensor  # of each loss
    scalar: torch.Tensor  # without dimensions: the gradient of a mean, a weight
    out: torch.Tensor
    bytes: torch.Tensor  # data in uint8
    image: torch.Tensor  # uint8, to be written
    threshold: torch.Tensor  # (B,), of the dtype of the arithmetic
    upstream: torch.Tensor  # the same without dimensions
    t: torch.Tensor  # (B,), one of them 0
    later: torch.Tensor  # (B,), none of them 0
    seed: torch.Tensor  # (1,)
    seeds: torch.Tensor  # (B,)

    def tensors(self):
        return [getattr(self, field.name) for field in fields(self)]

    def copy_(self, other):
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def poisoned(self):
        """The same shapes and layouts, with NaN for data, and for integers other ones."""
        poison = lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x + 1  # noqa: E731
        return Inputs(*map(poison, self.tensors()))


@functools.cache
def _pool(device):
    """Normal numbers, made on the CPU once."""
    return torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(100), dtype=torch.float64).to(device)


def inputs(device, shape=(3, 4, 5, 7), dtype=torch.float32, m_dtype=None, arrange=torch.clone, salt=0):
    """The same numbers on every device. `arrange` lays the tensors of shape (B, C, ...) out in memory."""
    pool, begin = _pool(torch.device(device)), itertools.count(1000 * salt, 7919)
    computed = torch.float64 if torch.float64 in (dtype, m_dtype) else torch.float32

    def normal(shape, dtype=dtype, of=lambda x: x):
        first, count = next(begin), math.prod(shape)
        numbers = pool if first + count <= len(pool) else pool.repeat(1 + (first + count) // len(pool))
        numbers = numbers[first : first + count]
        return arrange(of(numbers.reshape(shape).to(dtype)))

    batch, channels, *rest = shape
    return Inputs(
        x=normal(shape),
        m=normal(shape, m_dtype or dtype),
        u=normal(shape, m_dtype or dtype),
        noise=normal(shape),
        wide=normal((batch, 2 * channels, *rest), m_dtype or dtype),
        target=normal(shape, of=torch.sigmoid),  # before its layout, on which the CPU's last bit depends
        weight=normal(shape).abs_(),
        gradient=normal(shape),
        scalar=torch.tensor(0.75, dtype=dtype).to(device),
        out=arrange(torch.zeros(shape, dtype=torch.promote_types(dtype, m_dtype or dtype), device=device)),
        bytes=normal(shape, torch.float32, of=lambda x: x.clamp(-2, 2) * 60 + 128).to(torch.uint8),
        image=arrange(torch.zeros(shape, dtype=torch.uint8, device=device)),
        threshold=torch.linspace(0.5, 1.5, batch, dtype=computed).to(device),
        upstream=torch.tensor(0.75, dtype=computed).to(device),
        t=((torch.arange(batch) * 13 + salt) % 40).to(device),
        later=((torch.arange(batch) * 13 + salt) % 39 + 1).to(device),
        seed=torch.tensor([77 + salt]).to(device),
        seeds=(torch.arange(batch) * 2**33 - 5 - salt).to(device),
    )


def _step(**options):
    """ddpm_step; a value that names a field of Inputs stands for that tensor."""
    return lambda i, **out: fastgen.ddpm_step(**_filled(i, {"x_t": "x", "model_output": "m", "t": "t", **options}), **out)


def _filled(i, options):
    take = lambda name: isinstance(name, str) and hasattr(i, name)  # noqa: E731
    return {"schedule": SCHEDULE} | {k: getattr(i, v) if take(v) else v for k, v in options.items()}


def _ddim(**options):
    return lambda i, **out: fastgen.ddim_step(**_filled(i, {"x_t": "x", "model_output": "m", "t": "t", **options}), **out)


def _plain(noise):
    """The op behind a scheduler's step."""

    def call(i):
        computed = torch.float64 if torch.float64 in (i.x.dtype, i.m.dtype) else torch.float32
        rows = SCHEDULE.ddpm_step_table("epsilon", "posterior", i.x.device, computed).rows
        return torch.ops.fastgen.ddpm_step_plain(i.x, i.m, rows, 7, i.noise if noise else None, 5, 1.0)

    return call


def _forward(op, data, **options):
    return lambda i, **out: op(**_filled(i, {data: "x", "t": "t", **options}), **out)


def _randn(seed, offset=3):
    def call(i):
        seeds = {"int": -9, "one": i.seed, "each": i.seeds}[seed]
        return fastgen.randn(i.x.shape, seed=seeds, offset=offset, dtype=i.x.dtype, device=i.x.device)

    return call


def _torch_cuda(seed):
    """T is 256, so that a thread has several turns where there are more than 1024 elements."""

    def call(i):
        seeds = {"int": -9, "one": i.seed, "each": i.seeds}[seed]
        card = {"stream": "torch-cuda", "multiprocessors": 1, "threads_per_multiprocessor": 256}
        return fastgen.randn(i.x.shape, seed=seeds, offset=8, dtype=i.x.dtype, device=i.x.device, **card)

    return call


def _loss(reduction="mean", weight=None, pos_weight=None):
    def call(i):
        given = {"full": i.weight, "scalar": i.scalar, None: None}
        return fastgen.bce_with_logits(i.x, i.target, given[weight], reduction, given[pos_weight])

    return call


def _gradient(reduction=1, weight=None):
    """The kernel of the way back alone."""

    def call(i):
        upstream, w = i.gradient if reduction == 0 else i.scalar, None if weight is None else i.weight
        return torch.ops.fastgen.bce_with_logits_backward(upstream, i.x, i.target, w, None, reduction)

    return call


def _diffusion_loss(**options):
    return _forward(fastgen.diffusion_loss, "x0", model_output="m", **options)


def _diffusion_gradient(source, prediction, reduction=1, weights=False):
    """The kernel of the way back alone: of an MSE, of what `source` says is the noise."""
    backward = torch.ops.fastgen.diffusion_loss_backward_x0 if prediction else torch.ops.fastgen.diffusion_loss_backward

    def call(i):
        computed = torch.float64 if torch.float64 in (i.x.dtype, i.m.dtype) else torch.float32
        name = ("epsilon", "sample", "v_prediction")[prediction]
        rows = SCHEDULE.diffusion_loss_table(name, None, i.x.device, computed).rows
        noise, seeds = (i.noise, None) if source == "noise" else (None, i.seeds)
        upstream = i.threshold if reduction == 0 else i.upstream
        w = i.threshold if weights else None
        return backward(upstream, i.m, i.x, rows, i.t, 0, noise, seeds, None, 0, w, prediction, 0, 1.0, reduction)

    return call


def _vlb(**options):
    return _forward(fastgen.vlb_terms, "x0", **({"model_output": "m"} | options))


def _hybrid(**options):
    return _forward(fastgen.diffusion_loss, "x0", **({"model_output": "wide", "variance": "learned_range"} | options))


def _vlb_gradient(source, learned=False):
    """The kernel of the way back alone."""

    def call(i):
        m, computed = (i.wide if learned else i.m), torch.float64 if torch.float64 in (i.x.dtype, i.m.dtype) else torch.float32
        rows = SCHEDULE.vlb_terms_table("epsilon", "learned" if learned else "beta", i.x.device, computed).rows
        x_t, noise, seeds = (given if name == source else None for name, given in _sources(i))
        others = x_t, noise, seeds, None, 0, 1.5, learned, 0, 1.0, True, -1, 1.0, None, 1.0, False
        return torch.ops.fastgen.vlb_terms_backward(i.threshold, m, i.x, rows, i.t, 0, *others)

    return call


def _sources(i):
    return ("x_t", i.target), ("noise", i.noise), ("seeds", i.seeds)


def _log_prob(**options):
    given = {"x_prev": "noise", "model_output": "m", "t": "later"} | options
    return _forward(fastgen.step_log_prob, "x_t", **given)


def _log_prob_gradient(to_x, learned=False):
    """The kernel of the way back alone."""
    backward = torch.ops.fastgen.step_log_prob_backward_x if to_x else torch.ops.fastgen.step_log_prob_backward

    def call(i):
        m, computed = (i.wide if learned else i.m), torch.float64 if torch.float64 in (i.x.dtype, i.m.dtype) else torch.float32
        rows = SCHEDULE.ddpm_step_table("epsilon", "learned" if learned else "beta", i.x.device, computed).rows
        return backward(i.threshold, i.noise, i.x, m, rows, i.later, 0, None if to_x else 1.5, learned, 1.0)

    return call


def _log_weight(learned=False):
    """No public function of one step has it."""

    def call(i):
        m, computed = (i.wide if learned else i.m), torch.float64 if torch.float64 in (i.x.dtype, i.m.dtype) else torch.float32
        rows = SCHEDULE.step_log_weight_table("epsilon", "learned" if learned else "beta", i.x.device, computed).rows
        return torch.ops.fastgen.step_log_weight(i.noise, i.x, m, rows, i.t, 0, 1.5 if learned else None, learned, 1.0)

    return call


def _halves(i):
    """The parameters of a Gaussian as an encoder returns them."""
    return i.wide.chunk(2, 1)


def _reparameterize(**options):
    return lambda i: fastgen.reparameterize(
        i.m, i.x, **{k: getattr(i, v, v) if isinstance(v, str) else v for k, v in options.items()}
    )


def _gaussian_gradient(source, of_kl=False, halves=False):
    """The kernel of the way back alone."""

    def call(i):
        mean, log_variance = _halves(i) if halves else (i.m, i.x)
        noise, seeds = (i.noise, None) if source == "noise" else (None, i.seeds)
        operands = log_variance, noise, seeds, None, 3, -30.0, 20.0
        if of_kl:
            return torch.ops.fastgen.reparameterize_kl_backward(i.u, i.threshold, mean, *operands)
        return torch.ops.fastgen.reparameterize_backward(i.u, *operands)

    return call


def _kl_gradient(others):
    def call(i):
        given = (i.noise, i.u) if others else (None, None)
        made = torch.ops.fastgen.gaussian_kl_backward(i.threshold, i.m, i.x, *given, -1.5, math.inf)
        return made if others else made[:2]

    return call


def _gan(smoothing=0.0, monitors=False):
    """The loss and the monitors as the op returns them, which are views elsewhere."""
    return lambda i: torch.ops.fastgen.gan_loss([i.x, i.target, i.m], 2, 0, smoothing, 1, monitors, False)


def _gan_gradient(reduction=1):
    return lambda i: torch.ops.fastgen.gan_loss_backward(i.scalar, [i.x, i.m], 1, 0, 0.1, reduction)


# those that also take out=
INTO = {
    "q_sample noise": _forward(fastgen.q_sample, "x0", noise="noise"),
    "q_sample int": _forward(fastgen.q_sample, "x0", t=7, seed=5),
    "q_sample one seed": _forward(fastgen.q_sample, "x0", seed="seed", offset=2**33),
    "q_sample seeds": _forward(fastgen.q_sample, "x0", seed="seeds"),
    "q_step": _forward(fastgen.q_step, "x_prev", seed="seed"),
    "ddpm noise": _step(noise="noise"),
    "ddpm int": _step(t=7, seed=5),
    "ddpm one seed": _step(seed="seed"),
    "ddpm seeds": _step(seed="seeds"),
    "ddpm v beta": _step(prediction="v_prediction", variance="beta", seed="seed"),
    "ddpm sample clip": _step(prediction="sample", clip=1.0, seed="seed"),
    "ddpm clip noise": _step(clip=1.0, noise="noise"),
    "ddpm threshold": _step(threshold="threshold", seed="seeds"),
    "ddpm threshold noise": _step(threshold="threshold", noise="noise"),
    "ddpm learned": _step(model_output="wide", variance="learned", seed="seed"),
    "ddpm learned noise": _step(model_output="wide", variance="learned", noise="noise"),
    "ddpm learned_range clip": _step(model_output="wide", variance="learned_range", clip=1.5, seed="seed"),
    "ddpm guided": _step(unconditional_output="u", guidance_scale=2.5, seed="seed"),
    "ddpm guided noise": _step(unconditional_output="u", guidance_scale=2.5, clip=1.0, noise="noise"),
    "ddpm guided learned": _step(
        model_output="wide",
        variance="learned",
        unconditional_output="wide",
        guidance_scale=2.5,
        threshold="threshold",
        seed="seeds",
    ),
    "ddim guided": _ddim(unconditional_output="u", guidance_scale=2.5),
    "ddim": _ddim(),
    "ddim eta clip": _ddim(eta=0.7, clip=1.0, seed="seed"),
}
CALLS = INTO | {
    "ddpm x0": _step(seed="seed", return_x0=True),
    "ddpm x0 threshold": _step(threshold="threshold", noise="noise", return_x0=True),
    "ddim x0": _ddim(return_x0=True),
    "ddpm plain": _plain(noise=False),
    "ddpm plain noise": _plain(noise=True),
    "q_sample bytes": _forward(fastgen.q_sample, "x0", x0="bytes", seed="seeds"),
    "q_sample bytes noise": _forward(fastgen.q_sample, "x0", x0="bytes", noise="noise"),
    "loss bytes": _diffusion_loss(x0="bytes", seed="seeds", prediction="v_prediction"),
    "loss bytes sample each": _diffusion_loss(x0="bytes", prediction="sample", reduction="none"),
    "vlb bytes": _vlb(x0="bytes", seed="seed"),
    "to_uint8": lambda i: fastgen.to_uint8(i.x),
    "to_uint8 contiguous": lambda i: fastgen.to_uint8(i.x, channels_last=False),
    "to_uint8 channels-last": lambda i: fastgen.to_uint8(i.x, channels_last=True),
    "to_uint8, out=": lambda i: fastgen.to_uint8(i.x, out=i.image),
    "q_posterior": _forward(fastgen.q_posterior, "x0", x_t="m"),
    "randn int": _randn("int"),
    "randn one seed": _randn("one"),
    "randn seeds": _randn("each"),
    "randn torch-cuda": _torch_cuda("int"),
    "randn torch-cuda one seed": _torch_cuda("one"),
    "randn torch-cuda seeds": _torch_cuda("each"),
    "loss mean": _diffusion_loss(seed="seed"),
    "loss int": _diffusion_loss(t=7, seed=5, reduction="sum"),
    "loss noise": _diffusion_loss(noise="noise", loss="l1"),
    "loss each": _diffusion_loss(seed="seeds", prediction="v_prediction", reduction="none"),
    "loss each noise": _diffusion_loss(noise="noise", prediction="v_prediction", loss="huber", reduction="none"),
    "loss sample": _diffusion_loss(prediction="sample", weighting="min_snr"),
    "loss weights": _diffusion_loss(seed="seeds", weighting="threshold"),
    "loss back": _diffusion_gradient("seeds", 0),
    "loss back noise": _diffusion_gradient("noise", 0, weights=True),
    "loss back sample": _diffusion_gradient("seeds", 1),
    "loss back v each": _diffusion_gradient("seeds", 2, 0),
    "vlb": _vlb(seed="seed"),
    "vlb noise beta": _vlb(noise="noise", variance="beta", clip=1.0),
    "vlb x_t": _vlb(x_t="target", t=7, decoder="gaussian"),
    "vlb learned": _vlb(model_output="wide", seed="seeds", variance="learned", prediction="v_prediction"),
    "vlb learned x_t": _vlb(model_output="wide", x_t="target", variance="learned_range", unit="bits_per_dim"),
    "vlb hybrid": _hybrid(seed="seed"),
    "vlb hybrid noise each": _hybrid(noise="noise", loss="huber", reduction="none", weighting="threshold"),
    "vlb back": _vlb_gradient("seeds"),
    "vlb back noise": _vlb_gradient("noise", learned=True),
    "vlb back x_t": _vlb_gradient("x_t", learned=True),
    "log_prob": _log_prob(),
    "log_prob int clip": _log_prob(t=7, clip=1.0, over="mean"),
    "log_prob ddim": _log_prob(method="ddim", eta=0.7),
    "log_prob learned": _log_prob(model_output="wide", variance="learned", prediction="v_prediction"),
    "log_prob learned clip": _log_prob(model_output="wide", variance="learned_range", clip=1.0),
    "log_prob of a step": _step(t="later", seed="seed", return_log_prob=True),
    "log_prob of a step, noise clip": _step(t=7, noise="noise", clip=1.0, return_log_prob=True),
    "log_prob of a step, learned": _step(t="later", model_output="wide", variance="learned", seed="seeds", return_log_prob=True),
    "log_prob of a step, learned clip noise": _step(
        t="later",
        model_output="wide",
        variance="learned_range",
        clip=1.0,
        noise="noise",
        return_log_prob=True,
        log_prob_over="mean",
    ),
    "log_prob of a step, guided": _step(
        t="later", unconditional_output="u", guidance_scale=2.5, seed="seeds", return_log_prob=True
    ),
    "log_prob of a step, ddim": _ddim(t="later", eta=0.7, seed=5, return_log_prob=True),
    "log_weight": _log_weight(),
    "log_weight learned clip": _log_weight(learned=True),
    "log_prob back": _log_prob_gradient(False),
    "log_prob back learned": _log_prob_gradient(False, learned=True),
    "log_prob back x": _log_prob_gradient(True),
    "log_prob back x learned": _log_prob_gradient(True, learned=True),
    "reparameterize": _reparameterize(seed="seeds"),
    "reparameterize int": _reparameterize(seed=5, clamp=(-30.0, 20.0)),
    "reparameterize noise": _reparameterize(noise="noise"),
    "reparameterize halves": lambda i: fastgen.reparameterize(*_halves(i), seed=i.seed),
    "reparameterize kl": _reparameterize(seed="seeds", return_kl=True),
    "reparameterize kl noise": _reparameterize(noise="noise", return_kl=True, clamp=(-1.0, 1.0)),
    "reparameterize kl halves": lambda i: fastgen.reparameterize(*_halves(i), seed=i.seed, return_kl=True),
    "reparameterize back": _gaussian_gradient("seeds"),
    "reparameterize back noise": _gaussian_gradient("noise"),
    "reparameterize kl back": _gaussian_gradient("seeds", of_kl=True),
    "reparameterize kl back noise halves": _gaussian_gradient("noise", of_kl=True, halves=True),
    "gaussian_kl": lambda i: fastgen.gaussian_kl(i.m, i.x),
    "gaussian_kl halves": lambda i: fastgen.gaussian_kl(*_halves(i), clamp=(-30.0, 20.0)),
    "gaussian_kl others": lambda i: fastgen.gaussian_kl(i.m, i.x, i.noise, i.u),
    "gaussian_kl back": _kl_gradient(False),
    "gaussian_kl back others": _kl_gradient(True),
    "bce mean": _loss(),
    "bce sum": _loss("sum"),
    "bce each": _loss("none"),
    "bce weights": _loss("mean", "full", "full"),
    "bce scalar weights": _loss("none", "scalar", "scalar"),
    "bce wide": lambda i: torch.ops.fastgen.bce_with_logits_wide(i.x, i.target, None, None, 1),
    "bce back": _gradient(),
    "bce back each": _gradient(0, "full"),
    "gan discriminator": lambda i: fastgen.discriminator_loss(i.x, i.m),
    "gan scales": _gan(0.1),
    "gan monitors": _gan(monitors=True),
    "gan generator": lambda i: fastgen.generator_loss(i.x),
    "gan minimax sum": lambda i: fastgen.generator_loss(i.x, kind="minimax", reduction="sum"),
    "gan back": _gan_gradient(),
    "gan back sum": _gan_gradient(2),
}
CALLS |= {f"{name}, out=": lambda i, call=call: call(i, out=i.out) for name, call in INTO.items()}
CALLS["ddpm x0, out="] = lambda i: CALLS["ddpm x0"](i, out=i.out)
CALLS["ddim x0, out="] = lambda i: CALLS["ddim x0"](i, out=i.out)
CALLS["log_prob of a step, out="] = lambda i: CALLS["log_prob of a step"](i, out=i.out)
CALLS["log_prob of a step, ddim, out="] = lambda i: CALLS["log_prob of a step, ddim"](i, out=i.out)
CALLS["q_step, out="] = lambda i: INTO["q_step"](i, out=i.out)


def fits(name, i):
    """Whether `name` can be called on `i`: q_sample's out= has the dtype of x."""
    return not (name.startswith("q_s") and name.endswith("out=") and i.out.dtype != i.x.dtype)


def results(result):
    """The tensors of a result."""
    return list(result) if isinstance(result, (tuple, list)) else [result]


# ---- what the calls are -----------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """Of one call, found by making it on the CPU: what tests may expect of it follows from these, never from its name."""

    timed: bool  # each sample has a timestep of its own, which is read on the device
    seeded: bool  # it makes noise from a seed
    sums: bool  # a result is added up over elements, of each sample or of all, for which a kernel may need room
    bare: bool  # it calls the compiled op itself, whatever the backend
    tensors: int  # how many tensors it goes through one after another: the logits of a GAN loss, else 1

    def launches(self, backend):
        """The Triton backend has a launch for each of the logits, and another that adds up what the programs have summed."""
        return 1 if backend == "cpp" or self.bare else self.tensors + self.sums


class _Called(TorchDispatchMode):
    """Notes how many of fastgen's ops are called, and those of their arguments that are given, by name."""

    def __init__(self):
        super().__init__()
        self.ops, self.given = 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "fastgen":
            self.ops += 1
            names = (argument.name for argument in function._schema.arguments)
            given = dict(zip(names, arguments, strict=False)) | (keywords or {})
            self.given |= {name: value for name, value in given.items() if value is not None}
        return function(*arguments, **(keywords or {}))


def facts(call):
    i = inputs("cpu", (2, 3, 5))
    with fastgen.use_backend("cpp"), _Called() as called:
        made = results(call(i))
    with fastgen.use_backend("eager"), _Called() as chosen:
        call(i)
    given = called.given
    return Facts(
        timed="t" in given,
        seeded="noise" not in given and not given.keys().isdisjoint(("seed", "seeds")),
        sums=any(y.dim() < i.x.dim() for y in made),
        bare=chosen.ops > 0,
        tensors=len(given.get("logits", [i.x])),
    )


# ---- as a program ---------------------------------------------------------------------------------------------------


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def unaligned(x):
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def settings():
    """(what, arguments of `inputs`): shapes and dtypes that take every path of a kernel, tails and unaligned rows too."""
    bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    yield "float32", {"dtype": f32}
    yield "bfloat16", {"dtype": bf16}
    yield "float16 and bfloat16", {"dtype": f16, "m_dtype": bf16, "shape": (2, 3, 37)}
    yield "float32 and bfloat16, tails", {"dtype": f32, "m_dtype": bf16, "shape": (2, 1, 131)}
    yield "float64", {"dtype": f64, "shape": (2, 3, 3)}
    yield "bfloat16, several tiles", {"dtype": bf16, "shape": (3, 8, 515)}
    yield "float32, many tiny samples", {"dtype": f32, "shape": (515, 1, 3)}
    yield "channels-last float32", {"dtype": f32, "arrange": channels_last, "shape": (2, 5, 3, 7)}
    yield "channels-last bfloat16", {"dtype": bf16, "arrange": channels_last, "shape": (2, 64, 5, 3)}
    yield "unaligned bfloat16", {"dtype": bf16, "arrange": unaligned, "shape": (1, 2, 129)}
    yield "unaligned float32", {"dtype": f32, "arrange": unaligned, "shape": (2, 2, 33)}
    yield "one element", {"dtype": f32, "shape": (1, 1, 1)}
    yield "no element", {"dtype": f32, "shape": (0, 2, 3)}
    yield "no element of many samples", {"dtype": f32, "shape": (1000, 1, 0)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sums", action="store_true", help="only the calls that add up, whose kernels alone use shared memory")
    parser.add_argument("--until", type=float, default=math.inf, metavar="EPOCH", help="stop after the call that ends later")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and fastgen.backend(device) == "eager":
        raise SystemExit(f"there are no kernels to run:\n{fastgen.backend_info()}")
    chosen = {name: call for name, call in CALLS.items() if not options.sums or facts(call).sums}
    called, total = 0, 0
    for what, how in settings():
        i = inputs(device, **how)
        fitting = {name: call for name, call in chosen.items() if fits(name, i)}
        total += len(fitting)
        for name, call in fitting.items():
            if time.time() > options.until:
                break
            made = results(call(i))
            if device == "cuda":
                torch.cuda.synchronize()  # so that an error is that call's
            of_nothing = what.startswith("no element") and any(
                loss in name for loss in ("bce", "gan", "loss", "vlb")
            )  # NaN, if a mean
            finite = of_nothing or all(y.cpu().isfinite().all() for y in made)
            if not finite:
                raise SystemExit(f"{name}, {what}: not every value is finite")
            called += 1
        else:
            print(f"{what}: done", flush=True)
    if not called:
        raise SystemExit(f"there was no time for any of {total} calls")
    print(f"{called}{f' of {total}' * (called < total)} calls on {device}, backend {fastgen.backend(device)}")


if __name__ == "__main__":
    main()
