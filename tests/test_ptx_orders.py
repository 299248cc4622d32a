"""The CUDA kernels on the PTX machine with an adversary: blocks and warps in other orders, stores that others see late, approximate
functions as far off as the PTX ISA allows, launches side by side, launches that run again. The bits stay the same, or near."""

import every_call
import ptx_machine
import pytest
import torch
from conftest import assert_close, assert_same

import fastgen

pytestmark = pytest.mark.skipif(not ptx_machine.LIBRARY, reason="needs the machine: python tests/device_on_ptx.py")
SHAPE = (2, 3, 64, 65)  # of several blocks for each sample, and a tail
SUMS = [name for name, call in every_call.CALLS.items() if ptx_machine.LIBRARY and every_call.facts(call).sums]
ORDERS = {
    "backward": {"order": 1, "resident": 64},
    "few at a time": {"order": 2, "seed": 1, "resident": 4},
    "many at a time": {"order": 2, "seed": 2, "resident": 200},
    "short turns": {"order": 0, "resident": 16, "turn": 7},
    "stores seen late": {"order": 2, "seed": 3, "resident": 16, "delayed": 1},
}


@pytest.fixture(autouse=True)
def kernels():
    with fastgen.use_backend("cpp"):
        yield


def called(name, dtype=torch.float32, shape=SHAPE):
    return every_call.results(every_call.CALLS[name](every_call.inputs("cpu", shape, dtype)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", every_call.CALLS)
def test_the_order_of_blocks_and_warps_changes_no_bit(name, order):
    delayed = "delayed" in ORDERS[order]
    if delayed and name not in SUMS:
        pytest.skip("its blocks have nothing to tell each other")
    shape = (2, 3, 20, 21) if delayed and "none" in name else SHAPE
    expected = called(name, shape=shape)
    with ptx_machine.settings(**ORDERS[order]):
        found = called(name, shape=shape)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("name", every_call.CALLS)
def test_approximate_functions_may_be_off(name):
    """By what the ISA allows: then a result in float32 is off by that, and of half precision at most by one rounding more."""
    expected, right, right_half = called(name, torch.float64), called(name), called(name, torch.bfloat16)
    if "torch-cuda" in name:  # of float64 these are other numbers
        expected = right
    with ptx_machine.settings(perturbed=1, seed=1):
        found, half = called(name), called(name, torch.bfloat16)
    for a, b in zip(found, expected, strict=True):
        if a.dtype.is_floating_point:
            assert_close(a, b, scale=20 * max(1.0, b.abs().max().item()))
    for a, b in zip(half, right_half, strict=True):
        if a.dtype == torch.bfloat16:
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5 * max(1.0, b.abs().max().item()))
    i = every_call.inputs("cpu", SHAPE)
    i.seed.add_(1), i.seeds.add_(1)
    other, sums = every_call.results(every_call.CALLS[name](i)), name in SUMS
    if not sums and any(not torch.equal(a, b) for a, b in zip(other, right, strict=True)):
        # its noise rests on such functions; in a sum what is off one way and the other meets
        assert any(not torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_the_last_block_waits_for_earlier_ones():
    """The sums' one assumption about the order of blocks: that of those which run at a time not all are last ones of an output."""
    x, y = torch.linspace(-3, 3, 50_000), torch.linspace(0, 1, 50_000)
    expected = fastgen.bce_with_logits(x, y)
    with ptx_machine.settings(order=1, resident=2):  # the last one starts first, and the others take turns beside it
        assert_same(fastgen.bce_with_logits(x, y), expected)
    with ptx_machine.settings(order=0, resident=1):
        assert_same(fastgen.bce_with_logits(x, y), expected)
    with ptx_machine.settings(order=1, resident=1), pytest.raises(RuntimeError, match="a hang, thread .*sum_kernel"):
        fastgen.bce_with_logits(x, y)


def test_the_error_of_a_launch_stays_until_it_is_asked_for():
    """Of 33 tensors an op makes two launches, and asks once; the second one's goes well."""
    many = [torch.linspace(-3, 3, 3000)] * 32 + [torch.ones(1)]
    with ptx_machine.settings(order=1, resident=1), pytest.raises(RuntimeError, match="a hang, thread .*sum_kernel"):
        fastgen.generator_loss(many)


@pytest.mark.parametrize("seed", range(3))
def test_launches_side_by_side(seed):
    """On two streams, whose blocks come in any order; on each stream one launch after the other, of which the second needs what the
    first has written."""
    schedule = fastgen.Schedule.linear(40)
    data = [torch.randn(3, 7000, generator=torch.Generator().manual_seed(k)) for k in range(4)]

    def work(x):
        noised = fastgen.q_sample(x, 5, schedule, seed=3)
        return fastgen.bce_with_logits(noised, x.sigmoid()), fastgen.diffusion_loss(
            noised, x, 5, schedule, seed=3, reduction="none"
        )

    expected = [work(x) for x in data]
    with ptx_machine.settings(order=2, seed=seed, resident=12, delayed=1), ptx_machine.launches_wait():
        found = []
        for k, x in enumerate(data):
            ptx_machine.stream(k % 2)
            found.append(work(x))
        ptx_machine.run_waiting()
    for a, b in zip(found, expected, strict=True):
        assert_same(a[0], b[0])
        assert_same(a[1], b[1])


@pytest.mark.parametrize("name", SUMS)
def test_launches_run_again(name):
    """As the replay of a graph: the same scratch memory and the same number of a launch, with other data."""
    call = every_call.CALLS[name]
    i, other = (every_call.inputs("cpu", SHAPE, salt=salt) for salt in (0, 1))
    if not every_call.fits(name, i):
        pytest.skip("not of this shape")
    other.seed.copy_(i.seed)  # which the host reads
    expected = every_call.results(call(other))
    with ptx_machine.settings(order=2, seed=5, resident=16), ptx_machine.launches_wait():
        made = every_call.results(call(i))
        ptx_machine.run_waiting(times=2)
        i.copy_(other)
        ptx_machine.run_waiting()
        made = [y.clone() for y in made]
    for a, b in zip(made, expected, strict=True):
        assert_same(a, b)
