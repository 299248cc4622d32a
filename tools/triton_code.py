"""What Triton makes of every kernel of fastgen.triton, for GPUs of NVIDIA and AMD; this machine needs neither.

An op is called on tensors of the CPU up to its launches, whose arguments are kept. Triton's own JIT then compiles each kernel for
them, told by a driver that the GPU is the one wanted; so what is compiled is what would run. `machine_code` puts the figures
beside those of the CUDA kernels, tests/test_triton_code.py has the contract. What was read of a kernel is kept under
build/triton_code until a source or Triton changes.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch

from . import amdgcn, machine_code, sass
from .machine_code import Kernel, MainPath, Resources

TARGETS = ("80", "90", "100", "120", "gfx942")
CACHE = machine_code.ROOT / "build/triton_code"
SOURCES = ("fastgen/triton/**/*.py", "fastgen/_core/*.py", "tools/*.py")  # on which what is read depends
NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}
HOT, COLD, ALL = (torch.float32, torch.bfloat16), (torch.float16, torch.float64), tuple(NAMES)


# ---- what is called --------------------------------------------------------------------------------------------------

SHAPE = (16, 64, 64, 64)  # enough elements for the largest tiles; nothing is read, so no memory is touched
SEEDS = torch.empty(SHAPE[0], dtype=torch.int64)


def x(dtype, shape=SHAPE):
    return torch.empty(shape, dtype=dtype)


def last(dtype, shape=SHAPE):
    """The same, channels-last."""
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype).movedim(-1, 1)


def at(x, columns):
    """A table for `x`, and which rows of it."""
    table = torch.empty(1000, columns, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return {"rows": table, "t": torch.empty(x.shape[0], dtype=torch.int64), "index": 0}


def noised(x, **more):
    return {"x": x, **at(x, 2), **more}


def noised_bytes(dtype, **more):
    """With rows for a result of this dtype."""
    return noised(x(dtype), **more) | {"x": x(torch.uint8)}


def drawn_as_cuda(out, **more):
    return {"out": out, "seeds": None, "seed": None, "offset": 0, "threads": 132 * 2048, **more}


def stepped(x, m=None, **more):
    return {"x_t": x, "model_output": x if m is None else m, **at(x, 10), **more}


def wide(dtype):
    """A network's output with a learned variance."""
    return x(dtype, (SHAPE[0], 2 * SHAPE[1], *SHAPE[2:]))


