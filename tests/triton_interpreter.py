"""Triton's interpreter, mended where it would be wrong or slow (as of 3.6 … 3.9).

It cuts the lower bits off where float32 becomes bfloat16, which no test of one rounding would pass: here that rounds to the
nearest, and NaN stays NaN, as on a GPU. A condition that is one number becomes integers where it is spread over a tile, which 3.9
refuses as a mask: here it stays a condition. A number that bounds a loop is an array of one element, which 3.6 cannot make an int
of beside NumPy 2.4. And it takes `triton.language` apart and puts it together again at each call of a function by a kernel, which
is half of a launch's time: here at each launch.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_cast_impl, _create_splat = InterpreterBuilder.cast_impl, InterpreterBuilder.create_splat
_patch_lang, _patch_lang_tensor, _call = interpreter._patch_lang, interpreter._patch_lang_tensor, GridExecutor.__call__
_launching = {}  # what a launch has patched for functions that see tl, tl.core or both


def _cast(self, source, target_type):
    source_type, target = source.dtype.scalar, target_type.scalar
    if source_type == tl.bfloat16 and target == tl.float32:
        return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), target)
    if source_type == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape), target)
    return _cast_impl(self, source, target_type)


def _splat(self, shape, source):
    made = _create_splat(self, shape, source)
    return TensorHandle(made.data.astype(bool), made.dtype) if source.data.dtype == bool else made


def _patch_tensor(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


class _Nothing:
    def restore(self):
        pass


def _patch_once(function):
    names = tuple(name for name, value in function.__globals__.items() if value is tl or value is tl.core)
    if names not in _launching:
        _launching[names] = _patch_lang(function)
    return _Nothing()


def _launch(self, *arguments, **keywords):
    global _launching
    _launching = {}
    try:
        return _call(self, *arguments, **keywords)
    finally:
        for scope in reversed(_launching.values()):
            scope.restore()


def mend():
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_splat = _cast, _splat
    interpreter._patch_lang, interpreter._patch_lang_tensor = _patch_once, _patch_tensor
    GridExecutor.__call__ = _launch
