"""q_sample and q_step: values, noise sources, shapes, layouts, out=, gradients."""

import itertools

import numpy as np
import pytest
import reference
import torch
from conftest import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    TIMESTEPS,
    array,
    assert_close,
    assert_derivatives,
    assert_same,
    channels_last,
    normal,
    on,
    unaligned,
)

import fastgen

OPS = {"q_sample": (fastgen.q_sample, reference.q_sample), "q_step": (fastgen.q_step, reference.q_step)}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param][0]


@pytest.fixture
def expected_op(op):
    return {f: e for f, e in OPS.values()}[op]


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", TIMESTEPS.values(), ids=TIMESTEPS)
def test_values(device, schedule, op, expected_op, t, dtype):
    x, noise = normal((3, 4, 5, 6), 0, dtype, device), normal((3, 4, 5, 6), 1, dtype, device)
    y = op(x, on(device, t), schedule, noise=noise)
    assert y.dtype == dtype and y.shape == x.shape and y.device == x.device and not y.requires_grad
    assert_close(y, expected_op(array(x), schedule.betas, t, array(noise)), scale=5)


@pytest.mark.pairs
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("noise_dtype", DTYPES)
def test_noise_of_another_dtype(device, schedule, op, expected_op, x_dtype, noise_dtype):
    """The result has the dtype of the data; no precision of the noise is lost before the one rounding."""
    x, noise = normal((3, 50), 0, x_dtype, device), normal((3, 50), 1, noise_dtype, device)
    y = op(x, 9, schedule, noise=noise)
    assert y.dtype == x_dtype
    assert_close(y, expected_op(array(x), schedule.betas, 9, array(noise)), scale=5)


def test_forward_steps_compose_to_the_marginal(device, schedule):
    """q_step after q_step without noise shrinks x0 as q_sample does, and leaves x0 alone itself."""
    x0 = normal((2, 9), 0, torch.float64, device)
    x = x0
    for t in range(len(schedule)):
        x = fastgen.q_step(x, t, schedule, noise=torch.zeros_like(x))
        assert_close(x, fastgen.q_sample(x0, t, schedule, noise=torch.zeros_like(x)))
    assert_same(x0, normal((2, 9), 0, torch.float64, device))


def test_respaced_schedule(device, schedule):
    """t counts the kept steps, and the marginal at a kept step is the original's."""
    x0 = normal((2, 9), 0, torch.float64, device)
    respaced = schedule.respace([3, 20, 39])
    for t, original in enumerate([3, 20, 39]):
        assert_close(fastgen.q_sample(x0, t, respaced, seed=1), fastgen.q_sample(x0, original, schedule, seed=1))


@pytest.mark.parametrize("t", [7, [7, 3]])
def test_nan_and_inf_flow_through(device, schedule, op, expected_op, t):
    x, noise = normal((2, 133), 0, device=device), normal((2, 133), 1, device=device)
    x[0, [0, 130]], x[1, 5], noise[1, [5, 6]], noise[0, 7] = torch.nan, torch.inf, -torch.inf, torch.nan
    y = op(x, on(device, t), schedule, noise=noise)
    with np.errstate(invalid="ignore"):
        assert_close(y, expected_op(array(x), schedule.betas, t, array(noise)), scale=5)
    assert y.isnan().sum() == 4 and y.isinf().sum() == 1


# ---- where noise comes from -----------------------------------------------------------------------------------------


