"""Every peer, written once: each op of fastgen, the same in eager PyTorch as a user writes it, torch.compile of that, and the
limit: `b.copy_(a)` on as many elements as make it move the bytes that the op must move, or for a call on a few one `torch.add`.

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
from fastgen._ops.step_log_prob import step_log_weight as weigh  # which has no public name of its own

from . import common

SCHEDULE = fastgen.Schedule.linear(1000)
SEED = 1
BACKENDS = {"fastgen triton": "triton", "fastgen eager": "eager"}  # "fastgen" is its default, the compiled kernels
FORWARD, BACKWARD = "forward", "forward + backward"
COMPILED = (10_000, 1_000_000, 10_000_000)  # elements at which torch.compile is timed: a program takes seconds to make
LONGEST = 20_000_000  # elements up to which the other peers are timed: the eager ones take seconds and gigabytes beyond


@dataclass(frozen=True)
class Case:
    """What all peers of a group compute, from the same buffers."""

    op: str
    mode: str  # where the noise comes from: "seed", "noise" (given), "generator" (torch's); "" where there is none
    output: str  # "out" (written where told), "fresh" (a new tensor) or "scalar"
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: int  # how many tensors of this shape and dtype must be read or written
    inputs: Callable  # () → one set of arguments
    ours: Callable  # arguments → a call of fastgen that takes nothing
    eager: Callable  # the same in PyTorch, a function of the arguments
    bind: Callable = partial  # (function, *arguments) → a call of a compiled or eager function that takes nothing
    passes: str = FORWARD
    overhead: bool = False  # a call so small that its limit is one torch.add of as many elements
    detail: str = ""  # what else is particular about the call
    device: str = "cpu"
    channels_last: bool = False
    threads: int | None = None  # of the CPU; None: torch's default
    byte_tensors: int = 0  # how many of uint8 besides
    network: Callable | None = None  # arguments → what writes them before each call, as in a chain, and is not timed

    def __str__(self):
        passes = "backward" if self.passes == BACKWARD else ""
        layout = "channels_last" if self.channels_last else ""
        threads = f"{self.threads}_threads" if self.threads else ""
        words = (self.op, self.mode, passes, self.output, self.detail, size_name(self.elements), common.DTYPES[self.dtype])
        return "-".join(filter(None, (*words, layout, threads))).replace(" ", "_")

    @property
    def call(self) -> str:
        """As it is written: ddpm_step(seed=, out=)."""
        words = [f"{self.mode}="] * bool(self.mode) + ["out="] * (self.output == "out") + [self.detail] * bool(self.detail)
        backward = " + backward" if self.passes == BACKWARD else ""
        if self.op == "diffusion_loss":
            return "q_sample + diffusion_loss" + backward
        name = {"gan_loss": "discriminator_loss", "q_sample_bytes": "q_sample"}.get(self.op, self.op)
        words = ["bytes"] * (self.op == "q_sample_bytes") + words
        return f"{name}({', '.join(words)}){backward}"

    @property
    def kind(self) -> str:
        return "overhead" if self.overhead else "threads" if self.threads else "throughput"

    @property
    def peers(self) -> tuple[str, ...]:
        """The limit first: of the others the share of it is told."""
        if self.threads:
            return "limit", "fastgen", "eager"
        if self.elements > LONGEST and self.device == "cpu":
            return "limit", "fastgen"
        single = self.dtype == torch.float32
        names = ["limit", "fastgen", "eager"]
        if single and not self.channels_last and not self.overhead:
            names.append("fastgen eager")
        if "triton" in fastgen.available_backends(self.device) and self.device != "cpu":  # its interpreter is for tests
            names.append("fastgen triton")
        near = any(abs(math.log(elements / self.elements)) < 0.5 for elements in COMPILED) or self.shape == TINY
        if near and not self.overhead and (single or (self.passes == FORWARD and not self.channels_last)):
            names.append("torch.compile")
        return tuple(names)

    @property
    def limit(self) -> str:
        return "torch.add" if self.overhead else "copy"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """What must be moved; a few coefficients per sample are not counted."""
        return (self.tensors * self.dtype.itemsize + self.byte_tensors) * self.elements

    @property
    def fits(self) -> bool:
        """Whether the buffers, the limit's and the temporaries of the eager peer leave a quarter of the free memory."""
        sets = common.copies(self.bytes, self.device)
        return 2 * self.bytes * sets + 4 * self.bytes < 0.75 * common.free_bytes(self.device)


