"""torch's own noise made in the kernels: the bits of torch.randn, and the state in which it leaves the generator."""

import math
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastgen
from fastgen._core import dispatch, torch_noise

pytestmark = pytest.mark.skipif(not dispatch.has("torch_randn"), reason="an op of the CPU alone, in the compiled library")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
SCHEDULE = fastgen.Schedule.linear(40)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Of whatever they can make, be it worthwhile or not."""
    for what in ("IN_AN_OP", "TO_FILL"):
        monkeypatch.setattr(torch_noise, what, (torch_noise.LEAST, torch_noise.LEAST))
    with fastgen.use_backend("cpp"):
        yield


@pytest.fixture(params=["alone", "beside a thread"])
def company(request, monkeypatch):
    """Without other threads (those of pytest draw nothing), and with one that waits."""
    if request.param == "alone":
        monkeypatch.setattr(threading, "active_count", lambda: 1)
        yield
        return
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    yield
    end.set()
    other.join()


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same_bits(a, b):
    assert a.shape == b.shape and a.dtype is b.dtype
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    assert torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def generator_at(seed, words):
    """A generator after so many words, that is at any place of a twist."""
    generator = torch.Generator().manual_seed(seed)
    if words:
        torch.empty(words, dtype=torch.int32).random_(generator=generator)
    return generator


def twins(seed, words=0):
    return generator_at(seed, words), generator_at(seed, words)


def normal(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- torch_randn ----------------------------------------------------------------------------------------------------


def test_the_kernels_reproduce_this_torch():
    """On the machines and releases that the tests run on; elsewhere torch.randn is called."""
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("a torch without AVX2 makes its normals in another way")
    assert torch_noise.arithmetic(torch.float32) is True
    assert "made in the kernels for float32" in fastgen.backend_info()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("words", [0, 1, 608, 623, 624, 625, 1000])
def test_torch_randn(dtype, words, threads, company):
    """Whole blocks and not, one twist and many, shared by threads and not."""
    for count in (0, 1, 15, 16, 17, 511, 512, 513, 527, 624, 1248, 5000, 8191, 70_003):
        ours, theirs = twins(count, words)
        same_bits(fastgen.torch_randn((count,), generator=ours, dtype=dtype), torch.randn(count, generator=theirs, dtype=dtype))
        assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_of_a_tail(dtype):
    ours, theirs = twins(3)
    for count in range(512, 560):
        same_bits(fastgen.torch_randn((count,), generator=ours, dtype=dtype), torch.randn(count, generator=theirs, dtype=dtype))
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_torch_randn_of_the_default_generator_and_dtype():
    torch.manual_seed(5)
    expected = torch.randn(7, 300), torch.randn(2), torch.get_rng_state()
    torch.manual_seed(5)
    found = fastgen.torch_randn((7, 300)), fastgen.torch_randn((2,)), torch.get_rng_state()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert fastgen.torch_randn((0, 600)).shape == (0, 600)


def test_a_normal_that_is_left_over_stays(company):
    """torch keeps the second of a pair that it made for short noise, and long noise does not touch it."""
    ours, theirs = twins(1)
    for count in (3, 600, 1, 5000, 3):
        same_bits(fastgen.torch_randn((count,), generator=ours), torch.randn(count, generator=theirs))
        x = normal((count,), 1)
        z = torch.randn(count, generator=theirs)
        same_bits(fastgen.q_sample(x, 3, SCHEDULE, generator=ours), fastgen.q_sample(x, 3, SCHEDULE, noise=z))
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_torch_randn_of_a_meta_tensor_and_under_a_mode():
    assert fastgen.torch_randn((600,), device="meta").is_meta
    with torch._subclasses.FakeTensorMode():
        assert fastgen.torch_randn((600,)).shape == (600,)
    compiled = torch.compile(lambda x: fastgen.torch_randn(x.shape) + x, backend="eager", fullgraph=True, dynamic=True)
    for count in (600, 700, 3):
        assert compiled(torch.zeros(4, count)).shape == (4, count)


# ---- in the ops -----------------------------------------------------------------------------------------------------


SHAPES = [(1, 16), (1, 112), (3, 7), (5, 16, 3), (2, 3, 63), (2, 3, 64), (3, 1000), (1, 70_001), (40, 1029), (64,)]


def t_of(shape, per_sample):
    return torch.arange(shape[0]) % 40 if per_sample else 7


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["one t", "t each"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", [fastgen.q_sample, fastgen.q_step])
def test_q_sample(op, shape, per_sample, dtype, threads):
    ours, theirs = twins(11, 77)
    x, t = normal(shape, 1, dtype), t_of(shape, per_sample)
    expected = op(x, t, SCHEDULE, noise=torch.randn(shape, generator=theirs, dtype=dtype))
    same_bits(op(x, t, SCHEDULE, generator=ours), expected)
    assert torch.equal(ours.get_state(), theirs.get_state())
    torch.randn(shape, generator=theirs, dtype=dtype)
    op(x, t, SCHEDULE, generator=ours, out=x)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_q_sample_in_place_and_of_bytes(company):
    x = normal((3, 1001), 1)
    ours, theirs = twins(2)
    expected = fastgen.q_sample(x, 3, SCHEDULE, noise=torch.randn(x.shape, generator=theirs))
    assert fastgen.q_sample(x, 3, SCHEDULE, generator=ours, out=x) is x
    same_bits(x, expected)
    image = (normal((2, 3, 20), 3) * 50).to(torch.uint8)
    out = torch.empty(image.shape, dtype=torch.bfloat16)
    expected = fastgen.q_sample(image, 3, SCHEDULE, noise=torch.randn(image.shape, generator=theirs, dtype=torch.bfloat16))
    same_bits(fastgen.q_sample(image, 3, SCHEDULE, generator=ours, out=out), expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


OPTIONS = {
    "plain": {},
    "clip": {"clip": 0.7},
    "x0": {"return_x0": True},
    "threshold": {"threshold": True},
    "learned": {"variance": "learned_range", "clip": 1.0, "return_x0": True},
    "guidance": {"unconditional_output": True, "guidance_scale": 3.0},
    "out": {"out": True},
    "in place": {"out": "x_t"},
}


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["one t", "t each"])
@pytest.mark.parametrize("shape", [(1, 16, 7), (5, 4, 9), (3, 2, 500), (40, 3, 343)], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_steps(option, shape, per_sample, dtype, threads):
    """Of a sample at t = 0 the noise is drawn too, and not used."""
    options, t = dict(OPTIONS[option]), t_of(shape, per_sample)
    x, m = normal(shape, 1, dtype), normal(shape, 2, dtype)
    if "variance" in options:
        m = torch.cat([m, normal(shape, 3, dtype)], dim=1)
    if "threshold" in options:
        options["threshold"] = torch.linspace(0.5, 2, shape[0])
    if "unconditional_output" in options:
        options["unconditional_output"] = m.flip(-1)
    steps = [fastgen.ddpm_step] if "variance" in options else [fastgen.ddpm_step, fastgen.ddim_step]
    for step in steps:
        if step is fastgen.ddim_step:
            options["eta"] = 0.5
        ours, theirs = twins(4, 601)
        out = options.pop("out", None)
        z = torch.randn(shape, generator=theirs, dtype=dtype)
        expected = step(x, m, t, SCHEDULE, noise=z, **options)
        if out is not None:
            options["out"] = x.clone() if out == "x_t" else torch.empty_like(x)
        found = step(options["out"] if out == "x_t" else x, m, t, SCHEDULE, generator=ours, **options)
        if out is not None:
            assert found is options["out"]
            options["out"] = out
        for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, expected)), strict=True):
            same_bits(a, b)
        assert torch.equal(ours.get_state(), theirs.get_state())


def test_mixed_dtypes():
    """The noise has the dtype of the result."""
    x, m = normal((2, 400), 1), normal((2, 400), 2, torch.bfloat16)
    for a, b in ((x, m), (m, x), (x.double(), m), (x, m.double())):
        ours, theirs = twins(4)
        dtype = torch.promote_types(a.dtype, b.dtype)
        z = torch.randn(x.shape, generator=theirs, dtype=dtype)
        same_bits(fastgen.ddpm_step(a, b, 3, SCHEDULE, generator=ours), fastgen.ddpm_step(a, b, 3, SCHEDULE, noise=z))
        assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("why", ["float64", "short", "channels-last", "strided", "gradient", "no noise"])
def test_what_torch_draws_itself(why, company):
    x = normal((2, 3, 8, 8), 1)
    if why == "float64":
        x = x.double()
    if why == "short":
        x = x[:1, 0, 0, :]
    if why == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    if why == "strided":
        x = x.transpose(1, 2)
    if why == "gradient":
        x.requires_grad_()
    step = {"eta": 0.0 if why == "no noise" else 1.0}
    ours, theirs = twins(6)
    z = None if why == "no noise" else torch.randn(x.shape, generator=theirs, dtype=x.dtype)
    same_bits(
        fastgen.ddim_step(x, x.cos(), 3, SCHEDULE, generator=ours, **step).detach(),
        fastgen.ddim_step(x, x.cos(), 3, SCHEDULE, noise=z, **step).detach(),
    )
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_no_gradient_is_lost():
    x = normal((2, 300), 1).requires_grad_()
    y = fastgen.q_sample(x, 3, SCHEDULE, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, x.new_tensor(SCHEDULE.alphas_cumprod[3] ** 0.5).expand_as(x))
    with torch.no_grad():
        assert not fastgen.q_sample(x, 3, SCHEDULE, generator=torch.Generator().manual_seed(1)).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_that_is_filled(dtype):
    """Beside a log-probability the noise is a tensor, which gets torch's numbers from the kernel."""
    x, m = normal((4, 3, 100), 1, dtype), normal((4, 3, 100), 2, dtype)
    ours, theirs = twins(8)
    z = torch.randn(x.shape, generator=theirs, dtype=dtype)
    found = fastgen.ddpm_step(x, m, 3, SCHEDULE, generator=ours, return_log_prob=True)
    for a, b in zip(found, fastgen.ddpm_step(x, m, 3, SCHEDULE, noise=z, return_log_prob=True), strict=True):
        same_bits(a, b)
    assert torch.equal(ours.get_state(), theirs.get_state())


