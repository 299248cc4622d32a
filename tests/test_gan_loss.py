"""discriminator_loss and generator_loss: values, scales, smoothing, monitors, gradients, and the theory of the lecture note."""

import functools
import itertools
import math
import mmap
import os
import sys

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, LAYOUTS, array, assert_close, assert_derivatives, assert_same, interpreted, normal, transposed
from scipy import integrate

import fastgen

REDUCTIONS = ("mean", "sum")
KINDS = ("non_saturating", "minimax")
SHAPES = [(), (1,), (5,), (127,), (128,), (129,), (3, 4), (2, 3, 5, 7), (4099,)]
EMPTY = [(0,), (0, 4), (4, 0)]
bce = torch.nn.functional.binary_cross_entropy_with_logits


def logits(shape, seed, device, dtype=torch.float32):
    return 3 * normal(shape, seed, dtype, device)


def arrays(x):
    return [array(y) for y in x] if isinstance(x, (list, tuple)) else [array(x)]


def discriminator(real, fake, smoothing=0.0, reduction="mean"):
    return reference.gan_loss(arrays(real), arrays(fake), smoothing, reduction)


def generator(fake, kind="non_saturating", reduction="mean"):
    return (
        reference.gan_loss(arrays(fake), [], 0.0, reduction)
        if kind == KINDS[0]
        else -reference.gan_loss([], arrays(fake), 0.0, reduction)
    )


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shapes(device, shape, reduction, dtype):
    real, fake = logits(shape, 0, device, dtype), logits((3, 37), 1, device, dtype)
    loss = fastgen.discriminator_loss(real, fake, reduction=reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == () and not loss.requires_grad
    assert_close(loss, discriminator(real, fake, reduction=reduction))
    assert_close(fastgen.discriminator_loss(fake, real, reduction=reduction), discriminator(fake, real, reduction=reduction))
    for kind in KINDS:
        assert_close(fastgen.generator_loss(real, kind=kind, reduction=reduction), generator(real, kind, reduction))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_blocks(device, dtype):
    real, fake = logits((40_003,), 0, device, dtype), logits((70_001,), 1, device, dtype)
    rel = 2e-7 if dtype == torch.float32 else 1e-12
    for reduction in REDUCTIONS:
        loss = fastgen.discriminator_loss(real, fake, label_smoothing=0.1, reduction=reduction)
        assert loss.item() == pytest.approx(discriminator(real, fake, 0.1, reduction), rel=rel)


@pytest.mark.parametrize("shape", EMPTY)
def test_nothing(device, shape):
    """The mean of nothing is NaN, its sum 0, as in torch; the other side's monitors know nothing of it."""
    none, some = torch.empty(shape, device=device), logits((5,), 0, device)
    for real, fake in ((none, some), (some, none), (none, none), ([some, none], some)):
        assert fastgen.discriminator_loss(real, fake).isnan()
        total = fastgen.discriminator_loss(real, fake, reduction="sum")
        assert_close(total, discriminator(real, fake, reduction="sum"))
    _, monitors = fastgen.discriminator_loss(none, some, reduction="sum", monitors=True)
    assert torch.stack(monitors).isnan().tolist() == [True, False, True, True]
    assert fastgen.generator_loss(none).isnan() and fastgen.generator_loss(none, reduction="sum") == 0
    leaf = none.clone().requires_grad_()
    for reduction in REDUCTIONS:
        (gradient,) = torch.autograd.grad(fastgen.discriminator_loss(leaf, some, reduction=reduction), leaf)
        assert gradient.shape == shape


@pytest.mark.pairs
@pytest.mark.parametrize("real_dtype", DTYPES)
@pytest.mark.parametrize("fake_dtype", DTYPES)
def test_dtypes(device, real_dtype, fake_dtype):
    real, fake = logits((3, 50), 0, device, real_dtype), logits((7, 50), 1, device, fake_dtype)
    loss, monitors = fastgen.discriminator_loss(real, fake, label_smoothing=0.1, monitors=True)
    assert loss.dtype == (torch.float64 if torch.float64 in (real_dtype, fake_dtype) else torch.float32)
    accuracy = {"rtol": 0, "atol": 1e-6}  # a float32 tensor beside a float64 one is computed in either
    np.testing.assert_allclose(array(loss), discriminator(real, fake, 0.1), **accuracy)
    np.testing.assert_allclose(
        np.array([x.item() for x in monitors]), reference.gan_monitors(arrays(real), arrays(fake)), **accuracy
    )
    assert all(x.dtype == loss.dtype for x in monitors)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 0.99, 0])