# ---- where an op is timed --------------------------------------------------------------------------------------------

TINY = (2, 3, 8, 8)
SMALL_EVENT, EVENT = (4, 8, 8), (3, 64, 64)


def size_name(elements: int) -> str:
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if elements >= 0.95 * unit:
            return f"{elements / unit:.0f}{name}"
    return str(elements)


def shape_of(elements: int) -> tuple[int, ...]:
    """A batch of about so many elements: of latents up to 10⁵, of images from 10⁶."""
    event = SMALL_EVENT if elements < 500_000 else EVENT
    return (max(round(elements / math.prod(event)), 1), *event)


class Grid:
    """At which (shape, dtype, channels_last) an op is timed. All sizes, dtypes and layouts of everything would take hours; each is
    varied by itself, at sizes where it matters."""

    def __init__(self, tiny: bool = False, device: str = "cpu"):
        single, half = common.DTYPES
        small, million, ten = (TINY,) * 3 if tiny else map(shape_of, COMPILED)
        sizes = [TINY] if tiny else [shape_of(10**k) for k in range(3, 9)]
        halves = [million] if tiny else [million, ten]
        self.tiny, self.device = tiny, device
        self.contiguous = [(shape, single, False) for shape in sizes] + [(shape, half, False) for shape in halves]
        self.channels_last = [(million, dtype, True) for dtype in (single, half)]
        self.fresh = [(shape, single, False) for shape in dict.fromkeys((million, ten))]  # new outputs
        self.backward = [(shape, single, False) for shape in dict.fromkeys((small, million, ten))] + [(million, half, False)]
        self.large = ten
        self.points = [(TINY if tiny else (5_000, 2, 1, 1), single, False)]  # in the plane: samples shorter than a vector

    def over(self, points, make, *arguments):
        """make(shape, dtype, *arguments) at each of `points`."""
        return [
            replace(make(shape, dtype, *arguments), device=self.device, channels_last=channels_last)
            for shape, dtype, channels_last in points
        ]


def prepare(case: Case, names=None, tiny: bool = False) -> dict[str, list[Callable]]:
    """{peer: calls to rotate through, one for each set of buffers}; all share the sets, except the limit."""
    return {name: _calls(case, name, tiny) for name in (case.peers if names is None else names)}


def _calls(case, name, tiny):
    if name == "limit":
        return _limit(case)
    if name in ("fastgen", *BACKENDS):
        calls = [case.ours(*arguments) for arguments in sets(case)]
        return [partial(_on_backend, BACKENDS[name], call) for call in calls] if name in BACKENDS else calls
    arguments = sets(case)
    function = compiled(case, arguments, tiny) if name == "torch.compile" else case.eager  # "diffusers" where that is the peer
    return [case.bind(function, *each) for each in arguments]


def _on_backend(name, call):
    with fastgen.use_backend(name):
        return call()


@functools.lru_cache(maxsize=1)
def sets(case):
    """The sets of arguments of the last case, kept for its next peer."""

    def make():
        arguments = case.inputs()
        return tuple(map(_channels_last, arguments)) if case.channels_last else arguments

    return common.rotation(make, case.device, in_chain(case))


def in_chain(case) -> bool:
    """Whether the buffers are what a network has just left in the cache. On a GPU, where nothing runs between two launches that are
    timed, they rotate as ever."""
    return case.network is not None and case.device == "cpu"


