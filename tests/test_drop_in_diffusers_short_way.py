"""The short way of a step of diffusers' schedulers on fastgen: it gives what the long way gives, bit for bit, or is not taken."""

import contextlib
import math
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import DTYPES, LAYOUTS, normal

pytest.importorskip("diffusers")
fast = pytest.importorskip("fastgen.drop_in.diffusers")

NAMES = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler")


@pytest.fixture
def no_short_way(monkeypatch):
    """A context in which every step goes the long way, and diffusers itself makes the output."""

    @contextlib.contextmanager
    def without():
        with monkeypatch.context() as patched:
            patched.setattr(fast._methods, "short_step", lambda *_: None)
            patched.setattr(fast._methods, "fast_output", lambda cls, y, x0: cls(prev_sample=y, pred_original_sample=x0))
            yield

    return without


@pytest.fixture
def ways(monkeypatch):
    """Counts which ways steps have gone to their end: "short", "long" or "diffusers", which is its own code."""
    if fast._short_way.plain_step is None:
        pytest.skip("needs the compiled CPU kernels")
    counts = Counter()

    def count(module, name, way):
        function = getattr(module, name)

        def counted(*arguments, **keywords):
            result = function(*arguments, **keywords)
            counts[way] += 1
            return result

        monkeypatch.setattr(module, name, counted)

    count(fast._short_way, "plain_step", "short")
    count(fast._short_way, "torch_plain_step", "short")
    count(fast._methods, "reverse_step", "long")
    count(fast._methods, "fall_through", "diffusers")
    return counts


# ---- random schedulers --------------------------------------------------------------------------------------------------------

