"""Records of qualifications: their files, what is ignored and why, and what follows from them."""

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cdetr_kernels import evidence
from cdetr_kernels.evidence import BACKWARD, FORWARD, Evidence, Finding, Key, Record
from cdetr_kernels.qualification import store

KEY = Key("NVIDIA H100 80GB HBM3", "9.0", "570.86.15", "2.15.0", "3.9.0", "0123456789abcdef")
FINDING = Finding("op", "triton", "float32", (1, 512, True), FORWARD, "right", "", 1.0, 2.0, "B=1")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CDETR_FAST_CACHE", str(tmp_path))
    return tmp_path / "records"


def found(**changes) -> Finding:
    return dataclasses.replace(FINDING, **changes)


def test_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("CDETR_FAST_CACHE", str(tmp_path / "own"))
    assert evidence.user_folder() == tmp_path / "own" / "records"
    monkeypatch.delenv("CDETR_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert evidence.user_folder() == tmp_path / "xdg" / "cdetr_fast" / "records"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, as the standard says
    monkeypatch.setenv("HOME", str(tmp_path))
    assert evidence.user_folder() == tmp_path / ".cache" / "cdetr_fast" / "records"


def test_a_record_is_read_as_it_was_written(cache):
    record = Record(KEY, (FINDING, found(mode=BACKWARD)), {"half 32 forward": (64, 64, 4, 3, 1, 8)})
    path = store.write(record)
    assert path.parent == cache
    assert evidence.find(KEY) == (record, str(path))
    assert {x.suffix for x in cache.iterdir()} == {".json", ".lock"}


def test_the_operators_of_a_new_record_replace_their_findings_and_no_others(cache):
    first, second = (1, 2, 3, 4, 5, 6), (5, 6, 7, 8, 9, 10)
    general, separable = "half 32 forward", "half 32 separable_forward"
    other = found(operator="conditional_attention_separable")
    tiles = {general: first, "ieee 32 forward many": first, separable: first}
    store.write(Record(KEY, (found(operator="conditional_attention"), other), tiles))
    worse = found(operator="conditional_attention", verdict="wrong", dtype="float16")
    store.write(Record(KEY, (worse,), {general: second}))
    record, _ = evidence.find(KEY)
    # Without the other tile of the operator: nothing was found with it now.
    assert record == Record(KEY, (other, worse), {general: second, separable: first})


@pytest.mark.parametrize("field", [x.name for x in dataclasses.fields(Key)])
def test_a_record_with_another_key_is_ignored_with_the_difference(cache, field):
    path = store.write(Record(KEY, (FINDING,)))
    other = dataclasses.replace(KEY, **{field: "another"})
    record, reason = evidence.find(other)
    assert record is None
    if field == "device":  # not about this one at all
        assert reason == "there is no record of this device"
    else:
        assert f"{field} {getattr(KEY, field)} instead of another" in reason
        assert str(path) in reason
    # The same under the name that is looked for, as where files were copied.
    path.rename(cache / other.file_name)
    record, reason = evidence.find(other)
    assert record is None
    assert f"{field} {getattr(KEY, field)} instead of another" in reason


TEXT = Record(KEY, (FINDING,), {"half 32 forward": (64, 64, 4, 3, 1, 8)}).to_json()


@given(st.integers(0, len(TEXT) - 3))
def test_a_record_cut_short_anywhere_cannot_be_read(length):
    with pytest.raises(evidence.RecordError, match="cannot be read"):
        evidence.parse(TEXT[:length])


WRONG = {
    "another format": lambda x: x | {"format": evidence.FORMAT + 1},
    "no format": lambda x: {name: value for name, value in x.items() if name != "format"},
    "a list": lambda x: [x],
    "no dtype": lambda x: x | {"findings": [x["findings"][0] | {"dtype": "nn"}]},
    "no mode": lambda x: x | {"findings": [x["findings"][0] | {"mode": "sideways"}]},
    "a text as time": lambda x: x | {"findings": [x["findings"][0] | {"ms": "1"}]},
    "calls of lists": lambda x: x | {"findings": [x["findings"][0] | {"calls": [[1]]}]},
    "calls of nothing": lambda x: x | {"findings": [x["findings"][0] | {"calls": None}]},
    "unknown fields": lambda x: x | {"findings": [x["findings"][0] | {"more": 1}]},
    "a short tile": lambda x: x | {"tiles": {"half 32 forward": [64, 64]}},
    "another key": lambda x: x | {"key": {"device": "x"}},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_record_of_another_form_is_ignored(cache, change):
    cache.mkdir()
    content = change(json.loads(TEXT))
    (cache / KEY.file_name).write_text(json.dumps(content))
    record, reason = evidence.find(KEY)
    assert record is None
    assert "has format" in reason or "cannot be read" in reason
    # A new record replaces it.
    store.write(Record(KEY, (FINDING,)))
    assert evidence.find(KEY)[0] == Record(KEY, (FINDING,))


def test_bytes_and_folders_are_ignored(cache):
    cache.mkdir()
    (cache / KEY.file_name).write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in evidence.find(KEY)[1]
    (cache / KEY.file_name).unlink()
    (cache / KEY.file_name).mkdir()
    assert evidence.find(KEY)[0] is None


def _write_often(name: str) -> None:
    for _ in range(20):
        store.write(Record(KEY, (found(operator=name),)))


def test_two_processes_at_once_lose_nothing(cache):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_often, args=(name,)) for name in ("a", "b", "c")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    record, _ = evidence.find(KEY)
    assert sorted(x.operator for x in record.findings) == ["a", "b", "c"]
    assert not list(cache.glob("*.part"))
    assert not list(cache.glob(".*"))


def test_a_lock_that_is_held_is_waited_for_with_a_limit(tmp_path):
    path = tmp_path / "lock"
    with store.locked(path, 0.0) as held:
        assert held
        with store.locked(path, 0.2) as second:
            assert not second
    with store.locked(path, 0.0) as held:
        assert held


def test_a_lock_of_another_user_is_held_all_the_same(monkeypatch, tmp_path):
    path = tmp_path / "lock"
    path.touch()
    usual = Path.open

    def refused(self, mode="r", **options):
        if mode != "r":
            raise PermissionError(13, "Permission denied", str(self))
        return usual(self, mode, **options)

    monkeypatch.setattr(Path, "open", refused)
    with store.locked(path, 0.0) as held:
        assert held
        with store.locked(path, 0.0) as second:
            assert not second


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.setenv("CDETR_FAST_CACHE", "~nobody-of-this-name/cache")
    key = Key("A GPU", "9.0", "570", "2.15.0", "3.9.0", "0123456789abcdef")
    record, reason = evidence.find(key)
    assert record is None
    assert reason == "there is no home folder for records (CDETR_FAST_CACHE names another one)"
    assert store.unwritable_reason() == reason
    with pytest.raises(OSError, match="there is no home folder"):
        store.write(Record(key))


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CDETR_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="Not a directory"):
        store.write(Record(KEY, (FINDING,)))
    assert "cannot be written" in store.unwritable_reason()
    assert evidence.find(KEY)[0] is None


