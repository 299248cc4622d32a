"""A sequence of launches recorded once and launched again: what `fastgen.Sampler` asks of torch.cuda's graphs."""

from __future__ import annotations

import contextlib
import threading

import torch

from .._core import backends

# torch.cuda.graph: "only one capture may be underway at a time in the process". A network may itself sample in its warm-up.
_one_capture = threading.RLock()
_this_thread = threading.local()  # .records: whether it is in the middle of making a graph
# Up to torch 2.11 every graph has the default generator's one state, and a replay in the middle of a capture would raise.
_replays_wait = backends.torch_version() < (2, 12)
# Captures that torch's allocators go on asking whether a stream is theirs: of a graph that is gone they would ask freed memory
_broken = []


def usable(device: torch.device) -> bool:
    """Whether a chain on `device` may be recorded or replayed now: not inside a capture, which records it anyway, nor in the
    warm-up before one: to wait there for a sampler whose thread waits for this recording would be to wait for ever."""
    records = getattr(_this_thread, "records", False)
    return device.type == "cuda" and not records and not torch.cuda.is_current_stream_capturing()


class Graph:
    """What `function()` launches on `device`, recorded after a call of `warm_up()`; `output` is what it returned, in memory of the
    graph's own that every `replay` writes anew.

    Where recording fails, the exception is the function's own if it raised one, and torch's allocator and random numbers are as
    before; but torch 2.13 keeps the memory that the recording had asked for, and 2.11 and 2.12 look for pinned memory more slowly.
    """

    def __init__(self, function, warm_up, device: torch.device):
        self._device, self._free = device, torch.cuda.Event()
        self._graph = torch.cuda.CUDAGraph()
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        with _one_capture, torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            outer, _this_thread.records = getattr(_this_thread, "records", False), True
            try:
                # torch.cuda.graph does not leave its stream where ending a capture fails, the one around it does
                with torch.cuda.stream(stream), _uncached_autocast():
                    warm_up()  # libraries and lazy modules initialise themselves outside
                    self._record(function, stream, pool)
            finally:  # after an error too: the memory that was lent to this stream goes back to the caller's
                _this_thread.records = outer
                torch.cuda.current_stream().wait_stream(stream)

    def _record(self, function, stream, pool):
        errors = []  # the function's own, and that of ending the capture, which may fail for what happened in it
        try:
            # other threads may allocate and synchronise meanwhile
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    self.output = function()
                except BaseException as error:
                    errors.append(error)
                    raise
        except BaseException as error:
            errors.append(error)
        if errors:
            _give_back(self._graph, pool)
            _recover(stream)
            # neither of them keeps the other, or this frame's list both: the chain's memory goes when the caller drops the error
            del errors[1:]
            raise errors.pop()

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
        with _one_capture if _replays_wait else contextlib.nullcontext():
            self._graph.replay()

    def finish(self) -> None:
        """Waits for the replays under way: the allocator does not know what memory they use."""
        self._free.synchronize()


def _give_back(graph, pool) -> None:
    """What a capture that broke off has of the allocator. From torch 2.14 on `reset` does it, and 2.13 ends the allocation itself
    (pytorch/pytorch#180395); up to 2.12 it goes on where ending the capture fails, and with it, until the process ends, what the
    allocator does during captures only: memory that several streams have used is not given back, a MemPool's end aborts."""
    end, release = getattr(torch._C, "_cuda_endAllocateToPool", None), getattr(torch._C, "_cuda_releasePool", None)
    with contextlib.suppress(RuntimeError):
        graph.reset()
        if end is not None and release is not None:
            end(torch.cuda.current_device(), pool)  # raises where torch has done so; whether it has released too is not known then
            _broken.append(graph)
            release(torch.cuda.current_device(), pool)


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
