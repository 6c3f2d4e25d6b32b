"""Code that the triton kernels of several operators share, on the device and on the host.

On the device: `arithmetic` (dots, roundings, powers), `attention_blocks`, `boxes`, `random`
(dropout masks) and `waves` (sines and wavelengths). On the host: `support` (where kernels can run;
the one module that does not import triton), `tiles` and `configurations` (the table of tiles and
the choice from it), `launching`, and `registration` (operators of torch).
"""
