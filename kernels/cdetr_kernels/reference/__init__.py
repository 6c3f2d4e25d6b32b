"""The operators' definitions in plain PyTorch, valid in double precision."""
