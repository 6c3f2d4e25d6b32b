"""Which implementation of an operator runs, and why.

Each operator has a table of paths. `backend="auto"` takes the best one there is; a path that is
asked for by name and cannot run raises `RuntimeError` with the reason, so a request is never
answered by another path in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

BACKENDS = ("auto", "torch", "triton", "native")


@dataclass(frozen=True)
class Choice:
    """The path that `backend="auto"` takes for one operator, and the reason."""

    op: str
    path: str
    reason: str


@dataclass(frozen=True)
class Operator:
    """One operator and its implementations.

    Args:
        name: Public name of the operator.
        paths: Implementations by backend name, best first.
        held_back: Paths that run only when asked for by name, with the reason.
    """

    name: str
    paths: dict[str, Callable] = field(default_factory=dict)
    held_back: dict[str, str] = field(default_factory=dict)

    def __call__(self, backend: str, *args, **kwargs):
        """Runs the path that `backend` names.

        Raises:
            ValueError: `backend` is not one of `BACKENDS`.
            RuntimeError: The path was asked for by name and this build does not have it, or it
                cannot run on these tensors.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
        name = self._best() if backend == "auto" else backend
        if name not in self.paths:
            raise RuntimeError(
                f"{self.name}: backend {backend!r} cannot run: {self._absence(backend)}"
            )
        return self.paths[name](*args, **kwargs)

    def choice(self) -> Choice:
        """Returns the path that "auto" takes, with the reason for it."""
        absent = (self._absence(name) for name in ("triton", "native") if name not in self.paths)
        return Choice(self.name, self._best(), "; ".join((*self.held_back.values(), *absent)))

    def _best(self) -> str:
        return next(name for name in self.paths if name not in self.held_back)

    def _absence(self, backend: str) -> str:
        return f"this version of cdetr_kernels has no {backend} path for {self.name}"


def report() -> list[Choice]:
    """Returns the path that "auto" takes, and why, for every operator (`cdetr-fast info`)."""
    from cdetr_kernels.ops import OPERATORS

    return [operator.choice() for operator in OPERATORS]
