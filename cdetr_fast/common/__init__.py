"""Shared helpers: atomic files, checks of values, suggestions for misspelled names."""
