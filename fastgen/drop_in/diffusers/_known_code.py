"""The code of diffusers that the tests of `fastgen.drop_in.diffusers` have run; written by tools/diffusers_matrix.py."""

RELEASES = {  # how many tests passed, and when
    "0.32.2": "216 tests, 2026-11-24",
    "0.34.0": "222 tests, 2026-11-24",
    "0.36.0": "216 tests, 2026-11-24",
    "0.37.1": "222 tests, 2026-11-24",
    "0.42.1": "222 tests, 2026-11-24",
}
KNOWN = {
    "DDPMScheduler.add_noise": ("6141087bc18f6a15",),
    "DDPMScheduler.get_velocity": ("b80044f3dfdb1249",),
    "DDPMScheduler.step": (
        "0514e6fa6450b39e",
        "d5d400db00f587fb",
        "2ebc88f5eb5a38f7",
        "67131d2dc13c233f",
        "77052eb0580c509f",
    ),
    "DDPMScheduler._get_variance": (
        "b8e2caf98de1d929",
        "9d9b17277872ed83",
        "6d187c21b842ec35",
    ),
    "DDPMScheduler.previous_timestep": ("4ae32dffa69bd372",),
    "DDPMScheduler._threshold_sample": ("b3b3440dad96f700",),
    "DDPMParallelScheduler.add_noise": ("6141087bc18f6a15",),
    "DDPMParallelScheduler.get_velocity": ("b80044f3dfdb1249",),
    "DDPMParallelScheduler.step": (
        "5cc73763a1a0fa63",
        "6fa527534407fc93",
        "c2697f9da0d28bae",
        "c6aae919221a0fab",
    ),
    "DDPMParallelScheduler._get_variance": (
        "b8e2caf98de1d929",
        "9d9b17277872ed83",
        "6d187c21b842ec35",
    ),
    "DDPMParallelScheduler.previous_timestep": ("4ae32dffa69bd372",),
    "DDPMParallelScheduler._threshold_sample": ("b3b3440dad96f700",),
    "DDPMParallelScheduler.batch_step_no_noise": (
        "a88d3195ebe02f4c",
        "b17af91fa5e6e7c3",
    ),
    "DDIMScheduler.add_noise": ("6141087bc18f6a15",),
    "DDIMScheduler.get_velocity": ("b80044f3dfdb1249",),
    "DDIMScheduler.step": (
        "6574c6811236ed71",
        "18638ce90aea00a4",
        "0b3e0f94bee81d4a",
        "c69795b70f32973c",
    ),
    "DDIMScheduler._get_variance": (
        "19c3d11c18294482",
        "0c38bb2ab3f2765e",
    ),
    "DDIMScheduler._threshold_sample": ("b3b3440dad96f700",),
    "DiagonalGaussianDistribution.__init__": ("79fea7833b60ada7",),
    "DiagonalGaussianDistribution.sample": ("70e7f6b123640380",),
    "DiagonalGaussianDistribution.kl": ("3ce3eee42029f353",),
}
