"""Runs torch.compile for a GPU that is not there: fake tensors on one, Inductor up to the program that it writes, and Triton's
own compiler on each of fastgen's kernels in it. For a process of its own, since much of torch is replaced by stand-ins."""

import contextlib
import functools
import importlib.util
import json
import re
import tempfile
import types
from pathlib import Path

import torch
import torch._inductor.fx_passes.joint_graph
import torch._inductor.fx_passes.post_grad
import torch._inductor.graph
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._library.triton import get_triton_kernels_for_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

import fastgen
from fastgen._core import backends
from fastgen._core.tables import Table
from fastgen.triton import FUNCTIONS

TARGET = GPUTarget("cuda", 90, 32)
PROPERTIES = types.SimpleNamespace(
    **{"name": "H100", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32, "total_memory": 80 << 30},
    **{"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "regs_per_multiprocessor": 65536},
    **{"L2_cache_size": 50 << 20, "shared_memory_per_block_optin": 232448, "gcnArchName": ""},
)


class Compiled(Exception):
    """What a compiled program raises here in place of running."""


def pretend():
    """An H100 as far as torch and Triton ask before they run anything."""
    triton.runtime.driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: TARGET,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            is_active=lambda: True,
        )
    )
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (9, 0),
        "get_rng_state": lambda *device: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *state: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda device: 0,
        # another function than the last, since dynamo keeps handlers by function
        "_maybe_exchange_device": lambda device: 0,
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    for interface in (CudaInterface, CudaInterface.Worker):
        interface.get_device_properties = staticmethod(cuda["get_device_properties"])
        interface.current_device = staticmethod(cuda["current_device"])
    # the patterns are traced on the device; none of them has to do with fastgen
    for passes in (torch._inductor.fx_passes.joint_graph, torch._inductor.fx_passes.post_grad):
        passes.lazy_init = lambda *device: None
    torch._inductor.config.pattern_matcher = False
    torch._inductor.config.joint_graph_constant_folding = False
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.graph.GraphLowering.compile_to_module = to_module
    backends._why_not = lambda name, device: ""
    original, tables = fastgen.Schedule._make_table, {}

    def make_table(schedule, key, double, device):
        if (schedule, key, double) not in tables:
            real = original(schedule, key, double, torch.device("cpu"))
            with MODE:
                tables[schedule, key, double] = Table(torch.empty(real.rows.shape, dtype=real.rows.dtype, device=device), *real[1:])
        return tables[schedule, key, double]

    fastgen.Schedule._make_table = make_table


MODE = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
programs = []  # (calls in the graph, source)


def to_module(graph):
    calls = [str(node.target) for node in graph.module.graph.nodes if node.op == "call_function"]
    programs.append((calls, graph.codegen()[0].value))

    def call(arguments):
        raise Compiled

    return types.SimpleNamespace(call=call, __file__=None, __path__=None, runner=None)


