"""Triton's interpreter, made to convert bfloat16 as a GPU does: to the nearest, NaN to NaN. As it comes (3.6 … 3.9), it cuts the
lower bits off, which no test of one rounding would pass."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_original = InterpreterBuilder.cast_impl


def _cast(self, source, target_type):
    source_type, target = source.dtype.scalar, target_type.scalar
    if source_type == tl.bfloat16 and target == tl.float32:
        return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), target)
    if source_type == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape), target)
    return _original(self, source, target_type)


def round_correctly():
    InterpreterBuilder.cast_impl = _cast
