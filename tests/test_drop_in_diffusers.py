"""The schedulers of diffusers on fastgen: the same numbers, files and errors, and what they have beyond it."""

import copy
import functools
import inspect
import itertools
import logging
import pickle
import types

import numpy as np
import pytest
import torch
from conftest import LAYOUTS, array, in_threads, normal
from dispatched import Dispatched
from torch._dynamo.testing import CompileCounterWithBackend

import fastgen
from fastgen._core import torch_noise

diffusers = pytest.importorskip("diffusers")
fast = pytest.importorskip("fastgen.drop_in.diffusers")

NAMES = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
LIMITS = {
    "clipped": {"clip_sample": True, "clip_sample_range": 1.5},
    "thresholded": {"clip_sample": False, "thresholding": True, "sample_max_value": 1.7},
    "unlimited": {"clip_sample": False},
}
VARIANTS = {
    "DDPMScheduler": [{"variance_type": v} for v in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")],
    "DDIMScheduler": [{"eta": eta, "use_clipped_model_output": u} for eta in (0.0, 0.7, 1.0) for u in (False, True)],
}
VARIANTS["DDPMParallelScheduler"] = VARIANTS["DDPMScheduler"]


def both(name, steps=10, **config):
    """diffusers' scheduler and ours, configured alike."""
    made = getattr(diffusers, name)(**config), getattr(fast, name)(**config)
    for scheduler in made:
        if steps is not None:
            scheduler.set_timesteps(steps)
    return made


def network(channels, learned, dtype):
    weights = normal((2 * channels if learned else channels, channels), 3, dtype)
    return lambda x, t: torch.tanh(torch.einsum("oc,bc...->bo...", weights, x) / 2 + 0.001 * t)


def chain(scheduler, x, *, generator=None, learned=False, **options):
    """Every step's (previous sample, x0)."""
    model, results = network(x.shape[1], learned, x.dtype), []
    for t in scheduler.timesteps:
        output = scheduler.step(model(x, t), t, x, generator=generator, **options)
        x = output.prev_sample
        results.append((x, output.pred_original_sample))
    return results


def assert_near(ours, theirs, rtol=None):
    """To rounding: of the largest number in play, since x0 = (x − √β·m)/√ᾱ cancels by up to 150 at the default schedule's end."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and type(ours) is type(theirs)
    rtol = rtol or (1e-12 if ours.dtype == torch.float64 else 2e-5)
    np.testing.assert_allclose(array(ours), array(theirs), rtol=0, atol=rtol * max(1.0, np.abs(array(theirs)).max()))


def test_nothing_private_looks_public():
    names = [name for name in vars(fast) if name[0] != "_"]
    assert [name for name in names if name != "vae"] == fast.__all__  # which is a module of its own, there once it is imported


# ---- the same numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_chains_are_those_of_diffusers(name, prediction, limit, dtype):
    for variant, spacing in itertools.product(VARIANTS[name], ("leading", "trailing", "linspace")):
        of_step = variant if "eta" in variant else {}
        config = {"prediction_type": prediction, "timestep_spacing": spacing, **LIMITS[limit], **({} if of_step else variant)}
        results, states = [], []
        for scheduler in both(name, **config):
            generator = torch.Generator().manual_seed(0)
            learned = variant.get("variance_type") == "learned_range"
            results.append(chain(scheduler, normal((2, 4, 3, 5), 0, dtype), generator=generator, learned=learned, **of_step))
            states.append(generator.get_state())
        assert torch.equal(*states)
        for theirs, ours in zip(*results, strict=True):
            assert_near(ours[0], theirs[0])
            assert_near(ours[1], theirs[1])


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "clip_sample": False},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"trained_betas": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], "num_train_timesteps": 8},
    ],
    ids=lambda config: next(iter(config)),
)
@pytest.mark.parametrize("name", NAMES)
def test_schedules(name, config, backend, device):
    for steps in (4, 8) if backend == "triton" else (1, 7, 8):
        theirs, ours = (
            chain(s, normal((2, 3, 4), 1, device=device), generator=torch.Generator().manual_seed(1))
            for s in both(name, steps, **config)
        )
        for (x, x0), (y, y0) in zip(theirs, ours, strict=True):
            assert_near(y, x)
            assert_near(y0, x0)


def test_ddim_final_alpha():
    theirs, ours = both("DDIMScheduler", set_alpha_to_one=False, clip_sample=False)
    for eta in (0.0, 1.0):
        results = [chain(s, normal((2, 3, 4), 1), eta=eta, generator=torch.Generator().manual_seed(1)) for s in (theirs, ours)]
        assert_near(results[1][-1][0], results[0][-1][0])


def test_ddpm_without_set_timesteps_and_with_custom_ones():
    theirs, ours = both("DDPMScheduler", None)
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)
    for custom in (None, [900, 500, 20, 3]):
        if custom:
            theirs.set_timesteps(timesteps=custom)
            ours.set_timesteps(timesteps=custom)
        for t in (900, 500, 3):
            a, b = (s.step(m, t, x, generator=torch.Generator().manual_seed(1)).prev_sample for s in (theirs, ours))
            assert_near(b, a)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_nearer_to_the_truth(name, dtype):
    """One rounding instead of one for each operation; and the same dtypes."""
    theirs, ours = both(name, clip_sample=False)
    exact = getattr(diffusers, name)(clip_sample=False)
    exact.set_timesteps(10)
    x, m = normal((2, 3, 64), 0, dtype), normal((2, 3, 64), 1, dtype)
    options = {"eta": 1.0} if "DDIM" in name else {}
    for t in theirs.timesteps:
        draws = [torch.Generator().manual_seed(5) for _ in range(3)]
        a, b = (s.step(m, t, x, generator=g, **options) for s, g in zip((theirs, ours), draws, strict=False))
        # the noise, in half precision, is part of the truth
        z = torch.randn(x.shape, generator=draws[2], dtype=dtype).double()
        still = exact.step(m.double(), t, x.double(), generator=torch.Generator().manual_seed(5), **options)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        sigma = exact._get_variance(t) ** 0.5 if "DDPM" in name else exact._get_variance(t, t - 100) ** 0.5
        truth = still.prev_sample + (sigma * (z - noise) if t > 0 or "DDIM" in name else 0)
        assert a.prev_sample.dtype == b.prev_sample.dtype == b.pred_original_sample.dtype == dtype
        error = [(r.prev_sample.double() - truth).abs().max().item() for r in (a, b)]
        assert error[1] <= error[0] + 1e-6
        assert error[1] <= 0.51 * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float32)]
)
def test_mixed_dtypes_have_the_results_of_diffusers(prediction, dtypes):
    for name, limit in itertools.product(("DDPMScheduler", "DDIMScheduler"), ("clipped", "unlimited")):
        x, m = normal((2, 3, 8), 0, dtypes[0]), normal((2, 3, 8), 1, dtypes[1])
        a, b = (
            s.step(m, s.timesteps[8], x, generator=torch.Generator().manual_seed(1))
            for s in both(name, prediction_type=prediction, **LIMITS[limit])
        )
        assert_near(b.prev_sample, a.prev_sample, 0.03)
        assert_near(b.pred_original_sample, a.pred_original_sample, 0.03)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", NAMES)
def test_the_default_generator_is_drawn_from_as_by_diffusers(name, limit):
    for options in [{"eta": 0.0}, {"eta": 0.5}] if "DDIM" in name else [{}]:
        results, states = [], []
        for s in both(name, **LIMITS[limit]):
            torch.manual_seed(3)
            results.append(chain(s, normal((2, 3, 4), 0), **options)[-1][0])
            states.append(torch.get_rng_state())
        assert_near(results[1], results[0])
        assert torch.equal(*states)


def test_generators():
    """Lists of them, and none; what is drawn, and that nothing is at timestep 0."""
    for scheduler_class in NAMES:
        theirs, ours = both(scheduler_class)
        options = {"eta": 1.0} if "DDIM" in scheduler_class else {}
        x, m = normal((3, 2, 4), 0), normal((3, 2, 4), 1)
        for count, t in itertools.product((1, 3, None), (theirs.timesteps[2], theirs.timesteps[-1])):
            results, states = [], []
            for s in (theirs, ours):
                torch.manual_seed(7)
                generators = None if count is None else [torch.Generator().manual_seed(i) for i in range(count)]
                results.append(s.step(m, t, x, generator=generators, **options).prev_sample)
                states.append(torch.cat([g.get_state() for g in generators or [torch.default_generator]]))
            assert_near(results[1], results[0])
            assert torch.equal(*states)


def test_results_are_those_of_diffusers_in_kind():
    for name in NAMES:
        theirs, ours = both(name)
        x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)
        a, b = theirs.step(m, theirs.timesteps[-1], x), ours.step(m, ours.timesteps[-1], x)
        assert type(a) is type(b) and list(a.keys()) == list(b.keys()) and len(a.to_tuple()) == len(b.to_tuple())
        assert b["prev_sample"] is b.prev_sample is b[0] and b[1] is b.pred_original_sample
        assert torch.utils._pytree.tree_flatten(b)[0][0] is b.prev_sample
        plain = ours.step(m, ours.timesteps[-1], x, return_dict=False)
        assert type(plain) is tuple and torch.equal(plain[0], b.prev_sample)


def test_gradients():
    for name, limit in itertools.product(("DDPMScheduler", "DDIMScheduler"), LIMITS):
        gradients = []
        for s in both(name, **LIMITS[limit]):
            x, m = normal((2, 3, 4), 0).requires_grad_(), normal((2, 3, 4), 1).requires_grad_()
            y = s.step(m, s.timesteps[7], x, generator=torch.Generator().manual_seed(1))
            gradients.append(torch.autograd.grad((y.prev_sample.sin() + y.pred_original_sample.cos()).sum(), (x, m)))
        for a, b in zip(*gradients, strict=True):
            assert_near(b, a, 1e-4)


def test_second_derivatives_through_two_steps():
    for name, limit in itertools.product(("DDPMScheduler", "DDIMScheduler"), LIMITS):
        results = []
        for s in both(name, **LIMITS[limit]):
            x, m = (normal((2, 3, 4), seed, torch.float64).requires_grad_() for seed in (0, 1))
            generator, options = torch.Generator().manual_seed(1), {"eta": 0.7} if "DDIM" in name else {}
            y = s.step(m, s.timesteps[6], x, generator=generator, **options).prev_sample
            y = s.step(torch.tanh(y * m), s.timesteps[7], y, generator=generator, **options).prev_sample
            first = torch.autograd.grad(y.sin().sum(), (x, m), create_graph=True)
            results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, m))])
        for a, b in zip(*results, strict=True):
            assert_near(b, a, 1e-6)


def test_batch_step_no_noise():
    theirs, ours = both("DDPMParallelScheduler")
    x, m, t = normal((4, 3, 5), 0), normal((4, 3, 5), 1), torch.tensor([900, 400, 100, 0])
    with Dispatched() as ops:
        y = ours.batch_step_no_noise(m, t, x)
    assert ops.of_fastgen() == 1
    assert_near(y, theirs.batch_step_no_noise(m, t, x))


# ---- add_noise, get_velocity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("method", ("add_noise", "get_velocity"))
@pytest.mark.parametrize("name", NAMES)
def test_forward(name, method, dtype):
    theirs, ours = both(name, None)
    x, noise = normal((4, 3, 8), 0, dtype), normal((4, 3, 8), 1, dtype)
    for t in (torch.tensor([0, 3, 500, 999]), torch.tensor([7]), torch.tensor(11), torch.tensor([0, 1, 2, 3], dtype=torch.int32)):
        with Dispatched() as ops:
            y = getattr(ours, method)(x, noise, t)
        assert ops.of_fastgen() == 1
        expected = getattr(theirs, method)(x, noise, t)
        assert_near(y, expected, 2e-6 if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps)


def test_noise_is_not_lost_with_float32_coefficients():
    ours, kept = fast.DDPMScheduler(), fast.DDPMScheduler(float32_coefficients=True)
    x, noise = torch.zeros(2, 64, dtype=torch.bfloat16), normal((2, 64), 1, torch.bfloat16)
    t = torch.tensor([0, 9])
    assert not diffusers.DDPMScheduler().add_noise(x, noise, t).any() and not ours.add_noise(x, noise, t).any()
    expected = diffusers.DDPMScheduler().add_noise(x.double(), noise.double(), t)
    torch.testing.assert_close(kept.add_noise(x, noise, t).double(), expected, rtol=2**-8, atol=0)


def test_gradients_of_add_noise():
    gradients = []
    for s in both("DDPMScheduler", None):
        x, noise = normal((2, 3, 4), 0).requires_grad_(), normal((2, 3, 4), 1).requires_grad_()
        gradients.append(torch.autograd.grad(s.add_noise(x, noise, torch.tensor([5, 700])).sin().sum(), (x, noise)))
    for a, b in zip(*gradients, strict=True):
        assert_near(b, a)


# ---- real pipelines -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    options = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **blocks, **options).eval()


def generate(pipeline_class, unet, scheduler, **options):
    pipeline = pipeline_class(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=6, output_type="np", **options)


PIPELINES = [
    ("DDPMPipeline", "DDPMScheduler", {}),
    ("DDIMPipeline", "DDIMScheduler", {"eta": 0.5, "use_clipped_model_output": True}),
]
PIPELINES += [("DDPMPipeline", "DDPMParallelScheduler", {}), ("DDIMPipeline", "DDIMScheduler", {"eta": 0.0})]


@pytest.mark.parametrize(("pipeline", "name", "options"), PIPELINES)
def test_pipelines_make_the_same_images(unet, one_thread, pipeline, name, options):
    pipeline = getattr(diffusers, pipeline)
    expected = generate(pipeline, unet, getattr(diffusers, name)(), **options).images
    np.testing.assert_allclose(generate(pipeline, unet, getattr(fast, name)(), **options).images, expected, atol=2e-5)
    with fast.patch(), Dispatched() as ops:
        patched = generate(pipeline, unet, getattr(diffusers, name)(), **options).images
    np.testing.assert_allclose(patched, expected, atol=2e-5)
    assert ops.of_fastgen() == 6  # one launch for each step
    with Dispatched() as ops:
        assert np.array_equal(generate(pipeline, unet, getattr(diffusers, name)(), **options).images, expected)
    assert ops.of_fastgen() == 0
    with fast.patch(rng="fused"), Dispatched() as ops:
        fused = generate(pipeline, unet, getattr(diffusers, name)(), **options).images
    assert ops.of_fastgen() == 6 and ops["aten.randn"] == 1 and fused.shape == expected.shape  # the randn is the pipeline's own


# ---- noise in the kernel ------------------------------------------------------------------------------------------------------


def test_seed_says_which_noise():
    s = fast.DDPMScheduler(clip_sample=False)
    s.set_timesteps(10)
    x, m, t = normal((3, 2, 4), 0), normal((3, 2, 4), 1), 600
    still = s.step(m, t, x, seed=0).prev_sample - fastgen.randn(x.shape, seed=0, offset=t) * s._get_variance(t) ** 0.5
    for seed in (4, torch.tensor([1, 2, 3])):
        y = s.step(m, t, x, seed=seed).prev_sample
        assert_near(y, still + fastgen.randn(x.shape, seed=seed, offset=t) * s._get_variance(t) ** 0.5)
    alone = s.step(m[1:2], t, x[1:2], seed=torch.tensor([2])).prev_sample
    assert torch.equal(alone, y[1:2])
    with pytest.raises(ValueError, match="generator, seed"):
        s.step(m, t, x, seed=1, generator=torch.Generator())


@pytest.mark.parametrize("name", NAMES)
def test_fused_noise(name):
    s = getattr(fast, name)(rng="fused", clip_sample=False)
    s.set_timesteps(10)
    options = {"eta": 1.0} if "DDIM" in name else {}
    x, m, t = torch.zeros(3, 2, 5000), torch.zeros(3, 2, 5000), s.timesteps[4]

    def step(generator, x=x, m=m, t=t):
        return s.step(m, t, x, generator=generator, **options).prev_sample

    with Dispatched() as ops:
        y = step(torch.Generator().manual_seed(1))
    assert ops.of_fastgen() == 1 and not any("randn" in op for op in ops.counts)
    assert torch.equal(y, step(torch.Generator().manual_seed(1))) and not torch.equal(y, step(torch.Generator().manual_seed(2)))
    variance = s._get_variance(t) if "DDPM" in name else s._get_variance(t, t - 100)
    assert abs((y / variance**0.5).std() - 1) < 0.02 and abs((y / variance**0.5).mean()) < 0.02
    torch.manual_seed(0)
    first, second = step(None), step(None)
    torch.manual_seed(0)
    assert torch.equal(step(None), first) and not torch.equal(first, second)
    # with a generator for each sample, a sample does not depend on its neighbours
    together = step([torch.Generator().manual_seed(i) for i in range(3)])
    pair = step([torch.Generator().manual_seed(i) for i in (2, 1)], x[:2], m[:2])
    assert torch.equal(together[1:], pair.flip(0))
    with pytest.raises(ValueError, match="list of 3"):
        step([torch.Generator(), torch.Generator()])
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    if "DDPM" in name:
        step(generator, t=0)
        assert torch.equal(generator.get_state(), before)


def test_timesteps_of_their_own_for_each_sample():
    for name in NAMES:
        s = getattr(fast, name)()
        s.set_timesteps(10)
        options = {"eta": 1.0} if "DDIM" in name else {}
        x, m = normal((3, 2, 4), 0), normal((3, 2, 4), 1)
        t, seeds = torch.tensor([900, 0, 300]), torch.tensor([4, 5, 6])
        y = s.step(m, t, x, seed=seeds, **options)
        for i in range(3):
            alone = s.step(m[i : i + 1], int(t[i]), x[i : i + 1], seed=seeds[i : i + 1], **options)
            assert torch.equal(y.prev_sample[i : i + 1], alone.prev_sample)
            assert torch.equal(y.pred_original_sample[i : i + 1], alone.pred_original_sample)


def test_timesteps_on_a_device_are_known_by_their_place():
    """What a GPU's timestep is, without asking the GPU: views of `scheduler.timesteps` tell by their storage offset."""
    s = fast.DDPMScheduler()
    s.set_timesteps(10)
    values = fast._remembered.remembered(s).settings.timesteps
    for t, expected in zip(s.timesteps[3:], s.timesteps.tolist()[3:], strict=True):
        position = fast._remembered.position_in(s.timesteps, t)
        assert position is not None and values[position] == expected
    for other in (s.timesteps[3].clone(), s.timesteps.clone()[3], s.timesteps[3].to(torch.int32), s.timesteps.view(torch.int32)[6]):
        assert fast._remembered.position_in(s.timesteps, other) is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("rng", ("exact", "fused"))
@pytest.mark.parametrize("name", NAMES)
def test_no_synchronisation(name, rng):
    s = getattr(fast, name)(rng=rng)
    s.set_timesteps(10, device="cuda")
    options = {"eta": 1.0} if "DDIM" in name else {}
    x, m = normal((3, 2, 4), 0, device="cuda"), normal((3, 2, 4), 1, device="cuda")
    s.step(m, s.timesteps[0], x, **options)
    others = [torch.tensor(t, device="cuda") for t in (900, [900, 0, 300])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in (*s.timesteps, *others):
            s.step(m, t, x, **options)
            s.add_noise(x, m, t)
            s.get_velocity(x, m, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- files, copies, patching --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_of_diffusers(name, tmp_path):
    config = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 77, "prediction_type": "v_prediction"}
    theirs, ours = both(name, None, **config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [(tmp_path / who / "scheduler_config.json").read_text() for who in ("theirs", "ours")]
    assert files[0] == files[1]
    loaded = getattr(fast, name).from_pretrained(tmp_path / "theirs", rng="fused")
    assert (
        loaded.to_json_string() == ours.to_json_string()
        and loaded._fastgen_options.rng == "fused"
        and torch.equal(loaded.betas, theirs.betas)
    )
    assert getattr(diffusers, name).from_pretrained(tmp_path / "ours").to_json_string() == theirs.to_json_string()
    assert getattr(fast, name).from_config(theirs.config).to_json_string() == theirs.to_json_string()
    assert set(ours.compatibles) == set(theirs.compatibles)
    assert isinstance(ours, getattr(diffusers, name)) and repr(ours) == repr(theirs)


def test_saved_pipelines_load_without_fastgen(unet, tmp_path):
    diffusers.DDPMPipeline(unet, fast.DDPMScheduler(num_train_timesteps=50)).save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDPMScheduler and loaded.scheduler.config.num_train_timesteps == 50


@pytest.mark.parametrize("copied", (copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))))
def test_copies(copied):
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)
    with fast.patch():
        for s in both("DDPMScheduler"):
            expected = s.step(m, 500, x, generator=torch.Generator().manual_seed(1)).prev_sample
            other = copied(s)
            assert type(other) is type(s)
            assert torch.equal(other.step(m, 500, x, generator=torch.Generator().manual_seed(1)).prev_sample, expected)
            other.set_timesteps(20)
            changed = type(s)()
            changed.set_timesteps(20)
            y = [q.step(m, 550, x, generator=torch.Generator().manual_seed(1)).prev_sample for q in (other, changed)]
            assert torch.equal(*y)
            assert torch.equal(s.step(m, 500, x, generator=torch.Generator().manual_seed(1)).prev_sample, expected)


