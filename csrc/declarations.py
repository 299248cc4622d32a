"""Writes the C++ side of fastgen/_core/declared.py: for each stem a header, declared/<stem>.h, with the struct of its operands, the
prototypes of the functions that csrc/<stem>/<stem>_op.cpp defines, and the registration of its ops with torch."""

import runpy
from pathlib import Path

DECLARED = runpy.run_path(str(Path(__file__).resolve().parent.parent / "fastgen/_core/declared.py"))
TYPES = {
    "Tensor": "const Tensor&",
    "Tensor?": "const OptionalTensor&",
    "Tensor[]": "const std::vector<Tensor>&",
    "SymInt": "int64_t",
    "SymInt?": "std::optional<int64_t>",
    "int": "int64_t",
    "int?": "std::optional<int64_t>",
    "float": "double",
    "float?": "std::optional<double>",
    "bool": "bool",
}
RESULTS = {
    "()": "void",
    "Tensor": "Tensor",
    "(Tensor, Tensor)": "std::tuple<Tensor, Tensor>",
    "(Tensor, Tensor, Tensor)": "std::tuple<Tensor, Tensor, Tensor>",
    "Tensor[]": "std::vector<Tensor>",
}


def parameters(arguments):
    return [f"{TYPES[argument.type]} {argument.name}" for argument in arguments]


def on_some_devices(op, lines):
    """The lines where the library that is compiled has the op."""
    return lines if op.cuda else ["#ifndef FG_DEVICE_KERNELS", *lines, "#endif"]


def header(stem):
    ops = [op for op in DECLARED["OPS"].values() if op.stem == stem]
    struct = DECLARED["OPERANDS"][stem].__name__
    operands = next(op.operands for op in ops if op.operands)
    lines = [
        "// Written by csrc/declarations.py from fastgen/_core/declared.py.",
        "#pragma once",
        '#include "common/op.h"',
        "namespace fastgen {",
        "namespace {",
        f"struct {struct} {{",
        *(f"  {parameter};" for parameter in parameters(operands)),
        "};",
    ]
    for op in ops:
        result = RESULTS[op.returns]
        names = [argument.name for argument in op.arguments]
        if op.operands:
            first, last = len(op.before), len(op.before) + len(op.operands)
            taken = [*parameters(op.before), f"const {struct}& operands", *parameters(op.after)]
            given = [*names[:first], f"{struct}{{{', '.join(names[first:last])}}}", *names[last:]]
        else:
            taken, given = parameters(op.arguments), names
        written = [f"{result} {op.function}({', '.join(taken)});"] if op.function == op.name else []
        call = f"{op.function}({', '.join(given)})"
        written.append(f"inline {result} called_{op.name}({', '.join(parameters(op.arguments))}) {{ return {call}; }}")
        lines += on_some_devices(op, written)
    lines += ["}  // namespace", "}  // namespace fastgen", "#ifndef FG_CUDA", "STABLE_TORCH_LIBRARY_FRAGMENT(fastgen, library) {"]
    for op in ops:
        lines += on_some_devices(op, [f'  library.def("{op.schema}");'])
    lines += ["}", "#endif", "STABLE_TORCH_LIBRARY_IMPL(fastgen, FG_DEVICE, library) {"]
    for op in ops:
        lines += on_some_devices(op, [f'  library.impl("{op.name}", TORCH_BOX(&fastgen::called_{op.name}));'])
    return "\n".join([*lines, "}", ""])


def write(directory: Path) -> None:
    """The headers, into `directory`/declared; one that says the same already is left alone, so that nothing is compiled again."""
    folder = Path(directory) / "declared"
    folder.mkdir(parents=True, exist_ok=True)
    for stem in DECLARED["STEMS"]:
        path, text = folder / f"{stem}.h", header(stem)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
