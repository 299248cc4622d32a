"""What of a network is looked at: where its weights are, what it returns, and its fingerprint, by which a recorded chain is known
to hold still."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from .._core import checks

# Values of these types cannot change inside: two of them are compared as they are.
COMPARED_BY_VALUE = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))


def first_weight(model) -> torch.Tensor | None:
    """The first of `model.parameters()` that is floating, looked for at each call: torch's own iterator takes 2.5 times as long."""
    if not isinstance(model, nn.Module):
        return None
    if type(model).parameters is not nn.Module.parameters:
        return next((p for p in model.parameters() if p.dtype in checks.FLOATING), None)
    todo, seen = [model], set()
    while todo:
        m = todo.pop()
        if m is None or id(m) in seen:
            continue
        seen.add(id(m))
        for p in list(m._parameters.values()):
            if p is not None and p.dtype in checks.FLOATING:
                return p
        todo += list(m._modules.values())[::-1]
    return None


def output_of(returned) -> torch.Tensor:
    """The tensor in what a network has returned."""
    m = returned
    if not isinstance(m, torch.Tensor):
        m = m[0] if isinstance(m, tuple) and m else getattr(m, "sample", None)
    if not isinstance(m, torch.Tensor):
        expected = "a tensor, a tuple that begins with one, or an object with one as .sample"
        raise TypeError(f"model: expected it to return {expected}, got {type(returned).__name__}")
    return m


def can_be_seen_into(model) -> bool:
    """Whether the fingerprint shows a change of the network; else a replay would go on with what was there first."""
    modules = _modules(model)
    return bool(modules) and not any(isinstance(m, torch.jit.ScriptModule) for m in modules)


def fingerprint(model) -> list:
    """What a graph of this network takes for given: which modules it has, where their weights lie, their hooks and what else is an
    attribute of one. It takes 6 µs for each module."""
    found = [_fingerprint_of(hooks) for hooks in _HOOKS_OF_ALL_MODULES]
    for m in _modules(model):
        found.append(type(m))
        if isinstance(m, torch.jit.ScriptModule):  # its parameters and buffers are kept in C++, not among its attributes
            found += m.training, [location(x) for x in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
        for name, value in list(vars(m).items()):
            if name in _WITHOUT_PART_IN_A_CALL:
                continue
            cls = type(value)
            if cls in COMPARED_BY_VALUE:
                found += name, cls, value
            elif cls is not dict or value:  # most of a module's dicts are empty
                found += name, _fingerprint_of(value)
    return found


def location(x: torch.Tensor | None):
    """Where a tensor lies and how: two tensors have it in common only where a graph that reads the one reads the other."""
    if x is None:
        return None
    if type(x) in (torch.Tensor, nn.Parameter) and x.layout is torch.strided:
        return x.data_ptr(), x.dtype, x.shape, x.stride()
    return _Identity(x)  # a sparse tensor, or one of a subclass, may have no address


# A module's own attributes but these are hooks of gradients and of state dicts, which a call does not reach.
_PART_OF_A_CALL = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "training")
_WITHOUT_PART_IN_A_CALL = frozenset(vars(nn.Module())).difference(_PART_OF_A_CALL)
_HOOKS_OF_ALL_MODULES = nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks
_MOST_ENTRIES = 1000  # a list or a dict that has more is not looked through
_DEEPEST = 5  # nor is one that lies within so many others


def _modules(model) -> list[nn.Module]:
    """`model.modules()`, also while another thread adds some, which iterators over dicts do not survive."""
    found = {id(model): model} if isinstance(model, nn.Module) else {}
    todo = list(found.values())
    for m in todo:
        for child in list(m._modules.values()):
            if child is not None and id(child) not in found:
                found[id(child)] = child
                todo.append(child)
    return todo


def _fingerprint_of(value, depth=0):
    """What is equal only while a graph need not be recorded anew for this attribute: of a number or a string the value, of a tensor
    the location, of a list or a dict what it holds; of anything else the identity."""
    cls = type(value)
    if cls in COMPARED_BY_VALUE:
        return cls, value
    if isinstance(value, torch.Tensor):
        return location(value)
    if isinstance(value, nn.Module):
        return weakref.ref(value)  # two of these are equal as long as their modules live and are one
    if isinstance(value, (dict, list, tuple, set, frozenset)) and len(value) <= _MOST_ENTRIES and depth < _DEEPEST:
        if not value:
            return cls
        if isinstance(value, dict):
            return cls, [(key, _fingerprint_of(x, depth + 1)) for key, x in list(value.items())]
        return cls, [_fingerprint_of(x, depth + 1) for x in list(value)]
    return _Identity(value)


class _Identity:
    """Which object it was: equal to that of no other, not even of one that lies where the first did, as an id would be."""

    def __init__(self, x):
        try:
            self._x = weakref.ref(x)
        except TypeError:  # a list, for one, cannot be referred to weakly
            self._x = lambda: x

    def __eq__(self, other):
        x = self._x()
        return x is not None and isinstance(other, _Identity) and x is other._x()
