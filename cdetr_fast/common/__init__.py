"""Shared helpers: checks of values by their types, atomic files, first lines of errors, devices."""
