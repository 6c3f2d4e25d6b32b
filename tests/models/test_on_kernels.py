"""The model on triton's kernels, in the interpreter: the numbers of the references.

Each test starts a process of its own, as the backend and the interpreter are chosen at import.
"""
