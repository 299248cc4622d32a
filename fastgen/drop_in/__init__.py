"""Adapters: what other libraries' users already run, made fast by one import. Each is a module of its own, imported on demand:

- `fastgen.drop_in.diffusers`: DDPMScheduler, DDPMParallelScheduler, DDIMScheduler; in `fastgen.drop_in.diffusers.vae` the
  posterior of its autoencoders
- `fastgen.drop_in.gaussian_diffusion`: the `GaussianDiffusion` of denoising-diffusion-pytorch and of guided-diffusion
- `fastgen.drop_in.losses`: torch.nn's binary cross entropy with logits, torchgan's minimax losses
"""
