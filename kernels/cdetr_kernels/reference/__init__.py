"""The operators' definitions in plain PyTorch: readable, differentiable, valid in double precision."""