def test_label_smoothing(device, smoothing):
    """One-sided: the target of fake samples stays 0."""
    real, fake = logits((64, 1), 0, device), logits((32, 1), 1, device)
    loss = fastgen.discriminator_loss(real, fake, label_smoothing=smoothing)
    assert_close(loss, discriminator(real, fake, smoothing))
    eager = bce(real, torch.full_like(real, 1 - smoothing)) + bce(fake, torch.zeros_like(fake))
    torch.testing.assert_close(loss, eager)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scales", [(1, 1), (3, 3), (2, 5), (1, 40), (70, 33)])
def test_scales(device, scales, reduction):
    """Each scale has its own mean, and the loss is their sum; more than one launch takes."""
    shapes = [(2, 1, 9, 9), (2, 1, 4, 4), (2, 77), (3,), (1030,)]
    real, fake = ([logits(shapes[k % 5], 10 * side + k, device) for k in range(n)] for side, n in enumerate(scales))
    loss, monitors = fastgen.discriminator_loss(real, tuple(fake), label_smoothing=0.2, reduction=reduction, monitors=True)
    assert_close(loss, discriminator(real, fake, 0.2, reduction))
    for actual, expected in zip(monitors, reference.gan_monitors(arrays(real), arrays(fake)), strict=True):
        assert_close(actual, expected)
    for kind in KINDS:
        loss, monitors = fastgen.generator_loss(fake, kind=kind, reduction=reduction, monitors=True)
        assert_close(loss, generator(fake, kind, reduction))
        for actual, expected in zip(monitors, reference.gan_monitors([], arrays(fake))[1:3], strict=True):
            assert_close(actual, expected)
    leaves = [x.clone().requires_grad_() for x in real + fake]
    fastgen.discriminator_loss(leaves[: len(real)], leaves[len(real) :], reduction=reduction).mul(0.5).backward()
    for k, leaf in enumerate(leaves):
        n = leaf.numel() if reduction == "mean" else 1
        assert_close(leaf.grad, 0.5 / n * reference.bce_with_logits_gradient(array(leaf), float(k < len(real))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_reduction(device, dtype):
    """The pair of losses, each as its logits."""
    real, fake = logits((3, 4), 0, device, dtype), logits((5,), 1, device, dtype)
    losses = fastgen.discriminator_loss(real, fake, label_smoothing=0.1, reduction="none")
    for loss, x, target in zip(losses, (real, fake), (0.9, 0.0), strict=True):
        assert loss.dtype == dtype
        assert_close(loss, reference.bce_with_logits(array(x), target, reduction="none"))
    (first, second), _ = fastgen.discriminator_loss([real, fake], fake, reduction="none")
    assert first.shape == real.shape and second.shape == fake.shape
    loss, monitors = fastgen.generator_loss(fake, kind="minimax", reduction="none", monitors=True)
    assert_close(loss, -reference.bce_with_logits(array(fake), 0.0, reduction="none"))
    assert_close(monitors.fake_probability, np.mean(reference.sigmoid(array(fake))).astype(np.float64))
    leaf = real.clone().requires_grad_()
    fastgen.discriminator_loss(leaf, fake, reduction="none")[0].sum().backward()
    assert_close(leaf.grad, reference.bce_with_logits_gradient(array(real), 1.0))


@pytest.mark.pairs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_layouts(device, layout, other):
    """A gradient lies in memory as its logits do, where those leave no gaps."""
    real, fake = logits((3, 4, 5, 6), 0, device), logits((2, 4, 5, 6), 1, device)
    leaves = LAYOUTS[layout](real).requires_grad_(), LAYOUTS[other](fake).requires_grad_()
    for scale in (1.0, 2.0):
        loss = fastgen.discriminator_loss(*leaves)
        assert_close(loss, discriminator(real, fake))
        gradients = torch.autograd.grad(scale * loss, leaves)
        for gradient, leaf, target, name in zip(gradients, leaves, (1.0, 0.0), (layout, other), strict=True):
            assert_close(gradient, scale / leaf.numel() * reference.bce_with_logits_gradient(array(leaf), target))
            if fastgen.backend(device) != "eager":
                assert gradient.stride() == leaf.stride() if name != "sliced" else gradient.is_contiguous()


def test_expanded_logits(device):
    x = logits((5, 1), 0, device).requires_grad_()
    fastgen.discriminator_loss(x.expand(5, 7), x.expand(5, 3), reduction="sum").backward()
    expected = 7 * reference.bce_with_logits_gradient(array(x), 1.0) + 3 * reference.bce_with_logits_gradient(array(x), 0.0)
    assert_close(x.grad, expected)


def test_half_precision_under_autocast(device):
    """The logits come out of the network in half precision; the loss is not rounded to it."""
    weight = normal((16, 1), 0, device=device).requires_grad_()
    x, z = normal((64, 16), 1, device=device), normal((64, 16), 2, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        real, fake = x @ weight, z @ weight
        loss = fastgen.discriminator_loss(real, fake)
        assert real.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert_close(loss, discriminator(real, fake))
    loss.backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


# ---- extremes -------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 17.0, 88.0, 104.0, 1e4, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits(device, dtype, magnitude, smoothing):
    """A confident right answer keeps the digits of its tiny loss and gradient."""
    tight = {"rtol": 2e-6 if dtype == torch.float32 else 1e-13, "atol": 2 * float(torch.finfo(dtype).tiny)}
    if fastgen.backend(device) == "eager":  # torch's float32 softplus and σ lose a few more
        tight["rtol"] *= 4
    for value, count in itertools.product((magnitude, -magnitude), (1, 70)):
        x = torch.full((count,), value, dtype=dtype, device=device).requires_grad_()
        none = torch.empty(0, dtype=dtype, device=device)
        for loss, target in (
            (fastgen.discriminator_loss(x, none, label_smoothing=smoothing, reduction="sum"), 1.0 - smoothing),
            (fastgen.discriminator_loss(none, x, label_smoothing=smoothing, reduction="sum"), 0.0),
        ):
            expected = count * np.float64(reference.bce_with_logits(array(x)[0], target))
            if expected < torch.finfo(dtype).max:
                np.testing.assert_allclose(array(loss), expected, **tight)
            (gradient,) = torch.autograd.grad(loss, x)
            np.testing.assert_allclose(array(gradient), reference.bce_with_logits_gradient(array(x), target), **tight)


@pytest.mark.parametrize("count", [1, 33])
def test_infinite_logits(device, count):
    """Infinitely sure: no loss where that is right, an infinite one where not, and gradients of 0 and ±1."""
    inf = torch.full((count,), torch.inf, device=device)
    zero = torch.zeros(0, device=device)
    for real, fake, smoothing, loss, slope in [
        (inf, zero, 0.0, 0.0, 0.0),
        (-inf, zero, 0.0, torch.inf, -1.0),
        (zero, inf, 0.0, torch.inf, 1.0),
        (zero, -inf, 0.0, 0.0, 0.0),
        (inf, zero, 0.1, torch.inf, 0.1),
        (-inf, zero, 0.1, torch.inf, -0.9),
        (zero, -inf, 0.1, 0.0, 0.0),
    ]:
        x = (real if len(real) else fake).clone().requires_grad_()
        sides = (x, fake) if len(real) else (real, x)
        for upstream in (1.0, 0.5):
            made = fastgen.discriminator_loss(*sides, label_smoothing=smoothing, reduction="sum")
            assert made == loss
            (gradient,) = torch.autograd.grad(upstream * made, x)
            assert_close(gradient, np.full(count, upstream * slope))
    loss, monitors = fastgen.discriminator_loss(inf, -inf, monitors=True)
    assert loss == 0 and torch.stack(monitors).tolist() == [1, 0, 1, 0]
    loss, monitors = fastgen.discriminator_loss(-inf, inf, monitors=True)
    assert loss == torch.inf and torch.stack(monitors).tolist() == [0, 1, 0, -torch.inf]
    assert fastgen.generator_loss(inf) == 0 and fastgen.generator_loss(inf, kind="minimax") == -torch.inf


@pytest.mark.parametrize("position", [0, 31, 99, 100])
def test_nan(device, position):
    """Reaches the loss, that element's gradient, and the monitors of its side."""
    good, bad = logits((101,), 0, device), logits((101,), 1, device)
    bad[position] = torch.nan
    for smoothing in (0.0, 0.1):
        loss, monitors = fastgen.discriminator_loss(bad, good, label_smoothing=smoothing, monitors=True)
        assert loss.isnan() and torch.stack(monitors).isnan().tolist() == [True, False, True, True]
        leaf = bad.clone().requires_grad_()
        for upstream in (1.0, 2.0):
            (gradient,) = torch.autograd.grad(upstream * fastgen.discriminator_loss(leaf, good, label_smoothing=smoothing), leaf)
            assert torch.equal(gradient.isnan(), bad.isnan())
    assert fastgen.generator_loss(bad).isnan() and fastgen.generator_loss(good).isfinite()


# ---- monitors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_monitors(device, reduction, smoothing):
    """Never smoothed, always means, each side with the same weight in the accuracy however many logits it has."""
    real, fake = logits((1000,), 0, device).round(), logits((37, 3), 1, device).round()  # with zeros among them
    how = {"label_smoothing": smoothing, "reduction": reduction}
    loss, monitors = fastgen.discriminator_loss(real, fake, **how, monitors=True)
    plain = fastgen.discriminator_loss(real, fake, **how)
    for a, e in zip(loss, plain, strict=True) if reduction == "none" else [(loss, plain)]:
        torch.testing.assert_close(a, e, rtol=3e-7, atol=0)
    assert monitors._fields == ("real_probability", "fake_probability", "accuracy", "value")
    for actual, expected in zip(monitors, reference.gan_monitors(arrays(real), arrays(fake)), strict=True):
        assert actual.shape == () and actual.device == real.device and not actual.requires_grad
        assert_close(actual, expected)
    assert (real == 0).any() and (fake == 0).any()  # each of which counts a half
    _, monitors = fastgen.generator_loss(fake, reduction=reduction, monitors=True)
    assert monitors._fields == ("fake_probability", "accuracy")


def test_monitors_beside_gradients(device):
    real, fake = logits((300,), 0, device).requires_grad_(), logits((40,), 1, device).requires_grad_()
    loss, monitors = fastgen.discriminator_loss(real, fake, monitors=True)
    assert loss.requires_grad and not any(x.requires_grad for x in monitors)
    gradients = torch.autograd.grad(loss, (real, fake))
    for a, e in zip(gradients, torch.autograd.grad(fastgen.discriminator_loss(real, fake), (real, fake)), strict=True):
        assert_same(a, e)
    for actual, expected in zip(monitors, reference.gan_monitors(arrays(real), arrays(fake)), strict=True):
        assert_close(actual, expected)


# ---- gradients ------------------------------------------------------------------------------------------------------

LOSSES = {
    "discriminator": lambda x, y, reduction: fastgen.discriminator_loss(x, y, reduction=reduction),
    "smoothed": lambda x, y, reduction: fastgen.discriminator_loss([x, y], y, label_smoothing=0.1, reduction=reduction),
    "non_saturating": lambda x, y, reduction: fastgen.generator_loss([x, y], reduction=reduction),
    "minimax": lambda x, y, reduction: fastgen.generator_loss([y, x], kind="minimax", reduction=reduction),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradcheck(device, loss, reduction):
    x, y = (logits(shape, k, device, torch.float64).requires_grad_() for k, shape in enumerate([(2, 3), (4,)]))
    f = lambda x, y: loss(x, y, reduction)  # noqa: E731
    assert_derivatives(device, f, (x, y))
    batched = torch.autograd.grad(f(x, y), (x, y), torch.arange(3.0, dtype=torch.float64, device=device), is_grads_batched=True)
    for several, one in zip(batched, torch.autograd.grad(f(x, y), (x, y)), strict=True):
        torch.testing.assert_close(several, torch.stack([k * one for k in range(3)]))


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [1.0, 65536.0, -0.25])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (64, 1), (7, 129), (40_001,)])
def test_gradients(device, shape, reduction, upstream, dtype):
    """Rounded once, whatever comes from above: a loss scale exists to keep float16's gradients from vanishing."""
    real, fake = (logits(shape, k, device, dtype).requires_grad_() for k in range(2))
    loss = fastgen.discriminator_loss(real, fake, label_smoothing=0.1, reduction=reduction)
    gradients = torch.autograd.grad(upstream * loss, (real, fake))
    scale = upstream / (real.numel() if reduction == "mean" else 1)
    for gradient, x, target in zip(gradients, (real, fake), (0.9, 0.0), strict=True):
        assert gradient.dtype == dtype
        expected = scale * reference.bce_with_logits_gradient(array(x), target)
        limit = torch.finfo(dtype).max
        inside = np.abs(expected) < limit
        assert_close(gradient[torch.tensor(inside, device=device)], expected[inside], scale=abs(scale))


def test_gradient_of_either_side(device):
    real, fake = logits((5,), 0, device), logits((6,), 1, device)
    leaf = fake.clone().requires_grad_()
    fastgen.discriminator_loss(real, leaf).backward()
    assert_close(leaf.grad, reference.bce_with_logits_gradient(array(fake), 0.0) / 6)
    assert not fastgen.discriminator_loss(real, fake).requires_grad
    with torch.no_grad():
        assert not fastgen.discriminator_loss(real, leaf).requires_grad
    both = fake.clone().requires_grad_()  # one tensor on both sides
    fastgen.discriminator_loss(both, both, reduction="sum").backward()
    expected = reference.bce_with_logits_gradient(array(fake), 0.0) + reference.bce_with_logits_gradient(array(fake), 1.0)
    assert_close(both.grad, expected)


def test_a_second_backward_gives_the_same(device):
    """Also where the caller has written to what the first one gave."""
    real, fake = logits((50,), 0, device).requires_grad_(), logits((6,), 1, device)
    loss = fastgen.discriminator_loss(real, fake)
    (first,) = torch.autograd.grad(loss, real, retain_graph=True)
    kept = first.clone()
    first.fill_(7.0)
    for _ in range(2):
        (again,) = torch.autograd.grad(loss, real, retain_graph=True)
        assert_same(again, kept)
    torch.autograd.grad(loss, real)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, real)
    if fastgen.backend(device) == "eager":  # which keeps other tensors
        return
    y = real.detach().clone().requires_grad_() * 1
    loss = fastgen.generator_loss(y)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functional_transforms(device):
    real, fake = logits((4, 5), 0, device), logits((4, 3), 1, device)
    loss = lambda r, f: fastgen.discriminator_loss(r, f, label_smoothing=0.1)  # noqa: E731
    each = torch.func.vmap(loss)(real, fake)
    assert_close(each, np.array([discriminator(r, f, 0.1) for r, f in zip(real, fake, strict=True)]))
    leaf = real.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, fake), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(real, fake), expected)
    value, slope = torch.func.jvp(lambda r: loss(r, fake), (real,), (torch.ones_like(real),))
    torch.testing.assert_close(slope, expected.sum())
    assert_close(value, discriminator(real, fake, 0.1))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(fake, torch.ones_like(fake))
        slope = torch.autograd.forward_ad.unpack_dual(fastgen.generator_loss(dual)).tangent
    assert_close(slope, np.mean(reference.bce_with_logits_gradient(array(fake), 1.0)))
    hessian = torch.func.hessian(fastgen.generator_loss)(fake[0])
    s = reference.sigmoid(array(fake[0]))
    assert_close(hessian, np.diag(s * (1 - s)) / 3)
    _, monitors = torch.func.vmap(lambda r, f: fastgen.discriminator_loss(r, f, monitors=True))(real, fake)
    assert_close(monitors.real_probability, reference.sigmoid(array(real)).mean(1))


