"""Benchmarks: `pytest benchmarks --benchmark-only`; on a GPU also `python -m benchmarks.gpu_check` (`make gpu`), whose last stage,
`python -m benchmarks.gpu_bench`, does without pytest-benchmark.
`python -m benchmarks.report` makes tables and plots of what they wrote, and the figures that the docs quote (`make figures`).
For whoever changes a kernel: `python -m benchmarks.compare BASE` (`make bench-compare BASE=rev`).

Not part of the installed package.
"""
