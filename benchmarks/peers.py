"""Every peer, written once: each op of fastgen, the same in eager PyTorch as a user writes it, torch.compile of that,
and the limit, `torch.add(a, b, out=c)` (on a GPU `b.copy_(a)`) on as many elements as make it move the bytes that the op must move.

A `Case` is one comparison: an op, how it is called, a shape and a dtype. `prepare` makes calls without arguments of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import fastgen

from . import common

SCHEDULE = fastgen.Schedule.linear(1000)
SEED = 1
# the limit first: the others are given as shares of it
PEERS = ("torch.add", "fastgen", "eager", "torch.compile")


@dataclass(frozen=True)
class Case:
    """What all peers of a group compute, from the same buffers."""

    op: str
    mode: str  # where the noise comes from, or which passes
    output: str  # "out" (written where told), "fresh" (a new tensor) or "scalar"
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: int  # how many tensors of this shape and dtype must be read or written
    inputs: Callable  # () → one set of arguments
    ours: Callable  # arguments → a call of fastgen that takes nothing
    eager: Callable  # the same in PyTorch, a function of the arguments
    bind: Callable = partial  # (function, *arguments) → a call of a compiled or eager function that takes nothing
    overhead: bool = False  # a call so small that its limit is one torch.add of as many elements
    device: str = "cpu"
    channels_last: bool = False

    def __str__(self):
        dtype = common.DTYPES[self.dtype]
        return "-".join(filter(None, (self.op, self.mode, self.output, common.size_name(self.elements), dtype)))

    @property
    def peers(self) -> tuple[str, ...]:
        return PEERS[:-1] if self.overhead else PEERS

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """What must be moved; a few coefficients per sample are not counted."""
        return self.tensors * self.elements * self.dtype.itemsize

    @property
    def fits(self) -> bool:
        """Whether the buffers, the limit's and the temporaries of the eager peer leave a quarter of the free memory."""
        sets = common.copies(self.bytes, self.device)
        return 2 * self.bytes * sets + 4 * self.bytes < 0.75 * common.free_bytes(self.device)


def prepare(case: Case, names=PEERS, tiny: bool = False) -> dict[str, list[Callable]]:
    """{peer: calls to rotate through, one for each set of buffers}; all share the sets, except torch.add."""
    return {name: _calls(case, name, tiny) for name in names}


def _calls(case, name, tiny):
    if name == "torch.add":
        return [partial(torch.add, a, b) if c is None else partial(torch.add, a, b, out=c) for a, b, c in _limit(case)]
    if name == "copy":
        return [partial(b.copy_, a) for a, b in _copies(case)]
    if name == "fastgen":
        return [case.ours(*arguments) for arguments in sets(case)]
    function = _compiled(case, tiny) if name == "torch.compile" else case.eager  # which is "diffusers" where that is the peer
    return [case.bind(function, *arguments) for arguments in sets(case)]


@functools.lru_cache(maxsize=1)
def sets(case):
    """The sets of arguments of the last case, kept for its next peer."""

    def make():
        arguments = case.inputs()
        return tuple(map(_channels_last, arguments)) if case.channels_last else arguments

    return common.rotation(make, case.device)


def _channels_last(x):
    if not isinstance(x, torch.Tensor) or x.dim() != 4:
        return x
    return x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad)


def _copies(case):
    elements = case.bytes // (2 * case.dtype.itemsize)
    return common.rotation(lambda: _normal(2, (elements,), case.dtype), case.device)


def _limit(case):
    elements = case.elements if case.overhead else case.bytes // (3 * case.dtype.itemsize)
    output = "fresh" if case.output == "fresh" else "out"
    return common.rotation(lambda: (*_normal(2, (elements,), case.dtype), _output(output, (elements,), case.dtype)), case.device)


def _compiled(case, tiny):
    """Compiled for this shape alone. Inductor takes seconds: where `tiny`, one case shows that it works."""
    torch.compiler.reset()
    inductor = not tiny or (case.op, case.mode, case.output, case.dtype) == ("q_sample", "noise", "out", torch.float32)
    return torch.compile(case.eager, dynamic=False, fullgraph=True, backend="inductor" if inductor else "eager")


# ---- arguments -------------------------------------------------------------------------------------------------------


def _normal(how_many, shape, dtype):
    return [torch.randn(shape, dtype=dtype) for _ in range(how_many)]


def _noise(mode, shape, dtype):
    return torch.randn(shape, dtype=dtype) if mode == "noise" else None


def _output(output, shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype) if output == "out" else None  # written, so that its pages exist


def _timesteps(shape, t=None):
    if t is not None:
        return t.to(torch.get_default_device()) if isinstance(t, torch.Tensor) else t
    return torch.linspace(0, len(SCHEDULE) - 1, shape[0]).long()


