"""Which ops a piece of code runs."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """`with Dispatched() as ops:` counts by name, "aten.mul" and "fastgen.ddpm_step", what is dispatched in it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.counts[str(function.overloadpacket)] += 1
        return function(*arguments, **(keywords or {}))

    def __getitem__(self, name):
        return self.counts[name]

    def of_fastgen(self):
        """How many were fastgen's, of whatever backend."""
        return sum(count for name, count in self.counts.items() if name.startswith("fastgen"))