def test_patch_serves_what_exists_and_is_undone():
    own = {name: dict(vars(getattr(diffusers, name))) for name in NAMES}
    s = diffusers.DDPMScheduler()
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)
    patch = fast.patch()
    with Dispatched() as ops:
        s.step(m, 500, x)
    assert ops.of_fastgen() == 1
    with fast.patch(rng="fused"), Dispatched() as ops:
        s.step(m, 500, x)
    assert ops.of_fastgen() == 1 and not any("randn" in op for op in ops.counts)
    patch.unpatch()
    assert all(dict(vars(getattr(diffusers, name))) == own[name] for name in NAMES)
    with Dispatched() as ops:
        s.step(m, 500, x)
    assert ops.of_fastgen() == 0


def test_patch_says_what_it_covers(caplog):
    noising = ["add_noise", "get_velocity"]
    covered = [f"{name}.{method}" for name in NAMES for method in (*noising, "step")]
    covered.insert(6, "DDPMParallelScheduler.batch_step_no_noise")
    with caplog.at_level(logging.INFO, "fastgen.drop_in"), fast.patch() as outer:
        assert sorted(outer.covered) == sorted(covered) and not outer.skipped
        assert caplog.messages == ["10 of 10 methods of diffusers' schedulers run on fastgen"]
        with fast.patch() as inner:  # what has been patched is known by what it was
            assert inner.covered == outer.covered


