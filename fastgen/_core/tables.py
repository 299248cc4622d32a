"""Coefficient tables: computed once in float64, cast once, kept per device; the kernels gather one row of them per sample."""

from __future__ import annotations

import contextlib
import weakref
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

# The columns, op by op. csrc/<op>/<op>.h names the same columns in the same order. `y_from_x` is the coefficient of x in y, and
# so on; `step_columns` has the formula.
Q_SAMPLE_COLUMNS = ("scale", "sigma")
DIFFUSION_LOSS_COLUMNS = ("target_from_x0", "target_from_noise", "weight")
Q_POSTERIOR_COLUMNS = ("mean_from_x0", "mean_from_x", "variance", "log_variance")
DDPM_STEP_COLUMNS = (
    *("x0_from_x", "x0_from_m", "y_from_x0", "y_from_x", "y_from_x_unclipped", "y_from_m_unclipped"),
    *("sigma", "slope", "intercept", "y_from_m"),
)

STEP_LOG_WEIGHT_COLUMNS = (
    *("x0_from_x", "x0_from_m", "y_from_x0", "y_from_x", "y_from_x_unclipped", "y_from_m_unclipped"),
    *("inverse_sigma", "slope", "intercept", "y_from_m", "forward_scale", "forward_inverse_sigma", "prior"),
)
VLB_TERMS_COLUMNS = (
    *("scale", "sigma", "x0_from_x", "x0_from_m", "mean_from_x0", "log_posterior_variance", "slope", "intercept"),
    *("constant", "precision", "decoder", "target_from_x0", "target_from_noise", "loss_weight"),
)

_NOISE_COLUMN = {
    "q_sample": Q_SAMPLE_COLUMNS.index("sigma"),
    "q_step": Q_SAMPLE_COLUMNS.index("sigma"),
    "ddpm_step": DDPM_STEP_COLUMNS.index("sigma"),
    "ddim_step": DDPM_STEP_COLUMNS.index("sigma"),
}


class Table(NamedTuple):
    """Coefficient rows on one device."""

    rows: torch.Tensor  # (T, columns), float32 or float64; (T-1, columns) where the last step has no finite coefficients
    noisy: bool  # False where every noise coefficient is 0, so that no noise has to be drawn
    note: str  # why there are only T-1 rows, or ""


class Tables:
    """An owner of coefficient tables. `_rows` computes one when it is first asked for, and it is kept for each dtype and device."""

    __slots__ = ("_plans", "_tables", "__weakref__")

    def __init__(self):
        object.__setattr__(self, "_plans", {})  # the plans that dispatch.plan looks up
        object.__setattr__(self, "_tables", {})
        _BY_ID[id(self)] = self

    def _rows(self, key: tuple) -> tuple[np.ndarray, str]:
        """The float64 rows of the table `key`, whose first entry is the op, and why some are missing."""
        raise NotImplementedError

    def _check_float32(self, rows: np.ndarray) -> None:
        """Raises an error for rows that are finite in float64 and not in float32, where a subclass cannot have them."""

    def _table(self, key: tuple, device: torch.device, dtype: torch.dtype) -> Table:
        """The cached table of `key` on `device`, in float64 where `dtype` is float64, else in float32."""
        if torch.compiler.is_compiling():
            return _constant_table(id(self), tuple(map(constant, key)), dtype is torch.float64, device)
        table = self._tables.get((key, dtype is torch.float64, device))
        if table is None:
            table = self._make_table(key, dtype is torch.float64, device)
        return table if fake_mode() is None else table._replace(rows=let_in(table.rows))

    def _make_table(self, key: tuple, double: bool, device: torch.device) -> Table:
        rows, note = self._rows(key)
        if not double:
            self._check_float32(rows)
        noisy = bool(np.any(rows[:, _NOISE_COLUMN[key[0]]] != 0)) if key[0] in _NOISE_COLUMN else False
        with plain_tensors():
            tensor = torch.tensor(rows, dtype=torch.float64 if double else torch.float32, device=device)
        # torch._dynamo.mark_static does this. Without it dynamic=True makes the length a symbol, and no guard can say whose it is.
        tensor._dynamo_static_indices = {0, 1}  # pyright: ignore[reportAttributeAccessIssue]  # Dynamo's own
        return self._tables.setdefault((key, double, device), Table(tensor, noisy, note))


class Coefficients(Tables):
    """Another library's coefficients of one op, in the place of a `Schedule`: float64 rows (T, columns), NaN where that library
    has no step."""

    __slots__ = ("op", "rows")

    def __init__(self, op: str, rows: np.ndarray):
        super().__init__()
        self.op = op
        self.rows = rows

    def _rows(self, key):
        return self.rows, ""

    def table(self, device: torch.device, dtype: torch.dtype) -> Table:
        return self._table((self.op,), device, dtype)


def step_columns(
    x0_from_x,
    x0_from_m,
    y_from_x0,
    y_from_x,
    sigma,
    slope: np.ndarray | float = 0.0,
    intercept: np.ndarray | float = 0.0,
    y_from_m: np.ndarray | float = 0.0,
):
    """The columns of a reverse step, `DDPM_STEP_COLUMNS`, in which A and B are what the others come to where x0 is not clipped:

        x0 = P·x_t + Q·m        y = U·x0 + V·x_t + W·m + S·z  =  A·x_t + B·m + S·z

    P and Q are `x0_from_x` and `x0_from_m`, U, V and W `y_from_x0`, `y_from_x` and `y_from_m`, A and B `y_from_x_unclipped` and
    `y_from_m_unclipped`, S is `sigma`. With a learned variance S is 0 or 1 and the deviation is S·exp(L·v + M), where L is `slope`,
    M is `intercept` and v is what the network says of the variance.
    """
    with np.errstate(invalid="ignore"):
        unclipped = y_from_x0 * x0_from_x + y_from_x, y_from_x0 * x0_from_m + y_from_m
        columns = x0_from_x, x0_from_m, y_from_x0, y_from_x, *unclipped, sigma, slope, intercept, y_from_m
    return np.stack(np.broadcast_arrays(*columns), axis=1)


def fake_mode():
    """The FakeTensorMode that is on, or None."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def let_in(tensor):
    """`tensor`, which was made outside the fake mode that is on, as that mode takes it: by this op alone. In make_fx the tensor
    becomes a constant of the graph."""
    return torch.ops.aten.lift_fresh(tensor)


def making_graph() -> bool:
    """Whether make_fx is tracing."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


@contextlib.contextmanager
def plain_tensors():
    """Whatever the caller is in the middle of, what is made in this context is an ordinary tensor: no fake, traced, inference or
    torch.func tensor may enter a cache."""
    with torch.inference_mode(False), _disable_current_modes(), torch._C._DisableFuncTorch():
        yield


# Dynamo makes id(tables) a constant and guards it; before torch 2.12 it can give a constant function no other objects.
_BY_ID: weakref.WeakValueDictionary[int, Tables] = weakref.WeakValueDictionary()


def _constant_table(identity: int, key: tuple, double: bool, device: torch.device) -> Table:
    """The table that a traced program uses: a constant of the graph, guarded by the identity of its owner."""
    tables = _BY_ID[identity]
    return tables._tables.get((key, double, device)) or tables._make_table(key, double, device)


# torch.compiler.assume_constant_result does this, but to call it would import the whole compiler with this module.
_constant_table._dynamo_marked_constant = True


def constant(value):
    """`value`, in a traced program as a constant of the graph: dynamic=True makes a float a symbol, an argument's default too."""
    if type(value) is float and torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_scalar  # which the tracer has imported, and fastgen need not

        return guard_scalar(value)
    return value
