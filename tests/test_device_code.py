"""The CUDA kernels' ways through a tensor: their index arithmetic on the host, past 2³² elements too, and shapes for each way.

The second half runs on every device and backend; `tests/device_on_ptx.py` and `device_on_host.py` run it on the
kernels' code.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close, channels_last, normal, unaligned

import fastgen

ROOT = Path(__file__).resolve().parent.parent
SIZES = (1, 3, 4, 127, 128, 129, 1000, 4096, 12_289)
PROBE = """
#include "common/index.h"
using namespace fastgen;
extern "C" int64_t quotient(int64_t divisor, int64_t n) { return Divider(divisor).quotient(n); }
// {vectors of an item, items, vectors left over, first of those}
extern "C" void vector_plan(int64_t vectors, int64_t samples, int32_t most, int64_t* out) {
  const VectorPlan plan(vectors, samples, most);
  out[0] = plan.unroll, out[1] = plan.items.count, out[2] = plan.left_over, out[3] = plan.first_left_over();
}
// {sample, vectors …} of an item
extern "C" void vectors_of(int64_t vectors, int64_t samples, int32_t most, int64_t item, int64_t* out) {
  const VectorPlan plan(vectors, samples, most);
  const Place place = plan.items.at(item);
  *out++ = place.sample;
  for (int u = 0; u < plan.unroll; ++u)
    *out++ = plan.vector(place.index, u);
}
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    if shutil.which("g++") is None or not (ROOT / "csrc").exists():
        pytest.skip("needs g++ and the sources")
    directory = tmp_path_factory.mktemp("probe")
    (directory / "probe.cpp").write_text(PROBE)
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        f"-I{ROOT / 'csrc'}",
        directory / "probe.cpp",
        "-o",
        directory / "probe.so",
    ]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(directory / "probe.so"))
    library.quotient.restype = ctypes.c_int64
    return library


def quotient(probe, divisor, n):
    return probe.quotient(ctypes.c_int64(divisor), ctypes.c_int64(n))


def called(function, *arguments, results):
    out = (ctypes.c_int64 * results)()
    function(*map(ctypes.c_int64, arguments), out)
    return list(out)