def number(dtype, *shape):
    """Of the type of the arithmetic on `dtype`."""
    return torch.empty(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def lossy(m, x0=None, **more):
    options = {"noise": None, "seeds": None, "seed": None, "offset": 0, "weights": None}
    return {"model_output": m, "x0": m if x0 is None else x0, **at(m, 3), **options, **EPSILON_MSE_MEAN, **more}


EPSILON_MSE_MEAN = {"prediction": 0, "loss": 0, "delta": 1.0, "reduction": 1}
V_HUBER_EACH = {"prediction": 2, "loss": 2, "reduction": 0}


def bounded(m, x0=None, gradient=None, **more):
    x0 = m if x0 is None else x0
    options = {"x_t": None, "noise": None, "seeds": None, "seed": None, "offset": 0, "clip": None, "learned": False}
    back = {} if gradient is None else {"detach_mean": False}
    first = {} if gradient is None else {"gradient": gradient}
    options |= {"decoder": 0, "scale": 1.0, "each_sample": True, "loss": -1, "delta": 1.0, "weights": None, "vlb_weight": 1.0}
    return {**first, "model_output": m, "x0": x0, **at(x0, 14), **options, **more, **back}


def probable(x, m=None, gradient=None, **more):
    options = {"clip": None, "learned": False, "scale": 1.0}
    first = {} if gradient is None else {"gradient": gradient}
    return {**first, "x_prev": x, "x_t": x, "model_output": x if m is None else m, **at(x, 10), **options, **more}


def trajectory(dtype):
    """One is never kept in half precision."""
    return x(torch.promote_types(dtype, torch.float32))


def weighed(x, m=None, **more):
    return {**probable(x, m), **at(x, 13), **more}


def probable_step(x, m=None, **more):
    given = probable(x, m)
    del given["x_prev"]
    return {**given, "noise": None, "seeds": None, "seed": None, "unconditional": None, "guidance": 1.0, **more}


def drawn(mean, log_variance=None, gradients=(), **more):
    options = {"noise": None, "seeds": None, "seed": None, "offset": 0, "lowest": -30.0, "highest": 20.0}
    own = {"log_variance": mean if log_variance is None else log_variance, **options, **more}
    if not gradients:
        return {"mean": mean, **own}
    both = {"kl_gradient": gradients[1], "mean": mean} if len(gradients) > 1 else {}
    return {"gradient": gradients[0], **both, **own}


def halves(dtype):
    """Of a tensor of twice the channels."""
    return wide(dtype).chunk(2, 1)


def diverging(mean, log_variance=None, others=(None, None), gradient=None, bounds=(-30.0, 20.0)):
    first = {} if gradient is None else {"gradient": gradient}
    names = "mean", "log_variance", "other_mean", "other_log_variance", "lowest", "highest"
    return first | dict(zip(names, (mean, mean if log_variance is None else log_variance, *others, *bounds), strict=True))


def crossed(x, weight=None, pos_weight=None, reduction=1, **more):
    return {"input": x, "target": x, "weight": weight, "pos_weight": pos_weight, "reduction": reduction, **more}


def fooled(x, monitors=False, smoothing=0.0):
    options = {"real": 1, "kind": 0, "smoothing": smoothing, "reduction": 1}
    return {"logits": [x, x], **options, "monitors": monitors, "gradients": False}


def fooled_back(x, smoothing=0.0):
    return {"gradient": number(x.dtype), "logits": [x], "real": 1, "kind": 0, "smoothing": smoothing, "reduction": 1}


class Call(NamedTuple):
    """A call of fastgen.triton.FUNCTIONS[op] for each dtype."""

    op: str  # or its backward, …
    label: str
    arguments: Callable[[torch.dtype], dict[str, Any]]
    cuda: str = ""  # label of the CUDA kernel that does the same; {0} stands for the dtype, {two} and {three} for more of it
    hot: bool = True  # whether its kernels must make wide accesses and, unless they add up, exchange nothing between threads
    dtypes: tuple[torch.dtype, ...] = HOT


# One for each way in which a kernel is compiled differently.
CALLS = (
    Call("q_sample", "no noise", lambda d: noised(x(d)), "Vectors<QSample<{three}>, no noise>"),
    Call("q_sample", "noise", lambda d: noised(x(d), noise=x(d)), "Vectors<QSample<{three}>, noise>"),
    Call("q_sample", "seed", lambda d: noised(x(d), seed=5), "Vectors<QSample<{three}>, seed>"),
    Call("q_sample", "seed, channels-last", lambda d: noised(last(d), seed=5), "Tiles<QSample<{three}>, seed>"),
    Call("q_sample", "seed tensor", lambda d: noised(x(d), seeds=SEEDS[:1])),
    Call("q_sample", "seeds, one t", lambda d: noised(x(d), t=None, seeds=SEEDS)),
    Call("q_sample", "noise, one t", lambda d: noised(x(d), t=None, noise=x(d))),
    Call("q_sample", "noise of f32", lambda d: noised(x(d), noise=x(torch.float32)), "", False, COLD),
    Call("q_sample", "seed", lambda d: noised(x(d), seed=5), "", False, COLD),
    Call("q_sample", "seed, few elements", lambda d: noised(x(d, (16, 64, 8, 8)), seed=5), "", False),
    Call("q_sample", "seed, odd event", lambda d: noised(x(d, (16, 3, 5, 7)), seed=5), "", False, ALL),
    Call("q_sample", "seed, event of 2", lambda d: noised(x(d, (16, 2)), seed=5), "", False),
    Call("q_sample", "seed, 3 channels last", lambda d: noised(last(d, (16, 3, 8, 8)), seed=5), "", False, ALL),
    Call("q_sample", "seed, channels-last, odd event", lambda d: noised(last(d, (16, 3, 5, 7)), seed=5), "", False, ALL),
    Call("q_sample", "seed, past int32", lambda d: noised(x(d, (2, 2**30)), seed=5), "", False, HOT[:1]),
    Call("q_sample", "bytes, seed", lambda d: noised_bytes(d, seed=5), "", False, HOT[:1]),
    Call("q_sample", "bytes, noise", lambda d: noised_bytes(d, noise=x(d)), "", False, ALL),
    Call("to_uint8", "", lambda d: {"x": x(d), "channels_last": False}, "ToUint8Vectors<{0}>", True),
    Call("to_uint8", "to channels-last", lambda d: {"x": x(d), "channels_last": True}, "", False, ALL),
    Call("randn", "seed", lambda d: {"out": x(d), "seeds": None, "seed": 5, "offset": 0}, "Vectors<Randn<{three}>, seed>"),
    Call("randn", "seeds", lambda d: {"out": x(d), "seeds": SEEDS, "seed": None, "offset": 0}, "", False, COLD),
    Call("randn_torch_cuda", "seed", lambda d: drawn_as_cuda(x(d), seed=5), "", True, HOT[:1]),
    Call("randn_torch_cuda", "seed", lambda d: drawn_as_cuda(x(d), seed=5), "", False, HOT[1:] + COLD),
    Call("randn_torch_cuda", "seeds", lambda d: drawn_as_cuda(x(d), seeds=SEEDS), "", False, HOT[:1]),
    Call("q_posterior", "means", lambda d: {"x0": x(d), "x_t": x(d), **at(x(d), 4)}, "Vectors<QPosterior<{three}>, no noise>"),
    Call("q_posterior", "means", lambda d: {"x0": x(d), "x_t": x(HOT[0]), **at(x(d), 4)}, "", False, COLD),
    Call("ddpm_step", "no noise", lambda d: stepped(x(d)), "Vectors<DdpmStepPlain<{three}>, no noise>"),
    Call("ddpm_step", "noise", lambda d: stepped(x(d), noise=x(d)), "Vectors<DdpmStepPlain<{three}>, noise>"),
    Call("ddpm_step", "seed", lambda d: stepped(x(d), seed=5), "Vectors<DdpmStepPlain<{three}>, seed>"),
    Call("ddpm_step", "seed, channels-last", lambda d: stepped(last(d), seed=5), "Tiles<DdpmStepPlain<{three}>, seed>"),
    Call("ddpm_step", "seed, state of f32", lambda d: stepped(x(HOT[0]), x(d), seed=5),
        "Vectors<DdpmStepPlain<float, f32, {0}, f32>, seed>", False, HOT[1:]),
    Call("ddpm_step", "seed, threshold", lambda d: stepped(x(d), seed=5, threshold=number(d, SHAPE[0]))),
    Call("ddpm_step", "seed, clip, learned", lambda d: stepped(x(d), wide(d), seed=5, clip=1.0, learned=True), "", False, ALL),
    Call("ddpm_step", "seed, guidance, clip", lambda d: stepped(x(d), seed=5, clip=1.0, unconditional=x(d), guidance=7.5)),
    Call("ddpm_step", "noise, guidance", lambda d: stepped(x(d), noise=x(d), unconditional=x(d), guidance=7.5)),
    Call("ddpm_step_x0", "seed, clip", lambda d: stepped(x(d), seed=5, clip=1.0), "Vectors<DdpmStep<{three}>, seed>"),
    Call("ddpm_step_x0", "noise, clip", lambda d: stepped(x(d), noise=x(d), clip=1.0), "Vectors<DdpmStep<{three}>, noise>"),
    Call("diffusion_loss", "seed", lambda d: lossy(x(d), seed=5),
        "sum_kernel<Added<Vectors<DiffusionLossItems<{two}, false>, seed>>>"),
    Call("diffusion_loss", "noise", lambda d: lossy(x(d), noise=x(d)),
        "sum_kernel<Added<Vectors<DiffusionLossItems<{two}, false>, noise>>>"),
    Call("diffusion_loss", "seed, channels-last", lambda d: lossy(last(d), seed=5),
        "sum_kernel<Added<Tiles<DiffusionLossItems<{two}, false>, seed>>>"),
    Call("diffusion_loss", "v, seed, huber, weights, each",
        lambda d: lossy(x(d), seed=5, weights=number(d, SHAPE[0]), **V_HUBER_EACH), "", False, ALL),
    Call("diffusion_loss", "bytes, v, seed", lambda d: lossy(x(d), x(torch.uint8), seed=5, prediction=2), "", False, ALL),
    Call("diffusion_loss_backward", "bytes, v, seed",
        lambda d: lossy(x(d), x(torch.uint8), seed=5, prediction=2, gradient=number(d)), "", False, ALL),
    Call("diffusion_loss_backward", "seed", lambda d: lossy(x(d), seed=5, gradient=number(d)),
        "Vectors<DiffusionLossItems<{two}, true>, seed>"),
    Call("diffusion_loss_backward_x0", "v, seed, huber, each",
        lambda d: lossy(x(d), seed=5, gradient=number(d, SHAPE[0]), **V_HUBER_EACH)),
    Call("vlb_terms", "seed", lambda d: bounded(x(d), seed=5),
        "sum_kernel<Added<Vectors<VlbTermsItems<{two}, false>, seed>>>"),
    Call("vlb_terms", "x_t, learned", lambda d: bounded(wide(d), x(d), x_t=x(d), learned=True),
        "sum_kernel<Added<Vectors<VlbTermsItems<{two}, false>, no noise>>>"),
    Call("vlb_terms", "noise, learned, clip, gaussian",
        lambda d: bounded(wide(d), x(d), noise=x(d), learned=True, clip=1.0, decoder=1), "", False, ALL),
    Call("vlb_terms", "seed, learned, approximate",
        lambda d: bounded(wide(d), x(d), seed=5, learned=True, decoder=2), "", False, ALL),
    Call("vlb_terms", "seed, hybrid, mean",
        lambda d: bounded(wide(d), x(d), seed=5, learned=True, loss=0, each_sample=False), ""),
    Call("vlb_terms_backward", "seed, learned", lambda d: bounded(wide(d), x(d), number(d, SHAPE[0]), seed=5, learned=True),
        "Vectors<VlbTermsItems<{two}, true>, seed>"),
    Call("vlb_terms_backward", "seed, hybrid, mean",
        lambda d: bounded(wide(d), x(d), number(d), seed=5, learned=True, loss=0, each_sample=False), ""),
    Call("step_log_prob", "epsilon", lambda d: probable(x(d)),
        "sum_kernel<Added<Vectors<StepLogProbItems<{two}, false>, no noise>>>"),
    Call("step_log_prob", "learned, clip", lambda d: probable(x(d), wide(d), learned=True, clip=1.0), "", False, ALL),
    Call("step_log_weight", "epsilon", lambda d: weighed(x(d)),
        "sum_kernel<Added<Vectors<StepLogWeightItems<{two}>, no noise>>>", True, HOT[:1]),
    Call("step_log_weight", "learned, clip", lambda d: weighed(trajectory(d), wide(d), learned=True, clip=1.0), "", False, ALL),
    Call("ddpm_step_log_prob", "seed", lambda d: probable_step(x(d), seed=5),
        "sum_kernel<Added<Vectors<Steps<{three}>, seed>>>"),
    Call("ddpm_step_log_prob", "noise, learned, clip",
        lambda d: probable_step(x(d), wide(d), noise=x(d), learned=True, clip=1.0), "", False, ALL),
    Call("ddim_step_log_prob", "seed", lambda d: probable_step(x(d), seed=5), ""),
    Call("step_log_prob_backward", "epsilon", lambda d: probable(x(d), None, number(d, SHAPE[0])),
        "Vectors<StepLogProbItems<{two}, true>, no noise>"),
    Call("step_log_prob_backward", "learned, clip",
        lambda d: probable(x(d), wide(d), number(d, SHAPE[0]), learned=True, clip=1.0), "", False, ALL),
    Call("step_log_prob_backward_x", "epsilon", lambda d: probable(x(d), None, number(d, SHAPE[0])), ""),
    Call("step_log_prob_backward_x", "learned, clip",
        lambda d: probable(x(d), wide(d), number(d, SHAPE[0]), learned=True, clip=1.0), "", False, ALL),
    Call("reparameterize", "seed", lambda d: drawn(x(d), seed=5), "Vectors<Reparameterize<{three}>, seed>"),
    Call("reparameterize", "seed, channels-last", lambda d: drawn(last(d), seed=5), "Tiles<Reparameterize<{three}>, seed>"),
    Call("reparameterize", "noise", lambda d: drawn(x(d), noise=x(d)), "Vectors<Reparameterize<{three}>, noise>"),
    Call("reparameterize", "seeds, halves", lambda d: drawn(*halves(d), seeds=SEEDS), "", False, ALL),
    Call("reparameterize_kl", "seed", lambda d: drawn(x(d), seed=5),
        "sum_kernel<Added<Vectors<ReparameterizeKl<{three}>, seed>>>"),
    Call("reparameterize_kl", "noise, halves", lambda d: drawn(*halves(d), noise=x(d)), "", False, ALL),
    Call("reparameterize_backward", "seed", lambda d: drawn(x(d), None, (x(d),), seed=5),
        "Vectors<ReparameterizeGradient<{three}>, seed>"),
    Call("reparameterize_kl_backward", "seed", lambda d: drawn(x(d), None, (x(d), number(d, SHAPE[0])), seed=5), ""),
    Call("reparameterize_kl_backward", "noise, halves",
        lambda d: drawn(*halves(d), (x(d), number(d, SHAPE[0])), noise=x(d)), "", False, ALL),
    Call("gaussian_kl", "prior", lambda d: diverging(x(d)),
        "sum_kernel<Added<Vectors<GaussianKlItems<float, {0}, false>, no noise>>>"),
    Call("gaussian_kl", "halves", lambda d: diverging(*halves(d), bounds=(-float("inf"), float("inf"))), "", False, ALL),
    Call("gaussian_kl", "two", lambda d: diverging(x(d), x(d), (x(d), x(d))), "", True, HOT),
    Call("gaussian_kl_backward", "prior", lambda d: diverging(x(d), gradient=number(d, SHAPE[0])), ""),
    Call("gaussian_kl_backward", "two", lambda d: diverging(x(d), x(d), (x(d), x(d)), number(d, SHAPE[0])),
        "Vectors<GaussianKlItems<float, {0}, true>, no noise>", True, HOT),
    Call("bce_with_logits", "mean", lambda d: crossed(x(d)), "sum_kernel<BceVectorSum<BceTypes<{0}, {0}>>>"),
    Call("bce_with_logits", "mean, weights", lambda d: crossed(x(d), x(d), number(d)), "", False, ALL),
    Call("bce_with_logits", "none", lambda d: crossed(x(d), reduction=0), "BceVectors<BceTypes<{0}, {0}>, false>"),
    Call("bce_with_logits_backward", "mean", lambda d: crossed(x(d), gradient=number(d)), "BceVectors<BceTypes<{0}, {0}>, true>"),
    Call("gan_loss", "mean", lambda d: fooled(x(d)), "sum_kernel<GanVectorSums<{0}, false>>"),
    Call("gan_loss", "mean, smoothed, monitors", lambda d: fooled(x(d), True, 0.1),
        "sum_kernel<GanVectorSums<{0}, true>>", False, ALL[1:]),
    Call("gan_loss_backward", "mean", lambda d: fooled_back(x(d)), "GanVectors<{0}>"),
)  # fmt: skip


# ---- compiling -------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A call for a dtype and target; `fusion` None: as the op launches it."""

    call: int  # of CALLS
    dtype: torch.dtype
    target: str
    fusion: bool | None = None

    @property
    def label(self) -> str:
        return f"{CALLS[self.call].label}, {NAMES[self.dtype]}"


def jobs(targets, fusion=None, op=None, in_turns=False) -> list[Job]:
    """Each call for each of its dtypes and each target; `in_turns`: for one of its dtypes on each target, the next one on the next
    of TARGETS. All four of NVIDIA's then have each of a call's dtypes between them; AMD's only one has all."""
    made = []
    for k, call in enumerate(CALLS):
        for target in targets if op in (None, call.op) else ():
            turn = k + TARGETS.index(target)
            one = in_turns and (fusion is not None or not target.startswith("gfx"))
            chosen = [call.dtypes[turn % len(call.dtypes)]] if one else call.dtypes
            made += [Job(k, dtype, target, fusion) for dtype in chosen]
    return made


class Launch(NamedTuple):
    kernel: Any
    grid: tuple
    arguments: tuple
    options: dict[str, Any]  # those of the kernel that are constants, and those of the compiler


@functools.cache
def launches(call: int, dtype: torch.dtype) -> list[Launch]:
    from triton.runtime.jit import JITFunction

    import fastgen.triton

    found = []

    def run(kernel, *arguments, grid, warmup, **options):
        found.append(Launch(kernel, grid, arguments, options))

    op, _, arguments, *_ = CALLS[call]
    with mock.patch.object(JITFunction, "run", run):
        fastgen.triton.FUNCTIONS[op][0](**arguments(dtype))
    return found


class Driver(NamedTuple):
    """All that the JIT asks of one before it launches."""

    target: Any

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target  # the key of the JIT's cache

    def get_current_stream(self, device):
        return 0


def gpu(target: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target), 32)


