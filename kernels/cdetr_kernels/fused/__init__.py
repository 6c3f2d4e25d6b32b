"""Operators as Triton kernels, one operator a file.

`configurations` holds tile sizes, `launching` what all launchers share, `random` the dropout masks.
Importing this package imports neither triton nor its modules; `cdetr_kernels.ops` does so at the
first call that asks for a kernel.
"""
