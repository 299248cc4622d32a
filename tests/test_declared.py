"""The table of ops (fastgen/_core/declared.py): it says what torch has, and an op that is in it is tested in every way there is."""

import importlib.util
import inspect
import pickle
import pickletools
import runpy
import sys
from pathlib import Path

import conftest
import every_call
import pytest
import test_checks
import test_compile
import test_dispatch
import test_threads
import torch
from dispatched import Dispatched

import fastgen
from fastgen._core import backends, declared, dispatch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `tools`, under every import mode of pytest
compiled = pytest.mark.skipif(not backends.HAS_OPS, reason="the compiled library is absent")
sources = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")
# Where the derivatives and the mapping of each stem's ops under torch.func are tested.
TRANSFORMED = {
    **dict.fromkeys(("q_sample", "q_posterior", "ddpm_step", "randn"), "test_transforms.py"),
    **{
        stem: f"test_{stem}.py"
        for stem in (
            "bce_with_logits",
            "gan_loss",
            "diffusion_loss",
            "vlb_terms",
            "step_log_prob",
            "to_uint8",
            "reparameterize",
            "gaussian_kl",
        )
    },
}


@compiled
def test_the_table_says_what_torch_has():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastgen::")}
    assert names - {"cpu_capability"} == set(declared.OPS)
    for name, op in declared.OPS.items():
        schema = getattr(torch.ops.fastgen, name).default._schema
        assert str(schema).removeprefix("fastgen::") == str(torch._C.parse_schema(op.schema))
        assert [a.name for a in schema.arguments] == [a.name for a in op.arguments]
        assert op.written == tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def test_arguments_in_groups():
    op = declared.OPS["ddpm_step_out"]
    o, x0, out = op.grouped("x", "m", "rows", None, 3, seed=5, out="out", x0="x0")
    assert o == declared.OPERANDS["ddpm_step"]("x", "m", "rows", None, 3, seed=5) and (x0, out) == ("x0", "out")
    assert o.guidance == 1.0 and o.learned is False and o.clip is None
    gradient, o = declared.OPS["bce_with_logits_backward"].grouped("g", "x", "y", None, None, 1)
    assert gradient == "g" and o.reduction == 1
    assert declared.OPS["ddpm_step_plain"].grouped(1, 2, 3, 4, 5, 6, clip=7) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("text", ["Tensor", "Tensor? x y", "Tensor(a) x", "Tensor? x=3", "double x=1.0"])
def test_what_is_no_argument(text):
    with pytest.raises(ValueError, match="no argument of a schema"):
        declared._argument(text)


@pytest.mark.parametrize(
    "arguments, keywords", [((1, 2, 3), {}), ((1, 2, 3, 4, 5), {}), ((1, 2, 3), {"t": 4, "indx": 5}), ((1,), {"x0": 2})]
)
def test_arguments_that_do_not_fit(arguments, keywords):
    op = declared.OPS["q_posterior"]
    if len(arguments) == 5:
        arguments += (6,)
    with pytest.raises(TypeError, match=r"expected the arguments of q_posterior\(Tensor x0"):
        op.grouped(*arguments, **keywords)


def test_every_op_has_a_fake():
    assert set(dispatch.FAKES) == set(declared.OPS)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_has_the_same_arguments():
    import fastgen.triton

    assert set(fastgen.triton.FUNCTIONS) == {name for name, op in declared.OPS.items() if op.triton}
    for name, (function, written) in fastgen.triton.FUNCTIONS.items():
        op = declared.OPS[name]
        assert list(inspect.signature(function).parameters) == [argument.name for argument in op.arguments]
        assert written == op.written


@sources
@pytest.mark.parametrize("stem", declared.STEMS)
def test_every_stem_has_its_files(stem):
    files = [f"csrc/{stem}/{stem}{end}" for end in (".h", "_op.cpp", "_cpu.cpp", "_cuda.cu", "_device.h")]
    files += [f"fastgen/_ops/{stem}.py", f"fastgen/triton/{stem}.py", f"tests/test_{stem}.py", f"benchmarks/bench_{stem}.py"]
    assert not [file for file in files if not (ROOT / file).exists()]


@compiled
def test_every_op_is_checked():
    """By torch.library.opcheck, and besides what is contiguous it takes what is not."""
    samples = list(test_dispatch.op_samples())
    assert {op for op, *_ in samples} == set(declared.OPS)
    strided = {declared.OPS[op].stem for op, arguments, _ in samples if not all(x.is_contiguous() for x in tensors(arguments))}
    assert strided == set(declared.STEMS) - {"randn"}  # which has no input


def tensors(arguments):
    for x in arguments:
        if isinstance(x, list):
            yield from x
        elif isinstance(x, torch.Tensor):
            yield x