def strange_previous_timestep(self, timestep):
    """As diffusers up to 0.31 has it, where the spacing is not "leading" too."""
    return timestep - self.config.num_train_timesteps // self.num_inference_steps


@pytest.fixture
def other_diffusers(monkeypatch):
    """A release with another method, which was there when the drop-in was imported."""

    def have(base, name, method):
        monkeypatch.setattr(base, name, method)
        if name in fast._covered.REPLACED_BY_TABLES:
            monkeypatch.setitem(fast._covered.IMPORTED_METHODS[base], name, method)

    return have


def linspaced(scheduler, **options):
    scheduler.set_timesteps(7)
    return chain(scheduler, normal((2, 3, 4), 0), generator=torch.Generator().manual_seed(1), **options)


def test_patch_leaves_code_alone_that_is_not_known(other_diffusers, caplog):
    base = diffusers.DDPMScheduler
    other_diffusers(base, "previous_timestep", strange_previous_timestep)
    scheduler, step = base(timestep_spacing="linspace"), vars(base)["step"]
    expected = linspaced(scheduler)
    with caplog.at_level(logging.INFO, "fastgen.drop_in"), fast.patch() as patch:
        why = f"the tests have not run the code of DDPMScheduler's previous_timestep in diffusers {diffusers.__version__}"
        assert patch.skipped == {"DDPMScheduler.step": why} and len(patch.covered) == 9
        assert caplog.messages == [f"9 of 10 methods of diffusers' schedulers run on fastgen; not step: {why}"]
        assert vars(base)["step"] is step
        torch.testing.assert_close(linspaced(scheduler), expected, rtol=0, atol=0)
        with Dispatched() as ops:
            scheduler.add_noise(normal((2, 3), 0), normal((2, 3), 1), torch.tensor([1, 2]))
            diffusers.DDPMParallelScheduler().step(normal((2, 3), 0), 5, normal((2, 3), 1))
        assert ops.of_fastgen() == 2


