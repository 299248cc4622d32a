"""Everything that an NVIDIA GPU has to show, in under ten minutes and without a network: build, tests, sanitizer, benchmarks.

    python -m benchmarks.gpu_check [--wheel FILE] [--out DIR] [--minutes 9] [--only build,tests,sanitizer,bench]

Writes DIR/<device>/gpu_check.json (with --only, gpu_check_<stages>.json), after every stage, and a short table to the terminal.
Stages run in processes of their own, with a share of the time each; one that fails or runs out of time does not stop the next.
What is not there is skipped with a line that says what and why. The full output of every stage is under build/gpu_check/.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# neither torch nor fastgen: the library may not be built yet, and this process must outlive whatever happens to a GPU
ROOT = Path(__file__).resolve().parent.parent
OUT = Path("benchmarks/results")
LOGS = ROOT / "build/gpu_check"
USUAL_CUDA = Path("/usr/local/cuda")
STAGES = ("build", "tests", "sanitizer", "bench")
# shares of the time that is left; what a stage does not use goes to the later ones
WEIGHTS = {"build": 4.0, "tests": 5.0, "sanitizer": 3.0, "bench": 3.0}
HUGE = "past_32_bits"  # in the names of the tests that want the device's memory for themselves
# tests/conftest.py says so, and pytest puts the words between "!!!" in the middle of a line; ids may have spaces
LOST = re.compile(r"the GPU was lost for this process by (.+?)(?= !+$|$)", re.MULTILINE)
# Predicted, not measured on a GPU: counted are the tests that `--device cuda` collects with a torch that pretends to have a GPU,
# and for test_cuda.py the kernels that Triton compiles for them, by the types, alignments and constants of each launch.
#   not Triton's     12,700 tests, at 30 ms                                                                    400 processor seconds
#   Triton's           5,400 tests of the ops, at 2 compilations                                           10,800 compilations
#                      1,850 tests of test_cuda.py: 12 in one of dtypes, 22 of sizes, 24 of layouts, 37 of
#                            alignments; 5,600 of them differ, as far as processes find each other's    21,000 compilations
# A compilation takes 0.8 s of an EPYC's core, for sm_90. So all of Triton's would take 36 minutes on 12 processes, and
# before tests were sampled by their kernels too, those of test_cuda.py were among those that were not Triton's.
TRITON_SECONDS = 26_000
# Of the time that is left for Triton's tests, what the chosen ones are meant to take: the rest is for the start of the processes,
# some 20 s of imports and collecting, and for the longest test.
TRITON_SHARE = 0.4
PROCESSES = 12  # at most; three quarters of the cores, so that compilers find some too
RESTART = 30.0  # seconds that another process is worth starting for
INTERRUPT = 12.0  # seconds from the request to stop to the kill

PROBE = """
import json, sys
found = {"python": sys.version.split()[0]}
try:
    import torch
    found["torch"], found["cuda"] = torch.__version__, torch.version.cuda
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {"device": p.name, "capability": f"{p.major}.{p.minor}", "devices": torch.cuda.device_count()}
        found |= {"memory": p.total_memory, "multiprocessors": p.multi_processor_count, "L2": getattr(p, "L2_cache_size", None)}
except ImportError as error:
    found["torch_error"] = str(error)
try:
    import triton
    found["triton"] = triton.__version__
except Exception as error:
    found["triton"] = None
print(json.dumps(found))
"""


# ---- running a stage -------------------------------------------------------------------------------------------------


class Skip(Exception):
    """A stage, or a part of it, that cannot run here: what is missing."""


def run_command(command, seconds: float, log: Path, env=None, cwd=ROOT) -> tuple[int | None, str]:
    """(exit status, output), the status None where the time ran out; the output goes to `log` as it comes.

    A command that runs out of time is interrupted, so that it can write what it has, and then killed with all its children.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {}),
            start_new_session=True,
            # a shell's background job ignores SIGINT, and so would what it starts
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, log.read_text(errors="replace")


def tail(output: str, lines: int = 40) -> str:
    return "\n".join(output.splitlines()[-lines:])[-6000:]


def ended(status: int | None, seconds: float) -> str:
    return f"stopped after {seconds:.0f} s, its share of the time" if status is None else f"exit status {status}"


