"""Shared helpers: atomic files, checks of values, errors, devices, suggestions for wrong names."""