def test_a_subclass_of_code_that_is_not_known_runs_it_and_warns(other_diffusers, caplog):
    base = diffusers.DDPMScheduler
    other_diffusers(base, "previous_timestep", strange_previous_timestep)
    subclass = fast._classes.subclass_of(base)
    with caplog.at_level(logging.WARNING, "fastgen.drop_in"):
        made = [subclass(timestep_spacing="linspace", rng=rng) for rng in ("exact", "fused")]
    (message,) = caplog.messages  # once
    assert message.startswith("fastgen.drop_in.diffusers.DDPMScheduler.step is diffusers' own: the tests have not run the code of")
    expected = linspaced(base(timestep_spacing="linspace"))
    for scheduler in made:
        with Dispatched() as ops:
            results = linspaced(scheduler)
        assert ops.of_fastgen() == 0
        torch.testing.assert_close(results, expected, rtol=0, atol=0)
    x = normal((2, 3, 4), 0)
    with pytest.raises(ValueError, match="seed: expected None where fastgen does not cover the step .*previous_timestep"):
        made[0].step(x, int(made[0].timesteps[1]), x, seed=1)
    assert inspect.signature(made[0].step) == inspect.signature(base().step)  # which pipelines look at
    with Dispatched() as ops:
        made[0].get_velocity(x, x, torch.tensor([1, 2]))
    assert ops.of_fastgen() == 1


