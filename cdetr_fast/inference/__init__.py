"""Fast inference: `optimize()` and what it is made of."""

from cdetr_fast.inference.optimize import optimize

__all__ = ["optimize"]
