"""Images as bytes: to_uint8, and uint8 x0 of the ops that take data."""

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
    assert_same,
    channels_last,
    normal,
    on,
    unaligned,
)

import fastgen
from fastgen._core import dispatch

BYTES = torch.arange(256, dtype=torch.uint8)
VALUES = (2 * np.arange(256.0) - 255) / 255  # float64, rounded once


def computed(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def images(shape, seed=0, device="cpu"):
    """Bytes that are all there as often."""
    count = int(np.prod(shape))
    return BYTES[torch.arange(count) * 37 + seed & 255].view(shape).to(device)


def numbers(x, dtype=torch.float64):
    """What the bytes stand for, rounded once to the type of the arithmetic on `dtype`."""
    return torch.tensor(VALUES)[x.cpu().long()].to(x.device, computed(dtype))


# ---- to_uint8 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_and_back(device, dtype):
    """All 256, through any floating dtype."""
    assert_same(fastgen.to_uint8(torch.tensor(VALUES).to(device, dtype)), BYTES.to(device))


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (), (4097,), (2, 3, 61, 67)])
def test_values(device, dtype, shape):
    """Beside the formula in float64, where that is not as good as in the middle of two bytes."""
    x = normal(shape, 0, dtype, device)
    y = fastgen.to_uint8(x)
    assert y.dtype == torch.uint8 and y.shape == x.shape and y.device == x.device and y.is_contiguous()
    exact = reference.to_uint8(array(x))
    between = np.abs(exact % 1 - 0.5) < 2e-5
    np.testing.assert_array_equal(array(y)[~between], np.rint(exact)[~between])
    assert np.all(np.abs(array(y) - exact) < 0.5001)


def test_ties_go_to_the_even_byte(device):
    """Of the values in the middle of two bytes some are numbers of float32: (x + 1)·127.5 = 127.5 at 0, and all in float64."""
    assert fastgen.to_uint8(torch.zeros(5, device=device)).tolist() == [128] * 5
    middle = torch.tensor([k / 127.5 - 1 for k in (0.5, 1.5, 2.5, 63.75, 127.5, 191.25, 253.5, 254.5)], dtype=torch.float64)
    exact = reference.to_uint8(array(middle))
    assert_same(fastgen.to_uint8(middle.to(device)).cpu(), torch.tensor(np.rint(exact)).to(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_within_the_range(device, dtype):
    x = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 1.5, -1.5, 1e4, -1e4, 1.0, -1.0, -0.0], dtype=dtype)
    assert fastgen.to_uint8(x.to(device)).tolist() == [0, 0, 255, 0, 255, 0, 255, 0, 255, 0, 128]


LAYOUT_SHAPES = [
    (3, 4, 5, 6),
    (2, 3, 33, 35),
    (2, 1, 5, 7),
    (2, 70, 9, 11),
    (2, 3, 4, 5, 3),
    (3, 65, 3),
    (0, 3, 4, 4),
    (2, 0, 3, 3),
]


@pytest.mark.pairs
@pytest.mark.parametrize("shape", LAYOUT_SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", [None, False, True], ids=["same", "contiguous", "channels_last"])
def test_layouts(device, shape, layout, dtype, to):
    """Any strides give the bytes of the contiguous tensor, in the layout that is asked for."""
    x = normal(shape, 0, dtype, device)
    expected, laid_out = fastgen.to_uint8(x), LAYOUTS[layout](x)
    y = fastgen.to_uint8(laid_out, channels_last=to)
    assert_same(y, expected)
    assert (y.movedim(1, -1) if to or (to is None and layout == "channels_last") else y).is_contiguous()
    assert_same(laid_out, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3, 300, 301), (1, 4, 129, 257), (2, 130, 65, 67)])
def test_many_tiles_are_transposed(device, dtype, shape):
    x = normal(shape, 0, dtype, device)
    expected = fastgen.to_uint8(x)
    assert_same(fastgen.to_uint8(x, channels_last=True), expected)
    assert_same(fastgen.to_uint8(channels_last(x), channels_last=False), expected)