@pytest.mark.parametrize("name", ["step", "add_noise", "get_velocity"])
def test_what_another_library_has_put_in_a_methods_place_stays(monkeypatch, name):
    written = getattr(diffusers.DDIMScheduler, name)
    other = functools.wraps(written)(lambda self, *arguments, **keywords: written(self, *arguments, **keywords))
    monkeypatch.setattr(diffusers.DDIMScheduler, name, other)
    with fast.patch() as patch:
        assert [*patch.skipped] == [f"DDIMScheduler.{name}"] and getattr(diffusers.DDIMScheduler, name) is other
    changed = types.FunctionType(written.__code__, written.__globals__, name, tuple(written.__defaults__ or ()) + (None,))
    monkeypatch.setattr(diffusers.DDIMScheduler, name, changed)  # the same text with other defaults
    with fast.patch() as patch:
        assert [*patch.skipped] == [f"DDIMScheduler.{name}"]


def test_a_subclass_that_wraps_a_patched_method_keeps_its_own():
    """functools.wraps gives its method the patch's mark too; it is the user's all the same, in force and after."""
    with fast.patch():

        class Doubled(diffusers.DDPMScheduler):
            @functools.wraps(diffusers.DDPMScheduler.step)
            def step(self, *arguments, **keywords):
                return 2 * super().step(*arguments, return_dict=False, **keywords)[0]

    x, m, scheduler = normal((2, 3, 4), 0), normal((2, 3, 4), 1), Doubled()
    scheduler.set_timesteps(10)

    def step():
        with Dispatched() as ops:
            return scheduler.step(m, scheduler.timesteps[3], x, generator=torch.Generator().manual_seed(1)), ops.of_fastgen()

    expected, kernels = step()
    assert kernels == 0
    with fast.patch() as patch:
        assert not patch.skipped
        found, kernels = step()
        assert kernels == 1
    assert_near(found, expected)
    assert step()[1] == 0


@pytest.mark.parametrize("randomness", ["different", "same", "error"])
def test_fused_noise_under_vmap(randomness):
    scheduler, x = fast.DDPMScheduler(rng="fused"), torch.zeros(3, 2, 4)
    scheduler.set_timesteps(10)
    mapped = torch.func.vmap(lambda x: scheduler.step(x, scheduler.timesteps[3], x).prev_sample, randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="random"):
            mapped(x)
    else:
        assert len(mapped(x).flatten(1).unique(dim=0)) == {"different": 3, "same": 1}[randomness]


def test_changes_are_noticed():
    theirs, ours = both("DDPMScheduler")
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)

    def same(t):
        a, b = (s.step(m, t, x, generator=torch.Generator().manual_seed(1)) for s in (theirs, ours))
        assert_near(b.prev_sample, a.prev_sample)
        assert_near(ours.add_noise(x, m, torch.tensor([t, t])), theirs.add_noise(x, m, torch.tensor([t, t])))

    def change(action):
        for s in (theirs, ours):
            action(s)

    same(500)
    change(lambda s: s.set_timesteps(20))
    same(550)
    change(lambda s: s.register_to_config(clip_sample_range=0.3))
    same(550)
    change(lambda s: s.alphas_cumprod.mul_(0.9))
    same(550)
    change(lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**2))
    same(550)
    change(lambda s: setattr(s, "timesteps", torch.tensor([900, 550, 300])))
    same(550)
    change(lambda s: s.timesteps.copy_(torch.tensor([900, 550, 200])))
    same(550)
    change(lambda s: setattr(s, "num_inference_steps", None))
    same(549)
    change(lambda s: setattr(s, "one", torch.tensor(0.999)))
    change(lambda s: setattr(s, "timesteps", torch.tensor([900, 550])))
    change(lambda s: setattr(s, "num_inference_steps", 2))
    same(550)
    change(lambda s: setattr(s, "_get_variance", lambda t, **_: torch.tensor(4.0)))
    same(900)


