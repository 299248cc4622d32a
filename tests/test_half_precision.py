"""The losses of half-precision logits, over all 65,536 of them: bce_with_logits and those of a GAN, their values and slopes.

The CUDA kernels' formulas take approximations of 2ᵃ and 1/a there. The first half compiles them for the host with approximations
that are as far off as the PTX ISA lets a GPU's be. Both errors act in one direction each on a loss or a slope, so that the worst is
at the ends. The second half is what every backend must keep; `tests/device_on_ptx.py` and
`device_on_host.py` run it on the kernels' code.
"""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import array

import fastgen

ROOT = Path(__file__).resolve().parent.parent
HALVES = (torch.bfloat16, torch.float16)
TARGETS = (0.0, 1.0, 0.5)
WEIGHT = 0.75
# Of a loss, and of a slope's two terms, which have opposite signs: the relative error in float32. What grows with |x| is the
# rounding of the exponent, and far below the 2⁻⁹·|x| or 2⁻¹²·|x| that the logit itself was rounded by.
ERROR, ERROR_OF_EXPONENT = 6e-7, 8e-8
SUBNORMAL = 2.0**-148  # two units of float32's

PROBE = """
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>
static int exp2_ulps = 0, reciprocal_ulps = 0;
static float shifted(float a, int ulps) {
  int32_t bits;
  memcpy(&bits, &a, 4);
  bits += ulps;
  float b;
  memcpy(&b, &bits, 4);
  return a >= 0x1p-125f && a < INFINITY ? b : a < 0x1p-126f ? 0.0f : a;
}
#define FG_EXP2_APPROXIMATION(a) ((a) == 0 ? 1.0f : shifted(::exp2f(a), exp2_ulps))
#define FG_RECIPROCAL_APPROXIMATION(a) shifted(1.0f / (a), reciprocal_ulps)
#include "gan_loss/gan_loss.h"
using namespace fastgen;
extern "C" void approximations(int exp2, int reciprocal) { exp2_ulps = exp2, reciprocal_ulps = reciprocal; }
// {BCE's loss and slope, the same with a weight and a pos_weight, the GAN's loss, slope and probability} of each logit
extern "C" void evaluate(int accurate, int64_t count, const float* x, double target, float weight, float* const* out) {
  GanSegment segment{};
  segment.target = target;
  const GanTarget<float> of_segment(segment);
  auto all = [&](auto accuracy) {
    constexpr Accuracy kAccuracy = decltype(accuracy)::value;
    const float y = float(target);
    for (int64_t i = 0; i < count; ++i) {
      out[0][i] = bce_loss<kAccuracy>(x[i], y, One{}, One{});
      out[1][i] = bce_gradient<kAccuracy>(x[i], y, One{}, One{});
      out[2][i] = bce_loss<kAccuracy>(x[i], y, weight, weight);
      out[3][i] = bce_gradient<kAccuracy>(x[i], y, weight, weight);
      const GanLogit<float, kAccuracy> logit(x[i]);
      out[4][i] = gan_loss(logit, of_segment, of_segment.soft);
      out[5][i] = gan_gradient(logit, of_segment.positive, of_segment.negative);
      out[6][i] = gan_probability(logit);
    }
  };
  accurate ? all(std::integral_constant<Accuracy, kAccurate>{}) : all(std::integral_constant<Accuracy, kApproximate>{});
}
"""


def every_logit(dtype):
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def sigmoid(x):
    with np.errstate(invalid="ignore", under="ignore"):
        return reference.sigmoid(x)


def truth(x, y, weight=None):
    """In float64, of an array of logits: (losses, slopes, the sum of the sizes of a slope's two terms); weight: of both kinds."""
    w = 1.0 if weight is None else weight
    with np.errstate(invalid="ignore", under="ignore"):
        losses = reference.bce_with_logits(x, np.float64(y), w, w, "none")
        slopes = reference.bce_with_logits_gradient(x, y, w, w)
        terms = w * ((1.0 - y) * reference.sigmoid(x) + w * y * reference.sigmoid(-x))
    return losses, slopes, terms


def allowed(x, size):
    """The error that a value of float32 may have."""
    return (ERROR + ERROR_OF_EXPONENT * np.minimum(np.abs(x), 150.0)) * size + SUBNORMAL


def half_a_unit(expected, dtype):
    """Half the spacing of the dtype's numbers around each: what one rounding may add."""
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    with np.errstate(invalid="ignore"):
        power = np.exp2(np.floor(np.log2(np.maximum(np.abs(expected), tiny))))
    return 0.5 * eps * power