def test_division_without_division(probe):
    """Exact for every divisor and every 63-bit number: around the multiples, where an inexact one goes wrong first."""
    rng = np.random.default_rng(0)
    powers = [2**k + d for k in range(63) for d in (-1, 0, 1)]
    divisors = [d for d in powers if 0 < d < 2**63] + [int(2 ** rng.uniform(0, 63)) for _ in range(300)]
    for divisor in divisors:
        numbers = [0, 1, divisor - 1, divisor, 2**63 - 1, 2**32, 2**32 - 1]
        for multiple in (1, 2, 3, (2**63 - 1) // divisor, int(rng.integers(1, max((2**63 - 1) // divisor, 2)))):
            numbers += [multiple * divisor - 1, multiple * divisor]
        for n in numbers:
            if n < 2**63:
                assert quotient(probe, divisor, n) == n // divisor, (divisor, n)


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize("vectors", [0, *SIZES, 300_000, 1_048_579, 8_388_608])
def test_every_vector_is_one_threads(probe, vectors, samples):
    """Each vector of each sample in exactly one item, or left over at the end of a single sample."""
    unroll, items, left_over, first = called(probe.vector_plan, vectors, samples, 4, results=4)
    assert unroll in (1, 2, 4) and items * unroll + left_over * samples == vectors * samples
    assert left_over == 0 or samples == 1
    if items * unroll > 3_000_000:
        chosen = np.unique(np.concatenate([np.arange(1000), items // 2 + np.arange(1000), items - 1 - np.arange(1000)]))
    else:
        chosen = np.arange(0, items, max(items // 20_000, 1))
    seen = set()
    for item in chosen:
        sample, *own = called(probe.vectors_of, vectors, samples, 4, int(item), results=1 + unroll)
        assert 0 <= sample < samples
        for vector in own:
            assert 0 <= vector < vectors - left_over and (sample, vector) not in seen
            seen.add((sample, vector))
    if len(chosen) == items:
        assert len(seen) == items * unroll
    if left_over:
        assert first == vectors - left_over


@pytest.mark.parametrize("samples", [1, 3, 64])
def test_the_last_wave_is_short(probe, samples):
    """Two vectors for a thread only from 5 waves of threads on, four from 10, and then they are taken."""
    wave = 132 * 768  # threads that an H100 runs at a time, of 80 registers each
    for vectors in (2**k * m for k in range(10, 28) for m in (4, 5, 6, 7)):
        unroll, items, *_ = called(probe.vector_plan, vectors, samples, 4, results=4)
        waves = items / wave
        assert unroll == 1 or waves >= 2.5 * unroll, (vectors, unroll, waves)
        assert unroll == 4 or waves / 2 < 2.6 * 2 * unroll, (vectors, unroll, waves)  # twice as many would have left too few


@pytest.mark.parametrize("samples", [1, 3, 2**20])
@pytest.mark.parametrize("vectors", [2**30 + 3, 2**32, 2**35 + 8])
def test_places_past_the_32_bits(probe, vectors, samples):
    """Neighbouring items are neighbouring vectors of one sample, to the last of tensors that no memory holds."""
    unroll, items, left_over, _ = called(probe.vector_plan, vectors, samples, 4, results=4)
    per_sample = items // samples
    for item in (0, 1, 2**31, 2**32 - 1, 2**32, per_sample - 1, per_sample, items - per_sample, items - 1):
        if item >= items:
            continue
        sample, *own = called(probe.vectors_of, vectors, samples, 4, item, results=1 + unroll)
        assert sample == item // per_sample
        assert own == [item % per_sample + u * per_sample for u in range(unroll)]
    assert per_sample * unroll + left_over == vectors


# ---- shapes that take every way ----------------------------------------------------------------------------------------

MIXES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]
SHAPES = {
    "vectors": ((3, 4, 2, 8), torch.clone),
    "one sample with a rest": ((1, 77), torch.clone),
    "unaligned": ((3, 4, 2, 8), unaligned),
    "odd": ((3, 5, 7), torch.clone),
    "tiles": ((3, 16, 4, 3), channels_last),
    "channels-last, whole groups": ((3, 3, 4, 4), channels_last),
    "channels-last, broken groups": ((3, 3, 3, 3), channels_last),
}
NOISES = ("none", "noise", "seed")


def agree(call, seed_offset, shape, noise, device, dtype):
    """`call` on this backend beside the eager one on the same noise, at an int timestep and at one for each sample."""
    for t in (17, torch.arange(39, 39 - 5 * shape[0], -5, device=device)):
        given = {}
        if noise != "none":
            computed = torch.float64 if dtype == torch.float64 else torch.float32
            if isinstance(t, int) or seed_offset == 0:
                z = fastgen.randn(shape, seed=5, offset=t if seed_offset else 0, dtype=computed, device=device)
            else:
                z = torch.stack(
                    [fastgen.randn(shape, seed=5, offset=int(o), dtype=computed, device=device)[i] for i, o in enumerate(t)]
                )
            given = {"seed": 5} if noise == "seed" else {"noise": z.to(dtype)}
        actual = call(t, **given)
        with fastgen.use_backend("eager"):
            expected = call(t, **(given if noise != "seed" else {"noise": z}))
        for a, e in zip(actual, expected, strict=True):
            near(a, e)


def near(actual, expected):
    """Both rounded once to their dtype, from float32 arithmetic or better on numbers of a size below 8."""
    eps = torch.finfo(actual.dtype).eps
    rounding = 1e-14 if actual.dtype == torch.float64 else 4e-6
    torch.testing.assert_close(actual, expected, rtol=eps, atol=rounding, equal_nan=True)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("way", SHAPES)
@pytest.mark.parametrize(("x_dtype", "m_dtype"), MIXES)
def test_steps_take_every_way(device, schedule, x_dtype, m_dtype, way, noise):
    shape, arrange = SHAPES[way]
    x, m, u = (arrange(normal(shape, seed, kind, device)) for seed, kind in enumerate((x_dtype, m_dtype, m_dtype)))
    dtype = torch.promote_types(x_dtype, m_dtype)

    def plain(t, **given):
        if noise == "none":
            return (fastgen.ddim_step(x, m, t, schedule),)
        return (fastgen.ddpm_step(x, m, t, schedule, **given),)

    def full(t, **given):
        if noise == "none":
            return fastgen.ddim_step(x, m, t, schedule, clip=0.7, return_x0=True)
        return fastgen.ddpm_step(x, m, t, schedule, clip=0.7, return_x0=True, **given)

    def guided(t, **given):
        guidance = {"unconditional_output": u, "guidance_scale": 1.5}
        if noise == "none":
            return (fastgen.ddim_step(x, m, t, schedule, clip=0.7, **guidance),)
        return fastgen.ddpm_step(x, m, t, schedule, clip=0.7, return_x0=True, **guidance, **given)

    agree(plain, 1, shape, noise, device, dtype)
    agree(guided, 1, shape, noise, device, dtype)
    agree(full, 1, shape, noise, device, dtype)
    if noise != "none" and len(shape) > 1:
        both = arrange(normal((shape[0], 2 * shape[1], *shape[2:]), 2, m_dtype, device))
        bound = torch.rand(shape[0], dtype=torch.float64, device=device) + 0.5
        learned = lambda t, **given: (  # noqa: E731
            fastgen.ddpm_step(x, both, t, schedule, variance="learned_range", threshold=bound, **given),
        )
        agree(learned, 1, shape, noise, device, dtype)


@pytest.mark.parametrize("way", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_noising_takes_every_way(device, schedule, dtype, way):
    shape, arrange = SHAPES[way]
    x0, x_t = arrange(normal(shape, 0, dtype, device)), arrange(normal(shape, 1, dtype, device))
    for noise in ("noise", "seed"):
        agree(lambda t, **given: (fastgen.q_sample(x0, t, schedule, **given),), 0, shape, noise, device, dtype)
    agree(lambda t: fastgen.q_posterior(x0, x_t, t, schedule), 0, shape, "none", device, dtype)
    x0.requires_grad_()
    gradient = arrange(normal(shape, 2, dtype, device))
    (back,) = torch.autograd.grad(fastgen.q_sample(x0, 17, schedule, seed=1), x0, gradient)  # q_sample without noise
    near(back, (gradient.double() * schedule.alphas_cumprod[17] ** 0.5).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_vectors_of_a_thread(device, schedule, dtype):
    """Large enough that a thread takes two vectors, or four, with a rest that makes no whole one. The CPU's own kernels know
    nothing of the kind."""
    if smaller := int(os.environ.get("FASTGEN_SMALLER", 0)):  # of tests/device_tests.py
        counts = 4_200_003 // smaller // 4 * 4 + 3, 16_800_001 // smaller // 4 * 4 + 1
    else:
        counts = (4_200_003, 16_800_001) if device.type == "cuda" else (1_100_003,)
    for count in counts:
        x, m = normal((1, count), 0, dtype, device), normal((1, count), 1, dtype, device)
        y = fastgen.ddpm_step(x, m, 9, schedule, seed=3)
        z = fastgen.randn((1, count), seed=3, offset=9, device=device)
        with fastgen.use_backend("eager"):
            expected = fastgen.ddpm_step(x, m, 9, schedule, noise=z)
        near(y, expected)
        target = m.sigmoid()
        ours = fastgen.bce_with_logits(x, target, reduction="none")
        with fastgen.use_backend("eager"):
            near(ours, fastgen.bce_with_logits(x, target, reduction="none"))
            total = fastgen.bce_with_logits(x.double(), target.double())
        assert_close(fastgen.bce_with_logits(x.float(), target.float()), total)