def run_stages(stages: dict, minutes: float, say, save=lambda results: None) -> dict:
    """Runs {name: function(seconds) → dict} in turn, each with its share of what is left of the time.

    A function's dict has "outcome" ("passed" or "failed") and "words"; one that raises `Skip` is skipped, one that raises anything
    else has failed, with the traceback. `say` gets a line for each, `save` all results so far.
    """
    end, results, left = time.monotonic() + 60 * minutes, {}, list(stages)
    for name, function in stages.items():
        remaining = end - time.monotonic() - INTERRUPT
        share = WEIGHTS.get(name, 1.0) / sum(WEIGHTS.get(other, 1.0) for other in left)
        left.remove(name)
        start = time.monotonic()
        try:
            if remaining < 1:
                raise Skip("no time was left")
            result = function(remaining * share)
        except Skip as reason:
            result = {"outcome": "skipped", "words": str(reason)}
        except Exception as error:
            result = {"outcome": "failed", "words": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        results[name] = result | {"seconds": round(time.monotonic() - start, 1)}
        say(stage_line(name, results[name]))
        save(results)
    return results


def stage_line(name: str, result: dict) -> str:
    return f"{name:10} {result['outcome']:8} {result['seconds']:6.1f} s  {result['words']}"


# ---- the stages ------------------------------------------------------------------------------------------------------


class Check:
    """The stages over one tree: this one, built in place, or a copy of its tests beside an installed wheel."""

    def __init__(self, found: dict, wheel: Path | None = None, logs: Path = LOGS, device: str = "cuda"):
        self.found, self.wheel, self.logs, self.root = found, wheel, logs, ROOT
        self.device = device  # "cpu", where a test runs the stages on a few elements
        if wheel is not None:
            self.root = logs / "tree"
        self.env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(self.library), os.environ.get("PYTHONPATH")]))}

    @property
    def library(self) -> Path:
        """The folder that holds the `fastgen` under test."""
        return ROOT if self.wheel is None else self.logs / "site"

    def python(self, *arguments):
        return [sys.executable, *arguments]

    def run(self, name, command, seconds, env=None):
        return run_command(command, seconds, self.logs / f"{name}.log", self.env | (env or {}), self.root)

    def build(self, seconds):
        if self.wheel is not None:
            return self.install(seconds)
        if nvcc() is None:
            raise Skip(f"no nvcc on the PATH, in CUDA_HOME nor in {USUAL_CUDA}; what is built already, if anything, is used")
        missing = [name for name in ("setuptools", "torch") if importlib.util.find_spec(name) is None]
        if missing:
            raise Skip(f"{', '.join(missing)} is not installed; what is built already, if anything, is used")
        arch = self.found["capability"]
        command = self.python("setup.py", "--quiet", "build_ext", "--inplace")
        status, output = self.run("build", command, seconds, {"FASTGEN_CUDA": "1", "FASTGEN_CUDA_ARCHS": arch})
        if status == 0:
            return {"outcome": "passed", "words": f"both libraries, for compute capability {arch}"}
        if "there is no ninja" in output:
            raise Skip("there is no ninja; what is built already, if anything, is used")
        return {"outcome": "failed", "words": ended(status, seconds), "output": tail(output)}

    def install(self, seconds):
        """The wheel into a folder of its own, and a copy of what runs on it, away from this tree's `fastgen`."""
        for folder in ("site", "tree"):
            shutil.rmtree(self.logs / folder, ignore_errors=True)
        self.root.mkdir(parents=True)
        for name in ("tests", "benchmarks", "examples", "tools"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(ROOT / "pyproject.toml", self.root)
        options = ("--no-index", "--no-deps", "--quiet", "--disable-pip-version-check", "--target", self.logs / "site")
        status, output = self.run("build", self.python("-m", "pip", "install", *options, self.wheel), seconds)
        if status == 0:
            return {"outcome": "passed", "words": f"installed {self.wheel.name}"}
        return {"outcome": "failed", "words": ended(status, seconds), "output": tail(output)}

    # -- tests --

    def tests(self, seconds):
        """First the tests of huge tensors, alone on the device; then, in several processes side by side, all others, and of the
        Triton backend's, which compile kernels, as many as there is time for."""
        if importlib.util.find_spec("pytest") is None:
            raise Skip("pytest is not installed")
        end = time.monotonic() + seconds
        parts = {"huge": self.share("tests_huge", end - 0.7 * seconds, "tests/test_cuda.py", "-k", HUGE)}
        chosen = ("tests", "-k", f"not {HUGE}")
        triton = self.found.get("triton")
        parts["others"] = self.shares("tests", end - (0.3 if triton else 0) * seconds, 1, *chosen, "--not-backend", "triton")
        if triton:
            left = max(end - time.monotonic(), 1.0)
            sample = max(1, math.ceil(TRITON_SECONDS / (TRITON_SHARE * left * processes())))
            parts["triton"] = self.shares("tests_triton", end, sample, *chosen, "--backend", "triton")
            parts["triton"]["words"] += f" of one test in {sample}"
        return joined({name: part | {"words": f"{name}: {part['words']}"} for name, part in parts.items()})

    def shares(self, name, end, sample, *arguments):
        """One test in `sample`, dealt to so many processes."""
        count = processes()

        def share(k):
            return self.share(f"{name}_{k}", end, *arguments, "--share", f"{k * sample}/{sample * count}")

        with ThreadPoolExecutor(count) as threads:
            return merged(list(threads.map(share, range(count))))

    def share(self, name, end, *arguments):
        """The tests of one process. One that loses the GPU ends with the test that lost it, and another goes on behind that."""
        parts, done = [], 0
        while True:
            again = f"_{len(parts)}" if parts else ""
            parts.append(self.pytest(name + again, max(end - time.monotonic(), 1.0), *arguments, "--from", str(done)))
            done += parts[-1]["ran"]
            if not parts[-1]["lost"] or not parts[-1]["ran"] or end - time.monotonic() < RESTART:
                return merged(parts)

    def pytest(self, name, seconds, *arguments):
        report = self.logs / f"{name}.xml"
        report.unlink(missing_ok=True)
        # no plugin that happens to be installed: some add options or change how tests run; nor a pool of compilers for each process
        env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "2"}
        options = (
            "-q",
            "--device",
            self.device,
            "--tb=short",
            "-rN",
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
        )
        status, output = self.run(name, self.python("-m", "pytest", *options, *arguments), seconds, env)
        result = read_junit(report)
        passed = status == 0 and result["counts"]["passed"] > 0
        lost = LOST.findall(output)[:1]
        words = counted(result["counts"])
        if status not in (0, 1) and not lost:
            words += f"; {ended(status, seconds)}"
        result |= {"outcome": "passed" if passed else "failed", "words": words, "lost": lost}
        return result if passed else result | {"output": tail(output)}

    # -- compute-sanitizer --

    def sanitizer(self, seconds):
        tool = shutil.which("compute-sanitizer") or next(
            (str(path) for home in (os.environ.get("CUDA_HOME"), USUAL_CUDA) if home and (path := sanitizer_of(home)).exists()),
            None,
        )
        if tool is None:
            raise Skip("compute-sanitizer is not on the PATH nor in the CUDA toolkit")
        result, end = {}, time.monotonic() + seconds
        # Predicted, not measured: under a tool a call takes some 50 ms, and there are 1,100 of them, after half a minute of
        # imports. Shared memory, which racecheck watches, is used by sums alone, a fifth of the calls. Both stop after a call when
        # their time is over, and what they have seen by then counts.
        for check, share, calls in (("memcheck", 0.7, ()), ("racecheck", 1.0, ("--sums",))):
            left = (end - time.monotonic()) * share
            # without the caching allocator every tensor is an allocation of its own, whose bounds the tool knows
            env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            options = ("--tool", check, "--error-exitcode", "9", "--launch-timeout", "120", "--print-limit", "20")
            driver = ("tests/every_call.py", "--device", self.device, "--until", f"{time.time() + 0.9 * left - 5:.0f}", *calls)
            status, output = self.run(check, [tool, *options, *self.python(*driver)], left, env)
            summaries = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
            calls = re.findall(r"^(\d+ (?:of \d+ )?calls on .*)$", output, re.MULTILINE)
            clean = status == 0 and bool(calls) and bool(summaries)
            words = f"{check}: {summaries[-1] if summaries else ended(status, left)}" + (f", {calls[-1]}" if calls else "")
            result[check] = {"outcome": "passed" if clean else "failed", "words": words}
            if not clean:
                result[check]["output"] = tail(output, 80)
                if re.search(r"[Dd]evice not supported|not supported on this", output):
                    result[check] |= {"outcome": "skipped", "words": f"{check}: the tool refuses this device"}
        return joined(result)

    # -- benchmarks --

    def bench(self, seconds):
        from_stage = self.logs / "bench.json"
        from_stage.unlink(missing_ok=True)
        options = ("--device", self.device, *(["--tiny"] if self.device == "cpu" else []))
        options = (*options, "--seconds", f"{max(seconds - 10, 1):.0f}", "--json", from_stage)
        command = self.python("-m", "benchmarks.gpu_bench", *options)
        status, output = self.run("bench", command, seconds)
        result = {"outcome": "passed" if status == 0 else "failed", "words": ended(status, seconds)}
        try:
            numbers = json.loads(from_stage.read_text())
        except (OSError, ValueError):
            return result | {"outcome": "failed", "output": tail(output)}
        measured = [row for row in numbers["rows"] if row["peers"]]
        result["words"] = f"{len(measured)} of {len(numbers['rows'])} rows measured" + (
            "" if status == 0 else f"; {result['words']}"
        )
        return result | {"numbers": numbers} | ({} if status == 0 else {"output": tail(output)})


