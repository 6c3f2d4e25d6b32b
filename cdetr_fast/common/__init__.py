"""Shared helpers: checks of values by their types, atomic files, errors, devices, CUDA graphs."""
