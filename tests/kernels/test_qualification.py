"""Qualification with triton's interpreter as the device: broken kernels and records.

Child processes find the broken kernels in a `sitecustomize` of the test, so the package has no
door for them.
"""

import dataclasses
import json
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch

import cdetr_kernels
from cdetr_kernels import evidence, registry
from cdetr_kernels.evidence import BACKWARD, FORWARD, RIGHT, Evidence
from cdetr_kernels.gpu import configurations
from cdetr_kernels.qualification import (
    children,
    compilation,
    plan,
    run,
    tuning,
    worker,
)
from cdetr_kernels.qualification.children import Outcome
from cdetr_kernels.qualification.plan import CHECK, LEVELS, TIME, Task

pytest.importorskip("triton")
CPU = torch.device("cpu")

# A kernel that is right, and seven that are not.
BROKEN = textwrap.dedent("""
    import dataclasses, os, signal
    import torch
    from cdetr_kernels import registry

    def wrong_by_one_percent(result, *_):
        return 1.01 * result

    def nan_at_a_border(result, *_):
        result = result.clone()
        result[..., -1, -1] = float("nan")
        return result

    def exits(*_):
        os._exit(0)

    def crashes(*_):
        os.kill(os.getpid(), signal.SIGSEGV)

    def loops(*_):
        while True:
            pass

    def takes_all_memory(*_):
        return torch.empty(2**55, dtype=torch.uint8)

    def not_repeatable(result, *_):
        output, attention = result
        return output * (1 + 1e-7 * torch.rand(output.shape)), attention

    FAULTS = {
        "sine_query": wrong_by_one_percent,
        "sine_position_2d": nan_at_a_border,
        "matching_cost": exits,
        "conditional_attention_separable": crashes,
        "set_loss": loops,
        "normalize_and_pad": takes_all_memory,
        "conditional_attention": not_repeatable,
    }
    for name, fault in FAULTS.items():
        operator = registry.operator(name)
        torchs = operator.implementations["torch"].run
        def broken(*args, torchs=torchs, fault=fault):
            return fault(torchs(*args), *args)
        operator.implementations["triton"] = dataclasses.replace(
            operator.implementations["triton"], run=broken
        )
""")
VERDICTS = {
    "residual_layer_norm": RIGHT,
    "sine_query": "wrong",
    "sine_position_2d": "not finite",
    "matching_cost": children.CRASHED,
    "conditional_attention_separable": children.CRASHED,
    "set_loss": children.TIMED_OUT,
    "normalize_and_pad": "out of memory",
    "conditional_attention": "not repeatable",
}


