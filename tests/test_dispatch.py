"""Which backend runs, and the compiled ops under torch.ops.fastgen."""

import contextvars
import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import DEVICES, channels_last, normal
from torch.utils._pytree import tree_map

import fastgen
from fastgen._core import declared

compiled = pytest.mark.skipif(not fastgen._core.backends.HAS_OPS, reason="the compiled library is absent")
AVAILABLE = {name for device in DEVICES for name in fastgen.available_backends(device)}
UNAVAILABLE = [name for name in ("cpp", "triton", "eager") if name not in AVAILABLE]


def run_python(code, **environment):
    """Runs `code` in a fresh interpreter that imports the same fastgen; (exit status, output)."""
    path = os.pathsep.join([os.path.dirname(os.path.dirname(fastgen.__file__)), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


# ---- choosing -------------------------------------------------------------------------------------------------------


def test_automatic_order():
    names = fastgen.available_backends()
    assert "eager" in names and names == tuple(name for name in ("cpp", "triton", "eager") if name in names)
    with fastgen.use_backend(None):
        assert fastgen.backend() == fastgen.backend("cpu") == ("cpp" if "cpp" in names else "eager")


def test_use_backend(backend, device):
    assert fastgen.backend(device) == backend
    with fastgen.use_backend("eager"):
        assert fastgen.backend(device) == "eager"
        with fastgen.use_backend(backend):
            assert fastgen.backend(device) == backend
            with fastgen.use_backend("auto"):
                assert fastgen.backend(device) == fastgen.available_backends(device)[0]
        assert fastgen.backend(device) == "eager"
    assert fastgen.backend(device) == backend


def test_use_backend_is_restored_after_an_error(backend, device):
    with pytest.raises(KeyError), fastgen.use_backend("eager"):
        raise KeyError
    assert fastgen.backend(device) == backend


def test_eager_runs_no_compiled_op(device, schedule):
    """The choice decides what runs, not only what `backend` says."""
    x = normal((2, 3), 0, device=device)
    for name, expected in [("eager", False), *([("cpp", True)] if "cpp" in fastgen.available_backends(device) else [])]:
        with fastgen.use_backend(name), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fastgen.q_sample(x, 5, schedule, seed=1)
            fastgen.ddpm_step(x, x, 5, schedule, seed=1)
            fastgen.bce_with_logits(x, x)
            fastgen.discriminator_loss(x, x)
        assert any(event.key.startswith("fastgen::") for event in profile.key_averages()) == expected


DERIVATIVES = {
    "q_sample": lambda schedule, x: fastgen.q_sample(x, 5, schedule, seed=1),
    "q_posterior": lambda schedule, x: fastgen.q_posterior(x, x, 5, schedule)[0],
    "ddpm_step": lambda schedule, x: fastgen.ddpm_step(x, x, 5, schedule, seed=1, clip=3.0),
    "bce_with_logits": lambda schedule, x: fastgen.bce_with_logits(x, torch.zeros_like(x), reduction="sum"),
    "discriminator_loss": lambda schedule, x: fastgen.discriminator_loss(x, x[0], label_smoothing=0.1),
}


@pytest.mark.parametrize("function", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_functional_derivatives_are_right_or_refused(device, schedule, function, transform):
    """A derivative by torch.func, in reverse or forward mode, may be refused but never be zero in silence."""
    x = torch.ones(2, 3, dtype=torch.float64, device=device)
    f = lambda x: function(schedule, x).sum()  # noqa: E731
    leaf = x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(f(leaf), leaf)
    try:
        derivative = torch.func.grad(f)(x) if transform == "grad" else torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(derivative, exact if transform == "grad" else exact.sum())


def test_unknown_names_are_refused():
    for name in ("cuda", "", "EAGER", 1):
        with (
            pytest.raises(ValueError, match="^name: expected one of 'cpp', 'triton', 'eager' or 'auto'"),
            fastgen.use_backend(name),
        ):
            pass


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_unavailable_backends_are_refused(name):
    """The message says why, and what there is."""
    before = fastgen.backend()
    with (
        pytest.raises(RuntimeError, match=rf"^name: backend '{name}' is not available.*available: .*'eager'"),
        fastgen.use_backend(name),
    ):
        pass
    assert fastgen.backend() == before


def test_threads_choose_for_themselves():
    inside, done, seen = threading.Event(), threading.Event(), {}
    automatic = fastgen.backend()

    def choose_eager():
        seen["start"] = fastgen.backend()
        with fastgen.use_backend("eager"):
            inside.set()
            done.wait(10)
            seen["end"] = fastgen.backend()

    with fastgen.use_backend(fastgen.available_backends()[0]):
        thread = threading.Thread(target=choose_eager)
        thread.start()
        assert inside.wait(10)
        seen["main"] = fastgen.backend()
        done.set()
        thread.join()
    assert seen == {"start": automatic, "main": fastgen.available_backends()[0], "end": "eager"}


@pytest.fixture
def gpu(monkeypatch):
    """As if torch found a GPU, for which Triton is installed."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "triton", sys)
    for name in ("CC", "CXX", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)


def python_h(folder):
    folder.mkdir(exist_ok=True)
    (folder / "Python.h").touch()
    return str(folder)


def program(path):
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    "compiler, header, triton, compile",
    [
        ("gcc", "include", "available", "the compiler g++ was not found"),
        ("clang", "include", "available", "the compiler g++ was not found"),
        ("g++", "include", "the compiler gcc or clang was not found", "available"),
        (None, "include", "the compiler gcc or clang was not found", "the compiler g++ was not found"),
        ("gcc", None, "Python.h is missing", "the compiler g++ was not found"),
        ("g++", None, "the compiler gcc or clang was not found", "Python.h is missing"),
        ("gcc", "CPATH", "available", "the compiler g++ was not found"),
    ],
)
def test_backend_info_says_what_compiles_at_run_time(gpu, monkeypatch, tmp_path, compiler, header, triton, compile):
    """Triton launches nothing without a C compiler and Python's headers, and torch.compile needs the same of C++."""
    monkeypatch.setenv("PATH", str(tmp_path))
    if compiler:
        program(tmp_path / compiler)
    monkeypatch.setattr(fastgen._core.backends.sysconfig, "get_path", lambda *_: str(tmp_path / "include"))
    if header:
        folder = python_h(tmp_path / header)
        if header == "CPATH":
            monkeypatch.setenv("CPATH", f"/nowhere:{folder}")
    lines = dict(line.split(": ", 1) for line in fastgen.backend_info().splitlines()[1:])
    assert triton in lines["triton on cuda"] and compile in lines["torch.compile"]
    assert ("triton" in fastgen.available_backends("cuda")) == (triton == "available")


def test_a_named_compiler_is_the_one(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "icx")
    assert "the compiler icx was not found" in fastgen.backend_info()
    program(tmp_path / "icx")
    assert "the compiler icx was not found" not in fastgen.backend_info()
    monkeypatch.setenv("CXX", "ccache clang++ -stdlib=libc++")  # which torch.compile takes apart into words
    assert "the compiler ccache was not found" in fastgen.backend_info()
    program(tmp_path / "ccache")
    assert "the compiler ccache was not found" not in fastgen.backend_info()


def test_backend_info():
    text = fastgen.backend_info()
    assert torch.__version__ in text and all(f"{device}: backend '{fastgen.backend(device)}'" in text for device in ("cpu",))


# ---- the environment ------------------------------------------------------------------------------------------------


@pytest.fixture
def import_with(monkeypatch):
    """What importing fastgen with FASTGEN_BACKEND=name does, without a process of its own."""

    def choose(name):
        monkeypatch.setenv("FASTGEN_BACKEND", name)
        monkeypatch.setattr(fastgen._core.backends, "_choice", contextvars.ContextVar("fresh", default=None))
        monkeypatch.setattr(fastgen._core.backends, "_traced_choice", None)
        fastgen._core.backends._from_environment()

    return choose


@pytest.mark.parametrize("name", [*fastgen.available_backends(), "auto", ""])
def test_environment_chooses(import_with, name):
    import_with(name)
    assert fastgen.backend() == (name if name not in ("auto", "") else fastgen.available_backends()[0])
    with fastgen.use_backend("auto"):  # what the program says wins
        assert fastgen.backend() == fastgen.available_backends()[0]


@pytest.mark.parametrize("name, error", [("nonsense", ValueError), *[(name, RuntimeError) for name in UNAVAILABLE]])
def test_bad_environment_is_refused_at_the_first_op(import_with, name, error):
    import_with(name)
    for call in (fastgen.backend, lambda: fastgen.randn((2, 3), seed=1)):
        with pytest.raises(error, match=f"^backend: .*'{name}'|^backend: .*'eager'"):
            call()


def test_environment_in_another_process():
    code = "import fastgen; print(fastgen.backend(), fastgen.randn((1, 1), seed=1).shape)"
    assert run_python(code, FASTGEN_BACKEND="eager") == (0, "eager torch.Size([1, 1])\n")


# ---- the compiled ops -----------------------------------------------------------------------------------------------

T2 = torch.tensor([3, 0])
SEEDS = torch.tensor([1, -2])
STATES = torch.Generator().manual_seed(3).get_state()  # of torch's generator


def op_samples():
    """(op, arguments, keyword arguments) of every compiled op, with each kind of timestep, noise and option."""
    schedule, cpu = fastgen.Schedule.linear(10), torch.device("cpu")
    x, m, z = (normal((2, 3, 4), seed) for seed in range(3))
    two, image = normal((2, 6, 4), 3), normal((2, 3, 4, 5), 4)
    forward = [
        (x, None, 3, None, None, 5, 0),
        (x, T2, 0, z, None, None, 0),
        (x.bfloat16(), T2, 0, None, SEEDS, None, 2**33),
        (channels_last(image), None, 3, None, torch.tensor([7]), None, 0),
        (x.transpose(0, 2).contiguous().transpose(0, 2), None, 3, None, None, None, 0),
        (x[:0], T2[:0], 0, None, None, 5, 0),
    ]
    image_bytes, rows = (image * 50).to(torch.uint8), schedule.q_sample_table(cpu, torch.float32).rows
    for noise in (None, image.bfloat16()):
        arguments = image_bytes, rows, None, 3, noise, None, 5 if noise is None else None, 0
        yield "q_sample", arguments, {}
        yield "q_sample_out", arguments, {"out": image.half()}
    for op, table in (("q_sample", schedule.q_sample_table), ("q_step", schedule.q_step_table)):
        for data, *rest in forward:
            arguments = (data, table(cpu, data.dtype).rows, *rest)
            yield op, arguments, {}
            yield op + "_out", arguments, {"out": torch.empty(data.shape, dtype=data.dtype)}
        rows = table(cpu, torch.float32).rows
        drawn = STATES.clone(), 3, True, image_bytes, rows, None, 3
        yield op + "_torch", drawn, {"out": torch.empty(image.shape, dtype=torch.bfloat16)}
        yield op + "_torch", (STATES.repeat(2, 1), 0, False, image, rows, T2, 0), {"out": torch.empty_like(image)}
    reverse = [
        (x, m, None, 3, z, None, None, None, None, False),
        (x, m.double(), T2, 0, None, None, 5, 1.5, None, False),
        (x.half(), m.bfloat16(), T2, 0, None, SEEDS, None, None, torch.ones(2), False),
        (x, two, None, 3, None, torch.tensor([7]), None, 1.0, None, True),
        (channels_last(image), image, None, 3, None, None, None, None, None, False),
        (x[:0], m[:0], T2[:0], 0, None, None, 5, None, None, False),
    ]
    for data, output, *rest in reverse:
        dtype = torch.promote_types(data.dtype, output.dtype)
        ddpm = schedule.ddpm_step_table("epsilon", "learned" if rest[-1] else "beta", cpu, dtype).rows
        steps = (
            [("ddpm_step", ddpm)]
            if rest[-1]
            else [("ddpm_step", ddpm), ("ddim_step", schedule.ddim_step_table("sample", 0.5, cpu, dtype).rows)]
        )
        for op, rows in steps:
            arguments = (data, output, rows, *rest)
            yield op, arguments, {}
            yield op + "_x0", arguments, {}
            yield op + "_out", arguments, {"out": torch.empty(data.shape, dtype=dtype)}
            if op == "ddpm_step" and not arguments[-1]:
                for noise in (None, data):
                    yield "ddpm_step_plain", (data, output, rows, 3, noise, 2**40, 0.5), {}
            if dtype is torch.float32 and data.numel() > 15 and data.is_contiguous() and not arguments[-1]:
                out = torch.empty(data.shape, dtype=dtype)
                drawn = STATES.clone(), 0, True, data, output, rows, *rest[:2]
                yield op + "_torch", drawn, {"x0": torch.empty_like(out), "out": out}
                if op == "ddpm_step":
                    yield "ddpm_step_torch_plain", (STATES.clone(), 0, True, data, output, rows, 3, 0.5), {}
            arguments = (*arguments, output.flip(-1), 2.5)  # the unconditional output and the scale
            yield op, arguments, {}
            yield op + "_x0", arguments, {}
            yield op + "_out", (*arguments, torch.empty(data.shape, dtype=dtype)), {"out": torch.empty(data.shape, dtype=dtype)}
    posterior = schedule.q_posterior_table(cpu, torch.float32).rows
    for arguments in [(x, m, None, 3), (x.bfloat16(), m, T2, 0), (channels_last(image), image, None, 0)]:
        yield "q_posterior", (*arguments[:2], posterior, *arguments[2:]), {}
    for arguments in [(torch.empty(2, 5), None, 7, 0), (torch.empty(2, 3, 4).half(), SEEDS, None, 3)]:
        yield "randn", arguments, {}
        yield "randn_torch_cuda", (*arguments[:-1], 8, 512), {}
    yield "torch_randn", (torch.empty(2, 50).half(), STATES.clone(), True), {}
    yield "torch_randn", (torch.empty(2, 50), STATES.repeat(2, 1), False), {}
    yield "torch_skip", (STATES.clone(), 700), {}
    yield "torch_skip", (STATES.repeat(2, 1), 0), {}
    for data in (x, image.bfloat16(), channels_last(image), x.transpose(0, 2).double(), x[:0]):
        for layout in (False, True):
            yield "to_uint8", (data, layout), {}
        out = torch.empty(data.shape, dtype=torch.uint8)
        yield "to_uint8_out", (data,), {"out": out}
        yield "to_uint8_out", (data,), {"out": channels_last(out)}
    for reduction in range(3):
        for arguments in [
            (x, m, None, None, reduction),
            (x.bfloat16(), m, torch.tensor(2.0), z.abs(), reduction),
            (channels_last(image), image.sigmoid(), image.abs(), None, reduction),
        ]:
            yield "bce_with_logits", arguments, {}
            yield "bce_with_logits_wide", arguments, {}
            loss = torch.ops.fastgen.bce_with_logits(*arguments)
            yield "bce_with_logits_backward", (torch.ones_like(loss), *arguments), {}
    for options in [
        ([x, m.bfloat16()], 1, 0, 0.1, 1),
        ([x.double(), channels_last(image), m[:1]], 2, 0, 0.0, 2),
        ([image[..., 1:], x.transpose(0, 2)], 0, 1, 0.0, 1),
    ]:
        for monitors in (False, True):
            yield "gan_loss", (*options, monitors, not monitors), {}
        yield "gan_loss_backward", (torch.tensor(2.0), *options), {}
    terms = [
        (x, m, None, 3, None, None, None, 5, 0, None, False, 0, 1.0, True, -1, 1.0, None, 1.0),
        (x.bfloat16(), m, T2, 0, None, None, SEEDS, None, 2**33, 1.5, False, 1, 0.5, False, -1, 1.0, None, 1.0),
        (
            torch.cat([image] * 2, 1),
            channels_last(image),
            T2,
            0,
            image,
            *(None,) * 3,
            0,
            None,
            True,
            2,
            1.0,
            True,
            -1,
            1.0,
            None,
            1.0,
        ),
        (two.double(), m.half(), None, 0, None, z, None, None, 0, 1.0, True, 0, 1.0, False, -1, 1.0, None, 1.0),
        (two, m, None, 0, None, z, None, None, 0, None, True, 0, 0.5, True, 2, 0.5, torch.ones(2), 0.3),
        (two.half(), m, T2, 0, None, None, None, 5, 0, None, True, 0, 0.5, False, 0, 1.0, None, 0.3),
    ]
    data_bytes = (m * 50).to(torch.uint8)
    terms.append((x.bfloat16(), data_bytes, T2, 0, None, None, None, 5, 0, None, False, 0, 1.0, True, -1, 1.0, None, 1.0))
    for output, data, *rest in terms:
        dtype = torch.float64 if torch.float64 in (output.dtype, data.dtype) else torch.float32
        rows = schedule.vlb_terms_table(
            "epsilon", "learned" if rest[8] else "beta", cpu, dtype, "uniform" if rest[12] >= 0 else None
        ).rows
        gradient = torch.ones(2 if rest[11] else (), dtype=dtype)
        yield "vlb_terms", (output, data, rows, *rest), {}
        yield "vlb_terms_backward", (gradient, output, data, rows, *rest, rest[9] == 1), {}
        yield "vlb_terms_and_gradient", (output, data, rows, *rest, rest[9] == 1, rest[12] >= 0), {}
        if rest[11] and rest[12] < 0:
            yield "vlb_terms_and_error", (output, data, rows, *rest), {}
    log_probs = [
        (x, m, None, 3, None, False, 1.0),
        (x.bfloat16(), m, T2.clamp(min=1), 0, 1.5, False, 0.5),
        (channels_last(image), torch.cat([image, image], 1), T2 + 1, 0, None, True, 1.0),
        (x.half(), two.double(), None, 2, 1.0, True, 1.0),
        (x[:0], m[:0], T2[:0], 0, None, False, 1.0),
    ]
    for data, output, *rest in log_probs:
        dtype = torch.float64 if torch.float64 in (output.dtype, data.dtype) else torch.float32
        rows = schedule.ddpm_step_table("epsilon", "learned" if rest[-2] else "beta", cpu, dtype).rows
        arguments = (data.flip(1), data, output, rows, *rest)
        yield "step_log_prob", arguments, {}
        yield "step_log_prob_and_gradient", arguments, {}
        weights = schedule.step_log_weight_table("epsilon", "learned" if rest[-2] else "beta", cpu, dtype).rows
        yield "step_log_weight", (*arguments[:3], weights, *rest), {}
        for source in (
            (data.flip(2), None, None, None, 1.0),
            (None, SEEDS[: len(data)], None, output, 1.5),
            (None, None, 5, None, 1.0),
        ):
            made_as = torch.promote_types(data.dtype, output.dtype)
            for op in ("ddpm_step_log_prob", "ddim_step_log_prob"):
                yield op, (*arguments[1:], *source), {}
                yield op + "_out", (*arguments[1:], *source), {"out": torch.empty(data.shape, dtype=made_as)}
        yield "step_log_prob_backward", (torch.ones(len(data), dtype=dtype), *arguments), {}
        yield "step_log_prob_backward_x", (torch.ones(len(data), dtype=dtype), *arguments), {}
    moments, nhwc_moments = torch.cat([image, image], 1), channels_last(torch.cat([image, image], 1))
    gaussians = [
        (x, m),
        (x.bfloat16(), m),
        (channels_last(image), image),
        (x.half(), m.double()),
        (x[:0], m[:0]),
        moments.chunk(2, 1),
        nhwc_moments.chunk(2, 1),
    ]
    for mean, log_variance in gaussians:
        result = torch.promote_types(mean.dtype, log_variance.dtype)
        computed = torch.float64 if result == torch.float64 else torch.float32
        each = torch.ones(len(mean), dtype=computed)
        sources = (mean.flip(1), None, None, 0), (None, SEEDS[: len(mean)], None, 2**33), (None, None, 5, 0)
        for noise, bounds in zip(sources, ((-math.inf, math.inf), (-30.0, 20.0), (-math.inf, 0.5)), strict=True):
            operands = log_variance, *noise, *bounds
            yield "reparameterize", (mean, *operands), {}
            yield "reparameterize_kl", (mean, *operands), {}
            yield "reparameterize_backward", (mean.to(result), *operands), {}
            yield "reparameterize_kl_backward", (mean.to(result), each, mean, *operands), {}
        for others in ((None, None), (mean.flip(1), None), (None, log_variance.flip(1)), (mean.flip(1), log_variance)):
            yield "gaussian_kl", (mean, log_variance, *others, -30.0, math.inf), {}
            yield "gaussian_kl_backward", (each, mean, log_variance, *others, -30.0, math.inf), {}
    losses = [
        (x, m, None, 3, None, None, 5, 0, None, 0, 0, 1.0, 1),
        (x.bfloat16(), m, T2, 0, None, SEEDS, None, 2**33, torch.ones(2), 2, 2, 0.5, 2),
        (channels_last(image), image, T2, 0, image, None, None, 0, None, 2, 1, 1.0, 1),
        (x.double(), m.half(), None, 3, None, None, None, 0, None, 1, 0, 1.0, 1),
    ]
    losses.append((x.bfloat16(), data_bytes, T2, 0, None, SEEDS, None, 0, None, 2, 0, 1.0, 1))
    for output, data, *rest in losses:
        dtype = torch.float64 if torch.float64 in (output.dtype, data.dtype) else torch.float32
        prediction = ("epsilon", "sample", "v_prediction")[rest[-4]]
        rows = schedule.diffusion_loss_table(prediction, 5.0, cpu, dtype).rows
        for reduction in (0, rest[-1]):
            arguments = (output, data, rows, *rest[:-1], reduction)
            yield "diffusion_loss", arguments, {}
            if reduction:
                yield "diffusion_loss_and_gradient", arguments, {}
            gradient = torch.ones(2 if reduction == 0 else (), dtype=dtype)
            yield "diffusion_loss_backward", (gradient, *arguments), {}
            if prediction != "epsilon" and data.is_floating_point():
                yield "diffusion_loss_backward_x0", (gradient, *arguments), {}


@compiled
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", declared.OPS)
def test_opcheck(op, device):
    if not declared.OPS[op].cuda and device != "cpu":
        pytest.skip("an op of the CPU alone")
    samples = [sample for sample in op_samples() if sample[0] == op]
    assert len(samples) >= 2
    for sample in samples:
        arguments, keywords = tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, sample[1:])
        torch.library.opcheck(getattr(torch.ops.fastgen, op).default, arguments, keywords)


BAD_CALLS = """
import torch, fastgen
x, cpu = torch.zeros(3, 4), torch.device("cpu")
schedule = fastgen.Schedule.linear(10)
rows, posterior = schedule.q_sample_table(cpu, x.dtype).rows, schedule.q_posterior_table(cpu, x.dtype).rows
step = schedule.ddpm_step_table("epsilon", "learned", cpu, x.dtype).rows
loss_rows = schedule.diffusion_loss_table("v_prediction", None, cpu, x.dtype).rows
vlb_rows = schedule.vlb_terms_table("epsilon", "beta", cpu, x.dtype, None).rows
ops, t = torch.ops.fastgen, torch.tensor([1, 2, 3])


def loss(m=x, x0=x, rows=loss_rows, t=None, index=1, noise=None, seeds=None, seed=1, weights=None, kinds=(2, 0, 1), op=None):
    return (op or ops.diffusion_loss)(m, x0, rows, t, index, noise, seeds, seed, 0, weights, kinds[0], kinds[1], 1.0, kinds[2])


calls = {
    "index of the loss": lambda: loss(index=10),
    "t of the loss": lambda: loss(t=t + 7),
    "x0 of the loss": lambda: loss(x0=x[:2]),
    "x0 that is not read": lambda: loss(x0=x[:2], kinds=(0, 0, 1)),
    "noise of the loss": lambda: loss(noise=x[:2], seed=None),
    "no noise": lambda: loss(seed=None),
    "seeds of the loss": lambda: loss(seeds=t[:2], seed=None),
    "columns of the loss": lambda: loss(rows=rows),
    "precision of the loss": lambda: loss(m=x.double()),
    "weights of the loss": lambda: loss(weights=torch.ones(2)),
    "precision of the weights": lambda: loss(weights=torch.ones(3).double()),
    "prediction": lambda: loss(kinds=(3, 0, 1)),
    "kind of the loss": lambda: loss(kinds=(0, -1, 1)),
    "reduction of the loss": lambda: loss(kinds=(0, 0, 3)),
    "gradient of each loss": lambda: ops.diffusion_loss_backward(
        torch.ones(2), x, x, loss_rows, None, 1, None, None, 1, 0, None, 2, 0, 1.0, 0
    ),
    "gradients of one loss": lambda: ops.diffusion_loss_backward(
        torch.ones(3), x, x, loss_rows, None, 1, None, None, 1, 0, None, 2, 0, 1.0, 1
    ),
    "gradient to an x0 that is not read": lambda: ops.diffusion_loss_backward_x0(
        torch.ones(()), x, x, loss_rows, None, 1, None, None, 1, 0, None, 0, 0, 1.0, 1
    ),
    "the loss apart, of a term by itself": lambda: ops.vlb_terms_and_gradient(
        x, x, vlb_rows, None, 0, None, None, None, 1, 0, None, False, 0, 1.0, True, -1, 1.0, None, 1.0, False, True
    ),
    "the error of terms added up": lambda: ops.vlb_terms_and_error(
        x, x, vlb_rows, None, 0, None, None, None, 1, 0, None, False, 0, 1.0, False, -1, 1.0, None, 1.0
    ),
    "gradient of each loss at once": lambda: loss(kinds=(2, 0, 0), op=ops.diffusion_loss_and_gradient),
    "index": lambda: ops.q_sample(x, rows, None, 10, None, None, 1, 0),
    "negative index": lambda: ops.q_sample(x, rows, None, -1, None, None, 1, 0),
    "t": lambda: ops.q_sample(x, rows, t + 7, 0, None, None, 1, 0),
    "t of another length": lambda: ops.q_sample(x, rows, t[:2], 0, None, None, 1, 0),
    "t of another dtype": lambda: ops.q_sample(x, rows, t.int(), 0, None, None, 1, 0),
    "noise": lambda: ops.q_sample(x, rows, None, 1, x[:2], None, None, 0),
    "seeds": lambda: ops.q_sample(x, rows, None, 1, None, t[:2], None, 0),
    "columns": lambda: ops.q_sample(x, rows[:, :1].contiguous(), None, 1, None, None, 1, 0),
    "precision of the rows": lambda: ops.q_sample(x, rows.double(), None, 1, None, None, 1, 0),
    "out": lambda: ops.q_sample_out(x, rows, None, 1, None, None, 1, 0, out=x[:2].clone()),
    "dtype of out": lambda: ops.q_sample_out(x, rows, None, 1, None, None, 1, 0, out=x.double()),
    "dtype": lambda: ops.q_sample(x.long(), rows, None, 1, None, None, 1, 0),
    "model_output": lambda: ops.ddpm_step(x, x[:2], step, None, 1, None, None, 1, None, None, False),
    "learned": lambda: ops.ddpm_step(x, x, step, None, 1, None, None, 1, None, None, True),
    "threshold": lambda: ops.ddpm_step(x, x, step, None, 1, None, None, 1, None, torch.ones(2), False),
    "precision of the threshold": lambda: ops.ddpm_step(x, x, step, None, 1, None, None, 1, None, torch.ones(3).double(), False),
    "unconditional": lambda: ops.ddpm_step(x, x, step, None, 1, None, None, 1, None, None, False, x[:2]),
    "dtype of unconditional": lambda: ops.ddpm_step(x, x, step, None, 1, None, None, 1, None, None, False, x.half()),
    "x0": lambda: ops.ddpm_step_out(x, x, step, None, 1, None, None, 1, None, None, False, x0=x[:2].clone(), out=x.clone()),
    "x_t": lambda: ops.q_posterior(x, x[:2], posterior, None, 1),
    "no seed": lambda: ops.randn(x, None, None, 0),
    "no seed of torch's": lambda: ops.randn_torch_cuda(x, None, None, 0, 256),
    "offset between": lambda: ops.randn_torch_cuda(x, None, 1, 2, 256),
    "half a block of threads": lambda: ops.randn_torch_cuda(x, None, 1, 0, 128),
    "target": lambda: ops.bce_with_logits(x, x[:2], None, None, 1),
    "weight": lambda: ops.bce_with_logits(x, x, x[:2], None, 1),
    "reduction": lambda: ops.bce_with_logits(x, x, None, None, 3),
    "gradient": lambda: ops.bce_with_logits_backward(x[:2], x, x, None, None, 0),
    "no noise of a sample": lambda: ops.reparameterize(x, x, None, None, None, 0, -30.0, 20.0),
    "mean": lambda: ops.reparameterize(x[:2], x, None, None, 1, 0, -30.0, 20.0),
    "log_variance": lambda: ops.reparameterize_kl(x, x[:, :3], None, None, 1, 0, -30.0, 20.0),
    "seeds of a sample": lambda: ops.reparameterize(x, x, None, t[:2], None, 0, -30.0, 20.0),
    "noise of a sample": lambda: ops.reparameterize(x, x, x[:2], None, None, 0, -30.0, 20.0),
    "a mean that is a number": lambda: ops.reparameterize(x[0, 0], x[0, 0], None, None, 1, 0, -30.0, 20.0),
    "integers for a mean": lambda: ops.reparameterize(x.long(), x, None, None, 1, 0, -30.0, 20.0),
    "gradient of a sample": lambda: ops.reparameterize_backward(x[:2], x, None, None, 1, 0, -30.0, 20.0),
    "gradient of a divergence": lambda: ops.reparameterize_kl_backward(x, x[:2, 0], x, x, None, None, 1, 0, -30.0, 20.0),
    "precision of that": lambda: ops.reparameterize_kl_backward(x, x[:, 0].double(), x, x, None, None, 1, 0, -30.0, 20.0),
    "mean of that": lambda: ops.reparameterize_kl_backward(x, x[:, 0], x[:2], x, None, None, 1, 0, -30.0, 20.0),
    "other_mean": lambda: ops.gaussian_kl(x, x, x[:2], None, -30.0, 20.0),
    "other_log_variance": lambda: ops.gaussian_kl(x, x, None, x[:2], -30.0, 20.0),
    "variances of another shape": lambda: ops.gaussian_kl(x, x[:, :3], None, None, -30.0, 20.0),
    "gradient of two Gaussians": lambda: ops.gaussian_kl_backward(torch.ones(2), x, x, None, None, -30.0, 20.0),
    "no logits": lambda: ops.gan_loss([], 0, 0, 0.0, 1, False, False),
    "integer logits": lambda: ops.gan_loss([x, x.long()], 1, 0, 0.0, 1, False, False),
    "logits elsewhere": lambda: ops.gan_loss([x, x.to("meta")], 1, 0, 0.0, 1, False, True),
    "number of real logits": lambda: ops.gan_loss([x, x], 3, 0, 0.0, 1, False, False),
    "kind": lambda: ops.gan_loss([x, x], 1, 3, 0.0, 1, False, False),
    "smoothing": lambda: ops.gan_loss([x, x], 1, 0, 1.0, 1, False, False),
    "no reduction": lambda: ops.gan_loss([x, x], 1, 0, 0.0, 0, False, False),
    "gradient of the GAN loss": lambda: ops.gan_loss_backward(x, [x, x], 1, 0, 0.0, 1),
}
for name, call in calls.items():
    try:
        call()
    except RuntimeError:
        continue
    print(name, "was accepted")
print("done")
"""


@compiled
def test_memory_is_safe_without_the_python_layer():
    """What would read or write outside a tensor is refused by the ops themselves. In a process of its own, lest it crash."""
    assert run_python(BAD_CALLS) == (0, "done\n")
