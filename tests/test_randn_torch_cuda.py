"""torch's numbers on a CUDA GPU, on every backend and device: what others have published of their GPUs, and what the sources of
torch and cuRAND say; and fastgen.TorchCudaGenerator, which goes on in that stream."""

import copy
import inspect
import os
import pickle
import warnings

import numpy as np
import pytest
import reference
import torch
from conftest import DTYPES, array, assert_same, channels_last, normal

import fastgen
from fastgen._core import backends, rng, torch_cuda

SMALL = {"multiprocessors": 2, "threads_per_multiprocessor": 600}  # T is at most 1024
T = 1024


def draw(shape, **how):
    return fastgen.randn(shape, stream="torch-cuda", **how)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def assert_numbers(z, expected):
    """To what float32's logarithm, sine and cosine leave: some ulp of the largest number, 5 · 2.4e-7."""
    difference = np.abs(array(z).reshape(-1) - expected)
    if z.dtype == torch.float64:
        assert np.all(difference <= 1e-12)
    elif z.dtype == torch.float32:
        assert np.all(difference <= 2e-6) and np.mean(difference) < 2e-7
    else:  # one rounding on top
        assert np.all(difference <= 0.5 * torch.finfo(z.dtype).eps * np.abs(expected) + 2e-6)


# ---- known answers --------------------------------------------------------------------------------------------------


PRINTED = 6e-5  # of values with four digits after the point


# (seed, shape, the GPUs, {first element of a row: numbers})
KNOWN = {
    # the docstring of modules/rng_philox.py in AUTOMATIC1111's stable-diffusion-webui
    "webui": (
        *(0, (12,), ("T4", "A100", "RTX 4090")),
        {
            0: (-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564),
            6: (-0.62285122, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497),
        },
    ),
    "pytorch#79496": (10, (3,), ("V100",), {0: (-0.1029, 1.6810, -0.2708)}),
    "pytorch#143086, H100": (
        *(1, (1, 49 * 12 * 112 * 144), ("H100",)),
        {0: (-0.2963, 2.6764, -0.1408), 49 * 12 * 112 * 144 - 3: (-0.6970, -0.7780, 0.3267)},
    ),
    "pytorch#143086, A100": (
        *(1, (1, 49 * 12 * 112 * 144), ("A100",)),
        {0: (-0.2963, 2.6764, -0.1408), 49 * 12 * 112 * 144 - 3: (0.1549, -0.6797, -0.1656)},
    ),
    "pytorch#158398": (
        *(42, (1, 64, 2048), ("RTX 3060",)),
        {
            0: (0.1940, 2.1614, -0.1721),
            2045: (1.4540, -2.7733, -0.8932),
            2048: (-0.4574, 0.8063, 0.1580),
            2 * 2048: (1.1346, -0.6329, -0.9147),
            61 * 2048: (-0.4861, 0.3358, 1.0578),
            62 * 2048 - 3: (-0.7282, 0.5087, 0.1318),
            62 * 2048: (0.7881, 0.8339, -1.1424),
            63 * 2048: (-1.2356, -0.4083, -0.4695),
            64 * 2048 - 3: (-0.4841, 1.2850, -0.0282),
        },
    ),
    # normal_ of (1, 3, 128, 128), elements [0, :, 0, 0]
    "pytorch#62467": (43, (1, 3, 128, 128), ("RTX A6000",), {0: (1.9983,), 128 * 128: (0.8704,), 2 * 128 * 128: (2.1127,)}),
    # normal_(5, 5**.5) of (1000, 100), which is 5 + √5·z
    "pytorch#97097": (
        *(14, (1000, 100), ("RTX A4000",)),
        {
            first: tuple((x - 5) / 5**0.5 for x in row)
            for first, row in {
                0: (2.8731, 5.2727, 2.9889),
                97: (1.6853, 9.6331, 6.6319),
                200: (6.5552, 4.0857, 4.2315),
                297: (2.7704, 3.5479, 3.3063),
                99_700: (8.6297, 2.3137, 6.2596),
                99_797: (7.9358, 4.4697, 2.7475),
                99_800: (7.0551, 7.8583, 3.9990),
                99_897: (4.1139, 8.9315, 4.2042),
                99_900: (2.7337, 2.2106, 7.7815),
                99_997: (8.2207, 6.5395, 4.2604),
            }.items()
        },
    ),
}


