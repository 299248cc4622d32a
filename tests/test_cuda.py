"""What can only be seen on an NVIDIA GPU: streams, graphs, several devices, launches, allocations, tensors past 2³² elements.

Values, dtypes, layouts and gradients are in the files of the ops, whose tests run on every device.
"""

import contextlib
import copy
import gc
import itertools
import pickle
import threading
from functools import partial
from math import prod

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, array, assert_close, assert_same, channels_last
from every_call import CALLS, INTO, SCHEDULE, facts, fits, inputs, results
from torch._dynamo.utils import counters

import fastgen

HERE = torch.cuda.is_available()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not HERE, reason="torch finds no CUDA device")]
DEVICE = torch.device("cuda", torch.cuda.current_device()) if HERE else torch.device("cpu")
KERNELS = [name for name in fastgen.available_backends("cuda") if name != "eager"] or ["cpp"]
SHAPE = (3, 4, 33, 35)
FACTS = {name: facts(call) for name, call in CALLS.items()} if HERE else {}
LATE = 20_000_000  # clock cycles, some 10 ms: what a stream does first, so that work on another one would come too early


@pytest.fixture(params=KERNELS, autouse=True)
def kernels(request):
    """Runs the test on every backend with kernels of fastgen's."""
    with fastgen.use_backend(request.param):
        yield request.param


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def clones(result):
    return [y.clone() for y in results(result)]


def assert_all_same(actual, expected):
    for a, e in zip(results(actual), results(expected), strict=True):
        assert_same(a, e)


# ---- streams --------------------------------------------------------------------------------------------------------


def test_runs_on_the_current_stream(call):
    """Behind whatever produces the inputs there, and before whatever reads the result there."""
    good = inputs(DEVICE, SHAPE)
    expected = clones(call(good))
    good.out.fill_(torch.nan)
    late, side = good.poisoned(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LATE)
        late.copy_(good)
        made = call(late)
        read = clones(made)
    side.synchronize()
    assert_all_same(tuple(read), tuple(expected))