def kernels(source, folder):
    """name, types of the arguments and PTX of each kernel of fastgen's in a program of Inductor's."""
    found = []
    pattern = r"# Original path: [^\n]*/fastgen/triton/[^\n]*\n\w+ = async_compile.triton\('(\w+)', '''\n(.*?)\n'''"
    for name, text in re.findall(pattern, source, re.S):
        text = text.replace("triton_helpers.set_driver_to_gpu()", "").replace("@triton_heuristics.user_autotune(", "@KEEP(")
        path = Path(folder) / f"{name}_{len(list(Path(folder).iterdir()))}.py"
        path.write_text("KEEP = lambda **options: lambda kernel: (kernel, options)\n" + text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel, options = getattr(module, name)
        meta = options["triton_meta"]
        constants = {(kernel.arg_names.index(k),): v for k, v in meta["constants"].items()}
        compiled = triton.compile(ASTSource(kernel, meta["signature"], constants, meta["configs"][0]), target=TARGET)
        found.append(
            {"name": name, "signature": meta["signature"], "constants": str(meta["constants"]), "ptx": compiled.asm["ptx"]}
        )
    return found


SCHEDULE = fastgen.Schedule.linear(40, 1e-3, 0.2)


def inputs(batch, event=(3, 8, 8), **like):
    with MODE:
        x = torch.empty(batch, *event, device="cuda:0", **like)
        t, seeds = (torch.empty(batch, dtype=torch.int64, device="cuda:0") for _ in range(2))
    return x, t, seeds


def run(function, calls, backend="triton", **options):
    """What torch.compile makes of `function` for these calls one after another."""
    torch._dynamo.reset()
    programs.clear()
    compiled = torch.compile(function, fullgraph=True, **options)
    made = []
    for arguments in calls:
        with MODE, fastgen.use_backend(backend), contextlib.suppress(Compiled):
            compiled(*arguments)
        made.append(len(programs))
    with tempfile.TemporaryDirectory() as folder:
        return {
            "made": made,  # how many programs there were after each call
            "graphs": [graph for graph, _ in programs],
            "launches": [re.findall(r"^ *(\w+_kernel_\d+\.run\(.*)$", source, re.M) for _, source in programs],
            "fused": [re.findall(r"^ *(triton_\w+\.run\(.*)$", source, re.M) for _, source in programs],
            "kernels": [kernels(source, folder) for _, source in programs],
        }


def sine_and(step):
    """Something of Inductor's before and after."""
    return lambda x, *rest: 2 * step(x.sin(), *rest)


def cases():
    noised = sine_and(lambda x, t, seed: fastgen.q_sample(x, t, SCHEDULE, seed=seed, offset=3))
    x, t, seeds = inputs(5)
    yield "tensors", run(noised, [(x, t, seeds)])
    yield "batches", run(noised, [inputs(batch) for batch in (5, 7, 9)], dynamic=True)
    yield "timesteps", run(noised, [(x, t, seeds) for t in (7, 8, 9, 30)])
    yield "seeds", run(noised, [(x, t, seed) for seed in (7, 8, 9, 10)])
    yield "far seeds", run(noised, [(x, t, seed) for seed in (5, 2**40, 2**62 + 1, -(2**40), -(2**62), 6, -(2**63), 2**63 + 5)])
    # Triton makes constants of ones where a number may be one, Inductor of every one
    ones = lambda x, t: fastgen.q_sample(x, t, SCHEDULE, seed=1, offset=1)  # noqa: E731
    yield "ones", run(ones, [(inputs(1, (1, 4))[0], 1)])
    far = lambda x, t: fastgen.q_sample(x, t, SCHEDULE, seed=-(2**62), offset=2**62)  # noqa: E731
    yield "far", run(far, [(x, 0)])
    yield "given noise", run(lambda x, t: fastgen.q_step(x, t, SCHEDULE, noise=x.cos()), [(x, t)])
    with MODE:
        last = x.to(memory_format=torch.channels_last)
    yield "channels last", run(lambda x, t, seed: fastgen.q_sample(x, t, SCHEDULE, seed=seed), [(last, t, seeds)])


def on_other_gpus():
    """The programs of the automatic order where the CUDA library has code for the GPU, and where it has none."""
    backends._AUTOMATIC["cuda"], backends._ARCHS = "cpp", "8.0 9.0"
    x, t, seeds = inputs(5)
    for capability in ((9, 0), (7, 0)):
        torch.cuda.get_device_capability = lambda device=None, capability=capability: capability
        backends._asked_capability.cache_clear()
        noised = lambda x, t, seed: fastgen.q_sample(x, t, SCHEDULE, seed=seed)  # noqa: E731
        yield "{}.{}".format(*capability), run(noised, [(x, t, seeds)], backend="auto")["graphs"]


def every_op():
    """Each op once, on its own: forward by its public function, backward by the op that autograd calls."""
    x, t, seeds = inputs(5)
    with MODE:
        m, wide, one, each = x.clone(), torch.cat([x, x], 1), x.sum(), x.sum((1, 2, 3))
    loss = functools.partial(fastgen.diffusion_loss, schedule=SCHEDULE)
    ops = torch.ops.fastgen_triton
    rows = SCHEDULE.diffusion_loss_table("v_prediction", None, x.device, x.dtype).rows
    back = (rows, t, 0, None, seeds, None, 0, None, 2, 0, 1.0, 1)
    calls = {
        "q_step": lambda x, m, t, s: fastgen.q_step(x, t, SCHEDULE, noise=m),
        "q_posterior": lambda x, m, t, s: fastgen.q_posterior(x, m, t, SCHEDULE),
        "ddpm_step": lambda x, m, t, s: fastgen.ddpm_step(x, m, t, SCHEDULE, seed=s, clip=1.0),
        "ddpm_step of float64": lambda x, m, t, s: fastgen.ddpm_step(x.double(), m, t, SCHEDULE, clip=0.1, noise=m),
        "ddpm_step with a learned variance": lambda x, m, t, s: fastgen.ddpm_step(
            x, wide.sin(), t, SCHEDULE, variance="learned_range", threshold=each.abs(), seed=s, return_x0=True
        ),
        "ddpm_step with guidance": lambda x, m, t, s: fastgen.ddpm_step(
            x, m, t, SCHEDULE, seed=s, clip=1.0, unconditional_output=m.sin(), guidance_scale=7.5
        ),
        "ddpm_step of float64 with guidance": lambda x, m, t, s: fastgen.ddpm_step(
            x.double(), m, t, SCHEDULE, noise=m, unconditional_output=m.sin(), guidance_scale=0.1
        ),
        "ddpm_step to out": lambda x, m, t, s: fastgen.ddpm_step(x, m, t, SCHEDULE, seed=s, out=torch.empty_like(x)),
        "ddim_step": lambda x, m, t, s: fastgen.ddim_step(x, m, 7, SCHEDULE),
        "randn": lambda x, m, t, s: fastgen.randn((5, 7), seed=s, device=x.device),
        "randn_torch_cuda": lambda x, m, t, s: fastgen.randn(
            (5, 7), seed=s, device=x.device, stream="torch-cuda", device_like="A100"
        ),
        "diffusion_loss": lambda x, m, t, s: loss(m, x, t, seed=s, prediction="v_prediction", weighting="min_snr"),
        "diffusion_loss of each sample": lambda x, m, t, s: loss(m, x, t, seed=s, loss="huber", weighting=each, reduction="none"),
        "diffusion_loss_backward": lambda x, m, t, s: ops.diffusion_loss_backward(one, m, x, *back),
        "diffusion_loss_backward_x0": lambda x, m, t, s: ops.diffusion_loss_backward_x0(one, m, x, *back),
        "vlb_terms": lambda x, m, t, s: fastgen.vlb_terms(m, x, t, SCHEDULE, seed=s),
        "step_log_prob": lambda x, m, t, s: fastgen.step_log_prob(x.sin(), x, m, t, SCHEDULE),
        "ddpm_step with its log-probability": lambda x, m, t, s: fastgen.ddpm_step(x, m, t, SCHEDULE, seed=s, return_log_prob=True),
        "bce_with_logits": lambda x, m, t, s: fastgen.bce_with_logits(x, m.sigmoid(), pos_weight=m.mean()),
        "bce_with_logits of each": lambda x, m, t, s: fastgen.bce_with_logits(x, m.sigmoid(), m.abs(), "none"),
        "bce_with_logits_backward": lambda x, m, t, s: ops.bce_with_logits_backward(one, x, m, None, None, 1),
        "gan_loss": lambda x, m, t, s: fastgen.discriminator_loss([x, m.sin()], m, label_smoothing=0.1),
        "gan_loss with monitors": lambda x, m, t, s: tuple(fastgen.discriminator_loss(x, m, monitors=True)[1]),
        "gan_loss_backward": lambda x, m, t, s: ops.gan_loss_backward(one, [x, m], 1, 0, 0.0, 1),
    }
    for name, call in calls.items():
        made = run(call, [(x, m, t, seeds)])
        yield name, {"graphs": made["graphs"], "kernels": [[kernel["name"] for kernel in found] for found in made["kernels"]]}


if __name__ == "__main__":
    pretend()
    found = {name: [kernel.__name__ for kernel in get_triton_kernels_for_op(f"fastgen_triton::{name}")] for name in FUNCTIONS}
    print(json.dumps({"found": found, **dict(cases()), "ops": dict(every_op()), "gpus": dict(on_other_gpus())}))
