"""The short way of a step of diffusers' schedulers on fastgen: it gives what the long way gives, bit for bit, or is not taken."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import normal

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
