"""Fixtures and helpers shared by the tests: which backends and devices run, test data, tolerances."""

import itertools
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgen

sys.path.insert(0, str(Path(__file__).parent))  # for `import reference`, under every import mode of pytest

if "triton" in fastgen.available_backends("cpu"):
    import triton_interpreter

    triton_interpreter.mend()

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("cpp", "triton", "eager")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
PLACES = [(device, name) for device in DEVICES for name in fastgen.available_backends(device)]
SHAPES = [(0, 3), (3, 0), (1,), (5,), (5, 1), (3, 127), (3, 128), (3, 129), (2, 3, 5, 7), (2, 2, 3, 4, 5)]
LOST = "the GPU was lost for this process"  # benchmarks.gpu_check looks for these words
WORDS = {  # by which the tests outside an op's own file name it
    "q_sample": ("q_sample", "q_step", "noising"),
    "q_posterior": ("q_posterior", "noising"),
    "ddpm_step": ("ddpm", "ddim", "steps", "many_vectors"),
    "randn": ("randn",),
    "bce_with_logits": ("bce", "many_vectors"),
    "gan_loss": ("gan", "discriminator", "generator"),
    "diffusion_loss": ("diffusion_loss", "[loss", "-loss"),
    "vlb_terms": ("vlb",),
    "step_log_prob": ("log_prob", "log_weight"),
    "to_uint8": ("uint8", "bytes"),
    "reparameterize": ("reparameterize",),
    "gaussian_kl": ("gaussian_kl",),
}
TIMESTEPS = {"first": 0, "middle": 17, "last": 39, "mixed": [39, 0, 17]}  # of `schedule`


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), help="only the tests that run on this device (default: all)")
    parser.addoption("--backend", choices=BACKENDS, action="append", help="only the tests that ask for one of these backends")
    parser.addoption("--not-backend", choices=BACKENDS, action="append", help="none of the tests that ask for this backend")
    parser.addoption("--op", choices=WORDS, help="only the tests of this op: of its file, and those that name it")
    parser.addoption("--share", default="0/1", metavar="K/N", help="only every N-th test from the K-th on")
    parser.addoption("--all", action="store_true", help="whole products of parameters, where else a part of them covers every pair")
    parser.addoption("--from", default=0, type=int, metavar="N", dest="first", help="of these, none of the first N")


def pytest_configure(config):
    if "FASTGEN_LAUNCHED" in os.environ and hasattr(config, "workerinput"):  # a file for each of pytest's processes
        os.environ["FASTGEN_LAUNCHED"] += "." + config.workerinput["workerid"]
    config.addinivalue_line("markers", "cuda: makes sense on an NVIDIA GPU only")
    config.addinivalue_line("markers", "backend(name): is about this backend")
    config.addinivalue_line("markers", "pairs(eager=2): on the CPU only as many parametrisations as have every pair of values")


def pytest_collection_modifyitems(config, items):
    """With --device, leaves out what another device runs; a test that has no say in its device runs on the CPU."""
    device, backends, others = (config.getoption(name) for name in ("--device", "--backend", "--not-backend"))
    share, shares = map(int, config.getoption("--share").split("/"))
    wanted = [item for item in items if _is_about(item, config.getoption("--op")) and device in (None, _device_of(item))]
    wanted = [item for item in wanted if not backends or _backend_of(item) in backends]
    wanted = [item for item in wanted if not others or _backend_of(item) not in others]
    if not config.getoption("--all"):
        wanted = _without_repeated_pairs(wanted)
    wanted = wanted[share::shares][config.getoption("first") :]
    if left_out := set(items) - set(wanted):
        items[:] = wanted
        config.hook.pytest_deselected(items=left_out)


def _without_repeated_pairs(items):
    """Leaves out those of the tests marked `pairs` that have no value of one parameter beside a value of another which no other
    test of the same function on the same backend has too; of the eager one, with `eager=1`, those without a value that no other
    has. A GPU is asked everything: its kernels take no time."""
    functions = {}
    for item in items:
        if item.get_closest_marker("pairs") and _device_of(item) == "cpu":
            functions.setdefault((item.nodeid.partition("[")[0], _backend_of(item)), []).append(item)
    left_out = {item for tests in functions.values() for item in set(tests) - covering({i: _together(i) for i in tests})}
    return [item for item in items if item not in left_out]


def _together(item):
    """Pairs of the names of its values, or single ones; what one `parametrize` gives several arguments is one value."""
    count = item.get_closest_marker("pairs").kwargs.get("eager", 2) if _backend_of(item) == "eager" else 2
    return set(itertools.combinations(enumerate(item.callspec._idlist), count))


def covering(sets):
    """Keys of `sets` whose values together have all that any of them has: few of them, though not the fewest."""
    chosen, missing = set(), set().union(*sets.values())
    bound = {key: len(pairs) for key, pairs in sets.items()}  # on how many missing ones it would add
    while missing:
        best = max(bound, key=bound.get)
        new = len(sets[best] & missing)
        if new < bound[best]:
            bound[best] = new  # another may add more
            continue
        chosen.add(best)
        missing -= sets[best]
        del bound[best]
    return chosen


