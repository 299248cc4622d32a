"""Every op of the Triton backend beside the compiled one, on the samples of every kind of timestep, noise, layout and option.

Small enough to be run under every Triton that is supported (`make triton-matrix`); each op's own file has the rest.
"""

import pytest
import torch
from test_dispatch import op_samples
from torch.utils import _pytree as pytree

import fastgen

if not {"triton", "cpp"} <= set(fastgen.available_backends()):
    pytest.skip("needs the CPU library and Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

import fastgen.triton


@pytest.mark.backend("triton")
@pytest.mark.parametrize("op", fastgen.triton.FUNCTIONS)
def test_agrees_with_the_compiled_op(op):
    samples = [(arguments, keywords) for name, arguments, keywords in op_samples() if name == op]
    assert samples
    for arguments, keywords in samples:
        results = []
        for library in (torch.ops.fastgen, torch.ops.fastgen_triton):
            call = getattr(library, op).default
            own = pytree.tree_map_only(torch.Tensor, torch.clone, (arguments, keywords))
            results.append((call(*own[0], **own[1]), own))
        # the tensors that were written to as well; normals may differ by 1e-3 where the radius is near 0
        torch.testing.assert_close(results[1], results[0], rtol=1e-2 if half(arguments) else 1e-4, atol=1e-3, equal_nan=True)


def half(arguments):
    """Whether anything is rounded to half precision, where the two may differ in the last place."""
    return any(x.dtype in (torch.float16, torch.bfloat16) for x in pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor))
