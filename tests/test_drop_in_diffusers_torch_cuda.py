"""The drop-in for diffusers with a fastgen.TorchCudaGenerator: the noise that diffusers draws on a CUDA GPU, step after step."""

import numpy as np
import pytest
import reference
import torch
from conftest import array, normal
from test_drop_in_diffusers import assert_near

import fastgen

diffusers = pytest.importorskip("diffusers")
fast = pytest.importorskip("fastgen.drop_in.diffusers")

CARD = {"multiprocessors": 1, "threads_per_multiprocessor": 512}  # so that a thread has several turns
SHAPE = (3, 2, 900)
NAMES = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler")


class OnTheGpu:
    """What diffusers' randn_tensor does on a GPU, with torch's generators there: the reference's numbers."""

    def __init__(self, *seeds):
        self.seeds, self.offsets = seeds, [0] * len(seeds)
        self.device = torch.device("cuda")

    def draw(self, shape, generator=None, device=None, dtype=None, layout=None):
        parts = []
        for i, seed in enumerate(self.seeds):
            each = tuple(shape) if len(self.seeds) == 1 else (1, *shape[1:])
            name = str(dtype).removeprefix("torch.")
            z, self.offsets[i] = reference.torch_cuda_normals(int(np.prod(each)), seed, self.offsets[i], *CARD.values(), dtype=name)
            parts.append(torch.tensor(z).reshape(each).to(dtype))
        return torch.cat(parts)