# ---- eager PyTorch ---------------------------------------------------------------------------------------------------


def _tables(*columns):
    """One float32 table per coefficient, as training code keeps them."""
    return [column.float() for column in columns]


_betas = torch.tensor(SCHEDULE.betas)
_alphas = 1 - _betas
_bar = torch.cumprod(_alphas, 0)
_bar_prev = torch.cat([torch.ones_like(_bar[:1]), _bar[:-1]])
_variance = _betas * (1 - _bar_prev) / (1 - _bar)

Q_SAMPLE = _tables(_bar.sqrt(), (1 - _bar).sqrt())
DDPM_STEP = _tables(_alphas.rsqrt(), _betas / (1 - _bar).sqrt(), _variance.sqrt())
DDIM_STEP = _tables(_bar.rsqrt(), (1 - _bar).sqrt(), _bar_prev.sqrt(), (1 - _bar_prev).sqrt())
Q_POSTERIOR = _tables(
    _betas * _bar_prev.sqrt() / (1 - _bar),
    _alphas.sqrt() * (1 - _bar_prev) / (1 - _bar),
    _variance,
    torch.cat([_variance[1:2], _variance[1:]]).log(),
)


_moved = {}


def _on_device(tables):
    """The tables on the default device, the same tensors at every call."""
    key = id(tables), torch.get_default_device()
    if key not in _moved:
        _moved[key] = [table.to(key[1]) for table in tables]
    return _moved[key]


def gather(table, t, x):
    """The coefficient of each sample, in the dtype of the data, shaped to broadcast."""
    return table[t].to(x.dtype).view(-1, 1, 1, 1)


def eager_q_sample(x0, t, noise, out, tables):
    scale, sigma = (gather(table, t, x0) for table in tables)
    noise = torch.randn_like(x0) if noise is None else noise
    return torch.add(scale * x0, sigma * noise, out=out)


def eager_ddpm_step(x_t, model_output, t, noise, out, tables):
    scale, slope, sigma = (gather(table, t, x_t) for table in tables)
    noise = torch.randn_like(x_t) if noise is None else noise
    return torch.add(scale * (x_t - slope * model_output), sigma * noise, out=out)


def eager_ddim_step(x_t, model_output, t, out, tables):
    inverse, sigma, scale_prev, sigma_prev = (gather(table, t, x_t) for table in tables)
    x0 = inverse * (x_t - sigma * model_output)
    return torch.add(scale_prev * x0, sigma_prev * model_output, out=out)


def eager_q_posterior(x0, x_t, t, tables):
    u, v, variance, log_variance = (gather(table, t, x0) for table in tables)
    return u * x0 + v * x_t, variance, log_variance


def eager_training_step(m, x0, t, tables):
    """What a training loop computes besides the network, whose output m stands for: x_t, and the loss of the noise in it."""
    noise = torch.randn_like(x0)
    x_t = eager_q_sample(x0, t, noise, None, tables)
    return F.mse_loss(m, noise), x_t


def training_gradient(step, m, *arguments):
    """The loss, its gradient and x_t."""
    loss, x_t = step(m, *arguments)
    return loss, *torch.autograd.grad(loss, m), x_t


def eager_bce_with_logits(input, target):
    return F.binary_cross_entropy_with_logits(input, target)


def eager_gan_loss(real, fake):
    """As training code has it, with targets made for every batch."""
    real_loss = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    return real_loss + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))


def gradients(loss, real, fake):
    """Forward and backward to the logits: the loss and its gradients."""
    value = loss(real, fake)
    return value, *torch.autograd.grad(value, (real, fake))


def gradient(loss, input, target):
    """Forward and backward to the logits: the loss and its gradient."""
    value = loss(input, target)
    return value, *torch.autograd.grad(value, input)


# ---- cases -----------------------------------------------------------------------------------------------------------


def q_sample(shape, dtype, mode, output, t=None, overhead=False):
    """mode: "noise" or "seed"; t: an int or a tensor, all timesteps in turn where it is None."""

    def inputs():
        (x0,) = _normal(1, shape, dtype)
        return x0, _timesteps(shape, t), _noise(mode, shape, dtype), _output(output, shape, dtype), _on_device(Q_SAMPLE)

    def ours(x0, t, noise, out, tables):
        if noise is None:
            return partial(fastgen.q_sample, x0, t, SCHEDULE, seed=SEED, out=out)
        return partial(fastgen.q_sample, x0, t, SCHEDULE, noise=noise, out=out)

    tensors = 3 if mode == "noise" else 2
    return Case("q_sample", mode, output, shape, dtype, tensors, inputs, ours, eager_q_sample, overhead=overhead)


