"""The generator itself: known answers, and the seeds and offsets that are accepted."""

import math

import numpy as np
import pytest
import reference
import torch

import fastgen
from fastgen._core import rng

# philox4x32 with 10 rounds in kat_vectors of random123: counter, key, words
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert tuple(int(word) for word in reference.philox4x32(counter, key)) == expected
    as_tensors = [[torch.tensor(word) for word in part] for part in (counter, key)]
    assert tuple(int(word) for word in rng.philox4x32(*as_tensors)) == expected


def test_philox_agrees_with_numpy():
    counter_and_key = np.random.default_rng(0).integers(0, 2**32, (6, 5000))
    expected = reference.philox4x32(counter_and_key[:4], counter_and_key[4:])
    actual = rng.philox4x32(torch.tensor(counter_and_key[:4]), torch.tensor(counter_and_key[4:]))
    np.testing.assert_array_equal(torch.stack(actual).numpy(), np.stack(expected))


def test_box_muller_formula():
    """The two normals of a hand-computed pair of words: a quarter turn, u = 3/8."""
    z0, z1 = rng._box_muller(torch.tensor(3 * 2**29), torch.tensor(2**30))
    radius = math.sqrt(-2 * math.log(3 / 8 + 2**-33))
    assert abs(z0.item()) < 1e-15 and z1.item() == pytest.approx(radius, rel=1e-14)


@pytest.mark.parametrize(
    "seed, expected",
    [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1), (-1, -1), (-(2**63), -(2**63)), (np.int64(7), 7)],
)
def test_int_seeds_are_64_bit_twos_complement(seed, expected):
    assert rng.check_seed(seed, 3, torch.device("cpu")) == (None, expected)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_seeds_past_64_bits_are_refused(seed):
    with pytest.raises(ValueError, match="^seed: "):
        rng.check_seed(seed, 3, torch.device("cpu"))


@pytest.mark.parametrize("offset", [0, 1, 2**32, 2**63 - 1])
def test_offsets(offset):
    assert rng.check_offset(offset) == offset


@pytest.mark.parametrize("offset, error", [(-1, ValueError), (2**63, ValueError), (0.0, TypeError), (True, TypeError)])
def test_bad_offsets_are_refused(offset, error):
    with pytest.raises(error, match="^offset: "):
        rng.check_offset(offset)


def test_drawn_seeds_are_63_bit_and_governed_by_manual_seed():
    torch.manual_seed(5)
    seeds = [rng.draw_seed(torch.device("cpu"))[1] for _ in range(200)]
    torch.manual_seed(5)
    assert seeds == [rng.draw_seed(torch.device("cpu"))[1] for _ in range(200)]
    assert len(set(seeds)) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # the high bits are used


def test_no_seed_is_drawn_during_cuda_graph_capture(monkeypatch):
    """It would be frozen into the graph."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="^seed: expected an int64 tensor .*pass seed=tensor"):
        rng.draw_seed(torch.device("cuda"))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_device_does_not_draw_the_seed(schedule):
    x = torch.zeros(2, 3)
    torch.manual_seed(3)
    expected = fastgen.q_sample(x, 5, schedule)
    torch.manual_seed(3)
    with torch.device("meta"):
        assert torch.equal(fastgen.q_sample(x, 5, schedule), expected)