def chain(scheduler, generator, dtype=torch.float32, **options):
    """The samples of all steps, the first included."""
    x = normal(SHAPE, 0, dtype)
    made = []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x, generator=generator, **options).prev_sample
        made.append(x)
    return made


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("seeds", [(7,), (5, 2**63 + 1, 5)], ids=["one", "list"])
@pytest.mark.parametrize("how", ["class", "patch", "whatever rng"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_a_gpu(monkeypatch, name, how, seeds, dtype):
    options = {"eta": 0.8} if name == "DDIMScheduler" else {}
    theirs = getattr(diffusers, name)(clip_sample=False)
    theirs.set_timesteps(6)
    gpu = OnTheGpu(*seeds)
    module = __import__(type(theirs).__module__, fromlist=["randn_tensor"])
    with monkeypatch.context() as patched:
        patched.setattr(module, "randn_tensor", gpu.draw)
        expected = chain(theirs, None, dtype, **options)
    generators = [fastgen.TorchCudaGenerator(seed, **CARD) for seed in seeds]
    generator = generators if len(seeds) > 1 else generators[0]
    if how == "patch":
        with fast.patch(rng="torch-cuda"):
            made = chain(theirs, generator, dtype, **options)
    else:
        ours = getattr(fast, name)(clip_sample=False, rng="torch-cuda" if how == "class" else "fused")
        ours.set_timesteps(6)
        made = chain(ours, generator, dtype, **options)
    for y, e in zip(made, expected, strict=True):
        assert_near(y, e)
    assert [each.get_offset() for each in generators] == gpu.offsets and gpu.offsets[0] > 0


def test_steps_without_noise_draw_none():
    ddim = fast.DDIMScheduler(rng="torch-cuda")
    ddim.set_timesteps(4)
    chain(ddim, None)  # eta is 0
    ddpm = fast.DDPMScheduler(rng="torch-cuda")
    x, generator = normal(SHAPE, 0), fastgen.TorchCudaGenerator(1, **CARD)
    ddpm.step(x, 0, x, generator=generator)
    ddpm.step(x, 0, x)
    assert generator.get_offset() == 0


@pytest.mark.parametrize("name", NAMES)
def test_no_other_noise_in_silence(name):
    options = {"eta": 1.0} if name == "DDIMScheduler" else {}
    s, x = getattr(fast, name)(rng="torch-cuda"), normal(SHAPE, 0)
    s.set_timesteps(5)
    cpu = torch.Generator().manual_seed(12)
    state = cpu.get_state()
    for generator, message in [
        (None, "got None, whose noise would be torch's default generator's"),
        (cpu, r"got a torch.Generator on cpu, .*; pass fastgen.TorchCudaGenerator\(12, device_like=...\)"),
        ([cpu] * 3, "got a torch.Generator on cpu"),
        ([fastgen.TorchCudaGenerator(1, **CARD), cpu, cpu], "got a torch.Generator on cpu"),
        ([fastgen.TorchCudaGenerator(1, **CARD)] * 2, "expected one, or a list of 3, one for each sample, got a list of 2"),
    ]:
        for t in (s.timesteps[1], s.timesteps[1]):  # the long way and, where the step is known, the short one
            with pytest.raises(ValueError, match=f"^generator: .*{message}"):
                s.step(x, t, x, generator=generator, **options)
    assert torch.equal(cpu.get_state(), state)
    # a step that has gone well goes the short way from then on
    s.step(x, s.timesteps[1], x, generator=fastgen.TorchCudaGenerator(1, **CARD), **options)
    with pytest.raises(ValueError, match="^generator: expected a fastgen.TorchCudaGenerator"):
        s.step(x, s.timesteps[1], x, **options)
    y = s.step(x, s.timesteps[1], x, seed=5, **options).prev_sample  # a seed decides as ever
    assert torch.equal(y, s.step(x, s.timesteps[1], x, seed=5, **options).prev_sample)


def test_where_a_step_is_not_covered():
    """diffusers' own step takes no such generator, and without one would draw other numbers."""
    s, x = fast.DDPMScheduler(variance_type="learned", rng="torch-cuda"), normal((2, 3, 4, 4), 0)
    s.set_timesteps(5)
    m = torch.cat([x, x.abs() + 0.1], 1)
    for generator in (None, fastgen.TorchCudaGenerator(1, **CARD), torch.Generator()):
        with pytest.raises(ValueError, match="^generator: expected a torch.Generator, and rng .* where fastgen does not cover"):
            s.step(m, s.timesteps[1], x, generator=generator)
    plain = fast.DDPMScheduler(variance_type="learned")
    plain.set_timesteps(5)
    with pytest.raises(ValueError, match="^generator: expected a torch.Generator, .* got TorchCudaGenerator"):
        plain.step(m, s.timesteps[1], x, generator=fastgen.TorchCudaGenerator(1, **CARD))
    plain.step(m, s.timesteps[1], x, generator=torch.Generator())
    ddim = fast.DDIMScheduler(thresholding=True, clip_sample=False, rng="torch-cuda")
    ddim.set_timesteps(5)
    leaf = x.clone().requires_grad_()  # gradients through dynamic thresholding are not covered
    ddim.step(leaf, ddim.timesteps[1], leaf)
    with pytest.raises(ValueError, match="^generator: "):
        ddim.step(leaf, ddim.timesteps[1], leaf, eta=0.5)


def test_methods_whose_code_is_not_known():
    from fastgen.drop_in.diffusers._methods import diffusers_own

    class Scheduler:
        class _fastgen_options:
            rng = "torch-cuda"

        def step(self, model_output, eta=0.0, generator=None):
            return "diffusers' own"

    Scheduler.step = diffusers_own("untested", Scheduler.step)
    assert Scheduler().step(1) == Scheduler().step(1, 0.0, torch.Generator()) == "diffusers' own"
    for call in (lambda s: s.step(1, 0.5), lambda s: s.step(1, 0.5, torch.Generator()), lambda s: s.step(1, eta=1.0)):
        with pytest.raises(ValueError, match=r"^generator: expected a torch.Generator, and rng .* \(untested\)"):
            call(Scheduler())


def test_a_pipeline_with_latents():
    """The first sample comes from the generator as well, and then its steps' noise, as on the GPU."""
    generator = fastgen.TorchCudaGenerator(3, **CARD)
    first = generator.randn(SHAPE)
    assert generator.get_offset() == 4 * -(-first.numel() // (4 * 512))
    np.testing.assert_allclose(array(first).ravel(), reference.torch_cuda_normals(first.numel(), 3, 0, 1, 512)[0], atol=2e-6)


def test_bad_rng():
    for make in (fast.DDPMScheduler, fast.patch):
        with pytest.raises(ValueError, match="^rng: expected one of 'exact', 'fused', 'torch-cuda', got 'cuda'"):
            make(rng="cuda")
    import fastgen.drop_in.gaussian_diffusion as gaussian

    with pytest.raises(ValueError, match="^rng: expected one of 'exact', 'fused', got 'torch-cuda'"):
        gaussian.patch(object(), rng="torch-cuda")  # pyright: ignore[reportArgumentType]
