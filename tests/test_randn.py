"""fastgen.randn is the random-number contract, on every backend; q_sample has the same noise in any memory layout."""

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, array, assert_same, channels_last, normal

import fastgen

SEEDS = [0, 1, -1, 12345, -(2**62) + 3, 2**63 - 1, 2**63, 2**64 - 2]
EVENTS = [(n,) for n in (0, 1, 2, 3, 4, 5, 7, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025)]
EVENTS += [(), (3, 32, 32), (5, 7, 3), (1, 1, 1), (3, 0, 2)]


def assert_contract(z, shape, seed, offset=0):
    """`z` is what the contract says of (shape, seed, offset), to the accuracy that its dtype is owed."""
    expected = reference.normals(shape, seed, offset)
    assert tuple(z.shape) == tuple(shape)
    difference = np.abs(array(z) - expected)
    if difference.size == 0:
        return
    if z.dtype == torch.float64:
        assert np.all(difference <= 1e-12)
    elif z.dtype == torch.float32:
        assert np.all(difference <= 1e-3) and np.mean(difference) < (1e-6 if difference.size > 20 else 1e-4)
    else:  # one rounding on top of float32's error
        assert np.all(difference <= 0.5 * torch.finfo(z.dtype).eps * np.abs(expected) + 1e-3)
        assert np.mean(difference) < torch.finfo(z.dtype).eps


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("event", EVENTS)
def test_event_sizes(device, event, dtype):
    for batch in (1, 3):
        z = fastgen.randn((batch, *event), seed=42, dtype=dtype, device=device)
        assert_contract(z, (batch, *event), 42)
        assert z.shape == (batch, *event) and z.dtype == dtype and z.device.type == device.type and z.is_contiguous()
    assert fastgen.randn((0, *event), seed=42, device=device).shape == (0, *event)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_seeds(device, seed, dtype):
    shape = (3, 517)
    assert_contract(fastgen.randn(shape, seed=seed, dtype=dtype, device=device), shape, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [1, 999, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1])
def test_offsets(device, offset, dtype):
    z = fastgen.randn((2, 130), seed=7, offset=offset, dtype=dtype, device=device)
    assert_contract(z, (2, 130), 7, offset)


def test_seed_tensor_of_one_element_is_the_int(device):
    expected = fastgen.randn((3, 50), seed=-9, device=device)
    for seed in (torch.tensor(-9), torch.tensor([-9])):
        assert_same(fastgen.randn((3, 50), seed=seed.to(device), device=device), expected)
        assert_same(fastgen.randn((3, 50), seed=seed, device=device), expected)  # read where it lies


@pytest.mark.parametrize("dtype", DTYPES)
def test_seeds_per_sample(device, dtype):
    seeds = [5, -6, 2**63 - 1, -(2**63), 5]
    shape = (5, 3, 43)
    z = fastgen.randn(shape, seed=torch.tensor(seeds, device=device), offset=2**33 + 5, dtype=dtype, device=device)
    assert_contract(z, shape, seeds, 2**33 + 5)
    assert_same(z[0], z[4])


def test_strided_seed_tensor(device):
    seeds = torch.tensor([[1, 2], [3, 4], [5, 6]], device=device)[:, 1]
    assert_contract(fastgen.randn((3, 40), seed=seeds, device=device), (3, 40), [2, 4, 6])


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("event", [(), (1,), (5,), (128,), (3, 33, 31)])
def test_sample_is_independent_of_the_batch(device, event, dtype):
    seeds = torch.tensor([4, -4, 2**62 + 1], device=device)
    whole = fastgen.randn((3, *event), seed=seeds, offset=11, dtype=dtype, device=device)
    for i in range(3):
        alone = fastgen.randn((1, *event), seed=seeds[i : i + 1], offset=11, dtype=dtype, device=device)
        assert_same(whole[i], alone[0])


def test_first_samples_of_a_larger_batch(device):
    """With one seed, adding samples changes none of those before."""
    assert_same(fastgen.randn((9, 77), seed=3, device=device)[:4], fastgen.randn((4, 77), seed=3, device=device))


