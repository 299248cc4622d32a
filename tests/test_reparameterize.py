"""reparameterize: values, noise sources, the divergence beside them, layouts, gradients."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    array,
    assert_close,
    assert_derivatives,
    assert_same,
    channels_last,
    normal,
    unaligned,
)
from test_gaussian_kl import CLAMP, halves

import fastgen

SHAPE = (3, 4, 5, 6)
SOURCES = ["seed", "seeds", "noise"]


def data(shape, device, dtype=torch.float32, second=None):
    return normal(shape, 0, dtype, device), normal(shape, 1, second or dtype, device)


def source(name, shape, device, dtype=torch.float32):
    return {
        "seed": {"seed": 5, "offset": 2**33},
        "seeds": {"seed": torch.arange(shape[0], device=device) * 2**33 - 7},
        "noise": {"noise": normal(shape, 4, dtype, device)},
    }[name]


def noise_of(how, shape, device, dtype):
    """What a source denotes, in the precision of the arithmetic."""
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    return how["noise"] if "noise" in how else fastgen.randn(shape, **how, dtype=precision, device=device)


def truth(mean, log_variance, noise, clamp=None):
    """z and the divergence."""
    mean, log_variance, noise = array(mean), array(log_variance), array(noise)
    if clamp is not None:
        log_variance = np.clip(log_variance, *clamp)
    kl = reference.gaussian_kl(mean, log_variance, np.zeros_like(mean), np.zeros_like(mean))
    return reference.reparameterize(mean, log_variance, noise), kl.sum(tuple(range(1, mean.ndim)))


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
@pytest.mark.parametrize("noise_dtype", DTYPES)
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("clamp", [None, CLAMP])
def test_values(device, dtype, second, noise_dtype, name, clamp):
    mean, log_variance = data(SHAPE, device, dtype, second)
    how = source(name, SHAPE, device, noise_dtype)
    z, kl = fastgen.reparameterize(mean, log_variance, clamp=clamp, return_kl=True, **how)
    result = torch.promote_types(dtype, second)
    assert z.dtype == result and z.shape == SHAPE and not z.requires_grad
    assert kl.dtype == (torch.float64 if result == torch.float64 else torch.float32) and kl.shape == SHAPE[:1]
    expected, divergence = truth(mean, log_variance, noise_of(how, SHAPE, device, result), clamp)
    assert_close(z, expected, scale=10)
    np.testing.assert_allclose(array(kl), divergence, rtol=1e-13 if result == torch.float64 else 2e-6)
    assert_same(fastgen.reparameterize(mean, log_variance, clamp=clamp, **how), z)


@pytest.mark.pairs
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 0), (700, 3), (2, 17_001), (40, 3, 17), (1, 2**20 + 3)])
@pytest.mark.parametrize("name", SOURCES)
def test_shapes(device, shape, name):
    """The divergence of no elements is 0."""
    mean, log_variance = data(shape, device)
    how = source(name, shape, device)
    z, kl = fastgen.reparameterize(mean, log_variance, return_kl=True, **how)
    assert z.shape == shape and kl.shape == shape[:1]
    expected, divergence = truth(mean, log_variance, noise_of(how, shape, device, torch.float32))
    assert_close(z, expected, scale=10)
    np.testing.assert_allclose(array(kl), divergence, rtol=2e-6)
    assert_same(fastgen.reparameterize(mean, log_variance, **how), z)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOURCES)
def test_one_dtype_for_all(device, dtype, name):
    """Which has kernels of its own, for both results together; z is the same with the divergence and without."""
    shape = (2, 16, 8, 4)
    mean, log_variance = data(shape, device, dtype)
    how = source(name, shape, device, dtype)
    z, kl = fastgen.reparameterize(mean, log_variance, return_kl=True, **how)
    expected, divergence = truth(mean, log_variance, noise_of(how, shape, device, dtype))
    assert_close(z, expected, scale=10)
    np.testing.assert_allclose(array(kl), divergence, rtol=1e-13 if dtype == torch.float64 else 2e-6)
    assert_same(fastgen.reparameterize(mean, log_variance, **how), z)


def test_the_divergence_is_that_of_gaussian_kl(device):
    mean, log_variance = data((3, 1000), device)
    _, kl = fastgen.reparameterize(mean, 1e-3 * log_variance, seed=1, return_kl=True)
    torch.testing.assert_close(kl, fastgen.gaussian_kl(mean, 1e-3 * log_variance), rtol=1e-6, atol=0)


def test_large_and_small_variances(device):
    """σ = 0 leaves the mean; with diffusers' bounds nothing overflows."""
    log_variance = torch.tensor([[-math.inf, -2000.0, 2000.0, math.inf]], device=device)
    mean, noise = torch.ones_like(log_variance), torch.full_like(log_variance, 2.0)
    assert fastgen.reparameterize(mean, log_variance, noise=noise).tolist() == [[1.0, 1.0, math.inf, math.inf]]
    clamped = fastgen.reparameterize(mean, log_variance, noise=noise, clamp=(-30.0, 20.0))
    assert_close(clamped, [[1 + 2 * math.exp(-15)] * 2 + [1 + 2 * math.exp(10)] * 2])


