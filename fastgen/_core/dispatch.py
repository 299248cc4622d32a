"""What every op's Python side shares: the plan of a call, calling the backend's op, gathering rows, registering fakes.

On 16 elements a compiled op takes some 3 µs and every check in Python 0.1 to 0.5. So what calls with the same dtypes, device,
options and backend have in common is checked once and kept as a plan, and the shapes are left to the compiled op, which has to
look at them anyway for memory safety; only when it refuses are the checks of `checks` run, for their words.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import backends, checks, declared

OVERLOADS: dict[str, Any] = {}  # torch.ops.fastgen.<op>.default
DIRECT: dict[str, Any] = {}  # the same ops without OpOverload's Python frame (0.3 µs), which only a tracer needs
FAKES: dict[str, Any] = {}  # the fakes of all declared ops, taking the arguments that the op takes


class Plan(NamedTuple):
    """What is the same for every call of one op with these dtypes, this device, these options and this backend."""

    op: str
    rows: torch.Tensor  # the coefficient table
    end: int  # timesteps 0 … end-1
    note: str  # what to add to the complaint about a timestep
    noisy: bool  # whether any row takes noise
    dtype: torch.dtype  # of the result
    call: Any  # the backend's op; None for the eager backend
    careful: bool  # check the tensors in Python first: eager would broadcast, and a fake accepts anything
    learned: bool = False  # whether the network's output carries a variance too
    backend: str = "cpp"


_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # found once, which saves 0.02 µs a call
dispatch_modes = torch._C._len_torch_dispatch_stack  # the tracers that are no dynamo: make_fx, torch.export(strict=False)
functorch_is_active = torch._C._are_functorch_transforms_active  # what torch.autograd.Function.apply asks itself


def transformed():
    """Whether a transform of torch.func (grad, vmap, …) or forward-mode AD is under way: the compiled ops carry none of them."""
    return forward_ad._current_level >= 0 or functorch_is_active()


def plan(name, schedule, x, y, option=None, other=None):
    """The plan kept for these arguments, or None where there is none yet, or none may be used: while tracing or transforming."""
    # the last two are `transformed()`, without the time that a call takes
    if _is_dynamo_compiling() or dispatch_modes() or forward_ad._current_level >= 0 or functorch_is_active():
        return None
    try:
        # True for the CPU: to make, hash and compare a torch.device takes 0.1 µs
        return schedule._plans[name, x.dtype, y.dtype, x.is_cpu or x.device, backends._choice.get(), option, other]
    except (AttributeError, KeyError, TypeError):
        return None


def make_plan(name, schedule, x, y, dtype, table, option=None, other=None, learned=False, kernel=None):
    """The plan for arguments whose types, dtypes, device and options have been checked; under a transform, of the reference.
    `kernel` is the op to call, where that is another one, with a table of its own."""
    tracing, backend, kernel = traced(), backend_for(x.device), kernel or name
    call = None if backend == "eager" else op(kernel, backend)
    careful = tracing or backend != "cpp"
    new_plan = Plan(kernel, table.rows, table.rows.size(0), table.note, table.noisy, dtype, call, careful, learned, backend)
    if not tracing and not transformed():
        schedule._plans[name, x.dtype, y.dtype, x.is_cpu or x.device, backends._choice.get(), option, other] = new_plan
    return new_plan


def backend_for(device):
    """Which backend's ops to call: "eager" under a transform, since no other carries one."""
    return "eager" if transformed() else backends.select_for(device)


def timestep(plan, t, x, begin=0):
    """`checks.timestep`, except that a tensor for a compiled op is passed on unchecked, since the op checks it."""
    if type(t) is int and begin <= t < plan.end:
        return None, t
    if isinstance(t, torch.Tensor) and not plan.careful:
        return t, 0
    return checks.timestep(t, x, plan.end, plan.note, begin)


def batched(gradient):
    """Whether a backward is under vmap, as torch.autograd.grad(is_grads_batched=True) runs it: in torch ops then."""
    return transformed() or (not torch.compiler.is_compiling() and _is_batched(gradient))


_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda gradient: False)  # pyright: ignore[reportAttributeAccessIssue]  # no stub