def drawn_by_torch(call):
    """The ATen ops that draw normals in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()} & {"aten::randn", "aten::randn_like", "aten::normal_", "aten::normal"}


def test_nothing_is_drawn_by_torch():
    x, generator = normal((2, 3, 100), 1), torch.Generator().manual_seed(3)
    fastgen.q_sample(x, 3, SCHEDULE, generator=generator)  # which asks torch for known answers, once
    for call in (
        lambda: fastgen.torch_randn((1000,)),
        lambda: fastgen.q_sample(x, 3, SCHEDULE, generator=generator),
        lambda: fastgen.ddpm_step(x, x, 3, SCHEDULE, generator=generator, clip=1.0),
        lambda: fastgen.ddim_step(x, x, 3, SCHEDULE, generator=generator, eta=1.0, return_x0=True),
        lambda: fastgen.ddpm_step(x, x, 3, SCHEDULE, generator=generator, return_log_prob=True),
    ):
        assert not drawn_by_torch(call)
    assert drawn_by_torch(lambda: torch.randn(1000)) and drawn_by_torch(lambda: fastgen.torch_randn((5,)))


def test_the_noise_is_never_made():
    x, generator = normal((2**20,), 1).reshape(4, -1), torch.Generator().manual_seed(3)
    out = torch.empty_like(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fastgen.ddpm_step(x, x, 3, SCHEDULE, generator=generator, out=out)
    sizes = [event.cpu_memory_usage for event in profile.events()]
    assert max(sizes) < 100_000  # the state, and not 4 MiB


# ---- several generators, as diffusers' drop-in takes them -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("event", [(16,), (21,), (3, 64), (4, 1001)], ids=str)
def test_a_generator_for_each_sample(event, dtype, threads, company):
    pairs = [twins(seed, 100 * seed) for seed in range(5)]
    ours, theirs = zip(*pairs, strict=True)
    x = normal((5, *event), 1, dtype)
    z = torch.cat([torch.randn((1, *event), generator=generator, dtype=dtype) for generator in theirs])
    source = torch_noise.source(list(ours), x, dtype)
    assert source is not None
    rows = SCHEDULE.ddpm_step_table("epsilon", "beta", x.device, dtype).rows
    t = torch.tensor([3, 0, 7, 1, 20])
    y = torch.empty_like(x)
    rest = (None, None, None, None, None, False, None, 1.0, None)
    source.run(dispatch.DIRECT["ddpm_step_torch"], x, x, rows, t, 0, *rest, out=y)
    same_bits(y, fastgen.ddpm_step(x, x, t, SCHEDULE, variance="beta", noise=z))
    for a, b in pairs:
        assert torch.equal(a.get_state(), b.get_state())


def test_lists_that_are_left_to_torch():
    x, one = normal((3, 100), 1), torch.Generator()
    assert torch_noise.source([one, torch.Generator(), one], x, x.dtype) is None  # of which torch draws twice in turn
    assert torch_noise.source([torch.Generator()] * 2, x, x.dtype) is None
    assert torch_noise.source([torch.Generator() for _ in range(3)], x[:, :15].contiguous(), x.dtype) is None
    assert torch_noise.source([], x, x.dtype) is None
    assert torch_noise.source([1, 2, 3], x, x.dtype) is None
    assert torch_noise.source(tuple(torch.Generator() for _ in x), x, x.dtype) is None  # diffusers takes lists
    assert torch_noise.source([], x[:0], x.dtype) is None


def test_what_is_not_worthwhile(monkeypatch):
    """Fewer elements, or not so many more beside another thread: torch is faster."""
    monkeypatch.setattr(torch_noise, "IN_AN_OP", (100, 200))
    x, one = normal((300,), 1), torch.Generator()
    for threads, made in ((1, [False, True, True, True]), (2, [False, False, False, True])):
        monkeypatch.setattr(threading, "active_count", lambda threads=threads: threads)
        assert [torch_noise.source(one, x[:count], x.dtype) is not None for count in (99, 100, 199, 200)] == made


ERRORS = {
    "shape of the output": lambda x, g: fastgen.ddpm_step(x, x[:, :-1], 3, SCHEDULE, generator=g),
    "timestep": lambda x, g: fastgen.q_sample(x, torch.tensor([3, 40]), SCHEDULE, generator=g),
    "out": lambda x, g: fastgen.q_sample(x, 3, SCHEDULE, generator=g, out=x.half()),
    "threshold": lambda x, g: fastgen.ddpm_step(x, x, 3, SCHEDULE, generator=g, threshold=torch.ones(3)),
}


@pytest.mark.parametrize("what", ERRORS)
def test_nothing_is_drawn_where_an_error_is_raised(what, company):
    x, generator = normal((2, 50), 1), torch.Generator().manual_seed(3)
    fastgen.ddpm_step(x, x, 3, SCHEDULE, generator=generator)  # from now on there is a plan
    fastgen.q_sample(x, 3, SCHEDULE, generator=generator)
    before, data = generator.get_state(), x.clone()
    with pytest.raises((ValueError, TypeError)):
        ERRORS[what](x, generator)
    assert torch.equal(generator.get_state(), before) and torch.equal(x, data)


def test_words_are_given_back_where_an_op_fails(company):
    x, generator = normal((2, 50), 1), torch.Generator().manual_seed(3)
    found, before = torch_noise.source(generator, x, x.dtype), generator.get_state()

    def fails(*arguments):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        found.run(fails)
    assert torch.equal(generator.get_state(), before)


def test_the_layout_of_the_result_is_the_ops():
    x = torch.randn(5, 100)[::5]  # contiguous, with the strides of the whole
    assert fastgen.q_sample(x, 3, SCHEDULE, generator=torch.Generator()).stride() == (100, 1)
    y, x0 = fastgen.ddpm_step(x, x, 3, SCHEDULE, generator=torch.Generator(), return_x0=True)
    assert y.stride() == x0.stride() == (100, 1)


def test_a_child_does_not_wait_for_a_thread_that_it_has_not():
    code = """