@compiled
def test_every_op_is_called():
    """By tests/every_call.py, on which the tests of allocations, launches and unread memory stand, and compute-sanitizer's run."""
    i = every_call.inputs("cpu", (2, 3, 5))
    with fastgen.use_backend("cpp"), Dispatched() as ops:
        for call in every_call.CALLS.values():
            call(i)
    ahead = {name for name, op in declared.OPS.items() if not op.cuda}  # the CPU's own, which autograd alone calls
    assert {name for name in declared.OPS if ops["fastgen." + name]} == set(declared.OPS) - ahead


@compiled
def test_every_stem_runs_with_threads():
    x, schedule = torch.linspace(-2, 2, 3 * 4 * 9).reshape(3, 4, 9), fastgen.Schedule.linear(40)
    with fastgen.use_backend("cpp"), Dispatched() as ops:
        for function in test_threads.FUNCTIONS:
            list(function(schedule, x, torch.tensor(test_threads.T)))
    assert {op.stem for name, op in declared.OPS.items() if ops["fastgen." + name]} == set(declared.STEMS)


def test_every_stem_is_transformed():
    assert TRANSFORMED.keys() == set(declared.STEMS)
    for stem, file in TRANSFORMED.items():
        text = (Path(__file__).parent / file).read_text()
        assert "torch.func." in text and "vmap(" in text
        assert any(f"fastgen.{name}(" in text for name in public_functions(stem))


@compiled
def test_every_stem_compiles():
    """Under torch.compile(fullgraph=True), in tests/test_compile.py."""
    x, schedule = torch.linspace(-2, 2, 3 * 4 * 5).reshape(3, 4, 5), fastgen.Schedule.linear(40)
    with fastgen.use_backend("cpp"), Dispatched() as ops:
        for function in test_compile.FORWARD.values():
            function(schedule, x, x.cos(), 7, 11)
    assert {op.stem for name, op in declared.OPS.items() if ops["fastgen." + name]} == set(declared.STEMS)


@pytest.mark.parametrize("stem", declared.STEMS)
def test_bad_input_of_every_stem_is_refused(stem):
    """In tests/test_checks.py, by each of its functions."""
    refused = {op for ops, *_ in test_checks.CASES for op in ops}
    for name in public_functions(stem):
        assert name in refused
        inspect.signature(getattr(fastgen, name)).bind(**test_checks.arguments(name, "cpu"))


def public_functions(stem):
    named = {name: getattr(fastgen, name) for name in fastgen.__all__}
    found = [name for name, each in named.items() if inspect.isfunction(each) and each.__module__ == f"fastgen._ops.{stem}"]
    assert found
    return found


def test_every_stem_is_an_option():
    """Of `pytest --op`, by which `make test-op` chooses its tests."""
    assert set(conftest.WORDS) == set(declared.STEMS)


@sources
def test_the_machine_code_of_every_stem_is_read():
    from tools import machine_code

    # each of them a parameter of tests/test_machine_code.py
    assert {source.parent.name for source in machine_code.sources()} == set(declared.STEMS)
    if importlib.util.find_spec("triton") is not None:
        from tools import triton_code

        assert {declared.OPS[call.op].stem for call in triton_code.CALLS} == set(declared.STEMS)


@sources
def test_both_sides_have_every_type():
    """C++ (csrc/declarations.py) and Triton's functions (fastgen/triton), of whatever may stand in a schema."""
    made = runpy.run_path(str(ROOT / "csrc/declarations.py"))
    used = {argument.type for op in declared.OPS.values() for argument in op.arguments}
    assert used <= set(made["TYPES"])
    assert {op.returns for op in declared.OPS.values()} <= set(made["RESULTS"])
    if importlib.util.find_spec("triton") is not None:
        import fastgen.triton

        assert set(made["TYPES"]) == set(fastgen.triton._TYPES) and set(made["RESULTS"]) == set(fastgen.triton._RESULTS)


@pytest.mark.parametrize("name", ["BCEWithLogitsLoss", "Sampler", "Schedule", "LogLikelihood", "VariationalBound"])
def test_pickles_name_no_private_module(name):
    """So that one can still be read after a module has moved."""
    schedule = fastgen.Schedule.linear(4)
    made = {
        "BCEWithLogitsLoss": lambda: fastgen.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
        "Sampler": lambda: fastgen.Sampler(torch.nn.Identity(), (2, 3), schedule, steps=2, clip=1.0),
        "Schedule": lambda: schedule,
        "LogLikelihood": lambda: fastgen.LogLikelihood(*[torch.ones(2)] * 3),
        "VariationalBound": lambda: fastgen.VariationalBound(*[torch.ones(2)] * 3),
    }[name]()
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        words = [str(argument) for _, argument, _ in pickletools.genops(pickle.dumps(made, protocol)) if argument is not None]
        named = [word for word in words if word.startswith("fastgen")]
        assert named and not [word for word in named if "._" in word]
