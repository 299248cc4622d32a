"""`make gpu`, as far as a machine without a GPU can tell: its stages end as they should, whatever happens in them, and its numbers
become tables. The stages themselves run on the CPU, on a few elements."""

import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastgen

ROOT = Path(__file__).resolve().parents[1]
H100 = {"python": "3.12.3", "torch": "2.11.0+cu130", "cuda": "13.0", "triton": "3.6.0", "device": "NVIDIA H100 80GB HBM3"}
H100 |= {"capability": "9.0", "memory": 2**36, "devices": 1}

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="needs the source tree")


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import gpu_check

    return gpu_check


@pytest.fixture
def gpu_bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import gpu_bench, peers

    yield gpu_bench
    peers.sets.cache_clear()
    peers._programs.clear()
    torch._dynamo.reset()


# ---- stages that fail, hang or cannot run ---------------------------------------------------------------------------


def passed(seconds):
    return {"outcome": "passed", "words": f"{seconds:.0f} s"}


def test_a_stage_that_raises_does_not_stop_the_next(gpu_check):
    def missing(seconds):
        raise gpu_check.Skip("nothing to run it with")

    said, saved = [], []
    stages = {"build": lambda seconds: 1 / 0, "tests": missing, "bench": passed}
    results = gpu_check.run_stages(stages, 5, said.append, lambda results: saved.append(len(results)))
    assert [result["outcome"] for result in results.values()] == ["failed", "skipped", "passed"]
    assert "ZeroDivisionError" in results["build"]["traceback"] and results["tests"]["words"] == "nothing to run it with"
    assert saved == [1, 2, 3] and len(said) == 3 and said[1].startswith("tests      skipped")


def test_time_that_is_left_goes_to_the_later_stages(gpu_check):
    given = {}

    def stage(name):
        return lambda seconds: given.update({name: seconds}) or passed(seconds)

    gpu_check.run_stages({name: stage(name) for name in gpu_check.STAGES}, 9, lambda line: None)
    weights = gpu_check.WEIGHTS
    assert given["build"] == pytest.approx((540 - gpu_check.INTERRUPT) * weights["build"] / sum(weights.values()), abs=1)
    assert given["bench"] == pytest.approx(540 - gpu_check.INTERRUPT, abs=1)


def test_without_time_a_stage_is_skipped(gpu_check):
    results = gpu_check.run_stages({"tests": passed}, 0.1, lambda line: None)
    assert results["tests"]["outcome"] == "skipped" and "no time" in results["tests"]["words"]


def test_commands(gpu_check, tmp_path):
    python = [sys.executable, "-c"]
    assert gpu_check.run_command([*python, "print('here'); raise SystemExit(3)"], 20, tmp_path / "a.log") == (3, "here\n")
    environment = gpu_check.run_command([*python, "import os; print(os.environ['X'])"], 20, tmp_path / "b.log", {"X": "y"})
    assert environment == (0, "y\n") and (tmp_path / "b.log").read_text() == "y\n"


