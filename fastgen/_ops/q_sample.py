"""q(x_t | x_0), and q(x_t | x_{t−1}) with another table: public functions, eager reference, fakes, autograd."""

from __future__ import annotations

import torch

from .._core import checks, declared, dispatch, rng, torch_noise
from .._core.tables import Q_SAMPLE_COLUMNS, Coefficients, plain_tensors
from .._core.torch_cuda import TorchCudaGenerator
from ..schedule import Schedule

Operands = declared.OPERANDS["q_sample"]
SCALE, SIGMA = map(Q_SAMPLE_COLUMNS.index, ("scale", "sigma"))


def q_sample(
    x0: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    offset: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Noises data to timestep t:

        x_t = √ᾱ_t · x0 + √(1 − ᾱ_t) · ε,   ε ~ N(0, I)

    Args:
        x0: (B, *event), float16, bfloat16, float32, float64 or uint8, contiguous or channels-last; other strides are copied first.
            A byte u stands for u/127.5 − 1, made of it in registers and rounded once.
        t: int or int64 tensor of shape (B,), 0-based, within 0 … T−1.
        schedule: a `Schedule` of T steps.
        noise: ε itself, the shape of x0, any of the four floating dtypes.
        seed: int or int64 tensor of 1 or B elements; ε is then `fastgen.randn(x0.shape, seed=seed, offset=offset)`, made in
            registers and never stored.
        generator: a `torch.Generator`; ε is then `torch.randn(x0.shape, generator=generator, dtype=dtype)` in the result's dtype,
            bit for bit, on the CPU mostly made in the kernel (see `torch_randn`). Or a `TorchCudaGenerator`.
        offset: int within 0 … 2⁶³−1; with `seed` only.
        out: where to write; may be x0 itself.

    With no noise source, a seed is drawn from torch's default CPU generator. Returns x_t with the shape, dtype and layout of
    x0; of bytes in the dtype of `out`, else in that of `noise`, else in float32, or float64 where that is torch's default dtype.
    Differentiable in a floating x0 and in noise. Half precision computes in float32 and rounds once.

    Raises TypeError for wrong types or dtypes, ValueError for wrong shapes, devices or values, before anything is written. A
    timestep outside the schedule in a tensor on a GPU, where it cannot be seen without a synchronisation, makes that sample
    NaN; in a compiled program on the CPU it raises RuntimeError.

    Source: Ho et al. 2020, equation (4).
    """
    return _noised("q_sample", Schedule.q_sample_table, "x0", x0, t, schedule, noise, seed, generator, offset, out)


def q_step(
    x_prev: torch.Tensor,
    t: int | torch.Tensor,
    schedule: Schedule,
    *,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    generator: torch.Generator | TorchCudaGenerator | None = None,
    offset: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of the forward process:

        x_t = √(1 − β_t) · x_{t−1} + √β_t · ε,   ε ~ N(0, I)

    Arguments, result and errors are those of `q_sample`, with x_{t−1} in place of x_0, which is not of bytes.

    Source: Ho et al. 2020, equation (2).
    """
    return _noised("q_step", Schedule.q_step_table, "x_prev", x_prev, t, schedule, noise, seed, generator, offset, out)


def noised_with(coefficients, x, t, *, noise=None, seed=None, generator=None, offset=0, out=None):
    """`q_sample` with the `Coefficients` of another library: scale·x + sigma·noise."""
    return _noised("q_sample", type(coefficients).table, "x", x, t, coefficients, noise, seed, generator, offset, out)


def check_schedule(value):
    """A `Schedule`, or the `Coefficients` of another library in its place."""
    if not isinstance(value, Coefficients):
        checks.schedule(value)


def _noised(op, table, x_name, x, t, schedule, noise, seed, generator, offset, out):
    plan = dispatch.plan(op, schedule, x, x)
    if plan is None:
        plan = _make_plan(op, table, x_name, x, schedule, noise, out)
    end, note, careful = plan.end, plan.note, plan.careful
    given_t = t
    if type(t) is int and 0 <= t < end:
        t, index = None, t
    elif isinstance(t, torch.Tensor) and not careful:
        index = 0
    else:
        _check_data(x_name, x)
        t, index = checks.timestep(t, x, end, note)
    if offset != 0 or type(offset) is not int:
        offset = rng.check_offset(offset)
    if type(generator) is torch.Generator and noise is None and seed is None and not careful:
        y = _with_torch_noise(plan, x_name, x, given_t, t, index, generator, out)
        if y is not None:
            return y
    # before a seed is drawn; of what else is wrong a compiled op complains before it writes
    if careful or (noise is None and seed is None):
        _check_tensors(x_name, x, given_t, noise, plan, out)
    elif out is not None and torch.is_grad_enabled():
        checks.ungraded_output(out, x, noise)
    seeds = None
    if type(seed) is not int or not 0 <= seed < 2**63 or noise is not None or generator is not None:
        _check_data(x_name, x)
        noise, seeds, seed = rng.noise_source(x_name, x, plan.dtype, noise, seed, generator)
    try:
        return _run(plan, x, t, index, noise, seeds, seed, offset, out)
    except (RuntimeError, TypeError):
        _check_tensors(x_name, x, given_t, noise, plan, out)
        raise


def _make_plan(op, table, x_name, x, schedule, noise, out):
    """Of bytes there is a plan for each dtype of the result."""
    check_schedule(schedule)
    _check_data(x_name, x)
    dtype, option = x.dtype, None
    if dtype is torch.uint8:
        for name, given in (("noise", noise), ("out", out)):
            if given is not None:
                checks.tensor(name, given)
        found = noise if out is None else out
        dtype = option = checks.compute_dtype(torch.get_default_dtype()) if found is None else found.dtype
        if (plan := dispatch.plan(op, schedule, x, x, option)) is not None:
            return plan
    return dispatch.make_plan(op, schedule, x, x, dtype, table(schedule, x.device, dtype), option)


def _check_data(x_name, x):
    checks.batched(x_name, x, or_bytes=x_name == "x0")  # only data may be bytes, not what is noised already


def _check_tensors(x_name, x, t, noise, plan, out):
    _check_data(x_name, x)
    checks.timestep(t, x, plan.end, plan.note)
    if noise is not None:
        checks.like("noise", noise, x_name, x)
    if out is not None:
        checks.output(out, x.shape, plan.dtype, x.device, {x_name: x, "noise": noise})


def _run(plan, x, t, index, noise, seeds, seed, offset, out=None):
    recorded = (x.requires_grad or (noise is not None and noise.requires_grad)) and torch.is_grad_enabled()
    if out is None and not recorded and plan.call is not None:
        # The usual call. Of its operands those that are left out need not be converted; a tuple of them all would take 0.2 µs.
        if seed is None and seeds is None:
            return plan.call(x, plan.rows, t, index, noise)
        return plan.call(x, plan.rows, t, index, noise, seeds, seed, offset)
    operands = (x, plan.rows, t, index, noise, seeds, seed, offset)
    if plan.call is None:
        y = reference(Operands(*operands), plan.dtype)
        return y if out is None else out.copy_(y)
    if out is not None:
        dispatch.op(plan.op + "_out", plan.backend)(*operands, out=out)
        return dispatch.written(out)
    return _QSample.apply(plan, *operands)


def _with_torch_noise(plan, x_name, x, given_t, t, index, generator, out):
    """With the noise of `generator` made in the compiled kernel; None where that cannot be."""
    source = torch_noise.source(generator, x, plan.dtype)
    if source is None or (torch.is_grad_enabled() and x.requires_grad):
        return None
    if out is not None and torch.is_grad_enabled():
        checks.ungraded_output(out, x)

    y = torch.empty(x.shape, dtype=plan.dtype, device=x.device) if out is None else out
    check = lambda: _check_tensors(x_name, x, given_t, None, plan, out)  # noqa: E731
    source.run(dispatch.DIRECT[plan.op + "_torch"], x, plan.rows, t, index, check=check, out=y)
    return y if out is None else dispatch.written(y)


def scaled(rows, column, x, t, index, backend):
    """rows[t][column] · x, one coefficient per sample, differentiable in x: `q_sample`'s kernel without noise."""
    call = None if dispatch.batched(x) else dispatch.op("q_sample", backend)
    plan = dispatch.Plan("q_sample", _scale_rows(rows, column), 0, "", False, x.dtype, call, False, backend=backend)
    return _run(plan, x, t, index, None, None, None, 0)


def _scale_rows(rows, column):
    """`q_sample`'s rows with this column of others for a scale. Kept with those, since to make them takes 7 µs, half of what a
    small gradient does; but not where their values are unknown yet, as while a CUDA graph is captured. On a GPU each stream keeps
    its own: another one would have to wait for the kernel that makes them."""
    known = type(rows) is torch.Tensor and not (dispatch.traced() or dispatch.transformed() or rng.capturing(rows.device))
    if not known or not (rows.is_cpu or rows.is_cuda):
        return _twice(rows, column)
    kept = rows.__dict__.setdefault("_fastgen_scale_rows", {})  # pyright: ignore[reportAttributeAccessIssue]  # a dict, not a class's proxy
    key = column, torch.cuda.current_stream(rows.device) if rows.is_cuda else None
    if key not in kept:
        with plain_tensors():
            kept[key] = _twice(rows, column)
    return kept[key]


def _twice(rows, column):
    # not rows[:, [column, column]]: on a GPU a list of indices is copied there, which synchronises
    return rows[:, column : column + 1].expand(-1, 2).contiguous()


# ---- eager reference ------------------------------------------------------------------------------------------------------


def reference(o, dtype):
    """The kernel in plain PyTorch: scale · x, plus sigma · ε where there is a noise source, of the dtype that is asked for. rows:
    (T, 2), the columns of `tables.Q_SAMPLE_COLUMNS`."""
    scale, sigma = dispatch.gathered(o.rows, o.t, o.index, o.x.dim())
    y, noise = scale * dispatch.real_of(o.x, o.rows.dtype), o.noise
    if noise is None and (o.seeds is not None or o.seed is not None):
        noise = rng.normals(o.x.shape, o.seeds, o.seed, o.offset, o.x.device, o.rows.dtype)
    return dispatch.with_noise(y, sigma, noise).to(dtype)


# ---- fakes ----------------------------------------------------------------------------------------------------------------


@dispatch.register_fake("q_sample", "q_step")
def _fake(o):
    dispatch.same_device(o.x, o.rows, o.t, o.noise)
    return dispatch.empty_like(o.x, result_dtype(o))


def result_dtype(o):
    """Of floating data theirs; of bytes that of the noise, and where none is given that of the rows."""
    if o.x.dtype is not torch.uint8:
        return o.x.dtype
    return (o.rows if o.noise is None else o.noise).dtype


# ---- autograd -------------------------------------------------------------------------------------------------------------


class _QSample(torch.autograd.Function):
    """Linear in x and in the noise, so the backward is the same kernel without noise, and so is the backward's."""

    @staticmethod
    def forward(ctx, plan, *arguments):
        o = Operands(*arguments)
        ctx.save_for_backward(o.t)
        ctx.row, ctx.backend = (o.rows, o.index), plan.backend
        return plan.call(*arguments)

    @staticmethod
    def backward(ctx, gradient):
        (t,), (rows, index), needed = ctx.saved_tensors, ctx.row, Operands(*ctx.needs_input_grad[1:])
        x = scaled(rows, SCALE, gradient, t, index, ctx.backend) if needed.x else None
        noise = scaled(rows, SIGMA, gradient, t, index, ctx.backend) if needed.noise else None
        return None, *dispatch.gradients(Operands, x=x, noise=noise)
