"""Comparisons: the gate, what stands in a row, and the timer."""

import multiprocessing
import os

import pytest
import torch

from benchmarks.case import Case, Within, largest_difference
from benchmarks.memory import (
    available_mib,
    memory_of,
    peak_mib,
    peak_mib_of_process,
    peaks_mib_of_process,
)
from benchmarks.timing import summarised, time_in_turns

X = torch.ones(3)
GATE = Within(lambda a, b: {"error": largest_difference(a, b)}, {"error": 0.1})


def case(**options):
    providers = {"reference": lambda: X, "near": lambda: X + 0.05, "far": lambda: X + 1}
    return Case(**{"work": "w", "shape": "3", "providers": providers, "gate": GATE} | options)


def test_a_row_has_its_time_and_accuracy_or_the_reason(capsys):
    tried = case(derive=lambda row: {"calls/s": 1e3 / row["ms"]}, counts=lambda name: {"n": name})
    reference, near, far = rows = tried.measure(3)
    assert reference["speed-up"] == 1
    assert near["accuracy"]["error"] == pytest.approx(0.05)
    assert near["speed-up"] == pytest.approx(reference["ms"] / near["ms"])
    assert near["calls/s"] == pytest.approx(1e3 / near["ms"])
    assert near["n"] == "near"
    assert far == {"work": "w", "shape": "3", "dtype": "float32", "provider": "far",
                   "not measured": "error is 1, expected at most 0.1"}  # fmt: skip
    assert tried.failures(rows) == [far]
    assert case(optional=["far"]).failures(rows) == []
    assert "far: error is 1" in capsys.readouterr().err


def test_what_is_refused_has_a_row_and_is_no_failure():
    tried = case(providers={"reference": lambda: X}, refused={"large": "does not fit"})
    rows = tried.measure(1)
    assert [row["provider"] for row in rows] == ["reference", "large"]
    assert rows[1]["not measured"] == "does not fit"
    assert tried.failures(rows) == []
    (row,) = case(providers={}, refused={"large": "does not fit"}).measure(1)
    assert row["provider"] == "large"


@pytest.mark.parametrize("broken", ["reference", "far"])
def test_a_provider_that_raises_does_not_stop_the_others(broken):
    def fail():
        raise ValueError("two lines\nof text")

    providers = {"reference": lambda: X, "near": lambda: X, "far": lambda: X} | {broken: fail}
    rows = {row["provider"]: row for row in case(providers=providers).measure(1)}
    assert rows[broken]["not measured"] == "ValueError: two lines"
    # Without the reference there is nothing to check the others against.
    assert ("ms" in rows["near"]) == (broken == "far")


def test_nan_passes_no_gate():
    providers = {"reference": lambda: X, "nan": lambda: X * float("nan")}
    assert "ms" not in case(providers=providers).measure(1)[1]


def test_results_of_the_timed_calls_can_be_checked():
    kept = {}
    providers = {
        name: lambda name=name, add=add: kept.setdefault(name, X + add)
        for name, add in (("reference", 0), ("far", 1))
    }
    tried = case(providers=providers, gate_after=True, result=kept.__getitem__)
    reference, far = tried.measure(1)
    assert reference["calls"] == 1
    assert "ms" not in far


@pytest.mark.parametrize("cold", [False, True])
def test_calls_are_timed_in_turns(cold):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = time_in_turns(calls, 3, warmup=1, cold=cold)
    assert order == list("abababab")
    assert [times[name]["calls"] for name in "ab"] == [3, 3]


def test_time_runs_out_after_ten_calls():
    assert time_in_turns({"a": lambda: None}, 1000, seconds=0)["a"]["calls"] == 10


def test_statistics():
    assert summarised(range(1, 101)) == {
        "ms": 50.5, "min_ms": 1, "p95_ms": 95, "max_ms": 100, "calls": 100
    }  # fmt: skip


def make_allocation(mib):
    return lambda: torch.ones(mib * 2**18).sum()


def test_the_peak_of_a_process():
    assert peak_mib_of_process(make_allocation, 64) == pytest.approx(64, abs=16)
    assert peak_mib(make_allocation(1), torch.device("cpu")) is None


def make_growing():
    return make_allocation


def test_peaks_of_a_process_that_may_end_before_its_values_do():
    peaks = peaks_mib_of_process(make_growing, [8, 64, 10**9])
    assert next(peaks) == pytest.approx(8, abs=16)
    assert next(peaks) == pytest.approx(64, abs=16)
    with pytest.raises(RuntimeError, match="make_growing: the process ended with 1"):
        next(peaks)
    peaks = peaks_mib_of_process(make_growing, [1, 2])
    next(peaks)
    peaks.close()
    assert not multiprocessing.active_children()


def test_memory_of_a_process():
    sizes = memory_of(os.getpid())
    assert sizes["RSS"] >= sizes["PSS"] >= sizes["anonymous PSS"] > 0
    assert sizes["RSS"] >= sizes["own"] > 0
    assert available_mib() > 0