@pytest.mark.parametrize("source", KNOWN)
def test_numbers_that_others_have_published(source, device):
    seed, shape, cards, rows = KNOWN[source]
    if np.prod(shape) > 200_000 and (backends.backend() != "cpp" or "FASTGEN_LAUNCHED" in os.environ):
        pytest.skip("9.5 million elements take the other backends too long")
    for card in cards:
        z = array(draw(shape, seed=seed, device_like=card, device=device)).reshape(-1)
        for first, numbers in rows.items():
            tolerance = 1e-6 if source == "webui" else PRINTED
            np.testing.assert_allclose(z[first : first + len(numbers)], numbers, rtol=0, atol=tolerance)


@pytest.mark.parametrize("source", KNOWN)
def test_the_reference_has_them_too(source):
    seed, shape, cards, rows = KNOWN[source]
    for card in cards:
        for first, numbers in rows.items():
            elements = first + np.arange(len(numbers))
            z, _ = reference.torch_cuda_normals(int(np.prod(shape)), seed, 0, *torch_cuda.CARDS[card], elements=elements)
            np.testing.assert_allclose(z, numbers, rtol=0, atol=1e-6 if source == "webui" else PRINTED)


# ---- values ---------------------------------------------------------------------------------------------------------

# No multiple of 4 or 256, a block, T, and several turns, with a remainder in each of a thread's numbers
COUNTS = [1, 3, 255, 256, 257, 1000, T - 1, T, T + 1, 2 * T, 2 * T + 255, 3 * T + 1, 4 * T - 1, 4 * T, 4 * T + 1, 4 * T + 5]
COUNTS += [5 * T + 300, 8 * T, 9 * T + 77]


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_sizes(device, count, dtype):
    z = draw((count,), seed=42, dtype=dtype, device=device, **SMALL)
    assert z.shape == (count,) and z.dtype == dtype and z.device.type == device.type and z.is_contiguous()
    assert_numbers(z, reference.torch_cuda_normals(count, 42, 0, 2, 600, name_of(dtype))[0])


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 + 3, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 4, 2**33, 2**34 - 4, 2**34, 2**63 - 4])
def test_seeds_and_offsets(device, seed, offset, dtype):
    """The counter is of 64 bits, and one turn carries from its first word into the second."""
    shape = (3, 5, 700)
    z = draw(shape, seed=seed, offset=offset, dtype=dtype, device=device, **SMALL)
    assert_numbers(z, reference.torch_cuda_normals(10_500, seed, offset, 2, 600, name_of(dtype))[0])


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("event", [(), (1,), (3, 5), (257,), (5 * T + 3,)])
def test_a_seed_for_each_sample(device, event, dtype):
    """Sample i is what a generator of its own gives for one sample, as diffusers' randn_tensor draws with a list of them."""
    seeds = torch.tensor([5, -6, 2**63 - 1, 5], device=device)
    z = draw((4, *event), seed=seeds, offset=8, dtype=dtype, device=device, **SMALL)
    for i, seed in enumerate(seeds.tolist()):
        assert_same(z[i], draw((1, *event), seed=seed, offset=8, dtype=dtype, device=device, **SMALL)[0])
    assert_same(draw((1, *event), seed=seeds[1:2], dtype=dtype, device=device, **SMALL),
                draw((1, *event), seed=-6, dtype=dtype, device=device, **SMALL))  # fmt: skip


def test_one_seed_in_memory(device):
    expected = draw((3, 500), seed=-9, device=device, **SMALL)
    for seed in (torch.tensor(-9), torch.tensor([-9])):
        assert_same(draw((3, 500), seed=seed.to(device), device=device, **SMALL), expected)
        assert_same(draw((3, 500), seed=seed, device=device, **SMALL), expected)