SEEDS = [
    (3, 0),
    (-(2**63), 2**32 + 1),
    (2**64 - 1, 2**63 - 1),
    (torch.tensor([-8]), 5),
    (torch.tensor(7), 0),
    (torch.tensor([5, -5, 2**62]), 2**32 + 1),
]


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [17, [0, 39, 17]])
@pytest.mark.parametrize("seed, offset", SEEDS)
def test_seed(device, schedule, op, expected_op, dtype, t, seed, offset):
    x = normal((3, 5, 31), 0, dtype, device)
    if isinstance(seed, torch.Tensor):
        seed = seed.to(device)
    y = op(x, on(device, t), schedule, seed=seed, offset=offset)
    # what the seed denotes, given as noise, in the precision of the arithmetic
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    noise = fastgen.randn(x.shape, seed=seed, offset=offset, dtype=precision, device=device)
    expected = expected_op(array(x), schedule.betas, t, array(noise))
    assert_close(y, expected, scale=5)
    assert_same(y, op(x, on(device, t), schedule, seed=seed, offset=offset))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_generator_gives_the_numbers_of_torch_randn(device, schedule, op, dtype):
    x = normal((3, 5, 31), 0, dtype, device)
    noise = torch.randn(x.shape, generator=torch.Generator(device).manual_seed(11), dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(11)
    assert_same(op(x, 9, schedule, generator=generator), op(x, 9, schedule, noise=noise))
    assert not torch.equal(op(x, 9, schedule, generator=generator), op(x, 9, schedule, noise=noise))


def test_manual_seed_governs_noise_that_nobody_chose(device, schedule, op):
    x = normal((3, 50), 0, device=device)
    torch.manual_seed(1)
    first, second = op(x, 9, schedule), op(x, 9, schedule)
    torch.manual_seed(1)
    assert_same(op(x, 9, schedule), first)
    assert not torch.equal(first, second)
    torch.manual_seed(2)
    assert not torch.equal(op(x, 9, schedule), first)
    residual = array(first) - array(op(x, 9, schedule, noise=torch.zeros_like(x)))
    assert residual.std() > 0.1


def test_sample_is_independent_of_the_batch(device, schedule, op):
    seeds, t = torch.tensor([4, -4, 2**62 + 1], device=device), torch.tensor([5, 30, 0], device=device)
    for x in (normal((3, 3, 9, 11), 0, device=device), channels_last(normal((3, 3, 9, 11), 0, device=device))):
        whole = op(x, t, schedule, seed=seeds, offset=6)
        for i in range(3):
            alone = op(x[i : i + 1], t[i : i + 1], schedule, seed=seeds[i : i + 1], offset=6)
            assert_same(whole[i], alone[0])
            assert_same(alone, op(x[i : i + 1], int(t[i]), schedule, seed=int(seeds[i]), offset=6))


# ---- shapes, layouts, out= ------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_sample", [False, True], ids=["int_t", "tensor_t"])
def test_shapes(device, schedule, op, expected_op, shape, per_sample):
    x, noise = normal(shape, 0, device=device), normal(shape, 1, device=device)
    t = (torch.arange(shape[0], device=device) * 7) % 40 if per_sample else 17
    timesteps = t.cpu().numpy() if per_sample else t
    y = op(x, t, schedule, noise=noise)
    assert y.shape == shape
    assert_close(y, expected_op(array(x), schedule.betas, timesteps, array(noise)), scale=5)
    seeded = op(x, t, schedule, seed=2)
    assert_close(seeded, array(op(x, t, schedule, noise=fastgen.randn(shape, seed=2, device=device))), scale=5)


LAYOUT_CASES = [((3, 4, 5, 6), *layouts) for layouts in itertools.product(LAYOUTS, LAYOUTS)] + [
    (shape, *layouts)
    for shape in [(2, 3, 4, 5, 3), (3, 65, 3), (2, 300, 1, 3), (2, 1, 5, 7)]
    for layouts in [("channels_last", "channels_last"), ("contiguous", "channels_last"), ("channels_last", "sliced")]
]


def test_a_million_elements(device, schedule):
    """Many tiles, many threads and a tail."""
    shape = (1, 2**20 + 3)
    x, noise = normal(shape, 0, device=device), fastgen.randn(shape, seed=2, device=device)
    y = fastgen.q_sample(x, 17, schedule, noise=noise)
    assert_close(y, reference.q_sample(array(x), schedule.betas, 17, array(noise)), scale=5)
    assert_close(fastgen.q_sample(x, 17, schedule, seed=2), y, scale=5)


@pytest.mark.pairs
@pytest.mark.parametrize("shape, layout, noise_layout", LAYOUT_CASES)
def test_layouts(device, schedule, op, shape, layout, noise_layout):
    """Any strides give the values of the contiguous tensors; contiguous and channels-last are kept."""
    x, noise = normal(shape, 0, device=device), normal(shape, 1, device=device)
    x_like, noise_like = LAYOUTS[layout](x), LAYOUTS[noise_layout](noise)
    for t in (9, torch.arange(shape[0], device=device)):
        for how, same in (({"noise": noise}, {"noise": noise_like}), ({"seed": 4}, {"seed": 4})):
            y = op(x_like, t, schedule, **same)
            assert_same(y, op(x, t, schedule, **how))
            if layout == "channels_last":
                assert y.movedim(1, -1).is_contiguous()
            elif layout in ("contiguous", "unaligned"):
                assert y.is_contiguous()
    assert_same(x_like, x)  # inputs are left alone


def test_expanded_inputs(device, schedule, op):
    x, noise = normal((3, 1, 4), 0, device=device), normal((1, 5, 4), 1, device=device)
    y = op(x.expand(3, 5, 4), 9, schedule, noise=noise.expand(3, 5, 4))
    assert_same(y, op(x.repeat(1, 5, 1), 9, schedule, noise=noise.repeat(3, 1, 1)))


def test_timesteps_and_seeds_with_strides(device, schedule, op):
    x = normal((3, 40), 0, device=device)
    expected = op(x, torch.tensor([5, 5, 5], device=device), schedule, seed=torch.tensor([1, 1, 1], device=device))
    expanded = torch.tensor([5], device=device).expand(3), torch.tensor([1], device=device).expand(3)
    sliced = torch.full((3, 2), 5, device=device)[:, 1], torch.full((3, 2), 1, device=device)[:, 1]
    for t, seed in (expanded, sliced):
        assert_same(op(x, t, schedule, seed=seed), expected)


@pytest.mark.pairs
@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_out(device, schedule, op, layout, out_layout, dtype):
    x, noise = LAYOUTS[layout](normal((3, 4, 5, 6), 0, dtype, device)), normal((3, 4, 5, 6), 1, dtype, device)
    for how in ({"noise": noise}, {"seed": 3}):
        out = LAYOUTS[out_layout](torch.full_like(noise, torch.nan))
        strides = out.stride()
        assert op(x, 9, schedule, out=out, **how) is out
        assert out.stride() == strides
        assert_same(out, op(x, 9, schedule, **how))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_may_be_an_input(device, schedule, op, layout):
    x, noise = normal((3, 4, 5, 6), 0, device=device), normal((3, 4, 5, 6), 1, device=device)
    for t in (9, torch.tensor([9, 0, 39], device=device)):
        for how in ({"noise": noise}, {"seed": 3}):
            in_place = LAYOUTS[layout](x)
            assert op(in_place, t, schedule, out=in_place, **how) is in_place
            assert_same(in_place, op(x, t, schedule, **how))
        expected, in_place = op(x, t, schedule, noise=noise), LAYOUTS[layout](noise)
        assert_same(op(x, t, schedule, noise=in_place, out=in_place), expected)


def test_out_writes_nothing_around_it(device, schedule, op):
    wide = torch.full((3, 200), 7.0, device=device)
    op(torch.zeros(3, 129, device=device), 9, schedule, seed=1, out=wide[:, 33:162])
    assert torch.all(wide[:, :33] == 7) and torch.all(wide[:, 162:] == 7) and not torch.any(wide[:, 33:162] == 7)
    line = torch.full((131,), 7.0, device=device)
    op(torch.zeros(1, 129, device=device), 9, schedule, seed=1, out=line[1:130].view(1, 129))
    assert line[0] == 7 and line[130] == 7 and not torch.any(line[1:130] == 7)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [9, [39, 0]])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(device, schedule, op, t, layout):
    shape = (2, 2, 3, 2)
    x = LAYOUTS[layout](normal(shape, 0, torch.float64, device)).requires_grad_()
    noise = normal(shape, 1, torch.float64, device).requires_grad_()
    t = on(device, t)
    for f, inputs in [
        (lambda x, noise: op(x, t, schedule, noise=noise), (x, noise)),
        (lambda noise: op(x.detach(), t, schedule, noise=noise), (noise,)),
        (lambda x: op(x, t, schedule, seed=3), (x,)),
    ]:
        assert_derivatives(device, f, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [9, [39, 0, 5]])
