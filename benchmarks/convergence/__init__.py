"""Convergence study: how fast training converges, `python -m benchmarks.convergence`."""