def between(case) -> Callable | None:
    return case.network(*sets(case)[0]) if in_chain(case) else None


def _channels_last(x):
    if not isinstance(x, torch.Tensor) or x.dim() != 4:
        return x
    return x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad)


def _limit(case):
    if case.overhead:
        return [partial(torch.add, a, b) for a, b in common.rotation(lambda: _normal(2, case.shape, case.dtype), case.device)]
    elements = max(case.bytes // (2 * case.dtype.itemsize), 1)
    return [
        partial(b.copy_, a) for a, b in common.rotation(lambda: _normal(2, (elements,), case.dtype), case.device, in_chain(case))
    ]


def graph_of(case) -> tuple:
    """What cases with the same compiled program have in common: all but the batch. But randn's shape is nowhere else to be read,
    and a GPU gets a program of its own for each large shape, which is the best that torch.compile has to offer. On the CPU a batch
    that is known gains nothing (q_sample(noise=) at 10⁶: 419 µs, any batch 380; bce_with_logits 1225 and 1076)."""
    whole = case.op in ("randn", "randn_torch_cuda") or (case.device != "cpu" and case.elements > 500_000)
    shape = case.shape if whole else case.shape[1:]
    return case.op, case.mode, case.passes, case.output, case.dtype, case.channels_last, case.device, shape


_programs: dict = {}


def _inductor_options(case, backend):
    """What serves torch.compile best. On the CPU its own random numbers are made one by one: ddpm_step(seed=) at 10⁶ elements took
    37.6 ms with them and 4.6 with eager's (2 cores). On a GPU they are made in the kernel that needs them."""
    return {"fallback_random": True} if backend == "inductor" and case.device == "cpu" else None


def compiled(case, arguments, tiny=False, backend="inductor"):
    """The eager peer compiled; `arguments` are the sets it will be called with. One program is kept. Inductor takes seconds: where
    `tiny`, one case shows that it works."""
    if tiny and (case.op, case.mode, case.passes, case.dtype) != ("q_sample", "noise", FORWARD, torch.float32):
        backend = "eager"
    key = (*graph_of(case), backend)
    if len(key[-2]) < len(case.shape):
        for x in (x for each in arguments for x in each):
            if isinstance(x, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(x, 0)
    if key not in _programs:
        _programs.clear()
        torch.compiler.reset()
        # dynamic=None: static but for what is marked
        _programs[key] = torch.compile(case.eager, fullgraph=True, backend=backend, options=_inductor_options(case, backend))
    return _programs[key]


# ---- arguments -------------------------------------------------------------------------------------------------------


def _normal(how_many, shape, dtype):
    """Large ones repeat a part: a benchmark should not spend its time on torch.randn."""
    elements = math.prod(shape)
    if elements <= 2**20:
        return [torch.randn(shape, dtype=dtype) for _ in range(how_many)]
    return [torch.randn(2**20, dtype=dtype).repeat(-(-elements // 2**20))[:elements].view(shape) for _ in range(how_many)]


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
VLB_TERMS = _tables(
    _bar.rsqrt(),
    -((1 - _bar) / _bar).sqrt(),
    _betas * _bar_prev.sqrt() / (1 - _bar),
    _alphas.sqrt() * (1 - _bar_prev) / (1 - _bar),
    torch.cat([_variance[1:2], _variance[1:]]).log(),
    _betas.log(),
)
STEP_LOG_PROB = _tables(_alphas.rsqrt(), _betas / (1 - _bar).sqrt(), torch.cat([_variance[1:2], _variance[1:]]).sqrt())
STEP_LOG_WEIGHT = [*STEP_LOG_PROB, *_tables(_alphas.sqrt(), _betas)]
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


def eager_q_sample_bytes(pixels, t, noise, out, tables):
    """The bytes made numbers first, as a data loader does or a training step on the device."""
    return eager_q_sample(pixels.to(tables[0].dtype if out is None else out.dtype) / 127.5 - 1, t, noise, out, tables)


def eager_to_uint8(x):
    """As images are written to files: (B, H, W, C) in memory."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


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


def eager_vlb_terms(m, x0, x_t, t, tables):
    """As training code has it, in float32: both terms of all elements, of which each sample takes one."""
    from_x, from_m, mean_from_x0, mean_from_x, low, high = (gather(table, t, x0).float() for table in tables)
    x0, x_t = x0.float(), x_t.float()
    said, v = m.float().chunk(2, 1)
    share = 0.5 * (v + 1)
    log_variance = share * high + (1 - share) * low
    mean = mean_from_x0 * (from_x * x_t + from_m * said) + mean_from_x * x_t
    true_mean = mean_from_x0 * x0 + mean_from_x * x_t
    kl = 0.5 * (log_variance - low - 1 + torch.exp(low - log_variance) + (true_mean - mean) ** 2 * torch.exp(-log_variance))
    inverse = torch.exp(-0.5 * log_variance)
    above, below = (torch.special.ndtr((x0 - mean + end) * inverse) for end in (1 / 255, -1 / 255))
    inner = (above - below).clamp(min=1e-12).log()
    low_end, high_end = above.clamp(min=1e-12).log(), (1 - below).clamp(min=1e-12).log()
    decoded = -torch.where(x0 < -0.999, low_end, torch.where(x0 > 0.999, high_end, inner))
    return torch.where(t == 0, decoded.flatten(1).sum(1), kl.flatten(1).sum(1)).mean(), x_t


def log_density(x, mean, sigma):
    """Of each element of a normal variable, as training code has it."""
    return -((x - mean) ** 2) / (2 * sigma**2) - torch.log(sigma) - 0.5 * math.log(2 * math.pi)


def eager_step_log_prob(m, x_t, x_prev, t, tables):
    """As DDPO's code has it, in float32: the step's mean and deviation, and the mean of the normal log-density."""
    scale, slope, sigma = (gather(table, t, x_t).float() for table in tables)
    mean = scale * (x_t.float() - slope * m.float())
    return log_density(x_prev.float(), mean, sigma).flatten(1).mean(1).sum(), x_t


def eager_ddpm_step_log_prob(x_t, m, t, noise, out, tables):
    """As DDPO's code has it: the step, and of what it returns the mean of the normal log-density in float32."""
    scale, slope, sigma = (gather(table, t, x_t) for table in tables)
    mean = scale * (x_t - slope * m)
    x_prev = torch.add(mean, sigma * torch.randn_like(x_t), out=out)
    return x_prev, log_density(x_prev.float(), mean.float(), sigma.float()).flatten(1).mean(1)


def eager_step_log_weight(x_prev, x_t, m, t, tables):
    """What a step contributes to the logarithm of a trajectory's weight."""
    scale, slope, sigma, keep, beta = (gather(table, t, x_t) for table in tables)
    reverse = log_density(x_prev, scale * (x_t - slope * m.float()), sigma)
    forward = log_density(x_t, keep * x_prev, beta.sqrt())
    return (reverse - forward).flatten(1).mean(), m


def eager_reparameterize(mean, log_variance, noise):
    return mean + torch.exp(0.5 * log_variance) * (torch.randn_like(mean) if noise is None else noise)


def eager_posterior(mean, log_variance):
    """A sample and its divergence, as training code of variational autoencoders has it."""
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(1)
    return eager_reparameterize(mean, log_variance, None), kl


def eager_gaussian_kl(mean, log_variance, other_mean, other_log_variance):
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    ratio = log_variance - other_log_variance
    return 0.5 * (torch.exp(ratio) - 1.0 - ratio + distance).flatten(1).sum(1).mean()


def posterior_gradients(step, mean, log_variance, gradient):
    """The sample, its divergence, and the gradients to the parameters of one to the sample and of 1 to each divergence."""
    z, kl = step(mean, log_variance)
    return z, kl, *torch.autograd.grad((z, kl), (mean, log_variance), (gradient, torch.ones_like(kl)))


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


def gradients(function, inputs, gradient=None):
    """Forward and backward: what the function returns, with the gradients to `inputs`."""
    value = function()
    first = value[0] if isinstance(value, tuple) else value
    return first, *torch.autograd.grad(first, inputs, gradient)


# ---- cases -----------------------------------------------------------------------------------------------------------


def q_sample(shape, dtype, mode, output, t=None):
    """mode: "noise", "seed" or "generator", which is torch's default one; t: an int or a tensor, all timesteps in turn where it is
    None."""

    def inputs():
        (x0,) = _normal(1, shape, dtype)
        return x0, _timesteps(shape, t), _noise(mode, shape, dtype), _output(output, shape, dtype), _on_device(Q_SAMPLE)

    def ours(x0, t, noise, out, tables):
        if noise is None:
            return partial(fastgen.q_sample, x0, t, SCHEDULE, seed=SEED, out=out)
        return partial(fastgen.q_sample, x0, t, SCHEDULE, noise=noise, out=out)

    tensors = 3 if mode == "noise" else 2
    return Case("q_sample", mode, output, shape, dtype, tensors, inputs, ours, eager_q_sample)


def q_sample_bytes(shape, dtype):
    """Of uint8 data, of which a quarter of float32's bytes is read; the result has the dtype of `out`."""

    def inputs():
        pixels = (_normal(1, shape, torch.float32)[0].clamp(-2, 2) * 60 + 128).to(torch.uint8)
        return pixels, _timesteps(shape), None, _output("out", shape, dtype), _on_device(Q_SAMPLE)

    def ours(pixels, t, noise, out, tables):
        return partial(fastgen.q_sample, pixels, t, SCHEDULE, seed=SEED, out=out)

    return Case("q_sample_bytes", "seed", "out", shape, dtype, 1, inputs, ours, eager_q_sample_bytes, byte_tensors=1)


def to_uint8(shape, dtype):
    """To channels-last memory."""
    ours = partial(partial, partial(fastgen.to_uint8, channels_last=True))
    inputs = lambda: tuple(_normal(1, shape, dtype))  # noqa: E731
    return Case("to_uint8", "", "fresh", shape, dtype, 1, inputs, ours, eager_to_uint8, byte_tensors=1)


def ddpm_step(shape, dtype, mode, output, t=None):
    """mode: "noise", "seed" or "generator", which is torch's default one; t: an int or a tensor, all timesteps in turn where it is
    None."""

    def inputs():
        x_t, m = _normal(2, shape, dtype)
        tables = _on_device(DDPM_STEP)
        return x_t, m, _timesteps(shape, t), _noise(mode, shape, dtype), _output(output, shape, dtype), tables

    def ours(x_t, m, t, noise, out, tables):
        source = {"noise": noise, "seed": SEED, "generator": torch.default_generator}[mode]
        return partial(fastgen.ddpm_step, x_t, m, t, SCHEDULE, **{mode: source}, out=out)

    tensors = 4 if mode == "noise" else 3
    return Case("ddpm_step", mode, output, shape, dtype, tensors, inputs, ours, eager_ddpm_step)


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


def randn_torch_cuda(shape, dtype):
    """The numbers of an H100. eager draws others, the CPU's own: on a GPU the same ones, if that is an H100."""

    def inputs():
        return (torch.get_default_device(),)

    def ours(device):
        return partial(fastgen.randn, shape, seed=SEED, dtype=dtype, device=device, stream="torch-cuda", device_like="H100")

    def eager(device):
        return torch.randn(shape, dtype=dtype, device=device)

    return Case("randn_torch_cuda", "seed", "fresh", shape, dtype, 1, inputs, ours, eager)


def torch_randn(shape, dtype):
    """torch's own noise, of its default generator."""

    def inputs():
        return (torch.get_default_device(),)

    def ours(device):
        return partial(fastgen.torch_randn, shape, dtype=dtype, device=device)

    def eager(device):
        return torch.randn(shape, dtype=dtype, device=device)

    return Case("torch_randn", "generator", "fresh", shape, dtype, 1, inputs, ours, eager)


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
    ours = partial(bind, step)
    return Case("diffusion_loss", "seed", "fresh", shape, dtype, 4, inputs, ours, eager_training_step, bind, passes=BACKWARD)


def vlb_terms(shape, dtype):
    """With a learned variance, and its gradient: x0, x_t and the network's output of twice the channels are read, and as much as
    that is written."""

    def inputs():
        x0, noise, off, v = _normal(4, shape, dtype)
        t = _timesteps(shape)
        x_t = eager_q_sample(x0, t, noise, None, _on_device(Q_SAMPLE))
        m = torch.cat([noise + 0.1 * off, v], 1)  # near what is right: far from it eager's clamp shows
        return m.requires_grad_(), x0, x_t, t, _on_device(VLB_TERMS)

    def step(m, x0, x_t, t, tables):
        return fastgen.vlb_terms(m, x0, t, SCHEDULE, x_t=x_t, variance="learned_range", reduction="mean"), x_t

    bind = partial(partial, training_gradient)
    ours = partial(bind, step)
    return Case("vlb_terms", "x_t", "fresh", shape, dtype, 6, inputs, ours, eager_vlb_terms, bind, passes=BACKWARD)


def step_log_prob(shape, dtype):
    """And its gradient to the network's output: x_t, x_{t−1} and the output are read, and as much as the last is written."""

    def inputs():
        x_t, off, noise = _normal(3, shape, dtype)
        t = _timesteps(shape).clamp(min=1)
        return noise.requires_grad_(), x_t, x_t + 0.02 * off, t, _on_device(STEP_LOG_PROB)

    def step(m, x_t, x_prev, t, tables):
        return fastgen.step_log_prob(x_prev, x_t, m, t, SCHEDULE, over="mean").sum(), x_t

    bind = partial(partial, training_gradient)
    ours = partial(bind, step)
    return Case("step_log_prob", "", "fresh", shape, dtype, 4, inputs, ours, eager_step_log_prob, bind, passes=BACKWARD)


def ddpm_step_log_prob(shape, dtype):
    """The step from a seed with its log-probability: no tensor more than the step alone moves."""

    def inputs():
        x_t, m = _normal(2, shape, dtype)
        return x_t, m, _timesteps(shape).clamp(min=1), None, _output("out", shape, dtype), _on_device(STEP_LOG_PROB)

    def ours(x_t, m, t, noise, out, tables):
        options = {"out": out, "return_log_prob": True, "log_prob_over": "mean"}
        return partial(fastgen.ddpm_step, x_t, m, t, SCHEDULE, seed=SEED, **options)

    return Case("ddpm_step_log_prob", "seed", "out", shape, dtype, 3, inputs, ours, eager_ddpm_step_log_prob)


def step_log_weight(shape, dtype):
    """What `log_likelihood` launches for a step but the last, which has the prior too: x_{t−1} and x_t, always in float32, and the
    network's output are read."""

    def inputs():
        x_t, off = _normal(2, shape, torch.float32)
        (m,) = _normal(1, shape, dtype)
        t = _timesteps(shape).clamp(1, len(SCHEDULE) - 2)
        return x_t + 0.02 * off, x_t, m, t, _on_device(STEP_LOG_WEIGHT)

    def ours(x_prev, x_t, m, t, tables):
        return lambda: (weigh(x_prev, x_t, m, t, SCHEDULE).mean() / x_t[0].numel(), m)

    tensors = 3 if dtype == torch.float32 else 5  # of the network's output's type
    return Case("step_log_weight", "", "scalar", shape, dtype, tensors, inputs, ours, eager_step_log_weight)


def reparameterize(shape, dtype, mode):
    """mode: "noise" or "seed"."""

    def inputs():
        return *_normal(2, shape, dtype), _noise(mode, shape, dtype)

    def ours(mean, log_variance, noise):
        source = {"seed": SEED} if noise is None else {"noise": noise}
        return partial(fastgen.reparameterize, mean, log_variance, **source)

    tensors = 4 if mode == "noise" else 3
    return Case("reparameterize", mode, "fresh", shape, dtype, tensors, inputs, ours, eager_reparameterize)


def posterior(shape, dtype):
    """What a variational autoencoder has between its two networks: the sample and its divergence, and from their gradients that to
    the parameters. Those and the sample's gradient are read, and as much is written."""

    def inputs():
        mean, log_variance, gradient = _normal(3, shape, dtype)
        return mean.requires_grad_(), log_variance.requires_grad_(), gradient

    bind = partial(partial, posterior_gradients)
    ours = partial(bind, partial(fastgen.reparameterize, seed=SEED, return_kl=True))
    case = Case("reparameterize", "seed", "fresh", shape, dtype, 6, inputs, ours, eager_posterior, bind, passes=BACKWARD)
    return replace(case, detail="return_kl=True")


def gaussian_kl(shape, dtype):
    """Of two, and its gradient to all four parameters: as many tensors are read as written."""

    def inputs():
        return tuple(x.requires_grad_() for x in _normal(4, shape, dtype))

    def step(*parameters):
        return fastgen.gaussian_kl(*parameters, reduction="mean")

    def bind(function, *parameters):
        return partial(gradients, partial(function, *parameters), parameters)

    ours = partial(bind, step)
    return Case("gaussian_kl", "", "scalar", shape, dtype, 8, inputs, ours, eager_gaussian_kl, bind, passes=BACKWARD)


def bce_with_logits(shape, dtype, passes=FORWARD):
    """Two tensors are read; with the backward the gradient is written besides, and need not read them again."""

    def inputs():
        (logits,) = _normal(1, shape, dtype)
        return logits, (_normal(1, shape, dtype)[0] > 0).to(dtype)

    ours = partial(partial, fastgen.bce_with_logits)
    case = Case("bce_with_logits", "", "scalar", shape, dtype, 2, inputs, ours, eager_bce_with_logits)
    return case if passes == FORWARD else backward(case, 1, 1)


def gan_loss(shape, dtype, passes=FORWARD):
    """The discriminator's, on as many logits of real samples as of fake ones, each of this shape: both are read, and with the
    backward as much is written."""
    ours = partial(partial, fastgen.discriminator_loss)
    case = Case("gan_loss", "", "scalar", shape, dtype, 2, lambda: tuple(_normal(2, shape, dtype)), ours, eager_gan_loss)
    return case if passes == FORWARD else backward(case, 2, 2)


def backward(case, inputs, tensors):
    """A case and then its backward to the first `inputs` arguments, which moves so many tensors more."""

    def with_gradient():
        arguments = case.inputs()
        given = None if case.output == "scalar" else _normal(1, case.shape, case.dtype)[0]
        return given, *(x.requires_grad_() for x in arguments[:inputs]), *arguments[inputs:]

    def bind(function, gradient, *arguments):
        return partial(gradients, partial(function, *arguments), arguments[:inputs], gradient)

    def ours(gradient, *arguments):
        return partial(gradients, case.ours(*arguments), arguments[:inputs], gradient)

    return replace(case, passes=BACKWARD, tensors=case.tensors + tensors, inputs=with_gradient, ours=ours, bind=bind)


def calls_of_16():
    """One call on 16 elements each: what a call costs apart from its work. The timestep is an int or a tensor."""
    timesteps = {"t int": 500, "t tensor": torch.tensor([500])}
    return [
        replace(make((1, 1, 4, 4), torch.float32, mode, "fresh", t), overhead=True, detail=name)
        for make in (ddpm_step, q_sample)
        for mode in ("seed", "noise")
        for name, t in timesteps.items()
    ]