def assert_same_side_by_side(loss, cases):
    """Of each case the same bits alone and 40 times beside the others, each on a stream of its own."""
    expected = [loss(i) for i in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    made = [[] for _ in cases]
    for _ in range(40):
        for i, stream, losses in zip(cases, streams, made, strict=True):
            with torch.cuda.stream(stream):
                losses.append(loss(i))
    torch.cuda.synchronize()
    for losses, first in zip(made, expected, strict=True):
        for other in losses:
            assert_same(other, first)


def test_streams_side_by_side():
    """Sums on several streams at a time share nothing."""
    cases = [inputs(DEVICE, (1, 1, n), salt=n) for n in (100_003, 1_000, 3_000_001, 64, 500_000)]
    assert_same_side_by_side(lambda i: fastgen.bce_with_logits(i.x, i.target), cases)


def test_streams_side_by_side_with_a_sum_for_each_sample():
    """Two samples of many thread blocks each, and many of a warp each."""
    cases = [inputs(DEVICE, shape, salt=k) for k, shape in enumerate([(2, 1, 1_000_003), (3, 4, 70_001), (5_000, 1, 37)])]
    each = lambda i: fastgen.diffusion_loss(i.m, i.x, i.t, SCHEDULE, seed=i.seeds, reduction="none")  # noqa: E731
    assert_same_side_by_side(each, cases)


def test_threads_side_by_side(kernels):
    """Python threads with a stream each: first calls too, which make the tables."""
    schedule = fastgen.Schedule.linear(40, 1e-3, 0.2)
    i = inputs(DEVICE, SHAPE)
    expected = fastgen.ddpm_step(i.x, i.m, i.t, SCHEDULE, seed=i.seeds, clip=1.0)
    torch.cuda.synchronize()
    made = []

    def work():
        with fastgen.use_backend(kernels), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                y = fastgen.ddpm_step(i.x, i.m, i.t, schedule, seed=i.seeds, clip=1.0)
            torch.cuda.current_stream().synchronize()
            made.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    for y in made:
        assert_same(y, expected)


# ---- CUDA graphs ----------------------------------------------------------------------------------------------------


def captured(function):
    """(graph, the tensors that each replay writes); run twice before, on another stream, as torch's notes ask."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = function()
    return graph, results(made)


def test_capture_and_replay(call):
    """A replay reads what the inputs hold then, seeds and timesteps too, and can be repeated."""
    static, other = inputs(DEVICE, SHAPE), inputs(DEVICE, SHAPE, salt=1)
    graph, made = captured(lambda: call(static))
    static.copy_(other)
    expected = clones(call(other))
    for _ in range(3):
        for y in made:
            y.fill_(torch.nan)
        graph.replay()
        assert_all_same(tuple(made), tuple(expected))


def test_capture_of_the_backward():
    i, other = inputs(DEVICE, SHAPE), inputs(DEVICE, SHAPE, salt=1)
    leaf = i.x.clone().requires_grad_()

    def step():
        return torch.autograd.grad(fastgen.bce_with_logits(leaf, i.target), leaf)

    graph, (gradient,) = captured(step)
    i.target.copy_(other.target)
    for _ in range(2):
        gradient.fill_(torch.nan)
        graph.replay()
        assert_same(gradient, step()[0])


BACKWARDS = {
    "q_sample": lambda x, i: fastgen.q_sample(x, i.t, SCHEDULE, seed=1),
    "q_posterior": lambda x, i: fastgen.q_posterior(x, i.m, i.t, SCHEDULE)[0],
    "ddpm_step": lambda x, i: fastgen.ddpm_step(x, i.m, i.t, SCHEDULE, seed=1),
    "ddpm_step, clipped": lambda x, i: fastgen.ddpm_step(x, i.m, i.t, SCHEDULE, seed=1, clip=1.0),
    "bce": lambda x, i: fastgen.bce_with_logits(x, i.target),
    "diffusion": lambda x, i: fastgen.diffusion_loss(x, i.m, i.t, SCHEDULE, seed=i.seeds, weighting="min_snr"),
    "diffusion, each": lambda x, i: fastgen.diffusion_loss(x, i.m, i.t, SCHEDULE, noise=i.noise, reduction="none"),
    "diffusion, scaled": lambda x, i: 3 * fastgen.diffusion_loss(i.m, x, i.t, SCHEDULE, seed=i.seed, prediction="v_prediction"),
    "gan": lambda x, i: fastgen.discriminator_loss(x, i.m),
    "gan, scaled": lambda x, i: 3 * fastgen.discriminator_loss([x, i.m], i.m, monitors=True)[0],
}


def backward_step(name):
    i = inputs(DEVICE, SHAPE)
    leaf = i.x.clone().requires_grad_()

    def step():
        y = BACKWARDS[name](leaf, i)
        return torch.autograd.grad(y, leaf, torch.ones_like(y))

    return step


@pytest.mark.parametrize("name", BACKWARDS)
def test_the_backward_does_not_synchronise(name):
    step = backward_step(name)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", BACKWARDS)
def test_the_backward_in_a_graph(name):
    """What synchronises cannot be captured, nor then a training step with it."""
    step = backward_step(name)
    expected = step()
    graph, (gradient,) = captured(step)
    gradient.fill_(torch.nan)
    graph.replay()
    assert_same(gradient, expected[0])


def test_default_noise_is_fresh_under_reduce_overhead():
    """The drawn seed is a tensor on the device: of one on the host CUDA-graph trees would record the value."""
    x = torch.zeros(SHAPE, device=DEVICE)
    compiled = torch.compile(lambda x: fastgen.q_sample(x, 5, SCHEDULE), mode="reduce-overhead", fullgraph=True)
    seen = [compiled(x).clone() for _ in range(6)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_a_seed_on_the_host_is_refused_in_a_capture():
    x, seed = torch.zeros(SHAPE, device=DEVICE), torch.tensor([3])
    fastgen.q_sample(x, 5, SCHEDULE, seed=seed)
    with pytest.raises(ValueError, match="^seed: expected a tensor on cuda"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fastgen.q_sample(x, 5, SCHEDULE, seed=seed)
    (sampler,) = samplers(False)
    for seeds in ([1, 2, 3], torch.tensor([1, 2, 3])):
        sampler(sample_seeds=seeds)
        message = "^sample_seeds: expected a tensor on cuda"
        with pytest.raises(ValueError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            sampler(sample_seeds=seeds)


NOISY = {
    "q_sample": lambda x, t, **how: fastgen.q_sample(x, t, SCHEDULE, **how),
    "q_step": lambda x, t, **how: fastgen.q_step(x, t, SCHEDULE, **how),
    "ddpm_step": lambda x, t, **how: fastgen.ddpm_step(x, x, t, SCHEDULE, **how),
    "ddim_step": lambda x, t, **how: fastgen.ddim_step(x, x, t, SCHEDULE, eta=0.5, **how),
    "randn": lambda x, t, **how: fastgen.randn(x.shape, dtype=x.dtype, device=x.device, **how),
}


@pytest.mark.parametrize("op", NOISY.values(), ids=NOISY)
@pytest.mark.parametrize("per_sample", [False, True], ids=["one_seed", "seeds"])
def test_seed_advanced_in_the_graph_gives_fresh_noise(op, per_sample):
    i = inputs(DEVICE, SHAPE)
    seed, t = (i.seeds if per_sample else i.seed), torch.full((3,), 9, device=DEVICE)

    def step():
        y = op(i.x, t, seed=seed)
        seed.add_(1)
        return y

    graph, (y,) = captured(step)
    start = torch.arange(seed.numel(), device=DEVICE) * 1000
    seed.copy_(start)
    seen = []
    for k in range(4):
        graph.replay()
        assert_same(y, op(i.x, t, seed=start + k))
        seen.append(y.clone())
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("op", NOISY.values(), ids=NOISY)
@pytest.mark.parametrize("per_sample", [False, True], ids=["one_seed", "seeds"])
def test_reduce_overhead_reads_seeds_and_timesteps_anew(op, per_sample):
    """Both are advanced in place, on the device, between the replays of CUDA-graph trees."""
    torch._dynamo.reset()
    counters.clear()
    i = inputs(DEVICE, SHAPE)
    seed, t = (i.seeds if per_sample else i.seed).clone(), torch.full((3,), 20, device=DEVICE)
    compiled = torch.compile(lambda x, t, seed: op(x.sin(), t, seed=seed), mode="reduce-overhead", fullgraph=True)
    seen = []
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        seen.append(compiled(i.x, t, seed).clone())
        assert_close(seen[-1], op(i.x.sin(), t, seed=seed))
        seed.add_(1)
        t.sub_(1)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    assert not counters["inductor"]["cudagraph_skips"]


def test_sampling_loop_as_one_graph():
    """Algorithm 4.2 by replays of a single step: timestep and state live on the device."""
    x, t, seed = inputs(DEVICE, SHAPE).x, torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.tensor([3], device=DEVICE)
    start = x.clone()

    def step():
        fastgen.ddpm_step(x, torch.tanh(x), t, SCHEDULE, seed=seed, clip=1.0, out=x)
        t.sub_(1)
        return x

    graph, _ = captured(step)
    x.copy_(start)
    t.fill_(39)
    expected = start
    for k in reversed(range(40)):
        graph.replay()
        expected = fastgen.ddpm_step(expected, torch.tanh(expected), k, SCHEDULE, seed=3, clip=1.0)
    assert_same(x, expected)


@pytest.mark.parametrize("op", [name for name in NOISY if name != "randn"])
def test_capture_without_a_seed_is_refused(op):
    i = inputs(DEVICE, SHAPE)
    NOISY[op](i.x, i.t)  # its table is made outside
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="^seed: .*graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        NOISY[op](i.x, i.t)
    assert torch.equal(torch.get_rng_state(), state)
    assert NOISY[op](i.x, i.t).isfinite().all()


# ---- whole chains -----------------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    """A small network with a condition, and with `synchronises` one that no graph can record."""

    def __init__(self, synchronises=False):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 3, padding=1))
        self.synchronises = synchronises

    def forward(self, x, t, shift=0.0):
        if self.synchronises:
            x = x * x.isfinite().all().item()
        return self.layers(x) + 0.01 * t.reshape(-1, 1, 1, 1) + shift


def network(**how):
    torch.manual_seed(0)
    return Network(**how).to(DEVICE).eval()


CHAINS = {
    "ddpm": {"clip": 1.0},
    "ddim": {"method": "ddim"},
    "ddim noise": {"method": "ddim", "eta": 0.5, "steps": 10},
    "guided": {"guidance_scale": 2.0, "clip": 1.0},
    "thresholded": {"threshold": 0.9, "steps": 10, "spacing": "trailing"},
}


def recorded_forms(sampler):
    """How many forms of calls have a graph."""
    return sum(form.graph is not None for form in sampler._graphs._forms)


def samplers(*choices, model=None, **options):
    model = network() if model is None else model
    return [fastgen.Sampler(model, SHAPE, SCHEDULE, cuda_graph=choice, **options) for choice in choices]


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("per_sample", [False, True], ids=["one_seed", "seeds"])
def test_a_chain_as_one_graph(name, per_sample):
    """The bits of the steps, for other seeds and other values of the arguments at each replay."""
    eager, graph, automatic = samplers(False, True, "auto", **CHAINS[name])
    made = []
    for k in range(4):
        seeds = {"sample_seeds": [k, k + 10, k + 20]} if per_sample else {"seed": torch.tensor([k], device=DEVICE) if k % 2 else k}
        kwargs = {"model_kwargs": {"shift": torch.full((3, 1, 1, 1), 0.1 * k, device=DEVICE)}}
        if "guidance_scale" in CHAINS[name]:
            kwargs["unconditional_kwargs"] = {"shift": torch.zeros(3, 1, 1, 1, device=DEVICE)}
        expected = eager(**seeds, **kwargs)
        made.append(graph(**seeds, **kwargs))
        assert_same(made[-1], expected)
        assert_same(automatic(**seeds, **kwargs), expected)
    for sampler in (graph, automatic):
        assert recorded_forms(sampler) == 1
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(made, 2))


@pytest.mark.parametrize("options", [{}, {"threshold": 0.9}], ids=["plain", "thresholded"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_chain_does_not_synchronise(guided, options):
    """Nor do arguments that both halves of guidance share."""
    shared = {"shift": torch.zeros(1, 1, 1, 1, device=DEVICE)}
    (sampler,) = samplers(False, **options, **({"guidance_scale": 2.0} if guided else {}))
    sampler = partial(sampler, model_kwargs=shared, unconditional_kwargs=dict(shared) if guided else None)
    seeds = torch.arange(3, device=DEVICE)
    sampler(sample_seeds=seeds)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler(sample_seeds=seeds)
        sampler(seed=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_network_that_synchronises_falls_back(caplog):
    """With one warning; the failed recording leaves neither the stream nor torch's generator behind."""
    automatic, graph = samplers("auto", True, model=network(synchronises=True))
    (eager,) = samplers(False)
    stream = torch.cuda.current_stream()
    with caplog.at_level("WARNING", logger="fastgen"):
        for seed in range(4):
            assert_same(automatic(seed=seed), eager(seed=seed))
    assert len(caplog.records) == 1
    with pytest.raises(RuntimeError, match="^cuda_graph: the chain could not be recorded"):
        graph(seed=1)
    assert torch.cuda.current_stream() == stream
    assert torch.randn(3, device=DEVICE).isfinite().all()
    (good,) = samplers(True)
    assert_same(good(seed=1), eager(seed=1))


@pytest.mark.parametrize("fails", ["in the warm-up", "in the capture", "at its end"])
def test_a_failed_recording_leaves_the_allocator_as_it_was(fails):
    """Memory that two streams have used comes back only while the allocator knows of no capture."""

    class Fails(Network):
        calls = 0

        def forward(self, x, t):
            self.calls += 1
            if fails == "at its end" or self.calls == {"in the warm-up": 2, "in the capture": 4}[fails]:
                if fails != "at its end":
                    raise ValueError("on purpose")
                with contextlib.suppress(RuntimeError):
                    x.sum().item()  # which a capture does not survive
            return super().forward(x, t)

    (graph,) = samplers(True, model=Fails().to(DEVICE).eval())
    with pytest.raises(RuntimeError, match="^cuda_graph: the chain could not be recorded"):
        graph(seed=1)
    del graph
    gc.collect()
    torch.cuda.synchronize()
    torch.empty(1, device=DEVICE)  # an allocation looks for what has become free
    before, side = torch.cuda.memory_allocated(), torch.cuda.Stream()
    for _ in range(2):
        x = torch.zeros(2**22, device=DEVICE)
        with torch.cuda.stream(side):
            x.add_(1)
        x.record_stream(side)
        del x
        torch.cuda.synchronize()
        torch.empty(1, device=DEVICE)
    assert torch.cuda.memory_allocated() == before
    torch.cuda.MemPool()  # up to torch 2.12 its end would abort the process


def test_a_recording_and_another_threads_work(kernels):
    """Its replays on every torch, its random numbers on those whose generators know a recording from what is none."""
    eager, replayed, recorded = samplers(False, True, True)
    expected, over, seen, errors = eager(seed=1), threading.Event(), [], []
    replayed(seed=1)

    def work():
        try:
            with fastgen.use_backend(kernels), torch.cuda.stream(torch.cuda.Stream()):
                while not over.is_set():
                    seen.append(replayed(seed=1))
                    if fastgen._core.backends.torch_version() >= (2, 12):
                        torch.randn(3, device=DEVICE)
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for k in range(3):
            recorded(seed=1, model_kwargs={"shift": float(k)})  # three forms
    finally:
        over.set()
        thread.join()
    assert seen and not errors
    for x in [*seen, recorded(seed=1, model_kwargs={"shift": 0.0})]:
        assert_same(x, expected)


@pytest.mark.parametrize("count", [2, 6])
def test_forms_of_calls_in_turn(count):
    """Up to four keep their graphs; of more, each gives its memory to the next while the last replay may still run."""
    eager, graph = samplers(False, True)
    forms = [{"model_kwargs": {"shift": 0.1 * k}} for k in range(count)]
    made = [graph(seed=1, **form) for _ in range(3) for form in forms]
    for x, form in zip(made, forms * 3, strict=True):
        assert_same(x, eager(seed=1, **form))
    assert recorded_forms(graph) == min(count, 4)


def test_replays_on_several_streams_and_threads(kernels):
    """They share the graph's memory, hence take turns; their results are tensors of their own."""
    eager, graph = samplers(False, True)
    expected = [eager(seed=seed) for seed in range(4)]
    graph(seed=0)
    torch.cuda.synchronize()
    made = [None] * 4

    def work(seed):
        with fastgen.use_backend(kernels), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(LATE // 10)
            made[seed] = [graph(seed=seed) for _ in range(10)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, results_of in enumerate(made):
        for x in results_of:
            assert_same(x, expected[seed])


def test_a_graph_sees_weights_that_move():
    model = network()
    eager, graph = samplers(False, True, model=model)
    graph(seed=1)
    with torch.no_grad():
        model.layers[0].weight.mul_(1.5)  # in place
    assert_same(graph(seed=1), eager(seed=1))
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)  # elsewhere
    assert_same(graph(seed=1), eager(seed=1))


def test_a_chain_in_the_callers_graph():
    """It is recorded with what surrounds it, and reads its seed from the device."""
    eager, automatic = samplers(False, "auto")
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    graph, (made,) = captured(lambda: automatic(seed=seed))
    for k in (5, 6):
        seed.fill_(k)
        graph.replay()
        assert_same(made, eager(seed=k))


def test_a_chain_outlives_its_sampler(kernels):
    """The memory of a sampler's own schedule is that of the stream it was made on, which would give it to whoever asks next."""
    model = network()
    expected = fastgen.sample(model, SHAPE, SCHEDULE, steps=10, seed=1)
    for graph in (False, True):
        (sampler,) = samplers(graph, model=model, steps=10)
        sampler(seed=1)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(LATE)
            made = sampler(seed=1)
        rows = sampler._chain.constants[1]
        kept = sampler if graph else None  # whose private memory the allocator knows nothing about
        del sampler
        asked = [torch.full_like(rows, torch.nan) for _ in range(200)]
        side.synchronize()
        assert_same(made, expected)
        del kept, asked


def test_a_copy_of_a_policy():
    """It samples from the copy's network, wherever that has gone since."""
    eager, graph = samplers(False, True)
    policy = torch.nn.ModuleDict({"network": graph._model})
    policy.sampler = graph
    graph(seed=1)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert other.sampler._model is other["network"]
        assert_same(other.sampler(seed=1), eager(seed=1))
    automatic = copy.deepcopy(network()).cpu()
    sampler = fastgen.Sampler(automatic, SHAPE, SCHEDULE)
    assert sampler(seed=1).is_cpu
    automatic.to(DEVICE)
    for _ in range(3):
        assert_same(sampler(seed=1), eager(seed=1))


def test_a_graph_under_autocast():
    """The weights that autocast casts are not read from its cache, which ends with it; without it, and with another dtype, the
    chain is another one."""
    eager, graph = samplers(False, True)
    for seed in range(3):
        made = []
        for how in ({"enabled": False}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}):
            with torch.autocast("cuda", **how):
                made.append(graph(seed=seed))
                assert_same(made[-1], eager(seed=seed))
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(made, 2))
    assert recorded_forms(graph) == 3