# ---- long sums ------------------------------------------------------------------------------------------------------


def test_sums_do_not_drift(backend, device):
    """10⁸ float32 logits beside float64."""
    if backend == "eager":
        pytest.skip("its sums are torch's")
    if interpreted(device):
        pytest.skip("Triton's interpreter takes minutes for so many")
    if device.type == "cpu" and free_memory() < 2**30:
        pytest.skip("needs 1 GiB of free memory")
    times = 4 if "FASTGEN_LAUNCHED" in os.environ else 100  # the CUDA code on the host takes a minute for more
    part = logits((10**6,), 0, device) + 0.3
    real = part.repeat(times)
    loss, monitors = fastgen.discriminator_loss(real, part, monitors=True)
    assert loss.item() == pytest.approx(discriminator(part, part), rel=1e-7)
    for actual, expected in zip(monitors, reference.gan_monitors(arrays(part), arrays(part)), strict=True):
        assert actual.item() == pytest.approx(expected, rel=1e-7)
    total = fastgen.generator_loss(real, reduction="sum")
    assert total.item() == pytest.approx(times * generator(part, reduction="sum"), rel=1e-7)
    same = fastgen.generator_loss(torch.full((2**22 + 5,), 0.1, device=device), reduction="sum")  # rounds the same way each time
    assert same.item() == pytest.approx((2**22 + 5) * generator(torch.tensor(0.1)), rel=4e-6)


