"""The `GaussianDiffusion` of denoising-diffusion-pytorch, and that of guided-diffusion, improved-diffusion and DiT."""

from __future__ import annotations

from typing import Literal

from . import _denoising_diffusion_pytorch, _guided_diffusion
from ._gaussian import patched
from ._patch import Patch, check_rng


def patch(obj_or_class: object, *, rng: Literal["exact", "fused"] = "exact") -> Patch:
    """Makes a `GaussianDiffusion`, or all of a class, take fastgen's kernels for what is not the network:

    - of denoising-diffusion-pytorch, its `GaussianDiffusion1D` too: q_sample, q_posterior, p_mean_variance, p_sample, ddim_sample,
      p_losses, and so sample() and the training step that call them; of its `LearnedGaussianDiffusion` q_sample, q_posterior and
      p_losses, the hybrid loss;
    - of guided-diffusion, improved-diffusion and DiT (their SpacedDiffusion, and copies): q_sample, q_posterior_mean_variance,
      p_mean_variance, p_sample, ddim_sample; `denoised_fn` and `cond_fn` with a kernel more each; training_losses of every type,
      _vb_terms_bpd, _prior_bpd and calc_bpd_loop.

    Which of the two kinds it is, the methods tell. The patch is in force at once, until `unpatch()` or the end of a `with` block:

        with fastgen.drop_in.gaussian_diffusion.patch(diffusion) as p:
            images = diffusion.sample(batch_size=16)
        print(p)  # 6 of 6 methods of GaussianDiffusion run on fastgen

    Replaced is a method only if its code is known, and that of the methods that it calls on the way: by a fingerprint of their
    source, with defaults and helpers, and the tests have run on each (`tools/known_code.py`, last with torch 2.13 on 2026-11-24):

    - denoising-diffusion-pytorch 1.0.0 … 2.3.4: all but p_losses before 1.6.4, of `LearnedGaussianDiffusion` before 2.3.0, and
      ddim_sample before 1.1.1, of `GaussianDiffusion1D` before 1.0.7. The tests have run with 1.0.0, 1.0.7, 1.1.1, 1.2.2, 1.4.6,
      1.5.4, 1.5.8, 1.6.4, 1.8.7, 1.8.15, 1.10.17, 2.0.0, 2.0.18, 2.2.0, 2.2.3, 2.2.6, 2.3.0, 2.3.2 and 2.3.4, in which is all of
      this code;
    - guided-diffusion at 22e0df8, improved-diffusion at 1bc7bbb, DiT at ed81ce2: all of the above.

    What is not known, a fork's or a subclass's own or one without a source, keeps its code: `p.skipped` names it and why, as does a
    line of level INFO of the log "fastgen.drop_in". motion-diffusion-model, which paints inside p_mean_variance, has q_sample and
    q_posterior_mean_variance on fastgen and the rest its own.

    Args:
        obj_or_class: an instance, or a class, whose subclasses are then patched too where they do not override.
        rng: "exact" draws noise as the library does, the same numbers in the same order; "fused" makes it inside the kernels, from
            a seed that torch's default CPU generator gives, and never stores it: faster, and other numbers.

    Results are the library's to rounding, with its shapes, dtypes, gradients and conventions: its clipping to ±1, no noise at
    t = 0, its log-variance there, what is drawn and not used; at t = 0 of the bound its approximation of Φ, and no probability
    below 1e-12 (1e-15 in denoising-diffusion-pytorch), with float32's rounding of what is near 1 in front of the logarithm.
    DDIM's coefficients are rounded once, where the libraries subtract in float32: a chain ends up to ten times nearer to
    float64. Coefficients are read from the object's own buffers or arrays, and again when a buffer is replaced or written to
    (`load_state_dict`, `.to`, `.half`), or an array replaced; an array changed in place is not noticed. Nothing is added to the
    object's buffers or state_dict. A deep copy of a patched instance is patched for good; a pickled one is not. For
    `torch.nn.DataParallel`, patch the class.

    What a kernel does not take runs the original and says so in that log at level DEBUG: subclasses that override a formula,
    networks that predict the previous x, losses of half-precision data, tensors that are not dense and floating, noise of
    another shape, t of another kind, a condition on float64 data. In a program under `torch.compile` the originals are what is
    compiled, covered or not, and nothing says so, since nothing can be logged there.

    Raises TypeError for an object of neither kind, ValueError for another rng. A timestep in a tensor outside the object's is an
    error of fastgen's, a ValueError on the CPU.

    Sources: denoising_diffusion_pytorch; gaussian_diffusion.py and respace.py of github.com/openai/guided-diffusion,
    openai/improved-diffusion and facebookresearch/DiT.
    """
    check_rng(rng)
    for library in (_denoising_diffusion_pytorch, _guided_diffusion):
        if all(hasattr(obj_or_class, name) for name in library.MARKS):
            return patched(obj_or_class, library.METHODS, rng)
    marks = " or ".join(", ".join(library.MARKS) for library in (_denoising_diffusion_pytorch, _guided_diffusion))
    raise TypeError(f"obj_or_class: expected a GaussianDiffusion with the methods {marks}, got {obj_or_class!r:.200}")