def test_final_alpha_is_watched():
    theirs, ours = both("DDIMScheduler", clip_sample=False)
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)
    for value in (1.0, 0.99999, 0.9999):
        for s in (theirs, ours):
            s.final_alpha_cumprod.fill_(value)
        assert_near(ours.step(m, 0, x).prev_sample, theirs.step(m, 0, x).prev_sample)


def test_settings_are_shared_and_tables_bounded():
    first, second, other = fast.DDIMScheduler(), fast.DDIMScheduler(), fast.DDIMScheduler(beta_end=0.03)
    for s in (first, second, other):
        s.set_timesteps(10)
    settings = fast._remembered.remembered(first).settings
    assert fast._remembered.remembered(second).settings is settings and fast._remembered.remembered(other).settings is not settings
    first.set_timesteps(20)
    assert fast._remembered.remembered(first).settings is not settings
    first.set_timesteps(10)
    assert fast._remembered.remembered(first).settings is settings
    x = normal((2, 3, 4), 0)
    for k in range(2 * fast._settings.MOST_TABLES):
        first.step(x, 500, x, eta=k / 1000)
    assert len(settings.kept) <= fast._settings.MOST_TABLES and len(first._fastgen.short_ways) <= fast._settings.MOST_TABLES
    for k in range(2 * fast._settings.MOST_SETTINGS):
        fast.DDPMScheduler(beta_end=0.01 + k / 1e5)
    assert len(fast._settings._shared) <= fast._settings.MOST_SETTINGS


# ---- what is not covered ------------------------------------------------------------------------------------------------------


class Warmer(diffusers.DDPMScheduler):
    def _get_variance(self, *arguments, **keywords):
        return 2 * super()._get_variance(*arguments, **keywords)


def test_what_is_not_covered_runs_diffusers_own_code_and_says_so(caplog):
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)

    def fell_through(step, expected, words):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "fastgen.drop_in"), Dispatched() as ops:
            y = step()
        assert ops.of_fastgen() == 0 and words in caplog.text
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)

    def drawn(s, *arguments, **options):
        return s.step(*arguments, generator=torch.Generator().manual_seed(1), **options).prev_sample

    warm = Warmer()
    expected = drawn(warm, m, 500, x)
    with fast.patch():
        fell_through(lambda: drawn(warm, m, 500, x), expected, "Warmer has a _get_variance of its own")
    theirs, ours = both("DDPMScheduler", None, variance_type="learned")
    two = torch.cat([m, m.abs()], dim=1)
    fell_through(lambda: drawn(ours, two, 500, x), drawn(theirs, two, 500, x), "variance_type is 'learned'")
    with pytest.raises(ValueError, match="seed: expected None where fastgen does not cover"):
        ours.step(two, 500, x, seed=1)
    theirs, ours = both("DDPMScheduler", None, rescale_betas_zero_snr=True)
    fell_through(lambda: drawn(ours, m, 999, x), drawn(theirs, m, 999, x), "not finite")
    theirs, ours = both("DDPMScheduler", None, clip_sample_range=float("inf"))
    with Dispatched() as ops:
        assert_near(drawn(ours, m, 500, x), drawn(theirs, m, 500, x))
    assert ops.of_fastgen() == 1
    theirs, ours = both("DDIMScheduler")
    for s in (theirs, ours):
        s.timesteps = s.timesteps.tolist()
    fell_through(lambda: drawn(ours, m, 500, x), drawn(theirs, m, 500, x), "timesteps is no tensor")
    z = normal((2, 3, 4), 2, torch.float64)
    options = {"eta": 0.5, "variance_noise": z}
    theirs, ours = both("DDIMScheduler")
    expected = theirs.step(m, 500, x, **options).prev_sample
    fell_through(lambda: ours.step(m, 500, x, **options).prev_sample, expected, "variance_noise of torch.float64")
    theirs, ours = both("DDPMScheduler", None)
    fell_through(lambda: drawn(ours, m[:1], 500, x), drawn(theirs, m[:1], 500, x), "shapes")
    t = torch.tensor([3, 4])
    fell_through(lambda: ours.add_noise(x, m.double(), t), theirs.add_noise(x, m.double(), t), "dtypes")
    fell_through(lambda: ours.add_noise(x, m[:1], t), theirs.add_noise(x, m[:1], t), "shapes")
    sparse = x.to_sparse()
    fell_through(lambda: ours.add_noise(sparse, sparse, t), theirs.add_noise(sparse, sparse, t), "layouts")
    theirs, ours = both("DDPMScheduler")
    t = torch.tensor([[500]])  # where diffusers takes the first timestep for it
    fell_through(lambda: drawn(ours, m, t, x), drawn(theirs, m, t, x), "a timestep of shape (1, 1)")
    theirs, ours = both("DDIMScheduler", 5, num_train_timesteps=5, trained_betas=[0.0] * 5)
    fell_through(lambda: drawn(ours, m, 3, x), drawn(theirs, m, 3, x), "not finite")
    theirs, ours = both("DDPMScheduler", None)
    t = torch.tensor([3, 4])
    fell_through(lambda: ours.get_velocity(x, m, t - 10), theirs.get_velocity(x, m, t - 10), "expected timesteps within")
    theirs, ours = both("DDIMScheduler")
    z = normal((1, 3, 4), 2)
    options = {"eta": 0.5, "variance_noise": z}
    expected = theirs.step(m, 500, x, **options).prev_sample
    fell_through(lambda: ours.step(m, 500, x, **options).prev_sample, expected, "variance_noise")


