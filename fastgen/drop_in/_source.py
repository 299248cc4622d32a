"""Whether a function's code is one that has been tested: a fingerprint of its source."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
import types

# What two Pythons write differently for the same code, and what says nothing about what it does
_IGNORED = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx"}


def fingerprint(function) -> str | None:
    """16 hexadecimal digits for what a function or method does: its syntax tree without documentation and annotations, its
    decorators, the values of its defaults, and what its global names stand for: functions of its own package count by their own
    fingerprints, those of other packages by name. None where that cannot be known: no source, a wrapper that its source does not
    show.

    The syntax tree and not the bytecode, which is another one in every Python. Copies of one text in several packages, or under
    other comments, have one fingerprint; a change of a constant, a default or a helper gives another.
    """
    return _fingerprint(function, ())


def _fingerprint(function, above):
    function, wrappers = _unwrapped(getattr(function, "__func__", function))
    tree = syntax_tree(function)
    if tree is None or len(tree.decorator_list) != wrappers:
        return None
    parts = [_text(tree), repr(function.__defaults__), repr(sorted((function.__kwdefaults__ or {}).items()))]
    above = (*above, function)
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & function.__globals__.keys()):
        meaning = _meaning(function.__globals__[name], function, above)
        if meaning is None:
            return None
        parts.append(f"{name}: {meaning}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _unwrapped(function):
    """The function as it was written, and by how many decorators of torch's (no_grad, inference_mode, autocast) it is wrapped. Of
    other wrappers, which may do anything, it is the outermost that counts as the function."""
    wrappers = 0
    while hasattr(function, "__wrapped__"):
        if not hasattr(function, "_fastgen_replaces"):  # a patch's own wrapper stands for what it replaces
            if _package(function.__globals__.get("__name__", "")) != "torch":
                break
            wrappers += 1
        function = function.__wrapped__
    return function, wrappers


@functools.lru_cache(maxsize=1024)
def syntax_tree(function) -> ast.FunctionDef | None:
    """Of one that is written by `def`; None for others, and where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) and isinstance(function, types.FunctionType) else None


def _text(node) -> str:
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if name not in _IGNORED}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            fields["body"] = node.body[1:]
        inside = (f"{name}={_text(value)}" for name, value in fields.items() if value is not None and value != [])
        return f"{type(node).__name__}({', '.join(inside)})"
    return f"[{', '.join(map(_text, node))}]" if isinstance(node, list) else repr(node)


def _meaning(value, function, above):
    """What a global name of `function` stands for, in words that are the same in every copy of its package."""
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}" if _package(value.__name__) != _package(function.__module__) else "module"
    own = _package(getattr(value, "__module__", None) or "") == _package(function.__module__)
    if isinstance(value, types.FunctionType) and own:
        return "itself" if value in above else _fingerprint(value, above)
    if own:
        return type(value).__name__
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return repr(value) if isinstance(value, (int, float, complex, str, bytes, bool, type(None))) else type(value).__name__


def _package(module: str) -> str:
    return module.partition(".")[0]