def test_no_elements(device):
    assert draw((0, 3), seed=1, device=device, **SMALL).shape == (0, 3)
    assert draw((3, 0), seed=torch.tensor([1, 2, 3], device=device), device=device, **SMALL).shape == (3, 0)


def test_the_shape_does_not_matter(device):
    flat = draw((3000,), seed=7, device=device, **SMALL)
    assert_same(draw((3, 10, 100), seed=7, device=device, **SMALL).reshape(-1), flat)


def test_named_gpus(device):
    """The name stands for two numbers, and up to T of the smaller GPU two of them agree."""
    count = 40_960 + 500
    t4, l4 = (draw((count,), seed=3, device_like=name, device=device) for name in ("T4", "L4"))
    assert_same(t4, draw((count,), seed=3, multiprocessors=40, threads_per_multiprocessor=1024, device=device))
    assert_same(t4[:40_960], l4[:40_960])
    assert not torch.equal(t4[40_960:], l4[40_960:])


@pytest.mark.backend("cpp")
def test_far_into_a_tensor():
    """As large as one may be: 2³⁰ elements of half precision, of which the reference makes a few."""
    if "cpp" not in fastgen.available_backends("cpu") or "FASTGEN_LAUNCHED" in os.environ:
        pytest.skip("the CUDA code on the host is too slow")
    count = 2**30
    with fastgen.use_backend("cpp"):
        z = draw((count,), seed=11, dtype=torch.float16, device_like="H100")
    elements = np.array([0, 270_336, 540_673, 811_010, 4 * 270_336, 2**29 + 1, count - 270_337, count - 2, count - 1])
    expected, after = reference.torch_cuda_normals(count, 11, 0, 132, 2048, elements=elements)
    assert_numbers(z[torch.tensor(elements)], expected)
    assert after == 4 * 993


# ---- the ops' out= --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not backends.HAS_OPS, reason="the compiled library is absent")
def test_the_op_writes_in_logical_order():
    op = torch.ops.fastgen.randn_torch_cuda
    expected = draw((2, 3, 20, 30), seed=3, **SMALL)
    for out in (channels_last(torch.empty(2, 3, 20, 30)), torch.empty(30, 20, 3, 2).permute(3, 2, 1, 0)):
        op(out, None, 3, 0, T)
        assert torch.equal(out, expected)
    for bad in ((None, None, 0, T), (None, 3, 2, T), (None, 3, -4, T), (None, 3, 0, 100), (None, 3, 0, 0)):
        with pytest.raises(RuntimeError, match="expected"):
            op(torch.empty(2, 3), *bad)


# ---- a generator ----------------------------------------------------------------------------------------------------


def test_generator_goes_on(device):
    """As torch's generator does: by 4 for each turn of the threads."""
    for dtype in DTYPES:
        generator, offset = fastgen.TorchCudaGenerator(17, **SMALL), 0
        for shape in ((1,), (3, 700), (0, 5), (4 * T,), (2, 4 * T + 1), (5, 7)):
            count = int(np.prod(shape))
            expected, after = reference.torch_cuda_normals(count, 17, offset, 2, 600, name_of(dtype)) if count else ([], offset)
            assert_numbers_or_none(generator.randn(shape, dtype=dtype, device=device), expected)
            offset = after
            assert generator.get_offset() == offset
    assert generator.initial_seed() == 17


def assert_numbers_or_none(z, expected):
    assert z.numel() == len(expected)
    if z.numel():
        assert_numbers(z, expected)


def test_generator_is_set(device):
    generator = fastgen.TorchCudaGenerator(-3, device_like="A100", offset=8)
    assert generator.initial_seed() == 2**64 - 3 and generator.get_offset() == 8
    z = fastgen.randn((5, 3), generator=generator, device=device)
    assert_same(z, draw((5, 3), seed=-3, offset=8, device_like="A100", device=device))
    generator.set_offset(8)
    assert_same(generator.randn((5, 3), device=device), z)
    assert generator.manual_seed(-3) is generator and generator.get_offset() == 0
    assert repr(generator) == f"TorchCudaGenerator(seed={2**64 - 3}, offset=0, threads=221184)"
    generator.set_offset(8)
    for other in (copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):
        assert_same(other.randn((5, 3), device=device), z)
    assert generator.get_offset() == 8