def traced():
    """Whether a tracer or another dispatch mode looks on: torch.compile, make_fx, a fake mode, a counter of operations. Then no
    value may be read, and ops have to be called as ops, which the mode sees, and not as the functions that they are made of."""
    return torch.compiler.is_compiling() or dispatch_modes() > 0


def makes_ahead(backend, x):
    """Whether a forward may make the derivative by x too, for an upstream gradient of 1: on the CPU, where that costs less than to
    make it in the backward."""
    return backend == "cpp" and x.is_cpu and not traced()


def multiplied(gradients, upstream):
    """Multiplies `gradients` in place by `upstream`, one number or one for each sample; the CPU's forward made them for an upstream
    of 1. False where that may not be done and the backward has to compute them: in half precision they would be rounded twice, and
    a loss is scaled because they underflow."""
    if traced() or type(upstream) is not torch.Tensor:
        return False
    if upstream.dim():
        if any(x.itemsize < 4 for x in gradients):
            return False
        for x in gradients:
            x.mul_(upstream.reshape(-1, *[1] * (x.dim() - 1)))
    elif upstream.item() != 1.0:
        if any(x.itemsize < 4 for x in gradients):
            return False
        for x in gradients:
            x.mul_(upstream)
    return True


def distinct(tensors):
    """The tensors as an autograd.Function takes them: dynamo refuses one that comes twice, so the second time it is a view."""
    if not torch.compiler.is_compiling():
        return tensors
    found = []
    for x in tensors:
        found.append(x.view_as(x) if any(x is other for other in found if other is not None) else x)
    return found


def compiled(name, x):
    """The compiled op `name`, where that is what to call on `x`; None for another backend, a tracer or a transform. The op checks
    all that memory safety needs, so it may be called before anything has been checked here."""
    if torch.compiler.is_compiling() or transformed():
        return None
    try:
        return _compiled[name, x.is_cpu or x.device, backends._choice.get()]
    except AttributeError:  # not a tensor
        return None
    except KeyError:
        pass
    try:
        op = DIRECT[name] if backends.select_for(x.device) == "cpp" else None
    except RuntimeError:  # a backend that is not available here, which is said only after what is wrong with the arguments
        return None
    _compiled[name, x.is_cpu or x.device, backends._choice.get()] = op
    return op


_compiled: dict[Any, Any] = {}


# {name of a backend: function that returns its op of a name}. A backend whose import takes long is imported only when it is needed,
# and enters itself here when it is. "cpp" is this module's own.
OPS_OF: dict[str, Any] = {}


def op(name, backend):
    """torch.ops.fastgen.<name>, or what another backend has in its place."""
    if backend == "triton":
        _import_backend(backend)
        return OPS_OF[backend](name)
    return OVERLOADS[name] if torch.compiler.is_compiling() else DIRECT[name]


def _import_backend(backend):
    if backend not in OPS_OF:
        importlib.import_module(f"fastgen.{backend}")


_import_backend._dynamo_marked_constant = True  # so that dynamo imports the backend while it traces, and finds the entry


def written(out):
    """`out`, to which a compiled op has written. Autograd is told so, or a backward would use a value that is no longer there."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)
    return out


def gathered(rows, t, index, dim):
    """The columns of each sample's row, shaped to broadcast against (B, *event); NaN for a timestep outside the table."""
    if t is None:
        return rows[index].unbind()
    inside = (t >= 0) & (t < rows.size(0))
    row = torch.where(inside.unsqueeze(1), rows[t.clamp(0, rows.size(0) - 1)], torch.nan)
    return row.reshape(*row.shape, *[1] * (dim - 1)).unbind(1)


def with_noise(y, sigma, noise):
    """y + sigma · noise; where sigma is 0 the noise is not looked at, were it infinite or NaN."""
    if noise is None:
        return y
    return torch.where(sigma == 0, y, y + sigma * noise.to(y.dtype))


def real_of(x, dtype):
    """Data in the dtype of the arithmetic. A byte u is u/127.5 − 1, rounded once: the formula of csrc/common/bytes.h."""
    if x.dtype is not torch.uint8:
        return x.to(dtype)
    c, s = (16843009 / 2**32, 2.0**-32) if dtype is torch.float64 else (65793 / 2**24, 2.0**-24)
    first = (2.0 * x.to(dtype) - 255.0) * c
    return first + first * s


