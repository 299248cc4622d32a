"""Data and networks of the tests of whole chains: `variational_bound` and `log_likelihood`."""

import numpy as np
import torch


def pixels(shape, dtype=torch.float32, device="cpu"):
    return torch.tensor(np.random.default_rng(1).integers(0, 256, shape) / 127.5 - 1).to(device, dtype)


def tame(x, t, shift=None):
    """A network whose every element is a function of the same element, whatever comes with it in the batch."""
    m = torch.tanh(x) + 0.01 * t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    return m if shift is None else m + shift


def wide(x, t):
    return torch.cat([tame(x, t), -0.5 - tame(x, t).square()], 1)


class Seen:
    """A network that remembers what it was given."""

    def __init__(self, model=tame):
        self.model, self.calls = model, []

    def __call__(self, x, t, **kwargs):
        self.calls.append((x.clone(), t.clone(), kwargs))
        return self.model(x, t, **kwargs)
