"""The posterior of diffusers' autoencoders on fastgen, under a real AutoencoderKL with random weights."""

import copy
import logging
import pickle

import pytest
import torch
from conftest import normal
from dispatched import Dispatched

import fastgen

diffusers = pytest.importorskip("diffusers")
autoencoders = pytest.importorskip("diffusers.models.autoencoders.vae")

from fastgen.drop_in.diffusers import vae as fast  # noqa: E402

OWN = autoencoders.DiagonalGaussianDistribution
SHAPE = (3, 8, 6, 10)
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # diffusers rounds every operation


def moments(dtype=torch.float32, seed=0, size=1.0, shape=SHAPE):
    x = normal(shape, seed, torch.float64)
    x[:, shape[1] // 2 :] *= size
    return x.to(dtype)


def generator(seed=11):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16, layers_per_block=1
    ).eval()


@pytest.fixture(autouse=True)
def _nothing_stays_patched():
    before = dict(vars(OWN))
    yield
    assert dict(vars(OWN)) == before


def assert_near(actual, expected, dtype):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


# ---- the class ------------------------------------------------------------------------------------------------------


def test_its_code_is_known():
    """Of the diffusers that is installed here, all of it."""
    assert fast._why_untested() == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 40.0], ids=["", "clamped"])
def test_sample_kl_nll_mode(dtype, size):
    """diffusers' numbers, its clamp too."""
    parameters, other = moments(dtype, 0, size), moments(dtype, 1)
    own, ours = OWN(parameters), fast.DiagonalGaussianDistribution(parameters)
    assert isinstance(ours, OWN)
    with Dispatched() as ops:
        sample = ours.sample(generator())
    assert ops["fastgen.reparameterize"] == 1
    expected = OWN(parameters.double())
    noise = torch.randn(ours.mean.shape, generator=generator(), dtype=dtype)
    assert_near(sample, own.sample(generator()), dtype) if size == 1.0 else None
    exact = (expected.mean + expected.std * noise.double()).to(dtype)
    torch.testing.assert_close(sample, exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-6 if dtype != torch.float64 else 1e-13)
    with Dispatched() as ops:
        kl = ours.kl()
    assert ops["fastgen.gaussian_kl"] == 1
    torch.testing.assert_close(kl, expected.kl().to(dtype), rtol=max(2e-6, torch.finfo(dtype).eps), atol=0)
    of_two = ours.kl(fast.DiagonalGaussianDistribution(other))
    torch.testing.assert_close(of_two, expected.kl(OWN(other.double())).to(dtype), rtol=max(4e-6, torch.finfo(dtype).eps), atol=0)
    torch.testing.assert_close(ours.nll(sample), own.nll(sample), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours.nll(sample, dims=[2, 3]), own.nll(sample, dims=[2, 3]), rtol=0, atol=0, equal_nan=True)
    assert ours.mode() is ours.mean
    for name in ("mean", "logvar", "std", "var", "parameters"):
        torch.testing.assert_close(getattr(ours, name), getattr(own, name), rtol=0, atol=0)
    assert ours.std is ours.std


def test_the_same_generators_are_left_in_the_same_state():
    parameters = moments()
    own, ours = (kind(parameters) for kind in (OWN, fast.DiagonalGaussianDistribution))
    for make in (lambda: generator(), lambda: [generator(k) for k in range(3)], lambda: [generator()]):
        mine, theirs = make(), make()
        assert_near(ours.sample(mine), own.sample(theirs), torch.float32)
        for a, b in zip(mine if isinstance(mine, list) else [mine], theirs if isinstance(theirs, list) else [theirs], strict=True):
            assert torch.equal(a.get_state(), b.get_state())
    torch.manual_seed(5)
    mine = ours.sample()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    assert_near(mine, own.sample(), torch.float32)
    assert torch.equal(torch.get_rng_state(), after)