# ---- several devices ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one(call):
    here, there = (inputs(torch.device("cuda", index), SHAPE) for index in (0, 1))
    with torch.cuda.device(0):
        expected, made = results(call(here)), results(call(there))
        assert torch.cuda.current_device() == 0
    for e, m in zip(expected, made, strict=True):
        assert m.device.index == 1
        assert_same(m.to(e.device), e)


RAW = {  # the ops beneath Python's checks, with one tensor at a time on the CPU
    "q_sample": lambda i, rows: (i.x, rows, i.t, 0, i.noise, None, None, 0),
    "q_sample seeds": lambda i, rows: (i.x, rows, i.t, 0, None, i.seeds, None, 0),
    "ddpm_step": lambda i, rows: (i.x, i.m, rows, i.t, 0, i.noise, None, None, None, i.threshold, False),
    "ddim_step": lambda i, rows: (i.x, i.m, rows, i.t, 0, None, i.seeds, None, 1.0, None, False),
    "q_posterior": lambda i, rows: (i.x, i.m, rows, i.t, 0),
    "bce_with_logits": lambda i, rows: (i.x, i.target, i.weight, i.weight, 1),
    "bce_with_logits_backward": lambda i, rows: (i.gradient, i.x, i.target, i.weight, i.weight, 0),
    "diffusion_loss": lambda i, rows: (i.m, i.x, rows, i.t, 0, i.noise, None, None, 0, i.threshold, 2, 0, 1.0, 1),
    "diffusion_loss seeds": lambda i, rows: (i.m, i.x, rows, i.t, 0, None, i.seeds, None, 0, None, 0, 0, 1.0, 0),
    "diffusion_loss_backward": lambda i, rows: (i.upstream, i.m, i.x, rows, i.t, 0, i.noise, None, None, 0, None, 2, 0, 1.0, 1),
    "diffusion_loss_backward_x0": lambda i, rows: (i.threshold, i.m, i.x, rows, i.t, 0, i.noise, None, None, 0, None, 2, 0, 1.0, 0),
}