def ddpm_step(shape, dtype, mode, output, t=None, overhead=False):
    """mode: "noise" or "seed"; t: an int or a tensor, all timesteps in turn where it is None."""

    def inputs():
        x_t, m = _normal(2, shape, dtype)
        tables = _on_device(DDPM_STEP)
        return x_t, m, _timesteps(shape, t), _noise(mode, shape, dtype), _output(output, shape, dtype), tables

    def ours(x_t, m, t, noise, out, tables):
        if noise is None:
            return partial(fastgen.ddpm_step, x_t, m, t, SCHEDULE, seed=SEED, out=out)
        return partial(fastgen.ddpm_step, x_t, m, t, SCHEDULE, noise=noise, out=out)

    tensors = 4 if mode == "noise" else 3
    return Case("ddpm_step", mode, output, shape, dtype, tensors, inputs, ours, eager_ddpm_step, overhead=overhead)


def ddim_step(shape, dtype, output):
    """η = 0, without noise."""

    def inputs():
        return *_normal(2, shape, dtype), _timesteps(shape), _output(output, shape, dtype), _on_device(DDIM_STEP)

    def ours(x_t, m, t, out, tables):
        return partial(fastgen.ddim_step, x_t, m, t, SCHEDULE, out=out)

    return Case("ddim_step", "", output, shape, dtype, 3, inputs, ours, eager_ddim_step)


def q_posterior(shape, dtype):
    def inputs():
        return *_normal(2, shape, dtype), _timesteps(shape), _on_device(Q_POSTERIOR)

    def ours(x0, x_t, t, tables):
        return partial(fastgen.q_posterior, x0, x_t, t, SCHEDULE)

    return Case("q_posterior", "", "fresh", shape, dtype, 3, inputs, ours, eager_q_posterior)


def randn(shape, dtype):
    def inputs():
        return (torch.get_default_device(),)

    def ours(device):
        return partial(fastgen.randn, shape, seed=SEED, dtype=dtype, device=device)

    def eager(device):
        return torch.randn(shape, dtype=dtype, device=device)

    return Case("randn", "seed", "fresh", shape, dtype, 1, inputs, ours, eager)


def diffusion_loss(shape, dtype):
    """q_sample, the loss and its gradient: x0 and the network's output are read, x_t and the gradient written. (The CUDA kernels
    read the output twice, since there noise is cheaper to make again than a gradient to move.)"""

    def inputs():
        m, x0 = _normal(2, shape, dtype)
        return m.requires_grad_(), x0, _timesteps(shape), _on_device(Q_SAMPLE)

    def step(m, x0, t, tables):
        x_t = fastgen.q_sample(x0, t, SCHEDULE, seed=SEED)
        return fastgen.diffusion_loss(m, x0, t, SCHEDULE, seed=SEED), x_t

    bind = partial(partial, training_gradient)
    return Case("diffusion_loss", "seed", "fresh", shape, dtype, 4, inputs, partial(bind, step), eager_training_step, bind)


def bce_with_logits(shape, dtype, mode):
    """mode: "forward", which reads two tensors, or "backward": forward, then backward, which reads two, writes one."""
    backward = mode == "backward"
    bind = partial(partial, gradient) if backward else partial

    def inputs():
        (logits,) = _normal(1, shape, dtype)
        return logits.requires_grad_(backward), torch.rand(shape).round_().to(dtype)

    ours = partial(bind, fastgen.bce_with_logits)
    tensors = 5 if backward else 2
    return Case("bce_with_logits", mode, "scalar", shape, dtype, tensors, inputs, ours, eager_bce_with_logits, bind)


def gan_loss(shape, dtype, mode):
    """The discriminator's, on as many logits of real samples as of fake ones, each of this shape. mode: "forward", which reads
    both, or "backward": forward, then backward, which reads both again and writes as much."""
    backward = mode == "backward"
    bind = partial(partial, gradients) if backward else partial

    def inputs():
        return tuple(x.requires_grad_(backward) for x in _normal(2, shape, dtype))

    ours = partial(bind, fastgen.discriminator_loss)
    return Case("gan_loss", mode, "scalar", shape, dtype, 6 if backward else 2, inputs, ours, eager_gan_loss, bind)


def calls_of_16():
    """One call on 16 elements each: what a call costs apart from its work. The timestep is an int or a tensor."""
    timesteps = {"t_int": 500, "t_tensor": torch.tensor([500])}
    return [
        replace(make((1, 1, 4, 4), torch.float32, mode, "fresh", t, overhead=True), mode=f"{mode}-{name}")
        for make in (ddpm_step, q_sample)
        for mode in ("seed", "noise")
        for name, t in timesteps.items()
    ]
