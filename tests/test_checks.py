"""Bad input is refused by every op on every backend alike: TypeError for a wrong type or dtype, ValueError for the rest, a
message that starts with the argument's name, and nothing written."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import normal

import fastgen

BETAS = fastgen.Schedule.linear(10).betas
SHAPE = (3, 4, 5)
SENTINEL = 7.0


def arguments(op, device):
    """A good call of `op`, with a schedule that has no table yet."""
    schedule = fastgen.Schedule.from_betas(BETAS)
    x, y = normal(SHAPE, 0, device=device), normal(SHAPE, 1, device=device)
    return {
        "q_sample": {"x0": x, "t": 5, "schedule": schedule},
        "q_step": {"x_prev": x, "t": 5, "schedule": schedule},
        "q_posterior": {"x0": x, "x_t": y, "t": 5, "schedule": schedule},
        "ddpm_step": {"x_t": x, "model_output": y, "t": 5, "schedule": schedule},
        "ddim_step": {"x_t": x, "model_output": y, "t": 5, "schedule": schedule, "eta": 0.5},
        "diffusion_loss": {"x0": x, "model_output": y, "t": 5, "schedule": schedule, "seed": 1},
        "vlb_terms": {"x0": x, "model_output": y, "t": 5, "schedule": schedule, "seed": 1},
        "step_log_prob": {"x_prev": y, "x_t": x, "model_output": y, "t": 5, "schedule": schedule},
        "reparameterize": {"mean": x, "log_variance": y},
        "gaussian_kl": {"mean": x, "log_variance": y},
        "bce_with_logits": {"input": x, "target": y},
        "discriminator_loss": {"real_logits": x, "fake_logits": y},
        "generator_loss": {"fake_logits": y},
        "randn": {"shape": SHAPE, "seed": 1, "device": device},
        "torch_randn": {"shape": SHAPE, "device": device},
        "to_uint8": {"x": x},
    }[op]


NOISY = ("q_sample", "q_step", "ddpm_step", "ddim_step")
STEPS = ("ddpm_step", "ddim_step")
TIMED = (*NOISY, "q_posterior", "diffusion_loss", "vlb_terms", "step_log_prob")
LOSS = ("diffusion_loss",)
VLB = ("vlb_terms",)
LOG_PROB = ("step_log_prob",)
SAMPLE = ("reparameterize",)
GAUSSIAN = ("reparameterize", "gaussian_kl")
DRAWN = (*NOISY, *SAMPLE)  # all that take noise=, seed= or generator=
GAN = ("discriminator_loss", "generator_loss")
DATA = {
    "q_sample": "x0",
    "q_step": "x_prev",
    "q_posterior": "x0",
    "ddpm_step": "x_t",
    "ddim_step": "x_t",
    "diffusion_loss": "x0",
    "vlb_terms": "x0",
    "step_log_prob": "x_t",
    **dict.fromkeys(GAUSSIAN, "mean"),
}
SECOND = {
    "q_posterior": "x_t",
    **dict.fromkeys(("ddpm_step", "ddim_step", "diffusion_loss", "vlb_terms", "step_log_prob"), "model_output"),
    **dict.fromkeys(GAUSSIAN, "log_variance"),
}


def guidance(scale, output=None):
    return {"unconditional_output": torch.zeros(SHAPE) if output is None else output, "guidance_scale": scale}


# (ops, what is changed, the error, the start of its message); tensors are moved to the device
CASES = [
    # the schedule and the timestep
    (TIMED, {"schedule": None}, TypeError, "schedule"),
    (TIMED, {"schedule": BETAS}, TypeError, "schedule"),
    (TIMED, {"t": -1}, ValueError, "t"),
    (TIMED, {"t": 10}, ValueError, "t"),
    (TIMED, {"t": 2**63}, ValueError, "t"),
    (TIMED, {"t": 5.0}, TypeError, "t"),
    (TIMED, {"t": True}, TypeError, "t"),
    (TIMED, {"t": None}, TypeError, "t"),
    (TIMED, {"t": "5"}, TypeError, "t"),
    (TIMED, {"t": [1, 2, 3]}, TypeError, "t"),
    (TIMED, {"t": np.array([1, 2, 3])}, TypeError, "t"),
    (TIMED, {"t": torch.tensor([1, 2, 3], dtype=torch.int32)}, TypeError, "t"),
    (TIMED, {"t": torch.tensor([1.0, 2.0, 3.0])}, TypeError, "t"),
    (TIMED, {"t": torch.tensor([True, True, True])}, TypeError, "t"),
    (TIMED, {"t": torch.tensor(1)}, ValueError, "t"),
    (TIMED, {"t": torch.tensor([1])}, ValueError, "t"),
    (TIMED, {"t": torch.tensor([1, 2, 3, 4])}, ValueError, "t"),
    (TIMED, {"t": torch.tensor([[1], [2], [3]])}, ValueError, "t"),
    (TIMED, {"t": torch.empty(3, dtype=torch.int64, device="meta")}, ValueError, "t"),
    # where noise comes from
    (DRAWN, {"noise": torch.zeros(SHAPE), "seed": 1}, ValueError, "noise, seed, generator"),
    (DRAWN, {"noise": torch.zeros(SHAPE), "generator": torch.Generator()}, ValueError, "noise, seed, generator"),
    (DRAWN, {"seed": 1, "generator": torch.Generator()}, ValueError, "noise, seed, generator"),
    (DRAWN, {"seed": torch.tensor([1]), "generator": torch.Generator()}, ValueError, "noise, seed, generator"),
    (DRAWN, {"noise": 0.0}, TypeError, "noise"),
    (DRAWN, {"noise": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "noise"),
    (DRAWN, {"noise": torch.zeros(SHAPE, dtype=torch.complex64)}, TypeError, "noise"),
    (DRAWN, {"noise": torch.zeros(3, 4, 1)}, ValueError, "noise"),
    (DRAWN, {"noise": torch.zeros(3, 5, 4)}, ValueError, "noise"),
    (DRAWN, {"noise": torch.zeros(3, 20)}, ValueError, "noise"),
    (DRAWN, {"noise": torch.zeros(1, 3, 4, 5)}, ValueError, "noise"),
    (DRAWN, {"noise": torch.zeros(SHAPE, device="meta")}, ValueError, "noise"),
    (DRAWN, {"generator": 1}, TypeError, "generator"),
    ((*DRAWN, "randn"), {"seed": 1.0}, TypeError, "seed"),
    ((*DRAWN, "randn"), {"seed": True}, TypeError, "seed"),
    ((*DRAWN, "randn"), {"seed": "1"}, TypeError, "seed"),
    ((*DRAWN, "randn"), {"seed": [1, 2, 3]}, TypeError, "seed"),
    ((*DRAWN, "randn"), {"seed": 2**64}, ValueError, "seed"),
    ((*DRAWN, "randn"), {"seed": -(2**63) - 1}, ValueError, "seed"),
    ((*DRAWN, "randn"), {"seed": torch.tensor([1, 2, 3], dtype=torch.int32)}, TypeError, "seed"),
    ((*DRAWN, "randn"), {"seed": torch.tensor([1.0])}, TypeError, "seed"),
    ((*DRAWN, "randn"), {"seed": torch.tensor([1, 2])}, ValueError, "seed"),
    ((*DRAWN, "randn"), {"seed": torch.tensor([[1, 2, 3]])}, ValueError, "seed"),
    ((*DRAWN, "randn"), {"seed": torch.tensor([], dtype=torch.int64)}, ValueError, "seed"),
    ((*DRAWN, "randn"), {"seed": torch.empty(3, dtype=torch.int64, device="meta")}, ValueError, "seed"),
    (("q_sample", "q_step", "randn", *SAMPLE), {"offset": -1, "seed": 1}, ValueError, "offset"),
    (("q_sample", "q_step", "randn", *SAMPLE), {"offset": 2**63, "seed": 1}, ValueError, "offset"),
    (("q_sample", "q_step", "randn", *SAMPLE), {"offset": 0.0, "seed": 1}, TypeError, "offset"),
    (("q_sample", "q_step", "randn", *SAMPLE), {"offset": True, "seed": 1}, TypeError, "offset"),
    (("randn",), {"seed": None}, TypeError, "seed"),
    # options
    (STEPS, {"prediction": "noise"}, ValueError, "prediction"),
    (STEPS, {"prediction": None}, ValueError, "prediction"),
    (("ddpm_step",), {"variance": "fixed"}, ValueError, "variance"),
    (("ddpm_step",), {"variance": 1}, ValueError, "variance"),
    (STEPS, {"clip": 0.0}, ValueError, "clip"),
    (STEPS, {"clip": -1.0}, ValueError, "clip"),
    (STEPS, {"clip": float("nan")}, ValueError, "clip"),
    (STEPS, {"clip": float("inf")}, ValueError, "clip"),
    (STEPS, {"clip": True}, TypeError, "clip"),
    (STEPS, {"clip": "1"}, TypeError, "clip"),
    (STEPS, {"clip": np.float32("nan")}, ValueError, "clip"),
    (STEPS, {"clip": np.float16("inf")}, ValueError, "clip"),
    (STEPS, {"clip": np.float32(0)}, ValueError, "clip"),
    (STEPS, {"clip": np.True_}, TypeError, "clip"),
    (STEPS, {"clip": np.array(1.0)}, TypeError, "clip"),
    (STEPS, {"clip": np.complex64(1)}, TypeError, "clip"),
    (STEPS, {"clip": Fraction(10**400)}, ValueError, "clip"),
    (STEPS, {"clip": torch.tensor(1.0)}, TypeError, "clip"),
    (STEPS, {"clip": 1.0, "threshold": torch.ones(3)}, ValueError, "clip, threshold"),
    (STEPS, {"threshold": 1.0}, TypeError, "threshold"),
    (STEPS, {"threshold": torch.ones(3, dtype=torch.int64)}, TypeError, "threshold"),
    (STEPS, {"threshold": torch.ones(4)}, ValueError, "threshold"),
    (STEPS, {"threshold": torch.ones(3, 1)}, ValueError, "threshold"),
    (STEPS, {"threshold": torch.tensor(1.0)}, ValueError, "threshold"),
    (STEPS, {"threshold": torch.ones(3, device="meta")}, ValueError, "threshold"),
    (STEPS, {"threshold": torch.ones(3, requires_grad=True)}, ValueError, "threshold"),
    (STEPS, {"return_x0": 1}, TypeError, "return_x0"),
    (STEPS, {"return_x0": None}, TypeError, "return_x0"),
    (("ddim_step",), {"eta": -0.1}, ValueError, "eta"),
    (("ddim_step",), {"eta": 1.1}, ValueError, "eta"),
    (("ddim_step",), {"eta": float("nan")}, ValueError, "eta"),
    (("ddim_step",), {"eta": np.float32(1.1)}, ValueError, "eta"),
    (("ddim_step",), {"eta": np.True_}, TypeError, "eta"),
    (("ddim_step",), {"eta": "0"}, TypeError, "eta"),
    (("ddim_step",), {"eta": True}, TypeError, "eta"),
    (("ddim_step",), {"eta": None}, TypeError, "eta"),
    (("ddpm_step",), {"variance": "learned", "model_output": torch.zeros(SHAPE)}, ValueError, "model_output"),
    (("ddpm_step",), {"variance": "learned", "model_output": torch.zeros(3, 8, 4)}, ValueError, "model_output"),
    (("ddpm_step",), {"variance": "learned", "model_output": torch.zeros(3, 4, 10)}, ValueError, "model_output"),
    (("ddpm_step",), {"variance": "learned", "model_output": torch.zeros(3, 8, 1, 5)}, ValueError, "model_output"),
    (("ddpm_step",), {"variance": "learned_range", "model_output": torch.zeros(3, 8)}, ValueError, "model_output"),
    (("ddpm_step",), {"variance": "learned_range", "model_output": torch.zeros(3, 12, 5)}, ValueError, "model_output"),
    (("ddpm_step",), {"variance": "learned", "x_t": torch.zeros(3), "model_output": torch.zeros(6)}, ValueError, "x_t"),
    (("ddpm_step",), {"model_output": torch.zeros(3, 8, 5)}, ValueError, "model_output"),
    (STEPS, {"unconditional_output": torch.zeros(SHAPE)}, ValueError, "unconditional_output, guidance_scale"),
    (STEPS, {"guidance_scale": 2.0}, ValueError, "unconditional_output, guidance_scale"),
    (
        ("ddpm_step",),
        {"variance": "learned", "model_output": torch.zeros(3, 8, 5), **guidance(2.0)},
        ValueError,
        "unconditional_output",
    ),
    # randn
    (("randn", "torch_randn"), {"shape": ()}, ValueError, "shape"),
    (("randn", "torch_randn"), {"shape": (3, -1)}, ValueError, "shape"),
    (("randn", "torch_randn"), {"shape": 3}, TypeError, "shape"),
    (("randn",), {"shape": (3.0,)}, TypeError, "shape"),
    (("randn",), {"shape": "ab"}, TypeError, "shape"),
    (("randn", "torch_randn"), {"dtype": torch.int64}, TypeError, "dtype"),
    (("randn",), {"dtype": torch.complex64}, TypeError, "dtype"),
    (("randn", "torch_randn"), {"dtype": "float32"}, TypeError, "dtype"),
    (("torch_randn",), {"generator": 5}, TypeError, "generator"),
    (("torch_randn",), {"generator": torch.Generator(), "device": "meta"}, ValueError, "generator"),
    (("randn",), {"device": "nowhere"}, ValueError, "device"),
    (("randn",), {"device": 1.5}, TypeError, "device"),
    (("randn",), {"stream": "torch"}, ValueError, "stream"),
    (("randn",), {"device_like": "A100"}, ValueError, "device_like"),
    (("randn",), {"stream": "torch-cuda", "device_like": "H1000"}, ValueError, "device_like"),
    (("randn",), {"stream": "torch-cuda", "device_like": "A100", "offset": 2}, ValueError, "offset"),
    (("randn",), {"stream": "torch-cuda", "multiprocessors": 2}, ValueError, "threads_per_multiprocessor"),
    (("randn",), {"seed": None, "generator": 3}, TypeError, "generator"),
    # the losses
    (VLB, {"seed": None}, ValueError, "x_t, noise, seed"),
    (VLB, {"x_t": torch.zeros(SHAPE)}, ValueError, "x_t, noise, seed"),
    (VLB, {"seed": None, "x_t": 0.0}, TypeError, "x_t"),
    (VLB, {"seed": None, "x_t": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x_t"),
    (VLB, {"seed": None, "x_t": torch.zeros(3, 5, 4)}, ValueError, "x_t"),
    (VLB, {"seed": None, "x_t": torch.zeros(SHAPE, device="meta")}, ValueError, "x_t"),
    (VLB, {"seed": None, "noise": torch.zeros(3, 5, 4)}, ValueError, "noise"),
    (VLB, {"seed": 1.0}, TypeError, "seed"),
    (VLB, {"offset": -1}, ValueError, "offset"),
    (VLB, {"prediction": "noise"}, ValueError, "prediction"),
    (VLB, {"variance": "fixed"}, ValueError, "variance"),
    (VLB, {"variance": "learned", "model_output": torch.zeros(3, 8, 4)}, ValueError, "model_output"),
    (VLB, {"variance": "learned"}, ValueError, "model_output"),
    (VLB, {"clip": 0.0}, ValueError, "clip"),
    (VLB, {"clip": "1"}, TypeError, "clip"),
    (VLB, {"decoder": "discretised"}, ValueError, "decoder"),
    (VLB, {"unit": "bits"}, ValueError, "unit"),
    (VLB, {"detach_mean": 1}, TypeError, "detach_mean"),
    (VLB, {"reduction": "batchmean"}, ValueError, "reduction"),
    (LOG_PROB, {"x_prev": None}, TypeError, "x_prev"),
    (LOG_PROB, {"x_prev": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x_prev"),
    (LOG_PROB, {"x_prev": torch.zeros(3, 5, 4)}, ValueError, "x_prev"),
    (LOG_PROB, {"x_prev": torch.zeros(SHAPE, device="meta")}, ValueError, "x_prev"),
    (LOG_PROB, {"t": 0}, ValueError, "t"),
    (LOG_PROB, {"method": "euler"}, ValueError, "method"),
    (LOG_PROB, {"method": ["ddim"]}, ValueError, "method"),
    (LOG_PROB, {"method": "ddim"}, ValueError, "eta"),
    (LOG_PROB, {"method": "ddim", "eta": 0.0}, ValueError, "eta"),
    (LOG_PROB, {"method": "ddim", "eta": 2.0}, ValueError, "eta"),
    (LOG_PROB, {"method": "ddim", "eta": True}, TypeError, "eta"),
    (LOG_PROB, {"method": "ddim", "eta": "1"}, TypeError, "eta"),
    (LOG_PROB, {"method": "ddim", "eta": 1.0, "variance": "posterior"}, ValueError, "variance"),
    (LOG_PROB, {"eta": 1.0}, ValueError, "eta"),
    (LOG_PROB, {"prediction": "noise"}, ValueError, "prediction"),
    (LOG_PROB, {"variance": "fixed"}, ValueError, "variance"),
    (LOG_PROB, {"variance": ["learned"]}, ValueError, "variance"),
    (LOG_PROB, {"variance": "learned"}, ValueError, "model_output"),
    (LOG_PROB, {"clip": 0.0}, ValueError, "clip"),
    (LOG_PROB, {"clip": "1"}, TypeError, "clip"),
    (LOG_PROB, {"over": "event"}, ValueError, "over"),
    (LOSS, {"seed": None}, ValueError, "noise, seed"),
    (LOSS, {"seed": None, "prediction": "v_prediction"}, ValueError, "noise, seed"),
    (LOSS, {"noise": torch.zeros(SHAPE)}, ValueError, "noise, seed, generator"),
    (LOSS, {"noise": torch.zeros(SHAPE), "prediction": "sample"}, ValueError, "noise, seed, generator"),
    (LOSS, {"seed": None, "noise": 0.0}, TypeError, "noise"),
    (LOSS, {"seed": None, "noise": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "noise"),
    (LOSS, {"seed": None, "noise": torch.zeros(3, 5, 4)}, ValueError, "noise"),
    (LOSS, {"seed": None, "noise": torch.zeros(3, 1, 5), "prediction": "sample"}, ValueError, "noise"),
    (LOSS, {"seed": None, "noise": torch.zeros(SHAPE, device="meta")}, ValueError, "noise"),
    (LOSS, {"seed": 1.0}, TypeError, "seed"),
    (LOSS, {"seed": 2**64}, ValueError, "seed"),
    (LOSS, {"seed": torch.tensor([1, 2])}, ValueError, "seed"),
    (LOSS, {"seed": torch.tensor([1, 2]), "prediction": "sample"}, ValueError, "seed"),
    (LOSS, {"offset": -1}, ValueError, "offset"),
    (LOSS, {"offset": 0.0}, TypeError, "offset"),
    (LOSS, {"prediction": "noise"}, ValueError, "prediction"),
    (LOSS, {"loss": "l2"}, ValueError, "loss"),
    (LOSS, {"loss": None}, ValueError, "loss"),
    (LOSS, {"delta": 0.0}, ValueError, "delta"),
    (LOSS, {"delta": float("inf")}, ValueError, "delta"),
    (LOSS, {"delta": True}, TypeError, "delta"),
    (LOSS, {"delta": "1"}, TypeError, "delta"),
    (LOSS, {"reduction": "batchmean"}, ValueError, "reduction"),
    (LOSS, {"reduction": 1}, ValueError, "reduction"),
    (LOSS, {"weighting": "snr"}, ValueError, "weighting"),
    (LOSS, {"weighting": 1.0}, ValueError, "weighting"),
    (LOSS, {"weighting": [1.0, 1.0, 1.0]}, ValueError, "weighting"),
    (LOSS, {"weighting": np.ones(4)}, ValueError, "weighting"),
    (LOSS, {"weighting": "min_snr", "snr_gamma": True}, TypeError, "snr_gamma"),
    (LOSS, {"weighting": "min_snr", "snr_gamma": 10**400}, ValueError, "snr_gamma"),
    (LOSS, {"delta": 10**400}, ValueError, "delta"),
    (LOSS, {"weighting": torch.ones(3, dtype=torch.int64)}, TypeError, "weighting"),
    (LOSS, {"weighting": torch.ones(4)}, ValueError, "weighting"),
    (LOSS, {"weighting": torch.ones(3, 1, 1)}, ValueError, "weighting"),
    (LOSS, {"weighting": torch.tensor(1.0)}, ValueError, "weighting"),
    (LOSS, {"weighting": torch.ones(3, device="meta")}, ValueError, "weighting"),
    (LOSS, {"weighting": "min_snr", "snr_gamma": 0.0}, ValueError, "snr_gamma"),
    (LOSS, {"weighting": "min_snr", "snr_gamma": float("nan")}, ValueError, "snr_gamma"),
    (LOSS, {"weighting": "min_snr", "snr_gamma": None}, TypeError, "snr_gamma"),
    (("bce_with_logits",), {"target": torch.zeros(3, 4)}, ValueError, "target"),
    (("bce_with_logits",), {"target": torch.zeros(3, 5, 4)}, ValueError, "target"),
    (("bce_with_logits",), {"target": torch.zeros(60)}, ValueError, "target"),
    (("bce_with_logits",), {"target": torch.tensor(0.0)}, ValueError, "target"),
    (("bce_with_logits",), {"target": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "target"),
    (("bce_with_logits",), {"target": torch.zeros(SHAPE, dtype=torch.bool)}, TypeError, "target"),
    (("bce_with_logits",), {"target": 1.0}, TypeError, "target"),
    (("bce_with_logits",), {"target": torch.zeros(SHAPE, device="meta")}, ValueError, "target"),
    (("bce_with_logits",), {"input": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "input"),
    (("bce_with_logits",), {"input": None}, TypeError, "input"),
    (("bce_with_logits",), {"pos_weight": torch.ones(5, dtype=torch.bool)}, TypeError, "pos_weight"),
    (("bce_with_logits",), {"reduction": "batchmean"}, ValueError, "reduction"),
    (("bce_with_logits",), {"reduction": None}, ValueError, "reduction"),
]
CASES += [
    (GAUSSIAN, {"clamp": bad}, error, "clamp")
    for bad, error in [
        (1.0, TypeError),
        ("ab", TypeError),
        ((-30.0,), TypeError),
        ((-30.0, 0.0, 20.0), TypeError),
        ((-30.0, None), TypeError),
        ((True, 20.0), TypeError),
        ((20.0, -30.0), ValueError),
        ((float("nan"), 20.0), ValueError),
        (np.array([-30.0, 20.0]), TypeError),
    ]
]
CASES += [
    (("gaussian_kl",), {name: bad}, error, name)
    for name in ("other_mean", "other_log_variance")
    for bad, error in [
        (0.0, TypeError),
        (torch.zeros(SHAPE, dtype=torch.int64), TypeError),
        (torch.zeros(3, 5, 4), ValueError),
        (torch.zeros(1, 4, 5), ValueError),
        (torch.zeros(SHAPE, device="meta"), ValueError),
    ]
]
CASES += [
    (("gaussian_kl",), {"reduction": "batchmean"}, ValueError, "reduction"),
    (("gaussian_kl",), {"reduction": None}, ValueError, "reduction"),
    (SAMPLE, {"return_kl": 1}, TypeError, "return_kl"),
    (SAMPLE, {"return_kl": None}, TypeError, "return_kl"),
]
CASES += [
    (("bce_with_logits",), {name: bad}, error, name)
    for name in ("weight", "pos_weight")
    for bad, error in [
        (2.0, TypeError),
        (torch.ones(5, dtype=torch.complex64), TypeError),
        (torch.ones(4), ValueError),
        (torch.ones(3, 1, 1, 1), ValueError),
        (torch.ones(1, *SHAPE), ValueError),
        (torch.ones(5, device="meta"), ValueError),
    ]
]
CASES += [
    (ops, {name: bad}, error, name + where)
    for ops, name in ((GAN[:1], "real_logits"), (GAN, "fake_logits"))
    for bad, error, where in [
        (None, TypeError, ""),
        (1.0, TypeError, ""),
        (np.zeros(SHAPE), TypeError, ""),
        (torch.zeros(SHAPE, dtype=torch.int64), TypeError, ""),
        (torch.zeros(SHAPE, dtype=torch.bool), TypeError, ""),
        (torch.zeros(SHAPE, dtype=torch.complex64), TypeError, ""),
        (torch.zeros(SHAPE).to_sparse(), TypeError, ""),
        ([], ValueError, ""),
        ((), ValueError, ""),
        ([1.0], TypeError, r"\[0\]"),
        ([torch.zeros(SHAPE), torch.zeros(SHAPE, dtype=torch.int64)], TypeError, r"\[1\]"),
        ([torch.zeros(SHAPE), [torch.zeros(SHAPE)]], TypeError, r"\[1\]"),
        ([torch.zeros(SHAPE), torch.zeros(SHAPE, device="meta")], ValueError, ""),
    ]
]
CASES += [
    (GAN[:1], {"fake_logits": torch.zeros(SHAPE, device="meta")}, ValueError, "fake_logits"),
    (GAN[:1], {"label_smoothing": -0.1}, ValueError, "label_smoothing"),
    (GAN[:1], {"label_smoothing": 1.0}, ValueError, "label_smoothing"),
    (GAN[:1], {"label_smoothing": 1}, ValueError, "label_smoothing"),
    (GAN[:1], {"label_smoothing": float("nan")}, ValueError, "label_smoothing"),
    (GAN[:1], {"label_smoothing": float("inf")}, ValueError, "label_smoothing"),
    (GAN[:1], {"label_smoothing": "0.1"}, TypeError, "label_smoothing"),
    (GAN[:1], {"label_smoothing": True}, TypeError, "label_smoothing"),
    (GAN[:1], {"label_smoothing": torch.tensor(0.1)}, TypeError, "label_smoothing"),
    (GAN[1:], {"kind": "hinge"}, ValueError, "kind"),
    (GAN[1:], {"kind": None}, ValueError, "kind"),
    (GAN, {"reduction": "batchmean"}, ValueError, "reduction"),
    (GAN, {"reduction": None}, ValueError, "reduction"),
    (GAN, {"monitors": 1}, TypeError, "monitors"),
    (GAN, {"monitors": None}, TypeError, "monitors"),
]
CASES += [(STEPS, guidance(bad), TypeError, "guidance_scale") for bad in (True, "2", torch.tensor(2.0), 2j)]
CASES += [(STEPS, guidance(float(bad)), ValueError, "guidance_scale") for bad in ("nan", "inf", "-inf")]
CASES += [
    (STEPS, guidance(2.0, bad), error, "unconditional_output")
    for bad, error in [
        (1.0, TypeError),
        (np.zeros(SHAPE), TypeError),
        (torch.zeros(SHAPE, dtype=torch.int64), TypeError),
        (torch.zeros(SHAPE, dtype=torch.bfloat16), TypeError),
        (torch.zeros(SHAPE, dtype=torch.float64), TypeError),
        (torch.zeros(3, 4, 1), ValueError),
        (torch.zeros(3, 8, 5), ValueError),
        (torch.zeros(60), ValueError),
        (torch.zeros(SHAPE, device="meta"), ValueError),
    ]
]
BYTES = torch.zeros(SHAPE, dtype=torch.uint8)  # what no op takes but for x0, and that not all
CASES += [
    (("q_step",), {"x_prev": BYTES}, TypeError, "x_prev"),
    (("q_posterior",), {"x0": BYTES}, TypeError, "x0"),
    (("q_posterior", *STEPS, "vlb_terms", "step_log_prob"), {"x_t": BYTES}, TypeError, "x_t"),
    ((*STEPS, "diffusion_loss", "vlb_terms", "step_log_prob"), {"model_output": BYTES}, TypeError, "model_output"),
    (("step_log_prob",), {"x_prev": BYTES}, TypeError, "x_prev"),
    (DRAWN, {"noise": BYTES}, TypeError, "noise"),
    (GAUSSIAN, {"mean": BYTES}, TypeError, "mean"),
    (GAUSSIAN, {"log_variance": BYTES}, TypeError, "log_variance"),
    (("diffusion_loss", "vlb_terms"), {"seed": None, "noise": BYTES}, TypeError, "noise"),
    (("q_sample",), {"x0": BYTES, "noise": BYTES}, TypeError, "noise"),
    (("bce_with_logits",), {"input": BYTES}, TypeError, "input"),
    (("bce_with_logits",), {"target": BYTES}, TypeError, "target"),
    (GAN, {"fake_logits": BYTES}, TypeError, "fake_logits"),
    (("to_uint8",), {"x": BYTES}, TypeError, "x"),
    (("to_uint8",), {"x": None}, TypeError, "x"),
    (("to_uint8",), {"x": np.zeros(SHAPE)}, TypeError, "x"),
    (("to_uint8",), {"x": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x"),
    (("to_uint8",), {"x": torch.zeros(SHAPE, dtype=torch.complex64)}, TypeError, "x"),
    (("to_uint8",), {"x": torch.zeros(SHAPE).to_sparse()}, TypeError, "x"),
    (("to_uint8",), {"channels_last": 1}, TypeError, "channels_last"),
    (("to_uint8",), {"channels_last": torch.channels_last}, TypeError, "channels_last"),
    (("to_uint8",), {"channels_last": True, "x": torch.zeros(3, 4)}, ValueError, "channels_last"),
    (("to_uint8",), {"channels_last": False, "out": BYTES}, ValueError, "channels_last"),
    (("to_uint8",), {"out": torch.zeros(SHAPE)}, TypeError, "out"),
    (("to_uint8",), {"out": torch.zeros(SHAPE, dtype=torch.int8)}, TypeError, "out"),
    (("to_uint8",), {"out": torch.zeros(3, 4, 6, dtype=torch.uint8)}, ValueError, "out"),
    (("to_uint8",), {"out": torch.zeros(SHAPE, dtype=torch.uint8, device="meta")}, ValueError, "out"),
    (("to_uint8",), {"out": torch.zeros(3, 4, 1, dtype=torch.uint8).expand(SHAPE)}, ValueError, "out"),
]
for op, name in DATA.items():
    CASES += [
        ((op,), {name: None}, TypeError, name),
        ((op,), {name: np.zeros(SHAPE)}, TypeError, name),
        ((op,), {name: torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, name),
        ((op,), {name: torch.zeros(SHAPE, dtype=torch.bool)}, TypeError, name),
        ((op,), {name: torch.zeros(SHAPE, dtype=torch.complex64)}, TypeError, name),
        ((op,), {name: torch.zeros(SHAPE, dtype=torch.float8_e4m3fn)}, TypeError, name),
        ((op,), {name: torch.zeros(SHAPE).to_sparse()}, TypeError, name),
        ((op,), {name: torch.tensor(1.0)}, ValueError, name),
    ]
for op, name in SECOND.items():
    CASES += [
        ((op,), {name: 1.0}, TypeError, name),
        ((op,), {name: torch.zeros(SHAPE, dtype=torch.int32)}, TypeError, name),
        ((op,), {name: torch.zeros(SHAPE, dtype=torch.complex128)}, TypeError, name),
        ((op,), {name: torch.zeros(3, 4, 6)}, ValueError, name),
        ((op,), {name: torch.zeros(1, 4, 5)}, ValueError, name),
        ((op,), {name: torch.zeros(3, 5, 4)}, ValueError, name),
        ((op,), {name: torch.zeros(60)}, ValueError, name),
        ((op,), {name: torch.zeros(SHAPE, device="meta")}, ValueError, name),
    ]
EACH = [(op, *case[1:]) for case in CASES for op in case[0]]


def describe(value):
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}{'' if value.device.type == 'cpu' else value.device}".replace(" ", "")
    return str(value).replace(" ", "") if isinstance(value, (int, float, str, tuple, list)) else type(value).__name__


def case_id(case):
    return f"{case[0]}-" + "-".join(f"{name}={describe(value)}" for name, value in case[1].items())


def moved(value, device):
    return (
        value.detach().to(device).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and not value.is_meta
        else value
    )


@pytest.mark.parametrize("op, change, error, start", EACH, ids=map(case_id, EACH))
def test_bad_arguments(device, op, change, error, start):
    """The first call with a schedule, and calls after a good one, which find what that one left to be found."""
    good = arguments(op, device)
    bad = {**good, **{name: moved(value, device) for name, value in change.items()}}
    out = torch.full(SHAPE, SENTINEL, device=device)
    call = getattr(fastgen, op)
    for how in ({}, {"out": out}) if op in NOISY else ({},):
        with pytest.raises(error, match=f"^{start}: expected "):
            call(**bad, **how)
        call(**good)
        if op == "ddim_step":
            call(**{**good, "eta": 1.0})
        if "variance" in change:
            wide = torch.zeros(3, 8, 5, device=device)
            for variance in ("learned", "learned_range"):
                call(**{**good, "variance": variance, "model_output": wide})
        with pytest.raises(error, match=f"^{start}: expected "):
            call(**bad, **how)
    assert torch.all(out == SENTINEL)


@pytest.mark.parametrize("op", TIMED)
@pytest.mark.parametrize("bad", [-1, 10, 2**40, -(2**63)])
@pytest.mark.parametrize("position", [0, 2])
def test_timesteps_of_a_tensor_outside_the_schedule(device, op, bad, position):
    """ValueError on the CPU; on a GPU, where looking would synchronise, that sample is NaN and the others are right."""
    kwargs = arguments(op, device)
    t = torch.tensor([5, 5, 5], device=device)
    t[position] = bad
    out = torch.full(SHAPE, SENTINEL, device=device)
    if device.type == "cpu":
        for how in ({}, {"out": out}) if op in NOISY else ({},):
            with pytest.raises(ValueError, match=f"^t: expected timesteps within {op in LOG_PROB:d} … 9, got {bad}"):
                getattr(fastgen, op)(**{**kwargs, "t": t}, **how)
        assert torch.all(out == SENTINEL)
    else:
        result = getattr(fastgen, op)(**{**kwargs, "t": t})
        if op == "diffusion_loss":
            assert result.isnan()
            return
        result = result[0] if op == "q_posterior" else result
        assert result.isnan().reshape(3, -1).all(1).tolist() == [i == position for i in range(3)]


@pytest.mark.parametrize("op", TIMED)
@pytest.mark.parametrize("t", [np.int64(5), np.int32(5)])
def test_numpy_ints_are_ints(device, op, t):
    kwargs = arguments(op, device)
    torch.manual_seed(0)
    expected = getattr(fastgen, op)(**kwargs)
    torch.manual_seed(0)
    actual = getattr(fastgen, op)(**{**kwargs, "t": t})
    first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
    assert torch.equal(first(actual), first(expected))


# (op, the arguments that take any real number, all representable in half precision)
REALS = [
    ("ddpm_step", {"clip": 1.5}),
    ("ddim_step", {"clip": 1.5, "eta": 0.25}),
    ("ddpm_step", guidance(2.5)),
    ("diffusion_loss", {"weighting": "min_snr", "snr_gamma": 4.5}),
    ("diffusion_loss", {"loss": "huber", "delta": 0.5}),
    ("discriminator_loss", {"label_smoothing": 0.125}),
]


@pytest.mark.parametrize("op, options", REALS)
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, Fraction])
def test_a_real_number_is_a_number(device, op, options, kind):
    seed = {"seed": 1} if op in STEPS else {}
    plain = {**arguments(op, device), **seed, **{name: moved(value, device) for name, value in options.items()}}
    given = {**plain, **{name: kind(value) for name, value in options.items() if isinstance(value, float)}}
    assert torch.equal(getattr(fastgen, op)(**given), getattr(fastgen, op)(**plain))


def test_a_real_number_is_a_number_of_a_schedule():
    for make, numbers in [
        (fastgen.Schedule.linear, (0.125, 0.25)),
        (fastgen.Schedule.scaled_linear, (0.125, 0.25)),
        (fastgen.Schedule.sigmoid, (0.125, 0.25)),
        (fastgen.Schedule.cosine, (0.125, 0.5)),
    ]:
        expected = make(10, *numbers)
        for kind in (np.float16, np.float32, np.float64, Fraction):
            made = make(10, *map(kind, numbers))
            assert (made.betas == expected.betas).all() and repr(made) == repr(expected)


@pytest.mark.parametrize("name", ["cuda", "xpu"])
@pytest.mark.parametrize("error", [AssertionError, RuntimeError])
def test_a_device_that_is_not_here(monkeypatch, name, error):
    """What torch raises by how it was built, as a complaint about the argument."""

    def current_device():
        raise error("there is none")

    monkeypatch.setattr(getattr(torch, name), "current_device", current_device)
    for call in (
        lambda: fastgen.randn(SHAPE, seed=1, device=name),
        lambda: fastgen.sample(lambda x, t: x, SHAPE, fastgen.Schedule.linear(2), device=name),
    ):
        with pytest.raises(ValueError, match=f"^device: expected one that torch finds here, got '{name}': there is none"):
            call()


# ---- out= -----------------------------------------------------------------------------------------------------------


def filled(shape, **how):
    return torch.full(shape, SENTINEL, **how)


BAD_OUT = {
    "type": (lambda device: 1.0, TypeError),
    "integer": (lambda device: torch.full(SHAPE, 7, device=device), TypeError),
    "float64": (lambda device: filled(SHAPE, device=device, dtype=torch.float64), TypeError),
    "bfloat16": (lambda device: filled(SHAPE, device=device, dtype=torch.bfloat16), TypeError),
    "flat": (lambda device: filled((60,), device=device), ValueError),
    "small": (lambda device: filled((3, 4, 1), device=device), ValueError),
    "large": (lambda device: filled((4, 4, 5), device=device), ValueError),
    "empty": (lambda device: filled((0,), device=device), ValueError),
    "elsewhere": (lambda device: torch.empty(SHAPE, device="meta"), ValueError),
    "expanded": (lambda device: filled((3, 1, 5), device=device).expand(SHAPE), ValueError),
    "expanded and spread": (lambda device: filled((3, 1, 500), device=device)[..., ::100].expand(SHAPE), ValueError),
    "requires_grad": (lambda device: filled(SHAPE, device=device).requires_grad_(), ValueError),
}


@pytest.mark.parametrize("op", NOISY)
@pytest.mark.parametrize("make, error", BAD_OUT.values(), ids=BAD_OUT)
def test_bad_out(device, op, make, error):
    out = make(device)
    with pytest.raises(error, match="^out: expected "):
        getattr(fastgen, op)(**arguments(op, device), out=out)
    if isinstance(out, torch.Tensor) and not out.is_meta:
        assert torch.all(out == SENTINEL)


@pytest.mark.parametrize("op", STEPS)
def test_out_has_the_promoted_dtype(device, op):
    kwargs = arguments(op, device)
    kwargs["x_t"] = kwargs["x_t"].bfloat16()
    out = filled(SHAPE, device=device, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="^out: expected dtype float32"):
        getattr(fastgen, op)(**kwargs, out=out)
    assert torch.all(out == SENTINEL)


@pytest.mark.parametrize("op", NOISY)
def test_out_cannot_record_a_gradient(device, op):
    kwargs = arguments(op, device)
    for name in {DATA[op], SECOND.get(op, DATA[op])}:
        leaf = kwargs[name].clone().requires_grad_()
        out = filled(SHAPE, device=device)
        with pytest.raises(ValueError, match="^out: expected "):
            getattr(fastgen, op)(**{**kwargs, name: leaf}, out=out)
        assert torch.all(out == SENTINEL)
        with torch.no_grad():
            getattr(fastgen, op)(**{**kwargs, name: leaf}, out=out)
        assert not torch.any(out == SENTINEL) and not out.requires_grad
    if op in STEPS:
        out, leaf = filled(SHAPE, device=device), torch.zeros(SHAPE, device=device, requires_grad=True)
        with pytest.raises(ValueError, match="^out: expected "):
            getattr(fastgen, op)(**kwargs, **guidance(2.0, leaf), out=out)
        assert torch.all(out == SENTINEL)


@pytest.mark.parametrize("op", NOISY)
def test_out_may_not_overlap_an_input_in_part(device, op):
    """Memory shared in any way but being the same tensor could be overwritten before it is read."""
    kwargs = arguments(op, device)
    buffer = torch.full((200,), SENTINEL, device=device)
    shifted, out = buffer[1:61].view(SHAPE), buffer[:60].view(SHAPE)
    reversed_strides = buffer[:60].view(5, 4, 3).permute(2, 1, 0)
    for name in (DATA[op], SECOND.get(op), "noise", "unconditional_output" if op in STEPS else None):
        how = {"guidance_scale": 2.0} if name == "unconditional_output" else {}
        for overlapping in (shifted, reversed_strides) if name else ():
            with pytest.raises(ValueError, match=f"^out: expected memory apart from {name}"):
                getattr(fastgen, op)(**{**kwargs, name: overlapping, **how}, out=out)
    assert torch.all(buffer == SENTINEL)
    getattr(fastgen, op)(**{**kwargs, DATA[op]: buffer[60:120].view(SHAPE)}, out=out)  # beside each other is fine
    assert torch.all(buffer[60:] == SENTINEL)


@pytest.mark.parametrize("op", STEPS)
def test_out_may_not_be_the_threshold(device, op):
    kwargs = {**arguments(op, device), "x_t": torch.zeros(3, device=device), "model_output": torch.zeros(3, device=device)}
    threshold = torch.ones(4, device=device)
    with pytest.raises(ValueError, match="^out: expected memory apart from threshold"):
        getattr(fastgen, op)(**kwargs, threshold=threshold[:3], out=threshold[1:])
    assert torch.all(threshold == 1)


@pytest.mark.parametrize("op", DRAWN)
def test_refusal_draws_no_random_number(device, op):
    state = torch.get_rng_state()
    wrong = (
        {"clamp": (1, 0)} if op in SAMPLE else {"t": 10},
        {"log_variance" if op in SAMPLE else "out": torch.zeros(2, device=device)},
    )
    for change in (*wrong, {"noise": torch.zeros(2, device=device)}):
        with pytest.raises(ValueError):
            getattr(fastgen, op)(**{**arguments(op, device), **change})
    assert torch.equal(torch.get_rng_state(), state)


def test_a_scalar_is_refused_alike_by_every_backend(device, schedule):
    """After a call that was good, too, whose checks need not be made again."""
    good, bad = filled((1,), device=device), filled((), device=device)
    fastgen.q_sample(good, 1, schedule, seed=1)
    fastgen.ddpm_step(good, good, 1, schedule, seed=1)
    t = torch.tensor([1], device=device)
    for call in (
        lambda: fastgen.q_sample(bad, 1, schedule, seed=-1),
        lambda: fastgen.q_sample(bad, 1, schedule, seed=t),
        lambda: fastgen.q_sample(bad, t, schedule, seed=1),
        lambda: fastgen.ddpm_step(bad, bad, t, schedule, seed=1),
        lambda: fastgen.ddpm_step(bad, bad, 1, schedule, seed=1, threshold=good),
    ):
        with pytest.raises(ValueError, match="expected shape"):
            call()


def test_losses_are_checked_where_fakes_stand_in_for_kernels():
    fastgen.bce_with_logits(torch.zeros(1), torch.zeros(1))  # the path without checks in Python is known from now on

    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return fastgen.bce_with_logits(x, y)

    for x, y, error in (
        (torch.zeros(3), torch.zeros(4), ValueError),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), TypeError),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3), TypeError),
    ):
        with pytest.raises(error, match="expected"):
            torch.export.export(Loss(), (x, y), strict=False)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(error, match="expected"):
            fastgen.bce_with_logits(mode.from_tensor(x), mode.from_tensor(y))
