"""Dispatch by the evidence of records, and the tiles in them, in triton's interpreter."""

import contextlib
import dataclasses
import time
from unittest import mock

import pytest
import torch
from support.interpreter import run_in_the_interpreter
from support.kernels import assert_accurate, in_this_process, interpreted_only

import cdetr_kernels
from cdetr_kernels import dispatch, evidence, registry
from cdetr_kernels.dispatch import Implementation, Operator
from cdetr_kernels.evidence import BACKWARD, FORWARD, RIGHT, Evidence, Finding, Record
from cdetr_kernels.gpu import configurations
from cdetr_kernels.gpu.tiles import Tile
from cdetr_kernels.qualification import checks, tuning
from cdetr_kernels.qualification.plan import TIME, Task
from cdetr_kernels.testing import accuracy
from cdetr_kernels.testing.accuracy import KERNELS_FACTOR

pytest.importorskip("triton")
CPU = torch.device("cpu")


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
