"""Checkpoints of this package, transformers and the paper's authors: load, save, key names."""
