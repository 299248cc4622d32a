"""What `import fastgen` adds to `import torch`, which is to be under 50 ms: each round is a process of its own."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import fastgen

from . import common

CODE = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import fastgen
print(between - start, time.perf_counter() - between)
"""


def test_import(benchmark, pytestconfig, note, in_time):
    in_time("import")
    times = []
    environment = os.environ | {"PYTHONPATH": str(Path(fastgen.__file__).parents[1])}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode: the warm-up writes it

    def fresh():
        run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
        times.append(tuple(map(float, run.stdout.split())))

    benchmark.group = "import"
    benchmark.pedantic(fresh, rounds=1 if pytestconfig.option.tiny else 9, warmup_rounds=1)
    torch_s, fastgen_s = (statistics.median(column) for column in zip(*times[1:] or times, strict=True))
    share = fastgen_s / (torch_s + fastgen_s)
    benchmark.extra_info.update(
        {"kind": "import", "torch s": torch_s, "fastgen s": fastgen_s, "fastgen's share": share}, **common.environment()
    )
    note(f"import torch {torch_s * 1e3:.0f} ms, then import fastgen {fastgen_s * 1e3:.1f} ms, {share:.1%} of both")