@pytest.mark.pairs
@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_out(device, layout, out_layout, dtype):
    x = LAYOUTS[layout](normal((3, 4, 5, 6), 0, dtype, device))
    out = LAYOUTS[out_layout](torch.full(x.shape, 7, dtype=torch.uint8, device=device))
    strides = out.stride()
    assert fastgen.to_uint8(x, out=out) is out and out.stride() == strides
    assert_same(out, fastgen.to_uint8(x))


def test_out_writes_nothing_around_it(device):
    for begin in range(5):
        line = torch.full((140,), 7, dtype=torch.uint8, device=device)
        fastgen.to_uint8(torch.ones(1, 129, device=device), out=line[begin : begin + 129].view(1, 129))
        assert torch.all(line[:begin] == 7) and torch.all(line[begin + 129 :] == 7) and torch.all(line[begin : begin + 129] == 255)


def test_out_in_the_memory_of_x_is_refused(device):
    x = torch.zeros(3, 8, device=device)
    with pytest.raises(ValueError, match="^out: expected memory apart from x"):
        fastgen.to_uint8(x.view(-1)[:6], out=x.view(torch.uint8).view(-1)[:6])


def test_no_gradient_flows(device):
    x = normal((3, 4), 0, device=device).requires_grad_()
    y = fastgen.to_uint8(x)
    assert not y.requires_grad and y.grad_fn is None
    assert_same(fastgen.to_uint8(x, out=torch.zeros_like(y)), y)