@pytest.mark.parametrize("name", ["q_sample", "q_step", "ddpm_step", "ddim_step"])
def test_ops_take_it(name, schedule, device):
    """In place of a torch.Generator: the numbers of randn, in the result's dtype, and then the next ones."""
    x, m = normal((3, 4, 5), 0, torch.float64, device), normal((3, 4, 5), 1, torch.float64, device)
    more = {"model_output": m} if "step" in name and name != "q_step" else {}
    more |= {"eta": 0.5} if name == "ddim_step" else {}
    function = getattr(fastgen, name)
    generator = fastgen.TorchCudaGenerator(9, **SMALL)
    drawn = fastgen.TorchCudaGenerator(9, **SMALL)
    for _ in range(2):
        z = drawn.randn(x.shape, dtype=torch.float64, device=device)
        assert_same(function(x, t=7, schedule=schedule, generator=generator, **more),
                    function(x, t=7, schedule=schedule, noise=z, **more))  # fmt: skip
    assert generator.get_offset() == drawn.get_offset() == 8
    with pytest.raises(ValueError, match="expected at most one"):
        function(x, t=7, schedule=schedule, generator=generator, seed=3, **more)
    assert generator.get_offset() == 8


def test_a_step_without_noise_leaves_it(schedule, device):
    x, generator = normal((3, 4), 0, device=device), fastgen.TorchCudaGenerator(9, **SMALL)
    fastgen.ddim_step(x, x, 7, schedule, generator=generator)
    assert generator.get_offset() == 0


def test_no_numbers_into_a_cuda_graph(monkeypatch):
    generator = fastgen.TorchCudaGenerator(9, **SMALL)
    monkeypatch.setattr(rng, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="^generator: expected none during CUDA-graph capture"):
        generator.randn((3,))
    assert generator.get_offset() == 0


def test_the_gpu_that_the_result_is_on(monkeypatch):
    """Without a name it is the device's own: by torch.cuda.get_device_properties, of which this machine may have none."""

    class Properties:
        multi_processor_count, max_threads_per_multi_processor = 78, 2048

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert torch_cuda.threads_of(None, None, None, torch.device("cuda", 0)) == 78 * 2048


