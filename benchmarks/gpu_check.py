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
STAGES = ("build", "tests", "sanitizer", "bench")
# shares of the time that is left; what a stage does not use goes to the later ones
WEIGHTS = {"build": 5.0, "tests": 3.0, "sanitizer": 1.5, "bench": 4.0}
HUGE = "past_32_bits"  # in the names of the tests that want the device's memory for themselves
TRITON_SAMPLE = (
    4  # on a GPU, one in so many of the Triton backend's tests is run: most of them compile a kernel, which takes a second
)
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
        if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
            raise Skip("no nvcc on the PATH nor CUDA_HOME; what is built already, if anything, is used")
        missing = [name for name in ("setuptools", "torch") if importlib.util.find_spec(name) is None]
        if missing or (shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None):
            raise Skip(f"{', '.join(missing) or 'ninja'} is not installed; what is built already, if anything, is used")
        arch = self.found["capability"]
        command = self.python("setup.py", "--quiet", "build_ext", "--inplace")
        status, output = self.run("build", command, seconds, {"FASTGEN_CUDA": "1", "FASTGEN_CUDA_ARCHS": arch})
        if status == 0:
            return {"outcome": "passed", "words": f"both libraries, for compute capability {arch}"}
        return {"outcome": "failed", "words": ended(status, seconds), "output": tail(output)}

    def install(self, seconds):
        """The wheel into a folder of its own, and a copy of the tests and benchmarks away from this tree's `fastgen`."""
        for folder in ("site", "tree"):
            shutil.rmtree(self.logs / folder, ignore_errors=True)
        self.root.mkdir(parents=True)
        for name in ("tests", "benchmarks", "examples"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(ROOT / "pyproject.toml", self.root)
        options = ("--no-index", "--no-deps", "--quiet", "--disable-pip-version-check", "--target", self.logs / "site")
        status, output = self.run("build", self.python("-m", "pip", "install", *options, self.wheel), seconds)
        if status == 0:
            return {"outcome": "passed", "words": f"installed {self.wheel.name}"}
        return {"outcome": "failed", "words": ended(status, seconds), "output": tail(output)}

    # -- tests --

    def tests(self, seconds):
        """First the tests of huge tensors, alone on the device; then all others, side by side where xdist is installed; then some
        of the Triton backend's, which compile a kernel each."""
        if importlib.util.find_spec("pytest") is None:
            raise Skip("pytest is not installed")
        start = time.monotonic()
        huge = self.pytest("tests_huge", 0.4 * seconds, "tests/test_cuda.py", "-k", HUGE)
        workers = min(8, (os.cpu_count() or 1) // 2)
        parallel = importlib.util.find_spec("xdist") is not None and workers > 1
        side_by_side = ("-p", "xdist", "-n", str(workers)) if parallel else ()
        left = seconds - (time.monotonic() - start)
        chosen = ("tests", "-k", f"not {HUGE}", "--not-backend", "triton")
        others = self.pytest("tests", (0.6 if self.found.get("triton") else 1.0) * left, *chosen, *side_by_side)
        if not parallel:
            others["words"] += "; one after another, since pytest-xdist is not installed"
        parts = {"huge": huge, "others": others}
        if self.found.get("triton"):
            parts["triton"] = self.triton_tests(seconds - (time.monotonic() - start), workers)
        return joined({name: part | {"words": f"{name}: {part['words']}"} for name, part in parts.items()})

    def triton_tests(self, seconds, workers):
        """One test in TRITON_SAMPLE, in so many processes."""
        shares = max(workers, 1)

        def share(k):
            options = ("--backend", "triton", "--share", f"{k * TRITON_SAMPLE}/{TRITON_SAMPLE * shares}")
            return self.pytest(f"tests_triton_{k}", seconds, "tests", "-k", f"not {HUGE}", *options)

        with ThreadPoolExecutor(shares) as threads:
            found = list(threads.map(share, range(shares)))
        failed = [part for part in found if part["outcome"] == "failed"]
        counts = {word: sum(part["counts"][word] for part in found) for word in found[0]["counts"]}
        skips = {}
        for reason, count in (item for part in found for item in part["skips"].items()):
            skips[reason] = skips.get(reason, 0) + count
        words = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no test ran"
        words += f" of one test in {TRITON_SAMPLE}" + "".join(f"; {part['words']}" for part in failed[:1])
        result = {"outcome": "failed" if failed else "passed", "words": words, "counts": counts, "skips": skips}
        result["failures"] = [failure for part in found for failure in part["failures"]][:200]
        return result | ({"output": failed[0]["output"]} if failed else {})

    def pytest(self, name, seconds, *arguments):
        report = self.logs / f"{name}.xml"
        report.unlink(missing_ok=True)
        # no plugin that happens to be installed: some add options or change how tests run
        env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
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
        words = ", ".join(f"{count} {word}" for word, count in result["counts"].items() if count) or "no test ran"
        if status not in (0, 1):
            words += f"; {ended(status, seconds)}"
        result |= {"outcome": "passed" if passed else "failed", "words": words}
        return result if passed else result | {"output": tail(output)}

    # -- compute-sanitizer --

    def sanitizer(self, seconds):
        tool = shutil.which("compute-sanitizer") or next(
            (
                str(path)
                for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
                if home and (path := sanitizer_of(home)).exists()
            ),
            None,
        )
        if tool is None:
            raise Skip("compute-sanitizer is not on the PATH nor in the CUDA toolkit")
        result, start = {}, time.monotonic()
        for index, check in enumerate(("memcheck", "racecheck")):
            left = (seconds - (time.monotonic() - start)) / (2 - index)
            # without the caching allocator every tensor is an allocation of its own, whose bounds the tool knows
            env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            options = ("--tool", check, "--error-exitcode", "9", "--launch-timeout", "120", "--print-limit", "20")
            command = [tool, *options, *self.python("tests/every_call.py", "--device", self.device)]
            status, output = self.run(check, command, left, env)
            summaries = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
            calls = re.findall(r"^(\d+ calls on .*)$", output, re.MULTILINE)
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


def sanitizer_of(home) -> Path:
    return Path(home) / "bin/compute-sanitizer"


def read_junit(report: Path) -> dict:
    """{"counts": {…}, "failures": [{"test", "message"}, …], "skips": {reason: how many}} of a JUnit file; zeros without one."""
    counts, failures, skips = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0), [], {}
    with contextlib.suppress(OSError, xml.ParseError):
        for case in xml.parse(report).iter("testcase"):
            kinds = {child.tag: child for child in case}
            word = {"failure": "failed", "error": "errors", "skipped": "skipped"}
            kind = next((tag for tag in word if tag in kinds), None)
            counts[word[kind] if kind else "passed"] += 1
            if kind == "skipped":
                reason = kinds[kind].get("message", "")
                skips[reason] = skips.get(reason, 0) + 1
            elif kind:
                name = f"{case.get('classname', '')}::{case.get('name', '')}"
                failures.append({"test": name, "message": kinds[kind].get("message", "")[:500]})
    return {"counts": counts, "failures": failures[:200], "skips": skips}


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
    nvcc = re.search(r"release ([\d.]+)", output_of("nvcc", "--version") or "")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    status = output_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return found | {
        "driver": driver.splitlines()[0] if driver else None,
        "nvcc": nvcc.group(1) if nvcc else None,
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
