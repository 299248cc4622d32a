"""The chain as one CUDA graph: which calls of a sampler are recorded, which are replays, and what a replay takes for given."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import Literal

import torch
from torch.utils import _pytree as pytree

from .._core import backends
from . import cuda_graph, network
from .arguments import same_values
from .chain import Chain

logger = logging.getLogger("fastgen")

_MOST_GRAPHS = 4  # that a sampler keeps: a robot's loop or a server makes calls of one form or two


class ChainGraphs:
    """The graphs of one sampler, at most one for each form of its calls, and when they are recorded and replayed."""

    def __init__(self, mode: Literal["auto"] | bool):
        self.mode = mode  # the sampler's `cuda_graph`, until a recording fails: then "auto" becomes False
        # All that a call may change, by whoever holds the lock. The forms are in the order in which they came last; `_room` is how
        # many of them may have a graph.
        self._lock, self._forms, self._room = threading.Lock(), [], _MOST_GRAPHS

    def replayed(self, chain: Chain, seed, kwargs) -> torch.Tensor | None:
        """x_0 by a graph; None where this call is to run step by step."""
        if self.mode is False or not cuda_graph.usable(chain.device):
            return None
        if self.mode == "auto" and not network.can_be_seen_into(chain.model):
            return None
        leaves, spec = pytree.tree_flatten(kwargs)
        if complaint := _why_not_recorded(leaves, chain.device):
            if self.mode is True:
                raise ValueError(complaint)
            return None
        form = _CallForm(seed, leaves, spec, chain.model)
        with self._lock:
            if self.mode is False:  # a recording in another thread has failed meanwhile
                return None
            form, is_new = self._entered(form)
            if form.graph is None:
                if is_new and self.mode == "auto":
                    logger.debug("the first call of its form: the chain runs step by step")
                    return None
                logger.debug("the chain is recorded as a CUDA graph")
                try:
                    form.graph = self._recorded(chain, seed, leaves, spec)
                except Exception as error:
                    if self.mode is True:
                        raise RuntimeError(f"cuda_graph: the chain could not be recorded: {error}") from error
                    self.mode = False
                    self._drop_graphs(0)
                    self._forms.clear()
                    logger.warning("the chain cannot be one CUDA graph and runs step by step from now on: %s", error)
                    return None
            return form.graph.replay(seed, _tensors(leaves))

    def _entered(self, form: _CallForm) -> tuple[_CallForm, bool]:
        """The form as it is in the list, where it is the last now, and whether it is new there."""
        # A form that has not come for long is forgotten, unless it has a graph: of more forms in turn than there is room for, those
        # without one stay step by step.
        older, newer = self._forms[: -self._room], self._forms[-self._room :]
        self._forms = [each for each in older if each.graph is not None] + newer
        earlier = next((each for each in self._forms if each == form), None)
        if earlier is not None:
            self._forms.remove(earlier)
        self._forms.append(earlier or form)
        return self._forms[-1], earlier is None

    def _recorded(self, chain, seed, leaves, spec):
        others = self._drop_graphs(self._room - 1)  # before more memory is asked for
        try:
            return _ChainGraph(chain, seed, leaves, spec)
        except torch.OutOfMemoryError:
            if not others:
                raise
        self._room = others
        self._drop_graphs(0)
        return _ChainGraph(chain, seed, leaves, spec)

    def _drop_graphs(self, left):
        """Drops all graphs but the `left` that were used last. Returns how many there are then."""
        recorded = [form for form in self._forms if form.graph is not None]
        for form in recorded[: max(len(recorded) - left, 0)]:
            form.graph.finish()
            form.graph = None
        return min(len(recorded), left)


class _CallForm:
    """All of a call that a graph takes for given: calls of one form differ in the values of tensors only. With the graph that was
    recorded of one, if there is any."""

    def __init__(self, seed, leaves, spec, model):
        self.graph: _ChainGraph | None = None
        self._facts = (
            seed.numel() if isinstance(seed, torch.Tensor) else 1,
            spec,
            backends._choice.get(),
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
            tuple((x.shape, x.dtype) for x in _tensors(leaves)),
            network.fingerprint(model),
        )
        self._values = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def __eq__(self, other):
        if not isinstance(other, _CallForm) or self._facts != other._facts:
            return False
        return all(same_values(a, b) for a, b in zip(self._values, other._values, strict=True))


class _ChainGraph:
    """A recorded chain and what it reads: the seeds, the chain's timesteps and coefficients, and the tensors that the network is
    given besides x and t. They live as long as the graph does, of which they are no part."""

    def __init__(self, chain: Chain, seed, leaves, spec):
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be written to later
            count = seed.numel() if isinstance(seed, torch.Tensor) else 1
            self._seeds = torch.empty(count, dtype=torch.int64, device=chain.device)
            self._write_seed(seed)
            static_leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            self._tensors = _tensors(static_leaves)
            self._read = self._seeds, *chain.constants, *self._tensors
            run = partial(chain.run, self._seeds, pytree.tree_unflatten(static_leaves, spec))
            # the warm-up takes two steps: from the second on, the layout is that of the network's output
            self._graph = cuda_graph.Graph(run, partial(run, steps=2), chain.device)

    def replay(self, seed, tensors) -> torch.Tensor:
        """x_0 for this seed and these values of the tensors, in memory of its own."""
        with self._graph.turn(self._read):
            self._write_seed(seed)
            for static, given in zip(self._tensors, tensors, strict=True):
                static.copy_(given)
            self._graph.replay()
            return self._graph.output.clone()

    def finish(self):
        """Waits for the replays under way, whose memory is free to go then."""
        self._graph.finish()

    def _write_seed(self, seed):
        # an int is part of the launch, where a copy from the host would wait for it
        self._seeds.copy_(seed) if isinstance(seed, torch.Tensor) else self._seeds.fill_(seed)


def _why_not_recorded(leaves, device) -> str | None:
    """What is wrong with these arguments of the network, if they cannot be part of a graph."""
    expected = "model_kwargs: expected tensors"
    if elsewhere := [x for x in _tensors(leaves) if x.device != device]:
        return f"{expected} on {device} with cuda_graph=True, got {elsewhere[0].device}"
    recordable = (torch.Tensor, *network.COMPARED_BY_VALUE)
    if opaque := [x for x in leaves if not isinstance(x, recordable)]:  # an object of another type may change inside, unseen
        return f"{expected}, numbers and strings with cuda_graph=True, got {type(opaque[0]).__name__}"
    return None


def _tensors(leaves) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
