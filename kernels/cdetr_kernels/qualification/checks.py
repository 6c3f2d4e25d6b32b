"""Checks of one path of an operator on one device, and its times: the work of a child process."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cdetr_kernels import registry
from cdetr_kernels.evidence import BACKWARD, FORWARD, RIGHT
from cdetr_kernels.qualification import tuning
from cdetr_kernels.qualification.plan import CHECK, TILE, Task
from cdetr_kernels.testing import accuracy, borders, timing
from cdetr_kernels.testing.accuracy import KERNELS_FACTOR, Judge, Results
from cdetr_kernels.testing.case import Case, Function

Row = dict[str, Any]


class Rejected(Exception):
    """A path is not to be used.

    Args:
        verdict: What is wrong, in a word or two.
        reason: Details.
    """

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(f"{verdict}: {reason}")
        self.verdict, self.reason = verdict, reason


def run(task: Task, device: torch.device, repeats: int, seconds: float) -> list[Row]:
    """Run a task; return a row for each mode, with its verdict."""
    if task.what == TILE:
        return [tuning.run(task, device, repeats, seconds)]
    rows = []
    for mode in (FORWARD, BACKWARD) if task.backward else (FORWARD,):
        row: Row = {"mode": mode, "verdict": RIGHT, "reason": ""}
        try:
            case = make_case(task, device)
            judge = Judge(case, mode == BACKWARD)
            if task.what == CHECK:
                check(judge, task.path)
            else:
                row |= measure(judge, task.path, repeats, seconds)
        except Rejected as error:
            row |= {"verdict": error.verdict, "reason": error.reason}
        except Exception as error:  # whatever it is, the path is not to be used
            row |= verdict_of(error)
        rows.append(row)
        if row["verdict"] != RIGHT:
            break
    return rows


def make_case(task: Task, device: torch.device) -> Case:
    """Return the call that a task is about; raise Rejected if the path cannot run it."""
    module = registry.cases(task.operator)
    case: Case = module.make(getattr(torch, task.dtype), device, **task.sizes)
    implementation = registry.operator(task.operator).implementations[task.path]
    reason = implementation.unsupported_reason(*case.handed_on(task.path))
    if reason is not None:
        raise Rejected("cannot run", reason)
    return case


def verdict_of(error: Exception) -> Row:
    """Return what an exception says about a path."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    short = ("out of memory", "can't allocate memory", "not enough memory", "out of resource")
    is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if is_memory or any(words in str(error).lower() for words in short):
        return {"verdict": "out of memory", "reason": reason}
    return {"verdict": "raises", "reason": reason}


def check(judge: Judge, path: str) -> None:
    """Check everything about the results of a path; raise Rejected if something is wrong."""
    case = judge.case
    function = case.function(path)
    require_accurate(judge, judge.evaluate(function), "")
    require_repeatable(judge, function)
    guarded = borders.Guarded()
    with guarded.installed():
        results = judge.evaluate(function)
    # Memory that is left unwritten matters where it is a result, which is NaN then.
    if (guarded.complaint() or "").startswith("writes"):
        raise Rejected("writes outside", "into the guards around its memory")
    require_accurate(judge, results, " in poisoned memory")
    scattered = {
        name: borders.scattered(x) if isinstance(x, Tensor) else x
        for name, x in case.inputs.items()
    }
    with torch.set_grad_enabled(bool(judge.names)):
        results = accuracy.evaluate(function, scattered, judge.names, judge.grads, judge.images)
    require_accurate(judge, results, " of strided inputs with poison between")
    if case.device.type == "cuda":
        require_capturable(judge, function)


def require_accurate(judge: Judge, got: Results, where: str) -> None:
    """Raise Rejected if a result has more than twice torch's own error against fp64."""
    for name, x in got.named().items():
        expected = judge.exact[name].isfinite()
        wrong = int((expected & ~x.isfinite()).sum()) if x.is_floating_point() else 0
        if wrong:
            raise Rejected("not finite", f"{name}{where}: {wrong} of {x.numel()} numbers")
    for error in judge.errors(got):
        if not error.passes(KERNELS_FACTOR):
            raise Rejected(
                "wrong",
                f"{error.name}{where}: error {error.error:.3g} against fp64, "
                f"torch's is {error.torchs:.3g}",
            )


def require_repeatable(judge: Judge, function: Function) -> None:
    """Raise Rejected if several calls do not give the same bits."""
    first = judge.evaluate(function).named()
    for _ in range(2):
        require_equal(first, judge.evaluate(function).named(), "not repeatable", "another call")


def require_equal(
    first: dict[str, Tensor], again: dict[str, Tensor], verdict: str, what: str
) -> None:
    """Raise Rejected if results differ in a bit."""
    for name, x in first.items():
        if not torch.equal(x, again[name]):
            differing = int((x != again[name]).sum())
            raise Rejected(verdict, f"{name}: {what} differs in {differing} of {x.numel()} numbers")


def require_capturable(judge: Judge, function: Function) -> None:
    """Raise Rejected if a CUDA graph of a call cannot be made, or its replay differs."""
    expected = judge.evaluate(function).named()
    kept: dict[str, Tensor] = {}

    def call() -> None:
        kept.update(judge.evaluate(function).named())

    try:
        replay = timing.captured(call)
    except RuntimeError as error:
        raise Rejected("cannot be captured", verdict_of(error)["reason"]) from error
    for _ in range(2):
        for x in kept.values():
            x.zero_()
        replay()
        require_equal(expected, kept, "wrong when replayed", "a replay")


def measure(judge: Judge, path: str, repeats: int, seconds: float) -> Row:
    """Check the results of a path at the model's sizes, and time it beside torch's own."""
    function = judge.case.function(path)
    require_accurate(judge, judge.evaluate(function), "")
    require_repeatable(judge, function)
    # A seed is for the comparison: torch's fused attention takes none.
    unseeded = {"seed": None} if "seed" in judge.case.options else {}
    calls = {name: _call(judge, judge.case.function(name, **unseeded)) for name in (path, "torch")}
    device = judge.case.device
    # The interpreter's times say nothing, so there are few of them.
    on_gpu = device.type == "cuda"
    times = timing.time_in_turns(
        calls, repeats if on_gpu else 2, warmup=2 * on_gpu, device=device, cold=on_gpu,
        seconds=seconds,
    )  # fmt: skip
    return {"ms": times[path]["ms"], "torch_ms": times["torch"]["ms"]}


def _call(judge: Judge, function: Function) -> Callable[[], Any]:
    """Return a call with the inputs of a case, with gradients if they are judged."""
    names = judge.names
    inputs = {
        name: x.detach().requires_grad_() if name in names else x
        for name, x in judge.case.inputs.items()
    }
    leaves: Sequence[Tensor] = [inputs[name] for name in names]

    def call() -> Any:
        if not names:
            with torch.no_grad():
                return function(**inputs)
        outputs = accuracy.tensors(function(**inputs))
        grads = [g.to(x.dtype) for g, x in zip(judge.grads, outputs, strict=True)]
        return torch.autograd.grad(outputs, leaves, grads)

    return call