def test_more_than_2_to_the_31_logits(backend, device):
    """Zeros that take no memory, and something at the end."""
    if backend == "eager" or device.type != "cpu" or sys.platform != "linux":
        pytest.skip("one kernel's index arithmetic; on a GPU tests/test_cuda.py has it")
    if backend == "triton" or "FASTGEN_LAUNCHED" in os.environ:
        pytest.skip("Triton's interpreter takes minutes for so many, and so does the CUDA code on the host")
    count = 2**31 + 5
    memory = mmap.mmap(-1, 2 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    x = torch.frombuffer(memory, dtype=torch.bfloat16)
    x[-5:] = -(2.0**31)
    total = fastgen.generator_loss(x, reduction="sum")
    assert total.item() == pytest.approx((count - 5) * math.log(2) + 5 * 2**31, rel=1e-6)


def free_memory():
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable"))


# ---- theory ---------------------------------------------------------------------------------------------------------


def gaussian(x, mean, deviation):
    return np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))


DATA, GENERATED = (0.0, 1.0), (1.5, 0.7)  # mean and deviation of each


def jensen_shannon(p, q):
    """The divergence of two densities by quadrature."""

    def integrand(x):
        a, b = p(x), q(x)
        m = (a + b) / 2
        return 0.5 * (a * np.log(a / m) + b * np.log(b / m)) if a > 0 and b > 0 else 0.5 * (a + b) * np.log(2)

    return integrate.quad(integrand, -12, 12, epsabs=1e-12, limit=200)[0]


