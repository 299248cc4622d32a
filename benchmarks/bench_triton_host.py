"""What calls of the Triton backend take on the host, measured without a GPU: see triton_host.py. A process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import common, triton_host


def test_triton_host(benchmark, pytestconfig, note, in_time):
    in_time("triton_host")  # before it may be skipped: no time is held back for what does not run
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if triton_host.compiler() is None:
        pytest.skip("needs a C compiler, as Triton's launcher does")
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTGEN_BACKEND")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.triton_host", *(["--tiny"] if pytestconfig.option.tiny else [])]

    def run():
        return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    benchmark.group = "triton host"
    found = benchmark.pedantic(run, rounds=1)
    add = found.pop("torch.add")
    benchmark.extra_info.update({"kind": "triton host", "calls": found, "torch.add": add}, **common.environment())
    for name, call in found.items():
        ours, theirs = call["direct"], call["dispatch"]
        note(f"{name}: {ours:.1f} µs; by Triton's dispatch {theirs:.1f}, {theirs / ours:.1f} times; {call['launches']} launches")
    note(f"torch.add of 16 elements on this CPU: {add:.2f} µs")
