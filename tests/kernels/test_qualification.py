"""Qualification with triton's interpreter as the device: broken kernels, records, dispatch.

Child processes find the broken kernels in a `sitecustomize` of the test, so the package has no
door for them.
"""

import contextlib
import dataclasses
import json
import textwrap
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support.interpreter import INTERPRETED, run_in_the_interpreter
from support.kernels import assert_accurate

import cdetr_kernels
from cdetr_kernels import dispatch, evidence, registry
from cdetr_kernels.dispatch import Implementation, Operator
from cdetr_kernels.evidence import BACKWARD, FORWARD, RIGHT, Evidence, Finding, Record
from cdetr_kernels.gpu import configurations
from cdetr_kernels.gpu.tiles import Tile
from cdetr_kernels.qualification import (
    checks,
    children,
    compilation,
    plan,
    run,
    tuning,
    worker,
)
from cdetr_kernels.qualification.children import Outcome
from cdetr_kernels.qualification.plan import CHECK, LEVELS, TIME, Task
from cdetr_kernels.testing import accuracy
from cdetr_kernels.testing.accuracy import KERNELS_FACTOR

pytest.importorskip("triton")
in_this_process = pytest.mark.skipif(INTERPRETED, reason="starts its own processes")
interpreted_only = pytest.mark.skipif(
    not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own"
)
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


@in_this_process
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


@in_this_process
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


@in_this_process
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


@in_this_process
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


@in_this_process
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


@in_this_process
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
    assert compiled_files(tmp_path) == 2
    assert [x.process.returncode is not None for x in started] == [True, True]
    # There is no triton driver to do it for, or nothing to gain.
    with compilation.ahead(tasks, CPU, LEVELS["quick"]):
        assert len(started) == 2


@in_this_process
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


@in_this_process
def test_out_of_time_is_not_a_verdict_on_the_kernel(monkeypatch):
    monkeypatch.setattr(children, "Child", lambda *_: pytest.fail("nothing is to be started"))
    left = children.Children.__new__(children.Children)
    left.device, left.level, left.spare, left.hung = CPU, LEVELS["quick"], None, ""
    tasks = [Task(TIME, "op", "triton"), Task(TIME, "op", "triton", "float16")]
    outcomes = list(left.run(tasks, time.monotonic() - 1))
    assert [x.verdict for x in outcomes] == [children.OUT_OF_TIME] * 2


# --------------------------------------------------------------------- dispatch, interpreted


@in_this_process
def test_in_the_interpreter(root, tmp_path):
    run_in_the_interpreter(root, __file__, CDETR_FAST_CACHE=str(tmp_path))


def norm_case():
    module = registry.cases("residual_layer_norm")
    return module.make(torch.float32, CPU, batch=1, rows=3, channels=16)


def norm_finding(**changes) -> Finding:
    calls = registry.operator("residual_layer_norm").classify(*norm_case().handed_on("torch"))
    fields = {"ms": 1.0, "torch_ms": 2.5, "label": "B=1", "date": "2026-11-26", "calls": calls}
    return Finding(
        "residual_layer_norm", "triton", "float32",
        **({"mode": FORWARD, "verdict": RIGHT} | fields | changes),
    )  # fmt: skip


@pytest.fixture
def go_by(monkeypatch):
    """Have a new process's state go by findings, in a record on disk."""

    def go_by(*findings):
        key = evidence.key(CPU)
        monkeypatch.setattr(evidence, "_FIXED", {})
        for name in registry.NAMES:
            registry.operator(name)._taken.clear()
        path = evidence.user_folder() / key.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Record(key, findings).to_json())
        return registry.operator("residual_layer_norm")

    yield go_by
    for name in registry.NAMES:
        registry.operator(name)._taken.clear()


@interpreted_only
def test_auto_takes_what_a_record_shows_right_and_fastest(go_by):
    case = norm_case()
    arguments = case.handed_on("torch")
    operator = go_by(norm_finding())
    assert operator.select(*arguments) == "triton"
    judge = accuracy.Judge(case, False)
    (error,) = judge.errors(judge.evaluate(case.function("auto")))
    assert error.passes(KERNELS_FACTOR)
    for worse in ({"torch_ms": 0.9}, {"verdict": "wrong"}, {"calls": (0,)}, {"ms": None}):
        assert go_by(norm_finding(**worse)).select(*arguments) == "torch", worse
    assert go_by().select(*arguments) == "torch"


@interpreted_only
def test_the_choice_is_fixed_at_the_first_call(go_by):
    arguments = norm_case().handed_on("torch")
    operator = go_by(norm_finding())
    assert operator.select(*arguments) == "triton"
    (evidence.user_folder() / evidence.key(CPU).file_name).write_text("")
    assert operator.select(*arguments) == "triton"
    assert evidence.is_fixed(CPU)


