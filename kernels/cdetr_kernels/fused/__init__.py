"""Operators as Triton kernels, one operator a file.

`tiles` holds tile sizes, `configurations` chooses one, `launching` is what all launchers share,
`random` makes dropout masks, `waves` sines and wavelengths.
Importing this package imports neither triton nor its modules; `cdetr_kernels.ops` does so at the
first call that asks for a kernel.
"""