def assert_within(actual, expected, bound):
    """Elements that are not finite must be the same."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    share = np.abs(actual[finite] - expected[finite]) / bound[finite]
    worst = np.argmax(share)
    assert share[worst] <= 1.0, (actual[finite][worst], expected[finite][worst], bound[finite][worst])


# ---- the formulas ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    if shutil.which("g++") is None or not (ROOT / "csrc").exists():
        pytest.skip("needs g++ and the sources")
    directory = tmp_path_factory.mktemp("half_precision")
    (directory / "probe.cpp").write_text(PROBE)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-march=native", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, directory / "probe.cpp", "-o", directory / "probe.so"], check=True)
    return ctypes.CDLL(str(directory / "probe.so"))


def evaluate(probe, x, y, accurate=False):
    x = np.ascontiguousarray(x, np.float32)
    results = np.empty((7, len(x)), np.float32)
    pointers = (ctypes.c_void_p * 7)(*(row.ctypes.data for row in results))
    probe.evaluate(
        ctypes.c_int(accurate),
        ctypes.c_int64(len(x)),
        x.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_double(y),
        ctypes.c_float(WEIGHT),
        pointers,
    )
    return results


@pytest.mark.parametrize("y", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("exp2, reciprocal", [(0, 0), *itertools.product((-2, 2), (-1, 1))])
def test_formulas(probe, exp2, reciprocal, dtype, y):
    """In float32, whose sums keep the digits of the tiniest loss, and rounded once to the dtype."""
    probe.approximations(exp2, reciprocal)
    x = array(every_logit(dtype).float())
    plain, weighted = truth(x, y), truth(x, y, WEIGHT)
    expected = [*plain[:2], *weighted[:2], *plain[:2], sigmoid(x)]
    sizes = [plain[0], plain[2], weighted[0], weighted[2], plain[0], plain[2], sigmoid(x)]
    for actual, value, size in zip(evaluate(probe, x, y), expected, sizes, strict=True):
        bound = allowed(x, size)
        assert_within(actual.astype(np.float64), value, bound)
        assert_within(array(torch.from_numpy(actual).to(dtype)), value, half_a_unit(value, dtype) + bound)


@pytest.mark.parametrize("y", TARGETS)
def test_accurate_formulas(probe, y):
    """Those of float32 data, on the same logits: closer by far, and no different where an approximation is off."""
    probe.approximations(2, -1)
    x = array(torch.cat([every_logit(dtype).float() for dtype in HALVES]))
    losses, slopes, terms = truth(x, y)
    results = evaluate(probe, x, y, accurate=True)
    for k, value, size in ((0, losses, losses), (4, losses, losses), (1, slopes, terms), (5, slopes, terms)):
        assert_within(results[k].astype(np.float64), value, 2.5e-7 * size + SUBNORMAL)


# ---- every backend --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("y", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
def test_bce_with_logits(device, dtype, y, weight):
    x = every_logit(dtype).to(device).requires_grad_()
    target = torch.full_like(x, y).detach()
    w = None if weight is None else torch.full_like(target, weight)
    loss = fastgen.bce_with_logits(x, target, w, "none", w)
    (slope,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    losses, slopes, terms = truth(array(x), y, weight)
    assert loss.dtype == slope.dtype == dtype
    assert_within(array(loss), losses, half_a_unit(losses, dtype) + allowed(array(x), losses))
    assert_within(array(slope), slopes, half_a_unit(slopes, dtype) + allowed(array(x), terms))


@pytest.mark.parametrize("y", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
def test_means(device, dtype, y):
    """Of logits that are all alike: their errors do not cancel."""
    for value in (-80.0, -20.0, -3.0, -0.5, 0.0, 1e-3, 0.5, 3.0, 20.0, 80.0):
        x = torch.full((1040,), value, dtype=dtype, device=device)
        expected = truth(array(x), y)[0][:1]
        mean = fastgen.bce_with_logits(x, torch.full_like(x, y))
        assert_within(array(mean)[None], expected, half_a_unit(expected, dtype) + 2 * allowed(array(x)[:1], expected))


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_gan_losses(device, dtype, real, smoothing):
    every = every_logit(dtype)
    x = every.to(device).requires_grad_()
    other = torch.zeros(1, dtype=dtype, device=device)
    pair = (x, other) if real else (other, x)
    loss = fastgen.discriminator_loss(*pair, label_smoothing=smoothing, reduction="sum")
    (slope,) = torch.autograd.grad(loss, x)
    y = 1.0 - smoothing if real else 0.0
    _, slopes, terms = truth(array(x), y)
    assert slope.dtype == dtype
    assert_within(array(slope), slopes, half_a_unit(slopes, dtype) + allowed(array(x), terms))
    for value in (-80.0, -20.0, -3.0, 0.0, 3.0, 20.0, 80.0):  # all alike, into a float32
        alike = torch.full((1040,), value, dtype=dtype, device=device)
        expected = truth(array(alike), y)[0][:1]
        loss = fastgen.discriminator_loss(
            *((alike, other[:0]) if real else (other[:0], alike)), label_smoothing=smoothing, reduction="sum"
        )
        assert_within(array(loss)[None] / 1040, expected, 2 * allowed(array(alike)[:1], expected))