@pytest.mark.parametrize("name", RAW)
def test_tensors_elsewhere_are_refused_by_the_ops(name):
    """A pointer into the host's memory never reaches a kernel."""
    op = getattr(torch.ops.fastgen, name.split()[0])
    tables = {"q_sample": SCHEDULE.q_sample_table, "q_posterior": SCHEDULE.q_posterior_table}
    losses = "diffusion_loss", "diffusion_loss_backward", "diffusion_loss_backward_x0"
    tables |= dict.fromkeys(losses, partial(SCHEDULE.diffusion_loss_table, "v_prediction", None))
    table = tables.get(name.split()[0], lambda *where: SCHEDULE.ddpm_step_table("epsilon", "beta", *where))
    arguments = RAW[name](inputs(DEVICE), table(DEVICE, torch.float32).rows)
    op(*arguments)
    for k, x in enumerate(arguments):
        if isinstance(x, torch.Tensor):
            # NotImplementedError is a RuntimeError too
            with pytest.raises(RuntimeError):
                op(*arguments[:k], x.cpu(), *arguments[k + 1 :])
    torch.cuda.synchronize()


def test_logits_elsewhere_are_refused_by_the_ops():
    i, ops = inputs(DEVICE), torch.ops.fastgen
    for logits in ([i.x, i.m.cpu()], [i.x.cpu(), i.m]):
        with pytest.raises(RuntimeError):
            ops.gan_loss(logits, 1, 0, 0.0, 1, False, False)
        with pytest.raises(RuntimeError):
            ops.gan_loss_backward(i.scalar, logits, 1, 0, 0.0, 1)
        with pytest.raises(ValueError, match="logits: expected tensors on "):
            fastgen.discriminator_loss(*logits)
    with pytest.raises(RuntimeError):
        ops.gan_loss_backward(i.scalar.cpu(), [i.x], 1, 0, 0.0, 1)
    torch.cuda.synchronize()


