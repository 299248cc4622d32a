"""The Triton backend: the ops of the compiled libraries, by the same names and with the same arguments; but for the CPU's own.

Imported where the backend is first used, since it imports Triton. What a tracer (torch.compile, make_fx, …) looks at
calls `torch.ops.fastgen_triton.<op>`, each a `torch.library.triton_op`, so that Inductor sees the kernels; else the function that
is the op is called directly, which saves some 30 µs.
"""

from __future__ import annotations

import functools
import importlib
import inspect

import torch

from .._core import declared, dispatch
from .common.direct import Direct
from .common.op import INTERPRETED

# How torch reads a schema's types off a function.
_TYPES = {
    "Tensor": torch.Tensor,
    "Tensor?": torch.Tensor | None,
    "Tensor[]": list[torch.Tensor],
    "SymInt": int,
    "SymInt?": int | None,
    "int": int,
    "int?": int | None,
    "float": float,
    "float?": float | None,
    "bool": bool,
}
_RESULTS = {
    "()": None,
    "Tensor": torch.Tensor,
    "Tensor[]": list[torch.Tensor],
    "(Tensor, Tensor)": tuple[torch.Tensor, torch.Tensor],
    "(Tensor, Tensor, Tensor)": tuple[torch.Tensor, torch.Tensor, torch.Tensor],
}


def _signature(op):
    parameters, optional = [], False
    for argument in op.arguments:
        kind, default = _TYPES[argument.type], argument.default
        # A tensor that is given by keyword only is one without a default, and torch takes neither after an argument that has one:
        # it becomes one that may be None, and never is.
        if optional and default is declared.REQUIRED:
            kind, default = kind | None, None
        optional = optional or default is not declared.REQUIRED
        how = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(argument.name, how, annotation=kind, default=default))
    return inspect.Signature(parameters, return_annotation=_RESULTS[op.returns])


def _function(op):
    """The op's function as torch takes it, and `Direct`: with the arguments that are declared, one by one."""
    grouping = getattr(importlib.import_module(f".{op.stem}", __name__), op.function)

    @functools.wraps(grouping)  # so that torch, which looks for the kernels in the source, finds them
    def function(*arguments, **keywords):
        return grouping(*op.grouped(*arguments, **keywords))

    function.__signature__ = _signature(op)
    return function


# name of the op: (the function, the arguments that it writes to)
FUNCTIONS = {name: (_function(op), op.written) for name, op in declared.OPS.items() if op.triton}


def _registered(name, function, written):
    full_name = f"fastgen_triton::{name}"
    if not INTERPRETED:
        return torch.library.triton_op(full_name, function, mutates_args=written)
    # the interpreter's kernels take no symbolic sizes, so a tracer may not look inside
    made = torch.library.custom_op(full_name, function, mutates_args=written)
    made.register_fake(dispatch.FAKES[name] if not written else lambda *arguments, **keywords: None)
    return made


_REGISTERED = {name: _registered(name, *rest) for name, rest in FUNCTIONS.items()}
_TRACED = {name: getattr(torch.ops.fastgen_triton, name).default for name in FUNCTIONS}


_CALLED = {name: function if INTERPRETED else Direct(function) for name, (function, _) in FUNCTIONS.items()}


def op(name):
    return _TRACED[name] if dispatch.traced() else _CALLED[name]


dispatch.OPS_OF["triton"] = op
