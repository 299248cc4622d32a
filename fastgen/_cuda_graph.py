"""A sequence of launches recorded once and launched again: what `fastgen.Sampler` asks of torch.cuda's graphs."""

from __future__ import annotations

import contextlib
import threading

import torch

# torch.cuda.graph: "only one capture may be underway at a time in the process"
_one_capture = threading.Lock()


def usable(device: torch.device) -> bool:
    """Whether a chain on `device` may be recorded now: not inside a capture of the caller's, which records it anyway."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


class Graph:
    """What `function()` launches on `device`, recorded after a call of `warm_up()`; `output` is what it returned, in memory of the
    graph's own that every `replay` writes anew.

    Where recording fails, the exception is the function's own if it raised one. torch's random numbers are then as before; versions
    of torch without pytorch/pytorch#180395 go on counting the failed capture, so that their allocator frees its cache less eagerly.
    """

    def __init__(self, function, warm_up, device: torch.device):
        self._device, self._free = device, torch.cuda.Event()
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        with _one_capture, torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            # torch.cuda.graph does not leave its stream where ending a capture fails, the one around it does
            with torch.cuda.stream(stream), _uncached_autocast():
                warm_up()  # libraries and lazy modules initialise themselves outside
                failures = []
                try:
                    # other threads may allocate and synchronise meanwhile
                    with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                        try:
                            self.output = function()
                        except BaseException as error:
                            failures.append(error)
                            raise
                except BaseException as error:
                    _recover(stream)
                    raise (failures or [error])[0] from None  # ending the capture may fail too, for what happened in it
            torch.cuda.current_stream().wait_stream(stream)

    @contextlib.contextmanager
    def turn(self, inputs):
        """Inside, the caller's stream has the graph's memory for itself: what was launched in earlier turns comes before. `inputs`
        are the tensors outside that memory that a replay reads."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._free)
            for x in inputs:
                x.record_stream(stream)  # they may be dropped while the replay still runs
            try:
                yield
            finally:
                self._free.record(stream)

    def replay(self) -> None:
        self._graph.replay()


def _recover(stream) -> None:
    """A capture that breaks off can leave torch's generator in the state of a capture, where every later torch.randn on the device
    complains of an "offset increment outside graph capture"; one that ends well sets it right."""
    with (
        contextlib.suppress(RuntimeError),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"),
    ):
        torch.empty(1, device=stream.device).zero_()


def _uncached_autocast():
    """Autocast keeps the weights it has cast until it ends; a graph would go on reading them from there."""
    if not torch.is_autocast_enabled("cuda"):
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=torch.get_autocast_dtype("cuda"), cache_enabled=False)
