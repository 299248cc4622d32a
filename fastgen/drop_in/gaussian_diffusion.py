"""The `GaussianDiffusion` of denoising-diffusion-pytorch, and that of guided-diffusion and improved-diffusion."""

from __future__ import annotations

from . import _denoising_diffusion_pytorch, _guided_diffusion
from ._gaussian import patched
from ._patch import Patch, check_rng


def patch(obj_or_class, *, rng="exact") -> Patch:
    """Makes a `GaussianDiffusion`, or all of a class, take fastgen's kernels for what is not the network:

    - of denoising-diffusion-pytorch (2.3): q_sample, q_posterior, p_mean_variance, p_sample, ddim_sample, p_losses, and so sample()
      and the training step that call them;
    - of guided-diffusion (that of improved-diffusion, its SpacedDiffusion, and other copies with the same methods): q_sample,
      q_posterior_mean_variance, p_mean_variance, p_sample, ddim_sample.

    Which of the two it is, the methods tell. The patch is in force at once, until `unpatch()` or the end of a `with` block:

        with fastgen.drop_in.gaussian_diffusion.patch(diffusion):
            images = diffusion.sample(batch_size=16)

    Args:
        obj_or_class: an instance, or a class, whose subclasses are then patched too where they do not override.
        rng: "exact" draws noise as the library does, the same numbers in the same order; "fused" makes it inside the kernels, from
            a seed that torch's default CPU generator gives, and never stores it: faster, and other numbers.

    Results are the library's to rounding, with its shapes, dtypes, gradients and conventions: its clipping to ±1, no noise at
    t = 0, its log-variance there, what is drawn and not used. Coefficients are read from the object's own buffers or arrays, and
    again when a buffer is replaced or written to (`load_state_dict`, `.to`, `.half`), or an array replaced; an array changed in
    place is not noticed. Nothing is added to the object's buffers or state_dict. A deep copy of a patched instance is patched for
    good; a pickled one is not. For `torch.nn.DataParallel`, patch the class.

    What is not covered runs the original and says so in the log "fastgen.drop_in" at level DEBUG: methods with other arguments or
    in classes that override a formula, `denoised_fn`, `cond_fn`, networks that predict the previous x, tensors that are not dense
    and floating, noise of another shape, t of another kind. In a program under `torch.compile` the originals are what is compiled,
    covered or not, and nothing says so, since nothing can be logged there.

    Raises TypeError for an object of neither kind, ValueError for another rng. A timestep in a tensor outside the object's is an
    error of fastgen's, a ValueError on the CPU.

    Sources: denoising_diffusion_pytorch 2.3.4; guided_diffusion/gaussian_diffusion.py of github.com/openai/guided-diffusion.
    """
    check_rng(rng)
    for library in (_denoising_diffusion_pytorch, _guided_diffusion):
        if all(hasattr(obj_or_class, name) for name in library.MARKS):
            return patched(obj_or_class, library.METHODS, library.MARKS[0], rng)
    marks = " or ".join(", ".join(library.MARKS) for library in (_denoising_diffusion_pytorch, _guided_diffusion))
    raise TypeError(f"obj_or_class: expected a GaussianDiffusion with the methods {marks}, got {obj_or_class!r:.200}")