def sum_of_events(x):
    """(B,): of each sample, 0 where it has no elements."""
    return x.flatten(1).sum(1) if x.dim() > 1 else x


def is_channels_last(x):
    """Whether `x` is (B, C, *spatial) with the strides of (B, *spatial, C), and not contiguous as well."""
    return x.dim() >= 3 and not x.is_contiguous() and x.permute(0, *range(2, x.dim()), 1).is_contiguous()


def has_channels_last_samples(x):
    """Whether the samples of `x` are channels-last, perhaps with gaps between them or between their positions, as in a half of the
    channels; SampleLayout in C++."""
    sizes, strides, step, positions = x.shape, x.stride(), 0, 1
    if x.dim() < 3 or x[:1].is_contiguous() or not (sizes[1] == 1 or strides[1] == 1):
        return False
    for size, stride in zip(sizes[:1:-1], strides[:1:-1], strict=True):
        if size == 1:
            continue
        if positions == 1:
            step = stride
        if stride != step * positions:
            return False
        positions *= size
    return step >= sizes[1] and (sizes[0] == 1 or strides[0] == 0 or strides[0] >= step * positions)


def empty_like(x, dtype=None, factor=1, samples=None, channels_last=None):
    """A tensor as a compiled op allocates it: channels-last where `x` is that and not contiguous too, else contiguous, unless it is
    said which; of `factor` times the channels, or of another number of samples."""
    dtype, shape = dtype or x.dtype, list(x.shape)
    if factor != 1:
        shape[1] = factor * shape[1]
    if samples is not None:
        shape[0] = samples
    if is_channels_last(x) if channels_last is None else channels_last:
        empty = torch.empty([shape[0], *shape[2:], shape[1]], dtype=dtype, device=x.device)
        return empty.permute(0, x.dim() - 1, *range(1, x.dim() - 1))
    return torch.empty(shape, dtype=dtype, device=x.device)


def gradients(operands, **found):
    """What a backward returns for the operands of an op: the gradients that were `found`, by name, and None for the others."""
    return tuple([found.get(name) for name in operands._fields])


def same_device(x, *others):
    """Raises a RuntimeError for tensors on several devices. The fakes call this, since torch calls a fake where one tensor among
    real ones is a meta tensor, and it has to refuse that as the kernels do."""
    for y in others:
        if y is not None and y.device != x.device:
            raise RuntimeError(f"expected tensors on {x.device}, got one on {y.device}")


def has(op):
    """Whether the loaded library has torch.ops.fastgen.<op>."""
    return backends.HAS_OPS and hasattr(torch.ops.fastgen, op)


def register_fake(*names):
    """Decorates the fake of the ops of these names: of their arguments, it takes the operands as one. <name>_out and <name>_torch
    get a fake too, where they are declared: their argument `out` is the result, or the first of two."""

    def register(fake):
        for name in names:
            _register(name, _ungrouped(fake, declared.OPS[name]))
            for into in (name + "_out", name + "_torch"):
                if into in declared.OPS:
                    _register(into, _out_fake(fake, declared.OPS[into]))
        return fake

    return register


def _ungrouped(fake, op):
    return lambda *arguments, **keywords: fake(*op.grouped(*arguments, **keywords))


def _out_fake(fake, op):
    def out_fake(*arguments, out, **keywords):
        given = op.grouped(*arguments, **keywords, out=out)
        if op.returns == "()":
            same_device(fake(given[len(op.before)]), out)
            return None
        made, other = fake(*given[:-1])
        same_device(made, out)
        return other

    return out_fake


def _register(name, fake):
    FAKES[name] = fake
    if not has(name):  # the library is absent, or lacks an op that is another's (`declared.Op.cuda`)
        return
    torch.library.register_fake(f"fastgen::{name}", fake)
    OVERLOADS[name] = getattr(torch.ops.fastgen, name).default
    DIRECT[name] = getattr(OVERLOADS[name], "_op", OVERLOADS[name])