def test_a_step_that_is_not_covered_leaves_the_noising_covered():
    x, noise, t = normal((2, 3, 4), 0), normal((2, 3, 4), 1), torch.tensor([3, 400])
    schedulers = [both("DDPMScheduler", None, variance_type=kind) for kind in ("learned", "mine")]
    schedulers += [(Warmer(), Warmer()), both("DDIMScheduler", None, clip_sample_range=-1.0)]
    schedulers.append(both("DDPMParallelScheduler"))
    for s in schedulers[-1]:
        s.timesteps = s.timesteps.tolist()
    for theirs, ours in schedulers:
        expected = theirs.add_noise(x, noise, t), theirs.get_velocity(x, noise, t)
        with fast.patch(), Dispatched() as ops:
            results = ours.add_noise(x, noise, t), ours.get_velocity(x, noise, t)
        assert ops.of_fastgen() == 2
        for y, z in zip(results, expected, strict=True):
            assert_near(y, z)
    theirs, ours = both("DDPMScheduler")
    for s in (theirs, ours):
        s.alphas_cumprod.requires_grad_()
    with Dispatched() as ops:
        assert ours.add_noise(x, noise, t).requires_grad and ops.of_fastgen() == 0


def test_variance_noise():
    theirs, ours = both("DDIMScheduler")
    x, m, z = normal((2, 3, 4), 0), normal((2, 3, 4), 1), normal((2, 3, 4), 2)
    with Dispatched() as ops:
        y = ours.step(m, 500, x, eta=0.5, variance_noise=z).prev_sample
    assert ops.of_fastgen() == 1
    assert_near(y, theirs.step(m, 500, x, eta=0.5, variance_noise=z).prev_sample)


@pytest.mark.parametrize(
    "call",
    [
        lambda s, x: s.step(x, 501, x),  # not among the timesteps
        lambda s, x: s.step(x, torch.tensor(1000), x),
        lambda s, x: s.step(x[:, :1, :2], 500, x),
        lambda s, x: s.step("x", 500, x),
        lambda s, x: s.add_noise(x, x, torch.tensor([0, 1000])),
        lambda s, x: s.add_noise(x, x, torch.tensor([0, 1, 2])),
        lambda s, x: s.set_timesteps(2000),
        lambda s, x: type(s)(beta_schedule="none"),
    ],
)
def test_errors_are_those_of_diffusers(call):
    raised = []
    for s in both("DDPMScheduler"):
        with pytest.raises(Exception) as error:  # noqa: PT011
            call(s, normal((2, 3, 4), 0))
        raised.append(type(error.value))
    assert raised[0] is raised[1]


def test_options_are_checked():
    for make in (fast.patch, fast.DDPMScheduler):
        with pytest.raises(ValueError, match="rng: expected one of 'exact', 'fused', 'torch-cuda', got 'fast'"):
            make(rng="fast")
        with pytest.raises(TypeError, match="float32_coefficients: expected a bool, got int"):
            make(float32_coefficients=1)
    assert "_fastgen" not in vars(diffusers.DDPMScheduler())


def test_a_nan_stays_where_it_is():
    """In the sample, of which the prediction of x0 knows nothing, it is no part of the quantile."""
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1) * 2
    x[0, 1, 2] = torch.nan
    theirs, ours = both("DDPMScheduler", prediction_type="sample", thresholding=True)
    with Dispatched() as ops:
        a, b = (s.step(m, 500, x, generator=torch.Generator().manual_seed(1)).prev_sample for s in (theirs, ours))
    assert ops.of_fastgen() == 1 and torch.equal(a.isnan(), b.isnan()) and a.isnan().sum() == 1
    assert_near(b.nan_to_num(), a.nan_to_num())


# ---- torch.compile ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"thresholding": True}], ids=["clipped", "thresholded"])
@pytest.mark.parametrize("source", ("exact", "fused", "seed"))
@pytest.mark.parametrize("name", ("DDPMScheduler", "DDIMScheduler"))
def test_compiled_steps_have_no_graph_breaks(name, source, config):
    torch._dynamo.reset()
    s = getattr(fast, name)(rng="fused" if source == "fused" else "exact", clip_sample_range=0.9, **config)
    s = copy.deepcopy(s)
    options = {"seed": torch.tensor([3, 4])} if source == "seed" else {}
    options |= {"eta": 0.5} if "DDIM" in name else {}
    compiled = torch.compile(lambda m, t, x: s.step(m, t, x, **options).prev_sample, fullgraph=True, backend="aot_eager")
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)
    for steps in (10, 20, *[10] * 12):  # the same state again and again: not compiled again
        s.set_timesteps(steps)
        if steps == 20:
            s.register_to_config(clip_sample_range=0.5)
        for t in s.timesteps[3:5]:
            torch.manual_seed(0)
            y = compiled(m, t, x)
            torch.manual_seed(0)
            expected = s.step(m, t, x, **options).prev_sample
            if source == "fused":  # a seed drawn in the graph is another one
                assert torch.isfinite(y).all() and not torch.equal(y, compiled(m, t, x))
            else:
                assert_near(y, expected)


def test_compiled_noising_has_no_graph_breaks():
    torch._dynamo.reset()
    s = fast.DDPMParallelScheduler()
    s.set_timesteps(10)
    x, m, t = normal((2, 3, 4), 0), normal((2, 3, 4), 1), torch.tensor([900, 100])
    for method in (s.add_noise, s.get_velocity, s.batch_step_no_noise):
        last = (m, t) if method != s.batch_step_no_noise else (t, m)
        compiled = torch.compile(lambda x, a, b, method=method: method(x, a, b), fullgraph=True, backend="aot_eager")
        assert_near(compiled(x, *last), method(x, *last))