def test_fused_noise():
    """From a seed that the generator gives: reproducible, one for each sample of a list, and no noise tensor."""
    ours = fast.DiagonalGaussianDistribution(moments(), rng="fused")
    with Dispatched() as ops:
        first = ours.sample(generator())
    assert ops["fastgen.reparameterize"] == 1 and not ops["aten.randn"] and not ops["aten.normal_"]
    assert torch.equal(ours.sample(generator()), first) and not torch.equal(ours.sample(generator(12)), first)
    each = ours.sample([generator(k) for k in range(3)])
    last = fast.DiagonalGaussianDistribution(moments()[2:], rng="fused").sample([generator(2)])
    assert torch.equal(each[2:], last)
    torch.manual_seed(1)
    drawn = ours.sample()
    torch.manual_seed(1)
    assert torch.equal(ours.sample(), drawn)
    for bad, error in (("fast", ValueError), (None, ValueError)):
        with pytest.raises(error, match="^rng: expected"):
            fast.DiagonalGaussianDistribution(moments(), rng=bad)
        with pytest.raises(error, match="^rng: expected"):
            fast.patch(rng=bad)


def test_gradients():
    """To the parameters, of the sample, the divergence and the density."""
    upstream = normal((3, 4, 6, 10), 5)
    found = []
    for kind in (OWN, fast.DiagonalGaussianDistribution):
        parameters, other = moments(size=20.0).requires_grad_(), moments(seed=1).requires_grad_()
        made = kind(parameters)
        loss = (made.sample(generator()) * upstream).sum() + made.kl().sum() * 1e-6 + made.kl(kind(other)).sum() * 1e-6
        loss = loss + made.nll(upstream).sum() * 1e-6
        found.append(torch.autograd.grad(loss, (parameters, other)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["deterministic", "video", "mean", "logvar", "std", "other"])
def test_what_is_not_covered_is_diffusers_own(change, caplog):
    shape = (2, 4, 3, 5, 7) if change == "video" else SHAPE
    parameters = moments(shape=shape)
    pair = [kind(parameters, deterministic=change == "deterministic") for kind in (OWN, fast.DiagonalGaussianDistribution)]
    for each in pair:
        if change in ("mean", "logvar", "std"):
            setattr(each, change, getattr(each, change) + 1)
    own, ours = pair
    other = OWN(parameters) if change == "other" else None
    with caplog.at_level(logging.DEBUG, "fastgen.drop_in"):
        kl, sample = ours.kl(other), ours.sample(generator())
    torch.testing.assert_close(kl, own.kl(other), rtol=0, atol=0)
    torch.testing.assert_close(sample, own.sample(generator()), rtol=2e-6, atol=2e-6)
    assert "not fastgen but the original runs" in caplog.text
    for name in ("mean", "logvar", "std", "var"):
        torch.testing.assert_close(getattr(ours, name), getattr(own, name), rtol=0, atol=0)


def test_copies_and_pickles():
    ours = fast.DiagonalGaussianDistribution(moments())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert torch.equal(other.kl(), ours.kl()) and torch.equal(other.sample(generator()), ours.sample(generator()))


def test_it_compiles():
    def loss(parameters):
        made = fast.DiagonalGaussianDistribution(parameters)
        return made.kl() + made.sample().sum((1, 2, 3)) * 0 + made.mode().sum()

    parameters = moments()
    made = torch.compile(loss, fullgraph=True, backend="aot_eager")(parameters)
    torch.testing.assert_close(made, loss(parameters))


# ---- the patch ------------------------------------------------------------------------------------------------------


def test_under_a_real_autoencoder(autoencoder):
    """encode, sample, divergence and decode, and the gradients of a training step; before, meanwhile and after."""
    x = normal((2, 3, 16, 16), 0)

    def step():
        autoencoder.zero_grad()
        posterior = autoencoder.encode(x).latent_dist
        z = posterior.sample(generator())
        loss = (autoencoder.decode(z).sample - x).square().mean() + 1e-3 * posterior.kl().mean()
        loss.backward()
        gradients = [p.grad.clone() for p in autoencoder.parameters()]
        return posterior, z.detach(), loss.detach(), gradients

    before = step()
    with fast.patch() as patch, Dispatched() as ops:
        meanwhile = step()
        whole = autoencoder(x, sample_posterior=True, generator=generator()).sample
    assert patch.covered == ("DiagonalGaussianDistribution.__init__",) and not patch.skipped
    assert ops["fastgen.reparameterize"] == 2 and ops["fastgen.gaussian_kl"] == 1
    assert type(before[0]) is OWN and type(meanwhile[0]) is fast.DiagonalGaussianDistribution
    torch.testing.assert_close(meanwhile[1:3], before[1:3], rtol=1e-5, atol=1e-5)
    for a, b in zip(meanwhile[3], before[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * max(1.0, b.abs().max().item()))
    torch.testing.assert_close(whole, autoencoder(x, sample_posterior=True, generator=generator()).sample, rtol=1e-4, atol=1e-5)
    after = step()
    assert type(after[0]) is OWN
    assert torch.equal(after[1], before[1])
    # what was made meanwhile stays what it is, and what there was before has stayed diffusers' own
    with Dispatched() as ops:
        assert_near(meanwhile[0].sample(generator()), before[0].sample(generator()), torch.float32)
        torch.testing.assert_close(meanwhile[0].std, before[0].std)
    assert ops["fastgen.reparameterize"] == 1


def test_a_patch_with_fused_noise(autoencoder):
    x = normal((2, 3, 16, 16), 0)
    with torch.no_grad(), fast.patch(rng="fused"), Dispatched() as ops:
        posterior = autoencoder.encode(x).latent_dist
        first = posterior.sample(generator())
    assert ops["fastgen.reparameterize"] == 1 and not ops["aten.randn"]
    assert torch.equal(fast.DiagonalGaussianDistribution(posterior.parameters, rng="fused").sample(generator()), first)
    assert torch.equal(pickle.loads(pickle.dumps(posterior)).sample(generator()), first)


def test_patches_within_each_other():
    with fast.patch() as outer:
        with fast.patch(rng="fused") as inner:
            assert inner.covered == outer.covered
            assert OWN(moments())._rng == "fused"
        assert OWN(moments())._rng == "exact"
    assert type(OWN(moments())) is OWN
    assert "1 of 1 constructors" in repr(outer)


def test_subclasses_stay_as_they_are():
    class Other(OWN):
        def sample(self, generator=None):
            return self.mean

    with fast.patch():
        made = Other(moments())
    assert type(made) is Other and torch.equal(made.sample(), made.mean)
    torch.testing.assert_close(made.kl(), OWN(moments()).kl())


def test_unknown_code_is_left_alone(monkeypatch, caplog):
    def sample(self, generator=None):
        return self.mean + 0.0

    monkeypatch.setattr(OWN, "sample", sample)
    with caplog.at_level(logging.INFO, "fastgen.drop_in"), fast.patch() as patch:
        assert not patch.covered and "sample" in patch.skipped["DiagonalGaussianDistribution.__init__"]
        assert type(OWN(moments())) is OWN
    assert "tests have not run" in caplog.text
    # the class is diffusers' own then, which it says once
    monkeypatch.setattr(fast.DiagonalGaussianDistribution, "_warning", fast._why_untested())
    monkeypatch.setattr(fast, "_to_warn", [True])
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastgen.drop_in"):
        for _ in range(2):
            made = fast.DiagonalGaussianDistribution(moments())
    assert len(caplog.records) == 1 and torch.equal(made.sample(), made.mean)
    torch.testing.assert_close(made.kl(), OWN(moments()).kl(), rtol=0, atol=0)


def test_compiled_programs_under_the_patch_have_diffusers_own():
    parameters, called = moments(), []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    expected = OWN(parameters).kl()
    with fast.patch():
        made = torch.compile(lambda p: OWN(p).kl(), fullgraph=True, backend=backend)(parameters)
    torch.testing.assert_close(made, expected)
    assert called and not any("fastgen" in name for name in called)


def test_eager_backend_takes_it_too():
    parameters = moments()
    with fastgen.use_backend("eager"):
        sample = fast.DiagonalGaussianDistribution(parameters).sample(generator())
    assert_near(sample, OWN(parameters).sample(generator()), torch.float32)
