"""The operators, a folder each.

The package of an operator has its public function, the checks of its arguments and its table of
implementations. `reference` is its definition in plain PyTorch, valid in double precision; `triton`
and `native` are its kernels; `cases` are the inputs that tests, benchmarks and the audit run it on.
"""
