"""A plugin of pytest: torch.cuda on the devices of fake_cuda.cpp, for what test_cuda.py asks of it. device_on_ptx.py --cuda loads
it, before torch and fastgen."""

import collections
import contextlib
import ctypes
import os
import re
import time
import types

_library = ctypes.CDLL(os.environ["FASTGEN_FAKE_CUDA"], mode=ctypes.RTLD_GLOBAL)  # before torch, which asks once for devices
for _function in (_library.fake_cuda_statistic, _library.fake_cuda_logged, _library.fake_cuda_memory):
    _function.restype = ctypes.c_int64
_library.fake_cuda_logged_name.restype = ctypes.c_char_p

import pytest  # noqa: E402
import torch  # noqa: E402

CAPABILITY = divmod(int(os.environ["FASTGEN_PTX_ARCH"]), 10)
_COUNTS = pytest.StashKey()
SYNC_DEBUG_MODES = ("default", "warn", "error")

# What the devices cannot show, or the machine takes too long for: by what a test's name begins with.
GRAPHS, COMPILE = "CUDA graphs", "torch.compile for a GPU, which makes Triton's kernels"
STREAMS, TIME = "streams that are asynchronous", "too many elements for the machine, which other tests have fewer of"
LEFT_OUT = {
    "test_streams_side_by_side": STREAMS,
    "test_a_chain_outlives_its_sampler": STREAMS,
    "test_capture_and_replay": GRAPHS,
    "test_capture_of_the_backward": GRAPHS,
    "test_the_backward_in_a_graph": GRAPHS,
    "test_a_seed_on_the_host_is_refused_in_a_capture": GRAPHS,
    "test_capture_without_a_seed_is_refused": GRAPHS,
    "test_seed_advanced_in_the_graph": GRAPHS,
    "test_sampling_loop_as_one_graph": GRAPHS,
    "test_a_chain_as_one_graph": GRAPHS,
    "test_a_network_that_synchronises_falls_back": GRAPHS,
    "test_a_failed_recording": GRAPHS,
    "test_a_recording_and_another_threads_work": GRAPHS,
    "test_forms_of_calls_in_turn": GRAPHS,
    "test_replays_on_several_streams": GRAPHS,
    "test_a_graph_": GRAPHS,
    "test_a_chain_in_the_callers_graph": GRAPHS,
    "test_a_copy_of_a_policy": GRAPHS,
    "test_default_noise_is_fresh_under_reduce_overhead": COMPILE,
    "test_reduce_overhead": COMPILE,
    r"test_channels_last_is_bit_identical\[cpp-(31|64|320)-": TIME,
    r"test_sums_have_the_same_bits_on_every_run\[cpp-5000011-": TIME,
    r"test_gan_losses_have_the_same_bits_on_every_run\[cpp-(65537|5000011)-": TIME,
    r"test_diffusion_losses_have_the_same_bits_on_every_run\[cpp-\(2,1,1000003\)": TIME,
}


def index_of(device=None):
    """Of a device in any of the ways that torch.cuda takes; None is the current one."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return _library.fake_cuda_device() if index is None else index


def exchange_device(index):
    if index < 0:
        return -1
    before = _library.fake_cuda_exchange_device(index)
    if before < 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return before


def synchronize(device=None):
    """There is nothing to wait for but autograd's thread of a device, which lets go of its last tensors after it has said that it
    is done."""
    time.sleep(0.002)


def memory_stats(device=None):
    names = ("allocation.all.allocated", "requested_bytes.all.current", "allocated_bytes.all.current")
    return {name: _library.fake_cuda_statistic(index_of(device), which) for which, name in enumerate(names)}


def mem_get_info(device=None):
    total = _library.fake_cuda_memory()
    return total - memory_stats(device)["allocated_bytes.all.current"], total


@contextlib.contextmanager
def memory_out_of_reach():
    """What is allocated within a `with` block is memory that no kernel may touch."""
    _library.fake_cuda_put_out_of_reach(1)
    try:
        yield
    finally:
        _library.fake_cuda_put_out_of_reach(0)


class Profile:
    """As much of torch.profiler.profile as tells what was launched: the library's kernels, and torch's operators, each of which
    counts as one launch."""

    def __init__(self, **options):
        self._events = []

    def __enter__(self):
        _library.fake_cuda_log(1)
        return self

    def __exit__(self, *error):
        _library.fake_cuda_log(0)
        for n in range(_library.fake_cuda_logged()):
            name, when = _library.fake_cuda_logged_name(ctypes.c_int64(n)).decode(), types.SimpleNamespace(start=n, end=n)
            self._events.append(types.SimpleNamespace(name=name, device_type=torch.autograd.DeviceType.CUDA, time_range=when))

    def events(self):
        return self._events


class Stream(torch.Stream):
    """torch's own, which asks the devices for one."""

    def __new__(cls, device=None, priority=0):
        return super().__new__(cls, torch.device("cuda", index_of(device)))

    @property
    def cuda_stream(self):
        return self.native_handle


def properties(device=None):
    major, minor = CAPABILITY
    named = {"name": "PTX machine", "major": major, "minor": minor, "multi_processor_count": 132, "warp_size": 32}
    return types.SimpleNamespace(**named, total_memory=_library.fake_cuda_memory())


INSTEAD = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "device_count": lambda: _library.fake_cuda_devices(),
    "current_device": lambda: _library.fake_cuda_device(),
    "set_device": lambda device: exchange_device(index_of(device)),
    "_exchange_device": exchange_device,
    "_maybe_exchange_device": exchange_device,
    "get_device_capability": lambda device=None: CAPABILITY,
    "get_device_name": lambda device=None: "PTX machine",
    "get_device_properties": properties,
    "is_bf16_supported": lambda *options: True,
    "synchronize": synchronize,
    "empty_cache": lambda: None,
    "memory_stats": memory_stats,
    "mem_get_info": mem_get_info,
    "memory_allocated": lambda device=None: memory_stats(device)["allocated_bytes.all.current"],
    "set_sync_debug_mode": lambda mode: _library.fake_cuda_set_sync_debug_mode(SYNC_DEBUG_MODES.index(mode)),
    "is_current_stream_capturing": lambda: False,
    "Stream": Stream,
    "Event": lambda *options, **more: torch.Event("cuda"),
    "current_stream": lambda device=None: torch.accelerator.current_stream(torch.device("cuda", index_of(device))),
    "stream": lambda stream: contextlib.nullcontext() if stream is None else stream,
    "_sleep": lambda cycles: None,
    "manual_seed": lambda seed: None,  # random numbers come from the CPU's generator
    "manual_seed_all": lambda seed: None,
}
for _name, _value in INSTEAD.items():
    setattr(torch.cuda, _name, _value)
torch.profiler.profile = Profile
torch.version.cuda = "13.0"


def pytest_collection_modifyitems(config, items):
    why = {item: next((reason for name, reason in LEFT_OUT.items() if re.match(name, item.name)), None) for item in items}
    items[:] = [item for item in items if not why[item]]
    config.hook.pytest_deselected(items=[item for item in why if why[item]])
    config.stash[_COUNTS] = collections.Counter(filter(None, why.values()))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash.get(_COUNTS, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Each of xdist's processes has collected all tests."""
    node.config.stash[_COUNTS] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter, config):
    for reason, count in config.stash.get(_COUNTS, {}).items():
        terminalreporter.write_line(f"left out, {count} tests: {reason}")