@pytest.mark.parametrize("stubborn", [False, True])
def test_commands_that_hang_are_stopped(gpu_check, tmp_path, monkeypatch, stubborn):
    """First asked to, so that they can write what they have; then killed, with their children."""
    monkeypatch.setattr(gpu_check, "INTERRUPT", 1.0 if stubborn else 20.0)
    code = f"""
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
if {stubborn}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    start = time.monotonic()
    status, output = gpu_check.run_command([sys.executable, "-c", code], 2.0, tmp_path / "log")
    assert status is None and time.monotonic() - start < 20
    assert ("interrupted" in output) != stubborn
    child, patience = Path("/proc", output.split()[0], "stat"), time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < patience, "the child lives on"
        time.sleep(0.05)


# ---- what the machine has -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found, words",
    [
        (H100, ""),
        ({"torch_error": "No module named 'torch'"}, "cannot be imported"),
        (H100 | {"torch": "2.9.1"}, "2.10 or newer"),
        (H100 | {"cuda": None}, "without CUDA"),
        ({key: value for key, value in H100.items() if key != "device"}, "finds no CUDA device"),
    ],
)
def test_what_is_missing(gpu_check, found, words):
    missing = gpu_check.what_is_missing(found)
    assert words in missing and bool(words) == bool(missing)


def test_probe(gpu_check):
    found = gpu_check.probe()
    assert found["torch"] == torch.__version__ and ("device" in found) == torch.cuda.is_available()
    assert gpu_check.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole check")
def test_without_a_gpu_it_ends_at_once():
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu_check"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "nothing was run: torch" in run.stderr and len(run.stderr.splitlines()) == 1


# ---- the stages -----------------------------------------------------------------------------------------------------


@pytest.fixture
def check(gpu_check, tmp_path):
    made = gpu_check.Check(H100, logs=tmp_path, device="cpu")
    made.env["PYTHONPATH"] = os.pathsep.join([str(Path(fastgen.__file__).parents[1]), *filter(None, sys.path)])
    return made


def test_build_without_a_compiler_is_skipped(gpu_check, check, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(gpu_check, "USUAL_CUDA", Path("/nowhere"))
    with pytest.raises(gpu_check.Skip, match="no nvcc"):
        check.build(10)


@pytest.mark.parametrize("output, outcome", [("", "passed"), ("fastgen: there is no ninja: `pip install ninja`", None)])
def test_build_looks_where_nvcc_usually_is(gpu_check, check, monkeypatch, tmp_path, output, outcome):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text("#!/bin/sh\necho release 13.0")
    (tmp_path / "bin/nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(gpu_check, "USUAL_CUDA", tmp_path)
    monkeypatch.setattr(check, "run", lambda *arguments: (1 if output else 0, output))
    if outcome:
        assert check.build(10)["outcome"] == outcome
    else:
        with pytest.raises(gpu_check.Skip, match="no ninja"):
            check.build(10)


def test_wheel_is_installed_apart_from_the_tree(gpu_check, tmp_path):
    """What the stages then import is the wheel's."""
    wheel = tmp_path / "fastgen_kernels-7-py3-none-any.whl"
    info = "fastgen_kernels-7.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fastgen/__init__.py", "__version__ = 'of the wheel'\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fastgen-kernels\nVersion: 7\nRequires-Dist: torch\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    check = gpu_check.Check(H100, wheel, tmp_path / "logs")
    result = check.build(120)
    if "No module named pip" in result.get("output", ""):
        pytest.skip("needs pip")
    assert result["outcome"] == "passed", result
    status, output = check.run("version", check.python("-c", "import fastgen; print(fastgen.__version__)"), 60)
    assert (status, output) == (0, "of the wheel\n")
    assert (check.root / "tests/test_cuda.py").exists() and (check.root / "benchmarks/gpu_bench.py").exists()
    assert not (check.root / "benchmarks/results").exists()


def test_tests_are_counted_and_failures_named(check, tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text("""
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_skipped(): pytest.skip("too small a device")
@pytest.fixture
def broken(): raise OSError("gone")
def test_error(broken): pass
""")
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    result = check.pytest("some", 60, tests, "-c", tmp_path / "pytest.ini")
    assert result["counts"] == {"passed": 1, "failed": 1, "errors": 1, "skipped": 1} and result["outcome"] == "failed"
    assert [failure["test"].split("::")[1] for failure in result["failures"]] == ["test_bad", "test_error"]
    assert "one is not two" in result["failures"][0]["message"] and list(result["skips"]) == ["too small a device"]
    assert result["words"] == "1 passed, 1 failed, 1 errors, 1 skipped" and "test_bad" in result["output"]
    good = check.pytest("good", 60, tests, "-c", tmp_path / "pytest.ini", "-k", "good")
    assert good["outcome"] == "passed" and "output" not in good
    assert check.pytest("none", 60, tests, "-c", tmp_path / "pytest.ini", "-k", "nothing")["outcome"] == "failed"


POISONED = """
import pytest
import torch
lost = []
torch.cuda.is_initialized = lambda: True
def synchronize():
    if lost: raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.synchronize = synchronize
def test_good(): pass
def test_loses(): lost.append("what no call has noticed yet")
def test_bad(): assert not lost; assert 1 == 2, "one is not two"
@pytest.mark.parametrize("what", ["bce mean"])
def test_loses_too(what): lost.append(1); raise RuntimeError("CUDA error: device-side assert triggered")
@pytest.fixture
def bad_setup(): lost.append("in a fixture's set-up")
def test_after_setup(bad_setup): pass
@pytest.fixture
def bad_teardown(): yield; lost.append("in a fixture's teardown")
def test_before_teardown(bad_teardown): pass
def test_last(): assert not lost
"""


def test_a_lost_gpu_fails_one_test(gpu_check, check, tmp_path):
    """The test that lost it, and none that comes later: another process goes on behind it."""
    (tmp_path / "test_some.py").write_text(POISONED)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    check.env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), check.env["PYTHONPATH"]])
    options = ("-c", tmp_path / "pytest.ini", "-p", "conftest")
    result = check.share("some", time.monotonic() + 200, tmp_path / "test_some.py", *options)
    assert result["counts"] == {"passed": 2, "failed": 3, "errors": 2, "skipped": 0} and result["ran"] == 7
    failures = {failure["test"].split("::")[1]: failure["message"] for failure in result["failures"]}
    losing = ["test_loses", "test_loses_too[bce mean]", "test_after_setup", "test_before_teardown"]
    assert sorted(failures) == sorted([*losing, "test_bad"])
    assert "illegal memory access" in failures["test_loses"] and "one is not two" in failures["test_bad"]
    assert [test.split("::")[1] for test in result["lost"]] == losing
    assert "4 of them lost the GPU for their process, first " in result["words"] and result["outcome"] == "failed"
    assert len(gpu_check.report_lines({"tests": result | {"seconds": 1.0}}, [])) == 6  # "… and 1 more failures"