@interpreted_only
def test_a_path_by_name_needs_no_evidence(go_by):
    go_by(norm_finding(verdict="wrong"))
    case = norm_case()
    judge = accuracy.Judge(case, False)
    (error,) = judge.errors(judge.evaluate(case.function("triton")))
    assert error.passes(KERNELS_FACTOR)


@interpreted_only
def test_a_graph_has_one_path_for_all_sizes(go_by, monkeypatch):
    operator = go_by(norm_finding(), norm_finding(calls=(2**22,)))
    ran = []
    for name, implementation in list(operator.implementations.items()):

        def noted(*arguments, name=name, run=implementation.run):
            ran.append(name)
            return run(*arguments)

        monkeypatch.setitem(
            operator.implementations, name, dataclasses.replace(implementation, run=noted)
        )
    norm = cdetr_kernels.residual_layer_norm
    torch.compiler.reset()
    compiled = torch.compile(norm, fullgraph=True, backend="eager", dynamic=True)
    for rows in (2, 3, 5):
        x = torch.randn(2, rows, 16)
        got = compiled(x, x, x[0, 0], x[0, 1])
        torch.testing.assert_close(got, norm(x, x, x[0, 0], x[0, 1], backend="torch"))
    assert set(ran[:1]) == {"triton"}

    class Model(torch.nn.Module):
        def forward(self, x):
            return norm(x, x, x[0, 0], x[0, 1])

    rows = torch.export.Dim("rows", min=2, max=100000)
    exported = torch.export.export(
        Model(), (torch.randn(2, 5, 16),), dynamic_shapes={"x": {1: rows}}
    )
    targets = {str(node.target) for node in exported.graph.nodes}
    assert any("cdetr_fast.residual_layer_norm" in target for target in targets)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(exported.module()(x), Model()(x))


@interpreted_only
def test_info_shows_path_reason_figure_and_date(go_by):
    go_by(norm_finding(), norm_finding(calls=(0,), verdict="crashed", reason="SIGSEGV", ms=None))
    taken, crashed = registry.operator("residual_layer_norm").choices(CPU)
    assert (taken.path, taken.figure, taken.date) == (
        "triton", "1.0000 ms, 2.50 times as fast", "2026-11-26",
    )  # fmt: skip
    assert taken.calls == "float32 B=1, forward"
    assert (crashed.path, crashed.reason) == ("torch", "not triton: crashed (SIGSEGV)")
    assert not evidence.is_fixed(CPU)  # looking is not calling
    (other,) = registry.operator("sine_query").choices(CPU)
    assert (other.path, "makes a record" in other.reason) == ("torch", True)


@interpreted_only
def test_tiles_of_a_record_are_used(go_by, monkeypatch):
    from cdetr_kernels.gpu import launching

    query = torch.zeros(1, 2, 1, 32)
    go_by()
    assert launching.attention_tile("forward", query, query) == configurations._INTERPRETED
    few, many = (16, 64, 8, 1, 2, 4), (128, 64, 8, 1, 1, 8)
    tiles = {"ieee 32 forward": few, f"ieee 32 forward{configurations.MANY}": many}
    record = Record(evidence.key(CPU), (), tiles)
    monkeypatch.setattr(evidence, "_FIXED", {-1: Evidence(record, "")})
    assert launching.attention_tile("forward", query, query).choice == few
    other = launching.attention_tile("backward_keys", query, query)
    assert other == configurations._INTERPRETED
    rows = torch.zeros(2, 64, 1, 32)
    assert launching.attention_tile("forward", rows, query).choice == many
    # The kernel over keys goes by the rows of the keys.
    record.tiles[f"ieee 32 backward_keys{configurations.MANY}"] = few
    assert launching.attention_tile("backward_keys", rows, query) == configurations._INTERPRETED
    assert launching.attention_tile("backward_keys", query, rows).choice == few


@interpreted_only
def test_one_tile_is_checked_and_timed():
    key = tuning.Key("half", 32, "attention_map")
    task = Task("tile", key.operator, "triton", kernel=str(key), tile=(16, 32, 4, 1, 1, 8))
    found = tuning.run(task, CPU, 2, 0.0)
    assert found["verdict"] == RIGHT, found
    assert all(ms > 0 for ms in found["ms"].values())


