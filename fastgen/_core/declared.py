"""What there is of torch.ops.fastgen: one declaration of each op, in the words of a torch schema.

setup.py writes the C++ side of them from this (csrc/declarations.py), `dispatch` registers fakes, the Triton backend gets the
signatures of its functions; tests/test_declared.py holds the tests' lists of ops to it. torch is not imported, since setup.py runs
without it.

Most arguments of an op are the operands of its stem, the folder csrc/<stem>: they are declared once, stand for "..." in the
schemas of its ops, and travel together, in Python as `OPERANDS[stem]`, in C++ as a struct. ddim_step and q_step are other ops under
names of their own, so that a profile tells them apart.
"""

from __future__ import annotations

import inspect
import re
from collections import namedtuple
from typing import Any, NamedTuple

REQUIRED = inspect.Parameter.empty


class Argument(NamedTuple):
    type: str  # the schema's, without what it is aliased to: "Tensor", "SymInt?", "Tensor[]"
    name: str
    default: Any = REQUIRED
    written: bool = False  # whether the op writes to it
    declaration: str = ""  # as it stands in the schema


class Op(NamedTuple):
    name: str
    stem: str
    function: str  # what does it, by this name in csrc/<stem>/<stem>_op.cpp and fastgen/triton/<stem>.py
    before: tuple[Argument, ...]
    operands: tuple[Argument, ...]  # those of the stem, or none
    after: tuple[Argument, ...]
    returns: str
    keyword_only: int  # how many of the last arguments are
    cuda: bool
    triton: bool

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return self.before + self.operands + self.after

    @property
    def written(self) -> tuple[str, ...]:
        """The names of the arguments that it writes to."""
        return tuple(argument.name for argument in self.arguments if argument.written)

    @property
    def schema(self) -> str:
        arguments = [argument.declaration for argument in self.arguments]
        if self.keyword_only:
            arguments.insert(len(arguments) - self.keyword_only, "*")
        return f"{self.name}({', '.join(arguments)}) -> {self.returns}"

    def grouped(self, *arguments, **keywords) -> list:
        """The arguments of a call as `function` takes them: the operands as one."""
        declared, first = self.arguments, len(self.before)
        rest = declared[len(arguments) :]
        values = [*arguments, *(keywords.get(each.name, each.default) for each in rest)]
        unknown = keywords.keys() - {each.name for each in rest}
        if unknown or len(values) != len(declared) or any(value is REQUIRED for value in values):
            given = f"{len(arguments)} in order, by name {', '.join(keywords) or 'none'}"
            raise TypeError(f"expected the arguments of {self.schema}, got {given}")
        if not self.operands:
            return values
        last = first + len(self.operands)
        return [*values[:first], OPERANDS[self.stem](*values[first:last]), *values[last:]]


_ARGUMENT = re.compile(
    r"(?P<type>Tensor|SymInt|int|float|bool)(?P<alias>\(\w!\))?(?P<more>\[\]|\?)? (?P<name>\w+)(?:=(?P<default>\S+))?"
)
_SCHEMA = re.compile(r"(\w+)\((.*)\) -> (.+)")
_DEFAULTS = {"None": None, "True": True, "False": False}


def _argument(text: str) -> Argument:
    found = _ARGUMENT.fullmatch(text)
    if found is None:
        raise ValueError(f"no argument of a schema: {text!r}")
    default = found["default"]
    if default is None:
        value = REQUIRED
    elif default in _DEFAULTS:
        value = _DEFAULTS[default]
    elif found["type"] == "Tensor" or found["more"] == "[]":
        raise ValueError(f"no argument of a schema: {text!r}, whose default is none for its type")
    else:
        value = float(default) if found["type"] == "float" else int(default)
    return Argument(found["type"] + (found["more"] or ""), found["name"], value, found["alias"] is not None, text)


def _arguments(text: str) -> tuple[Argument, ...]:
    return tuple(map(_argument, text.split(", "))) if text else ()


def _op(stem: str, schema: str, operands: str, function: str | None = None, cuda: bool = True, triton: bool = True) -> Op:
    found = _SCHEMA.fullmatch(schema)
    if found is None:
        raise ValueError(f"no schema of an op: {schema!r}")
    name, arguments, returns = found.groups()
    arguments, star, keywords = arguments.partition(", *, ")
    before, dots, after = arguments.partition("...")
    last = _arguments(after.removeprefix(", ")) + _arguments(keywords)
    middle = _arguments(operands) if dots else ()
    first = _arguments(before.removesuffix(", "))
    return Op(name, stem, function or name, first, middle, last, returns, len(_arguments(keywords)) if star else 0, cuda, triton)


_WITH_LOG_PROB = "..., Tensor? noise, Tensor? seeds, SymInt? seed, Tensor? unconditional, float guidance"