def optimal_logits(x, data, generated):
    """log p_data − log p_g, whose σ is equation (2.4)."""
    log = lambda x, mean, deviation: -0.5 * ((x - mean) / deviation) ** 2 - math.log(deviation)  # noqa: E731
    return log(x, *data) - log(x, *generated)


def test_value_at_the_optimal_discriminator(device):
    """Theorem 3: max_D V = 2·JSD(p_data‖p_g) − log 4, its loss log 4 − 2·JSD, to Monte-Carlo accuracy."""
    n = 10**6
    x, z = DATA[0] + DATA[1] * normal((n,), 0, torch.float64), GENERATED[0] + GENERATED[1] * normal((n,), 1, torch.float64)
    real, fake = (optimal_logits(v, DATA, GENERATED).to(device, torch.float32) for v in (x, z))
    loss, monitors = fastgen.discriminator_loss(real, fake, monitors=True)
    divergence = jensen_shannon(lambda x: gaussian(x, *DATA), lambda x: gaussian(x, *GENERATED))
    assert 0.1 < divergence < math.log(2)
    deviation = math.sqrt((np.logaddexp(0, -array(real)).var() + np.logaddexp(0, array(fake)).var()) / n)
    assert loss.item() == pytest.approx(math.log(4) - 2 * divergence, abs=4 * deviation)
    assert monitors.value.item() == pytest.approx(2 * divergence - math.log(4), abs=4 * deviation)
    # the best discriminator is calibrated: ∫ D·(p_data + p_g) = ∫ p_data = 1
    assert (monitors.real_probability + monitors.fake_probability).item() == pytest.approx(1, abs=4 / math.sqrt(n))
    # any other loses more
    for change in (lambda logit: logit + 0.1, lambda logit: 0.9 * logit):
        assert fastgen.discriminator_loss(change(real), change(fake)) > loss