NO_FAILURE = {"counts": {"passed": 2, "failed": 0, "errors": 0, "skipped": 1}, "skips": {"too small": 1}, "failures": []}


@pytest.mark.parametrize("triton", ["3.6.0", None])
def test_suite_runs_side_by_side(gpu_check, check, monkeypatch, triton):
    """Huge tensors alone, before; of the Triton backend's tests one in so many as the time allows. Each process has its share."""
    ran = []

    def pytest_of(name, seconds, *words):
        ran.append((name, seconds, words))
        failed = {"outcome": "failed", "output": "why", "failures": [{"test": "bad", "message": "no"}]}
        return passed(seconds) | NO_FAILURE | {"ran": 3, "lost": []} | (failed if name == "tests_triton_3" else {})

    monkeypatch.setattr(check, "pytest", pytest_of)
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 16)
    check.found = check.found | {"triton": triton}
    result = check.tests(400)
    assert ran[0][0] == "tests_huge" and ran[0][1] <= 120 and "not past_32_bits" not in ran[0][2]
    others = [(seconds, words) for name, seconds, words in ran if name.startswith("tests_") and name[6:].isdigit()]
    assert sorted(words[words.index("--share") + 1] for _, words in others) == sorted(f"{k}/12" for k in range(12))
    assert all("--not-backend" in words and seconds > (250 if triton else 350) for seconds, words in others)
    part = result["parts"]["others"]
    assert part["counts"] == {"passed": 24, "failed": 0, "errors": 0, "skipped": 12} and part["skips"] == {"too small": 12}
    assert list(result["parts"]) == ["huge", "others", *(["triton"] if triton else [])]
    if triton:
        sample = 14  # 26,000 s of compilations in 0.4 of 400 s of 12 processes
        shares = [words[words.index("--share") + 1] for name, _, words in ran if name.startswith("tests_triton")]
        assert sorted(shares) == sorted(f"{k * sample}/{12 * sample}" for k in range(12))
        part = result["parts"]["triton"]
        assert part["failures"] == [{"test": "bad", "message": "no"}] and part["output"] == "why"
        assert result["outcome"] == "failed" and f"of one test in {sample}" in result["words"]


def test_which_tests_are_tritons():
    """Those whose place is, and those of test_cuda.py whose kernels are."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
from types import SimpleNamespace as item
import conftest
def of(**parameters): return conftest._backend_of(item(callspec=item(params=parameters), get_closest_marker=lambda name: None))
print(of(kernels="triton"), of(kernels="cpp"), of(place=("cuda", "triton")), of(kernels=3), of())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.split() == ["triton", "cpp", "triton", "None", "None"], run.stderr


def test_device_option_chooses_the_tests():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_rng.py", "tests/test_cuda.py"]
    for device, here, elsewhere in (("cpu", "test_rng", "test_cuda"), ("cuda", "test_cuda", "test_rng")):
        run = subprocess.run([*command, "--device", device], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert here in run.stdout and f"{elsewhere}.py" not in run.stdout, run.stdout + run.stderr


SANITIZER = """#!{python}
import subprocess, sys
command = sys.argv[sys.argv.index({python!r}):]
assert sys.argv[1] == "--tool" and "--error-exitcode" in sys.argv
racecheck = sys.argv[2] == "racecheck"
if racecheck or {errors}:  # once is enough
    print("7 calls on cpu")
    status = 0