# Of the ops that make torch's own noise, on the CPU: the states of its generators, which they put forward; the dtype of the noise
# that torch would have drawn, a `DType` of csrc/common/elementwise.h; whether its arithmetic fuses multiplications and additions.
_TORCH = "Tensor(s!) states, int noise_dtype, bool fused"
_CPU_ONLY = {"cuda": False, "triton": False}

# stem: (the operands, the ops). An op is a schema; or a schema and what there is to say about it.
_DECLARED: dict[str, tuple[str, tuple]] = {
    "q_sample": (
        # The defaults spare a common call the conversion of arguments that it does not use, some 0.05 µs each.
        "Tensor x, Tensor rows, Tensor? t, SymInt index, Tensor? noise=None, Tensor? seeds=None, SymInt? seed=None, "
        "SymInt offset=0",
        (
            "q_sample(...) -> Tensor",
            ("q_step(...) -> Tensor", {"function": "q_sample"}),
            "q_sample_out(..., *, Tensor(a!) out) -> ()",
            ("q_step_out(..., *, Tensor(a!) out) -> ()", {"function": "q_sample_out"}),
            (f"q_sample_torch({_TORCH}, ..., *, Tensor(a!) out) -> ()", _CPU_ONLY),
            (f"q_step_torch({_TORCH}, ..., *, Tensor(a!) out) -> ()", {"function": "q_sample_torch", **_CPU_ONLY}),
        ),
    ),
    "q_posterior": (
        "Tensor x0, Tensor x_t, Tensor rows, Tensor? t, SymInt index",
        ("q_posterior(...) -> (Tensor, Tensor, Tensor)",),
    ),
    "ddpm_step": (
        "Tensor x_t, Tensor model_output, Tensor rows, Tensor? t, SymInt index, Tensor? noise=None, Tensor? seeds=None, "
        "SymInt? seed=None, float? clip=None, Tensor? threshold=None, bool learned=False, Tensor? unconditional=None, "
        "float guidance=1.0",
        (
            "ddpm_step(...) -> Tensor",
            ("ddim_step(...) -> Tensor", {"function": "ddpm_step"}),
            "ddpm_step_x0(...) -> (Tensor, Tensor)",
            ("ddim_step_x0(...) -> (Tensor, Tensor)", {"function": "ddpm_step_x0"}),
            "ddpm_step_out(..., Tensor(b!)? x0=None, *, Tensor(a!) out) -> ()",
            ("ddim_step_out(..., Tensor(b!)? x0=None, *, Tensor(a!) out) -> ()", {"function": "ddpm_step_out"}),
            # What a scheduler's step mostly is: of 13 arguments the other six take 0.5 of 4 µs to be left out.
            (
                "ddpm_step_plain(Tensor x_t, Tensor model_output, Tensor rows, int index, Tensor? noise, int? seed, float? clip)"
                " -> (Tensor, Tensor)",
                {"triton": False},
            ),
            (f"ddpm_step_torch({_TORCH}, ..., Tensor(b!)? x0=None, *, Tensor(a!) out) -> ()", _CPU_ONLY),
            (
                f"ddim_step_torch({_TORCH}, ..., Tensor(b!)? x0=None, *, Tensor(a!) out) -> ()",
                {"function": "ddpm_step_torch", **_CPU_ONLY},
            ),
            (
                f"ddpm_step_torch_plain({_TORCH}, Tensor x_t, Tensor model_output, Tensor rows, int index, float? clip)"
                " -> (Tensor, Tensor)",
                _CPU_ONLY,
            ),
        ),
    ),
    "to_uint8": (
        "Tensor x",
        ("to_uint8(..., bool channels_last) -> Tensor", "to_uint8_out(..., *, Tensor(a!) out) -> ()"),
    ),
    "randn": (
        "Tensor? seeds, SymInt? seed, SymInt offset",
        (
            "randn(Tensor(a!) out, ...) -> ()",
            "randn_torch_cuda(Tensor(a!) out, ..., SymInt threads) -> ()",
            ("torch_randn(Tensor(a!) out, Tensor(s!) states, bool fused) -> ()", _CPU_ONLY),
            ("torch_skip(Tensor(s!) states, int words) -> ()", _CPU_ONLY),
        ),
    ),
    "bce_with_logits": (
        "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, int reduction",
        (
            "bce_with_logits(...) -> Tensor",
            "bce_with_logits_wide(...) -> Tensor",  # with a result of float32 in place of half precision, for autocast
            "bce_with_logits_backward(Tensor gradient, ...) -> Tensor",
        ),
    ),
    "gan_loss": (
        "Tensor[] logits, int real, int kind, float smoothing, int reduction",
        ("gan_loss(..., bool monitors, bool gradients) -> Tensor[]", "gan_loss_backward(Tensor gradient, ...) -> Tensor[]"),
    ),
    "diffusion_loss": (
        "Tensor model_output, Tensor x0, Tensor rows, Tensor? t, SymInt index, Tensor? noise, Tensor? seeds, SymInt? seed, "
        "SymInt offset, Tensor? weights, int prediction, int loss, float delta, int reduction",
        (
            "diffusion_loss(...) -> Tensor",
            ("diffusion_loss_and_gradient(...) -> (Tensor, Tensor)", _CPU_ONLY),
            "diffusion_loss_backward(Tensor gradient, ...) -> Tensor",
            "diffusion_loss_backward_x0(Tensor gradient, ...) -> (Tensor, Tensor)",
        ),
    ),
    "vlb_terms": (
        "Tensor model_output, Tensor x0, Tensor rows, Tensor? t, SymInt index, Tensor? x_t, Tensor? noise, Tensor? seeds, "
        "SymInt? seed, SymInt offset, float? clip, bool learned, int decoder, float scale, bool each_sample, "
        "int loss, float delta, Tensor? weights, float vlb_weight",
        (
            "vlb_terms(...) -> Tensor",
            (
                "vlb_terms_and_gradient(..., bool detach_mean, bool apart) -> (Tensor, Tensor, Tensor)",
                _CPU_ONLY,
            ),
            ("vlb_terms_and_error(...) -> (Tensor, Tensor)", _CPU_ONLY),
            "vlb_terms_backward(Tensor gradient, ..., bool detach_mean) -> Tensor",
        ),
    ),
    "step_log_prob": (
        "Tensor x_t, Tensor model_output, Tensor rows, Tensor? t, SymInt index, float? clip, bool learned, float scale",
        (
            "step_log_prob(Tensor x_prev, ...) -> Tensor",
            "step_log_weight(Tensor x_prev, ...) -> Tensor",  # with a table of its own
            ("step_log_prob_and_gradient(Tensor x_prev, ...) -> (Tensor, Tensor)", _CPU_ONLY),
            "step_log_prob_backward(Tensor gradient, Tensor x_prev, ...) -> Tensor",
            "step_log_prob_backward_x(Tensor gradient, Tensor x_prev, ...) -> (Tensor, Tensor)",
            f"ddpm_step_log_prob({_WITH_LOG_PROB}) -> (Tensor, Tensor)",
            (f"ddim_step_log_prob({_WITH_LOG_PROB}) -> (Tensor, Tensor)", {"function": "ddpm_step_log_prob"}),
            f"ddpm_step_log_prob_out({_WITH_LOG_PROB}, *, Tensor(a!) out) -> Tensor",
            (f"ddim_step_log_prob_out({_WITH_LOG_PROB}, *, Tensor(a!) out) -> Tensor", {"function": "ddpm_step_log_prob_out"}),
        ),
    ),
    "reparameterize": (
        "Tensor log_variance, Tensor? noise, Tensor? seeds, SymInt? seed, SymInt offset, float lowest, float highest",
        (
            "reparameterize(Tensor mean, ...) -> Tensor",
            "reparameterize_kl(Tensor mean, ...) -> (Tensor, Tensor)",
            "reparameterize_backward(Tensor gradient, ...) -> Tensor",
            "reparameterize_kl_backward(Tensor gradient, Tensor kl_gradient, Tensor mean, ...) -> (Tensor, Tensor)",
        ),
    ),
    "gaussian_kl": (
        "Tensor mean, Tensor log_variance, Tensor? other_mean, Tensor? other_log_variance, float lowest, float highest",
        ("gaussian_kl(...) -> Tensor", "gaussian_kl_backward(Tensor gradient, ...) -> (Tensor, Tensor, Tensor)"),
    ),
}

STEMS = tuple(_DECLARED)


def _operands(stem: str, text: str) -> type:
    arguments = _arguments(text)
    defaults = [argument.default for argument in arguments if argument.default is not REQUIRED]
    return namedtuple(_struct(stem), [argument.name for argument in arguments], defaults=defaults)


def _struct(stem: str) -> str:
    """The operands' name, in C++ too."""
    return stem.title().replace("_", "") + "Operands"


OPERANDS: dict[str, Any] = {stem: _operands(stem, operands) for stem, (operands, _) in _DECLARED.items()}
OPS: dict[str, Op] = {}  # by name
for _stem, (_text, _schemas) in _DECLARED.items():
    for _schema in _schemas:
        _schema, _more = (_schema, {}) if isinstance(_schema, str) else _schema
        _made = _op(_stem, _schema, _text, **_more)
        OPS[_made.name] = _made
