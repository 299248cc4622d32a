"""The code of diffusers that the tests of `fastgen.drop_in.diffusers` have run; written by tools/diffusers_matrix.py."""

RELEASES = {  # how many tests passed, and when
}
KNOWN = {
    "DDPMScheduler.add_noise": ("6141087bc18f6a15",),
    "DDPMScheduler.get_velocity": ("b80044f3dfdb1249",),
    "DDPMScheduler.step": ("0514e6fa6450b39e",),
    "DDPMScheduler._get_variance": ("b8e2caf98de1d929",),
    "DDPMScheduler.previous_timestep": ("4ae32dffa69bd372",),
    "DDPMScheduler._threshold_sample": ("b3b3440dad96f700",),
    "DDPMParallelScheduler.add_noise": ("6141087bc18f6a15",),
    "DDPMParallelScheduler.get_velocity": ("b80044f3dfdb1249",),
    "DDPMParallelScheduler.step": ("5cc73763a1a0fa63",),
    "DDPMParallelScheduler._get_variance": ("b8e2caf98de1d929",),
    "DDPMParallelScheduler.previous_timestep": ("4ae32dffa69bd372",),
    "DDPMParallelScheduler._threshold_sample": ("b3b3440dad96f700",),
    "DDPMParallelScheduler.batch_step_no_noise": ("a88d3195ebe02f4c",),
    "DDIMScheduler.add_noise": ("6141087bc18f6a15",),
    "DDIMScheduler.get_velocity": ("b80044f3dfdb1249",),
    "DDIMScheduler.step": ("6574c6811236ed71",),
    "DDIMScheduler._get_variance": ("19c3d11c18294482",),
    "DDIMScheduler._threshold_sample": ("b3b3440dad96f700",),
}