def compiled(launch: Launch, target: str, fusion: bool | None = None):
    """Triton's compiled kernel, from Triton's cache where nothing has changed since."""
    from triton.runtime import driver

    options = launch.options if fusion is None else launch.options | {"enable_fp_fusion": fusion}
    with mock.patch.object(driver, "_active", Driver(gpu(target))):
        return launch.kernel.warmup(*launch.arguments, grid=launch.grid, **options)


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class TritonKernel(Kernel):
    cuda: str  # label of the CUDA kernel that does the same, "" if none is named
    fast: bool  # whether its machine code must be
    adds: bool  # not element-wise
    code: str  # digest of the instructions, as bits
    fused: bool | None  # what the op says of floating-point fusion; None: nothing
    conversions: int  # of layouts: exchanges between threads

    @property
    def label(self) -> str:
        return self.name


def elements(launch: Launch, target: str) -> float | None:
    """Of a thread; None where the kernel's tiles are not those of the driver."""
    from fastgen.triton.common.driver import TILED

    options = launch.options
    if "E" not in options:
        return None
    parts = 4 if options.get("LAYOUT") == TILED.value else 1
    return parts * options.get("S", 1) * options["E"] / (options["num_warps"] * gpu(target).warp_size)


@dataclass
class Code:
    """Of one kernel. `path` is what a thread runs of `text`, `body` the loop over tiles in it, if there is one."""

    resources: Resources
    counts: Callable[[list], dict[str, int]]
    text: list
    path: list
    body: list
    understood: bool = True
    other_loops: int = 0


