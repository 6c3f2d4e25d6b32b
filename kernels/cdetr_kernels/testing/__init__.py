"""Helpers that tests, benchmarks and the audit of the operators share.

`case` holds one call of an operator with its inputs, `accuracy` judges results against fp64, and
`machine_code` compiles kernels for GPUs that need not be present.
"""
