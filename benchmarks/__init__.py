"""Benchmarks: `pytest benchmarks --benchmark-only`, and `python -m benchmarks.side_by_side`.

Not part of the installed package.
"""