def test_transforms(device):
    """Mapped by vmap; a function that is differentiated may make bytes on the side."""
    x = normal((3, 4, 5), 0, device=device)
    assert_same(torch.vmap(fastgen.to_uint8)(x), fastgen.to_uint8(x))
    assert_same(
        torch.vmap(lambda x: fastgen.to_uint8(x[None], channels_last=True))(x.unsqueeze(1)), fastgen.to_uint8(x[:, None, None])
    )
    gradient, side = torch.func.grad(lambda x: ((x * x).sum(), fastgen.to_uint8(x)), has_aux=True)(x)
    assert_close(gradient, 2 * x)
    assert_same(side, fastgen.to_uint8(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(device, dynamic):
    torch._dynamo.reset()
    fast = torch.compile(
        lambda x: fastgen.to_uint8(2 * x, channels_last=True), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for size in (4, 7, 9):
        x = normal((2, 3, size, 5), 0, device=device)
        y = fast(x)
        assert_same(y, fastgen.to_uint8(2 * x))
        assert y.movedim(1, -1).is_contiguous()
    torch._dynamo.reset()


# ---- bytes for data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 64, 67, 256])
def test_what_a_byte_stands_for(device, schedule, dtype, columns):
    """Of all 256, to the last bit: a network that predicts x0 as that has no error at all, however the kernel reads the bytes."""
    x = images((257, columns), device=device)
    m = numbers(x, dtype)
    losses = fastgen.diffusion_loss(m, x, 5, schedule, prediction="sample", loss="l1", reduction="none")
    assert losses.dtype == dtype and not losses.any()
    assert fastgen.diffusion_loss(-m, x, 5, schedule, prediction="sample", loss="l1", reduction="none").all()


def test_the_formula_in_plain_torch():
    for dtype in (torch.float32, torch.float64):
        assert_same(dispatch.real_of(BYTES, dtype), torch.tensor(VALUES).to(dtype))


Q_SAMPLE_SHAPES = [*SHAPES, (2, 3, 8, 8), (3, 16, 12), (2, 24, 4, 6), (2, 5, 1031)]


@pytest.mark.pairs
@pytest.mark.parametrize("shape", Q_SAMPLE_SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned", "transposed", "sliced"])
def test_q_sample(device, schedule, shape, dtype, layout):
    """The noise and the numbers of what the bytes stand for; `dtype`: of the noise that is given, None: of the one that is made."""
    x = images(shape, device=device)
    arranged = LAYOUTS[layout](x) if x.dim() > 2 or layout in ("contiguous", "unaligned") else x
    t = (torch.arange(shape[0], device=device) * 7) % 40
    how = {"seed": 5, "offset": 2} if dtype is None else {"noise": normal(shape, 1, dtype, device)}
    for timestep in (t, 11):
        y = fastgen.q_sample(arranged, timestep, schedule, **how)
        expected = fastgen.q_sample(numbers(x, dtype or torch.float32), timestep, schedule, **how)
        assert_same(y, expected.to(dtype or torch.float32))
        if layout == "channels_last" and x.dim() > 2:
            assert y.movedim(1, -1).is_contiguous()


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise_dtype", [torch.bfloat16, torch.float32, torch.float64, None], ids=str)
def test_out_of_q_sample_says_the_dtype(device, schedule, dtype, noise_dtype):
    x = images((3, 4, 5, 6), device=device)
    how = {"seed": 5} if noise_dtype is None else {"noise": normal(x.shape, 1, noise_dtype, device)}
    for arrange in (torch.clone, channels_last, unaligned):
        out = arrange(torch.full(x.shape, torch.nan, dtype=dtype, device=device))
        assert fastgen.q_sample(x, 9, schedule, out=out, **how) is out
        noise = how.get("noise", fastgen.randn(x.shape, seed=5, dtype=computed(dtype), device=device))
        assert_close(out, reference.q_sample(array(numbers(x)), schedule.betas, 9, array(noise)), scale=5)


def test_dtype_of_q_sample(device, schedule):
    x = images((2, 5), device=device)
    generator = lambda: torch.Generator(device).manual_seed(3)  # noqa: E731
    drawn = torch.randn(x.shape, generator=generator(), device=device)
    assert_same(fastgen.q_sample(x, 9, schedule, generator=generator()), fastgen.q_sample(x, 9, schedule, noise=drawn))
    assert fastgen.q_sample(x, 9, schedule).dtype == torch.float32
    try:
        for default, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
            torch.set_default_dtype(default)
            assert fastgen.q_sample(x, 9, schedule, seed=1).dtype == expected
    finally:
        torch.set_default_dtype(torch.float32)
    assert fastgen.q_sample(x, 9, schedule, seed=1).dtype == torch.float32


def test_gradient_to_noise(device, schedule):
    x, noise = images((2, 5), device=device), normal((2, 5), 1, torch.bfloat16, device).requires_grad_()
    upstream = normal((2, 5), 2, torch.bfloat16, device)
    t = torch.tensor([3, 9], device=device)
    (of_bytes,) = torch.autograd.grad(fastgen.q_sample(x, t, schedule, noise=noise), noise, upstream)
    (of_numbers,) = torch.autograd.grad(fastgen.q_sample(numbers(x).bfloat16(), t, schedule, noise=noise), noise, upstream)
    assert_same(of_bytes, of_numbers)


LOSSES = {
    "epsilon": (fastgen.diffusion_loss, {"seed": 5}),
    "sample": (fastgen.diffusion_loss, {"prediction": "sample", "loss": "huber"}),
    "v": (fastgen.diffusion_loss, {"prediction": "v_prediction", "seed": 5, "reduction": "none"}),
    "v sum": (fastgen.diffusion_loss, {"prediction": "v_prediction", "noise": "given", "reduction": "sum"}),
    "hybrid": (fastgen.diffusion_loss, {"variance": "learned_range", "seed": 5, "reduction": "none"}),
    "vlb": (fastgen.vlb_terms, {"seed": 5}),
    "vlb noise": (fastgen.vlb_terms, {"noise": "given", "prediction": "sample", "clip": 1.0}),
    "vlb x_t": (fastgen.vlb_terms, {"x_t": "given", "variance": "learned"}),
}


@pytest.mark.pairs
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, layout", [
    ((3, 4, 5, 6), "contiguous"),
    ((3, 8, 4, 8), "contiguous"),
    ((3, 8, 4, 8), "channels_last"),
    ((3, 4, 5, 6), "channels_last"),
    ((3, 4, 5, 6), "sliced"),
    ((3, 2, 3), "contiguous"),
    ((3, 1, 1031), "unaligned"),
])  # fmt: skip
def test_losses(device, schedule, name, dtype, shape, layout):
    """Values and gradients of the numbers that the bytes stand for, in the dtype that the network's output asks for alone."""
    loss, options = LOSSES[name]
    x = images(shape, device=device)
    given = normal(shape, 2, dtype, device)
    options = {k: given if v == "given" else v for k, v in options.items()}
    channels = 2 * shape[1] if "variance" in options else shape[1]
    m = LAYOUTS[layout](normal((shape[0], channels, *shape[2:]), 1, dtype, device)).requires_grad_()
    found = []
    for data in (LAYOUTS[layout](x), LAYOUTS[layout](numbers(x, dtype))):
        for t in (torch.tensor([0, 39, 17], device=device), 5):
            value = loss(m, data, t, schedule, **options)
            assert value.dtype == computed(dtype)
            found += [value.detach(), *torch.autograd.grad(value.sum(), m)]
    half = len(found) // 2
    for a, b in zip(found[:half], found[half:], strict=True):
        if device.type == "cuda" and a.dim() < 2:  # other kernels, which add up in another order
            assert_close(a, b, scale=max(1.0, float(b.abs().max())) * 10)
        elif a.dim() < 2:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert_same(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["seed", "noise"])
def test_every_kernel_of_bytes(device, schedule, layout, dtype, source):
    """The types, layouts and sources of noise that one of its own is compiled for: of x_t, and of the loss and its gradient."""
    x, arrange, t = images((2, 16, 4, 8), device=device), LAYOUTS[layout], torch.tensor([39, 5], device=device)
    how = {source: 5 if source == "seed" else arrange(normal(x.shape, 2, dtype, device))}
    out = fastgen.q_sample(arrange(x), t, schedule, out=arrange(torch.empty(x.shape, dtype=dtype, device=device)), **how)
    assert_same(out, fastgen.q_sample(numbers(x, torch.float32), t, schedule, **how).to(dtype))
    m, found = arrange(normal(x.shape, 1, dtype, device)).requires_grad_(), []
    for data in (arrange(x), arrange(numbers(x, dtype))):
        loss = fastgen.diffusion_loss(m, data, t, schedule, prediction="v_prediction", reduction="none", **how)
        found.append((loss.detach(), torch.autograd.grad(loss, m, torch.ones_like(loss))[0]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (5,), (3, 2, 3), (2, 3, 33, 35)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_prior_kl(device, schedule, shape, layout):
    x = images(shape, device=device)
    arranged = channels_last(x) if layout == "channels_last" and x.dim() > 2 else x
    for unit in ("nats", "bits_per_dim"):
        terms = fastgen.prior_kl(arranged, schedule, unit=unit)
        assert terms.dtype == torch.float32
        assert_close(terms, fastgen.prior_kl(numbers(x), schedule, unit=unit))


@pytest.mark.parametrize("variance", ["posterior", "learned_range"])
def test_variational_bound(device, schedule, variance):
    """The same as of the numbers, and the network is given floating ones."""
    seen = []

    def model(x, t):
        seen.append(x.dtype)
        return torch.cat([x, x.cos()], 1) if variance == "learned_range" else 0.5 * x

    x = images((3, 2, 4, 4), device=device)
    options = {"seed": torch.tensor([1, 2, 3], device=device), "timesteps": [0, 5, 39], "variance": variance}
    of_bytes = fastgen.variational_bound(model, x, schedule, **options)
    of_numbers = fastgen.variational_bound(model, numbers(x, torch.float32), schedule, **options)
    for a, b in zip(of_bytes, of_numbers, strict=True):
        assert_close(a, b, scale=max(1.0, float(b.abs().max())))
    assert set(seen) == {torch.float32}


def test_the_bins_are_those_of_the_bytes(device):
    """The decoder's 256 probabilities add up to 1 where its bins lie side by side, one around what each byte stands for."""
    schedule = fastgen.Schedule.linear(40, 1e-3, 0.2)
    x = BYTES.to(device)[:, None]
    x_t = torch.full((256, 1), 0.3, dtype=torch.float64, device=device)
    m = torch.full((256, 1), 0.1, dtype=torch.float64, device=device)
    terms = fastgen.vlb_terms(m, x, 0, schedule, x_t=x_t)
    assert float(torch.exp(-terms).sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", ["v", "vlb"])
def test_bytes_have_no_gradient(device, schedule, name):
    """Second derivatives, forward-mode AD and torch.func of the network's output work as of numbers."""
    loss, options = LOSSES[name]
    x, m = images((2, 3), device=device), normal((2, 3), 1, torch.float64, device)
    f = lambda data: lambda m: loss(m, data, 5, schedule, **options).sum()  # noqa: E731
    assert_close(torch.func.grad(f(x))(m), torch.func.grad(f(numbers(x)))(m))
    assert_close(torch.func.hessian(f(x))(m), torch.func.hessian(f(numbers(x)))(m))
    mapped = torch.vmap(lambda m, x: loss(m, x, 5, schedule, **{**options, "seed": 5}).sum())
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss(m.requires_grad_(), x, 5, schedule, **options).sum(), x)
    assert mapped(m.detach()[:, None], x[:, None]).shape == (2,)


def test_the_ops_refuse_to_differentiate_bytes(device):
    """Below the public functions."""
    if fastgen.backend(device) != "cpp":
        pytest.skip("is about the compiled ops")
    schedule = fastgen.Schedule.linear(10)
    x, m = images((2, 3), device=device), normal((2, 3), 1, device=device)
    rows = schedule.diffusion_loss_table("sample", None, device, torch.float32).rows
    one = torch.ones((), device=device)
    with pytest.raises(RuntimeError, match="x0: expected no bytes"):
        torch.ops.fastgen.diffusion_loss_backward_x0(one, m, x, rows, None, 3, None, None, None, 0, None, 1, 0, 1.0, 1)
    rows = schedule.vlb_terms_table("sample", "beta", device, torch.float32).rows
    with pytest.raises(RuntimeError, match="model_output: expected no bytes"):
        others = None, None, None, 5, 0, None, False, 0, 1.0, True, -1, 1.0, None, 1.0, False
        torch.ops.fastgen.vlb_terms_backward(torch.ones(2, device=device), x, x, rows, None, 3, *others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_million_bytes(device, schedule, dtype):
    """Many tiles, many threads and a tail."""
    x = images((1, 2**20 + 3), device=device)
    out = torch.empty(x.shape, dtype=dtype, device=device)
    fastgen.q_sample(x, 17, schedule, seed=2, out=out)
    assert_same(out, fastgen.q_sample(numbers(x, torch.float32), 17, schedule, seed=2).to(dtype))
    assert_same(fastgen.to_uint8(numbers(x, torch.float32).to(dtype)), x)


def test_samples_are_independent_of_the_batch(device, schedule):
    seeds = torch.tensor([4, -4, 2**62 + 1], device=device)
    x, t = images((3, 3, 9, 11), device=device), on(device, [5, 30, 0])
    whole = fastgen.q_sample(x, t, schedule, seed=seeds)
    for i in range(3):
        assert_same(fastgen.q_sample(x[i : i + 1], t[i : i + 1], schedule, seed=seeds[i : i + 1])[0], whole[i])
