"""The predicted bound of a kernel (tools/bound.py): by hand, for kernels that are nothing but numbers."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `tools`, under every import mode of pytest
if not (ROOT / "tools").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
from tools import bound, machine_code  # noqa: E402


def kernel(arch="90", registers=32, loads=2, vectors=4, **per_element):
    """One that reads two float32 and writes one for each element, by 128-bit accesses; `loads` of them at a time."""
    each = {"load 128": loads / vectors, "store 128": 1 / vectors, "load": loads / vectors, "store": 1 / vectors, **per_element}
    counts = {"load 128": loads, "store 128": 1}
    main = machine_code.MainPath(vectors, 100, 0, 0, [], counts, {"instructions": sum(each.values()), **each})
    return machine_code.Kernel("op", arch, "kernel", machine_code.Resources(registers, 0, 0, 0, 0), 100, counts, main)


def test_memory_binds_where_there_is_little_to_do():
    made = bound.predicted(kernel())
    assert made.binds == "memory" and made.share == 1.0
    assert made.copy == made.memory == pytest.approx(12 / 3.0)  # 12 bytes at 3 TB/s, in picoseconds


@pytest.mark.parametrize("unit, lanes", [("special", 16), ("integer", 64), ("fp32", 128), ("conversion", 16)])
def test_a_unit_that_binds(unit, lanes):
    made = bound.predicted(kernel(**{unit: 300.0}))
    time = 1e12 * 300 / (132 * 1.98e9 * lanes)
    assert made.units[unit] == pytest.approx(time)
    assert made.binds == ("issue" if unit == "fp32" else unit)
    assert made.share == pytest.approx(4.0 / max(time, made.units["issue"]))


def test_too_few_bytes_on_their_way():
    """255 registers leave a multiprocessor 8 warps, each thread of which asks for 16 bytes at a time: 4,096 bytes, and as many
    that it writes. 3 TB/s × 600 ns / 132 are 13,636."""
    made = bound.predicted(kernel(registers=255, loads=1))
    assert made.binds == "memory" and made.share == pytest.approx(4096 * 2 / 13_636, rel=1e-3)


def test_narrow_accesses_are_of_rows():
    assert bound.bytes_of(kernel(**{"load 32": 5.0})) == 12


def test_what_is_not_predicted():
    assert bound.predicted(kernel(arch="75")) is None
    nothing = kernel()
    nothing.main = None
    assert bound.predicted(nothing) is None


def test_slower_units_of_an_older_gpu():
    newer, older = bound.predicted(kernel(fp32=60.0)), bound.predicted(kernel("80", fp32=60.0))
    assert older.units["fp32"] == pytest.approx(newer.units["fp32"] * 2 * 132 * 1.98 / (108 * 1.41))