else:
    status = subprocess.run(command).returncode
print("========= RACECHECK SUMMARY: 0 hazards displayed" if racecheck else "========= ERROR SUMMARY: {errors} errors")
sys.exit(status or (0 if racecheck else {status}))
"""


@pytest.mark.parametrize("errors", [0, 2])
def test_sanitizer(check, tmp_path, monkeypatch, errors):
    """A stand-in for the tool, which runs the driver of every kernel, here on the CPU."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER.format(python=sys.executable, errors=errors, status=9 if errors else 0))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    result = check.sanitizer(200)
    assert result["outcome"] == ("failed" if errors else "passed"), result
    assert f"memcheck: ERROR SUMMARY: {errors} errors" in result["words"] and "calls on cpu" in result["words"]
    assert result["parts"]["racecheck"]["outcome"] == "passed"


def test_sanitizer_that_is_absent_is_skipped(gpu_check, check, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(gpu_check, "sanitizer_of", lambda home: Path("/nowhere/compute-sanitizer"))
    with pytest.raises(gpu_check.Skip, match="compute-sanitizer is not"):
        check.sanitizer(10)


def test_every_call_reaches_every_op():
    """The driver leaves out none of the compiled ops."""
    import every_call

    if not fastgen._core.backends.HAS_OPS:
        pytest.skip("the compiled library is absent")
    i = every_call.inputs("cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for name, call in every_call.CALLS.items():
            assert all(y.isfinite().all() for y in every_call.results(call(i))), name
    called = {event.key for event in profile.key_averages() if event.key.startswith("fastgen::")}
    registered = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastgen::")}
    ahead = ("diffusion_loss_and_gradient", "vlb_terms_and_gradient", "vlb_terms_and_error", "step_log_prob_and_gradient")
    drawn = (
        "torch_randn",
        "torch_skip",
        "q_sample_torch",
        "q_step_torch",
        "ddpm_step_torch",
        "ddim_step_torch",
        "ddpm_step_torch_plain",
    )
    of_the_cpu = {"fastgen::cpu_capability", *(f"fastgen::{name}" for name in ahead + drawn)}
    assert called == registered - of_the_cpu


# ---- the benchmarks -------------------------------------------------------------------------------------------------


def test_bench_stage(check, gpu_check):
    result = check.bench(300)
    assert result["outcome"] == "passed", result
    rows = result["numbers"]["rows"]
    assert all({"limit", "fastgen", "eager", "torch.compile"} == row["peers"].keys() and not row["errors"] for row in rows)
    ops = {"ddpm_step", "q_sample", "bce_with_logits", "discriminator_loss", "q_posterior", "randn"}
    assert {row["what"].split("(")[0].split()[0] for row in rows} == ops
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"} and any(row["channels_last"] for row in rows)
    assert all(peer["seconds"]["median"] > 0 and peer["kernel_seconds"] > 0 for row in rows for peer in row["peers"].values())
    assert result["numbers"]["overheads"][0]["what"] == "bce_with_logits() + backward"
    lines = gpu_check.bench_lines(check, result["numbers"])
    assert 60 < len(lines) < 100 and "share of the device's copy speed" in lines[0]


def test_sizes_and_programs(gpu_bench):
    cases = gpu_bench.cases("cpu")
    assert all(
        abs(case.elements / size - 1) < 0.03
        for case in cases
        for size in [min(gpu_bench.SIZES, key=lambda s: abs(s - case.elements))]
    )
    assert len({str(case) for case in cases}) == len(cases) == 10 * 2 * 7 + 8
    wanted = [gpu_bench.targets(on_gpu(case)) for case in cases]
    assert all("limit" in each for each in wanted[:20]) and not any("limit" in each for each in wanted[20:])
    assert len(gpu_bench.graphs("cpu")) < len(cases)


def test_one_program_serves_every_small_batch(gpu_bench):
    """Compiled by Inductor with a batch of any size, and the same numbers as eager."""
    make = next(iter(gpu_bench.kinds()))
    from benchmarks import peers

    counter = CompileCounterWithBackend("inductor")
    for batch in (39, 4, 17):
        case = peers.q_sample((batch, 4, 8, 8), torch.float32, "noise", "out")
        arguments = peers.sets(case)[0]
        y = peers.compiled(case, [arguments], backend=counter)(*arguments).clone()
        torch.testing.assert_close(y, case.eager(*arguments))
        peers.sets.cache_clear()
    assert counter.frame_count == 1
    assert peers.graph_of(make((39, 4, 8, 8), torch.float32)) == peers.graph_of(make((4, 4, 8, 8), torch.float32))


def test_a_peer_that_fails_is_noted(gpu_bench):
    case = next(iter(gpu_bench.cases("cpu", tiny=True)))
    row = gpu_bench.measured(replace(case, eager=lambda *arguments: 1 / 0), ("limit", "fastgen", "eager"), None, True)
    assert row["peers"].keys() == {"limit", "fastgen"} and "ZeroDivisionError" in row["errors"]["eager"]


def test_warm_compiles_a_share_of_the_programs(gpu_bench, monkeypatch):
    monkeypatch.setattr(gpu_bench, "graphs", lambda device, tiny=False: gpu_bench.cases(device, tiny)[4:8])
    assert gpu_bench.warm("cpu", 1, 4, True) == 1


def on_gpu(case):
    return replace(case, device="cuda")


def made_up(gpu_bench, ratio):
    """Rows of every case with invented times: each peer `ratio` times as slow as fastgen."""
    rows = []
    for case in map(on_gpu, gpu_bench.cases("cpu")):
        times = gpu_bench.quartiles([1e-3] * 5)
        row = {"what": case.call, "dtype": gpu_bench.common.DTYPES[case.dtype], "channels_last": case.channels_last}
        row |= {"shape": case.shape, "elements": case.elements, "bytes": case.bytes, "peers": {}, "errors": {}}
        for name in gpu_bench.PEERS:
            target = gpu_bench.targets(case).get(name)
            met = gpu_bench.verdict(target, ratio, times)
            share = {"seconds": times, "kernel_seconds": 1e-6, "bytes_per_second": 3e12, "ratio": gpu_bench.quartiles([ratio] * 5)}
            row["peers"][name] = share | {"target": target, "met": met}
        rows.append(row)
    return {"environment": {}, "rows": rows, "overheads": []}


def test_tables_say_which_targets_are_missed(gpu_bench):
    good, bad = (gpu_bench.lines(made_up(gpu_bench, ratio)) for ratio in (6.0, 0.5))
    assert "targets: 100 of 100 met" in " ".join(good).replace(str(len(gpu_bench.judged(made_up(gpu_bench, 6.0)))), "100")
    assert not any("!" in line for line in good) and len(good) < 81
    assert sum(line.startswith("fastgen triton ÷ fastgen: 0.5 in the middle") for line in bad) == 1
    assert any("0.5!" in line for line in bad) and len(bad) < 96
    assert any(line.startswith("targets: 0 of") for line in bad) and any("more" in line for line in bad[-2:])


def test_result_is_one_file_named_after_the_device(gpu_check, gpu_bench, monkeypatch, tmp_path, capsys):
    numbers = made_up(gpu_bench, 1.2)
    failures = [{"test": "tests.test_cuda::test_one", "message": "assert False"}]
    stages = {
        "build": lambda self, seconds: passed(seconds),
        "tests": lambda self, seconds: {"outcome": "failed", "words": "1 failed", "failures": failures},
        "bench": lambda self, seconds: passed(seconds) | {"numbers": numbers},
    }
    monkeypatch.setattr(gpu_check, "probe", lambda: H100)
    for name, stage in stages.items():
        monkeypatch.setattr(gpu_check.Check, name, stage)
    assert gpu_check.main(["--out", str(tmp_path), "--only", "bench,build,tests"]) == 1
    result = json.loads((tmp_path / "nvidia-h100-80gb-hbm3/gpu_check_build_tests_bench.json").read_text())
    assert {"device", "driver", "torch", "triton", "nvcc", "commit", "dirty", "date"} <= result["environment"].keys()
    assert list(result["stages"]) == ["build", "tests", "bench"] and result["stages"]["bench"]["numbers"]["rows"]
    output = capsys.readouterr().out.splitlines()
    assert len(output) < 110 and "failed: tests" in output[-1] and any("test_one: assert False" in line for line in output)
    assert gpu_check.main(["--out", str(tmp_path), "--only", "build"]) == 0
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "nonsense"])