@interpreted_only
@pytest.mark.parametrize("operator", ["conditional_attention", "conditional_attention_separable"])
@pytest.mark.parametrize(("fill", "depth"), [*tuning.PARTS, (1, 8)])
def test_keys_in_the_parts_that_are_tried(operator, fill, depth):
    """On a GPU of 132 multiprocessors, of which 2 programs leave most idle."""
    from cdetr_kernels.gpu import launching

    case = registry.cases(operator).make(
        torch.float32, "cpu", 1, 20, 9, 20, "padded", heads=1, size=16
    )
    kernel = f"{'separable_' * operator.endswith('separable')}forward"
    parts = configurations.parts
    made: list[int] = []

    def noted(*arguments):
        made.append(parts(*arguments))
        return made[-1]

    with (
        tuning.with_tile(kernel, Tile(16, 16, fill=fill, depth=depth)),
        tuning.replaced("parts", noted),
        mock.patch.object(launching, "multiprocessors", return_value=132),
    ):
        assert_accurate(case)
    tiles = 12 if operator == "conditional_attention" else 18  # 9 lines of 2 tiles
    assert set(made) == {1 if fill == 0 else max(1, tiles // depth)}


@interpreted_only
@pytest.mark.parametrize("operator", ["conditional_attention", "conditional_attention_separable"])
@pytest.mark.parametrize("options", [{"dropout_p": 0.3}, {"returns_map": True}], ids=str)
def test_calls_with_dropout_and_with_the_map(operator, options):
    """They are compared with fp64 too, and torch's side of the times draws its own weights."""
    sizes = {"batch": 2, "queries": 20, "height": 3, "width": 8, "heads": 1, "size": 16}
    task = Task(TIME, operator, "triton", "float32", sizes | {"mask": "padded"} | options, True)
    rows = checks.run(task, CPU, 2, 0.0)
    assert [(x["mode"], x["verdict"]) for x in rows] == [(FORWARD, RIGHT), (BACKWARD, RIGHT)], rows
    if "dropout_p" in options:
        case = registry.cases(operator).make(torch.float32, "cpu", **task.sizes)
        other = dataclasses.replace(case, options=case.options | {"seed": 2})
        with pytest.raises(checks.Rejected, match="wrong"):  # other weights are left out
            checks.measure(accuracy.Judge(other, False), "triton", 2, 0.0)


@interpreted_only
@pytest.mark.parametrize("operator", ["conditional_attention", "conditional_attention_separable"])
def test_tiles_of_128_rows(operator):
    case = registry.cases(operator).make(torch.float32, "cpu", 2, 130, 9, 16, "padded", heads=1)
    prefix = "separable_" * operator.endswith("separable")
    with contextlib.ExitStack() as stack:
        for name, tile in {
            "forward": Tile(128, 64, 8),
            "backward_queries": Tile(128, 32, 8),
            "backward_keys": Tile(32, 128, 8),
        }.items():
            stack.enter_context(tuning.with_tile(prefix + name, tile))
        assert_accurate(case)


# ------------------------------------------------------------------------------- the look-up


def test_the_look_up_costs_under_a_microsecond(monkeypatch):
    """Of attention, whose class has the most parts, beside what a call without evidence costs."""
    case = registry.cases("conditional_attention").make(torch.float32, CPU, 1, 2, 2, 2, heads=1)
    arguments = case.handed_on("torch")
    operator = registry.operator("conditional_attention")
    call = (True, torch.float32, operator.classify(*arguments))
    monkeypatch.setitem(operator._taken, -1, {call: "torch"})
    first = arguments[0]
    assert operator._by_evidence(first, arguments) == "torch"
    best = float("inf")
    for _ in range(200):
        start = time.thread_time_ns()
        for _ in range(50):
            operator._by_evidence(first, arguments)
        best = min(best, (time.thread_time_ns() - start) / 50)
    print(f"{best:.0f} ns")
    assert best < 2500  # on a slow machine; 1,000 on one of today


def test_one_line_a_process_without_a_record(monkeypatch, caplog):
    monkeypatch.setattr(evidence, "_SAID", set())
    known = Evidence(None, "there is no record of this device")
    for _ in range(3):
        dispatch._say_without_record(known, torch.device("cuda", 0))
    (line,) = caplog.messages
    assert "`cdetr-fast qualify`" in line
    dispatch._say_without_record(Evidence(Record(evidence.key(CPU)), ""), torch.device("cuda", 0))
    assert len(caplog.messages) == 1


def test_without_evidence_nothing_is_looked_up_on_a_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(evidence, "of", lambda _: pytest.fail("no evidence is needed"))
    operator = Operator(
        "op",
        {
            "triton": Implementation(lambda x: 1, evidence_on=("cuda", "cpu")),
            "torch": Implementation(lambda x: 2),
        },
    )
    assert operator("auto", torch.zeros(1)) == 2
    assert operator("triton", torch.zeros(1)) == 1