# ---- timesteps that nobody looked at --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, fact in FACTS.items() if fact.timed])
@pytest.mark.parametrize("arrange", [torch.clone, channels_last])
def test_bad_timestep_makes_its_sample_nan(name, arrange):
    good = inputs(DEVICE, (5, 4, 33, 35), arrange=arrange)
    expected = clones(CALLS[name](good))
    for position, bad in enumerate((-1, 40, 2**40, -(2**63), 2**63 - 1)):
        i = inputs(DEVICE, (5, 4, 33, 35), arrange=arrange)
        i.t[position] = i.later[position] = bad
        others = [k for k in range(5) if k != position]
        for y, e in zip(clones(CALLS[name](i)), expected, strict=True):
            if y.dim() == 0:
                assert y.isnan()
                continue
            assert y[position].isnan().all()
            assert_same(y[others], e[others])
    torch.cuda.synchronize()


# ---- launches, allocations, synchronisation -------------------------------------------------------------------------


def test_no_synchronisation(call):
    i = inputs(DEVICE, SHAPE)
    call(i)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_allocates_its_results_and_nothing_else(call, request):
    name = request.node.callspec.params["call"]
    i = inputs(DEVICE, (3, 4, 129, 257))
    made = call(i)
    del made
    keys = ("allocation.all.allocated", "requested_bytes.all.current")
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(DEVICE)
    made = results(call(i))
    after = torch.cuda.memory_stats(DEVICE)
    allocated, grown = (after[key] - before[key] for key in keys)
    fresh = [y for y in made if y.data_ptr() not in (i.out.data_ptr(), i.image.data_ptr())]
    # a sum of many blocks may need room for theirs, until it is done
    allowed = len(fresh) + FACTS[name].sums
    assert len(fresh) <= allocated <= allowed
    assert grown == sum(y.nbytes for y in fresh)