def test_cards():
    """A name is that of one GPU, whose threads come in blocks of 256."""
    assert all(1 <= m < 2**10 and t in (1024, 1536, 2048) for m, t in torch_cuda.CARDS.values())
    # as measured by others: pytorch#194676 (T4, L4), pytorch#176584 (RTX 4090 D, H20)
    threads = {name: torch_cuda.threads_of(name, None, None) for name in ("T4", "L4", "RTX 4090 D", "H20", "A100", "H100")}
    assert list(threads.values()) == [40_960, 89_088, 175_104, 159_744, 221_184, 270_336]


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, error, message",
    [
        ({}, ValueError, "device_like: expected the name of the GPU whose numbers these are for numbers on cpu"),
        ({"device_like": "H1000"}, ValueError, "device_like: expected one of 'V100', .*, got 'H1000'; of another GPU, pass"),
        ({"device_like": 3}, TypeError, "device_like: expected the name of a GPU, got int"),
        ({"device_like": "A100", "multiprocessors": 3}, ValueError, "device_like, multiprocessors: expected at most one, got both"),
        ({"multiprocessors": 3}, ValueError, "threads_per_multiprocessor: expected an int beside multiprocessors, got None"),
        ({"threads_per_multiprocessor": 3}, ValueError, "multiprocessors: expected an int beside threads_per_multiprocessor"),
        ({**SMALL, "multiprocessors": 0}, ValueError, "multiprocessors: expected an int within 1 … 65535, got 0"),
        ({**SMALL, "multiprocessors": 1.5}, TypeError, "multiprocessors: expected an int, got float"),
        ({**SMALL, "threads_per_multiprocessor": 255}, ValueError, "threads_per_multiprocessor: expected an int within 256"),
        ({**SMALL, "offset": 2}, ValueError, "offset: expected a multiple of 4, as torch.Generator.get_offset has them, got 2"),
        ({**SMALL, "offset": -4}, ValueError, "offset: expected an int within"),
        ({**SMALL, "seed": 2**64}, ValueError, "seed: expected a 64-bit int"),
        ({**SMALL, "seed": torch.tensor([1, 2])}, ValueError, "seed: expected 1 element or shape"),
        ({**SMALL, "stream": "torch"}, ValueError, "stream: expected one of 'fastgen', 'torch-cuda', got 'torch'"),
        ({"stream": "fastgen", "device_like": "A100"}, ValueError, 'device_like: expected None unless stream="torch-cuda"'),
        ({"stream": "fastgen", "multiprocessors": 2}, ValueError, 'multiprocessors: expected None unless stream="torch-cuda"'),
        ({**SMALL, "shape": (2**29 + 1,)}, ValueError, "shape: expected at most 2.*31 bytes, 536870912 elements of float32"),
        ({**SMALL, "shape": (2, 2**29 + 1), "seed": torch.tensor([1, 2])}, ValueError, "shape: expected at most 2.*31 bytes"),
        ({**SMALL, "shape": (2**28 + 1,), "dtype": torch.float64}, ValueError, "268435456 elements of float64"),
        ({**SMALL, "shape": (2**30 + 1,), "dtype": torch.bfloat16}, ValueError, "1073741824 elements of bfloat16"),
    ],
)
def test_bad_arguments(how, error, message):
    with pytest.raises(error, match=f"^{message}" if message[0].islower() else message):
        fastgen.randn(**{"shape": (3, 4), "seed": 1, "stream": "torch-cuda", **how})


def test_bad_generators():
    generator = fastgen.TorchCudaGenerator(1, **SMALL)
    for how, error, message in [
        ({"generator": torch.Generator()}, TypeError, "generator: expected a fastgen.TorchCudaGenerator, got Generator"),
        ({"generator": generator, "seed": 1}, ValueError, "generator, seed: expected at most one, got both"),
        ({"generator": generator, "offset": 4}, ValueError, "generator, offset: expected at most one, got both"),
        ({"generator": generator, "device_like": "A100"}, ValueError, "generator, device_like: expected at most one, got both"),
        ({"generator": generator, "shape": (2**29 + 1,)}, ValueError, "shape: expected at most"),
        ({}, TypeError, "seed: expected an int or an int64 tensor, got None"),
    ]:
        with pytest.raises(error, match=f"^{message}"):
            fastgen.randn(**{"shape": (3, 4), **how})
    assert generator.get_offset() == 0
    for arguments, error, message in [
        (((1,), {}), ValueError, "device_like: expected the name of the GPU whose numbers these are, such as 'A100'"),
        ((("1",), SMALL), TypeError, "seed: expected an int, got str"),
        (((torch.tensor(1),), SMALL), TypeError, "seed: expected an int, got Tensor"),
        (((2**64,), SMALL), ValueError, "seed: expected a 64-bit int"),
        (((1,), {**SMALL, "offset": 6}), ValueError, "offset: expected a multiple of 4"),
    ]:
        with pytest.raises(error, match=f"^{message}"):
            fastgen.TorchCudaGenerator(*arguments[0], **arguments[1])
    with pytest.raises(ValueError, match="^offset: expected a multiple of 4"):
        generator.set_offset(3)
    with pytest.raises(TypeError, match=r"^generator: expected a torch.Generator or fastgen.TorchCudaGenerator, got int"):
        fastgen.q_sample(torch.zeros(2, 3), 0, fastgen.Schedule.linear(4), generator=3)  # pyright: ignore