def nvidia(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = machine_code.run(machine_code.disassembler("cuobjdump"), "-res-usage", file.name).stdout
        (function,) = sass.parse(machine_code.run(machine_code.disassembler(), "-c", file.name).stdout).values()
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    text = function.instructions
    spills = [sum(i.stem == stem for i in text) for stem in ("STL", "LDL")]
    resources = Resources(used["REG"], used["STACK"] + used["LOCAL"], *spills, used["SHARED"])
    if (path := sass.main_path(function)) is None:
        return Code(resources, sass.counts, text, text, [])
    understood = len(path.instructions) == len(text) or not path.impossible  # in straight code, undefined bits are left unused
    return Code(resources, sass.counts, text, path.instructions, path.body, understood, path.other_loops)


def amd(assembly: str, name: str) -> Code:
    lines, used = amdgcn.body(assembly, name), amdgcn.metadata(assembly)
    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count", "group_segment_fixed_size")
    text = amdgcn.instructions(lines)
    return Code(Resources(*(used[name] for name in names)), amdgcn.counts, text, text, amdgcn.loop(lines))


def digest(made) -> str:
    """Of the instructions in the ELF file of a compiled kernel, without what is said about them in its other sections."""
    elf = made.asm["cubin" if "cubin" in made.asm else "hsaco"]
    (table,), (size, count, names) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<3H", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + size * k) for k in range(count)]  # name, …, offset, size
    text = [s for s in sections if elf[sections[names][4] + s[0] :].startswith(b".text")]
    return hashlib.sha256(b"".join(elf[s[4] : s[4] + s[5]] for s in text)).hexdigest()


def main_path(code: Code, n: float | None) -> MainPath:
    """Per element: of the loop over tiles where there is one, else of the whole path."""
    each = code.body or code.path
    found = code.counts(each)
    per_element = {"instructions": len(each) / n} | {key: found[key] / n for key in found} if n else {}
    impossible = [] if code.understood else [[]]
    return MainPath(n, len(code.path), len(code.body), code.other_loops, impossible, code.counts(code.path), per_element)


@functools.cache
def version() -> str:
    """Of all that the machine code and its reader are made from."""
    digest = hashlib.sha256("".join(f"{name} {importlib.metadata.version(name)} " for name in ("torch", "triton")).encode())
    for pattern in SOURCES:
        for path in sorted(machine_code.ROOT.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    found = digest.hexdigest()[:16]
    for old in CACHE.glob("*"):
        if old.name != found:
            shutil.rmtree(old, ignore_errors=True)
    return found


def kept(function):
    """`function` of a job, whose result is taken from the cache where nothing has changed since. A process that finds another
    one at the same job waits for what that one makes: pytest's workers, each with a pool of its own, share the compiling."""

    @functools.wraps(function)
    def from_cache(job: Job):
        folder = CACHE / version()
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{function.__name__} {CALLS[job.call].op} {job.call} {NAMES[job.dtype]} {job.target} {job.fusion}"
        path, part = (folder / f"{stem}.{suffix}" for suffix in ("pickle", "part"))
        with (folder / f"{stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                part.write_bytes(pickle.dumps(function(job)))
                part.replace(path)
        return pickle.loads(path.read_bytes())

    return from_cache


@kept
def read(job: Job) -> list[TritonKernel]:
    """What is known of every kernel that a call launches."""
    call, found = CALLS[job.call], []
    for launch in launches(job.call, job.dtype):
        made = compiled(launch, job.target, job.fusion)
        dtype = NAMES[job.dtype]
        two, three = (", ".join(["float", *[dtype] * count]) for count in (2, 3))
        name, n, layouts = made.metadata.name, elements(launch, job.target), made.asm["ttgir"]
        op = launch.kernel.__module__.rpartition(".")[2] if n else call.op  # a backward's is the op
        code = nvidia(made.asm["cubin"]) if "cubin" in made.asm else amd(made.asm["amdgcn"], name)
        found.append(
            TritonKernel(
                *(op, job.target, f"Triton {name}, {job.label}", code.resources),
                *(len(code.text), code.counts(code.text), main_path(code, n)),
                cuda=call.cuda.format(dtype, two=two, three=three) if n else "",
                fast=call.hot and n is not None,
                adds="tt.reduce" in layouts,
                code=digest(made),
                fused=launch.options.get("enable_fp_fusion"),
                conversions=layouts.count("ttg.convert_layout"),
            )
        )
    return found


@kept
def digests(job: Job) -> list[str]:
    return [digest(compiled(launch, job.target, job.fusion)) for launch in launches(job.call, job.dtype)]


def kernel_names() -> tuple[set[str], set[str]]:
    """Of all kernels of the ops, and of those that CALLS launch."""
    from triton.runtime.jit import JITFunction

    import fastgen.triton  # noqa: F401

    modules = [module for name, module in sys.modules.items() if name.startswith("fastgen.triton.")]
    names = {
        name for module in modules for name, x in vars(module).items() if isinstance(x, JITFunction) and name.endswith("_kernel")
    }
    return names, {launch.kernel.__name__ for job in jobs(("90",)) for launch in launches(job.call, job.dtype)}


# ---- processes -------------------------------------------------------------------------------------------------------


def _start():
    os.environ.pop("TRITON_INTERPRET", None)  # under which there would be nothing to compile
    torch.set_num_threads(1)


def pool() -> ProcessPoolExecutor:
    """Processes that know nothing of this one's Triton."""
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"), _start)


def read_all(targets) -> list[TritonKernel]:
    with pool() as processes:
        return [kernel for kernels in processes.map(read, jobs(targets)) for kernel in kernels]