def test_launches_of_each_call(kernels):
    """One, or what the Triton backend needs for a sum. No memset, no copy; torch's kernel that inverts bits marks where a call
    begins."""
    i, mark = inputs(DEVICE, SHAPE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for call in CALLS.values():
        call(i)
    mark.bitwise_not_()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in CALLS.values():
            mark.bitwise_not_()
            call(i)
        mark.bitwise_not_()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    launched = []
    for event in events:
        if "bitwise_not" in event.name:
            launched.append([])
        elif launched:
            launched[-1].append(event.name)
    assert len(launched) == len(CALLS) + 1, f"the profiler saw {len(launched)} of {len(CALLS) + 1} marks"
    wrong = {name: names for name, names in zip(CALLS, launched, strict=False) if len(names) != FACTS[name].launches(kernels)}
    assert wrong == {}


def test_backward_is_one_launch_and_one_allocation():
    i = inputs(DEVICE, SHAPE)
    leaf = i.x.clone().requires_grad_()
    loss = fastgen.bce_with_logits(leaf, i.target)
    torch.autograd.grad(loss, leaf, i.scalar)
    loss = fastgen.bce_with_logits(leaf, i.target)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        (gradient,) = torch.autograd.grad(loss, leaf, i.scalar)
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"] - before == 1
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 1, names
    assert gradient.isfinite().all()


def test_a_training_step_stores_no_noise(kernels):
    """x_t, the loss with room for the sums of its thread blocks, the gradient: three launches, or four of Triton's."""
    i = inputs(DEVICE, (3, 4, 129, 257))
    leaf = i.m.clone().requires_grad_()

    def step():
        x_t = fastgen.q_sample(i.x, i.t, SCHEDULE, seed=i.seeds)
        loss = fastgen.diffusion_loss(leaf, i.x, i.t, SCHEDULE, seed=i.seeds)
        return x_t, loss, *torch.autograd.grad(loss, leaf, i.upstream)

    step()
    torch.cuda.synchronize()
    keys = ("allocation.all.allocated", "requested_bytes.all.current")
    before = torch.cuda.memory_stats(DEVICE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        made = step()
        torch.cuda.synchronize()
    after = torch.cuda.memory_stats(DEVICE)
    assert after[keys[0]] - before[keys[0]] == 4
    assert after[keys[1]] - before[keys[1]] == sum(y.nbytes for y in made)
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == (4 if kernels == "triton" else 3), names


@pytest.mark.parametrize("tensors, launches", [(2, 1), (32, 1), (33, 2), (70, 3)])
def test_launches_and_allocations_of_the_gan_loss(kernels, tensors, launches):
    """Forward: the loss and room for the sums of the thread blocks; backward: a gradient for each of the logits. The Triton backend
    launches each of the logits by itself, and the sum."""
    i = inputs(DEVICE, SHAPE)
    leaves = [i.x[:, :, k % 7 : k % 7 + 3].clone().requires_grad_() for k in range(tensors)]
    step = lambda: torch.autograd.grad(fastgen.discriminator_loss(leaves[:1], leaves[1:]), leaves, i.scalar)  # noqa: E731
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        gradients = step()
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"] - before == 2 + tensors
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == (2 * tensors + 1 if kernels == "triton" else 2 * launches), names
    assert all(gradient.isfinite().all() for gradient in gradients)


# ---- values, on shapes that take a kernel's every path --------------------------------------------------------------


def assert_near_eager(name, *how):
    """Both round once to the dtype; beneath that, float32's arithmetic, and for a seed the fast functions of Box–Muller. A bare op
    has no eager backend, so the CPU's kernel stands for it, on the same numbers."""
    i, seeded = inputs(DEVICE, *how), FACTS[name].seeded
    if not fits(name, i):
        return
    actual = clones(CALLS[name](i))
    with fastgen.use_backend("eager"):
        expected = [y.to(DEVICE) for y in clones(CALLS[name](inputs("cpu", *how) if FACTS[name].bare else i))]
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        if a.numel() == 0:
            continue
        if a.dtype is torch.uint8:
            assert_same(a, e)
            continue
        a, e, eps = a.double(), e.double(), torch.finfo(a.dtype).eps
        assert torch.equal(a.isnan(), e.isnan())
        excess = (a - e).abs() - 2 * eps * e.abs()
        worst, mean = excess.nan_to_num(0.0).max().item(), excess.clamp(min=0).nan_to_num(0.0).mean().item()
        scale = max(1.0, e.nan_to_num(0.0).abs().max().item())
        assert worst <= (5e-3 if seeded else 2e-6) * scale and mean <= (1e-5 if seeded else 1e-6) * scale


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last])
def test_dtypes_against_eager(name, arrange):
    for dtype, m_dtype in itertools.product(DTYPES, DTYPES):
        assert_near_eager(name, (3, 4, 9, 37), dtype, m_dtype, arrange)


SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 1023, 1025, 2047, 2049, 4095, 4097, 100_003]


@pytest.mark.parametrize("name", CALLS)
def test_sizes_against_eager(name):
    for n, dtype in itertools.product(SIZES, (torch.float32, torch.bfloat16)):
        assert_near_eager(name, (2, 1, n), dtype)


@pytest.mark.parametrize("name", [name for name, fact in FACTS.items() if not fact.sums])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 320])
def test_channels_last_is_bit_identical(name, channels):
    for dtype, m_dtype in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float64,) * 2):
        for size in ((1, 1), (3, 5), (16, 16), (31, 33)):
            shape = (3, channels, *size)
            expected = clones(CALLS[name](inputs(DEVICE, shape, dtype, m_dtype)))
            actual = results(CALLS[name](inputs(DEVICE, shape, dtype, m_dtype, channels_last)))
            assert_all_same(tuple(actual), tuple(expected))


def shifted(by):
    """Lays a tensor out contiguously, `by` elements past an aligned address."""

    def arrange(x):
        around = torch.nan if x.is_floating_point() else 7  # of bytes
        line = torch.full((x.numel() + by,), around, dtype=x.dtype, device=x.device)[by:]
        return line.copy_(x.reshape(-1)).view(x.shape)

    return arrange


@pytest.mark.parametrize("name", CALLS)
def test_unaligned_views(name):
    """Storage that begins anywhere, of all tensors alike and of one alone. A sum may then be added up in another order."""
    same = torch.testing.assert_close if FACTS[name].sums else assert_all_same
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16, torch.float64), ((2, 4, 37), (2, 1, 2051), (3, 2, 512))):
        expected = clones(CALLS[name](inputs(DEVICE, shape, dtype)))
        for by in (1, 2, 3, 5, 8):
            same(tuple(results(CALLS[name](inputs(DEVICE, shape, dtype, arrange=shifted(by))))), tuple(expected))
        for field in ("x", "m", "wide", "noise", "out", "target"):
            i = inputs(DEVICE, shape, dtype)
            setattr(i, field, shifted(1)(getattr(i, field)))
            same(tuple(results(CALLS[name](i))), tuple(expected))


