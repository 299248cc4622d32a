"""Benchmarks: `pytest benchmarks --benchmark-only`, and `python -m benchmarks.side_by_side`; on a GPU
`python -m benchmarks.gpu_check` (`make gpu`), whose last stage is `python -m benchmarks.gpu_bench`.
`python -m benchmarks.report` makes tables and plots of what they wrote, and README's figures (`make figures`).

Not part of the installed package.
"""