def nvcc() -> str | None:
    """Where setup.py looks for it too."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(Path(home) / "bin/nvcc")
    return shutil.which("nvcc") or shutil.which(USUAL_CUDA / "bin/nvcc")


def sanitizer_of(home) -> Path:
    return Path(home) / "bin/compute-sanitizer"


def read_junit(report: Path) -> dict:
    """{"counts": {…}, "failures": [{"test", "message"}, …], "skips": {reason: how many}, "ran": tests} of a JUnit file; zeros
    without one. A test that fails and whose fixtures then fail too counts twice, but ran once."""
    counts, failures, skips, tests = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0), [], {}, set()
    with contextlib.suppress(OSError, xml.ParseError):
        for case in xml.parse(report).iter("testcase"):
            kinds = {child.tag: child for child in case}
            tests.add((case.get("classname"), case.get("name")))
            word = {"failure": "failed", "error": "errors", "skipped": "skipped"}
            kind = next((tag for tag in word if tag in kinds), None)
            counts[word[kind] if kind else "passed"] += 1
            if kind == "skipped":
                reason = kinds[kind].get("message", "")
                skips[reason] = skips.get(reason, 0) + 1
            elif kind:
                name = f"{case.get('classname', '')}::{case.get('name', '')}"
                failures.append({"test": name, "message": kinds[kind].get("message", "")[:500]})
    return {"counts": counts, "failures": failures[:200], "skips": skips, "ran": len(tests)}


def processes() -> int:
    return max(1, min(PROCESSES, (os.cpu_count() or 1) * 3 // 4))


def counted(counts: dict) -> str:
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no test ran"


def merged(parts: list[dict]) -> dict:
    """One result of several runs of pytest: all counts, the failures in their order, the words of the first that went wrong."""
    counts = {word: sum(part["counts"][word] for part in parts) for word in parts[0]["counts"]}
    skips: dict[str, int] = {}
    for reason, count in (item for part in parts for item in part["skips"].items()):
        skips[reason] = skips.get(reason, 0) + count
    failed = [part for part in parts if part["outcome"] == "failed" and not (len(parts) > 1 and is_empty(part))]
    lost = [test for part in parts for test in part["lost"]]
    words = counted(counts) + "".join(f"; {part['words']}" for part in failed[:1] if ";" in part["words"])
    if lost:
        words += f"; {len(lost)} of them lost the GPU for their process, first {lost[0]}"
    result = {"outcome": "failed" if failed or not counts["passed"] else "passed", "words": words, "counts": counts, "skips": skips}
    result |= {"ran": sum(part["ran"] for part in parts), "lost": lost}
    result["failures"] = [failure for part in parts for failure in part["failures"]][:200]
    return result | ({"output": failed[0]["output"]} if failed else {})


def is_empty(part: dict) -> bool:
    """Whether there was no test for a process: it came after the last, or there are fewer tests than processes."""
    return "no test ran; exit status 5" in part["words"]


def joined(parts: dict) -> dict:
    """One result of several: failed where one failed, skipped where all were."""
    outcomes = [part["outcome"] for part in parts.values()]
    outcome = "failed" if "failed" in outcomes else "passed" if "passed" in outcomes else "skipped"
    return {"outcome": outcome, "words": "; ".join(part["words"] for part in parts.values()), "parts": parts}


# ---- the device and the result ---------------------------------------------------------------------------------------


def probe() -> dict:
    """What the machine's Python has, asked in a process of its own."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {"torch_error": "it took more than 120 s to import and to look for a device"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"torch_error": tail(done.stderr, 3) or f"exit status {done.returncode}"}


