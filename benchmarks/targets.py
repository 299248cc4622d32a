"""How many times faster than each peer a case is meant to be, and whether it is. Beside the limit: which share of its speed."""

from __future__ import annotations

import torch

from . import peers
from .measured import NOISY

DROP_IN = {(1, 16, 7): 10.0, (64, 3, 32, 32): 10.0, (8, 3, 256, 256): 5.0}  # with rng="fused"; with diffusers' noise, no slower

# Of the bytes that a forward and a backward move on a GPU, those that they must: the backward reads the inputs again
READS = {"bce_with_logits": 3 / 5, "gan_loss": 4 / 6}


def targets(case) -> dict[str, float]:
    """{peer: least (its time ÷ ours)}."""
    if case.op.startswith("guided-diffusion"):
        return {"guided-diffusion": 10.0}
    if case.op.startswith("diffusers"):
        return {"diffusers": DROP_IN.get(case.shape, 1.0) if case.mode == "fused" else 1.0}
    backward = case.passes == peers.BACKWARD
    if case.overhead:
        return {"eager": 4.0} if case.op == "gan_loss" and backward else {"limit": 0.25} if case.detail else {}
    if case.channels_last or case.threads:
        return {}
    step = case.op in ("ddpm_step", "q_sample") and case.output == "out"
    if case.device != "cpu":
        half, large = case.dtype == torch.bfloat16, case.elements > 5e7
        if step and case.mode == "seed":
            return ({"limit": 0.85 if half else 0.90} if large else {}) | {"torch.compile": 1.5 if half else 1.0, "eager": 5.0}
        if case.op in READS and large:
            return {"limit": 0.90 * (READS[case.op] if backward else 1)}
    elif case.elements < 900_000 or case.dtype != torch.float32:
        return {}
    elif step:
        return {"eager": 8.0, "torch.compile": 8.0} if case.mode == "seed" else {"limit": 0.85}
    elif case.op == "bce_with_logits":
        return {"eager": 3.0}
    elif case.op == "gan_loss":
        return {"eager": 4.0} if backward else {}
    elif case.op == "reparameterize":
        return {"eager": 5.0 if backward else 8.0} if case.mode == "seed" else {}
    five = ("diffusion_loss", "step_log_prob", "gaussian_kl")
    return {"eager": 10.0} if case.op == "vlb_terms" else {"eager": 5.0} if case.op in five else {}


def noisy(times: dict) -> bool:
    """Whether the samples, given by their quartiles, do not allow to judge."""
    return times["median"] > NOISY * times["best"]


def verdict(target: float | None, ratio: float, *times: dict) -> str:
    """Whether a target is met: "yes", "NO", or "noisy" where one of `times` does not allow to say."""
    if target is None:
        return ""
    if any(map(noisy, times)):
        return "noisy"
    return "yes" if ratio >= target else "NO"