@pytest.mark.parametrize("name", SOURCES)
def test_nan_and_inf_flow_through(device, name):
    mean, log_variance = data((3, 133), device)
    mean[0, 3], mean[1, 130], log_variance[0, 7], log_variance[0, 131] = torch.nan, torch.inf, torch.nan, torch.inf
    how = source(name, (3, 133), device)
    z, kl = fastgen.reparameterize(mean, log_variance, return_kl=True, **how)
    with np.errstate(invalid="ignore"):
        assert_close(z, truth(mean, log_variance, noise_of(how, (3, 133), device, torch.float32))[0], scale=10)
    assert z.isnan().sum() == 2 and not kl[:2].isfinite().any() and kl[2].isfinite()
    clamped = fastgen.reparameterize(mean, log_variance, clamp=(-30.0, 20.0), **how)
    assert clamped.isnan().sum() == 2 and clamped[0, 131].isfinite()


# ---- where noise comes from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_generator_gives_the_numbers_of_torch_randn(device, dtype):
    mean, log_variance = data((3, 5, 31), device, dtype)
    noise = torch.randn(mean.shape, generator=torch.Generator(device).manual_seed(11), dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(11)
    assert_same(
        fastgen.reparameterize(mean, log_variance, generator=generator), fastgen.reparameterize(mean, log_variance, noise=noise)
    )


def test_manual_seed_governs_noise_that_nobody_chose(device):
    mean, log_variance = data((3, 50), device)
    torch.manual_seed(1)
    first, second = fastgen.reparameterize(mean, log_variance), fastgen.reparameterize(mean, log_variance)
    torch.manual_seed(1)
    assert_same(fastgen.reparameterize(mean, log_variance), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("arrange", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
def test_a_sample_does_not_depend_on_its_batch(device, arrange):
    seeds = torch.tensor([4, -4, 2**62 + 1], device=device)
    mean, log_variance = (arrange(x) for x in data((3, 3, 9, 11), device))
    whole, kl = fastgen.reparameterize(mean, log_variance, seed=seeds, return_kl=True)
    for i in range(3):
        one = slice(i, i + 1)
        alone, alone_kl = fastgen.reparameterize(mean[one], log_variance[one], seed=int(seeds[i]), return_kl=True)
        assert_same(whole[i], alone[0])
        assert_same(kl[i], alone_kl[0])


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("third", LAYOUTS)
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 8, 4, 8)])
def test_layouts(device, layout, second, third, name, shape):
    """Of the gradients too. That of z is contiguous or channels-last where that of the mean is."""
    found = []
    for arrange in ((torch.clone,) * 3, [LAYOUTS[each] for each in (layout, second, third)]):
        mean, log_variance = (change(x).requires_grad_() for change, x in zip(arrange[:2], data(shape, device), strict=True))
        how = source(name, shape, device)
        if "noise" in how:
            how = {"noise": arrange[2](how["noise"])}
        z, kl = fastgen.reparameterize(mean, log_variance, return_kl=True, **how)
        alone = fastgen.reparameterize(mean, log_variance, **how)
        assert_same(alone, z)
        if arrange[0] is channels_last:
            assert z.movedim(1, -1).is_contiguous()
        elif arrange[0] in (torch.clone, unaligned):
            assert z.is_contiguous()
        upstream = arrange[2](normal(shape, 7, device=device))
        both = torch.autograd.grad((z * upstream).sum() + (kl * torch.arange(1.0, 1 + len(kl)).to(kl)).sum(), (mean, log_variance))
        of_z = torch.autograd.grad(alone, (mean, log_variance), upstream)
        found.append((kl.detach(), z.detach(), *both, *of_z))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-6, atol=0)
    for a, b in zip(found[1][1:], found[0][1:], strict=True):
        assert_same(a, b)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, unaligned], ids=["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 8, 4, 8), (2, 16, 8, 4), (3, 1, 3, 5), (70, 2, 3), (2, 3, 1, 1), (2, 5)])
def test_halves_are_taken_where_they_are(device, dtype, arrange, name, shape):
    """The same bits as of copies without gaps; z has no gaps itself."""
    apart, copies = halves(shape, device, arrange, dtype)
    how, found = source(name, shape, device, dtype), []
    for pair in (apart, copies):
        mean, log_variance = (x.detach().requires_grad_() for x in pair)
        z, kl = fastgen.reparameterize(mean, log_variance, return_kl=True, **how)
        alone = fastgen.reparameterize(mean, log_variance, **how)
        assert_same(alone, z)
        assert z.is_contiguous() or z.movedim(1, -1).is_contiguous()
        upstream = normal(shape, 7, dtype, device)
        grads = torch.autograd.grad((z * upstream).sum() + kl.sum().to(dtype), (mean, log_variance))
        found.append((kl.detach(), z.detach(), *grads, *torch.autograd.grad(alone, (mean, log_variance), upstream)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-6, atol=0)
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert_same(a, b)


@pytest.mark.backend("cpp")
@pytest.mark.skipif("cpp" not in fastgen.available_backends("cpu"), reason="the compiled library is absent")
@pytest.mark.parametrize("arrange", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
def test_no_copy_is_made_of_halves(arrange):
    """Of the tensor that a network returns: what is allocated is the result."""
    mean, log_variance = arrange(normal((2, 8, 64, 64), 0)).chunk(2, 1)
    mean, log_variance = mean.requires_grad_(), log_variance.requires_grad_()

    def allocated(work):
        with torch.profiler.profile(profile_memory=True) as profile:
            work()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    with fastgen.use_backend("cpp"):
        fastgen.reparameterize(mean, log_variance, seed=1, return_kl=True)
        with torch.no_grad():
            assert allocated(lambda: fastgen.reparameterize(mean, log_variance, seed=1)) == mean.nbytes
            assert allocated(lambda: fastgen.reparameterize(mean, log_variance, seed=1, return_kl=True)) < 1.1 * mean.nbytes
            assert allocated(lambda: fastgen.gaussian_kl(mean, log_variance)) < 0.1 * mean.nbytes


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("clamp", [None, CLAMP])
@pytest.mark.parametrize("results", ["z", "kl", "both"])
def test_gradcheck(device, name, clamp, results):
    """Of each parameter alone, of both, and of noise."""
    mean, log_variance = data((3, 2, 5), device, torch.float64)
    how = source(name, mean.shape, device, torch.float64)

    def f(mean, log_variance, *noise):
        given = {"noise": noise[0]} if noise else how
        if results == "z":
            return fastgen.reparameterize(mean, log_variance, clamp=clamp, **given)
        made = fastgen.reparameterize(mean, log_variance, clamp=clamp, return_kl=True, **given)
        return made[1] if results == "kl" else made

    for needed in ((True, False), (False, True), (True, True)):
        leaves = [x.detach().requires_grad_(need) for x, need in zip((mean, log_variance), needed, strict=True)]
        assert_derivatives(device, f, leaves)
    if name == "noise" and results != "kl":
        leaves = [x.detach().requires_grad_() for x in (mean, log_variance, how["noise"])]
        assert_derivatives(device, f, leaves)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arrange", [torch.clone, channels_last, unaligned], ids=["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("clamp", [None, CLAMP])
@pytest.mark.parametrize("shape", [(2, 16, 8, 4), (1, 8, 31), (3, 5, 7)])
def test_every_kernel(device, dtype, arrange, name, clamp, shape):
    """The types and layouts that a kernel of its own is compiled for; forward, and backward of z, of both and of the divergence,
    against eager."""
    how, found = source(name, shape, device, dtype), []
    if "noise" in how:
        how = {"noise": arrange(how["noise"])}
    for backend in (fastgen.backend(device), "eager"):
        with fastgen.use_backend(backend):
            leaves = [arrange(x).requires_grad_() for x in data(shape, device, dtype)]
            z, kl = fastgen.reparameterize(*leaves, clamp=clamp, return_kl=True, **how)
            alone = fastgen.reparameterize(*leaves, clamp=clamp, **how)
            upstream = normal(shape, 7, dtype, device), torch.arange(1.0, 1 + shape[0]).to(kl)
            found.append(
                (
                    kl.detach(),
                    *(z.detach(), alone.detach()),
                    *torch.autograd.grad(alone, leaves, upstream[0]),
                    *torch.autograd.grad((z, kl), leaves, upstream, retain_graph=True),
                    *torch.autograd.grad(kl, leaves, upstream[1]),
                )
            )
    single = dtype != torch.float64
    np.testing.assert_allclose(array(found[0][0]), array(found[1][0]), rtol=1e-6 if single else 1e-13)
    for actual, expected in zip(found[0][1:], found[1][1:], strict=True):
        assert actual.dtype == expected.dtype == dtype
        difference = (actual.double() - expected.double()).abs()
        # each is rounded once, and the noise of float32 is off by 1e-6 of the contract's float64, times a gradient of up to 30
        bound = 1.01 * torch.finfo(dtype).eps * expected.double().abs() + (2e-5 if single else 1e-12)
        assert (difference <= bound).all()


def test_the_gradients_of_both_are_those_of_each(device):
    mean, log_variance = (x.requires_grad_() for x in data((3, 40), device))
    z, kl = fastgen.reparameterize(mean, log_variance, seed=3, return_kl=True)
    both = torch.autograd.grad(z.sum() + kl.sum(), (mean, log_variance), retain_graph=True)
    of_z = torch.autograd.grad(z.sum(), (mean, log_variance), retain_graph=True)
    of_kl = torch.autograd.grad(kl.sum(), (mean, log_variance), retain_graph=True)
    for total, first, second in zip(both, of_z, of_kl, strict=True):
        torch.testing.assert_close(total, first + second)
    assert_same(of_z[0], torch.ones_like(mean))
    assert_same(of_kl[0], mean.detach())
    (alone,) = torch.autograd.grad(z.sum(), mean)
    assert_same(alone, torch.ones_like(mean))


def test_no_gradient_outside_the_bounds(device):
    """At a bound there is one, as of torch.clamp."""
    log_variance = torch.tensor([[-2.0, -1.0, 0.5, 1.0, 2.0]], device=device).requires_grad_()
    mean, noise = torch.zeros_like(log_variance), torch.ones_like(log_variance)
    for return_kl in (False, True):
        made = fastgen.reparameterize(mean, log_variance, noise=noise, clamp=(-1, 1), return_kl=return_kl)
        total = made[0].sum() + made[1].sum() if return_kl else made.sum()
        (found,) = torch.autograd.grad(total, log_variance)
        assert (found == 0).tolist() == [[True, False, False, False, True]]


def test_backward_more_than_once(device):
    mean, log_variance = (x.requires_grad_() for x in data(SHAPE, device))
    z, kl = fastgen.reparameterize(mean, log_variance, seed=9, return_kl=True)
    loss = (z * z).sum() + kl.sum()
    first = torch.autograd.grad(loss, (mean, log_variance), retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, (mean, log_variance), retain_graph=True), first, strict=True):
        assert_same(a, b)
    for a, b in zip(torch.autograd.grad(loss, (mean, log_variance), create_graph=True), first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_are_recorded_only_where_asked(device):
    mean, log_variance = data((2, 3), device)
    assert not fastgen.reparameterize(mean, log_variance, seed=1).requires_grad
    with torch.no_grad():
        assert not fastgen.reparameterize(mean.requires_grad_(), log_variance, seed=1).requires_grad
    assert fastgen.reparameterize(mean, log_variance, seed=1).requires_grad


def test_transforms(device):
    """torch.func and forward mode: the decomposed path."""
    mean, log_variance = data((3, 20), device, torch.float64)

    def f(v):
        z, kl = fastgen.reparameterize(mean, v, seed=3, return_kl=True)
        return (z * z).sum() + kl.sum()

    leaf = log_variance.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(f)(log_variance), expected)
    tangent = normal(mean.shape, 5, torch.float64, device)
    _, derivative = torch.func.jvp(f, (log_variance,), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum())
    several = torch.autograd.grad(f(leaf), leaf, torch.arange(3.0, dtype=torch.float64, device=device), is_grads_batched=True)
    torch.testing.assert_close(several[0], torch.stack([k * expected for k in range(3)]))
    both = torch.func.vmap(f)(torch.stack([log_variance, 2 * log_variance]))
    torch.testing.assert_close(both, torch.stack([f(log_variance), f(2 * log_variance)]))