def what_is_missing(found: dict) -> str:
    """ "" where the check can run, else what it lacks."""
    if "torch_error" in found:
        return f"torch cannot be imported by {sys.executable}: {found['torch_error']}"
    version = tuple(int(part) for part in re.findall(r"\d+", found["torch"])[:2])
    if version < (2, 10):
        return f"torch 2.10 or newer is needed, {found['torch']} is installed"
    if found.get("cuda") is None:
        return f"torch {found['torch']} was built without CUDA"
    if "device" not in found:
        return f"torch {found['torch']} finds no CUDA device"
    return ""


def output_of(*command) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(found: dict) -> dict:
    release = re.search(r"release ([\d.]+)", (output_of(nvcc(), "--version") if nvcc() else None) or "")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    status = output_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return found | {
        "driver": driver.splitlines()[0] if driver else None,
        "nvcc": release.group(1) if release else None,
        "cores": os.cpu_count(),
        "commit": output_of("git", "rev-parse", "--short=12", "--verify", "HEAD"),
        "dirty": None if status is None else bool(status),
        "packages": {name: importlib.util.find_spec(name) is not None for name in ("pytest", "xdist", "scipy", "numpy", "ninja")},
        "date": time.strftime("%Y-%m-%d"),
    }


def slug(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def report_lines(results: dict, bench_lines: list[str]) -> list[str]:
    """What is printed last: the benchmark's tables, then the stages, then what failed or was skipped and why."""
    text = [*bench_lines, ""] if bench_lines else []
    text += [stage_line(name, result) for name, result in results.items()]
    for name, result in results.items():
        for part in (result, *result.get("parts", {}).values()):
            failures = part.get("failures", [])
            text += [
                f"  {name}: {failure['test']}: {failure['message'].splitlines()[0][:150] if failure['message'] else ''}"
                for failure in failures[:4]
            ]
            text += [f"  {name}: … and {len(failures) - 4} more failures"] * (len(failures) > 4)
            text += [f"  {name}: {count} skipped: {reason}" for reason, count in list(part.get("skips", {}).items())[:4]]
    return text


def bench_lines(check: Check, numbers: dict | None) -> list[str]:
    """`gpu_bench.lines`, from a process of its own, since importing it imports fastgen."""
    if not numbers:
        return []
    code = "import json, sys; from benchmarks import gpu_bench; print(*gpu_bench.lines(json.load(sys.stdin)), sep='\\n')"
    environment = {"capture_output": True, "text": True, "cwd": check.root, "env": os.environ | check.env}
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(numbers), **environment)
    return done.stdout.splitlines() or [f"no table: {tail(done.stderr, 1)}"]


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="check this wheel, not a build of the tree")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where the result goes (default {OUT})")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument("--only", default=",".join(STAGES), metavar="STAGES", help=f"of {','.join(STAGES)}; default all")
    parser.add_argument("--commit", metavar="ID", help="what the result says was checked, where git cannot tell")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if not set(wanted) <= set(STAGES):
        parser.error(f"--only: expected some of {', '.join(STAGES)}, got {options.only!r}")
    if options.wheel is not None and not options.wheel.is_file():
        parser.error(f"--wheel: no such file: {options.wheel}")
    start = time.monotonic()
    found = probe()
    if missing := what_is_missing(found):
        print(f"gpu check: nothing was run: {missing}", file=sys.stderr)
        return 2

    wanted = [name for name in STAGES if name in wanted]
    whole = len(wanted) == len(STAGES)
    file = options.out / slug(found["device"]) / f"gpu_check{'' if whole else '_' + '_'.join(wanted)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    check = Check(found, options.wheel.resolve() if options.wheel else None)
    described = environment(found) | {"wheel": options.wheel and options.wheel.name}
    described["commit"] = described["commit"] or options.commit
    versions = ", ".join(f"{name} {described[name] or 'none'}" for name in ("driver", "torch", "triton", "nvcc"))
    print(f"{found['device']}, {versions}")

    def save(results):
        file.write_text(json.dumps({"environment": described, "stages": results}, indent=1) + "\n")

    def say(line):
        print(line, flush=True)

    results = run_stages({name: getattr(check, name) for name in wanted}, options.minutes, say, save)
    save(results)
    print(*report_lines(results, bench_lines(check, results.get("bench", {}).get("numbers"))), sep="\n")
    failed = [name for name, result in results.items() if result["outcome"] == "failed"]
    print(f"{time.monotonic() - start:.0f} s; {'failed: ' + ', '.join(failed) if failed else 'nothing failed'}; {file}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