def test_a_full_disk_leaves_the_old_record_and_nothing_else(monkeypatch, cache):
    path = store.write(Record(KEY, (FINDING,)))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(Record(KEY, (found(verdict="wrong"),)))
    assert "No space left" in store.unwritable_reason()
    assert evidence.find(KEY)[0] == Record(KEY, (FINDING,))
    assert {x.name for x in cache.iterdir()} == {path.name, path.with_suffix(".lock").name}


def test_the_fastest_right_path_is_taken():
    findings = (
        found(path="a", ms=1.0),
        found(path="b", ms=0.5),
        found(path="c", ms=0.1, verdict="wrong"),
        found(path="a", calls=(2,), ms=2.5),  # slower than torch
        found(path="a", calls=(3,), ms=None, torch_ms=None),  # not timed
        found(path="a", calls=(4,), dtype="bfloat16", mode=BACKWARD),
        found(operator="other", calls=(5,)),
    )
    taken = Evidence(Record(KEY, findings), "").taken("op")
    assert {call: x.path for call, x in taken.items()} == {
        (False, torch.float32, (1, 512, True)): "b",
        (True, torch.bfloat16, (4,)): "a",
    }


def test_a_graph_has_a_path_that_is_right_for_all_calls_and_faster_overall():
    def constant(*findings):
        return Evidence(Record(KEY, findings), "").constant("op", torch.float32, False)

    quick, slow = found(ms=1.0, torch_ms=4.0), found(calls=(2,), ms=2.0, torch_ms=1.0)
    assert constant(quick, slow) == "triton"
    assert constant(slow) is None
    assert constant(quick, found(calls=(2,), verdict="wrong")) is None
    assert constant(quick, found(calls=(2,), dtype="float16", verdict="wrong")) == "triton"
    assert constant() is None
    assert Evidence(None, "").constant("op", torch.float32, False) is None


def test_versions_and_sources_of_this_installation():
    key = evidence.key(torch.device("cpu"))
    assert key.torch == str(torch.__version__)
    assert key.triton[0].isdigit() or key.triton == "-"
    assert len(key.sources) == 16
    assert key.device == "triton's interpreter"
    assert key.file_name.startswith("triton-s-interpreter-")