@pytest.fixture(scope="module")
def qualified(tmp_path_factory):
    """Qualify all operators, most of them broken; return the report and the lines about it."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "sitecustomize.py").write_text(BROKEN)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDETR_FAST_CACHE", str(folder))
        # No longer than that: the tests after it start processes whose kernels are to be whole.
        with pytest.MonkeyPatch.context() as broken:
            broken.setenv("TRITON_INTERPRET", "1")
            broken.setenv("PYTHONPATH", str(folder))
            limits = dataclasses.replace(LEVELS["quick"], seconds=600.0, task_seconds=8.0)
            broken.setitem(LEVELS, "quick", limits)
            report = cdetr_kernels.qualify(say=said.append)
        yield report, said


@pytest.mark.slow
@pytest.mark.parametrize("name", VERDICTS)
def test_broken_kernels_are_caught_named_and_not_taken(qualified, name):
    report, said = qualified
    findings = [x for x in report.record.findings if x.operator == name]
    assert findings
    assert {x.verdict for x in findings} == {VERDICTS[name]}, findings
    (line,) = [x for x in said if x.startswith(f"{name}:")]
    if VERDICTS[name] != RIGHT:
        assert VERDICTS[name] in line
        assert not any(x.is_taken for x in findings)
        assert Evidence(report.record, "").taken(name) == {}
        assert all(x in report.rejected for x in findings)


@pytest.mark.slow
def test_the_reasons_say_what_happened(qualified):
    reasons = {x.operator: x.reason for x in qualified[0].record.findings}
    assert "exit status 0" in reasons["matching_cost"]
    assert "killed by SIGSEGV" in reasons["conditional_attention_separable"]
    assert "nothing after 8 s" in reasons["set_loss"]
    assert "allocate memory" in reasons["normalize_and_pad"]
    assert "output 0: error" in reasons["sine_query"]
    assert "of 26112 numbers" in reasons["sine_position_2d"]
    assert "differs in" in reasons["conditional_attention"]


@pytest.mark.slow
def test_the_record_is_kept_and_has_times(qualified):
    report, _ = qualified
    record, source = evidence.find(evidence.key(CPU))
    assert (record, source) == (report.record, str(report.file))
    (norm,) = [x for x in record.findings if x.operator == "residual_layer_norm"]
    assert norm.ms > 0
    assert norm.torch_ms > 0
    # The interpreter is never faster.
    assert not report.taken
    assert "kernels taken in 0" in report.summary()


def test_what_cannot_be_qualified(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"operators: expected some of .*, got \['nothing'\]"):
        cdetr_kernels.qualify(operators=["nothing"])
    with pytest.raises(ValueError, match="level: expected one of quick, full, got 'slow'"):
        cdetr_kernels.qualify(level="slow")
    with pytest.raises(RuntimeError, match="device: expected a GPU"):
        cdetr_kernels.qualify("meta")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        cdetr_kernels.qualify("cpu")


class FakeChildren:
    """Children that answer at once; `run` is given the outcome of a task."""

    def __init__(self, outcome):
        self.outcome, self.device = outcome, CPU
        self.ran = []

    def run(self, tasks, deadline, tiles=None, *, are_last=False):
        self.ran += tasks
        return (self.outcome(task, tiles) for task in tasks)


def row(mode=FORWARD, verdict=RIGHT, **more):
    return {"mode": mode, "verdict": verdict, "reason": "", **more}


def test_a_check_rejects_its_dtype_and_no_other():
    tasks = [
        Task(what, "op", "triton", dtype, {}, True, (size,))
        for what in (CHECK, TIME)
        for dtype in ("float16", "float32")
        for size in (1, 2)
    ]

    def outcome(task, _):
        if task.what == CHECK and task.dtype == "float16" and task.calls == (2,):
            return Outcome(task, (row(), row(BACKWARD, "wrong")))
        return Outcome(task, tuple(row(m, ms=1.0, torch_ms=2.0) for m in (FORWARD, BACKWARD)))

    findings = run._findings([outcome(task, None) for task in tasks], "quick")
    assert {(x.dtype, x.mode, x.calls): x.verdict for x in findings} == {
        (dtype, mode, (size,)): "wrong" if (dtype, mode) == ("float16", BACKWARD) else RIGHT
        for dtype in ("float16", "float32")
        for mode in (FORWARD, BACKWARD)
        for size in (1, 2)
    }


@pytest.mark.parametrize("worse", [row(ms=3.0, torch_ms=2.0), row(verdict="wrong")], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_a_class_is_as_good_as_the_worst_of_its_calls(worse, first):
    task = Task(TIME, "op", "triton")
    rows = [row(ms=1.0, torch_ms=2.0), worse][:: 1 if first else -1]
    (finding,) = run._findings([Outcome(task, (x,)) for x in rows], "quick")
    assert not finding.is_taken


@pytest.mark.parametrize("holds", [True, False])
def test_tiles_are_kept_only_if_everything_holds_with_them(monkeypatch, holds):
    planned = [Task(TIME, "conditional_attention", "triton")]
    key = "half 32 forward"
    many = key + configurations.MANY
    tiles = [Task("tile", "conditional_attention", "triton", kernel=key, tile=(*tile, 1, 8),
                  label=label)
             for tile, label in (((64, 64, 4, 3), tuning.TABLE), ((128, 64, 8, 3), "b"),
                                 ((32, 64, 4, 3), "c"), ((64, 64, 4, 2), "d"))]  # fmt: skip
    # Of calls with few rows, and with many.
    times = {
        (64, 64, 4, 3, 1, 8): (1.0, 1.0), (128, 64, 8, 3, 1, 8): (0.5, 0.7),
        (32, 64, 4, 3, 1, 8): (0.1, 0.1), (64, 64, 4, 2, 1, 8): (0.499, 0.6),
        # With the fastest tile of few rows, the keys split in other ways.
        (128, 64, 8, 3, 0, 8): (0.6, 0.2), (128, 64, 8, 3, 1, 4): (0.4, 0.2),
        (128, 64, 8, 3, 2, 4): (0.45, 0.2), (128, 64, 8, 3, 2, 2): (0.395, 0.2),
    }  # fmt: skip

    def outcome(task, with_tiles):
        if task.what == TIME:
            right = not with_tiles or holds
            return Outcome(task, (row(verdict=RIGHT if right else "wrong", ms=0.7, torch_ms=2.0),))
        if task.label == "c" or task.tile not in times:
            return Outcome(task, (row(verdict="wrong"),))
        return Outcome(task, (row(ms=dict(zip((key, many), times[task.tile], strict=True))),))

    found = run._qualified(FakeChildren(outcome), planned, tiles, "quick", 1e9, are_last=True)
    findings, chosen = found
    assert all(x.verdict == RIGHT for x in findings)
    # "c" is wrong, "d" is not better than "b" by more than noise with few rows, and (2, 2) not
    # better than (1, 4). Splits are no matter of many rows.
    expected = {key: (128, 64, 8, 3, 1, 4), many: (64, 64, 4, 2, 1, 8)}
    assert chosen == (expected if holds else {})


def test_every_operator_with_kernels_has_tasks_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tuning, "_architecture", lambda _: "sm_90")
    gpu = torch.device("cuda", 0)
    for name in registry.NAMES:
        paths = registry.operator(name).needs_evidence("cuda")
        assert paths, name
        for level in LEVELS:
            tasks = plan.tasks(name, paths, level, gpu)
            assert {task.what for task in tasks} == {CHECK, TIME}
            kinds = {(task.dtype, task.path) for task in tasks if task.what == TIME}
            assert kinds == {(task.dtype, task.path) for task in tasks if task.what == CHECK}
            for task in tasks:
                json.dumps(task.to_json())
            if name.startswith("conditional"):
                tiles = tuning.tasks(tasks, level, gpu)
                assert len({(x.kernel, x.tile) for x in tiles}) == len(tiles) > 6
    assert sum(plan.weight(name) for name in registry.NAMES) > len(registry.NAMES)


def compiled_files(folder) -> int:
    return len(list(folder.rglob("*.cubin")))


def test_kernels_are_compiled_ahead_into_the_cache_of_triton(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(evidence, "_FIXED", {})
    tasks = plan.tasks("residual_layer_norm", ["triton"], "quick", torch.device("cuda", 0))
    key = tuning.Key("half", 32, "separable_forward")
    tasks.append(Task("tile", key.operator, "triton", kernel=str(key), tile=(64, 32, 4, 3, 1, 4)))
    job = {"capability": 90, "multiprocessors": 132, "tasks": [x.to_json() for x in tasks]}
    names = compilation.run(job)
    assert {"layer_norm_kernel", "forward_kernel", "merge_kernel"} <= set(names)
    assert compiled_files(tmp_path) == len(names)
    assert compilation.run(job) == names  # the same variants, found in the cache
    assert compiled_files(tmp_path) == len(names)


def test_processes_compile_until_the_tasks_are_done(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compilation, "processes", lambda: 2)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, uuid="a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    gpu = torch.device("cuda", 0)
    tasks = plan.tasks("residual_layer_norm", ["triton"], "quick", gpu)
    started: list[children.Child] = []

    class Noted(children.Child):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self)

    monkeypatch.setattr(compilation, "Child", Noted)
    with compilation.ahead(tasks, gpu, LEVELS["quick"]):
        end = time.monotonic() + 120
        while compiled_files(tmp_path) < 2 and time.monotonic() < end:
            time.sleep(0.2)
    assert [x.process.returncode is not None for x in started] == [True, True]
    assert 2 <= compiled_files(tmp_path) <= 3  # of the three that there are, until the end
    # There is no triton driver to do it for, or nothing to gain.
    with compilation.ahead(tasks, CPU, LEVELS["quick"]):
        assert len(started) == 2


def test_a_gpu_that_no_other_process_can_use_is_not_the_kernels_fault(tmp_path, monkeypatch):
    """One in exclusive mode, or full: nothing is recorded, so that it is tried again."""
    refuses = "import os, sys\nif any('worker' in x for x in sys.orig_argv):\n    os._exit(3)\n"
    (tmp_path / "sitecustomize.py").write_text(refuses)
    monkeypatch.setenv("CDETR_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="cannot work on cpu: exit status 3"):
        cdetr_kernels.qualify(operators="sine_query")
    assert not list(tmp_path.glob("records/*"))


@pytest.mark.parametrize(
    ("seen", "taken"),
    [("ab", 1), ("b", 0), ("ba", 0), ("bb", 1), ("a", None), ("", None)],
)
def test_a_gpu_has_another_number_in_the_process_that_checks(monkeypatch, seen, taken):
    """The parent process took it for number 1, before its variables were changed."""
    used = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda x: SimpleNamespace(uuid=seen[x.index])
    )
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(item=lambda: device))
    job = {"device": "cuda:1", "identity": "b"}
    if taken is None:
        with pytest.raises(RuntimeError, match=r"there is no cuda:1 of the parent process \(b\)"):
            worker.usable_device(job)
        return
    assert worker.usable_device(job) == torch.device("cuda", taken)
    assert used == [torch.device("cuda", taken)]


def test_operators_share_the_time():
    names = ["conditional_attention", "sine_query", "set_loss"]
    first = plan.deadlines(names, 5.0, 100.0, 160.0)
    assert first == 100.0 + 60.0 * 4 / 6
    assert plan.deadlines(names[1:], 5.0, 110.0, 160.0) == 135.0
    assert plan.deadlines(names[2:], 5.0, 150.0, 160.0) == 160.0
    assert plan.deadlines(names, 5.0, 159.0, 160.0) == 160.0


def test_out_of_time_is_not_a_verdict_on_the_kernel(monkeypatch):
    monkeypatch.setattr(children, "Child", lambda *_: pytest.fail("nothing is to be started"))
    left = children.Children.__new__(children.Children)
    left.device, left.level, left.spare, left.hung = CPU, LEVELS["quick"], None, ""
    tasks = [Task(TIME, "op", "triton"), Task(TIME, "op", "triton", "float16")]
    outcomes = list(left.run(tasks, time.monotonic() - 1))
    assert [x.verdict for x in outcomes] == [children.OUT_OF_TIME] * 2
