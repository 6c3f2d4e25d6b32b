"""Surroundings of the training loop: processes, signals, log, state on disk, identity."""