@pytest.mark.parametrize("event", [(), (1,), (3,)])
def test_many_tiny_samples(device, event):
    shape = (20_001, *event)
    assert_contract(fastgen.randn(shape, seed=8, device=device), shape, 8)
    seeds = torch.arange(20_001, device=device) * 2**40 - 2**50
    assert_contract(fastgen.randn(shape, seed=seeds, device=device), shape, seeds.tolist())


def test_random_words_bit_for_bit(device):
    """From float64 normals the 32-bit words can be solved for: the integers agree exactly."""
    shape, seed, offset = (4, 4096), 2**63 + 99, 2**32 + 4
    z = array(fastgen.randn(shape, seed=seed, offset=offset, dtype=torch.float64, device=device)).reshape(4, 1024, 2, 2)
    u = np.exp(-0.5 * (z**2).sum(-1))
    turn = np.arctan2(z[..., 1], z[..., 0]) / (2 * np.pi) % 1.0
    r = np.stack([np.rint(u * 2**32 - 0.5), np.rint(turn * 2**32) % 2**32], axis=-1).reshape(4, 1024, 4)
    np.testing.assert_array_equal(r, reference.words(shape, seed, offset))


def test_defaults(device):
    with torch.device(device):
        z = fastgen.randn([2, 3], seed=1)
    assert z.dtype == torch.get_default_dtype() and z.device.type == device.type
    assert_same(z, fastgen.randn(torch.Size((2, 3)), seed=1, offset=0, dtype=torch.float32, device=device))
    if device.type == "cpu":
        assert_same(z, fastgen.randn((2, 3), seed=1))


def test_global_generator_is_left_alone(device):
    state = torch.get_rng_state()
    fastgen.randn((2, 3), seed=1, device=device)
    assert torch.equal(torch.get_rng_state(), state)


# ---- distribution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_and_distribution(device, dtype):
    stats = pytest.importorskip("scipy.stats")
    z = array(fastgen.randn((8, 2**17), seed=2024, dtype=dtype, device=device)).ravel()
    n = z.size
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(np.mean(z**power) - moment) < 4 * np.sqrt(variance / n)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert 4.2 < np.abs(z).max() < 6.7  # the tails are there; u ≥ 2⁻³³ bounds them


def test_streams_are_independent(device):
    """No correlation, of the numbers or of their squares, between lanes, neighbours, samples, seeds or offsets."""
    n = 2**14
    draw = lambda **how: array(fastgen.randn((2, 4 * n), device=device, dtype=torch.float64, **how))  # noqa: E731
    base = draw(seed=77)
    others = [draw(seed=78)[0], draw(seed=77 + 2**32)[0], draw(seed=77, offset=1)[0], draw(seed=77, offset=2**32)[0]]
    lanes = base[0].reshape(n, 4).T
    pairs = [(lanes[i], lanes[j]) for i in range(4) for j in range(i)]
    pairs += [(base[0, :-4], base[0, 4:]), (base[0], base[1]), *[(base[0], other) for other in others]]
    for a, b in pairs:
        for f in (np.asarray, np.square, np.abs):
            assert abs(np.corrcoef(f(a), f(b))[0, 1]) < 4.5 / np.sqrt(a.size)


# ---- layouts --------------------------------------------------------------------------------------------------------

LAYOUT_SHAPES = [(2, c, 5, 7) for c in (1, 2, 3, 5, 64, 300)] + [(2, c, 3, 5, 3) for c in (1, 2, 3, 5, 64)]
LAYOUT_SHAPES += [(3, 3, 1, 1), (1, 4, 9, 8), (2, 6, 31), (2, 3, 0, 4), (0, 3, 4, 4)]


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", LAYOUT_SHAPES)
def test_noise_is_independent_of_the_layout(device, schedule, shape, dtype):
    x0 = normal(shape, 0, dtype, device)
    seeds = torch.arange(shape[0], device=device)
    for seed in (3, seeds):
        expected = fastgen.q_sample(x0, 20, schedule, seed=seed)
        actual = fastgen.q_sample(channels_last(x0), 20, schedule, seed=seed)
        assert_same(actual, expected)
        assert actual.movedim(1, -1).is_contiguous()