ANY_SCHEDULER = {  # options of the constructor, and what each is drawn from
    "num_train_timesteps": (40, 200, 1000),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "epsilon", "v_prediction", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "steps_offset": (0, 1),
    "clip_sample": (False, True),
    "clip_sample_range": (0.3, 1.0, math.inf),
    "thresholding": (False, False, False, False, False, True),
    "dynamic_thresholding_ratio": (0.5, 0.995),
    "sample_max_value": (1.0, 1.5),
    "rescale_betas_zero_snr": (False, True),
}
DDPM = {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range")}
OPTIONS = {
    "DDPMScheduler": ANY_SCHEDULER | DDPM,
    "DDPMParallelScheduler": ANY_SCHEDULER | DDPM,
    "DDIMScheduler": ANY_SCHEDULER | {"set_alpha_to_one": (False, True)},
}
DDIM_STEP = {"eta": (0.0, 0.4, 1.0), "use_clipped_model_output": (False, True)}
CALLS = {  # how `step` is called
    "steps": (1, 2, 5, 7, "custom", None),  # None: set_timesteps is not called
    "rng": ("exact", "fused"),
    "generator": (None, None, "one", "one", "list"),
    "return_dict": (False, True),
    "timestep": ("element", "copy", "int32", "int"),
    "mode": (contextlib.nullcontext, torch.no_grad, torch.inference_mode),
    "shape": ((2, 3, 4, 5), (1, 16, 7), (3, 4), (0, 3, 4), (2, 3, 0)),
    "dtypes": tuple((x, m) for x in DTYPES for m in (x, x, *DTYPES)),
    "layouts": tuple((x, m) for x in LAYOUTS for m in (x, x, *LAYOUTS)),
}
TIMESTEPS = {"element": lambda t: t, "copy": torch.clone, "int32": lambda t: t.to(torch.int32), "int": int}


@dataclass
class Chain:
    """A scheduler and a chain of its steps, drawn at random."""

    name: str
    config: dict
    step: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)

    @property
    def is_made_the_short_way(self):
        """Whether all its steps are, but those that diffusers' own code makes; of those without noise they may be all the same."""
        c = self.config
        served = c["prediction_type"] != "sample" and not c["thresholding"] and c.get("variance_type") != "learned_range"
        return served and self.call["generator"] != "list"

    def scheduler(self):
        scheduler = getattr(fast, self.name)(**self.config, rng=self.call["rng"])
        steps = self.call["steps"]
        if steps == "custom":
            total = self.config["num_train_timesteps"]
            scheduler.set_timesteps(timesteps=[total - 2, total // 2, total // 5, 3, 0])
        elif steps is not None:
            scheduler.set_timesteps(steps)
        return scheduler

    def outcomes(self, scheduler):
        """What each step gives, and the states of the generators after it."""
        torch.manual_seed(1)
        call = self.call
        count = {None: 0, "one": 1, "list": call["shape"][0]}[call["generator"]]
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        generator = generators[0] if call["generator"] == "one" else generators or None
        (x_dtype, m_dtype), (x_layout, m_layout) = call["dtypes"], call["layouts"]
        x, found = normal(call["shape"], 0, x_dtype), []
        with call["mode"]():
            for t in [*scheduler.timesteps[:5], *scheduler.timesteps[-2:]]:
                x, m = LAYOUTS[x_layout](x), LAYOUTS[m_layout](self.network(x, t).to(m_dtype))
                timestep = TIMESTEPS[call["timestep"]](t)
                y = scheduler.step(m, timestep, x, generator=generator, return_dict=call["return_dict"], **self.step)
                tensors = y if type(y) is tuple else (y.prev_sample, y.pred_original_sample, *y.values(), *y.to_tuple())
                states = [torch.get_rng_state(), *(g.get_state() for g in generators)]
                found.append((type(y), tensors, states))
                x = tensors[0]
        return found

    def network(self, x, t):
        m = torch.tanh(x.double() * 1.3 + t / 1000)
        return torch.cat([m, m.cos()], dim=1) if self.config.get("variance_type") == "learned_range" else m


def drawn(name, seed):
    """The chain of a seed, which is the same everywhere."""
    pick = random.Random(f"{name} {seed}")
    config, step, call = (
        {option: pick.choice(values) for option, values in options.items()}
        for options in (OPTIONS[name], DDIM_STEP if name == "DDIMScheduler" else {}, CALLS)
    )
    if name == "DDIMScheduler" and call["steps"] in ("custom", None):  # which DDIM has not
        call["steps"] = 5
    return Chain(name, config, step, call)


def assert_bits(y, expected):
    """Of equal bits, NaN with NaN, in the same order in memory."""
    assert (y.dtype, y.shape, y.stride()) == (expected.dtype, expected.shape, expected.stride())
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[y.itemsize]
    differ = y.contiguous().view(integers) != expected.contiguous().view(integers)
    assert not (differ & ~(y.isnan() & expected.isnan())).any()


SEEDS = range(60)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_short_way_is_the_long_one(name, seed, ways, no_short_way):
    chain = drawn(name, seed)
    scheduler = chain.scheduler()
    chain.outcomes(scheduler)  # after which every kind of step has gone well
    ways.clear()
    short = chain.outcomes(scheduler)
    of_short = Counter(ways)
    ways.clear()
    with no_short_way():
        long = chain.outcomes(chain.scheduler())
    steps = len(long)
    # both ways have really been gone, step by step, but for steps that fastgen covers neither way
    assert ways["short"] == 0 and ways["long"] == steps - ways["diffusers"]
    assert of_short["diffusers"] == ways["diffusers"] and of_short["short"] + of_short["long"] == ways["long"]
    if chain.is_made_the_short_way:
        assert of_short["short"] == ways["long"]
    elif chain.call["generator"] != "list":
        assert of_short["short"] == 0
    for (kind, tensors, states), (expected_kind, expected_tensors, expected_states) in zip(short, long, strict=True):
        assert kind is expected_kind and len(tensors) == len(expected_tensors) == (2 if kind is tuple else 6)
        for y, expected in zip(tensors, expected_tensors, strict=True):
            assert_bits(y, expected)
        assert all(map(torch.equal, states, expected_states))


@pytest.mark.parametrize("name", NAMES)
def test_the_random_schedulers_have_every_option(name):
    """Among those whose steps are made the short way; else the test above would say less than it seems to."""
    chains = [chain for seed in SEEDS if (chain := drawn(name, seed)).is_made_the_short_way]
    left_out = {("prediction_type", "sample"), ("thresholding", True), ("variance_type", "learned_range"), ("generator", "list")}
    if name == "DDIMScheduler":
        left_out |= {("steps", "custom"), ("steps", None)}
    for options in (OPTIONS[name], DDIM_STEP if name == "DDIMScheduler" else {}, CALLS):
        for option, values in options.items():
            wanted = {value for value in values if (option, value) not in left_out}
            found = {(chain.config | chain.step | chain.call)[option] for chain in chains}
            if option in ("dtypes", "layouts"):  # both of the sample and of the model's output, if not every pair
                wanted, found = ({(i, value[i]) for value in pairs for i in (0, 1)} for pairs in (wanted, found))
            assert found == wanted, option


# ---- what is not alike --------------------------------------------------------------------------------------------------------


def short_and_long(no_short_way, scheduler, calls):
    """What each call gives, and leaves of the generators, the short way and the long way."""

    def outcome(call):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        try:
            y = call(scheduler, generator)
        except Exception as error:
            y = type(error), str(error)
        return y, generator.get_state(), torch.get_rng_state()

    short = [outcome(call) for call in calls]
    with no_short_way():
        return short, [outcome(call) for call in calls]


@pytest.mark.parametrize("rng", ("exact", "fused"))
@pytest.mark.parametrize("name", NAMES)
def test_the_short_way_leaves_what_is_not_alike_to_the_long_one(no_short_way, name, rng):
    s = getattr(fast, name)(rng=rng, clip_sample=False)
    s.set_timesteps(10)
    x, m, t = normal((2, 3, 4), 0), normal((2, 3, 4), 1), s.timesteps[3]
    s.step(m, t, x)
    graded = x.clone().requires_grad_()
    pairs = [(m[:1], x), (m, x[:1]), (m.to_sparse(), x.to_sparse()), (m[0, 0, 0], x[0, 0, 0]), (m.to("meta"), x)]
    pairs += [(m.double(), x), (m, x.half()), (m.tolist(), x), (m.to_mkldnn(), x.to_mkldnn()), (m, graded), (m.mT, x)]
    timesteps = [torch.tensor([400]), torch.tensor([[400]]), torch.tensor(400.0), torch.tensor(True), True, 400.0, 5000, -1, None]
    timesteps += [torch.tensor(400).to_sparse(), torch.tensor(400, device="meta"), torch.tensor(400), s.timesteps[3:4]]
    calls = [lambda s, g, m=m, x=x: s.step(m, t, x, generator=g).prev_sample for m, x in pairs]
    calls += [lambda s, g, m=m, x=x: s.step(m, t, x).prev_sample for m, x in pairs]
    calls += [lambda s, g, t=t: s.step(m, t, x, generator=g).prev_sample for t in timesteps]
    calls += [lambda s, g: s.step(m, t, x, generator=[g, g]).prev_sample, lambda s, g: s.step(m, t, x, generator=5).prev_sample]
    if name == "DDIMScheduler":
        for value in (np.array(True), [], [1], None):
            calls += [lambda s, g, v=value: s.step(m, t, x, 0.5, use_clipped_model_output=v, generator=g).prev_sample]
        calls += [
            lambda s, g, eta=eta: s.step(m, t, x, eta, generator=g).prev_sample for eta in (0, 1, True, np.float64(0.5), None)
        ]
    for short, long in zip(*short_and_long(no_short_way, s, calls), strict=True):
        y, expected = short[0], long[0]
        assert type(y) is type(expected)
        if isinstance(y, torch.Tensor) and y.layout is not torch._mkldnn:
            assert (y.dtype, y.layout, y.requires_grad) == (expected.dtype, expected.layout, expected.requires_grad)
            assert y.is_meta or torch.equal(y.to_dense(), expected.to_dense())
        elif isinstance(y, tuple):
            assert y == expected
        assert all(map(torch.equal, short[1:], long[1:]))  # nothing was drawn before the short way gave up


def test_the_short_way_is_given_no_seed_where_nothing_is_drawn(monkeypatch):
    """With one, the kernel makes noise and multiplies it by 0: 30 times as long for (4096, 7)."""
    s = fast.DDIMScheduler()
    s.set_timesteps(10)
    x, m, taken = normal((2, 3, 4), 0), normal((2, 3, 4), 1), []
    s.step(m, s.timesteps[3], x)
    plain = fast._short_way.plain_step
    if plain is None:
        pytest.skip("needs the compiled CPU kernels")
    monkeypatch.setattr(fast._short_way, "plain_step", lambda *arguments: taken.append(arguments) or plain(*arguments))
    s.step(m, s.timesteps[4], x)
    (arguments,) = taken
    assert arguments[4:6] == (None, None)  # noise and seed


def test_the_short_way_keeps_nothing_of_another_device(monkeypatch):
    """Whose rows the op would refuse in a later step, on the CPU, after the noise has been drawn."""
    monkeypatch.setattr(fast._short_way, "plain_rows", lambda *_: torch.zeros(1000, 7))
    s = fast.DDPMScheduler()
    s.set_timesteps(10)
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)
    remembered, key = s._fastgen, fast._coefficients.DDPM
    coefficients, has_step = remembered.settings.coefficients(key)
    fast._short_way.keep(remembered, key, coefficients, has_step, x.to("meta"), m.to("meta"))
    assert not remembered.short_ways


def test_timesteps_made_in_inference_mode_are_read(no_short_way):
    """They have no version, so that a change of theirs is not noticed."""
    with torch.inference_mode():
        s = fast.DDIMScheduler()
        s.set_timesteps(10)
        x, t = torch.ones(1, 3), s.timesteps[3]
        s.step(x, t, x)
        t.copy_(100)
        (short,), (long,) = short_and_long(no_short_way, s, [lambda s, g: s.step(x, t, x).prev_sample])
        assert torch.equal(short[0], long[0])