def test_value_where_the_densities_agree(device):
    """Theorem 3: −log 4, since the optimal logits are 0."""
    x, z = normal((100,), 0, torch.float64), normal((200,), 1, torch.float64)
    real, fake = (optimal_logits(v, DATA, DATA).to(device) for v in (x, z))
    loss, monitors = fastgen.discriminator_loss(real, fake, monitors=True)
    assert_close(loss, math.log(4))
    assert_close(torch.stack(monitors), np.array([0.5, 0.5, 0.5, -math.log(4)]))


@pytest.mark.parametrize("p_data, p_g", [(0.5, 0.5), (0.9, 0.1), (0.2, 0.7), (3.0, 0.01)])
def test_best_logit(device, p_data, p_g):
    """Proposition 2: of a·log D + b·log(1 − D), here over a grid of logits, D = a/(a + b) is the maximum."""
    points = 41 if interpreted(device) else 401
    grid = torch.linspace(-8, 8, points, dtype=torch.float64, device=device)
    none, total = grid[:0], functools.partial(fastgen.discriminator_loss, reduction="sum")
    pairs = [(total(x, none), total(none, x)) for x in grid[:, None]]
    losses = torch.stack([p_data * real + p_g * fake for real, fake in pairs])
    best = torch.sigmoid(grid[losses.argmin()])
    assert best.item() == pytest.approx(p_data / (p_data + p_g), abs=0.25 * (grid[1] - grid[0]).item())
    # and there the gradient of the mean over p_data copies of a real and p_g of a fake sample is 0
    x = torch.full((1,), math.log(p_data / p_g), dtype=torch.float64, device=device, requires_grad=True)
    loss = p_data * total(x, none) + p_g * total(none, x)
    assert torch.autograd.grad(loss, x)[0].abs().item() < 1e-14


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_best_logit_under_smoothing(device, smoothing):
    """Salimans et al. 2016: (1 − s)·p_data/(p_data + p_g)."""
    x = torch.zeros(1, dtype=torch.float64, device=device, requires_grad=True)
    for _ in range(12 if interpreted(device) else 60):  # Newton's method
        loss = fastgen.discriminator_loss(x, x, label_smoothing=smoothing)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        x = (x - slope / curvature).detach().requires_grad_()
    assert torch.sigmoid(x).item() == pytest.approx((1 - smoothing) / 2, abs=1e-12)


def test_both_generator_losses_have_the_same_fixed_point(device):
    """At D = ½ everywhere the gradients of both are proportional; far below, only one is left."""
    undecided, sure = (torch.full((8,), value, device=device, requires_grad=True) for value in (0.0, -20.0))
    slope = lambda x, kind: torch.autograd.grad(fastgen.generator_loss(x, kind=kind), x)[0]  # noqa: E731
    assert_same(*(slope(undecided, kind) for kind in KINDS))
    assert slope(sure, "minimax").abs().max() < 1e-9 and slope(sure, "non_saturating").abs().min() > 0.12


def test_transposed_logits_are_read_in_place(device):
    """The order is the memory's: the sums of a tensor and of its transpose have the same bits, in float64, where order shows."""
    x = transposed(logits((33, 65), 0, device, torch.float64))
    assert not x.is_contiguous()
    assert_same(fastgen.generator_loss(x), fastgen.generator_loss(x.t()))