def test_gradients_are_the_coefficients(device, schedule, op, dtype, t):
    """The op is linear, so its gradients are it applied to the incoming gradient and to nothing else."""
    x = normal((3, 40), 0, dtype, device).requires_grad_()
    noise = normal((3, 40), 1, torch.float32, device).requires_grad_()
    gradient, zero = normal((3, 40), 2, dtype, device), np.zeros((3, 40))
    op(x, on(device, t), schedule, noise=noise).backward(gradient)
    expected_op = {f: e for f, e in OPS.values()}[op]
    assert x.grad.dtype == dtype and noise.grad.dtype == torch.float32
    assert_close(x.grad, expected_op(array(gradient), schedule.betas, t, zero))
    coarser = min(dtype, torch.float32, key=lambda dtype: torch.finfo(dtype).bits)
    assert_close(noise.grad.to(coarser), expected_op(zero, schedule.betas, t, array(gradient)))


def test_gradients_are_recorded_only_where_asked(device, schedule, op):
    x, noise = torch.ones(2, 3, device=device), torch.ones(2, 3, device=device)
    assert not op(x, 3, schedule, noise=noise).requires_grad
    assert op(x.clone().requires_grad_(), 3, schedule, seed=1).requires_grad
    assert op(x, 3, schedule, noise=noise.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        assert not op(x.clone().requires_grad_(), 3, schedule, seed=1).requires_grad
        out = torch.empty(2, 3, device=device)
        assert_same(op(x.clone().requires_grad_(), 3, schedule, seed=1, out=out), op(x, 3, schedule, seed=1))


def test_unaligned_and_empty_gradients(device, schedule, op):
    for x in (unaligned(normal((2, 5), 0, device=device)), torch.ones(0, 4, device=device)):
        x = x.requires_grad_()
        op(x, 3, schedule, seed=1).sum().backward()
        assert x.grad.shape == x.shape and torch.all(x.grad > 0)


def test_out_is_known_to_have_changed(device):
    """A backward that needs what `out` held before is refused, as for any in-place operation."""
    parameter, state = torch.ones(2, 3, device=device, requires_grad=True), torch.zeros(2, 3, device=device)
    loss = (parameter * state).sum()
    fastgen.q_sample(torch.ones(2, 3, device=device), 3, fastgen.Schedule.linear(10), seed=1, out=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