@pytest.mark.parametrize("dynamic", (None, True))
@pytest.mark.parametrize("name", NAMES)
def test_one_program_for_all_of_a_schedulers_methods(name, dynamic):
    """For every timestep, tensor or int, and of two schedulers: tables that the program is the first to ask for."""
    torch._dynamo.reset()
    s = getattr(fast, name)(beta_end=0.0123 if dynamic else 0.0124)
    other = fast.DDIMScheduler(beta_end=0.0125, thresholding=True)
    s.set_timesteps(10)
    other.set_timesteps(10)

    def step(x, m, t):
        y = s.add_noise(x, m, t) + s.get_velocity(x, m, t) if isinstance(t, torch.Tensor) else x
        y = s.step(m, t, y, seed=3).prev_sample
        return other.step(m, t, other.step(m, t, y, eta=0.5, seed=4).prev_sample).prev_sample

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)
    for t in [*range(900, -1, -100), *s.timesteps]:
        assert_near(compiled(x, m, t), step(x, m, t))
    assert counter.frame_count <= 7


@pytest.mark.parametrize("dynamic", (None, True))
def test_compiled_etas_and_infinite_coefficients(dynamic):
    """A program for each eta; where a row is infinite, an int timestep is looked at, and diffusers' own step is compiled."""
    torch._dynamo.reset()
    s = fast.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    s.set_timesteps(10)
    step = lambda m, t, x, eta: s.step(m, t, x, eta=eta).prev_sample  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, t, eta in ((2, 899, 0.0), (2, 999, 0.0), (3, 799, 0.0), (2, 899, 0.3), (4, 899, 0.6)):
        x, m = normal((batch, 3, 4), 0), normal((batch, 3, 4), 1)
        results = []
        for f in (compiled, step):
            torch.manual_seed(0)
            results.append(f(m, t, x, eta))
        assert torch.isfinite(results[0]).all()
        assert_near(*results)


@pytest.mark.parametrize("patched_first", (True, False))
def test_compiled_under_a_patch(patched_first):
    torch._dynamo.reset()
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)
    s = diffusers.DDPMScheduler()
    if not patched_first:
        s.set_timesteps(10)
    with fast.patch():
        s.set_timesteps(10)
        compiled = torch.compile(lambda m, t, x: s.step(m, t, x, seed=4).prev_sample, fullgraph=True, backend="aot_eager")
        for t in s.timesteps[4:6]:
            assert_near(compiled(m, t, x), s.step(m, t, x, seed=4).prev_sample)


# ---- odd circumstances --------------------------------------------------------------------------------------------------------


def test_modes_and_default_devices():
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)
    expected = both("DDPMScheduler")[0].step(m, 500, x, generator=torch.Generator().manual_seed(1)).prev_sample
    s = fast.DDPMScheduler()
    for mode in (torch.device("meta"), torch.inference_mode(), torch.no_grad()):
        with mode:
            if not isinstance(mode, torch.device):
                s = fast.DDPMScheduler()
            s.set_timesteps(10, device="cpu")
            y = [s.step(m, t, x, generator=torch.Generator().manual_seed(1)).prev_sample for t in (500, s.timesteps[4])]
        assert_near(y[0], expected)
        assert_near(s.step(m, s.timesteps[4], x, generator=torch.Generator().manual_seed(1)).prev_sample, y[1])


@pytest.mark.parametrize("layout", ("channels_last", "transposed", "sliced", "empty"))
def test_layouts(layout):
    x, m = normal((2, 3, 4, 5), 0), normal((2, 3, 4, 5), 1)
    if layout == "empty":
        x, m = x[:0], m[:0]
    else:
        x, m = LAYOUTS[layout](x), LAYOUTS[layout](m)
    for name in NAMES:
        a, b = (s.step(m, s.timesteps[3], x, generator=torch.Generator().manual_seed(1)).prev_sample for s in both(name))
        assert b.shape == a.shape and (x.numel() == 0 or torch.allclose(a, b, atol=1e-4))


def test_methods_replaced_on_the_class_of_diffusers(monkeypatch):
    x, m = normal((2, 3, 4), 0), normal((2, 3, 4), 1)
    monkeypatch.setattr(diffusers.DDPMScheduler, "_get_variance", lambda self, t, **_: torch.tensor(4.0))
    a, b = (s.step(m, 500, x, generator=torch.Generator().manual_seed(1)).prev_sample for s in both("DDPMScheduler"))
    assert torch.equal(a, b)


def test_threads_may_share_a_scheduler():
    s = fast.DDPMScheduler(rng="fused")
    s.set_timesteps(10)
    x, m = normal((2, 3, 64), 0), normal((2, 3, 64), 1)
    expected = [s.step(m, 500, x, generator=torch.Generator().manual_seed(i)).prev_sample for i in range(8)]
    other = fast.DDPMScheduler(rng="fused")
    other.set_timesteps(10)
    results = in_threads(8, lambda i: other.step(m, 500, x, generator=torch.Generator().manual_seed(i)).prev_sample)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of_each", [False, True])
def test_torch_draws_no_noise_itself(name, of_each):
    """The kernels do, of so many elements: the very numbers, as the other tests of this file have it."""
    if torch_noise.arithmetic(torch.float32) is None:
        pytest.skip("the kernels do not make this torch's numbers")
    s = getattr(fast, name)()
    s.set_timesteps(10)
    options = {"eta": 1.0} if name == "DDIMScheduler" else {}
    x, m = normal((2, 3, 4000), 0), normal((2, 3, 4000), 1)
    generator = [torch.Generator(), torch.Generator()] if of_each else None
    for t in s.timesteps[:3]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            x = s.step(m, t, x, generator=generator, **options).prev_sample
        called = {event.key for event in profile.key_averages()}
        assert not called & {"aten::randn", "aten::normal_"}
        assert called & {"fastgen::torch_randn", "fastgen::ddpm_step_torch_plain"}
