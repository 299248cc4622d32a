"""Benchmarks: `pytest benchmarks --benchmark-only`, and `python -m benchmarks.side_by_side`; on a GPU
`python -m benchmarks.gpu_check` (`make gpu`), whose last stage is `python -m benchmarks.gpu_bench`. For whoever changes a kernel:
`python -m benchmarks.compare BASE` (`make bench-compare BASE=rev`).

Not part of the installed package.
"""