import os, threading, torch, fastgen
from fastgen._core import torch_noise
torch.set_num_threads(1)
torch_noise.TO_FILL = 16, 16
end = threading.Event()
threading.Thread(target=end.wait, daemon=True).start()
torch_noise._reserving.acquire()
if os.fork() == 0:
    threading.Thread(target=end.wait, daemon=True).start()
    fastgen.torch_randn((1000,))
    os._exit(7)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- where the running torch has another arithmetic -----------------------------------------------------------------


def test_another_arithmetic_is_noticed(monkeypatch):
    """One bit of one number, or of the state, is enough for torch.randn to be called."""
    monkeypatch.setattr(torch_noise, "_arithmetic", {})
    real = torch.randn

    def other(*arguments, **keywords):
        x = real(*arguments, **keywords)
        if x.numel() == 2048:
            x[77] = torch.nextafter(x[77], x.new_tensor(9.0))
        return x

    monkeypatch.setattr(torch, "randn", other)
    assert torch_noise.arithmetic(torch.float32) is None
    assert "torch.randn's for float32" in fastgen.backend_info()
    monkeypatch.setattr(torch, "randn", real)
    ours, theirs = twins(5)
    same_bits(fastgen.torch_randn((1000,), generator=ours), torch.randn(1000, generator=theirs))
    x = normal((1000,), 3)
    same_bits(
        fastgen.q_sample(x, 3, SCHEDULE, generator=ours), fastgen.q_sample(x, 3, SCHEDULE, noise=real(1000, generator=theirs))
    )
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_without_fused_multiplications():
    """What another build of torch would give: near, and not the same."""
    state = torch.Generator().manual_seed(3).get_state()
    out, other, states = torch.empty(1, 5000), torch.empty(1, 5000), state.clone()
    dispatch.DIRECT["torch_randn"](out, state, True)
    dispatch.DIRECT["torch_randn"](other, states, False)
    assert torch.equal(state, states)
    different = (out != other).float().mean()
    assert 0.001 < different < 0.05 and torch.allclose(out, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_capabilities(capability):
    """Whatever torch's kernels are, the numbers are torch's."""
    code = """
import torch, fastgen
for dtype in (torch.float32, torch.bfloat16):
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    x, y = fastgen.torch_randn((5003,), generator=a, dtype=dtype), torch.randn(5003, generator=b, dtype=dtype)
    assert torch.equal(x, y) and torch.equal(a.get_state(), b.get_state())
print(fastgen.backend_info())
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ("torch.randn's for float32" in result.stdout) == (capability == "default")


# ---- threads --------------------------------------------------------------------------------------------------------


def test_draws_of_several_threads_are_apart():
    """From one generator: together they take what one thread would have, each number once."""
    rounds, each, workers = 40, 1600, 4
    ours, theirs = twins(9)
    found, problems = [], []

    def draw():
        try:
            for _ in range(rounds):
                found.append(fastgen.torch_randn((each,), generator=ours))
        except Exception as problem:  # pragma: no cover
            problems.append(problem)

    running = [threading.Thread(target=draw) for _ in range(workers)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not problems
    expected = [torch.randn(each, generator=theirs) for _ in range(rounds * workers)]
    assert {x[0].item() for x in found} == {x[0].item() for x in expected} and len(found) == len(expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_a_draw_of_torch_beside_is_noticed(monkeypatch):
    """Another thread's torch.randn between the look at the state and the new one: no number is drawn twice."""
    ours, theirs = twins(10)
    waiting, skip, stolen = threading.Event(), dispatch.DIRECT["torch_skip"], []

    def skip_late(states, words):
        skip(states, words)
        if not stolen:
            stolen.append(torch.randn(100, generator=ours))

    monkeypatch.setitem(dispatch.DIRECT, "torch_skip", skip_late)
    other = threading.Thread(target=waiting.wait)
    other.start()
    try:
        drawn = fastgen.torch_randn((1000,), generator=ours)
    finally:
        waiting.set()
        other.join()
    assert stolen
    same_bits(stolen[0], torch.randn(100, generator=theirs))
    same_bits(drawn, torch.randn(1000, generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("words", [0, 1, 15, 623, 624, 625, 1248, 10_000])
def test_torch_skip(words):
    ours, theirs = generator_at(3, 5), generator_at(3, 5 + words)
    states = torch.stack([ours.get_state(), generator_at(4, 0).get_state()])
    torch.ops.fastgen.torch_skip(states, words)
    assert torch.equal(states[0], theirs.get_state())
    assert torch.equal(states[1], generator_at(4, words).get_state())


# ---- what the ops refuse --------------------------------------------------------------------------------------------


def states(count=1):
    return torch.stack([torch.Generator().get_state() for _ in range(count)])


BAD_STATES = {
    "three dimensions": lambda: states().unsqueeze(0),
    "none": lambda: states()[:0],
    "not aligned": lambda: torch.zeros(torch_noise.STATE_BYTES + 1, dtype=torch.uint8)[1:],
    "another length": lambda: states()[:, :-8].contiguous(),
    "another dtype": lambda: states().int(),
    "not contiguous": lambda: states(2).T.contiguous().T,
    "another count": lambda: states(2),
    "other bytes": lambda: torch.full((1, torch_noise.STATE_BYTES), 255, dtype=torch.uint8),
    "no bytes": lambda: torch.zeros(1, torch_noise.STATE_BYTES, dtype=torch.uint8),
}


@pytest.mark.parametrize("what", BAD_STATES)
def test_states_that_are_none(what):
    out = torch.zeros(3, 100)
    with pytest.raises(RuntimeError, match="states"):
        torch.ops.fastgen.torch_randn(out, BAD_STATES[what](), True)
    assert not out.any()


def test_what_the_kernels_do_not_make():
    ops, rows = torch.ops.fastgen, SCHEDULE.q_sample_table(torch.device("cpu"), torch.float32).rows
    for out in (torch.zeros(1, 15), torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        with pytest.raises(RuntimeError, match="16 elements"):
            ops.torch_randn(out, states(), True)
    with pytest.raises(RuntimeError, match="16 elements"):
        ops.torch_randn(torch.zeros(3, 8), states(3), True)
    with pytest.raises(RuntimeError, match="noise_dtype"):
        ops.torch_randn(torch.zeros(1, 100).double(), states(), True)
    x = torch.zeros(1, 100)
    for code in (-1, 1, 4):
        with pytest.raises(RuntimeError, match="noise_dtype"):
            ops.q_sample_torch(states(), code, True, x, rows, None, 3, out=torch.empty_like(x))
    with pytest.raises(RuntimeError, match="words"):
        ops.torch_skip(states(), -1)


def test_the_distribution():
    x = fastgen.torch_randn((1_000_000,), generator=torch.Generator().manual_seed(1)).double()
    assert abs(x.mean()) < 5e-3 and abs(x.var() - 1) < 1e-2 and abs((x**4).mean() - 3) < 0.05
    assert abs((x < 1.0).double().mean() - 0.5 * (1 + math.erf(math.sqrt(0.5)))) < 3e-3