# ---- torch.compile --------------------------------------------------------------------------------------------------


def test_compiles(device):
    torch._dynamo.reset()
    fast = torch.compile(lambda x: x + draw(x.shape, seed=5, device=x.device, **SMALL), fullgraph=True, backend="aot_eager")
    for shape in ((3, 5), (7, 500), (9, 700)):  # of symbolic sizes from the second on
        x = normal(shape, 0, device=device)
        assert_same(fast(x), x + draw(shape, seed=5, device=device, **SMALL))


def test_compiles_with_a_generator(device):
    torch._dynamo.reset()
    compiled, eager = (fastgen.TorchCudaGenerator(5, **SMALL) for _ in range(2))
    add = lambda x: x + fastgen.randn(x.shape, generator=compiled, device=x.device)  # noqa: E731
    fast = torch.compile(add, fullgraph=True, backend="aot_eager")
    x = normal((3, 500), 0, device=device)
    for _ in range(4):
        assert_same(fast(x), x + eager.randn(x.shape, device=device))
        assert compiled.get_offset() == eager.get_offset()


# ---- torch's stateless keys -----------------------------------------------------------------------------------------


def test_keys_of_torch_are_seeds(device):
    """A key that torch.func._random.key has made of a seed gives the contract's numbers of sample 0 at offset 0, but in float64."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        z = fastgen.randn((1, 1003), seed=2**63 + 42, dtype=dtype, device=device)
        assert_key_numbers(z, reference.torch_key_normals(1003, 2**63 + 42, 0))
    z = fastgen.randn((2, 77), seed=torch.tensor([5, 2**40], device=device), device=device)
    for i, seed in enumerate((5, 2**40)):
        assert_key_numbers(z[i], reference.torch_key_normals(77, seed, 0))
    double = array(fastgen.randn((1, 1003), seed=42, dtype=torch.float64, device=device))[0]
    assert np.abs(double - reference.torch_key_normals(1003, 42, 0, "float64")).max() > 1


def assert_key_numbers(z, expected):
    difference = np.abs(array(z).reshape(-1) - expected)
    if z.dtype == torch.float32:
        assert np.all(difference <= 1e-3) and np.mean(difference) < 1e-6  # the contract's accuracy
    else:
        assert np.all(difference <= 0.5 * torch.finfo(z.dtype).eps * np.abs(expected) + 1e-3)


def stateless():
    """torch.func._random, where torch has it for the CPU: from 2.14 on."""
    try:
        import torch.func._random as random

        random.normal(random.key(0), 1)
    except (ImportError, AttributeError, NotImplementedError, RuntimeError):
        return None
    return random


def test_keys_of_torch_itself(device):
    random = stateless()
    if random is None:
        pytest.skip("this torch has no torch.func._random with a kernel for the CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in (0, 42, 2**63 + 5):
            key = random.key(seed)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                expected = array(random.normal(key, 1003, dtype=dtype))
                z = fastgen.randn((1, 1003), seed=seed, dtype=dtype, device=device)
                tolerance = 3e-6 + torch.finfo(dtype).eps * np.abs(expected)
                assert np.all(np.abs(array(z)[0] - expected) <= tolerance + (1e-3 if device.type == "cuda" else 0))
            double = array(random.normal(key, 1003, dtype=torch.float64))
            np.testing.assert_allclose(reference.torch_key_normals(1003, seed, 0, "float64"), double, rtol=0, atol=1e-12)
        split = random.fold_in(random.key(3), 7)
        seed, offset = split.view(torch.int64).tolist()
        expected = array(random.normal(split, 50))
        np.testing.assert_allclose(reference.torch_key_normals(50, seed, offset % 2**64), expected, rtol=0, atol=3e-6)


def test_signature():
    """What names the GPU is the same in both places."""
    named = {"device_like", "multiprocessors", "threads_per_multiprocessor"}
    for function in (fastgen.randn, fastgen.TorchCudaGenerator.__init__):
        assert named < set(inspect.signature(function).parameters)