@pytest.mark.parametrize("name", INTO)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, shifted(1)], ids=["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place(name, arrange, dtype):
    shape = (5, 3, 65, 67)
    expected = clones(INTO[name](inputs(DEVICE, shape, dtype)))
    for field in ("x", "m", "noise"):
        i = inputs(DEVICE, shape, dtype, arrange=arrange)
        target = getattr(i, field)
        assert INTO[name](i, out=target) is target
        assert_all_same(target, tuple(expected))


# ---- the same bits on every run -------------------------------------------------------------------------------------


def beside_other_work(loss):
    """What `loss` gives with the device to itself, and 30 times beside copies on another stream."""
    first, other = loss(), torch.cuda.Stream()
    a, b = torch.zeros(2**24, device=DEVICE), torch.zeros(2**24, device=DEVICE)
    torch.cuda.synchronize()
    made = []
    for k in range(30):
        with torch.cuda.stream(other):
            b[k * 1000 :].copy_(a[k * 1000 :])
        made.append(loss())
    torch.cuda.synchronize()
    return first, made


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n", [1, 64, 1_000, 65_537, 5_000_011])
def test_sums_have_the_same_bits_on_every_run(reduction, n):
    i = inputs(DEVICE, (1, 1, n))
    first, losses = beside_other_work(lambda: fastgen.bce_with_logits(i.x, i.target, i.weight, reduction))
    assert all(torch.equal(loss, first) for loss in losses)
    exact = reference.bce_with_logits(*map(array, (i.x, i.target, i.weight)), reduction=reduction)
    assert first.item() == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("monitors", [False, True])
@pytest.mark.parametrize("n", [1, 64, 65_537, 5_000_011])
def test_gan_losses_have_the_same_bits_on_every_run(n, monitors):
    i = inputs(DEVICE, (1, 1, n))
    scales = [i.x, *i.x.reshape(-1).split(max(n // 50, 1))[:50]]  # two launches
    first, made = beside_other_work(lambda: torch.ops.fastgen.gan_loss([*scales, i.m], len(scales), 0, 0.1, 1, monitors, False))
    for again in made:
        assert_all_same(tuple(again), tuple(first))
    exact = reference.gan_loss([array(x) for x in scales], [array(i.m)], 0.1)
    assert first[0].item() == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1_000_003), (700, 3, 17), (3, 8, 64, 64)])
def test_diffusion_losses_have_the_same_bits_on_every_run(shape, reduction):
    i = inputs(DEVICE, shape)
    first, made = beside_other_work(lambda: fastgen.diffusion_loss(i.m, i.x, i.t, SCHEDULE, noise=i.noise, reduction=reduction))
    assert all(torch.equal(again, first) for again in made)
    assert_close(first, reference.diffusion_loss(array(i.m), array(i.noise), reduction=reduction))


# ---- tensors past 2³² elements --------------------------------------------------------------------------------------

MANY = 2**32 + 4099


@pytest.fixture
def room():
    """Skips where the device has not that much memory free."""

    def need(total):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < total + 2**30:
            pytest.skip(f"needs {total / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")

    yield need
    torch.cuda.empty_cache()


def places(n):
    """Where to look: the ends, and about the powers of two at which an index overflows."""
    begins = [0, n - 1029, *(power - 517 for power in (2**31, 2**32) if power + 517 < n - 1029), 3 * n // 4 + 1]
    return [slice(begin, begin + 1029) for begin in begins]


def large(n, device, dtype=torch.bfloat16, fill=0.25):
    """(1, n) numbers: noise at `places`, `fill` elsewhere."""
    x = torch.full((1, n), fill, dtype=dtype, device=device)
    for k, place in enumerate(places(n)):
        values = np.random.default_rng(k).standard_normal(1029)
        x[0, place] = torch.tensor(values).to(device, dtype)
    return x


def check_everywhere_written(y):
    assert all(part.isfinite().all() for part in y.reshape(-1).split(2**26))


def check_large_randn(n, device):
    z = fastgen.randn((1, n), seed=-5, offset=2**33, device=device)
    for place in places(n):
        difference = np.abs(array(z[0, place]) - reference.normals_between(place.start, place.stop, -5, 2**33))
        assert difference.max() < 1e-3 and difference.mean() < 1e-5
    check_everywhere_written(z)


def check_large_q_sample(n, device):
    x = large(n, device)
    before = [array(x[:, place]) for place in places(n)]
    y = fastgen.q_sample(x, 17, SCHEDULE, seed=7, out=torch.full_like(x, torch.nan))
    for place, x0 in zip(places(n), before, strict=True):
        noise = reference.normals_between(place.start, place.stop, 7)
        expected = reference.q_sample(x0, SCHEDULE.betas, 17, noise)
        np.testing.assert_allclose(array(y[:, place]), expected, rtol=2**-8, atol=1e-3)
    check_everywhere_written(y)


def check_large_ddpm_step(n, device):
    """In place; the timestep in a tensor."""
    x, m = large(n, device), large(n, device, fill=0.5)
    before = [array(x[:, place]) for place in places(n)]
    y = fastgen.ddpm_step(x, m, torch.tensor([17], device=device), SCHEDULE, seed=7, clip=1.0, out=x)
    for place, x_t in zip(places(n), before, strict=True):
        noise = reference.normals_between(place.start, place.stop, 7, 17)
        expected, _ = reference.ddpm_step(x_t, array(m[:, place]), SCHEDULE.betas, 17, noise, clip=1.0)
        np.testing.assert_allclose(array(y[:, place]), expected, rtol=2**-8, atol=1e-3)
    check_everywhere_written(y)


def check_large_q_posterior(n, device):
    x0, x_t = large(n, device), large(n, device, fill=0.5)
    mean, _, _ = fastgen.q_posterior(x0, x_t, 17, SCHEDULE)
    for place in places(n):
        expected, _ = reference.q_posterior(array(x0[:, place]), array(x_t[:, place]), SCHEDULE.betas, 17)
        assert_close(mean[:, place], expected, scale=5)
    check_everywhere_written(mean)


def check_large_batch(batch, event, device):
    """Many samples with timesteps of their own; in none of them an index is large."""
    x = torch.full((batch, event), 0.25, dtype=torch.bfloat16, device=device)
    t = torch.arange(batch, device=device) % 40
    y = fastgen.q_sample(x, t, SCHEDULE, seed=7)
    for sample in (0, 1, batch // 2, batch - 2, batch - 1):
        noise = reference.normals_between(0, event, 7, 0, sample)[None]
        expected = reference.q_sample(np.full((1, event), 0.25), SCHEDULE.betas, sample % 40, noise)
        np.testing.assert_allclose(array(y[sample : sample + 1]), expected, rtol=2**-8, atol=1e-3)
    check_everywhere_written(y)


def check_large_channels_last(side, device):
    shape = (2, 5, side, side)
    x = torch.full((2, side, side, 5), 0.25, dtype=torch.bfloat16, device=device).movedim(-1, 1)
    y = fastgen.q_sample(x, 17, SCHEDULE, seed=7, out=x)
    assert y.shape == shape and y.movedim(1, -1).is_contiguous()
    for sample, channel, row in itertools.product((0, 1), (0, 4), (0, side // 2, side - 1)):
        begin = (channel * side + row) * side
        noise = reference.normals_between(begin, begin + side, 7, 0, sample)
        expected = reference.q_sample(np.full(side, 0.25), SCHEDULE.betas, 17, noise)
        np.testing.assert_allclose(array(y[sample, channel, row]), expected, rtol=2**-8, atol=1e-3)
    check_everywhere_written(x.movedim(1, -1))


def check_large_bce(n, device):
    """Logits so large at the end that the mean shows whether they were counted; targets in float32, hence the mean too."""
    x, y = large(n, device), large(n, device, torch.float32, 0.5).sigmoid_()
    x[:, places(n)[1]] *= 1e5
    parts = [(array(x[0, place]), array(y[0, place])) for place in places(n)]
    one = reference.bce_with_logits(array(x[:, 2000:2001]), array(y[:, 2000:2001]))
    rest = n - sum(part[0].size for part in parts)
    exact = rest * one + sum(reference.bce_with_logits(*part, reduction="sum") for part in parts)
    assert fastgen.bce_with_logits(x, y).item() == pytest.approx(exact / n, rel=1e-5)
    upstream = torch.tensor(1.0, device=device)
    gradient = torch.ops.fastgen.bce_with_logits_backward(upstream, x, y, None, None, 2)
    for place, part in zip(places(n), parts, strict=True):
        assert_close(gradient[0, place], reference.bce_with_logits_gradient(*part))
    check_everywhere_written(gradient)


def check_large_diffusion_loss(n, device):
    """The residuals at the end dwarf the rest of the sum."""
    m = large(n, device)
    m[:, places(n)[1]] *= 1e5
    parts = [(array(m[0, place]), reference.normals_between(place.start, place.stop, 7)) for place in places(n)]
    rest = (n - sum(part[0].size for part in parts)) * (1 + 0.25**2)  # the mean of (¼ − ε)²
    exact = rest + sum(reference.diffusion_loss(*part, reduction="sum") for part in parts)
    options = {"seed": 7, "reduction": "sum"}
    assert fastgen.diffusion_loss(m, m, 17, SCHEDULE, **options).item() == pytest.approx(exact, rel=1e-3)
    assert fastgen.diffusion_loss(m, m, 17, SCHEDULE, seed=7, reduction="none").item() == pytest.approx(exact / n, rel=1e-3)
    rows = SCHEDULE.diffusion_loss_table("epsilon", None, m.device, torch.float32).rows
    upstream = torch.tensor(1.0, device=device)
    gradient = torch.ops.fastgen.diffusion_loss_backward(upstream, m, m, rows, None, 17, None, None, 7, 0, None, 0, 0, 1.0, 2)
    for place, part in zip(places(n), parts, strict=True):
        np.testing.assert_allclose(array(gradient[0, place]), reference.diffusion_loss_slope(*part), rtol=2**-8, atol=2e-3)
    check_everywhere_written(gradient)


def check_large_gan_loss(n, device):
    x = large(n, device)
    x[:, places(n)[1]] *= 1e5
    parts = [array(x[0, place]) for place in places(n)]
    rest = (n - sum(part.size for part in parts)) * reference.bce_with_logits(array(x[:, 2000:2001]), 0.9)
    exact = rest + sum(reference.bce_with_logits(part, 0.9, reduction="sum") for part in parts)
    small = x[0, :5].clone()
    loss = fastgen.discriminator_loss(x, small, label_smoothing=0.1)
    assert loss.item() == pytest.approx(exact / n + reference.bce_with_logits(array(small), 0.0), rel=1e-5)
    upstream = torch.tensor(1.0, device=device)
    gradient, _ = torch.ops.fastgen.gan_loss_backward(upstream, [x, small], 1, 0, 0.1, 2)
    for place, part in zip(places(n), parts, strict=True):
        assert_close(gradient[0, place], reference.bce_with_logits_gradient(part, 0.9))
    check_everywhere_written(gradient)


@pytest.mark.parametrize(
    "check, bytes_each",
    [
        (check_large_randn, 4),
        (check_large_q_sample, 2 * 2),
        (check_large_ddpm_step, 2 * 2),
        (check_large_q_posterior, 3 * 2),
        (check_large_bce, 2 + 4 + 2),
        (check_large_diffusion_loss, 2 + 2),
        (check_large_gan_loss, 2 + 2),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_past_32_bits(room, check, bytes_each):
    room(bytes_each * MANY)
    check(MANY, DEVICE)


@pytest.mark.parametrize("batch, event", [(70_001, 61_441), (MANY // 3 + 1, 3)])
def test_batch_past_32_bits(room, batch, event):
    room(2 * batch * event * 2 + 2 * batch * 8)
    check_large_batch(batch, event, DEVICE)


def test_channels_last_past_32_bits(room):
    side = 20_800
    assert prod((2, 5, side, side)) > 2**32
    room(2 * 5 * side * side * 2)
    check_large_channels_last(side, DEVICE)