def _is_about(item, op):
    return op is None or item.path.stem in (f"test_{op}", "test_declared") or any(word in item.name for word in WORDS[op])


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def _device_of(item):
    if item.get_closest_marker("cuda"):
        return "cuda"
    place, device = _parameters(item).get("place"), _parameters(item).get("device", "cpu")
    return place[0] if place else torch.device(device).type


def _backend_of(item):
    if marker := item.get_closest_marker("backend"):
        return marker.args[0]
    place, kernels = _parameters(item).get("place"), _parameters(item).get("kernels")
    return place[1] if place else kernels if kernels in BACKENDS else None


@pytest.hookimpl(hookwrapper=True)
def _ends_with_the_gpu(item):
    """Ends the run after a test that has lost the GPU for its process, itself or in a fixture: after an illegal address or a failed
    device assertion every later call fails with the same error, whatever it does. An error that nobody has waited for is that
    test's too."""
    outcome = yield
    if not torch.cuda.is_initialized() or str(item.session.shouldstop).startswith(LOST):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        item.session.shouldstop = f"{LOST} by {item.nodeid}"
        if outcome.excinfo is None:
            outcome.force_exception(error)


pytest_runtest_setup = pytest_runtest_call = pytest_runtest_teardown = _ends_with_the_gpu


def pytest_report_header(config):
    return fastgen.backend_info().splitlines()


def pytest_make_parametrize_id(config, val, argname):
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    return str(val).replace(" ", "") if isinstance(val, (tuple, list)) else None


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    return request.param


@pytest.fixture
def backend(place):
    """Runs the test on every backend of every device."""
    with fastgen.use_backend(place[1]):
        yield place[1]


@pytest.fixture
def device(place, backend):
    """The device that goes with `backend`."""
    return torch.device(place[0])


@pytest.fixture(scope="session")
def schedule():
    """Forty steps whose coefficients are neither tiny nor huge."""
    return fastgen.Schedule.linear(40, 1e-3, 0.2)


@pytest.fixture(scope="module")
def one_thread():
    """So small networks gain nothing from a second thread, and on a busy machine wait for it most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def interpreted(device):
    """Whether ops on this device run in Triton's interpreter, of whose launches each takes milliseconds: then fewer will do."""
    return torch.device(device).type == "cpu" and fastgen.backend(device) == "triton"


def in_threads(count, work):
    """[work(0), work(1), …], each in a thread of its own, all from the same moment on. An exception in one is raised."""
    start = threading.Barrier(count)

    def run(i):
        start.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def normal(shape, seed, dtype=torch.float32, device="cpu"):
    """Test data: normal numbers that have nothing to do with fastgen's."""
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape)).to(device, dtype)


def on(device, t):
    """A list of timesteps as a tensor, an int as it is."""
    return torch.tensor(t, device=device) if isinstance(t, list) else t


def channels_last(x):
    """The values of `x` with dimension 1 innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def unaligned(x):
    """The values of `x`, contiguous, one element past an aligned address."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def transposed(x):
    """The values of `x` with its dimensions in reverse order in memory."""
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def sliced(x):
    """The values of `x` with gaps between them: every third column of a wider tensor."""
    wide = x.new_zeros(*x.shape[:-1], 3 * x.shape[-1] + 1)
    wide[..., 1::3] = x
    return wide[..., 1::3]


LAYOUTS = {
    "contiguous": torch.clone,
    "channels_last": channels_last,
    "unaligned": unaligned,
    "transposed": transposed,
    "sliced": sliced,
}


def tolerance(dtype, scale=1.0):
    """Half a unit in the last place for the one rounding at the store, plus a few roundings of the arithmetic (float32, or
    float64 for float64) on terms as large as `scale`."""
    if dtype == torch.float64:
        return {"rtol": 0.0, "atol": 1e-14 * scale}
    tiny = 2.0**-25 if dtype == torch.float16 else 0.0  # half the spacing of float16's subnormals
    return {"rtol": 0.5 * torch.finfo(dtype).eps, "atol": 5e-7 * scale + tiny}


def array(x):
    return x.detach().cpu().double().numpy()


def assert_close(actual, expected, scale=None):
    """A tensor against the float64 truth (array or tensor), to the accuracy that its dtype is owed. NaN and inf must match."""
    expected = array(expected) if isinstance(expected, torch.Tensor) else np.asarray(expected, np.float64)
    if scale is None:
        scale = max(1.0, np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
    np.testing.assert_allclose(array(actual), expected, **tolerance(actual.dtype, scale), equal_nan=True)


def assert_derivatives(device, function, inputs):
    """The first and second ones of a float64 function, against finite differences."""
    fast = interpreted(device)  # along a random direction, not along each axis
    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast)


def assert_same(actual, expected):
    """Bit for bit, NaN equal to NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
