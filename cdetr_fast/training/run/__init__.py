"""A training run from outside the loop: processes, signals, log, state on disk, identity."""
