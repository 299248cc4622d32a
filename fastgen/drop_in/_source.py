"""Whether a function's code is one that has been tested: a fingerprint of its source."""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import inspect
import textwrap
import types
from typing import NamedTuple

# What two Pythons write differently for the same code, and what says nothing about what it does
_IGNORED = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx"}


def fingerprint(function) -> str | None:
    """16 hexadecimal digits for what a function or method does: its syntax tree without documentation and annotations, its
    decorators, the values of its defaults, and what its global names stand for: functions and classes of its own package count by
    their own code, those of other packages by name, constants by value. None where that cannot be known: no source, a wrapper
    that its source does not show, variables of a function around it.

    The syntax tree and not the bytecode, which is another one in every Python. Copies of one text in several packages, or under
    other comments, have one fingerprint; a change of a constant, a default or a helper gives another.
    """
    return _fingerprint(function, ())


def _fingerprint(function, above):
    function, wrappers = _unwrapped(getattr(function, "__func__", function))
    if not isinstance(function, types.FunctionType) or set(function.__code__.co_freevars) - {"__class__"}:
        return None
    read = _read(function.__code__, function.__code__.co_filename)
    if read is None or read.decorators != wrappers:
        return None
    parts = [read.text, repr(function.__defaults__), repr(sorted((function.__kwdefaults__ or {}).items()))]
    above = (*above, function)
    for name, attributes in read.names.items():
        if name in function.__globals__:
            meaning = _meaning(function.__globals__[name], attributes, function, above)
            if meaning is None:
                return None
            parts.append(f"{name}: {meaning}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _unwrapped(function):
    """The function as it was written, and by how many decorators of torch's (no_grad, inference_mode, autocast) it is wrapped. Of
    other wrappers, which may do anything, it is the outermost that counts as the function."""
    wrappers = 0
    while hasattr(function, "__wrapped__"):
        if replaced_by(function) is None:  # a patch's own wrapper stands for what it replaces
            if _package(function.__globals__.get("__name__", "")) != "torch":
                break
            wrappers += 1
        function = function.__wrapped__
    return function, wrappers


def mark_replacement(function, original) -> None:
    """Says of a patch's function what it has been put in the place of."""
    function._fastgen_replaces = function, original


def replaced_by(function):
    """What a patch's function, or a method of it, has been put in the place of; None for other functions. functools.wraps gives
    what wraps it the same attributes, so the mark says whose it is."""
    function = getattr(function, "__func__", function)
    mark = getattr(function, "_fastgen_replaces", None)
    return mark[1] if mark is not None and mark[0] is function else None


def syntax_tree(function) -> ast.FunctionDef | None:
    """Of one that is written by `def`; None for others, and where there is no source."""
    read = _read(function.__code__, function.__code__.co_filename) if isinstance(function, types.FunctionType) else None
    return read and read.tree


class _Read(NamedTuple):
    tree: ast.FunctionDef
    text: str
    decorators: int  # other than staticmethod, classmethod, property and its setter
    names: dict[str, list[str]]  # that it reads, and which attributes of each


@functools.lru_cache(maxsize=1024)
def _read(code, filename) -> _Read | None:
    """What the source of a code object says. Kept by that and not by the function, which may be given other code; and by the file,
    since code objects of two files are equal that differ in a decorator."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    names = {node.id: set() for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names[node.value.id].add(node.attr)
    decorators = sum(not _makes_a_method(each) for each in tree.decorator_list)
    return _Read(tree, _text(tree), decorators, {name: sorted(names[name]) for name in sorted(names)})


def _makes_a_method(decorator):
    if isinstance(decorator, ast.Attribute):
        return decorator.attr in ("getter", "setter", "deleter")
    return isinstance(decorator, ast.Name) and decorator.id in ("staticmethod", "classmethod", "property")


def _text(node) -> str:
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if name not in _IGNORED}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            fields["body"] = node.body[1:]
        inside = (f"{name}={_text(value)}" for name, value in fields.items() if value is not None and value != [])
        return f"{type(node).__name__}({', '.join(inside)})"
    return f"[{', '.join(map(_text, node))}]" if isinstance(node, list) else repr(node)


def _meaning(value, attributes, function, above):
    """What a global name of `function` stands for, of which it reads `attributes`, in words that are the same in every copy of its
    package; None where it cannot be known."""
    if isinstance(value, types.ModuleType):
        if _package(value.__name__) != _package(function.__module__):
            return f"module {value.__name__}"
        inside = [(name, _meaning(getattr(value, name, None), [], function, above)) for name in attributes]
        return None if any(meaning is None for _, meaning in inside) else f"module with {inside}"
    if value in above if isinstance(value, (types.FunctionType, type)) else False:
        return "itself"
    if isinstance(value, (types.FunctionType, type)) and _package(value.__module__) == _package(function.__module__):
        return _code_of_class(value, above) if isinstance(value, type) else _fingerprint(value, above)
    if callable(value) and hasattr(value, "__qualname__"):
        package = _package(getattr(value, "__module__", None) or "")
        return package if package == "tqdm" else f"{package} {value.__qualname__}"  # tqdm.auto has another class in a notebook
    return _constant(value)


def _code_of_class(kind, above):
    """Of an enumeration its names, of a tuple its fields, of others what they are made of: functions, constants, bases of their
    own package. Of a dataclass its fields, those of its bases among them, stand for what it has made of them, which has no source.
    """
    if issubclass(kind, enum.Enum):
        return f"enumeration {list(kind.__members__)}"
    if issubclass(kind, tuple):
        return f"tuple {getattr(kind, '_fields', None)}"
    above, members, fields = (*above, kind), dict(vars(kind)), ""
    bases = [base for base in kind.__bases__ if _package(base.__module__) == _package(kind.__module__)]
    if "__dataclass_fields__" in members:
        found = dataclasses.fields(kind)
        fields, bases = f" of {[(x.name, _constant(x.default)) for x in found]}", []
        own = {x.name for x in found}
        members = {name: value for name, value in members.items() if name not in own and not _made_by_dataclass(value)}
    meanings = [(name, _meaning_of_member(name, value, above)) for name, value in members.items()]
    meanings += [("bases", _code_of_class(base, above)) for base in bases]
    if any(meaning is None for _, meaning in meanings):
        return None
    return f"class{fields} {sorted((name, meaning) for name, meaning in meanings if meaning)}"


def _made_by_dataclass(value):
    return isinstance(value, types.FunctionType) and inspect.unwrap(value).__code__.co_filename == "<string>"


def _meaning_of_member(name, value, above):
    """What an attribute of a class stands for; "" for what every class has, None where it cannot be known."""
    if isinstance(value, types.FunctionType):
        return _fingerprint(value, above)
    if isinstance(value, (staticmethod, classmethod)):
        code = _fingerprint(value.__func__, above) if isinstance(value.__func__, types.FunctionType) else None
        return code and f"{type(value).__name__} {code}"
    if isinstance(value, property):
        codes = [function and _fingerprint(function, above) for function in (value.fget, value.fset, value.fdel)]
        known = all(code for code, function in zip(codes, (value.fget, value.fset, value.fdel), strict=True) if function)
        return f"property {codes}" if known else None
    if (name.startswith("__") and name.endswith("__")) or name == "_abc_impl":
        return ""
    return None if hasattr(value, "__get__") else _constant(value)


def _constant(value):
    """Numbers, strings and what holds them, by value; other objects by their kind."""
    if isinstance(value, (int, float, complex, str, bytes, type(None))):
        return repr(value)
    if isinstance(value, dict):
        return f"dict {[(_constant(k), _constant(v)) for k, v in value.items()]}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} {[_constant(x) for x in value]}"
    if isinstance(value, (set, frozenset)):
        return f"set {sorted(_constant(x) for x in value)}"
    if hasattr(value, "tolist"):  # an array or a tensor
        return f"{type(value).__name__} {value.tolist()}"
    return type(value).__name__


def _package(module: str) -> str:
    return module.partition(".")[0]
