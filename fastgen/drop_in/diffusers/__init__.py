"""diffusers' DDPMScheduler, DDPMParallelScheduler and DDIMScheduler on fastgen: `step`, `add_noise`, `get_velocity` in one launch.

Two ways to have them:

    from fastgen.drop_in.diffusers import DDPMScheduler      # a subclass of diffusers' own, for new code
    fastgen.drop_in.diffusers.patch()                        # diffusers' own classes, for code as it is; or `with patch():`

By default the numbers are diffusers' to rounding: its float32 cumulative products and order of operations decide the coefficients,
the same `generator` (or list of them) gives the same noise, none is drawn at timestep 0, results have the same dtypes. Each result
is computed in float32 (float64 for float64) and rounded once, where diffusers rounds half precision after every operation.

Beyond diffusers:

- `rng="fused"`, a keyword of the classes and of `patch`: noise is made in the kernel, from a seed that is drawn from `generator`
  (one for each sample from a list of them), so no noise tensor exists. Other numbers than diffusers', of the same distribution.
- `rng="torch-cuda"`: the noise is, on any device, what diffusers would draw on a CUDA GPU. It comes from a
  `fastgen.TorchCudaGenerator`, or a list of them, as `generator`, which knows the seed, the GPU and how far the stream has come.
  One that is seeded like a `torch.Generator("cuda")` there gives the noise of the same steps in the same order, to some 1e-6.
  No other generator is taken but torch's own on a CUDA GPU, nor None, so that no other noise is drawn in silence. The sample
  that a chain begins with comes from it too: `latents=generator.randn(shape)`. With another `rng` such a generator is taken as
  well, and decides.
- `step(..., seed=)`: an int, or int64 tensor of 1 or B elements, one seed per sample. The noise is then
  `fastgen.randn(sample.shape, seed=seed, offset=timestep)`, whatever `rng` is.
- `step` takes a tensor of B timesteps, one per sample, and samples of any shape (B, ...).
- No timestep is read back from a GPU. Of a 0-dimensional one that is an element of `scheduler.timesteps` the value is known all the
  same; of another one it is not, so with it noise is drawn at timestep 0 too (and not used), and a timestep that the scheduler
  does not visit makes its sample NaN.
- `step` compiles with `torch.compile(fullgraph=True)`, after `set_timesteps`, but without `generator=`, which torch cannot trace.
  No timestep's value is known then, but whether an int is 0. It makes a program for each `eta`, and sees a changed `alphas_cumprod`
  only after another `set_timesteps`.
- `float32_coefficients=True`: `add_noise` and `get_velocity` of half-precision samples use float32 coefficients. diffusers rounds ᾱ
  to the samples' dtype first; in bfloat16, 1 − ᾱ is then 0 for the default first 10 timesteps: no noise is added.

What is not covered (variance type "learned", where the network's output is the variance itself and the kernel takes its logarithm;
an infinite coefficient, a subclass with another variance, other shapes, gradients through dynamic thresholding) runs diffusers' own
code and says so at level DEBUG of the logger "fastgen.drop_in". In those cases `seed=` and a `fastgen.TorchCudaGenerator` raise
ValueError. `add_noise` and `get_velocity` are covered where only the reverse step is not.

Nor is a method covered whose code, or that of the methods which it calls, the tests have not run: another release of diffusers may
compute something else. `_known_code.py` names the releases that they have run, and what each method's code was. Anything else
keeps diffusers' own code: `patch` leaves it alone and says so (`Patch.skipped`, and a line of level INFO), and the subclasses call
it, which they say in a line of level WARNING when the first scheduler of a class is made; so results never change in silence. The
code is looked at by `patch()` and when this module is imported, not at a step.

A scheduler is looked at again when one of its attributes has been replaced, or a tensor among them changed in place (so the value
of a timestep that is an element of `scheduler.timesteps` is known without reading it); but not after writing through `.data` or
`.numpy()`, or to a tensor made in inference mode, nor when a method of its class has been replaced: then
call `set_timesteps` again.

Known to differ: half-precision results stay so where a timestep of shape (1,), or `batch_step_no_noise`, makes diffusers' float32;
where an element of the sample or of the model's output is infinite or NaN, or overflows on the way, the result may be another of
NaN, infinite and clipped, since diffusers' formulas read and cancel other terms.
"""

# Read in this order, each of which imports only from those before it: _known_code, _covered, _coefficients, _settings, _remembered,
# _torch_cuda, _noise, _arguments, _short_way, _step, _methods, _classes.
from ._classes import DDIMScheduler, DDPMParallelScheduler, DDPMScheduler, patch

__all__ = ["DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "patch"]
