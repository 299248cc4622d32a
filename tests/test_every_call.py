"""What test_cuda.py takes the calls of every_call.py to be, held against what they do here: a wrong entry shows without a GPU."""

import importlib
import itertools
import sys
from types import SimpleNamespace

import every_call
import pytest
import torch
from every_call import CALLS, facts, inputs, results

import fastgen

if not fastgen._core.backends.HAS_OPS:
    pytest.skip("the compiled library is absent", allow_module_level=True)

SHAPE = (3, 4, 33, 35)  # as in test_cuda.py
# what the compiled ops do on the way back the CPU does on the way forward, hence TRITON alone there
BACKENDS = [pytest.param(name, marks=pytest.mark.backend(name)) for name in fastgen.available_backends() if name != "eager"]
TRITON = [parameter for parameter in BACKENDS if parameter.values == ("triton",)]


@pytest.mark.parametrize("name", CALLS)
def test_those_that_read_timesteps(name):
    """They refuse one outside the schedule, where a GPU makes that sample NaN; the others never see it."""
    i, refused = inputs("cpu", (2, 3, 5)), False
    i.t[1] = i.later[1] = len(every_call.SCHEDULE)
    try:
        CALLS[name](i)
    except (ValueError, RuntimeError):
        refused = True
    assert refused == facts(CALLS[name]).timed


@pytest.mark.parametrize(
    "name",
    [name for name in CALLS if not any(word in name for word in ("bce", "gan", "vlb", "log_prob", "log_weight", "uint8", "bytes"))],
)
def test_those_that_make_noise(name):
    """Of zeros the others make zeros. What makes noise is compared with eager less closely, so none may be missing."""
    i = inputs("cpu", (2, 3, 5))
    for x in (i.x, i.m, i.u, i.wide, i.noise):
        x.zero_()
    assert facts(CALLS[name]).seeded or not results(CALLS[name](i))[0].any()


@pytest.fixture(params=BACKENDS)
def kernels(request, monkeypatch):
    """Runs the test on each backend as on a GPU: without the look at the timesteps that the CPU alone takes, and with the Triton
    backend's tiles in place of the interpreter's. Returns the backend's name and a list that notes Triton's launches."""
    launched = []
    monkeypatch.setattr(torch, "aminmax", lambda x: (1, 1))
    if request.param == "triton":
        modules = [importlib.import_module(f"fastgen.triton.{name}") for name in ("common.sum", "bce_with_logits", "gan_loss")]
        op = modules[0].op
        monkeypatch.setattr(op, "INTERPRETED_FACTOR", 1)
        for module in modules:
            monkeypatch.setattr(module, "TILE", op.MANY)
        # nothing is computed, which would take minutes
        monkeypatch.setattr(op, "launch", lambda kernel, *arguments, **parameters: launched.append(kernel.__name__))
    with fastgen.use_backend(request.param):
        yield request.param, launched


def memory_of(call, i):
    """How often a call allocates memory, how much of it is left, and the results that are new."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        made = results(call(i))
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return (
        sum(size > 0 for size in sizes),
        sum(sizes),
        [y for y in made if y.data_ptr() not in (i.out.data_ptr(), i.image.data_ptr())],
    )


@pytest.mark.parametrize("name", CALLS)
def test_launches_and_allocations(kernels, name):
    """The CPU's kernels keep their sums on the stack or in C++, the Triton backend's in a tensor, as the CUDA kernels do."""
    backend, launched = kernels
    call, i, fact = CALLS[name], inputs("cpu", SHAPE), facts(CALLS[name])
    call(i)  # makes the tables
    launched.clear()
    allocated, left, fresh = memory_of(call, i)
    assert left == sum(y.nbytes for y in fresh)
    if backend == "cpp" or fact.bare:
        assert allocated == len(fresh) and not launched
    else:
        assert allocated == len(fresh) + fact.sums
        assert len(launched) == fact.launches(backend), launched


@pytest.mark.parametrize("kernels", TRITON, indirect=True)
@pytest.mark.parametrize("tensors", [2, 33])
def test_launches_and_allocations_of_a_gan_step(kernels, tensors):
    """Those that test_cuda.py asserts; autograd's way back too."""
    _, launched = kernels
    x = inputs("cpu", SHAPE).x
    leaves = [x[:, :, k % 7 : k % 7 + 3].clone().requires_grad_() for k in range(tensors)]
    upstream = torch.tensor(0.75)

    def step(i):
        return torch.autograd.grad(fastgen.discriminator_loss(leaves[:1], leaves[1:]), leaves, upstream)

    allocated, _, gradients = memory_of(step, inputs("cpu"))
    assert allocated == 2 + tensors and len(gradients) == tensors
    assert len(launched) == 2 * tensors + 1, launched


@pytest.mark.parametrize("kernels", TRITON, indirect=True)
def test_launches_and_allocations_of_a_training_step(kernels):
    _, launched = kernels
    i = inputs("cpu", (3, 4, 129, 257))
    leaf = i.m.clone().requires_grad_()

    def step(i):
        x_t = fastgen.q_sample(i.x, i.t, every_call.SCHEDULE, seed=i.seeds)
        loss = fastgen.diffusion_loss(leaf, i.x, i.t, every_call.SCHEDULE, seed=i.seeds)
        return x_t, loss.detach(), *torch.autograd.grad(loss, leaf, i.upstream)

    step(i)
    launched.clear()
    assert memory_of(step, i)[0] == 4 and len(launched) == 4, launched


@pytest.mark.parametrize("until, made", [(100, 11), (0, 0)])
def test_the_program_stops_in_time(monkeypatch, capsys, until, made):
    """compute-sanitizer then still says what it has seen."""
    monkeypatch.setattr(sys, "argv", ["every_call.py", "--device", "cpu", "--sums", "--until", str(until)])
    monkeypatch.setattr(every_call, "time", SimpleNamespace(time=itertools.count(90).__next__))
    if made:
        every_call.main()
        assert f"\n{made} of " in "\n" + capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="no time for any of"):
            every_call.main()
