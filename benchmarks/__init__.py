"""Benchmarks: `python -m benchmarks.<name>` measures, checks accuracy and writes JSON rows."""
